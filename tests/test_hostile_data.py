"""Damaged and hostile data of every domain: a sentence with the file's name, or a right reading."""

from __future__ import annotations

import gzip
import json
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from limbeck.data import boxed, parallel, tables, texts
from limbeck.errors import UserError
from limbeck.tasks import domain
from limbeck.training.progress import Voice

Edit = Callable[[Path], object]


def picture(path: Path, size=(40, 30), mode="RGB", colour=0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)


def bomb(path: Path) -> None:
    """An image that announces ten thousand million pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 0, 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000)))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + content + chunk(b"IEND", b""))


def voc(root: Path) -> None:
    corners = "<xmin>3</xmin><ymin>3</ymin><xmax>20</xmax><ymax>20</ymax>"
    for n in range(6):
        picture(root / "JPEGImages" / f"i{n}.png")
        file = root / "Annotations" / f"i{n}.xml"
        file.parent.mkdir(exist_ok=True)
        thing = f"<object><name>{'ab'[n % 2]}</name><bndbox>{corners}</bndbox></object>"
        file.write_text(f"<annotation>{thing}</annotation>")


def coco(root: Path) -> None:
    for n in range(6):
        picture(root / f"i{n}.png")
    images = [{"id": n, "file_name": f"i{n}.png"} for n in range(6)]
    boxes = [
        {"image_id": n, "category_id": (7, 90)[n % 2], "bbox": [3, 3, 10, 10]} for n in range(6)
    ]
    names = [{"id": 7, "name": "a"}, {"id": 90, "name": "b"}]
    content = {"images": images, "annotations": boxes, "categories": names}
    (root / "train.json").write_text(json.dumps(content))


def masks(root: Path) -> None:
    for n in range(8):
        picture(root / "train" / f"{n}.png", (32, 32), colour=(9 * n, 0, 0))
        mask = np.zeros((32, 32), np.uint8)
        mask[4:20, 4:20] = n % 2 + 1
        (root / "trainannot").mkdir(exist_ok=True)
        Image.fromarray(mask).save(root / "trainannot" / f"{n}.png")
    (root / "classes.txt").write_text("ground\na\nb\n")


def pairs(root: Path) -> None:
    for n in range(10):
        picture(root / "train" / f"{n}.png", (64, 32), colour=(n, 0, 0))


def lanes(root: Path) -> None:
    picture(root / "clips" / "0.jpg", (128, 72))
    line = {"lanes": [[10, 12, 14]], "h_samples": [30, 40, 50], "raw_file": "clips/0.jpg"}
    (root / "label_data.json").write_text((json.dumps(line) + "\n") * 6)


def table_of_texts(root: Path) -> None:
    lines = "".join(f"word {n}\t{n % 2}\n" for n in range(40))
    (root / "train.tsv").write_text(f"sentence\tlabel\n{lines}")


def json_lines(root: Path) -> None:
    lines = (json.dumps({"text": f"word {n}", "label": n % 2}) for n in range(40))
    (root / "train.jsonl").write_text("\n".join(lines) + "\n")


def translations(root: Path) -> None:
    (root / "train.en").write_text("".join(f"one {n}\n" for n in range(60)))
    (root / "train.de").write_text("".join(f"ein {n}\n" for n in range(60)))


def rows(root: Path) -> None:
    lines = "".join(f"{n},{2.5 * n},{'xy'[n % 2]}\n" for n in range(40))
    (root / "train.csv").write_text(f"a,b,c\n{lines}")


SOURCES: dict[str, tuple[str, str, Edit, dict[str, Any]]] = {
    "voc": ("detection", "voc:", voc, {}),
    "coco": ("detection", "coco:", coco, {}),
    "masks": ("segmentation", "masks:", masks, {}),
    "pairs": ("generation", "pairs:", pairs, {}),
    "lanes": ("lanes", "tusimple:", lanes, {"size": (32, 64)}),
    "tsv": ("text", "folder:", table_of_texts, {}),
    "jsonl": ("text", "folder:", json_lines, {}),
    "translation": ("translation", "", translations, {}),
    "table": ("tabular", "", rows, {}),
}
"""Kind of data -> task, how its source begins, what makes a good one, what else is said of it."""


def read(kind: str, root: Path) -> None:
    """Lay the data out and read all of them, as a run does before it trains."""
    task, before, _, words = SOURCES[kind]
    made = domain(task)
    ground = made(
        made.words_type(source=f"{before}{root}", **words),
        device=torch.device("cpu"),
        workers=0,
        voice=Voice(quiet=True),
    )
    for split in ground.splits.values():
        for _ in ground.task().batches(split, batch_size=64).epoch(0):
            pass


def put(*place: Any) -> Edit:
    """Put the last of these into the COCO file at the place of the others."""

    def edit(root: Path) -> None:
        content = at = json.loads((root / "train.json").read_text())
        for key in place[:-2]:
            at = at[key]
        at[place[-2]] = place[-1]
        (root / "train.json").write_text(json.dumps(content))

    return edit


def text(name: str, content: str | bytes) -> Edit:
    raw = content if isinstance(content, bytes) else content.encode()
    return lambda root: (root / name).write_bytes(raw)


def more(name: str, line: str | bytes) -> Edit:
    raw = line if isinstance(line, bytes) else line.encode("utf-8", "surrogatepass")
    return lambda root: (root / name).write_bytes((root / name).read_bytes() + raw + b"\n")


def pipe(name: str) -> Edit:
    return lambda root: ((root / name).unlink(), os.mkfifo(root / name))


DEEP = "[" * 100_000
I2 = "Annotations/i2.xml"
ENTITIES = "".join(f'<!ENTITY e{n} "{f"&e{n - 1};" * 50}">' for n in range(1, 9))
BILLION = f'<!DOCTYPE x [<!ENTITY e0 "ha">{ENTITIES}]><annotation>&e8;</annotation>'
FOREIGN = '<!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/passwd">]><annotation>&e;</annotation>'


@pytest.mark.parametrize("kind", list(SOURCES))
def test_good_data_are_read(kind, tmp_path):
    SOURCES[kind][2](tmp_path)
    read(kind, tmp_path)


@pytest.mark.parametrize(
    ("kind", "edit", "sentence"),
    [
        ("voc", text(I2, BILLION), "i2.xml is damaged: limit on input amplification"),
        ("voc", text(I2, FOREIGN), "i2.xml is damaged: undefined entity &e;"),
        ("voc", text(I2, "<?xml version='1.0' encoding='klingon'?><annotation/>"), "klingon"),
        ("voc", text(I2, "<html/>"), "i2.xml is no annotation but holds <html>"),
        ("voc", pipe(I2), "no .*i2.xml"),
        ("coco", text("train.json", DEEP), "train.json is damaged: .*nested too deeply"),
        ("coco", text("train.json", b'{"a": "\xff"}'), "train.json is damaged"),
        ("coco", pipe("train.json"), "train.json"),
        ("coco", put("images", 0, "id", []), r"has a box in image 0, which it does not list"),
        ("coco", put("images", 0, "id", 1), "train.json has two images with the id 1"),
        ("coco", put("annotations", 0, "image_id", {}), "train.json has a box in image '{}'"),
        (
            "coco",
            put("annotations", 0, "category_id", []),
            r"train.json has a box of category '\[\]",
        ),
        ("coco", put("categories", 0, "id", []), "train.json has a category without a whole numb"),
        ("coco", put("categories", 0, "id", 90), "train.json has two categories with the id 90"),
        ("coco", put("annotations", 0, "bbox", [10**400, 1, 2, 3]), "train.json has the box"),
        ("coco", put("images", 0, "file_name", "../../etc/passwd.png"), "lists ../../etc/passwd"),
        ("masks", lambda r: bomb(r / "trainannot/2.png"), "the mask .*2.png"),
        (
            "masks",
            lambda r: bomb(r / "train/2.png"),
            "train/2.png has more than the 64,000,000 pix",
        ),
        ("masks", text("trainannot/2.png", b""), "the mask .*2.png cannot be read as an image"),
        ("masks", text("train.txt", b"\xff\xff a\n"), r"\\xff\\xff, which line 1 of .*train.txt"),
        (
            "pairs",
            lambda r: bomb(r / "train/2.png"),
            "train/2.png has more than the 64,000,000 pix",
        ),
        ("pairs", lambda r: picture(r / "train/1.png", (1, 32)), "train/1.png is too narrow"),
        ("lanes", text("label_data.json", b"\xff\n"), "label_data.json is no text in UTF-8"),
        (
            "lanes",
            more("label_data.json", '{"lanes": [[NaN]], "h_samples": [3], "raw_file": "a"}'),
            "line 7 of .*label_data.json is no label",
        ),
        (
            "lanes",
            more("label_data.json", '{"lanes": [], "h_samples": [3], "raw_file": "/etc/hostname"}'),
            "/etc/hostname, which line 7 of .*label_data.json names, lies outside",
        ),
        ("lanes", more("label_data.json", DEEP), "line 7 of .*label_data.json is no label"),
        (
            "tsv",
            text("train.tsv", "text\ttext\tlabel\na\tb\t1\n"),
            "train.tsv names a column twice",
        ),
        ("tsv", more("train.tsv", b"\xff\t1"), "train.tsv is not text in UTF-8"),
        ("jsonl", more("train.jsonl", DEEP), "train.jsonl, line 41: no JSON object"),
        ("jsonl", more("train.jsonl", r'{"text": "\ud800", "label": 1}'), "sample 41: .*no text"),
        ("translation", more("train.de", "x"), "train.de has 61 lines, but .*train.en has 60"),
        ("translation", more("train.de", b"\xff"), "train.de is no text in UTF-8"),
        ("table", more("train.csv", b"1,2,\xff"), "the column 'c' holds binary and no classes"),
        ("table", more("train.csv", "1e999,2,x"), "row 41 of the column 'a' is infinite"),
    ],
)
def test_what_is_wrong_is_one_sentence_with_the_files_name(tmp_path, kind, edit, sentence):
    SOURCES[kind][2](tmp_path)
    edit(tmp_path)
    with pytest.raises(UserError, match=sentence) as caught:
        read(kind, tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_category_with_a_gap_before_it_is_read_rightly(tmp_path):
    coco(tmp_path)
    data = boxed.load(f"coco:{tmp_path}")
    assert data.classes == ("a", "b")
    assert data.train.labels is not None
    assert set(data.train.labels[:, 0].tolist()) == {1, 2}


def test_a_text_may_hold_what_other_programs_take_for_the_end_of_a_line(tmp_path):
    json_lines(tmp_path)
    more("train.jsonl", '{"text": "one\u2028two", "label": 1}')(tmp_path)
    data = texts.load(f"folder:{tmp_path}")
    assert ("one\u2028two",) in data.splits["train"].texts
    translations(tmp_path)
    more("train.en", "a\u2028b\x0bc\x85d")(tmp_path)
    more("train.de", "x")(tmp_path)
    found = parallel.load(str(tmp_path / "train.en").removesuffix("/train.en"), ("de", "en"))
    assert "a b c d" in found.train.target


def test_numbers_beyond_those_of_floats_lose_their_last_digits_alone(tmp_path):
    table = pa.table({"a": pa.array([2**64 - 1, 1] * 20, pa.uint64()), "c": ["x", "y"] * 20})
    pq.write_table(table, tmp_path / "t.parquet")
    assert tables.load(str(tmp_path / "t.parquet")).train.cells.max() == 2.0**64


def test_a_small_file_that_swells_is_not_read_to_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(parallel, "MOST_BYTES", 10_000)
    translations(tmp_path)
    (tmp_path / "train.en").unlink()
    (tmp_path / "train.en.gz").write_bytes(gzip.compress(bytes(10**7)))
    with pytest.raises(UserError, match=r"train\.en\.gz holds more than the 10,000 bytes"):
        read("translation", tmp_path)


@pytest.mark.parametrize(
    ("kind", "edits", "faults"),
    [
        (
            "voc",
            [text(I2, "<a>"), text("JPEGImages/i3.png", "x")],
            ["i2.xml is damaged", "i3.png cannot be read"],
        ),
        (
            "coco",
            [
                put("annotations", 0, "bbox", [1]),
                put("annotations", 1, "image_id", 99),
                put("images", 5, "file_name", "none.png"),
                text("i4.png", "x"),
            ],
            ["has the box [1]", "in image 99", "lists none.png", "i4.png cannot be read"],
        ),
        (
            "masks",
            [
                text("trainannot/1.png", "x"),
                lambda r: picture(r / "trainannot/2.png", (9, 9), "L"),
                lambda r: (r / "trainannot/3.png").unlink(),
                text("train/4.png", "x"),
            ],
            ["annot/1.png", "annot/2.png has 9 x 9", "3.png has no mask", "train/4.png cannot"],
        ),
        (
            "pairs",
            [text("train/1.png", "x"), text("train/3.png", "x")],
            ["train/1.png cannot", "train/3.png cannot"],
        ),
        (
            "lanes",
            [more("label_data.json", "{"), more("label_data.json", '{"lanes": 5}')],
            ["line 7 of", "line 8 of"],
        ),
        (
            "tsv",
            [more("train.tsv", "a\tb\tc"), more("train.tsv", "x"), more("train.tsv", "y\t")],
            ["line 42: 3 columns", "line 43: 1 columns", "holds '', which is no class"],
        ),
        (
            "jsonl",
            [
                more("train.jsonl", "{"),
                more("train.jsonl", "5"),
                more("train.jsonl", '{"label":1}'),
            ],
            ["line 41", "line 42", "no text"],
        ),
        (
            "table",
            [text("train.csv", "a,b,c\n" + "inf,1,x\n2,inf,y\n" * 20)],
            ["row 1 of the column 'a'", "row 2 of the column 'b'"],
        ),
    ],
)
def test_a_check_tells_all_faults_at_once(command, tmp_path, kind, edits, faults):
    task, before, make, words = SOURCES[kind]
    make(tmp_path)
    for edit in edits:
        edit(tmp_path)
    given = [w for k, v in words.items() for w in ("--set", f"data.{k}={list(v)}")]
    status, said, wrong = command("check-data", f"{before}{tmp_path}", "--task", task, *given)
    assert status == 2
    lines = said.splitlines()
    assert len(lines) == len(faults), said
    for fault in faults:
        assert any(fault in line for line in lines), said
    assert f"{len(faults)} faults" in wrong
