"""MobileNets: Efficient Convolutional Neural Networks for Mobile Vision Applications. Howard, Zhu,
Chen, Kalenichenko, Wang, Weyand, Andreetto, Adam, 2017 (arXiv 1704.04861).

A 3x3 convolution is parted in two: one filter for each channel, and a 1x1 convolution that mixes
the channels. That costs 8 to 9 times less and loses about a point of accuracy on ImageNet. A width
multiplier alpha thins all layers alike, a resolution multiplier rho shrinks the images.

The paper distils in two experiments. Attributes of faces (section 4.6): the student learns a large
model's probabilities for each attribute, on images without labels. Embeddings of faces (section
4.7): the student regresses the vectors of FaceNet.

Needs: for attributes, the task of that name and a teacher with the same attributes; for
embeddings, a student and a teacher that each end in a linear layer, or the paths of their layers.
"""

from __future__ import annotations

import copy
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from limbeck.errors import UserError
from limbeck.models.head import last_linear
from limbeck.models.initialise import fan_out_normal
from limbeck.report.verdict import said
from limbeck.training.bench import Bench
from limbeck.training.finding import Chart, Finding
from limbeck.training.method import Method, Phases
from limbeck.training.network import Network
from limbeck.training.phases import Journal, Solve
from limbeck.training.taps import Taps
from limbeck.training.task import Answer, Batch, Terms
from limbeck.training.teacher import Teacher

ROWS = (
    ((64, 1),),
    ((128, 2), (128, 1)),
    ((256, 2), (256, 1)),
    ((512, 2), *((512, 1),) * 5),
    ((1024, 2), (1024, 1)),
)
"""Table 1 without its first row: channels and stride of each layer, by the resolution they put out.

The table prints stride 2 for the last layer too, where sizes and published costs only fit 1.
"""

RATES = (1e-1, 1e-2, 1e-3)
"""The false accept rates that embeddings are compared at."""
MOST = 4000
"""The samples whose pairs are compared, at most."""

Kind = Literal["separable", "full"]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


def channels_of(channels: int, alpha: float) -> int:
    """Section 3.3: a layer's channels at a width multiplier, at least 8.

    >>> channels_of(512, 0.75), channels_of(32, 0.1)
    (384, 8)
    """
    return max(int(channels * alpha), 8)


