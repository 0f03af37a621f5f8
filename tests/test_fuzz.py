"""Whatever a user writes, the outcome is a recipe, a run or one sentence."""

from __future__ import annotations

import contextlib
import io
import os
import re
import reprlib
import resource
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache, reduce
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from limbeck import cli, comparison, distillation, plain, recipes
from limbeck.catalogue import systems
from limbeck.errors import MOST_CHARACTERS, UserError
from limbeck.models import zoo
from limbeck.training.progress import Voice
from limbeck.training.run import Run

# The soak draws its cases anew each time unless this says otherwise.
SEED = int(os.environ.get("LIMBECK_FUZZ_SEED") or time.time())
SECONDS, MEMORY = 60, 8 * 2**30
INTERNAL = re.compile(r"pydantic|object at 0x|<class|Traceback|ModelPart|Words\b|\[key\]|NoneType")

# What is written.

TRICKS = [
    *("", " ", ".", "..", "~", "canary.py", "~nobody/x", "../../etc/passwd", "/etc/passwd"),
    *("/dev/zero", "a\0b", "a\nb", "\x1b[31m", "\u202e", "\ud800", "é" * 300, "x" * 5000, "%s"),
    *("{}", "{0}", "-1", "nan", "digits", "digits:x", "folder:", "folder:.", "hf:", "mnist"),
    *("cifar10:.", "parquet:\0", "a:b", "mlp-8", "mlp-0", "mlp-", "mlp-²", "mlp--1"),
    *("mlp-99999999999999999999", "cnn-4", "wrn-10-1", "wrn-999999994-1", "wrn-10-99999999"),
    *("mlp-8@", "mlp-8@pretrained", "mlp-8@x.pt", "run:", "file:/etc/passwd", "file:\0", "timm:"),
    *("torchvision:x", "hf:.", "vgg8", "resnet8", "kd", "kd+nst", "kd:", "kd:x", ":", "+"),
    *("canary.py:Canary", "canary.py:", ".py:x", "fp16", "top-0", "top-9999999999999999999"),
    *("tensorboard", "cosine", "classification", "text"),
]
TEXTS = st.sampled_from(TRICKS) | st.text(max_size=12)
NUMBERS = st.one_of(
    st.sampled_from([0, 1, -1, 2, 3, 255, 2**31, 2**63, -(2**64), 10**12, 10**30, 10**400]),
    st.integers(-5, 300),
    st.floats(),
    st.booleans(),
)
LIKELY = [0, 1, 2, 7, 100, 1000, 2**16, 10**6, 2**31 - 1, 10**12, 0.5, 0.99, 1e-9, "1e300"]
SCALARS = st.none() | NUMBERS | TEXTS
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS | NUMBERS, inner, max_size=3),
    max_leaves=6,
)
"""Values of any type, hostile ones often."""

BOMBS = [
    "a0: &a0 [x]\n" + "\n".join(f"a{n}: &a{n} [{f'*a{n - 1},' * 9}]" for n in range(1, 40)),
    "a0: &a0 {x: 1}\n"
    + "\n".join(f"a{n}: &a{n} {{<<: [{f'*a{n - 1},' * 9}]}}" for n in range(1, 40)),
    *("&a [*a]", "a: &a {b: *a}", "&a {<<: *a}", "[" * 10_000, "{a: " * 10_000, "- " * 50_000),
    *("? " * 50_000, "a: " + "9" * 5000, "a: 1" + ":59" * 100_000, "a: 0x" + "f" * 5000),
    *("a: !!binary aGk=", "a: 2001-01-01", "a: !!set {b}", "!!omap [a: 1]", "a: 1\na: 2"),
    *("a: !!python/object/apply:os.system ['touch canary']", "{1: 2, null: 3}", "---\n---\n", ""),
    *("!!python/name:os.system", "!!python/module:os", "a: !!int ''", "a: !!float x", "\ufeffa: 1"),
    *("a: .nan", "a: 1e999", "\0", "%YAML 9.9\n---\n", "a: *b", "<<: 1", "? [a]\n: b", "!!bool x"),
    "\n".join(f"k{n}: 1" for n in range(20_000)),
]
MARKS = st.sampled_from([*"[]{}:,&*!|>'\"%@`#?-\n\t ", "<<: ", "*a", "&a ", "!!str ", "a: ", "- "])
YAMLS = st.one_of(
    st.sampled_from(BOMBS),
    st.lists(MARKS | st.text(max_size=3), max_size=30).map("".join),
    VALUES.filter(lambda value: not isinstance(value, str)).map(repr),
    st.text(),
)
FILES = st.one_of(
    YAMLS.map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.binary(max_size=60),
    YAMLS.map(lambda text: text.encode("utf-16", "surrogatepass")),
)


