"""Which filters of a network can go, which do, and the network without them.

Li, Kadav, Durdanovic, Samet, Graf: Pruning Filters for Efficient ConvNets, ICLR 2017, and Liu, Li,
Shen, Huang, Yan, Zhang: Learning Efficient Convolutional Networks through Network Slimming, ICCV
2017, from which the paper's pruned networks come.
"""

from __future__ import annotations

import copy
import math
import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from limbeck.errors import UserError, did_you_mean
from limbeck.models.plain import Quarters

_PASSED_MODULES: frozenset[type[nn.Module]] = frozenset(
    {
        *(nn.Identity, nn.Dropout, nn.Dropout2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d),
        *(nn.AdaptiveMaxPool2d, Quarters, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU),
        *(nn.SiLU, nn.Sigmoid, nn.Tanh, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh),
    }
)
_PASSED_FUNCTIONS: frozenset[Any] = frozenset(
    {
        *(F.relu, F.relu6, F.leaky_relu, F.elu, F.gelu, F.silu, F.dropout, torch.relu),
        *(torch.sigmoid, torch.tanh, F.avg_pool2d, F.adaptive_avg_pool2d, torch.relu_),
        *(F.max_pool2d, torch.max_pool2d),
    }
)
_PASSED_METHODS = frozenset({"relu", "relu_", "sigmoid", "tanh", "contiguous", "clamp"})
ADDED: frozenset[Any] = frozenset({operator.add, operator.iadd, torch.add, "add", "add_"})


# Which filters are kept.


def surviving(scores: Tensor, ratio: float) -> Tensor:
    """The filters that survive, by number in rising order.

    A filter survives if its score is greater than that of the last one to go; of equal ones none
    does. Where all are equal the first ones stay.

    Args:
        scores: (n,), the larger the better: sums of absolute weights, or scales of batch norms.
        ratio: the share of filters that go, in [0, 1).

    >>> surviving(torch.tensor([4.0, 1.0, 3.0, 2.0]), 0.5).tolist()
    [0, 2]
    """
    gone = math.floor(len(scores) * ratio + 1e-9)  # 0.29 * 100 is less than 29
    if not gone:
        return torch.arange(len(scores))
    kept = (scores > scores.sort().values[gone - 1]).nonzero().flatten()
    return kept if len(kept) else torch.arange(max(1, len(scores) - gone))


def surviving_together(scores: Mapping[str, Tensor], ratio: float) -> dict[str, Tensor]:
    """As :func:`surviving`, with one threshold for several layers, each keeping its best filter.

    >>> scores = {"a": torch.tensor([4.0, 5.0]), "b": torch.tensor([1.0, 2.0])}
    >>> {path: kept.tolist() for path, kept in surviving_together(scores, 0.5).items()}
    {'a': [0, 1], 'b': [1]}
    """
    everything = torch.cat(list(scores.values()))
    chosen = torch.zeros(len(everything), dtype=torch.bool)
    chosen[surviving(everything, ratio)] = True
    parts = chosen.split([len(s) for s in scores.values()])
    return {
        path: kept.nonzero().flatten() if kept.any() else own.argmax()[None]
        for (path, own), kept in zip(scores.items(), parts, strict=True)
    }


# Which layer reads which.


class _Tracer(fx.Tracer):
    def __init__(self, whole: tuple[type[nn.Module], ...]) -> None:
        super().__init__()
        self.whole = whole

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, self.whole) or super().is_leaf_module(m, module_qualified_name)


def traced(model: nn.Module, whole: tuple[type[nn.Module], ...] = ()) -> fx.Graph:
    """What the model computes at rest, as a graph.

    Args:
        model: it is put to rest.
        whole: modules that are a single node, beside those of PyTorch.

    Raises:
        UserError: it cannot be traced.
    """
    try:
        return _Tracer((*whole, Quarters)).trace(model.eval())
    except Exception as error:  # the model's own code, run on proxies, may raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{type(model).__name__} cannot be pruned: which layer reads which cannot be read off "
            f"its forward pass, as it is no fixed sequence of operations ({reason})"
        ) from None


