"""YAML and command-line words become validated objects here, and nowhere else."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError, create_model

from limbeck import plain
from limbeck.catalogue import System, method_class, short_name
from limbeck.data.augment import Augment
from limbeck.errors import UserError, did_you_mean, shown
from limbeck.tasks import DOMAINS, domain
from limbeck.training.domain import Domain, Part, Words
from limbeck.training.engine import Engine
from limbeck.training.method import Method, Sum, Supervised
from limbeck.training.parameters import MOST, TOO_LARGE, Fault, fault
from limbeck.training.phases import Training

Share = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class ModelPart(Part):
    """A model by name and how it is trained; weights in the name make a finished teacher."""

    model: str
    training: Training = Training()
    augment: Augment | None = Field(default=None, description="instead of the data's")
    called: str = Field(default="", description="in tables and pictures")


class Recipe(Part):
    """Everything that decides a run; ``data`` is what the task's domain understands."""

    system: str
    preset: str = ""
    task: str = "classification"
    data: Words
    teachers: tuple[ModelPart, ...] = ()
    mean: Literal["probabilities", "logits"] = "probabilities"
    weights: tuple[Share, ...] | None = None
    student: ModelPart
    methods: dict[str, dict[str, Any]] = Field(default_factory=dict)
    seed: int = Field(default=0, ge=0, lt=2**31)
    seeds: int = Field(default=1, ge=1, le=1000, description="paired comparisons, from `seed` on")
    baseline: bool | ModelPart = Field(
        default=True, description="the plain student; or another model to compare with"
    )
    select: Literal["last", "best"] = "last"
    engine: Engine = Engine()

    def names(self, roles: Mapping[str, str] | None = None) -> dict[str, str]:
        """What the roles are called: as the recipe says, else as the method does in ``roles``.

        Two models that are compared go by their names where neither has another for them.
        """
        said = dict(roles or {})
        if isinstance(self.baseline, ModelPart):
            said["baseline"] = self.baseline.called or self.baseline.model
            said.setdefault("student", self.student.model)
        if self.student.called:
            said["student"] = self.student.called
        return said

    def method(self) -> Method:
        """The method, or the sum of methods, that the recipe names."""
        if not self.methods:
            return Supervised()
        parts = [method_class(name)(**given) for name, given in self.methods.items()]
        return parts[0] if len(parts) == 1 else _sum(parts)


@cache
def recipe_type(task: str) -> type[Recipe]:
    """What a recipe of this task looks like.

    >>> recipe_type("sequence").model_fields["data"].annotation.__name__
    'SequenceWords'

    Raises:
        UserError: there is no such task.
    """
    return create_model("Recipe", __base__=Recipe, data=(domain(task).words_type, ...))


def _sum(parts: Sequence[Method]) -> Method:
    total = parts[0]
    for part in parts[1:]:
        total = Sum(total, part)
    return total


def preset(chosen: System, name: str, kind: str) -> dict[str, Any]:
    """A system's preset as plain values, fitted to a kind of data (its ``for`` section).

    Raises:
        UserError: the system has no such preset.
    """
    if name not in chosen.presets:
        raise UserError(
            f"{chosen.slug} has no preset {name!r}; {did_you_mean(name, chosen.presets)}"
        )
    # The catalogue's own stay as they are whatever becomes of these.
    content = copy.deepcopy(dict(chosen.presets[name]))
    fitted = content.pop("for", {})
    return {
        "system": chosen.slug,
        "preset": name,
        **merged(content, fitted.get(kind, {})),
    }


def preset_source(chosen: System, name: str) -> str:
    """The data that a preset runs on unless told otherwise."""
    content = chosen.presets.get(name, {})
    return str(content.get("data", {}).get("source", preset_domain(chosen, name).source))


