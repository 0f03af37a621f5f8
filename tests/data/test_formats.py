"""The official formats are read byte by byte; nothing in them is executed."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import BuiltinFunctionType, FunctionType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from limbeck.data import formats
from limbeck.errors import UserError

GENERATOR = np.random.default_rng(1)


def idx(values: Any) -> bytes:
    header = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
    return header + values.astype(np.uint8).tobytes()


def refused(call: Callable[..., Any], *arguments: Any) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gz"])
def test_idx_gives_back_what_was_written(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    for shape in [(7,), (3, 4), (5, 2, 3)]:
        values = GENERATOR.integers(0, 256, shape, dtype=np.uint8)
        file = tmp_path / "file"
        file.write_bytes(pack(idx(values)))
        assert np.array_equal(formats.read_idx(file).numpy(), values)


WHOLE = idx(np.zeros((2, 3, 4)))


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (WHOLE[:-1], "announces 2 x 3 x 4 bytes in its header but holds 23"),
        (WHOLE + b"x", "announces 2 x 3 x 4 bytes in its header but holds more"),
        (WHOLE[:4] + b"\xff" * 12 + WHOLE[16:], "announces 4294967295 x"),
        (b"\x00\x00\x08\xff" + b"\xff" * 1020, "announces"),
        (WHOLE[:9], "ends within its header"),
        (b"\x00\x00\x08\x00", "holds no data"),
        (idx(np.zeros((0, 28, 28))), "holds no data"),
        (b"\x00\x00\x0d" + WHOLE[3:], "no IDX file of unsigned bytes"),
        (b"", "no IDX file"),
        (b"PK\x03\x04 not idx at all", "no IDX file"),
        (gzip.compress(WHOLE)[:-9], "cannot be read"),
        (gzip.compress(WHOLE)[:12] + b"\xff" * 20, "no IDX file"),
        (b"\x1f\x8b\x08", "cannot be read"),
    ],
)
def test_idx_that_lies_is_refused_by_name(tmp_path: Path, raw: bytes, reason: str) -> None:
    file = tmp_path / "train-images-idx3-ubyte"
    file.write_bytes(raw)
    text = refused(formats.read_idx, file)
    assert str(file) in text
    assert reason in text


def write_idx(folder: Path, stem: str, images: Any, labels: Any, end: str = "") -> None:
    (folder / f"{stem}-images-idx3-ubyte{end}").write_bytes(idx(images))
    (folder / f"{stem}-labels-idx1-ubyte{end}").write_bytes(idx(labels))


def test_idx_images_and_labels_make_a_pool(tmp_path: Path) -> None:
    images = GENERATOR.integers(0, 256, (4, 5, 6))
    write_idx(tmp_path, "train", images, np.array([3, 1, 4, 1]))
    pool = formats.idx_pool(tmp_path, "train")
    assert pool is not None
    assert np.array_equal(pool[0][:, 0].numpy(), images)
    assert pool[0].shape == (4, 1, 5, 6)
    assert pool[1] is not None
    assert pool[1].tolist() == [3, 1, 4, 1]
    assert formats.idx_pool(tmp_path, "t10k") is None


@pytest.mark.parametrize(
    ("images", "labels", "reason"),
    [
        ((4, 2, 2), (3,), "4 images, 3 labels"),
        ((4, 4), (4,), "2 and 1 dimensions"),
        ((4, 2, 2), (4, 1), "3 and 2 dimensions"),
    ],
)
def test_idx_files_that_do_not_belong_together_are_refused(
    tmp_path: Path, images: tuple[int, ...], labels: tuple[int, ...], reason: str
) -> None:
    write_idx(tmp_path, "train", np.ones(images), np.ones(labels))
    assert reason in refused(formats.idx_pool, tmp_path, "train")


def records(number: int, *labels: list[int]) -> tuple[Any, bytes]:
    """Planes (N, 3, 32, 32) and the binary version's bytes."""
    planes = GENERATOR.integers(0, 256, (number, 3, 32, 32), dtype=np.uint8)
    rows = [np.array(own, dtype=np.uint8)[:, None] for own in labels]
    return planes, np.concatenate([*rows, planes.reshape(number, -1)], 1).tobytes()


