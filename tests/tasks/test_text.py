import json

import pytest
import torch
from sklearn.metrics import f1_score, matthews_corrcoef

from limbeck import distillation, recipes
from limbeck.data import grammar, texts
from limbeck.errors import UserError
from limbeck.models import build, load
from limbeck.models.text import TextInput, check_same_tokens, encoder, read_tokenizer, word_pieces
from limbeck.tasks.text import Text, TextClassification, TextWords
from limbeck.training.progress import Voice
from limbeck.training.trainer import _slices

QUIET = Voice(quiet=True)
SAID = ["the film is fine", "the play is dull", "a fine day", "Ünlikely"]
WORDS = TextInput(word_pieces(SAID, 60), 8)


# Data.


def written(folder, **files):
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        stem, _, suffix = name.rpartition("_")
        (folder / f"{stem}.{suffix}").write_text(content)
    return folder


TSV = 'sentence\tlabel\n"a fine day\t1\na dull one\t0\nfine\t1\ndull\t0\n'


def test_the_same_texts_are_read_from_every_format(tmp_path):
    rows = [("a, fine day", "good"), ("dull", "bad"), ('so "so"', "bad"), ("well", "good")]
    tsv = "text\tlabel\n" + "".join(f"{t}\t{y}\n" for t, y in rows)
    csv = "text,label\n" + "".join(f'"{t.replace(chr(34), 2 * chr(34))}",{y}\n' for t, y in rows)
    lines = "".join(json.dumps({"text": t, "label": y}) + "\n" for t, y in rows)
    found = [
        texts.load(f"folder:{written(tmp_path / kind, **{f'train_{kind}': said})}", 0.0)
        for kind, said in (("tsv", tsv), ("csv", csv), ("jsonl", lines))
    ]
    assert len({data.fingerprint() for data in found}) == 1
    assert found[0].classes == ("bad", "good")
    assert found[0].splits["train"].texts[0] == ("a, fine day",)
    assert (len(found[0].splits["train"]), len(found[0].splits["test"])) == (2, 2)


def test_quotes_are_letters_in_a_tsv_of_glue(tmp_path):
    data = texts.load(str(written(tmp_path / "set", train_tsv=TSV)), 0.0)
    assert ('"a fine day',) in data.splits["train"].texts


def test_a_test_file_without_labels_is_left_and_the_development_file_is_tested_on(tmp_path):
    hidden = "sentence\tlabel\nwho knows\t-1\n"
    folder = written(tmp_path / "set", train_tsv=TSV, dev_tsv=TSV, test_tsv=hidden)
    data = texts.load(f"folder:{folder}", 0.5)
    assert [len(data.splits[name]) for name in ("train", "validation", "test")] == [2, 2, 4]


def test_a_pair_is_known_by_its_columns_or_named(tmp_path):
    said = "id\tquestion\tsentence\tlabel\n" + "".join(
        f"{n}\tq{n}\ts{n}\t{n % 2}\n" for n in range(8)
    )
    folder = written(tmp_path / "set", train_tsv=said)
    data = texts.load(f"folder:{folder}")
    assert data.columns == ("question", "sentence")
    assert data.splits["train"].texts[3] == ("q3", "s3")
    alone = texts.load(f"file:{folder / 'train.tsv'}", columns=["sentence"])
    assert alone.splits["train"].texts[3] == ("s3",)


def test_a_data_set_of_the_library_is_read_from_its_folder(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    )
    rows = {"text": ["a", "b", "c", "d"] * 3, "label": [0, 1, 0, 1] * 3}
    whole = datasets.DatasetDict({"train": datasets.Dataset.from_dict(rows, features)})
    whole.save_to_disk(tmp_path / "kept")
    data = texts.load(f"hf:{tmp_path / 'kept'}", 0.0)
    assert data.classes == ("no", "yes")
    assert data.splits["train"].read(0) in {("a",), ("c",)} | {("b",), ("d",)}


