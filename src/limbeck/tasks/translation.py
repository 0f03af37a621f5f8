"""Translation: a sentence goes in, one of another language comes out, token by token."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from limbeck.data import parallel
from limbeck.data.parallel import Pairs
from limbeck.errors import UserError
from limbeck.extras import need
from limbeck.models import build
from limbeck.models.beam import beam_search
from limbeck.models.sentences import LEAST, PAD, Sentences, sources, targets
from limbeck.models.seq2seq import Seq2Seq
from limbeck.models.spec import STORED, Spec
from limbeck.training.checkpoint import write_atomically
from limbeck.training.domain import Domain, Words
from limbeck.training.network import Network
from limbeck.training.progress import Voice
from limbeck.training.seeding import derive
from limbeck.training.taps import Taps
from limbeck.training.task import Answer, Batch, Batches, Task, model_output
from limbeck.training.teacher import Teacher

PREDICTIONS = "predictions.json"
"""The file in a run folder that has what each network made of the test sentences."""

ROWS = 1280  # hypotheses that are worked on at once
POOL = 50  # batches whose sentences are sorted by length before they are parted


@dataclass(frozen=True)
class Hypothesis:
    """A translation with its log-probability in nats; ``finished`` unless it was cut off."""

    text: str
    score: float
    finished: bool


class PairBatches:
    """Batches of pairs, filled up to the longest with :data:`limbeck.models.sentences.PAD`.

    ``source`` (B, S); ``before`` (B, T), the gold tokens before each token; ``label`` (B, T), the
    tokens; ``row`` (B,). All int64. For training the pairs come shuffled, those of a batch of like
    length.

    Args:
        pairs: the sentences.
        text: turns them into tokens; for training all at once, as they are sorted by length.
        batch_size: sentences a step, over all processes.
        seed: decides the order.
        train: shuffle; otherwise the pairs come in their order.
    """

    def __init__(
        self, pairs: Pairs, text: Sentences, batch_size: int, *, seed: int = 0, train: bool = False
    ) -> None:
        self.pairs, self.text, self.batch_size = pairs, text, batch_size
        self.seed, self.train = seed, train

    def __len__(self) -> int:
        return -(-len(self.pairs) // self.batch_size)

    def order(self, epoch: int) -> list[list[int]]:
        """The positions of each batch's pairs in this epoch."""
        if not self.train:
            return _chunks(list(range(len(self.pairs))), self.batch_size)
        generator = torch.Generator().manual_seed(derive(self.seed, epoch) >> 1)
        shuffled = torch.randperm(len(self.pairs), generator=generator).tolist()
        batches: list[list[int]] = []
        for pool in _chunks(shuffled, POOL * self.batch_size):
            pool.sort(key=lambda n: self._lengths[n])
            batches += _chunks(pool, self.batch_size)
        return [batches[n] for n in torch.randperm(len(batches), generator=generator).tolist()]

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from step ``start`` on, this process's share of each."""
        rank, world = 0, 1
        if self.train and dist.is_available() and dist.is_initialized():
            rank, world = dist.get_rank(), dist.get_world_size()
        for places in self.order(epoch)[start:]:
            # A process left without a sample takes one with no weight, so that all step together.
            mine = places[rank::world] or places[:1]
            before, label = targets(self._tokens("target", mine))
            batch: Batch = {
                "source": sources(self._tokens("source", mine)),
                "before": before,
                "label": label,
                "row": self.pairs.rows[mine],
            }
            if world > 1:
                # The loss is a mean over tokens, so they are what is shared; END is one.
                tokens = [self._lengths[n][0] + 1 for n in places]
                batch["share"] = sum(tokens[rank::world]) * world / sum(tokens)
            yield batch

    @cached_property
    def _every(self) -> dict[str, list[list[int]]]:
        return {
            "source": self.text.encode("source", self.pairs.source),
            "target": self.text.encode("target", self.pairs.target),
        }

    @cached_property
    def _lengths(self) -> list[tuple[int, int]]:
        """Tokens of target and source of each pair."""
        sides = self._every["target"], self._every["source"]
        return [(len(t), len(s)) for t, s in zip(*sides, strict=True)]

    def _tokens(self, side: Literal["source", "target"], places: Sequence[int]) -> list[list[int]]:
        if self.train:
            return [self._every[side][n] for n in places]
        return self.text.encode(side, [getattr(self.pairs, side)[n] for n in places])


