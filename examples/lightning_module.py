"""Distillation in a Lightning module."""

from __future__ import annotations

import lightning
import torch
from digits import accuracy, loaders, network, trained_teacher
from torch import Tensor

import limbeck


class Distillation(lightning.LightningModule):
    """Trains a student; the teacher is in no checkpoint and no optimiser."""

    def __init__(self, distiller: limbeck.Distiller) -> None:
        super().__init__()
        self.distiller = distiller

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        image, label = batch
        terms = self.distiller({"image": image, "label": label})
        self.log_dict(terms)
        return sum(terms.values())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.distiller.parameters(), lr=1e-2)


def main(epochs: int = 8) -> float:
    lightning.seed_everything(0, verbose=False)
    train, test = loaders()
    student = network(16)
    distiller = limbeck.Distiller(student, trained_teacher(train), limbeck.KD(temperature=4.0))
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Distillation(distiller), train)
    print(f"accuracy {accuracy(student, test):.3f}")
    return accuracy(student, test)


if __name__ == "__main__":
    main()
