"""The systems there are: read from the YAML beside each paper's file, without importing torch."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from limbeck import foreign
from limbeck.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from torch import nn

    from limbeck.training.method import Method

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_FOLDER = Path(__file__).parent / "systems"


@dataclass(frozen=True)
class Paper:
    """A paper and its tags in Gou et al.'s survey of knowledge distillation (2021)."""

    number: int
    title: str
    authors: tuple[str, ...]
    year: int
    venue: str
    link: str
    knowledge: tuple[str, ...] = ()
    scheme: tuple[str, ...] = ()
    kind: tuple[str, ...] = ()
    task: tuple[str, ...] = ()


@dataclass(frozen=True)
class System:
    """A paper's system: its idea, its presets, what was measured, and where its code lies.

    ``method`` names the class of its method; a paper that is a network alone has none.
    ``further`` names the classes of its other methods, ``SLUG:NAME`` in a recipe.
    ``networks`` says what networks it brings, name by name; the names begin with the slug.
    """

    slug: str
    domain: str
    paper: Paper
    idea: str
    equations: str
    presets: Mapping[str, Mapping[str, Any]] = field(repr=False)
    method: str = ""
    further: Mapping[str, str] = field(default_factory=dict)
    networks: Mapping[str, str] = field(default_factory=dict, repr=False)
    results: tuple[Mapping[str, Any], ...] = field(default=(), repr=False)
    notes: str = ""

    def method_class(self, name: str = "") -> type[Method]:
        """The class that the system's YAML names, or the further one of this name.

        It lies in the file beside the YAML, or in the folder of the same name.

        Raises:
            UserError: the paper is a network and brings no method, or it has no such further one.
        """
        if name and name not in self.further:
            known = [f"{self.slug}:{other}" for other in self.further] or [self.slug]
            wanted = f"{self.slug}:{name}"
            raise UserError(f"there is no method {wanted!r}; {did_you_mean(wanted, known)}")
        if not self.method:
            raise UserError(
                f"{self.slug} is a network and no method; name it as a student or a teacher, as in "
                f"--student {next(iter(self.networks))}"
            )
        found: type[Method] = getattr(self._module(), self.further[name] if name else self.method)
        return found

    def methods(self) -> dict[str, str]:
        """The classes of the paper's methods by the names that recipes give them."""
        main = {self.slug: self.method} if self.method else {}
        return main | {f"{self.slug}:{name}": kind for name, kind in self.further.items()}

    def network(self, name: str, classes: int, channels: int, size: tuple[int, int]) -> nn.Module:
        """One of the paper's networks, made by the function ``network`` of the file beside it."""
        made: nn.Module = self._module().network(name, classes, channels, size)
        return made

    def _module(self) -> Any:
        name = self.slug.replace("-", "_")
        return importlib.import_module(f"limbeck.systems.{self.domain}.{name}")

    def as_json(self) -> dict[str, Any]:
        """What ``limbeck list --json`` says of the system."""
        paper = self.paper
        return {
            "number": paper.number,
            "slug": self.slug,
            "title": paper.title,
            "authors": list(paper.authors),
            "year": paper.year,
            "venue": paper.venue,
            "link": paper.link,
            "domain": self.domain,
            "knowledge": list(paper.knowledge),
            "scheme": list(paper.scheme),
            "kind": list(paper.kind),
            "task": list(paper.task),
            "presets": list(self.presets),
        }


@cache
def systems() -> dict[str, System]:
    """All systems by slug, in the order of their numbers."""
    found = [_read(path) for path in _FOLDER.glob("*/*.yaml")]
    return {system.slug: system for system in sorted(found, key=lambda s: s.paper.number)}


def system(slug: str) -> System:
    """The system of this slug.

    Raises:
        UserError: there is none, with the near names.
    """
    known = systems()
    if slug not in known:
        raise UserError(f"there is no system {slug!r}; {did_you_mean(slug, known)}")
    return known[slug]


def method_class(name: str) -> type[Method]:
    """The method of this name: a system's slug, or ``SLUG:NAME`` for a paper's further ones.

    ``FILE.py:CLASS`` is one of the user's own (see :mod:`limbeck.foreign`).
    """
    if foreign.is_foreign(name):
        return foreign.method_class(name)
    slug, colon, further = name.partition(":")
    return system(slug if further or not colon else name).method_class(further)


def owner(method: str) -> System:
    """The system that a method's name belongs to.

    Raises:
        UserError: there is none; one of the user's own has none.
    """
    if foreign.is_foreign(method):
        raise UserError(
            f"{method} brings no preset with data and models; name a system of the catalogue "
            "before it, as in limbeck compare kd ..."
        )
    return system(method.partition(":")[0])


def short_name(method: str) -> str:
    """What a method is called where its name stands for a run.

    >>> short_name("kd:specialists"), short_name("ours/similarity.py:Similarity")
    ('kd:specialists', 'similarity')
    """
    return method.rpartition(":")[2].lower() if foreign.is_foreign(method) else method


def _read(path: Path) -> System:
    content = yaml.load(path.read_text(encoding="utf-8"), Loader=_LOADER)
    paper = content.pop("paper")
    facts: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in paper.items()}
    return System(
        slug=path.stem.replace("_", "-"),
        domain=path.parent.name,
        paper=Paper(**facts),
        results=tuple(content.pop("results", ())),
        **content,
    )
