"""The command line: parses and prints, nothing else."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from limbeck.errors import UserError
from limbeck.training.signals import Stopped, on_signals, stop

if TYPE_CHECKING:
    from limbeck.catalogue import System

app = typer.Typer(
    name="limbeck",
    help="Knowledge distillation: a large teacher goes in, a small student comes out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Preset = Annotated[str, typer.Option(help="smoke (seconds), small (minutes) or paper")]
DataOption = Annotated[
    str | None,
    typer.Option("--data", help="digits, mnist:PATH, cifar100:PATH, folder:PATH, parquet:PATH ..."),
]
Model = Annotated[
    str | None,
    typer.Option(help="resnet20, torchvision:NAME, timm:NAME, hf:NAME, run:PATH or file:PATH"),
]
Set = Annotated[
    list[str] | None, typer.Option("--set", help="a recipe key: student.training.epochs=3")
]
Seed = Annotated[int | None, typer.Option(help="of the first comparison", min=0)]
Seeds = Annotated[int | None, typer.Option(help="how many paired comparisons", min=1)]
Out = Annotated[Path | None, typer.Option(help="the run folder; it must not exist yet")]
CacheTeacher = Annotated[
    bool, typer.Option("--cache-teacher", help="remember the teacher's answers on disk, in fp16")
]
ProfileSteps = Annotated[bool, typer.Option("--profile", help="say where a step's time goes")]
RunCode = Annotated[
    bool, typer.Option("--run-code", help="run the files of methods named FILE.py:CLASS")
]
Json = Annotated[bool, typer.Option("--json", help="print JSON")]


def _echo(text: str) -> None:
    typer.echo(text)


@app.command("list", epilog="Example: limbeck list --task detection --json")
def list_(
    domain: Annotated[str | None, typer.Option(help="classification, language ...")] = None,
    knowledge: Annotated[str | None, typer.Option(help="response, feature or relation")] = None,
    scheme: Annotated[str | None, typer.Option(help="offline, online or self")] = None,
    kind: Annotated[str | None, typer.Option(help="adversarial, multi-teacher ...")] = None,
    task: Annotated[str | None, typer.Option(help="part of a task's name")] = None,
    as_json: Json = False,
) -> None:
    """List the systems, with the effect that was measured first."""
    from limbeck.catalogue import systems

    wanted = {"knowledge": knowledge, "scheme": scheme, "kind": kind, "task": task}
    found = [
        system
        for system in systems().values()
        if (domain is None or domain == system.domain)
        and all(
            word is None or any(word.lower() in tag.lower() for tag in getattr(system.paper, name))
            for name, word in wanted.items()
        )
    ]
    if as_json:
        _echo(json.dumps([system.as_json() for system in found], indent=2))
        return
    width = max((len(s.slug) for s in found), default=4)
    for system in found:
        paper = system.paper
        tags = "; ".join(
            ", ".join(tags)
            for tags in (paper.knowledge, paper.scheme, paper.kind, paper.task)
            if tags
        )
        effect = system.results[0]["effect"] if system.results else "not measured"
        title = f"{paper.title} ({paper.year})"
        _echo(f"{paper.number:02d}  {system.slug:<{width}}  {title} [{tags}] {effect}")


@app.command(epilog="Example: limbeck show kd")
def show(slug: str) -> None:
    """Show a system: idea, equations, parameters, how to run it, what was measured."""
    from limbeck.catalogue import system

    _echo(_card(system(slug)))


def _card(system: System) -> str:
    from limbeck.catalogue import method_class
    from limbeck.training.parameters import schema

    paper = system.paper
    lines = [
        f"{paper.number:02d} {system.slug}: {paper.title}",
        f"{', '.join(paper.authors)}. {paper.venue}, {paper.year}. {paper.link}",
        "",
        system.idea.strip(),
        "",
        "Equations",
        *("  " + line for line in system.equations.strip().splitlines()),
    ]
    for method in system.methods():
        where = "method" if method == system.slug else f"methods.{method}"
        lines += ["", f"Parameters of {method} (--set {where}.NAME=VALUE)"]
        for name, field in schema(method_class(method)).model_fields.items():
            lines.append(f"  {name} = {field.default!r}{_range(field.metadata)}")
    if system.networks:
        lines += ["", "Networks (--student NAME, --teacher NAME)"]
        width = max(map(len, system.networks))
        lines += [f"  {name:<{width}}  {line}" for name, line in system.networks.items()]
    lines += ["", "Run"]
    lines += [f"  limbeck run {system.slug} --preset {name}" for name in system.presets]
    if system.notes:
        lines += ["", "Notes", "  " + system.notes.strip()]
    lines += ["", "Measured"]
    for result in system.results:
        lines.append(f"  {result['effect']}: {result['data']}")
        lines.append(f"    {result['figures']}")
        lines.append(f"    {result['command']}")
        lines.append(f"    {result['machine']}, {result['date']}")
    if not system.results:
        lines.append("  nothing yet")
    return "\n".join(lines)


def _range(limits: Sequence[object]) -> str:
    """The limits of a number as a reader writes them: "  (> 0)"."""
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    found = [
        f"{sign} {getattr(limit, name)}"
        for limit in limits
        for name, sign in signs.items()
        if getattr(limit, name, None) is not None
    ]
    return f"  ({', '.join(found)})" if found else ""


@app.command(
    epilog="Examples: limbeck run kd --preset smoke; limbeck run kd --data mnist:PATH --seeds 3; "
    "limbeck run recipe.yaml --set student.training.epochs=5"
)
def run(
    system: Annotated[str, typer.Argument(help="a system's slug, or a recipe file")],
    preset: Preset = "small",
    data: DataOption = None,
    teacher: Model = None,
    student: Model = None,
    assign: Set = None,
    seed: Seed = None,
    seeds: Seeds = None,
    cache_teacher: CacheTeacher = False,
    profile: ProfileSteps = False,
    run_code: RunCode = False,
    out: Out = None,
) -> None:
    """Run a system end to end: teacher, plain student, distilled student, report."""
    _permit(run_code)
    from limbeck import recipes
    from limbeck.catalogue import system as find

    if system.endswith((".yaml", ".yml")):
        values = recipes.read(Path(system))
    else:
        chosen = find(system)
        source = data or recipes.preset_source(chosen, preset)
        kind = recipes.preset_domain(chosen, preset).kind_of(source)
        values = recipes.preset(chosen, preset, kind)
    _start(
        values,
        data=data,
        teacher=teacher,
        student=student,
        assign=assign,
        seed=seed,
        seeds=seeds,
        cache_teacher=cache_teacher,
        profile=profile,
        out=out,
    )


@app.command(
    epilog="Examples: limbeck compare kd nst --data cifar100:PATH --seeds 3; "
    "limbeck compare kd nst kd+nst --teacher run:runs/teacher --tune 20"
)
def compare(
    systems: Annotated[list[str], typer.Argument(help="methods; kd+nst adds two up")],
    preset: Preset = "small",
    data: DataOption = None,
    teacher: Annotated[
        list[str] | None, typer.Option(help="one or several; see limbeck run --help")
    ] = None,
    student: Model = None,
    assign: Set = None,
    seed: Seed = None,
    seeds: Annotated[int, typer.Option(help="how many paired comparisons", min=1)] = 3,
    jobs: Annotated[int, typer.Option(help="processes at once, where memory allows", min=1)] = 1,
    tune: Annotated[
        int, typer.Option(help="trials a system on validation data, by Optuna", min=0)
    ] = 0,
    cache_teacher: CacheTeacher = False,
    run_code: RunCode = False,
    out: Out = None,
) -> None:
    """Compare systems: one teacher, the same seeds, a leaderboard. Resume with limbeck resume."""
    _permit(run_code)
    from limbeck import comparison, recipes
    from limbeck.catalogue import owner
    from limbeck.distillation import fresh_name

    first = owner(systems[0].split("+")[0])
    source = data or recipes.preset_source(first, preset)
    values = _given({}, data=source, student=student, seed=seed, seeds=seeds)
    laid = comparison.plan(
        systems,
        preset,
        recipes.preset_domain(first, preset).kind_of(source),
        values,
        teachers=teacher or (),
        assign=assign or (),
        cache=cache_teacher,
        trials=tune,
        jobs=jobs,
    )
    facts = {"system": "compare", "data": source}
    comparison.begin(laid, out or fresh_name(facts))


def _permit(run_code: bool) -> None:
    if run_code:
        from limbeck import foreign

        foreign.permit()


def _start(
    values: dict[str, Any],
    *,
    data: str | None = None,
    teacher: str | None = None,
    student: str | None = None,
    assign: Sequence[str] | None = None,
    seed: int | None = None,
    seeds: int | None = None,
    cache_teacher: bool = False,
    profile: bool = False,
    out: Path | None = None,
) -> None:
    from limbeck import recipes
    from limbeck.distillation import start

    values = _given(values, data=data, student=student, seed=seed, seeds=seeds, profile=profile)
    if teacher is not None:
        values = recipes.with_teachers(values, [teacher])
    values = recipes.assigned(values, assign or ())
    if cache_teacher:
        values = recipes.with_cache(values)
    start(recipes.validate(values), out)


def _given(
    values: dict[str, Any],
    *,
    data: str | None = None,
    student: str | None = None,
    seed: int | None = None,
    seeds: int | None = None,
    profile: bool = False,
) -> dict[str, Any]:
    """Recipe values with what the command line's own options say."""
    from limbeck import recipes

    given: dict[str, Any] = {}
    if data is not None:
        given["data"] = {"source": data}
    if student is not None:
        given["student"] = {"model": student}
    if seed is not None:
        given["seed"] = seed
    if seeds is not None:
        given["seeds"] = seeds
    if profile:
        given["engine"] = {"profile": True}
    return recipes.merged(values, given)