@dataclass(frozen=True)
class Layer:
    """A convolution and what gets narrower with it.

    Attributes:
        path: its place in the model.
        norms: batch norms of its outputs.
        readers: convolutions and linear layers that read its outputs.
        obstacle: why it cannot lose filters; empty if it can.
    """

    path: str
    norms: tuple[str, ...] = ()
    readers: tuple[str, ...] = ()
    obstacle: str = ""


def layers(model: nn.Module) -> list[Layer]:
    """The convolutions in the order in which they run, each with who reads it.

    A convolution can lose filters where its outputs go through batch norms, activations, pooling
    and flattening alone to whole convolutions and linear layers. It cannot where they are added or
    concatenated to others (the stream of a residual network), or read in groups.

    Raises:
        UserError: the model cannot be traced.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    >>> [(layer.readers, layer.obstacle) for layer in layers(model)]
    [(('2',), ''), ((), 'it is what the network puts out')]
    """
    graph = traced(model)
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    found = []
    for node in graph.nodes:
        if node.op != "call_module":
            continue
        module = model.get_submodule(str(node.target))
        if isinstance(module, nn.Conv2d):
            found.append(_layer(model, node, calls, owners))
    return list({layer.path: layer for layer in found}.values())


def _layer(
    model: nn.Module, node: fx.Node, calls: Mapping[Any, int], owners: Mapping[int, int]
) -> Layer:
    path = str(node.target)
    if obstacle := own_obstacle(model, path, calls, owners):
        return Layer(path, obstacle=obstacle)
    norms: list[str] = []
    readers: list[str] = []
    waiting = [(user, False) for user in node.users]
    while waiting:
        user, flat = waiting.pop(0)
        name = str(user.target)
        module = model.get_submodule(name) if user.op == "call_module" else None
        if _asks_how_many(user):
            continue
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            if isinstance(module, nn.Conv2d) and module.groups > 1:
                return Layer(path, obstacle=f"{name} reads it in groups")
            if isinstance(module, nn.Linear) and not flat:
                return Layer(path, obstacle=f"{name} reads other than its channels")
            if calls[user.target] > 1 or any(owners[id(p)] > 1 for p in module.parameters()):
                return Layer(path, obstacle=f"{name} reads it and is used elsewhere too")
            readers.append(name)
            continue
        if type(module) is nn.BatchNorm2d and calls[user.target] == 1:
            norms.append(name)
        elif not _passes(user, module):
            return Layer(path, obstacle=_why(user, module))
        waiting += [(after, flat or _flattens(user, module)) for after in user.users]
    if not readers:
        return Layer(path, obstacle="nothing reads it")
    return Layer(path, tuple(norms), tuple(dict.fromkeys(readers)))


def own_obstacle(
    model: nn.Module, path: str, calls: Mapping[Any, int], owners: Mapping[int, int]
) -> str:
    module = model.get_submodule(path)
    if type(module) is not nn.Conv2d:
        return f"it is a {type(module).__name__}"
    if module.groups > 1:
        return "its filters see groups of channels"
    if calls[path] > 1 or any(owners[id(p)] > 1 for p in module.parameters()):
        return "it is used more than once"
    return ""


def _passes(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether a channel goes in and the same channel, or its pixels one by one, comes out."""
    if module is not None:
        return type(module) in _PASSED_MODULES or _flattens(node, module)
    if node.op == "call_function" and node.target in _PASSED_FUNCTIONS:
        return True
    if node.op == "call_method" and node.target in _PASSED_METHODS:
        return True
    return _flattens(node, module) or _averages(node)


def _flattens(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether (B, C, H, W) becomes (B, C H W), or by averaging (B, C)."""
    if module is not None:
        return type(module) is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1)
    if node.target in (torch.flatten, "flatten"):
        given = node.args[1:] + tuple(node.kwargs.values())
        return given in ((1,), (1, -1))
    if node.target in ("view", "reshape"):
        return len(node.args) == 3 and str(node.args[2]) == "-1"
    keeps = node.kwargs.get("keepdim", False) or len(node.args) > 2
    return _averages(node) and not keeps


