import json
import os
import signal
from pathlib import Path

import pytest
import torch
from torch import nn

from limbeck.data.augment import Augment
from limbeck.data.batches import ImageBatches
from limbeck.data.data import ResidentImages, Split
from limbeck.errors import UserError
from limbeck.training.engine import Engine
from limbeck.training.phases import Fit, Solve, Training, Update
from limbeck.training.progress import Voice
from limbeck.training.run import Run
from limbeck.training.trainer import Interrupted, Trainer

QUICK = Engine(device="cpu", checkpoint_seconds=0.0, log_every=3)


class Killed(BaseException):
    """Stands for a process that dies: nothing catches it, nothing is tidied up."""


def split(n: int = 40) -> Split:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (n, 1, 4, 4), generator=generator, dtype=torch.uint8)
    return Split("train", ResidentImages(pixels), torch.arange(n) % 3)


def net(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 3)
        )


def batches(n: int = 40, size: int = 16) -> ImageBatches:
    return ImageBatches(split(n), size, seed=5, train=True, augment=Augment(crop=1, flip=True))


def phases(parts: dict[str, nn.Module], poison: int | None = None, **settings):
    """A supervised fit, a solve that changes a weight, and a fit of two updates in turn."""
    calls = {"n": 0}

    def labels(model):
        def terms(batch):
            calls["n"] += 1
            if calls["n"] == poison:
                raise Killed
            return {"labels": nn.functional.cross_entropy(model(batch["image"]), batch["label"])}

        return terms

    def rival(batch):
        target = parts["a"](batch["image"]).detach()
        return {"match": (parts["b"](batch["image"]) - target).square().mean()}

    training = Training(lr=0.05, epochs=3, **settings)

    def double(journal):
        def work():
            return parts["a"][1].weight.detach() * 2

        with torch.no_grad():
            parts["a"][1].weight.copy_(journal.remember("doubled", work))
        return {"norm": float(parts["a"][1].weight.norm())}

    yield Fit(
        name="first",
        seed=3,
        updates=[Update(train={"a": parts["a"]}, terms=labels(parts["a"]), settings=training)],
        batches=batches(),
        epochs=3,
        evaluate=lambda: {"weight": float(parts["a"][1].weight.sum())},
    )
    found = yield Solve(name="double", seed=3, run=double, writes={"a": parts["a"]})
    parts["norm"] = found["norm"]
    yield Fit(
        name="second",
        seed=3,
        updates=[
            Update(name="rival", train={"b": parts["b"]}, terms=rival, settings=training),
            Update(
                name="own", train={"a": parts["a"]}, terms=labels(parts["a"]), settings=training
            ),
        ],
        batches=batches(),
        epochs=3,
    )


def train(path: Path, engine: Engine = QUICK, poison: int | None = None, **settings):
    run = Run.open(path) if (path / "recipe.yaml").exists() else Run.create(path, {"test": True})
    parts = {"a": net(1), "b": net(2)}
    Trainer(run, engine, Voice(quiet=True)).work(phases(parts, poison, **settings))
    return parts, run


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("optimiser", ["sgd", "adamw"])
def test_a_run_killed_at_any_step_ends_with_the_same_bits(tmp_path, optimiser):
    parts, run = train(tmp_path / "whole", optimiser=optimiser)
    for number, poison in enumerate((2, 4, 6, 9, 12, 15, 18)):
        path = tmp_path / f"killed-{number}"
        with pytest.raises(Killed):
            train(path, poison=poison, optimiser=optimiser)
        again, resumed = train(path, optimiser=optimiser)
        assert same(parts["a"], again["a"])
        assert same(parts["b"], again["b"])
        assert again["norm"] == parts["norm"]
        assert resumed.metrics() == run.metrics()