@app.command(
    epilog="Example: limbeck distill --teacher run:runs/teacher --student mobilenetv2 "
    "--data folder:photos --method kd --epochs 30"
)
def distill(
    teacher: Annotated[list[str], typer.Option(help="one or several; see limbeck run --help")],
    student: Annotated[str, typer.Option(help="the model to train")],
    data: Annotated[str, typer.Option(help="what to learn from, such as folder:PATH")],
    method: Annotated[
        list[str] | None, typer.Option(help="a system, or FILE.py:CLASS; several add up")
    ] = None,
    epochs: Annotated[int, typer.Option(min=0)] = 20,
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    lr: Annotated[float, typer.Option(help="peak learning rate of AdamW")] = 1e-3,
    baseline: Annotated[bool, typer.Option(help="train the plain student too")] = True,
    assign: Set = None,
    seed: Seed = None,
    seeds: Seeds = None,
    cache_teacher: CacheTeacher = False,
    profile: ProfileSteps = False,
    run_code: RunCode = False,
    out: Out = None,
) -> None:
    """Distil your own teacher into your own student on your own data."""
    _permit(run_code)
    from limbeck import recipes

    values = recipes.for_own_models(
        methods=method or ["kd"],
        data=data,
        student=student,
        training={"epochs": epochs, "batch_size": batch_size, "lr": lr},
    )
    values = recipes.with_teachers({**values, "baseline": baseline}, teacher)
    _start(
        values,
        assign=assign,
        seed=seed,
        seeds=seeds,
        cache_teacher=cache_teacher,
        profile=profile,
        out=out,
    )