def test_binary_cifar10_has_a_label_byte_and_three_planes() -> None:
    planes, raw = records(3, [7, 0, 9])
    pixels, labels = formats.cifar_binary(raw, "x", None)
    assert np.array_equal(pixels.numpy(), planes)
    assert labels is not None
    assert labels.tolist() == [7, 0, 9]


def test_binary_cifar100_has_the_coarse_label_first() -> None:
    planes, raw = records(2, [4, 19], [30, 99])
    for coarse, expected in ((True, [4, 19]), (False, [30, 99])):
        pixels, labels = formats.cifar_binary(raw, "x", coarse)
        assert np.array_equal(pixels.numpy(), planes)
        assert labels is not None
        assert labels.tolist() == expected


def test_broken_records_are_refused() -> None:
    _, raw = records(2, [0, 1])
    assert "no multiple of a record's 3073" in refused(
        formats.cifar_binary, raw[:-1], "a.bin", None
    )
    assert "a.bin" in refused(formats.cifar_binary, b"", "a.bin", None)
    assert "3074" in refused(formats.cifar_binary, raw, "a.bin", False)


class Python2(pickle._Pickler):  # type: ignore[name-defined,misc]
    """Writes as Python 2 did, which the official batches come from: every string is bytes."""

    dispatch = dict(pickle._Pickler.dispatch)  # type: ignore[attr-defined]  # noqa: RUF012

    def save_text(self, text: str | bytes) -> None:
        raw = text.encode() if isinstance(text, str) else text
        self.write(b"T" + struct.pack("<I", len(raw)) + raw)
        self.memoize(text)

    dispatch[str] = dispatch[bytes] = save_text

    def save_global(self, thing: Any, name: str | None = None) -> None:
        module = thing.__module__.replace("numpy._core", "numpy.core")
        self.write(f"c{module}\n{thing.__name__}\n".encode())
        self.memoize(thing)

    dispatch[FunctionType] = dispatch[BuiltinFunctionType] = dispatch[type] = save_global


def official_pickle(content: dict[Any, Any]) -> bytes:
    buffer = io.BytesIO()
    Python2(buffer, protocol=2).dump(content)
    return buffer.getvalue()


def test_python_batches_are_read_as_the_official_files_are_written() -> None:
    planes, _ = records(3, [0, 0, 0])
    data = planes.reshape(3, -1)
    raw = official_pickle({b"data": data, b"labels": [5, 6, 7], b"batch_label": b"one"})
    assert b"cnumpy.core.multiarray\n_reconstruct" in raw
    assert b"_codecs" not in raw
    pixels, labels = formats.cifar_pickle(raw, "data_batch_1", None)
    assert np.array_equal(pixels.numpy(), planes)
    assert labels is not None
    assert labels.tolist() == [5, 6, 7]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("bytes_keys", [True, False])
def test_python_batches_of_any_protocol_are_read(protocol: int, bytes_keys: bool) -> None:
    planes, _ = records(2, [0, 0])
    content = {"data": planes.reshape(2, -1), "fine_labels": [10, 11], "coarse_labels": [1, 2]}
    keyed: dict[Any, Any] = {k.encode() if bytes_keys else k: v for k, v in content.items()}
    raw = pickle.dumps(keyed, protocol=protocol)
    for coarse, expected in ((False, [10, 11]), (True, [1, 2])):
        pixels, labels = formats.cifar_pickle(raw, "train", coarse)
        assert np.array_equal(pixels.numpy(), planes)
        assert labels is not None
        assert labels.tolist() == expected


