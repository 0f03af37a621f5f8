"""The report: what is in it, that it is safe, and that a browser shows it."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from limbeck.errors import UserError
from limbeck.report import page
from limbeck.report.classification import confusion, most_changed, reliability
from limbeck.report.figures import panel, spread
from limbeck.training.finding import Chart, Finding
from limbeck.training.run import Run

EVIL = '<script>alert("1")</script>'
EVERYTHING = [
    "table",
    "curves",
    "cost",
    "agreement",
    "calibration",
    "confusion",
    "examples",
    "audit",
    "recipe",
    "environment",
]
CHROMIUM = Path("/usr/bin/chromium")


class Page(HTMLParser):
    """The elements of a page, and the text inside each kind of them."""

    VOID = ("meta", "link", "img", "br", "hr", "input")

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, str] = {}
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in self._open:
            self.text[tag] = self.text.get(tag, "") + data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def sections(self) -> list[str | None]:
        return [section["id"] for section in self.all("section")]


def read(run: Run) -> Page:
    return Page(page.write(run).read_text(encoding="utf-8"))


def change(run: Run, **facts: Any) -> None:
    path = run.path / "result.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **facts}))


def test_a_finished_run_has_all_sections_in_order(finished):
    found = read(finished)
    assert found.sections == EVERYTHING
    assert "kd on digits" in re.sub(r"\s+", " ", found.text["h1"])
    assert "Not decided: the distilled student differs" in found.text["p"]
    for said in ("teacher", "plain student", "distilled student", "20.41 k", "4.21 ms"):
        assert said in found.text["table"]
    assert "62.0 %" in found.text["table"]
    assert "system: kd" in found.text["pre"]
    assert "torch" in found.text["table"]


def test_every_figure_says_what_it_shows_and_how_to_read_it(finished):
    found = read(finished)
    assert len(found.all("figcaption")) == len(found.all("figure")) > 6
    panels = [d for d in found.all("div") if d.get("class") == "panel"]
    assert len(panels) == len(found.all("svg")) > 8
    assert all(p["role"] == "img" and p["aria-label"] for p in panels)
    assert all(i["alt"] for i in found.all("img"))


def test_the_page_holds_everything_it_shows(finished):
    text = page.write(finished).read_text(encoding="utf-8")
    assert not re.search(r"https?://", text.replace("http://www.w3.org/", "")), "outside address"
    found = Page(text)
    assert not found.all("script")
    assert [link["href"] for link in found.all("link")] == ["data:,"]
    assert all((i["src"] or "").startswith("data:image/png;base64,") for i in found.all("img"))
    assert "@import" not in found.text["style"]
    assert "url(" not in found.text["style"]


def test_identifiers_are_unique_and_references_lead_somewhere(finished):
    text = page.write(finished).read_text(encoding="utf-8")
    names = [a["id"] for _, a in Page(text).tags if "id" in a]
    assert len(names) == len(set(names))
    wanted = set(re.findall(r'(?:url\(|href=")#([^)"]+)', text))
    assert wanted <= set(names)


def test_the_page_reads_in_light_and_dark(finished):
    text = page.write(finished).read_text(encoding="utf-8")
    assert "prefers-color-scheme: dark" in text
    drawings = "".join(re.findall(r"<svg.*?</svg>", text, re.S))
    assert "currentColor" in drawings
    assert "var(--student)" in drawings
    assert not re.search(r"#[0-9a-f]{6}\b", drawings), "a colour that does not follow the reader's"


def test_the_same_run_makes_the_same_page(finished):
    assert page.write(finished).read_bytes() == page.write(finished).read_bytes()


def test_what_a_run_holds_never_becomes_markup(make_run, tmp_path):
    classes = (EVIL, '"><img src=x onerror=alert(2)>', "a & b", "$x^2$", "bell\x07")
    run = make_run(tmp_path / "run", classes=classes, data=f"/data/{EVIL}", recipe={"note": EVIL})
    with (run.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        entry = {"phase": EVIL, "seed": 0, "epoch": 1.0, "step": 1}
        file.write(json.dumps({**entry, "terms": {EVIL: 1.0}}) + "\n")
        file.write(json.dumps({**entry, "validation": {"accuracy": 0.5}}) + "\n")
        audit = {"values": {EVIL: 1.0}, "gradient_share": {EVIL: 1.0}}
        file.write(json.dumps({**entry, "audit": audit}) + "\n")
    found = read(run)
    assert not found.all("script")
    assert not [a for _, attributes in found.tags for a in attributes if a.startswith("on")]
    assert all((i["src"] or "").startswith("data:") for i in found.all("img"))
    for place in ("title", "h1", "pre", "td", "dd"):
        assert EVIL in found.text[place], place
    assert "<script>" in found.text["svg"], "the class is named in the figure, as text"
    assert "$x^2$" in found.text["svg"], "a name is no formula"


HOSTILE = (
    "<script>document.title='x'</script>",
    '"><img src=x onerror="document.title=1">',
    "</style></pre><svg onload=alert(1)>",
    "' onmouseover='alert(1)",
    "{{7*7}}{% raw %}",
    r"$\frac$ $\unknown{ _^",
    "two\nlines\tand\x00\x1b[31m\ufffe",
    "\U0001f600 \u202e \u05d0",
    "x" * 10_000,
)


@pytest.fixture(scope="module")
def hostile(make_run, tmp_path_factory) -> Run:
    """A run all of whose words want to be something else."""
    words = " ".join(HOSTILE[:6])
    path = tmp_path_factory.mktemp("hostile") / "run"
    run = _of(make_run, path, words)
    lines = {
        f"{word} {role}": [(0, 0.5), (9, 0.7)] for role in ("student", "x") for word in HOSTILE
    }
    found = Finding(
        title=words,
        caption=words,
        table=[["", *HOSTILE], [words, *HOSTILE]],
        charts=[Chart(words, words, words, lines)],
        pictures={words: torch.arange(64).view(8, 8).byte()},
    )
    change(
        run,
        system=words,
        preset=words,
        metric={"name": words, "higher_is_better": True},
        names={"student": words, "baseline": HOSTILE[6], "teacher": HOSTILE[7]},
        verdict={"word": "none", "sentence": words},
    )
    run.write_json("findings.json", {"findings": [found.as_json()]})
    run.write_json("environment.json", {word: [word] for word in HOSTILE})
    return run


def _of(make_run, path: Path, words: str) -> Run:
    run: Run = make_run(path, classes=HOSTILE, data=words, recipe={words: [words]})
    place = {"phase": words, "seed": 0, "epoch": 1.0, "step": 1}
    audit = {"values": {words: 1.0}, "gradient_share": {words: 1.0}}
    for line in ({"terms": {words: 1.0}}, {"validation": {words: 0.5}}, {"audit": audit}):
        run.log(place | line)
    run.logged()
    return run


def test_hostile_words_are_text_everywhere(hostile):
    found = read(hostile)
    assert not found.all("script")
    assert not [a for _, attributes in found.tags for a in attributes if a.startswith("on")]
    assert all((i["src"] or "").startswith("data:") for i in found.all("img"))
    assert "finding0" in found.sections
    for place in ("title", "pre", "td", "dd", "h2", "figcaption", "svg"):
        assert HOSTILE[0] in found.text[place], place
    assert "{{7*7}}" in found.text["td"]


def pixels(*shape: int) -> torch.Tensor:
    return torch.arange(64).view(8, 8).byte().expand(*shape, 8, 8).contiguous()


def scenes(path: Path) -> None:
    tensors = {"images": pixels(1, 3), "labels": pixels(1) % 3, "masks.student": pixels(1) % 2}
    save_file(tensors, path / "predictions.safetensors", {"classes": "\n".join(NAMES)})


def boxes(path: Path) -> None:
    corners, one = torch.tensor([[0.0, 0.0, 5.0, 5.0]]), torch.tensor([1])
    tensors = {"images": pixels(1, 3), "labels": one[None], "boxes": corners[None]}
    tensors |= {"student.of": one - 1, "student.scores": torch.ones(1)}
    tensors |= {"student.boxes": corners.clone(), "student.labels": one.clone()}
    save_file(tensors, path / "detections.safetensors", {"classes": "\n".join(NAMES)})


def sentences(path: Path) -> None:
    words = list(NAMES)
    said = {"source": words, "reference": words, "said": {"student": words}}
    (path / "predictions.json").write_text(json.dumps(said))


def texts(path: Path) -> None:
    shown = [{"position": n, "texts": [word]} for n, word in enumerate(NAMES)]
    (path / "examples.json").write_text(json.dumps(shown))


def columns(path: Path) -> None:
    tensors = {"places": torch.rand(4, 5), "curve.student": torch.rand(4, 5)}
    lines = "\n".join(f"{word}\t{word}" for word in NAMES)
    save_file(tensors, path / "curves.safetensors", {"columns": lines})


def images(path: Path) -> None:
    tensors = {"given": pixels(1, 1), "true": pixels(1, 3), "made.student": pixels(1, 3)}
    save_file(tensors, path / "made.safetensors")


NAMES = HOSTILE[:4]


@pytest.mark.parametrize(
    ("task", "left", "section", "facts"),
    [
        ("segmentation", scenes, "masks", {"class_iou": {"student": dict.fromkeys(NAMES, 0.5)}}),
        ("detection", boxes, "found", {"by_class": {"student": dict.fromkeys(NAMES, 0.5)}}),
        ("translation", sentences, "sentences", {}),
        ("text", texts, "texts", {}),
        ("tabular", columns, "curves-of-columns", {}),
        ("generation", images, "made", {"measures": {"student": dict.fromkeys(NAMES, 0.5)}}),
    ],
)
def test_hostile_words_are_text_in_every_task(make_run, tmp_path, task, left, section, facts):
    run = make_run(tmp_path / "run", classes=NAMES)
    change(run, task=task, names={"student": NAMES[0]}, **facts)
    left(run.path)
    found = read(run)
    assert section in found.sections
    assert not found.all("script")
    assert not [a for _, attributes in found.tags for a in attributes if a.startswith("on")]
    assert all((i["src"] or "").startswith("data:") for i in found.all("img"))
    assert NAMES[1][:20] in " ".join(found.text.values())


@pytest.mark.parametrize("word", HOSTILE, ids=range(len(HOSTILE)))
def test_any_word_can_be_drawn(word):
    drawn = panel("x", word, lambda axes: (axes.set_title(word), axes.plot([0, 1], label=word)))
    assert drawn.svg.count("<svg") == 1
    assert "<script" not in drawn.svg


@pytest.mark.parametrize(
    ("keys", "section"),
    [
        (("agreement",), "agreement"),
        (("parameters", "latency_ms"), "cost"),
    ],
)
def test_a_section_without_its_facts_is_left_out(make_run, tmp_path, keys, section):
    run = make_run(tmp_path / "run")
    change(run, **dict.fromkeys(keys))
    assert read(run).sections == [s for s in EVERYTHING if s != section]


def test_without_predictions_metrics_and_environment_the_rest_stands(make_run, tmp_path):
    run = make_run(tmp_path / "run")
    for name in ("predictions.safetensors", "metrics.jsonl", "environment.json"):
        (run.path / name).unlink()
    found = read(Run.open(run.path))
    assert found.sections == ["table", "cost", "agreement", "recipe"]


def test_without_images_there_are_no_examples(make_run, tmp_path):
    run = make_run(tmp_path / "run")
    path = run.path / "predictions.safetensors"
    kept = {k: v for k, v in load_file(path).items() if not k.startswith("example")}
    save_file(kept, path)
    found = read(run)
    assert found.sections == [s for s in EVERYTHING if s != "examples"]


def test_another_task_has_the_sections_that_all_have(make_run, tmp_path):
    run = make_run(tmp_path / "run")
    change(run, task="another")
    assert not {"calibration", "confusion", "examples"} & set(read(run).sections)


def test_a_model_trained_alone_is_compared_with_nothing(make_run, tmp_path):
    found = read(make_run(tmp_path / "run", roles=("student",)))
    assert found.sections == ["table", "curves", "calibration", "audit", "recipe", "environment"]
    assert "model" in found.text["table"]
    text = " ".join(found.text.values())
    assert "distilled" not in text
    assert "decided" not in text


def test_seeds_are_drawn_together_and_named(make_run, tmp_path):
    found = read(make_run(tmp_path / "run", seeds=3))
    assert "seeds 0, 1, 2" in found.text["p"]
    assert "one thin line a seed" in found.text["figcaption"]
    assert found.text["svg"].count("distilled student: kd") == 1
    assert "@" not in found.text["svg"]


def test_lines_of_several_rounds_are_not_said_to_be_seeds(make_run, tmp_path):
    run = make_run(tmp_path / "run", roles=("student",))
    for number in (1, 2):
        for step in (1, 2):
            line = {"phase": f"student@0.{number}", "epoch": float(step), "step": step}
            run.log({**line, "terms": {"loss": 1.0 / step}})
    page.write(run)
    caption = read(run).text["figcaption"]
    assert "one thin line each time a network is trained" in caption
    assert "a seed" not in caption


def test_a_long_training_makes_no_heavy_page(make_run, tmp_path):
    run = make_run(tmp_path / "run", roles=("student",))
    for step in range(20_000):
        run.log({"phase": "student", "epoch": step / 100, "step": step, "terms": {"loss": 1.0}})
    assert page.write(run).stat().st_size < 200_000


def test_values_that_are_not_finite_do_not_stop_the_report(make_run, tmp_path):
    run = make_run(tmp_path / "run", roles=("student",))
    run.log({"phase": "student", "epoch": 9.0, "step": 99, "terms": {"loss": float("nan")}})
    assert "curves" in read(run).sections


def test_an_unfinished_run_has_no_report(make_run, tmp_path):
    run = make_run(tmp_path / "run")
    (run.path / "result.json").unlink()
    with pytest.raises(UserError, match="not finished"):
        page.write(run)


def test_colour_images_and_large_ones_are_shown(make_run, tmp_path):
    run = make_run(tmp_path / "run")
    path = run.path / "predictions.safetensors"
    tensors = load_file(path)
    number = len(tensors["example_positions"])
    tensors["example_images"] = torch.randint(256, (number, 3, 300, 200), dtype=torch.uint8)
    save_file(tensors, path)
    images = read(run).all("img")
    assert images
    assert all(i.get("class") != "small" for i in images)
    assert path.stat().st_size > (run.path / "report.html").stat().st_size


def test_the_calibration_error_is_the_weighted_gap():
    # Two samples at 0.95, one right: gap 0.45; two at 0.65, both right: gap 0.35; mean 0.40.
    sure, unsure = [0.95, 0.05], [0.65, 0.35]
    found = reliability(np.array([sure, sure, unsure, unsure]), np.array([0, 1, 0, 0]))
    assert found.share.tolist() == [0.5, 0.5]
    assert found.accuracy.tolist() == [1.0, 0.5]
    assert found.error == pytest.approx(0.40)


def test_a_confusion_has_a_row_of_shares_for_each_true_class():
    found = confusion(np.array([0, 1, 1, 1, 2]), np.array([0, 0, 1, 1, 1]), 4)
    third = pytest.approx(1 / 3)
    assert found[0].tolist() == [0.5, 0.5, 0, 0]
    assert found[1].tolist() == [0, pytest.approx(2 / 3), third, 0]
    assert not found[2:].any()


def test_the_most_changed_classes_keep_their_order():
    difference = np.diag([0.1, 0.5, 0.0, -0.4])
    assert most_changed(difference, 2).tolist() == [1, 3]
    assert len(most_changed(np.eye(50))) == 20


def test_labels_move_apart_as_little_as_they_can():
    assert spread([0.9, 0.1, 0.5], 0.2) == [0.9, 0.1, 0.5]
    assert spread([0.5, 0.5, 0.5], 0.1) == pytest.approx([0.4, 0.5, 0.6])


def test_text_in_a_drawing_is_escaped():
    drawn = panel("x", "label", lambda axes: axes.set_title("<b>&amp;"))
    assert html.escape("<b>&amp;") in drawn.svg


def test_several_teachers_are_told_apart_in_the_same_colour(make_run, tmp_path):
    run = make_run(tmp_path / "run")
    for number in (1, 2, 3):
        for epoch in (1, 2):
            place = {"phase": f"teacher-{number}", "seed": 0, "epoch": epoch, "step": epoch}
            run.log({**place, "validation": {"accuracy": 0.9 + number / 100}})
    text = page.write(run).read_text(encoding="utf-8")
    drawing = re.findall(r"<svg.*?</svg>", text, re.S)[0]
    strokes = [x for x in re.findall(r'style="([^"]*)"', drawing) if "var(--teacher)" in x]
    dashes = {re.sub(r".*dasharray: ([^;]*).*|.*", r"\1", stroke) for stroke in strokes}
    # One is solid; each of three is dashed at its own width in the plot and in the legend.
    assert len(dashes) == 1 + 2 * 3
    assert "var(--other)" not in drawing


@pytest.mark.parametrize(
    "facts", [{"latency_ms": {"teacher": None, "student": {}}}, {"seeds": None}]
)
def test_null_facts_do_not_stop_the_report(make_run, tmp_path, facts):
    run = make_run(tmp_path / "run")
    agreement = {"baseline": None, "student": 0.9}
    change(run, **facts, agreement=agreement, seconds=None, verdict=None)
    assert {"table", "cost", "agreement"} <= set(read(run).sections)


# The page stands in a frame, since windows do not get as narrow as a phone, and tells it the facts.
CHECK = """
<script>
addEventListener("load", () => {
  const images = [...document.images], drawings = [...document.querySelectorAll("figure svg")];
  const shown = drawings.filter(d => d.getBBox().width > 0 && d.getBBox().height > 0);
  const wide = document.documentElement.scrollWidth > innerWidth;
  // Text is cut where it leaves its drawing.
  const cut = [...document.querySelectorAll("figure svg text")].filter(t => {
    const a = t.getBoundingClientRect(), b = t.ownerSVGElement.getBoundingClientRect();
    return Math.min(a.left - b.left, b.right - a.right, a.top - b.top, b.bottom - a.bottom) < -1;
  }).map(t => t.textContent);
  parent.postMessage(JSON.stringify({
    images: images.length, loaded: images.filter(i => i.naturalWidth > 0).length,
    drawings: drawings.length, shown: shown.length, wide, cut, width: innerWidth,
  }), "*");
});
</script>
"""
FRAME = """<!doctype html><body style="margin:0">
<script>addEventListener("message", m => { document.title = m.data; });</script>
<iframe src="report.html" style="border:0;width:WIDTHpx;height:6000px"></iframe>
"""


def browse(folder: Path, text: str, width: int, *flags: str) -> subprocess.CompletedProcess[str]:
    """Open the page ``width`` pixels wide."""
    (folder / "report.html").write_text(text, encoding="utf-8")
    frame = folder / "frame.html"
    frame.write_text(FRAME.replace("WIDTH", str(width)), encoding="utf-8")
    always = (
        "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking "
        f"disable-component-update disable-sync enable-logging=stderr v=0 hide-scrollbars "
        f"virtual-time-budget=3000 window-size={max(width, 500)},6000 "
        f"user-data-dir={folder / 'profile'}"
    )
    try:
        return subprocess.run(
            [CHROMIUM, *(f"--{flag}" for flag in (*always.split(), *flags)), frame.as_uri()],
            capture_output=True,
            text=True,
            timeout=50,
        )
    finally:
        shutil.rmtree(folder / "profile", ignore_errors=True)


def complaints(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def seen(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.S)
    assert title, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(html.unescape(title[1]))
    return found


needs_browser = pytest.mark.skipif(
    not CHROMIUM.exists(), reason="there is no Chromium at /usr/bin/chromium"
)


@needs_browser
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_all_of_it_and_complains_of_nothing(finished, tmp_path, width):
    text = page.write(finished).read_text(encoding="utf-8")
    done = browse(tmp_path, text.replace("</body>", CHECK + "</body>"), width, "dump-dom")
    found = seen(done)
    assert found["width"] == width
    assert found["images"] == found["loaded"] > 0
    assert found["drawings"] == found["shown"] > 8
    assert not found["wide"], "the page scrolls sideways"
    assert found["cut"] == []
    assert complaints(done) == []


@needs_browser
def test_a_browser_runs_nothing_of_what_hostile_words_say(hostile, tmp_path):
    text = page.write(hostile).read_text(encoding="utf-8")
    told = "<script>parent.postMessage(JSON.stringify({title: document.title}), '*')</script>"
    done = browse(tmp_path, text.replace("</body>", f"{told}</body>"), 1280, "dump-dom")
    assert HOSTILE[0] in seen(done)["title"], "the title is the words, and not what they say"
    assert complaints(done) == []


@needs_browser
def test_the_browser_would_have_told_of_a_fault(finished, tmp_path):
    fault = '<img src="data:image/png;base64,AAAA"><p style="width:3000px">x</p>'
    fault += '<script>console.error("planted")</script>'
    text = page.write(finished).read_text(encoding="utf-8")
    done = browse(tmp_path, text.replace("</body>", fault + CHECK + "</body>"), 390, "dump-dom")
    found = seen(done)
    assert found["images"] == found["loaded"] + 1
    assert found["wide"]
    assert "planted" in complaints(done)[0]


@needs_browser
@pytest.mark.parametrize("dark", [False, True])
def test_the_picture_on_the_screen_has_the_colours_of_the_page(finished, tmp_path, dark):
    text = page.write(finished).read_text(encoding="utf-8")
    text = text.replace("(prefers-color-scheme: dark)", "all" if dark else "not all")
    shot = tmp_path / "shot.png"
    browse(tmp_path, text, 1280, f"screenshot={shot}")
    with Image.open(shot) as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    assert pixels[0].tolist() == ([0x14, 0x17, 0x1B] if dark else [0xFB, 0xFA, 0xF8])
    student = [0x6D, 0xB5, 0xF7] if dark else [0x0A, 0x66, 0xB0]
    # The student's curves, bars and points: a blank or colourless drawing has none of it.
    assert (pixels == student).all(1).sum() > 2000


def test_what_only_a_method_found_is_shown_with_its_table_charts_and_pictures(make_run, tmp_path):
    run = make_run(tmp_path / "run", seeds=3)
    found = Finding(
        title="Percentiles",
        caption="Of one unit's <input>.",
        table=[["", "steps"], ["with", "40"]],
        charts=[
            Chart(
                "Median",
                "step",
                "input",
                {"student 50 %": [(0, 0.5), (9, 0.7)]},
                bands={"student 50 %": [(0, 0.4, 0.6), (9, 0.65, 0.8)]},
            )
        ],
        pictures={"unit 7": torch.arange(64).view(8, 8).byte()},
    )
    change(run, names={"student": "with batch norm", "baseline": "without"})
    run.write_json("findings.json", {"findings": [found.as_json()]})
    shown = read(run)
    assert "finding0" in shown.sections
    assert "Percentiles" in shown.text["h2"]
    assert "40" in shown.text["td"]
    assert any(
        "with batch norm 50 % from 0.5 to 0.7" in (d.get("aria-label") or "")
        for d in shown.all("div")
    )
    assert any(i["alt"] == "unit 7" for i in shown.all("img"))
    assert "FillBetween" in page.write(run).read_text(encoding="utf-8")
    assert "<input>" not in page.write(run).read_text(encoding="utf-8")


def test_a_chart_joins_no_points_that_are_dots(make_run, tmp_path):
    run = make_run(tmp_path / "run", seeds=3)
    points = {"baseline": [(0, 0.5), (5, 0.2), (9, 0.7)], "student": [(0, 0.5), (9, 0.7)]}

    def drawn(dots: tuple[str, ...]) -> str:
        found = Finding("Search", "", charts=[Chart("Search", "cost", "rating", points, dots)])
        run.write_json("findings.json", {"findings": [found.as_json()]})
        return page.write(run).read_text(encoding="utf-8")

    (joined, apart) = (drawn(dots).count("<use ") for dots in ((), ("baseline",)))
    assert apart - joined >= 3


def test_two_networks_that_are_compared_go_by_their_names(make_run, tmp_path):
    run = make_run(tmp_path / "run", seeds=3, roles=("baseline", "student"))
    change(run, names={"student": "densenet", "baseline": "stack"})
    shown = read(run)
    assert all(name in shown.text["table"] for name in ("densenet", "stack"))
    assert "distilled" not in shown.text["figcaption"] + shown.text["table"]
