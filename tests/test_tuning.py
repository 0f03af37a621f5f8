"""The search for hyper-parameters: where, on what, and what it leaves."""

from __future__ import annotations

import optuna
import pytest
import yaml
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from limbeck.comparison import plan
from limbeck.errors import UserError
from limbeck.tuning import space, tune


def test_numbers_are_searched_for_around_the_recipes_value_and_within_their_limits():
    found = space({"kd": {"temperature": 8.0}, "nst": {"weight": 5.0, "degree": 3}})
    assert found["kd.temperature"] == (FloatDistribution(0.8, 80.0, log=True), 8.0)
    assert found["nst.weight"] == (FloatDistribution(0.5, 50.0, log=True), 5.0)
    assert found["nst.degree"] == (IntDistribution(1, 6), 3)
    assert found["nst.kernel"] == (CategoricalDistribution(("poly", "linear", "gaussian")), "poly")


def test_what_is_off_or_no_number_stays_as_it_is():
    found = space({"kd": {"weight": 0.0}, "nst": {}})
    assert not {"kd.weight", "kd.absent", "nst.offset", "nst.half", "nst.student_layers"} & set(
        found
    )


@pytest.fixture
def folder(tmp_path):
    given = {"student": {"model": "mlp-8", "training": {"epochs": 2}}, "seeds": 2}
    laid = plan(["kd"], "smoke", "digits", given, teachers=["mlp-16"])
    recipes = {name: dict(recipe) for name, recipe in laid.recipes.items()}
    # An untrained teacher will do to see what is tried.
    recipes["kd"]["teachers"] = [{"model": "mlp-16", "training": {"epochs": 0}}]
    (tmp_path / "comparison.yaml").write_text(yaml.safe_dump({"recipes": recipes}))
    return tmp_path


def test_a_search_keeps_the_best_on_validation_data_and_goes_on_where_it_was(folder, capsys):
    found = tune(folder, "kd", 2)
    assert (found["trials"], found["pruned"]) == (2, 0)
    assert found["after"] >= found["before"] > 0
    assert set(found["methods"]["kd"]) == {"temperature", "weight", "label_weight"}
    assert yaml.safe_load((folder / "tuned" / "kd.yaml").read_text()) == found
    assert "trial 1 of 2" in capsys.readouterr().out
    assert tune(folder, "kd", 2) == found
    assert "trial" not in capsys.readouterr().out
    assert tune(folder, "kd", 3)["trials"] == 3
    # A study a system: several searches begin at once, and would make one file's tables twice.
    assert [p.name for p in sorted((folder / "tuned").iterdir())] == ["kd.db", "kd.yaml"]


def test_the_first_trial_is_the_recipes_own(folder):
    found = tune(folder, "kd", 1)
    assert found["found"] == pytest.approx(
        {"kd.temperature": 4.0, "kd.weight": 0.9, "kd.label_weight": 0.1}
    )
    assert found["before"] == found["after"]


def test_the_recipes_own_values_are_tried_again_where_their_trial_was_killed(folder):
    (folder / "tuned").mkdir()
    storage = f"sqlite:///{folder / 'tuned' / 'kd.db'}"
    killed = optuna.create_study(study_name="kd", storage=storage, direction="maximize")
    killed.ask()
    found = tune(folder, "kd", 1)
    assert found["before"] == found["after"] > 0


def test_without_validation_data_there_is_nothing_to_search_on(folder):
    content = yaml.safe_load((folder / "comparison.yaml").read_text())
    content["recipes"]["kd"]["data"]["validation"] = 0
    (folder / "comparison.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match="validation data, and there are none"):
        tune(folder, "kd", 1)