class Separable(nn.Sequential):
    """Section 3.1: a 3x3 filter for each channel, then a 1x1 convolution; batch norm, ReLU on each.

    >>> import torch
    >>> Separable(8, 12, stride=2)(torch.zeros(1, 8, 6, 6)).shape
    torch.Size([1, 12, 3, 3])
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__(
            OrderedDict(
                depthwise=_convolution(inputs, inputs, 3, stride, groups=inputs),
                pointwise=_convolution(inputs, outputs, 1),
            )
        )


def _convolution(
    inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


class MobileNet(nn.Module):
    """Table 1: a convolution, thirteen separable layers in five stages, a mean, a classifier.

    A stage holds the layers of one resolution. Convolutions start from N(0, 2 / fan-out), linear
    layers from PyTorch's default.

    Args:
        alpha: the width multiplier, above 0.
        classes: number of outputs.
        channels: of the images, (B, channels, H, W).
        stem_stride: 2 as published, 1 for small images.
        layers: ``separable``, or ``full`` 3x3 convolutions in their place (table 4).
        shallow: leave the five layers of 512 channels at stride 1 out (table 5).
        embedding: units of a linear layer before the classifier (section 4.7); 0 for none.

    Example:
        >>> import torch
        >>> MobileNet(0.25, classes=10, stem_stride=1)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    stages = ("stage1", "stage2", "stage3", "stage4", "stage5")

    def __init__(
        self,
        alpha: float,
        classes: int,
        channels: int = 3,
        stem_stride: int = 2,
        layers: Kind = "separable",
        shallow: bool = False,
        embedding: int = 0,
    ) -> None:
        super().__init__()
        width = channels_of(32, alpha)
        self.stem = _convolution(channels, width, 3, stem_stride)
        for stage, rows in zip(self.stages, ROWS, strict=True):
            kept = rows[:1] if shallow and len(rows) > 2 else rows
            made = []
            for outputs, stride in kept:
                inputs, width = width, channels_of(outputs, alpha)
                made.append(
                    Separable(inputs, width, stride)
                    if layers == "separable"
                    else _convolution(inputs, width, 3, stride)
                )
            self.add_module(stage, nn.Sequential(*made))
        self.embedding: nn.Module = nn.Identity()
        if embedding:
            self.embedding, width = nn.Linear(width, embedding), embedding
        self.fc = nn.Linear(width, classes)
        fan_out_normal(self)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) -> (B, classes)."""
        x = self.stem(x)
        for stage in self.stages:
            x = self.get_submodule(stage)(x)
        return self.fc(self.embedding(x.mean((2, 3))))  # type: ignore[no-any-return]


_NAME = re.compile(
    r"mobilenet-(?P<alpha>\d+(\.\d+)?)(?P<body>-shallow|-conv)?(?P<small>-cifar)?(-e(?P<units>\d+))?"
)


def network(name: str, classes: int, channels: int, size: tuple[int, int]) -> MobileNet:
    """``mobilenet-ALPHA``, with ``-shallow`` or ``-conv``, ``-cifar`` and ``-eUNITS`` behind it.

    Args:
        name: ``-shallow`` lacks five layers, ``-conv`` has full convolutions, ``-cifar`` a stem of
            stride 1, ``-e64`` a linear embedding of 64 before the classifier.
        classes: number of outputs.
        channels: of the images.
        size: height and width of the images in pixels.

    Raises:
        UserError: a name that is none of these, or images that are too small.

    >>> network("mobilenet-0.25-shallow-cifar-e64", 10, 1, (8, 8)).fc
    Linear(in_features=64, out_features=10, bias=True)
    """
    found = _NAME.fullmatch(name)
    if found is None or not 0 < float(found["alpha"]) <= 4 or found["units"] in ("0", "00"):
        raise UserError(
            f"there is no network named {name!r}; a MobileNet is mobilenet-ALPHA with a width "
            "multiplier above 0 and at most 4, then -shallow or -conv, -cifar, -eUNITS, each or "
            "none, as in mobilenet-0.5, mobilenet-1.0-shallow and mobilenet-0.25-cifar-e64"
        )
    small = found["small"] is not None
    least = 8 if small else 32
    if min(size) < least:
        raise UserError(
            f"{name} needs images of at least {least} x {least} pixels, not {size[0]} x {size[1]}"
            + ("" if small or min(size) < 8 else f"; {_small(found)} takes smaller ones")
        )
    return MobileNet(
        float(found["alpha"]),
        classes,
        channels,
        stem_stride=1 if small else 2,
        layers="full" if found["body"] == "-conv" else "separable",
        shallow=found["body"] == "-shallow",
        embedding=int(found["units"] or 0),
    )


def _small(found: re.Match[str]) -> str:
    """The name of the same network with the stem for small images."""
    units = f"-e{found['units']}" if found["units"] else ""
    return f"mobilenet-{found['alpha']}{found['body'] or ''}-cifar{units}"


def attribute_distillation(
    student_logits: Tensor, teacher_logits: Tensor, groups: Sequence[int] | None = None
) -> Tensor:
    r"""Section 4.6: the cross-entropy with the teacher's probabilities of each attribute.

    :math:`\frac{1}{A} \sum_a H(t_a, s_a)` with :math:`H(t, s) = -\sum_c t_c \log s_c`, mean over
    the batch. There is no term of labels and no temperature.

    Args:
        student_logits: (B, N).
        teacher_logits: (B, N); no gradient flows into them.
        groups: how many logits each attribute has, in order: of one logit the sigmoid says that
            the attribute is there, of several the softmax says which value it has. By default
            each logit is an attribute.

    Returns:
        A scalar at least 0, in float32 or better; the teacher's entropy where both agree.

    Raises:
        UserError: logits of different shapes, or groups that do not add up to them.

    >>> teacher = torch.tensor([[0.9, 0.5]]).logit()
    >>> attribute_distillation(torch.zeros(1, 2), teacher)
    tensor(0.6931)
    """
    if student_logits.shape != teacher_logits.shape or student_logits.ndim != 2:
        raise UserError(
            f"the student's logits have the shape {tuple(student_logits.shape)}, the teacher's "
            f"{tuple(teacher_logits.shape)}; both must be (B, N) and speak of the same attributes"
        )
    s = student_logits.to(torch.promote_types(student_logits.dtype, torch.float32))
    t = teacher_logits.detach().to(s.dtype)
    if groups is None:
        return F.binary_cross_entropy_with_logits(s, t.sigmoid())
    sizes = list(groups)
    if sum(sizes) != s.shape[1] or min(sizes, default=0) < 1:
        raise UserError(
            f"attributes with {sizes} logits make {sum(sizes)}, but there are {s.shape[1]}; name "
            "how many each attribute has, at least 1"
        )
    parts = zip(s.split(sizes, 1), t.split(sizes, 1), strict=True)
    return torch.stack([_cross_entropy(one, other) for one, other in parts]).mean()


def _cross_entropy(student: Tensor, teacher: Tensor) -> Tensor:
    """Of one attribute, (B, C), mean over the batch."""
    if student.shape[1] == 1:
        return F.binary_cross_entropy_with_logits(student, teacher.sigmoid())
    return F.cross_entropy(student, teacher.softmax(1))


def embedding_distillation(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Section 4.7: :math:`\|e_T - e_S\|^2`, summed over dimensions, mean over the batch.

    Args:
        student: (B, D).
        teacher: (B, D); no gradient flows into them.

    Returns:
        A scalar at least 0, in float32 or better.

    Raises:
        UserError: embeddings of different shapes.

    >>> embedding_distillation(torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]]))
    tensor(2.)
    """
    if student.shape != teacher.shape or student.ndim != 2:
        raise UserError(
            f"the student's embeddings have the shape {tuple(student.shape)}, the teacher's "
            f"{tuple(teacher.shape)}; both must be (B, D) with the same D"
        )
    s = student.to(torch.promote_types(student.dtype, torch.float32))
    return (s - teacher.detach().to(s.dtype)).square().sum(1).mean()


