import math
import random

import pytest
import torch
from tokenizers import Tokenizer, models
from torch import nn

from carrying import carry_out, noise, same
from limbeck import KD, recipes
from limbeck.catalogue import system
from limbeck.data.texts import Texts
from limbeck.errors import UserError
from limbeck.losses import attention_distance, hidden_distance, prediction_distance
from limbeck.models.text import TextInput, bert, encoder, masked, special_ids, word_pieces
from limbeck.systems.language.tinybert import (
    Augmentation,
    Augmenter,
    Layers,
    Neighbours,
    TinyBERT,
    attention_scores,
    replaceable,
    replaced,
    uniform_layers,
)
from limbeck.tasks.text import TextClassification
from limbeck.training.bench import Bench, Candidate
from limbeck.training.distiller import Distiller
from limbeck.training.engine import Engine
from limbeck.training.network import Network
from limbeck.training.phases import Training

CPU = Engine(device="cpu", checkpoint_seconds=0.0)
QUICK = Training(epochs=1, batch_size=16, optimiser="adamw", lr=2e-3)


# The losses.


def test_scores_of_padding_are_none_in_both_and_count_in_the_mean():
    student = torch.tensor([[[[1.0, -10001.0], [2.0, -9998.0]]]], requires_grad=True)
    teacher = torch.tensor([[[[0.0, -10003.0], [4.0, -9999.0]]]])
    loss = attention_distance(student, teacher)
    loss.backward()
    assert loss.item() == 1.25
    assert student.grad.flatten().tolist() == [0.5, 0.0, -1.0, 0.0]


def test_two_classes_that_nobody_prefers_are_half_of_ln_2():
    logits = torch.zeros(5, 2)
    assert prediction_distance(logits, logits).item() == pytest.approx(0.346574, abs=1e-6)


def test_predictions_follow_an_independent_formula_in_value_and_gradient():
    student, teacher = noise(3, 4).requires_grad_(), noise(3, 4, seed=1).requires_grad_()
    temperature, total = 2.0, 0.0
    gradient = torch.zeros(3, 4, dtype=torch.float64)
    for b in range(3):
        p = [math.exp(v / temperature) for v in teacher[b].tolist()]
        q = [math.exp(v / temperature) for v in student[b].tolist()]
        p, q = [v / sum(p) for v in p], [v / sum(q) for v in q]
        total -= sum(a * math.log(c) for a, c in zip(p, q, strict=True)) / 12
        for i in range(4):
            gradient[b, i] = (q[i] - p[i]) / temperature / 12
    loss = prediction_distance(student, teacher, temperature)
    loss.backward()
    assert loss.item() == pytest.approx(total, rel=1e-12)
    assert torch.allclose(student.grad, gradient, atol=1e-15)
    assert teacher.grad is None, "the teacher learns nothing"
    shifted = prediction_distance(student + 3, teacher - 7, temperature)
    assert shifted.item() == pytest.approx(total, rel=1e-12)


def test_attention_and_hidden_states_follow_an_independent_formula():
    heads, B, L, d = 2, 2, 3, 6
    qs, ks, qt, kt = (noise(B, L, d, seed=n) for n in range(4))
    padding = torch.tensor([[False] * 3, [False, False, True]])
    qs.requires_grad_()
    found = attention_distance(
        attention_scores(qs, ks, heads, padding), attention_scores(qt, kt, heads, padding)
    )
    found.backward()
    total, gradient, size = 0.0, torch.zeros_like(qs), d // heads
    for b in range(B):
        for h in range(heads):
            part = slice(h * size, (h + 1) * size)
            for i in range(L):
                for j in range(L):
                    if padding[b, j]:
                        continue
                    s = float(qs[b, i, part] @ ks[b, j, part]) / math.sqrt(size)
                    t = float(qt[b, i, part] @ kt[b, j, part]) / math.sqrt(size)
                    total += (s - t) ** 2 / (B * heads * L * L)
                    gradient[b, i, part] += (
                        2 * (s - t) * ks[b, j, part] / math.sqrt(size) / (B * heads * L * L)
                    )
    assert found.item() == pytest.approx(total, rel=1e-12)
    assert torch.allclose(qs.grad, gradient, atol=1e-14)
    one, other = noise(2, 3, 4), noise(2, 3, 4, seed=1).requires_grad_()
    pairs = zip(one.flatten().tolist(), other.flatten().tolist(), strict=True)
    expected = sum((a - b) ** 2 for a, b in pairs)
    one.requires_grad_()
    loss = hidden_distance(one, other)
    loss.backward()
    assert loss.item() == pytest.approx(expected / 24, rel=1e-12)
    assert torch.allclose(one.grad, 2 * (one - other).detach() / 24)
    assert other.grad is None