@app.command(epilog="Example: limbeck train --model resnet32 --data folder:photos --epochs 30")
def train(
    model: Annotated[str, typer.Option(help="see limbeck run --help")],
    data: Annotated[str, typer.Option(help="what to learn from, such as folder:PATH")],
    epochs: Annotated[int, typer.Option(min=0)] = 20,
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    lr: Annotated[float, typer.Option(help="peak learning rate of AdamW")] = 1e-3,
    assign: Set = None,
    seed: Seed = None,
    profile: ProfileSteps = False,
    out: Out = None,
) -> None:
    """Train a model on labels alone: a teacher to be."""
    from limbeck import recipes

    values = recipes.for_own_models(
        methods=[],
        data=data,
        student=model,
        training={"epochs": epochs, "batch_size": batch_size, "lr": lr},
    )
    _start(values, assign=assign, seed=seed, profile=profile, out=out)


@app.command(epilog="Example: limbeck resume runs/kd-digits-20260101-120000")
def resume(folder: Path, run_code: RunCode = False) -> None:
    """Continue a run or a comparison where it was stopped."""
    _permit(run_code)
    from limbeck import comparison
    from limbeck.distillation import resume as go_on

    if comparison.is_comparison(folder):
        comparison.go_on(folder)
    else:
        go_on(folder)


