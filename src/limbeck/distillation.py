"""The main job: from a recipe, or from your own models and data, to a finished run."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from torch import nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous
from torch.utils.data import DataLoader

from limbeck import __version__
from limbeck import data as sources
from limbeck.data.batches import failure
from limbeck.data.data import Data
from limbeck.data.faults import gathered, tolerated
from limbeck.errors import UserError, readable
from limbeck.models import Input, build, described, load, profile, save, weights_given
from limbeck.models.input import Intake
from limbeck.models.spec import exists
from limbeck.recipes import ModelPart, Recipe, assigned, validate
from limbeck.systems.classification.kd import KD
from limbeck.tasks import domain
from limbeck.tasks.classification import Classification
from limbeck.tasks.images import ImageClassification
from limbeck.training import distiller
from limbeck.training.bench import Bench, Candidate, Rival
from limbeck.training.cache import Cache
from limbeck.training.domain import Domain
from limbeck.training.engine import Engine, peak_memory
from limbeck.training.method import Method, Phases
from limbeck.training.network import Network
from limbeck.training.phases import Training
from limbeck.training.progress import Voice
from limbeck.training.run import FINDINGS, RECIPE, RESULT, Run
from limbeck.training.task import Batch, Task, model_output
from limbeck.training.teacher import Teacher
from limbeck.training.trainer import Trainer

_RESTARTS = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
"""How often torchrun has started this group of processes again."""


@dataclass(frozen=True)
class _Job:
    """A method, what is laid out for it, and what the result says about where it came from."""

    method: Method
    bench: Bench
    engine: Engine
    facts: Mapping[str, Any]
    sample: Any


def start(recipe: Recipe, out: Path | None = None, voice: Voice | None = None) -> Run:
    """Carry out a recipe in a fresh run folder.

    Args:
        recipe: what to do.
        out: the folder; ``runs/SYSTEM-DATA-TIME`` if not given.
        voice: what speaks to the user.

    Raises:
        UserError: anything wrong with recipe, data or models, before the folder is made.
    """
    job = _from_recipe(recipe, voice or _voice(recipe.engine))
    return _begin(job, out, recipe.model_dump(mode="json"))


def resume(path: Path, voice: Voice | None = None) -> Run:
    """Continue a run where it was stopped; a finished one is left as it is.

    Raises:
        UserError: there is no run, or it was made from objects in Python.
    """
    run = Run.open(path)
    if (path / RESULT).is_file():
        from limbeck.report import page

        run.result()
        first = os.environ.get("RANK", "0") == "0"
        if first and not (path / page.REPORT).is_file():
            with run.held():
                page.write(run)
        (voice or Voice()).say(f"{path} is finished: there is nothing to resume")
        return run
    content = run.recipe()
    if "data" not in content:
        raise UserError(
            f"{path} was made from objects in Python: call limbeck.distill with the same "
            "arguments and resume=True"
        )
    recipe = validate(content)
    return _carry_out(_from_recipe(recipe, voice or _voice(recipe.engine)), run)


def rehearse(recipe: Recipe, teachers: Sequence[str]) -> None:
    """Find out whether a recipe's parts fit together, with these models as finished teachers.

    Raises:
        UserError: they do not.
    """
    parts = tuple(ModelPart(model=name) for name in teachers)
    job = _from_recipe(recipe.model_copy(update={"teachers": parts}), Voice(quiet=True))
    finished = [replace(candidate, training=None) for candidate in job.bench.candidates]
    job.bench.candidates = finished
    job.method.rehearse(job.bench)


def trial_of(recipe: Recipe, path: Path, heard: Callable[[Phases], Phases]) -> None:
    """Train the student of a recipe without a plain one, measured on validation data alone.

    Args:
        recipe: with one seed.
        path: a folder for the time being.
        heard: what the phases pass through on their way to the trainer.
    """
    voice = Voice(quiet=True)
    job = _from_recipe(recipe.model_copy(update={"baseline": False}), voice)
    run = Run.create(path, {"system": recipe.system})
    _remember(job, path.parent)
    Trainer(run, job.engine, voice).work(heard(job.method.phases(job.bench)))


@dataclass(frozen=True)
class Distilled:
    """A finished distillation: the student, its run folder and the figures of ``result.json``.

    ``further`` holds what else the method delivers, by role.
    """

    student: nn.Module
    run: Run
    result: dict[str, Any] = field(repr=False)
    further: dict[str, nn.Module] = field(default_factory=dict, repr=False)


def distill(
    student: nn.Module,
    teacher: nn.Module | Sequence[nn.Module] | str,
    data: str | Data | Sequence[DataLoader[Any]],
    *,
    method: Method | None = None,
    training: Training | None = None,
    out: str | Path | None = None,
    seed: int = 0,
    baseline: bool = True,
    engine: Engine | None = None,
    quiet: bool = False,
    resume: bool = False,
) -> Distilled:
    """Distil a teacher into a student: any modules, any data, no registration.

    Args:
        student: the module to train, in place. With a string or :class:`Data` as data its input
            is normalised by the data's mean and deviation.
        teacher: a trained module, several (their probabilities are averaged), or a name with
            weights such as ``"run:PATH"``; an empty list for a method that takes none.
        data: a source such as ``"folder:photos"``, a :class:`Data`, or your own loaders of
            (image, label) pairs: (train, test) or (train, validation, test).
        method: what to distil by; ``KD()`` if not given. Methods add up with ``+``.
        training: epochs, optimiser and learning rate.
        out: the run folder; ``runs/...`` if not given.
        baseline: train a copy of the student on labels alone, for the comparison.
        resume: continue in ``out``.

    Returns:
        The student with its run folder and figures.

    Raises:
        UserError: models, data and method that do not fit, before any training.

    Example:
        >>> import limbeck, tempfile
        >>> from torch import nn
        >>> net = lambda width: nn.Sequential(
        ...     nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10)
        ... )
        >>> done = limbeck.distill(
        ...     net(8), net(32), "digits", quiet=True, out=tempfile.mkdtemp(),
        ...     training=Training(epochs=1),
        ... )
        >>> sorted(done.result["measures"])
        ['baseline', 'student', 'teacher']
    """
    engine = engine or Engine()
    voice, device = _voice(engine, quiet), _device(engine)
    splits, classes, input, facts = _laid_out(data, voice)
    if isinstance(teacher, str):
        if not classes or input is None:
            raise UserError("a teacher by name needs data by name; pass the module itself")
        teachers: Sequence[nn.Module] = [build(teacher, classes, input)]
    else:
        teachers = [teacher] if isinstance(teacher, nn.Module) else teacher
    networks = [t if isinstance(t, Network) else Network(t, input) for t in teachers]
    fresh = student if isinstance(student, Network) else Network(student, input)
    view = _view(splits["train"])
    if not classes:
        classes = tuple(str(c) for c in range(_outputs((networks or [fresh])[0], view)))
    bench = Bench(
        engine=engine,
        task=Classification(classes, device=device),
        candidates=[Candidate(network) for network in networks],
        make_student=lambda _: copy.deepcopy(fresh),
        training=training or Training(),
        seeds=(seed,),
        baseline=baseline,
        device=device,
        voice=voice,
        **splits,
    )
    chosen = method or KD()
    named = {"names": dict(chosen.roles)} if chosen.roles else {}
    facts = {"system": type(chosen).__name__.lower(), "preset": "", **named, **facts}
    job = _Job(chosen, bench, engine, facts, torch.zeros(1, *view))
    if resume:
        if out is None:
            raise UserError("resume=True needs the run folder: out=...")
        run = _carry_out(job, Run.open(Path(out)))
    else:
        run = _begin(job, Path(out) if out else None, {"system": facts["system"], "seed": seed})
    trained = bench.students[seed]
    further = {role: networks[seed].model for role, networks in bench.further.items()}
    if _shape(trained.model) != _shape(fresh.model):  # the method delivers a make of its own
        return Distilled(trained.model, run, run.result(), further)
    fresh.load_state_dict(trained.state_dict())
    return Distilled(fresh.model, run, run.result(), further)


class Distiller(distiller.Distiller):
    """Student, teacher and method as one module for your own training loop.

    A batch goes in, named loss terms come out, weights included: sum them, go backward, step an
    optimiser over ``parameters()``, which are the student's and the method's. The teacher is
    frozen and in neither the parameters nor the state dict.

    Args:
        student, teacher: modules that give logits (or mappings or objects with ``logits``);
            several teachers are averaged.
        method: methods add up with ``+``.
        task: what a batch means; classification with ``image`` and ``label`` if not given.
        sample: one batch to learn shapes from; needed where a method trains adapters.

    Raises:
        UserError: see :class:`limbeck.training.distiller.Distiller`.

    Example:
        >>> import limbeck
        >>> step = limbeck.Distiller(nn.Linear(4, 3), nn.Linear(4, 3), limbeck.KD())
        >>> batch = {"image": torch.ones(2, 4), "label": torch.tensor([0, 2])}
        >>> terms = step(batch)
        >>> sorted(terms)
        ['kd', 'labels']
        >>> sum(terms.values()).backward()
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | Sequence[nn.Module],
        method: Method,
        task: Task | None = None,
        sample: Batch | None = None,
    ) -> None:
        super().__init__(student, teacher, method, task or Classification(()), sample)


