"""Distilling the Knowledge in a Neural Network. Hinton, Vinyals, Dean, 2015 (arXiv 1503.02531).

Section 5: what a classifier of many classes, the generalist, confuses with one another is left to
specialists. Each is a copy of the generalist that learns to tell a few classes apart, and has one
more output, the dustbin, for all others. When an image comes, only the specialists for what the
generalist holds most probable are asked, and the distribution that agrees best with all who spoke
is the answer.

Needs: one classifier that ends in a linear layer, as the teacher; labelled images in memory or by
name. The specialists are of the same make, so the student is named as the teacher is.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from limbeck.data.augment import uniforms
from limbeck.data.data import Split
from limbeck.errors import UserError
from limbeck.models.head import last_linear
from limbeck.tasks.classification import Classification
from limbeck.training.bench import Bench
from limbeck.training.finding import Finding
from limbeck.training.method import Method, Phases
from limbeck.training.network import Network
from limbeck.training.phases import Fit, Solve
from limbeck.training.seeding import derive
from limbeck.training.task import Batch, Batches, model_output

Classes = tuple[int, ...]

_DRAWN = 1503


def confusable_classes(
    probabilities: Tensor,
    clusters: int,
    *,
    scaled: bool = True,
    size: int | None = None,
    most: int | None = None,
    seed: int = 0,
) -> tuple[Classes, ...]:
    """Sets of classes that are often predicted together (section 5.1).

    K-means over the columns of the covariance matrix of the predicted probabilities: two classes
    whose probabilities rise and fall with the same others are near each other. A set of a single
    class, and one of all classes, is left out: a specialist would have nothing to tell apart.

    Args:
        probabilities: (N, C) of the generalist on N >= 2 inputs, labels are not needed.
        clusters: how many clusters are looked for, 1 to C.
        scaled: divide the covariances by the deviations of both classes. As they are, the entries
            on the diagonal, which say how widely a class is predicted and not with which other,
            outweigh all others, and K-means parts off single classes.
        size: so many classes a set, the nearest to a cluster's centre; the sets may then overlap,
            as those of the paper do. The clusters themselves, which do not, if not given.
        most: of a larger cluster so many are kept, those that vary most with the rest of it.
        seed: of K-means' first centres.

    Returns:
        The sets, each in ascending order and the first class deciding their order; perhaps none.

    >>> p = torch.tensor([[.6, .4, 0, 0], [.4, .6, 0, 0], [0, 0, .5, .5], [0, 0, .7, .3]])
    >>> confusable_classes(p, clusters=2)
    ((0, 1), (2, 3))
    """
    count, classes = probabilities.shape
    if count < 2 or not 1 <= clusters <= classes:
        raise UserError(
            f"{count} predictions of {classes} classes cannot be parted into {clusters} clusters; "
            "there are at least two predictions and at most as many clusters as classes"
        )
    # Here, as scikit-learn takes longer to import than a small network to train.
    from sklearn.cluster import KMeans

    covariance = torch.cov(probabilities.double().T)
    if scaled:
        deviation = covariance.diagonal().clamp(min=1e-30).sqrt()
        covariance = covariance / torch.outer(deviation, deviation)
    found = KMeans(clusters, n_init=10, random_state=seed).fit(covariance.numpy())
    label = torch.from_numpy(found.labels_)
    sets = set()
    for number, centre in enumerate(torch.from_numpy(found.cluster_centers_)):
        members = (label == number).nonzero().flatten()
        if size is not None and len(members):
            distances = (covariance - centre).square().sum(1)
            members = distances.argsort(stable=True)[:size]
        elif most is not None and len(members) > most:
            inside = covariance[members][:, members]
            together = inside.sum(1) - inside.diagonal()
            members = members[together.argsort(descending=True, stable=True)[:most]]
        if 1 < len(members) < classes:
            sets.add(tuple(sorted(members.tolist())))
    return tuple(sorted(sets))


def specialist_split(split: Split, special: Sequence[int], seed: int, epoch: int) -> Split:
    """What a specialist sees in one epoch (section 5.2): half special classes, half the rest.

    All samples of the special classes, and as many drawn at random from the rest, others in each
    epoch. Who is drawn is a function of (seed, sample, epoch). Where the rest is the smaller part,
    its samples come as often as it takes, equally often but for one.

    Args:
        split: with labels.
        special: the specialist's classes; their places here are the new labels, and
            ``len(special)`` is that of the dustbin.

    Returns:
        The samples with the specialist's labels, identities kept.

    >>> from limbeck.data import ResidentImages
    >>> pixels = ResidentImages(torch.zeros(6, 1, 2, 2, dtype=torch.uint8))
    >>> split = Split("train", pixels, torch.tensor([0, 1, 2, 3, 0, 1]))
    >>> specialist_split(split, [1], seed=0, epoch=0).labels.tolist()
    [0, 0, 1, 1]
    """
    own, rest = _parted(split, special)
    if len(rest):
        # Of other numbers than augmentation's: else who is drawn would be cropped alike.
        chance = uniforms(split.rows[rest], 1, derive(seed, _DRAWN), epoch).flatten()
        order = rest[chance.argsort(stable=True)]
        rest = order.repeat(-(-len(own) // len(rest)))[: len(own)]
    chosen = split.subset(torch.cat([own, rest]))
    assert split.labels is not None
    assert chosen.labels is not None
    place = torch.full((max(int(split.labels.max()), *special) + 1,), len(special))
    place[list(special)] = torch.arange(len(special))
    return replace(chosen, labels=place[chosen.labels])


def oversampling(split: Split, special: Sequence[int]) -> float:
    """How many times as often a sample of the special classes is seen as one of the rest.

    >>> from limbeck.data import ResidentImages
    >>> pixels = ResidentImages(torch.zeros(6, 1, 2, 2, dtype=torch.uint8))
    >>> oversampling(Split("train", pixels, torch.tensor([0, 1, 2, 3, 0, 1])), [1])
    2.0
    """
    own, rest = _parted(split, special)
    if not len(own) or not len(rest):
        raise UserError(
            f"a specialist for {len(special)} classes needs samples of them and of others; the "
            f"{split.name} split has {len(own)} and {len(rest)}"
        )
    return len(rest) / len(own)


def _parted(split: Split, special: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The positions of the special classes' samples, and those of the rest."""
    if split.labels is None:
        raise UserError("specialists are told by labels which samples are theirs; give some")
    own = torch.isin(split.labels, torch.tensor(list(special)))
    return own.nonzero().flatten(), (~own).nonzero().flatten()


