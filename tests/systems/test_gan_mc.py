import itertools
import json
import math

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import limbeck
from carrying import carry_out, noise, same
from limbeck import distillation, recipes
from limbeck.catalogue import system
from limbeck.data import tables
from limbeck.data.augment import Augment
from limbeck.data.data import ResidentImages, Split
from limbeck.errors import UserError
from limbeck.losses import (
    compression,
    compression_score,
    generator_terms,
    judge_terms,
    munge,
)
from limbeck.models import Input, build
from limbeck.models.plain import CNN
from limbeck.models.table import Column, TableInput
from limbeck.systems.generative.gan_mc import (
    GANMC,
    ImageGenerator,
    Mixed,
    RowGenerator,
    balanced,
    network,
)
from limbeck.systems.generative.gan_mc.networks import judge_of_images, judge_of_rows
from limbeck.tasks.classification import Classification
from limbeck.tasks.tabular import Tabular
from limbeck.training.bench import Bench, Candidate
from limbeck.training.engine import Engine
from limbeck.training.network import Network
from limbeck.training.phases import Fit, Solve, Training
from limbeck.training.progress import Voice

CAREFUL = Engine(device="cpu", checkpoint_seconds=0.0)
IRIS = tables.load("iris")
TABLE = TableInput((Column("a", 1.0, 2.0), Column("b", categories=("x", "y", "z"))))
ADAM = {"optimiser": "adam", "weight_decay": 0.0, "schedule": "constant"}


# Losses.


def test_the_distance_has_the_value_and_the_gradient_worked_out_by_hand():
    student = torch.zeros(2, 2, requires_grad=True)
    teacher = torch.tensor([[1.0, 2.0], [0.0, 0.0]], requires_grad=True)
    loss = compression(student, teacher)
    loss.backward()
    assert loss.item() == 1.25
    assert student.grad.tolist() == [[-0.5, -1.0], [0.0, 0.0]]
    assert teacher.grad is None


def test_the_distance_follows_an_independent_formula():
    ours, theirs = noise(5, 4).requires_grad_(), noise(5, 4, seed=1)
    loss = compression(ours, theirs)
    loss.backward()
    s, t = ours.detach().numpy(), theirs.numpy()
    assert loss.item() == pytest.approx(((t - s) ** 2).sum() / (2 * 5), rel=1e-12)
    assert np.allclose(ours.grad.numpy(), (s - t) / 5, atol=1e-14)
    assert compression(theirs, theirs) == 0
    assert compression(ours.bfloat16(), theirs).dtype == torch.float32


def log_softmax(rows: np.ndarray) -> np.ndarray:
    return rows - np.log(np.exp(rows).sum(1, keepdims=True))


def test_judge_and_generator_minimise_the_auxiliary_classifiers_losses():
    real, fake = noise(6).requires_grad_(), noise(6, seed=1).requires_grad_()
    kinds, guesses = noise(6, 3, seed=2), noise(6, 3, seed=3).requires_grad_()
    labels, drawn = torch.arange(6) % 3, torch.tensor([0, 0, 1, 2, 1, 0])
    judge = judge_terms((real, kinds), (fake, guesses), labels, drawn)
    s = {n: 1 / (1 + np.exp(-v.detach().numpy())) for n, v in (("r", real), ("f", fake))}
    source = -np.log(s["r"]).mean() - np.log(1 - s["f"]).mean()
    picked = [
        log_softmax(v.detach().numpy())[np.arange(6), k.numpy()].mean()
        for v, k in ((kinds, labels), (guesses, drawn))
    ]
    assert judge["source"].item() == pytest.approx(source, rel=1e-12)
    assert judge["class"].item() == pytest.approx(-sum(picked), rel=1e-12)
    made = generator_terms((fake, guesses), drawn)
    assert made["source"].item() == pytest.approx(-np.log(s["f"]).mean(), rel=1e-12)
    assert made["class"].item() == pytest.approx(-picked[1], rel=1e-12)
    made["source"].backward()
    assert np.allclose(fake.grad.numpy(), (s["f"] - 1) / 6, atol=1e-14)


def test_a_set_is_balanced():
    assert torch.bincount(balanced(800, 10)).tolist() == [80] * 10
    assert torch.bincount(balanced(11, 3)).tolist() == [3] * 3
    assert len(balanced(2, 3)) == 0


def test_munge_without_a_chance_returns_the_rows():
    rows = noise(7, 3)
    assert torch.equal(munge(rows, 3, 1.5, 0.0), rows.repeat(3, 1))


