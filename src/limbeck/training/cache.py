"""A frozen network's answers, kept on disk, so that a network is asked once for each view."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from limbeck.errors import UserError
from limbeck.training.checkpoint import write_atomically
from limbeck.training.network import Network
from limbeck.training.progress import Voice
from limbeck.training.task import Answer, View

Tensors = Mapping[str, Tensor]

STORAGE = r"full|fp16|top-[1-9]\d{0,6}"
"""The ways to keep an answer, as a regular expression."""


class Cache:
    """Remembers what frozen networks answered to the views of a training set.

    Answers lie in files of fixed records, one file a view, one record a sample, memory-mapped. A
    record is found by the sample's identity, never by its position in a batch, and begins with a
    checksum of its content and place: one that was never written, only half written or altered is
    not valid, and the network is asked again. So a cache may be interrupted at any moment, and be
    extended by samples and views. A folder belongs to the network's weights, the data, how they
    are augmented, the taps and the storage; where any of it differs another folder is used.

    Args:
        folder: where the caches of all networks and data sets lie.
        storage: ``full`` keeps each tensor in its own type; ``fp16`` rounds to half precision;
            ``top-K`` keeps of a distribution over classes the K most probable and the mass of the
            rest, which is spread evenly over the other classes. That is a distribution again, so
            a divergence from it is one, but a biased target: among the rest the teacher's own
            preferences are lost, and above temperature 1 the rest weighs more than it did.
            Everything else is then kept as in ``fp16``.
        voice: says how large a cache is going to be before it is written.

    Raises:
        UserError: a storage that does not exist.
    """

    def __init__(self, folder: str | Path, storage: str = "fp16", voice: Voice | None = None):
        if not re.fullmatch(STORAGE, storage):
            raise UserError(f"answers are kept in full, in fp16 or as top-K, not as {storage!r}")
        self.folder = Path(folder)
        self.storage = storage
        self.voice = voice or Voice(quiet=True)
        self._top = int(storage[4:]) if storage.startswith("top-") else None
        self._stores: dict[str, _Store] = {}

    def answer(
        self,
        identity: Mapping[str, Any],
        view: View,
        rows: Tensor,
        ask: Callable[[Tensor], Answer],
        distributions: tuple[str, ...] = (),
        device: torch.device | None = None,
    ) -> Answer:
        """The remembered answer to a batch; what is not remembered yet is asked and written.

        Args:
            identity: what the answer depends on beside the view: see :func:`identify`.
            view: the view that the batch shows.
            rows: the samples' identities, int64 of shape (B,).
            ask: the network's answer to the samples at these positions of the batch.
            distributions: the outputs that are logits over classes.
            device: where the answer is wanted.

        Returns:
            What storage made of the answer, whether it was remembered or not, so that a run does
            not depend on the state of the cache.
        """
        rows = rows.cpu()
        key = hashlib.sha256(
            json.dumps([identity, view.source, self.storage], sort_keys=True).encode()
        ).hexdigest()[:32]
        if key not in self._stores:
            first = ask(torch.arange(1))
            codecs = self._codecs(first, distributions)
            self._stores[key] = self._open(_Store(self.folder / key, codecs, view.rows), view)
            self._stores[key].describe({**identity, "data": view.source, "storage": self.storage})
        store = self._stores[key]
        raw, valid = store.read(view.number, rows)
        if not valid.all():
            missing = (~valid).nonzero().flatten()
            raw[missing] = store.write(view.number, rows[missing], _flat(ask(missing)))
        if device is not None and device.type == "cuda":
            raw = raw.pin_memory()
        return _answer(store.decode(raw.to(device, non_blocking=True)))

    def check(
        self, answers: Sequence[Answer], view: View, distributions: tuple[str, ...] = ()
    ) -> None:
        """Find out before anything is trained whether there is room for answers like these.

        Raises:
            UserError: they need more space than there is, or the folder cannot be made.
        """
        codecs = [self._codecs(answer, distributions) for answer in answers]
        stores = [_Store(self.folder, each, view.rows) for each in codecs]
        self._room(sum(store.bytes for store in stores) * view.of)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            writable = os.access(self.folder, os.W_OK)
        except (OSError, ValueError):
            writable = False
        if not writable:
            raise UserError(
                f"the teacher's answers cannot be kept in {self.folder}, where nothing can be "
                "written; name another folder (engine.cache_folder)"
            )

    def _codecs(self, answer: Answer, distributions: tuple[str, ...]) -> dict[str, _Codec]:
        wide = {f"outputs/{name}" for name in distributions}
        return {
            name: _codec(tensor, self.storage, self._top if name in wide else None)
            for name, tensor in _flat(answer).items()
        }

    def _open(self, store: _Store, view: View) -> _Store:
        """Say how large it is going to be, and begin it."""
        there = store.there(view.of)
        lacking = store.bytes * (view.of - there)
        self._room(lacking)
        text = (
            f"teacher's answers ({self.storage}): {view.samples:,} samples x {view.of} "
            f"view{'s' * (view.of > 1)}, {store.record:,} bytes each, "
        )
        text += f"{_size(lacking)} to be written" if lacking else "kept"
        self.voice.say(f"{text} in {store.folder}")
        store.mapped(view.number)
        return store

    def _room(self, wanted: int) -> None:
        folder = self.folder.absolute()
        place = next(p for p in (folder, *folder.parents) if p.exists())
        free = shutil.disk_usage(place).free
        if wanted > free:
            raise UserError(
                f"the teacher's answers would take {_size(wanted)} and {place} has "
                f"{_size(free)} free; remember fewer views (data.augment.views), keep less of each "
                "(engine.cache=fp16 or top-20), or name another folder (engine.cache_folder)"
            )


def identify(network: Network) -> dict[str, Any]:
    """What a network's answers depend on: its weights, its structure and its input."""
    digest = hashlib.sha256()
    for name, tensor in network.model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return {
        "weights": digest.hexdigest(),
        "structure": hashlib.sha256(_structure(network.model).encode()).hexdigest(),
        "name": network.name,
        "input": repr(network.input),
    }


