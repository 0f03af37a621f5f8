import pytest
import torch

from limbeck.errors import UserError
from limbeck.models import build
from limbeck.models.generators import ConditionInput, make

HALF = (0.5, 0.5, 0.5)
COLOURS = ("red", "green", "blue")


def test_the_published_generator_has_its_parameters():
    generator = make("resnet-generator-64-9", 3, 3, (256, 256))
    assert sum(p.numel() for p in generator.parameters()) == 11_378_179


def test_published_weights_fit_by_the_numbers_of_their_layers():
    generator = make("resnet-generator-8-9", 3, 3, (16, 16))
    shapes = {name: tuple(tensor.shape) for name, tensor in generator.state_dict().items()}
    assert shapes["1.weight"] == (8, 3, 7, 7)
    assert shapes["10.body.1.weight"] == shapes["18.body.5.weight"] == (32, 32, 3, 3)
    assert shapes["19.weight"] == (32, 16, 3, 3)
    assert shapes["26.weight"] == (3, 8, 7, 7)
    assert len(generator) == 28


def test_what_is_made_has_the_condition_s_size_and_lies_in_range():
    for size in ((12, 20), (32, 32)):
        made = make("resnet-generator-4-1", 1, 3, size)(10 * torch.randn(2, 1, *size))
        assert made.shape == (2, 3, *size)
        assert made.abs().max() <= 1


@pytest.mark.parametrize(
    ("name", "size", "sentence"),
    [
        ("resnet-generator-0-9", (32, 32), "no generator named 'resnet-generator-0-9'; did you"),
        ("resnet20", (32, 32), "no generator named 'resnet20'"),
        ("resnet-generator-8-2", (30, 32), r"multiples of 4 .*, not 30 x 32; --set 'data\.size"),
        ("resnet-generator-8-2@pretrained", (32, 32), "ships no weights"),
        ("timm:resnet18", (32, 32), "no model of timm can be fed 3 x .* images to make others of"),
    ],
)
def test_what_cannot_be_made_is_one_sentence(name, size, sentence):
    with pytest.raises(UserError, match=sentence):
        build(name, COLOURS, ConditionInput(3, size, HALF, HALF))
