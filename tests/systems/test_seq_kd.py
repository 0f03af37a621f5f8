import math

import pytest
import torch

from carrying import carry_out, noise, same
from limbeck import recipes
from limbeck.catalogue import system
from limbeck.errors import UserError
from limbeck.losses import word_kd
from limbeck.models import build, load
from limbeck.models.sentences import PAD, Sentences
from limbeck.systems.language.seq_kd import (
    SeqKD,
    best_of,
    closest_to,
    gleu,
    keep_zeros,
    magnitude_masks,
    matrices,
    nonzero,
    sentence_bleu,
)
from limbeck.tasks.translation import Hypothesis, PairBatches, ParallelText, TranslationWords
from limbeck.training.bench import Bench, Candidate
from limbeck.training.distiller import Distiller
from limbeck.training.engine import Engine
from limbeck.training.phases import Fit, Training
from limbeck.training.progress import Voice
from limbeck.training.task import Answer

CPU = Engine(device="cpu", checkpoint_seconds=0.0)

# The loss.


def test_the_loss_has_the_values_worked_out_by_hand():
    p, q = torch.tensor([[[0.2, 0.5, 0.3]]]).log(), torch.tensor([[[0.6, 0.3, 0.1]]]).log()
    loss = word_kd(p, q)
    by_hand = 0.6 * 1.6094379 + 0.3 * 0.6931472 + 0.1 * 1.2039728
    assert loss.item() == pytest.approx(1.294004, abs=1e-6)
    assert loss.item() == pytest.approx(by_hand, abs=1e-6)
    term = SeqKD(word=0.5).terms(
        Answer({"logits": p}), Answer({"logits": q}), {"label": torch.ones(1, 1)}
    )
    mixed = SeqKD(word=0.5).label_weight * -float(p[0, 0, 0]) + float(term["words"])
    assert mixed == pytest.approx(1.451721, abs=1e-6)


def test_value_and_gradient_follow_an_independent_formula_and_filling_has_no_part():
    ours, theirs = noise(2, 3, 4, seed=1).requires_grad_(), noise(2, 3, 4, seed=2).requires_grad_()
    there = torch.tensor([[True, True, False], [True, False, False]])
    loss = word_kd(ours, theirs, there)
    loss.backward()
    total, gradient = 0.0, torch.zeros(2, 3, 4, dtype=torch.float64)
    for b, j in there.nonzero().tolist():
        p, q = ([math.exp(v) for v in t[b, j].tolist()] for t in (ours, theirs))
        p, q = [v / sum(p) for v in p], [v / sum(q) for v in q]
        total -= sum(y * math.log(x) for x, y in zip(p, q, strict=True)) / 3
        for k in range(4):
            gradient[b, j, k] = (p[k] - q[k]) / 3
    assert loss.item() == pytest.approx(total, rel=1e-12)
    assert torch.allclose(ours.grad, gradient, atol=1e-14)
    assert theirs.grad is None


def test_a_teacher_that_is_sure_of_the_gold_word_is_the_label():
    logits, gold = noise(5, 7, seed=3), torch.tensor([0, 3, 6, 2, 2])
    sure = torch.nn.functional.one_hot(gold, 7).double() * 1e4
    expected = torch.nn.functional.cross_entropy(logits, gold)
    assert word_kd(logits, sure).item() == pytest.approx(expected.item(), rel=1e-12)


