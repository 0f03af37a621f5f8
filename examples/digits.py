"""What the three examples share: real digits, a teacher, a student and how often each is right."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def loaders() -> tuple[DataLoader, DataLoader]:
    """Training and test batches of (image, label), images (B, 64) in [0, 1]."""
    digits = load_digits()
    images, labels = torch.tensor(digits.data / 16).float(), torch.tensor(digits.target)
    train = TensorDataset(images[:1400], labels[:1400])
    test = TensorDataset(images[1400:], labels[1400:])
    return DataLoader(train, batch_size=64, shuffle=True), DataLoader(test, batch_size=500)


def network(width: int) -> nn.Module:
    """A perceptron with one hidden layer."""
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))


def trained_teacher(train: DataLoader) -> nn.Module:
    """A wide perceptron, trained on labels for a few epochs."""
    teacher = network(256)
    optimiser = torch.optim.Adam(teacher.parameters(), lr=3e-3)
    for _ in range(8):
        for image, label in train:
            optimiser.zero_grad()
            nn.functional.cross_entropy(teacher(image), label).backward()
            optimiser.step()
    return teacher


@torch.no_grad()
def accuracy(model: nn.Module, test: DataLoader) -> float:
    """The share of right answers, 0 to 1."""
    right = [(model(image).argmax(1) == label).float() for image, label in test]
    return float(torch.cat(right).mean())
