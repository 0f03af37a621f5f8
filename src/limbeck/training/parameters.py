"""Constructor arguments checked against their annotations, from YAML and Python alike."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, get_type_hints

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from limbeck.errors import UserError, did_you_mean


def schema(kind: type) -> type[BaseModel]:
    """A class's constructor as a pydantic model: names, types, ranges and defaults."""
    return _schema(kind.__name__, inspect.unwrap(kind.__init__))  # type: ignore[misc]


def checked(name: str, init: Callable[..., None]) -> Callable[..., None]:
    """A constructor that checks its arguments first.

    Raises (from the returned constructor):
        UserError: an unknown argument, with the near names; a value of the wrong type or out of
            range.
    """
    names = list(inspect.signature(init).parameters)[1:]

    @functools.wraps(init)
    def construct(self: Any, *args: Any, **kwargs: Any) -> None:
        if len(args) > len(names):
            raise UserError(f"{name} takes at most {len(names)} arguments: {', '.join(names)}")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        for argument in given:
            if argument not in names:
                raise UserError(
                    f"{name} has no parameter {argument!r}; {did_you_mean(argument, names)}"
                )
        try:
            values = _schema(name, init)(**given)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            reason = reason_of(first["msg"])
            raise UserError(f"{name}({where}={first['input']!r}): {reason}") from None
        init(self, **{argument: getattr(values, argument) for argument in given})

    return construct


def reason_of(message: str) -> str:
    """A pydantic message as the end of a sentence.

    >>> reason_of("Value error, the moon is full")
    'the moon is full'
    """
    text = message.removeprefix("Value error, ")
    return text[:1].lower() + text[1:]


def _schema(name: str, init: Callable[..., None]) -> type[BaseModel]:
    hints = get_type_hints(init, include_extras=True)
    fields: dict[str, Any] = {}
    for argument, parameter in list(inspect.signature(init).parameters.items())[1:]:
        default = ... if parameter.default is parameter.empty else parameter.default
        fields[argument] = (hints.get(argument, Any), default)
    config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)
    return create_model(name, __config__=config, **fields)
