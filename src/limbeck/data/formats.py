"""The official formats of MNIST and CIFAR, byte by byte, and Parquet; nothing read is executed."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import math
import pickle
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from limbeck import memory
from limbeck.data.faults import each, tolerated
from limbeck.data.images import decode, decode_all, facts
from limbeck.errors import UserError, did_you_mean
from limbeck.files import regular

_MEMBER = 2**30  # no official archive holds a file of this size
_NAMES = 2**20  # nor names and the like that are longer than this
_COPIES = 3  # bytes, pixels and the whole that they are joined to are in memory at once

Pool = tuple[Tensor, Tensor | None]
"""Pixels (N, C, H, W) uint8 and labels (N,) int64, if any."""


def read_idx(path: Path) -> Tensor:
    """An IDX file, plain or gzipped, of unsigned bytes, in the shape its header tells.

    Raises:
        UserError: no IDX file, or its header and its length disagree.
    """
    try:
        with regular(path).open("rb") as plain:
            packed = plain.read(2) == b"\x1f\x8b"
            plain.seek(0)
            return _idx(gzip.open(plain) if packed else plain, path)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {_first_line(error)}") from None


def _idx(file: IO[bytes] | gzip.GzipFile, path: Path) -> Tensor:
    """No more is read than the header announces, however much there is."""
    start = file.read(4)
    if len(start) < 4 or start[:3] != b"\x00\x00\x08":
        raise UserError(f"{path} is no IDX file of unsigned bytes")
    header = file.read(4 * start[3])
    shape = [int.from_bytes(header[i : i + 4], "big") for i in range(0, len(header), 4)]
    if len(header) < 4 * start[3]:
        raise UserError(f"{path} ends within its header")
    if not shape or 0 in shape:
        raise UserError(f"{path} holds no data")
    size = math.prod(shape)
    announced = f"{path} announces {' x '.join(map(str, shape))} bytes in its header"
    memory.check(f"{announced}, which", min(size, 2**62))
    raw = bytearray()
    while len(raw) <= size and (part := file.read(2**20)):
        raw += part
    if len(raw) != size:
        raise UserError(f"{announced} but holds {f'{len(raw):,}' if len(raw) < size else 'more'}")
    return torch.frombuffer(raw, dtype=torch.uint8).view(shape)


def idx_pool(folder: Path, stem: str) -> Pool | None:
    """Images and labels of an MNIST-like split (``train`` or ``t10k``), or ``None`` if absent."""
    files = [
        min(folder.glob(f"{stem}-{kind}*ubyte*"), key=lambda p: (not p.is_file(), p), default=None)
        for kind in ("images", "labels")
    ]
    there = [file for file in files if file is not None]
    if not there:
        return None
    if len(there) == 1:
        absent = "images" if files[0] is None else "labels"
        raise UserError(f"{there[0]} has no {stem}-{absent} beside it")
    images, labels = there
    pixels, numbers = each(read_idx, there)
    numbers = numbers.long()
    if (pixels.ndim, numbers.ndim) != (3, 1):
        raise UserError(
            f"{images.name} and {labels.name} in {folder} have {pixels.ndim} and {numbers.ndim} "
            "dimensions; images have 3 and labels 1"
        )
    if len(pixels) != len(numbers):
        raise UserError(
            f"{images.name} and {labels.name} in {folder} do not belong together: "
            f"{len(pixels):,} images, {len(numbers):,} labels"
        )
    return pixels[:, None], numbers


def cifar_binary(raw: bytes, name: str, coarse: bool | None) -> Pool:
    """Records of the official binary version: label bytes, then red, green and blue planes.

    ``coarse`` is ``None`` for CIFAR-10 (one label byte) and says for CIFAR-100 (two) which counts.
    """
    extra = 1 if coarse is None else 2
    length = extra + 3072
    if not raw or len(raw) % length:
        raise UserError(f"{name} holds {len(raw):,} bytes, no multiple of a record's {length}")
    records = torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(-1, length)
    label = records[:, 0 if coarse is None or coarse else 1].long()
    return records[:, extra:].reshape(-1, 3, 32, 32).clone(), label


def write_cifar_binary(
    path: Path, pixels: Tensor, labels: Tensor, coarse: Tensor | None = None
) -> None:
    """Write records of the official binary version, which :func:`cifar_binary` reads back.

    Pixel (row r, column c, channel k) of image i lies at byte 3073 i + 1 + 1024 k + 32 r + c of
    CIFAR-10, and at 3074 i + 2 + 1024 k + 32 r + c of CIFAR-100. There is no header.

    Args:
        path: such as ``data_batch_1.bin`` for CIFAR-10, ``train.bin`` for CIFAR-100.
        pixels: uint8 of shape (N, 3, 32, 32).
        labels: whole numbers, (N,): from 0 to 9; the fine ones, from 0 to 99, if ``coarse`` is
            given.
        coarse: from 0 to 19, which makes the records those of CIFAR-100
            (:func:`limbeck.data.cifar.coarse_labels`).

    Raises:
        UserError: pixels or labels that a record cannot hold; a file that cannot be written.

    >>> import tempfile
    >>> pixels, labels = torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.tensor([7, 2])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = Path(folder, "data_batch_1.bin")
    ...     write_cifar_binary(file, pixels, labels)
    ...     file.stat().st_size, cifar_binary(file.read_bytes(), file.name, None)[1]
    (6146, tensor([7, 2]))
    """
    if pixels.dtype != torch.uint8 or pixels.shape[1:] != (3, 32, 32):
        raise UserError(
            "a record of CIFAR holds 3 x 32 x 32 unsigned bytes, and images of "
            f"{pixels.dtype} of shape {tuple(pixels.shape)} do not fit in"
        )
    columns = []
    classes = {"label": (labels, 10)}
    if coarse is not None:
        classes = {"coarse label": (coarse, 20), "fine label": (labels, 100)}
    for name, (values, number) in classes.items():
        if values.shape != (len(pixels),) or values.is_floating_point():
            raise UserError(
                f"{len(pixels):,} records want as many whole numbers as {name}s, not "
                f"{values.dtype} of shape {tuple(values.shape)}"
            )
        if len(values) and not 0 <= int(values.min()) <= int(values.max()) < number:
            raise UserError(
                f"a {name} of CIFAR-{10 if coarse is None else 100} runs from 0 to {number - 1}, "
                f"and here from {int(values.min())} to {int(values.max())}"
            )
        columns.append(values.to(torch.uint8)[:, None].cpu())
    records = torch.cat([*columns, pixels.cpu().flatten(1)], 1)
    try:
        path.write_bytes(records.contiguous().numpy().tobytes())
    except OSError as error:
        reason = (error.strerror or "error").lower()
        raise UserError(f"{path} cannot be written: {reason}") from None


def cifar_pickle(raw: bytes, name: str, coarse: bool | None) -> Pool:
    """A batch of the official Python version, read by an unpickler that admits arrays only."""
    try:
        content = _ArraysOnly(io.BytesIO(raw), name).load()
        batch = {k.decode() if isinstance(k, bytes) else k: v for k, v in content.items()}
        key = "labels" if coarse is None else ("coarse_labels" if coarse else "fine_labels")
        absent = [k for k in ("data", key) if k not in batch]
        if absent:
            raise UserError(f"{name} has no {absent[0]!r}; it has {', '.join(map(str, batch))}")
        data, numbers = np.array(batch["data"]), np.array(batch[key])
        if data.dtype != np.uint8 or data.shape[1:] not in ((3072,), (3, 32, 32)):
            raise ValueError(f"data are {data.dtype} of shape {data.shape}, not uint8 (N, 3072)")
        if numbers.dtype.kind not in "iu" and numbers.size:
            raise ValueError(f"labels are {numbers.dtype} and no whole numbers")
        pixels = torch.from_numpy(data).reshape(-1, 3, 32, 32)
        labels = torch.from_numpy(numbers.astype(np.int64)).flatten()
    except UserError:
        raise
    except Exception as error:  # a foreign pickle can fail in any way
        reason = _first_line(error)
        raise UserError(f"{name} is no batch of CIFAR's Python version: {reason}") from None
    if not len(pixels) or len(pixels) != len(labels):
        raise UserError(f"{name} holds {len(pixels):,} images and {len(labels):,} labels")
    return pixels, labels


class _ArraysOnly(pickle.Unpickler):
    """Admits what CIFAR's pickles hold: NumPy arrays in dictionaries."""

    _ADMITTED = frozenset(
        {
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("numpy.core.numeric", "_frombuffer"),
            ("numpy._core.numeric", "_frombuffer"),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("_codecs", "encode"),
        }
    )

    def __init__(self, file: io.BytesIO, name: str) -> None:
        super().__init__(file, encoding="bytes")
        self._name = name

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ADMITTED:
            raise UserError(
                f"{self._name} is a pickle that wants {module}.{name}; only arrays are read, and "
                "nothing was executed"
            )
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def members(path: Path, wanted: Callable[[str], Any]) -> Iterator[tuple[str, bytes]]:
    """Paths and contents of a file, a folder's files, or an archive's, which is not unpacked.

    Args:
        wanted: whether a file of this name, without its folder, is read.
    """
    if path.is_dir() or not {".tar", ".tgz", ".gz", ".bz2", ".xz"} & set(path.suffixes):
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        for file in files:
            if wanted(file.name) and not file.is_dir():
                memory.check(str(file), _COPIES * regular(file).stat().st_size)
                yield str(file), file.read_bytes()
        return
    try:
        with tarfile.open(path, tarinfo=_Member) as archive:
            for member in archive:
                inside = PurePosixPath(member.name)
                if ".." in inside.parts or inside.is_absolute():
                    raise UserError(f"{path} holds {member.name!r}, which climbs out of it")
                if wanted(inside.name) and (content := _content(archive, member)) is not None:
                    memory.check(str(path / inside), _COPIES * member.size)
                    yield str(path / inside), content.read()
    except (tarfile.TarError, OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        # Tarfile's own list of all that was tried says less than the name.
        reason = "" if "\n" in str(error) else f": {_first_line(error)}"
        raise UserError(f"{path} is no readable tar archive{reason}") from None


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes] | None:
    return archive.extractfile(member) if member.isfile() else None


