"""Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate Shift.
Ioffe, Szegedy, ICML 2015.

What a layer is fed changes its distribution whenever the layers below it learn. Here each channel
is normalised with mean and variance of the mini-batch and then scaled and shifted by two learned
numbers, as part of the network, so that gradients know about it. Training then bears larger
learning rates, saturating units and careless initialisation. A finished network takes the
statistics of the population instead, and the layer is an affine map that can be folded into the
one before it (:mod:`limbeck.training.folding`).

Below lie Algorithm 1 with its derivatives, the layer, Algorithm 2's statistics, and the experiment
of section 4.1: a perceptron of sigmoids with and without the layer.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from limbeck.errors import UserError
from limbeck.training.finding import Chart, Finding
from limbeck.training.method import Phases, Supervised
from limbeck.training.network import Network
from limbeck.training.phases import Fit, Journal, Phase, Solve

if TYPE_CHECKING:
    from limbeck.training.bench import Bench

T = TypeVar("T")

STD = 0.1
"""Of the "small random Gaussian values" that weights start from; the paper does not say which."""


def batch_norm(
    x: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    r"""Normalise each channel over the mini-batch, then scale and shift it (Algorithm 1).

    Over the m values x_i of a channel, those of all samples and positions (section 3.2):

    .. math::
        \mu = \frac1m \sum_i x_i, \quad \sigma^2 = \frac1m \sum_i (x_i - \mu)^2, \quad
        \hat x_i = \frac{x_i - \mu}{\sqrt{\sigma^2 + \epsilon}}, \quad
        y_i = \gamma \hat x_i + \beta

    Args:
        x: (N, C, ...), floating point; worked out in float32 or better.
        gamma, beta: (C,); 1 and 0 if not given.
        eps: added to the variance, at least 0.

    Returns:
        Of the shape and dtype of ``x``; can be differentiated twice.

    >>> batch_norm(torch.tensor([[1.0], [3.0]]), eps=0.0).flatten()
    tensor([-1.,  1.])
    """
    y: Tensor = _Normalised.apply(x, gamma, beta, eps)[0]
    return y


class _Normalised(torch.autograd.Function):
    """Algorithm 1 and its derivatives; also gives the statistics, which carry no gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        mean, variance = moments(x)
        inverse = (variance + eps).rsqrt()
        # x is alive anyway, as what the layer before put out; its normalised form is not kept.
        ctx.save_for_backward(x, gamma, mean, inverse)
        ctx.eps, ctx.beta_dtype = eps, None if beta is None else beta.dtype
        ctx.mark_non_differentiable(mean, variance)
        y = (_exact(x) - _wide(mean, x)) * _wide(inverse, x)
        if gamma is not None:
            y = y * _wide(gamma, x)
        if beta is not None:
            y = y + _wide(beta, x)
        return y.to(x.dtype), mean, variance

    @staticmethod
    def backward(
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        """The equations of section 3, whose chain through mean and variance collapses to

        dl/dx = gamma / sqrt(var + eps) * (g - mean(g) - x_hat * mean(g * x_hat)), g = dl/dy,

        since the sum of x - mean, by which dl/dvar enters dl/dmean, is zero.
        """
        x, gamma, mean, inverse = ctx.saved_tensors
        if torch.is_grad_enabled():  # for a derivative of the derivative, which has to know them
            mean, variance = moments(x)
            inverse = (variance + ctx.eps).rsqrt()
        g = _exact(gradients[0])
        over = _others(x)
        normal = (_exact(x) - _wide(mean, x)) * _wide(inverse, x)
        d_gamma, d_beta = (g * normal).sum(over), g.sum(over)
        d_x = None
        if ctx.needs_input_grad[0]:
            m = x.numel() / x.shape[1]
            slope = inverse if gamma is None else inverse * gamma
            d_x = _wide(slope, x) * (g - _wide(d_beta / m, x) - normal * _wide(d_gamma / m, x))
            d_x = d_x.to(x.dtype)
        return (
            d_x,
            None if gamma is None else d_gamma.to(gamma.dtype),
            None if ctx.beta_dtype is None else d_beta.to(ctx.beta_dtype),
            None,
        )


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel of (N, C, ...): (C,) each, in float32 or better.

    >>> moments(torch.tensor([[1.0], [3.0]]))
    (tensor([2.]), tensor([1.]))
    """
    exact, over = _exact(x), _others(x)
    mean = exact.mean(over)
    return mean, (exact - _wide(mean, x)).square().mean(over)


def at_inference(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """The fixed affine map that a batch norm of a finished network is (Algorithm 2, line 11).

    y = gamma / sqrt(Var + eps) * x + (beta - gamma * E / sqrt(Var + eps)), with E and Var, (C,),
    those of the population; of the shape and dtype of ``x``, (N, C, ...).

    >>> statistics = torch.tensor([4.0]), torch.tensor([1.25])
    >>> at_inference(torch.tensor([[10.0]]), *statistics, torch.tensor([3.0]), eps=1.0)
    tensor([[12.]])
    """
    scale = (_exact(variance) + eps).rsqrt()
    if gamma is not None:
        scale = scale * gamma
    shift = -mean * scale
    if beta is not None:
        shift = shift + beta
    return (_exact(x) * _wide(scale, x) + _wide(shift, x)).to(x.dtype)


def _exact(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _others(x: Tensor) -> list[int]:
    """All dimensions but that of the channels."""
    return [d for d in range(x.ndim) if d != 1]


def _wide(channels: Tensor, x: Tensor) -> Tensor:
    """(C,) as (C, 1, ...), one number for a channel of ``x``."""
    return channels.view(-1, *[1] * (x.ndim - 2))


class BatchNorm(_BatchNorm):
    """The layer, for (N, C), (N, C, L) and (N, C, H, W): a channel is a unit or a feature map.

    Names and meaning of parameters and buffers are those of :class:`torch.nn.BatchNorm2d`, so that
    weights can be exchanged, and whatever looks for a batch norm finds this one; the arithmetic is
    the paper's. In training the running statistics move towards the batch's, r <- (1 - momentum) r
    + momentum s, where the variance is the unbiased one (section 3.1), while the batch itself is
    normalised with the biased one. The layer before needs no bias: beta is one (section 3.2).

    Args:
        features: C.
        eps: added to the variance, at least 0; the paper gives none.
        momentum: in [0, 1]; ``None`` for the plain average over all batches so far.
        affine: whether there are gamma (``weight``, from 1) and beta (``bias``, from 0).

    Raises:
        UserError: settings out of range; an input of another shape; in training, a single value a
            channel, which has no variance.

    Example:
        >>> layer = BatchNorm(1)
        >>> layer(torch.tensor([[1.0], [3.0]])).tolist()[1]
        [0.9999949932098389]
        >>> layer.running_mean, layer.running_var
        (tensor([0.2000]), tensor([1.1000]))
    """

    folds = True

    def __init__(
        self,
        features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
    ) -> None:
        if features < 1 or not 0 <= eps < math.inf or not 0 <= (momentum or 0) <= 1:
            raise UserError(
                "a batch norm has at least 1 feature, an eps of at least 0 and a momentum in "
                f"[0, 1] or None, not {features}, {eps} and {momentum}"
            )
        super().__init__(features, eps, momentum, affine)

    def forward(self, input: Tensor) -> Tensor:
        """(N, C), (N, C, L) or (N, C, H, W) -> the same."""
        shape = tuple(input.shape)
        if len(shape) not in (2, 3, 4) or shape[1] != self.num_features:
            raise UserError(
                f"this batch norm takes (N, C), (N, C, L) or (N, C, H, W) with C = "
                f"{self.num_features}, not {shape}"
            )
        if not self.training:
            assert self.running_mean is not None
            assert self.running_var is not None
            statistics = self.running_mean, self.running_var
            return at_inference(input, *statistics, self.weight, self.bias, self.eps)
        m = math.prod(shape) // self.num_features
        if m < 2:
            raise UserError(
                f"in training a batch norm needs more than one value a channel, which {shape} has "
                "not; give larger batches, or leave out a last one of a single sample"
            )
        y, mean, variance = _Normalised.apply(input, self.weight, self.bias, self.eps)
        if self.track_running_stats:
            self._follow(mean, variance * m / (m - 1))
        normalised: Tensor = y
        return normalised

    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        share = self.momentum
        if share is None:
            share = 1.0 / float(self.num_batches_tracked)
        for running, found in ((self.running_mean, mean), (self.running_var, variance)):
            running.mul_(1 - share).add_(found.to(running.dtype), alpha=share)


def population_statistics(
    model: nn.Module, batches: Iterable[Any], run: Callable[[Any], Any] | None = None
) -> int:
    r"""Set all batch norms' running statistics to those of a population (Algorithm 2, line 10).

    E[x] is the mean of the batches' means and Var[x] the mean of their unbiased variances, which
    for batches of one size m is :math:`\frac{m}{m-1} E[\sigma^2]`. While they are gathered, in one
    pass over the batches, batch norms normalise with the batch's own statistics, so each layer is
    fed what it was fed in training; all else (dropout) is as at inference. Modes are restored.

    Args:
        model: with batch norms of this module's or torch's that have running statistics.
        batches: what the model is called with, one mini-batch of training data each.
        run: how the model is run on a batch instead.

    Returns:
        The number of batches; ``num_batches_tracked`` is how many a layer saw of them.

    Raises:
        UserError: no batch, no batch norm with running statistics, one that a batch does not
            reach, or a single value a channel. The model is then as it was.

    >>> layer = BatchNorm(1)
    >>> population_statistics(layer, [torch.tensor([[1.0], [3.0]]), torch.tensor([[2.0], [6.0]])])
    2
    >>> layer.running_mean.item(), layer.running_var.item()
    (3.0, 5.0)
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    if not norms:
        raise UserError(f"{type(model).__name__} has no batch norm with running statistics")
    sums: dict[nn.Module, tuple[Tensor, Tensor, int]] = {}

    def gather(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0]
        m = x.numel() // x.shape[1]
        if m < 2:
            raise UserError(
                f"a batch of shape {tuple(x.shape)} has a single value a channel and so no "
                "variance; leave it out"
            )
        mean, variance = (t.to("cpu", torch.float64) for t in moments(x))
        variance = variance * m / (m - 1)
        means, variances, times = sums.get(norm, (0, 0, 0))
        sums[norm] = (means + mean, variances + variance, times + 1)

    modes = [(module, module.training) for module in model.modules()]
    hooks = [norm.register_forward_pre_hook(gather) for norm in norms]
    number = 0
    model.eval()
    try:
        for norm in norms:
            # In training mode without tracking: the running averages stay out of it.
            norm.train()
            norm.track_running_stats = False
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            for batch in batches:
                (run or model)(batch)
                number += 1
    finally:
        for hook in hooks:
            hook.remove()
        for norm in norms:
            norm.track_running_stats = True
        for module, mode in modes:
            module.training = mode
    if len(sums) < len(norms):
        raise UserError(
            f"{len(norms) - len(sums)} of {len(norms)} batch norms were not reached by "
            f"{number} batches; give batches that the whole model reads"
        )
    for norm in norms:
        means, variances, times = sums[norm]
        for buffer, total in ((norm.running_mean, means), (norm.running_var, variances)):
            assert buffer is not None
            buffer.copy_(total / times)
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.fill_(times)
    return number


class Binary(nn.Module):
    """1 where the input is above 0, which for a normalised image is above the data's mean grey.

    >>> Binary()(torch.tensor([-0.5, 0.0, 2.0]))
    tensor([0., 0., 1.])
    """

    def forward(self, x: Tensor) -> Tensor:
        return (x > 0).to(x.dtype)


class SigmoidMLP(nn.Sequential):
    """The network of section 4.1: a binary image, hidden layers z = g(BN(W u)) or g(W u + b).

    g is the sigmoid. Weights start from N(0, 0.1^2), biases from 0; of one seed, with and without
    batch norm, they are the same. A stage is a hidden layer of ``linear``, ``norm`` and
    ``sigmoid``.

    Args:
        inputs: numbers in one sample, channels x height x width.
        widths: units of the hidden layers.
        classes: number of outputs.
        normalised: with batch norm, and without biases before it.

    Example:
        >>> SigmoidMLP(64, (20, 20), classes=10)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self, inputs: int, widths: Sequence[int], classes: int, normalised: bool = True
    ) -> None:
        layers: OrderedDict[str, nn.Module] = OrderedDict(binary=Binary(), flatten=nn.Flatten())
        for number, width in enumerate(widths, start=1):
            parts: OrderedDict[str, nn.Module] = OrderedDict()
            parts["linear"] = _gaussian(inputs, width, bias=not normalised)
            if normalised:
                parts["norm"] = BatchNorm(width)
            parts["sigmoid"] = nn.Sigmoid()
            layers[f"stage{number}"] = nn.Sequential(parts)
            inputs = width
        layers["fc"] = _gaussian(inputs, classes)
        super().__init__(layers)
        self.stages = tuple(name for name in layers if name.startswith("stage"))


def _gaussian(inputs: int, outputs: int, bias: bool = True) -> nn.Linear:
    # Torch's own initialisation would draw for biases, and the two networks begin to differ.
    layer: nn.Linear = nn.utils.skip_init(nn.Linear, inputs, outputs, bias=bias)
    nn.init.normal_(layer.weight, std=STD)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def network(name: str, classes: int, channels: int, size: tuple[int, int]) -> nn.Module:
    """``batchnorm-H1-H2-...``, and the same ``-without`` batch norm, for images of any size.

    Raises:
        UserError: another name.
    """
    plain = name.removesuffix("-without")
    widths = plain.split("-")[1:]
    if not widths or not all(w.isdecimal() and int(w) for w in widths):
        raise UserError(
            f"{name} is no network of this paper: they are batchnorm-H1-H2-... with the units of "
            "each hidden layer, at least 1, as in batchnorm-100-100-100, and "
            "batchnorm-100-100-100-without"
        )
    inputs = channels * size[0] * size[1]
    return SigmoidMLP(inputs, [int(w) for w in widths], classes, normalised=plain == name)


class BatchNormalization(Supervised):
    """Two networks trained alike, with and without batch norm, watched as in section 4.1.

    After each epoch, beside accuracy, percentiles are taken of what one unit of the last sigmoid
    is fed over the validation images, as in Figure 1 (b, c).

    Args:
        percentiles: which, in order; the outer two are the spread.
        unit: which unit (or channel) of the last :class:`torch.nn.Sigmoid`, from 0.
        population: at the end, put the population's statistics over one epoch of training batches
            (Algorithm 2) in the place of the student's running averages.
    """

    tasks = ("classification",)

    def __init__(
        self,
        percentiles: Annotated[
            tuple[Annotated[float, Field(ge=0, le=100)], ...], Field(min_length=1)
        ] = (15, 50, 85),
        unit: Annotated[int, Field(ge=0)] = 0,
        population: bool = True,
    ) -> None:
        super().__init__()
        if list(percentiles) != sorted(set(percentiles)):
            raise UserError(f"percentiles come in rising order, not as {percentiles}")
        self.percentiles = percentiles
        self.unit = unit
        self.population = population
        self.exchanged: dict[int, dict[str, float]] = {}

    def rehearse(self, bench: Bench) -> None:
        super().rehearse(bench)
        if not len(bench.validation):
            raise UserError(
                "BatchNormalization watches networks on validation images, and none are held out; "
                "set data.validation=0.1"
            )
        seed, rivals = bench.seeds[0], [] if bench.rival is None else [bench.rival]
        for make, training in [
            (bench.make_student, bench.training),
            *((rival.make, rival.training) for rival in rivals),
        ]:
            network = bench.laid_out(make(seed))
            batches = bench.batches(training.batch_size, seed)
            # An epoch's last batch is the one that may hold too little to be normalised.
            image = next(batches.epoch(0, len(batches) - 1))["image"].to(bench.device)
            with torch.no_grad():
                self._fed(network, partial(network, image))

    def phases(self, bench: Bench) -> Phases:
        for seed in bench.seeds:
            if bench.rival is not None:
                for fit in bench.plain(seed):
                    yield self._watched(bench, fit, bench.baselines[seed])
            student = bench.student(seed)
            fit = bench.fit(bench.label("student", seed), student, bench.training, seed=seed)
            yield self._watched(bench, fit, student)
            if self.population and _norms(student):
                self.exchanged[seed] = yield self._exchange(bench, student, seed)

    def _watched(self, bench: Bench, training: Phase, network: Network) -> Fit:
        """The same training, with the percentiles among what is measured after an epoch."""
        measure = bench.watch(network)
        assert isinstance(training, Fit)
        assert measure is not None
        shares = torch.tensor(self.percentiles, dtype=torch.float64) / 100

        def evaluate() -> dict[str, float]:
            values, found = self._fed(network, measure)
            cuts = values.double().quantile(shares).tolist()
            return found | dict(zip(self._names(), cuts, strict=True))

        return replace(training, evaluate=evaluate)

    def _names(self) -> list[str]:
        return [f"percentile {p:g}" for p in self.percentiles]

    def _fed(self, network: Network, run: Callable[[], T]) -> tuple[Tensor, T]:
        """What the watched unit is fed while something runs the network, and what that gives."""
        sigmoids = [m for m in network.modules() if isinstance(m, nn.Sigmoid)]
        if not sigmoids:
            raise UserError(
                f"BatchNormalization watches what the last sigmoid of a network is fed, and "
                f"{network.name or type(network.model).__name__} has no torch.nn.Sigmoid; take "
                "batchnorm-100-100-100"
            )
        fed: list[Tensor] = []

        def note(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            width = args[0].shape[1]
            if self.unit >= width:
                raise UserError(
                    f"BatchNormalization(unit={self.unit}): the last sigmoid of "
                    f"{network.name or type(network.model).__name__} has {width} units, from 0"
                )
            fed.append(args[0][:, self.unit].detach().float().flatten().cpu())

        hook = sigmoids[-1].register_forward_pre_hook(note)
        try:
            # A compiled network would not notice the hook.
            with torch.compiler.set_stance("force_eager"):
                found = run()
        finally:
            hook.remove()
        return torch.cat(fed), found

    def _exchange(self, bench: Bench, student: Network, seed: int) -> Solve:
        task, split = bench.task, bench.validation
        batches = bench.batches(bench.training.batch_size, seed)

        def exchange(_: Journal) -> dict[str, float]:
            running = task.measure(student, split)[task.metric]
            number = population_statistics(
                student, batches.epoch(0), lambda batch: task.run(student, batch)
            )
            population = task.measure(student, split)[task.metric]
            bench.voice.say(
                f"population statistics of {number:,} batches: {task.metric} {population:.4f} on "
                f"the validation split, {running:.4f} with running averages"
            )
            return {"running": running, "population": population}

        return Solve(
            name=bench.label("population", seed),
            seed=seed,
            run=exchange,
            writes={"student": student},
        )

    def findings(self, bench: Bench, metrics: Sequence[Mapping[str, Any]]) -> list[Finding]:
        """Figure 1: accuracy over steps, the percentiles over steps, and what they come to."""
        curves = {
            (role, seed): Curve.read(metrics, bench.label(role, seed), self._names())
            for seed in bench.seeds
            for role in ("baseline", "student")
        }
        curves = {place: curve for place, curve in curves.items() if curve.steps}
        metric, first = bench.task.metric, bench.seeds[0]
        shown = {role: curve for (role, seed), curve in curves.items() if seed == first}
        charts = [
            Chart(
                f"{metric} on the validation images",
                "steps",
                metric,
                {role: curve.line(curve.accuracy) for role, curve in shown.items()},
            )
        ]
        charts += [
            Chart(
                f"input of one sigmoid, {_kind(bench.delivered(first)[role])}",
                "steps",
                "input",
                {
                    f"{role} {p:g} %": curve.line(values)
                    for p, values in zip(self.percentiles, curve.percentiles, strict=True)
                },
            )
            for role, curve in shown.items()
        ]
        found = Finding(
            "Training with and without batch norm",
            f"Percentiles are of what unit {self.unit} of the last sigmoid is fed over the "
            "validation images. The curves are those of the first seed.",
            charts=charts,
        )
        return [found, self._table(bench, curves)]

    def _table(self, bench: Bench, curves: Mapping[tuple[str, int], Curve]) -> Finding:
        middle = self.percentiles[len(self.percentiles) // 2]
        rows = [
            [
                "seed",
                "network",
                f"best {bench.task.metric}",
                f"last {bench.task.metric}",
                "steps to the best of the one without",
                f"drift of percentile {middle:g}",
                "drift of the spread",
            ]
        ]
        measured: dict[tuple[str, str], list[tuple[float, ...]]] = {}
        for (role, seed), curve in curves.items():
            mark = curves.get(("baseline", seed), curve)
            steps = curve.reach(max(mark.accuracy))
            facts = (max(curve.accuracy), curve.accuracy[-1], steps or math.inf, *curve.drifts())
            kind = _kind(bench.delivered(seed)[role])
            measured.setdefault((role, kind), []).append(facts)
            rows.append([str(seed), kind, *_cells(facts)])
        if len(bench.seeds) > 1:
            for (_, kind), every in measured.items():
                means = [sum(column) / len(column) for column in zip(*every, strict=True)]
                rows.append(["mean", kind, *_cells(means)])
        caption = (
            "On the validation images, after each epoch. A drift is the largest minus the smallest "
            "value from the end of the first epoch on, in units of the sigmoid's input; the spread "
            "is the distance of the outer percentiles."
        )
        for seed, found in self.exchanged.items():
            caption += (
                f" Seed {seed}: {found['population']:.4f} with the population's statistics, "
                f"{found['running']:.4f} with running averages."
            )
        return Finding("Steps and drift", caption, rows)


@dataclass(frozen=True)
class Curve:
    """What was measured after each epoch of a phase: one number an epoch in each list."""

    steps: list[int]
    accuracy: list[float]
    percentiles: list[list[float]]

    @classmethod
    def read(
        cls, metrics: Sequence[Mapping[str, Any]], phase: str, percentiles: Sequence[str]
    ) -> Curve:
        """Of the lines of a run's metrics, those of a phase; the task's metric comes first."""
        lines = [m for m in metrics if m["phase"] == phase and "validation" in m]
        measured = [line["validation"] for line in lines]
        return cls(
            steps=[line["step"] for line in lines],
            accuracy=[next(iter(m.values())) for m in measured],
            percentiles=[[m[name] for m in measured] for name in percentiles],
        )

    def line(self, values: Sequence[float]) -> list[tuple[float, float]]:
        """Points over steps."""
        return list(zip(self.steps, values, strict=True))

    def reach(self, accuracy: float) -> int | None:
        """The first step at which so much is reached, ``None`` if it never is.

        >>> Curve([10, 20], [0.5, 0.7], []).reach(0.6)
        20
        """
        reached = zip(self.steps, self.accuracy, strict=True)
        return next((step for step, found in reached if found >= accuracy), None)

    def drifts(self) -> tuple[float, float]:
        """Largest minus smallest of the middle percentile, and of the outer two's distance.

        >>> Curve([10, 20], [0.5, 0.7], [[-1.0, -2.0], [0.0, 0.5], [1.0, 3.0]]).drifts()
        (0.5, 3.0)
        """
        middle = self.percentiles[len(self.percentiles) // 2]
        low, high = self.percentiles[0], self.percentiles[-1]
        spread = [b - a for a, b in zip(low, high, strict=True)]
        return max(middle) - min(middle), max(spread) - min(spread)


def _cells(facts: Sequence[float]) -> list[str]:
    """Best and last accuracy, steps (infinite: not reached), drifts."""
    best, last, steps, median, spread = facts
    reached = f"{steps:,.0f}" if math.isfinite(steps) else "not reached"
    return [f"{best:.4f}", f"{last:.4f}", reached, f"{median:.2f}", f"{spread:.2f}"]


def _norms(model: nn.Module) -> bool:
    return any(isinstance(m, _BatchNorm) for m in model.modules())


def _kind(model: nn.Module) -> str:
    return "with batch norm" if _norms(model) else "without batch norm"
