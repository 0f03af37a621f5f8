"""A search for a method's hyper-parameters on validation data, by Optuna.

``python -m limbeck.tuning FOLDER NAME TRIALS`` works on one entry of a comparison; several
processes may work on it at once, as the study lies in a file that they share.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable, Generator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

import yaml

from limbeck.catalogue import method_class
from limbeck.errors import UserError
from limbeck.recipes import merged, read, validate
from limbeck.report.leaderboard import settings
from limbeck.training.checkpoint import write_atomically
from limbeck.training.parameters import schema
from limbeck.training.phases import Fit, Phase

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.distributions import BaseDistribution

SPAN = 10.0
"""A number is searched for between its preset's value over this and times this."""


def tune(folder: Path, name: str, trials: int) -> dict[str, Any]:
    """Search for an entry's hyper-parameters until there are so many trials, and write them down.

    The first trial is the preset's own values, so what is found is no worse than they are on the
    validation data. A trial trains one student of a seed that the comparison does not use, and is
    given up where it lies below the median of the others after the same epoch.

    Args:
        folder: of the comparison.
        name: of the entry.
        trials: finished ones, given up or not, of all processes and attempts together.

    Raises:
        UserError: nothing to search for, or no validation data to search on.
    """
    import optuna

    from limbeck.comparison import COMPARISON, TUNED, with_teachers_in

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    recipe = with_teachers_in(folder, read(folder / COMPARISON)["recipes"][name])
    known = space(recipe["methods"])
    if not known:
        raise UserError(f"{name} has no hyper-parameter that could be searched for")
    (folder / TUNED).mkdir(exist_ok=True)
    kept = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)
    study = optuna.create_study(
        study_name=name,
        storage=f"sqlite:///{folder.absolute() / TUNED / name}.db",
        load_if_exists=True,
        direction="maximize",
        sampler=optuna.samplers.TPESampler(seed=recipe["seed"]),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=1),
    )
    if _own(study, known) is None:
        study.enqueue_trial({key: default for key, (_, default) in known.items()})

    def attempt(trial: Trial) -> float:
        chosen = {key: _suggest(trial, key, how) for key, (how, _) in known.items()}
        return _validated(folder, merged(recipe, {"methods": _nested(chosen)}), trial)

    if (lacking := trials - len(study.get_trials(states=kept))) > 0:
        enough = optuna.study.MaxTrialsCallback(trials, states=kept)
        study.optimize(attempt, n_trials=lacking, callbacks=[enough, _speak(trials)])
    found = _found(study, known)
    text = yaml.safe_dump(found, sort_keys=False)
    write_atomically(folder / TUNED / f"{name}.yaml", text.encode())
    return found