def correct_dustbin(logits: Tensor, ratio: float) -> Tensor:
    """Undo what the sampling did to the dustbin (section 5.2): its logit rises by log ``ratio``.

    Args:
        logits: (..., C_m + 1), the dustbin last.
        ratio: how many times as often as the rest the special classes were seen, above 0.

    >>> correct_dustbin(torch.zeros(2), 4.0).softmax(0)
    tensor([0.2000, 0.8000])
    """
    if not 0 < ratio < math.inf:
        raise UserError(f"an oversampling ratio is a number above 0, not {ratio}")
    return torch.cat([logits[..., :-1], logits[..., -1:] + math.log(ratio)], dim=-1)


def merge(
    generalist: Tensor,
    specialists: Sequence[Tensor],
    members: Sequence[Sequence[int]],
    active: Tensor | None = None,
    *,
    tolerance: float | None = None,
    most: int = 1000,
) -> Tensor:
    r"""The distribution that agrees best with all who speak (section 5.3, eq. 5).

    With :math:`p^g` the generalist's distribution and :math:`p^m` those of the specialists that
    are active, it is the q with the least

    .. math:: KL(p^g \| q) + \sum_m KL(p^m \| q),

    where the probabilities of q outside a specialist's classes are summed into its dustbin.
    The paper descends along the gradient for each image. But up to a constant this is minus the
    log-likelihood of q for 1 + M observations, some of which say only "one of the others", so EM
    solves it: complete each distribution by spreading its dustbin over the other classes in
    proportion to q, and let the mean of the completed ones be the next q. Each step lowers the sum,
    and a q that stays is a stationary point; as minus the logarithm of a sum is convex, strictly so
    in :math:`p^g`'s term, there is only one. Where one specialist alone is active, the first step
    ends there; elsewhere two steps are extrapolated (SQUAREM, Varadhan and Roland 2008) wherever
    that lowers the sum further.

    Args:
        generalist: logits or log-probabilities (B, C).
        specialists: for each, logits or log-probabilities (B, C_m + 1), the dustbin last.
        members: for each, its C_m classes in the order of its outputs.
        active: bool (B, M); all are if not given. A row without any is the generalist's own.
        tolerance: the relative change of the probabilities in a step at which the steps end; that
            of rounding if not given.
        most: rounds of three steps at the most.

    Returns:
        Log-probabilities (B, C), in float32 or better. Where a specialist spoke they are at least
        -66 in float32.

    Raises:
        UserError: logits or classes that do not fit together.

    >>> general, special = torch.tensor([[.5, .3, .2]]).log(), torch.tensor([[.2, .7, .1]]).log()
    >>> merge(general, [special], members=[[0, 1]]).exp()
    tensor([[0.3500, 0.5000, 0.1500]])
    """
    log_g = _precise(generalist).log_softmax(-1)
    if not specialists:
        return log_g
    number = len(specialists)
    active = log_g.new_ones(len(log_g), number, dtype=torch.bool) if active is None else active
    outside = log_g.new_ones(number, log_g.shape[1])
    known, dustbins = log_g.exp(), log_g.new_zeros(len(log_g), number)
    for m, (logits, own) in enumerate(zip(specialists, members, strict=True)):
        _fits(logits, own, log_g)
        p = torch.where(active[:, m, None], logits.to(log_g).softmax(-1), 0)
        place = torch.as_tensor(own, device=log_g.device)
        outside[m, place] = 0
        known = known.index_add(1, place, p[:, :-1])
        dustbins[:, m] = p[:, -1]
    speakers = 1 + active.sum(1, keepdim=True)
    limits = torch.finfo(log_g.dtype)
    enough = 8 * limits.eps if tolerance is None else tolerance
    # Far enough above the least number that a quotient of two probabilities is one, too.
    floor = limits.tiny**0.75

    def step(q: Tensor) -> Tensor:
        share = dustbins / (q @ outside.T).clamp(min=floor)
        return ((known + q * (share @ outside)) / speakers).clamp(min=floor)

    def divergence(q: Tensor) -> Tensor:
        """Up to a constant, (B, 1)."""
        summed = (q @ outside.T).clamp(min=floor)
        return -(known * q.log()).sum(1, True) - (dustbins * summed.log()).sum(1, True)

    q = step(log_g.exp().clamp(min=floor))
    for _ in range(most):
        one = step(q)
        if ((one - q).abs() <= enough * q).all():
            break
        two = step(one)
        far = step(_extrapolated(q.log(), one.log(), two.log()).clamp(min=floor))
        q = torch.where(divergence(far) < divergence(two), far, two)
    return torch.where(speakers > 1, q.log(), log_g)