def measure(model: str, data: str, split: str = "test") -> dict[str, float]:
    """The measures of a model, by name, on a split of a data source."""
    if split not in ("train", "validation", "test"):
        raise UserError(f"a split is train, validation or test, not {split!r}")
    kind = _domain_of(model)
    if any(f.is_required() for n, f in kind.words_type.model_fields.items() if n != "source"):
        kind = ImageClassification  # what else a task needs to know is not said here
    engine = Engine()
    with readable(f"the data source {data}"):
        ground = kind(
            kind.words_type(source=data),
            device=_device(engine),
            workers=engine.readers(),
            voice=Voice(quiet=True),
        )
    return ground.task().measure(ground.network(model), ground.splits[split])


def faults(
    source: str, task: str, assign: Sequence[str] = (), voice: Voice | None = None
) -> list[str]:
    """All that is wrong with a data source, one sentence each; ``assign`` as in a recipe."""
    values = {"system": "", "task": task, "data": {"source": source}, "student": {"model": ""}}
    recipe = validate(assigned(values, assign))
    engine = recipe.engine
    voice = voice or Voice(quiet=True)
    with gathered() as found, tolerated():
        try:
            # In this process, where the faults are gathered.
            ground = domain(task)(recipe.data, device=_device(engine), workers=0, voice=voice)
            for split in {id(split): split for split in ground.splits.values()}.values():
                for _ in ground.task().batches(split, batch_size=64).epoch(0):
                    pass
        except UserError:
            raise
        except Exception:  # what is left of a data set without its faulty samples
            if not found:
                raise
    return list(found)


