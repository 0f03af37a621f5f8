"""Where a step's time goes."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from limbeck.training.progress import Voice

STRETCHES = ("data", "teacher", "student", "loss", "backward", "optimiser", "evaluation")
SKIPPED, RECORDED = 5, 20


def stretch(name: str) -> AbstractContextManager[Any]:
    """Names a stretch of a step in a profile; without a profile it costs next to nothing."""
    recording = torch.autograd._profiler_enabled()  # type: ignore[attr-defined]
    return record_function(name) if recording else nullcontext()


class Profile:
    """Records some steps of a phase: a table, and a trace for chrome://tracing.

    The first steps, in which memory is first touched and networks are compiled, are left out. A
    phase of a single step, or one that is stopped before the last recorded step, has no profile.
    Where an epoch ends among the recorded steps, its evaluation is in the table.

    Args:
        folder: where ``PHASE.trace.json`` and ``PHASE.json`` go.
        phase: the phase's name.
        steps: how many steps it has.
        device: where the work is done.
        voice: says the table.
    """

    def __init__(
        self, folder: Path, phase: str, steps: int, device: torch.device, voice: Voice
    ) -> None:
        self._path = folder / phase
        self._phase = phase
        self._device = device
        self._voice = voice
        skipped = max(1, min(SKIPPED, steps // 2))
        self._steps = max(1, min(RECORDED, steps - skipped))
        self._left = skipped + self._steps
        activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._profile = profile(
            activities=activities,
            schedule=schedule(wait=skipped - 1, warmup=1, active=self._steps, repeat=1),
            on_trace_ready=self._ready,
        )
        self._profile.start()

    def step(self) -> None:
        """A step of the phase is done."""
        if self._left:
            self._left -= 1
            self._profile.step()

    def end(self) -> None:
        """The phase is done."""
        if self._left:
            self._profile.stop()

    def _ready(self, recorded: Any) -> None:
        if self._left:
            return
        found = {event.key: event for event in recorded.key_averages()}
        whole = sum(e.cpu_time_total for k, e in found.items() if k.startswith("ProfilerStep"))
        self._path.parent.mkdir(parents=True, exist_ok=True)
        recorded.export_chrome_trace(str(self._path.with_suffix(".trace.json")))
        table: dict[str, dict[str, float]] = {}
        for name in STRETCHES:
            if name in found:
                table[name] = {"ms": found[name].cpu_time_total / 1e3 / self._steps}
                if self._device.type == "cuda":
                    table[name]["device_ms"] = found[name].device_time_total / 1e3 / self._steps
        step = whole / 1e3 / self._steps
        table["other"] = {"ms": step - sum(row["ms"] for row in table.values())}
        for row in table.values():
            row["share"] = row["ms"] / step
        report = {"phase": self._phase, "steps": self._steps, "ms_per_step": step, "parts": table}
        self._path.with_suffix(".json").write_text(json.dumps(report, indent=2))
        self._speak(report)

    def _speak(self, report: dict[str, Any]) -> None:
        self._voice.say(
            f"{self._phase}: {report['ms_per_step']:.2f} ms a step over {report['steps']} steps"
        )
        for name, row in report["parts"].items():
            device = f"{row['device_ms']:10.2f} ms on the device" if "device_ms" in row else ""
            self._voice.say(f"  {name:<10}{row['ms']:10.2f} ms {row['share']:6.1%}{device}")
        self._voice.say(
            f"  the trace for chrome://tracing: {self._path.with_suffix('.trace.json')}"
        )
