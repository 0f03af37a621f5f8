import os
import time
from pathlib import Path

import pytest

from limbeck import recipes
from limbeck.catalogue import method_class, system, systems
from limbeck.errors import UserError
from limbeck.models import Input, build
from limbeck.systems.classification.kd import KD
from limbeck.training.method import Method, Supervised

MINIMAL = {"system": "kd", "data": {"source": "digits"}, "student": {"model": "mlp-8"}}


def test_a_preset_that_is_changed_leaves_the_catalogue_as_it_was():
    kd = system("kd")
    recipes.preset(kd, "smoke", "digits")["student"]["training"]["epochs"] = 77
    assert recipes.preset(kd, "smoke", "digits")["student"]["training"]["epochs"] != 77


@pytest.mark.parametrize("slug", list(systems()))
def test_every_preset_is_a_valid_recipe_for_every_kind_of_data(slug):
    chosen = system(slug)
    assert {"smoke", "small", "paper"} <= set(chosen.presets)
    assert all(issubclass(method_class(name), Method) for name in chosen.methods())
    for name, content in chosen.presets.items():
        for kind in ("digits", *content.get("for", {})):
            recipe = recipes.validate(recipes.preset(chosen, name, kind))
            assert (recipe.system, recipe.preset) == (slug, name)


def test_papers_are_told_apart_by_their_numbers():
    papers = [s.paper for s in systems().values()]
    assert len({p.number for p in papers}) == len(papers)
    assert all(p.link.startswith("https://") and 1990 < p.year < 2030 and p.authors for p in papers)


def test_the_published_pair_of_kd_has_the_published_sizes():
    recipe = recipes.validate(recipes.preset(system("kd"), "paper", "cifar100"))
    classes = [str(c) for c in range(100)]
    input = Input(3, (32, 32), (0.5,) * 3, (0.25,) * 3)
    sizes = {
        part.model: sum(p.numel() for p in build(part.model, classes, input).parameters())
        for part in (*recipe.teachers, recipe.student)
    }
    assert sizes == {"resnet56": 861_620, "resnet20": 278_324}
    training = recipe.student.training
    rates = {epoch: training.lr * training.factor(epoch) for epoch in (0, 149, 150, 180, 210)}
    expected = {0: 0.05, 149: 0.05, 150: 0.005, 180: 5e-4, 210: 5e-5}
    assert rates == {epoch: pytest.approx(rate) for epoch, rate in expected.items()}


def test_method_and_teacher_are_short_for_the_first_method_and_every_teacher():
    values = recipes.with_teachers(
        recipes.preset(system("kd"), "smoke", "digits"), ["vgg8", "resnet8"]
    )
    words = ["method.temperature=7", "teacher.training.epochs=1", "student.training.lr=0.5"]
    recipe = recipes.validate(recipes.assigned(values, words))
    method = recipe.method()
    assert isinstance(method, KD)
    assert method.temperature == 7
    assert [t.model for t in recipe.teachers] == ["vgg8", "resnet8"]
    assert [t.training.epochs for t in recipe.teachers] == [1, 1]
    assert recipe.student.training.lr == 0.5


def test_a_recipe_without_methods_learns_from_labels():
    assert isinstance(recipes.validate(MINIMAL).method(), Supervised)