class _Member(tarfile.TarInfo):
    """What an archive's header announces, if it is of a size to be believed."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        found = super().frombuf(buf, encoding, errors)
        if found.size > (_MEMBER if found.isreg() else _NAMES):
            raise ValueError(f"it holds {found.name!r} of {found.size:,} bytes")
        return found


def _first_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def parquet_pool(
    paths: Sequence[Path], label: str | None, size: tuple[int, int] | None
) -> tuple[Tensor, Tensor | None, tuple[str, ...]]:
    """Pixels, labels and class names (if the schema knows them) of Parquet files.

    The image column holds encoded bytes, bare or as the struct {bytes, path}; labels are numbers
    or names.
    """
    tables = each(_table, paths)
    try:
        table = pa.concat_tables(tables)
    except pa.ArrowException:
        raise UserError(f"the Parquet files beside {paths[0]} have different columns") from None
    if not table.num_rows:
        raise UserError(f"{paths[0]} holds no rows")
    column = _image_column(table, paths[0])
    cells = table.column(column).to_pylist()
    blobs = [c["bytes"] if isinstance(c, dict) else c for c in cells]
    lengths = [t.num_rows for t in tables]

    def where(row: int) -> str:
        for path, length in zip(paths, lengths, strict=True):
            if row < length:
                return f"{path}, row {row}"
            row -= length
        raise IndexError(row)

    absent = set()
    for row, blob in enumerate(blobs):
        if not isinstance(blob, bytes) or not blob:
            absent.add(row)
            with tolerated():
                raise UserError(f"{where(row)}: column {column!r} holds no image bytes")
    labels: Tensor | None = None
    classes: tuple[str, ...] = ()
    name = _label_column(table, label, paths[0])
    if name is not None:
        labels, classes = _labels(table.column(name), name, where)
        classes = classes or _hub_names(table, name)
    # Not every header: reading them all takes as long as decoding. The rows are spread evenly.
    there = [row for row in range(len(blobs)) if row not in absent]
    sampled = []
    for row in there[:: -(-len(blobs) // 64)]:
        with tolerated():
            sampled.append(facts(blobs[row], where(row)))
    channels = 1 if all(grey for _, _, grey in sampled) else 3
    side = size or (sampled[0][:2] if sampled else (1, 1))

    def read(row: int) -> Tensor:
        with tolerated():
            if row not in absent:
                return decode(blobs[row], channels, side, where(row))
        return torch.zeros(channels, *side, dtype=torch.uint8)

    return decode_all(len(blobs), read), labels, classes


def _table(path: Path) -> pa.Table:
    try:
        groups = pq.read_metadata(regular(path))
        sizes = [groups.row_group(i).total_byte_size for i in range(groups.num_row_groups)]
        memory.check(str(path), sum(sizes))
        return pq.read_table(path)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as Parquet: {_first_line(error)}") from None


def _image_column(table: pa.Table, path: Path) -> str:
    for field in table.schema:
        kind = field.type
        fits = pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
        if fits or (pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0):
            return str(field.name)
    raise UserError(
        f"{path} has no image column (encoded bytes, or a struct with 'bytes'); it has "
        + ", ".join(table.column_names)
    )


def _label_column(table: pa.Table, label: str | None, path: Path) -> str | None:
    if label is not None:
        for name in (label, f"{label}_label"):
            if name in table.column_names:
                return name
        raise UserError(
            f"{path} has no column {label!r}; {did_you_mean(label, table.column_names)}"
        )
    return next((n for n in ("label", "fine_label", "labels") if n in table.column_names), None)


def _labels(
    column: pa.ChunkedArray, name: str, where: Callable[[int], str]
) -> tuple[Tensor, tuple[str, ...]]:
    values = column.to_pylist()
    kind = type(next((value for value in values if value is not None), 0))

    if kind not in (int, bool, str):
        raise UserError(f"{where(0)}: column {name!r} holds neither a whole number nor a name")
    for row, value in enumerate(values):
        with tolerated():
            if value is None:
                values[row] = kind()
                raise UserError(f"{where(row)}: column {name!r} holds no label")
            if kind is int and not 0 <= value < 2**31:
                values[row] = 0
                raise UserError(
                    f"{where(row)}: column {name!r} holds {value}; classes count from 0"
                )
    if kind is not str:
        return torch.tensor(values, dtype=torch.int64), ()
    classes = tuple(sorted(set(values)))
    number = {c: i for i, c in enumerate(classes)}
    return torch.tensor([number[v] for v in values]), classes


def _hub_names(table: pa.Table, name: str) -> tuple[str, ...]:
    """Class names that the ``datasets`` library keeps in a schema's metadata."""
    try:
        content = json.loads((table.schema.metadata or {})[b"huggingface"])
        return tuple(content["info"]["features"][name]["names"])
    except (KeyError, TypeError, ValueError):
        return ()