class Touch:
    """Unpickled by an ordinary unpickler, this makes a file."""

    def __init__(self, call: Any, *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> Any:
        return self.call, self.arguments


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("inside", [True, False])
def test_a_malicious_pickle_executes_nothing(tmp_path: Path, protocol: int, inside: bool) -> None:
    canary = tmp_path / "canary"
    for attack in (
        Touch(os.system, f"touch {canary}"),
        Touch(os.mkdir, str(canary)),
        Touch(eval, f"open({str(canary)!r}, 'w')"),
        Touch(open, str(canary), "w"),
    ):
        content = {b"data": attack, b"labels": [1]} if inside else attack
        raw = pickle.dumps(content, protocol=protocol)
        text = refused(formats.cifar_pickle, raw, "data_batch_1", None)
        assert "data_batch_1" in text
        assert "nothing was executed" in text
        assert not canary.exists()
    pickle.loads(raw)
    assert canary.exists()  # the canary sings where an ordinary unpickler reads it


def test_attributes_of_what_is_admitted_cannot_be_reached() -> None:
    for path in ("ndarray.tofile", "dtype.__class__", "fromfile", "load"):
        raw = b"\x80\x04\x8c\x05numpy" + b"\x8c" + bytes([len(path)]) + path.encode() + b"\x93."
        assert "only arrays are read" in refused(formats.cifar_pickle, raw, "x", None)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([1, 2], "no batch"),
        ({b"data": np.zeros((1, 3072), np.uint8), b"fine_labels": [1]}, "no 'labels'"),
        ({b"labels": [1]}, "no 'data'"),
        ({b"data": np.zeros((1, 3000), np.uint8), b"labels": [1]}, "no batch"),
        ({b"data": np.zeros((2, 3072), np.uint8), b"labels": [1]}, "2 images and 1 labels"),
        ({b"data": np.zeros((0, 3072), np.uint8), b"labels": []}, "0 images"),
        ({b"data": np.zeros((1, 3072), np.uint8), b"labels": ["cat"]}, "no batch"),
        ({b"data": np.zeros((1, 3072), np.uint8), b"labels": [None]}, "no batch"),
    ],
)
def test_a_pickle_of_something_else_is_refused(content: Any, reason: str) -> None:
    text = refused(formats.cifar_pickle, pickle.dumps(content, protocol=4), "a/test_batch", None)
    assert "a/test_batch" in text
    assert reason in text


def test_any_damage_to_a_pickle_is_one_sentence() -> None:
    planes, _ = records(1, [0])
    raw = pickle.dumps({b"data": planes.reshape(1, -1), b"labels": [3]}, protocol=2)
    assert "test_batch" in refused(formats.cifar_pickle, raw[:-200], "test_batch", None)
    assert "test_batch" in refused(formats.cifar_pickle, b"", "test_batch", None)
    for place in range(180):
        damaged = bytearray(raw)
        damaged[place] ^= 0x15
        try:
            formats.cifar_pickle(bytes(damaged), "test_batch", None)
        except UserError:
            continue


def archive(path: Path, members: dict[str, bytes], mode: Any = "w:gz") -> Path:
    with tarfile.open(path, mode) as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


@pytest.mark.parametrize(("end", "mode"), [("tar.gz", "w:gz"), ("tar", "w"), ("tgz", "w:gz")])
def test_an_archive_is_read_where_it_lies(tmp_path: Path, end: str, mode: str) -> None:
    path = archive(tmp_path / f"c.{end}", {"top/a.bin": b"1", "top/deep/b": b"22"}, mode)
    found = [(Path(name).name, raw) for name, raw in formats.members(path, bool)]
    assert found == [("a.bin", b"1"), ("b", b"22")]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["../evil.bin", "top/../../evil.bin", "/tmp/limbeck_evil.bin"])
