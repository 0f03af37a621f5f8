"""Rows of tables with a class each: what a batch means, where they come from, and networks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor

from limbeck.data import tables
from limbeck.data.splits import transfer
from limbeck.data.tables import Rows
from limbeck.models import build
from limbeck.models.table import TableInput
from limbeck.tasks.classification import Classification
from limbeck.tasks.images import Transfer
from limbeck.training.domain import Domain, Words
from limbeck.training.network import Network, Solved
from limbeck.training.progress import Voice
from limbeck.training.seeding import derive
from limbeck.training.task import Batch, Batches, View
from limbeck.training.teacher import Teacher

POINTS, MOST_ROWS, MOST_CURVES = 15, 64, 6


class RowBatches:
    """Batches of rows: ``cells`` float (B, columns), ``row`` int64, ``label`` int64 if there are.

    A row has one view, so what a teacher says of it can be remembered.

    Args:
        split: the rows.
        batch_size: rows a step, over all processes.
        seed: decides the order.
        train: shuffle; otherwise the split's own order.
        device: where the batches are made.
    """

    def __init__(
        self, split: Rows, batch_size: int, seed: int, train: bool, device: torch.device
    ) -> None:
        self.split, self.batch_size, self.seed, self.train = split, batch_size, seed, train
        self.device = device
        self._source = split.fingerprint() if train else ""

    def __len__(self) -> int:
        return -(-len(self.split) // self.batch_size)

    def order(self, epoch: int) -> Tensor:
        """The positions of the split's rows in the order of this epoch."""
        if not self.train:
            return torch.arange(len(self.split))
        generator = torch.Generator().manual_seed(derive(self.seed, epoch) >> 1)
        return torch.randperm(len(self.split), generator=generator)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from step ``start`` on, this process's share of each."""
        split, rank, world = self.split, 0, 1
        if self.train and dist.is_available() and dist.is_initialized():
            rank, world = dist.get_rank(), dist.get_world_size()
        for chunk in self.order(epoch).split(self.batch_size)[start:]:
            # A process left without a row takes one with no weight, so that all step together.
            mine = chunk[rank::world] if len(chunk) > rank else chunk[:1]
            rows = split.rows[mine]
            batch: Batch = {"cells": split.cells[rows].to(self.device), "row": rows}
            if split.labels is not None:
                batch["label"] = split.labels[mine].to(self.device)
            if self.train:
                batch["view"] = View(self._source, 0, 1, len(split), len(split.cells))
            if world > 1:
                batch["share"] = len(mine) * world / len(chunk) if len(chunk) > rank else 0.0
            yield batch


