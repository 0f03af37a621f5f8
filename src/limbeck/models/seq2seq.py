"""Networks that translate: LSTMs with attention (Luong et al. 2015), and Transformers.

Each has three faces: ``model((source, before))`` gives the logits (B, T, V) of all tokens at once,
each from the gold ones before it; ``encode(source)`` reads sentences, and ``step`` says the next
token's logits, for searches.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from limbeck.errors import UserError, did_you_mean
from limbeck.models.sentences import PAD

if TYPE_CHECKING:
    from limbeck.models.libraries import Offer, Order

NAMES = {
    "lstm-1x64": "LSTM encoder and decoder of 1 layer and 64 units with attention (any lstm-LxU)",
    "lstm-2x500": "of 2 layers and 500 units",
    "lstm-4x1000": "of 4 layers and 1000 units",
    "lstm-2x500-drop": "with dropout of 0.3 between layers (any lstm-...-drop)",
    "transformer-3x256": "Transformer of 3 + 3 layers and 256 units (any transformer-LxU)",
}
"""Name -> one line about it; L layers of U units."""

DROPOUT = 0.3
HEAD = 64  # units of an attention head of a Transformer

State = tuple[Tensor, ...]
"""What a decoder remembers: tensors with one row a hypothesis."""


class Seq2Seq(nn.Module):
    """A network that reads a sentence and says another, token by token."""

    def forward(self, view: tuple[Tensor, Tensor]) -> Tensor:
        """Logits (B, T, V) of tokens from the source (B, S) and the tokens before them (B, T)."""
        raise NotImplementedError

    def encode(self, source: Tensor) -> tuple[State, State]:
        """What is read of sentences (B, S), and what the decoder begins with."""
        raise NotImplementedError

    def step(self, token: Tensor, read: State, state: State) -> tuple[Tensor, State]:
        """Logits (B * K, V) of the next token, and the state with it.

        Args:
            token: (B * K,), the last token of K hypotheses for each of B sentences.
            read: what :meth:`encode` read of the B sentences.
            state: of the B * K hypotheses.
        """
        raise NotImplementedError


class AttentionLSTM(Seq2Seq):
    """LSTM encoder and decoder with global attention, general score and input feeding.

    The encoder reads forwards; the decoder begins with its last states. Embeddings are as wide as
    the layers. All weights begin uniform within 0.1, those of fewer than 300 units within more.

    Args:
        layers: of encoder and decoder each.
        width: units of a layer.
        source, target: sizes of the vocabularies.
        dropout: between layers and before the output.

    >>> net = AttentionLSTM(1, 8, 20, 30)
    >>> net((torch.ones(2, 5, dtype=torch.int64), torch.ones(2, 7, dtype=torch.int64))).shape
    torch.Size([2, 7, 30])
    """

    def __init__(
        self, layers: int, width: int, source: int, target: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.source_embedding = nn.Embedding(source, width)
        self.target_embedding = nn.Embedding(target, width)
        between = dropout if layers > 1 else 0.0
        self.encoder = nn.LSTM(width, width, layers, batch_first=True, dropout=between)
        sizes = [2 * width] + [width] * (layers - 1)
        self.decoder = nn.ModuleList(nn.LSTMCell(size, width) for size in sizes)
        self.score = nn.Linear(width, width, bias=False)
        self.combine = nn.Linear(2 * width, width, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(width, target)
        # Within the same 0.1 the signals of a narrow network die away.
        bound = max(0.1, (3 / width) ** 0.5)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, view: tuple[Tensor, Tensor]) -> Tensor:
        source, before = view
        read, state = self.encode(source)
        said = []
        for embedded in self.target_embedding(before).unbind(1):
            state = self._advance(embedded, read, state)
            said.append(state[-1])
        logits: Tensor = self.output(torch.stack(said, 1))
        return logits

    def encode(self, source: Tensor) -> tuple[State, State]:
        there = source != PAD
        packed = nn.utils.rnn.pack_padded_sequence(
            self.source_embedding(source),
            there.sum(1).clamp(min=1).cpu(),
            batch_first=True,
            enforce_sorted=False,
        )
        outputs, (hidden, cell) = self.encoder(packed)
        memory, _ = nn.utils.rnn.pad_packed_sequence(
            outputs, batch_first=True, total_length=source.shape[1]
        )
        fed = memory.new_zeros(len(source), memory.shape[2])
        # The general score h' W m, its product with the memory made once for all steps.
        return (memory, self.score(memory), there), (*hidden, *cell, fed)

    def step(self, token: Tensor, read: State, state: State) -> tuple[Tensor, State]:
        state = self._advance(self.target_embedding(token), read, state)
        return self.output(state[-1]), state

    def _advance(self, embedded: Tensor, read: State, state: State) -> State:
        """One token further: hidden states, cells, and the attentional vector that is fed back."""
        layers = len(self.decoder)
        hidden, cells, fed = state[:layers], state[layers:-1], state[-1]
        below, states = torch.cat([embedded, fed], 1), []
        for number, layer in enumerate(self.decoder):
            if number:
                below = self.dropout(below)
            states.append(layer(below, (hidden[number], cells[number])))
            below = states[-1][0]
        memory, keys, there = read
        query = below.view(len(memory), -1, below.shape[1])  # (B, K, D)
        scores = torch.bmm(query, keys.transpose(1, 2))  # (B, K, S)
        shares = scores.masked_fill(~there[:, None], float("-inf")).softmax(-1)
        context = torch.bmm(shares, memory).view_as(below)
        fed = self.dropout(self.combine(torch.cat([context, below], 1)).tanh())
        return (*(h for h, _ in states), *(c for _, c in states), fed)


class Transformer(Seq2Seq):
    """Transformer encoder and decoder (Vaswani et al. 2017), norms first, sinusoidal places.

    Args:
        layers: of encoder and decoder each.
        width: units; heads have 64, the layers between four times the width.
        source, target: sizes of the vocabularies.
        dropout: as PyTorch's.

    >>> net = Transformer(1, 16, 20, 30)
    >>> net((torch.ones(2, 5, dtype=torch.int64), torch.ones(2, 7, dtype=torch.int64))).shape
    torch.Size([2, 7, 30])
    """

    def __init__(
        self, layers: int, width: int, source: int, target: int, dropout: float = 0.1
    ) -> None:
        super().__init__()
        heads = max(1, width // HEAD)
        self.source_embedding = nn.Embedding(source, width)
        self.target_embedding = nn.Embedding(target, width)
        kind = {"dropout": dropout, "batch_first": True, "norm_first": True}
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(width, heads, 4 * width, **kind),  # type: ignore[arg-type]
            layers,
            nn.LayerNorm(width),
            enable_nested_tensor=False,
        )
        self.decoder = nn.TransformerDecoder(
            nn.TransformerDecoderLayer(width, heads, 4 * width, **kind),  # type: ignore[arg-type]
            layers,
            nn.LayerNorm(width),
        )
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(width, target)
        for embedding in (self.source_embedding, self.target_embedding):
            nn.init.normal_(embedding.weight, std=width**-0.5)

    def forward(self, view: tuple[Tensor, Tensor]) -> Tensor:
        source, before = view
        logits: Tensor = self.output(self._decoded(before, *self.encode(source)[0]))
        return logits

    def encode(self, source: Tensor) -> tuple[State, State]:
        missing = source == PAD
        read = self.encoder(
            self._placed(self.source_embedding(source)), src_key_padding_mask=missing
        )
        return (read, missing), (source.new_empty(len(source), 0),)

    def step(self, token: Tensor, read: State, state: State) -> tuple[Tensor, State]:
        before = torch.cat([state[0], token[:, None]], 1)
        times = len(before) // len(read[0])
        wide = (part.repeat_interleave(times, 0) for part in read)
        return self.output(self._decoded(before, *wide)[:, -1]), (before,)

    def _decoded(self, before: Tensor, memory: Tensor, missing: Tensor) -> Tensor:
        length = before.shape[1]
        later = torch.ones(length, length, dtype=torch.bool, device=before.device).triu(1)
        found: Tensor = self.decoder(
            self._placed(self.target_embedding(before)),
            memory,
            tgt_mask=later,
            memory_key_padding_mask=missing,
        )
        return found

    def _placed(self, embedded: Tensor) -> Tensor:
        """Embeddings (B, T, D) times the root of D, with their places."""
        _, length, width = embedded.shape
        place = torch.arange(length, device=embedded.device)[:, None]
        each = torch.arange(0, width, 2, device=embedded.device) / width
        angle = place / 10000.0**each
        places = torch.stack([angle.sin(), angle.cos()], 2).flatten(1)[:, :width]
        placed: Tensor = self.dropout(embedded * width**0.5 + places)
        return placed


def offer(order: Order) -> Offer:
    """A network of Limbeck's own that translates, by its name.

    Raises:
        UserError: there is none of this name.
    """
    from limbeck.models.libraries import Offer, Way

    found = re.fullmatch(r"(lstm|transformer)-(\d+)x(\d+)(-drop)?", order.name)
    if found is None or "0" in (found[2], found[3]) or (found[1] != "lstm" and found[4]):
        raise UserError(
            f"there is no network named {order.name!r} that translates; "
            + did_you_mean(order.name, NAMES)
        )
    layers, width = int(found[2]), int(found[3])
    if found[1] == "transformer" and width > HEAD and width % HEAD:
        raise UserError(f"{order.name}: units of a Transformer are parted into heads of {HEAD}")

    def make() -> nn.Module:
        if found[1] == "transformer":
            return Transformer(layers, width, *order.input.sizes)
        source, target = order.input.sizes
        return AttentionLSTM(layers, width, source, target, DROPOUT if found[4] else 0.0)

    return Offer([Way(make, order.input)])