def test_munge_swaps_two_rows_twice_or_makes_them_equal_in_place():
    a, b = [1.0, 5.0], [2.0, -3.0]
    pair = torch.tensor([a, b])
    assert munge(pair, 1, math.inf, 1.0).tolist() == [a, b]
    assert munge(pair, 1, math.inf, 1.0, in_place=True).tolist() == [b, b]


def test_munge_starts_each_time_from_the_rows_as_given_and_is_a_function_of_its_seed():
    rows = noise(30, 4)
    made = munge(rows, 2, 1.5, 0.5, seed=1)
    assert made.shape == (60, 4)
    assert torch.equal(made, munge(rows, 2, 1.5, 0.5, seed=1))
    assert not torch.equal(made[:30], made[30:])
    assert not torch.equal(made, munge(rows, 2, 1.5, 0.5, seed=2))
    # Half of the cells are exchanged, so about as many as that stay.
    assert 0.1 < (made[:30] == rows).double().mean() < 0.6


def test_the_score_of_the_real_set_is_one_and_its_error_a_standard_error():
    assert compression_score([0.5, 0.6], [0.5, 0.6])[0] == 1
    score, error = compression_score([0.2, 0.3, 0.4], [0.5, 0.7])
    assert score == pytest.approx(0.5)
    assert error == pytest.approx(0.1 / math.sqrt(3) / 0.6)
    assert compression_score([0.2], [0.4]) == (0.5, 0.0)
    for wrong in (([], [0.5]), ([0.5], []), ([0.5], [0.0])):
        with pytest.raises(UserError, match="wants accuracies"):
            compression_score(*wrong)


def test_logits_of_other_classes_are_one_sentence():
    with pytest.raises(UserError, match="both must know the same classes"):
        compression(torch.zeros(2, 3), torch.zeros(2, 4))


# Networks.


def test_the_networks_have_the_published_sizes():
    def size(module) -> int:
        return sum(p.numel() for p in module.parameters())

    magic = TableInput(tuple(Column(str(n)) for n in range(10)))
    assert size(RowGenerator(magic, 2)) == 5_760
    assert size(ImageGenerator((32, 32), 3, 10)) == 1_593_888
    assert size(network("gan-mc-lenet", 10, 3, (32, 32))) == 3_497_866
    input = Input(3, (32, 32), (0.5,) * 3, (0.5,) * 3)
    assert size(build("gan-mc-lenet", [str(c) for c in range(10)], input)) == 3_497_866


def test_the_students_biases_are_drawn_as_published():
    student = network("gan-mc-lenet", 10, 3, (32, 32))
    biases = torch.cat([p.detach() for n, p in student.named_parameters() if n.endswith("bias")])
    assert biases.std().item() == pytest.approx(0.5, rel=0.1)


@pytest.mark.parametrize("size", [(8, 8), (28, 28), (32, 32), (12, 20), (4, 4)])
def test_a_generator_makes_images_of_any_size_in_whole_levels(size):
    made = ImageGenerator(size, 1, 3, width=4)
    drawn = made.draw(torch.tensor([0, 1, 2, 2]), seed=5)
    assert drawn.shape == (4, 1, *size)
    levels = drawn * 255
    assert torch.allclose(levels, levels.round(), atol=1e-4)
    assert 0 <= drawn.min() <= drawn.max() <= 1
    assert torch.equal(drawn, made.draw(torch.tensor([0, 1, 2, 2]), seed=5))
    source, kinds = judge_of_images(size, 1, 3, width=4)(made.shown(drawn))
    assert (source.shape, kinds.shape) == ((4,), (4, 3))


def test_the_class_replaces_the_first_entries_of_the_noise():
    made = ImageGenerator((8, 8), 1, 3, width=4).eval()
    one, other = noise(2, 103, dtype=torch.float32), noise(2, 103, dtype=torch.float32)
    other[:, :3] = 7.0
    classes = torch.tensor([1, 2])
    assert torch.equal(made(one, classes), made(other, classes))
    assert not torch.equal(made(one, classes), made(one, classes.flip(0)))


