"""Feature Fusion for Online Mutual Knowledge Distillation. Kim, Hyun, Chung, Kwak, ICPR 2020
(arXiv 1904.09058, 2019).

Several sub-networks learn side by side; no teacher was trained before. A light module fuses their
last feature maps and classifies what it fused. What the sub-networks say together teaches the fused
classifier, and what that says teaches each of them, so that there are two things to deploy: one
sub-network, which costs what it always did, and the fused classifier.

Needs: labelled images; networks whose children run one after the other as far as their last feature
maps, as all of Limbeck's residual, wide, VGG, MobileNet and ShuffleNet networks do.
"""

from __future__ import annotations

import copy
import math
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from limbeck.catalogue import system
from limbeck.errors import UserError, did_you_mean
from limbeck.models import Input, build, zoo
from limbeck.models.initialise import fan_out_normal
from limbeck.report.verdict import mean_interval, said, verdict
from limbeck.training.bench import Bench
from limbeck.training.features import reduced
from limbeck.training.finding import Chart, Finding
from limbeck.training.method import Method, Phases
from limbeck.training.network import Network
from limbeck.training.phases import Fit, Update
from limbeck.training.profiling import stretch
from limbeck.training.seeding import derive
from limbeck.training.task import Answer, Batch, Batches, Terms

SHIFT = 1e-7
"""What the published code adds to each probability of a target."""

Taught = Literal["both", "fused", "branches", "nobody"]
WHO: Mapping[str, str] = {
    "both": "both",
    "fused": "the fused classifier",
    "branches": "the sub-networks",
    "nobody": "nobody",
}
"""Who is taught by the other side, in words."""


def ramp_up(epoch: float, length: float = 80.0) -> float:
    r"""The weight of what is taught at an epoch.

    .. math:: r(e) = \exp\left(-5 (1 - \min(e, E) / E)^2\right)

    Args:
        epoch: e, whole epochs that lie behind; 0 in the first.
        length: E, from which epoch on the weight is 1; 0 for no ramp.

    Returns:
        A number above 0 and at most 1.

    >>> round(ramp_up(0), 10), round(ramp_up(40), 10), ramp_up(80), ramp_up(3, length=0)
    (0.006737947, 0.2865047969, 1.0, 1.0)
    """
    if length <= 0:
        return 1.0
    return math.exp(-5 * (1 - min(epoch, length) / length) ** 2)


def shifted_kl(
    logits: Tensor, target: Tensor, temperature: float = 3.0, shift: float = SHIFT
) -> Tensor:
    r"""Divergence of a learner from a target that is shifted off zero, mean over the batch.

    .. math::
        \frac{T^2}{B} \sum_b \sum_i \tilde p_i \left(\log \tilde p_i - \log q_i\right), \qquad
        \tilde p = \mathrm{softmax}(b / T) + \epsilon, \quad q = \mathrm{softmax}(a / T)

    which is not normalised again, so its least value is about C epsilon T^2 and not 0.

    Args:
        logits: a, (B, C), of who learns.
        target: b, (B, C), of who teaches; no gradient flows into it.
        temperature: T, above 0.
        shift: epsilon, at least 0; without it this is the loss of plain soft targets.

    Returns:
        A scalar in nats times T^2, in float32 or better.

    Raises:
        UserError: shapes that differ, or a temperature that is not positive.

    >>> learner, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[math.log(3.0), 0.0]])
    >>> round(float(shifted_kl(learner, teacher, temperature=1.0, shift=0.0)), 7)
    0.1308121
    """
    if logits.shape != target.shape or logits.ndim != 2:
        raise UserError(
            f"the learner's logits have the shape {tuple(logits.shape)}, the target's "
            f"{tuple(target.shape)}; both must be (B, C) and equal"
        )
    if not 0 < temperature < math.inf:
        raise UserError(f"a temperature is a number above 0, not {temperature}")
    a = logits.to(torch.promote_types(logits.dtype, torch.float32))
    p = (target.detach().to(a) / temperature).softmax(1) + shift
    log_q = (a / temperature).log_softmax(1)
    return temperature**2 * F.kl_div(log_q, p, reduction="batchmean")