@pytest.mark.parametrize(
    ("files", "given", "sentence"),
    [
        ({}, {}, "holds no training texts; wanted is a file named train.tsv"),
        ({"train_tsv": "a\tb\n1\t2\n"}, {}, "has no column 'label'; known: a, b"),
        ({"train_tsv": "a\tlabel\n1\t2\n"}, {}, r"does not say which column .* one or two of a,"),
        ({"train_tsv": TSV}, {"columns": ["sentense"]}, "no column 'sentense'; did you mean sen"),
        ({"train_tsv": TSV}, {"columns": ["label"] * 3}, "one text or two, not 3"),
        ({"train_tsv": TSV + "one cell\n"}, {}, "line 6: 1 columns instead of the 2"),
        ({"train_tsv": "sentence\tlabel\n"}, {}, "holds no samples below its headings"),
        (
            {"train_tsv": "sentence\tlabel\na\t1\nb\t\n"},
            {},
            "sample 2: the column 'label' holds ''",
        ),
        ({"train_tsv": "sentence\tlabel\na\t1\nb\t1\n"}, {}, "holds 1 different values"),
        ({"train_tsv": TSV, "dev_tsv": "sentence\tlabel\na\t7\n"}, {}, "sample 1: the label '7'"),
        ({"train_jsonl": "{}\nno\n"}, {}, "line 2: no JSON object"),
        (
            {"train_jsonl": '{"text": 3, "label": "a"}\n{"text": "b", "label": "b"}\n'},
            {},
            "holds no t",
        ),
        ({"train_jsonl": '{"text": "b", "label": 0.5}\n'}, {}, "holds 0.5, which is no class"),
    ],
)
def test_what_is_wrong_with_files_is_one_sentence(tmp_path, files, given, sentence):
    folder = written(tmp_path / "set", **files)
    with pytest.raises(UserError, match=sentence) as caught:
        texts.load(f"folder:{folder}", **given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("sst2", "sst2 lies in a folder of yours; say which, as in sst2:PATH"),
        ("gramar", "there are no texts at 'gramar'.* did you mean grammar"),
        ("sst2:nowhere", "there is no folder nowhere"),
        ("file:notes.pdf", "notes.pdf is no file of texts"),
        ("folder:", "names no place"),
    ],
)
def test_a_source_that_there_is_not_is_one_sentence(source, sentence):
    with pytest.raises(UserError, match=sentence):
        texts.load(source)


def test_real_sets_have_the_sizes_that_are_published(real_data):
    data = texts.load(f"sst2:{real_data('sst2')}")
    assert [len(s) for s in data.splits.values()] == [20000, 872, 1457]
    assert data.classes == ("negative", "positive")
    pairs = texts.load(f"qnli:{real_data('qnli')}")
    assert pairs.columns == ("question", "sentence")
    assert len(pairs.splits["test"]) == 1000


def test_a_remark_is_what_its_last_part_says():
    tables = grammar.tables()
    every = [row["text"] for rows in tables.values() for row in rows]
    assert len(set(every)) == len(every) == 5000
    for row in tables["test"]:
        words = row["text"].partition(" but ")[2] or row["text"]
        words = words.split(" the ")[-1].split() if "although" in words else words.split()
        found = [word for word in words if word in grammar.GOOD + grammar.BAD][-1]
        good = (found in grammar.GOOD) != ("not" in words)
        assert row["label"] == ("favourable" if good else "unfavourable"), row


def test_the_order_is_a_function_of_seed_and_epoch_and_starts_at_any_step():
    split = texts.Texts("train", tuple((("x" * (n % 17)),) for n in range(100)), None)
    batches = texts.TextBatches(split, 8, seed=3, train=True)
    first = [batch["row"].tolist() for batch in batches.epoch(1)]
    assert [batch["row"].tolist() for batch in batches.epoch(1, start=5)] == first[5:]
    assert first != [batch["row"].tolist() for batch in batches.epoch(2)]
    assert sorted(row for rows in first for row in rows) == list(range(100))
    assert len(first) == len(batches)
    lengths = [{len(split.texts[row][0]) for row in rows} for rows in first]
    assert max(max(some) - min(some) for some in lengths) < 6, "about as long"