def test_four_layers_learn_from_every_third_of_twelve():
    assert uniform_layers(4, 12) == (3, 6, 9, 12)
    with pytest.raises(UserError, match=r"12 layers cannot be shared out evenly .* student's 5"):
        uniform_layers(5, 12)


@pytest.mark.parametrize("loss", [attention_distance, hidden_distance, prediction_distance])
def test_shapes_that_differ_are_one_sentence(loss):
    with pytest.raises(UserError, match="both must be equal"):
        loss(torch.zeros(2, 3), torch.zeros(2, 4))


# The networks.

SAID = [f"the {thing} is {how}" for thing in ("film", "play") for how in ("fine", "dull", "odd")]
WORDS = TextInput(word_pieces(SAID, 80), 16)


def fresh(layers=1, width=8, heads=2, seed=0, classes=2, input=WORDS):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Network(bert(input, classes, layers, width, heads, 2 * width), input, "b", "ab")


@pytest.fixture(scope="module")
def full():
    """As many tokens as BERT has."""
    vocabulary = {token: n for n, token in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]"))}
    vocabulary |= {f"w{n}": n for n in range(4, 30522)}
    made = Tokenizer(models.WordPiece(vocab=vocabulary, unk_token="[UNK]"))
    return TextInput(made.to_str(), 128)


@pytest.mark.parametrize(
    ("sizes", "parameters"),
    [
        ((4, 312, 12, 1200), 14_350_248),
        ((6, 768, 12, 3072), 66_955_008),
        ((12, 768, 12, 3072), 109_482_240),
    ],
)
def test_published_sizes_have_the_published_parameters(full, sizes, parameters):
    with torch.device("meta"):
        model = bert(full, 2, *sizes)
    head = sum(p.numel() for p in model.classifier.parameters())
    assert sum(p.numel() for p in model.parameters()) - head == parameters
    if sizes[0] == 4:
        fit_dense = 312 * 768 + 768
        assert parameters + head + fit_dense == 14_591_258


def layers_of(student, teacher, layers, sample, **given):
    places = encoder(student.model), encoder(teacher.model)
    method = Layers(*places, layers, **given)
    return Distiller(student, teacher, method, TextClassification("ab"), sample)


BATCH = {"text": [(text,) for text in (*SAID, "the")]}


def test_a_student_like_its_teacher_has_nothing_to_learn_from_its_layers():
    teacher = fresh(layers=2)
    distiller = layers_of(fresh(layers=2).eval(), teacher, (1, 2), BATCH)
    lift = distiller.method.fit_dense[0]
    with torch.no_grad():
        lift.weight.copy_(torch.eye(8))
        lift.bias.zero_()
    terms = distiller.eval()(BATCH)
    assert {name: float(value) for name, value in terms.items()} == {
        "embedding": pytest.approx(0, abs=1e-12),
        "hidden": pytest.approx(0, abs=1e-12),
        "attention": pytest.approx(0, abs=1e-12),
    }


def test_scores_are_those_whose_softmax_is_the_models_own_attention():
    network = fresh(layers=2).eval()
    network.model.config._attn_implementation = "eager"
    task = TextClassification("ab")
    fed = network.input(BATCH["text"])
    with torch.no_grad():
        wanted = network.model.base_model(**fed, output_attentions=True).attentions
        distiller = layers_of(network, fresh(layers=2, seed=1), (1, 2), BATCH)
        answer = task.run(network.eval(), BATCH, distiller._taps)
        for layer in range(2):
            scores = distiller.method.scores(answer, encoder(network.model), layer)
            assert torch.allclose(scores.softmax(-1), wanted[layer], atol=1e-6)


def test_layers_are_matched_as_the_map_says_and_by_one_map_or_two():
    student, teacher = fresh(layers=1, width=6), fresh(layers=3, seed=1)
    for maps, number in (("shared", 1), ("separate", 2)):
        distiller = layers_of(student, teacher, (3,), BATCH, maps=maps)
        assert "bert.encoder.layer.2" in distiller.method.teacher_taps
        assert not any("layer.0" in path for path in distiller.method.teacher_taps)
        assert len(distiller.method.fit_dense) == number
        assert sum(p.numel() for p in distiller.method.parameters()) == number * (6 * 8 + 8)
        terms = distiller(BATCH)
        sum(terms.values()).backward()
        assert all(p.grad is not None for p in distiller.method.parameters())
        distiller.release()


