import inspect
import json
import re
import subprocess
import sys
from datetime import date
from pathlib import Path

import pytest

from limbeck import catalogue
from limbeck.catalogue import system, systems
from limbeck.errors import UserError
from limbeck.training.method import Method
from limbeck.training.parameters import schema

FOLDER = Path(catalogue.__file__).parent / "systems"
ALL = list(systems().values())
each = pytest.mark.parametrize("chosen", ALL, ids=lambda s: s.slug)


def test_every_file_is_one_system_and_they_come_in_the_order_of_their_numbers():
    files = {path.stem.replace("_", "-") for path in FOLDER.glob("*/*.yaml")}
    assert {s.slug for s in ALL} == files
    assert len(files) == len(list(FOLDER.glob("*/*.yaml")))
    numbers = [s.paper.number for s in ALL]
    assert numbers == sorted(set(numbers))


@each
def test_a_paper_says_what_a_reader_needs_to_find_it(chosen):
    paper = chosen.paper
    assert paper.title.strip() == paper.title != ""
    assert paper.authors
    assert all(isinstance(name, str) and name.strip() for name in paper.authors)
    assert isinstance(paper.year, int)
    assert 1990 <= paper.year <= date.today().year
    assert paper.venue
    assert paper.link.startswith("https://")
    for tags in (paper.knowledge, paper.scheme, paper.kind, paper.task):
        assert isinstance(tags, tuple)
        assert all(isinstance(tag, str) and tag for tag in tags)
    assert set(paper.knowledge) <= {"response", "feature", "relation"}
    assert set(paper.scheme) <= {"offline", "online", "self"}
    assert paper.task


@each
def test_the_method_is_in_the_file_beside_and_its_docstring_names_the_paper(chosen):
    place = FOLDER / chosen.domain / chosen.slug.replace("-", "_")
    file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    top = file.read_text(encoding="utf-8").split('"""')[1]
    assert chosen.paper.title in " ".join(top.split())
    assert str(chosen.paper.year) in top
    if not chosen.method:
        assert chosen.networks
        return
    for name in chosen.methods():
        kind = catalogue.method_class(name)
        assert issubclass(kind, Method)
        assert Path(inspect.getfile(kind)).is_relative_to(place if place.is_dir() else file)
        kind()  # the defaults are within their own limits
        for name, field in schema(kind).model_fields.items():
            assert not field.is_required(), name


@each
def test_a_measured_result_can_be_repeated(chosen):
    assert chosen.idea.strip()
    assert chosen.equations.strip()
    for result in chosen.results:
        assert set(result) == {"data", "effect", "figures", "command", "machine", "date"}
        assert result["command"].startswith("limbeck ")
        assert result["date"] <= date.today()
        named = re.findall(r"limbeck run (\S+)", result["command"])
        assert all(name in systems() for name in named)


@each
def test_an_effect_is_one_of_the_figures(chosen):
    for result in chosen.results:
        effect, figures = result["effect"], result["figures"]
        word = re.match("better|worse|not decided|one seed", effect)
        assert word, effect
        assert word[0] == "one seed" or word[0] in figures.lower(), effect
        (number,) = re.findall(r"[-+]?\d+\.\d+", effect)
        # Of two figures of one seed, or of a spread, the difference is not spelt out.
        assert number.lstrip("+-") in figures or "difference" not in figures, effect


def test_what_is_listed_as_json_is_what_the_file_says():
    (kd,) = (s.as_json() for s in ALL if s.slug == "kd")
    assert json.loads(json.dumps(kd)) == kd
    assert (kd["number"], kd["year"], kd["domain"]) == (4, 2015, "classification")
    assert kd["authors"] == ["Geoffrey Hinton", "Oriol Vinyals", "Jeff Dean"]
    assert kd["presets"] == list(system("kd").presets)


def test_a_wrong_slug_gets_the_near_ones():
    with pytest.raises(UserError, match="there is no system 'kdd'; did you mean kd"):
        system("kdd")
    with pytest.raises(UserError, match="there is no system ''; known: "):
        system("")


@pytest.mark.parametrize("words", [["list"], ["list", "--json"], ["--help"], ["run", "--help"]])
def test_what_only_looks_needs_no_torch(words):
    code = (
        "import sys; sys.argv = ['limbeck', *sys.argv[1:]]\n"
        "from limbeck import cli\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, *words], check=True, capture_output=True)
