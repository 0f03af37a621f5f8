"""A finished run made again from what its folder says, and the two compared bit by bit."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from limbeck.distillation import fresh_name, resume, start
from limbeck.errors import UserError
from limbeck.recipes import validate
from limbeck.tasks import domain
from limbeck.training.progress import Voice
from limbeck.training.run import Run, environment

TIMED = ("latency_ms", "seconds", "memory", "limbeck")
"""What a result says of the machine at the time, not of what was found."""


_SECONDS = re.compile(r"\d[\d.,]* s\b")
"""What a finding says of the machine at the time."""


class Differs(Exception):
    """A run made again has other bits; ``status`` is the exit status."""

    status = 1


@dataclass(frozen=True)
class Reproduction:
    """A run made again: where, how much was compared, and a sentence for each difference."""

    again: Path
    networks: int
    lines: int
    differences: tuple[str, ...]


def reproduce(folder: Path, out: Path | None = None, voice: Voice | None = None) -> Reproduction:
    """Make a finished run again and compare networks, metrics and results.

    What was begun before in ``out`` is continued. On as many threads as the run was made with, the
    same machine and packages give the same bits.

    Args:
        folder: of the run.
        out: the folder to make it again in; ``runs/SYSTEM-DATA-TIME`` if not given.
        voice: what speaks to the user.

    Raises:
        UserError: the run is not finished or was made from objects in Python, or its data are
            others by now: found before anything is trained.
    """
    voice, run = voice or Voice(), Run.open(folder)
    result, content = run.result(), run.recipe()
    if "data" not in content:
        raise UserError(
            f"{folder} was made from objects in Python, which its folder does not hold; only a run "
            "from a recipe can be made again"
        )
    recipe = validate(content)
    ground = domain(recipe.task)(
        recipe.data, device=torch.device("cpu"), workers=0, voice=Voice(quiet=True)
    )
    then, now = result.get("fingerprint"), ground.facts.get("fingerprint")
    if then != now:
        raise UserError(
            f"the data at {recipe.data.source} are not those of {folder}: their fingerprint was "
            f"{then} and is {now}"
        )
    before = run.environment()
    for sentence in _elsewhere(before):
        voice.warn(sentence)
    if recipe.engine.threads is None and isinstance(before.get("threads"), int):
        torch.set_num_threads(before["threads"])
    if out is not None and (out / "recipe.yaml").is_file():
        if Run.open(out).recipe() != content:
            raise UserError(f"{out} holds another run; choose another name with --out")
        again = resume(out, voice)
    else:
        again = start(recipe, out or fresh_name(result), voice)
    return compare(run, again)


def compare(one: Run, other: Run) -> Reproduction:
    """What two finished runs have in common, and what not; times aside."""
    ours, theirs = _networks(one), _networks(other)
    lines, others = one.metrics(), other.metrics()
    differences = [*_metrics(lines, others)]
    for role in sorted(ours.keys() | theirs.keys()):
        if ours.get(role) != theirs.get(role):
            differences.append(f"the weights of {role} differ")
    # As text, NaN is equal to itself.
    told = [_SECONDS.sub("", json.dumps(run.findings())) for run in (one, other)]
    if told[0] != told[1]:
        differences.append("the findings differ")
    before, after = one.result(), other.result()
    for name in sorted((before.keys() | after.keys()) - set(TIMED)):
        found = [json.dumps(r.get(name), sort_keys=True) for r in (before, after)]
        if found[0] != found[1]:
            differences.append(f"{name} in the result was {found[0][:200]} and is {found[1][:200]}")
    return Reproduction(other.path, len(ours), len(lines), tuple(differences))


def _networks(run: Run) -> dict[str, str]:
    """SHA-256 of each stored network by role."""
    found = {}
    for file in run.path.glob("*.safetensors"):
        card = file.with_suffix(".json")
        if card.is_file():
            found[file.stem] = str(json.loads(card.read_text(encoding="utf-8")).get("sha256"))
    return found


def _metrics(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> Iterator[str]:
    """The first line of metrics that differs."""
    for one, other in zip_longest(ours, theirs):
        if json.dumps(one) != json.dumps(other):
            place = one or other
            yield f"metrics differ from step {place['step']} of phase {place['phase']!r} on"
            return


def _elsewhere(before: Mapping[str, Any]) -> Iterator[str]:
    """What is otherwise than where the run was made, as far as bits depend on it."""
    now = environment()
    for name in ("python", "platform", "processor", "cuda"):
        if name in before and before[name] != now[name]:
            yield f"{name} was {before[name]} and is {now[name]}; bits may differ"
    packages = before.get("packages")
    for name, version in packages.items() if isinstance(packages, Mapping) else ():
        if version != now["packages"].get(name):
            yield f"{name} was {version} and is {now['packages'].get(name)}; bits may differ"
