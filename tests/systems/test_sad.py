import math

import pytest
import torch
from torch import nn

from carrying import carry_out, noise, same
from limbeck import distillation, recipes
from limbeck.catalogue import system
from limbeck.data.data import ResidentImages
from limbeck.data.scenes import IGNORE, Scenes, Warp
from limbeck.errors import UserError
from limbeck.losses import attention_map, iou_loss, sad
from limbeck.models.dense import make
from limbeck.systems.dense.sad import SAD, Later
from limbeck.tasks.segmentation import Segmentation
from limbeck.training.bench import Bench, Candidate, Rival
from limbeck.training.engine import Engine
from limbeck.training.network import Network
from limbeck.training.phases import Training
from limbeck.training.progress import Voice

ONE = torch.tensor([[[[0.0, 1.0], [0.0, 0.0]]]])
CPU = Engine(device="cpu", checkpoint_seconds=0.0, channels_last=False)


# The loss.


def test_the_maps_and_distances_are_those_worked_out_by_hand():
    total = math.e + 3
    expected = [1 / total, math.e / total, 1 / total, 1 / total]
    assert attention_map(ONE).flatten().tolist() == pytest.approx(expected)
    assert attention_map(ONE).flatten().tolist() == pytest.approx(
        [0.17488, 0.47536, 0.17488, 0.17488], abs=1e-5
    )
    zeros = torch.zeros(1, 1, 2, 2)
    assert attention_map(zeros).flatten().tolist() == [0.25] * 4
    assert sad(ONE, zeros).item() == pytest.approx(0.0169301, abs=1e-7)
    assert sad(ONE, zeros, "sum_hw").item() == pytest.approx(0.0677203, abs=1e-7)


def test_value_and_gradient_follow_an_independent_formula():
    shallow, deep = noise(2, 3, 3, 2, seed=1).requires_grad_(), noise(2, 5, 3, 2, seed=2)
    loss, gradient = 0.0, torch.zeros_like(shallow)
    for b in range(2):
        maps = []
        for features in (shallow, deep):
            values = [
                math.exp(sum(float(features[b, c, i, j]) ** 2 for c in range(len(features[b]))))
                for i in range(3)
                for j in range(2)
            ]
            maps.append([value / sum(values) for value in values])
        ours, target = maps
        off = [o - t for o, t in zip(ours, target, strict=True)]
        loss += sum(d * d for d in off) / 6 / 2
        # d softmax_i / d s_k = p_i (1[i = k] - p_k), d s_k / d a_ck = 2 a_ck
        mean = sum(d * p for d, p in zip(off, ours, strict=True))
        for k in range(6):
            through = 2 / 6 / 2 * ours[k] * (off[k] - mean)
            gradient[b, :, k // 2, k % 2] = through * 2 * shallow[b, :, k // 2, k % 2].detach()
    found = sad(shallow, deep)
    found.backward()
    assert found.item() == pytest.approx(loss, rel=1e-12)
    assert torch.allclose(shallow.grad, gradient, atol=1e-15)


def test_a_map_sums_to_one_for_each_sample_and_knows_no_signs_and_no_order_of_channels():
    features = noise(3, 4, 5, 6)
    found = attention_map(features, (10, 12))
    assert torch.allclose(found.flatten(1).sum(1), torch.ones(3, dtype=torch.float64))
    assert torch.equal(attention_map(-features), attention_map(features))
    other = features[:, [2, 0, 3, 1]]
    assert torch.allclose(attention_map(other), attention_map(features), atol=1e-15)
    assert torch.equal(attention_map(features)[:2], attention_map(features[:2]))
    assert sad(features, features).item() == 0


def test_channels_and_sizes_may_differ_and_the_smaller_map_is_enlarged():
    shallow, deep = noise(2, 3, 8, 8), torch.full((2, 5, 4, 4), 0.7, dtype=torch.float64)
    uniform = torch.full((2, 8, 8), 1 / 64, dtype=torch.float64)
    assert torch.allclose(attention_map(deep, (8, 8)), uniform)
    expected = (attention_map(shallow) - uniform).square()
    assert sad(shallow, deep).item() == pytest.approx(float(expected.mean()))
    assert sad(deep, shallow).item() == pytest.approx(float(expected.mean()))
    assert sad(shallow, deep, "sum_hw").item() == pytest.approx(64 * float(expected.mean()))


def test_the_map_is_enlarged_before_the_softmax():
    features = torch.tensor([[[[0.0, 2.0]]]], dtype=torch.float64)
    squares = torch.tensor([0.0, 1.0, 3.0, 4.0], dtype=torch.float64)  # bilinear, of 0 and 4
    assert torch.allclose(attention_map(features, (1, 4)).flatten(), squares.softmax(0))


@pytest.mark.parametrize("detached", [True, False])
def test_only_the_shallow_block_learns_unless_told_otherwise(detached):
    shallow, deep = noise(1, 2, 3, 3, seed=1), noise(1, 2, 3, 3, seed=2)
    shallow.requires_grad_()
    deep.requires_grad_()
    sad(shallow, deep, detach_target=detached).backward()
    assert shallow.grad.abs().sum() > 0
    assert (deep.grad is None) == detached


def test_large_activations_neither_overflow_nor_lose_their_gradient_to_nan():
    features = (1e3 * noise(1, 4, 6, 6, dtype=torch.float32)).requires_grad_()
    loss = sad(features, torch.zeros(1, 4, 6, 6), "sum_hw")
    loss.backward()
    assert math.isfinite(loss.item())
    assert torch.isfinite(features.grad).all()
    half = torch.full((1, 512, 2, 2), 100.0, dtype=torch.float16)  # squares beyond fp16
    assert torch.isfinite(attention_map(half)).all()


@pytest.mark.parametrize(
    ("features", "sentence"),
    [
        ((torch.zeros(2, 3), torch.zeros(2, 3)), "compares feature maps"),
        ((torch.zeros(2, 3, 4, 4), torch.zeros(1, 3, 4, 4)), "of 2 samples, the other of 1"),
    ],
)
def test_features_that_are_no_maps_are_one_sentence(features, sentence):
    with pytest.raises(UserError, match=sentence):
        sad(*features)


# The IoU loss.


def test_iou_loss_is_0_for_the_truth_and_1_for_what_has_nothing_of_it():
    truth = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]])
    assert iou_loss(truth, truth).item() == 0
    assert iou_loss(1 - truth, truth).item() == 1
    half = torch.full((1, 2, 2, 1), 0.5)
    covered = torch.tensor([[[[1.0], [1.0]], [[0.0], [0.0]]]])
    # Four pixels: N_o = 1, N_p = N_g = 2.
    assert iou_loss(half, covered).item() == pytest.approx(1 - 1 / 3)


