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