def test_a_recipe_survives_being_written_and_read():
    recipe = recipes.validate(recipes.preset(system("kd"), "small", "mnist"))
    assert recipes.validate(recipe.model_dump(mode="json")) == recipe


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"sead": 1}, "no key 'sead'; did you mean seed"),
        ({"data": {"sorce": "digits"}}, "no key 'data.sorce'; did you mean source"),
        ({"engine": {"precision": "fp8"}}, "engine.precision='fp8'"),
        ({"student": {"training": {"lr": float("nan")}}}, "student.training.lr=nan"),
        ({"teachers": [{"modle": "x"}]}, "did you mean model|lacks the key"),
        ({"data": None}, "recipe key data=None"),
        ({"methods": {"kdd": {}}}, "no system 'kdd'; did you mean kd"),
        ({"methods": {"kd": {"weight": -1}}}, r"KD\(weight=-1\)"),
        ({"method": 3}, "a mapping of parameters is wanted"),
        ({"seed": 10**400}, "recipe key seed="),
        ({"seed": 10**5000}, "recipe key seed=a int: "),
        ({"data": {"augment": {"cropp": 1}}}, "no key 'data.augment.cropp'; did you mean crop"),
        ({"data": {"transfer": {"onli": [1]}}}, "'data.transfer.onli'; did you mean only"),
        ({"data": {"transfer": {"fraction": 0}}}, "data.transfer.fraction=0"),
        ({"data": {"size": [0, 8]}}, r"data.size.0=0"),
        (
            {"student": {"training": {"nesterov": True, "momentum": 0}}},
            "nesterov=True: .*momentum",
        ),
        ({"student": {"trainin": {}}}, "'student.trainin'; did you mean training"),
        ({"student": {"training": {"epoch": 1}}}, "'student.training.epoch'; did you mean epochs"),
        ({"student": {"training": {"epochs": "many"}}}, "student.training.epochs='many'"),
        ({"student": "mlp-8"}, "recipe key student='mlp-8'"),
        ({"teachers": [{"model": "x", "trainin": {}}]}, "'teachers.0.trainin'; did you mean train"),
        ({"teachers": 3}, "recipe key teachers=3"),
        ({"teacher": 3}, "recipe key teachers.0=3"),
        ({"teacher": {}, "teachers": []}, "the key teacher or the key teachers, not both"),
        ({"engine": {"workerz": 1}}, "'engine.workerz'; did you mean workers"),
        ({"engine": {"cache": "top-0"}}, "engine.cache='top-0': answers are kept in full, in fp16"),
        ({"engine": {"compile": "perhaps"}}, r"engine.compile='perhaps': .* or as graphs"),
        ({"engine": {"threads": 0}}, "engine.threads=0"),
        ({"data": {"augment": {"views": 0}}}, "data.augment.views=0"),
        ({"data": {"augment": {"rand_magnitude": 31}}}, "rand_magnitude=31"),
        ({"weights": [1, float("nan")]}, "weights.1=nan"),
        ({"seeds": 0}, "seeds=0"),
        ({"mean": "median"}, "mean='median'"),
        ({"task": "sequences"}, "there is no task 'sequences'; did you mean sequence"),
        ({1: 2}, "recipe key 1: 1 is no word"),
        ({"\ud800": 2}, "is no word"),
        ({"system": [1], "method": {}}, r"recipe key system=\[1\]"),
        ({"methods": {"kd:": {}}}, "no system 'kd:'; did you mean kd"),
        ({"baseline": {"modle": 1}}, "no key 'baseline.modle'; did you mean model"),
        ({"baseline": {"model": "x", "training": {"epocs": 1}}}, "'baseline.training.epocs'; did"),
        ({"student": 3}, "recipe key student=3: a mapping of keys to values is wanted"),
        ({"engine": {"cache_folder": 3}}, "engine.cache_folder=3: a path is wanted"),
        ({"engine": {"checkpoint_seconds": float("inf")}}, "checkpoint_seconds=inf"),
        ({"student": {"training": {"milestones": [10**400]}}}, "milestones.0=1000.* means nothing"),
        ({"task": "sequence", "data": {"sequence": [1]}}, "data.sequence.0=1: a list is wanted"),
        ({"called": [[[[[[[[[[[[[[[[[[[[[]]]]]]]]]]]]]]]]]]]]]}, "called.*nested too deeply"),
        ({"methods": {"kd": {"temprature": 1}}}, "no parameter 'temprature'; did you mean temper"),
        ({"methods": {"kd": {"temperature": 0}}}, r"KD\(temperature=0\)"),
        ({"methods": {"kd": 3}}, "methods.kd=3"),
        ({"methods": 3, "method": {}}, "a mapping from systems to parameters is wanted"),
        ({"methods": {"kd": 3}, "method": {}}, "a mapping of parameters is wanted"),
    ],
)
def test_a_wrong_recipe_is_one_sentence(change, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        recipes.validate(recipes.merged(MINIMAL, change))
    assert "\n" not in str(caught.value)


def test_overrides_are_plain_values():
    assert recipes.overrides(["a.b=[1, x]", "a.c=1e-3", "d=null"]) == {
        "a": {"b": [1, "x"], "c": "1e-3"},
        "d": None,
    }
    deep = "a." * 5000 + "b=1"
    for word in ("a", "=1", "a..b=1", deep, "a=!!python/name:os.system", "a=[", "a={{}}"):
        with pytest.raises(UserError):
            recipes.overrides([word])


def test_values_are_merged_key_by_key_and_the_originals_are_left_alone():
    base = {"a": {"b": 1, "c": {"d": 2}}, "l": [1, 2]}
    over = {"a": {"c": {"e": 3}}, "l": [3], "n": None}
    found = recipes.merged(base, over)
    assert found == {"a": {"b": 1, "c": {"d": 2, "e": 3}}, "l": [3], "n": None}
    found["a"]["c"]["d"] = 9
    assert base == {"a": {"b": 1, "c": {"d": 2}}, "l": [1, 2]}
    assert recipes.merged({"a": {"b": 1}}, {"a": 3}) == {"a": 3}
    assert recipes.merged({"a": 3}, {"a": {"b": 1}}) == {"a": {"b": 1}}


def test_later_words_win_and_words_for_the_same_place_add_up():
    assert recipes.overrides(["a.b=1", "a.c=2", "a.b=3"]) == {"a": {"b": 3, "c": 2}}
    assert recipes.overrides([" a.b =x=y"]) == {"a": {"b": "x=y"}}
    assert recipes.overrides(["a={b: 1}", "a.c=2"]) == {"a": {"b": 1, "c": 2}}


@pytest.mark.parametrize(
    "text", ["!!timestamp x", "!!bool x", "!!int ''", "!!float x", "!!binary é", "\0", "[" * 5000]
)
def test_a_value_with_a_wrong_tag_is_no_value(text, tmp_path):
    with pytest.raises(UserError, match="is no YAML value"):
        recipes.overrides([f"seed={text}"])
    (tmp_path / "r.yaml").write_text(f"seed: {text}", encoding="utf-8")
    with pytest.raises(UserError, match=r"r\.yaml is no YAML that a recipe can be read from: .+"):
        recipes.read(tmp_path / "r.yaml")


@pytest.mark.parametrize("teachers", [3, "vgg8", [3], {"model": "vgg8"}, [[]]])
def test_words_for_teachers_that_are_none_are_one_sentence(teachers):
    for change in (
        lambda values: recipes.assigned(values, ["teacher.training.epochs=1"]),
        lambda values: recipes.with_teachers(values, ["vgg8"]),
    ):
        with pytest.raises(UserError, match="recipe key teachers: a list of mappings"):
            change({**MINIMAL, "teachers": teachers})
    for word in ("teacher=3", "teacher=[]"):
        with pytest.raises(UserError, match="a key of the teacher is wanted"):
            recipes.assigned(MINIMAL, [word])


def test_a_teacher_that_is_asked_for_needs_no_teacher_in_the_recipe():
    assert recipes.with_teachers(MINIMAL, ["vgg8"])["teachers"] == [{"model": "vgg8"}]
    words = ["teacher.model=vgg8", "teacher.training.epochs=2"]
    recipe = recipes.validate(recipes.assigned(MINIMAL, words))
    assert [(t.model, t.training.epochs) for t in recipe.teachers] == [("vgg8", 2)]


def test_the_method_shorthand_reaches_the_first_method_only():
    values = {**MINIMAL, "methods": {"kd": {"weight": 0.5}}, "method": {"temperature": 2}}
    assert recipes.validate(values).methods == {"kd": {"weight": 0.5, "temperature": 2}}
    recipe = recipes.validate({**MINIMAL, "method": {"temperature": 3}})
    assert recipe.methods == {"kd": {"temperature": 3}}


def test_a_preset_is_fitted_to_the_kind_of_data_and_the_rest_of_it_stays():
    kd = system("kd")
    plain, fitted = (recipes.preset(kd, "small", kind) for kind in ("digits", "cifar10"))
    section = kd.presets["small"]["for"]["cifar10"]
    assert "for" not in plain
    assert "for" not in fitted
    assert plain["student"] == kd.presets["small"]["student"]
    assert fitted["student"]["model"] == section["student"]["model"]
    assert fitted["methods"] == plain["methods"]
    assert recipes.preset(kd, "small", "folder") == plain
    assert recipes.preset_source(kd, "small") == "digits"
    with pytest.raises(UserError, match="kd has no preset 'smoll'; did you mean small"):
        recipes.preset(kd, "smoll", "digits")


def test_presets_are_not_changed_by_what_is_made_of_them():
    before = repr(system("kd").presets)
    words = ["teacher.model=x", "student.training.epochs=9", "method.weight=0"]
    recipes.validate(recipes.assigned(recipes.preset(system("kd"), "small", "mnist"), words))
    assert repr(system("kd").presets) == before


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "holds no mapping"),
        (b"- 1", "holds no mapping"),
        (b"kd", "holds no mapping"),
        (b"a: b: c", "is no YAML that a recipe"),
        (b"\xff\xfe\x00", "is no YAML that a recipe"),
        (b"a: *nowhere", "is no YAML that a recipe"),
        (b"a: !!python/object/apply:os.system ['touch canary']", "is no YAML that a recipe"),
        (b"a: !!python/object/new:os.system ['touch canary']", "is no YAML that a recipe"),
        (b"a: !!python/name:os.system", "is no YAML that a recipe"),
        (b"a: 1\n---\na: 2", "is no YAML that a recipe"),
        (b"seed: 1\nseed: 2", r"the key 'seed' occurs twice \(line 2\)"),
        (b"a: {<<: {b: 1}, b: 2, b: 3}", "the key 'b' occurs twice"),
        (b"a: !!set {b}", r"the tag '.*:set' is none of a plain value \(line 1\)"),
        (b"seed: " + b"9" * 5000, "a number has more than 400 digits"),
        (b"seed: 1" + b":59" * 9999, "a number has more than 400 digits"),
        (b"#" * 2**21, "it has more than 1,048,576 characters"),
    ],
)
def test_a_file_that_is_no_recipe_is_one_sentence_and_runs_nothing(
    tmp_path, monkeypatch, content, sentence
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_bytes(content)
    with pytest.raises(UserError, match=sentence) as caught:
        recipes.read(tmp_path / "r.yaml")
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["r.yaml"]


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    for path in (tmp_path / "pipe.yaml", Path("/dev/zero")):
        with pytest.raises(UserError, match=f"{path} cannot be read: it is a device or a pipe"):
            recipes.read(path)
    for path, reason in ((tmp_path / "no.yaml", "no such file"), (tmp_path, "is a directory")):
        with pytest.raises(UserError, match=f"{path} cannot be read: {reason}"):
            recipes.read(path)


def test_anchors_of_a_recipe_file_work_and_a_bomb_of_them_is_told_in_time(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(
        "system: kd\ndata: {source: digits}\nteacher: {model: mlp-8, training: &t {epochs: 3}}\n"
        "student: {model: mlp-4, training: *t}\n"
    )
    recipe = recipes.validate(recipes.read(path))
    assert recipe.student.training == recipe.teachers[0].training
    lists = [f"a{n}: &a{n} [{f'*a{n - 1}, ' * 9}]" for n in range(1, 40)]
    maps = [f"a{n}: &a{n} {{<<: [{f'*a{n - 1}, ' * 9}]}}" for n in range(1, 40)]
    for bomb in (["a0: &a0 [x]", *lists], ["a0: &a0 {x: 1}", *maps], ["a: &a [*a]"]):
        path.write_text("\n".join(bomb))
        begun = time.monotonic()
        with pytest.raises(UserError, match=r"r\.yaml .*(100,000 values|holds itself) \(line"):
            recipes.read(path)
        assert time.monotonic() - begun < 5


@pytest.mark.parametrize("task", ["tabular", "segmentation"])
def test_a_task_without_views_is_remembered_without_them(task):
    assert recipes.with_cache({"task": task}) == {"task": task, "engine": {"cache": "fp16"}}


def test_remembering_the_teacher_sets_what_was_not_set():
    values = {"data": {"source": "digits", "augment": {"views": 7}}, "engine": {"threads": 2}}
    found = recipes.with_cache(values)
    assert found["data"]["augment"] == {"views": 7}
    assert found["engine"] == {"cache": "fp16", "threads": 2}
    assert recipes.with_cache({})["data"] == {"augment": {"views": recipes.VIEWS}}
    assert recipes.with_cache({"engine": {"cache": "full"}})["engine"] == {"cache": "full"}
    # a recorded recipe holds null where nothing was said
    recorded = recipes.validate(MINIMAL).model_dump(mode="json")
    again = recipes.validate(recipes.with_cache(recorded))
    assert (again.engine.cache, again.data.augment.views) == ("fp16", recipes.VIEWS)
