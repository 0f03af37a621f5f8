"""Learning without Forgetting. Li, Hoiem, ECCV 2016 and TPAMI 2017 (arXiv 1606.09282).

A trained network is to learn a new task, and the images of the old one are gone. What the network
says about the new images, in the words of the old task, is recorded before it learns; then it
learns the new labels while its answers to the old question are kept near the records. So the
teacher is the network itself as it was, and the new images stand for the old ones.

Needs: images in memory or by name whose classes are parted into tasks (the task ``sequence``); a
network that ends in a linear layer.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from limbeck.data.data import Split
from limbeck.errors import UserError
from limbeck.models.head import last_linear
from limbeck.report.verdict import said
from limbeck.tasks.sequence import SequentialClassification
from limbeck.training.bench import Bench
from limbeck.training.finding import Finding
from limbeck.training.method import Method, Phases
from limbeck.training.network import Network
from limbeck.training.phases import Fit, Training, Update
from limbeck.training.task import Answer, Batch, Terms, model_output

Rival = Literal["features", "joint"]
RIVALS: dict[str, str] = {"features": "feature extraction", "joint": "joint training"}


def lwf(logits: Tensor, recorded: Tensor, temperature: float = 2.0) -> Tensor:
    r"""The loss that keeps old answers (Eq. 2 and 3), mean over the batch.

    .. math:: -\sum_i y'_i \log \hat y'_i, \qquad y' = \frac{y^{1/T}}{\sum_j y_j^{1/T}}

    which of logits is the cross-entropy of their softmax at temperature T. There is no factor T^2.

    Args:
        logits: (B, C) of the old task's head now.
        recorded: (B, C), logits or log-probabilities of that head before; no gradient flows into
            them.
        temperature: T, above 0.

    Returns:
        A scalar in nats; the records' entropy where nothing changed.

    Raises:
        UserError: shapes that differ, or a temperature that is not positive.

    >>> round(float(lwf(torch.zeros(1, 2), torch.tensor([[2.0, 0.0]]))), 7)
    0.6931472
    """
    z, r = _alike(logits, recorded, temperature)
    return -((r / temperature).softmax(-1) * (z / temperature).log_softmax(-1)).sum(-1).mean()


def lwf_multilabel(logits: Tensor, recorded: Tensor, temperature: float = 2.0) -> Tensor:
    r"""The loss that keeps the answers of an old task of several labels (section 3).

    For each label the binary form of :func:`lwf`, with
    :math:`y' = y^{1/T} / (y^{1/T} + (1 - y)^{1/T})`, summed over the labels, mean over the batch.

    Args:
        logits, recorded: (B, A), the sigmoid of which says whether a label is there.

    >>> recorded = torch.tensor([[0.8]]).logit()
    >>> round(float(lwf_multilabel(torch.zeros(1, 1), recorded)), 7)
    0.6931472
    """
    z, r = _alike(logits, recorded, temperature)
    wanted = (r / temperature).sigmoid()
    loss = F.binary_cross_entropy_with_logits(z / temperature, wanted, reduction="none")
    return loss.sum(-1).mean()


def _alike(logits: Tensor, recorded: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    if logits.shape != recorded.shape or logits.ndim != 2:
        raise UserError(
            f"the logits have the shape {tuple(logits.shape)}, those recorded "
            f"{tuple(recorded.shape)}; both must be (B, C) and of the same head"
        )
    if not 0 < temperature < math.inf:
        raise UserError(f"a temperature is a number above 0, not {temperature}")
    precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return precise, recorded.detach().to(precise)


class Heads(nn.Module):
    """The last layer of a network, one head a task; logits come out in the classes' order.

    Args:
        features: of the layer before.
        parts: the class numbers of each task; together 0 to C - 1.

    >>> Heads(4, [(0, 2), (1, 3)])(torch.zeros(5, 4)).shape
    torch.Size([5, 4])
    """

    order: Tensor

    def __init__(self, features: int, parts: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(features, len(part)) for part in parts)
        for head in self.heads:
            assert isinstance(head, nn.Linear)
            nn.init.xavier_uniform_(head.weight)
            nn.init.zeros_(head.bias)
        named = torch.tensor([number for part in parts for number in part])
        self.register_buffer("order", named.argsort(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, features) -> (B, C)."""
        return torch.cat([head(x) for head in self.heads], 1)[:, self.order]

    @torch.no_grad()
    def as_one(self) -> nn.Linear:
        """A single linear layer that answers the same."""
        heads = [head for head in self.heads if isinstance(head, nn.Linear)]
        one = nn.Linear(heads[0].in_features, len(self.order)).to(heads[0].weight)
        one.weight.copy_(torch.cat([head.weight for head in heads])[self.order])
        one.bias.copy_(torch.cat([head.bias for head in heads])[self.order])
        return one