def test_a_row_is_the_noise_times_the_class_through_two_layers():
    made = RowGenerator(TABLE, 2).double()
    z, classes = noise(4, 100), torch.tensor([0, 1, 1, 0])
    first, second = made.layers[0], made.layers[2]
    with torch.no_grad():
        h = (z * made.embedding.weight[classes]) @ first.weight.T + first.bias
        out = h.clamp(min=0) @ second.weight.T + second.bias
        found = made(z, classes)
    assert torch.allclose(found[:, 0], out[:, 0])
    assert torch.equal(found[:, 1:].argmax(1), out[:, 1:].argmax(1))
    assert torch.allclose(found[:, 1:].sum(1), torch.ones(4, dtype=torch.float64))


def test_made_rows_are_cells_of_the_table_and_categories_get_a_gradient():
    made = RowGenerator(TABLE, 2)
    cells = made.draw(torch.tensor([0, 1, 1]), 0)
    assert set(cells[:, 1].tolist()) <= {0.0, 1.0, 2.0}
    shown = made(made.noise(8), torch.zeros(8, dtype=torch.int64))
    judge_of_rows(4, 2)(shown)[0].sum().backward()
    assert made.layers[2].weight.grad[1:].abs().sum() > 0


def test_the_noise_has_the_published_deviation():
    assert RowGenerator(TABLE, 2).noise(2000).std().item() == pytest.approx(0.5, rel=0.02)
    assert ImageGenerator((8, 8), 1, 2).noise(2000).std().item() == pytest.approx(1.0, rel=0.02)


def test_networks_that_there_are_not_are_one_sentence():
    with pytest.raises(UserError, match="known: gan-mc-lenet, gan-mc-nin"):
        network("gan-mc-resnet", 10, 3, (32, 32))
    with pytest.raises(UserError, match="at least 16 x 16 pixels, not 8 x 8"):
        network("gan-mc-lenet", 10, 1, (8, 8))
    assert network("gan-mc-nin", 10, 1, (28, 28)).eval()(torch.zeros(1, 1, 28, 28)).shape == (1, 10)


# Mixed batches.


class Counting:
    """Real batches that tell which were read."""

    def __init__(self) -> None:
        self.read: list[int] = []

    def __len__(self) -> int:
        return 40

    def epoch(self, epoch, start=0):
        for step in range(start, len(self)):
            self.read.append(step)
            yield {"image": torch.full((5, 1, 8, 8), float(step)), "row": torch.arange(5)}


def mixed(share: float) -> tuple[Mixed, Counting]:
    real = Counting()
    made = ImageGenerator((8, 8), 1, 3, width=4)
    return Mixed(real, made, "image", share, samples=200, batch_size=5, seed=3), real


def test_without_made_batches_the_real_ones_come_as_they_are():
    batches, _ = mixed(0.0)
    for got, wanted in zip(batches.epoch(1), Counting().epoch(1), strict=True):
        assert got.keys() == wanted.keys()
        assert torch.equal(got["image"], wanted["image"])


def test_with_made_batches_alone_no_real_one_is_read():
    batches, real = mixed(1.0)
    found = list(batches.epoch(0))
    assert (len(found), real.read) == (40, [])
    assert all(b["image"].shape == (5, 1, 8, 8) for b in found)


def test_a_made_batch_has_no_label_and_real_ones_keep_their_step():
    batches, _ = mixed(0.5)
    made = batches.made(0)
    assert 10 < made.sum() < 30
    for step, batch in enumerate(batches.epoch(0)):
        assert "label" not in batch
        assert ("row" in batch) == (not made[step])
        if not made[step]:
            assert (batch["image"] == step).all()


def test_an_epochs_made_classes_are_balanced_and_drawn_anew():
    batches, _ = mixed(0.8)
    assert torch.bincount(batches.classes(0)).tolist() == [53] * 3
    assert not torch.equal(batches.classes(0), batches.classes(1))


def test_any_step_is_found_again():
    batches, _ = mixed(0.5)
    whole = list(batches.epoch(2))
    for start in (1, 17, 39):
        for one, other in zip(batches.epoch(2, start), whole[start:], strict=True):
            assert torch.equal(one["image"], other["image"])


# Runs.


def table_bench(student: str = "mlp-8", seeds=(0,), **given) -> Bench:
    return Bench(
        task=Tabular(IRIS.classes, IRIS.input),
        train=IRIS.train,
        transfer=given.pop("transfer", IRIS.train),
        validation=IRIS.validation,
        test=IRIS.test,
        candidates=given.pop(
            "candidates", [Candidate(build("forest-10-8", IRIS.classes, IRIS.input, 0), Training())]
        ),
        make_student=lambda seed: build(student, IRIS.classes, IRIS.input, seed),
        training=Training(epochs=8, batch_size=32, lr=0.02, **ADAM),
        seeds=seeds,
        engine=CAREFUL,
    )


