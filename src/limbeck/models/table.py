"""What models of tables are fed, and the models that there are for them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from pydantic import FiniteFloat
from torch import Tensor, nn

from limbeck.errors import UserError, did_you_mean
from limbeck.models.input import Deviation, Intake, check_logits

if TYPE_CHECKING:
    from limbeck.models.libraries import Offer, Order

KNOWN = {
    "mlp-64-64": "two hidden layers of 64 units (any mlp-H1-H2-...)",
    "mlp-256-256-drop": "with dropout, 0.2 on inputs and 0.5 on hidden units (any mlp-...-drop)",
    "forest-100-64": "a random forest of 100 trees with at most 64 leaves each (any forest-T-L)",
}
"""Models of tables by name, patterns named in the line."""

_MOST_ENTRIES = 2**28


@dataclass(frozen=True)
class Column:
    """A column of a table: a number with mean and deviation in training, or one of categories."""

    name: str
    mean: FiniteFloat = 0.0
    std: Deviation = 1.0
    categories: tuple[str, ...] = ()

    @property
    def width(self) -> int:
        """How many numbers a model is fed of it."""
        return len(self.categories) or 1


@dataclass(frozen=True)
class TableInput(Intake):
    """Rows of a table: numbers standardised, categories as one number each, 1 for the one it is.

    A number that is missing (NaN) is fed as the training mean, a category that is missing or was
    not met in training as no category at all.
    """

    columns: tuple[Column, ...]

    kind = "tables"

    @property
    def width(self) -> int:
        """Numbers that a model is fed of one row."""
        return sum(column.width for column in self.columns)

    def __call__(self, view: Tensor) -> Tensor:
        """Rows (B, columns), categories by number and missing ones as NaN, to (B, width).

        >>> table = TableInput((Column("height", 2.0, 0.5), Column("sex", categories=("f", "m"))))
        >>> table(torch.tensor([[3.0, 1.0], [torch.nan, torch.nan]]))
        tensor([[2., 0., 1.],
                [0., 0., 0.]])
        """
        self._check(view, len(self.columns))
        mean, std = self._moments(view)
        numbers = ((view - mean) / std).nan_to_num(nan=0.0)
        if not any(column.categories for column in self.columns):
            return numbers
        parts = []
        for place, column in enumerate(self.columns):
            if column.categories:
                which = view[:, place].nan_to_num(nan=len(column.categories)).long()
                hot = F.one_hot(which, len(column.categories) + 1)[:, :-1]
                parts.append(hot.to(numbers))
            else:
                parts.append(numbers[:, place : place + 1])
        return torch.cat(parts, 1)

    def restored(self, fed: Tensor) -> Tensor:
        """The rows that would be fed so, (B, width) to (B, columns); the inverse of a call.

        Of a category's numbers the largest says which it is.

        >>> table = TableInput((Column("height", 2.0, 0.5), Column("sex", categories=("f", "m"))))
        >>> table.restored(torch.tensor([[2.0, 0.1, 0.7]]))
        tensor([[3., 1.]])
        """
        self._check(fed, self.width)
        parts = fed.split([column.width for column in self.columns], 1)
        return torch.stack(
            [
                part.argmax(1).to(fed)
                if column.categories
                else part[:, 0] * column.std + column.mean
                for column, part in zip(self.columns, parts, strict=True)
            ],
            1,
        )

    def sample(self) -> Tensor:
        return torch.zeros(1, len(self.columns))

    def describe(self) -> str:
        return f"tables of {len(self.columns)} columns"

    def offers(self) -> Mapping[str, Callable[[Order], Offer]]:
        return {"": _own}

    def check(self, output: Any, classes: int) -> None:
        check_logits(output, classes)

    def _moments(self, like: Tensor) -> tuple[Tensor, Tensor]:
        pairs = [(column.mean, column.std) for column in self.columns]
        mean, std = torch.tensor(pairs, dtype=like.dtype, device=like.device).unbind(1)
        return mean, std

    def _check(self, rows: Tensor, width: int) -> None:
        if rows.ndim != 2 or rows.shape[1] != width:
            raise UserError(
                f"a model for {self.describe()} cannot read rows of shape {tuple(rows.shape[1:])}"
            )


def _own(order: Order) -> Offer:
    from limbeck.models.libraries import Offer, Way

    if order.pretrained:
        raise UserError(f"Limbeck ships no weights for {order.name}; train it")
    return Offer([Way(_maker(order.name, order.input.width, len(order.classes)), order.input)])


def _maker(name: str, inputs: int, classes: int) -> Callable[[], nn.Module]:
    match = re.fullmatch(r"(mlp|forest)((?:-[1-9]\d{0,5})+)(-drop)?", name)
    numbers = [int(n) for n in match[2][1:].split("-")] if match else []
    if match is not None and match[1] == "mlp":
        from limbeck.models.plain import MLP

        hidden, first = (0.5, 0.2) if match[3] else (0.0, 0.0)
        return lambda: MLP(inputs, numbers, classes, hidden, first)
    if match is not None and len(numbers) == 2 and not match[3]:
        from limbeck.models.forest import Forest

        trees, leaves = numbers
        if leaves < 2 or trees * leaves * classes > _MOST_ENTRIES:
            raise UserError(
                f"{name}: a forest is forest-TREES-LEAVES with 2 leaves a tree or more, and trees "
                f"x leaves x classes at most {_MOST_ENTRIES:,}"
            )
        return lambda: Forest(inputs, trees, leaves, classes)
    raise UserError(f"there is no network of tables named {name!r}; {did_you_mean(name, KNOWN)}")