def test_a_batch_of_texts_is_worked_off_in_slices():
    pieces = _slices({"text": [("a",), ("b",), ("c",)], "row": torch.arange(3)}, 2)
    assert [(piece["text"], share) for piece, share in pieces] == [
        ([("a",), ("b",)], pytest.approx(2 / 3)),
        ([("c",)], pytest.approx(1 / 3)),
    ]


# Tokens.


def test_a_tokenizer_is_the_same_for_the_same_texts_and_reads_pairs():
    assert word_pieces(SAID, 60) == WORDS.tokenizer
    fed = WORDS([("fine",), ("the film", "a fine day is dull")])
    assert fed["input_ids"].shape == (2, 8)
    assert fed["attention_mask"][0].tolist() == [1] * int(fed["attention_mask"][0].sum()) + [0] * (
        8 - int(fed["attention_mask"][0].sum())
    )
    assert fed["token_type_ids"][1].tolist().count(1) > 2
    assert WORDS.pieces(("the film",))[0] == "[CLS]"
    assert WORDS.words("Ünlikely, Film") == ["unlikely", ",", "film"]
    assert WORDS.tokens["[PAD]"] == 0


def test_no_text_can_say_a_token_that_stands_for_a_gap_but_the_gap_itself():
    assert "[MASK]" in WORDS.pieces(("a [MASK] day",))


def test_two_models_agree_on_tokens_or_hear_it_in_a_sentence():
    check_same_tokens(WORDS, TextInput(WORDS.tokenizer, 4), "for a reason")
    other = TextInput(word_pieces(["something else"], 60), 8)
    with pytest.raises(UserError, match=r"differ, such as .* for a reason; give the data"):
        check_same_tokens(WORDS, other, "for a reason")


def test_tokenizers_are_read_from_files_and_from_networks(tmp_path):
    (tmp_path / "tokenizer.json").write_text(WORDS.tokenizer)
    assert read_tokenizer(str(tmp_path / "tokenizer.json"), 8) == WORDS
    ordered = sorted(WORDS.tokens, key=WORDS.tokens.__getitem__)
    (tmp_path / "vocab.txt").write_text("\n".join(ordered))
    found = read_tokenizer(str(tmp_path / "vocab.txt"), 8)
    assert found.tokens == WORDS.tokens
    assert found([("the film",)])["input_ids"].equal(WORDS([("the film",)])["input_ids"])
    (tmp_path / "bad.txt").write_text("a\nb")
    for name, sentence in (
        ("bad.txt", "is no vocabulary of BERT"),
        ("none.json", "cannot be read"),
        ("folder", "no fast tokenizer"),
    ):
        with pytest.raises(UserError, match=sentence):
            read_tokenizer(str(tmp_path / name), 8)


# Networks.


def test_a_model_of_transformers_is_read_with_its_own_tokens(tmp_path):
    import transformers

    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=__import__("tokenizers").Tokenizer.from_str(WORDS.tokenizer),
        pad_token="[PAD]",
        model_input_names=["input_ids", "attention_mask"],
    )
    config = transformers.DistilBertConfig(
        vocab_size=len(WORDS.tokens), dim=8, n_layers=1, n_heads=2, hidden_dim=8, num_labels=3
    )
    folder = tmp_path / "model"
    transformers.DistilBertForSequenceClassification(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    network = build(f"hf:{folder}", ["a", "b", "c"], TextInput(WORDS.tokenizer, 6))
    assert not network.input.segments
    assert (network.input.tokens, network.input.length) == (WORDS.tokens, 6)
    assert network([("fine",)]).shape == (1, 3)
    assert encoder(network.model).heads == 2


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("bert-2-9-2", "the heads share the width evenly"),
        ("bret-2-8-2", "no model of text named 'bret-2-8-2'; did you mean bert-2-128-2"),
        ("resnet8", "no model of text named"),
        ("bert-base@pretrained", "ships no weights"),
        ("timm:resnet18", "no model of timm can be fed texts of up to 8 tokens"),
        ("hf:nowhere/at-all", "neither a folder written by save_pretrained nor"),
    ],
)
def test_a_model_that_there_is_not_is_one_sentence(name, sentence):
    with pytest.raises(UserError, match=sentence):
        build(name, ["a", "b"], WORDS)


