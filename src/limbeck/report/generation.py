"""The parts of the report that only tasks have in which images are made."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from limbeck.files import regular
from limbeck.report.figures import Gallery, Picture, Section, embedded
from limbeck.report.table import names, roles
from limbeck.training.run import Run

_WIDE = 96
"""Small images are enlarged by whole numbers up to so many pixels."""


def sections(run: Run) -> list[Section]:
    """All measures of each network, and what it makes of some test images."""
    result = run.result()
    return [*_measures(result), *_made(run, names(result), roles(result))]


def _measures(result: Mapping[str, Any]) -> list[Section]:
    found, called = result.get("measures") or {}, names(result)
    there = [role for role in roles(result) if found.get(role)]
    if not there:
        return []
    lines = [[name, *(f"{found[role][name]:.4f}" for role in there)] for name in found[there[0]]]
    note = (
        "On the test data, of the first seed. SSIM is 1 and PSNR (dB) without end where images are "
        "equal; the absolute error is the mean over pixels, white being 1."
    )
    headings = ["measure", *(called[role] for role in there)]
    return [Section("measures", "Measures", table=[headings, *lines], note=note)]


def _made(run: Run, called: Mapping[str, str], known: Iterable[str]) -> list[Section]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(regular(run.path / "made.safetensors"), framework="numpy") as file:
            keys = file.keys()  # the file itself cannot be iterated over
            tensors = {key: file.get_tensor(key) for key in keys}
    except (OSError, SafetensorError):
        return []
    columns = {"given": "given", "true": "true"}
    columns |= {f"made.{role}": called[role] for role in known if f"made.{role}" in tensors}
    galleries = []
    for number in range(len(tensors["given"])):
        pictures = [
            Picture(
                source=embedded(_enlarged(tensors[key][number])),
                alt=f"Test pair {number + 1}: {name}",
                lines=[("", name)],
                small=True,
            )
            for key, name in columns.items()
        ]
        galleries.append(Gallery("", pictures, ""))
    note = "Test pairs: what is given, what should be made of it, and what each network makes."
    return [Section("made", "What is made", galleries=galleries, note=note)] if galleries else []


def _enlarged(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """An image (C, H, W) as (H, W) or (H, W, 3), each pixel several wide if it is small."""
    image = pixels.transpose(1, 2, 0) if len(pixels) == 3 else pixels[0]
    times = max(1, _WIDE // image.shape[1])
    return image.repeat(times, 0).repeat(times, 1)