def _extrapolated(start: Tensor, one: Tensor, two: Tensor) -> Tensor:
    """Where a row of steps leads to, from two of them: log-probabilities to probabilities."""
    first = one - start
    change = two - one - first
    lengths = (torch.linalg.vector_norm(t, dim=1, keepdim=True) for t in (first, change))
    stride = torch.div(*lengths).nan_to_num(1.0).clamp(1, 1e4)
    return (start + 2 * stride * first + stride**2 * change).softmax(1)


def _fits(logits: Tensor, own: Sequence[int], generalist: Tensor) -> None:
    rows, classes = generalist.shape
    if logits.shape != (rows, len(own) + 1) or len(set(own)) != len(own):
        raise UserError(
            f"a specialist for the classes {list(own)} answers {rows} samples with logits of the "
            f"shape {(rows, len(own) + 1)}, not {tuple(logits.shape)}"
        )
    if not all(0 <= c < classes for c in own):
        raise UserError(f"a specialist's classes lie from 0 to {classes - 1}, not {list(own)}")


def specialist(
    generalist: nn.Module, classes: int, special: Sequence[int], ratio: float
) -> nn.Module:
    """A copy of the generalist with outputs for the special classes and the dustbin (section 5.2).

    The special classes keep the generalist's weights. The dustbin's are the mean of those of the
    other classes, its bias higher by the logarithm of their number over ``ratio``: with
    equal logits for all of them, what it stands for is their sum as it is sampled.

    Args:
        generalist: its last linear layer has an output for each class.
        classes: how many there are.
        special: the special classes.
        ratio: of the specialist's sampling, :func:`oversampling`.

    Raises:
        UserError: no such layer.
    """
    model = copy.deepcopy(generalist).requires_grad_(True)
    path, head = _head(model, classes)
    chosen = torch.tensor(list(special))
    rest = torch.tensor([c for c in range(classes) if c not in set(special)])
    new = nn.Linear(head.in_features, len(special) + 1, bias=head.bias is not None).to(head.weight)
    with torch.no_grad():
        new.weight.copy_(torch.cat([head.weight[chosen], head.weight[rest].mean(0, True)]))
        if head.bias is not None:
            dustbin = head.bias[rest].mean(0, True) + math.log(len(rest) / ratio)
            new.bias.copy_(torch.cat([head.bias[chosen], dustbin]))
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, new)
    return model


