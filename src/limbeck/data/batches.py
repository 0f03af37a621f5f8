"""Batches of images in an order that is a function of (seed, epoch)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from limbeck.data.augment import Augment
from limbeck.data.data import Images, ResidentImages, Split
from limbeck.errors import UserError
from limbeck.training.seeding import derive
from limbeck.training.signals import deaf
from limbeck.training.task import Batch, View


class ImageBatches:
    """Batches of a split: ``image`` float (B, C, H, W) in [0, 1], ``row`` int64, ``label`` int64.

    Training batches hold a :class:`View`, ``view``, where there are finitely many, and mixed ones
    the partners' labels, ``partner_label`` int64, with the labels' own share, ``mix`` float in
    [0, 1].

    Args:
        split: the samples; without labels there is no ``label`` in the batches.
        batch_size: samples a step, over all processes.
        seed: decides order and augmentation.
        train: shuffle and augment; otherwise the split's own order and pixels.
        augment: what is done at random to training images.
        workers: processes that read images which are not in memory.
        device: where the batches are made; images in memory are moved there once.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        *,
        seed: int = 0,
        train: bool = False,
        augment: Augment | None = None,
        workers: int = 0,
        device: torch.device | None = None,
    ) -> None:
        self.split = split
        self.batch_size = batch_size
        self.seed = seed
        self.train = train
        self.augment = augment or Augment()
        self.workers = workers
        self.device = device or torch.device("cpu")

    def __len__(self) -> int:
        return -(-len(self.split) // self.batch_size)

    def order(self, epoch: int) -> Tensor:
        """The positions of the split's samples in the order of this epoch."""
        if not self.train:
            return torch.arange(len(self.split))
        generator = torch.Generator().manual_seed(derive(self.seed, epoch) >> 1)
        return torch.randperm(len(self.split), generator=generator)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from step ``start`` on, this process's share of each."""
        chunks = list(self._wanted(epoch).split(self.batch_size, 1))[start:]
        rank, world = 0, 1
        if self.train and dist.is_available() and dist.is_initialized():
            rank, world = dist.get_rank(), dist.get_world_size()
        # A process left without a sample takes one with no weight, so that all step together.
        mine = [c[:, rank::world] if c.shape[1] > rank else c[:, :1] for c in chunks]
        for chunk, wanted, pixels in zip(chunks, mine, self._pixels(mine), strict=True):
            batch = self._batch(wanted, pixels.to(self.device), epoch)
            if world > 1:
                size = chunk.shape[1]
                batch["share"] = wanted.shape[1] * world / size if size > rank else 0.0
            yield batch

    def _wanted(self, epoch: int) -> Tensor:
        """Positions of an epoch's samples in order, (1, N), over those of partners, (2, N)."""
        order = self.order(epoch)
        if not (self.train and self.augment.mixes):
            return order[None]
        seed, view = self.augment.shown(self.seed, epoch)
        partners = self.augment.partners(self.split.rows[order], len(order), seed, view)
        return torch.stack([order, partners])

    def _batch(self, wanted: Tensor, pixels: Tensor, epoch: int) -> Batch:
        """A batch of the samples at these positions, (1, B) or with partners (2, B)."""
        rows = self.split.rows[wanted]
        seed, view = self.augment.shown(self.seed, epoch)
        if self.train:
            pixels = self.augment(pixels, rows.flatten(), seed, view, self._colours)
        batch: Batch = {"image": pixels.float().div_(255), "row": rows[0]}
        if self.split.labels is not None:
            batch["label"] = self.split.labels[wanted[0]]
        if len(wanted) > 1:
            images, partners = batch["image"].chunk(2)
            batch["image"], mix = self.augment.mix(images, partners, rows[0], seed, view)
            if self.split.labels is not None:
                batch |= {"partner_label": self.split.labels[wanted[1]], "mix": mix}
        if self.train and self.augment.distinct is not None:
            batch["view"] = View(
                source=self._source,
                number=view,
                of=self.augment.distinct,
                samples=len(self.split),
                rows=len(self.split.images),
            )
        return batch

    @cached_property
    def _source(self) -> str:
        augment = self.augment.model_dump_json(exclude={"views"})
        digest = hashlib.sha256(f"{self.split.images.fingerprint()} {augment}".encode())
        if self.augment.mixes:
            # A partner is a position in the split, so other samples make other mixtures.
            digest.update(self.split.rows.numpy().tobytes())
        for part in self._colours or ():
            # So are the colours that a tint is made of.
            digest.update(part.numpy().tobytes())
        return digest.hexdigest()

    @property
    def _colours(self) -> tuple[Tensor, Tensor] | None:
        return self.split.colours if self.augment.colour else None

    def _pixels(self, chunks: list[Tensor]) -> Iterator[Tensor]:
        images = self.split.images
        if isinstance(images, ResidentImages):
            pixels = images.on(self.device)
            for positions in chunks:
                rows = self.split.rows[positions].flatten()
                yield pixels.index_select(0, rows.to(pixels.device))
            return
        if not chunks:
            return
        loader = DataLoader(
            _Rows(images),
            batch_sampler=[self.split.rows[c].flatten().tolist() for c in chunks],
            collate_fn=_stacked,
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=deaf,
            # A generator of its own: images from disk draw as little from torch's as those in
            # memory do.
            generator=torch.Generator(),
        )
        for read in served(loader):
            if isinstance(read, UserError):
                raise read
            yield read


PATIENCE = 600
"""Seconds after which a process that reads samples is taken for stuck."""


def served(loader: DataLoader[Any]) -> Iterator[Any]:
    """What a loader gives.

    Raises:
        UserError: a process that reads for it died, or has not answered for :data:`PATIENCE`.
    """
    if loader.num_workers and not loader.timeout:
        loader.timeout = PATIENCE
    try:
        yield from loader
        return
    except (RuntimeError, ConnectionError, EOFError) as error:
        sentence = failure(error)
        if not sentence or not loader.num_workers:
            raise
    # Here, where nothing holds the loader's other processes any more.
    raise UserError(sentence)


def failure(error: Exception) -> str:
    """What a loader's error says of the processes that read for it; nothing if it does not.

    Torch raises it wherever the main process is when one of them dies.
    """
    said = str(error)
    if said.startswith("DataLoader worker (pid") or not isinstance(error, RuntimeError):
        return (
            "a process that reads samples died, killed from outside or out of memory; read with "
            "fewer (engine.workers, or your data loader's num_workers)"
        )
    if said.startswith("DataLoader timed out"):
        return (
            f"the processes that read samples gave none for {said.split()[4]} seconds; see whether "
            "the disk or the network that the samples lie on still answers"
        )
    return ""


class _Rows(Dataset[Tensor | UserError]):
    """Images by row; a mistake is returned, as a worker would add a traceback to a raised one."""

    def __init__(self, images: Images) -> None:
        self.images = images

    def __getitem__(self, row: Any) -> Tensor | UserError:
        try:
            return self.images.read(int(row))
        except UserError as error:
            return error


def _stacked(items: list[Tensor | UserError]) -> Tensor | UserError:
    mistake = next((item for item in items if isinstance(item, UserError)), None)
    return mistake or torch.stack([item for item in items if isinstance(item, Tensor)])


class LoaderBatches:
    """Batches of somebody's own ``DataLoader``.

    Items are ``(image, label)`` pairs or dicts with these keys. Torch's generator is seeded by
    (seed, epoch) before each pass, so a shuffling loader's order is a function of them.
    """

    def __init__(self, loader: DataLoader[Any], seed: int = 0) -> None:
        self.loader = loader
        self.seed = seed

    def __len__(self) -> int:
        return len(self.loader)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The loader's batches from step ``start`` on; the ones before are drawn and dropped."""
        seed = derive(self.seed, epoch) >> 1
        torch.manual_seed(seed)
        if self.loader.generator is not None:
            self.loader.generator.manual_seed(seed)
        for number, item in enumerate(served(self.loader)):
            if number >= start:
                yield dict(item) if isinstance(item, dict) else _named(item)


def _named(item: Any) -> Batch:
    if not isinstance(item, (tuple, list)) or not 1 <= len(item) <= 2:
        raise UserError(
            "a data loader's items are (image, label) pairs or dicts with 'image' and 'label', "
            f"not {type(item).__name__}"
        )
    return dict(zip(("image", "label"), item, strict=False))
