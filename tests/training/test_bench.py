import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from limbeck.data.augment import Augment
from limbeck.data.data import ResidentImages, Split
from limbeck.errors import UserError
from limbeck.systems.classification.kd import KD
from limbeck.tasks.classification import Classification
from limbeck.training.bench import Bench, Candidate, Rival
from limbeck.training.cache import Cache
from limbeck.training.engine import Engine
from limbeck.training.method import Supervised
from limbeck.training.network import Network
from limbeck.training.phases import Training


def split(n: int = 20) -> Split:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (n, 3, 6, 6), generator=generator, dtype=torch.uint8)
    return Split("train", ResidentImages(pixels), torch.arange(n) % 3)


class Head(nn.Module):
    """A convolution whose output is looked at in one of three ways."""

    def __init__(self, look: str = "flatten") -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.fc = nn.Linear(4 * 36, 3)
        self.look = look

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.look == "view":
            return self.fc(x.view(len(x), -1))
        if self.look == "as it lies":
            return self.fc(x.as_strided((len(x), 144), (144, 1)))
        return self.fc(x.flatten(1))


def bench(model: nn.Module | None = None, **given) -> Bench:
    training = split()
    given = {
        "task": Classification(["a", "b", "c"]),
        "train": training,
        "transfer": training,
        "validation": [],
        "test": training,
        "candidates": [Candidate(Network(Head()))],
        "make_student": lambda seed: Network(model or Head()),
        "training": Training(epochs=1, batch_size=8),
        **given,
    }
    return Bench(**given)


def test_a_convolutional_network_is_laid_out_channels_last():
    network = bench().student(0)
    assert network.memory_format == torch.channels_last
    assert network.model.conv.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("look", ["view", "as it lies"])
def test_a_network_that_looks_at_its_input_as_it_lies_is_left_contiguous(look):
    assert bench(Head(look)).student(0).memory_format == torch.contiguous_format


def test_a_network_that_answers_more_or_less_as_its_input_lies_is_left_contiguous():
    class Counting(Head):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)[: 1 + x.is_contiguous()]

    assert bench(Counting()).student(0).memory_format == torch.contiguous_format


def test_a_network_without_convolutions_is_left_contiguous():
    model = nn.Sequential(nn.Flatten(), nn.Linear(108, 3))
    assert bench(model).student(0).memory_format == torch.contiguous_format


@pytest.mark.parametrize(
    ("inputs", "stride", "layout"),
    [
        (3, 2, torch.contiguous_format),
        (3, 1, torch.channels_last),
    ],
)
def test_a_convolution_whose_backward_pass_spoils_memory_is_left_contiguous(inputs, stride, layout):
    model = nn.Sequential(
        nn.Conv2d(inputs, 8, 1, stride), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
    )
    laid = bench(model, engine=Engine(device="cpu")).student(0)
    assert laid.memory_format == layout


def test_channels_last_can_be_switched_off():
    network = bench(engine=Engine(channels_last=False)).student(0)
    assert network.memory_format == torch.contiguous_format


def test_the_layout_changes_an_answer_by_rounding_alone():
    images = torch.rand(4, 3, 6, 6)
    model = Head()
    one, other = Network(model)(images), bench(model).student(0)(images)
    assert torch.allclose(one, other, atol=1e-6)


def test_the_teacher_answers_as_the_engine_says(tmp_path):
    engine = Engine(teacher_precision="bf16", fold=False)
    made = bench(engine=engine).frozen([Network(Head())], Cache(tmp_path))
    assert (made.precision, made.fold) == (torch.bfloat16, False)


def test_fresh_views_without_end_cannot_be_remembered_and_are_met_before_training(tmp_path):
    task = Classification(["a", "b", "c"], Augment(flip=True))
    with pytest.raises(UserError, match=r"of images set data\.augment\.views"):
        bench(task=task, cache=Cache(tmp_path)).rehearse(KD())
    few = Classification(["a", "b", "c"], Augment(flip=True, views=2))
    bench(task=few, cache=Cache(tmp_path)).rehearse(KD())
    assert not list(tmp_path.iterdir())


def test_samples_of_somebodys_own_loader_have_no_name_to_be_remembered_by(tmp_path):
    loader = DataLoader(TensorDataset(torch.rand(8, 3, 6, 6), torch.arange(8) % 3), batch_size=4)
    mine = bench(train=loader, transfer=loader, cache=Cache(tmp_path))
    with pytest.raises(UserError, match="instead of your own loaders"):
        mine.rehearse(KD())


def test_without_labels_the_plain_student_learns_from_the_teachers_samples_in_as_many_steps():
    unlabelled = Split("train", split(40).images, None)
    phases = bench(transfer=unlabelled, training=Training(epochs=2, batch_size=4)).plain(0)
    fit = next(phases)
    assert fit.batches.split.labels is not None
    assert fit.epochs * len(fit.batches) == 2 * 10


def test_without_any_labels_there_is_no_plain_student():
    unlabelled = Split("train", split().images, None)
    assert list(bench(train=unlabelled, transfer=unlabelled).plain(0)) == []


def test_a_rival_takes_the_place_of_the_plain_student():
    rival = Rival(lambda seed: Network(Head("view")), Training(epochs=3, batch_size=5))
    laid = bench(rival=rival, candidates=[])
    baseline, student = Supervised().phases(laid)
    assert (baseline.name, baseline.epochs, len(baseline.batches)) == ("baseline", 3, 4)
    assert (student.name, student.epochs) == ("student", 1)
    assert laid.baselines[0].model.look == "view"
    assert laid.students[0].model.look == "flatten"


def test_networks_that_learn_from_labels_alone_take_no_teacher():
    with pytest.raises(UserError, match="takes no teacher"):
        Supervised().rehearse(bench())


def test_further_networks_are_delivered_with_the_seed_they_were_trained_with():
    laid, fused = bench(seeds=(0, 1)), Network(Head())
    student = laid.student(1)
    laid.deliver("fused", 1, fused)
    assert laid.delivered(1) == {"student": student, "fused": fused}
    assert laid.delivered(0) == {}


@pytest.mark.parametrize("role", ["student", "teacher-1", "result", "", "../other", "Fused", "a b"])
def test_a_role_that_is_no_name_of_a_file_of_its_own_is_refused(role):
    with pytest.raises(ValueError, match="cannot be the role"):
        bench().deliver(role, 0, Network(Head()))
