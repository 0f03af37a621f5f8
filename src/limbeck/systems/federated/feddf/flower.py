"""Flower carries clients and rounds: in this process, or by gRPC on the loopback interface.

A round is one ``fit_round`` of Flower's server. Flower's client manager knows the clients and gives
out those that the round's criterion names; its strategy interface configures each of them, weights
and settings included; its serialisation carries the weights there and back; its server collects the
reports and the failures. What is done with the reports is the method's business.

Flower's own simulation needs ray. In its place :func:`in_process` registers proxies that call
their client directly. :func:`over_loopback` starts Flower's gRPC server on 127.0.0.1, and each
client as a Flower client with a connection of its own, in a thread.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import Thread
from typing import Any

# A run speaks to nobody outside, and to 127.0.0.1 without a proxy.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("no_grpc_proxy", "127.0.0.1")
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import numpy as np
import torch
from flwr.client import NumPyClient, start_client
from flwr.common import (
    Code,
    DisconnectRes,
    EvaluateIns,
    EvaluateRes,
    FitIns,
    FitRes,
    GetParametersIns,
    GetParametersRes,
    GetPropertiesIns,
    GetPropertiesRes,
    Parameters,
    ReconnectIns,
    Scalar,
    Status,
    ndarrays_to_parameters,
    parameters_to_ndarrays,
)
from flwr.server import ClientManager, Server, SimpleClientManager
from flwr.server.client_proxy import ClientProxy
from flwr.server.criterion import Criterion
from flwr.server.strategy import FedAvg
from flwr.server.superlink.fleet.grpc_bidi.grpc_server import start_grpc_server

from limbeck.errors import UserError
from limbeck.systems.federated.feddf.clients import Client, Order, Report
from limbeck.training.phases import Journal

PATIENCE = 60.0
"""Seconds until all clients must have come, or gone."""


class FlowerClient(NumPyClient):
    """A client as Flower knows it: weights as arrays, settings as a config."""

    def __init__(self, client: Client) -> None:
        self.client = client
        # The number is a thread's own, and Flower calls from others.
        self.threads = torch.get_num_threads()
        self.mistake: BaseException | None = None

    def get_properties(self, config: dict[str, Scalar]) -> dict[str, Scalar]:
        """Who it is."""
        return {"client": self.client.number}

    def fit(
        self, parameters: list[np.ndarray], config: dict[str, Scalar]
    ) -> tuple[list[np.ndarray], int, dict[str, Scalar]]:
        """Train on from these weights."""
        torch.set_num_threads(self.threads)
        weights = [torch.from_numpy(np.array(array)) for array in parameters]
        number, proximal = int(config["round"]), float(config["proximal"])
        try:
            report = self.client.train(Order(self.client.number, number, weights, proximal))
        except BaseException as mistake:
            # A connection that ends does not say why.
            self.mistake = mistake
            raise
        return [w.numpy() for w in report.weights], report.samples, {"loss": report.loss}


class Direct(ClientProxy):
    """A client in this process, where Flower's simulation would start an actor of ray."""

    def __init__(self, client: Client) -> None:
        super().__init__(str(client.number))
        self.client = FlowerClient(client).to_client()

    def get_properties(
        self, ins: GetPropertiesIns, timeout: float | None, group_id: int | None
    ) -> GetPropertiesRes:
        return self.client.get_properties(ins)

    def get_parameters(
        self, ins: GetParametersIns, timeout: float | None, group_id: int | None
    ) -> GetParametersRes:
        return self.client.get_parameters(ins)

    def fit(self, ins: FitIns, timeout: float | None, group_id: int | None) -> FitRes:
        return self.client.fit(ins)

    def evaluate(
        self, ins: EvaluateIns, timeout: float | None, group_id: int | None
    ) -> EvaluateRes:
        return self.client.evaluate(ins)

    def reconnect(
        self, ins: ReconnectIns, timeout: float | None, group_id: int | None
    ) -> DisconnectRes:
        return DisconnectRes("")


class Remembering(Direct):
    """A proxy whose client is not asked again for what the journal has, nor after a failure."""

    def __init__(
        self, proxy: ClientProxy, number: int, journal: Journal, failed: list[BaseException]
    ) -> None:
        ClientProxy.__init__(self, proxy.cid)
        self.proxy, self.number, self.journal, self.failed = proxy, number, journal, failed

    def fit(self, ins: FitIns, timeout: float | None, group_id: int | None) -> FitRes:
        if self.failed:
            raise self.failed[0]
        try:
            return self._fit(ins, timeout, group_id)
        except BaseException as failure:
            self.failed.append(failure)
            raise

    def _fit(self, ins: FitIns, timeout: float | None, group_id: int | None) -> FitRes:
        def work() -> dict[str, Any]:
            result = self.proxy.fit(ins, timeout, group_id)
            if result.status.code != Code.OK:
                raise UserError(f"client {self.number} did not train: {result.status.message}")
            arrays = parameters_to_ndarrays(result.parameters)
            weights = [torch.from_numpy(np.array(array)) for array in arrays]
            loss = float(result.metrics["loss"])
            return Report(weights, result.num_examples, loss).as_plain()

        report = Report(**self.journal.remember(f"client-{self.number}", work))
        return FitRes(
            Status(Code.OK, ""),
            ndarrays_to_parameters([w.numpy() for w in report.weights]),
            report.samples,
            {"client": self.number, "loss": report.loss},
        )


