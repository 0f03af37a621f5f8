"""Several systems on the same ground: one teacher, paired seeds, one leaderboard.

A comparison is a folder of ordinary runs: the teacher's, the plain student's, and one for each
system, in which the teacher is read from the first. Each is carried out by a process of its own,
so it can be stopped anywhere and resumed like any run, alone or with the whole comparison.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from limbeck import memory, plain
from limbeck.catalogue import method_class, owner, short_name
from limbeck.errors import UserError
from limbeck.foreign import is_foreign
from limbeck.recipes import (
    Recipe,
    assigned,
    merged,
    preset,
    read,
    validate,
    with_cache,
    with_teachers,
)
from limbeck.report import leaderboard
from limbeck.report.leaderboard import Leaderboard
from limbeck.training.checkpoint import write_atomically
from limbeck.training.progress import Voice
from limbeck.training.run import RECIPE, RESULT, Run
from limbeck.training.signals import on_signals

COMPARISON, PLAIN, TUNED = "comparison.yaml", "plain", "tuned"
_STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)


@dataclass(frozen=True)
class Plan:
    """What a comparison does, as its folder holds it.

    ``recipes`` has the recipe of each run by its name: teachers first (``teacher``, or
    ``teacher-1`` and so on), then ``plain``, then the systems. ``trials`` is how often each
    system's hyper-parameters are tried on validation data before its run, ``jobs`` how many
    processes work at once.
    """

    recipes: Mapping[str, Mapping[str, Any]]
    trials: int = 0
    jobs: int = 1

    @property
    def teachers(self) -> list[str]:
        return [name for name in self.recipes if name.partition("-")[0] == "teacher"]

    @property
    def systems(self) -> list[str]:
        return [name for name in self.recipes if name not in (PLAIN, *self.teachers)]


def plan(
    systems: Sequence[str],
    name: str,
    kind: str,
    given: Mapping[str, Any],
    teachers: Sequence[str] = (),
    assign: Sequence[str] = (),
    cache: bool = False,
    trials: int = 0,
    jobs: int = 1,
) -> Plan:
    """Lay out a comparison.

    Args:
        systems: methods by name; ``kd+nst`` adds two up. The first one's preset gives data,
            teacher, student and budget to all; of the others' presets the methods' own
            hyper-parameters are taken.
        name: of the preset.
        kind: of data, which presets are fitted to.
        given: recipe values that replace the preset's.
        teachers: models in place of the preset's.
        assign: ``--set`` words; ``methods.SYSTEM.NAME=VALUE`` reaches every entry with that system.
        cache: whether the teachers' answers are remembered.
        trials, jobs: see :class:`Plan`.

    Raises:
        UserError: an unknown system, one that is named twice or takes no teacher, or recipe values
            that do not hold.
    """
    parts = {"+".join(map(short_name, e.split("+"))): e.split("+") for e in systems}
    if len(parts) < len(systems):
        raise UserError("a system is named twice; its seeds would be the same")
    for part in (part for names in parts.values() for part in names):
        if not method_class(part).takes_teacher:
            raise UserError(
                f"{part} takes no teacher, and what is compared here is what a teacher is worth; "
                f"run it alone: limbeck run {part}"
            )
    leader = next(iter(parts))
    base = preset(owner(parts[leader][0]), name, kind)
    shared = merged({**base, "methods": {}}, given)
    if teachers:
        shared = with_teachers(shared, teachers)
    shared = assigned(shared, assign)
    if "method" in shared:
        raise UserError("--set method: say whose, as in --set methods.kd.temperature=8")
    own = shared.pop("methods")
    shared.pop("baseline", None)
    if cache:
        shared = with_cache(shared)
    entries = {}
    for entry, names in parts.items():
        methods = {}
        for part in names:
            presets = {} if is_foreign(part) else owner(part).presets
            fitted = preset(owner(part), name, kind) if name in presets else {}
            methods[part] = merged(fitted.get("methods", {}).get(part) or {}, own.get(part) or {})
        recipe = {**shared, "system": entry, "baseline": False, "methods": methods}
        entries[entry] = _resolved(recipe)
    unknown = set(own) - {part for names in parts.values() for part in names}
    if unknown:
        raise UserError(f"--set methods.{min(unknown)}: that system is not among those compared")
    first = validate(entries[leader])
    runs, taught = _teachers(first)
    if not first.teachers:
        raise UserError(f"{leader} has no teacher; name one with --teacher")
    plain = {**entries[leader], "system": PLAIN, "methods": {}, "teachers": []}
    entries = {entry: _taught_by(recipe, taught) for entry, recipe in entries.items()}
    return Plan({**runs, PLAIN: plain, **entries}, trials, jobs)


def _resolved(values: Mapping[str, Any]) -> dict[str, Any]:
    return validate(values).model_dump(mode="json")


def _taught_by(recipe: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """A recipe with these models as teachers, whatever they were; they are not trained."""
    return _resolved(with_teachers({**recipe, "teachers": [{"model": names[0]}]}, names))


def with_teachers_in(folder: Path, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe of a comparison whose teachers are read from its folder."""
    place = f"run:{folder.absolute()}/"
    teachers = [t | {"model": t["model"].replace("run:./", place, 1)} for t in recipe["teachers"]]
    return {**recipe, "teachers": teachers}