def _head(model: nn.Module, classes: int) -> tuple[str, nn.Linear]:
    """The last linear layer, whose outputs are the logits, and its path."""
    found = last_linear(model, classes)
    if found is None or not found[0]:
        raise UserError(
            f"{type(model).__name__} does not end in a linear layer with an output for each of "
            f"the {classes} classes, which a specialist has another one in place of; choose a "
            "generalist that does"
        )
    return found


class SpecialistEnsemble(nn.Module):
    """A generalist, its specialists, and what both agree on (section 5.3).

    A specialist is asked only about samples for which it is active: one of its classes is among
    the ``top`` that the generalist holds most probable. So with disjoint sets and ``top=1`` a
    sample costs two passes at the most, however many specialists there are.

    Args:
        generalist: images to logits (B, C).
        specialists: images to logits (B, C_m + 1), the dustbin last.
        members: the C_m classes of each.
        ratios: how many times as often as the rest each saw its classes.
        top: n of the paper, at least 1.

    Example:
        >>> whole, part = nn.Linear(2, 3), nn.Linear(2, 3)
        >>> ensemble = SpecialistEnsemble(whole, [part], members=[[0, 1]], ratios=[2.0])
        >>> ensemble(torch.zeros(4, 2)).exp().sum(1).allclose(torch.ones(4))
        True
    """

    def __init__(
        self,
        generalist: nn.Module,
        specialists: Sequence[nn.Module],
        members: Sequence[Sequence[int]],
        ratios: Sequence[float],
        top: int = 1,
    ) -> None:
        super().__init__()
        self.generalist = generalist
        self.specialists = nn.ModuleList(specialists)
        self.members = tuple(tuple(own) for own in members)
        self.ratios = tuple(ratios)
        self.top = top

    def forward(self, images: Tensor) -> Tensor:
        """Log-probabilities (B, C) of the merged distribution."""
        return self.answer(images)[0]

    def answer(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities (B, C), and which specialists were asked about which image, (B, M)."""
        general = model_output(self.generalist(images))
        active = self.active(general)
        answers = []
        for m, (model, own) in enumerate(zip(self.specialists, self.members, strict=True)):
            rows = active[:, m].nonzero().flatten()
            logits = general.new_zeros(len(general), len(own) + 1)
            if len(rows):
                asked = model_output(model(images[rows]))
                logits = logits.index_copy(0, rows, correct_dustbin(asked, self.ratios[m]))
            answers.append(logits)
        return merge(general, answers, self.members, active), active

    def active(self, general: Tensor) -> Tensor:
        """Which specialists have one of the ``top`` classes of the generalist's logits, (B, M)."""
        best = general.topk(min(self.top, general.shape[1]), dim=1).indices
        there = torch.zeros_like(general, dtype=torch.bool).scatter(1, best, True)
        columns = [there[:, list(own)].any(1) for own in self.members]
        return torch.stack(columns, 1) if columns else there[:, :0]


class SpecialistBatches:
    """A specialist's training batches, of other samples of the rest in each epoch."""

    def __init__(
        self, task: Classification, split: Split, special: Classes, batch_size: int, seed: int
    ) -> None:
        self.task = task
        self.split = split
        self.special = special
        self.batch_size = batch_size
        self.seed = seed

    def _batches(self, epoch: int) -> Batches:
        drawn = specialist_split(self.split, self.special, self.seed, epoch)
        return self.task.batches(drawn, batch_size=self.batch_size, seed=self.seed, train=True)

    def __len__(self) -> int:
        return len(self._batches(0))

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of one epoch from step ``start`` on."""
        return self._batches(epoch).epoch(epoch, start)


class Specialists(Method):
    """A generalist, the teacher, is joined by specialists for the classes that it confuses.

    The budget of the recipe's student is that of each specialist; what the run compares is the
    generalist alone, as the baseline, with all of them together, as the student.

    Args:
        clusters: how many sets of confusable classes are looked for, each a specialist.
        scaled: look for them in the correlations of the predicted probabilities; otherwise in
            their covariances, as the paper does (see :func:`confusable_classes`).
        size: so many classes for each specialist, which may then share some; the cluster's own if
            not given.
        most: classes of a specialist at the most, where ``size`` is not given.
        top: a specialist is asked where one of its classes is among so many of the generalist's
            most probable (n, 1 in the paper).
    """

    tasks = ("classification",)
    roles: Mapping[str, str] = {"baseline": "generalist", "student": "generalist with specialists"}

    def __init__(
        self,
        clusters: Annotated[int, Field(ge=2)] = 8,
        scaled: bool = True,
        size: Annotated[int, Field(ge=2)] | None = None,
        most: Annotated[int, Field(ge=2)] | None = None,
        top: Annotated[int, Field(ge=1)] = 1,
    ) -> None:
        super().__init__()
        self.clusters = clusters
        self.scaled = scaled
        self.size = size
        self.most = most
        self.top = top

    def rehearse(self, bench: Bench) -> None:
        task = bench.task
        if not isinstance(task, Classification):
            raise UserError(f"specialists share out classes, which {task.name} does not have")
        if len(bench.candidates) != 1:
            raise UserError(
                f"specialists are copies of one generalist; name one teacher, not "
                f"{len(bench.candidates)}"
            )
        self._rehearse_data(task, bench.transfer)
        with torch.random.fork_rng():
            generalist = bench.laid_out(copy.deepcopy(bench.candidates[0].network)).eval()
            student = bench.make_student(bench.seeds[0])
            if _make(student) != _make(generalist):
                raise UserError(
                    "the specialists are copies of the generalist, so the student is of the same "
                    "make as the teacher; give the same model to --student as to --teacher"
                )
            _rehearse_head(task, generalist, bench.sample())
            if bench.rival is not None:
                rival = bench.laid_out(bench.rival.make(bench.seeds[0]))
                task.loss(task.run(rival, bench.sample()), bench.sample())

    def _rehearse_data(self, task: Classification, split: Any) -> None:
        classes = len(task.classes)
        if not isinstance(split, Split):
            raise UserError(
                "specialists draw their own samples from the training images: give the data by "
                "name or as limbeck.data.Data instead of your own loaders"
            )
        if split.labels is None:
            raise UserError(
                "specialists learn from labels, and the students' images have none; leave out "
                "data.unlabelled, data.labelled and data.transfer.labels"
            )
        if 2 * self.clusters > classes:
            raise UserError(
                f"Specialists(clusters={self.clusters}): {classes} classes make at most "
                f"{classes // 2} clusters of two or more"
            )
        if self.size is not None and self.size >= classes:
            raise UserError(
                f"Specialists(size={self.size}): of {classes} classes at most {classes - 1} are a "
                "specialist's, as the others make its dustbin"
            )
        absent = sorted(set(range(classes)) - set(split.labels.unique().tolist()))
        if absent:
            raise UserError(
                f"the students' images lack the class {task.classes[absent[0]]!r}, which may be a "
                "specialist's; choose data.transfer so that each class is there"
            )

    def phases(self, bench: Bench) -> Phases:
        yield from bench.teach()
        generalist = bench.candidates[0].network
        # The generalist is shown as the baseline, and once is enough.
        bench.teacher = None
        found = yield Solve(name="clusters", run=lambda _: self._clusters(bench, generalist))
        members = tuple(tuple(own) for own in found)
        if not members:
            bench.voice.warn("no two classes are confusable: there is nothing to specialise in")
        for seed in bench.seeds:
            if bench.rival is not None:
                yield from bench.plain(seed)
            elif bench.baseline:
                bench.baselines[seed] = generalist
            yield from self._specialise(bench, seed, generalist, members)

    def _clusters(self, bench: Bench, generalist: Network) -> list[list[int]]:
        """By what the generalist predicts for the training images as they are.

        There are always some, and more than validation images; their labels are not looked at.
        """
        assert isinstance(bench.task, Classification), "the rehearsal has seen to it"
        logits, _ = bench.task.predict(generalist, bench.transfer)
        found = confusable_classes(
            logits.softmax(1),
            self.clusters,
            scaled=self.scaled,
            size=self.size,
            most=self.most,
            seed=bench.seeds[0],
        )
        return [list(own) for own in found]

    def _specialise(
        self, bench: Bench, seed: int, generalist: Network, members: Sequence[Classes]
    ) -> Phases:
        task, split = bench.task, bench.transfer
        assert isinstance(task, Classification), "the rehearsal has seen to it"
        ratios = [oversampling(split, own) for own in members]
        networks = []
        for number, (own, ratio) in enumerate(zip(members, ratios, strict=True), start=1):
            model = specialist(generalist.model, len(task.classes), own, ratio)
            network = bench.laid_out(Network(model, generalist.input))
            networks.append(network)
            yield self._fit_specialist(bench, seed, f"specialist-{number}", network, own)
        whole = SpecialistEnsemble(
            copy.deepcopy(generalist.model), [n.model for n in networks], members, ratios, self.top
        ).requires_grad_(False)
        named = Network(whole, generalist.input, classes=task.classes)
        bench.students[seed] = bench.laid_out(named).eval()

    def _fit_specialist(
        self, bench: Bench, seed: int, name: str, network: Network, own: Classes
    ) -> Fit:
        task, settings = bench.task, bench.training
        assert isinstance(task, Classification), "the rehearsal has seen to it"
        usual = bench.fit(bench.label(name, seed), network, settings, seed=seed)
        held, evaluate = bench.validation, None
        if isinstance(held, Split) and held.labels is not None:
            mixed = specialist_split(held, own, seed=0, epoch=0)
            if len(mixed):
                evaluate = lambda: _decided_first(task, network, mixed)  # noqa: E731
        batches = SpecialistBatches(task, bench.transfer, own, settings.batch_size, seed)
        return replace(usual, batches=batches, evaluate=evaluate)

    def findings(self, bench: Bench, metrics: Sequence[Mapping[str, Any]]) -> list[Finding]:
        task, first = bench.task, bench.students[bench.seeds[0]].model
        assert isinstance(task, Classification)
        assert isinstance(first, SpecialistEnsemble)
        if not first.members:
            return []
        return [_who_knows_what(task, first), self._by_cover(bench, task, first.members)]

    def _by_cover(self, bench: Bench, task: Classification, members: Sequence[Classes]) -> Finding:
        """The paper's table 4."""
        alone, labels = task.predict(bench.candidates[0].network, bench.test)
        cover = torch.zeros(len(task.classes), dtype=torch.int64)
        for own in members:
            cover[list(own)] += 1
        before = (alone.argmax(1) == labels).double()
        together = [task.predict(bench.students[s], bench.test)[0] for s in bench.seeds]
        after = torch.stack([(z.argmax(1) == labels).double() for z in together]).mean(0)
        table = [["specialists", "test samples", "generalist", "with them", "change", "relative"]]
        for number in cover.unique().tolist():
            table.append([str(number), *_change(before, after, cover[labels] == number)])
        table.append(["all", *_change(before, after, torch.ones_like(labels, dtype=torch.bool))])
        seeds = f"mean of {len(bench.seeds)} seeds; " if len(bench.seeds) > 1 else ""
        return Finding(
            "How many specialists know the right class",
            "Test samples by the number of specialists among whose classes the right one is, and "
            f"the share of them classified correctly ({seeds}the paper's table 4). Change: "
            "samples that are right with the specialists less those that are without; relative: "
            "the same over those that were right before.",
            table,
        )


def _change(before: Tensor, after: Tensor, chosen: Tensor) -> list[str]:
    number, right = int(chosen.sum()), float(before[chosen].sum())
    gained = float(after[chosen].sum()) - right
    shares = [f"{100 * x / max(number, 1):.2f} %" for x in (right, right + gained)]
    relative = f"{100 * gained / right:+.1f} %" if right else ""
    return [f"{number:,}", *shares, f"{gained:+.1f}", relative]


def _who_knows_what(task: Classification, ensemble: SpecialistEnsemble) -> Finding:
    table = [["specialist", "classes", "they are", "seen as often as the rest"]]
    for number, (own, ratio) in enumerate(
        zip(ensemble.members, ensemble.ratios, strict=True), start=1
    ):
        names = ", ".join(task.classes[c] for c in own)
        table.append([str(number), str(len(own)), names, f"{ratio:.1f} times"])
    known = {c for own in ensemble.members for c in own}
    rest = [name for c, name in enumerate(task.classes) if c not in known]
    table.append(["none", str(len(rest)), ", ".join(rest), ""])
    return Finding(
        "What the specialists are for",
        "Classes that the generalist confuses: clusters of the columns of the covariance or "
        "correlation matrix of its predictions. The last row has the classes that no specialist "
        "knows.",
        table,
    )


def _decided_first(task: Classification, network: Network, split: Split) -> dict[str, float]:
    found = task.measure(network, split)
    return {task.metric: found[task.metric], **found}


def _make(network: Network) -> tuple[str, dict[str, torch.Size]]:
    """What two networks of the same make have in common: their kind and their tensors' shapes."""
    shapes = {name: tensor.shape for name, tensor in network.model.state_dict().items()}
    return type(network.model).__name__, shapes


def _rehearse_head(task: Classification, generalist: Network, sample: Batch) -> None:
    """Find out whether the outputs are those of the layer that a specialist has another in for."""
    classes, special = len(task.classes), (0, 1)
    model = specialist(generalist.model, classes, special, ratio=1.0)
    network = Network(model, generalist.input).lay_out(generalist.memory_format).eval()
    with torch.no_grad():
        whole = task.run(generalist, sample)["logits"]
        if whole.shape[1] != classes:
            raise UserError(
                f"the generalist has {whole.shape[1]} outputs, but the data {classes} classes"
            )
        try:
            part = task.run(network, sample)["logits"]
        except RuntimeError:  # what follows the layer may count its outputs
            part = whole
    same = part.shape == (len(whole), len(special) + 1) and torch.allclose(
        part[:, :2].float(), whole[:, :2].float(), rtol=1e-3, atol=1e-3
    )
    if not same:
        raise UserError(
            f"the outputs of {type(generalist.model).__name__} are not those of its last linear "
            "layer, which a specialist has another one in place of; choose a generalist whose are"
        )


def _precise(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
