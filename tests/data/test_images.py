"""An image file of any kind becomes the right pixels or one sentence that names it."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from limbeck.data.images import FileImages, decode, decode_all, facts
from limbeck.errors import UserError

GENERATOR = np.random.default_rng(0)
RGB = GENERATOR.integers(0, 256, (6, 9, 3), dtype=np.uint8)
GREY = GENERATOR.integers(0, 256, (6, 9), dtype=np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(raw: bytes, channels: int = 3) -> Any:
    """(H, W, C) as NumPy."""
    return decode(raw, channels, None, "x").permute(1, 2, 0).numpy()


@pytest.mark.parametrize("kind", ["PNG", "BMP", "PPM", "TIFF", "WEBP"])
def test_lossless_colour_and_grey_keep_every_pixel(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    assert np.array_equal(pixels(encoded(Image.fromarray(RGB), kind, **options)), RGB)
    if kind != "WEBP":
        grey = pixels(encoded(Image.fromarray(GREY), kind), channels=1)
        assert np.array_equal(grey[:, :, 0], GREY)


def test_grey_as_colour_has_three_equal_channels_and_colour_as_grey_its_luma() -> None:
    assert np.array_equal(pixels(encoded(Image.fromarray(GREY))), np.stack([GREY] * 3, 2))
    luma = RGB.astype(float) @ [0.299, 0.587, 0.114]  # ITU-R 601-2
    grey = pixels(encoded(Image.fromarray(RGB)), channels=1)[:, :, 0]
    assert np.abs(grey - luma).max() <= 1


def test_transparent_parts_lie_on_white() -> None:
    alpha = GENERATOR.integers(0, 256, (6, 9, 1), dtype=np.uint8)
    expected = RGB * (alpha / 255.0) + 255 * (1 - alpha / 255.0)
    rgba = encoded(Image.fromarray(np.concatenate([RGB, alpha], 2)))
    assert np.abs(pixels(rgba) - expected).max() <= 1
    expected = GREY * (alpha[:, :, 0] / 255.0) + 255 * (1 - alpha[:, :, 0] / 255.0)
    la = encoded(Image.fromarray(np.stack([GREY, alpha[:, :, 0]], 2)))
    assert np.abs(pixels(la, channels=1)[:, :, 0] - expected).max() <= 1
    assert np.abs(pixels(la) - expected[:, :, None]).max() <= 1


def test_a_transparent_palette_entry_is_white() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 0])
    image.putpixel((1, 0), 1)
    for kind in ("PNG", "GIF"):
        assert pixels(encoded(image, kind)).tolist() == [[[10, 20, 30], [200, 100, 0]]]
        raw = encoded(image, kind, transparency=0)
        assert pixels(raw).tolist() == [[[255, 255, 255], [200, 100, 0]]]
    half = encoded(image, "PNG", transparency=bytes([255, 0]))
    assert pixels(half).tolist() == [[[10, 20, 30], [255, 255, 255]]]


def test_a_transparent_colour_of_a_png_without_alpha_is_white() -> None:
    colour = Image.new("RGB", (1, 1), (9, 8, 7))
    assert pixels(encoded(colour, transparency=(9, 8, 7))).tolist() == [[[255, 255, 255]]]
    assert pixels(encoded(colour, transparency=(0, 8, 7))).tolist() == [[[9, 8, 7]]]
    grey = Image.new("L", (1, 1), 40)
    assert pixels(encoded(grey, transparency=40), channels=1).tolist() == [[[255]]]


def test_cmyk_is_shown_in_colour() -> None:
    flat = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    for raw in (encoded(flat, "TIFF"), encoded(flat, "JPEG", quality=100)):
        red, green, blue = pixels(raw)[8, 8].tolist()
        assert red < 5
        assert green > 250
        assert blue > 250


def test_sixteen_bit_grey_is_scaled_to_eight() -> None:
    values = np.array([[0, 257, 128 * 257, 65535]], dtype=np.uint16)
    for kind in ("PNG", "TIFF", "PPM"):
        found = pixels(encoded(Image.fromarray(values), kind), channels=1)
        assert found[:, :, 0].tolist() == [[0, 1, 128, 255]]


def test_a_dark_sixteen_bit_image_stays_dark() -> None:
    values = np.array([[0, 100, 200]], dtype=np.uint16)
    for kind in ("PNG", "TIFF", "PPM"):
        found = pixels(encoded(Image.fromarray(values), kind), channels=1)
        assert found[:, :, 0].tolist() == [[0, 0, 1]]


def test_floats_from_0_to_1_and_whole_numbers_to_255_fill_the_range() -> None:
    unit = Image.fromarray(np.array([[0, 0.2, 1]], dtype=np.float32))
    assert pixels(encoded(unit, "TIFF"), channels=1)[:, :, 0].tolist() == [[0, 51, 255]]
    whole = Image.fromarray(np.array([[0, 51, 255]], dtype=np.int32))
    assert pixels(encoded(whole, "TIFF"), channels=1)[:, :, 0].tolist() == [[0, 51, 255]]


@pytest.mark.parametrize("white", [1, 255])
def test_what_is_no_number_is_black_and_the_infinite_white(white: int) -> None:
    values = np.array([[np.nan, -np.inf, np.inf, white / 5, white]], dtype=np.float32)
    found = pixels(encoded(Image.fromarray(values), "TIFF"), channels=1)
    assert found[:, :, 0].tolist() == [[0, 0, 255, 51, 255]]
    nothing = Image.fromarray(np.full((1, 1), np.nan, np.float32))
    assert pixels(encoded(nothing, "TIFF"), channels=1).tolist() == [[[0]]]


def chunk(kind: bytes, data: bytes) -> bytes:
    check = struct.pack(">I", zlib.crc32(kind + data))
    return struct.pack(">I", len(data)) + kind + data + check


def png(width: int, depth: int, colour: int, row: bytes, *chunks: bytes) -> bytes:
    """A PNG of one row, byte by byte."""
    header = struct.pack(">IIBBBBB", width, 1, depth, colour, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(b"\0" + row))
    parts = [chunk(b"IHDR", header), *chunks, data, chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (png(1, 16, 2, struct.pack(">3H", 0, 65535, 32896)), [[0, 255, 128]]),
        (png(1, 16, 6, struct.pack(">4H", 0, 65535, 32896, 0)), [[255, 255, 255]]),
        (png(2, 16, 4, struct.pack(">4H", 32896, 65535, 0, 0)), [[128] * 3, [255] * 3]),
        (png(4, 2, 0, b"\x1b"), [[0] * 3, [85] * 3, [170] * 3, [255] * 3]),
        (png(2, 1, 3, b"\x80", chunk(b"PLTE", bytes(range(6)))), [[3, 4, 5], [0, 1, 2]]),
        (b"P6 1 1 65535\n" + struct.pack(">3H", 257, 65535, 32896), [[1, 255, 128]]),
        (b"P5 2 1 1023\n" + struct.pack(">2H", 0, 1023), [[0] * 3, [255] * 3]),
        (b"P3 1 1 255\n1 2 3\n", [[1, 2, 3]]),
        (b"Pf\n1 1\n-1.0\n" + struct.pack("<f", 0.2), [[51] * 3]),
    ],
    ids=["rgb16", "rgba16", "grey16-alpha", "grey2", "palette1", "ppm16", "pgm10", "plain", "pfm"],
)
def test_depths_that_are_written_byte_by_byte_are_read(raw: bytes, expected: Any) -> None:
    assert pixels(raw).tolist() == [expected]


@pytest.mark.parametrize("kind", [b"zTXt", b"iCCP"])
def test_words_in_an_image_that_swell_are_refused(kind: bytes) -> None:
    swollen = chunk(kind, b"a\0\0" + zlib.compress(bytes(2**25)))
    assert "too large" in sentence(png(1, 8, 0, b"\7", swollen))


@pytest.mark.parametrize(
    "raw",
    [
        b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0),
        b"RIFF\x16\0\0\0WEBPVP8X\x0a\0\0\0" + bytes(4) + b"\xff" * 6,
        b"P6 100000 100000 255\n",
        b"BM" + struct.pack("<IHHIIiiHHIIiiII", 99, 0, 0, 54, 40, 10**5, 10**5, 1, 24, *[0] * 6),
    ],
    ids=["gif", "webp", "ppm", "bmp"],
)
def test_an_immense_image_of_any_format_is_refused(raw: bytes) -> None:
    text = sentence(raw)
    assert "64,000,000" in text or "cannot be read" in text


def test_one_bit_is_black_and_white() -> None:
    bits = Image.fromarray(np.array([[0, 255, 255, 0]], dtype=np.uint8)).convert("1")
    for kind in ("PNG", "TIFF", "BMP", "GIF"):
        assert pixels(encoded(bits, kind), channels=1)[:, :, 0].tolist() == [[0, 255, 255, 0]]


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, RGB),
        (2, RGB[:, ::-1]),
        (3, RGB[::-1, ::-1]),
        (4, RGB[::-1]),
        (5, RGB.transpose(1, 0, 2)),
        (6, np.rot90(RGB, -1)),
        (7, RGB[::-1, ::-1].transpose(1, 0, 2)),
        (8, np.rot90(RGB)),
    ],
)
def test_an_image_is_turned_as_its_exif_says(orientation: int, upright: Any) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    raw = encoded(Image.fromarray(RGB), exif=exif)
    assert np.array_equal(pixels(raw), upright)
    assert facts(raw, "x") == (*upright.shape[:2], False)


def test_a_turned_sixteen_bit_image_keeps_its_brightness() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    values = np.array([[257, 514]], dtype=np.uint16)
    raw = encoded(Image.fromarray(values), exif=exif)
    assert pixels(raw, channels=1)[:, :, 0].tolist() == [[1], [2]]


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_an_animation_is_its_first_frame(kind: str) -> None:
    frames = [Image.new("RGB", (5, 4), c) for c in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    options = {"lossless": True} if kind == "WEBP" else {}
    raw = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert np.array_equal(pixels(raw), np.array(frames[0]))


def test_the_content_counts_and_not_the_suffix(tmp_path: Path) -> None:
    wrong = tmp_path / "really_a_png.jpg"
    wrong.write_bytes(encoded(Image.fromarray(RGB)))
    found = decode(wrong, 3, None, str(wrong))
    assert np.array_equal(found.permute(1, 2, 0).numpy(), RGB)


def test_facts_tell_height_width_and_greyness() -> None:
    assert facts(encoded(Image.fromarray(RGB)), "x") == (6, 9, False)
    grey16 = Image.fromarray(GREY.astype(np.uint16))
    for grey in (Image.fromarray(GREY), Image.fromarray(GREY).convert("1"), grey16):
        assert facts(encoded(grey), "x") == (6, 9, True)


def sentence(source: bytes | Path, name: str = "the/file.png") -> str:
    with pytest.raises(UserError) as caught:
        decode(source, 3, (8, 8), name)
    text = str(caught.value)
    assert name in text
    assert "\n" not in text
    return text


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.7])
def test_a_truncated_image_is_refused(kind: str, share: float) -> None:
    noise = GENERATOR.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    raw = encoded(Image.fromarray(noise), kind)
    sentence(raw[: int(len(raw) * share)])


def test_an_empty_file_and_foreign_content_are_refused(tmp_path: Path) -> None:
    empty = tmp_path / "empty.png"
    empty.touch()
    assert "no image of a known format" in sentence(empty, str(empty))
    assert "no image of a known format" in sentence(b"%PDF-1.4 not an image")
    assert "no image of a known format" in sentence(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9"
    )


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert "no such file" in sentence(tmp_path / "gone.png", "gone.png")


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header promises more pixels than its few bytes hold."""

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    data = zlib.compress(bytes(1000))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("side", [8_001, 10_000, 40_000])
def test_a_decompression_bomb_is_refused_without_warning(side: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "64,000,000" in sentence(bomb(side, side))


def test_damage_anywhere_is_an_image_or_one_sentence() -> None:
    generator = np.random.default_rng(3)
    noise = Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "words"
    originals = [
        encoded(noise.quantize(7) if kind == "GIF" else noise, kind, **options)
        for kind, options in (
            ("PNG", {"exif": exif}),
            ("JPEG", {"exif": exif}),
            ("GIF", {}),
            ("BMP", {}),
            ("TIFF", {"compression": "tiff_lzw"}),
            ("WEBP", {"exif": exif}),
            ("PPM", {}),
        )
    ]
    sentences = []
    for original in originals:
        for _ in range(150):
            raw = bytearray(original)
            for place in generator.integers(0, min(len(raw), 300), 1 + generator.integers(4)):
                raw[place] = generator.integers(256)
            try:
                facts(bytes(raw), "damaged.img")
                found = decode(bytes(raw), 3, (8, 8), "damaged.img")
            except UserError as error:
                sentences.append(str(error))
            else:
                assert found.shape == (3, 8, 8)
                assert found.dtype == torch.uint8
    assert len(sentences) > 100
    assert all("damaged.img" in s and "\n" not in s for s in sentences)


@pytest.mark.parametrize(
    ("height", "width", "top", "left", "side"),
    [(8, 8, 0, 0, 8), (8, 20, 0, 6, 8), (30, 8, 11, 0, 8), (16, 8, 4, 0, 8)],
)
def test_the_middle_is_cut_out_where_no_resizing_is_needed(
    height: int, width: int, top: int, left: int, side: int
) -> None:
    whole = GENERATOR.integers(0, 256, (height, width, 3), dtype=np.uint8)
    found = decode(encoded(Image.fromarray(whole)), 3, (side, side), "x")
    cut = whole[top : top + side, left : left + side]
    assert np.array_equal(found.permute(1, 2, 0).numpy(), cut)


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (3, 5), (100, 64)])
@pytest.mark.parametrize("size", [(8, 8), (6, 12)])
def test_every_size_is_fitted(shape: tuple[int, int], size: tuple[int, int]) -> None:
    flat = Image.fromarray(np.full(shape, 77, dtype=np.uint8))
    found = decode(encoded(flat), 1, size, "x")
    assert found.shape == (1, *size)
    assert found.unique().tolist() == [77]


