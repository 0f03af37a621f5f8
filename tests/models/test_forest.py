import copy

import numpy as np
import pytest
import torch
from sklearn.datasets import load_iris, load_wine
from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor

from limbeck.errors import UserError
from limbeck.models import build, load, save, weights
from limbeck.models.forest import LEAST, Forest
from limbeck.models.table import Column, TableInput

WINE = load_wine()
INPUTS = torch.from_numpy(WINE.data).float()
LABELS = torch.from_numpy(WINE.target).long()


def fitted(trees: int = 8, leaves: int = 64, seed: int = 3) -> Forest:
    forest = Forest(13, trees, leaves, 3)
    forest.solve(INPUTS, LABELS, seed)
    return forest


def probabilities(forest: Forest, inputs: torch.Tensor) -> np.ndarray:
    return forest(inputs).softmax(1).double().numpy()


def test_a_fitted_forest_says_what_scikit_learns_says():
    theirs = RandomForestClassifier(8, max_leaf_nodes=64, random_state=3).fit(
        INPUTS.numpy(), WINE.target
    )
    assert np.allclose(
        probabilities(fitted(), INPUTS), theirs.predict_proba(INPUTS.numpy()), atol=1e-5
    )


def test_it_regresses_probabilities_as_scikit_learns_forest_does():
    wanted = torch.softmax(torch.randn(178, 3, generator=torch.Generator().manual_seed(0)), 1)
    forest = Forest(13, 5, 32, 3)
    forest.solve(INPUTS, wanted, 1)
    theirs = RandomForestRegressor(5, max_leaf_nodes=32, random_state=1).fit(
        INPUTS.numpy(), wanted.numpy()
    )
    assert np.allclose(probabilities(forest, INPUTS), theirs.predict(INPUTS.numpy()), atol=1e-5)


def test_every_float32_at_a_threshold_goes_the_way_it_went():
    # Thresholds lie between neighbouring values, in float64, where float32 cannot follow.
    first = torch.tensor([0.1, 0.2, 0.3, 0.7])
    inputs = torch.stack([first, torch.nextafter(first, torch.tensor(1.0))]).T.flatten()[:, None]
    labels = torch.tensor([0, 1]).repeat(4)
    forest = Forest(1, 4, 16, 2)
    forest.solve(inputs, labels, 0)
    theirs = RandomForestClassifier(4, max_leaf_nodes=16, random_state=0).fit(
        inputs.numpy(), labels.numpy()
    )
    assert np.allclose(
        probabilities(forest, inputs), theirs.predict_proba(inputs.numpy()), atol=1e-5
    )


def test_a_class_that_no_row_has_keeps_the_least_probability():
    forest = Forest(13, 3, 8, 4)
    forest.solve(INPUTS, LABELS, 0)
    assert forest(INPUTS)[:, 3].exp().tolist() == pytest.approx([LEAST] * 178)


def test_its_tensors_keep_their_shapes_and_its_state_is_the_forest():
    fresh, forest = Forest(13, 8, 64, 3), fitted()
    shapes = {name: t.shape for name, t in fresh.state_dict().items()}
    assert {name: t.shape for name, t in forest.state_dict().items()} == shapes
    fresh.load_state_dict(copy.deepcopy(forest.state_dict()))
    assert torch.equal(fresh(INPUTS), forest(INPUTS))
    assert torch.equal(fitted()(INPUTS), forest(INPUTS))
    assert not torch.equal(fitted(seed=4)(INPUTS), forest(INPUTS))
    assert all(not p.requires_grad for p in forest.parameters())


def test_a_stored_forest_comes_back_from_arrays_alone(tmp_path):
    iris = load_iris()
    input = TableInput(tuple(Column(n, 1.0, 2.0) for n in iris.feature_names))
    network = build("forest-6-8", iris.target_names.tolist(), input)
    rows = torch.from_numpy(iris.data).float()
    network.model.solve(input(rows), torch.from_numpy(iris.target), 0)
    save(network, tmp_path / "teacher", {"task": "tabular"})
    assert {p.suffix for p in tmp_path.iterdir()} == {".safetensors", ".json"}
    found = load(tmp_path / "teacher")
    assert found.input == input
    assert torch.equal(found(rows), network(rows))


def test_a_stored_forest_with_endless_trees_ends():
    forest = Forest(2, 1, 4, 2)
    forest.depth.fill_(10**12)
    forest.left.copy_(torch.tensor([[1, 0, 0, 0, 0, 0, 0]]))
    assert forest(torch.zeros(1, 2)).shape == (1, 2)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("forest-10", "there is no network of tables named 'forest-10'; did you mean"),
        ("forest-10-1", "with 2 leaves a tree or more"),
        ("forest-99999-99999", "trees x leaves x classes at most"),
        ("forest-0-4", "there is no network of tables"),
        ("mlp", "there is no network of tables"),
        ("resnet8", "there is no network of tables"),
        ("timm:resnet18", "no model of timm can be fed tables of 1 columns"),
        ("mlp-8@pretrained", "ships no weights for mlp-8"),
    ],
)
def test_models_that_there_are_not_are_one_sentence(name, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        build(name, ["a", "b"], TableInput((Column("x"),)))
    assert "\n" not in str(caught.value)


def test_rows_of_another_width_are_one_sentence():
    with pytest.raises(UserError, match=r"tables of 1 columns cannot read rows of shape \(3,\)"):
        TableInput((Column("x"),))(torch.zeros(2, 3))


def test_what_is_fed_is_restored():
    table = TableInput(
        (Column("a", 3.0, 2.0), Column("b", categories=("x", "y", "z")), Column("c", -1.0, 0.5))
    )
    rows = torch.tensor([[1.0, 2.0, 4.0], [5.0, 0.0, -1.0]])
    assert table.width == 5
    assert torch.allclose(table.restored(table(rows)), rows)
    assert TableInput.from_json({"columns": [vars(c) for c in table.columns]}) == table


@pytest.mark.parametrize(
    ("name", "place"), [("left", 99), ("right", -1), ("feature", 2), ("feature", -5)]
)
def test_stored_trees_that_lead_out_of_their_arrays_are_refused(name, place):
    forest = Forest(inputs=2, trees=3, leaves=4, classes=2)
    state = {key: tensor.clone() for key, tensor in forest.state_dict().items()}
    state[name][1, 0] = place
    with pytest.raises(UserError, match=f"w.pt does not fit the model: {name} holds places beyond"):
        weights.fit(forest, state, "w.pt")