def test_a_journal_is_kept_while_its_phase_is_under_way_and_not_after(tmp_path):
    done, journal = [], tmp_path / "phases" / "000-count.journal"

    def count(journal, poison):
        for n in range(4):
            if n == poison:
                raise Killed
            journal.remember(f"piece-{n}", lambda n=n: done.append(n) or n)

    def work(poison=None):
        known = (tmp_path / "recipe.yaml").exists()
        run = Run.open(tmp_path) if known else Run.create(tmp_path, {"test": True})
        phase = Solve(name="count", run=lambda j: count(j, poison))
        Trainer(run, QUICK, Voice(quiet=True)).work(p for p in [phase])

    with pytest.raises(Killed):
        work(poison=2)
    assert sorted(p.name for p in journal.iterdir()) == ["piece-0.state", "piece-1.state"]
    work()
    assert done == [0, 1, 2, 3]
    assert not journal.exists()


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path):
    parts, _ = train(tmp_path / "whole")
    with pytest.raises(Killed):
        train(tmp_path / "killed", poison=7)
    newest = sorted((tmp_path / "killed" / "checkpoints").iterdir())[-1]
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    again, _ = train(tmp_path / "killed")
    assert same(parts["a"], again["a"])


def test_when_no_checkpoint_is_whole_the_run_says_so(tmp_path):
    with pytest.raises(Killed):
        train(tmp_path, poison=7)
    for path in (tmp_path / "checkpoints").iterdir():
        path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(UserError, match="none of the 2 checkpoints"):
        train(tmp_path)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_says_how_to_go_on(tmp_path, number, status):
    parts, _ = train(tmp_path / "whole")

    class Signalled(Voice):
        def step(self, done, terms=None, samples=0):
            if done == 4:
                os.kill(os.getpid(), number)

    run = Run.create(tmp_path / "stopped", {"test": True})
    stopped = {"a": net(1), "b": net(2)}
    slow = QUICK.model_copy(update={"checkpoint_seconds": 1e9})
    with pytest.raises(Interrupted, match=r"limbeck resume .*stopped") as caught:
        Trainer(run, slow, Signalled(quiet=True)).work(phases(stopped))
    assert caught.value.status == status
    again, _ = train(tmp_path / "stopped")
    assert same(parts["a"], again["a"])


def test_a_loss_that_is_not_finite_stops_the_run_with_its_name_and_step(tmp_path):
    model = net()
    steps = {"n": 0}

    def terms(batch):
        steps["n"] += 1
        good = model(batch["image"]).square().mean()
        return {"fine": good, "odd": good * (float("nan") if steps["n"] > 5 else 1.0)}

    fit = Fit(
        name="fit",
        updates=[Update(train={"m": model}, terms=terms, settings=Training())],
        batches=batches(),
        epochs=9,
    )
    run = Run.create(tmp_path / "run", {"test": True})
    engine = QUICK.model_copy(update={"checkpoint_seconds": 1e9})
    # the audit of the first batch calls the terms once before step 1
    with pytest.raises(UserError, match="'odd' became NaN or infinite at step 5 of phase 'fit'"):
        Trainer(run, engine, Voice(quiet=True)).work(iter_phases(fit))


def failing(tmp_path, terms, model, **settings) -> Run:
    fit = Fit(
        name="fit",
        updates=[Update(train={"m": model}, terms=terms, settings=Training(**settings))],
        batches=batches(),
        epochs=4,
    )
    run = Run.create(tmp_path / "run", {"test": True})
    Trainer(run, QUICK, Voice(quiet=True)).work(iter_phases(fit))
    return run


def refused() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")


def whole(path: Path) -> bool:
    """Whether the newest checkpoint holds numbers alone."""
    modules = Run.open(path).checkpoints.newest()["modules"]["m"]
    return all(tensor.isfinite().all() for tensor in modules.values())


@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_gradient_that_is_not_finite_stops_the_run_though_the_loss_is(tmp_path, clip):
    model, steps = net(), {"n": 0}

    def terms(batch):
        steps["n"] += 1
        said = model(batch["image"]).square().mean()
        # The root of zero has a gradient without end.
        return {"root": said + (said * 0).sqrt() if steps["n"] > 5 else said}

    sentence = r"gradient became NaN .* step 5 of phase 'fit', where the loss \(root\) was finite"
    with pytest.raises(UserError, match=sentence):
        failing(tmp_path, terms, model, clip_norm=clip)
    assert whole(tmp_path / "run")


