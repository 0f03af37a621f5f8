import json
import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import limbeck
from carrying import noise
from limbeck import recipes
from limbeck.catalogue import system
from limbeck.errors import UserError
from limbeck.losses import discrimination, feature_distance, fooling
from limbeck.models import zoo
from limbeck.models.plain import CNN
from limbeck.systems.classification.ktan import ACCURACY, KTAN, Discriminator, TeacherToStudent
from limbeck.tasks.classification import Classification
from limbeck.training.distiller import Distiller
from limbeck.training.engine import Engine
from limbeck.training.phases import Training


def net(widths=(4, 6), seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return CNN(widths, 3, 1)


def batch() -> dict[str, torch.Tensor]:
    return {
        "image": noise(5, 1, 8, 8, dtype=torch.float32),
        "label": torch.tensor([0, 1, 2, 0, 1]),
    }


def test_the_losses_have_the_values_worked_out_by_hand():
    zero, three = torch.zeros(4), torch.full((4,), math.log(3))
    assert discrimination(zero, zero).item() == pytest.approx(1.3862944)
    assert fooling(zero).item() == pytest.approx(0.6931472)
    assert discrimination(three, -three).item() == pytest.approx(0.5753641)
    assert fooling(-three).item() == pytest.approx(1.3862944)
    assert fooling(-three, "min-max").item() == pytest.approx(math.log(3 / 4))
    for shape in ((2, 3, 4, 4), (1, 5, 2, 3)):
        ones = noise(*shape)
        assert feature_distance(ones, ones) == 0
        assert feature_distance(ones, ones + 0.5).item() == pytest.approx(0.25)


def test_the_gradient_at_a_logit_of_zero_is_minus_half_over_the_batch():
    logits = torch.zeros(5, requires_grad=True)
    fooling(logits).backward()
    assert torch.allclose(logits.grad, torch.full((5,), -0.1))


def test_values_and_gradients_follow_an_independent_formula():
    real, fake = noise(6).requires_grad_(), noise(6, seed=1).requires_grad_()
    loss = discrimination(real, fake)
    loss.backward()
    s = [1 / (1 + math.exp(-x)) for x in real.tolist()]
    t = [1 / (1 + math.exp(-x)) for x in fake.tolist()]
    value = -sum(math.log(x) for x in s) / 6 - sum(math.log(1 - x) for x in t) / 6
    assert loss.item() == pytest.approx(value, rel=1e-12)
    assert real.grad.tolist() == pytest.approx([(x - 1) / 6 for x in s], rel=1e-12)
    assert fake.grad.tolist() == pytest.approx([x / 6 for x in t], rel=1e-12)
    for form, slope in (("non-saturating", lambda x: x - 1), ("min-max", lambda x: -x)):
        fake.grad = None
        fooling(fake, form).backward()
        assert fake.grad.tolist() == pytest.approx([slope(x) / 6 for x in t], rel=1e-12)


def test_logits_of_any_size_stay_finite():
    far = torch.tensor([1e4, -1e4])
    assert torch.isfinite(discrimination(far, -far))
    assert torch.isfinite(fooling(far, "min-max"))


def test_the_layer_brings_any_map_to_the_students_shape():
    for size in ((16, 16), (8, 8), (4, 4), (12, 10)):
        made = TeacherToStudent(64, size, (32, 8, 8))(torch.randn(2, 64, *size))
        assert made.shape == (2, 32, 8, 8)
        assert (made >= 0).all()


def test_a_discriminator_keeps_no_statistics_and_judges_small_maps():
    for size in ((8, 8), (2, 2), (1, 1)):
        judge = Discriminator(4, size)
        assert judge(torch.randn(3, 4, *size)).shape == (3,)
        assert [name for name, _ in judge.named_buffers()] == ["steps"]


TASK = Classification("abc")


def distiller(**given) -> Distiller:
    method = KTAN(student_layer="stage2", **given)
    return Distiller(net(), net((5, 8), seed=1), method, TASK, batch())


def test_without_weights_the_loss_is_plain_cross_entropy_bit_for_bit():
    found = distiller(kd=0, feature=0, adversarial=0)
    terms = found(batch())
    logits = found.student.model(batch()["image"])
    assert list(terms) == ["labels"]
    assert torch.equal(terms["labels"], nn.functional.cross_entropy(logits, batch()["label"]))


def test_the_students_loss_reaches_the_student_alone():
    found = distiller()
    sum(found(batch()).values()).backward()
    assert all(p.grad is None for p in found.method.parameters())
    assert all(p.grad is not None for p in found.student.parameters())


def test_identity_wants_equal_shapes():
    with pytest.raises(UserError, match="identity needs equal ones"):
        distiller(identity=True)
    method = KTAN(student_layer="stage2", identity=True)
    same = Distiller(net(), net(), method, TASK, batch())(batch())
    assert same["kd"].item() == pytest.approx(0, abs=1e-6)


def test_the_soft_targets_carry_the_squared_temperature():
    found = distiller(feature=0, adversarial=0, kd=1, temperature=3.0)
    ours, theirs = found.student.model(batch()["image"]), found.teacher.networks[0].model
    z, t = ours.double() / 3, theirs.eval()(batch()["image"]).double() / 3
    log_q, log_p = z.log_softmax(1), t.log_softmax(1)
    wanted = 9 * (log_p.exp() * (log_p - log_q)).sum(1).mean()
    assert found(batch())["kd"].item() == pytest.approx(wanted.item(), rel=1e-5)


def test_maps_of_other_shapes_and_what_is_no_map_are_one_sentence():
    with pytest.raises(UserError, match="both must be equal"):
        feature_distance(noise(1, 2, 3, 3), noise(1, 2, 4, 4))
    with pytest.raises(UserError, match="a discriminator judges"):
        Distiller(net(), net(), KTAN(student_layer="fc"), TASK, batch())


@pytest.mark.parametrize(
    "given", [{"kd": -1}, {"temperature": 0}, {"form": "hinge"}, {"warmup": -1}, {"lambda": 1}]
)
def test_wrong_hyper_parameters_are_one_sentence(given):
    with pytest.raises(UserError) as caught:
        KTAN(**given)
    assert "\n" not in str(caught.value)


def loader() -> list[DataLoader]:
    images = noise(60, 1, 8, 8, dtype=torch.float32)
    labels = images.flatten(1)[:, :3].argmax(1)
    sets = TensorDataset(images, labels)
    return [DataLoader(sets, 20, shuffle=s) for s in (True, False, False)]


LAYER = Training(epochs=3, lr=0.05, batch_size=20)


def run(path, kind=KTAN, training=None, resume=False, **given):
    return limbeck.distill(
        net(),
        net((8, 12), seed=1),
        loader(),
        out=path,
        method=kind(student_layer="stage2", layer=LAYER, **given),
        training=training or Training(epochs=3, lr=0.05),
        quiet=True,
        resume=resume,
        engine=Engine(device="cpu", checkpoint_seconds=0.0),
    )


def same(one, other) -> bool:
    ours, theirs = one.student.state_dict(), other.student.state_dict()
    return all(torch.equal(v, theirs[k]) for k, v in ours.items())


def test_a_discriminator_that_is_not_heeded_leaves_the_students_run_as_it_was(tmp_path):
    without = run(tmp_path / "without", adversarial=0.0)
    deaf = run(tmp_path / "deaf", adversarial=1.0, warmup=3)
    heard = run(tmp_path / "heard", adversarial=1.0, warmup=2)
    assert same(without, deaf)
    assert not same(without, heard)
    kept = [
        m["validation"][ACCURACY] for m in deaf.run.metrics() if ACCURACY in m.get("validation", {})
    ]
    assert len(kept) == 3
    assert all(0 <= v <= 1 for v in kept)


@pytest.mark.parametrize(("where", "at"), [("layer", 5), ("student", 6)])
def test_a_run_goes_on_where_it_failed(tmp_path, where, at):
    whole = run(tmp_path / "whole", warmup=1, adversarial=0.5)
    calls = {"n": 0}

    class Failing(KTAN):
        def terms(self, student, teacher, batch):
            calls["n"] += where == "student"
            if calls["n"] == at:
                raise RuntimeError("as if the power had gone")
            return super().terms(student, teacher, batch)

        def prepare(self, bench):
            for phase in super().prepare(bench):
                (update,) = phase.updates
                inner = update.terms

                def terms(batch, inner=inner):
                    calls["n"] += where == "layer"
                    if calls["n"] == at:
                        raise RuntimeError("as if the power had gone")
                    return inner(batch)

                update.terms = terms
                yield phase

    with pytest.raises(RuntimeError):
        run(tmp_path / "run", Failing, warmup=1, adversarial=0.5)
    assert same(whole, run(tmp_path / "run", resume=True, warmup=1, adversarial=0.5))


def test_each_step_changes_only_what_it_trains(tmp_path):
    seen: list[tuple[str, bool]] = []

    class Watching(KTAN):
        def distil(self, bench, seed):
            for fit in super().distil(bench, seed):
                judge, student = (u for u in fit.updates)
                parts = {"discriminator": judge.train["discriminator"]}
                parts["student"] = student.train["student"]
                state: dict[str, dict[str, torch.Tensor]] = {}

                def note(name, inner, parts=parts, state=state):
                    def terms(batch):
                        now = {
                            k: {n: v.clone() for n, v in m.named_parameters()}
                            for k, m in parts.items()
                        }
                        for k in now:
                            moved = k in state and any(
                                not torch.equal(v, state[k][n]) for n, v in now[k].items()
                            )
                            seen.append((f"{k} before {name}", moved))
                        state.update(now)
                        return inner(batch)

                    return terms

                judge.terms = note("discriminator", judge.terms)
                student.terms = note("student", student.terms)
                yield fit

    run(tmp_path / "run", Watching)
    moved = {name for name, changed in seen if changed}
    assert moved == {"discriminator before student", "student before discriminator"}
    assert len(seen) == 4 * (9 + 1)


def test_the_paper_preset_is_trained_as_the_card_says():
    recipe = recipes.validate(recipes.preset(system("ktan"), "paper", "cifar100"))
    method, training = recipe.method(), recipe.student.training
    assert (method.kd, method.feature, method.adversarial, method.temperature) == (1, 1, 1e-3, 4)
    assert (training.epochs, training.milestones, training.batch_size) == (200, (100, 150), 128)
    # CIFAR ResNets of depth 6n + 2 with projections, for 100 classes.
    wanted = {"resnet56": 861_620, "resnet20": 278_324}
    assert {recipe.teachers[0].model, recipe.student.model} == set(wanted)
    for name, number in wanted.items():
        assert sum(p.numel() for p in zoo.make(name, 100, 3, (32, 32)).parameters()) == number


def test_the_report_shows_the_discriminators_course(tmp_path):
    found = run(tmp_path / "run").run
    course = [
        m["validation"][ACCURACY] for m in found.metrics() if ACCURACY in m.get("validation", {})
    ]
    told = json.loads((found.path / "findings.json").read_text())["findings"][0]
    assert told["table"][1][1:] == [f"{course[0]:.3f}", f"{course[-1]:.3f}"]
    assert [y for _, y in told["charts"][0]["lines"]["student"]] == course


def test_a_recipe_chooses_the_betas_of_adam():
    settings = Training(optimiser="adam", betas=(0.5, 0.999))
    assert settings.build(nn.Linear(1, 1).parameters()).defaults["betas"] == (0.5, 0.999)
