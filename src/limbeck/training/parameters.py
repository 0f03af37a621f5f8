"""Constructor arguments checked against their annotations, from YAML and Python alike."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_type_hints

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from limbeck.errors import UserError, did_you_mean, shown

MOST, TOO_LARGE = 2.0**63, "so large a number means nothing"


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
            wrong = fault(error, given)
            raise UserError(f"{name}({wrong.where}={shown(wrong.value)}): {wrong.reason}") from None
        for argument in given:
            value = getattr(values, argument)
            if isinstance(value, int | float) and abs(value) >= MOST:
                raise UserError(f"{name}({argument}={shown(value)}): {TOO_LARGE}")
        init(self, **{argument: getattr(values, argument) for argument in given})

    return construct


@dataclass(frozen=True)
class Fault:
    """What is wrong with values: the path to one of them, the value, pydantic's name and reason."""

    path: tuple[int | str, ...]
    value: Any
    kind: str
    reason: str

    @property
    def where(self) -> str:
        """The path as people write it."""
        return ".".join(map(str, self.path))


_REASONS = {
    "model_type": "a mapping of keys to values is wanted",
    "dict_type": "a mapping of keys to values is wanted",
    "tuple_type": "a list is wanted",
    "path_type": "a path is wanted",
}
"""Where pydantic would name its own classes."""


def fault(error: ValidationError, given: Any) -> Fault:
    """The first value that a pydantic model refuses; of alternatives what comes closest.

    >>> kind = create_model("Kind", side=(bool | dict[str, int], ...))
    >>> try:
    ...     kind(side={"left": "x"})
    ... except ValidationError as error:
    ...     print(fault(error, {"side": {"left": "x"}}).where)
    side.left
    """
    errors = error.errors(include_url=False)
    found = [
        Fault(
            _within(given, one["loc"], lacking=one["type"] == "missing"),
            one["input"],
            one["type"],
            _REASONS.get(one["type"], reason_of(one["msg"])),
        )
        for one in errors
        if one["loc"][:1] == errors[0]["loc"][:1]
    ]
    return max(found, key=lambda one: (len(one.path), one.kind == "extra_forbidden"))


def _within(
    given: Any, place: tuple[int | str, ...], lacking: bool = False
) -> tuple[int | str, ...]:
    """A place, whose last part may be lacking, without pydantic's words for a type's variants."""
    path: list[int | str] = []
    for part in place:
        try:
            given = given[part]
        except (TypeError, LookupError):
            continue
        path.append(part)
    return (*path, place[-1]) if lacking else tuple(path)


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
    config = ConfigDict(extra="forbid", arbitrary_types_allowed=True, allow_inf_nan=False)
    return create_model(name, __config__=config, **fields)
