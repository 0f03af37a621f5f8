"""Tasks by the name that a recipe gives them. A task is imported when it is first named."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from limbeck.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from limbeck.training.domain import Domain

DOMAINS = {
    "classification": "limbeck.tasks.images:ImageClassification",
    "attributes": "limbeck.tasks.images:ImageAttributes",
    "detection": "limbeck.tasks.detection:ImageDetection",
    "control": "limbeck.tasks.control:Environments",
    "sequence": "limbeck.tasks.images:ImageSequence",
    "segmentation": "limbeck.tasks.scenes:ImageSegmentation",
    "lanes": "limbeck.tasks.scenes:ImageLanes",
    "text": "limbeck.tasks.text:Text",
    "translation": "limbeck.tasks.translation:ParallelText",
    "generation": "limbeck.tasks.generation:ImageGeneration",
    "tabular": "limbeck.tasks.tabular:TableClassification",
}
"""Task -> where its domain lies."""


def domain(task: str) -> type[Domain]:
    """The data, the meaning of a batch and the networks that a recipe's ``task`` stands for.

    >>> domain("classification").source
    'digits'

    Raises:
        UserError: there is no such task, with the near names.
    """
    if task not in DOMAINS:
        raise UserError(f"there is no task {task!r}; {did_you_mean(str(task), DOMAINS)}")
    module, _, name = DOMAINS[task].partition(":")
    found: type[Domain] = getattr(import_module(module), name)
    return found
