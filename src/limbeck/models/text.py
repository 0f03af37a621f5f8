"""Models of text: what they are fed, those made here by name, and where their parts lie."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from limbeck.errors import UserError, did_you_mean
from limbeck.extras import need
from limbeck.models import weights
from limbeck.models.build import fed
from limbeck.models.input import Count, Intake
from limbeck.models.libraries import (
    Offer,
    Order,
    Way,
    answering,
    configuration,
    with_weights,
)
from limbeck.models.spec import PRETRAINED, has_weights
from limbeck.training.network import Network

PADDING, UNKNOWN, FIRST, LAST, MASK = SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
POSITIONS = 512

NAMES = {
    "bert-base": "BERT of 12 layers, width 768",
    "tinybert-6": "BERT of 6 layers, width 768",
    "tinybert-4": "BERT of 4 layers, width 312",
    "bert-2-128-2": "BERT of 2 layers, width 128, 2 heads (any bert-LAYERS-WIDTH-HEADS)",
    "bert-4-312-12-1200": "with so many units between (any bert-LAYERS-WIDTH-HEADS-UNITS)",
}
"""Name -> one line about it; each is a classifier with fresh weights."""

_SIZES = {
    "bert-base": (12, 768, 12, 3072),
    "tinybert-6": (6, 768, 12, 3072),
    "tinybert-4": (4, 312, 12, 1200),
}

FAMILIES = ("bert", "roberta", "electra", "distilbert", "camembert", "xlm-roberta")
"""Families of transformers whose attention scores are products of queries and keys alone."""

_PAIRS = (("query", "key"), ("q_lin", "k_lin"))
_HEADS = ("num_attention_heads", "n_heads")


@dataclass(frozen=True)
class TextInput(Intake):
    """What a model of text is fed: the tokens of one text or two.

    Args:
        tokenizer: all of a fast tokenizer, in the JSON of the library ``tokenizers``.
        length: the most tokens, at which the longer of two texts is cut.
        padding: the token that fills up shorter texts.
        segments: whether the model is told which of the two texts a token is of.

    >>> words = TextInput(word_pieces(["a fine day"], 40), 8)
    >>> words([("a fine day",)])["input_ids"].shape
    torch.Size([1, 5])
    """

    tokenizer: str
    length: Count
    padding: str = PADDING
    segments: bool = True

    kind = "text"

    def __call__(self, view: Sequence[tuple[str, ...]]) -> dict[str, Tensor]:
        """Texts as ``input_ids`` and ``attention_mask``, int64 (B, L) on the CPU.

        L is the longest of them; with ``token_type_ids`` where the model has segments.
        """
        given = [texts[0] if len(texts) == 1 else texts for texts in view]
        found = self._ready().encode_batch(given)
        fed = {
            "input_ids": torch.tensor([e.ids for e in found]),
            "attention_mask": torch.tensor([e.attention_mask for e in found]),
        }
        if self.segments:
            fed["token_type_ids"] = torch.tensor([e.type_ids for e in found])
        return fed

    def _ready(self) -> Any:
        return _tokenizer(self.tokenizer, self.length, self.padding)

    @property
    def tokens(self) -> dict[str, int]:
        """The map from tokens to ids."""
        return _map(self.tokenizer)

    def words(self, text: str) -> list[str]:
        """A text's words as the tokenizer parts them, before it takes them to pieces."""
        made = self._ready()
        said = text if made.normalizer is None else made.normalizer.normalize_str(text)
        if made.pre_tokenizer is None:
            return said.split()
        return [word for word, _ in made.pre_tokenizer.pre_tokenize_str(said)]

    def pieces(self, texts: tuple[str, ...]) -> list[str]:
        """The tokens that a model reads of one sample."""
        given = texts[0] if len(texts) == 1 else texts
        return list(self._ready().encode_batch([given])[0].tokens)

    def sample(self) -> list[tuple[str, ...]]:
        """One text that is as long as any."""
        return [(" ".join(["."] * self.length),)]

    def describe(self) -> str:
        return f"texts of up to {self.length} tokens"

    def offers(self) -> Mapping[str, Callable[[Order], Offer]]:
        return {"": _own, "hf": _transformers}

    def check(self, output: Any, classes: int) -> None:
        shape = tuple(getattr(output, "shape", ()))
        if shape != (1, classes):
            raise ValueError(f"it puts out {shape} instead of {(1, classes)}")

    @classmethod
    def from_json(cls, facts: dict[str, Any]) -> Self:
        found = super().from_json(facts)
        try:
            found._ready()
        except Exception:  # Foreign JSON can fail in any way.
            raise ValueError("it holds no tokenizer") from None
        return found