def test_a_student_that_says_the_same_has_nothing_to_learn():
    logits = noise(5, 7, seed=4).requires_grad_()
    word_kd(logits, logits.detach() + 3).backward()
    assert logits.grad.abs().max() < 1e-15


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((torch.zeros(2, 3), torch.zeros(2, 4)), "must speak of the same words"),
        ((torch.zeros(1, 3), torch.zeros(1, 3), torch.zeros(1, dtype=torch.bool)), "no token"),
    ],
)
def test_wrong_logits_are_one_sentence(arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        word_kd(*arguments)


# Likeness and choice.


@pytest.mark.parametrize(
    ("candidate", "reference", "bleu", "shared"),
    [
        ("a b c", "a b d", (2 / 3 * 1 / 2 * 1 / 2) ** 0.25, 0.5),
        ("d", "a b c d", math.exp(-3), 0.1),
        ("a b c d", "a b c d", 1.0, 1.0),
        # No match: 1/2, 1/4, 1/8 and 1/16 of 4, 3, 2 and 1.
        ("e f g h", "a b c d", (1 / 8 * 1 / 12 * 1 / 16 * 1 / 16) ** 0.25, 0.0),
        # Clipped: one of three.
        ("a a a", "a b c", (1 / 3 * 1 / 4 * 1 / 4) ** 0.25, 1 / 6),
        ("", "a b", 0.0, 0.0),
    ],
)
def test_likeness_has_the_values_worked_out_by_hand(candidate, reference, bleu, shared):
    words = candidate.split(), reference.split()
    assert sentence_bleu(*words) == pytest.approx(bleu, abs=1e-6)
    assert gleu(*words) == pytest.approx(shared)


def beam(*texts, finished=True):
    return [Hypothesis(text, -float(n), finished) for n, text in enumerate(texts)]


def test_the_reference_is_chosen_where_the_beam_has_it():
    assert closest_to("a b c d", beam("a b c", "a b d c", "a b c d")) == "a b c d"


def test_of_a_single_hypothesis_the_closest_is_the_most_probable():
    one = beam("x y z")
    assert closest_to("a b c", one) == best_of(one) == "x y z"


def test_hypotheses_that_are_empty_or_without_end_do_not_count():
    cut = Hypothesis("a b c d", 0.0, False)
    assert best_of([cut, *beam("", "a b")]) == "a b"
    assert closest_to("a b c d", [cut, *beam("", "c")]) == "c"
    assert best_of([cut]) is closest_to("a", beam("")) is None


# Pruning.


def test_the_smallest_weights_go():
    weights = {"w": torch.tensor([0.1, -0.5, 0.2, -0.05])}
    assert magnitude_masks(weights, 0.5)["w"].tolist() == [False, True, True, False]
    weights["v"] = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    blind = magnitude_masks(weights, 0.5)
    assert (blind["w"].sum(), blind["v"].sum()) == (0, 4)
    uniform = magnitude_masks(weights, 0.5, "layer")
    assert (uniform["w"].sum(), uniform["v"].sum()) == (2, 2)
    assert all(mask.all() for mask in magnitude_masks(weights, 0.0).values())
    with pytest.raises(UserError, match=r"lies in \[0, 1\)"):
        magnitude_masks(weights, 1.0)


@pytest.mark.parametrize("optimiser", ["sgd", "adam", "adamw"])
def test_a_weight_that_is_gone_stays_gone(optimiser):
    layer = torch.nn.Linear(4, 3)
    with torch.no_grad():
        layer.weight[:, ::2] = 0
    keep_zeros(layer.weight)
    before = layer.weight.clone()
    stepping = Training(optimiser=optimiser, lr=0.1, weight_decay=0.01).build(layer.parameters())
    for seed in range(3):
        stepping.zero_grad()
        layer(noise(5, 4, seed=seed, dtype=torch.float32)).square().sum().backward()
        stepping.step()
    assert (layer.weight[:, ::2] == 0).all()
    assert (layer.weight[:, 1::2] != before[:, 1::2]).all()


# The run.


def domain() -> ParallelText:
    words = TranslationWords(source="numbers", limit=64, vocabulary=400, longest=12, beam=2)
    return ParallelText(words, device=torch.device("cpu"), workers=0, voice=Voice(quiet=True))


def bench(ground=None, **given) -> Bench:
    ground = ground or domain()
    splits = dict(ground.splits)
    splits["validation"] = splits["validation"].subset(range(8))
    splits["test"] = splits["test"].subset(range(8))
    training = Training(epochs=2, batch_size=16, optimiser="adam", lr=0.01, weight_decay=0)
    # Long enough for sentences that come to an end.
    taught = training.model_copy(update={"epochs": 6, "batch_size": 8, "lr": 0.03})
    given = {
        "task": ground.task(),
        **splits,
        "candidates": [Candidate(ground.network("lstm-1x16", 5), taught)],
        "make_student": lambda seed: ground.network("lstm-1x8", seed),
        "training": training,
        "engine": CPU,
        **given,
    }
    return Bench(**given)


METHOD = {"beam": 2, "best": 3, "word": 0.5, "prune": 0.5, "rival": 0.5}


def test_each_phase_learns_from_the_sentences_that_are_its_own(tmp_path):
    laid, fits = bench(), {}

    def look(phase):
        if isinstance(phase, Fit):
            fits[phase.name] = phase
            phase.epochs = min(phase.epochs, 6 if phase.name == "teacher" else 1)

    run = carry_out(tmp_path / "run", SeqKD(**METHOD), laid, look)
    gold = laid.transfer
    targets = {name: fit.batches.pairs.target for name, fit in fits.items()}
    teacher = laid.teacher.networks[0]
    found = laid.task.translate(teacher, gold.source, beam=2, best=2)
    rewritten = tuple(best_of(f) or t for f, t in zip(found, gold.target, strict=True))
    wide = laid.task.translate(teacher, gold.source, beam=3, best=3)
    closest = tuple(closest_to(t, f) or t for f, t in zip(wide, gold.target, strict=True))
    assert list(fits) == ["teacher", "baseline", "word-kd", "student", "inter", "pruned"]
    assert targets["teacher"] == targets["baseline"] == targets["word-kd"] == gold.target
    assert targets["student"] == rewritten != gold.target
    assert targets["inter"] == targets["pruned"] == closest
    assert fits["inter"].updates[0].settings.lr == pytest.approx(0.001)
    roles = laid.delivered(0)
    assert set(roles) == {"teacher", "baseline", "student", "seq-kd", "word-kd", "pruned"}
    weights = matrices(roles["pruned"].model).values()
    kept = sum(int(w.count_nonzero()) for w in weights) / sum(w.numel() for w in weights)
    assert kept == pytest.approx(0.5, abs=1e-3)
    assert nonzero(roles["student"]) > nonzero(roles["pruned"])
    assert not same(roles["seq-kd"], roles["student"])
    (finding,) = SeqKD(**METHOD).findings(laid, run.metrics())
    assert [row[0] for row in finding.table[1:]] == [
        "teacher",
        "plain student",
        "Seq-KD + Word-KD + Seq-Inter",
        "Word-KD",
        "Seq-KD + Word-KD",
        "pruned student",
    ]


def test_the_words_are_those_of_the_teacher_behind_the_gold_ones_and_it_sleeps():
    ground = domain()
    task, pairs = ground.task(), ground.splits["train"]
    student, teacher = ground.network("lstm-1x8", 1), ground.network("lstm-2x16-drop", 2)
    batch = next(iter(PairBatches(pairs, ground.text, 8).epoch(0)))
    step = Distiller(student, teacher, SeqKD(word=0.25), task, batch).train()
    terms = step(batch)
    view, label = (batch["source"], batch["before"]), batch["label"]
    p, q = (n.eval()(view).double().log_softmax(-1) for n in (student, teacher))
    there = label != PAD
    words = -(q.exp() * p).sum(-1)[there].mean()
    gold = -p.gather(2, label[..., None])[..., 0][there].mean()
    assert terms["words"].item() == pytest.approx(0.25 * words.item(), rel=1e-5)
    assert terms["labels"].item() == pytest.approx(0.75 * gold.item(), rel=1e-5)
    sum(terms.values()).backward()
    assert all(p.grad is None for p in teacher.parameters())


class Cut(Exception):
    pass


@pytest.mark.parametrize("phase", ["teacher", "student", "inter", "pruned", "rewrite", "choose"])
def test_a_run_that_was_cut_in_any_phase_goes_on_to_the_same_bits(tmp_path, monkeypatch, phase):
    ground = domain()
    monkeypatch.setattr("limbeck.systems.language.seq_kd.PIECE", 16)
    given = {"ground": ground, "baseline": False}
    method = SeqKD(**{**METHOD, "rival": 0.0})
    whole = bench(**given)
    carry_out(tmp_path / "whole", method, whole)
    under_way, calls = [], []
    task = type(ground.task())
    names = ("translate",) if phase in ("rewrite", "choose") else ("run",)
    for name in names:
        original = getattr(task, name)

        def failing(self, *args, original=original, **kwargs):
            if under_way[-1:] == [phase]:
                calls.append(1)
                if len(calls) == 4:
                    raise Cut
            return original(self, *args, **kwargs)

        monkeypatch.setattr(task, name, failing)
    with pytest.raises(Cut):
        carry_out(tmp_path / "cut", method, bench(**given), lambda p: under_way.append(p.name))
    monkeypatch.setattr(task, name, original)
    again = bench(**given)
    carry_out(tmp_path / "cut", method, again)
    for role, network in whole.delivered(0).items():
        if role != "teacher":
            assert same(network, again.delivered(0)[role])


def test_a_teacher_of_another_vocabulary_teaches_by_sentences_and_not_by_words():
    ground = domain()
    pairs = ground.splits["train"]
    other = Sentences.trained(pairs.source, [t.upper() for t in pairs.target], 350, longest=12)
    stranger = build("lstm-1x8", other.vocabulary, other, 3)
    laid = bench(ground, candidates=[Candidate(stranger)])
    SeqKD().rehearse(laid)
    for method in (SeqKD(word=0.5), SeqKD(rival=0.5)):
        with pytest.raises(UserError, match="learn from its sentences instead, as seq-kd"):
            method.rehearse(laid)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"word": 1.5}, r"SeqKD\(word=1\.5\)"),
        ({"beam": 0}, r"SeqKD\(beam=0\)"),
        ({"prune": 1.0}, r"SeqKD\(prune=1\.0\)"),
        ({"similarity": "ter"}, r"SeqKD\(similarity='ter'\)"),
        ({"bean": 5}, "no parameter 'bean'; did you mean beam"),
    ],
)
def test_wrong_parameters_are_one_sentence(given, sentence):
    with pytest.raises(UserError, match=sentence):
        SeqKD(**given)


