"""QKD: Quantization-aware Knowledge Distillation. Kim, Bhalgat, Lee, Patel, Kwak, 2019
(arXiv 1911.12491).

A network of few bits has little capacity left, and a teacher from the first step on takes more of
it. So the quantised student first studies alone, from labels, to a good start; then it and the
teacher, in full precision, learn from labels and from each other; at last the teacher stands still
and tutors. The intervals of the quantisers are learned along with the weights.

Needs: classification with labels; one teacher; a student of convolutions and linear layers.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from limbeck.errors import UserError
from limbeck.models.weights import Packs
from limbeck.report.verdict import said
from limbeck.systems.classification.kd import kd
from limbeck.training.bench import Bench
from limbeck.training.finding import Finding
from limbeck.training.method import Method, Phases
from limbeck.training.network import Network
from limbeck.training.phases import Fit, Training, Update
from limbeck.training.task import Answer, Batch, Terms, moved

Bits = Annotated[int, Field(ge=2, le=16)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Way = Literal["direct", "fixed"]
WAYS: dict[str, str] = {
    "baseline": "quantisation only",
    "direct": "fixed teacher from the start",
    "fixed": "self-study, then fixed teacher",
    "student": "QKD",
}
LEAST = 1e-5
"""No interval is used that is smaller."""


def quantise_weights(weights: Tensor, interval: Tensor, bits: int) -> Tensor:
    r"""Signed symmetric levels, :math:`2^k - 1` of them.

    .. math:: \bar W = I\,\mathrm{round}(n\,\mathrm{clip}(W / I, -1, 1)) / n, \qquad n = 2^{k-1} - 1

    Rounding has the derivative 1 (straight-through), all else its own.

    Args:
        weights: of any shape.
        interval: I, a scalar above 0.
        bits: k, at least 2.

    >>> quantise_weights(torch.tensor([-2.0, 0.2]), torch.tensor(1.0), 2).tolist()
    [-1.0, 0.0]
    """
    steps: int = 2 ** (bits - 1) - 1
    return interval * _rounded(steps * (weights / interval).clamp(-1, 1)) / steps


def quantise_inputs(inputs: Tensor, interval: Tensor, bits: int) -> Tensor:
    r"""Unsigned levels, :math:`2^k` of them, for what comes out of a ReLU.

    .. math:: \bar X = I\,\mathrm{round}(n\,\mathrm{clip}(X / I, 0, 1)) / n, \qquad n = 2^k - 1

    Args:
        inputs: of any shape.
        interval: I, a scalar above 0.
        bits: k, at least 1.

    >>> quantise_inputs(torch.tensor([-0.3, 2.0]), torch.tensor(1.0), 2).tolist()
    [0.0, 1.0]
    """
    steps: int = 2**bits - 1
    return interval * _rounded(steps * (inputs / interval).clamp(0, 1)) / steps


def _rounded(value: Tensor) -> Tensor:
    # Written so that the sum is the rounded value to the bit.
    return value.round().detach() + (value - value.detach())


def _positive(interval: Tensor) -> Tensor:
    """At least LEAST, with the derivative 1 so that an interval below it can come back."""
    return interval.clamp_min(LEAST).detach() + (interval - interval.detach())


class _Quantised(Packs):
    """What both kinds of layers share: full-precision weights, two intervals, and their bits."""

    weight: Tensor
    weight_interval: nn.Parameter
    input_interval: nn.Parameter
    signed: Tensor
    weight_bits: int
    input_bits: int

    def _equip(self, weight_bits: int, input_bits: int) -> None:
        self.weight_bits, self.input_bits = weight_bits, input_bits
        most = self.weight.detach().abs().max().clamp_min(LEAST)
        self.weight_interval = nn.Parameter(most)
        self.input_interval = nn.Parameter(torch.ones_like(most))
        self.register_buffer("signed", torch.zeros_like(most, dtype=torch.bool))

    def weights(self) -> Tensor:
        """The weights as they are used."""
        return quantise_weights(self.weight, _positive(self.weight_interval), self.weight_bits)

    def inputs(self, x: Tensor) -> Tensor:
        """The layer's input as it is used; the signed form where negative inputs were seen."""
        x, interval = x.to(self.weight.dtype), _positive(self.input_interval)
        with_sign = quantise_weights(x, interval, self.input_bits)
        return torch.where(self.signed, with_sign, quantise_inputs(x, interval, self.input_bits))

    def pack(self, state: dict[str, Tensor], prefix: str) -> None:
        """A level r of k bits is stored as r + 2^(k-1) - 1, bit after bit from a byte's highest."""
        name, bits, steps = f"{prefix}weight", self.weight_bits, 2 ** (self.weight_bits - 1) - 1
        interval = _positive(state[f"{prefix}weight_interval"])
        levels = (steps * (state[name] / interval).clamp(-1, 1)).round().long() + steps
        digits = (levels.flatten()[:, None] >> torch.arange(bits - 1, -1, -1)) & 1
        state[name] = torch.from_numpy(np.packbits(digits.to(torch.uint8).numpy().reshape(-1)))

    def unpack(self, state: dict[str, Tensor], prefix: str) -> None:
        """Levels times interval over their number, as :func:`quantise_weights` gives them."""
        name, interval = f"{prefix}weight", state.get(f"{prefix}weight_interval")
        found, bits, number = state.get(name), self.weight_bits, self.weight.numel()
        if found is None or found.dtype != torch.uint8 or interval is None:
            return
        if found.shape != (-(-number * bits // 8),):
            raise UserError(f"{name} is not stored as {number:,} weights of {bits} bits")
        digits = np.unpackbits(found.numpy(), count=number * bits).reshape(number, bits)
        steps = 2 ** (bits - 1) - 1
        levels = digits.astype(np.int64) @ 2 ** np.arange(bits - 1, -1, -1) - steps
        whole = torch.from_numpy(levels).to(interval.dtype).view(self.weight.shape)
        state[name] = _positive(interval) * whole / steps


class QuantisedConv2d(nn.Conv2d, _Quantised):
    """A convolution of quantised weights and inputs, under the names of a plain one's weights."""

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self._conv_forward(self.inputs(x), self.weights(), self.bias)
        return found


class QuantisedLinear(nn.Linear, _Quantised):
    """A linear layer of quantised weights and inputs."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.inputs(x), self.weights(), self.bias)


KINDS: dict[type[nn.Module], type[_Quantised]] = {
    nn.Conv2d: QuantisedConv2d,
    nn.Linear: QuantisedLinear,
}


def quantised(model: nn.Module, weights: int, inputs: int, edges: int = 8) -> nn.Module:
    """A copy of a model whose convolutions and linear layers are quantised.

    Args:
        model: any module; weights are kept in full precision, under their names.
        weights, inputs: bits of each layer's weights and inputs.
        edges: bits of both in the first and the last such layer; 32 leaves these as they are.

    Raises:
        UserError: there is nothing to quantise.

    >>> model = quantised(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), 4, 4)
    >>> [layer.weight_bits for layer in model]
    [8, 8]
    """
    model = copy.deepcopy(model)
    found = [(path, m) for path, m in model.named_modules() if type(m) in KINDS and path]
    if not found:
        raise UserError(
            f"{type(model).__name__} has no plain convolution or linear layer to quantise; choose "
            "a student in full precision that has"
        )
    for path, layer in found:
        edge = path in (found[0][0], found[-1][0])
        if edge and edges == 32:
            continue
        # Of the same class but for its forward, a layer keeps its weights' memory format and hooks.
        layer.__class__ = KINDS[type(layer)]
        assert isinstance(layer, _Quantised)
        layer._equip(edges if edge else weights, edges if edge else inputs)
    return model


def layers(model: nn.Module) -> dict[str, _Quantised]:
    """The quantised layers of a model by path."""
    return {path: m for path, m in model.named_modules() if isinstance(m, _Quantised)}


@torch.no_grad()
def calibrate(model: nn.Module, run: Callable[[], Any], least_error: bool = False) -> None:
    """Set the intervals from weights and from the layers' inputs during ``run``, in eval mode.

    Args:
        run: runs the model on some batches.
        least_error: the interval, of twenty up to the maximum, whose squared error is least,
            instead of the maximum itself.
    """
    found = layers(model)

    def see(layer: nn.Module, given: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, _Quantised)
        x = given[0]
        layer.signed.fill_(bool((x < 0).any()))
        quantise = quantise_weights if layer.signed else quantise_inputs
        best = _interval(x, quantise, layer.input_bits, least_error)
        layer.input_interval.copy_(best)
        weights = layer.weight
        layer.weight_interval.copy_(
            _interval(weights, quantise_weights, layer.weight_bits, least_error)
        )

    hooks = [layer.register_forward_pre_hook(see) for layer in found.values()]
    was_training = model.training
    try:
        model.eval()
        run()
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()


def _interval(
    x: Tensor, quantise: Callable[[Tensor, Tensor, int], Tensor], bits: int, least_error: bool
) -> Tensor:
    most = x.abs().max().clamp_min(LEAST)
    if not least_error:
        return most
    tried = [most * part / 20 for part in range(1, 21)]
    errors = torch.stack([(quantise(x, i, bits) - x).square().mean() for i in tried])
    return tried[int(errors.argmin())]


def size_in_bits(model: nn.Module) -> int:
    """Weights by their bits; all other parameters and statistics, intervals too, by 32.

    >>> size_in_bits(nn.Linear(4, 2)), size_in_bits(quantised(nn.Sequential(nn.Linear(4, 2)), 2, 2))
    (320, 192)
    """
    bits = {id(layer.weight): layer.weight_bits for layer in layers(model).values()}
    tensors = [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]
    return sum(t.numel() * bits.get(id(t), 32) for t in tensors)


def network(name: str, classes: int, channels: int, size: tuple[int, int]) -> nn.Module:
    """``qkd-wKaK-NAME``: one of Limbeck's own networks, quantised; ``wKaKeK`` for the edges' bits.

    Raises:
        UserError: the name is no such one.
    """
    from limbeck.models import zoo

    match = re.fullmatch(r"qkd-w(\d+)a(\d+)(?:e(\d+))?-(?!qkd)(.+)", name)
    bits = [int(k) for k in match.groups("8")[:3]] if match else []
    if not match or not all(2 <= k <= 16 or (k == 32 and n == 2) for n, k in enumerate(bits)):
        raise UserError(
            f"{name!r} names no quantised network; qkd-w4a4-resnet20 has 4 bits (2 to 16) for "
            "weights and inputs, and qkd-w4a4e32-resnet20 leaves the first and the last layer"
        )
    return quantised(zoo.make(match[4], classes, channels, size), *bits)


class _Weights(nn.Module):
    """A network of whose parameters the optimiser gets all but the intervals."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        for name, parameter in self.network.named_parameters(recurse=recurse):
            if name.rpartition(".")[2] not in ("weight_interval", "input_interval"):
                yield parameter


class QKD(Method):
    """A quantised student studies alone, then with its teacher, then is tutored.

    For each seed the student is trained in full precision first; from there each way goes on with
    the student's epochs, cosine by phase.

    Args:
        weights, inputs: bits of weights and of layers' inputs.
        edges: bits of the first and the last layer; 32 leaves them in full precision.
        shares: parts of the epochs for self-study, co-study and tutoring.
        temperature: tau of the soft answers.
        weight, label_weight: of the soft answers and of the labels, for both networks.
        weight_rate, input_rate: learning rates of the intervals.
        teacher_rate: the teacher's in co-study; the student's if not given.
        start: intervals begin at the ``maximum``, or where the squared ``error`` is least.
        pretraining: of the student in full precision; 0 epochs for one that has its weights.
        rivals: what else is tried with as many epochs: ``direct``, a fixed teacher from the start;
            ``fixed``, one that tutors after self-study.
    """

    tasks = ("classification",)
    roles: Mapping[str, str] = {"baseline": "quantisation only", "student": "QKD"}

    def __init__(
        self,
        weights: Bits = 4,
        inputs: Bits = 4,
        edges: Bits | Literal[32] = 8,
        shares: tuple[int, int, int] = (30, 100, 70),
        temperature: Rate = 2.0,
        weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0,
        label_weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0,
        weight_rate: Rate = 1e-4,
        input_rate: Rate = 1e-2,
        teacher_rate: Rate | None = None,
        start: Literal["maximum", "error"] = "maximum",
        pretraining: Training = Training(),  # noqa: B008
        rivals: tuple[Way, ...] = ("direct", "fixed"),
    ) -> None:
        super().__init__()
        if min(shares) < 0 or not sum(shares):
            raise UserError(f"shares are parts of the epochs, none below 0, not {list(shares)}")
        self.weights, self.inputs, self.edges = weights, inputs, edges
        self.shares = shares
        self.temperature = temperature
        self.weight = weight
        self.label_weight = label_weight
        self.weight_rate, self.input_rate = weight_rate, input_rate
        self.teacher_rate = teacher_rate
        self.start = start
        self.pretraining = pretraining
        self.rivals = rivals
        self.ways: dict[tuple[str, int], Network] = {}

    def terms(self, student: Answer, teacher: Answer, batch: Batch) -> Terms:
        loss = kd(student["logits"], teacher["logits"], self.temperature)
        return {"soft answers": self.weight * loss}

    def rehearse(self, bench: Bench) -> None:
        if len(bench.candidates) != 1:
            raise UserError(
                f"QKD co-studies with one teacher, not {len(bench.candidates)}; name one with "
                "--teacher"
            )
        sample = bench.sample()
        if not bench.task.labelled(sample):
            raise UserError("QKD's student studies from labels first; give labelled data")
        if bench.rival is not None:
            raise UserError(
                "QKD is compared with its own student, quantised and trained on labels alone; "
                "leave the baseline out of the recipe"
            )
        super().rehearse(bench)
        self._quantised(bench, bench.laid_out(bench.make_student(bench.seeds[0])))

    def epochs(self, total: int) -> tuple[int, int, int]:
        """How many epochs each of the three phases has.

        >>> QKD(shares=(2, 6, 4)).epochs(6)
        (1, 3, 2)
        """
        alone = round(total * self.shares[0] / sum(self.shares))
        both = round(total * (self.shares[0] + self.shares[1]) / sum(self.shares))
        return alone, both - alone, total - both

    def phases(self, bench: Bench) -> Phases:
        yield from bench.teach()
        for seed in bench.seeds:
            yield from self._seed(bench, seed)

    def _seed(self, bench: Bench, seed: int) -> Phases:
        full = bench.laid_out(bench.make_student(seed))
        if self.pretraining.epochs:
            yield bench.fit(bench.label("pretrained", seed), full, self.pretraining, seed=seed)
        self.ways["full", seed] = full
        alone, both, last = self.epochs(bench.training.epochs)
        fixed = bench.teacher

        def tutored(student: Network, teacher: nn.Module | None) -> Callable[[Batch], Terms]:
            def terms(batch: Batch) -> Terms:
                answer = bench.task.run(student, batch)
                found = {"labels": self.label_weight * bench.task.loss(answer, batch)}
                if teacher is not None:
                    found |= self.terms(answer, teacher(bench.task, batch), batch)
                return found

            return terms

        if bench.baseline:
            plain = self._quantised(bench, full)
            yield self._fit(
                bench, "baseline", seed, plain, tutored(plain, None), alone + both + last
            )
            self.ways["baseline", seed] = bench.baselines[seed] = plain
        if "direct" in self.rivals:
            direct = self._quantised(bench, full)
            terms = tutored(direct, fixed)
            yield self._fit(bench, "direct", seed, direct, terms, alone + both + last)
            self.ways["direct", seed] = direct
        student = self._quantised(bench, full)
        yield self._fit(bench, "self-study", seed, student, tutored(student, None), alone)
        if "fixed" in self.rivals:
            other = copy.deepcopy(student)
            yield self._fit(bench, "fixed", seed, other, tutored(other, fixed), both + last)
            self.ways["fixed", seed] = other
        teacher = copy.deepcopy(bench.candidates[0].network).requires_grad_(True)
        yield self._fit(
            bench, "co-study", seed, student, self._together(bench, student, teacher), both, teacher
        )
        self.ways["teacher", seed] = teacher
        terms = tutored(student, bench.frozen([teacher], None))
        yield self._fit(bench, "student", seed, student, terms, last)
        self.ways["student", seed] = bench.students[seed] = student

    def _together(
        self, bench: Bench, student: Network, teacher: Network
    ) -> Callable[[Batch], Terms]:
        """Both networks' losses from one pass of each; neither reaches the other's weights."""

        def terms(batch: Batch) -> Terms:
            mine, theirs = bench.task.run(student, batch), bench.task.run(teacher, batch)
            back = self.terms(theirs, _detached(mine), batch)["soft answers"]
            return {
                "labels": self.label_weight * bench.task.loss(mine, batch),
                **self.terms(mine, _detached(theirs), batch),
                "teacher's labels": self.label_weight * bench.task.loss(theirs, batch),
                "teacher's soft answers": back,
            }

        return terms

    def _quantised(self, bench: Bench, full: Network) -> Network:
        found = copy.deepcopy(full)
        found.model = quantised(full.model, self.weights, self.inputs, self.edges)
        edges = "" if self.edges == 8 else f"e{self.edges}"
        # A library's network has no name under which its quantised form could be built again.
        own = full.name and ":" not in full.name
        found.name = f"qkd-w{self.weights}a{self.inputs}{edges}-{full.name}" if own else ""
        first = next(bench.batches(bench.training.batch_size, bench.seeds[0]).epoch(0))
        sample = moved(first, bench.device)
        calibrate(found, lambda: bench.task.run(found, sample), self.start == "error")
        found.compile_model(bench.engine.compile)
        return found

    def _fit(
        self,
        bench: Bench,
        name: str,
        seed: int,
        student: Network,
        terms: Callable[[Batch], Terms],
        epochs: int,
        teacher: Network | None = None,
    ) -> Fit:
        """One phase, with rates of their own for the weights and both sorts of intervals."""
        whole = bench.training
        settings = whole.stretched(epochs / max(whole.epochs, 1)).model_copy(
            update={"epochs": epochs}
        )
        found = layers(student).values()
        # The audit weighs terms by the gradient at what is called the student, or at everything.
        train: dict[str, nn.Module] = {
            "student" if teacher is None else "weights": _Weights(student),
            "weight intervals": nn.ParameterList(layer.weight_interval for layer in found),
            "input intervals": nn.ParameterList(layer.input_interval for layer in found),
        }
        free = settings.model_copy(update={"weight_decay": 0.0})
        rates = {
            "weight intervals": free.model_copy(update={"lr": self.weight_rate}),
            "input intervals": free.model_copy(update={"lr": self.input_rate}),
        }
        if teacher is not None:
            train["teacher"] = teacher
            rates["teacher"] = settings.model_copy(update={"lr": self.teacher_rate or settings.lr})
        return Fit(
            name=bench.label(name, seed),
            seed=seed,
            updates=[Update(train=train, terms=terms, settings=settings, settings_for=rates)],
            batches=bench.batches(settings.batch_size, seed),
            epochs=epochs,
            evaluate=bench.watch(student),
            select=bench.select,
            higher_is_better=bench.task.higher_is_better,
        )

    def findings(self, bench: Bench, metrics: Sequence[Mapping[str, Any]]) -> list[Finding]:
        """All ways, the gap to full precision, the teacher before and after, and sizes."""

        def measured(way: str) -> list[float]:
            every = [self.ways[way, seed] for seed in bench.seeds]
            return [bench.task.measure(n, bench.test)[bench.task.metric] for n in every]

        full = measured("full")
        first = self.ways["full", bench.seeds[0]].model
        rows = [["way", bench.task.metric, "less than full precision", "bits"]]
        rows.append(["student in full precision", said(full), "", f"{size_in_bits(first):,}"])
        for way, called in WAYS.items():
            if (way, bench.seeds[0]) in self.ways:
                found = measured(way)
                gaps = [a - b for a, b in zip(full, found, strict=True)]
                size = size_in_bits(self.ways[way, bench.seeds[0]].model)
                rows.append([called, said(found), said(gaps), f"{size:,}"])
        before = bench.task.measure(bench.candidates[0].network, bench.test)[bench.task.metric]
        teachers = [
            ["teacher", bench.task.metric],
            ["before co-study", said([before])],
            ["after co-study", said(measured("teacher"))],
        ]
        caption = (
            "On the test split. Every way begins with the same student in full precision and has "
            "as many epochs. Weights count by their bits, all else by 32."
        )
        told = "The teacher is another network after it has studied with the student."
        return [Finding("Few bits", caption, rows), Finding("The teacher", told, teachers)]


def _detached(answer: Answer) -> Answer:
    return Answer({name: t.detach() for name, t in answer.outputs.items()}, {})