def test_a_member_that_climbs_out_is_refused(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "inner"
    folder.mkdir()
    path = archive(folder / "c.tar.gz", {"good.bin": b"1", name: b"2"})
    text = refused(lambda: list(formats.members(path, bool)))
    assert repr(name) in text
    assert "climbs out" in text
    assert list(tmp_path.rglob("*evil*")) == []
    assert not Path("/tmp/limbeck_evil.bin").exists()


def test_links_and_folders_in_an_archive_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "c.tar"
    with tarfile.open(path, "w") as tar:
        for name, kind in (("top", tarfile.DIRTYPE), ("link", tarfile.SYMTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
    assert list(formats.members(path, bool)) == []


@pytest.mark.parametrize("keep", [0, 5, 30, 200])
def test_a_truncated_archive_is_refused(tmp_path: Path, keep: int) -> None:
    path = archive(tmp_path / "c.tar.gz", {"data_batch_1.bin": GENERATOR.bytes(5000)})
    path.write_bytes(path.read_bytes()[:keep])
    assert str(path) in refused(lambda: list(formats.members(path, bool)))


def png(pixels: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


COLOUR = GENERATOR.integers(0, 256, (4, 6, 5, 3))
GREY = GENERATOR.integers(0, 256, (4, 6, 5))


def parquet(path: Path, images: Any, metadata: Any = None, **columns: Any) -> Path:
    table = pa.table({"image": images, **columns})
    if metadata is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps(metadata)})
    pq.write_table(table, path)
    return path


def blobs(pixels: Any = COLOUR) -> list[bytes]:
    return [png(p) for p in pixels]


def structs(pixels: Any = COLOUR) -> list[dict[str, Any]]:
    return [{"bytes": b, "path": None} for b in blobs(pixels)]


@pytest.mark.parametrize("cells", [blobs, structs])
def test_parquet_images_are_bare_bytes_or_structs(tmp_path: Path, cells: Any) -> None:
    path = parquet(tmp_path / "a.parquet", cells(), label=[2, 0, 1, 2])
    pixels, labels, names = formats.parquet_pool([path], None, None)
    assert np.array_equal(pixels.permute(0, 2, 3, 1).numpy(), COLOUR)
    assert labels is not None
    assert labels.tolist() == [2, 0, 1, 2]
    assert names == ()


def test_large_binary_and_numbers_of_any_width_are_read(tmp_path: Path) -> None:
    images = pa.array(blobs(), pa.large_binary())
    for kind in (pa.int8(), pa.uint16(), pa.int32(), pa.int64()):
        path = parquet(tmp_path / "a.parquet", images, label=pa.array([0, 1, 2, 3], kind))
        labels = formats.parquet_pool([path], None, None)[1]
        assert labels is not None
        assert labels.tolist() == [0, 1, 2, 3]


def test_grey_parquet_images_have_one_channel_and_one_colour_image_makes_all_colour(
    tmp_path: Path,
) -> None:
    path = parquet(tmp_path / "a.parquet", blobs(GREY))
    pixels = formats.parquet_pool([path], None, None)[0]
    assert np.array_equal(pixels[:, 0].numpy(), GREY)
    assert pixels.shape[1] == 1
    path = parquet(tmp_path / "b.parquet", [*blobs(GREY), png(COLOUR[0])])
    pixels = formats.parquet_pool([path], None, None)[0]
    assert np.array_equal(pixels[4].permute(1, 2, 0).numpy(), COLOUR[0])
    assert np.array_equal(pixels[1].permute(1, 2, 0).numpy(), np.stack([GREY[1]] * 3, 2))


def test_names_as_labels_are_numbered_in_their_alphabetical_order(tmp_path: Path) -> None:
    words = ["dog", "ant", "cat", "dog"]
    for column in (words, pa.array(words).dictionary_encode()):
        path = parquet(tmp_path / "a.parquet", blobs(), label=column)
        _, labels, names = formats.parquet_pool([path], None, None)
        assert names == ("ant", "cat", "dog")
        assert labels is not None
        assert labels.tolist() == [2, 0, 1, 2]


def test_class_names_that_datasets_left_in_the_metadata_are_used(tmp_path: Path) -> None:
    features = {
        "image": {"_type": "Image"},
        "label": {"names": ["no", "yes"], "_type": "ClassLabel"},
    }
    info = {"info": {"features": features}}
    path = parquet(tmp_path / "a.parquet", structs(), info, label=[0, 1, 1, 0])
    assert formats.parquet_pool([path], None, None)[2] == ("no", "yes")


@pytest.mark.parametrize("metadata", [{}, {"info": None}, {"info": {"features": {"label": 3}}}, []])
def test_other_metadata_is_no_matter(tmp_path: Path, metadata: Any) -> None:
    path = parquet(tmp_path / "a.parquet", blobs(), metadata, label=[0, 1, 1, 0])
    assert formats.parquet_pool([path], None, None)[2] == ()


def test_several_files_are_read_in_order(tmp_path: Path) -> None:
    paths = [
        parquet(tmp_path / f"{i}.parquet", blobs(COLOUR[2 * i : 2 * i + 2]), label=[i, i])
        for i in range(2)
    ]
    pixels, labels, _ = formats.parquet_pool(paths, None, None)
    assert np.array_equal(pixels.permute(0, 2, 3, 1).numpy(), COLOUR)
    assert labels is not None
    assert labels.tolist() == [0, 0, 1, 1]


def test_the_label_column_can_be_named_or_found(tmp_path: Path) -> None:
    path = parquet(
        tmp_path / "a.parquet", blobs(), fine_label=[3, 2, 1, 0], coarse_label=[1, 1, 0, 0]
    )
    for label, expected in (
        (None, [3, 2, 1, 0]),
        ("fine", [3, 2, 1, 0]),
        ("coarse", [1, 1, 0, 0]),
        ("coarse_label", [1, 1, 0, 0]),
    ):
        labels = formats.parquet_pool([path], label, None)[1]
        assert labels is not None
        assert labels.tolist() == expected
    text = refused(formats.parquet_pool, [path], "coarse_lable", None)
    assert "did you mean coarse_label" in text
    assert formats.parquet_pool([parquet(path, blobs())], None, None)[1] is None


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        ([0, None, 1, 1], "row 1: column 'label' holds no label"),
        ([None, None, None, None], "row 0: column 'label' holds no label"),
        ([0.5, 1.0, 0.0, 1.0], "neither a whole number nor a name"),
        ([[1], [0], [1], [1]], "neither a whole number nor a name"),
        ([0, 1, -1, 1], "row 2: column 'label' holds -1"),
        (pa.array([0, 1, 2**64 - 1, 1], pa.uint64()), "row 2: column 'label' holds 1844"),
    ],
)
def test_labels_that_are_none_are_refused_with_their_row(
    tmp_path: Path, labels: Any, reason: str
) -> None:
    path = parquet(tmp_path / "a.parquet", blobs(), label=labels)
    text = refused(formats.parquet_pool, [path], None, None)
    assert str(path) in text
    assert reason in text


