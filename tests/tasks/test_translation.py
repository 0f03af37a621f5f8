import json
from dataclasses import replace

import pytest
import torch

from limbeck import distillation, recipes
from limbeck.data.parallel import Pairs
from limbeck.errors import UserError
from limbeck.models import build, save
from limbeck.models.sentences import END, PAD, Sentences
from limbeck.tasks.translation import ParallelText, Translation, TranslationWords, bleu
from limbeck.training.network import Network
from limbeck.training.progress import Voice
from limbeck.training.task import Answer
from limbeck.training.teacher import Teacher

SOURCE = [f"{a} {b}" for a in ("one", "two", "three") for b in ("men ride", "dogs", "big red cars")]
TARGET = [
    f"{a} {b}" for a in ("ein", "zwei", "drei") for b in ("Männer reiten", "Hunde", "rote Autos")
]
PAIRS = Pairs("train", tuple(SOURCE), tuple(TARGET), torch.arange(9))
TEXT = Sentences.trained(SOURCE, TARGET, 320, longest=12)
TASK = Translation(TEXT, beam=3)


def network(name="lstm-1x16", seed=0, text=TEXT):
    return build(name, text.vocabulary, text, seed)


def batch():
    return next(iter(TASK.batches(PAIRS, batch_size=9).epoch(0)))


def test_a_batch_holds_tokens_filled_up_and_those_before_them():
    found = batch()
    label, before = found["label"], found["before"]
    assert torch.equal(before[:, 1:][label[:, :-1] > END], label[:, :-1][label[:, :-1] > END])
    assert ((label == END).sum(1) == 1).all()
    assert TEXT.decode(label.tolist()) == TARGET
    assert found["row"].tolist() == list(range(9))
    assert (label == PAD).any()


def test_the_order_of_training_is_a_function_of_seed_and_epoch():
    def rows(seed, epoch, start=0):
        batches = TASK.batches(PAIRS, batch_size=2, seed=seed, train=True)
        return [b["row"].tolist() for b in batches.epoch(epoch, start)]

    assert rows(0, 1) == rows(0, 1) != rows(0, 2)
    assert rows(0, 1)[2:] == rows(0, 1, start=2)
    assert sorted(row for found in rows(1, 0) for row in found) == list(range(9))


def test_the_loss_is_a_mean_over_tokens_to_which_filling_does_not_count():
    found, net = batch(), network()
    logits = TASK.run(net, found)["logits"]
    total, tokens = 0.0, 0
    for row in range(9):
        for place, token in enumerate(found["label"][row].tolist()):
            if token != PAD:
                total -= float(logits[row, place].double().log_softmax(0)[token])
                tokens += 1
    loss = TASK.loss(Answer({"logits": logits}), found)
    assert loss.item() == pytest.approx(total / tokens, rel=1e-5)
    garbage = torch.where((found["label"] == PAD)[..., None], 1e4 * torch.rand(1), logits)
    assert TASK.loss(Answer({"logits": garbage}), found).item() == pytest.approx(loss.item())
    longer = torch.cat([found["label"], torch.full((9, 3), PAD)], 1)
    wide = torch.cat([logits, torch.zeros(9, 3, logits.shape[2])], 1)
    loss_of_longer = TASK.loss(Answer({"logits": wide}), {**found, "label": longer})
    assert loss_of_longer.item() == pytest.approx(loss.item(), rel=1e-6)


def test_perplexity_is_the_exponential_of_the_loss_over_the_whole_split():
    net = network()
    expected = float(TASK.loss(TASK.run(net.eval(), batch()), batch()).exp())
    assert TASK.measure(net, PAIRS)["perplexity"] == pytest.approx(expected, rel=1e-4)


def test_bleu_is_that_of_the_corpus_and_not_of_sentences():
    # 1-grams 5 of 6, 2-grams 3 of 4, 3-grams 2 of 2, 4-grams 1 of 1; as long as the reference.
    said, gold = ["a b c d e"], ["a b c d f"]
    expected = 100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25
    assert bleu(said, gold) == pytest.approx(expected)
    assert bleu([""], ["a b"]) == 0


def test_translations_come_in_the_order_of_the_sentences_and_leave_the_mode_as_it_was():
    net = network().train()
    together = TASK.translate(net, SOURCE, beam=3, best=3)
    assert net.training
    for n, sentence in enumerate(SOURCE):
        (alone,) = TASK.translate(net, [sentence], beam=3, best=3)
        assert [h.text for h in alone] == [h.text for h in together[n]]
        assert [h.score for h in alone] == pytest.approx([h.score for h in together[n]], abs=1e-4)


