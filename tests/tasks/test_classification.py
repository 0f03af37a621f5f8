import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from limbeck.data.data import ResidentImages, Split
from limbeck.errors import UserError
from limbeck.tasks.classification import Classification, measures
from limbeck.training.network import Network
from limbeck.training.taps import Taps
from limbeck.training.task import Answer, model_output
from limbeck.training.teacher import Teacher

TASK = Classification(["a", "b", "c"])


def net(seed: int = 0) -> Network:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Network(
            nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
        )


def split(n: int = 300, labelled: bool = True) -> Split:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (n, 1, 4, 4), generator=generator, dtype=torch.uint8)
    return Split("test", ResidentImages(pixels), torch.arange(n) % 3 if labelled else None)


def by_hand(network: Network, part: Split) -> np.ndarray:
    """Logits of a split without batches, tasks or modes: pixels on the scale where white is 1."""
    pixels = torch.stack([part.images.read(int(row)) for row in part.rows])
    with torch.no_grad():
        return network.model.eval()(pixels.float() / 255).double().numpy()


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


@pytest.mark.parametrize("classes", [3, 10])
def test_measures_are_what_their_names_say(classes):
    generator = torch.Generator().manual_seed(classes)
    logits = 3 * torch.randn(500, classes, generator=generator)
    labels = torch.randint(0, classes, (500,), generator=generator)
    found = measures(logits, labels)
    p, y = softmax(logits.double().numpy()), labels.numpy()
    assert found["accuracy"] == pytest.approx((p.argmax(1) == y).mean())
    rank = (p > p[np.arange(500), y][:, None]).sum(1)
    assert found["top5"] == pytest.approx((rank < 5).mean())
    assert found["cross_entropy"] == pytest.approx(-np.log(p[np.arange(500), y]).mean(), rel=1e-5)
    confidence, right = p.max(1), p.argmax(1) == y
    bins = np.minimum((confidence * 15).astype(int), 14)
    gaps = [
        abs(right[bins == b].mean() - confidence[bins == b].mean()) * (bins == b).mean()
        for b in set(bins)
    ]
    assert found["calibration_error"] == pytest.approx(sum(gaps), abs=1e-5)


def test_fewer_than_five_classes_have_a_top_of_all_of_them():
    assert measures(torch.randn(20, 3), torch.arange(20) % 3)["top5"] == 1.0


def test_predictions_are_those_of_the_network_in_eval_mode_in_the_order_of_the_split():
    network, part = net(), split().subset([5, 299, 0, 7])
    state = {k: v.clone() for k, v in network.state_dict().items()}
    logits, labels = TASK.predict(network.train(), part)
    assert np.allclose(logits.numpy(), by_hand(net(), part), atol=1e-5)
    assert labels.tolist() == [2, 2, 0, 1]
    assert all(torch.equal(v, state[k]) for k, v in network.state_dict().items())


@pytest.mark.parametrize("mode", [True, False])
def test_measuring_restores_the_mode(mode):
    network = net().train(mode)
    TASK.measure(network, split())
    assert network.training is mode
    assert network.model[2].training is mode


def test_the_same_samples_measure_the_same_however_they_are_held():
    part = split()
    pixels = torch.stack([part.images.read(i) for i in range(300)]).float() / 255
    loader = DataLoader(TensorDataset(pixels, part.labels), batch_size=7)
    one, other = TASK.measure(net(), part), TASK.measure(net(), loader)
    assert one == {name: pytest.approx(value, abs=1e-6) for name, value in other.items()}


def test_nothing_and_no_labels_cannot_be_measured():
    with pytest.raises(UserError, match="no samples to measure on"):
        TASK.measure(net(), split().subset([]))
    with pytest.raises(UserError, match="needs labels, and these have none"):
        TASK.measure(net(), split(labelled=False))


def test_the_loss_is_the_mean_cross_entropy_and_needs_labels():
    logits = torch.tensor([[2.0, 0.0, -1.0], [0.0, 1.0, 0.0]], dtype=torch.float16)
    label = torch.tensor([0, 2])
    p = softmax(logits.double().numpy())
    expected = -np.log([p[0, 0], p[1, 2]]).mean()
    found = TASK.loss(Answer({"logits": logits}), {"label": label})
    assert found.item() == pytest.approx(expected, rel=1e-4)
    with pytest.raises(UserError, match="has no labels"):
        TASK.loss(Answer({"logits": logits}), {"image": label})
    assert TASK.labelled({"label": label})
    assert not TASK.labelled({"image": label})


def test_the_loss_of_a_mixed_image_is_that_of_both_labels_by_their_shares():
    logits = torch.tensor([[2.0, 0.0, -1.0], [0.0, 1.0, 0.0]])
    batch = {
        "label": torch.tensor([0, 2]),
        "partner_label": torch.tensor([1, 2]),
        "mix": torch.tensor([0.25, 0.6]),
    }
    nats = -np.log(softmax(logits.double().numpy()))
    expected = (0.25 * nats[0, 0] + 0.75 * nats[0, 1] + nats[1, 2]) / 2
    assert TASK.loss(Answer({"logits": logits}), batch).item() == pytest.approx(expected, rel=1e-6)


