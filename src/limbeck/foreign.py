"""Methods from the user's own files, named ``FILE.py:CLASS``. Naming one runs the file."""

from __future__ import annotations

import importlib.util
import os
import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from limbeck import plain
from limbeck.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from limbeck.training.method import Method

PERMISSION = "LIMBECK_RUN_CODE"
"""Set to 1 while files may be run; the processes of a comparison inherit it."""


def is_foreign(name: str) -> bool:
    """Whether a method's name is that of a class in a file.

    >>> is_foreign("mine.py:Mine"), is_foreign("kd:specialists")
    (True, False)
    """
    return name.rpartition(":")[0].endswith(".py")


def permit() -> None:
    """Let files be run from now on, as ``--run-code`` does."""
    os.environ[PERMISSION] = "1"


def method_class(name: str) -> type[Method]:
    """The class that ``FILE.py:CLASS`` names.

    Raises:
        UserError: files may not be run, or this one cannot be, or it has no such method.
    """
    from limbeck.training.method import Method

    path, _, kind = name.rpartition(":")
    if os.environ.get(PERMISSION) != "1":
        raise UserError(
            f"the method {name} is code in a file, which is run only if you say so: --run-code"
        )
    module = _module(plain.path(path).absolute())
    methods = {
        key: value
        for key, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, Method) and value is not Method
    }
    if kind not in methods:
        raise UserError(
            f"{path} has no method {kind!r}, a class that inherits from limbeck.Method; "
            + did_you_mean(kind, methods)
        )
    return methods[kind]


@cache
def _module(path: Path) -> Any:
    if not path.is_file():
        raise UserError(f"the file {path} does not exist, so no method can be had from it")
    name = f"limbeck_foreign_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Where classes look up the annotations of their constructors.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        told = error.lineno if isinstance(error, SyntaxError) else _line(error, path)
        where = f" (line {told})" if told else ""
        raise UserError(
            f"{path} cannot be imported: {type(error).__name__}: {error}{where}"
        ) from error
    return module


def _line(error: BaseException, path: Path) -> int | None:
    """The last line of the file that the error passed through."""
    found, trace = None, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(path):
            found = trace.tb_lineno
        trace = trace.tb_next
    return found
