import gzip
import json
from pathlib import Path

import pytest

from limbeck.data import parallel
from limbeck.data.parallel import english, german, load
from limbeck.errors import UserError

ENGLISH = [f"sentence number {n}" for n in range(40)]
GERMAN = [f"Satz Nummer {n}" for n in range(40)]


def write(folder: Path, **files) -> Path:
    folder.mkdir(exist_ok=True)
    for name, lines in files.items():
        text = "\n".join(lines) + "\n"
        path = folder / name.replace("__", ".")
        if path.suffix == ".gz":
            path.write_bytes(gzip.compress(text.encode()))
        else:
            path.write_text(text, encoding="utf-8")
    return folder


def test_a_folder_has_a_file_for_each_split_and_language_packed_or_not(tmp_path):
    write(tmp_path / "c", train__en=ENGLISH, train__de__gz=GERMAN, val__en=["a"], val__de=["b"])
    write(tmp_path / "c", test_2016__en=["x "], test_2016__de=["y"])
    (tmp_path / "c" / "README.md").write_text("words")
    found = load(str(tmp_path / "c"), ("en", "de"))
    assert found.train.source == tuple(ENGLISH)
    assert found.train.target == tuple(GERMAN)
    assert (found.validation.target, found.test.source) == (("b",), ("x",))
    assert parallel.kind_of(str(tmp_path / "c")) == "parallel"
    every = [row for s in (found.train, found.validation, found.test) for row in s.rows.tolist()]
    assert len(set(every)) == 42


def test_the_direction_is_that_of_the_languages(tmp_path):
    write(tmp_path / "c", train__en=ENGLISH, train__de=GERMAN)
    assert load(str(tmp_path / "c"), ("de", "en")).train.source[0].startswith("Satz")


def test_what_a_source_lacks_is_held_out_by_the_identities_alone(tmp_path):
    write(tmp_path / "c", train__en=ENGLISH, train__de=GERMAN)
    one, other = (load(str(tmp_path / "c"), validation=0.2) for _ in range(2))
    assert (len(one.train), len(one.validation), len(one.test)) == (26, 6, 8)
    assert one.fingerprint() == other.fingerprint()
    assert not {*one.train.source} & {*one.test.source, *one.validation.source}


def test_lines_with_an_empty_side_are_left_out_and_said(tmp_path):
    write(tmp_path / "c", train__en=["", *ENGLISH], train__de=["zu viel", *GERMAN])
    found = load(str(tmp_path / "c"), ("en", "de"), validation=0)
    assert len(found.train) + len(found.test) == 40
    assert "1 train pairs with an empty side left out" in found.describe()


def test_a_table_has_two_columns_or_a_heading(tmp_path):
    rows = [f"{g}\t{n}\t{e}" for n, (g, e) in enumerate(zip(GERMAN, ENGLISH, strict=True))]
    write(tmp_path, headed__tsv=["de\tid\ten", *rows], plain__tsv=rows)
    found = load(f"tsv:{tmp_path}/headed.tsv", ("en", "de"))
    assert found.languages == ("en", "de")
    assert found.train.source[0].startswith("sentence")
    assert found.train.target[0].startswith("Satz")
    assert load(str(tmp_path / "plain.tsv")).train.target[0].isdigit()


@pytest.mark.parametrize("nested", [False, True])
def test_json_lines_are_objects_with_a_key_for_each_language(tmp_path, nested):
    found = [{"en": e, "de": g} for e, g in zip(ENGLISH, GERMAN, strict=True)]
    lines = [json.dumps({"translation": one} if nested else one) for one in found]
    write(tmp_path, text__jsonl=lines)
    assert load(str(tmp_path / "text.jsonl")).languages == ("en", "de")
    assert load(str(tmp_path / "text.jsonl"), ("de", "en")).train.source[0].startswith("Satz")


@pytest.mark.parametrize(
    ("source", "languages", "sentence"),
    [
        ("{}/none", None, "none does not exist"),
        ("nombers", None, "no parallel text 'nombers'; did you mean numbers"),
        ("numbers:{}", None, "numbers takes no path"),
        ("numbers", ("en", "de"), "in English and German only"),
        ("parallel:", None, "parallel wants a path"),
        ("tsv:{}/c", None, "c is a folder; tsv: wants a file"),
        ("parallel:{}/c/train.en", None, "is a file; parallel: wants the folder"),
        ("{}/c/train.en", None, "train.en is no parallel text that is known"),
        ("{}/c", None, "has train in de, en, fr; say which two with data.languages"),
        ("{}/c", ("en", "es"), "has no train.es; known: de, en, fr"),
        ("{}/uneven", None, r"has 40 lines, but .*train\.en has 39"),
        ("{}/bare", None, "has no file that begins with train"),
        ("{}/short.tsv", None, r"row 2 of .*short\.tsv has 1 columns, not 2"),
        ("{}/short.tsv", ("en", "de"), "has no column 'en'; known: a, b"),
        ("{}/bad.jsonl", None, r"line 2 of .*bad\.jsonl is no JSON"),
        ("{}/list.jsonl", None, "no JSON object with the two sentences"),
        ("{}/three.jsonl", None, "have the keys a, b, c; say which two"),
        ("{}/three.jsonl", ("a", "c"), "line 1 of .* has 'c' that is no text"),
        ("{}/latin.tsv", None, "is no text in UTF-8: byte 1 is foreign"),
        ("{}/cut.tsv.gz", None, "is no whole gzip file"),
        ("{}/one.tsv", None, "has too few sentences to train and to test on: 1"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(tmp_path, source, languages, sentence):
    write(tmp_path / "c", train__en=ENGLISH, train__de=GERMAN, train__fr=GERMAN)
    write(tmp_path / "uneven", train__de=GERMAN, train__en=ENGLISH[1:])
    write(tmp_path / "bare", text__en=ENGLISH)
    write(tmp_path, short__tsv=["a\tb", "c"], one__tsv=["a\tb"])
    write(tmp_path, bad__jsonl=['{"a": "b", "c": "d"}', "{"], list__jsonl=["[1]"])
    write(tmp_path, three__jsonl=['{"a": "x", "b": "y", "c": 3}'])
    (tmp_path / "latin.tsv").write_bytes("zürich\tx\n".encode("latin-1"))
    (tmp_path / "cut.tsv.gz").write_bytes(gzip.compress(b"a\tb\n" * 99)[:15])
    with pytest.raises(UserError, match=sentence) as caught:
        load(source.format(tmp_path), languages)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("number", "choices", "said"),
    [
        (100, (False,) * 4, "hundert"),
        (101, (True, True, True, True), "ein hundert und eins"),
        (1000, (False,) * 4, "tausend"),
        (1912, (False, False, False, True), "neunzehn hundert zwölf"),
        (2021, (True,) * 4, "zwei tausend ein und zwanzig"),
        (9990, (False,) * 4, "neun tausend neun hundert neunzig"),
    ],
)
def test_numbers_are_said_as_people_say_them(number, choices, said):
    assert german(number, choices) == said


def test_a_number_has_one_english_name():
    names = [english(n) for n in range(1, 10_000)]
    assert len(set(names)) == len(names)
    assert (names[10], names[99], names[1999]) == ("eleven", "one hundred", "two thousand")


def test_multi30k_is_read_as_it_lies(real_data):
    found = load(str(real_data("multi30k")), ("en", "de"))
    assert [len(s) for s in (found.train, found.validation, found.test)] == [29000, 1014, 800]
    assert found.train.target[2] == "Ein kleines Mädchen klettert in ein Spielhaus aus Holz."
