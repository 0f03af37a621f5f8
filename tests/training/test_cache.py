import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from limbeck.data.augment import Augment
from limbeck.data.batches import ImageBatches
from limbeck.data.data import ResidentImages, Split
from limbeck.errors import UserError
from limbeck.tasks.classification import Classification
from limbeck.training.cache import Cache, identify
from limbeck.training.network import Network
from limbeck.training.progress import Voice
from limbeck.training.task import Answer, View
from limbeck.training.teacher import Teacher

TASK = Classification([str(n) for n in range(6)])
VIEW = View("photos", number=1, of=3, samples=40, rows=50)
ROWS = torch.tensor([3, 49, 0, 17])


class Sayings(Voice):
    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.said: list[str] = []

    def say(self, text: str, style: str | None = None) -> None:
        self.said.append(text)


def answers(rows: Tensor) -> Answer:
    """Logits and a feature that are a function of who is asked."""
    x = rows[:, None].double()
    logits = torch.cos(x * torch.arange(1, 7)).float() * 5
    return Answer({"logits": logits}, {"layer": torch.sin(x * torch.arange(12)).view(-1, 3, 2, 2)})


class Asked:
    """Counts whom the network is asked about."""

    def __init__(self, rows: Tensor, reply: Callable[[Tensor], Answer] = answers) -> None:
        self.rows, self.reply, self.asked = rows, reply, []

    def __call__(self, positions: Tensor) -> Answer:
        self.asked += self.rows[positions].tolist()
        return self.reply(self.rows[positions])


def look_up(cache: Cache, rows: Tensor, view: View = VIEW, who: str = "net", **given):
    asked = Asked(rows, **given)
    found = cache.answer({"net": who}, view, rows, asked, TASK.distributions)
    # to learn the shapes of what a cache is to hold, one sample is asked more
    return found, asked.asked


def equal(one: Answer, other: Answer) -> bool:
    return torch.equal(one["logits"], other["logits"]) and torch.equal(
        one.features["layer"], other.features["layer"]
    )


def test_a_full_cache_gives_back_every_bit_in_any_order(tmp_path):
    look_up(Cache(tmp_path, "full"), ROWS)
    shuffled = ROWS[[2, 0, 3, 1]]
    found, asked = look_up(Cache(tmp_path, "full"), shuffled)
    assert equal(found, answers(shuffled))
    assert len(asked) <= 1


def test_only_what_is_not_remembered_is_asked(tmp_path):
    cache = Cache(tmp_path, "full")
    look_up(cache, ROWS)
    more = torch.tensor([17, 5, 0, 6])
    found, asked = look_up(cache, more)
    assert asked == [5, 6]
    assert equal(found, answers(more))


def test_views_networks_and_data_are_kept_apart(tmp_path):
    cache = Cache(tmp_path, "full")
    look_up(cache, ROWS)
    for view, who in (
        (View("photos", 2, 3, 40, 50), "net"),
        (View("drawings", 1, 3, 40, 50), "net"),
        (VIEW, "another"),
    ):
        assert set(ROWS.tolist()) <= set(look_up(cache, ROWS, view, who)[1])


def test_the_number_of_views_may_grow(tmp_path):
    look_up(Cache(tmp_path, "full"), ROWS)
    _, asked = look_up(Cache(tmp_path, "full"), ROWS, View("photos", 1, 9, 40, 50))
    assert len(asked) <= 1


@pytest.mark.parametrize("storage", ["fp16", "top-2"])
def test_the_first_answer_is_the_one_that_is_remembered(tmp_path, storage):
    fresh, _ = look_up(Cache(tmp_path, storage), ROWS)
    again, _ = look_up(Cache(tmp_path, storage), ROWS)
    assert equal(fresh, again)
    assert fresh["logits"].dtype == torch.float32


def test_half_precision_rounds_and_nothing_else(tmp_path):
    found, _ = look_up(Cache(tmp_path, "fp16"), ROWS)
    assert torch.equal(found["logits"], answers(ROWS)["logits"].half().float())


def test_top_k_is_a_distribution_with_the_mass_of_the_rest_spread_evenly(tmp_path):
    found, _ = look_up(Cache(tmp_path, "top-2"), ROWS)
    p, q = answers(ROWS)["logits"].softmax(1), found["logits"].softmax(1)
    assert torch.allclose(q.sum(1), torch.ones(4))
    top = p.topk(2).indices
    assert torch.allclose(q.gather(1, top), p.gather(1, top), rtol=4e-3)
    rest = (1 - p.gather(1, top).sum(1, keepdim=True)) / 4
    others = torch.ones_like(p, dtype=torch.bool).scatter(1, top, False)
    assert torch.allclose(q[others].view(4, 4), rest.expand(4, 4), rtol=4e-3)