@cache
def _tokenizer(content: str, length: int, padding: str) -> Any:
    made = need("tokenizers").Tokenizer.from_str(content)
    made.enable_truncation(length)
    made.enable_padding(pad_id=made.token_to_id(padding), pad_token=padding)
    return made


@cache
def _map(content: str) -> dict[str, int]:
    found: dict[str, int] = need("tokenizers").Tokenizer.from_str(content).get_vocab()
    return found


def check_same_tokens(one: Any, other: Any, purpose: str) -> None:
    """See to it that two networks' intakes have the same map from tokens to ids.

    Raises:
        UserError: they have not, or one reads no text; ``purpose`` ends the sentence.
    """
    if not isinstance(one, TextInput) or not isinstance(other, TextInput):
        raise UserError(f"student and teacher must both read texts {purpose}")
    ours, theirs = one.tokens, other.tokens
    if ours == theirs:
        return
    differing = [t for t in theirs if theirs[t] != ours.get(t)] or [
        t for t in ours if t not in theirs
    ]
    raise UserError(
        f"the student's {len(ours):,} tokens and the teacher's {len(theirs):,} are not the same "
        f"({len(differing):,} differ, such as {differing[0]!r}), which they must be {purpose}; "
        "give the data the teacher's tokenizer with data.tokenizer"
    )


def word_pieces(texts: Iterable[str], size: int, lower: bool = True) -> str:
    """Train a WordPiece tokenizer, the same for the same texts, and give it as JSON.

    Wu et al., Google's Neural Machine Translation System, arXiv 1609.08144, section 4.1; parted
    into words as BERT does.

    Args:
        texts: what it is to be good for.
        size: how many tokens at most, the special ones and single characters included.
        lower: whether letters are lower-cased and lose their accents.
    """
    kept = list(texts)
    made = _blank({UNKNOWN: 0}, lower)
    letters = sorted({c for t in kept for c in made.normalizer.normalize_str(t) if not c.isspace()})
    # Pieces of one letter come in an order of their own otherwise, and ties with them.
    first = [*SPECIAL, *letters, *(f"##{letter}" for letter in letters)]
    trainer = need("tokenizers.trainers").WordPieceTrainer(
        vocab_size=max(size, len(first)), special_tokens=first, show_progress=False
    )
    made.train_from_iterator(kept, trainer)
    return str(_framed(_blank(made.get_vocab(), lower)).to_str())


def _blank(vocabulary: dict[str, int], lower: bool) -> Any:
    tokenizers = need("tokenizers")
    model = tokenizers.models.WordPiece(vocab=vocabulary, unk_token=UNKNOWN)
    made = tokenizers.Tokenizer(model)
    made.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=lower)
    made.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    made.decoder = tokenizers.decoders.WordPiece()
    return made


def _framed(made: Any) -> Any:
    """With [CLS] before, [SEP] behind each text, and special tokens that no text can say."""
    ids = [(token, made.token_to_id(token)) for token in (FIRST, LAST)]
    made.post_processor = need("tokenizers.processors").TemplateProcessing(
        single=f"{FIRST} $A {LAST}", pair=f"{FIRST} $A {LAST} $B:1 {LAST}:1", special_tokens=ids
    )
    made.add_special_tokens([t for t in SPECIAL if made.token_to_id(t) is not None])
    return made