class Translation(Task):
    """Translation: ``source``, ``before``, ``label`` in a batch, ``logits`` (B, T, V) in an answer.

    Args:
        text: the vocabularies that batches are made of.
        beam: width of the beam that networks are compared with, beside greedy search.
        device: where networks and batches live.
    """

    name: ClassVar[str] = "translation"
    distributions: ClassVar[tuple[str, ...]] = ("logits",)
    metric: ClassVar[str] = "BLEU"
    higher_is_better: ClassVar[bool] = True

    def __init__(self, text: Sentences, beam: int = 5, device: torch.device | None = None) -> None:
        self.text, self.beam = text, beam
        self.device = device or torch.device("cpu")

    def batches(
        self, split: Pairs, *, batch_size: int, seed: int = 0, train: bool = False
    ) -> Batches:
        return PairBatches(split, self.text, batch_size, seed=seed, train=train)

    def run(self, network: Network, batch: Batch, taps: Taps | None = None) -> Answer:
        """The logits of every token from the gold ones before it.

        Raises:
            UserError: the network has another vocabulary than the batches.
        """
        self.check_vocabulary(network)
        view = batch["source"], batch["before"]
        if taps is None or not taps.paths:
            return Answer({"logits": model_output(network(view))})
        output, features = taps.watch(network, view)
        return Answer({} if output is None else {"logits": model_output(output)}, features)

    def check_vocabulary(self, network: Network) -> None:
        """Raise where a network does not agree on the map from numbers to tokens."""
        theirs = network.input
        if not isinstance(theirs, Sentences) or theirs == self.text:
            return
        who = network.name or type(network.model).__name__
        for side in ("source", "target"):
            if difference := _difference(getattr(theirs, side), getattr(self.text, side)):
                raise UserError(
                    f"{who} has another {side} vocabulary than the data ({difference}), so words "
                    "cannot be compared one by one; learn from its sentences instead, as seq-kd "
                    "with word: 0 does, or train both models on the same vocabulary"
                )

    def loss(self, answer: Answer, batch: Batch) -> Tensor:
        """Cross-entropy in nats, mean over the tokens; filling does not count."""
        if not self.labelled(batch):
            raise UserError("the data has no translations, which the supervised loss needs")
        logits = answer["logits"].float().flatten(0, 1)
        return F.cross_entropy(logits, batch["label"].flatten(), ignore_index=PAD)

    def combine(
        self,
        answers: Sequence[Answer],
        weights: Tensor,
        mean: Literal["probabilities", "logits"],
    ) -> Answer:
        """One answer for several teachers: the mean of logits, or the logarithm of the mean."""
        stacked = torch.stack([a["logits"].float() for a in answers])
        shares = weights.to(stacked).view(-1, 1, 1, 1)
        if mean == "logits":
            return Answer({"logits": (shares * stacked).sum(0)})
        return Answer({"logits": torch.logsumexp(stacked.log_softmax(-1) + shares.log(), 0)})

    @torch.no_grad()
    def translate(
        self, network: Network | Teacher, sentences: Sequence[str], beam: int = 1, best: int = 1
    ) -> list[list[Hypothesis]]:
        """What a network makes of sentences, by beam search in its own vocabulary.

        Args:
            network: or a teacher of one network; its mode is restored.
            sentences: to translate.
            beam: hypotheses at a time; one is greedy.
            best: so many of them are given back, the most probable first, at most ``beam``.

        Raises:
            UserError: several teachers, or a model that takes no part in a search.
        """
        if isinstance(network, Teacher):
            if len(network.networks) > 1:
                raise UserError(
                    f"{len(network.networks)} teachers cannot search together; give one teacher"
                )
            (network,) = network.networks
        text, model = network.input, network.model
        if not isinstance(text, Sentences) or not isinstance(model, Seq2Seq):
            raise UserError(
                f"{network.name or type(model).__name__} cannot translate: a model with encode and "
                "step (limbeck.models.seq2seq.Seq2Seq) is needed, fed a "
                "limbeck.models.sentences.Sentences"
            )
        was_training = network.training
        network.eval()
        found: list[list[Hypothesis]] = [[] for _ in sentences]
        order = sorted(range(len(sentences)), key=lambda n: len(sentences[n]))
        for places in _chunks(order, max(1, ROWS // max(beam, 5))):
            source = sources(text.encode("source", [sentences[n] for n in places])).to(self.device)
            searched = beam_search(model, source, beam, text.longest, every=best > 1)
            tokens = searched.tokens[:, :best].cpu()
            scores, finished = searched.scores.tolist(), searched.finished.tolist()
            said = text.decode(tokens.flatten(0, 1).tolist())
            for row, place in enumerate(places):
                found[place] = [
                    Hypothesis(said[row * tokens.shape[1] + k], scores[row][k], finished[row][k])
                    for k in range(tokens.shape[1])
                    if scores[row][k] > float("-inf")
                ]
        network.train(was_training)
        return found

    def measure(self, network: Network | Teacher, split: Pairs) -> dict[str, float]:
        """BLEU (0..100) of greedy search, and perplexity on the gold translations, per token."""
        return {
            "BLEU": bleu(self._said(network, split, 1)[0], split.target),
            "perplexity": self._perplexity(network, split),
        }

    def searched(self, network: Network | Teacher, split: Pairs) -> dict[str, float]:
        """As :meth:`measure`, and by beam search: BLEU, and the probability of what it finds.

        The ``mode mass`` is the mean over sentences of the probability, 0..1, that the network
        gives to the best hypothesis of its beam: how sure it is of one translation.
        """
        said, mass = self._said(network, split, self.beam)
        return {
            **self.measure(network, split),
            f"BLEU, beam {self.beam}": bleu(said, split.target),
            "mode mass": mass,
        }

    def _said(self, network: Network | Teacher, split: Pairs, beam: int) -> tuple[list[str], float]:
        if not len(split):
            raise UserError("there are no sentences to measure on")
        first = [found[0] for found in self.translate(network, split.source, beam)]
        scores = torch.tensor([h.score for h in first], dtype=torch.float64)
        return [h.text for h in first], float(scores.exp().mean())

    @torch.no_grad()
    def _perplexity(self, network: Network | Teacher, split: Pairs) -> float:
        single = network.networks[0] if isinstance(network, Teacher) else network
        text = single.input if isinstance(single.input, Sentences) else self.text
        was_training = single.training
        single.eval()
        total, tokens = torch.zeros((), dtype=torch.float64), 0
        for batch in PairBatches(split, text, 128, train=True).epoch(0):
            label = batch["label"].to(self.device)
            view = batch["source"].to(self.device), batch["before"].to(self.device)
            logits = model_output(single(view)).float().flatten(0, 1)
            loss = F.cross_entropy(logits, label.flatten(), ignore_index=PAD, reduction="sum")
            total += loss.double().cpu()
            tokens += int((label != PAD).sum())
        single.train(was_training)
        return float((total / tokens).exp())

    def compare(self, networks: Mapping[str, Network | Teacher], split: Pairs) -> dict[str, Any]:
        """Each network's measures, by greedy and by beam search."""
        return {"measures": {name: self.searched(n, split) for name, n in networks.items()}}

    def record(self, networks: Mapping[str, Network | Teacher], split: Pairs, folder: Path) -> None:
        """Write ``predictions.json``: sources, references, each network's greedy translations."""
        said = {name: self._said(network, split, 1)[0] for name, network in networks.items()}
        content = {"source": split.source, "reference": split.target, "said": said}
        write_atomically(folder / PREDICTIONS, json.dumps(content, ensure_ascii=False).encode())


def bleu(said: Sequence[str], references: Sequence[str]) -> float:
    """Corpus BLEU, 0..100, of detokenised text (sacreBLEU; Papineni et al. 2002, Post 2018).

    >>> round(bleu(["a man rides a red bike"], ["a man rides a red bike"]), 6)
    100.0
    """
    found = need("sacrebleu").corpus_bleu(list(said), [list(references)])
    return float(found.score)


def _difference(theirs: str, ours: str) -> str:
    """The first token on which two vocabularies differ, as a part of a sentence."""
    one, other = (Sentences(v, v, 1).vocabulary for v in (theirs, ours))
    for number, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return f"token {number} is {a!r} and not {b!r}"
    return f"{len(one):,} tokens and not {len(other):,}" if len(one) != len(other) else ""


def _chunks(places: list[int], size: int) -> list[list[int]]:
    return [places[n : n + size] for n in range(0, len(places), size)]


class TranslationWords(Words):
    """Where parallel text comes from, and the vocabularies that are learnt from it."""

    languages: tuple[str, str] | None = Field(
        default=None, description="from which to which; ends of files, columns or keys"
    )
    vocabulary: int = Field(default=4000, ge=LEAST, le=10**6, description="tokens of a side")
    shared: bool = Field(default=False, description="one vocabulary for both sides")
    longest: int = Field(
        default=50, ge=1, le=1000, description="tokens; longer training pairs are left out"
    )
    beam: int = Field(default=5, ge=1, le=1000, description="that networks are compared with")


class ParallelText(Domain):
    """Sentences with their translations, of any source :func:`limbeck.data.parallel.load` knows."""

    words_type: ClassVar[type[Words]] = TranslationWords
    source = "numbers"

    def __init__(
        self, words: TranslationWords, *, device: torch.device, workers: int, voice: Voice
    ) -> None:
        need("sacrebleu")
        self.words, self.device = words, device
        corpus = parallel.load(words.source, words.languages, words.validation)
        voice.say(corpus.describe())
        train = corpus.train
        if words.limit is not None and words.limit < len(train):
            train = train.at_most(words.limit)
        self.text = Sentences.trained(
            train.source,
            train.target,
            words.vocabulary,
            shared=words.shared,
            longest=words.longest,
        )
        kept = self._short(train)
        voice.say(
            f"{len(kept):,} training pairs of at most {words.longest} tokens a side; "
            + self.text.describe()
        )
        self.splits = {
            "train": kept,
            "transfer": kept,
            "validation": corpus.validation,
            "test": corpus.test,
        }
        self.facts = {"data": corpus.source, "fingerprint": corpus.fingerprint()}

    def _short(self, pairs: Pairs) -> Pairs:
        longest = self.words.longest
        text = replace(self.text, longest=longest + 1)
        sides = text.encode("source", pairs.source), text.encode("target", pairs.target)
        both = enumerate(zip(*sides, strict=True))
        kept = pairs.subset([n for n, ids in both if max(map(len, ids)) <= longest])
        if not len(kept):
            raise UserError(
                f"no training pair of {self.words.source} has at most {longest} tokens a side; "
                "raise data.longest"
            )
        return kept

    @staticmethod
    def kind_of(source: str) -> str:
        return parallel.kind_of(source)

    def task(self, augment: Any = None) -> Translation:
        if augment is not None:
            raise UserError("sentences are not augmented; leave augment out")
        return Translation(self.text, self.words.beam, self.device)

    def network(self, name: str, seed: int | None = None) -> Network:
        # A stored network keeps its own vocabulary: sentences say the same in any.
        stored = Spec.parse(name).kind in STORED
        return build(name, () if stored else self.text.vocabulary, self.text, seed)

    def sample(self) -> tuple[Tensor, Tensor]:
        return self.text.sample()
