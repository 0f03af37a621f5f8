"""The strings that name a model. Known without torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from limbeck.errors import UserError, did_you_mean

LIBRARIES = ("torchvision", "timm", "hf")
STORED = ("run", "file")
PRETRAINED = "pretrained"
SUFFIXES = (".safetensors", ".pt", ".pth")


@dataclass(frozen=True)
class Spec:
    """A model's name taken apart.

    ``kind`` is "" for Limbeck's own networks, else one of :data:`LIBRARIES` or :data:`STORED`;
    ``weights`` is "", ``pretrained`` or a path.

    >>> Spec.parse("timm:resnet18@pretrained")
    Spec(kind='timm', name='resnet18', weights='pretrained')
    """

    kind: str
    name: str
    weights: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Take ``NAME``, ``KIND:NAME`` or either with ``@WEIGHTS`` behind it apart.

        Raises:
            UserError: an unknown kind, no name, or something else behind the @.
        """
        before, colon, behind = text.partition(":")
        kind, rest = (before, behind) if colon else ("", text)
        if kind and kind not in LIBRARIES + STORED:
            raise UserError(
                f"{text}: {kind!r} is no source of models; "
                + did_you_mean(kind, LIBRARIES + STORED)
            )
        name, at, weights = rest.rpartition("@")
        # A folder's name may hold an @ itself.
        if not at or (kind and exists(rest)):
            name, weights = rest, ""
        elif weights != PRETRAINED and Path(weights).suffix not in SUFFIXES:
            raise UserError(
                f"{text}: behind @ comes a file of weights ({', '.join(SUFFIXES)}) or the word "
                f"{PRETRAINED}, not {weights!r}"
            )
        if not name:
            raise UserError(f"{text!r} names no model")
        if kind in STORED and weights == PRETRAINED:
            raise UserError(f"{text}: {kind}: brings its own weights; leave @{PRETRAINED} out")
        return cls(kind, name, weights)


def exists(text: str) -> bool:
    """Whether a text is the path of something; one that can be no path is that of nothing.

    >>> exists("."), exists("x" * 5000)
    (True, False)
    """
    try:
        return Path(text).exists()
    except OSError:
        return False


def weights_given(spec: str) -> bool:
    """Whether a model named so comes with trained weights.

    Example:
        >>> weights_given("resnet20"), weights_given("run:runs/teacher")
        (False, True)
    """
    parsed = Spec.parse(spec)
    if parsed.weights or parsed.kind in STORED:
        return True
    return parsed.kind == "hf" and has_weights(parsed.name)


def has_weights(folder: str) -> bool:
    """Whether a folder holds weights written by transformers' ``save_pretrained``.

    >>> has_weights("nowhere")
    False
    """
    return exists(folder) and any(
        path.match(pattern)
        for path in Path(folder).glob("*")
        for pattern in ("model*.safetensors", "pytorch_model*.bin")
    )