def mutual_distillation(
    branches: Sequence[Tensor], fused: Tensor, temperature: float = 3.0, shift: float = SHIFT
) -> tuple[Tensor, Tensor]:
    r"""What sub-networks and fused classifier learn from each other.

    .. math::
        \sum_k \mathrm{KL}_T(z_k \leftarrow z_f), \qquad
        \mathrm{KL}_T(z_f \leftarrow z_e), \quad z_e = \frac{1}{n} \sum_k z_k

    The first is a sum over the sub-networks, not a mean, and the ensemble is a mean of logits, not
    of probabilities. A target gets no gradient (:func:`shifted_kl`).

    Args:
        branches: z_k, (B, C) each, of the n sub-networks.
        fused: z_f, (B, C), of the fused classifier.
        temperature: T, above 0.
        shift: added to each probability of a target.

    Returns:
        What the sub-networks learn from and what the fused classifier does, two scalars.

    >>> one, two = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    >>> [round(float(term), 5) for term in mutual_distillation([one, two], one / 2 + two / 2)]
    [0.98202, 0.0]
    """
    to_branches = [shifted_kl(branch, fused, temperature, shift) for branch in branches]
    ensemble = torch.stack(list(branches)).mean(0)
    return torch.stack(to_branches).sum(), shifted_kl(fused, ensemble, temperature, shift)