def test_a_step_that_ruins_the_weights_is_not_kept(tmp_path):
    model = net()

    def terms(batch):
        return {"large": model(batch["image"]).square().mean() * 1e30}

    with pytest.raises(UserError, match=r"became NaN or infinite .*phase 'fit'"):
        failing(tmp_path, terms, model, lr=1e30)
    assert not Run.open(tmp_path / "run").checkpoints.paths() or whole(tmp_path / "run")


@pytest.mark.parametrize(
    "work",
    [
        lambda: torch.empty(2**60),
        lambda: bytearray(2**62),
        refused,
    ],
    ids=["torch", "python", "accelerator"],
)
def test_a_step_that_wants_too_much_memory_says_what_to_lower(tmp_path, work):
    model, steps = net(), {"n": 0}

    def terms(batch):
        steps["n"] += 1
        if steps["n"] == 5:
            work()
        return {"fine": model(batch["image"]).square().mean()}

    with pytest.raises(UserError, match=r"step 4 of phase 'fit', 16 samples, wanted .* lower tr"):
        failing(tmp_path, terms, model)
    assert whole(tmp_path / "run")


def iter_phases(*items, heard=None):
    for item in items:
        found = yield item
        if heard is not None:
            heard.append(found)


def test_slices_of_a_batch_add_up_to_the_whole(tmp_path):
    def linear(seed):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return nn.Sequential(nn.Flatten(), nn.Linear(16, 3))

    ends = []
    for slices in (1, 3):
        model = linear(0)
        settings = Training(lr=0.1, accumulate=slices, clip_norm=0.5)
        fit = Fit(
            name="fit",
            updates=[
                Update(
                    train={"m": model},
                    terms=lambda b, model=model: {
                        "labels": nn.functional.cross_entropy(model(b["image"]), b["label"])
                    },
                    settings=settings,
                )
            ],
            batches=batches(),
            epochs=2,
        )
        run = Run.create(tmp_path / str(slices), {"test": True})
        Trainer(run, QUICK, Voice(quiet=True)).work(iter_phases(fit))
        ends.append(model[1].weight.detach().clone())
    assert torch.allclose(ends[0], ends[1], atol=1e-6)
    assert not torch.equal(ends[0], linear(0)[1].weight)


def test_an_update_leaves_alone_what_another_owns(tmp_path):
    a, b = net(1), net(2)
    frozen = {k: v.clone() for k, v in b.named_parameters()}

    def through_both(batch):
        return {"loss": (a(batch["image"]) + b(batch["image"])).square().mean()}

    updates = [
        Update(name="a", train={"a": a}, terms=through_both, settings=Training(lr=0.1)),
        Update(
            name="b",
            train={"b": b},
            terms=lambda batch: {"zero": 0.0 * b(batch["image"]).sum()},
            settings=Training(weight_decay=0.0),
        ),
    ]
    run = Run.create(tmp_path / "run", {"test": True})
    fit = Fit(name="fit", updates=updates, batches=batches(), epochs=1)
    Trainer(run, QUICK, Voice(quiet=True)).work(iter_phases(fit))
    assert all(torch.equal(v, frozen[k]) for k, v in b.named_parameters())
    assert all(p.requires_grad for p in b.parameters())


def test_the_best_state_on_validation_data_is_kept_when_asked(tmp_path):
    model = net()
    values = iter([0.1, 0.9, 0.3])
    states = []

    def evaluate():
        states.append({k: v.clone() for k, v in model.state_dict().items()})
        return {"accuracy": next(values)}

    fit = Fit(
        name="fit",
        updates=[
            Update(
                train={"m": model},
                terms=lambda b: {"l": nn.functional.cross_entropy(model(b["image"]), b["label"])},
                settings=Training(),
            )
        ],
        batches=batches(),
        epochs=3,
        evaluate=evaluate,
        select="best",
        keep=[2],
    )
    run = Run.create(tmp_path / "run", {"test": True})
    heard: list[object] = []
    Trainer(run, QUICK, Voice(quiet=True)).work(iter_phases(fit, heard=heard))
    assert all(torch.equal(v, states[1][k]) for k, v in model.state_dict().items())
    assert (run.path / "phases" / "000-fit.epoch-2").is_file()
    assert heard == [{2: run.path / "phases" / "000-fit.epoch-2"}]