def image_bench(task: Classification | None = None, **given) -> Bench:
    pixels = (noise(90, 1, 8, 8, dtype=torch.float32) * 40 + 128).clamp(0, 255).byte()
    labels = pixels.float().flatten(1)[:, :3].argmax(1)
    splits = {
        name: Split(name, ResidentImages(pixels), labels).subset(range(*places), name)
        for name, places in (("train", (0, 60)), ("validation", (60, 75)), ("test", (75, 90)))
    }

    def net(widths=(4, 6), seed: int = 0) -> Network:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return Network(CNN(widths, 3, 1))

    return Bench(
        task=task or Classification("abc"),
        train=splits["train"],
        transfer=given.pop("transfer", splits["train"]),
        validation=splits["validation"],
        test=splits["test"],
        candidates=[Candidate(net((8, 8), 9), Training(epochs=2, lr=0.05))],
        make_student=lambda seed: net(seed=seed),
        training=Training(epochs=2, batch_size=10, lr=0.003, **ADAM),
        engine=CAREFUL,
        **given,
    )


GAN = Training(epochs=2, batch_size=30, lr=1e-3, **ADAM)
SCORING = Training(epochs=1, batch_size=30, lr=1e-2, **ADAM)
QUICK = {"gan": GAN, "scoring": SCORING, "width": 4, "score": 1, "times": 3}
UNSCORED = {**QUICK, "score": 0}


def test_a_run_on_rows_trains_each_student_on_its_own_mixture(tmp_path):
    laid, seen = table_bench(), {}
    method = GANMC(**QUICK, rivals=("real", "fake", "munge"))

    def look(phase):
        if isinstance(phase, Fit):
            seen[phase.name] = {int(r) for b in phase.batches.epoch(0) for r in b["row"]}

    carry_out(tmp_path / "run", method, laid, look)
    n = len(IRIS.train)
    real, fake = set(range(n)), set(range(n, 4 * n))
    other = set(range(4 * n, 7 * n))
    assert seen["on-real"] == real
    assert seen["on-fake"] == fake
    assert seen["on-munge"] == real | other
    assert seen["student"] == real | fake
    assert set(laid.delivered(0)) >= {"teacher", "baseline", "on-real", "on-fake", "on-munge"}


def test_the_students_targets_are_the_teachers_answers_and_no_labels(tmp_path):
    laid, terms = table_bench(), {}

    def look(phase):
        if isinstance(phase, Fit) and phase.name == "student":
            terms["batch"] = next(phase.batches.epoch(0))
            terms["found"] = phase.updates[0].terms(terms["batch"])
            terms["said"] = laid.task.run(laid.students[0], terms["batch"])["logits"].detach()

    carry_out(tmp_path / "run", GANMC(**QUICK, rivals=()), laid, look)
    batch = terms["batch"]
    assert "label" not in batch
    theirs = laid.teacher(laid.task, {"cells": batch["cells"]})["logits"].double()
    ours = terms["said"].double()
    p = theirs.softmax(1)
    wanted = (p * (theirs.log_softmax(1) - ours.log_softmax(1))).sum(1).mean()
    assert list(terms["found"]) == ["compression"]
    assert terms["found"]["compression"].item() == pytest.approx(wanted.item(), rel=1e-4)


def test_a_student_makes_as_many_steps_on_the_mixture_as_on_real_rows(tmp_path):
    steps = {}

    def look(phase):
        if isinstance(phase, Fit):
            steps[phase.name] = phase.epochs * len(phase.batches)

    carry_out(tmp_path / "run", GANMC(**QUICK), table_bench(), look)
    assert steps["on-real"] == steps["baseline"] == 8 * 4
    assert steps["student"] == 2 * 14


def test_forests_are_students_of_probabilities(tmp_path):
    laid, kinds = table_bench("forest-4-8"), {}
    carry_out(
        tmp_path / "run",
        GANMC(**QUICK),
        laid,
        lambda phase: kinds.update({phase.name: type(phase)}),
    )
    assert {kinds[name] for name in ("teacher", "baseline", "on-real", "student")} == {Solve}
    measured = laid.task.measure(laid.students[0], laid.test)
    assert measured["accuracy"] > 0.8


