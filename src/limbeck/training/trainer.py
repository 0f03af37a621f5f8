"""Runs phases and owns what a method must not: devices, precision, logging, checkpoints."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, broadcast_object_list
from torch import Tensor, nn

from limbeck import memory
from limbeck.errors import UserError
from limbeck.training.audit import audit, some_unused
from limbeck.training.checkpoint import read_state, write_state
from limbeck.training.engine import Engine
from limbeck.training.method import Phases
from limbeck.training.phases import Fit, Phase, Solve, Training, Update
from limbeck.training.profiling import Profile, stretch
from limbeck.training.progress import Voice
from limbeck.training.run import Run
from limbeck.training.seeding import seed_all
from limbeck.training.signals import on_signals, stop
from limbeck.training.task import Batch, Terms, moved

LITTLE = 8 * 2**20
"""The bytes of activations below which a step is done on one thread."""


class Interrupted(Exception):
    """A signal ended the run after a checkpoint; ``status`` is the exit status."""

    def __init__(self, path: Any, number: int) -> None:
        super().__init__(f"stopped; continue with: limbeck resume {path}")
        self.status = 128 + number


@dataclass
class _Meter:
    """Sums of loss terms, kept on the device; reading them is the loop's only synchronisation."""

    names: list[str]
    sums: Tensor
    first_bad: Tensor
    steps: int = 0

    @classmethod
    def like(cls, terms: Terms) -> _Meter:
        values = _stacked(terms)
        bad = torch.full((len(values) + 1,), -1.0, dtype=values.dtype, device=values.device)
        return cls(list(terms), torch.zeros_like(values), bad)

    def add(self, terms: Terms, gradient: Tensor, step: int) -> None:
        """Count a step's terms in, and the length of its gradient."""
        values = _stacked(terms)
        self.sums += values
        every = torch.cat([values, gradient.to(values)[None]])
        bad = ~torch.isfinite(every) & (self.first_bad < 0)
        self.first_bad = torch.where(bad, float(step), self.first_bad)
        self.steps += 1

    def check(self, phase: str) -> None:
        """Raise the sentence for the first term, or gradient, that was not finite."""
        *terms, gradient = self.first_bad.tolist()
        bad = [(s, n) for n, s in zip(self.names, terms, strict=True) if s >= 0]
        step, name = min(bad, default=(float("inf"), ""))
        if 0 <= gradient < step:
            raise UserError(
                f"the gradient became NaN or infinite at step {int(gradient)} of phase {phase!r}, "
                f"where the loss ({', '.join(self.names)}) was finite, as that of a root or a "
                "logarithm does at zero; lower the learning rate, or set clip_norm "
                "(the last good checkpoint stands)"
            )
        if bad:
            raise UserError(
                f"the loss term {name!r} became NaN or infinite at step {int(step)} of phase "
                f"{phase!r}; lower the learning rate or the term's weight (the last good "
                "checkpoint stands)"
            )

    def read(self) -> dict[str, float]:
        """The means since the last reading."""
        means = (self.sums / max(self.steps, 1)).tolist()
        self.sums, self.steps = torch.zeros_like(self.sums), 0
        return dict(zip(self.names, means, strict=True))


def _stacked(terms: Terms) -> Tensor:
    return torch.stack([t.detach().to(torch.float64) for t in terms.values()])


class _Step(nn.Module):
    """What an update trains, as one module: wrapped for several processes and low precision."""

    def __init__(self, update: Update) -> None:
        super().__init__()
        self.trained = nn.ModuleDict(dict(update.train))
        self._terms = update.terms

    def forward(self, batch: Batch) -> Terms:
        return self._terms(batch)


