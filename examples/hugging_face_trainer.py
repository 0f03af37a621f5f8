"""Distillation in a Hugging Face Trainer."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from digits import accuracy, loaders, network, trained_teacher
from torch import Tensor
from transformers import Trainer, TrainingArguments

import limbeck


class DistillationTrainer(Trainer):
    """A trainer whose model is a distiller: its loss is the sum of the distiller's terms."""

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], **_: Any) -> Tensor:
        return sum(model(inputs).values())


def collate(samples: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Samples as the batch that a distiller reads."""
    images, labels = zip(*samples, strict=True)
    return {"image": torch.stack(images), "label": torch.stack(labels)}


def main(epochs: int = 8) -> float:
    torch.manual_seed(0)
    train, test = loaders()
    student = network(16)
    distiller = limbeck.Distiller(student, trained_teacher(train), limbeck.KD(temperature=4.0))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            num_train_epochs=epochs,
            per_device_train_batch_size=64,
            learning_rate=1e-2,
            remove_unused_columns=False,  # the trainer would drop what it cannot find in forward
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            logging_strategy="no",
        )
        trainer = DistillationTrainer(
            distiller, arguments, data_collator=collate, train_dataset=train.dataset
        )
        trainer.train()
    print(f"accuracy {accuracy(student, test):.3f}")
    return accuracy(student, test)


if __name__ == "__main__":
    main()