def test_an_image_that_cannot_be_decoded_is_named_by_file_and_row(tmp_path: Path) -> None:
    good = parquet(tmp_path / "0.parquet", blobs())
    for bad, reason in (
        (png(COLOUR[0])[:60], "row 2 cannot be read"),
        (b"words", "row 2 cannot be read"),
        (b"", "row 2: column 'image' holds no image bytes"),
        (None, "row 2: column 'image' holds no image bytes"),
    ):
        path = parquet(tmp_path / "1.parquet", [*blobs()[:2], bad])
        text = refused(formats.parquet_pool, [good, path], None, None)
        assert f"{path}, {reason}" in text


def test_parquet_without_images_or_rows_or_sense_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"picture": ["a"], "label": [1]}), path)
    assert "it has picture, label" in refused(formats.parquet_pool, [path], None, None)
    parquet(path, pa.array([], pa.binary()), label=pa.array([], pa.int64()))
    assert "holds no rows" in refused(formats.parquet_pool, [path], None, None)
    for raw in (b"", b"PAR1", b"PAR1 words PAR1", parquet(path, blobs()).read_bytes()[:-30]):
        path.write_bytes(raw)
        assert f"{path} cannot be read as Parquet" in refused(
            formats.parquet_pool, [path], None, None
        )
    missing = tmp_path / "gone.parquet"
    assert "gone.parquet" in refused(formats.parquet_pool, [missing], None, None)


def test_files_of_different_columns_are_refused(tmp_path: Path) -> None:
    paths = [
        parquet(tmp_path / "0.parquet", blobs(), label=[0, 1, 0, 1]),
        parquet(tmp_path / "1.parquet", blobs(), label=["a", "b", "a", "b"]),
    ]
    assert "different columns" in refused(formats.parquet_pool, paths, None, None)
