"""Batch norm folded into the layer before it, so that a frozen network answers faster.

Ioffe, Szegedy: Batch Normalization: Accelerating Deep Network Training by Reducing Internal
Covariate Shift, ICML 2015, section 3.1.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate
from torch.nn.modules.batchnorm import _BatchNorm

from limbeck.errors import UserError, did_you_mean

Transposed = nn.ConvTranspose1d | nn.ConvTranspose2d
Affine = nn.Conv1d | nn.Conv2d | Transposed | nn.Linear

PAIRS: dict[type[nn.Module], type[_BatchNorm]] = {
    nn.Conv1d: nn.BatchNorm1d,
    nn.Conv2d: nn.BatchNorm2d,
    nn.ConvTranspose1d: nn.BatchNorm1d,
    nn.ConvTranspose2d: nn.BatchNorm2d,
    nn.Linear: nn.BatchNorm1d,
}
"""What can be folded into what; a subclass may compute something else and is left alone. A batch
norm whose own class has ``folds = True`` says that at inference it computes what torch's do, for
whatever number of dimensions."""

FORWARD_HOOKS = ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")
OTHER_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def fold_batch_norm(model: nn.Module, keep: Iterable[str] = (), share: bool = False) -> nn.Module:
    """A copy of the model, in eval mode, with batch norms folded into the layers before them.

    With running mean E[x] and variance Var[x], a batch norm at inference is (section 3.1)

        y = gamma / sqrt(Var[x] + eps) * x + (beta - gamma E[x] / sqrt(Var[x] + eps)),

    so that behind x = W u + b it scales the rows of W and shifts b. Both are worked out in float64
    and rounded once to the layer's dtype. The batch norm becomes an :class:`torch.nn.Identity` at
    the same path with the same forward hooks; what it put out it still puts out, to rounding.

    A batch norm is folded if it has running statistics and reads the output of a Conv1d, Conv2d,
    ConvTranspose1d, ConvTranspose2d (grouped ones too) or Linear that nothing else reads. Left as
    they are: layers and batch norms that run more than once, share parameters, are subclassed,
    parametrized or hooked other than by forward hooks on the batch norm. Which tensor goes where is
    read off a symbolic trace of a call with the default values of optional arguments; a model that
    cannot be traced, because its control flow depends on its input for instance, is copied and not
    folded.

    Args:
        model: any module; it is not touched.
        keep: places as :class:`limbeck.training.taps.Taps` takes them (``"stem"``,
            ``"fc:input"``) whose activation must stay the same; a layer whose output is seen there
            is not folded. Outputs of batch norms stay the same without being named.
        share: let the copy hold the model's own tensors where they stay as they are.

    Raises:
        UserError: a path in ``keep`` that names no module. A forward pass of the copy, where a
            batch norm folded into a Linear is fed other than (B, F), or one folded into a
            convolution of one dimension other than (B, C, L): it would have read another axis.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        >>> fold_batch_norm(model)
        Sequential(
          (0): Conv2d(3, 4, kernel_size=(3, 3), stride=(1, 1))
          (1): Identity()
          (2): ReLU()
        )
        >>> type(fold_batch_norm(model, keep=["0"])[1]).__name__
        'BatchNorm2d'
    """
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())} if share else {}
    folded = copy.deepcopy(model, dict(tensors)).eval()
    seen = _seen(folded, keep)
    if not any(_is_norm(module) for module in folded.modules()):
        return folded
    trace = _trace(folded, seen)
    if trace is None:
        return folded
    pairs = _pairs(folded, trace)
    for layer, path in pairs:
        norm = folded.get_submodule(path)
        assert isinstance(layer, Affine)
        assert isinstance(norm, _BatchNorm)
        _fold(layer, norm)
        folded.set_submodule(path, _stand_in(layer, norm))
    if pairs:
        # A forward that reaches a batch norm by a plain list still runs the one taken out.
        again = _trace(folded, seen)
        if again is None or str(again.graph) != str(trace.graph):
            return copy.deepcopy(model, dict(tensors)).eval()
    return folded


class _Trace(fx.Tracer):
    """A symbolic trace that notes which nodes are seen at given places, as taps name them."""

    def __init__(self, seen: frozenset[str]) -> None:
        super().__init__()
        self.seen = seen
        self.nodes: set[fx.Node] = set()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return _is_norm(m) or super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        output = super().call_module(m, forward, args, kwargs)
        path = self.path_of_module(m)
        if path in self.seen:
            self._note(output)
        if f"{path}:input" in self.seen:
            self._note((args, kwargs))
        return output

    def _note(self, value: Any) -> None:
        def note(leaf: Any) -> None:
            if isinstance(leaf, fx.Proxy):
                self.nodes.add(leaf.node)

        map_aggregate(value, note)


def _seen(model: nn.Module, keep: Iterable[str]) -> frozenset[str]:
    """The places whose activation somebody sees: those to keep, and those with hooks."""
    modules = dict(model.named_modules())
    seen = set(keep)
    for path in seen:
        name, _, side = path.partition(":")
        if not name or name not in modules or side not in ("", "input"):
            raise UserError(
                f"{type(model).__name__} has no module {path!r} to keep; "
                + did_you_mean(name, [n for n in modules if n])
            )
    seen.update(path for path, module in modules.items() if module._forward_hooks)
    seen.update(f"{path}:input" for path, module in modules.items() if module._forward_pre_hooks)
    return frozenset(seen)


def _trace(model: nn.Module, seen: frozenset[str]) -> _Trace | None:
    """The model's symbolic trace, of a copy since hooks and the forward may store what they see."""
    if "forward" in vars(model):  # the trace would follow the class's forward instead
        return None
    copied = copy.deepcopy(model)
    for module in copied.modules():
        for hooks in FORWARD_HOOKS + OTHER_HOOKS:
            getattr(module, hooks).clear()
    trace = _Trace(seen)
    try:
        arguments = inspect.signature(copied.forward).parameters.values()
        defaults = {a.name: a.default for a in arguments if a.default is not a.empty}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trace.trace(copied, defaults)
    except Exception:  # the model's own code, run on proxies, may raise anything
        return None
    return trace