def test_a_mixture_that_is_all_its_own_has_the_plain_loss():
    generator = torch.Generator().manual_seed(0)
    answer = Answer({"logits": torch.randn(9, 3, generator=generator)})
    label = torch.arange(9) % 3
    mixed = {"label": label, "partner_label": label.flip(0), "mix": torch.ones(9)}
    assert torch.allclose(TASK.loss(answer, mixed), TASK.loss(answer, {"label": label}))


def test_answers_are_averaged_as_probabilities_or_as_logits():
    generator = torch.Generator().manual_seed(3)
    logits = [4 * torch.randn(6, 3, generator=generator) for _ in range(3)]
    answers = [Answer({"logits": v}) for v in logits]
    weights = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    arrays = [v.double().numpy() for v in logits]
    shares = weights.numpy()
    mean = TASK.combine(answers, weights, "probabilities")
    expected = sum(s * softmax(v) for s, v in zip(shares, arrays, strict=True))
    assert np.allclose(mean["logits"].exp().numpy(), expected, atol=1e-6)
    assert mean.members == tuple(answers)
    assert torch.equal(mean.weights, weights)
    mean = TASK.combine(answers, weights, "logits")
    expected = sum(s * v for s, v in zip(shares, arrays, strict=True))
    assert np.allclose(mean["logits"].numpy(), expected, atol=1e-5)
    assert mean.members == ()


def test_taps_are_captured_beside_the_logits_and_only_if_there_are_any():
    network, batch = net().eval(), {"image": torch.rand(2, 1, 4, 4)}
    taps = Taps(network.model, ("1",))
    answer = TASK.run(network, batch, taps)
    assert set(answer.features) == {"1"}
    assert torch.allclose(answer.features["1"], network.model[1](batch["image"].flatten(1)))
    plain = TASK.run(network, batch)
    assert plain.features == {}
    assert torch.equal(plain["logits"], answer["logits"])


def test_logits_are_found_in_what_models_return():
    z = torch.ones(2, 3)

    class Output:
        logits = z

    for output in (z, Output(), {"logits": z}, (z, "more"), [Output()], ({"logits": (z,)},)):
        assert model_output(output) is z
    for output in ((), {"scores": z}, "text", None):
        with pytest.raises(UserError, match="no tensor of logits was found"):
            model_output(output)


def test_a_comparison_counts_the_errors_and_the_agreement_with_the_teacher():
    networks = {"teacher": Teacher(net(1)), "baseline": net(2), "student": net(1)}
    part = split(90)
    found = TASK.compare(networks, part)
    labels = part.labels.numpy()
    teacher, baseline = (by_hand(net(seed), part).argmax(1) for seed in (1, 2))
    assert found["agreement"]["student"] == 1.0
    assert found["agreement"]["baseline"] == pytest.approx((teacher == baseline).mean())
    assert set(found["agreement"]) == {"baseline", "student"}
    for name, answers in (("teacher", teacher), ("baseline", baseline)):
        wrong = [int((answers != labels)[labels == c].sum()) for c in range(3)]
        assert found["errors"][name] == {"total": sum(wrong), "of": 90, "by_class": wrong}
        assert found["measures"][name]["accuracy"] == pytest.approx(1 - sum(wrong) / 90)
    assert "agreement" not in TASK.compare({"student": net(1)}, part)


def test_what_is_recorded_can_be_drawn_from_without_the_networks(tmp_path):
    part = split(300).subset(range(100, 300))
    TASK.record({"teacher": Teacher(net(1)), "student": net(2)}, part, tmp_path)
    tensors = load_file(tmp_path / "predictions.safetensors")
    with safe_open(tmp_path / "predictions.safetensors", "np") as file:
        assert file.metadata()["classes"].split("\n") == ["a", "b", "c"]
    assert torch.equal(tensors["labels"], part.labels)
    assert torch.equal(tensors["rows"], part.rows)
    answers = []
    for name, seed in (("teacher", 1), ("student", 2)):
        logits = by_hand(net(seed), part)
        found = tensors[f"probabilities.{name}"].double().numpy()
        assert np.allclose(found, softmax(logits), atol=1e-3)
        answers.append(logits.argmax(1))
    differing = np.flatnonzero(answers[0] != answers[1])[:64]
    assert tensors["example_positions"].tolist() == differing.tolist()
    for position, image in zip(differing, tensors["example_images"], strict=True):
        assert torch.equal(image, part.images.read(100 + int(position)))


def test_networks_that_agree_everywhere_leave_no_examples(tmp_path):
    TASK.record({"teacher": net(1), "student": net(1)}, split(), tmp_path)
    assert "example_images" not in load_file(tmp_path / "predictions.safetensors")


def test_half_precision_names_the_same_winner_as_the_logits(tmp_path):
    close = torch.tensor([[0.0, 1e-5, 0.0]])
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    nn.init.zeros_(model[1].weight)
    model[1].bias.data = close[0]
    TASK.record({"student": Network(model)}, split(3), tmp_path)
    recorded = load_file(tmp_path / "predictions.safetensors")["probabilities.student"]
    assert recorded.dtype == torch.float16
    # Rounding may tie what the logits told apart, but never turns it round.
    assert (recorded[:, 1] >= recorded.max(1).values).all()
