"""Learning Lightweight Lane Detection CNNs by Self Attention Distillation. Hou, Ma, Liu, Loy, ICCV
2019 (arXiv 1908.00821).

Lanes are thin, so a small network gets little signal from their labels. Once it is half trained,
the attention map of a deeper block outlines lanes and scene better than that of the block before.
From then on each block imitates the map of the next one of the same network: no teacher, no
labels, and nothing more to compute afterwards.

Needs: scenes with a class for every pixel (the tasks ``lanes`` and ``segmentation``); a network
with blocks one after another, ``block1`` to ``block4`` in Limbeck's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from limbeck.data.scenes import IGNORE
from limbeck.errors import UserError
from limbeck.report.verdict import said
from limbeck.tasks.segmentation import Segmentation
from limbeck.training.bench import Bench
from limbeck.training.features import check_maps
from limbeck.training.finding import Finding
from limbeck.training.method import Method, Phases
from limbeck.training.network import Network
from limbeck.training.phases import Fit, Update
from limbeck.training.taps import Taps
from limbeck.training.task import Answer, Batch, Batches, Task, Terms, moved

Reduction = Literal["mean", "sum_hw"]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]

SCENES, DRAWN = 64, 2
"""So many test scenes are looked at for the findings, and so many are drawn."""
WIDE = 300
"""Small scenes are enlarged by whole numbers up to so many pixels a picture."""


def energy(features: Tensor) -> Tensor:
    """Section 3.1: the squares of activations (B, C, H, W) summed over channels, (B, H, W).

    >>> energy(torch.tensor([[[[3.0]], [[-4.0]]]])).item()
    25.0
    """
    check_maps(features, "tapped", "self attention distillation compares")
    return features.to(torch.promote_types(features.dtype, torch.float32)).square().sum(1)


def attention_map(features: Tensor, size: tuple[int, int] | None = None) -> Tensor:
    r"""Section 3.1: where a block looks, :math:`\Psi = \Phi(\mathcal B(\mathcal G^2_{sum}(A)))`.

    Args:
        features: A, (B, C, H, W).
        size: height and width that the map is first brought to, bilinearly; its own if not given.

    Returns:
        (B, H, W), which sums to 1 for each sample: a softmax over positions.

    >>> attention_map(torch.tensor([[[[0.0, 1.0], [0.0, 0.0]]]])).flatten()
    tensor([0.1749, 0.4754, 0.1749, 0.1749])
    """
    found = _resized(energy(features), size or (features.shape[2], features.shape[3]))
    return found.flatten(1).softmax(1).view_as(found)


def sad(
    shallow: Tensor, deep: Tensor, reduction: Reduction = "mean", detach_target: bool = True
) -> Tensor:
    r"""Eq. 2: the squared distance of a block's attention map from that of the next block.

    .. math:: L_d(\Psi(A_m), \Psi(A_{m+1}))

    The smaller of the two maps is brought to the size of the larger one.

    Args:
        shallow, deep: features (B, C, H, W) of the two blocks; C and the sizes may differ.
        reduction: ``mean`` over samples and positions, or ``sum_hw`` over positions, mean over
            samples: maps sum to 1, so a mean over many positions is tiny.
        detach_target: no gradient flows into the deeper block.

    Raises:
        UserError: features that are no maps, or of another number of samples.

    >>> features = torch.tensor([[[[0.0, 1.0], [0.0, 0.0]]]])
    >>> round(float(sad(features, torch.zeros(1, 3, 2, 2), "sum_hw")), 6)
    0.06772
    """
    if len(shallow) != len(deep):
        raise UserError(
            f"one block has features of {len(shallow)} samples, the other of {len(deep)}; both "
            "must be of one pass"
        )
    sizes = [(f.shape[-2], f.shape[-1]) for f in (shallow, deep)]
    size = max(sizes, key=lambda s: s[0] * s[1])
    ours, target = (attention_map(f, size) for f in (shallow, deep))
    off = (ours - (target.detach() if detach_target else target)).square()
    return off.mean() if reduction == "mean" else off.flatten(1).sum(1).mean()


def iou_loss(probabilities: Tensor, truth: Tensor) -> Tensor:
    r"""Section 3.3: one minus the intersection over union of soft masks.

    .. math:: L_{IoU} = 1 - \frac{N_o}{N_p + N_g - N_o}, \qquad N_o = \sum p g,\; N_p = \sum p,\;
        N_g = \sum g

    counted for each sample and class, then averaged. A class that is neither there nor predicted
    is perfect.

    Args:
        probabilities: p, (B, ..., C).
        truth: g of the same shape, 0 to 1.

    Raises:
        UserError: shapes that differ.

    >>> half = torch.full((1, 2, 2, 1), 0.5)
    >>> round(float(iou_loss(half, torch.tensor([[[[1.0], [1.0]], [[0.0], [0.0]]]]))), 6)
    0.666667
    """
    if probabilities.shape != truth.shape or probabilities.ndim < 3:
        raise UserError(
            f"probabilities of the shape {tuple(probabilities.shape)} cannot be compared with a "
            f"truth of {tuple(truth.shape)}; both must be (B, ..., C)"
        )
    p, g = probabilities.flatten(1, -2), truth.flatten(1, -2)
    both = (p * g).sum(1)
    either = p.sum(1) + g.sum(1) - both
    there = either > 0
    return (1 - torch.where(there, both / either.where(there, 1.0), 1.0)).mean()


@dataclass(frozen=True)
class Later:
    """Batches that go on where some epochs have been."""

    batches: Batches
    begun: int

    def __len__(self) -> int:
        return len(self.batches)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        return self.batches.epoch(self.begun + epoch, start)


class SAD(Method):
    """Each block imitates the attention map of the next one, once the network is half trained.

    For each seed a network is trained plainly up to the switch. From there it goes on twice: as
    before (the baseline), and with the blocks imitating each other (the student).

    Args:
        weight: gamma, of the distillation summed over the paths.
        iou: alpha, of the IoU loss, before and after the switch and in both; 0 for none. It is
            over the classes that are things.
        start: the share of the epochs after which distillation is switched on.
        layers: the blocks, from the shallowest to the deepest; each imitates the one after it.
        reduction: of the distance between maps, see :func:`sad`.
        detach_target: whether the deeper block is a fixed target.
    """

    tasks = ("lanes", "segmentation")
    takes_teacher = False
    roles: Mapping[str, str] = {"baseline": "without SAD", "student": "with SAD"}

    def __init__(
        self,
        weight: Weight = 0.1,
        iou: Weight = 0.1,
        start: Annotated[float, Field(ge=0, lt=1)] = 2 / 3,
        layers: tuple[str, ...] = ("block2", "block3", "block4"),
        reduction: Reduction = "mean",
        detach_target: bool = True,
    ) -> None:
        super().__init__()
        if len(layers) < 2:
            raise UserError("self attention distillation needs two blocks or more in layers")
        self.weight = weight
        self.iou = iou
        self.start = start
        self.layers = layers
        self.reduction = reduction
        self.detach_target = detach_target
        self.before: dict[int, Network] = {}

    def rehearse(self, bench: Bench) -> None:
        self.check_task(bench.task)
        if bench.candidates:
            raise UserError(
                "a network that distils its own attention is its own teacher; leave --teacher out"
            )
        epochs = bench.training.epochs
        if epochs and self._switch(bench) == epochs:
            raise UserError(
                f"switched on after {self.start:.0%} of {epochs} epochs, distillation has no epoch "
                "left; set start lower"
            )
        student = bench.laid_out(bench.make_student(bench.seeds[0])).eval()
        sample = bench.sample()
        with torch.no_grad(), Taps(student.model, self.layers) as taps:
            for path in taps.overwritten(lambda: bench.task.run(student, sample, taps)):
                raise UserError(
                    f"what the tap {path!r} captures is overwritten in place by the layer behind "
                    "it; build that layer with inplace=False, or tap behind it"
                )
            self._terms(bench.task, bench.task.run(student, sample, taps), sample, True)
        if bench.rival is not None:
            super().rehearse(bench)

    def phases(self, bench: Bench) -> Phases:
        for seed in bench.seeds:
            yield from self._seed(bench, seed)

    def _seed(self, bench: Bench, seed: int) -> Phases:
        task, switch, end = bench.task, self._switch(bench), bench.training.epochs
        student = bench.student(seed)

        def trained(
            network: Network, taps: Taps | None, distilled: bool
        ) -> Callable[[Batch], Terms]:
            return lambda batch: self._terms(task, task.run(network, batch, taps), batch, distilled)

        # One set of hooks throughout: a compiled model does not see those that come later.
        with Taps(student.model, self.layers) as taps:
            if switch:
                terms = trained(student, taps, False)
                yield self._fit(bench, seed, "first", student, terms, 0, switch)
            self.before[seed] = _copied(bench, seed, student)
            if bench.rival is not None:
                yield from bench.plain(seed)
            elif bench.baseline:
                plain = bench.baselines[seed] = _copied(bench, seed, student)
                plain.compile_model(bench.engine.compile)
                terms = trained(plain, None, False)
                yield self._fit(bench, seed, "baseline", plain, terms, switch, end)
            terms = trained(student, taps, True)
            yield self._fit(bench, seed, "student", student, terms, switch, end)

    def _switch(self, bench: Bench) -> int:
        """The epochs without distillation."""
        return round(self.start * bench.training.epochs)

    def _fit(
        self,
        bench: Bench,
        seed: int,
        name: str,
        network: Network,
        terms: Callable[[Batch], Terms],
        begun: int,
        end: int,
    ) -> Fit:
        """Epochs ``begun`` to ``end`` of the bench's budget."""
        settings = bench.training
        return Fit(
            name=bench.label(name, seed),
            seed=seed,
            updates=[Update(train={"student": network}, terms=terms, settings=settings)],
            batches=Later(bench.batches(settings.batch_size, seed), begun),
            epochs=end - begun,
            evaluate=bench.watch(network),
            select=bench.select if end == settings.epochs else "last",
            higher_is_better=bench.task.higher_is_better,
            begun=begun,
        )

    def _terms(self, task: Task, answer: Answer, batch: Batch, distilled: bool) -> Terms:
        """Eq. 4: the task's own loss, alpha L_IoU, and once switched on gamma L_distill."""
        found = {"labels": task.loss(answer, batch)}
        if self.iou:
            found["iou"] = self.iou * iou_loss(*_soft_masks(task, answer, batch))
        if distilled:
            found["attention"] = self.weight * torch.stack(self._distances(answer)).sum()
        return found

    def _distances(self, answer: Answer) -> list[Tensor]:
        """Eq. 2, path by path."""
        maps = [answer.features[path] for path in self.layers]
        return [
            sad(shallow, deep, self.reduction, self.detach_target)
            for shallow, deep in pairwise(maps)
        ]

    # What is shown.

    def findings(self, bench: Bench, metrics: Sequence[Mapping[str, object]]) -> list[Finding]:
        """How far apart the blocks' maps are, how much of them lies on things, and the maps."""
        task = _segmentation(bench.task)
        ways = {"at the switch": self.before}
        if bench.rival is None and bench.baseline:
            ways[self.roles["baseline"]] = bench.baselines
        ways[self.roles["student"]] = bench.students
        things = task.objects.start > 0
        rows = [["", *ways]]
        columns = [
            [self._looked_at(bench, task, networks[seed]) for seed in bench.seeds]
            for networks in ways.values()
        ]
        for name in columns[0][0]:
            percent = name.startswith("on things")
            if things or not percent:
                cells = [said([one[name] for one in every], percent) for every in columns]
                rows.append([name, *cells])
        seed = bench.seeds[0]
        pictures = {}
        for number in range(min(DRAWN, len(bench.test))):
            for way, networks in ways.items():
                sheet = self._drawn(bench, networks[seed], number)
                pictures[f"test scene {number + 1}, {way}"] = sheet
        caption = (
            "Where a block looks: its squared activations, summed over channels. Each picture is "
            f"the image and the maps of {', '.join(self.layers)}, row by row. The table has the "
            "squared distance of two blocks' maps (softmax over positions), summed over positions"
        )
        caption += ", and the share of each map that lies on pixels of a thing." if things else "."
        return [Finding("Attention of the blocks", caption, rows, pictures=pictures)]

    @torch.no_grad()
    def _looked_at(self, bench: Bench, task: Segmentation, network: Network) -> dict[str, float]:
        """Distances of neighbouring maps, and the shares of maps that lie on things."""
        network.eval()
        few = bench.test.subset(range(min(SCENES, len(bench.test))))
        total: dict[str, float] = {}
        with Taps(network.model, self.layers) as taps:
            for batch in task.batches(few, batch_size=task.size).epoch(0):
                batch = moved(batch, bench.device)
                features = task.run(network, batch, taps).features
                share = len(batch["label"]) / len(few)
                for one, other in pairwise(self.layers):
                    name = f"distance {one} to {other}"
                    off = float(sad(features[one], features[other], "sum_hw"))
                    total[name] = total.get(name, 0.0) + share * off
                labels = batch["label"]
                size = (labels.shape[1], labels.shape[2])
                things = (labels >= task.objects.start) & (labels != IGNORE)
                for path in self.layers:
                    found = attention_map(features[path], size) * things
                    on, name = float(found.flatten(1).sum(1).mean()), f"on things: {path}"
                    total[name] = total.get(name, 0.0) + share * on
        return total

    @torch.no_grad()
    def _drawn(self, bench: Bench, network: Network, number: int) -> Tensor:
        """A test image and its maps in two columns, uint8 (H, W, 3)."""
        from matplotlib import colormaps

        network.eval()
        batch = next(bench.task.batches(bench.test.subset([number]), batch_size=1).epoch(0))
        batch = moved(batch, bench.device)
        with Taps(network.model, self.layers) as taps:
            features = bench.task.run(network, batch, taps).features
        image = batch["image"][0].permute(1, 2, 0).cpu()
        tiles = [image.mul(255).round()]
        for path in self.layers:
            found = _resized(energy(features[path]), (image.shape[0], image.shape[1]))[0].cpu()
            bright = (found / found.max().clamp(min=1e-12)).sqrt().numpy()
            tiles.append(torch.from_numpy(colormaps["magma"](bright)[..., :3] * 255).round())
        tiles += [torch.full_like(tiles[0], 255)] * (len(tiles) % 2)
        lines = [torch.cat(tiles[i : i + 2], 1) for i in range(0, len(tiles), 2)]
        sheet = torch.cat([line.to(torch.uint8) for line in lines])
        times = max(1, WIDE // sheet.shape[1])
        return sheet.repeat_interleave(times, 0).repeat_interleave(times, 1)


def _resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """B: maps (B, H, W) at a size, bilinearly."""
    if tuple(maps.shape[1:]) == size:
        return maps
    return F.interpolate(maps[:, None], size, mode="bilinear", align_corners=False)[:, 0]


def _soft_masks(task: Task, answer: Answer, batch: Batch) -> tuple[Tensor, Tensor]:
    """Probabilities and truth (B, H, W, C) of the classes that are things, 0 without a class."""
    things, labels = _segmentation(task).objects, batch["label"]
    known = (labels != IGNORE)[..., None]
    logits = answer["logits"].float()
    truth = F.one_hot(labels.where(known[..., 0], 0), logits.shape[-1]) * known
    chosen = slice(things.start, things.stop)
    return (logits.softmax(-1) * known)[..., chosen], truth[..., chosen].to(logits)


def _segmentation(task: Task) -> Segmentation:
    assert isinstance(task, Segmentation)
    return task


def _copied(bench: Bench, seed: int, network: Network) -> Network:
    """A network of its own with the same weights, without hooks."""
    copied = bench.laid_out(bench.make_student(seed))
    copied.load_state_dict(network.state_dict())
    return copied