def _pairs(model: nn.Module, trace: _Trace) -> list[tuple[nn.Module, str]]:
    """The layers to fold into, each with the path of its batch norm."""
    graph = trace.graph
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    read = {str(n.target).rpartition(".")[0] for n in graph.nodes if n.op == "get_attr"}
    names = Counter(m for _, m in model.named_modules(remove_duplicate=False))
    owners = Counter(p for _, p in model.named_parameters(remove_duplicate=False))

    def alone(node: fx.Node) -> bool:
        """Whether the node is the only use of a module that is as its class made it."""
        if node.op != "call_module" or calls[node.target] > 1 or node.target in read:
            return False
        module = model.get_submodule(str(node.target))
        hooked = any(getattr(module, hooks) for hooks in OTHER_HOOKS)
        return names[module] == 1 and "forward" not in vars(module) and not hooked

    pairs = []
    for node in graph.nodes:
        before = node.all_input_nodes
        if not (alone(node) and len(before) == 1 and alone(before[0])):
            continue
        layer = model.get_submodule(str(before[0].target))
        norm = model.get_submodule(str(node.target))
        private = all(owners[p] == 1 for p in layer.parameters())
        unseen = len(before[0].users) == 1 and before[0] not in trace.nodes
        if private and unseen and _fit(layer, norm):
            pairs.append((layer, str(node.target)))
    return pairs


def _is_norm(module: nn.Module) -> bool:
    """Whether it is a batch norm that may be folded somewhere."""
    return type(module) in PAIRS.values() or _says_so(module)


def _says_so(module: nn.Module) -> bool:
    # Its very own word: a subclass may compute something else.
    return isinstance(module, _BatchNorm) and bool(vars(type(module)).get("folds"))


def _fit(layer: nn.Module, norm: nn.Module) -> bool:
    """Whether the batch norm is a fixed affine map of the layer's output channels."""
    wanted = PAIRS.get(type(layer))
    if wanted is None or not (type(norm) is wanted or _says_so(norm)):
        return False
    assert isinstance(layer, Affine)
    assert isinstance(norm, _BatchNorm)
    return (
        not norm.training
        and norm.running_mean is not None
        and norm.running_var is not None
        and norm.num_features == _outputs(layer)
        and layer.weight.is_floating_point()
    )


def _outputs(layer: Affine) -> int:
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


@torch.no_grad()
def _fold(layer: Affine, norm: _BatchNorm) -> None:
    def exact(tensor: Tensor | None, otherwise: float) -> Tensor:
        if tensor is None:
            return torch.full((norm.num_features,), otherwise, dtype=torch.float64)
        # Not every accelerator has float64.
        return tensor.detach().to("cpu", torch.float64)

    scale = exact(norm.weight, 1) / (exact(norm.running_var, 1) + norm.eps).sqrt()
    old, window = layer.weight, [1] * (layer.weight.dim() - 2)
    if isinstance(layer, Transposed):
        # (inputs, outputs / groups, ...): the inputs of a group meet that group's outputs alone.
        by_input = scale.view(layer.groups, 1, -1).expand(-1, len(old) // layer.groups, -1)
        rows = by_input.reshape(len(old), -1, *window)
    else:
        rows = scale.view(-1, 1, *window)
    weight = exact(old, 0) * rows
    bias = (exact(layer.bias, 0) - exact(norm.running_mean, 0)) * scale + exact(norm.bias, 0)
    layer.weight = nn.Parameter(weight.to(old.device, old.dtype), old.requires_grad)
    layer.bias = nn.Parameter(bias.to(old.device, old.dtype), old.requires_grad)


def _stand_in(layer: Affine, norm: _BatchNorm) -> nn.Identity:
    """An identity with the batch norm's forward hooks."""
    identity = nn.Identity().eval()
    for hooks in FORWARD_HOOKS:
        setattr(identity, hooks, getattr(norm, hooks))
    if type(norm) is not nn.BatchNorm2d:  # which takes nothing but (B, C, H, W)
        identity.register_forward_pre_hook(partial(_refuse_other, dims=layer.weight.dim()))
    return identity


def _refuse_other(_: nn.Module, args: tuple[Tensor, ...], dims: int) -> None:
    if args[0].dim() != dims:
        raise UserError(
            f"this folded batch norm takes {dims} dimensions, not {args[0].dim()}; "
            "use the network without folding"
        )