@pytest.mark.parametrize("family", ["DistilBert", "Roberta", "Electra"])
def test_other_families_have_their_layers_found(family):
    import transformers

    sizes = {"dim": 8, "n_layers": 2, "n_heads": 2, "hidden_dim": 16, "pad_token_id": 0}
    if family != "DistilBert":
        sizes = {
            "hidden_size": 8,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 16,
            "pad_token_id": 0,
        }
    if family == "Electra":
        sizes["embedding_size"] = 4
    config = getattr(transformers, f"{family}Config")(vocab_size=len(WORDS.tokens), **sizes)
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{family}ForSequenceClassification")(config).eval()
    where = encoder(model)
    input = TextInput(WORDS.tokenizer, 16, segments=family == "Electra")
    network = Network(model, input)
    distiller = layers_of(network, fresh(layers=2), (1, 2), BATCH)
    sum(distiller(BATCH).values()).backward()
    with torch.no_grad():
        answer = distiller.task.run(network.eval(), BATCH, distiller._taps)
        wanted = model.base_model(
            **input(BATCH["text"]), output_attentions=True, output_hidden_states=True
        )
    scores = distiller.method.scores(answer, where, 1)
    assert torch.allclose(scores.softmax(-1), wanted.attentions[1], atol=1e-6)
    for path, state in zip((where.embedding, *where.hidden), wanted.hidden_states, strict=True):
        assert torch.allclose(answer.features[path], state, atol=1e-6)


# The augmentation.


def test_without_probability_nothing_is_made_and_what_is_made_is_new():
    words = ["a", "fine", "day"]
    assert replaced(words, {1: ["warm"]}, 20, 0.0, random.Random(0)) == []
    some = replaced(words, {1: ["warm", "cold", "fine"]}, 60, 0.5, random.Random(0))
    assert sorted(some) == ["a cold day", "a warm day"]
    assert some == replaced(words, {1: ["warm", "cold", "fine"]}, 60, 0.5, random.Random(0))


def test_each_place_is_replaced_as_often_as_is_said():
    words, options = ["x", "y"], {0: ["a"], 1: ["b"]}
    draw, changed = random.Random(0), 0
    for _ in range(4000):
        new = replaced(words, options, 1, 0.4, draw)
        changed += sum(text.split()[place] != words[place] for text in new for place in (0, 1))
    assert changed / 8000 == pytest.approx(0.4, abs=0.02)


class Favourites(nn.Module):
    """A language model that prefers tokens in the order of their ids, the last first."""

    def forward(self, fed, where):
        self.fed = fed
        return torch.arange(len(WORDS.tokens)).float().expand(int(where.sum()), -1)


def test_neither_stop_words_nor_digits_are_replaced_and_no_piece_of_a_word_comes_in(tmp_path):
    vectors = tmp_path / "vectors.txt"
    vectors.write_text("filmy 1 0\ngreat 0.9 0.1\nbad -1 0\nodd 0 1\n")
    text = "the film is filmy , 3 unheard !"
    split = Texts("train", ((text,),), None)
    language = Favourites()
    settings = Augmentation(copies=30, candidates=5, probability=1.0)
    augmenter = Augmenter(settings, WORDS, language, Neighbours(vectors, 3))
    words = WORDS.words(text)
    (found,) = augmenter.candidates([words])
    assert set(found) == {1, 3, 6}
    assert found[3] == ["great", "bad"], "the fourth vector is not read"
    assert found[6] == ["unheard"], "a word without a vector stays"
    names = {number: token for token, number in WORDS.tokens.items()}
    best = [names[len(names) - 1 - n] for n in range(5)]
    assert found[1] == [token for token in best if not token.startswith("##")]
    # [CLS] the [MASK] ... [SEP] the film ... [SEP], as the paper pairs them.
    assert (language.fed["token_type_ids"][0] == 1).any()
    (new,) = augmenter(split, [0])
    assert new
    assert all(other[0].split()[0] == "the" for other in new)
    assert replaceable("film")
    assert not any(map(replaceable, ("the", "3", "!", "naïve", "")))


def test_of_a_pair_one_side_changes_at_a_time():
    split = Texts("train", (("the film", "the play"),), None)
    settings = Augmentation(copies=5, candidates=3, probability=1.0, paired=False)
    (new,) = Augmenter(settings, WORDS, Favourites(), None)(split, [0])
    assert new
    assert all((a == "the film") != (b == "the play") for a, b in new)