def test_only_real_batches_are_plain_compression_bit_for_bit(tmp_path):
    laid = image_bench()
    carry_out(tmp_path / "run", GANMC(**QUICK, p_fake=0.0), laid)
    assert same(laid.students[0], laid.further["on-real"][0])
    other = image_bench()
    carry_out(tmp_path / "other", GANMC(**QUICK, p_fake=0.5), other)
    assert same(other.further["on-real"][0], laid.further["on-real"][0])
    assert not same(other.students[0], laid.students[0])


def test_images_are_matched_in_logits_by_a_teacher_that_sleeps(tmp_path):
    laid, found = image_bench(), {}

    def look(phase):
        if phase.name == "student":
            batch = next(phase.batches.epoch(0))
            found["ours"] = laid.task.run(laid.students[0], batch)["logits"].detach()
            found["theirs"] = laid.teacher(laid.task, {"image": batch["image"]})["logits"]
            found["loss"] = phase.updates[0].terms(batch)["compression"].item()
            assert not laid.teacher.networks[0].training

    carry_out(tmp_path / "run", GANMC(**QUICK, p_fake=1.0, rivals=()), laid, look)
    squares = (found["theirs"].double() - found["ours"].double()).square().sum(1).mean()
    assert found["loss"] == pytest.approx(squares.item() / 2, rel=1e-5)


def test_each_update_of_the_gan_changes_only_what_it_trains(tmp_path):
    seen = []

    def look(phase):
        if phase.name != "gan":
            return
        parts = {name: m for u in phase.updates for name, m in u.train.items()}
        state: dict[str, dict[str, torch.Tensor]] = {}
        for update in phase.updates:

            def terms(batch, inner=update.terms, name=update.name):
                now = {
                    k: {n: p.detach().clone() for n, p in m.named_parameters()}
                    for k, m in parts.items()
                }
                for k in now:
                    if k in state and any(
                        not torch.equal(v, state[k][n]) for n, v in now[k].items()
                    ):
                        seen.append(f"{k} before {name}")
                state.update(now)
                return inner(batch)

            update.terms = terms

    carry_out(tmp_path / "run", GANMC(**UNSCORED, rivals=()), table_bench(), look)
    assert set(seen) == {"judge before generator", "generator before judge"}


class PowerCut(Exception):
    pass


def cut(at: str, after: int):
    """A look at each phase that stops the one of this name after so many calls of its work."""

    def look(phase):
        if phase.name != at:
            return
        calls = itertools.count(1)
        if isinstance(phase, Solve):
            inner = phase.run

            class Journal:
                def __init__(self, real):
                    self.real = real

                def remember(self, name, work):
                    if next(calls) == after:
                        raise PowerCut
                    return self.real.remember(name, work)

            def run(journal):
                result = inner(Journal(journal))
                if next(calls) <= after:
                    raise PowerCut
                return result

            phase.run = run
            return
        update = phase.updates[-1]
        terms = update.terms

        def failing(batch):
            if next(calls) == after:
                raise PowerCut
            return terms(batch)

        update.terms = failing

    return look


@pytest.mark.parametrize("make", [table_bench, image_bench])
def test_a_run_goes_on_in_every_phase_to_the_same_bits(tmp_path, make):
    whole, phases = make(), []
    first = GANMC(**QUICK)
    carry_out(tmp_path / "whole", first, whole, lambda phase: phases.append(phase.name))
    assert phases[:2] == ["teacher", "gan"]
    for name in phases:
        path, after = tmp_path / f"cut-{name}", 3
        with pytest.raises(PowerCut):
            carry_out(path, GANMC(**QUICK), make(), cut(name, after))
        again, method = make(), GANMC(**QUICK)
        carry_out(path, method, again)
        assert same(again.students[0], whole.students[0]), name
        assert same(again.further["on-real"][0], whole.further["on-real"][0]), name
        assert same(method.generator, first.generator), name
        assert method.scores == first.scores, name


def test_the_scored_sets_are_labelled_by_the_teacher_and_seen_once(tmp_path):
    laid = image_bench()
    method = GANMC(**{**QUICK, "score": 2}, rivals=())
    carry_out(tmp_path / "run", method, laid)
    assert list(method.scores) == ["real", "GAN", "GAN, a only", "real, blurred"]
    assert all(len(found) == 2 for found in method.scores.values())
    for seed in range(2):
        sets = {name: list(make()) for name, make in method._sets(laid, seed).items()}
        assert {name: sum(map(len, found)) for name, found in sets.items()} == dict.fromkeys(
            sets, 60
        )
        # The real ones are each sample once.
        images = {tuple(i.flatten().tolist()) for part in sets["real"] for i in part}
        assert len(images) == 60