@pytest.mark.parametrize("poison", [None, 3, 11])
def test_a_fit_ends_when_its_best_measure_is_too_old_also_where_it_was_killed(tmp_path, poison):
    accuracies = [0.1, 0.9, 0.3, 0.4, 0.95]
    states, calls = {}, {"n": 0}

    def work(poison):
        model = net()

        def terms(batch):
            calls["n"] += 1
            if calls["n"] == poison:
                raise Killed
            return {"l": nn.functional.cross_entropy(model(batch["image"]), batch["label"])}

        def evaluate():
            epoch = round(run.metrics()[-1]["epoch"])
            states[epoch] = {k: v.clone() for k, v in model.state_dict().items()}
            return {"accuracy": accuracies[epoch - 1]}

        known = (tmp_path / "recipe.yaml").exists()
        run = Run.open(tmp_path) if known else Run.create(tmp_path, {"test": True})
        fit = Fit(
            name="fit",
            updates=[Update(train={"m": model}, terms=terms, settings=Training())],
            batches=batches(),
            epochs=5,
            evaluate=evaluate,
            select="best",
            patience=2,
        )
        Trainer(run, QUICK, Voice(quiet=True)).work(iter_phases(fit))
        return model

    if poison:
        with pytest.raises(Killed):
            work(poison)
    model = work(None)
    assert sorted(states) == [1, 2, 3, 4], "the fifth epoch would have been the best"
    assert all(torch.equal(v, states[2][k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("optimiser", ["sgd", "adam", "adamw", "rmsprop"])
def test_the_first_batch_is_audited_and_nothing_is_changed_by_it(tmp_path, optimiser):
    _, run = train(tmp_path, optimiser=optimiser)
    audit = run.metrics()[0]["audit"]
    assert audit["gradient_share"] == {"labels": 1.0}
    assert audit["bytes"]["activations"] > 0
    assert json.loads(json.dumps(audit)) == audit


def test_only_one_process_trains_in_a_folder(tmp_path):
    run = Run.create(tmp_path / "run", {"test": True})
    with (
        run.held(),
        pytest.raises(UserError, match="another process is training"),
        Run.open(run.path).held(),
    ):
        pass
    with run.held():
        pass


def test_a_profile_says_where_the_time_of_a_step_goes(tmp_path):
    engine = QUICK.model_copy(update={"profile": True, "checkpoint_seconds": 1e9})
    _, run = train(tmp_path / "run", engine)
    profile = json.loads((run.path / "profile" / "second.json").read_text())
    assert {"data", "backward", "optimiser", "other"} <= set(profile["parts"])
    assert profile["steps"] == 5
    parts = sum(row["ms"] for row in profile["parts"].values())
    assert parts == pytest.approx(profile["ms_per_step"])
    trace = json.loads((run.path / "profile" / "second.trace.json").read_text())
    names = {event.get("name") for event in trace["traceEvents"]}
    assert {"data", "backward", "optimiser"} <= names


def test_a_profile_changes_nothing_that_is_learnt(tmp_path):
    parts, run = train(tmp_path / "plain")
    again, profiled = train(tmp_path / "profiled", QUICK.model_copy(update={"profile": True}))
    assert same(parts["a"], again["a"])
    assert run.metrics() == profiled.metrics()


@pytest.mark.parametrize("optimiser", ["sgd", "adam", "adamw"])
def test_a_fused_optimiser_takes_the_same_steps_up_to_rounding(optimiser):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(50, generator=generator)
    gradients = torch.randn(20, 50, generator=generator)
    ends = []
    for fused in (True, False):
        weight = nn.Parameter(start.clone())
        steps = Training(optimiser=optimiser, lr=0.01).build([weight], fused)
        for gradient in gradients:
            weight.grad = gradient.clone()
            steps.step()
        ends.append(weight.detach())
    assert torch.allclose(ends[0], ends[1], atol=1e-6)
    assert not torch.allclose(ends[0], start, atol=1e-2)


def test_little_work_is_done_on_one_thread_and_a_resumed_run_keeps_their_number(tmp_path):
    before = torch.get_num_threads()
    seen = []

    def terms(model):
        def watched(batch):
            seen.append(torch.get_num_threads())
            return {"l": nn.functional.cross_entropy(model(batch["image"]), batch["label"])}

        return watched

    def fit(model):
        update = Update(train={"m": model}, terms=terms(model), settings=Training())
        return Fit(name="fit", updates=[update], batches=batches(), epochs=1)

    torch.set_num_threads(2)
    try:
        run = Run.create(tmp_path / "run", {"test": True})
        Trainer(run, QUICK, Voice(quiet=True)).work(iter_phases(fit(net())))
        assert set(seen[1:]) == {1}
        assert torch.get_num_threads() == 2
        seen.clear()
        told = QUICK.model_copy(update={"threads": 2})
        run = Run.create(tmp_path / "told", {"test": True})
        Trainer(run, told, Voice(quiet=True)).work(iter_phases(fit(net())))
        assert set(seen) == {2}
    finally:
        torch.set_num_threads(before)


class Deadly(Voice):
    """Kills the run after a step."""

    def __init__(self, last: int) -> None:
        super().__init__(quiet=True)
        self.last = last

    def step(self, done, terms=None, samples=0):
        if done == self.last:
            raise Killed


@pytest.mark.parametrize("last", [3, 9, 24, 25, 39])
def test_a_phase_has_a_profile_once_its_recorded_steps_are_done(tmp_path, last):
    model = net()
    update = Update(
        train={"m": model},
        terms=lambda b: {"l": nn.functional.cross_entropy(model(b["image"]), b["label"])},
        settings=Training(),
    )
    fit = Fit(name="fit", updates=[update], batches=batches(40, 4), epochs=4)
    engine = QUICK.model_copy(update={"profile": True, "checkpoint_seconds": 1e9})
    run = Run.create(tmp_path / "run", {"test": True})
    with pytest.raises(Killed):
        Trainer(run, engine, Deadly(last)).work(iter_phases(fit))
    # the first five steps are left out, and twenty are enough
    file = run.path / "profile" / "fit.json"
    assert file.exists() == (last >= 25)
    if file.exists():
        profile = json.loads(file.read_text())
        assert profile["steps"] == 20
        assert profile["parts"]["other"]["ms"] > 0


def test_kernels_alone_decay_where_that_is_asked_for():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8), nn.Linear(8, 2)
    )
    optimiser = Training(decay="kernels", weight_decay=0.1).build(model.parameters())
    decayed = {id(p) for g in optimiser.param_groups if g["weight_decay"] for p in g["params"]}
    assert decayed == {id(model[0].weight), id(model[3].weight)}
    everything = Training(weight_decay=0.1).build(model.parameters())
    assert len(everything.param_groups) == 1


def test_parts_with_other_settings_keep_them_beside_parameters_that_do_not_decay(tmp_path):
    one, other = nn.Linear(16, 2), nn.Linear(16, 2)
    slow = Training(lr=0.01, decay="kernels", schedule="constant", momentum=0.0)
    update = Update(
        train={"one": one, "other": other},
        terms=lambda batch: {
            "all": sum(part(batch["image"].flatten(1)).mean(0).sum() for part in (one, other))
        },
        settings=slow,
        settings_for={"other": slow.model_copy(update={"lr": 0.5})},
    )
    before = [part.bias.detach().clone() for part in (one, other)]
    run = Run.create(tmp_path / "run", {"test": True})
    fit = Fit(name="fit", updates=[update], batches=batches(size=40), epochs=1)
    Trainer(run, QUICK, Voice(quiet=True)).work(iter_phases(fit))
    moved = [old - part.bias.detach() for part, old in zip((one, other), before, strict=True)]
    assert torch.allclose(moved[0], torch.full((2,), 0.01), rtol=1e-4)
    assert torch.allclose(moved[1], torch.full((2,), 0.5), rtol=1e-4)


def test_rmsprop_takes_the_step_of_its_formula():
    weight = nn.Parameter(torch.tensor([2.0]))
    optimiser = Training(optimiser="rmsprop", lr=0.1, momentum=0, weight_decay=0).build([weight])
    weight.grad = torch.tensor([3.0])
    optimiser.step()
    assert weight.item() == pytest.approx(2 - 0.1 * 3 / ((0.1 * 9) ** 0.5 + 1))
