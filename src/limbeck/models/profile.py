"""What a model costs: parameters, multiply-adds, bytes, time."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from limbeck.training.network import Network


@dataclass(frozen=True)
class Profile:
    """The costs of one model.

    ``multiply_adds`` counts convolutions and matrix products for one sample; ``bytes`` is the size
    of parameters and buffers; ``latency_ms`` holds the percentiles p50, p90 and p99 of the time for
    one sample, in milliseconds, or is ``None`` where it was not measured.
    """

    parameters: int
    multiply_adds: int
    bytes: int
    latency_ms: dict[str, float] | None


def profile(network: Network, sample: Any, latency: bool = True) -> Profile:
    """Count and time a network on one sample, in eval mode, where it lies; it is left as it was.

    Args:
        network: on any device.
        sample: one sample, as the network is called with it; of images also the channels, height
            and width of a view, before the network's own resizing.
        latency: also measure the time, for about a second.

    Example:
        >>> from torch import nn
        >>> from limbeck.models import Network
        >>> layer = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
        >>> profile(Network(layer), (3, 2, 2), latency=False)
        Profile(parameters=65, multiply_adds=60, bytes=260, latency_ms=None)
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    parameters = list(network.parameters())
    device = parameters[0].device if parameters else torch.device("cpu")
    if isinstance(sample, tuple) and all(isinstance(side, int) for side in sample):
        sample = torch.zeros(1, *sample)
    if isinstance(sample, tuple):
        sample = tuple(part.to(device) for part in sample)
    elif hasattr(sample, "to"):
        sample = sample.to(device)
    # Each module has a mode of its own: a frozen part may be in eval mode within a training one.
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        with torch.no_grad():
            with FlopCounterMode(display=False) as counter:
                network(sample)
            times = _percentiles(network, sample, device) if latency else None
    finally:
        for module, mode in modes:
            module.training = mode
    return Profile(
        parameters=sum(p.numel() for p in parameters),
        multiply_adds=counter.get_total_flops() // 2,
        bytes=sum(t.numel() * t.element_size() for t in [*parameters, *network.buffers()]),
        latency_ms=times,
    )


def _percentiles(
    network: Network,
    sample: Any,
    device: torch.device,
    warm_up: int = 5,
    most: int = 200,
    seconds: float = 1.0,
) -> dict[str, float]:
    """Time single passes: at least ten, then until their number or the seconds are used up."""
    import torch

    def once() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        network(sample)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - start) * 1e3

    for _ in range(warm_up):
        once()
    times: list[float] = []
    while len(times) < 10 or (len(times) < most and sum(times) < seconds * 1e3):
        times.append(once())
    cuts = torch.tensor(times, dtype=torch.float64).quantile(
        torch.tensor([0.5, 0.9, 0.99], dtype=torch.float64)
    )
    return dict(zip(("p50", "p90", "p99"), cuts.tolist(), strict=True))
