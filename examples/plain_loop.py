"""Distillation in a training loop of your own."""

from __future__ import annotations

import torch
from digits import accuracy, loaders, network, trained_teacher

import limbeck


def main(epochs: int = 8) -> float:
    torch.manual_seed(0)
    train, test = loaders()
    teacher, student = trained_teacher(train), network(16)

    distiller = limbeck.Distiller(student, teacher, limbeck.KD(temperature=4.0))
    # The student's parameters and, with other methods, those of their adapters.
    optimiser = torch.optim.Adam(distiller.parameters(), lr=1e-2)
    for epoch in range(epochs):
        for image, label in train:
            terms = distiller({"image": image, "label": label})
            optimiser.zero_grad()
            sum(terms.values()).backward()
            optimiser.step()
        said = ", ".join(f"{name} {value:.3f}" for name, value in terms.items())
        print(f"epoch {epoch + 1}: {said}, accuracy {accuracy(student, test):.3f}")
    return accuracy(student, test)


if __name__ == "__main__":
    main()