def _teachers(recipe: Recipe) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The runs that train the teachers, and the teachers' names afterwards.

    A name that begins with a dot-slash is meant from the comparison's folder.
    """
    from limbeck.distillation import ready

    runs, names = {}, []
    for number, teacher in enumerate(recipe.teachers, 1):
        if ready(teacher.model):
            names.append(teacher.model)
            continue
        name = "teacher" if len(recipe.teachers) == 1 else f"teacher-{number}"
        names.append(f"run:./{name}")
        data = recipe.data.for_teacher()
        if teacher.augment is not None:
            data["augment"] = teacher.augment.model_dump(mode="json")
        runs[name] = _resolved(
            {
                **recipe.model_dump(mode="json"),
                "system": name,
                "data": data,
                "teachers": [],
                "student": teacher.model_dump(mode="json") | {"augment": None},
                "methods": {},
                "baseline": False,
                "seed": recipe.seed + number - 1,
                "seeds": 1,
            }
        )
    return runs, names


def begin(laid: Plan, out: Path, voice: Voice | None = None) -> Leaderboard:
    """Carry out a comparison in a fresh folder.

    Raises:
        UserError: the folder is taken; what does not fit together, before any training.
    """
    from limbeck.distillation import rehearse

    Run.check_free(out)
    for entry in laid.systems:
        rehearse(validate(laid.recipes[entry]), _own_teachers(laid, entry))
    content = {"recipes": dict(laid.recipes), "trials": laid.trials, "jobs": laid.jobs}
    write_atomically(out / COMPARISON, plain.written(content).encode())
    return go_on(out, voice)


def _own_teachers(laid: Plan, entry: str) -> list[str]:
    """The teachers of an entry by names that can be built before they are trained."""
    untrained = {f"run:./{name}": laid.recipes[name]["student"]["model"] for name in laid.teachers}
    return [untrained.get(t["model"], t["model"]) for t in laid.recipes[entry]["teachers"]]


def is_comparison(folder: Path) -> bool:
    """Whether a folder holds a comparison."""
    return (folder / COMPARISON).is_file()


def go_on(folder: Path, voice: Voice | None = None) -> Leaderboard:
    """Do whatever a comparison still lacks, and write its leaderboard.

    Raises:
        UserError: the folder holds no comparison, or one of its runs cannot be carried out.
    """
    if not is_comparison(folder):
        raise UserError(f"{folder} holds no comparison: it has no {COMPARISON}")
    content = read(folder / COMPARISON)
    laid = Plan(content["recipes"], int(content["trials"]), int(content["jobs"]))
    voice = voice or Voice()
    with _Crew(folder, voice) as crew:
        crew.work([_run(folder, laid, name) for name in laid.teachers], 1)
        crew.work([_run(folder, laid, PLAIN)], 1)
        jobs = _affordable(laid, folder, voice)
        if laid.trials:
            crew.work([_tuning(folder, laid, name) for name in laid.systems], jobs)
            for left in (folder / TUNED).glob("trial-*"):  # by a process that was killed
                shutil.rmtree(left, ignore_errors=True)
        crew.work([_run(folder, laid, name) for name in laid.systems], jobs)
    results = {name: Run.open(folder / name).result() for name in laid.recipes}
    found = leaderboard.rank(
        results[PLAIN],
        {name: results[name] for name in laid.systems},
        {name: _tuned(folder, name) for name in laid.systems} if laid.trials else {},
    )
    page = leaderboard.write(found, folder, content)
    voice.console.print(leaderboard.as_rich(found))
    for entry in found.entries:
        if entry.against_plain is not None:
            voice.say(f"{entry.name}: {entry.against_plain.sentence}")
    voice.say(f"leaderboard: {page}")
    return found


@dataclass(frozen=True)
class _Task:
    """A process to be run: what it is called, where it says what it does, its arguments."""

    name: str
    done: Path
    words: tuple[str, ...]


def _run(folder: Path, laid: Plan, name: str) -> _Task:
    """A run, begun or resumed."""
    path, recipe = folder / name, folder / f"{name}.yaml"
    if (path / RECIPE).is_file():
        return _Task(name, path / RESULT, ("limbeck", "resume", str(path)))
    values = with_teachers_in(folder, laid.recipes[name])
    values = merged(values, {"methods": _tuned(folder, name).get("methods", {})})
    if laid.jobs > 1 and values["engine"].get("threads") is None:
        threads = max(1, (os.cpu_count() or 1) // laid.jobs)
        values["engine"] = {**values["engine"], "threads": threads}
    write_atomically(recipe, plain.written(_resolved(values)).encode())
    return _Task(name, path / RESULT, ("limbeck", "run", str(recipe), "--out", str(path)))


def _tuning(folder: Path, laid: Plan, name: str) -> _Task:
    words = ("limbeck.tuning", str(folder), name, str(laid.trials))
    return _Task(f"tuning {name}", folder / TUNED / f"{name}.yaml", words)


def _tuned(folder: Path, name: str) -> dict[str, Any]:
    """What the search for an entry's hyper-parameters found; empty without one."""
    path = folder / TUNED / f"{name}.yaml"
    return read(path) if path.is_file() else {}