class Fusion(nn.Module):
    """Makes one classifier of several sub-networks' last feature maps.

    A depthwise 3x3 convolution looks at each channel, a pointwise one mixes the channels of all;
    batch norm and ReLU follow each. Averages over the positions feed a linear layer. A sub-network
    with larger maps than the smallest gets a strided convolution in front, which brings them to its
    size.

    Args:
        channels: of each sub-network's maps.
        sizes: height and width of each sub-network's maps.
        classes: number of outputs.
        width: channels of the fused maps; by default those of the first sub-network.

    Example:
        >>> fusion = Fusion((64, 64), ((8, 8), (8, 8)), classes=100)
        >>> sum(p.numel() for p in fusion.parameters())
        16228
        >>> fusion([torch.zeros(2, 64, 8, 8)] * 2).shape
        torch.Size([2, 100])
    """

    def __init__(
        self,
        channels: Sequence[int],
        sizes: Sequence[tuple[int, int]],
        classes: int,
        width: int | None = None,
    ) -> None:
        super().__init__()
        total, width = sum(channels), width or channels[0]
        self.size = min(h for h, _ in sizes), min(w for _, w in sizes)
        self.regressors = nn.ModuleList(
            nn.Identity() if size == self.size else _regressor(number, size, self.size)
            for number, size in zip(channels, sizes, strict=True)
        )
        self.depthwise = nn.Sequential(
            nn.Conv2d(total, total, 3, padding=1, groups=total, bias=False),
            nn.BatchNorm2d(total),
            nn.ReLU(),
        )
        self.pointwise = nn.Sequential(
            nn.Conv2d(total, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.fc = nn.Linear(width, classes)
        fan_out_normal(self)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """(B, C_k, H_k, W_k) of each sub-network -> (B, classes)."""
        met = [
            reduced(regressor(x), self.size)
            for regressor, x in zip(self.regressors, maps, strict=True)
        ]
        x = self.pointwise(self.depthwise(torch.cat(met, 1)))
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


def _regressor(channels: int, size: tuple[int, int], wanted: tuple[int, int]) -> nn.Sequential:
    """A convolution with a stride that leaves maps of the wanted size, or hardly larger ones."""
    steps = size[0] // wanted[0], size[1] // wanted[1]
    kernel, padding = (2 * steps[0] - 1, 2 * steps[1] - 1), (steps[0] - 1, steps[1] - 1)
    conv = nn.Conv2d(channels, channels, kernel, steps, padding, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU())


@dataclass(frozen=True)
class Cut:
    """Where a network is taken apart.

    Attributes:
        names: its children, one after the other, as far as the one that puts out its last maps.
        below: how many of them lie below its last stage.
        channels, size: of the last maps.
    """

    names: tuple[str, ...]
    below: int
    channels: int
    size: tuple[int, int]


@torch.no_grad()
def find_cut(model: nn.Module, images: Tensor) -> Cut:
    """Find out where a network can be taken apart, by running its children on some images.

    The last maps are those that no layer without weights has shrunk: what is pooled, not the mean.
    The last stage is the last that ``model.stages`` names, or the last child with a convolution.

    Args:
        model: a network; its children run in their order, as far as its last maps.
        images: (B, C, H, W), as the network is fed them.

    Raises:
        UserError: it has no feature maps, or is not the chain of its children up to there.

    >>> find_cut(zoo.make("resnet8", 10, 3, (32, 32)), torch.zeros(1, 3, 32, 32))
    Cut(names=('stem', 'stage1', 'stage2', 'stage3'), below=3, channels=64, size=(8, 8))
    """
    was_training = model.training
    model.eval()
    try:
        names, maps = _chain(model, images)
        if not names:
            raise UserError(
                f"{type(model).__name__} puts out no feature maps, (B, C, H, W), that could be "
                "fused; choose a convolutional network"
            )
        body = nn.Sequential(*(model.get_submodule(name) for name in names))
        same = torch.allclose(above(model, names)(body(images)), model(images), rtol=1e-4)
    except (RuntimeError, TypeError, AttributeError):
        same = False
    finally:
        model.train(was_training)
    if not same:
        raise UserError(
            f"{type(model).__name__} cannot be taken apart at its last feature maps, as it does "
            "not run its children one after the other up to there; choose another network, such "
            "as resnet20"
        )
    height, width = maps.shape[2:]
    return Cut(tuple(names), _last_stage(model, names), maps.shape[1], (height, width))


def _chain(model: nn.Module, images: Tensor) -> tuple[list[str], Tensor]:
    """The children up to the last maps, and these."""
    tried, length, maps, x = [], 0, images, images
    for name, child in model.named_children():
        before = x.shape[2:]
        try:
            x = child(x)
        except (RuntimeError, TypeError):
            break  # what comes between is in the network's own forward
        if not isinstance(x, Tensor) or x.ndim != 4 or isinstance(child, nn.Linear):
            break
        tried.append(name)
        if x.shape[2:] == before or any(True for _ in child.parameters()):
            length, maps = len(tried), x
    return tried[:length], maps


def _last_stage(model: nn.Module, names: Sequence[str]) -> int:
    stages = [name for name in getattr(model, "stages", ()) if name in names]
    if stages:
        return names.index(stages[-1])
    convolutional = [
        number
        for number, name in enumerate(names)
        if any(isinstance(m, nn.Conv2d) for m in model.get_submodule(name).modules())
    ]
    return convolutional[-1] if convolutional else 0


def above(model: nn.Module, names: Sequence[str]) -> nn.Module:
    """The rest of a network above these children: the same layers, not copies.

    >>> rest = above(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), ["0"])
    >>> rest(torch.zeros(1, 3)).shape
    torch.Size([1, 2])
    """
    own = (*model.parameters(recurse=False), *model.buffers(recurse=False))
    kept: dict[int, Any] = {id(tensor): tensor for tensor in own}
    for name, child in model.named_children():
        kept[id(child)] = nn.Identity() if name in names else child
    return copy.deepcopy(model, kept)


class Branch(nn.Module):
    """What a sub-network has to itself: ``body`` makes its last maps, ``head`` logits of them."""

    def __init__(self, body: nn.Sequential, head: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.head = head

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the common layers put out -> last maps (B, C, H, W) and logits (B, classes)."""
        maps = self.body(x)
        return maps, self.head(maps)


class FusedNetwork(nn.Module):
    """Sub-networks and the module that fuses them; what it answers is the fused classifier's.

    Branches of one network share the layers below its last stage: those of the first model take the
    place of the others' in these models, which stay sub-networks that can be run alone. Whole
    networks, which may be of different make, share nothing.

    Args:
        models: the sub-networks, at least two.
        images: some of what they will be fed, (B, C, H, W), for the shapes.
        share: whether they share what lies below the last stage.
        width: channels of the fused maps; by default those of the first model's.

    Raises:
        UserError: a model that cannot be taken apart, or has nothing below its last stage.

    Example:
        >>> models = [zoo.make("resnet8", 10, 3, (32, 32)) for _ in range(2)]
        >>> fused = FusedNetwork(models, torch.zeros(1, 3, 32, 32), share=True)
        >>> fused(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
        >>> models[0].stage2 is models[1].stage2, models[0].stage3 is models[1].stage3
        (True, False)
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        images: Tensor,
        share: bool,
        width: int | None = None,
    ) -> None:
        super().__init__()
        cuts = [find_cut(model, images) for model in models]
        below = cuts[0].below if share else 0
        if share and not below:
            raise UserError(
                f"{type(models[0]).__name__} has nothing below its last stage that branches could "
                "share; set share to false"
            )
        common = {name: models[0].get_submodule(name) for name in cuts[0].names[:below]}
        self.shared = nn.Sequential(OrderedDict(common))
        for model in models[1:]:
            for name, module in common.items():
                setattr(model, name, module)
        self.branches = nn.ModuleList(
            Branch(
                nn.Sequential(OrderedDict((n, model.get_submodule(n)) for n in cut.names[below:])),
                above(model, cut.names),
            )
            for model, cut in zip(models, cuts, strict=True)
        )
        with torch.no_grad():
            _, logits = self.branches[0].eval()(self.shared.eval()(images))
        self.train()
        channels, sizes = [cut.channels for cut in cuts], [cut.size for cut in cuts]
        self.fusion = Fusion(channels, sizes, logits.shape[1], width)
        self.fusion.to(logits.device)

    def forward(self, x: Tensor) -> Tensor:
        """z_f: (B, C, H, W) -> (B, classes)."""
        x = self.shared(x)
        maps = [branch.body(x) for branch in self.branches if isinstance(branch, Branch)]
        return self.fusion(maps)  # type: ignore[no-any-return]


class Together(nn.Module):
    """All answers of a fused network at once, the fused classifier's last."""

    def __init__(self, fused: FusedNetwork) -> None:
        super().__init__()
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        """z_1, ..., z_n and z_f: (B, C, H, W) -> (n + 1, B, classes)."""
        x = self.fused.shared(x)
        maps, logits = zip(*(branch(x) for branch in self.fused.branches), strict=True)
        return torch.stack([*logits, self.fused.fusion(maps)])


class Ensemble(Together):
    """The mean of the sub-networks' logits."""

    def forward(self, x: Tensor) -> Tensor:
        """z_e: (B, C, H, W) -> (B, classes)."""
        return super().forward(x)[:-1].mean(0)


def network(name: str, classes: int, channels: int, size: tuple[int, int]) -> nn.Module:
    """A fused network of Limbeck's own networks.

    Args:
        name: ``ffl-Nx-NAME``, N branches of a network that share what lies below its last stage;
            ``ffl-NAME+NAME+...``, whole networks that share nothing. Behind it ``-wW`` for fused
            maps of W channels instead of the first one's number.
        classes: number of outputs.
        channels: of the images, (B, channels, H, W).
        size: height and width of the images in pixels.

    Raises:
        UserError: there is no such network, or it cannot be taken apart.

    Example:
        >>> fused = network("ffl-2x-resnet32", 100, 3, (32, 32))
        >>> sum(p.numel() for p in fused.fusion.parameters())
        16228
    """
    found = re.fullmatch(r"ffl-((?P<number>\d{1,2})x-)?(?P<names>.+?)(-w(?P<width>\d{1,5}))?", name)
    names = found["names"].split("+") if found else []
    number, width = (int(found[key] or 0) for key in ("number", "width")) if found else (0, 0)
    whole = number == 0 and len(names) > 1
    if (
        not (whole or (number > 1 and len(names) == 1))
        or (found and found["width"] and not width)
        or any(n.startswith("ffl") for n in names)
    ):
        known = system("ffl").networks
        raise UserError(f"there is no network named {name!r}; {did_you_mean(name, known)}")
    models = [zoo.make(n, classes, channels, size) for n in (names if whole else names * number)]
    # Anything but zeros, which many layers would leave as they are.
    images = torch.linspace(-1, 1, channels * size[0] * size[1]).view(1, channels, *size)
    return FusedNetwork(models, images, not whole, width or None)


def called(names: Sequence[str], share: bool, width: int | None) -> str:
    """The name under which :func:`network` makes a fused network, "" if it cannot.

    >>> called(["resnet8", "resnet8"], True, None), called(["resnet8", "wrn-16-1"], False, 32)
    ('ffl-2x-resnet8', 'ffl-resnet8+wrn-16-1-w32')
    """
    if not all(names) or any(mark in name for name in names for mark in ":@+"):
        return ""
    stem = f"{len(names)}x-{names[0]}" if share else "+".join(names)
    return f"ffl-{stem}" + (f"-w{width}" if width else "")


@dataclass(frozen=True)
class Team:
    """A fused network, and its sub-networks as networks that stand alone, with the same weights."""

    fused: Network
    subnetworks: tuple[Network, ...]

    @property
    def model(self) -> FusedNetwork:
        """The fused network's model."""
        assert isinstance(self.fused.model, FusedNetwork)
        return self.fused.model

    def view(self, kind: type[Together]) -> Network:
        """The same weights, answering otherwise."""
        return Network(kind(self.model), self.fused.input).lay_out(self.fused.memory_format)


@dataclass(frozen=True)
class Counted:
    """Batches that say which epoch they are of, for the ramp goes by epochs."""

    batches: Batches

    def __len__(self) -> int:
        return len(self.batches)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        for batch in self.batches.epoch(epoch, start):
            yield {**batch, "epoch": epoch}


class FFL(Method):
    """Sub-networks and the classifier that fuses them teach each other while they learn.

    For each seed there is one phase. It delivers the first sub-network, which starts from the
    weights of the plain network, as the student, and the fused classifier as ``fused``.

    Args:
        branches: n, how many sub-networks the student's network makes.
        share: they share what lies below the last stage; if false they are n whole networks.
        peers: networks by name that learn beside one whole student, in place of its branches; they
            share nothing.
        width: channels of the fused maps; by default those of the student's last ones.
        taught: who is taught by the other side: ``both``; the ``fused`` classifier by the ensemble
            alone; the ``branches`` by the fused classifier alone; ``nobody``, where labels are all
            there is.
        temperature: T.
        weight: of what is taught, beside the labels.
        ramp: the epoch from which on that weight is reached; 0 for no ramp.
        shift: what is added to each probability of a target; 0 leaves plain soft targets.
        fusion_decay: weight decay of the fusion module, which else is trained as the student is.
        rivals: what else is trained from the same weights for the table, as in ``taught``.
    """

    tasks = ("classification",)
    takes_teacher = False
    roles: Mapping[str, str] = {
        "baseline": "plain network",
        "student": "sub-network",
        "fused": "fused classifier",
    }

    def __init__(
        self,
        branches: Annotated[int, Field(ge=2, le=99)] = 2,
        share: bool = True,
        peers: tuple[str, ...] = (),
        width: Annotated[int, Field(ge=1)] | None = None,
        taught: Taught = "both",
        temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 3.0,
        weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0,
        ramp: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 80.0,
        shift: Annotated[float, Field(ge=0, le=1e-3)] = SHIFT,
        fusion_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1e-5,
        rivals: tuple[Taught, ...] = (),
    ) -> None:
        super().__init__()
        if taught in rivals:
            raise UserError(
                f"{taught!r} is what is tried and cannot be its own rival; leave it out of rivals"
            )
        self.branches = branches
        self.share = share and not peers
        self.peers = peers
        self.width = width
        self.taught: Taught = taught
        self.temperature = temperature
        self.weight = weight
        self.ramp = ramp
        self.shift = shift
        self.fusion_decay = fusion_decay
        self.rivals = tuple(dict.fromkeys(rivals))
        self.teams: dict[tuple[Taught, int], Team] = {}

    def rehearse(self, bench: Bench) -> None:
        self.check_task(bench.task)
        if bench.candidates:
            raise UserError(
                "FFL takes no teacher: its networks teach each other while they learn; leave "
                "--teacher out"
            )
        super().rehearse(bench)
        sample = bench.sample()
        if not bench.task.labelled(sample):
            raise UserError(
                "networks that teach each other from the start learn from labels too, which the "
                "students' images lack; give labelled ones"
            )
        team = self._team(bench, bench.seeds[0])
        self.terms_of(team.view(Together), bench, self.taught, sample)
        first, second, *_ = (network.state_dict() for network in team.subnetworks)
        if not self.peers and all(torch.equal(first[key], second[key]) for key in first):
            bench.voice.warn(
                "all sub-networks start from the same weights, so they will have little to teach "
                "each other; name the student, as in --student resnet14"
            )
        if self.taught != "nobody" and self.ramp > bench.training.epochs > 0:
            bench.voice.warn(
                f"the ramp of {self.ramp:g} epochs is longer than the training of "
                f"{bench.training.epochs}: what is taught never reaches its weight; set ramp to "
                "about a quarter of the epochs"
            )

    def phases(self, bench: Bench) -> Phases:
        self.teams = {}
        for seed in bench.seeds:
            yield from bench.plain(seed)
            team = self.teams[self.taught, seed] = self._team(bench, seed)
            bench.students[seed] = team.subnetworks[0]
            bench.deliver("fused", seed, team.fused)
            yield self._together(bench, seed, team, "student", self.taught)
            for taught in self.rivals:
                rival = self.teams[taught, seed] = self._team(bench, seed)
                yield self._together(bench, seed, rival, f"taught-{taught}", taught)

    def _team(self, bench: Bench, seed: int) -> Team:
        """Fresh networks of a seed, on the device."""
        with torch.random.fork_rng():
            networks = self._subnetworks(bench, seed)
            first = networks[0]
            view = bench.sample()["image"][:2]
            images = view if first.input is None else first.input(view)
            torch.manual_seed(derive(seed, len(networks)) >> 1)
            models = [network.model for network in networks]
            model = FusedNetwork(models, images, self.share, self.width)
        name = called([network.name for network in networks], self.share, self.width)
        fused = bench.laid_out(Network(model, first.input, name, first.classes))
        return Team(fused, tuple(network.lay_out(fused.memory_format) for network in networks))

    def _subnetworks(self, bench: Bench, seed: int) -> list[Network]:
        first = bench.make_student(seed).to(bench.device)
        others = range(1, len(self.peers) + 1 if self.peers else self.branches)
        seeds = [derive(seed, number) >> 1 for number in others]
        if not self.peers:
            return [first, *(bench.make_student(s).to(bench.device) for s in seeds)]
        if not isinstance(first.input, Input):
            raise UserError("peers by name need data by name; give it, or leave peers out")
        peers = [
            build(peer, first.classes, first.input, s).to(bench.device)
            for peer, s in zip(self.peers, seeds, strict=True)
        ]
        for peer in peers:
            if peer.input != first.input:
                raise UserError(
                    f"{peer.name} is fed {peer.input.describe()} in its own normalisation, which "
                    f"{first.name} is not; networks that are fused see the same, so choose others"
                    if isinstance(peer.input, Input)
                    else f"{peer.name} is not fed images"
                )
        return [first, *peers]

    def _together(self, bench: Bench, seed: int, team: Team, name: str, taught: Taught) -> Fit:
        """All of them learn at once; the fusion module has a weight decay of its own."""
        settings, model = bench.training, team.model
        together = team.view(Together)
        together.compile_model(bench.engine.compile)
        own = nn.ModuleDict({"shared": model.shared, "branches": model.branches})

        def terms(batch: Batch) -> Terms:
            return self.terms_of(together, bench, taught, batch)

        return Fit(
            name=bench.label(name, seed),
            seed=seed,
            updates=[
                Update(
                    train={"student": own, "fusion": model.fusion},
                    terms=terms,
                    settings=settings,
                    settings_for={
                        "fusion": settings.model_copy(update={"weight_decay": self.fusion_decay})
                    },
                )
            ],
            batches=Counted(bench.batches(settings.batch_size, seed)),
            epochs=settings.epochs,
            evaluate=self._watch(bench, team),
            select=bench.select,
            higher_is_better=bench.task.higher_is_better,
        )

    def terms_of(self, together: Network, bench: Bench, taught: Taught, batch: Batch) -> Terms:
        """The loss of a batch: labels for all, and what those learn that are taught.

        The feature maps are not detached, so what the fused classifier gets wrong trains the
        sub-networks below it too.
        """
        with stretch("student"):
            *branches, fused = together(batch["image"])
        with stretch("loss"):
            ours = [bench.task.loss(Answer({"logits": z}), batch) for z in branches]
            terms = {
                "labels": torch.stack(ours).sum(),
                "fused labels": bench.task.loss(Answer({"logits": fused}), batch),
            }
            scale = self.weight * ramp_up(batch.get("epoch", 0), self.ramp)
            if taught == "nobody" or not self.weight:
                return terms
            ours_from, fused_from = mutual_distillation(
                branches, fused, self.temperature, self.shift
            )
            if taught in ("both", "branches"):
                terms["from fused"] = scale * ours_from
            if taught in ("both", "fused"):
                terms["from ensemble"] = scale * fused_from
            return terms

    def _watch(self, bench: Bench, team: Team) -> Callable[[], dict[str, float]] | None:
        measure = bench.watch(team.subnetworks[0])
        if measure is None:
            return None

        def both() -> dict[str, float]:
            found = bench.task.measure(team.fused, bench.validation)
            return {**measure(), "fused": found[bench.task.metric]}

        return both

    def findings(self, bench: Bench, metrics: Sequence[Mapping[str, Any]]) -> list[Finding]:
        """Each network alone, all together and fused, against the plain one, on the test split."""

        def measured(network: Network) -> float:
            return bench.task.measure(network, bench.test)[bench.task.metric]

        plain = [measured(bench.baselines[s]) for s in bench.seeds if s in bench.baselines]
        ways: tuple[Taught, ...] = (self.taught, *self.rivals)
        found = {
            way: _accuracies([self.teams[way, s] for s in bench.seeds], measured) for way in ways
        }
        rows = [["taught", "network", bench.task.metric, "over the plain network, points"]]
        if plain:
            rows.append(["", self.roles["baseline"], said(plain, percent=True), ""])
        for way, networks in found.items():
            for name, values in networks.items():
                if way == self.taught or not name.startswith("sub-network"):
                    rows.append(
                        [WHO[way], name, said(values, percent=True), _difference(plain, values)]
                    )
        caption = "Accuracy on the test split; sub-network 1 is the one delivered."
        if len(bench.seeds) > 1:
            caption += " ± is half the 95 % interval over the seeds, as are the brackets."
        for way in self.rivals:
            for name in ("mean sub-network", "fused classifier"):
                words = (f"{name} with {WHO[way]} taught", f"one with {WHO[self.taught]} taught")
                sentence = verdict(found[way][name], found[self.taught][name], names=words).sentence
                caption += f" {sentence[:1].upper()}{sentence[1:]}."
        chart = _chart(bench, metrics)
        charts = [chart] if chart.lines else []
        return [Finding("Alone, together and fused", caption, rows, charts)]


def _accuracies(
    teams: Sequence[Team], measured: Callable[[Network], float]
) -> dict[str, list[float]]:
    """By network, one number a seed."""
    number = len(teams[0].subnetworks)
    alone = [[measured(network) for network in team.subnetworks] for team in teams]
    names = [
        f"sub-network {n + 1}" + (f" ({teams[0].subnetworks[n].name})" if different else "")
        for different in [len({network.name for network in teams[0].subnetworks}) > 1]
        for n in range(number)
    ]
    return {
        **{name: [values[n] for values in alone] for n, name in enumerate(names)},
        "mean sub-network": [sum(values) / number for values in alone],
        "ensemble of the logits": [measured(team.view(Ensemble)) for team in teams],
        "fused classifier": [measured(team.fused) for team in teams],
    }


def _chart(bench: Bench, metrics: Sequence[Mapping[str, Any]]) -> Chart:
    """How good the networks of the first seed were after each epoch."""
    metric, seed = bench.task.metric, bench.seeds[0]
    wanted = {
        "baseline": (bench.label("baseline", seed), metric),
        "student": (bench.label("student", seed), metric),
        "fused": (bench.label("student", seed), "fused"),
    }
    lines = {
        role: [
            (float(line["epoch"]), float(line["validation"][key]))
            for line in metrics
            if line["phase"] == phase and key in line.get("validation", {})
        ]
        for role, (phase, key) in wanted.items()
    }
    there = {role: points for role, points in lines.items() if points}
    return Chart(f"Validation data, seed {seed}", "epoch", metric, there)


def _difference(plain: Sequence[float], values: Sequence[float]) -> str:
    """By how many points of a hundred the values are above the plain ones, seed by seed."""
    if not plain:
        return ""
    mean, half = mean_interval([b - a for a, b in zip(plain, values, strict=True)])
    if half is None:
        return f"{100 * mean:+.2f}"
    return f"{100 * mean:+.2f} ({100 * (mean - half):+.2f} to {100 * (mean + half):+.2f})"