def test_tokens_are_hidden_as_bert_was_trained():
    ids = torch.randint(5, 80, (200, 50), generator=torch.Generator().manual_seed(0))
    ids[:, 0], ids[:, -1] = 2, 0
    torch.manual_seed(0)
    hidden, chosen = masked(ids, special_ids(WORDS), 4, 80)
    assert not chosen[:, 0].any()
    assert not chosen[:, -1].any()
    assert torch.equal(hidden[~chosen], ids[~chosen])
    assert chosen[:, 1:-1].float().mean().item() == pytest.approx(0.15, abs=0.01)
    assert (hidden[chosen] == 4).float().mean().item() == pytest.approx(0.8, abs=0.03)
    assert (hidden[chosen] == ids[chosen]).float().mean().item() == pytest.approx(0.1, abs=0.03)


# The run.


def split(name, number, start=0):
    things, hows = ("film", "play"), ("fine", "dull", "odd")
    texts = tuple(
        (f"the {things[n % 2]} is {'not ' if n % 5 == 0 else ''}{hows[n % 3]}",)
        for n in range(start, start + number)
    )
    return Texts(name, texts, torch.tensor([(n % 3) % 2 for n in range(start, start + number)]))


def bench(**given) -> Bench:
    train = split("train", 48)
    given = {
        "task": TextClassification(("good", "bad")),
        "train": train,
        "transfer": train,
        "validation": split("validation", 12, 5),
        "test": split("test", 24, 7),
        "candidates": [Candidate(fresh(layers=2, seed=9), QUICK)],
        "make_student": lambda seed: fresh(width=6, seed=seed),
        "training": QUICK,
        "engine": CPU,
        **given,
    }
    return Bench(**given)


def method(**given):
    stages = dict.fromkeys(("pretraining", "general", "intermediate", "prediction"), QUICK)
    few = Augmentation(copies=2, paired=False)
    return TinyBERT(**{**stages, "augmentation": few, "rivals": ("prediction",), **given})


PHASES = [
    "language",
    "teacher",
    "augmentation",
    "baseline",
    "general",
    "intermediate",
    "student",
    "prediction",
]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    laid, names = bench(), []
    own = method()
    run = carry_out(
        tmp_path_factory.mktemp("t") / "run", own, laid, lambda phase: names.append(phase)
    )
    return own, laid, run, names


def test_the_stages_come_in_their_order_and_each_has_its_own_loss(done):
    _, laid, run, phases = done
    assert [phase.name for phase in phases] == PHASES
    terms = {}
    for line in run.metrics():
        terms.setdefault(line["phase"], set()).update(line.get("terms") or {})
    assert terms["general"] == terms["intermediate"] == {"embedding", "hidden", "attention"}
    assert terms["student"] == terms["prediction"] == {"prediction"}
    assert terms["language"] == {"masked words"}
    assert set(laid.delivered(0)) == {"teacher", "baseline", "student", "prediction"}
    assert not any(m._forward_hooks for m in laid.students[0].model.bert.encoder.modules())


def test_more_texts_make_more_steps_of_the_stages_that_read_them_alone(done):
    _, _, _, phases = done
    sizes = {phase.name: len(phase.batches.split) for phase in phases if hasattr(phase, "batches")}
    assert sizes["student"] == sizes["intermediate"] > 48
    assert sizes["general"] == sizes["baseline"] == sizes["prediction"] == 48
    alone = next(phase for phase in phases if phase.name == "prediction")
    assert alone.epochs == round(sizes["student"] / 48), "in as many steps"


def test_the_report_shows_where_they_look_and_what_was_made(done):
    own, laid, _, _ = done
    looks, made = own.findings(laid, [])
    assert set(looks.pictures) == {
        "teacher, layer 2",
        "TinyBERT, layer 1",
        "plain student, layer 1",
    }
    picture = looks.pictures["teacher, layer 2"]
    assert picture.dtype == torch.uint8
    assert picture.min() == 0
    assert "[CLS] the" in looks.caption
    assert made.table[0] == ["training text", "one made from it"]
    assert all(old != new for old, new in made.table[1:])


@pytest.mark.parametrize("phase", PHASES)
def test_a_run_goes_on_in_any_phase_where_it_failed(tmp_path, done, phase):
    whole = done[1]

    def break_off(found):
        if found.name != phase:
            return
        calls = {"n": 0}
        inner = found.updates[0].terms if hasattr(found, "updates") else found.run

        def failing(given):
            calls["n"] += 1
            if calls["n"] == 3 or not hasattr(found, "updates"):
                raise RuntimeError("as if the power had gone")
            return inner(given)

        if hasattr(found, "updates"):
            found.updates[0].terms = failing
        else:
            found.run = failing

    with pytest.raises(RuntimeError):
        carry_out(tmp_path / "run", method(), bench(), break_off)
    again = bench()
    carry_out(tmp_path / "run", method(), again)
    assert same(again.students[0], whole.students[0])
    assert same(again.baselines[0], whole.baselines[0])
    assert same(again.further["prediction"][0], whole.further["prediction"][0])