def test_longer_texts_than_a_model_reads_are_one_sentence():
    with pytest.raises(UserError, match="reads 512 tokens at most, not 600; lower data"):
        build("bert-1-8-2", ["a", "b"], TextInput(WORDS.tokenizer, 600))


# The task.


@pytest.mark.parametrize("classes", [2, 3])
def test_measures_are_those_of_glue(classes):
    generator = torch.Generator().manual_seed(classes)
    logits = torch.randn(60, classes, generator=generator)
    labels = torch.randint(classes, (60,), generator=generator)
    found = TextClassification.measures(logits, labels)
    said, true = logits.argmax(1).numpy(), labels.numpy()
    average = "binary" if classes == 2 else "macro"
    assert found["f1"] == pytest.approx(f1_score(true, said, average=average), abs=1e-6)
    assert found["matthews"] == pytest.approx(matthews_corrcoef(true, said), abs=1e-6)
    assert found["accuracy"] == pytest.approx((said == true).mean(), abs=1e-6)


RECIPE = {
    "system": "kd",
    "task": "text",
    "data": {"source": "grammar", "vocabulary": 300, "length": 24, "limit": 64},
    "teacher": {"model": "bert-1-8-2", "training": {"epochs": 1, "optimiser": "adamw"}},
    "student": {"model": "bert-1-8-2", "training": {"epochs": 1, "optimiser": "adamw"}},
    "methods": {"kd": {}},
    "engine": {"device": "cpu"},
}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    recipe = recipes.validate(RECIPE)
    return distillation.start(recipe, tmp_path_factory.mktemp("text") / "run", QUIET)


def test_a_run_says_what_was_said_of_which_text(done):
    page = (done.path / "report.html").read_text()
    assert "What was said of which text" in page
    example = json.loads((done.path / "examples.json").read_text())[0]
    assert example["texts"][0] in page
    assert set(done.result()["measures"]["student"]) == {
        "accuracy",
        "f1",
        "matthews",
        "cross_entropy",
    }


def test_a_stored_student_brings_its_tokenizer_and_reads_on(done, tmp_path):
    student = load(done.path / "student")
    assert isinstance(student.input, TextInput)
    found = distillation.measure(f"run:{done.path}", "grammar")
    assert found["accuracy"] == done.result()["student"]
    (tmp_path / "note.txt").write_text("the film is fine\n")
    (entry,) = distillation.recognise(f"run:{done.path}", [tmp_path / "note.txt"])
    assert {guess["class"] for guess in entry["classes"]} == {"favourable", "unfavourable"}
    assert read_tokenizer(f"run:{done.path}", student.input.length) == student.input


def test_a_teacher_of_other_tokens_teaches_what_needs_none(done, tmp_path):
    change = {"data": {"vocabulary": 200}, "teachers": [{"model": f"run:{done.path}"}]}
    values = {k: v for k, v in recipes.merged(RECIPE, change).items() if k != "teacher"}
    again = distillation.start(recipes.validate(values), tmp_path / "run", QUIET)
    assert again.result()["teacher"] == done.result()["student"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"data": {"vocabulry": 1}}, r"no key 'data\.vocabulry'; did you mean vocabulary"),
        ({"data": {"tokenizer": "nowhere"}}, "nowhere has no fast tokenizer"),
        (
            {
                "student": {"augment": {"crop": 2}},
                "baseline": {"model": "bert-1-8-2", "augment": {}},
            },
            "texts are not augmented as images are",
        ),
        ({"methods": {"factor-transfer": {}}}, "no module 'stage3' to tap"),
    ],
)
def test_what_a_recipe_gets_wrong_is_one_sentence(tmp_path, change, sentence):
    with pytest.raises(UserError, match=sentence):
        distillation.start(recipes.validate(recipes.merged(RECIPE, change)), tmp_path / "r", QUIET)
    assert not (tmp_path / "r").exists()


def test_without_the_extra_the_sentence_names_it(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "tokenizers", None)
    words = TextWords(source="grammar")
    with pytest.raises(UserError, match=r"pip install 'limbeck\[text\]'"):
        Text(words, device=torch.device("cpu"), workers=0, voice=QUIET)
