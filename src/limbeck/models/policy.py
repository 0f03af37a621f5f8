"""Policies: networks that say what to do where an environment stands."""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from limbeck.errors import UserError, did_you_mean
from limbeck.models.input import Intake

if TYPE_CHECKING:
    from limbeck.models.libraries import Offer, Order

NAMES = {
    "mlp-64-64": "tanh units, for actions drawn from a distribution (any mlp-H1-H2-...)",
    "mlp-64-64-norm": "layer norms and ReLU, actions within their bounds (any mlp-...-norm)",
}
"""Name -> one line about it."""


@dataclass(frozen=True)
class Observations(Intake):
    """Vectors that an environment shows, and the bounds of what can be done in it.

    Args:
        size: numbers in an observation.
        low, high: bounds of each number of an action; empty where actions are one of several.
    """

    size: Annotated[int, Field(ge=1, le=2**24)]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()

    kind: ClassVar[str] = "observations"

    def __call__(self, view: Tensor) -> Tensor:
        """(B, size), of any type -> (B, size) in single precision."""
        return view.float()

    def sample(self) -> Tensor:
        return torch.zeros(1, self.size)

    def describe(self) -> str:
        return f"observations of {self.size} numbers"

    def offers(self) -> Mapping[str, Callable[[Order], Offer]]:
        return {"": _own}

    def check(self, output: Any, classes: int) -> None:
        if not isinstance(output, Tensor) or output.shape != (1, classes):
            raise ValueError(f"it puts out no tensor of shape {(1, classes)}")


class Standardise(nn.Module):
    """Observations less their mean, over their deviation, both as far as they are known, clipped.

    Mean and deviation are learned by looking (:meth:`look`), not by gradients.

    >>> see = Standardise(1)
    >>> see.look(torch.tensor([[1.0], [3.0]]))
    >>> see(torch.tensor([[3.0]])).item()
    1.0
    """

    mean: Tensor
    variance: Tensor
    count: Tensor

    def __init__(self, size: int, clip: float = 5.0) -> None:
        super().__init__()
        self.clip = clip
        self.register_buffer("mean", torch.zeros(size, dtype=torch.float64))
        self.register_buffer("variance", torch.ones(size, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    @torch.no_grad()
    def look(self, seen: Tensor) -> None:
        """Take further observations, (N, size), into mean and variance (Chan et al. 1979)."""
        seen, number, before = seen.to(self.mean), len(seen), self.count.clone()
        total, apart = before + number, seen.mean(0) - self.mean
        squares = self.variance * before + seen.var(0, correction=0) * number
        self.mean += apart * number / total
        self.variance.copy_((squares + apart.square() * before * number / total) / total)
        self.count.copy_(total)

    def forward(self, seen: Tensor) -> Tensor:
        """(B, size) -> (B, size)."""
        deviation = (self.variance + 1e-8).sqrt()
        shown = (seen - self.mean.to(seen)) / deviation.to(seen)
        return shown.clamp(-self.clip, self.clip)


class Within(nn.Module):
    """Any numbers brought between bounds, by tanh.

    >>> Within((0.0,), (4.0,))(torch.tensor([[0.0]])).item()
    2.0
    """

    def __init__(self, low: Sequence[float], high: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("low", torch.tensor(low), persistent=False)
        self.register_buffer("high", torch.tensor(high), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, actions) -> (B, actions)."""
        low, high = self.get_buffer("low"), self.get_buffer("high")
        return low + (high - low) * (x.tanh() + 1) / 2


class Policy(nn.Module):
    """Observations in; out come the logits of what can be done, or the numbers of an action.

    Two kinds, after the two families of algorithms in OpenAI's baselines. A plain one has tanh
    units and orthogonal weights (gain sqrt 2, the last layer 0.01); its actions are a
    distribution's logits or mean. With ``norm`` each hidden layer is followed by layer norm and
    ReLU, and what the last one says, whose weights lie within 3e-3 of zero, is brought within the
    actions' bounds by tanh.

    Args:
        input: what is shown, and the bounds.
        actions: how many actions there are, or numbers in one.
        widths: of the hidden layers.
        norm: the second kind; it needs actions with finite bounds.

    Raises:
        UserError: ``norm`` without finite bounds.

    >>> Policy(Observations(3, (-2.0,), (2.0,)), 1, (64, 64), norm=True)(torch.zeros(5, 3)).shape
    torch.Size([5, 1])
    """

    def __init__(
        self, input: Observations, actions: int, widths: Sequence[int], norm: bool = False
    ) -> None:
        super().__init__()
        if norm and not (input.low and all(map(math.isfinite, [*input.low, *input.high]))):
            raise UserError(
                "a policy whose actions lie within bounds needs an environment that has such; "
                f"where actions are drawn take {'-'.join(['mlp', *map(str, widths)])}"
            )
        self.norm = norm
        self.standardise = Standardise(input.size, 5.0 if norm else 10.0)
        self.hidden = hidden(input.size, widths, norm)
        self.head = nn.Linear(widths[-1], actions)
        begin(self.head, norm, gain=0.01)
        self.bounds = Within(input.low, input.high) if norm else nn.Identity()

    def forward(self, seen: Tensor) -> Tensor:
        """(B, size) -> (B, actions)."""
        answer: Tensor = self.bounds(self.head(self.hidden(self.standardise(seen))))
        return answer


def hidden(inputs: int, widths: Sequence[int], norm: bool = False) -> nn.Sequential:
    """The hidden layers of a policy of either kind, and of what judges it."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for number, width in enumerate(widths, start=1):
        layers[f"fc{number}"] = linear = nn.Linear(inputs, width)
        if norm:
            layers[f"norm{number}"] = nn.LayerNorm(width)
            layers[f"relu{number}"] = nn.ReLU()
        else:
            begin(linear, gain=math.sqrt(2))
            layers[f"tanh{number}"] = nn.Tanh()
        inputs = width
    return nn.Sequential(layers)


def begin(layer: nn.Linear, norm: bool = False, *, gain: float = 1.0) -> None:
    """The weights a layer starts from: small uniform ones, or orthogonal ones of this gain."""
    if norm:
        nn.init.uniform_(layer.weight, -3e-3, 3e-3)
        nn.init.uniform_(layer.bias, -3e-3, 3e-3)
    else:
        nn.init.orthogonal_(layer.weight, gain)
        nn.init.zeros_(layer.bias)


def _own(order: Order) -> Offer:
    from limbeck.models.libraries import Offer, Way

    parsed = re.fullmatch(r"mlp((?:-[1-9]\d*)+)(-norm)?", order.name)
    if parsed is None or order.pretrained:
        raise UserError(
            f"there is no policy named {order.name!r}; {did_you_mean(order.name, NAMES)}"
        )
    widths = [int(width) for width in parsed[1][1:].split("-")]

    def make() -> nn.Module:
        return Policy(order.input, len(order.classes), widths, norm=parsed[2] is not None)

    return Offer([Way(make, order.input)])