def test_top_k_of_no_more_classes_than_that_is_half_precision(tmp_path):
    found, _ = look_up(Cache(tmp_path, "top-6"), ROWS)
    assert torch.equal(found["logits"], answers(ROWS)["logits"].half().float())


@pytest.mark.parametrize("byte", range(0, 144, 9))
def test_an_altered_record_is_asked_again(tmp_path, byte):
    look_up(Cache(tmp_path, "full"), ROWS)
    (file,) = tmp_path.glob("*/view-1.records")
    content = bytearray(file.read_bytes())
    record = len(content) // VIEW.rows
    # a checksum, six logits of four bytes, twelve features of eight
    assert record == 8 + 24 + 96
    content[17 * record + byte % record] ^= 4
    file.write_bytes(content)
    found, asked = look_up(Cache(tmp_path, "full"), ROWS)
    assert 17 in asked
    assert equal(found, answers(ROWS))


def test_a_record_in_the_wrong_place_is_not_taken(tmp_path):
    look_up(Cache(tmp_path, "full"), ROWS)
    (file,) = tmp_path.glob("*/view-1.records")
    content = file.read_bytes()
    record = len(content) // VIEW.rows
    moved = content[: 4 * record] + content[3 * record : 4 * record] + content[5 * record :]
    file.write_bytes(moved)
    found, asked = look_up(Cache(tmp_path, "full"), torch.tensor([4]))
    assert 4 in asked
    assert equal(found, answers(torch.tensor([4])))


def test_the_size_is_said_before_it_is_written_and_comes_true(tmp_path):
    voice = Sayings()
    look_up(Cache(tmp_path, "fp16", voice), ROWS)
    (said,) = voice.said
    # 8 + 6 x 2 and 12 x 2 bytes, each rounded up to a multiple of 8
    assert "40 samples x 3 views, 48 bytes each, 0.0 MB to be written" in said
    (file,) = tmp_path.glob("*/view-1.records")
    assert file.stat().st_size == 48 * 50
    assert json.loads(file.with_name("about.json").read_text())["bytes"] == 48
    for number in (0, 2):
        look_up(Cache(tmp_path, "fp16"), ROWS, View("photos", number, 3, 40, 50))
    look_up(Cache(tmp_path, "fp16", voice), ROWS)
    assert voice.said[-1].endswith(f"48 bytes each, kept in {file.parent}")
    assert sum(f.stat().st_size for f in file.parent.glob("*.records")) == 3 * 48 * 50


def test_answers_that_do_not_fit_on_the_disk_are_refused_before_training(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100))
    cache = Cache(tmp_path / "deep" / "down")
    with pytest.raises(UserError, match=r"would take .* has 0.0 MB free; remember fewer views"):
        cache.check([answers(ROWS)], VIEW)
    with pytest.raises(UserError, match="would take"):
        look_up(cache, ROWS)
    assert not (tmp_path / "deep").exists()


def test_a_folder_that_cannot_be_written_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"engine\.cache_folder"):
        look_up(Cache(tmp_path / "file"), ROWS)


def test_answers_of_different_shapes_are_a_sentence(tmp_path):
    cache = Cache(tmp_path, "full")
    look_up(cache, ROWS)

    def wider(rows: Tensor) -> Answer:
        wide = torch.zeros(len(rows), 3, 4, 4, dtype=torch.float64)
        return Answer(answers(rows).outputs, {"layer": wide})

    with pytest.raises(UserError, match=r"layer have the shape \(3, 4, 4\) .* \(3, 2, 2\)"):
        look_up(cache, torch.tensor([8]), reply=wider)


def test_answers_too_large_for_half_precision_are_a_sentence(tmp_path):
    large = lambda rows: Answer({"logits": torch.full((len(rows), 2), 1e6)})  # noqa: E731
    with pytest.raises(UserError, match=r"engine\.cache=full"):
        look_up(Cache(tmp_path), ROWS, reply=large)


def test_a_storage_that_does_not_exist_is_a_sentence(tmp_path):
    for storage in ("top-0", "top-", "int8", ""):
        with pytest.raises(UserError, match="in full, in fp16 or as top-K"):
            Cache(tmp_path, storage)


def net(seed: int = 0, wide: int = 16) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, wide),
        nn.ReLU(),
        nn.Linear(wide, 6),
    )


def test_a_network_is_known_by_weights_structure_and_input():
    one = identify(Network(net()))
    assert one == identify(Network(net()))
    assert one != identify(Network(net(seed=1)))
    assert one != identify(Network(net(), input=lambda view: view))
    other = net()
    other[5] = nn.Tanh()  # the same weights
    assert one != identify(Network(other))