def space(
    methods: Mapping[str, Mapping[str, Any]],
) -> dict[str, tuple[BaseDistribution, Any]]:
    """What can be searched for: by ``SYSTEM.PARAMETER``, where, and the value to begin with.

    Positive numbers, on a logarithmic scale around the recipe's value and within their limits, and
    named choices. Whole numbers are searched up to twice their value.

    >>> sorted(space({"kd": {}}))
    ['kd.label_weight', 'kd.temperature', 'kd.weight']
    """
    from optuna.distributions import (
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    found: dict[str, tuple[BaseDistribution, Any]] = {}
    for system, given in methods.items():
        for name, field in schema(method_class(system)).model_fields.items():
            value, key = given.get(name, field.default), f"{system}.{name}"
            limits = {
                side: getattr(limit, side)
                for limit in field.metadata
                for side in ("gt", "ge", "lt", "le")
                if getattr(limit, side, None) is not None
            }
            high = min(limits.get("lt", float("inf")), limits.get("le", float("inf")))
            if get_origin(field.annotation) is Literal:
                found[key] = CategoricalDistribution(get_args(field.annotation)), value
            elif field.annotation is float and value > 0:
                top = min(SPAN * value, high)
                found[key] = FloatDistribution(value / SPAN, top, log=True), float(value)
            elif field.annotation is int and value > 0:
                low = max(1, limits.get("ge", 1), limits.get("gt", 0) + 1)
                found[key] = IntDistribution(low, int(min(2 * value, high))), value
    return found


def _suggest(trial: Trial, key: str, how: BaseDistribution) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(how, FloatDistribution):
        return trial.suggest_float(key, how.low, how.high, log=how.log)
    if isinstance(how, IntDistribution):
        return trial.suggest_int(key, how.low, how.high)
    assert isinstance(how, CategoricalDistribution)
    return trial.suggest_categorical(key, how.choices)


def _nested(chosen: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """``{"kd.weight": 1}`` as ``{"kd": {"weight": 1}}``."""
    found: dict[str, dict[str, Any]] = {}
    for key, value in chosen.items():
        system, _, name = key.rpartition(".")
        found.setdefault(system, {})[name] = value
    return found


def _validated(folder: Path, values: Mapping[str, Any], trial: Trial) -> float:
    """The deciding metric on validation data after the last epoch, higher being better."""
    from limbeck.comparison import TUNED
    from limbeck.distillation import trial_of

    # The seeds of the comparison are kept for its verdict.
    recipe = validate({**values, "seed": values["seed"] + values["seeds"], "seeds": 1})
    measured: list[float] = []

    def heard(value: float) -> None:
        import optuna

        measured.append(value)
        trial.report(value, len(measured))
        if trial.should_prune():
            raise optuna.TrialPruned

    place = Path(tempfile.mkdtemp(prefix="trial-", dir=folder / TUNED))
    try:
        trial_of(recipe, place / "run", lambda phases: _heard(phases, heard))
    finally:
        shutil.rmtree(place, ignore_errors=True)
    if not measured:
        raise UserError("hyper-parameters are searched for on validation data, and there are none")
    return measured[-1]


def _heard(
    phases: Generator[Phase, Any, None], heard: Callable[[float], None]
) -> Generator[Phase, Any, None]:
    """The same phases; what the student's measure after each epoch is told, higher being better."""
    found: Any = None
    while True:
        try:
            phase = phases.send(found)
        except StopIteration:
            return
        if isinstance(phase, Fit) and phase.name == "student" and phase.evaluate is not None:
            phase = replace(phase, evaluate=_told(phase.evaluate, phase.higher_is_better, heard))
        found = yield phase


def _told(
    evaluate: Callable[[], dict[str, float]], higher: bool, heard: Callable[[float], None]
) -> Callable[[], dict[str, float]]:
    def measure() -> dict[str, float]:
        found = evaluate()
        value = next(iter(found.values()))
        heard(value if higher else -value)
        return found

    return measure


def _own(study: Study, known: Mapping[str, tuple[BaseDistribution, Any]]) -> Any:
    """The finished trial of the preset's own values; ``None`` where there is none yet."""
    own = {key: default for key, (_, default) in known.items()}
    finished = (t for t in study.trials if t.state.is_finished() and t.value is not None)
    return next((t for t in finished if t.params == own), None)


def _found(study: Study, known: Mapping[str, tuple[BaseDistribution, Any]]) -> dict[str, Any]:
    """The best trial's parameters, what it measured, and what the preset's own values did."""
    trials, first = study.trials, _own(study, known)
    return {
        "methods": _nested(study.best_params),
        "found": dict(study.best_params),
        "before": None if first is None else first.value,
        "after": study.best_value,
        "trials": sum(t.state.is_finished() for t in trials),
        "pruned": sum(t.state.name == "PRUNED" for t in trials),
    }


def _speak(trials: int) -> Callable[[Study, Any], None]:
    def speak(study: Study, trial: Any) -> None:
        value = "given up" if trial.value is None else f"{trial.value:.4f}"
        print(
            f"trial {trial.number + 1} of {trials}: {value} with {settings(trial.params)}",
            flush=True,
        )

    return speak


if __name__ == "__main__":
    try:
        tune(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
    except UserError as error:
        sys.exit(f"limbeck: {error}")
