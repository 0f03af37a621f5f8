import pytest
import torch

from limbeck import recipes
from limbeck.data.augment import Augment
from limbeck.data.data import ResidentImages, Split
from limbeck.errors import UserError
from limbeck.tasks.sequence import SequentialClassification, parts
from limbeck.training.network import Network

NAMES = ("cat", "dog", "car", "bus", "bee")


def split(labels) -> Split:
    pixels = torch.zeros(len(labels), 1, 2, 2, dtype=torch.uint8)
    return Split("test", ResidentImages(pixels), torch.tensor(labels))


@pytest.mark.parametrize(
    ("sequence", "expected"),
    [
        (2, ((0, 1, 2), (3, 4))),
        ([["car", "bus"], ["cat", 1, "bee"]], ((2, 3), (0, 1, 4))),
    ],
)
def test_classes_are_parted_by_number_or_by_name(sequence, expected):
    assert parts(NAMES, sequence) == expected


@pytest.mark.parametrize(
    ("sequence", "sentence"),
    [
        (1, "2 to 2 tasks"),
        (3, "2 to 2 tasks"),
        ([["cat", "dog", "car", "bus", "bee"]], "two tasks or more"),
        ([["cat", "dog", "car", "bus"], ["bee"]], "each of two classes"),
        ([["cat", "dog"], ["car", "cat", "bus", "bee"]], "'cat' is in two tasks"),
        ([["cat", "dog"], ["car", "bus"]], "'bee' is in no task"),
        ([["cat", "dig"], ["car", "bus", "bee"]], "did you mean dog"),
        ([["cat", 9], ["car", "bus", "bee"]], "class 9, but classes run from 0 to 4"),
    ],
)
def test_what_is_no_sequence_is_one_sentence(sequence, sentence):
    with pytest.raises(UserError, match=sentence):
        parts(NAMES, sequence)


def test_a_network_is_asked_only_about_the_classes_of_a_samples_task():
    class Fixed(torch.nn.Module):
        def forward(self, x):
            return torch.tensor([[1.0, 2.0, 3.0, 9.0, 8.0]]).expand(len(x), 5)

    task = SequentialClassification(NAMES, sequence=2)
    logits, labels = task.predict(Network(Fixed()), split([2, 0, 4]))
    assert logits.argmax(1).tolist() == [2, 2, 3]
    assert torch.isinf(logits[0, 3:]).all()
    found = task.measure(Network(Fixed()), split([2, 0, 4]))
    assert found["accuracy"] == pytest.approx(1 / 3)
    assert 0 < found["cross_entropy"] < 3
    assert labels.tolist() == [2, 0, 4]


def test_a_tasks_samples_keep_their_identities():
    task = SequentialClassification(NAMES, Augment(), sequence=[["bee", "cat"], [1, 2, 3]])
    own = task.of(split([0, 1, 4, 2, 0]), 0)
    assert own.rows.tolist() == [0, 2, 4]
    assert own.labels.tolist() == [0, 4, 0]


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"task": "sequence"}, r"the recipe lacks the key 'data\.sequence'"),
        (
            {"data": {"source": "digits", "sequence": 2}},
            r"no key 'data\.sequence', which is of the task sequence;",
        ),
    ],
)
def test_task_and_sequence_go_together(given, sentence):
    values = {"system": "x", "data": {"source": "digits"}, "student": {"model": "mlp-8"}, **given}
    with pytest.raises(UserError, match=sentence):
        recipes.validate(values)
