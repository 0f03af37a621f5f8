"""Named places in a model whose activation is wanted."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from limbeck.errors import UserError, did_you_mean


class _Enough(Exception):
    """Ends a pass in which everything wanted has been seen."""


class Taps:
    """Captures what named modules of a model put out (or take in), by forward hooks.

    A path is a module's name as in ``model.named_modules()``; with ``:input`` behind it the tap
    gives the module's first argument instead, as in ``"fc:input"``. Captures are returned beside
    the model's output and never parked on the model, so a tapped model compiles as one graph.

    Args:
        model: any module; it is not rewritten, and :meth:`remove` leaves no trace.
        paths: the places wanted, in the order in which they are returned.
        stop: end a pass as soon as everything wanted is there; the output is then ``None``. The
            first pass is a whole one, which finds taps that fire twice.

    Raises:
        UserError: a path that names no module (with the near names); on a call, a tap that did
            not fire or fired more than once.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
        >>> with Taps(model, ["0"]) as taps:
        ...     output, features = taps(torch.zeros(2, 4))
        >>> features["0"].shape
        torch.Size([2, 3])
    """

    def __init__(self, model: nn.Module, paths: Iterable[str], stop: bool = False) -> None:
        self.model = model
        self.paths = tuple(dict.fromkeys(paths))
        self.stop = stop and bool(self.paths)
        self._tried = False
        self._caught: dict[str, Tensor] = {}
        self._fired: dict[str, int] = {}
        self._handles: list[RemovableHandle] = []
        modules = dict(model.named_modules())
        for path in self.paths:
            name, _, side = path.partition(":")
            if not name or name not in modules or side not in ("", "input"):
                raise UserError(
                    f"{type(model).__name__} has no module {path!r} to tap; "
                    + did_you_mean(name, [n for n in modules if n])
                )
        for path in self.paths:
            name, _, side = path.partition(":")
            self._handles.append(self._hook(modules[name], path, side == "input"))

    def _hook(self, module: nn.Module, path: str, wants_input: bool) -> RemovableHandle:
        def catch(value: Any) -> None:
            if isinstance(value, tuple):
                value = value[0]
            self._caught[path] = value
            self._fired[path] = self._fired.get(path, 0) + 1
            if self.stop and self._tried and len(self._fired) == len(self.paths):
                raise _Enough

        if wants_input:
            return module.register_forward_pre_hook(lambda _, args: catch(args))
        return module.register_forward_hook(lambda _, __, output: catch(output))

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Tensor]]:
        """Run the model; return its output and the captures by path."""
        return self.watch(self.model, *args, **kwargs)

    def watch(
        self, run: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> tuple[Any, dict[str, Tensor]]:
        """Run a callable that ends up in the model, a wrapper around it for instance."""
        self._caught, self._fired = {}, {}
        output = None
        with suppress(_Enough):
            output = run(*args, **kwargs)
        self._tried = True
        caught, self._caught = self._caught, {}
        for path in self.paths:
            times = self._fired.get(path, 0)
            if times != 1:
                raise UserError(
                    f"the tap {path!r} fired {times} times in one pass of "
                    f"{type(self.model).__name__}; tap a module that runs exactly once"
                    + (", such as the block around it" if times else "")
                )
            if not isinstance(caught[path], Tensor):
                raise UserError(
                    f"the tap {path!r} of {type(self.model).__name__} catches "
                    f"{type(caught[path]).__name__}, not a tensor; tap a module within"
                )
        return output, {path: caught[path] for path in self.paths}

    def overwritten(self, run: Callable[[], Any]) -> list[str]:
        """The taps whose tensor a later in-place operation overwrites in a pass of ``run``.

        >>> import torch
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(inplace=True))
        >>> taps = Taps(model, ["0"])
        >>> taps.overwritten(lambda: taps(torch.zeros(2, 4)))
        ['0']
        """
        versions: dict[str, tuple[Tensor, int]] = {}
        modules = dict(self.model.named_modules())

        def note(path: str) -> Callable[..., None]:
            def hook(_: nn.Module, __: Any, output: Any) -> None:
                tensor = output[0] if isinstance(output, tuple) else output
                if isinstance(tensor, Tensor):
                    versions[path] = (tensor, tensor._version)

            return hook

        outputs = [p for p in self.paths if not p.endswith(":input")]
        handles = [modules[p].register_forward_hook(note(p)) for p in outputs]
        try:
            run()
        finally:
            for handle in handles:
                handle.remove()
        return [p for p, (tensor, version) in versions.items() if tensor._version != version]

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()