def test_shrinking_is_antialiased() -> None:
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    found = decode(encoded(Image.fromarray(board)), 1, (8, 8), "x").double()
    assert float((found[0, 1:-1, 1:-1] - 127.5).abs().max()) < 2


def stored(folder: Path, number: int) -> list[Path]:
    paths = []
    for i in range(number):
        paths.append(folder / f"{i}.png")
        Image.new("RGB", (4, 4), (i, 2 * i, 3 * i)).save(paths[-1])
    return paths


def test_files_are_read_in_their_order(tmp_path: Path) -> None:
    images = FileImages(stored(tmp_path, 20), 3, (4, 4))
    assert (len(images), images.channels, images.size) == (20, 3, (4, 4))
    together: Tensor = decode_all(20, images.read)
    for i in range(20):
        assert images.read(i)[:, 0, 0].tolist() == [i, 2 * i, 3 * i]
        assert torch.equal(together[i], images.read(i))


def test_decoding_in_threads_leaves_the_filters_of_warnings_alone(tmp_path: Path) -> None:
    images = FileImages(stored(tmp_path, 64), 3, (4, 4))
    before = list(warnings.filters)
    for _ in range(5):
        decode_all(64, images.read)
    assert list(warnings.filters) == before


def test_a_fingerprint_tells_a_changed_file_another_size_and_another_order(tmp_path: Path) -> None:
    paths = stored(tmp_path, 3)
    first = FileImages(paths, 3, (4, 4)).fingerprint()
    assert FileImages(paths, 3, (4, 4)).fingerprint() == first
    assert FileImages(paths, 3, (8, 8)).fingerprint() != first
    assert FileImages(paths, 1, (4, 4)).fingerprint() != first
    assert FileImages(paths[::-1], 3, (4, 4)).fingerprint() != first
    paths[1].write_bytes(encoded(Image.new("RGB", (5, 5))))
    assert FileImages(paths, 3, (4, 4)).fingerprint() != first