def preset_domain(chosen: System, name: str) -> type[Domain]:
    """The domain of a preset's task."""
    return domain(chosen.presets.get(name, {}).get("task", "classification"))


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with the values of ``over`` put in, mapping by mapping.

    >>> merged({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}})
    {'a': {'b': 3, 'c': 2}}
    """
    result = dict(base)
    for key, value in over.items():
        before = result.get(key)
        if isinstance(before, Mapping) and isinstance(value, Mapping):
            result[key] = merged(before, value)
        else:
            result[key] = value
    return result


def overrides(words: Iterable[str]) -> dict[str, Any]:
    """``["a.b=1", "c=x"]`` as nested values; the right sides are YAML.

    Raises:
        UserError: a word without ``=``, or a value that is no YAML.

    >>> overrides(["student.training.epochs=3", "seed=1"])
    {'student': {'training': {'epochs': 3}}, 'seed': 1}
    """
    result: dict[str, Any] = {}
    for word in words:
        path, equals, text = word.partition("=")
        keys = path.strip().split(".")
        if not equals or not all(keys) or len(keys) > DEEPEST:
            raise UserError(f"--set wants key.key=value, not {shown(word)}")
        try:
            value: Any = plain.parse(text)
        except ValueError as error:
            raise UserError(f"--set {path}: {shown(text)} is no YAML value: {error}") from None
        for key in reversed(keys):
            value = {key: value}
        result = merged(result, value)
    return result


def assigned(values: Mapping[str, Any], words: Iterable[str]) -> dict[str, Any]:
    """Recipe values with ``--set`` words put in; ``teacher.KEY`` reaches every teacher.

    >>> assigned({"teachers": [{"model": "vgg8"}]}, ["teacher.model=vgg11"])
    {'teachers': [{'model': 'vgg11'}]}
    """
    given = overrides(words)
    over = given.pop("teacher", None)
    result = merged(_with_list(values), given)
    if over is not None:
        if not isinstance(over, Mapping):
            raise UserError(
                f"--set teacher: a key of the teacher is wanted, as in teacher.model={over}"
            )
        result["teachers"] = [merged(t, over) for t in _teachers(result)]
    return result


def with_teachers(values: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Recipe values with these models as teachers, trained as the first one was to be."""
    result = _with_list(values)
    before = _teachers(result)[0]
    result["teachers"] = [merged(before, {"model": name}) for name in names]
    return result


VIEWS = 4
"""So many views of a sample are remembered unless a recipe says how many."""


def with_cache(values: Mapping[str, Any]) -> dict[str, Any]:
    """Recipe values that remember the teacher's answers, of a finite number of views if any.

    >>> with_cache({"data": {"augment": {"crop": 2, "views": None}}})["data"]
    {'augment': {'crop': 2, 'views': 4}}
    """
    lacking: dict[str, Any] = {"engine": {"cache": "fp16"}}
    words = domain(str(values.get("task", "classification"))).words_type
    if "augment" in words.model_fields and "views" in _fields(words, ["augment"]):
        lacking["data"] = {"augment": {"views": VIEWS}}
    return _filled(values, lacking)


def _filled(values: Mapping[str, Any], lacking: Mapping[str, Any]) -> dict[str, Any]:
    """Values with those of ``lacking`` where there is nothing or null, mapping by mapping."""
    result = dict(values)
    for key, value in lacking.items():
        before = result.get(key)
        if before is None:
            result[key] = value
        elif isinstance(before, Mapping) and isinstance(value, Mapping):
            result[key] = _filled(before, value)
    return result