def test_it_wants_one_teacher_and_sentences():
    ground = domain()
    two = [Candidate(ground.network("lstm-1x8", n)) for n in range(2)]
    for candidates in ([], two):
        with pytest.raises(UserError, match="one teacher is needed"):
            SeqKD().rehearse(bench(ground, candidates=candidates))


@pytest.mark.parametrize("preset", ["smoke", "small", "paper"])
def test_a_preset_is_a_recipe(preset):
    kind = "parallel" if preset == "paper" else "numbers"
    recipe = recipes.validate(recipes.preset(system("seq-kd"), preset, kind))
    assert recipe.task == "translation"
    if preset == "paper":
        assert (recipe.teachers[0].model, recipe.student.model) == (
            "lstm-4x1000-drop",
            "lstm-2x500-drop",
        )


def test_a_run_from_the_command_line_is_reported(tmp_path, command):
    sets = ["data.limit=64", "teacher.training.epochs=1", "student.training.epochs=1"]
    words = [w for s in [*sets, "methods.seq-kd.best=3"] for w in ("--set", s)]
    status, _, wrong = command(
        "run", "seq-kd", "--preset", "smoke", "--out", tmp_path / "r", *words
    )
    assert (status, wrong) == (0, "")
    page = (tmp_path / "r" / "report.html").read_text()
    for text in ("How sure the networks are", "What the networks say", "Seq-KD + Seq-Inter"):
        assert text in page
    assert load(tmp_path / "r" / "pruned").input.longest == 12