@app.command(epilog="Example: limbeck reproduce runs/kd-digits-20260101-120000")
def reproduce(
    folder: Annotated[Path, typer.Argument(help="a finished run")],
    run_code: RunCode = False,
    out: Out = None,
) -> None:
    """Make a finished run again and say whether it comes to the same bits."""
    _permit(run_code)
    from limbeck.reproduction import Differs
    from limbeck.reproduction import reproduce as again

    found = again(folder, out)
    for difference in found.differences:
        _echo(difference)
    if found.differences:
        raise Differs(f"{found.again} is not what {folder} was")
    _echo(f"the same bits: {found.networks} networks, {found.lines} lines of metrics, the result")


@app.command(epilog="Example: limbeck evaluate run:runs/photos --data folder:photos --split test")
def evaluate(
    model: Annotated[str, typer.Argument(help="see limbeck run --help")],
    data: Annotated[str, typer.Option(help="such as folder:PATH")],
    split: Annotated[str, typer.Option(help="train, validation or test")] = "test",
    as_json: Json = False,
) -> None:
    """Measure a model on a split of a data set."""
    from limbeck.distillation import measure

    found = measure(model, data, split)
    if as_json:
        _echo(json.dumps(found, indent=2))
    else:
        for name, value in found.items():
            _echo(f"{name:<20}{value:.4f}")


@app.command("check-data", epilog="Example: limbeck check-data voc:PATH --task detection")
def check_data(
    data: Annotated[str, typer.Argument(help="such as folder:PATH")],
    task: Annotated[str, typer.Option(help="what the data are for")] = "classification",
    assign: Set = None,
    as_json: Json = False,
) -> None:
    """Read all of a data set and tell all of its faults at once."""
    from limbeck.distillation import faults
    from limbeck.training.progress import Voice

    voice = Voice()
    with voice.console.capture() as said:
        found = faults(data, task, assign or (), voice)
    if as_json:
        _echo(json.dumps({"data": data, "found": said.get().splitlines(), "faults": found}))
    for sentence in () if as_json else found:
        _echo(sentence)
    if found:
        raise UserError(f"{data} has {len(found):,} fault{'' if len(found) == 1 else 's'}")
    if not as_json:
        _echo(f"{said.get()}{data} has no fault")


@app.command(epilog="Example: limbeck predict run:runs/photos cat.jpg dog.jpg --top 3")
def predict(
    model: Annotated[str, typer.Argument(help="run:PATH, file:PATH or a run folder")],
    images: Annotated[list[Path], typer.Argument(help="image files")],
    top: Annotated[int, typer.Option(min=1, help="how many classes")] = 3,
    as_json: Json = False,
) -> None:
    """Tell what a student sees in images."""
    from limbeck.distillation import recognise

    found = recognise(model, images, top)
    if as_json:
        _echo(json.dumps(found, indent=2))
        return
    for entry in found:
        guesses = ", ".join(f"{g['class']} {g['probability']:.1%}" for g in entry["classes"])
        _echo(f"{entry['image']}: {guesses}")