class _Worker:
    """One update with its optimiser."""

    def __init__(self, update: Update, accelerator: Accelerator, engine: Engine) -> None:
        self.update = update
        self.accelerator = accelerator
        self.graphs = engine.compile == "graphs"
        step = _Step(update).to(accelerator.device)
        fused = accelerator.device.type != "cpu" if engine.fused is None else engine.fused
        groups: list[tuple[Training, Any]] = []
        for name, module in update.train.items():
            settings = update.settings_for.get(name, update.settings)
            if any(p.requires_grad for p in module.parameters()):
                groups.append((settings, settings.build(module.parameters(), fused)))
        if not groups:
            raise UserError(f"nothing to train in update {update.name!r}: no parameter is free")
        # Counted before the groups of the others are added to the first one's.
        settings_of = [s for s, o in groups for _ in o.param_groups]
        optimiser = groups[0][1]
        for _, other in groups[1:]:
            for group in other.param_groups:
                optimiser.add_param_group(group)
        self.settings = settings_of
        self.parameters = [p for g in optimiser.param_groups for p in g["params"]]
        self.module = accelerator.prepare(step)
        self.optimiser = accelerator.prepare(optimiser)

    def set_rate(self, epoch: float) -> None:
        for settings, group in zip(self.settings, self.optimiser.param_groups, strict=True):
            group["lr"] = settings.lr * settings.factor(epoch)

    def __call__(self, batch: Batch) -> tuple[Terms, Tensor]:
        """One step: forward, backward and update; the terms, detached, and the gradient's norm."""
        if self.graphs:
            torch.compiler.cudagraph_mark_step_begin()
        self.optimiser.zero_grad(set_to_none=True)
        slices = self.update.settings.accumulate
        total: Terms = {}
        pieces = _slices(batch, slices)
        for number, (piece, share) in enumerate(pieces):
            last = number == len(pieces) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.module):
                terms = self.module(piece)
                scale = share * float(batch.get("share", 1.0))
                loss = torch.stack(list(terms.values())).sum()
                with stretch("backward"):
                    self.accelerator.backward(loss if scale == 1.0 else loss * scale)
            for name, value in terms.items():
                value = value.detach() * share
                total[name] = total[name] + value if name in total else value
        with stretch("optimiser"):
            clip, scaled = self.update.settings.clip_norm, self.accelerator.scaler is not None
            if clip is not None:
                norm = self.accelerator.clip_grad_norm_(self.parameters, clip)
            elif not scaled:
                gradients = [p.grad for p in self.parameters if p.grad is not None]
                norm = nn.utils.get_total_norm(gradients)
            self.optimiser.step()
        # A scaler skips a step that overflowed, and goes on.
        return total, torch.zeros(()) if scaled else norm.detach()


def _slices(batch: Batch, number: int) -> list[tuple[Batch, float]]:
    """A batch in ``number`` slices along the samples, each with its share of them."""
    sizes = [len(v) for v in batch.values() if isinstance(v, Tensor | list)]
    if number == 1 or not sizes:
        return [(batch, 1.0)]
    whole = sizes[0]
    edges = [round(whole * i / number) for i in range(number + 1)]
    return [
        (
            {k: v[a:b] if isinstance(v, Tensor | list) else v for k, v in batch.items()},
            (b - a) / whole,
        )
        for a, b in pairwise(edges)
        if b > a
    ]


class Trainer:
    """Runs phases one after the other into a run folder, from wherever it stood."""

    def __init__(self, run: Run, engine: Engine | None = None, voice: Voice | None = None) -> None:
        self.run = run
        self.engine = engine or Engine()
        # The precision of an earlier run in this process would stay otherwise.
        AcceleratorState._reset_state(reset_partial_state=False)
        self.accelerator = Accelerator(
            mixed_precision="no" if self.engine.precision == "fp32" else self.engine.precision,
            cpu=self.engine.on_cpu(),
            log_with=list(self.engine.trackers) or None,
            project_dir=str(run.path),
            kwargs_handlers=[DistributedDataParallelKwargs()],
        )
        self.main = self.accelerator.is_main_process
        self.voice = (voice or Voice()) if self.main else Voice(quiet=True)
        self.seconds: dict[str, float] = {}
        self.threads = torch.get_num_threads()
        self._signal: int | None = None

    @property
    def device(self) -> torch.device:
        """Where the work is done."""
        device: torch.device = self.accelerator.device
        return device

    def work(self, phases: Phases) -> None:
        """Run all phases; those already finished are skipped with their outcome put back.

        Raises:
            UserError: a loss that is not finite, a damaged run folder.
            Interrupted: SIGINT or SIGTERM arrived; a checkpoint has been written.
        """
        if self.engine.trackers:
            self.accelerator.init_trackers("logs")
        result: Any = None
        log = 0
        with on_signals(self._heard):
            for index in count():
                try:
                    phase = phases.send(result)
                except StopIteration:
                    break
                done = self.run.finished_phase(index, phase.name)
                if done is None:
                    done = self._do(index, phase, log)
                else:
                    _load(phase, done["modules"])
                if self.main:
                    self.run.drop_journal(index, phase.name)
                log, result = done["log"], done["result"]
                if isinstance(phase, Fit) and phase.keep:
                    result = {epoch: self._kept(index, phase, epoch) for epoch in phase.keep}
                self.seconds[phase.name] = done["seconds"]
        if self.main:
            # Those of the last phase, if it was killed when it had just recorded its outcome.
            self.run.checkpoints.clear()
        if self.engine.trackers:
            self.accelerator.end_training()

    def _kept(self, index: int, phase: Phase, epoch: int) -> Path:
        """Where the state after an epoch lies that a phase keeps."""
        return self.run.phase_path(index, phase.name).with_suffix(f".epoch-{epoch}")

    def _do(self, index: int, phase: Phase, log: int) -> dict[str, Any]:
        # Until each of several processes has seen that the phase is not finished.
        self.accelerator.wait_for_everyone()
        checkpoint = self.run.checkpoints.newest()
        for reason in self.run.checkpoints.skipped:
            self.voice.warn(f"{reason}; it was skipped for the checkpoint before it")
        if checkpoint is not None and checkpoint["phase"] != phase.name:
            checkpoint = None
        if self.main:
            self.run.cut_log(checkpoint["log"] if checkpoint else log)
        seed_all(phase.seed, index)
        if isinstance(phase, Fit):
            result, seconds = None, _Fitting(self, index, phase, checkpoint).work()
        elif isinstance(phase, Solve):
            result, seconds = self._solve(index, phase)
        else:
            raise TypeError(f"a phase is a Fit or a Solve, not {type(phase).__name__}")
        _check_finite(phase)
        if self.main:
            state = {"modules": _state(phase), "result": result, "seconds": seconds}
            self.run.finish_phase(index, phase.name, state)
        self.accelerator.wait_for_everyone()
        done = self.run.finished_phase(index, phase.name)
        assert done is not None
        if not self.main:
            _load(phase, done["modules"])
        return done

    def _solve(self, index: int, phase: Solve) -> tuple[Any, float]:
        begun = time.monotonic()
        for module in phase.writes.values():
            module.to(self.device)
        with memory.enough(lambda: f"the phase {phase.name!r}", "data.limit"):
            return phase.run(_Journal(self, index, phase)), time.monotonic() - begun

    def _heard(self, number: int) -> None:
        if self._signal is not None:
            stop(number)
        self._signal = number

    def stop_if_asked(self, save: Callable[[], None]) -> None:
        """Save and leave if a signal has arrived."""
        if self._signal is not None:
            save()
            raise Interrupted(self.run.path, self._signal)


