"""What a user can do wrong, said in one sentence."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake of the user: one sentence that says what, where and what would work.

    The command line prints the sentence and exits with status 2; no traceback is shown.
    """


def did_you_mean(wrong: str, known: Iterable[str], most: int = 3) -> str:
    """The end of an error sentence: the near names, or all of them if they are few.

    >>> did_you_mean("resnet2O", ["resnet20", "vgg8"])
    'did you mean resnet20?'
    >>> did_you_mean("x", ["resnet20", "vgg8"])
    'known: resnet20, vgg8'
    """
    names = sorted(set(known))
    near = difflib.get_close_matches(wrong, names, n=most, cutoff=0.6)
    if near:
        return f"did you mean {' or '.join(near)}?"
    shown = ", ".join(names[:12])
    return f"known: {shown}" + (f" and {len(names) - 12} more" if len(names) > 12 else "")