class LwF(Method):
    """Tasks one after another; what was said of the old ones is kept while the new one is learned.

    For each seed a network learns the first task. Then for each task that follows the new head is
    warmed up alone, from which LwF (the student) and fine-tuning (the baseline) go their ways.

    Args:
        temperature: T of the kept answers.
        weight: lambda_o, of each old task's term; 0 is fine-tuning.
        targets: the old answers: ``online``, to the very image that is seen, by a frozen copy; or
            ``recorded`` once for each image as it is and used for all its views, as in the
            published code.
        warmup: epochs of the new head alone; the joint epochs if not given.
        rivals: what else the tasks are learned by, for the table: ``features`` trains new heads on
            a frozen trunk, ``joint`` has the images of all tasks so far.
    """

    tasks = ("sequence",)
    takes_teacher = False
    roles: Mapping[str, str] = {"baseline": "fine-tuning", "student": "learning without forgetting"}

    def __init__(
        self,
        temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 2.0,
        weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0,
        targets: Literal["online", "recorded"] = "online",
        warmup: Annotated[int, Field(ge=0)] | None = None,
        rivals: tuple[Rival, ...] = ("features", "joint"),
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.weight = weight
        self.targets = targets
        self.warmup = warmup
        self.rivals = rivals
        self.ways: dict[tuple[str, int], list[Network]] = {}

    def rehearse(self, bench: Bench) -> None:
        task = _sequence(bench)
        if bench.candidates:
            raise UserError(
                "a network that learns without forgetting is its own teacher; leave --teacher out"
            )
        if not isinstance(bench.transfer, Split) or bench.transfer.labels is None:
            raise UserError(
                "tasks are told apart by the labels of the training images: give labelled data by "
                "name or as limbeck.data.Data"
            )
        if task.augment.mixes:
            raise UserError(
                "mixup and cutmix would mix images of different tasks; leave them out of "
                "data.augment"
            )
        network = with_heads(bench.laid_out(bench.make_student(bench.seeds[0])), task.parts)
        sample = bench.sample(task.of(bench.transfer, 0))
        _labels(task, 0, task.run(network, sample), sample)

    def phases(self, bench: Bench) -> Phases:
        for seed in bench.seeds:
            yield from self._seed(bench, _sequence(bench), seed)

    def _seed(self, bench: Bench, task: SequentialClassification, seed: int) -> Phases:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            first = with_heads(bench.laid_out(bench.make_student(seed)), task.parts)
        free(first, first.model, heads=[0])
        yield self._fit(bench, task, "first", seed, 0, {"student": first}, first, bench.training)
        ways = ["baseline", "student", *dict.fromkeys(self.rivals)]
        self.ways |= {(way, seed): [first] for way in ways}
        for number in range(1, len(task.parts)):
            for way in ways:
                before = self.ways[way, seed][-1]
                network = copy.deepcopy(before)
                yield from self._learn(bench, task, way, seed, number, network, before)
                self.ways[way, seed].append(copy.deepcopy(network).requires_grad_(False))
        bench.baselines[seed] = as_named(self.ways["baseline", seed][-1])
        bench.students[seed] = as_named(self.ways["student", seed][-1])

    def _learn(
        self,
        bench: Bench,
        task: SequentialClassification,
        way: str,
        seed: int,
        number: int,
        network: Network,
        before: Network,
    ) -> Phases:
        """One task by one way: the new head alone, then everything."""
        training, head = bench.training, _heads(network).heads[number]
        alone = self.warmup if self.warmup is not None else training.epochs
        factor = alone / max(training.epochs, 1)
        name = f"{way}-{number + 1}"
        free(network, head)
        if alone and way != "joint":
            warm = training.stretched(factor).model_copy(update={"epochs": alone})
            parts = {"head": head}
            yield self._fit(bench, task, f"{name}-head", seed, number, parts, network, warm)
        if way == "features":
            return
        free(network, network.model, heads=range(number + 1))
        terms = None
        if way == "student" and self.weight:
            terms = self._keeping(bench, task, number, network, copy.deepcopy(before))
        yield self._fit(
            bench,
            task,
            name,
            seed,
            number,
            {"student": network},
            network,
            training,
            terms=terms,
            every=way == "joint",
        )

    def _fit(
        self,
        bench: Bench,
        task: SequentialClassification,
        name: str,
        seed: int,
        number: int,
        train: dict[str, nn.Module],
        network: Network,
        settings: Training,
        terms: Callable[[Batch], Terms] | None = None,
        every: bool = False,
    ) -> Fit:
        """Training on one task's images, or on those of all tasks up to it."""
        numbers = range(number + 1) if every else [number]
        split = _union([task.of(bench.transfer, n) for n in numbers])
        trunk_learns = "student" in train

        def plainly(batch: Batch) -> Terms:
            if not trunk_learns:
                network.eval()  # a batch norm's statistics are part of the trunk
            answer = task.run(network, batch)
            if every:
                return {"labels": task.loss(answer, batch)}
            return {"labels": _labels(task, number, answer, batch)}

        def evaluate() -> dict[str, float]:
            found = {}
            for n in range(number + 1):
                part = task.of(bench.validation, n)
                if len(part):
                    found[f"task {n + 1}"] = task.measure(network, part)[task.metric]
            mean = sum(found.values()) / max(len(found), 1)
            return {task.metric: mean, **found}

        return Fit(
            name=bench.label(name, seed),
            seed=seed,
            updates=[Update(train=train, terms=terms or plainly, settings=settings)],
            batches=task.batches(split, batch_size=settings.batch_size, seed=seed, train=True),
            epochs=settings.epochs,
            evaluate=evaluate if len(bench.validation) else None,
            select=bench.select,
        )

    def _keeping(
        self,
        bench: Bench,
        task: SequentialClassification,
        number: int,
        network: Network,
        before: Network,
    ) -> Callable[[Batch], Terms]:
        """Eq. 1: the new labels' loss, and for each old task lambda_o times the kept answers'."""
        teacher = bench.frozen([before.requires_grad_(False)], None)
        split = task.of(bench.transfer, number)
        table = _recorded(task, before, split) if self.targets == "recorded" else None

        def terms(batch: Batch) -> Terms:
            answer = task.run(network, batch)
            old = teacher(task, batch)["logits"] if table is None else table(batch)
            found = {"labels": _labels(task, number, answer, batch)}
            for n, part in enumerate(task.parts[:number]):
                columns = list(part)
                loss = lwf(answer["logits"][:, columns], old[:, columns], self.temperature)
                found[f"task {n + 1}"] = self.weight * loss
            return found

        return terms

    def findings(self, bench: Bench, metrics: Sequence[Mapping[str, Any]]) -> list[Finding]:
        """How good each way is at each task after each of them, on the test split."""
        task = _sequence(bench)
        called = {**RIVALS, **self.roles}
        total = len(task.parts)
        rows = [["way", "after task", *(f"task {n + 1}" for n in range(total)), "mean"]]
        ways = dict.fromkeys(way for way, _ in self.ways)
        for way in ways:
            for after in range(total):
                every = [
                    self._accuracies(task, self.ways[way, seed][after], bench.test, after + 1)
                    for seed in bench.seeds
                ]
                cells = [said(column, percent=True) for column in zip(*every, strict=True)]
                means = said([sum(found) / len(found) for found in every], percent=True)
                blank = [""] * (total - after - 1)
                rows.append([called[way], str(after + 1), *cells, *blank, means])
        caption = (
            "Test accuracy where it is known which task an image is of. All ways begin with the "
            "same network after the first task; joint training alone sees old images again"
        )
        caption += "; ± is half the 95 % interval over the seeds." if len(bench.seeds) > 1 else "."
        return [Finding("What is remembered", caption, rows)]

    def _accuracies(
        self, task: SequentialClassification, network: Network, split: Split, known: int
    ) -> list[float]:
        return [task.measure(network, task.of(split, n))[task.metric] for n in range(known)]


def with_heads(network: Network, parts: Sequence[Sequence[int]]) -> Network:
    """The network with heads in place of its last linear layer, which has an output a class.

    Raises:
        UserError: it has no such layer.
    """
    classes = sum(map(len, parts))
    found = last_linear(network.model, classes)
    if found is None or not found[0]:
        raise UserError(
            f"{network.name or type(network.model).__name__} does not end in a linear layer with "
            f"an output for each of the {classes} classes, in place of which each task gets a head "
            "of its own; choose a network that does"
        )
    path, last = found
    network.model.set_submodule(path, Heads(last.in_features, parts).to(last.weight))
    return network


def _heads(network: Network) -> Heads:
    return next(module for module in network.modules() if isinstance(module, Heads))


def as_named(network: Network) -> Network:
    """A copy of the network as its name says: with one linear layer for all heads."""
    copied = copy.deepcopy(network)
    path = next(p for p, m in copied.model.named_modules() if isinstance(m, Heads))
    copied.model.set_submodule(path, _heads(copied).as_one())
    return copied


def free(network: Network, learns: nn.Module, heads: Sequence[int] | range | None = None) -> None:
    """Let one part of the network learn and nothing else; of the heads those that are named."""
    network.requires_grad_(False)
    learns.requires_grad_(True)
    if heads is not None:
        for number, head in enumerate(_heads(network).heads):
            head.requires_grad_(number in heads)


def _labels(task: SequentialClassification, number: int, answer: Answer, batch: Batch) -> Tensor:
    """The cross-entropy of one task's labels within its own head."""
    part = list(task.parts[number])
    place = torch.full((len(task.classes),), -1, device=batch["label"].device)
    place[part] = torch.arange(len(part), device=place.device)
    return F.cross_entropy(answer["logits"][:, part].float(), place[batch["label"]])


@torch.no_grad()
def _recorded(
    task: SequentialClassification, network: Network, split: Split
) -> Callable[[Batch], Tensor]:
    """What a network says of each image as it is, by the sample's identity."""
    network.eval()
    answers, rows = [], []
    for batch in task.batches(split, batch_size=256).epoch(0):
        answers.append(model_output(network(batch["image"].to(task.device))).float())
        rows.append(batch["row"])
    known = torch.cat(rows).cpu()
    place = torch.zeros(int(known.max()) + 1, dtype=torch.int64)
    place[known] = torch.arange(len(known))
    table = torch.cat(answers)

    def look_up(batch: Batch) -> Tensor:
        return table[place[batch["row"].cpu()].to(table.device)]

    return look_up


def _union(splits: Sequence[Split]) -> Split:
    """Several subsets of one split as one."""
    labels = torch.cat([s.labels for s in splits if s.labels is not None])
    return replace(splits[0], labels=labels, rows=torch.cat([s.rows for s in splits]))


def _sequence(bench: Bench) -> SequentialClassification:
    if not isinstance(bench.task, SequentialClassification):
        raise UserError(
            "LwF works on the task sequence, and the recipe says which classes are of which task: "
            "task: sequence, and data.sequence: 2"
        )
    return bench.task