class _Journal:
    """Pieces of a ``Solve`` that are done, one file each."""

    def __init__(self, trainer: Trainer, index: int, phase: Phase) -> None:
        self._trainer = trainer
        self._folder = trainer.run.journal_path(index, phase.name)

    def remember(self, name: str, work: Callable[[], Any]) -> Any:
        path, key = self._folder / f"{name}.state", self._trainer.run.key(self._folder.name, name)
        if path.exists():
            return read_state(path, key)
        result = work()
        if self._trainer.main:
            write_state(path, result, key)
        self._trainer.stop_if_asked(lambda: None)
        return result


class _Fitting:
    """A ``Fit`` under way."""

    def __init__(
        self, trainer: Trainer, index: int, phase: Fit, checkpoint: Mapping[str, Any] | None
    ) -> None:
        self.trainer = trainer
        self.index = index
        self.phase = phase
        self.rank = trainer.accelerator.process_index
        self.workers = [self._worker(update) for update in phase.updates]
        self.meters: list[_Meter | None] = [None for _ in self.workers]
        self.length = len(phase.batches)
        self.epoch = self.step = self.size = 0
        self.best: dict[str, Any] | None = None
        self.measures: dict[str, float] = {}
        self.profile: Profile | None = None
        self.spent = 0.0
        self.begun = self.saved = time.monotonic()
        if checkpoint is not None:
            self._restore(checkpoint)

    def _worker(self, update: Update) -> _Worker:
        accelerator = self.trainer.accelerator
        if accelerator.num_processes > 1:
            for module in update.train.values():
                module.to(accelerator.device).train()
            batch = moved(next(self.phase.batches.epoch(0)), accelerator.device)
            with accelerator.autocast():
                unused = some_unused(update, batch)
            accelerator.ddp_handler.find_unused_parameters = unused
        return _Worker(update, accelerator, self.trainer.engine)

    def work(self) -> float:
        """Run to the end; returns the seconds spent, over all attempts."""
        phase, trainer = self.phase, self.trainer
        steps = phase.epochs * self.length
        if trainer.engine.profile and trainer.main and steps > self._steps_done():
            self.profile = Profile(
                trainer.run.path / "profile",
                phase.name,
                steps - self._steps_done(),
                trainer.device,
                trainer.voice,
            )
        trainer.voice.begin(phase.name, steps, self._steps_done())
        try:
            while self.epoch < phase.epochs and not self._out_of_patience():
                with memory.enough(self._where, "training.batch_size"):
                    self._epoch()
        finally:
            trainer.voice.end()
            torch.set_num_threads(trainer.threads)
            if self.profile is not None:
                self.profile.end()
        if self.best is not None:
            _load(phase, self.best["modules"])
        for module in phase.modules().values():
            module.eval()
            module.zero_grad(set_to_none=True)
        self._speak()
        return self._seconds()

    def _where(self) -> str:
        return f"step {self._steps_done() + 1:,} of phase {self.phase.name!r}, {self.size} samples,"

    def _speak(self) -> None:
        text = f"{self.phase.name}: {self._steps_done():,} steps in {self._seconds():.1f} s"
        for name, value in list(self.measures.items())[:1]:
            text += f", {name} {value:.4f} on the validation split"
        self.trainer.voice.say(text)

    def _epoch(self) -> None:
        phase, engine = self.phase, self.trainer.engine
        for module in phase.modules().values():
            module.train()
        batches = phase.batches.epoch(self.epoch, self.step)
        while (batch := self._next(batches)) is not None:
            done, self.size = self._steps_done(), len(next(iter(batch.values())))
            if done == 0:
                self._audit(batch)
            seed_all(phase.seed, done, self.rank)
            for number, worker in enumerate(self.workers):
                worker.set_rate(phase.begun + self.epoch + self.step / self.length)
                with self._only(worker):
                    terms, gradient = worker(batch)
                meter = self.meters[number] or _Meter.like(terms)
                meter.add(terms, gradient, done + 1)
                self.meters[number] = meter
            self.step += 1
            if self.profile is not None:
                self.profile.step()
            if (done + 1) % engine.log_every == 0:
                self._log(self.size)
            else:
                self.trainer.voice.step(done + 1)
            self.trainer.stop_if_asked(self._save)
            if time.monotonic() - self.saved >= engine.checkpoint_seconds:
                self._save()
        if self.step < self.length:
            raise UserError(
                f"the data gave {self.step} batches in epoch {self.epoch + 1} where it had "
                f"announced {self.length}"
            )
        self._log(0)
        self.epoch, self.step = self.epoch + 1, 0
        with stretch("evaluation"):
            self._after_epoch()

    def _next(self, batches: Iterator[Batch]) -> Batch | None:
        with stretch("data"):
            batch = next(batches, None)
            return None if batch is None else moved(batch, self.trainer.device)

    def _after_epoch(self) -> None:
        phase, run = self.phase, self.trainer.run
        if not self.trainer.main:
            return
        if phase.evaluate is not None:
            measures = self.measures = phase.evaluate()
            run.log({**self._place(), "validation": measures})
            self._track({f"{phase.name}/validation/{k}": v for k, v in measures.items()})
            value = next(iter(measures.values()))
            if phase.select == "best" and self._improves(value):
                modules = copy.deepcopy(_state(phase))
                self.best = {"value": value, "epoch": self.epoch, "modules": modules}
        if self.epoch in phase.keep:
            path = self.trainer._kept(self.index, phase, self.epoch)
            write_state(path, {"modules": _state(phase)})

    def _out_of_patience(self) -> bool:
        """Whether the best measure is too old; the first process measures, and tells the others."""
        if self.phase.patience is None:
            return False
        told = [self.best is not None and self.epoch - self.best["epoch"] >= self.phase.patience]
        broadcast_object_list(told)
        return told[0]

    def _improves(self, value: float) -> bool:
        if self.best is None:
            return True
        before = float(self.best["value"])
        return value > before if self.phase.higher_is_better else value < before

    def _audit(self, batch: Batch) -> None:
        """Say what the first batch tells: each term's value and share of the gradient."""
        trainer, activations = self.trainer, 0
        for worker in self.workers:
            with self._only(worker), trainer.accelerator.autocast():
                seed_all(self.phase.seed, 0, self.rank)
                found = audit(worker.update, batch)
            activations += found.activations
            found.speak(trainer.voice, self.phase.name)
            if trainer.main:
                trainer.run.log({**self._place(), "audit": found.as_json()})
        if trainer.engine.threads is None and trainer.engine.on_cpu() and activations < LITTLE:
            # More threads would wait for each other longer than they work.
            torch.set_num_threads(1)

    @contextmanager
    def _only(self, worker: _Worker) -> Iterator[None]:
        """Let gradients reach nothing that another update owns."""
        own = {id(p) for p in worker.parameters}
        others = [p for w in self.workers for p in w.parameters if id(p) not in own]
        for parameter in others:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in others:
                parameter.requires_grad_(True)

    def _log(self, samples: int) -> None:
        terms: dict[str, float] = {}
        for worker, meter in zip(self.workers, self.meters, strict=True):
            if meter is None or not meter.steps:
                continue
            meter.check(self.phase.name)
            prefix = "" if len(self.workers) == 1 else f"{worker.update.name}."
            terms |= {prefix + name: value for name, value in meter.read().items()}
        if not terms or not self.trainer.main:
            return
        rate = self.workers[0].optimiser.param_groups[0]["lr"]
        self.trainer.run.log({**self._place(), "lr": rate, "terms": terms})
        self._track({f"{self.phase.name}/{k}": v for k, v in terms.items()})
        if samples:
            processes = self.trainer.accelerator.num_processes
            self.trainer.voice.step(self._steps_done(), terms, samples * processes)

    def _track(self, values: Mapping[str, float]) -> None:
        if self.trainer.engine.trackers:
            self.trainer.accelerator.log(dict(values), step=self._steps_done())

    def _place(self) -> dict[str, Any]:
        """Where in the run a line of metrics was written; ``step`` counts finished steps."""
        return {
            "phase": self.phase.name,
            "seed": self.phase.seed,
            "epoch": self._steps_done() / max(self.length, 1),
            "step": self._steps_done(),
        }

    def _steps_done(self) -> int:
        return self.epoch * self.length + self.step

    def _seconds(self) -> float:
        return self.spent + time.monotonic() - self.begun

    def _save(self) -> None:
        for meter in self.meters:
            if meter is not None:
                meter.check(self.phase.name)
        _check_finite(self.phase)
        if self.trainer.main:
            self.trainer.run.checkpoints.write(self._snapshot())
        self.saved = time.monotonic()

    def _snapshot(self) -> dict[str, Any]:
        scaler = self.trainer.accelerator.scaler
        return {
            "phase": self.phase.name,
            "epoch": self.epoch,
            "step": self.step,
            "modules": _state(self.phase),
            "optimisers": [w.optimiser.state_dict() for w in self.workers],
            "scaler": scaler.state_dict() if scaler is not None else None,
            "meters": [
                None if m is None else [m.names, m.sums, m.first_bad, m.steps] for m in self.meters
            ],
            "best": self.best,
            "log": self.trainer.run.logged(),
            "seconds": self._seconds(),
            "threads": torch.get_num_threads(),
        }

    def _restore(self, state: Mapping[str, Any]) -> None:
        device = self.trainer.device
        self.epoch, self.step, self.best = state["epoch"], state["step"], state["best"]
        self.spent = state["seconds"]
        # Sums in another number of parts would round otherwise.
        torch.set_num_threads(state.get("threads", self.trainer.threads))
        _load(self.phase, state["modules"])
        for worker, saved in zip(self.workers, state["optimisers"], strict=True):
            worker.optimiser.load_state_dict(saved)
        if state["scaler"] is not None and self.trainer.accelerator.scaler is not None:
            self.trainer.accelerator.scaler.load_state_dict(state["scaler"])
        self.meters = [
            None if m is None else _Meter(m[0], m[1].to(device), m[2].to(device), m[3])
            for m in state["meters"]
        ]
        self.trainer.voice.say(
            f"{self.phase.name}: resumed at step {self._steps_done():,} "
            f"of {self.phase.epochs * self.length:,}"
        )


def _state(phase: Phase) -> dict[str, dict[str, Any]]:
    return {name: module.state_dict() for name, module in phase.modules().items()}


def _check_finite(phase: Phase) -> None:
    """Refuse to keep modules that training has ruined."""
    for role, module in phase.modules().items():
        broken = [n for n, p in module.named_parameters() if not p.isfinite().all()]
        # A buffer may hold infinity on purpose, as masks do.
        broken += [n for n, b in module.named_buffers() if b.isnan().any()]
        if broken:
            raise UserError(
                f"{broken[0]} of the {role} became NaN or infinite in phase {phase.name!r}; lower "
                "the learning rate (the last good checkpoint stands)"
            )


def _load(phase: Phase, state: Mapping[str, Mapping[str, Any]]) -> None:
    modules = phase.modules()
    if set(modules) != set(state):
        raise UserError(
            f"phase {phase.name!r} was recorded with the modules {sorted(state)} but has "
            f"{sorted(modules)}; the run was made by another version of the method"
        )
    for name, module in modules.items():
        try:
            module.load_state_dict(state[name])
        except RuntimeError:
            raise UserError(
                f"the module {name!r} as recorded in phase {phase.name!r} does not fit; the run was"
                " made by another version of the method"
            ) from None