def test_a_teacher_that_is_ready_stays_as_it_is(tmp_path):
    teacher = fresh(layers=2, seed=9)
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    laid = bench(candidates=[Candidate(teacher)])
    carry_out(tmp_path / "run", method(rivals=()), laid)
    assert all(torch.equal(before[key], value) for key, value in teacher.state_dict().items())


OTHER = TextInput(word_pieces(["something else"], 60), 16)


@pytest.mark.parametrize(
    ("laid", "given", "sentence"),
    [
        (
            {"make_student": lambda seed: fresh(input=OTHER)},
            {},
            r"tokens and the teacher's .* are not the same .* data\.tokenizer",
        ),
        ({"make_student": lambda seed: fresh(heads=4)}, {}, "4 heads and the teacher 2"),
        ({"make_student": lambda seed: fresh(layers=3)}, {}, "cannot be shared out evenly"),
        ({}, {"layers": (3,)}, r"layers=\[3\] must name one of the teacher's layers, 1 to 2"),
        ({"candidates": []}, {}, "one teacher, not of 0"),
        ({"make_student": lambda seed: Network(nn.Linear(2, 2))}, {}, "must both read texts"),
        (
            {"make_student": lambda seed: Network(nn.Linear(2, 2), WORDS)},
            {},
            "the layers of Linear cannot be matched",
        ),
        ({}, {"text": "nowhere.txt"}, r"the text nowhere\.txt cannot be read"),
        ({}, {"pretraining": None}, "augmentation asks a masked language model"),
        ({}, {"augmentation": Augmentation(vectors="nowhere.txt")}, "word vectors nowhere"),
        (
            {},
            {"augmentation": Augmentation(language_model="hf:nowhere/at-all")},
            "no masked language model that can be reached",
        ),
    ],
)
def test_what_does_not_fit_is_found_before_training(laid, given, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        method(**given).rehearse(bench(**laid))
    assert "\n" not in str(caught.value)


def test_a_tokenizer_without_gaps_is_refused(full):
    given = {"candidates": [Candidate(fresh(layers=2, input=full), QUICK)]}
    laid = bench(make_student=lambda seed: fresh(input=full), **given)
    with pytest.raises(UserError, match=r"need the token \[MASK\], which the tokenizer has not"):
        method().rehearse(laid)


def test_it_works_on_texts_alone_and_adds_up_with_no_other_method():
    from limbeck.tasks.classification import Classification

    with pytest.raises(UserError, match="works on text, not on classification"):
        TinyBERT().rehearse(bench(task=Classification("ab")))
    with pytest.raises(UserError, match="phases of its own"):
        TinyBERT() + KD()


def test_a_published_language_model_fills_the_gaps(tmp_path):
    import transformers

    config = transformers.BertConfig(
        vocab_size=len(WORDS.tokens),
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
    )
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path / "mlm")
    config.vocab_size += 1
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path / "other")
    settings = Augmentation(copies=1, language_model=f"hf:{tmp_path / 'mlm'}")
    laid = bench()
    own = method(pretraining=None, general=None, rivals=(), augmentation=settings)
    own.rehearse(laid)
    carry_out(tmp_path / "run", own, laid)
    assert own.made
    other = Augmentation(copies=1, language_model=f"hf:{tmp_path / 'other'}")
    with pytest.raises(UserError, match="needs a language model of the teacher's tokens"):
        method(augmentation=other).rehearse(laid)


def test_the_papers_setting_is_stated():
    recipe = recipes.validate(recipes.preset(system("tinybert"), "paper", "sst2"))
    own = recipe.method()
    assert isinstance(own, TinyBERT)
    assert recipe.student.model == "tinybert-4"
    assert own.general.epochs == 3
    assert (own.general.batch_size, own.general.lr) == (256, 5e-5)
    assert (own.intermediate.epochs, own.intermediate.schedule) == (10, "constant")
    assert (own.prediction.epochs, own.prediction.batch_size) == (3, 32)
    assert (own.augmentation.copies, own.augmentation.candidates) == (20, 15)
    assert (own.augmentation.probability, own.temperature) == (0.4, 1.0)