def test_iou_loss_is_counted_by_sample_and_class():
    p, g = noise(3, 7, 4).softmax(-1), (noise(3, 7, 4, seed=5) > 0.4).double()
    ratios = []
    for b in range(3):
        for c in range(4):
            both = sum(float(p[b, i, c] * g[b, i, c]) for i in range(7))
            either = sum(float(p[b, i, c] + g[b, i, c]) for i in range(7)) - both
            ratios.append(1 - both / either)
    assert iou_loss(p, g).item() == pytest.approx(sum(ratios) / 12, rel=1e-12)


def test_a_class_that_is_nowhere_and_not_predicted_is_perfect_and_has_a_gradient():
    p = torch.tensor([[[0.5, 0.0], [0.5, 0.0]]], requires_grad=True)
    g = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])
    loss = iou_loss(p, g)
    assert loss.item() == pytest.approx((1 - 0.5 / 1.5) / 2)
    loss.backward()
    assert torch.isfinite(p.grad).all()
    with pytest.raises(UserError, match="cannot be compared"):
        iou_loss(p, g[:, :1])


# The run.


def scenes(number: int, seed: int) -> Scenes:
    """Bright bars on noise, upright or level, 16 x 16."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 120, (number, 3, 16, 16), generator=generator)
    masks = torch.zeros(number, 16, 16, dtype=torch.uint8)
    for n, at in enumerate(torch.randint(2, 12, (number,), generator=generator).tolist()):
        if n % 2:
            masks[n, :, at : at + 3] = 1
        else:
            masks[n, at : at + 3] = 2
    pixels = torch.where(masks[:, None] > 0, 230, pixels).to(torch.uint8)
    masks[:, 0, 0] = IGNORE
    return Scenes("train", ResidentImages(pixels), None, masks=masks)


def bench(**given) -> Bench:
    train = scenes(24, 1)

    def make_student(seed):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return Network(make("dilated-resnet10-8", 3, 3, (16, 16)))

    return Bench(
        **{
            "task": Segmentation(("background", "upright", "level"), warp=Warp(zoom=0.8)),
            "train": train,
            "transfer": train,
            "validation": scenes(8, 2),
            "test": scenes(8, 3),
            "candidates": [],
            "make_student": make_student,
            "training": Training(epochs=3, lr=0.05, batch_size=8, schedule="poly"),
            "engine": CPU,
            **given,
        }
    )


def method(**given) -> SAD:
    return SAD(**{"weight": 1.0, "reduction": "sum_hw", **given})


def run(path, chosen=None, laid=None, look=None):
    laid = laid or bench()
    return laid, carry_out(path, chosen or method(), laid, look)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    chosen = method()
    laid, folder = run(tmp_path_factory.mktemp("sad") / "run", chosen)
    return chosen, laid, folder


def test_baseline_and_student_part_at_the_switch_and_go_on_with_rate_and_batches(tmp_path):
    seen = {}

    def look(phase):
        batch = next(phase.batches.epoch(0))
        terms = phase.updates[0].terms(batch)
        phase.updates[0].train["student"].eval()
        seen[phase.name] = (phase.begun, phase.epochs, set(terms), batch["row"].tolist())

    laid, _ = run(tmp_path / "run", look=look)
    whole = bench().batches(8, 0)
    rows = [next(whole.epoch(epoch))["row"].tolist() for epoch in (0, 2)]
    assert seen["first"] == (0, 2, {"labels", "iou"}, rows[0])
    assert seen["baseline"] == (2, 1, {"labels", "iou"}, rows[1])
    assert seen["student"] == (2, 1, {"labels", "iou", "attention"}, rows[1])
    assert not same(laid.students[0], laid.baselines[0])


def test_without_weight_it_is_plain_training_bit_for_bit(tmp_path):
    laid, _ = run(tmp_path / "run", method(weight=0.0))
    assert same(laid.students[0], laid.baselines[0])


def test_before_the_switch_nothing_is_distilled(done, tmp_path):
    chosen, _, _ = done
    other = method(weight=50.0)
    run(tmp_path / "run", other)
    assert same(chosen.before[0], other.before[0])


def test_only_what_leads_to_shallower_blocks_is_moved_by_attention(tmp_path):
    seen = {}

    def look(phase):
        if phase.name == "student":
            network = phase.updates[0].train["student"]
            network.train()
            phase.updates[0].terms(next(phase.batches.epoch(0)))["attention"].backward()
            seen.update(
                {
                    n: p.grad is not None and bool(p.grad.any())
                    for n, p in network.named_parameters()
                }
            )
            network.zero_grad(set_to_none=True)

    run(tmp_path / "run", look=look)
    moved = {name.split(".")[1] for name, value in seen.items() if value}
    assert moved == {"conv1", "bn1", "block1", "block2", "block3"}


def test_the_finished_network_is_the_plain_one_in_make(done):
    _, laid, _ = done
    student = laid.students[0]
    assert all(not m._forward_hooks for m in student.modules())
    assert student.state_dict().keys() == laid.make_student(0).state_dict().keys()


def test_the_iou_loss_counts_things_alone_and_no_pixel_without_a_class():
    labels = torch.tensor([[[0, 1], [IGNORE, 2]]])
    task = Segmentation(("background", "a", "b"))
    from limbeck.training.task import Answer

    logits = noise(1, 2, 2, 3, dtype=torch.float32)
    terms = method(iou=1.0)._terms(task, Answer({"logits": logits}), {"label": labels}, False)
    p = logits.softmax(-1)[0].flatten(0, 1)[[0, 1, 3]]
    g = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    both, all_p = (p[:, 1:] * g).sum(0), p[:, 1:].sum(0)
    expected = (1 - both / (all_p + g.sum(0) - both)).mean()
    assert float(terms["iou"]) == pytest.approx(float(expected), rel=1e-6)
    assert "iou" not in method(iou=0)._terms(
        task, Answer({"logits": logits}), {"label": labels}, False
    )


@pytest.mark.parametrize("phase", ["first", "baseline", "student"])
def test_a_run_goes_on_in_any_phase_where_it_failed(tmp_path, done, phase):
    _, whole, _ = done

    def look(found):
        if found.name == phase:
            terms, calls = found.updates[0].terms, []

            def failing(batch):
                calls.append(1)
                if len(calls) == 3:  # one of them is the audit's
                    raise RuntimeError("the power went")
                return terms(batch)

            found.updates[0].terms = failing

    with pytest.raises(RuntimeError, match="the power went"):
        run(tmp_path / "run", look=look)
    chosen = method()
    laid, _ = run(tmp_path / "run", chosen)
    assert same(laid.students[0], whole.students[0])
    assert same(laid.baselines[0], whole.baselines[0])
    assert same(chosen.before[0], done[0].before[0])


def test_what_is_found_is_how_near_the_maps_are_and_where_they_lie(done):
    chosen, laid, folder = done
    (found,) = chosen.findings(laid, folder.metrics())
    assert list(found.table[0]) == ["", "at the switch", "without SAD", "with SAD"]
    named = {row[0]: row[1:] for row in found.table[1:]}
    assert set(named) == {
        "distance block2 to block3",
        "distance block3 to block4",
        "on things: block2",
        "on things: block3",
        "on things: block4",
    }
    assert all(0 <= float(c.split()[0]) <= 100 for row in named.values() for c in row)
    assert len(found.pictures) == 2 * 3
    assert found.pictures["test scene 1, with SAD"].shape == (9 * 32, 9 * 32, 3)
    near = [float(c) for c in named["distance block2 to block3"]]
    assert near[2] < near[1], "imitated maps are nearer"


def test_another_baseline_is_trained_as_its_own_recipe_says(tmp_path):
    rival = Rival(
        lambda seed: Network(make("dilated-resnet10-4", 3, 3, (16, 16))), Training(epochs=1)
    )
    laid, folder = run(tmp_path / "run", laid=bench(rival=rival))
    assert {m["phase"] for m in folder.metrics()} == {"first", "baseline", "student"}
    assert laid.baselines[0].model.conv1.out_channels == 4


def test_switched_on_at_once_there_is_no_first_phase(tmp_path):
    _, folder = run(tmp_path / "run", method(start=0.0), bench(training=Training(epochs=1)))
    assert {m["phase"] for m in folder.metrics()} == {"baseline", "student"}


def test_batches_that_go_on_begin_where_the_others_ended():
    batches = bench().batches(8, 0)
    ours = [b["row"].tolist() for b in Later(batches, 2).epoch(1, 1)]
    assert ours == [b["row"].tolist() for b in batches.epoch(3, 1)]


@pytest.mark.parametrize(
    ("given", "changed", "sentence"),
    [
        ({"layers": ("block2", "blok3")}, {}, "no module 'blok3' to tap; did you mean block3"),
        ({"start": 0.9}, {}, "distillation has no epoch left; set start lower"),
        ({}, {"candidates": [Candidate(Network(nn.Identity()))]}, "is its own teacher; leave"),
    ],
)
def test_what_does_not_fit_is_found_before_training(given, changed, sentence):
    with pytest.raises(UserError, match=sentence):
        method(**given).rehearse(bench(**changed))


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"layers": ("block2",)}, "two blocks or more"),
        ({"start": 1.0}, "start"),
        ({"weight": -1.0}, "weight"),
        ({"reduction": "sum"}, "reduction"),
    ],
)
def test_wrong_settings_are_one_sentence(given, sentence):
    with pytest.raises(UserError, match=sentence):
        SAD(**given)


def test_a_task_without_masks_is_refused(tmp_path):
    recipe = recipes.validate(
        {
            "system": "sad",
            "methods": {"sad": {}},
            "data": {"source": "digits"},
            "student": {"model": "resnet8"},
        }
    )
    with pytest.raises(UserError, match="SAD works on lanes, segmentation, not on classif"):
        distillation.start(recipe, tmp_path / "run", Voice(quiet=True))


# The presets.


def test_the_papers_setting_is_a_valid_recipe_for_tusimple():
    found = recipes.validate(recipes.preset(system("sad"), "paper", "tusimple"))
    assert found.student.model == "enet-sad"
    assert found.student.training.factor(0.5 * found.student.training.epochs) == pytest.approx(
        0.5**0.9
    )
    chosen = found.method()
    assert (chosen.weight, chosen.iou, chosen.reduction) == (0.1, 0.1, "mean")
    for name in ("small", "lanes"):
        recipes.validate(recipes.preset(system("sad"), name, "roads"))


def test_the_report_shows_the_attention_of_the_blocks(tmp_path):
    values = recipes.preset(system("sad"), "smoke", "digit-scenes")
    change = {
        "data": {"limit": 16},
        "student": {"model": "dilated-resnet10-8", "training": {"epochs": 3}},
    }
    done = distillation.start(
        recipes.validate(recipes.merged(values, change)), tmp_path / "run", Voice(quiet=True)
    )
    page = (done.path / "report.html").read_text()
    assert "Attention of the blocks" in page
    assert "test scene 1, at the switch" in page
    assert "From left to right, row by row: image, true, without SAD, with SAD" in page