def _asks_how_many(node: fx.Node) -> bool:
    """Whether the number of images is all that is read, as in ``x.view(x.size(0), -1)``."""
    if node.target is getattr and node.args[1] == "shape":
        return all(u.target is operator.getitem and u.args[1] == 0 for u in node.users)
    return node.target == "size" and tuple(node.args[1:]) == (0,)


def _averages(node: fx.Node) -> bool:
    if node.target not in (torch.mean, "mean"):
        return False
    over: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    return over in ((2, 3), (-2, -1), [2, 3], [-2, -1])


def _why(node: fx.Node, module: nn.Module | None) -> str:
    if node.op == "output":
        return "it is what the network puts out"
    if node.target in ADDED:
        return "it is added to other maps"
    if node.target in (torch.cat, torch.concat):
        return "it is concatenated with other maps"
    if module is not None:
        return f"{node.target} ({type(module).__name__}) reads it"
    called = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return f"{called} reads it"


@torch.no_grad()
def prune(model: nn.Module, kept: Mapping[str, Tensor]) -> nn.Module:
    """A copy of the model with some filters of some convolutions, and all that reads them.

    Args:
        model: any module that :func:`layers` can follow; it is not touched.
        kept: by a convolution's path the numbers of its filters that stay, in the order in which
            they are to stand.

    Raises:
        UserError: a layer that cannot lose filters, with the reason; or none is kept.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3))
    >>> small = prune(model, {"0": torch.tensor([1, 6])})
    >>> small[0].weight.shape[0], small[1].num_features, small[2].weight.shape[1]
    (2, 2, 2)
    """
    known = {layer.path: layer for layer in layers(copy.deepcopy(model))}
    small = copy.deepcopy(model)
    for path, chosen in kept.items():
        if path not in known:
            raise UserError(f"there is no convolution {path!r}; {did_you_mean(path, known)}")
        layer = known[path]
        if layer.obstacle:
            raise UserError(f"{path} cannot lose filters: {layer.obstacle}")
        if not len(chosen):
            raise UserError(f"{path} would be left without a filter")
        conv = small.get_submodule(path)
        _narrow(conv, 0, chosen, ("weight", "bias"))
        conv.out_channels = len(chosen)  # type: ignore[assignment]
        for name in layer.norms:
            norm = small.get_submodule(name)
            _narrow(norm, 0, chosen, ("weight", "bias", "running_mean", "running_var"))
            norm.num_features = len(chosen)  # type: ignore[assignment]
        for name in layer.readers:
            reader = small.get_submodule(name)
            if isinstance(reader, nn.Linear):
                pixels = reader.in_features // width(model, path)
                columns = chosen[:, None] * pixels + torch.arange(pixels, device=chosen.device)
                _narrow(reader, 1, columns.flatten(), ("weight",))
                reader.in_features = columns.numel()
            else:
                _narrow(reader, 1, chosen, ("weight",))
                reader.in_channels = len(chosen)  # type: ignore[assignment]
    return small


def _narrow(module: nn.Module, dim: int, chosen: Tensor, names: Sequence[str]) -> None:
    for name in names:
        old = getattr(module, name)
        if old is None:
            continue
        new = old.detach().index_select(dim, chosen.to(old.device))
        setattr(module, name, nn.Parameter(new, old.requires_grad) if name[:3] != "run" else new)


def width(model: nn.Module, path: str) -> int:
    conv = model.get_submodule(path)
    assert isinstance(conv, nn.Conv2d)
    return conv.out_channels
