import pytest

from limbeck import recipes
from limbeck.catalogue import system, systems
from limbeck.errors import UserError
from limbeck.models import Input, build
from limbeck.systems.classification.kd import KD
from limbeck.training.method import Method, Supervised

MINIMAL = {"system": "kd", "data": {"source": "digits"}, "student": {"model": "mlp-8"}}


@pytest.mark.parametrize("slug", list(systems()))
def test_every_preset_is_a_valid_recipe_for_every_kind_of_data(slug):
    chosen = system(slug)
    assert {"smoke", "small", "paper"} <= set(chosen.presets)
    assert issubclass(chosen.method_class(), Method)
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
    for word in ("a", "=1", "a..b=1", "a=!!python/name:os.system", "a=[", "a={{}}"):
        with pytest.raises(UserError):
            recipes.overrides([word])