class Tabular(Classification):
    """Classification of rows: ``cells`` and ``label`` in a batch, ``logits`` (B, C) in an answer.

    Args:
        classes: the class names in the order of the labels.
        input: what models are fed of a row.
        device: where networks and batches live.
    """

    name: ClassVar[str] = "tabular"
    seen: ClassVar[str] = "cells"

    def __init__(
        self, classes: tuple[str, ...], input: TableInput, device: torch.device | None = None
    ) -> None:
        super().__init__(classes, device=device)
        self.input = input

    def batches(
        self, split: Any, *, batch_size: int, seed: int = 0, train: bool = False
    ) -> Batches:
        return RowBatches(split, batch_size, seed, train, self.device)

    def solve(self, network: Network, split: Rows, seed: int) -> None:
        assert isinstance(network.model, Solved)
        self.check_labelled({} if split.labels is None else {"label": split.labels})
        cells = split.cells[split.rows].to(self.device)
        fed = cells if network.input is None else network.input(cells)
        assert split.labels is not None
        network.model.solve(fed, split.labels, seed)

    def measure(self, network: Network | Teacher, split: Any) -> dict[str, float]:
        """What images are measured by, and the area under the ROC curve, ``auc`` (0..1)."""
        logits, labels = self.predict(network, split)
        return {**super().measure(network, split), "auc": auc(logits, labels)}

    def compare(self, networks: Mapping[str, Network | Teacher], split: Any) -> dict[str, Any]:
        facts = super().compare(networks, split)
        for name, network in networks.items():
            facts["measures"][name]["auc"] = auc(*self.predict(network, split))
        return facts

    def record(self, networks: Mapping[str, Network | Teacher], split: Any, folder: Path) -> None:
        """Predictions as for images, and ``curves.safetensors``: see :meth:`curves`."""
        super().record(networks, split, folder)
        names, tensors = self.curves(networks, split)
        kinds = "\n".join(f"{c.name}\t{self.classes[k]}" for c, k in names)
        save_file(tensors, folder / "curves.safetensors", metadata={"columns": kinds})

    def curves(
        self, networks: Mapping[str, Network | Teacher], split: Rows
    ) -> tuple[list[tuple[Any, int]], dict[str, Tensor]]:
        """How a class's probability goes with a column, all other cells as they are.

        Friedman: Greedy Function Approximation, 2001, section 8.2, over at most 64 rows. Of each
        column of numbers the class is shown that goes up and down most with it, in the teacher if
        there is one; and of the columns those in which it does most.

        Returns:
            The columns, each with its class, and by name (columns, points) of float32: ``places``,
            and a network's ``curve.ROLE``.
        """
        cells = split.cells[split.rows].to(self.device)
        step = max(1, -(-len(cells) // MOST_ROWS))
        rows = cells[::step]
        numbers = [n for n, c in enumerate(self.input.columns) if not c.categories]
        shares = torch.linspace(0.02, 0.98, POINTS, device=cells.device)
        places = {n: cells[:, n].nanquantile(shares) for n in numbers}
        places = {n: p for n, p in places.items() if p.isfinite().all() and p[0] < p[-1]}

        def along(network: Network | Teacher, column: int) -> Tensor:
            changed = rows.repeat(POINTS, 1)
            changed[:, column] = places[column].repeat_interleave(len(rows))
            answer = self.answer(network.eval(), {"cells": changed})["logits"].float()
            return self.probabilities(answer).view(POINTS, len(rows), -1).mean(1)

        first = networks.get("teacher", next(iter(networks.values())))
        with torch.no_grad():
            range_of = {n: torch.aminmax(along(first, n), dim=0) for n in places}
            spans = {n: found.max - found.min for n, found in range_of.items()}
            chosen = sorted(spans, key=lambda n: -float(spans[n].max()))[:MOST_CURVES]
            class_of = {n: int(spans[n].argmax()) for n in chosen}
            found = {"places": torch.stack([places[n] for n in chosen])} if chosen else {}
            for role, network in networks.items():
                lines = [along(network, n)[:, class_of[n]] for n in chosen]
                found |= {f"curve.{role}": torch.stack(lines)} if lines else {}
        named = [(self.input.columns[n], class_of[n]) for n in chosen]
        return named, {name: tensor.cpu().contiguous() for name, tensor in found.items()}


class RankedTabular(Tabular):
    """The same, where the area under the ROC curve decides."""

    metric: ClassVar[str] = "auc"


def auc(logits: Tensor, labels: Tensor) -> float:
    """The area under the ROC curve, of more than two classes the mean of one against the rest.

    >>> auc(torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 3.0]]), torch.tensor([0, 0, 1]))
    1.0
    """
    from torchmetrics.functional.classification import multiclass_auroc

    return float(multiclass_auroc(logits.softmax(1), labels, num_classes=logits.shape[1]))


class TableWords(Words):
    """Where a table comes from and what its columns are."""

    label: str | None = Field(default=None, description="the column of classes; else the last")
    drop: tuple[str, ...] = Field(default=(), description="columns left out")
    categorical: tuple[str, ...] = Field(
        default=(), description="columns of numbers that stand for categories"
    )
    test: float = Field(
        default=0.2, gt=0, lt=1, description="share of the rows that is held out for testing"
    )
    metric: Literal["accuracy", "auc"] = Field(
        default="accuracy", description="what decides; auc where classes differ in weight"
    )
    transfer: Transfer = Transfer()


class TableClassification(Domain):
    """Tables of a class in each row, of any source that :func:`limbeck.data.tables.load` knows."""

    words_type: ClassVar[type[Words]] = TableWords
    source = "breast-cancer"

    def __init__(
        self, words: TableWords, *, device: torch.device, workers: int, voice: Voice
    ) -> None:
        self.words, self.device = words, device
        data = tables.load(
            words.source,
            validation=words.validation,
            test=words.test,
            label=words.label,
            drop=words.drop,
            categorical=words.categorical,
        )
        voice.say(data.describe())
        train = data.train
        if words.limit is not None and words.limit < len(train):
            train = transfer(train, fraction=words.limit / len(train))
        students = train
        if words.transfer != Transfer():
            students = transfer(train, **words.transfer.model_dump())
        if min(len(students), len(train)) < len(data.train):
            voice.say(
                f"teachers learn from {len(train):,} of {len(data.train):,} training rows, "
                f"students from {len(students):,}"
            )
        self.classes, self.input = data.classes, data.input
        self.splits = {
            "train": train,
            "transfer": students,
            "validation": data.validation,
            "test": data.test,
        }
        self.facts = {"data": data.source, "fingerprint": data.fingerprint()}

    @staticmethod
    def kind_of(source: str) -> str:
        return tables.kind_of(source)

    def task(self, augment: Any = None) -> Tabular:
        kind = RankedTabular if self.words.metric == "auc" else Tabular
        return kind(self.classes, self.input, self.device)

    def network(self, name: str, seed: int | None = None) -> Network:
        return build(name, self.classes, self.input, seed)

    def sample(self) -> Tensor:
        return self.input.sample()