def test_findings_show_sheets_scores_and_the_course(tmp_path):
    laid = image_bench()
    method = GANMC(**QUICK)
    run = carry_out(tmp_path / "run", method, laid)
    sheet, score, course = method.findings(laid, run.metrics())
    assert set(sheet.pictures) == {"real", "made"}
    # Three classes of eight images of 8 x 8, with a border of one pixel.
    assert sheet.pictures["made"].shape == (3 * 9 + 1, 8 * 9 + 1, 3)
    assert [row[0] for row in score.table[1:]] == list(method.scores)
    assert score.table[1][2] == "1.000"
    lines = course.charts[0].lines["generator"]
    assert [epoch for epoch, _ in lines] == [1, 2]
    assert all(0 <= share <= 1 for _, share in lines)
    table = table_bench()
    method = GANMC(**UNSCORED)
    run = carry_out(tmp_path / "table", method, table)
    rows, _ = method.findings(table, run.metrics())
    assert [chart.title for chart in rows.charts] == [c.name for c in IRIS.input.columns]
    assert all(set(chart.lines) == {"real", "made"} for chart in rows.charts)


def test_the_smoke_run_of_images_is_drawn(tmp_path):
    values = recipes.preset(system("gan-mc"), "images-smoke", "digits")
    words = ["seeds=1", "student.training.epochs=2", "teacher.training.epochs=1"]
    recipe = recipes.validate(recipes.assigned(values, words))
    run = distillation.start(recipe, tmp_path / "run", Voice(quiet=True))
    page = (run.path / "report.html").read_text()
    assert "Real and made images" in page
    assert "Compression score" in page
    pictures = json.loads((run.path / "findings.json").read_text())["findings"][0]["pictures"]
    assert all(source.startswith("data:image/png;base64,") for source in pictures.values())


# Mistakes.


def test_what_does_not_fit_is_one_sentence():
    plain = image_bench()
    for method, laid, sentence in (
        (GANMC(rivals=("munge",)), plain, "MUNGE makes rows of tables, not images"),
        (GANMC(match="logits"), table_bench("forest-4-8"), "is fitted to probabilities of rows"),
        (GANMC(), table_bench(candidates=[]), "needs a teacher; name one with --teacher"),
        (GANMC(), table_bench(transfer=IRIS.train.unlabelled()), "give labelled data"),
        (
            GANMC(),
            image_bench(Classification("abc", Augment(mixup=0.2))),
            "mixup and cutmix make samples of no one class",
        ),
    ):
        with pytest.raises(UserError, match=sentence) as caught:
            method.rehearse(laid)
        assert "\n" not in str(caught.value)


def test_loaders_are_one_sentence(tmp_path):
    sets = TensorDataset(noise(8, 1, 8, 8, dtype=torch.float32), torch.arange(8) % 2)
    loaders = [DataLoader(sets, 4) for _ in range(2)]
    with pytest.raises(UserError, match="give labelled data by name"):
        limbeck.distill(
            CNN((4,), 2, 1),
            CNN((4,), 2, 1),
            loaders,
            method=GANMC(),
            out=tmp_path / "r",
            quiet=True,
        )


@pytest.mark.parametrize(
    "given",
    [
        {"p_fake": 1.1},
        {"p_fake": -0.1},
        {"times": 0},
        {"width": 0},
        {"score": -1},
        {"match": "labels"},
        {"rivals": ["gan"]},
        {"tims": 3},
    ],
)
def test_wrong_hyper_parameters_are_one_sentence(given):
    with pytest.raises(UserError) as caught:
        GANMC(**given)
    assert "\n" not in str(caught.value)


def test_the_paper_presets_are_the_papers_settings():
    rows = recipes.validate(recipes.preset(system("gan-mc"), "paper", "magic04"))
    assert rows.teachers[0].model.startswith("forest-500-")
    assert rows.student.model.startswith("forest-20-")
    assert rows.method().times == 9
    images = recipes.validate(recipes.preset(system("gan-mc"), "paper-images", "cifar10"))
    method, training = images.method(), images.student.training
    assert (images.teachers[0].model, images.student.model) == ("gan-mc-nin", "gan-mc-lenet")
    assert (training.epochs, training.batch_size, training.lr) == (200, 256, 1e-4)
    assert (method.p_fake, method.width) == (0.8, 48)
    assert (method.scoring.epochs, method.scoring.batch_size, method.scoring.lr) == (1, 256, 1e-4)
    assert method.score == 3
