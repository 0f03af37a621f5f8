"""The neighbours, each driven by its own parts, as it comes: its loader, its networks, its loop.

They are given the shared images through a class with the interface of torchvision's CIFAR-100, as
the archive that it would download cannot be had everywhere. Weights are the shared ones: all three
have the same layers in the same order.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torchvision
from arena import Pace
from ground import (
    BATCH,
    CLASSES,
    DECAY,
    LABELS,
    LR,
    MOMENTUM,
    SOFT,
    STUDENT,
    TEACHER,
    TEMPERATURE,
    read,
    take_over,
)
from torchvision import transforms


def _shared_images(folder: Path) -> type[torchvision.datasets.CIFAR100]:
    images, labels = read(folder)

    class Shared(torchvision.datasets.CIFAR100):
        """CIFAR-100 as torchvision gives it, but for where the images come from."""

        def __init__(
            self,
            root: str = "",
            train: bool = True,
            transform: Any = None,
            target_transform: Any = None,
            download: bool = False,
        ) -> None:
            torchvision.datasets.VisionDataset.__init__(
                self, root, transform=transform, target_transform=target_transform
            )
            self.train, self.data, self.targets = train, images, labels

    return Shared


def torchdistill(pace: Pace, folder: str, workers: int) -> None:
    """torchdistill's DistillationBox in the training loop of its example, KD as in its recipes."""
    from torchdistill.core.distillation import get_distillation_box
    from torchdistill.misc.log import MetricLogger, SmoothedValue, set_basic_log_config
    from torchdistill.models import classification  # noqa: F401, makes the networks known by name
    from torchdistill.models.registry import get_model

    set_basic_log_config()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.benchmark = True
    student, teacher = (
        take_over(get_model(name, num_classes=CLASSES, pretrained=False), Path(folder) / file).to(
            device
        )
        for name, file in ((STUDENT, "student.pt"), (TEACHER, "teacher.pt"))
    )
    # Its example leaves the teacher in training mode; here it answers as the others' do, faster.
    teacher.eval()
    view = transforms.Compose(
        [
            transforms.RandomCrop(32, padding=4),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
        ]
    )
    whole = {"student_module_path": ".", "student_module_io": "output"}
    whole |= {"teacher_module_path": ".", "teacher_module_io": "output"}
    # alpha weighs the labels, beta the soft targets.
    terms = {"temperature": TEMPERATURE, "alpha": LABELS, "beta": SOFT, "reduction": "batchmean"}
    config = {
        "num_epochs": 10**6,
        "train_data_loader": {
            "dataset_id": "train",
            "sampler": {"class_or_func": torch.utils.data.RandomSampler, "kwargs": None},
            "kwargs": {
                "batch_size": BATCH,
                "num_workers": workers,
                "pin_memory": device.type == "cuda",
                "drop_last": False,
            },
        },
        "teacher": {"forward_proc": "forward_batch_only", "requires_grad": False},
        "student": {"forward_proc": "forward_batch_only", "requires_grad": True},
        "optimizer": {
            "key": "SGD",
            "kwargs": {"lr": LR, "momentum": MOMENTUM, "weight_decay": DECAY},
        },
        "criterion": {
            "key": "WeightedSumLoss",
            "kwargs": {
                "sub_terms": {
                    "kd": {"criterion": {"key": "KDLoss", "kwargs": whole | terms}, "weight": 1.0}
                }
            },
        },
    }
    images = {"train": _shared_images(Path(folder))(transform=view)}
    box = get_distillation_box(teacher, student, images, config, device, None, False, 1)
    told: dict[str, float] = {}
    for epoch in count():
        pace.mark(lambda: told)
        box.pre_epoch_process(epoch=epoch)
        logger = MetricLogger(delimiter="  ")
        logger.add_meter("lr", SmoothedValue(window_size=1, fmt="{value}"))
        logger.add_meter("img/s", SmoothedValue(window_size=10, fmt="{value}"))
        for batch, targets, more in logger.log_every(box.train_data_loader, 100, f"Epoch {epoch}"):
            begun = time.time()
            batch, targets = batch.to(device), targets.to(device)
            loss = box.forward_process(batch, targets, more)
            box.post_forward_process(loss=loss)
            logger.update(loss=loss.item(), lr=box.optimizer.param_groups[0]["lr"])
            logger.meters["img/s"].update(len(batch) / (time.time() - begun))
            if torch.isnan(loss) or torch.isinf(loss):
                raise ValueError(f"the loss became {loss}")
        told["loss"] = logger.meters["loss"].global_avg
        box.post_epoch_process()


def repdistiller(pace: Pace, folder: str, checkout: str, workers: int) -> None:
    """RepDistiller's ``train_distill`` with ``--distill kd`` on its own loader and networks."""
    torchvision.datasets.CIFAR100 = _shared_images(Path(folder))
    sys.path.insert(0, checkout)
    os.chdir(tempfile.mkdtemp(dir=folder))  # it makes a data folder wherever it stands
    from dataset.cifar100 import get_cifar100_dataloaders
    from distiller_zoo import DistillKL
    from helper.loops import train_distill

    from models import model_dict

    loader, _, _ = get_cifar100_dataloaders(BATCH, num_workers=workers, is_instance=True)
    student, teacher = (
        take_over(model_dict[name](num_classes=CLASSES), Path(folder) / file)
        for name, file in ((STUDENT, "student.pt"), (TEACHER, "teacher.pt"))
    )
    modules = torch.nn.ModuleList([student, teacher])
    criteria = torch.nn.ModuleList(
        [torch.nn.CrossEntropyLoss(), DistillKL(TEMPERATURE), DistillKL(TEMPERATURE)]
    )
    optimiser = torch.optim.SGD(student.parameters(), LR, MOMENTUM, weight_decay=DECAY)
    if torch.cuda.is_available():
        modules.cuda()
        criteria.cuda()
        torch.backends.cudnn.benchmark = True
    weights = SimpleNamespace(distill="kd", gamma=LABELS, alpha=SOFT, beta=0.0, print_freq=100)
    told: dict[str, float] = {}
    for epoch in count(1):
        pace.mark(lambda: told)
        _, told["loss"] = train_distill(epoch, loader, modules, criteria, optimiser, weights)