def _structure(model: nn.Module) -> str:
    kinds = [f"{type(m).__module__}.{type(m).__qualname__}" for m in model.modules()]
    return f"{model!r} {kinds}"


def _flat(answer: Answer) -> dict[str, Tensor]:
    """An answer's tensors under one kind of name."""
    outputs = {f"outputs/{name}": tensor for name, tensor in answer.outputs.items()}
    return outputs | {f"features/{name}": tensor for name, tensor in answer.features.items()}


def _answer(tensors: Tensors) -> Answer:
    def under(prefix: str) -> dict[str, Tensor]:
        return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}

    return Answer(under("outputs/"), under("features/"))


@dataclass(frozen=True)
class _Codec:
    """How a tensor becomes bytes and comes back; ``fields`` are the types and shapes of the parts.

    ``shape`` and ``dtype`` are those of one sample in the answer. Channels that lie last in memory
    are kept so, since sums over them would round otherwise.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    fields: tuple[tuple[torch.dtype, tuple[int, ...]], ...]
    channels_last: bool = False

    def encode(self, tensor: Tensor) -> list[Tensor]:
        (kept, _), *_ = self.fields
        encoded = (tensor.permute(0, 2, 3, 1) if self.channels_last else tensor).to(kept)
        if kept == torch.float16 and int(encoded.isinf().sum()) > int(tensor.isinf().sum()):
            raise UserError(
                "the teacher's answers are too large for half precision; keep them in full "
                "(engine.cache=full)"
            )
        return [encoded]

    def decode(self, parts: list[Tensor]) -> Tensor:
        tensor = parts[0].to(self.dtype)
        return tensor.permute(0, 3, 1, 2) if self.channels_last else tensor


class _Top(_Codec):
    """The K most probable classes, and the mass of all others."""

    def encode(self, tensor: Tensor) -> list[Tensor]:
        log_p = tensor.float().log_softmax(-1)
        (_, (k,)), *_ = self.fields
        kept = log_p.topk(k, dim=-1)
        rest = log_p.scatter(-1, kept.indices, -math.inf).logsumexp(-1, keepdim=True)
        return [kept.values.half(), kept.indices.int(), rest]

    def decode(self, parts: list[Tensor]) -> Tensor:
        values, indices, rest = parts
        others = self.shape[0] - values.shape[1]
        spread = (rest - math.log(others)).expand(-1, self.shape[0])
        return spread.scatter(-1, indices.long(), values.float()).to(self.dtype)


def _codec(tensor: Tensor, storage: str, top: int | None) -> _Codec:
    shape, dtype = tuple(tensor.shape[1:]), tensor.dtype
    if top is not None and len(shape) == 1 and top < shape[0]:
        fields = ((torch.float16, (top,)), (torch.int32, (top,)), (torch.float32, (1,)))
        return _Top(shape, dtype, fields)
    kept = dtype if storage == "full" or not dtype.is_floating_point else torch.float16
    last = tensor.ndim == 4 and not tensor.is_contiguous()
    last = last and tensor.is_contiguous(memory_format=torch.channels_last)
    stored = (*shape[1:], shape[0]) if last else shape
    return _Codec(shape, dtype, ((kept, stored),), last)


class _Store:
    """The records of one network on one data set."""

    def __init__(self, folder: Path, codecs: Mapping[str, _Codec], rows: int) -> None:
        self.folder = folder
        self.codecs = codecs
        self.rows = rows
        self.slices: dict[str, list[slice]] = {}
        end = 8
        for name, codec in codecs.items():
            self.slices[name] = []
            for dtype, shape in codec.fields:
                # Fields begin at multiples of 8 bytes, so that any type can be read in place.
                length = math.prod(shape) * dtype.itemsize
                self.slices[name].append(slice(end, end + length))
                end += -(-length // 8) * 8
        self.record = end
        self.bytes = end * rows
        raw = np.random.PCG64(20110).random_raw(end // 8) | np.uint64(1)
        self._odd = torch.from_numpy(raw.view(np.int64))
        self._views: dict[int, Tensor] = {}

    def there(self, views: int) -> int:
        """How many of the first views have a file."""
        return sum(self._path(n).exists() for n in range(views))

    def describe(self, about: Mapping[str, Any]) -> None:
        """Write down for a reader what lies here."""
        content = json.dumps({**about, "bytes": self.record, "rows": self.rows}, indent=2)
        write_atomically(self.folder / "about.json", content.encode())

    def read(self, view: int, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Records (B, record) of bytes, and which of them are valid, (B,)."""
        raw = self.mapped(view).index_select(0, rows)
        words = raw.view(torch.int64)
        return raw, words[:, 0] == self._checksum(view, rows, words)

    def write(self, view: int, rows: Tensor, tensors: Tensors) -> Tensor:
        """Put answers in place; returns their records."""
        raw = torch.zeros(len(rows), self.record, dtype=torch.uint8)
        for name, codec in self.codecs.items():
            tensor = tensors[name].detach()
            if tuple(tensor.shape[1:]) != codec.shape:
                raise UserError(
                    f"the teacher's {name.partition('/')[2]} have the shape "
                    f"{tuple(tensor.shape[1:])} for one sample and {codec.shape} for another; "
                    "answers of different shapes cannot be remembered, so leave out the cache"
                )
            for part, place in zip(codec.encode(tensor), self.slices[name], strict=True):
                raw[:, place] = part.cpu().contiguous().flatten(1).view(torch.uint8)
        words = raw.view(torch.int64)
        words[:, 0] = self._checksum(view, rows, words)
        self.mapped(view)[rows] = raw
        return raw

    def decode(self, raw: Tensor) -> dict[str, Tensor]:
        """The tensors that records stand for."""
        found = {}
        for name, codec in self.codecs.items():
            parts = [
                raw[:, place].contiguous().view(dtype).view(len(raw), *shape)
                for place, (dtype, shape) in zip(self.slices[name], codec.fields, strict=True)
            ]
            found[name] = codec.decode(parts)
        return found

    def _checksum(self, view: int, rows: Tensor, words: Tensor) -> Tensor:
        """Multilinear hash of content and place; an empty record's is not the 0 it holds."""
        content = (words[:, 1:] * self._odd[1:]).sum(1)
        return content + (rows + 1) * self._odd[0] + (view + 1)

    def _path(self, view: int) -> Path:
        return self.folder / f"view-{view}.records"

    def mapped(self, view: int) -> Tensor:
        """The records of a view, (rows, record) uint8, a window on the file."""
        if view not in self._views:
            path = self._path(view)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                _reserve(path, self.bytes)
            except OSError as error:
                raise UserError(
                    f"the teacher's answers cannot be kept in {path}: "
                    f"{(error.strerror or str(error)).lower()}; free some space or name another "
                    "folder (engine.cache_folder)"
                ) from None
            records = np.memmap(path, np.uint8, "r+", shape=(self.rows, self.record))
            self._views[view] = torch.from_numpy(records)
        return self._views[view]


def _reserve(path: Path, size: int) -> None:
    """Make a file of this size; a full disk is met here, not as a signal at a later write."""
    fresh = not path.exists()
    with path.open("ab") as file:
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
        except OSError:
            if fresh:
                path.unlink()
            raise


def _size(number: int) -> str:
    return f"{number / 1e9:,.1f} GB" if number >= 1e9 else f"{number / 1e6:,.1f} MB"