def verification(embeddings: Tensor, labels: Tensor, rates: Sequence[float]) -> list[float]:
    """How many pairs of one class are told to be one, at given rates of wrongly told others.

    All pairs of samples are compared by the squared distance of their unit vectors. At a rate of
    false accepts as many pairs of two classes are accepted, the nearest ones, as do not exceed it,
    and with them all nearer pairs of one class; their share is the true accept rate.

    Args:
        embeddings: (N, D).
        labels: (N,) int.
        rates: false accept rates, in [0, 1].

    Returns:
        The true accept rate (0..1) at each of them.

    Raises:
        UserError: no two samples are of one class, or none are of two.

    >>> corners = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [1.0, 0.9]])
    >>> verification(corners, torch.tensor([0, 0, 1, 1]), [0.0, 0.5])
    [0.5, 1.0]
    """
    units = F.normalize(embeddings.double(), dim=1)
    # The square keeps the order of distances, so it need not be taken.
    distances = torch.pdist(units)
    first, second = torch.triu_indices(len(labels), len(labels), 1)
    same = (labels[first] == labels[second]).to(distances.device)
    genuine, impostors = distances[same], distances[~same].sort().values
    if not len(genuine) or not len(impostors):
        raise UserError(
            "faces are verified on pairs of one class and on pairs of two; these samples have "
            + ("only pairs of one" if len(genuine) else "no two of one class")
        )
    found = []
    for rate in rates:
        # A product such as 0.29 * 100 may fall just short of what it stands for.
        accepted = int(rate * len(impostors) + 1e-9)
        if accepted >= len(impostors):
            found.append(1.0)
        else:
            found.append(float((genuine < impostors[accepted]).double().mean()))
    return found


class AttributeDistillation(Method):
    """Section 4.6: the student learns the teacher's probabilities of attributes.

    Args:
        weight: of the cross-entropy with the teacher's probabilities.
        label_weight: of the labels' cross-entropy; the paper has none.
    """

    tasks = ("attributes",)

    def __init__(self, weight: Weight = 1.0, label_weight: Weight = 0.0) -> None:
        super().__init__()
        self.weight = weight
        self.label_weight = label_weight

    def build(self, student: Answer, teacher: Answer, batch: Batch) -> None:
        attribute_distillation(student["logits"], teacher["logits"])

    def terms(self, student: Answer, teacher: Answer, batch: Batch) -> Terms:
        loss = attribute_distillation(student["logits"], teacher["logits"])
        return {"attributes": self.weight * loss}