def read_tokenizer(source: str, length: int) -> TextInput:
    """The intake of a stored network, or one with a tokenizer from elsewhere.

    Args:
        source: ``run:FOLDER`` or ``file:PATH`` (a network's own), ``hf:NAME`` in the local cache or
            with ``@pretrained`` behind it, a folder or ``tokenizer.json`` of transformers, or
            BERT's ``vocab.txt``.
        length: the most tokens.

    Raises:
        UserError: there is none.
    """
    kind, colon, rest = source.partition(":")
    if colon and kind in ("run", "file"):
        place = Path(rest) / "student" if kind == "run" else Path(rest)
        found = fed(place)
        if not isinstance(found, TextInput):
            raise UserError(f"{source} is a network that reads no texts; it has no tokenizer")
        return replace(found, length=length)
    online = source.endswith(f"@{PRETRAINED}")
    path = Path((rest if kind == "hf" else source).removesuffix(f"@{PRETRAINED}"))
    if path.suffix == ".txt":
        return TextInput(_vocabulary(path), length)
    if path.suffix == ".json":
        return TextInput(*_parted(_content(path), str(path), length))
    return _library_tokenizer(str(path), length, online)


def _content(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise UserError(
            f"the tokenizer {path} cannot be read; wanted is a tokenizer.json, a vocab.txt, or a "
            "folder that transformers' save_pretrained wrote"
        ) from None


def _vocabulary(path: Path) -> str:
    words = _content(path).splitlines()
    missing = [token for token in SPECIAL if token not in words]
    if missing:
        raise UserError(f"{path} is no vocabulary of BERT: it has no {missing[0]}")
    lower = not any(word[:1].isupper() for word in words)
    return str(_framed(_blank({word: n for n, word in enumerate(words)}, lower)).to_str())


def _parted(content: str, where: str, length: int) -> tuple[str, int, str]:
    try:
        tokens = _map(content)
    except Exception as error:  # Foreign bytes can fail in any way.
        raise UserError(f"{where} is no tokenizer: {weights.first_line(error)}") from None
    padding = next((t for t in (PADDING, "<pad>") if t in tokens), None)
    if padding is None:
        raise UserError(f"{where} has no token for padding, {PADDING} or <pad>")
    return content, length, padding


def _library_tokenizer(name: str, length: int, online: bool) -> TextInput:
    tokenizers: Any = need("transformers").AutoTokenizer
    try:
        found = tokenizers.from_pretrained(
            name, trust_remote_code=False, local_files_only=not online, use_fast=True
        )
        content = found.backend_tokenizer.to_str()
    except Exception as error:
        raise UserError(
            f"{name} has no fast tokenizer that can be reached: {weights.first_line(error)}; give "
            "a folder, a tokenizer.json or a vocab.txt"
        ) from None
    segments = "token_type_ids" in found.model_input_names
    return TextInput(*_parted(content, name, length), segments)


def _own(order: Order) -> Offer:
    if order.pretrained:
        raise UserError(
            f"Limbeck ships no weights for {order.name}; train it, or take hf:NAME@pretrained"
        )
    sizes = _sizes(order.name)
    input: TextInput = order.input
    if input.length > POSITIONS:
        raise UserError(
            f"{order.name} reads {POSITIONS} tokens at most, not {input.length}; lower data.length"
        )
    return Offer([Way(lambda: bert(input, len(order.classes), *sizes), order.input)])


def _sizes(name: str) -> tuple[int, int, int, int]:
    if name in _SIZES:
        return _SIZES[name]
    family, *numbers = name.split("-")
    if family != "bert" or len(numbers) not in (3, 4) or not all(map(str.isdecimal, numbers)):
        raise UserError(f"there is no model of text named {name!r}; {did_you_mean(name, NAMES)}")
    layers, width, heads, *units = map(int, numbers)
    if 0 in (layers, width, heads, *units) or width % heads:
        raise UserError(
            f"{name}: layers, width and heads are at least 1, and the heads share the width evenly"
        )
    return layers, width, heads, *(units or [4 * width])  # type: ignore[return-value]


def bert(
    input: TextInput, classes: int, layers: int, width: int, heads: int, units: int
) -> nn.Module:
    """A classifier of BERT's make (Devlin et al., NAACL 2019) with fresh weights.

    Args:
        input: what it reads; its tokens get an embedding each.
        classes: number of outputs.
        layers, width, heads, units: of the encoder; ``units`` between the two layers of a block.
    """
    transformers = need("transformers")
    config = transformers.BertConfig(
        vocab_size=max(input.tokens.values()) + 1,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=units,
        max_position_embeddings=POSITIONS,
        pad_token_id=input.tokens[input.padding],
        num_labels=classes,
    )
    return answering(transformers.BertForSequenceClassification(config))


def _transformers(order: Order) -> Offer:
    models: Any = need("transformers").AutoModelForSequenceClassification
    config, input = configuration(order), order.input
    if order.config is None:
        input = _library_tokenizer(order.name, input.length, order.pretrained)
    if order.pretrained or (order.config is None and has_weights(order.name)):
        return Offer([Way(lambda: with_weights(models, order, config), input)], loaded=True)
    fresh = Way(lambda: answering(models.from_config(config, trust_remote_code=False)), input)
    return Offer([fresh])


# Where the parts of an encoder lie.


@dataclass(frozen=True)
class Encoder:
    """Tap paths of a transformer encoder.

    Args:
        ids: the tokens that it read, (B, L).
        embedding: what goes into the first layer, (B, L, width).
        hidden: what each layer puts out, (B, L, width).
        queries, keys: of each layer's attention, (B, L, width).
        heads: how many each layer has.
        padding: the id of tokens that fill up.
    """

    ids: str
    embedding: str
    hidden: tuple[str, ...]
    queries: tuple[str, ...]
    keys: tuple[str, ...]
    heads: int
    padding: int


def encoder(model: nn.Module) -> Encoder:
    """Find an encoder's parts in a model of transformers.

    Attention scores before the softmax are what queries and keys make of each other, so they need
    no way of computing attention that would put them out.

    Raises:
        UserError: a model of another family, whose scores are made of more than that.

    >>> words = TextInput(word_pieces(["a fine day"], 40), 8)
    >>> found = encoder(bert(words, 2, 2, 8, 2, 16))
    >>> found.hidden, found.heads
    (('bert.encoder.layer.0', 'bert.encoder.layer.1'), 2)
    """
    config = getattr(model, "config", None)
    family = getattr(config, "model_type", type(model).__name__)
    if family not in FAMILIES:
        raise UserError(
            f"the layers of {family} cannot be matched: wanted is a transformer encoder of the "
            f"family {', '.join(FAMILIES[:-1])} or {FAMILIES[-1]}"
        )
    modules = dict(model.named_modules())
    paths = {id(module): path for path, module in modules.items()}
    words = model.get_input_embeddings()  # type: ignore[operator]
    ids = paths[id(words)]
    layers = next(
        path
        for path, module in modules.items()
        if isinstance(module, nn.ModuleList)
        and any(name.endswith(f".{q}") for name, _ in module.named_modules() for q, _ in _PAIRS)
    )
    stack = modules[layers]
    assert isinstance(stack, nn.ModuleList)
    hidden = tuple(f"{layers}.{n}" for n in range(len(stack)))
    query, key = next(
        (name, name.removesuffix(q) + k)
        for name, _ in modules[hidden[0]].named_modules()
        for q, k in _PAIRS
        if name.endswith(f".{q}")
    )
    attention = modules[f"{hidden[0]}.{query}".rpartition(".")[0]]
    heads = next(getattr(attention, name) for name in _HEADS if hasattr(attention, name))
    wider = ids.split(".")[0] + ".embeddings_project"  # where embeddings are narrower than layers
    return Encoder(
        ids=f"{ids}:input",
        embedding=wider if wider in modules else ids.rpartition(".")[0],
        hidden=hidden,
        queries=tuple(f"{path}.{query}" for path in hidden),
        keys=tuple(f"{path}.{key}" for path in hidden),
        heads=int(heads),
        padding=int(words.padding_idx),
    )


class LanguageModel(nn.Module):
    """A masked language model on a network's encoder, which stays the network's.

    Devlin et al., NAACL 2019, section 3.1: a layer, then products with the embeddings of the tokens
    themselves.

    Args:
        network: a model of text; its classifier has no part in this.
    """

    def __init__(self, network: Network) -> None:
        super().__init__()
        model: Any = network.model
        words: nn.Embedding = model.get_input_embeddings()
        self.network = network
        self.transform = nn.Linear(model.config.hidden_size, words.embedding_dim)
        self.norm = nn.LayerNorm(words.embedding_dim, eps=1e-12)
        self.bias = nn.Parameter(torch.zeros(words.num_embeddings))

    def forward(self, fed: Mapping[str, Tensor], where: Tensor) -> Tensor:
        """Logits over the tokens (K, V) at K places of a batch; ``where`` is bool (B, L)."""
        model: Any = self.network.model
        hidden = model.base_model(**self.network.placed(fed)).last_hidden_state
        found = self.norm(nn.functional.gelu(self.transform(hidden[where.to(hidden.device)])))
        logits: Tensor = found @ model.get_input_embeddings().weight.T + self.bias
        return logits


class PublishedLanguageModel(nn.Module):
    """A masked language model of transformers with its own head.

    Args:
        name: ``hf:NAME``, in the local cache or a folder; with ``@pretrained`` behind it may be
            downloaded.

    Raises:
        UserError: there is none.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        plain = name.removeprefix("hf:").removesuffix(f"@{PRETRAINED}")
        models: Any = need("transformers").AutoModelForMaskedLM
        try:
            self.model: nn.Module = models.from_pretrained(
                plain,
                dtype=torch.float32,
                trust_remote_code=False,
                local_files_only=not name.endswith(f"@{PRETRAINED}"),
            )
        except Exception as error:
            raise UserError(
                f"{name} is no masked language model that can be reached: "
                f"{weights.first_line(error)}; give hf:FOLDER, or hf:NAME@pretrained"
            ) from None

    @property
    def tokens(self) -> int:
        """How many it knows."""
        config: Any = self.model.config
        return int(config.vocab_size)

    def forward(self, fed: Mapping[str, Tensor], where: Tensor) -> Tensor:
        """As of :class:`LanguageModel`."""
        logits: Tensor = Network(self.model, dict)(fed).logits
        return logits[where.to(logits.device)]


def masked(
    ids: Tensor, special: Sequence[int], mask: int, tokens: int, share: float = 0.15
) -> tuple[Tensor, Tensor]:
    """Hide tokens as BERT was trained: of those chosen 80 % become [MASK] and 10 % any token.

    Devlin et al., NAACL 2019, section 3.1. Draws from torch's generator.

    Args:
        ids: (B, L).
        special: ids that are never hidden.
        mask: the id of [MASK].
        tokens: how many there are.
        share: of tokens that are chosen.

    Returns:
        Ids with some hidden, and where, bool; both (B, L).
    """
    free = ~torch.isin(ids, torch.tensor(special, device=ids.device))
    chosen = (torch.rand(ids.shape, device=ids.device) < share) & free
    lot = torch.rand(ids.shape, device=ids.device)
    strange = torch.randint(tokens, ids.shape, device=ids.device)
    hidden = torch.where(
        lot < 0.8, torch.full_like(ids, mask), torch.where(lot < 0.9, strange, ids)
    )
    return torch.where(chosen, hidden, ids), chosen


def special_ids(input: TextInput) -> list[int]:
    """The ids of tokens that stand for no text."""
    facts = json.loads(input.tokenizer)["added_tokens"]
    return [int(token["id"]) for token in facts if token["special"]]
