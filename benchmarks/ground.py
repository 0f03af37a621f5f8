"""What all contenders share: images, the weights they start from, and the terms of the contest.

It lies in a folder that :func:`lay_out` fills. The teacher is not trained, which changes nothing of
what it costs; its batch norms have seen the images, so that its answers are of an ordinary size.
Nothing of Limbeck is imported here unless it is used: a neighbour's process is its own.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

TEACHER, STUDENT = "resnet56", "resnet20"
BATCH, LR, MOMENTUM, DECAY = 64, 0.05, 0.9, 5e-4
TEMPERATURE, LABELS, SOFT = 4.0, 0.1, 0.9
CLASSES = 100
TEST = 16
"""Images for testing: a source has to have some, of two classes or more; nothing is measured."""


def random_images(number: int) -> tuple[Tensor, Tensor]:
    """Random pixels, uint8 (N, 3, 32, 32), and random labels, (N,)."""
    torch.manual_seed(0)
    pixels = torch.randint(0, 256, (number, 3, 32, 32), dtype=torch.uint8)
    return pixels, torch.randint(0, CLASSES, (number,))


def lay_out(
    folder: Path, pixels: Tensor, labels: Tensor, teacher: str = TEACHER, student: str = STUDENT
) -> None:
    """Write the images in CIFAR-100's binary format, and teacher and student."""
    from limbeck.data import load
    from limbeck.models import Input, build, save

    _write(folder / "train.bin", pixels, labels)
    _write(folder / "test.bin", pixels[:TEST], torch.arange(TEST))
    data = load(f"cifar100:{folder}", validation=0.0)
    own = Input(3, data.size, data.mean, data.std)
    network = build(teacher, data.classes, own, seed=1)
    _settle(network, pixels)
    save(network, folder / "teacher", {})
    _for_others(network.model, folder / "teacher.pt")
    _for_others(build(student, data.classes, own, seed=0).model, folder / "student.pt")


def _settle(network: nn.Module, pixels: Tensor) -> None:
    """Let the batch norms of an untrained network take mean and variance from some images."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean over all batches
    with torch.no_grad():
        for part in pixels[: 8 * BATCH].split(BATCH):
            network(part / 255)


def lay_out_photographs(folder: Path, number: int, side: int = 224) -> None:
    """Write so many JPEG files in two classes, too many to be held in memory, and a tiny teacher.

    A hundred of them differ, which costs the same to decode.
    """
    from limbeck.models import Input, build, save

    generator = np.random.default_rng(0)
    for name in "ab":
        (folder / "photographs" / name).mkdir(parents=True)
    for index in range(number):
        path = folder / "photographs" / "ab"[index % 2] / f"{index}.jpg"
        if index < 100:
            coarse = generator.integers(0, 256, (side // 8, side // 8, 3), np.uint8)
            Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC).save(path)
        else:
            like = index % 100
            path.hardlink_to(folder / "photographs" / "ab"[like % 2] / f"{like}.jpg")
    own = Input(3, (side, side), (0.5,) * 3, (0.25,) * 3)
    save(build("mlp-8", "ab", own, seed=1), folder / "teacher", {})


def take_over(model: nn.Module, file: Path) -> nn.Module:
    """A neighbour's network of the same layers in the same order, with the weights in a file."""
    tensors = torch.load(file, weights_only=True)
    model.load_state_dict(dict(zip(model.state_dict(), tensors, strict=True)))
    return model


def _for_others(model: nn.Module, file: Path) -> None:
    torch.save(list(model.state_dict().values()), file)


def _write(file: Path, pixels: Tensor, labels: Tensor) -> None:
    coarse, fine = torch.zeros(len(labels), 1), labels[:, None]
    torch.cat([coarse.byte(), fine.byte(), pixels.flatten(1)], 1).numpy().tofile(file)


def read(folder: Path) -> tuple[np.ndarray, list[int]]:
    """The training images, uint8 (N, 32, 32, 3), and their labels."""
    records = np.fromfile(folder / "train.bin", np.uint8).reshape(-1, 3074)
    images = records[:, 2:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), records[:, 1].tolist()
