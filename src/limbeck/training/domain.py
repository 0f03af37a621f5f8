"""What the word behind a recipe's ``task`` stands for: data, what a batch means, networks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field

from limbeck.errors import UserError
from limbeck.training.network import Network
from limbeck.training.progress import Voice
from limbeck.training.task import Task


class Part(BaseModel):
    """A part of a recipe: its keys and no others, which stay as they were read."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Words(Part):
    """What a recipe may say under ``data``, in every domain."""

    source: str
    validation: float = Field(default=0.1, ge=0, lt=1, description="share held out of train")
    limit: Annotated[int, Field(ge=1)] | None = Field(default=None, description="training samples")

    def for_teacher(self) -> dict[str, Any]:
        """As plain values, for a run that trains the teacher alone: of what it would learn from."""
        return self.model_dump(mode="json")


class Domain(ABC):
    """Where samples come from, what a batch of them means, and which networks there are.

    Made from the ``data`` of a recipe, before anything is trained or written.

    Args:
        words: the recipe's ``data``, an object of the class in :attr:`words_type`.
        device: where networks and batches live.
        workers: processes that read samples which do not fit into memory.
        voice: what speaks to the user.

    Attributes:
        splits: ``train`` for teachers, ``transfer`` for students, ``validation``, ``test``.
        facts: what the result says of the data: ``data`` (its name) and ``fingerprint``.

    Raises:
        UserError: data that cannot be had.
    """

    words_type: ClassVar[type[Words]] = Words
    source: ClassVar[str]
    """The data that presets run on unless told otherwise; embedded."""

    splits: Mapping[str, Any]
    facts: Mapping[str, Any]

    @abstractmethod
    def __init__(self, words: Any, *, device: torch.device, workers: int, voice: Voice) -> None: ...

    @staticmethod
    @abstractmethod
    def kind_of(source: str) -> str:
        """The family of data that a source belongs to, which presets are fitted to."""

    @abstractmethod
    def task(self, augment: Any = None) -> Task:
        """What a batch means; ``augment`` replaces the recipe's where a domain augments."""

    @abstractmethod
    def network(self, name: str, seed: int | None = None) -> Network:
        """The network of this name for this data, with fresh weights from ``seed``."""

    @abstractmethod
    def sample(self) -> Any:
        """One sample, as networks are called with it: what their costs are measured on."""

    @classmethod
    def recognise(cls, network: Network, files: Sequence[Path], top: int) -> list[dict[str, Any]]:
        """What a network says of files, one mapping a file: ``limbeck predict``."""
        raise UserError("limbeck predict knows image classifiers only")