def test_two_vocabularies_are_told_apart_and_the_sequence_level_is_named():
    other = Sentences.trained(SOURCE, [t.upper() for t in TARGET], 320, longest=12)
    stranger = network(text=other)
    with pytest.raises(UserError, match=r"another target vocabulary than the data \(token") as said:
        TASK.run(stranger, batch())
    assert "as seq-kd with word: 0 does" in str(said.value)
    assert "\n" not in str(said.value)
    # Sentence by sentence it is as good as any.
    assert TASK.measure(stranger, PAIRS)["perplexity"] > 1
    longer = network(text=replace(TEXT, longest=5))
    assert TASK.run(longer, batch())["logits"].shape[0] == 9


def test_several_teachers_are_averaged_word_by_word_and_do_not_search():
    nets = [network(seed=n) for n in range(2)]
    logits = [TASK.run(n.eval(), batch())["logits"] for n in nets]
    mean = Teacher(nets)(TASK, batch())["logits"].softmax(-1)
    assert torch.allclose(mean, (logits[0].softmax(-1) + logits[1].softmax(-1)) / 2, atol=1e-6)
    with pytest.raises(UserError, match="2 teachers cannot search together"):
        TASK.translate(Teacher(nets), SOURCE)


def test_a_model_that_is_no_translator_is_one_sentence():
    with pytest.raises(UserError, match="Linear cannot translate: a model with encode and step"):
        TASK.translate(Network(torch.nn.Linear(2, 2)), SOURCE)


# The domain.


def ground(**words) -> ParallelText:
    given = {"source": "numbers", "vocabulary": 400, "longest": 12, **words}
    return ParallelText(
        TranslationWords(**given), device=torch.device("cpu"), workers=0, voice=Voice(quiet=True)
    )


def test_training_pairs_that_are_too_long_are_left_out_and_test_pairs_are_not():
    whole, part = ground(limit=300), ground(limit=300, longest=6)
    assert len(whole.splits["train"]) == 300 > len(part.splits["train"])
    assert len(whole.splits["test"]) == len(part.splits["test"])
    lengths = [len(t) for t in whole.text.encode("target", part.splits["train"].target)]
    assert max(lengths) <= 6
    with pytest.raises(UserError, match=r"at most 1 tokens a side; raise data\.longest"):
        ground(longest=1)


def test_a_stored_network_keeps_its_own_vocabulary(tmp_path):
    save(network(), tmp_path / "net", {"task": "translation"})
    there = ground(limit=300)
    assert there.network(f"file:{tmp_path / 'net'}").input == TEXT
    assert there.network("lstm-1x8", 0).input == there.text


RECIPE = {
    "system": "train",
    "task": "translation",
    "data": {"source": "numbers", "limit": 200, "vocabulary": 400, "longest": 12},
    "student": {"model": "transformer-1x32", "training": {"epochs": 1, "optimiser": "adam"}},
    "baseline": False,
    "engine": {"device": "cpu"},
}


def test_a_run_is_reported_with_its_sentences_and_evaluated_by_its_folder(tmp_path):
    run = distillation.start(recipes.validate(RECIPE), tmp_path / "run", Voice(quiet=True))
    result, page = run.result(), (run.path / "report.html").read_text()
    assert result["metric"] == {"name": "BLEU", "higher_is_better": True}
    assert set(result["measures"]["student"]) == {
        "BLEU",
        "perplexity",
        "BLEU, beam 5",
        "mode mass",
    }
    written = json.loads((run.path / "predictions.json").read_text())
    assert len(written["said"]["student"]) == len(written["source"]) == 329
    assert "What the networks say" in page
    assert "Greedy and beam search" in page
    assert written["source"][0] in page
    found = distillation.measure(f"run:{run.path}", "numbers")
    assert found["BLEU"] == pytest.approx(result["student"])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"data": {"source": "folder:none"}}, "the data path folder:none does not exist|no parall"),
        ({"data": {"vocabulary": 20}}, r"recipe key data\.vocabulary=20"),
        ({"data": {"languages": ["en"]}}, r"the recipe lacks the key 'data\.languages\.1'"),
        ({"data": {"augment": {}}}, r"no key 'data\.augment', which is of the task class"),
        ({"student": {"model": "resnet8"}}, "no network named 'resnet8' that translates"),
        ({"baseline": {"augment": {}, "model": "lstm-1x8"}}, "sentences are not augmented"),
        ({"methods": {"kd": {}}, "teacher": {"model": "lstm-1x8"}}, "KD works on classification"),
    ],
)
def test_what_cannot_be_translated_is_one_sentence(tmp_path, change, sentence):
    def run():
        recipe = recipes.validate(recipes.merged(RECIPE, change))
        distillation.start(recipe, tmp_path / "run", Voice(quiet=True))

    with pytest.raises(UserError, match=sentence) as caught:
        run()
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