@app.command(epilog="Example: limbeck report runs/kd-digits-20260101-120000")
def report(folder: Path) -> None:
    """Draw a run's report again."""
    from limbeck.report import page
    from limbeck.training.run import Run

    _echo(str(page.write(Run.open(folder))))


@app.command(epilog="Example: limbeck export runs/photos --format onnx --quantize int8")
def export(
    run: Annotated[str, typer.Argument(help="a finished run: its folder or run:PATH")],
    format: Annotated[str, typer.Option(help="onnx, torch-export, safetensors or packed")],
    quantize: Annotated[str | None, typer.Option(help="int8, with onnx only")] = None,
    out: Annotated[Path | None, typer.Option(help="a folder, new or empty")] = None,
    as_json: Json = False,
) -> None:
    """Write a run's student for other programs, checked against it, with a model card."""
    from limbeck.export import export as write

    found = write(run, format, quantize, out)
    if as_json:
        _echo(json.dumps(found.as_json(), indent=2))
        return
    rows = [
        ("", "file", "student"),
        ("bytes", f"{found.bytes:,}", f"{found.student_bytes:,}"),
        ("ms for one image", f"{found.latency_ms:.3f}", f"{found.student_latency_ms:.3f}"),
    ]
    if found.accuracy is not None and found.student_accuracy is not None:
        rows.append(("accuracy", f"{found.accuracy:.4f}", f"{found.student_accuracy:.4f}"))
    for name, ours, theirs in rows:
        _echo(f"{name:<20}{ours:>12}{theirs:>12}")
    _echo(
        f"{found.samples} {found.sampled}: {found.equal_predictions:.1%} of predictions are equal, "
        f"logits differ by up to {found.largest_difference:.2g} of {found.largest_logit:.2g}"
    )
    # A path may hold bytes that are no UTF-8.
    file = f"{found.folder}/{found.file}".encode(errors="backslashreplace").decode()
    _echo(f"\n{file}\n\n{found.loader}")


@app.command(epilog="Example: limbeck profile resnet20 --size 32 --classes 100")
def profile(
    model: Annotated[str, typer.Argument(help="see limbeck run --help")],
    size: Annotated[int, typer.Option(min=1, help="pixels")] = 32,
    channels: Annotated[int, typer.Option(min=1, max=3)] = 3,
    classes: Annotated[int, typer.Option(min=1)] = 100,
    as_json: Json = False,
) -> None:
    """Count a model's parameters and multiply-adds and measure its size and latency."""
    from limbeck.distillation import weigh

    found = weigh(model, (channels, size, size), classes)
    if as_json:
        _echo(json.dumps(found, indent=2))
        return
    _echo(f"parameters     {found['parameters']:,}")
    _echo(f"multiply-adds  {found['multiply_adds']:,}")
    _echo(f"size           {found['bytes'] / 1e6:.2f} MB")
    for name, value in found["latency_ms"].items():
        _echo(f"latency {name}    {value:.2f} ms")


def main() -> None:
    """Run the command line; the exit status is 0, 2 for a user's mistake, 1 for anything else."""
    # Before torch is imported: its profiler would keep a diary on the terminal.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    try:
        with on_signals(stop):
            app()
    except Stopped as stopped:
        typer.echo("limbeck: stopped", err=True)
        sys.exit(stopped.status)
    except UserError as error:
        typer.echo(f"limbeck: {error}", err=True)
        sys.exit(2)
    except OSError as error:
        if error.filename is None:
            raise
        refused = UserError(f"{error.filename}: {(error.strerror or 'error').lower()}")
        typer.echo(f"limbeck: {refused}", err=True)
        sys.exit(2)
    except Exception as error:
        status = getattr(error, "status", None)
        if status is None:
            raise
        typer.echo(f"limbeck: {error}", err=True)
        sys.exit(status)