def _teachers(values: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The teachers of a recipe, one without settings if there are none."""
    found = values.get("teachers") or [{}]
    if not isinstance(found, (list, tuple)) or not all(isinstance(t, Mapping) for t in found):
        raise UserError("recipe key teachers: a list of mappings, one a teacher, is wanted")
    return list(found)


def _with_list(values: Mapping[str, Any]) -> dict[str, Any]:
    """``teacher: {...}`` is ``teachers: [{...}]``."""
    result = dict(values)
    if "teacher" in result:
        if "teachers" in result:
            raise UserError("a recipe has the key teacher or the key teachers, not both")
        result["teachers"] = [result.pop("teacher")]
    return result


def for_own_models(
    methods: Sequence[str], data: str, student: str, training: Mapping[str, Any]
) -> dict[str, Any]:
    """A recipe for models of the user's own: AdamW with a warm-up, which suits most of them."""
    for name in methods:
        method_class(name)
    settings = {"optimiser": "adamw", "weight_decay": 0.05, "warmup": 1.0, **training}
    return {
        "system": short_name(methods[0]) if methods else "train",
        "data": {"source": data, "augment": {"crop": 2}},
        "teachers": [{"model": "", "training": settings}] if methods else [],
        "student": {"model": student, "training": settings},
        "methods": {slug: {} for slug in methods},
    }


def read(path: Path) -> dict[str, Any]:
    """A recipe file as plain values; nothing in it is imported or evaluated.

    Raises:
        UserError: the file is missing or no YAML mapping.
    """
    try:
        with plain.path(str(path)).open(encoding="utf-8") as file:
            content = plain.parse(file.read(plain.MOST_CHARACTERS + 1))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {(error.strerror or 'error').lower()}") from None
    except ValueError as error:
        raise UserError(f"{path} is no YAML that a recipe can be read from: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no mapping of keys to values, which a recipe is")
    return content


DEEPEST = 20
"""No recipe is nested deeper."""


def validate(values: Mapping[str, Any]) -> Recipe:
    """Plain values as a recipe.

    Raises:
        UserError: a key that does not exist (with the near ones), or a value out of range: one
            sentence on the first of them.
    """
    _check_extent(values)
    values = _shared_method(_with_list(values))
    kind = recipe_type(str(values.get("task", "classification")))
    try:
        recipe = kind.model_validate(values)
    except ValidationError as error:
        raise UserError(_sentence(fault(error, values), kind)) from None
    _check_extent(recipe.model_dump())  # again, as numbers may have been text
    recipe.method()
    return recipe


def _check_extent(values: Mapping[str, Any]) -> None:
    """Refuse values without end, numbers that no machine counts to and keys that are no words."""
    waiting: list[tuple[str, int, Any]] = [("", 0, values)]
    seen = 0
    while waiting:
        where, depth, value = waiting.pop()
        seen += 1
        if depth > DEEPEST or seen > plain.MOST_VALUES:
            raise UserError(f"recipe key {where}: values are nested too deeply, or too many")
        if isinstance(value, int | float) and abs(value) >= MOST:
            raise UserError(f"recipe key {where}={shown(value)}: {TOO_LARGE}")
        if isinstance(value, Mapping):
            for key, inner in value.items():
                path = f"{where}.{key}".removeprefix(".")
                if not isinstance(key, str) or not key.isprintable():
                    raise UserError(f"recipe key {path}: {shown(key)} is no word")
                waiting.append((path, depth + 1, inner))
        elif isinstance(value, list | tuple):
            waiting += [(f"{where}.{n}", depth + 1, inner) for n, inner in enumerate(value)]


def _shared_method(values: dict[str, Any]) -> dict[str, Any]:
    """``method: {...}`` holds the parameters of the recipe's first method."""
    if "method" in values:
        own, methods = values.pop("method"), values.get("methods") or {}
        if not isinstance(methods, Mapping):
            raise UserError("recipe key methods: a mapping from systems to parameters is wanted")
        first = next(iter(methods), str(values.get("system")))
        given = methods.get(first) or {}
        if not all(isinstance(m, Mapping) for m in (own, given)):
            raise UserError("recipe key method: a mapping of parameters is wanted")
        values["methods"] = {**methods, first: merged(given, own)}
    return values


def _sentence(wrong: Fault, kind: type[Recipe]) -> str:
    if wrong.kind == "extra_forbidden":
        *parents, last = wrong.path
        known = _fields(kind, parents)
        return f"the recipe has no key {shown(wrong.where)}{_elsewhere(wrong.path)}; " + (
            did_you_mean(str(last), known)
        )
    if wrong.kind == "missing":
        return f"the recipe lacks the key {wrong.where!r}"
    return f"recipe key {wrong.where}={shown(wrong.value)}: {wrong.reason}"


def _elsewhere(place: Sequence[int | str]) -> str:
    """The tasks in which a key would be one, as a part of a sentence."""
    if len(place) != 2 or place[0] != "data":
        return ""
    tasks = [task for task in DOMAINS if place[1] in domain(task).words_type.model_fields]
    return f", which is of the task {' or '.join(tasks)}" if tasks else ""


def _fields(model: type[BaseModel], path: Sequence[int | str]) -> list[str]:
    """The keys allowed at a place in a recipe."""
    for part in path:
        if isinstance(part, int):
            continue
        annotation = model.model_fields[part].annotation
        nested = _model_in(annotation)
        if nested is None:
            return []
        model = nested
    names = list(model.model_fields)
    return [*names, "teacher", "method"] if issubclass(model, Recipe) else names


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        found = _model_in(inner)
        if found is not None:
            return found
    return None
