import pytest
import torch
import torchvision
from torch import nn

from limbeck.errors import UserError
from limbeck.models import build
from limbeck.models.dense import NAMES, Existence, LaneInput, SceneInput, make
from limbeck.models.enet import ENet

SCENES = SceneInput(3, (48, 64), (0.5,) * 3, (0.5,) * 3)
CLASSES = ("background", "a", "b", "c", "d")


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_enet_has_its_published_size():
    assert 360_000 < count(ENet(19)) < 375_000  # 0.37 M in table 3, for Cityscapes


def test_enet_sad_has_the_size_measured_on_a_published_port():
    """The port has one slope for a whole PReLU and one PReLU more in each encoder bottleneck, and
    upsamples by 2x2 kernels in place of ENet's 3x3."""
    model = make("enet-sad", 5, 3, (288, 800), existence=True)
    slopes = [m for m in model.modules() if isinstance(m, nn.PReLU)]
    kernels = [up.middle.weight for up in (model.up1, model.up2)]
    as_ported = count(model) - sum(m.weight.numel() for m in slopes) + len(slopes)
    as_ported -= sum(k.numel() * 5 // 9 for k in kernels)
    bottlenecks = 2 + 4 + 3 * 8
    assert as_ported + bottlenecks == 1_106_423
    group = sum(p.numel() for p in model.block3.parameters())
    group -= sum(m.weight.numel() - 1 for m in model.block3.modules() if isinstance(m, nn.PReLU))
    assert as_ported + bottlenecks - 2 * (group + 8) == 817_331, "blocks 2 to 4 share weights"


@pytest.mark.parametrize("depth", [18, 34, 101])
def test_a_resnet_of_full_width_is_torchvisions_up_to_its_head(depth):
    ours = make(f"dilated-resnet{depth}", 5, 3, (32, 32))
    theirs = getattr(torchvision.models, f"resnet{depth}")()
    assert count(ours) - count(ours.head) == count(theirs) - count(theirs.fc)
    renamed = {
        name.replace("layer", "block"): tensor.shape
        for name, tensor in theirs.state_dict().items()
        if not name.startswith("fc")
    }
    mine = {n: t.shape for n, t in ours.state_dict().items() if not n.startswith("head")}
    assert mine == renamed


@pytest.mark.parametrize("name", ["enet", "enet-sad", "dilated-resnet10-8"])
@pytest.mark.parametrize("size", [(32, 48), (45, 61)])
def test_every_pixel_is_answered_for_in_images_of_any_size(name, size):
    model = make(name, 5, 3, size).eval()
    sizes = {}
    for path in model.blocks:
        model.get_submodule(path).register_forward_hook(
            lambda _, __, out, path=path: sizes.update({path: tuple(out.shape[2:])})
        )
    with torch.no_grad():
        assert model(torch.zeros(1, 3, *size)).shape == (1, 5, *size)
    eighth = tuple(-(-side // 8) for side in size)
    assert sizes["block1"] == tuple(-(-side // 4) for side in size)
    assert all(sizes[path] == eighth for path in model.blocks[1:])


@pytest.mark.parametrize("name", ["enet", "enet-sad", "dilated-resnet10-8"])
def test_every_parameter_learns_and_lanes_are_said_to_exist(name):
    model = make(name, 5, 3, (32, 48), existence=True)
    logits, there = model(torch.rand(2, 3, 32, 48))
    assert there.shape == (2, 4)
    (logits.square().mean() + there.square().mean()).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_existence_is_read_off_the_last_block():
    head = Existence(128, 4, (288, 800))
    assert count(head) == 128 * 5 + 5 + 5 * 18 * 50 * 128 + 128 + 128 * 4 + 4


def test_networks_are_built_by_name_and_rebuilt_from_their_facts():
    lanes = LaneInput(3, (32, 48), (0.5,) * 3, (0.5,) * 3)
    for fed, named in ((SCENES, "dilated-resnet10-8"), (lanes, "dilated-resnet10-8")):
        network = build(named, CLASSES, fed, seed=1)
        assert network.facts()["input"]["kind"] == fed.kind
        assert LaneInput.from_json(network.facts()["input"]).size == fed.size
    assert set(NAMES) >= {"enet", "enet-sad", "dilated-resnet18", "dilated-resnet34"}


def test_torchvisions_networks_answer_for_scenes_but_know_no_lanes():
    network = build("torchvision:lraspp_mobilenet_v3_large", CLASSES, SCENES, seed=0).eval()
    with torch.no_grad():
        assert network(SCENES.sample()).shape == (1, 5, 48, 64)
    lanes = LaneInput(3, (32, 48), (0.5,) * 3, (0.5,) * 3)
    with pytest.raises(UserError, match=r"no model of torchvision can be fed .* to find lanes in"):
        build("torchvision:lraspp_mobilenet_v3_large", CLASSES, lanes)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("enett", "no network for scenes named 'enett'; did you mean enet"),
        ("dilated-resnet10-0", "no network for scenes named"),
        ("enet@pretrained", "ships no weights for enet"),
    ],
)
def test_wrong_names_are_one_sentence(name, sentence):
    with pytest.raises(UserError, match=sentence):
        build(name, CLASSES, SCENES)
    with pytest.raises(UserError, match="at least 16 x 16 pixels"):
        make("enet", 5, 3, (8, 32))
