"""Clients: how a data set is split among them, what each does in a round, and who carries it."""

from __future__ import annotations

import copy
import importlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from limbeck.data.data import Split
from limbeck.errors import UserError
from limbeck.extras import need
from limbeck.training.network import Network
from limbeck.training.phases import Journal, Training
from limbeck.training.seeding import derive, seed_all
from limbeck.training.task import Task, moved

Carrier = Literal["own", "flower", "loopback"]
GROUP = 10
"""So many clients share out the samples of one part of the training set."""
DRAWS = 20_000
"""So often a split is drawn until each client has enough."""


def dirichlet_partition(
    labels: Tensor, clients: int, alpha: float, seed: int, group: int = GROUP
) -> list[Tensor]:
    r"""A split of labelled samples among clients, skewed in the classes (appendix C).

    Clients come in groups, each with its share of the shuffled samples. Within a group each class
    is shared out by a vector from a symmetric Dirichlet distribution, :math:`p \sim Dir(\alpha)`,
    in which a client that already has an average client's number of samples gets nothing more. The
    draw is repeated until each client has at least half of that number.

    Args:
        labels: int64 (N,).
        clients: how many there are.
        alpha: above 0; 100 is nearly i.i.d., 1 moderately skewed, 0.1 strongly.
        seed: of the split.
        group: how many clients share one part of the samples.

    Returns:
        For each client the positions of its samples, in rising order; together all of them, each
        once.

    Raises:
        UserError: fewer than four samples for each client, or no such split was found.

    >>> parts = dirichlet_partition(torch.arange(60) % 3, clients=4, alpha=1.0, seed=0)
    >>> sorted(torch.cat(parts).tolist()) == list(range(60)), min(map(len, parts)) >= 60 // 4 // 2
    (True, True)
    """
    if len(labels) < 4 * clients:
        raise UserError(
            f"{len(labels)} samples cannot be split among {clients} clients: there must be four or "
            "more for each; take fewer clients or more data"
        )
    generator = np.random.default_rng(derive(seed, clients) & 0xFFFFFFFF)
    order = generator.permutation(len(labels))
    found: list[Tensor] = []
    for first in range(0, clients, group):
        sharing = min(group, clients - first)
        edges = [len(labels) * (first + n) // clients for n in (0, sharing)]
        positions = order[edges[0] : edges[1]]
        found += _shared_out(labels.numpy(), positions, sharing, alpha, generator)
    return found


def _shared_out(
    labels: np.ndarray, positions: np.ndarray, clients: int, alpha: float, generator: Any
) -> list[Tensor]:
    """One group's samples among its clients."""
    average = len(positions) / clients
    classes = [positions[labels[positions] == c] for c in np.unique(labels[positions])]
    for _ in range(DRAWS):
        sizes = np.zeros(clients, dtype=np.int64)
        edges = []
        for members in classes:
            shares = generator.dirichlet(np.full(clients, alpha)) * (sizes < average)
            if not shares.sum() > 0:  # a small alpha may give all to those that are full
                break
            edges.append((shares / shares.sum()).cumsum()[:-1] * len(members))
            sizes += np.diff(edges[-1].astype(np.int64), prepend=0, append=len(members))
        if len(edges) == len(classes) and sizes.min() >= average / 2:
            parts = [
                np.split(members, cut.astype(np.int64))
                for members, cut in zip(classes, edges, strict=True)
            ]
            return [
                torch.from_numpy(np.sort(np.concatenate([part[k] for part in parts])))
                for k in range(clients)
            ]
    raise UserError(
        f"no split of {len(positions)} samples was found in {DRAWS:,} draws that gives each of "
        f"{clients} clients half of the average, at alpha {alpha}; take a larger alpha or fewer "
        "clients"
    )


def sampled(seed: int, number: int, clients: int, fraction: float) -> list[int]:
    """The clients of a round, in rising order: a share of all, at least one.

    >>> sampled(seed=0, number=1, clients=10, fraction=1.0) == list(range(10))
    True
    """
    wanted = max(1, round(fraction * clients))
    generator = torch.Generator().manual_seed(derive(seed, number, clients) >> 1)
    return sorted(torch.randperm(clients, generator=generator)[:wanted].tolist())


@dataclass(frozen=True)
class Order:
    """What a client is asked in a round: to train on from these weights.

    ``weights`` are the tensors of a state dict in its order; ``round`` counts from 1; ``proximal``
    is FedProx's mu, 0 without.
    """

    client: int
    round: int
    weights: Sequence[Tensor]
    proximal: float = 0.0


@dataclass(frozen=True)
class Report:
    """What a client sends back: its weights, how many samples it has and its mean loss."""

    weights: Sequence[Tensor]
    samples: int
    loss: float

    def as_plain(self) -> dict[str, Any]:
        """As a journal keeps it."""
        return {"weights": list(self.weights), "samples": self.samples, "loss": self.loss}


def weights_of(network: Network) -> list[Tensor]:
    """Copies of all tensors of a network, buffers included, in the order of its state dict."""
    return [t.detach().cpu().clone() for t in network.state_dict().values()]


def put(network: Network, weights: Sequence[Tensor]) -> Network:
    """Load what :func:`weights_of` gave."""
    network.load_state_dict(dict(zip(network.state_dict(), weights, strict=True)))
    return network


class Client:
    """One client: its private samples and the training on them.

    Args:
        number: who it is.
        split: its samples, with labels.
        network: of its architecture; the weights come with each order.
        task: what a batch means.
        settings: of the local training; its epochs are those of one round.
        seed: decides order and augmentation, with the client's number and the round.
        device: where it trains.
    """

    def __init__(
        self,
        number: int,
        split: Split,
        network: Network,
        task: Task,
        settings: Training,
        seed: int,
        device: torch.device,
    ) -> None:
        self.number = number
        self.split = split
        self.network = network
        self.task = task
        self.settings = settings
        self.seed = seed
        self.device = device

    def train(self, order: Order) -> Report:
        """Local training (Algorithm 1, line 4) with a fresh optimiser."""
        network = put(copy.deepcopy(self.network), order.weights).train()
        anchor = [p.detach().clone() for p in network.parameters()]
        settings = self.settings
        optimiser = settings.build(network.parameters())
        batches = self.task.batches(
            self.split, batch_size=settings.batch_size, seed=self.seed, train=True
        )
        losses: list[Tensor] = []
        for epoch in range(settings.epochs):
            # Later rounds see other orders and other crops.
            shown = (order.round - 1) * settings.epochs + epoch
            for step, batch in enumerate(batches.epoch(shown)):
                if step and len(batch["label"]) == 1:
                    break  # a sample left over alone has no batch statistics
                seed_all(self.seed, self.number, shown, step)
                for group in optimiser.param_groups:
                    group["lr"] = settings.lr * settings.factor(epoch + step / len(batches))
                batch = moved(batch, self.device)
                loss = self.task.loss(self.task.run(network, batch), batch)
                losses.append(loss.detach())
                if order.proximal:
                    loss = loss + proximal(list(network.parameters()), anchor, order.proximal)
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                if settings.clip_norm is not None:
                    torch.nn.utils.clip_grad_norm_(network.parameters(), settings.clip_norm)
                optimiser.step()
        mean = float(torch.stack(losses).double().mean()) if losses else 0.0
        return Report(weights_of(network), len(self.split), mean)


def proximal(parameters: Sequence[Tensor], anchor: Sequence[Tensor], mu: float) -> Tensor:
    r"""FedProx's local term, :math:`\frac{\mu}{2} \|x - x_{global}\|^2`; a scalar.

    >>> proximal([torch.tensor([3.0, 0.0])], [torch.tensor([0.0, 4.0])], mu=0.1)
    tensor(1.2500)
    """
    distances = [(p - a).square().sum() for p, a in zip(parameters, anchor, strict=True)]
    return mu / 2 * torch.stack(distances).sum()


class Carry(Protocol):
    """Brings each order to its client, and the reports back in the same order."""

    def __call__(
        self, clients: Mapping[int, Client], orders: Sequence[Order], journal: Journal
    ) -> list[Report]: ...


def own(clients: Mapping[int, Client], orders: Sequence[Order], journal: Journal) -> list[Report]:
    """One client after the other, in this process."""
    found = []
    for order in orders:

        def work(order: Order = order) -> dict[str, Any]:
            return clients[order.client].train(order).as_plain()

        found.append(Report(**journal.remember(f"client-{order.client}", work)))
    return found


def carrier(name: Carrier) -> Carry:
    """What carries clients and rounds, by name.

    Raises:
        UserError: it is Flower, which is not installed.
    """
    if name == "own":
        return own
    need("flwr")
    flower = importlib.import_module("limbeck.systems.federated.feddf.flower")
    chosen: Carry = flower.in_process if name == "flower" else flower.over_loopback
    return chosen


def checked(reports: Sequence[Report], orders: Sequence[Order]) -> None:
    """Raise the sentence for the first client whose loss was not finite."""
    for order, report in zip(orders, reports, strict=True):
        if not math.isfinite(report.loss):
            raise UserError(
                f"the loss of client {order.client} became NaN or infinite in round "
                f"{order.round}; lower the learning rate of the local training"
            )
