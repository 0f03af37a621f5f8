"""Beam search: the most probable sentences that a network says, as far as a beam finds them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from limbeck.models.sentences import BEGIN, END, PAD
from limbeck.models.seq2seq import Seq2Seq


@dataclass(frozen=True)
class Hypotheses:
    """What a search found for B sentences, K each, the most probable first.

    ``tokens`` (B, K, T) end with END where ``finished`` (B, K), and are filled with PAD; ``scores``
    (B, K) are log-probabilities in nats, -infinity where there are fewer than K.
    """

    tokens: Tensor
    scores: Tensor
    finished: Tensor


@torch.no_grad()
def beam_search(
    model: Seq2Seq, source: Tensor, beam: int = 5, longest: int = 50, every: bool = False
) -> Hypotheses:
    """The hypotheses of a beam; a beam of one is greedy.

    A finished hypothesis stays in the beam with its score, which no longer changes. Scores are not
    divided by lengths, so they only fall, and the first hypothesis is settled as soon as it is
    finished; with ``every`` the search goes on until all are.

    Args:
        model: in eval mode.
        source: tokens (B, S).
        beam: K.
        longest: the most tokens of a hypothesis without END.
        every: whether all K are wanted, not the first alone.
    """
    sentences = len(source)
    read, state = model.encode(source)
    state = tuple(part.repeat_interleave(beam, 0) for part in state)
    scores = torch.full((sentences, beam), float("-inf"), device=source.device)
    scores[:, 0] = 0.0
    finished = torch.zeros_like(scores, dtype=torch.bool)
    tokens = source.new_empty(sentences, beam, 0)
    last = source.new_full((sentences * beam,), BEGIN)
    first_row = torch.arange(sentences, device=source.device)[:, None] * beam
    for _ in range(longest + 1):
        logits, state = model.step(last, read, state)
        size = logits.shape[1]
        found = logits.float().log_softmax(-1).view(sentences, beam, size)
        found[..., [PAD, BEGIN]] = float("-inf")
        found = found.masked_fill(finished[..., None], float("-inf"))
        found[..., PAD] = found[..., PAD].masked_fill(finished, 0.0)
        scores, chosen = (scores[..., None] + found).flatten(1).topk(beam)
        origin, token = chosen // size, chosen % size
        rows = (first_row + origin).flatten()
        state = tuple(part[rows] for part in state)
        tokens = torch.cat(
            [tokens.flatten(0, 1)[rows].view(sentences, beam, -1), token[..., None]], 2
        )
        finished = finished.gather(1, origin) | (token == END)
        settled = finished | scores.isinf()
        if bool((settled if every else settled[:, 0]).all()):
            break
        last = token.flatten()
    return Hypotheses(tokens, scores, finished)