def split(n: int = 45) -> Split:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (n + 5, 1, 4, 4), generator=generator, dtype=torch.uint8)
    rows = torch.randperm(n + 5, generator=generator)[:n]
    return Split("train", ResidentImages(pixels), torch.arange(n) % 6, rows)


def batches(views: int | None = 2, size: int = 16, seed: int = 0) -> ImageBatches:
    augment = Augment(crop=1, flip=True, views=views)
    return ImageBatches(split(), size, seed=seed, train=True, augment=augment)


class Calls(nn.Module):
    """Counts the samples that reach the model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.samples = model, []
        self.model.register_forward_pre_hook(lambda _, args: self.samples.append(len(args[0])))

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("taps", [(), ("1", "5")])
def test_a_teacher_with_a_full_cache_answers_as_one_without_bit_for_bit(tmp_path, taps, layout):
    one, other = (Network(net()).lay_out(layout) for _ in range(2))
    plain, remembering = Teacher(one), Teacher(other, cache=Cache(tmp_path, "full"))
    plain.tap(taps)
    remembering.tap(taps)
    for epoch in range(5):
        for batch in batches().epoch(epoch):
            one, other = plain(TASK, batch), remembering(TASK, batch)
            assert torch.equal(one["logits"], other["logits"])
            assert list(one.features) == list(other.features) == list(taps)
            for tap in taps:
                assert torch.equal(one.features[tap], other.features[tap])
                assert one.features[tap].stride() == other.features[tap].stride()


def test_after_as_many_epochs_as_there_are_views_nothing_is_asked(tmp_path):
    calls = Calls(net())
    teacher = Teacher(calls, fold=False, cache=Cache(tmp_path))
    for epoch in range(6):
        calls.samples.clear()
        for batch in batches().epoch(epoch):
            teacher(TASK, batch)
        assert bool(calls.samples) == (epoch < 2)


def test_batches_without_a_view_are_answered_afresh(tmp_path):
    teacher = Teacher(net(), cache=Cache(tmp_path))
    other = ImageBatches(split(), 16)
    for batch in other.epoch(0):
        assert torch.equal(teacher(TASK, batch)["logits"], Teacher(net())(TASK, batch)["logits"])
    for batch in batches(views=None).epoch(0):
        teacher(TASK, batch)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("mean", ["probabilities", "logits"])
def test_each_network_of_an_ensemble_is_remembered_by_itself(tmp_path, mean):
    nets = [net(1), net(2)]
    whole = Teacher(nets, mean=mean, cache=Cache(tmp_path, "full"))
    batch = next(batches().epoch(0))
    asked = whole(TASK, batch)
    fresh = Teacher(nets, mean=mean)(TASK, batch)
    assert torch.equal(asked["logits"], fresh["logits"])
    assert len(asked.members) == len(fresh.members)
    one = Teacher(nets[1], cache=Cache(tmp_path, "full"))(TASK, batch)
    assert len(list(tmp_path.iterdir())) == 2
    assert torch.equal(one["logits"], Teacher(nets[1])(TASK, batch)["logits"])


def test_what_changes_an_answer_changes_the_folder(tmp_path):
    batch = next(batches().epoch(0))
    makes: list[Callable[[], Teacher]] = [
        lambda: Teacher(net(), cache=Cache(tmp_path)),
        lambda: Teacher(net(seed=1), cache=Cache(tmp_path)),
        lambda: Teacher(net(), cache=Cache(tmp_path, "full")),
        lambda: Teacher(net(), fold=False, cache=Cache(tmp_path)),
        lambda: Teacher(net(), precision=torch.bfloat16, cache=Cache(tmp_path)),
    ]
    for number, make in enumerate(makes):
        make()(TASK, batch)
        assert len(list(tmp_path.iterdir())) == number + 1
    with torch.autocast("cpu", torch.bfloat16):
        makes[0]()(TASK, batch)
    assert len(list(tmp_path.iterdir())) == len(makes) + 1
    tapped = makes[0]()
    tapped.tap(["1"])
    tapped(TASK, batch)
    tapped.tap(["1"], outputs=False)
    assert not tapped(TASK, batch).outputs
    assert len(list(tmp_path.iterdir())) == len(makes) + 3


def test_two_caches_in_one_folder_share_what_they_know(tmp_path: Path):
    one, other = Cache(tmp_path, "full"), Cache(tmp_path, "full")
    look_up(one, ROWS[:2])
    look_up(other, ROWS[2:])
    _, asked = look_up(one, ROWS)
    assert not asked