def _affordable(laid: Plan, folder: Path, voice: Voice) -> int:
    """How many processes fit into memory at once, by what the plain student's took."""
    free, taken = memory.available(), Run.open(folder / PLAIN).result().get("memory")
    if laid.jobs == 1 or free is None or not taken:
        return laid.jobs
    # A teacher's answers and a method's own modules come on top.
    jobs = max(1, min(laid.jobs, int(free / (2 * taken))))
    if jobs < laid.jobs:
        voice.warn(f"memory allows {jobs} processes at once, not {laid.jobs}")
    return jobs


class _Crew:
    """Processes at work; they are asked to stop, and save what they did, when the work ends early.

    One process at a time speaks to the terminal, several write into log files.
    """

    def __init__(self, folder: Path, voice: Voice) -> None:
        self.folder = folder
        self.voice = voice
        self.running: dict[subprocess.Popen[bytes], tuple[_Task, IO[bytes] | None]] = {}

    def __enter__(self) -> _Crew:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.running:
            process.terminate()
        for process in self.running:
            process.wait()

    def work(self, tasks: Sequence[_Task], jobs: int) -> None:
        """Carry out what is not done yet, so many at once."""
        waiting = deque(task for task in tasks if not task.done.is_file())
        with on_signals(self._heard):
            while waiting or self.running:
                while waiting and len(self.running) < jobs:
                    self._start(waiting.popleft(), aloud=jobs == 1)
                self._wait()

    def _heard(self, number: int) -> None:
        raise Stopped(self.folder, number)

    def _start(self, task: _Task, aloud: bool) -> None:
        self.voice.say(f"\n{task.name}" if aloud else f"{task.name}: begun")
        log = None if aloud else (self.folder / f"{task.name.replace(' ', '-')}.log").open("ab")
        quiet = log or (subprocess.DEVNULL if self.voice.console.quiet else None)
        command = [sys.executable, "-m", *task.words]
        # In a session of its own, so that a key pressed to stop is heard here and told once.
        process = subprocess.Popen(
            command, stdout=quiet, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
        )
        self.running[process] = (task, log)

    def _wait(self) -> None:
        """Wait until a process ends, and see what became of it."""
        while not (ended := [p for p in self.running if p.poll() is not None]):
            time.sleep(0.05)
        for process in ended:
            task, log = self.running.pop(process)
            if log is not None:
                log.close()
            if process.returncode in _STOPPED:
                raise Stopped(self.folder, process.returncode - 128)
            if process.returncode or not task.done.is_file():
                place = f"; {log.name} says why" if log is not None else ""
                raise UserError(
                    f"{task.name} could not be carried out{place}; when that is put right, go on "
                    f"with: limbeck resume {self.folder}"
                )
            if log is not None:
                self.voice.say(f"{task.name}: done")


class Stopped(Exception):
    """A signal ended the comparison; ``status`` is the exit status."""

    def __init__(self, folder: Path, number: int) -> None:
        super().__init__(f"stopped; continue with: limbeck resume {folder}")
        self.status = 128 + number
