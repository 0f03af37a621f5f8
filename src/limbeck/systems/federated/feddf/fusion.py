"""FedDF's server: averages, the distillation of the clients' ensemble, and the rounds.

Needs: classification data in memory or by name; unlabelled images (``data.unlabelled``), in place
of which a share of the training images is held back from the clients; validation data for early
stopping, the best snapshot and drop-worst.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from limbeck.data.data import Split
from limbeck.errors import UserError
from limbeck.models.build import build
from limbeck.report.verdict import said
from limbeck.systems.federated.feddf import clients as federation
from limbeck.systems.federated.feddf.clients import Carrier, Client, Order, put, weights_of
from limbeck.tasks.classification import Classification
from limbeck.training.bench import Bench
from limbeck.training.finding import Chart, Finding
from limbeck.training.method import Method, Phases
from limbeck.training.network import Network
from limbeck.training.phases import Fit, Journal, Solve, Training, Update
from limbeck.training.profiling import stretch
from limbeck.training.seeding import derive
from limbeck.training.task import Batch, Batches, Terms
from limbeck.training.teacher import Teacher

Target = Literal["avg_logits", "avg_probs", "avg_losses"]
Rival = Literal["fedprox", "fedavgm"]
RIVALS: dict[str, str] = {"fedprox": "FedProx", "fedavgm": "FedAvgM"}
ALIVE = 1.2
"""A client whose accuracy is below so many times chance is left out, if the worst are."""
OUTLIER = 1.5
"""A client so many deviations below the mean is left out of the ensemble, if the worst are."""

Count = Annotated[int, Field(ge=1, le=10**6)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


def feddf(
    student: Tensor,
    members: Tensor,
    target: Target = "avg_logits",
    weights: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    r"""Divergence of the student from the clients' ensemble (Algorithm 1, line 9), batch mean.

    .. math::
        KL\Big(\sigma\big(\textstyle\sum_k w_k f_k / T\big) \,\Big\|\, \sigma(f_s / T)\Big)

    for ``avg_logits``, which the paper uses; for ``avg_probs`` the target is
    :math:`\sum_k w_k \sigma(f_k / T)`, for ``avg_losses`` the loss is the weighted sum of the
    divergences from each client. There is no factor T^2.

    Args:
        student: logits (B, C).
        members: logits of the clients, (K, B, C); no gradient flows into them.
        target: how the clients are averaged.
        weights: (K,), at least 0, which sum to one; equal if not given.
        temperature: T, above 0.

    Returns:
        A scalar in nats, at least 0 up to rounding.

    Raises:
        UserError: shapes that do not fit, or a temperature that is not positive.

    >>> members = torch.tensor([[[2.0, 0.0]], [[0.0, 2.0]]])
    >>> round(float(feddf(torch.zeros(1, 2), members, "avg_losses")), 7)
    0.3278133
    """
    if members.ndim != 3 or members.shape[1:] != student.shape:
        raise UserError(
            f"the student's logits have the shape {tuple(student.shape)}, the clients' "
            f"{tuple(members.shape)}; they must be (B, C) and (K, B, C)"
        )
    if not 0 < temperature < math.inf:
        raise UserError(f"a temperature is a number above 0, not {temperature}")
    z = student.to(torch.promote_types(student.dtype, torch.float32)) / temperature
    f = members.detach().to(z) / temperature
    shares = torch.full_like(f[:, 0, 0], 1 / len(f)) if weights is None else weights.to(f)
    if shares.shape != f.shape[:1]:
        raise UserError(f"{len(f)} clients need {len(f)} weights, not {tuple(shares.shape)}")
    shares = shares.view(-1, 1, 1)
    log_q = z.log_softmax(-1)
    if target == "avg_losses":
        log_p = f.log_softmax(-1)
        return (shares * log_p.exp() * (log_p - log_q)).sum((0, 2)).mean()
    if target == "avg_probs":
        wanted = (shares * f.softmax(-1)).sum(0)
        return F.kl_div(log_q, wanted, reduction="batchmean")
    log_p = (shares * f).sum(0).log_softmax(-1)
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def average(received: Sequence[Sequence[Tensor]], weights: Sequence[float]) -> list[Tensor]:
    """The weighted mean of several networks, tensor by tensor (Algorithm 1, line 6).

    Batch norm statistics are averaged like weights. Integers, the batches that a batch norm has
    seen, have no mean: the first network's are taken.

    Args:
        received: each network's tensors, in the same order.
        weights: one a network, at least 0; they are divided by their sum.

    Returns:
        Tensors in the types that came, summed in float64.

    Raises:
        UserError: no network, or weights that do not fit.

    >>> average([[torch.tensor([1.0])], [torch.tensor([4.0])]], [300, 100])
    [tensor([1.7500])]
    """
    if not received or len(weights) != len(received) or min(weights) < 0 or sum(weights) <= 0:
        raise UserError(
            f"{len(received)} networks cannot be averaged by the weights {list(weights)}"
        )
    total = float(sum(weights))
    found = []
    for tensors in zip(*received, strict=True):
        first = tensors[0]
        if not first.is_floating_point():
            found.append(first.clone())
            continue
        mean = torch.zeros_like(first, dtype=torch.float64)
        for tensor, weight in zip(tensors, weights, strict=True):
            mean += tensor.double() * (weight / total)
        found.append(mean.to(first.dtype))
    return found


def server_momentum(
    before: Tensor, mean: Tensor, velocity: Tensor, beta: float
) -> tuple[Tensor, Tensor]:
    """FedAvgM's step from the weights before a round towards the clients' mean.

    Args:
        before, mean, velocity: of one shape.
        beta: the momentum, 0 <= beta < 1; 0 is FedAvg.

    Returns:
        The weights after the round, and the new velocity.

    >>> one, zero = torch.tensor([1.0]), torch.tensor([0.0])
    >>> server_momentum(one, zero, velocity=one, beta=0.5)
    (tensor([-0.5000]), tensor([1.5000]))
    """
    velocity = beta * velocity + (before - mean)
    return before - velocity, velocity


def drop_worst(accuracies: Sequence[float], classes: int) -> tuple[list[int], list[int]]:
    """The clients that are averaged, and those that are in the ensemble, by validation accuracy.

    A client below 1.2 times chance is in neither. Where there is none, those are left out of the
    ensemble whose share of all accuracy lies more than 1.5 standard deviations below the mean,
    both taken without the best client. If nobody is left, nobody is dropped.

    Args:
        accuracies: of the clients, 0 to 1.
        classes: of the task; chance is one over them.

    Returns:
        Positions of clients, twice, in rising order.

    >>> drop_worst([0.42, 0.40, 0.40, 0.40, 0.38], classes=10)
    ([0, 1, 2, 3, 4], [0, 1, 2, 3])
    >>> drop_worst([0.5, 0.11, 0.6], classes=10)
    ([0, 2], [0, 2])
    """
    everyone = list(range(len(accuracies)))
    alive = [k for k in everyone if accuracies[k] >= ALIVE / classes]
    if not alive:
        return everyone, everyone
    if len(alive) < len(everyone):
        return alive, alive
    total = sum(accuracies)
    shares = [a / total for a in accuracies]
    return everyone, [k for k in everyone if shares[k] >= _limit(shares)]


def _limit(shares: Sequence[float]) -> float:
    """Below which a share of the accuracy is an outlier."""
    rest = sorted(shares)[:-1]
    if not rest:
        return 0.0
    mean = sum(rest) / len(rest)
    deviation = math.sqrt(sum((s - mean) ** 2 for s in rest) / len(rest))
    # Equal accuracies have a mean that rounds to either side of them.
    return mean - OUTLIER * deviation - 1e-12


class Stretches:
    """Training batches in stretches of so many steps, each an epoch of a ``Fit``.

    Args:
        batches: what is passed through, again and again.
        steps: in a stretch.
        begun: the steps that other rounds have taken.
    """

    def __init__(self, batches: Batches, steps: int, begun: int = 0) -> None:
        self.batches = batches
        self.steps = steps
        self.begun = begun

    def __len__(self) -> int:
        return self.steps

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of one stretch."""
        at = self.begun + epoch * self.steps + start
        left = self.steps - start
        while left > 0:
            number, step = divmod(at, len(self.batches))
            for batch in self.batches.epoch(number, step):
                if not left:
                    return
                yield batch
                at, left = at + 1, left - 1


