import pytest
import torch
from torch import nn

from limbeck.errors import UserError
from limbeck.training.taps import Taps


def block() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))


def test_a_tap_gives_the_very_tensor_that_feeds_the_rest_of_the_net():
    model, x = block(), torch.randn(5, 4)
    with Taps(model, ["1", "2:input"]) as taps:
        output, features = taps(x)
    assert torch.equal(features["1"], model[1](model[0](x)))
    assert features["1"] is features["2:input"]
    features["1"].sum().backward()
    assert model[0].weight.grad is not None
    assert torch.equal(output, model(x))


def test_taps_leave_no_hook_behind():
    model = block()
    with Taps(model, ["0"]):
        pass
    assert not model[0]._forward_hooks


def test_an_unknown_tap_is_answered_with_the_near_names():
    model = nn.Sequential()
    model.add_module("layer1", nn.Linear(2, 2))
    with pytest.raises(UserError, match=r"no module 'layr1' to tap; did you mean layer1\?"):
        Taps(model, ["layr1"])


def test_a_tap_that_never_fires_is_an_error():
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    with pytest.raises(UserError, match="'idle' fired 0 times"):
        Taps(Idle(), ["idle"])(torch.zeros(1, 2))


def test_a_tap_that_fires_twice_is_an_error():
    shared = nn.ReLU()
    with pytest.raises(UserError, match="'0' fired 2 times"):
        Taps(nn.Sequential(shared, shared), ["0"])(torch.zeros(1, 2))


def test_an_in_place_layer_behind_a_tap_is_noticed():
    x = torch.randn(2, 4)
    for in_place, found in ((True, ["0"]), (False, [])):
        taps = Taps(nn.Sequential(nn.Linear(4, 3), nn.ReLU(inplace=in_place)), ["0"])
        assert taps.overwritten(lambda taps=taps: taps(x)) == found


def test_a_tapped_model_compiles_as_one_graph():
    model, x = block().eval(), torch.randn(5, 4)
    taps = Taps(model, ["0"])
    compiled = torch.compile(taps, fullgraph=True, backend="aot_eager")
    output, features = compiled(x)
    assert torch.allclose(output, model(x))
    assert torch.allclose(features["0"], model[0](x))


def test_a_pass_may_end_at_the_last_tap():
    model, x, ran = block(), torch.randn(5, 4), []
    model[2].register_forward_hook(lambda *_: ran.append(True))
    whole, taps = Taps(model, ["0", "1"]), Taps(model, ["1", "0"], stop=True)
    expected = whole(x)[1]
    taps(x)  # the first pass is a whole one
    ran.clear()
    output, features = taps(x)
    assert output is None
    assert not ran
    assert list(features) == ["1", "0"]
    assert all(torch.equal(features[path], expected[path]) for path in features)


def test_a_tap_that_fires_twice_is_found_before_a_pass_is_cut_short():
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    with pytest.raises(UserError, match="fired 2 times"):
        Taps(model, ["0"], stop=True)(torch.zeros(1, 4))


def test_a_tapped_model_compiles_as_one_graph_and_gives_what_it_gave():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU())
    x = torch.randn(2, 1, 5, 5)
    taps = Taps(model, ["0", "1", "2:input"])
    expected, features = taps(x)
    torch.compiler.reset()
    # without an optimising backend nothing may change, and fullgraph forbids a break
    model.compile(backend="eager", fullgraph=True)
    for _ in range(2):
        model[1].reset_running_stats()
        output, compiled = taps(x)
        assert torch.equal(output, expected)
        assert all(torch.equal(compiled[path], features[path]) for path in features)
    output.sum().backward()
    assert model[0].weight.grad is not None


def test_a_tap_that_catches_no_tensor_is_one_sentence():
    class Several(nn.Module):
        def forward(self, x):
            return {"fine": x, "coarse": x[:1]}

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.trunk = Several()

        def forward(self, x):
            return self.trunk(x)["fine"]

    taps = Taps(Model(), ["trunk"])
    with pytest.raises(UserError, match="'trunk' of Model catches dict, not a tensor; tap a mod"):
        taps.overwritten(lambda: taps(torch.zeros(2, 3)))