def recognise(model: str, files: Sequence[Path], top: int = 3) -> list[dict[str, Any]]:
    """What a network, by name or run folder, says of files."""
    stored = _stored(model)
    return _domain_of(model).recognise(load(stored), files, top)


def _domain_of(model: str) -> type[Domain]:
    """The domain that a stored model was made for; images with a class each unless it says."""
    stored = model.partition(":")[0] in ("run", "file") or exists(model)
    facts = described(_stored(model)) if stored else {}
    try:
        return domain(facts.get("task", Classification.name))
    except UserError as error:
        raise UserError(f"{model} was made for another task than there are: {error}") from None


def _stored(model: str) -> Path:
    """Where the network lies that ``run:PATH``, ``file:PATH`` or a bare path names."""
    kind, colon, rest = model.partition(":")
    name = rest if colon and kind in ("run", "file") else model
    return Path(name) / "student" if exists(f"{name}/.") else Path(name)


def ready(model: str) -> bool:
    """Whether a teacher brings weights for this task; a library's own are only a start."""
    return weights_given(model) and not model.endswith("@pretrained")


def weigh(model: str, view: tuple[int, int, int], classes: int) -> dict[str, Any]:
    """Parameters, multiply-adds, bytes and latency of a model by name, or of a stored network.

    ``view`` and ``classes`` are for models by name; a stored network knows its own.
    """
    if model.partition(":")[0] in ("run", "file") or exists(f"{model}/."):
        network = load(_stored(model))
        fed = network.input
        sample = fed.sample() if isinstance(fed, Intake) else torch.zeros(1, *view)
        return asdict(profile(network, sample))
    names = [str(c) for c in range(classes)]
    channels, height, width = view
    input = Input(channels, (height, width), (0.5,) * channels, (0.5,) * channels)
    return asdict(profile(build(model, names, input), input.sample()))


