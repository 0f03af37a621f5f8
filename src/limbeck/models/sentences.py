"""What models that translate are fed: tokens of two vocabularies, which lie beside the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from torch import Tensor

from limbeck.extras import need
from limbeck.models.input import Count, Intake

if TYPE_CHECKING:
    from limbeck.models.libraries import Offer, Order

PAD, BEGIN, END = 0, 1, 2
"""Tokens that are no text: filling, and the marks before and behind a translation."""

SPECIAL = ("<pad>", "<s>", "</s>")

LEAST = 300
"""The fewest tokens of a vocabulary: all bytes, the special ones, and some merges."""


@dataclass(frozen=True)
class Sentences(Intake):
    """Sentences as tokens: the source's vocabulary and the target's, as JSON of ``tokenizers``.

    Byte pairs on bytes, so every text can be said, and what is decoded is what was encoded.
    ``longest`` is the most tokens of a sentence; what is beyond is cut off.
    """

    source: str
    target: str
    longest: Count

    kind = "sentences"

    def __call__(self, view: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Source tokens (B, S) and target tokens so far (B, T), as they are."""
        return view

    @classmethod
    def trained(
        cls,
        source: Sequence[str],
        target: Sequence[str],
        size: int,
        *,
        shared: bool = False,
        longest: int = 50,
    ) -> Self:
        """Vocabularies learnt from sentences: of each side its own, or a shared one.

        >>> Sentences.trained(["a man"], ["ein Mann"], 300).decode([[3 + 65, 2]])
        ['b']
        """
        if shared:
            both = _trained([*source, *target], size)
            return cls(both, both, longest)
        return cls(_trained(source, size), _trained(target, size), longest)

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """The target's tokens in the order of their numbers."""
        return _vocabulary(self.target)

    @property
    def sizes(self) -> tuple[int, int]:
        """How many tokens source and target have."""
        return len(_vocabulary(self.source)), len(self.vocabulary)

    def encode(
        self, side: Literal["source", "target"], sentences: Sequence[str]
    ) -> list[list[int]]:
        """The tokens of sentences, at most ``longest`` each."""
        found = _tokenizer(getattr(self, side)).encode_batch(list(sentences))
        return [encoding.ids[: self.longest] for encoding in found]

    def decode(self, tokens: Iterable[Sequence[int]]) -> list[str]:
        """The text that target tokens stand for, up to :data:`END`."""
        cut = [_until_end(ids) for ids in tokens]
        return [" ".join(text.split()) for text in _tokenizer(self.target).decode_batch(cut)]

    def sample(self) -> tuple[Tensor, Tensor]:
        """A sentence of ten tokens on each side."""
        length = min(10, self.longest)
        return torch.full((1, length), END), torch.full((1, length), BEGIN)

    def describe(self) -> str:
        return "sentences of {:,} source and {:,} target tokens".format(*self.sizes)

    def offers(self) -> Mapping[str, Callable[[Order], Offer]]:
        from limbeck.models.seq2seq import offer

        return {"": offer}

    def check(self, output: Any, classes: int) -> None:
        if not isinstance(output, Tensor) or output.shape[-1] != classes:
            got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(f"it puts out {got} instead of {classes} logits a token")

    @classmethod
    def from_json(cls, facts: dict[str, Any]) -> Self:
        found = super().from_json(facts)
        try:
            _ = found.sizes
        except Exception:  # Foreign JSON can fail in any way.
            raise ValueError("it holds no vocabulary") from None
        return found


def _trained(sentences: Sequence[str], size: int) -> str:
    tokenizers = need("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.normalizer = tokenizers.normalizers.NFC()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences, trainer)
    return str(tokenizer.to_str())


@lru_cache(maxsize=16)
def _tokenizer(content: str) -> Any:
    return need("tokenizers").Tokenizer.from_str(content)


@lru_cache(maxsize=16)
def _vocabulary(content: str) -> tuple[str, ...]:
    tokenizer = _tokenizer(content)
    return tuple(str(tokenizer.id_to_token(n)) for n in range(tokenizer.get_vocab_size()))


def _until_end(ids: Sequence[int]) -> list[int]:
    found = []
    for token in ids:
        if token == END:
            break
        if token not in (PAD, BEGIN):
            found.append(int(token))
    return found


def sources(sentences: Sequence[Sequence[int]]) -> Tensor:
    """Tokens of sentences to translate, (B, S): each with :data:`END`, then :data:`PAD`.

    >>> sources([[7], [8, 9]])
    tensor([[7, 2, 0],
            [8, 9, 2]])
    """
    return _padded([[*ids, END] for ids in sentences])


def targets(sentences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Of translations the tokens before each token, (B, T), and the tokens themselves.

    >>> targets([[7]])
    (tensor([[1, 7]]), tensor([[7, 2]]))
    """
    return _padded([[BEGIN, *ids] for ids in sentences]), _padded(
        [[*ids, END] for ids in sentences]
    )


def _padded(sequences: Sequence[Sequence[int]]) -> Tensor:
    longest = max(map(len, sequences), default=0)
    return torch.tensor(
        [[*ids, *[PAD] * (longest - len(ids))] for ids in sequences], dtype=torch.int64
    ).view(len(sequences), longest)