@dataclass
class Ground:
    """What one seed's ways share: clients with their splits, architectures, unlabelled images."""

    seed: int
    clients: dict[int, Client]
    networks: list[Network]
    public: Split

    def group(self, client: int) -> int:
        """Which architecture a client has."""
        return client % len(self.networks)


@dataclass
class Way:
    """A federation's course: its networks now, one an architecture, and what each round said."""

    networks: list[Network]
    rounds: list[dict[str, Any]] = field(default_factory=list)
    averages: list[Network] = field(default_factory=list)
    ensemble: Teacher | None = None
    velocity: nn.ModuleList | None = None


class FedDF(Method):
    """Clients, rounds, and on the server the distillation of their ensemble.

    The student's training in a recipe is the local one, its epochs those of one round. The
    baseline is FedAvg: the same clients, the same split, the same local training, as many rounds,
    without the distillation.

    Args:
        rounds: of communication.
        clients: how many there are.
        fraction: C, the share of them that is drawn each round.
        alpha: of the Dirichlet split: 100 is nearly i.i.d., 0.1 strongly skewed.
        architectures: further networks by name; client k has the one of number k modulo all, the
            recipe's student being number 0. The student and FedAvg's network in the comparison are
            of number 0; the others are in the report.
        averaging: weighs clients by their ``samples`` (the paper) or equally, ``uniform`` (its
            code).
        target: how the ensemble is made of the clients' logits (see :func:`feddf`).
        ensemble: the clients' weights in it: ``uniform``, or their validation ``accuracy``.
        temperature: of both sides.
        steps, every, patience: of the distillation in a round, how often it is validated and after
            how many steps without a better measure it stops; the latter two in steps.
        rate, batch_size, clip: of its Adam, whose rate falls to zero by a cosine over ``steps``.
        start: what the distillation begins with: the ``average`` of the round, or what was fused in
            the round before (``previous``).
        fall_back: take the average instead where it validates better than all snapshots.
        drop_worst: leave failed clients out (see :func:`drop_worst`).
        public: the share of the training images that is held back from the clients and distilled
            on without its labels, where the recipe names no ``data.unlabelled``.
        rivals: what else is run for the report: ``fedprox``, ``fedavgm``.
        proximal, momentum: mu of FedProx, beta of FedAvgM.
        carrier: what carries clients and rounds: ``own``, one after the other in this process;
            ``flower``, the same by Flower's server, client manager and clients; ``loopback``, by
            Flower over gRPC on 127.0.0.1. All three end with the same bits.
    """

    tasks = ("classification",)
    takes_teacher = False
    roles: Mapping[str, str] = {"baseline": "FedAvg", "student": "FedDF"}

    def __init__(
        self,
        rounds: Count = 100,
        clients: Annotated[int, Field(ge=1, le=10_000)] = 20,
        fraction: Annotated[float, Field(gt=0, le=1)] = 0.4,
        alpha: Annotated[float, Field(ge=0.01, allow_inf_nan=False)] = 0.1,
        architectures: tuple[str, ...] = (),
        averaging: Literal["samples", "uniform"] = "samples",
        target: Target = "avg_logits",
        ensemble: Literal["uniform", "accuracy"] = "uniform",
        temperature: Positive = 1.0,
        steps: Count = 10_000,
        every: Count = 100,
        patience: Count = 1_000,
        rate: Positive = 1e-3,
        batch_size: Count = 128,
        clip: Positive | None = 5.0,
        start: Literal["average", "previous"] = "average",
        fall_back: bool = False,
        drop_worst: bool = False,
        public: Annotated[float, Field(gt=0, lt=1)] = 0.25,
        rivals: tuple[Rival, ...] = (),
        proximal: Weight = 0.01,
        momentum: Annotated[float, Field(ge=0, lt=1)] = 0.2,
        carrier: Carrier = "own",
    ) -> None:
        super().__init__()
        if steps % every or patience % every:
            raise UserError(
                f"the distillation is validated every {every} steps, so steps and patience are "
                f"multiples of that, not {steps} and {patience}"
            )
        if clients <= len(architectures):
            raise UserError(
                f"{clients} clients cannot have {len(architectures) + 1} architectures; take at "
                "least as many clients"
            )
        self.rounds = rounds
        self.clients = clients
        self.fraction = fraction
        self.alpha = alpha
        self.architectures = architectures
        self.averaging = averaging
        self.target: Target = target
        self.ensemble = ensemble
        self.temperature = temperature
        self.steps = steps
        self.every = every
        self.patience = patience
        self.rate = rate
        self.batch_size = batch_size
        self.clip = clip
        self.start = start
        self.fall_back = fall_back
        self.drop_worst = drop_worst
        self.public = public
        self.rivals = tuple(dict.fromkeys(rivals))
        self.proximal = proximal
        self.momentum = momentum
        self.carrier: Carrier = carrier
        self.ways: dict[tuple[str, int], Way] = {}
        self.shares: list[list[int]] = []

    # What is found out before anything is trained.

    def rehearse(self, bench: Bench) -> None:
        self.check_task(bench.task)
        if bench.candidates:
            raise UserError(
                "the teachers of a federation are its clients, which are trained in the run; leave "
                "--teacher out"
            )
        if not all(isinstance(split, Split) for split in (bench.train, bench.transfer)):
            raise UserError(
                "clients share out images by their labels: give data by name or as "
                "limbeck.data.Data instead of your own loaders"
            )
        if bench.train.labels is None:
            raise UserError("clients learn from labels, and the training images have none")
        if not len(bench.validation) and (
            self.drop_worst or self.fall_back or self.ensemble == "accuracy"
        ):
            raise UserError(
                "drop_worst, fall_back and ensemble: accuracy are decided on the server's "
                "validation data; keep some with data.validation"
            )
        federation.carrier(self.carrier)
        for seed in bench.seeds:
            self._parted(bench, seed)
        ground = self._lay_out(bench, bench.seeds[0])
        batch = bench.sample(ground.public)
        labelled = bench.sample(ground.clients[0].split)
        with torch.random.fork_rng(), torch.no_grad():
            for network in ground.networks:
                bench.task.loss(bench.task.run(network, labelled), labelled)
            said = [bench.task.run(n.eval(), batch)["logits"] for n in ground.networks]
        feddf(said[0], torch.stack(said), self.target, None, self.temperature)

    def _lay_out(self, bench: Bench, seed: int) -> Ground:
        """Share out the private samples and make the networks that a seed begins with."""
        parts, public = self._parted(bench, seed)
        first = bench.laid_out(bench.make_student(seed))
        networks = [first]
        if self.architectures and first.input is None:
            raise UserError(
                "further architectures are built by name, for which the data must be given by "
                "name; leave architectures out"
            )
        for number, name in enumerate(self.architectures, start=1):
            input: Any = first.input
            made = build(name, _task(bench).classes, input, seed=derive(seed, number) >> 33)
            networks.append(bench.laid_out(made))
        people = {
            k: Client(
                k,
                part,
                networks[k % len(networks)],
                bench.task,
                bench.training,
                seed,
                bench.device,
            )
            for k, part in enumerate(parts)
        }
        return Ground(seed, people, networks, public)

    def _parted(self, bench: Bench, seed: int) -> tuple[list[Split], Split]:
        """Each client's samples, and the images that the server distils on."""
        private, public = self._private_and_public(bench, seed)
        assert private.labels is not None, "it was found out at the rehearsal"
        parts = federation.dirichlet_partition(private.labels, self.clients, self.alpha, seed)
        return [private.subset(p, f"client {k}") for k, p in enumerate(parts)], public

    def _private_and_public(self, bench: Bench, seed: int) -> tuple[Split, Split]:
        """The clients' samples together, and the unlabelled ones."""
        if bench.transfer.labels is None:
            return bench.train, bench.transfer
        generator = torch.Generator().manual_seed(derive(seed, len(bench.transfer)) >> 1)
        order = torch.randperm(len(bench.transfer), generator=generator)
        held = max(1, round(self.public * len(order)))
        public = replace(bench.transfer.subset(order[:held].sort().values, "public"), labels=None)
        return bench.transfer.subset(order[held:].sort().values, "private"), public

    # The rounds.

    def phases(self, bench: Bench) -> Phases:
        self.ways = {}
        for seed in bench.seeds:
            ground = self._lay_out(bench, seed)
            if seed == bench.seeds[0]:
                self.shares = _class_counts(ground, len(_task(bench).classes))
            if bench.rival is not None:
                yield from bench.plain(seed)
            ways = ["baseline"] if bench.baseline and bench.rival is None else []
            for name in [*ways, *self.rivals, "student"]:
                way = self.ways[name, seed] = Way(copy.deepcopy(ground.networks))
                for number in range(1, self.rounds + 1):
                    yield from self._round(bench, ground, name, way, number)
                if name == "baseline":
                    bench.baselines[seed] = way.networks[0]
            bench.students[seed] = self.ways["student", seed].networks[0]

    def _round(self, bench: Bench, ground: Ground, name: str, way: Way, number: int) -> Phases:
        """Local training, the average, and for FedDF the distillation (Algorithms 1 and 3)."""
        chosen = federation.sampled(ground.seed, number, self.clients, self.fraction)
        received = nn.ModuleList(copy.deepcopy(ground.networks[ground.group(k)]) for k in chosen)
        averages = nn.ModuleList(copy.deepcopy(way.networks))
        writes: dict[str, nn.Module] = {"average": averages}
        if name == "student":
            writes["clients"] = received
        if name == "fedavgm":
            way.velocity = _at_rest(way.networks) if way.velocity is None else way.velocity
            writes["velocity"] = way.velocity

        def run(journal: Journal) -> dict[str, Any]:
            return self._carried_out(bench, ground, name, way, number, received, averages, journal)

        label = f"{name}@{ground.seed}.{number}"
        found = yield Solve(name=f"clients-of-{label}", seed=ground.seed, run=run, writes=writes)
        way.rounds.append(found)
        way.averages = _networks(averages)
        if name != "student":
            way.networks = way.averages
            return
        way.ensemble = self._ensemble(bench, received, found)
        begin = way.averages if self.start == "average" else way.networks
        way.networks = copy.deepcopy(begin)
        for g, network in enumerate(way.networks):
            own = label + (f"-{self.architectures[g - 1]}" if g else "")
            yield self._distilled(bench, ground, way.ensemble, network, number, own)
            if self.fall_back:
                yield self._better(bench, network, way.averages[g], ground.seed, own)

    def _carried_out(
        self,
        bench: Bench,
        ground: Ground,
        name: str,
        way: Way,
        number: int,
        received: nn.ModuleList,
        averages: nn.ModuleList,
        journal: Journal,
    ) -> dict[str, Any]:
        """A round up to the average, whose networks are changed; what it found as plain values."""
        chosen = federation.sampled(ground.seed, number, self.clients, self.fraction)
        mu = self.proximal if name == "fedprox" else 0.0
        orders = [Order(k, number, weights_of(way.networks[ground.group(k)]), mu) for k in chosen]
        reports = federation.carrier(self.carrier)(ground.clients, orders, journal)
        federation.checked(reports, orders)
        for network, report in zip(_networks(received), reports, strict=True):
            put(network, report.weights)
        found: dict[str, Any] = {"chosen": chosen, **self._judged(bench, _networks(received))}
        for g, mean in enumerate(_networks(averages)):
            members = [i for i in found["averaged"] if ground.group(chosen[i]) == g]
            if not members:  # nobody of this architecture: what there is stays
                continue
            samples = [reports[i].samples if self.averaging == "samples" else 1 for i in members]
            put(mean, average([reports[i].weights for i in members], samples))
            if name == "fedavgm" and way.velocity is not None:
                _push(mean, way.networks[g], way.velocity[g], self.momentum)
        found["loss"] = sum(report.loss for report in reports) / len(reports)
        if len(bench.validation):
            found["average"] = [_accuracy(bench, n) for n in _networks(averages)]
            text = f"average {found['average'][0]:.4f}"
            if name == "student":
                found["ensemble"] = _accuracy(bench, self._ensemble(bench, received, found))
                text += f", ensemble {found['ensemble']:.4f}"
            bench.voice.say(
                f"{self._called(name)}, round {number} of {self.rounds}: {len(chosen)} clients, "
                f"{text} on the validation split"
            )
        return found

    def _judged(self, bench: Bench, received: Sequence[Network]) -> dict[str, Any]:
        """Which of the clients are averaged, which are in the ensemble and with what weights."""
        everyone = list(range(len(received)))
        found: dict[str, Any] = {
            "averaged": everyone,
            "members": everyone,
            "weights": [1.0] * len(everyone),
        }
        if not self.drop_worst and self.ensemble == "uniform":
            return found
        accuracies = [_accuracy(bench, network) for network in received]
        if self.drop_worst:
            classes = len(_task(bench).classes)
            found["averaged"], found["members"] = drop_worst(accuracies, classes)
        if self.ensemble == "accuracy":
            found["weights"] = [max(accuracies[i], 1e-6) for i in found["members"]]
        else:
            found["weights"] = [1.0] * len(found["members"])
        return found

    def _ensemble(self, bench: Bench, received: nn.ModuleList, found: Mapping[str, Any]) -> Teacher:
        """The clients that came back, frozen, as one teacher."""
        networks = _networks(received)
        return Teacher(
            [networks[i] for i in found["members"]],
            mean="logits" if self.target == "avg_logits" else "probabilities",
            weights=found["weights"],
            fold=bench.engine.fold,
        ).to(bench.device)

    def _distilled(
        self,
        bench: Bench,
        ground: Ground,
        ensemble: Teacher,
        network: Network,
        number: int,
        name: str,
    ) -> Fit:
        """Ensemble distillation (Algorithm 1, lines 7 to 10), the best snapshot kept."""
        task, stretches = bench.task, self.steps // self.every

        def terms(batch: Batch) -> Terms:
            with stretch("teacher"):
                members = torch.stack([a["logits"].float() for a in ensemble.members(task, batch)])
            with stretch("student"):
                logits = task.run(network, batch)["logits"]
            weights = ensemble.weights.to(members)
            return {"feddf": feddf(logits, members, self.target, weights, self.temperature)}

        settings = Training(
            epochs=stretches,
            batch_size=self.batch_size,
            optimiser="adam",
            lr=self.rate,
            weight_decay=0.0,
            schedule="cosine",
            clip_norm=self.clip,
        )
        batches = task.batches(
            ground.public, batch_size=self.batch_size, seed=ground.seed, train=True
        )
        evaluate = bench.watch(network)
        return Fit(
            name=name,
            seed=ground.seed,
            updates=[Update(train={"student": network}, terms=terms, settings=settings)],
            batches=Stretches(batches, self.every, begun=(number - 1) * self.steps),
            epochs=stretches,
            evaluate=evaluate,
            select="last" if evaluate is None else "best",
            higher_is_better=task.higher_is_better,
            patience=None if evaluate is None else self.patience // self.every,
        )

    def _better(self, bench: Bench, network: Network, mean: Network, seed: int, name: str) -> Solve:
        """The average again, where it validates better than the best snapshot."""

        def run(_: Journal) -> bool:
            falls = bench.task.better(_accuracy(bench, mean), _accuracy(bench, network))
            if falls:
                put(network, weights_of(mean))
            return falls

        return Solve(name=f"choice-of-{name}", seed=seed, run=run, writes={"student": network})

    def _called(self, name: str) -> str:
        return {**RIVALS, **self.roles}[name]

    # What the report shows.

    def findings(self, bench: Bench, metrics: Sequence[Mapping[str, Any]]) -> list[Finding]:
        """Accuracies over the rounds, those at the end, and who had which classes."""
        found = [self._at_the_end(bench)]
        if len(bench.validation):
            found.insert(0, self._over_rounds(bench, metrics))
        return [*found, self._split(_task(bench).classes)]

    def _over_rounds(self, bench: Bench, metrics: Sequence[Mapping[str, Any]]) -> Finding:
        """Validation accuracy round by round, mean over the seeds."""
        ways: dict[str, list[list[float]]] = {}
        within: dict[str, list[list[float]]] = {}
        for (name, seed), way in self.ways.items():
            averages = [round["average"][0] for round in way.rounds]
            if name != "student":
                key = name if name == "baseline" else self._called(name)
                ways.setdefault(key, []).append(averages)
                continue
            fused = [
                _best(metrics, f"student@{seed}.{n}", bench.task.metric)
                for n in range(1, len(way.rounds) + 1)
            ]
            if self.fall_back:
                fused = [max(pair) for pair in zip(fused, averages, strict=True)]
            ways.setdefault("student", []).append(fused)
            within.setdefault("student", []).append(fused)
            within.setdefault("average", []).append(averages)
            within.setdefault("ensemble", []).append([r["ensemble"] for r in way.rounds])
        metric = bench.task.metric
        charts = [
            Chart("After each round", "round", metric, _course(ways)),
            Chart("Within FedDF's rounds", "round", metric, _course(within)),
        ]
        caption = (
            "On the server's validation data, mean over the seeds. Within a round FedDF distils "
            "the ensemble into the average and keeps the best snapshot."
        )
        if "baseline" in ways:
            drawn = charts[0].lines
            best = max(value for _, value in drawn["baseline"])
            first = next((n for n, value in drawn["student"] if value >= best), None)
            caption += f" FedAvg's best, {100 * best:.2f} %, is reached by FedDF " + (
                "in no round." if first is None else f"in round {int(first)}."
            )
        return Finding("Round by round", caption, charts=charts)

    def _at_the_end(self, bench: Bench) -> Finding:
        """Test accuracy after the last round, of each way and architecture and of the ensemble."""
        columns: dict[tuple[str, str], list[float]] = {}
        for (name, _), way in self.ways.items():
            called = self._called(name)
            for g, network in enumerate(way.networks):
                family = self.architectures[g - 1] if g else network.name
                value = _accuracy(bench, network, test=True)
                columns.setdefault((called, family), []).append(value)
                if name == "student":
                    value = _accuracy(bench, way.averages[g], test=True)
                    columns.setdefault((f"{called}'s last average", family), []).append(value)
            if way.ensemble is not None:
                value = _accuracy(bench, way.ensemble, test=True)
                columns.setdefault((f"{called}'s last ensemble", ""), []).append(value)
        rows = [["way", "network", "test accuracy"]]
        rows += [[called, family, said(v, percent=True)] for (called, family), v in columns.items()]
        caption = (
            f"After {self.rounds} rounds. The ensemble is all clients that came back in the last "
            "round, the average what the distillation began with"
        )
        caption += "; ± is half the 95 % interval over the seeds." if len(bench.seeds) > 1 else "."
        return Finding("After the last round", caption, rows)

    def _split(self, classes: Sequence[str]) -> Finding:
        """How many samples of each class each client has, in the first seed."""
        counts = torch.tensor(self.shares)
        share = counts / counts.sum(1, keepdim=True).clamp(min=1)
        side = max(1, min(16, 640 // counts.shape[1]))
        pixels = (255 * (1 - share)).round().to(torch.uint8)
        pixels = pixels.repeat_interleave(side, 0).repeat_interleave(side, 1)
        rows: list[list[str]] = []
        if counts.shape[1] <= 20:
            rows = [["client", *classes, "all"]]
            rows += [[str(k), *map(str, row), str(sum(row))] for k, row in enumerate(self.shares)]
        return Finding(
            "Who has which classes",
            f"Training samples in the first seed, alpha {self.alpha:g}. In the picture a row is a "
            "client, a column a class; the darker, the larger the class's share of the client.",
            rows,
            pictures={"clients by classes": pixels},
        )


def _task(bench: Bench) -> Classification:
    assert isinstance(bench.task, Classification), "it was found out at the rehearsal"
    return bench.task


def _networks(modules: nn.ModuleList) -> list[Network]:
    return [module for module in modules if isinstance(module, Network)]


def _at_rest(networks: Sequence[Network]) -> nn.ModuleList:
    """Modules of the networks' shape whose parameters are zero, for velocities."""
    still = nn.ModuleList(copy.deepcopy(list(networks)))
    for parameter in still.parameters():
        parameter.data.zero_()
    return still


@torch.no_grad()
def _push(mean: Network, before: Network, velocity: nn.Module, beta: float) -> None:
    """FedAvgM in place; batch norm statistics stay the average, as a variance has no momentum."""
    for m, b, v in zip(mean.parameters(), before.parameters(), velocity.parameters(), strict=True):
        moved, faster = server_momentum(b, m, v, beta)
        m.copy_(moved)
        v.copy_(faster)


def _accuracy(bench: Bench, network: Network | Teacher, test: bool = False) -> float:
    split = bench.test if test else bench.validation
    return bench.task.measure(network, split)[bench.task.metric]


def _course(runs: Mapping[str, list[list[float]]]) -> dict[str, list[tuple[float, float]]]:
    """Points (round, mean over the seeds) by name."""
    return {
        name: [
            (float(number), sum(values) / len(values))
            for number, values in enumerate(zip(*seeds, strict=True), start=1)
        ]
        for name, seeds in runs.items()
    }


def _best(metrics: Sequence[Mapping[str, Any]], phase: str, metric: str) -> float:
    """The best validation measure of a phase."""
    return max(
        float(line["validation"][metric])
        for line in metrics
        if line["phase"] == phase and "validation" in line
    )


def _class_counts(ground: Ground, classes: int) -> list[list[int]]:
    counts = []
    for client in ground.clients.values():
        labels = client.split.labels
        assert labels is not None, "clients share out labelled samples"
        counts.append(torch.bincount(labels, minlength=classes).tolist())
    return counts