def _from_recipe(recipe: Recipe, voice: Voice) -> _Job:
    """Turn a recipe's words into data, networks and a method."""
    engine, device, method = recipe.engine, _device(recipe.engine), recipe.method()
    with readable(f"the data source {recipe.data.source}"):
        ground = domain(recipe.task)(
            recipe.data, device=device, workers=engine.readers(), voice=voice
        )

    def own_task(part: ModelPart) -> Task | None:
        return None if part.augment is None else ground.task(part.augment)

    def make_student(seed: int) -> Network:
        return ground.network(recipe.student.model, seed)

    candidates = []
    for number, teacher in enumerate(recipe.teachers):
        network = ground.network(teacher.model, recipe.seed + number)
        training = None if ready(teacher.model) else teacher.training
        candidates.append(Candidate(network, training, own_task(teacher)))
    make_student(recipe.seed)  # a model that cannot be built is found before the run folder is made
    rival = None
    if isinstance(other := recipe.baseline, ModelPart):

        def make_rival(seed: int) -> Network:
            return ground.network(other.model, seed)

        rival = Rival(make_rival, other.training, own_task(other))
    bench = Bench(
        engine=engine,
        task=ground.task(),
        candidates=candidates,
        make_student=make_student,
        training=recipe.student.training,
        seeds=tuple(range(recipe.seed, recipe.seed + recipe.seeds)),
        baseline=bool(recipe.baseline),
        rival=rival,
        select=recipe.select,
        mean=recipe.mean,
        weights=recipe.weights,
        device=device,
        voice=voice,
        **ground.splits,
    )
    facts = {
        "system": recipe.system,
        "preset": recipe.preset,
        "names": recipe.names(method.roles),
        **ground.facts,
    }
    return _Job(method, bench, engine, facts, ground.sample())


def _laid_out(
    data: str | Data | Sequence[DataLoader[Any]], voice: Voice
) -> tuple[dict[str, Any], tuple[str, ...], Input | None, dict[str, Any]]:
    """Splits by name, class names and input as far as known, and facts for the result."""
    if isinstance(data, str):
        data = sources.load(data)
    if isinstance(data, Data):
        voice.say(data.describe())
        train, validation, test = data.train, data.validation, data.test
        input = Input(data.channels, data.size, data.mean, data.std)
        known = {"train": train, "transfer": train, "validation": validation, "test": test}
        return known, data.classes, input, _facts(data)
    loaders = list(data)
    if len(loaders) not in (2, 3):
        raise UserError(
            f"data loaders are (train, test) or (train, validation, test); {len(loaders)} came"
        )
    splits: dict[str, Any] = {"train": loaders[0], "transfer": loaders[0], "test": loaders[-1]}
    splits["validation"] = loaders[1] if len(loaders) == 3 else []
    return splits, (), None, {"data": "data loaders"}


def _facts(data: Data) -> dict[str, Any]:
    return {"data": data.source, "fingerprint": data.fingerprint()}