class EmbeddingDistillation(Method):
    """Section 4.7: the student regresses the teacher's embeddings.

    An embedding is what a network's last linear layer takes in. Where the two are of one width,
    the student's last layer is the teacher's from the start, so that a student which never saw a
    label classifies by its embedding. Where they are not, a linear adapter turns the student's
    into the teacher's; afterwards the adapter and the teacher's last layer, which are one linear
    layer together, become the student's. A network with an embedding of its own, such as
    ``mobilenet-0.25-cifar-e64``, needs no adapter and delivers the teacher's embedding.

    Args:
        weight: of the squared distances.
        label_weight: of the labels' cross-entropy; the paper has none.
        student_layer, teacher_layer: tap paths of embeddings, (B, D); by default the input of the
            last linear layer.
        classifier: give the student the teacher's last layer. Otherwise labels alone train it.
    """

    tasks = ("classification",)
    teacher_outputs = False

    def __init__(
        self,
        weight: Weight = 1.0,
        label_weight: Weight = 0.0,
        student_layer: str = "",
        teacher_layer: str = "",
        classifier: bool = True,
    ) -> None:
        super().__init__()
        self.weight = weight
        self.label_weight = label_weight
        self.student_layer = student_layer
        self.teacher_layer = teacher_layer
        self.classifier = classifier
        # As Limbeck's own networks have it; a run looks at the networks that it has.
        self.student_taps = (student_layer or "fc:input",)
        self.teacher_taps = (teacher_layer or "fc:input",)
        self.adapter: nn.Module = nn.Identity()

    def build(self, student: Answer, teacher: Answer, batch: Batch) -> None:
        s, t = self._embeddings(student, teacher)
        for features, whose in ((s, "student"), (t, "teacher")):
            if features.ndim != 2:
                raise UserError(
                    f"what the {whose}'s tap gives has the shape {tuple(features.shape)}; an "
                    f"embedding is a vector for each sample, (B, D): name another {whose}_layer"
                )
        if s.shape[1] != t.shape[1]:
            self.adapter = nn.Linear(s.shape[1], t.shape[1])

    def terms(self, student: Answer, teacher: Answer, batch: Batch) -> Terms:
        s, t = self._embeddings(student, teacher)
        return {"embedding": self.weight * embedding_distillation(self.adapter(s), t)}

    def _embeddings(self, student: Answer, teacher: Answer) -> tuple[Tensor, Tensor]:
        return student.features[self.student_taps[0]], teacher.features[self.teacher_taps[0]]

    def tapping(self, student: Network, teacher: Network) -> EmbeddingDistillation:
        """A copy that taps where these two networks have their embeddings.

        Raises:
            UserError: a network without a linear layer, or a classifier that cannot be taken over.
        """
        own = copy.deepcopy(self)
        own.student_taps = (self.student_layer or _embedding(student.model, "student"),)
        own.teacher_taps = (self.teacher_layer or _embedding(teacher.model, "teacher"),)
        if not self.classifier:
            return own
        for network, path, whose in (
            (student, own.student_taps[0], "student"),
            (teacher, own.teacher_taps[0], "teacher"),
        ):
            if path != _embedding(network.model, whose):
                raise UserError(
                    f"the {whose}'s {path!r} is not what its last linear layer takes in, so the "
                    "teacher's classifier cannot become the student's; leave that layer out, or "
                    "set classifier to false and give labels a weight"
                )
        one, other = _classifier(student.model), _classifier(teacher.model)
        if one.out_features != other.out_features:
            raise UserError(
                f"the student's last layer puts out {one.out_features} numbers, the teacher's "
                f"{other.out_features}; both must speak of the same classes"
            )
        if one.bias is None and (other.bias is not None or one.in_features != other.in_features):
            raise UserError(
                "the student's last layer has no bias, which the teacher's classifier needs; set "
                "classifier to false and give labels a weight"
            )
        return own

    def rehearse(self, bench: Bench) -> None:
        if bench.candidates:
            student = bench.make_student(bench.seeds[0])
            own = self.tapping(student, bench.candidates[0].network)
        else:
            own = self
        bench.rehearse(own)

    def distil(self, bench: Bench, seed: int) -> Phases:
        assert bench.teacher is not None, "phases have it taught first"
        student, teacher = bench.student(seed), bench.teacher.networks[0]
        distiller = bench.distiller(student, self.tapping(student, teacher), seed)
        adapter = distiller.method.adapter
        if isinstance(adapter, nn.Linear):
            bench.voice.say(
                f"a linear adapter turns the student's {adapter.in_features} features into the "
                f"teacher's {adapter.out_features} and is left behind; a student with an embedding "
                f"of {adapter.out_features} would deliver the teacher's"
            )
        elif self.classifier:
            hand_over(teacher.model, student.model)
        yield self.fit(bench, seed, distiller, student=student, method=distiller.method)
        # What labels have trained stays.
        if isinstance(adapter, nn.Linear) and self.classifier and not self.label_weight:

            def classify(_: Journal) -> None:
                hand_over(teacher.model, student.model, adapter)

            name = bench.label("classifier", seed)
            yield Solve(name=name, seed=seed, run=classify, writes={"student": student})

    def findings(self, bench: Bench, metrics: Sequence[Mapping[str, Any]]) -> list[Finding]:
        """How well embeddings tell whether two test images are of one class."""
        grid = [10 ** (-3 + 3 * step / 24) for step in range(25)]
        found: dict[str, list[list[float]]] = {}
        lines: dict[str, list[tuple[float, float]]] = {}
        for seed in bench.seeds:
            for role, network in bench.delivered(seed).items():
                if role == "teacher" and role in found:
                    continue
                vectors, labels = self._embedded(bench, role, network)
                if not lines.get(role):
                    curve = verification(vectors, labels, grid)
                    lines[role] = [(-3 + 3 * n / 24, rate) for n, rate in enumerate(curve)]
                found.setdefault(role, []).append(verification(vectors, labels, RATES))
        names = {"baseline": "plain student", "student": "distilled student"}
        table = [["", *(f"at {rate:g} false accepts" for rate in RATES)]]
        for role, rows in found.items():
            table.append([names.get(role, role), *map(said, zip(*rows, strict=True))])
        caption = (
            "Share of pairs of test images of one class that are accepted as such where a given "
            "share of the pairs of two classes is accepted too, by the distance of their "
            "embeddings as unit vectors"
        )
        if len(bench.seeds) > 1:
            caption += "; ± is half the 95 % interval of the mean over the seeds"
        chart = Chart("Verification", "log10 of false accept rate", "true accept rate", lines)
        return [Finding("Verification by embedding", caption + ".", table=table, charts=[chart])]

    @torch.no_grad()
    def _embedded(
        self, bench: Bench, role: str, network: Network | Teacher
    ) -> tuple[Tensor, Tensor]:
        """Embeddings (N, D) and labels (N,) of at most :data:`MOST` test samples."""
        single = network.networks[0] if isinstance(network, Teacher) else network
        given = {"teacher": self.teacher_layer, "student": self.student_layer}.get(role, "")
        if role == "baseline" and bench.rival is None:
            given = self.student_layer
        path = given or _embedding(single.model, role)
        was_training = single.training
        single.eval()
        vectors: list[Tensor] = []
        labels: list[Tensor] = []
        with Taps(single.model, (path,)) as taps:
            for batch in bench.task.batches(bench.test, batch_size=256).epoch(0):
                batch["image"] = batch["image"].to(bench.device)
                vectors.append(bench.task.run(single, batch, taps).features[path].float().cpu())
                labels.append(batch["label"].cpu())
                if sum(map(len, labels)) >= MOST:
                    break
        single.train(was_training)
        return torch.cat(vectors)[:MOST], torch.cat(labels)[:MOST]


def hand_over(teacher: nn.Module, student: nn.Module, adapter: nn.Linear | None = None) -> None:
    """Make the teacher's last linear layer, behind an adapter if there is one, the student's."""
    theirs, own = _classifier(teacher), _classifier(student)
    with torch.no_grad():
        weight: Tensor = theirs.weight
        bias: Tensor | None = theirs.bias
        if adapter is not None:
            # W (A x + a) + b = (W A) x + (W a + b)
            shift = weight @ adapter.bias
            weight, bias = weight @ adapter.weight, shift if bias is None else shift + bias
        own.weight.copy_(weight)
        if own.bias is not None:
            own.bias.copy_(torch.zeros_like(own.bias) if bias is None else bias)


def _classifier(model: nn.Module) -> nn.Linear:
    found = last_linear(model)
    assert found is not None, "the rehearsal has seen to it"
    return found[1]


def _embedding(model: nn.Module, whose: str) -> str:
    """The tap path of what a model's last linear layer takes in."""
    found = last_linear(model)
    if found is None or not found[0]:
        raise UserError(
            f"{type(model).__name__} has no linear layer whose input could be the {whose}'s "
            f"embedding; name the path of one with {whose}_layer, and set classifier to false"
        )
    return f"{found[0]}:input"
