"""Image generation: an image is made of another one, its edges or a map of what it shows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor, nn

from limbeck import plain
from limbeck.data import pairs as sources
from limbeck.data.augment import Augment
from limbeck.data.data import Split
from limbeck.data.pairs import Direction, PairBatches
from limbeck.errors import UserError, did_you_mean
from limbeck.models.build import build
from limbeck.models.generators import ConditionInput
from limbeck.models.input import Input
from limbeck.models.spec import STORED, Spec
from limbeck.training.domain import Domain, Part, Words
from limbeck.training.network import Network
from limbeck.training.progress import Voice
from limbeck.training.taps import Taps
from limbeck.training.task import Answer, Batch, Batches, Task, model_output, moved
from limbeck.training.teacher import Teacher

SHOWN = 6
"""So many test pairs are kept for the report."""
_MEASURED = 64

Made = list[tuple[Tensor, Tensor]]
"""What was made and what should have been, float (B, C, H, W) in [0, 1], batch by batch."""


class Generation(Task):
    """``image`` and ``target`` of :class:`limbeck.data.pairs.PairBatches` in a batch; an answer's
    ``image``, float (B, C, H, W) in [-1, 1], is what was made of the batch's.

    Structural similarity decides: by the pixels' errors alone a blur is better than a picture that
    is sharp and a little off. The supervised loss has that fault; methods bring their own critics.

    Args:
        given: channels of the condition.
        augment: what is done at random to a training pair, to both alike.
        workers: processes that read pairs which do not fit into memory.
        device: where networks and batches live.
    """

    name: ClassVar[str] = "generation"
    metric: ClassVar[str] = "SSIM"
    higher_is_better: ClassVar[bool] = True

    def __init__(
        self,
        given: int,
        augment: Augment | None = None,
        workers: int = 0,
        device: torch.device | None = None,
    ) -> None:
        self.given = given
        self.augment = augment or Augment()
        self.workers = workers
        self.device = device or torch.device("cpu")

    def batches(
        self, split: Split, *, batch_size: int, seed: int = 0, train: bool = False
    ) -> Batches:
        return PairBatches(
            split,
            batch_size,
            given=self.given,
            seed=seed,
            train=train,
            augment=self.augment,
            workers=self.workers,
            device=self.device,
        )

    def run(self, network: Network, batch: Batch, taps: Taps | None = None) -> Answer:
        if taps is None or not taps.paths:
            return Answer(self._outputs(network(batch["image"]), batch))
        output, features = taps.watch(network, batch["image"])
        return Answer({} if output is None else self._outputs(output, batch), features)

    def _outputs(self, output: Any, batch: Batch) -> dict[str, Tensor]:
        """What was made by its name, at the size of the condition."""
        image, size = model_output(output), batch["image"].shape[2:]
        if image.shape[2:] != size:
            image = F.interpolate(image, size, mode="bilinear", antialias=True)
        return {"image": image}

    def labelled(self, batch: Batch) -> bool:
        return "target" in batch

    def loss(self, answer: Answer, batch: Batch) -> Tensor:
        """The mean absolute difference to the target, of values in [-1, 1]."""
        return F.l1_loss(answer["image"].float(), batch["target"])

    @torch.no_grad()
    def made(self, network: Network | Teacher, split: Split) -> Made:
        """What a network makes of a split, in eval mode, beside what it should.

        Raises:
            UserError: the split is empty.
        """
        if not len(split):
            raise UserError("there are no pairs to measure on")
        was_training = network.training
        network.eval()
        found: Made = []
        for batch in self.batches(split, batch_size=_MEASURED).epoch(0):
            said = self.answer(network, moved(batch, self.device))["image"].float()
            # As images lie in memory that torchmetrics can flatten.
            one, other = (
                ((part.cpu() + 1) / 2).contiguous() for part in (said.clamp(-1, 1), batch["target"])
            )
            found.append((one, other))
        network.train(was_training)
        return found

    def measure(self, network: Network | Teacher, split: Split) -> dict[str, float]:
        """``SSIM`` (up to 1), ``PSNR`` (dB) and ``absolute error`` (white is 1), means over images.

        As torchmetrics has them; the window of the similarity is the usual 11 x 11, a Gaussian of
        deviation 1.5.
        """
        return self.measures(self.made(network, split))

    def measures(self, found: Made) -> dict[str, float]:
        """The measures of what was made."""
        # Here, as it takes longer to import than a small network to train.
        from torchmetrics import MeanAbsoluteError, Metric
        from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

        # One process measures alone, so a metric must not wait for the others.
        alike = StructuralSimilarityIndexMeasure(data_range=1.0, sync_on_compute=False)
        noise = PeakSignalNoiseRatio(data_range=1.0, dim=(1, 2, 3), sync_on_compute=False)
        error = MeanAbsoluteError(sync_on_compute=False)
        named: dict[str, Metric] = {"SSIM": alike, "PSNR": noise, "absolute error": error}
        for said, true in found:
            for measure in named.values():
                measure.update(said, true)
        return {name: measure.compute().item() for name, measure in named.items()}

    def compare(self, networks: Mapping[str, Network | Teacher], split: Split) -> dict[str, Any]:
        """All measures of each network."""
        return {"measures": {role: self.measure(n, split) for role, n in networks.items()}}

    def record(self, networks: Mapping[str, Network | Teacher], split: Split, folder: Path) -> None:
        """Write ``made.safetensors``: a few test pairs, evenly spaced, and what was made of them.

        ``given``, ``true`` and ``made.ROLE``, uint8 (M, C, H, W).
        """
        chosen = torch.linspace(0, len(split) - 1, min(SHOWN, len(split))).round().long()
        few = split.subset(chosen)
        stacked = torch.stack([few.images.read(int(row)).cpu() for row in few.rows])
        tensors = dict(zip(("given", "true"), stacked.tensor_split([self.given], 1), strict=True))
        for role, network in networks.items():
            said = torch.cat([said for said, _ in self.made(network, few)])
            tensors[f"made.{role}"] = (255 * said).round().to(torch.uint8)
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            folder / "made.safetensors",
        )


class Penultimate(nn.Module):
    """What a classifier's last linear layer reads, float64 (B, F), of images in [0, 1].

    Raises:
        UserError: the network has no linear layer.
    """

    def __init__(self, network: Network) -> None:
        super().__init__()
        layers = [m for m in network.modules() if isinstance(m, nn.Linear)]
        if not layers:
            raise UserError(
                f"{network.name} cannot judge images: it has no linear layer, before which the "
                "features lie that are compared"
            )
        self.network = network.eval().requires_grad_(False)
        self.last = layers[-1]
        self.num_features = self.last.in_features

    def forward(self, images: Tensor) -> Tensor:
        kept: list[Tensor] = []
        hook = self.last.register_forward_pre_hook(lambda _, given: kept.append(given[0]))
        self.network(images)
        hook.remove()
        return kept[-1].double().flatten(1)


class JudgedGeneration(Generation):
    """Generation measured by a classifier's features: their Fréchet distance decides.

    That of normal distributions fitted to the penultimate features of true and of made images
    (Heusel et al. 2017, equation 6), with a classifier of one's own in place of Inception's, so the
    numbers are not those called FID.

    Args:
        judge: the classifier.
        given, more: as of :class:`Generation`.
    """

    metric: ClassVar[str] = "Fréchet distance"
    higher_is_better: ClassVar[bool] = False

    def __init__(self, judge: Network, given: int, *more: Any) -> None:
        super().__init__(given, *more)
        self.judge = Penultimate(judge)

    def measures(self, found: Made) -> dict[str, float]:
        """As of all generation, and ``Fréchet distance`` (0 or more).

        Raises:
            UserError: there are fewer than two pairs.
        """
        from torchmetrics.image.fid import FrechetInceptionDistance

        distance = FrechetInceptionDistance(feature=self.judge, sync_on_compute=False)
        for said, true in found:
            distance.update(said, real=False)
            distance.update(true, real=True)
        if int(distance.real_features_num_samples) < 2:
            raise UserError("the distance of two sets of images wants two images or more")
        return {"Fréchet distance": float(distance.compute()), **super().measures(found)}


class Together(Part):
    """What is done at random to both images of a training pair alike."""

    crop: Annotated[int, Field(ge=0)] = Field(default=0, description="pixels")
    flip: bool = False
    zoom: Annotated[float, Field(gt=0, le=1)] = 1.0
    views: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="so many views of each pair; a fresh one each epoch if not given"
    )


Side = Annotated[int, Field(ge=12, le=2**12, multiple_of=4)]


class PairWords(Words):
    """Where pairs come from, and what is given."""

    size: tuple[Side, Side] | None = Field(default=None, description="height and width")
    condition: Literal["edges", "grey"] = Field(
        default="grey", description="what is given of a source of single images"
    )
    direction: Direction = Field(
        default="AtoB", description="of pairs from files: A is the left one, or in the folder A"
    )
    judge: str | None = Field(
        default=None, description="a classifier, run:PATH or file:PATH, by whose features to judge"
    )
    augment: Together = Together()


class ImageGeneration(Domain):
    """Images to be made of edges, of grey images, or of whatever lies beside them."""

    words_type: ClassVar[type[Words]] = PairWords
    source = "photographs"

    def __init__(
        self, words: PairWords, *, device: torch.device, workers: int, voice: Voice
    ) -> None:
        self.words, self.device, self.workers = words, device, workers
        kind, path = _parsed(words.source)
        if kind == "photographs":
            size = words.size or (sources.SIDE, sources.SIDE)
            pairs = sources.of_photographs(size, words.condition)
        elif path is not None:
            pairs = sources.read_pairs(path, words.size, words.direction)
        else:
            pairs = sources.of_images(words.source, words.size, words.condition, words.validation)
        pairs = pairs.completed(words.validation)
        voice.say(pairs.describe(words.source))
        train = pairs.splits["train"]
        if words.limit is not None and words.limit < len(train):
            train = train.subset(torch.linspace(0, len(train) - 1, words.limit).round().long())
        self.channels = ("grey",) if pairs.made == 1 else ("red", "green", "blue")
        half = (0.5,) * pairs.given
        self.input = ConditionInput(pairs.given, pairs.size, half, half)
        self.judge = None if words.judge is None else _judge(words.judge)
        self.splits = {**pairs.splits, "train": train, "transfer": train}
        self.facts = {
            "data": words.source,
            "fingerprint": "-".join(s.fingerprint()[:16] for s in self.splits.values()),
        }

    @staticmethod
    def kind_of(source: str) -> str:
        return _parsed(source)[0]

    def task(self, augment: Any = None) -> Generation:
        if augment is not None:
            raise UserError(
                "pairs are augmented alike for all models; leave a model's own augment out, and "
                "set data.augment"
            )
        given = self.input.channels
        more = Augment(**self.words.augment.model_dump()), self.workers, self.device
        if self.judge is None:
            return Generation(given, *more)
        return JudgedGeneration(self.judge.to(self.device), given, *more)

    def network(self, name: str, seed: int | None = None) -> Network:
        return build(name, self.channels, self.input, seed)

    def sample(self) -> Tensor:
        return self.input.sample()


def _parsed(source: str) -> tuple[str, Path | None]:
    """The kind of data, and where it lies if it is pairs in files."""
    kind, _, rest = source.partition(":")
    if source == "photographs":
        return source, None
    if kind == "pairs":
        if not rest:
            raise UserError("pairs: wants a path behind the colon, as in pairs:PATH")
        path = plain.path(rest)
        if not path.exists():
            raise UserError(f"the data path {path} does not exist")
        return kind, path
    if not plain.path(source).exists() and kind not in sources.KINDS:
        raise UserError(
            f"there is no source of images {source!r}; "
            + did_you_mean(kind, ["photographs", "pairs", *sources.KINDS])
        )
    return sources.kind_of(source), None


def _judge(name: str) -> Network:
    """The classifier that a recipe names; raises :class:`UserError` for one without weights."""
    if Spec.parse(name).kind not in STORED:
        raise UserError(
            f"data.judge={name}: a trained classifier is wanted, as run:PATH or file:PATH"
        )
    network = build(name, (), Input(3, (32, 32), (0.5,) * 3, (0.5,) * 3))
    if type(network.input) is not Input:
        raise UserError(f"data.judge={name}: {network.name} is no classifier of images")
    return network