def _view(split: Any) -> tuple[int, int, int]:
    """Channels, height and width of a sample."""
    batch = next(iter(Classification(()).batches(split, batch_size=1).epoch(0)))
    channels, height, width = batch["image"].shape[1:]
    return channels, height, width


def _outputs(network: Network, view: tuple[int, int, int]) -> int:
    """How many classes a network tells apart."""
    was_training = network.training
    with torch.no_grad():
        logits = model_output(network.eval()(torch.zeros(1, *view)))
    network.train(was_training)
    return logits.shape[-1]


def _shape(model: nn.Module) -> tuple[type[nn.Module], dict[str, torch.Size]]:
    """Its class, and the shapes of its tensors by name."""
    return type(model), {name: tensor.shape for name, tensor in model.state_dict().items()}


def _device(engine: Engine) -> torch.device:
    engine.settle()
    if _RESTARTS and not dist.is_initialized():
        # What the processes of the last attempt left in the agent's store would be taken for the
        # addresses of these.
        store, rank, world = next(rendezvous("env://"))
        dist.init_process_group(
            "gloo" if engine.on_cpu() else None,
            store=PrefixStore(f"attempt-{_RESTARTS}", store),
            rank=rank,
            world_size=world,
        )
    device: torch.device = PartialState(cpu=engine.on_cpu()).device
    return device


def _voice(engine: Engine, quiet: bool = False) -> Voice:
    """Only the first of several processes speaks."""
    _device(engine)
    return Voice(quiet=quiet or not PartialState().is_main_process)


def _begin(job: _Job, out: Path | None, recipe: Mapping[str, Any]) -> Run:
    state, names = PartialState(), [str(out or fresh_name(job.facts))]
    broadcast_object_list(names)
    path = Path(names[0])
    if _restarted(path, recipe):
        return _carry_out(job, Run.open(path))
    if state.is_main_process:
        Run.check_free(path)
    _remember(job, path)
    job.method.rehearse(job.bench)
    if state.is_main_process:
        Run.create(path, recipe)
    state.wait_for_everyone()
    return _carry_out(job, Run.open(path))


def _restarted(path: Path, recipe: Mapping[str, Any]) -> bool:
    """Whether torchrun began this run before, and a process of it died."""
    return _RESTARTS > 0 and (path / RECIPE).is_file() and Run.open(path).recipe() == recipe


def fresh_name(facts: Mapping[str, Any]) -> Path:
    """``runs/SYSTEM-DATA-TIME``, with a number behind it if that exists."""
    data = "".join(c if c.isalnum() else "-" for c in Path(str(facts["data"])).name)
    stem = f"{facts['system']}-{data}-{datetime.now():%Y%m%d-%H%M%S}"
    names = (stem if n == 1 else f"{stem}-{n}" for n in count(1))
    return next(path for path in (Path("runs") / name for name in names) if not path.exists())


def _remember(job: _Job, path: Path) -> None:
    """Lay out the cache of the teachers' answers: beside the run folder, unless told otherwise."""
    engine = job.engine
    if engine.cache is not None:
        folder = engine.cache_folder or path.absolute().parent / "teacher-cache"
        job.bench.cache = Cache(folder, engine.cache, job.bench.voice)


def _carry_out(job: _Job, run: Run) -> Run:
    state, bench = PartialState(), job.bench
    _remember(job, run.path)
    if not state.is_main_process:
        with _kept(run):
            Trainer(run, job.engine, bench.voice).work(job.method.phases(bench))
        return run
    with _kept(run), run.held():
        bench.voice.keep(run.path / "log.txt")
        trainer = Trainer(run, job.engine, bench.voice)
        bench.seconds = trainer.seconds
        trainer.work(job.method.phases(bench))
        _finish(job, run, trainer.seconds)
    return run


@contextmanager
def _kept(run: Run) -> Iterator[None]:
    """Say in a sentence what the disk or another process refuses, and how the run goes on."""
    try:
        yield
        return
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        wrong = f"{getattr(error, 'filename', None) or run.path}: {reason.lower()}"
    except RuntimeError as error:
        wrong = failure(error)
        if PartialState().num_processes > 1 and "by peer" in str(error):
            wrong = "another process of the run died (torchrun --max-restarts starts all again)"
        if not wrong:
            raise
    finally:
        run.close()
    raise UserError(f"{wrong}; when that is put right, continue with: limbeck resume {run.path}")


