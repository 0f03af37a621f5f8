"""Costs, against counts by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from limbeck.models import Input, Network, build, profile

COLOUR = Input(3, (32, 32), (0.5,) * 3, (0.5,) * 3)


def test_multiply_adds_of_a_small_cnn_are_those_counted_by_hand() -> None:
    network = build("cnn-4-8", [str(i) for i in range(10)], Input(1, (8, 8), (0.3,), (0.4,)))
    first = 8 * 8 * 4 * 9 * 1
    second = 4 * 4 * 8 * 9 * 4
    linear = 4 * 8 * 10
    costs = profile(network, (1, 8, 8), latency=False)
    assert costs.multiply_adds == first + second + linear
    assert costs.parameters == (9 * 4 + 4) + (9 * 4 * 8 + 8) + (32 * 10 + 10)
    assert costs.bytes == 4 * costs.parameters
    assert costs.latency_ms is None


def test_multiply_adds_are_counted_at_the_size_the_model_is_fed() -> None:
    network = Network(nn.Conv2d(3, 2, 1), COLOUR)
    assert profile(network, (3, 8, 8), latency=False).multiply_adds == 32 * 32 * 2 * 3


def test_buffers_count_as_bytes_but_not_as_parameters() -> None:
    costs = profile(Network(nn.BatchNorm2d(3)), (3, 4, 4), latency=False)
    assert (costs.parameters, costs.bytes) == (6, 4 * (6 + 6) + 8)


def test_a_tied_weight_counts_once() -> None:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    costs = profile(Network(nn.Sequential(first, second)), (1, 4, 4), latency=False)
    assert costs.parameters == 16 + 4 + 4


def test_profiling_leaves_modes_weights_statistics_and_random_numbers_as_they_were() -> None:
    network = build("resnet8", ["a", "b"], COLOUR, seed=0)
    network.train()
    network.get_submodule("model.stage1").eval()
    modes = [m.training for m in network.modules()]
    state = {k: v.clone() for k, v in network.state_dict().items()}
    generator = torch.get_rng_state()
    profile(network, (3, 32, 32))
    assert [m.training for m in network.modules()] == modes
    assert all(torch.equal(v, state[k]) for k, v in network.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(p.grad is None for p in network.parameters())


def test_latencies_are_positive_and_ordered() -> None:
    times = profile(Network(nn.Conv2d(3, 4, 3)), (3, 16, 16)).latency_ms
    assert times is not None
    assert 0 < times["p50"] <= times["p90"] <= times["p99"]


def test_modes_come_back_when_the_model_fails() -> None:
    network = Network(nn.Linear(3, 3)).train()
    with pytest.raises(RuntimeError):
        profile(network, (1, 4, 4))
    assert network.model.training
