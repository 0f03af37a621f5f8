"""Text as plain values (mappings, lists, text, numbers, true, false and null) and as paths."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from limbeck.errors import UserError

MOST_VALUES, MOST_CHARACTERS, MOST_DIGITS = 100_000, 2**20, 400
_STRANGE = ("binary", "omap", "pairs", "set", "timestamp")


def parse(text: str) -> Any:
    """What a YAML text says.

    Dates are text. What grows without end when its aliases are followed is refused, as is a key
    that a mapping names twice.

    Raises:
        ValueError: it says nothing plain; the message is the end of a sentence.

    >>> parse("a: {b: [1, 2.5, x, null], c: 2001-01-01}")
    {'a': {'b': [1, 2.5, 'x', None], 'c': '2001-01-01'}}
    """
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"it has more than {MOST_CHARACTERS:,} characters")
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f" (line {mark.line + 1})" if mark is not None else ""
        raise ValueError(f"{error.problem or error.context}{where}") from None
    except yaml.YAMLError as error:
        raise ValueError(str(error).partition("\n")[0]) from None
    except Exception:  # A wrong tag can fail in any way.
        raise ValueError("a value does not fit its tag") from None


def written(values: Mapping[str, Any]) -> str:
    r"""Plain values as a YAML text that :func:`parse` reads back.

    >>> parse(written({"name": "caf\u00e9 \x85"})) == {"name": "caf\u00e9 \x85"}
    True
    """
    text = yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True)
    # PyYAML would write this line break as it stands and read it as a space.
    return yaml.safe_dump(dict(values), sort_keys=False) if "\x85" in text else text


def parse_json(text: str) -> Any:
    """What a JSON text says.

    Raises:
        ValueError: it is none, or nested too deeply; the message is the end of a sentence.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def path(text: str) -> Path:
    """A path as a user writes it: ``~`` is a home.

    Raises:
        UserError: it can be none, or what lies there is no file and no folder: reading may not end.
    """
    if "\0" in text:
        raise UserError(f"{text!r} does not exist: no path holds a zero byte")
    try:
        found = Path(text).expanduser()
        if found.exists() and not (found.is_file() or found.is_dir()):
            raise UserError(f"{text} cannot be read: it is a device or a pipe and no file")
    except RuntimeError:
        raise UserError(f"{text} begins with the home of a user who is not known here") from None
    except OSError as error:
        raise UserError(f"{text} cannot be read: {(error.strerror or 'error').lower()}") from None
    return found


class _Loader(yaml.SafeLoader):
    """A safe loader that counts every value as often as aliases repeat it."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(_STRANGE)]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    yaml_constructors = {  # noqa: RUF012
        tag: constructor
        for tag, constructor in yaml.SafeLoader.yaml_constructors.items()
        if tag is not None and not tag.endswith(_STRANGE)
    }

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._values = 0
        self._sizes: dict[yaml.Node, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        before, alias = self._values, self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        if node is None:
            return None
        if alias and node not in self._sizes:
            raise _refused("a value holds itself", node)
        self._values += self._sizes[node] if alias else 1
        if self._values > MOST_VALUES:
            raise _refused(f"it holds more than {MOST_VALUES:,} values", node)
        if not alias:
            self._sizes[node] = self._values - before
        if isinstance(node, yaml.MappingNode) and not alias:
            self._check_keys(node)
        if node.tag.endswith((":int", ":float")) and len(node.value) > MOST_DIGITS:
            raise _refused(f"a number has more than {MOST_DIGITS} digits", node)
        return node

    def construct_undefined(self, node: yaml.Node) -> Any:
        raise _refused(f"the tag {node.tag!r} is none of a plain value", node)

    def _check_keys(self, node: yaml.MappingNode) -> None:
        named = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in named:
                    raise _refused(f"the key {key.value!r} occurs twice", key)
                named.add((key.tag, key.value))


_Loader.add_constructor(None, _Loader.construct_undefined)


def _refused(problem: str, node: yaml.Node) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