@cache
def presets() -> list[dict[str, Any]]:
    """Every preset of every system for every kind of data, resolved."""
    return [
        recipes.validate(recipes.preset(chosen, name, kind)).model_dump(mode="json")
        for chosen in systems().values()
        for name, content in chosen.presets.items()
        for kind in ("digits", *content.get("for", {}))
    ]


@cache
def keys() -> list[str]:
    """Every key of the presets, as ``--set`` writes it."""
    found = {".".join(map(str, path)) for base in presets() for path in places(base) if path}
    return sorted({re.sub(r"^teachers\.\d", "teacher", key) for key in found})


def places(values: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths to everything in plain values."""
    yield path
    if isinstance(values, dict | list):
        for key, inner in values.items() if isinstance(values, dict) else enumerate(values):
            yield from places(inner, (*path, key))


def replaced(values: Any, path: tuple[Any, ...], change: Callable[[Any], Any]) -> Any:
    """Values with the one at a place changed; a change to ``...`` leaves it out."""
    if not path:
        return change(values)
    key, *rest = path
    pairs = dict(values) if isinstance(values, dict) else dict(enumerate(values))
    pairs[key] = replaced(pairs[key], tuple(rest), change)
    left = {k: v for k, v in pairs.items() if v is not ...}
    return left if isinstance(values, dict) else list(left.values())


class Changed(dict[str, Any]):
    """A recipe that shows what was changed in it."""

    what: str

    def __repr__(self) -> str:
        return self.what


@st.composite
def mutated(
    draw: st.DrawFn,
    bases: st.SearchStrategy[dict[str, Any]],
    changes: Callable[[Any], st.SearchStrategy[Any]],
) -> dict[str, Any]:
    """A recipe with up to three values changed."""
    values = draw(bases)
    what = f"{values['system']} {values['preset']} {values['data']['source']}"
    for _ in range(draw(st.integers(1, 3))):
        # A place at random is mostly one of a long list, so half of them are found key by key.
        path: tuple[Any, ...] = ()
        here = values
        everywhere = list(places(values))
        if draw(st.booleans()):
            path = everywhere[draw(st.integers(0, len(everywhere) - 1))]
            here = reduce(lambda inner, key: inner[key], path, values)
        while isinstance(here, dict | list) and here and (not path or draw(st.integers(0, 9))):
            key = draw(st.sampled_from(list(here) if isinstance(here, dict) else range(len(here))))
            path, here = (*path, key), here[key]
        change = draw(changes(here))
        values = replaced(values, path, lambda _, change=change: change)
        what += f"; {'.'.join(map(str, path))} = {reprlib.repr(change)}"
    found = Changed(values)
    found.what = what
    return found


def anything(here: Any) -> st.SearchStrategy[Any]:
    """What may be put in a value's place: of its type or another, or ``...``, which is nothing."""
    kinds = [VALUES, st.sampled_from([..., [here], str(here)]), plausible(here)]
    if isinstance(here, dict):
        kinds.append(st.builds(lambda key, value: {**here, key: value}, TEXTS, VALUES))
    elif isinstance(here, list):
        kinds += [st.just([*here, *here]), VALUES.map(lambda value: [*here, value])]
    return st.one_of(kinds)


def plausible(here: Any) -> st.SearchStrategy[Any]:
    """Values of the same type, or of any where there was none."""
    if isinstance(here, bool):
        return st.just(not here)
    if isinstance(here, int | float):
        return st.sampled_from([-here, here + 1, here * 1000, *LIKELY])
    if isinstance(here, str):
        return TEXTS | st.sampled_from([here + "\n", here * 3])
    return st.sampled_from([here, True, *LIKELY]) | TEXTS | st.lists(st.sampled_from(LIKELY))


WORDS = st.lists(
    st.builds(
        lambda key, equals, text: f"{key}{equals}{text}",
        st.deferred(lambda: st.sampled_from(keys())) | TEXTS | st.lists(TEXTS).map(".".join),
        st.sampled_from(["=", "=", "=", "", "=="]),
        YAMLS | TEXTS | SCALARS.map(str),
    ),
    max_size=3,
)
PRESETS = st.deferred(lambda: st.integers(0, len(presets()) - 1).map(lambda n: presets()[n]))

# What must hold.


COUNTS: Counter[str] = Counter()


class Hangs(BaseException):
    """A case takes too long; nothing takes this for a mistake of the user."""


@contextlib.contextmanager
def in_time() -> Iterator[None]:
    def ring(*_: object) -> None:
        raise Hangs

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def sentence(said: str) -> None:
    assert said.strip()
    assert said.isprintable()
    assert len(said) < 2 * MOST_CHARACTERS
    assert not INTERNAL.search(said), said


def outcome(call: Callable[[], Any]) -> Any:
    """What a call comes to: its value, or ``None`` after one sentence."""
    with in_time():
        try:
            COUNTS["asked"] += 1
            found = call()
        except UserError as error:
            sentence(str(error))
            return None
    COUNTS["taken"] += 1
    return found


def read(content: bytes) -> None:
    Path("recipe.yaml").write_bytes(content)
    values = outcome(lambda: recipes.read(Path("recipe.yaml")))
    if values is not None:
        check(values)


def check(values: Any) -> recipes.Recipe | None:
    """Validate values; what is valid is the same recipe when it was written and read."""
    recipe = outcome(lambda: recipes.validate(values))
    if recipe is not None:
        with in_time():
            text = plain.written(recipe.model_dump(mode="json"))
            Path("recorded.yaml").write_text(text, encoding="utf-8")
            again = recipes.validate(recipes.read(Path("recorded.yaml")))
            assert again == recipe
            parts = [*recipe.teachers, recipe.student]
            assert all(0 <= p.training.factor(e) <= 1 for p in parts for e in (0.0, 0.5, 3.0))
    return recipe


def assign(case: tuple[dict[str, Any], list[str]]) -> None:
    values, words = case
    found = outcome(lambda: recipes.assigned(values, words))
    if found is not None:
        check(found)
        found = outcome(lambda: recipes.with_cache(found))
        if found is not None:
            check(found)


def begin(values: dict[str, Any]) -> None:
    """Start a recipe up to the moment at which its training would begin."""
    recipe = check(values)
    if recipe is not None:
        folder = Path("runs") / f"{time.monotonic_ns()}"
        engine = recipe.engine.model_copy(update={"threads": 1, "compile": False})
        recipe = recipe.model_copy(update={"engine": engine})
        run = outcome(lambda: distillation.start(recipe, folder, Voice(quiet=True)))
        if run is not None:
            assert recipes.validate(Run.open(folder).recipe()) == recipe


def about_to_train(job: Any, run: Run) -> Run:
    """What training begins with: a batch, and an optimiser."""
    bench = job.bench
    for training in (bench.training, *(c.training for c in bench.candidates if c.training)):
        training.build([torch.nn.Parameter(torch.zeros(2, 2))])
        batch = next(iter(bench.batches(training.batch_size, bench.seeds[-1]).epoch(1)))
        assert batch
    return run


def call(words: list[str]) -> None:
    """The command line ends with status 0, with one sentence, or by saying how it is used."""
    said, status = io.StringIO(), 0
    with (
        in_time(),
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(said),
    ):
        patch.setattr(sys, "argv", ["limbeck", *words])
        try:
            cli.main()
        except SystemExit as end:
            status = int(end.code or 0)
    COUNTS.update(asked=1, taken=not status)
    assert status in (0, 2)
    if status and "Usage: " not in said.getvalue():
        *progress, told = said.getvalue().rstrip("\n").split("\n")
        assert told.startswith("limbeck: ")
        assert "Traceback" not in "".join(progress)
        sentence(told)


ARGUMENTS = TEXTS.map(lambda text: text.encode(errors="ignore").decode().replace("\0", ""))
DRAWN = ["--data", "--teacher", "--student", "--set", "--seed", "--seeds", "--out", "--preset"]
COMMANDS = {
    "run kd --preset smoke": DRAWN,
    "run": DRAWN,
    "compare kd --preset smoke": ["", *DRAWN],
    "distill --teacher vgg8 --student mlp-8 --data digits": [
        *("--method", "--epochs", "--lr", "--batch-size", *DRAWN[:-1])
    ],
    "train --model mlp-8 --data digits": ["--model", "--epochs", "--data", "--set", "--out"],
    "evaluate mlp-8 --data digits": ["--data", "--split"],
    "predict": [""],
    "profile": ["--size", "--classes", "--channels"],
    "export": ["--format", "--quantize", "--out"],
    "resume": [""],
    "reproduce": ["--out"],
    "report": [""],
    "show": [""],
    "list": ["--task"],
}
"""Commands and the options whose values are drawn; without a name, an argument is."""


@st.composite
def commands(draw: st.DrawFn) -> list[str]:
    command = draw(st.sampled_from(list(COMMANDS)))
    words = command.split()
    if len(words) == 1:
        words.append(draw(ARGUMENTS))
    for option in draw(st.lists(st.sampled_from(COMMANDS[command]), max_size=3)):
        value = draw(ARGUMENTS | NUMBERS.map(str) if option else ARGUMENTS)
        words += [option, value] if option else [value]
    return words


KINDS = [
    *("", "", "folder:", "parquet:", "cifar10:", "mnist:", "hf:", "voc:", "coco:", "masks:"),
    *("tusimple:", "csv:", "tsv:", "glue:", "json:", "text:", "CartPole-v1", "gym:"),
    *("canary.py:",),
]
MODELS = st.builds(
    lambda kind, parts, mark, weights: kind + mark.join(parts) + weights,
    st.sampled_from(["", "", "", "hf:", "timm:", "torchvision:", "run:", "file:", ":", "x:"]),
    st.lists(
        st.sampled_from([*zoo.names(), "wrn", "mlp", "cnn", "drop", *"0123456789"]) | TEXTS,
        min_size=1,
        max_size=3,
    ),
    st.sampled_from("--x@:"),
    st.sampled_from(["", "", "@", "@pretrained", "@x.pt", "@canary.py", "@x.safetensors"]),
)
METHODS = st.lists(
    st.sampled_from([name for one in systems().values() for name in one.methods()]) | TEXTS,
    min_size=1,
    max_size=2,
).map("+".join)


def smoke(slug: str) -> dict[str, Any]:
    """The smoke preset of a system, resolved."""
    return next(p for p in presets() if (p["system"], p["preset"]) == (slug, "smoke"))


KD = st.builds(smoke, st.just("kd"))
ANY = st.builds(smoke, st.sampled_from(list(systems())))
PROPERTIES: dict[str, tuple[st.SearchStrategy[Any], Callable[[Any], Any], int, int]] = {
    "a recipe file": (FILES, read, 60, 6000),
    "values of any type": (
        st.dictionaries(TEXTS | st.sampled_from(list(recipes.Recipe.model_fields)), VALUES),
        check,
        40,
        1000,
    ),
    "a changed preset": (mutated(PRESETS, anything), check, 100, 8000),
    "words for a preset": (st.tuples(PRESETS, WORDS), assign, 100, 4000),
    "a start of kd": (mutated(KD, anything) | mutated(KD, plausible), begin, 40, 2000),
    "a start of any system": (mutated(ANY, plausible), begin, 0, 600),
    "a name of data": (
        st.builds(
            lambda slug, text: ["run", slug, "--preset", "smoke", "--data", text],
            st.sampled_from(list(systems())),
            st.builds(lambda kind, text: kind + text, st.sampled_from(KINDS), ARGUMENTS),
        ),
        call,
        40,
        1500,
    ),
    "a name of a model": (
        MODELS | TEXTS,
        lambda name: outcome(lambda: distillation.weigh(name, (1, 8, 8), 3)),
        50,
        1500,
    ),
    "names of methods": (
        st.lists(METHODS, min_size=1, max_size=3),
        lambda names: outcome(lambda: comparison.plan(names, "smoke", "digits", {})),
        50,
        1500,
    ),
    "a command": (commands(), call, 30, 500),
}
"""By the name of what is written: the cases, what must hold, how many of them in each suite."""


def fuzz(name: str, cases: int, **how: Any) -> None:
    strategy, check, *_ = PROPERTIES[name]

    @settings(
        max_examples=cases,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        **how,
    )
    @given(strategy)
    def holds(case: Any) -> None:
        check(case)

    holds() if how else seed(SEED)(holds)()


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty folder and home without a network and with little memory; nothing is trained."""

    def refuse(*_: object) -> None:
        raise OSError("there is no network")

    before, threads = resource.getrlimit(resource.RLIMIT_AS), torch.get_num_threads()
    (tmp_path / "canary.py").write_text("open('sung', 'w')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # it tries and tries
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(distillation, "_carry_out", about_to_train)
    monkeypatch.setattr(comparison, "go_on", lambda *_: None)
    if (statm := Path("/proc/self/statm")).exists():
        held = int(statm.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)
    torch.set_num_threads(threads)
    assert not [*tmp_path.rglob("sung"), *tmp_path.rglob("canary")], "foreign code was run"


@pytest.mark.parametrize("name", [name for name, how in PROPERTIES.items() if how[2]])
def test_a_few_cases_of(name, nowhere):
    fuzz(name, PROPERTIES[name][2], derandomize=True)


@pytest.mark.soak
@pytest.mark.parametrize("name", PROPERTIES)
def test_thousands_of_cases_of(name, nowhere):
    COUNTS.clear()
    fuzz(name, PROPERTIES[name][3])
    print(f"{name}: {COUNTS['taken']:,} of {COUNTS['asked']:,} taken, LIMBECK_FUZZ_SEED={SEED}")