class Chosen(Criterion):
    """Lets the client manager give out the clients of a round and no other."""

    def __init__(self, numbers: Sequence[int]) -> None:
        self.numbers = frozenset(numbers)

    def select(self, client: ClientProxy) -> bool:
        return number_of(client) in self.numbers


def number_of(proxy: ClientProxy) -> int:
    """Who is behind a proxy; each is asked once."""
    if "client" not in proxy.properties:
        found = proxy.get_properties(GetPropertiesIns({}), PATIENCE, None)
        proxy.properties["client"] = found.properties["client"]
    return int(proxy.properties["client"])


class Round(FedAvg):
    """Flower's strategy for one round: each client gets its own order, all reports are kept."""

    def __init__(self, orders: Sequence[Order], clients: int, journal: Journal) -> None:
        super().__init__(
            min_fit_clients=len(orders),
            min_available_clients=clients,
            fraction_evaluate=0.0,
            accept_failures=False,
        )
        self.orders = {order.client: order for order in orders}
        self.journal = journal
        self.reports: dict[int, Report] = {}
        self.failed: list[BaseException] = []

    def configure_fit(
        self, server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> list[tuple[ClientProxy, FitIns]]:
        """The chosen clients, each with the weights of its own architecture."""
        proxies = client_manager.sample(
            num_clients=len(self.orders),
            min_num_clients=self.min_available_clients,
            criterion=Chosen(list(self.orders)),
        )
        found: list[tuple[ClientProxy, FitIns]] = []
        for proxy in sorted(proxies, key=number_of):
            number = number_of(proxy)
            order = self.orders[number]
            config: dict[str, Scalar] = {"round": order.round, "proximal": order.proximal}
            weights = ndarrays_to_parameters([w.numpy() for w in order.weights])
            remembering = Remembering(proxy, number, self.journal, self.failed)
            found.append((remembering, FitIns(weights, config)))
        return found

    def aggregate_fit(
        self,
        server_round: int,
        results: list[tuple[ClientProxy, FitRes]],
        failures: list[tuple[ClientProxy, FitRes] | BaseException],
    ) -> tuple[Parameters | None, dict[str, Scalar]]:
        """Keep the reports; what stopped a client stops the round."""
        if self.failed:
            raise self.failed[0]
        for _, result in results:
            arrays = parameters_to_ndarrays(result.parameters)
            weights = [torch.from_numpy(np.array(array)) for array in arrays]
            loss = float(result.metrics["loss"])
            number = int(result.metrics["client"])
            self.reports[number] = Report(weights, result.num_examples, loss)
        return None, {}


def in_process(
    clients: Mapping[int, Client], orders: Sequence[Order], journal: Journal
) -> list[Report]:
    """A round by Flower's server, client manager and strategy, without a network."""
    with _quiet():
        manager = SimpleClientManager()
        for client in clients.values():
            manager.register(Direct(client))
        return _round(manager, len(clients), orders, journal)


def over_loopback(
    clients: Mapping[int, Client], orders: Sequence[Order], journal: Journal
) -> list[Report]:
    """A round by Flower's server and clients, which speak gRPC on 127.0.0.1."""
    with _quiet():
        manager = SimpleClientManager()
        served = [FlowerClient(client) for client in clients.values()]
        with _connected(served, manager):
            try:
                return _round(manager, len(clients), orders, journal)
            except Exception:
                for client in served:
                    if client.mistake is not None:
                        raise client.mistake from None
                raise


def _round(
    manager: ClientManager, clients: int, orders: Sequence[Order], journal: Journal
) -> list[Report]:
    strategy = Round(orders, clients, journal)
    server = Server(client_manager=manager, strategy=strategy)
    # One client at a time: torch's generators are the process's own.
    server.set_max_workers(1)
    server.fit_round(server_round=orders[0].round, timeout=None)
    return [strategy.reports[order.client] for order in orders]


@contextmanager
def _connected(clients: Sequence[FlowerClient], manager: ClientManager) -> Iterator[None]:
    """Flower's server on 127.0.0.1, all clients connected to it."""
    address = f"127.0.0.1:{_free_port()}"
    service = start_grpc_server(client_manager=manager, server_address=address)
    threads = []
    try:
        for client in clients:
            given = {"server_address": address, "client": client.to_client(), "insecure": True}
            threads.append(Thread(target=_served, kwargs=given, daemon=True))
            threads[-1].start()
        if not manager.wait_for(len(clients), timeout=int(PATIENCE)):
            raise UserError(
                f"only {manager.num_available()} of {len(clients)} clients reached Flower's server "
                f"on {address} in {PATIENCE:.0f} s; choose the carrier 'flower' or 'own'"
            )
        yield
        Server(client_manager=manager).disconnect_all_clients(timeout=PATIENCE)
        for thread in threads:
            thread.join(PATIENCE)
    finally:
        service.stop(grace=None).wait()


def _served(**given: Any) -> None:
    """A Flower client until it is sent away; what broke it is the server's to say."""
    try:
        start_client(**given)
    except Exception:
        logging.getLogger("flwr").debug("a client ended", exc_info=True)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Flower's account of each message out of the run's own."""
    logs = [logging.getLogger(name) for name in ("flwr", "grpc")]
    before = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for log, level in zip(logs, before, strict=True):
            log.setLevel(level)
