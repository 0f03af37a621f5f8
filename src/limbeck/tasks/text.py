"""Texts, or pairs of them, with a label each: what a batch means, data and networks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor

from limbeck.data import texts as sources
from limbeck.data.splits import sample
from limbeck.data.texts import TextBatches, Texts
from limbeck.errors import UserError
from limbeck.models import build
from limbeck.models.text import TextInput, read_tokenizer, word_pieces
from limbeck.tasks.classification import Classification
from limbeck.training.checkpoint import write_atomically
from limbeck.training.domain import Domain, Words
from limbeck.training.network import Network
from limbeck.training.progress import Voice
from limbeck.training.task import Batches, model_output
from limbeck.training.teacher import Teacher

EXAMPLES = "examples.json"
MOST_EXAMPLES = 64


class TextClassification(Classification):
    """Classification of texts: ``text`` and ``label`` in a batch, ``logits`` (B, C) in an answer.

    Args:
        classes: the class names in the order of the labels.
        device: where networks lie.
    """

    name: ClassVar[str] = "text"
    seen: ClassVar[str] = "text"

    def __init__(self, classes: Sequence[str], device: torch.device | None = None) -> None:
        super().__init__(classes, device=device)

    def batches(
        self, split: Any, *, batch_size: int, seed: int = 0, train: bool = False
    ) -> Batches:
        """Batches of a split of texts; somebody's own loader is not known here."""
        if not isinstance(split, Texts):
            raise UserError("texts are given by name; a data loader's cannot be read")
        return TextBatches(split, batch_size, seed=seed, train=train)

    @staticmethod
    def measures(logits: Tensor, labels: Tensor) -> dict[str, float]:
        """Accuracy, F1 and Matthews correlation, as GLUE has them; cross-entropy in nats.

        F1 is that of class 1 where there are two, and the mean over the classes else.

        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 2.0], [0.0, 2.0]])
        >>> found = TextClassification.measures(logits, torch.tensor([0, 0, 1]))
        >>> round(found["f1"], 4), found["matthews"]
        (0.6667, 0.5)
        """
        # Here, as it takes longer to import than a small network to train.
        from torchmetrics.functional.classification import (
            multiclass_accuracy,
            multiclass_f1_score,
            multiclass_matthews_corrcoef,
        )

        classes = logits.shape[1]
        f1 = multiclass_f1_score(logits, labels, classes, average="none")
        return {
            "accuracy": float(multiclass_accuracy(logits, labels, classes, average="micro")),
            "f1": float(f1[1] if classes == 2 else f1.mean()),
            "matthews": float(multiclass_matthews_corrcoef(logits, labels, classes)),
            "cross_entropy": float(F.cross_entropy(logits, labels)),
        }

    def record(self, networks: Mapping[str, Network | Teacher], split: Any, folder: Path) -> None:
        """Write what networks said of the test texts, and the words of some that are hard.

        ``predictions.safetensors``: labels, rows, each network's probabilities.
        ``examples.json``: position and strings of at most 64 texts: over which networks part, then
        such as all get wrong.
        """
        tensors: dict[str, Tensor] = {"rows": split.rows}
        answers = []
        for name, network in networks.items():
            logits, tensors["labels"] = self.predict(network, split)
            answers.append(logits.argmax(1))
            tensors[f"probabilities.{name}"] = self.probabilities(logits).half()
        votes = torch.stack(answers)
        parted, wrong = (votes != votes[0]).any(0), (votes != tensors["labels"]).any(0)
        order = (2 * parted.long() + wrong.long()).argsort(descending=True, stable=True)
        chosen = order[wrong[order]][:MOST_EXAMPLES].tolist()
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            folder / "predictions.safetensors",
            metadata={"classes": "\n".join(self.classes)},
        )
        shown = [{"position": p, "texts": split.read(p)} for p in chosen]
        write_atomically(folder / EXAMPLES, json.dumps(shown).encode())


class TextWords(Words):
    """Where texts come from and how they become tokens."""

    columns: tuple[str, ...] | None = Field(default=None, description="of the one or two texts")
    label: str = "label"
    tokenizer: str | None = Field(
        default=None,
        description="of a network (run:FOLDER), of transformers (hf:NAME, a folder, a "
        "tokenizer.json) or a vocab.txt; trained on the training texts if not given",
    )
    vocabulary: Annotated[int, Field(ge=64, le=2**20)] = Field(
        default=30522, description="tokens at most, of a tokenizer that is trained"
    )
    case: Literal["lower", "kept"] = "lower"
    length: Annotated[int, Field(ge=4, le=4096)] = Field(
        default=128, description="tokens at which texts are cut"
    )


class Text(Domain):
    """Texts, or pairs of them, of one class each."""

    words_type: ClassVar[type[Words]] = TextWords
    source = "grammar"

    def __init__(
        self, words: TextWords, *, device: torch.device, workers: int, voice: Voice
    ) -> None:
        self.words, self.device = words, device
        data = sources.load(words.source, words.validation, words.columns, words.label)
        voice.say(data.describe())
        train = data.splits["train"]
        if words.limit is not None and words.limit < len(train):
            voice.say(f"of the training texts {words.limit:,} are used")
            train = sample(train, words.limit)
        self.classes = data.classes
        self.input = self._input(train)
        self.splits = {
            "train": train,
            "transfer": train,
            "validation": data.splits["validation"],
            "test": data.splits["test"],
        }
        self.facts = {"data": data.source, "fingerprint": data.fingerprint()}

    def _input(self, train: Texts) -> TextInput:
        words = self.words
        if words.tokenizer is not None:
            return read_tokenizer(words.tokenizer, words.length)
        said = [text for position in range(len(train)) for text in train.read(position)]
        return TextInput(word_pieces(said, words.vocabulary, words.case == "lower"), words.length)

    @staticmethod
    def kind_of(source: str) -> str:
        return sources.kind_of(source)

    def task(self, augment: Any = None) -> TextClassification:
        if augment is not None:
            raise UserError("texts are not augmented as images are; leave out augment")
        return TextClassification(self.classes, self.device)

    def network(self, name: str, seed: int | None = None) -> Network:
        return build(name, self.classes, self.input, seed)

    def sample(self) -> list[tuple[str, ...]]:
        return self.input.sample()

    @classmethod
    def recognise(cls, network: Network, files: Sequence[Path], top: int) -> list[dict[str, Any]]:
        """The most probable classes of what files of text say, of each as a whole."""
        if not network.classes or not isinstance(network.input, TextInput):
            raise UserError("the network does not say which classes it knows and what it is fed")
        view = [(" ".join(sources.passages(file)),) for file in files]
        with torch.no_grad():
            logits = model_output(network.eval()(view))
        best = logits.softmax(-1).topk(min(top, len(network.classes)))
        return [
            {
                "image": str(file),
                "classes": [
                    {"class": network.classes[i], "probability": p}
                    for p, i in zip(ps, places, strict=True)
                ],
            }
            for file, ps, places in zip(
                files, best.values.tolist(), best.indices.tolist(), strict=True
            )
        ]