def _finish(job: _Job, run: Run, seconds: Mapping[str, float]) -> None:
    """Measure on the test split, deliver the networks, write result and report."""
    from limbeck.report import page, table

    bench, task, called = job.bench, job.bench.task, table.names(job.facts)
    first = bench.seeds[0]
    networks = bench.delivered(first)
    shown = {name: _single(network) for name, network in networks.items()}
    compared = task.compare(networks, bench.test)
    rows = [
        {"seed": seed}
        | {
            role: task.measure(network, bench.test)[task.metric]
            for role, network in bench.delivered(seed).items()
            if role != "teacher"
        }
        for seed in bench.seeds
    ]
    profiles = {name: [profile(n, job.sample) for n in group] for name, group in shown.items()}
    result: dict[str, Any] = {
        **job.facts,
        "seed": first,
        "task": task.name,
        "metric": {"name": task.metric, "higher_is_better": task.higher_is_better},
        "teacher": None,
        "baseline": rows[0].get("baseline"),
        "student": rows[0].get("student"),
        "further": {role: rows[0][role] for role in bench.further if role in rows[0]},
        "parameters": {n: sum(p.parameters for p in ps) for n, ps in profiles.items()},
        "multiply_adds": {n: sum(p.multiply_adds for p in ps) for n, ps in profiles.items()},
        "bytes": {n: sum(p.bytes for p in ps) for n, ps in profiles.items()},
        "latency_ms": {n: _sum_of([p.latency_ms or {} for p in ps]) for n, ps in profiles.items()},
        **compared,
        "seeds": rows,
        "verdict": _verdict(rows, task.higher_is_better, called),
        "seconds": {**seconds, "total": sum(seconds.values())},
        "memory": peak_memory(),
        "limbeck": __version__,
    }
    if "teacher" in networks:
        result["teacher"] = task.measure(networks["teacher"], bench.test)[task.metric]
        if "baseline" in rows[0] and not task.better(result["teacher"], rows[0]["baseline"]):
            bench.voice.warn(
                f"the teacher ({result['teacher']:.4f}) is no better than the {called['baseline']} "
                f"({rows[0]['baseline']:.4f}) on the test split: it has little to teach"
            )
    for role, group in shown.items():
        for number, network in enumerate(group):
            name = role if len(group) == 1 else f"{role}-{number + 1}"
            save(network, run.path / name, {"data": job.facts["data"], "task": task.name})
    task.record(networks, bench.test, run.path)
    findings = job.method.findings(bench, run.metrics())
    run.write_json(FINDINGS, {"findings": [found.as_json() for found in findings]})
    run.write_json(RESULT, result)
    report = page.write(run)
    bench.voice.console.print(table.as_rich(result))
    if result["verdict"]["word"] != "none":
        bench.voice.say(result["verdict"]["sentence"])
    bench.voice.say(f"report: {report}")


def _sum_of(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Key by key: an ensemble answers one network after the other."""
    return {key: sum(part[key] for part in parts) for key in parts[0]}


def _single(network: Network | Teacher) -> tuple[Network, ...]:
    return network.networks if isinstance(network, Teacher) else (network,)


def _verdict(
    rows: Sequence[Mapping[str, float]], higher_is_better: bool, called: Mapping[str, str]
) -> dict[str, Any]:
    if "baseline" not in rows[0] or "student" not in rows[0]:
        return {"word": "none", "sentence": f"no {called['baseline']} was trained to compare with"}
    from limbeck.report.verdict import verdict

    found = verdict(
        [row["baseline"] for row in rows],
        [row["student"] for row in rows],
        higher_is_better,
        (called["baseline"], called["student"]),
    )
    return {"word": found.word, "sentence": found.sentence}
