"""Image files of any mode and size as uint8 tensors of one shape."""

from __future__ import annotations

import hashlib
import io
import threading
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from limbeck import memory
from limbeck.data.faults import tolerated
from limbeck.errors import UserError
from limbeck.files import regular

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_FILTERS = threading.Lock()  # the filters of warnings belong to all threads
_PIXELS = 64_000_000  # beyond this an image is taken for a decompression bomb


def decode(source: Path | bytes, channels: int, size: tuple[int, int] | None, name: str) -> Tensor:
    """One image as uint8 of shape (C, H, W).

    The first frame of an animation, turned as its EXIF orientation says, transparent parts on
    white, 16-bit grey scaled to 8; its content tells the format and not the file's suffix. With a
    ``size``, the shorter side is resized to fit (bicubic, antialiased) and the middle is cut out.

    Raises:
        UserError: the image cannot be read; the sentence holds ``name``.
    """
    image = opened(source, name)
    try:
        image = _in_mode(image, "L" if channels == 1 else "RGB")
        if size is not None and (image.height, image.width) != size:
            image = ImageOps.fit(image, (size[1], size[0]), Image.Resampling.BICUBIC)
    except Exception as error:  # damaged pixels can fail in any way
        raise UserError(f"{name} cannot be read as an image: {_reason(error)}") from None
    pixels = torch.from_numpy(np.array(image))
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1).contiguous()


def facts(source: Path | bytes, name: str) -> tuple[int, int, bool]:
    """Height, width and whether an image is grey, from its header."""
    image = opened(source, name)
    grey = image.mode in ("1", "L", "LA", "I", "F") or image.mode.startswith("I;16")
    try:
        turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
    except Exception as error:  # damaged metadata can fail in any way
        raise UserError(f"{name} cannot be read as an image: {_reason(error)}") from None
    width, height = image.size
    return (width, height, grey) if turned else (height, width, grey)


def opened(source: Path | bytes, name: str) -> Image.Image:
    """An image file whose header was read.

    Raises:
        UserError: it is none of a known format, or a decompression bomb.
    """
    try:
        with _FILTERS, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            file = io.BytesIO(source) if isinstance(source, bytes) else regular(source)
            image = Image.open(file, formats=_FORMATS)
    except Image.DecompressionBombError:
        raise UserError(
            f"{name} has more than the {_PIXELS:,} pixels that are read; make it smaller"
        ) from None
    except Exception as error:  # a damaged header can fail in any way
        raise UserError(f"{name} cannot be read as an image: {_reason(error)}") from None
    if image.width * image.height > _PIXELS:
        raise UserError(
            f"{name} has {image.width:,} x {image.height:,} pixels, more than the {_PIXELS:,} that "
            "are read; make it smaller"
        )
    return image


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    if type(error).__name__ == "UnidentifiedImageError":
        return "its content is no image of a known format"
    lines = str(error).splitlines()
    return lines[0].rstrip(".").lower() if lines else "its content is damaged"


def _in_mode(image: Image.Image, mode: str) -> Image.Image:
    deep = image.mode in ("I", "F") or image.mode.startswith("I;16")
    whole = deep and image.mode != "F"
    sixteen = whole and (image.mode.startswith("I;16") or image.format in ("PNG", "PPM"))
    image = ImageOps.exif_transpose(image)
    if deep:
        values = np.array(image, dtype=np.float64)
        finite = values[np.isfinite(values)]
        values = np.nan_to_num(values)
        # A file of 32 bits does not say what white is: the least usual level that holds them all.
        white = 65535.0 if sixteen else _white(float(finite.max(initial=0)), image.mode)
        image = Image.fromarray((values.clip(0, white) * (255 / white)).round().astype(np.uint8))
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)


def _white(brightest: float, mode: str) -> float:
    levels = (1.0, 255.0) if mode == "F" else (255.0,)
    return next((level for level in levels if brightest <= level), 65535.0)


class FileImages:
    """Images that are decoded when they are read, all at one size."""

    def __init__(self, paths: Sequence[Path], channels: int, size: tuple[int, int]) -> None:
        self.paths = paths
        self.channels = channels
        self.size: tuple[int, int] | None = size

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> Tensor:
        path = self.paths[index]
        with tolerated():
            return decode(path, self.channels, self.size, str(path))
        return self.blank()

    def blank(self) -> Tensor:
        """What stands for an image that cannot be read while faults are gathered."""
        assert self.size is not None, "files are read at one size"
        return torch.zeros(self.channels, *self.size, dtype=torch.uint8)

    def fingerprint(self) -> str:
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256(f"{self.channels} {self.size}".encode())
        for path in self.paths:
            stat = path.stat()
            digest.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}".encode(errors="replace"))
        return digest.hexdigest()


def decode_all(number: int, read: Callable[[int], Tensor]) -> Tensor:
    """Decode many images of one size at once, (N, C, H, W); PIL lets other threads run."""
    with ThreadPoolExecutor() as pool:
        first = read(0)
        what = f"{number:,} images of {first.shape[1]:,} x {first.shape[2]:,} pixels"
        memory.check(what, number * first.numel())
        pixels = torch.empty((number, *first.shape), dtype=torch.uint8)

        def put(index: int) -> None:
            pixels[index] = read(index)

        for _ in pool.map(put, range(number)):
            pass
    return pixels
