"""TinyBERT: Distilling BERT for Natural Language Understanding. Jiao, Yin, Shang, Jiang, Chen, Li,
Wang, Liu, Findings of EMNLP 2020 (arXiv 1909.10351).

A small transformer is taught layer by layer by a large one: embeddings, attention scores before the
softmax, hidden states, and in the end predictions. A map says which layer of the teacher a layer of
the student learns from, and a learned linear map lifts the student's width to the teacher's. It is
done twice, by the language model on raw text and by the teacher of the task on training texts that
are made more by putting other words in their places.

Needs: a student and a teacher that are transformer encoders of a family such as BERT's, with the
same tokens and as many attention heads; texts by name (the task ``text``).
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS
from torch import Tensor, nn

from limbeck.data.texts import Texts, passages
from limbeck.errors import UserError
from limbeck.models.text import (
    MASK,
    Encoder,
    LanguageModel,
    PublishedLanguageModel,
    TextInput,
    check_same_tokens,
    encoder,
    masked,
    special_ids,
)
from limbeck.training.bench import Bench
from limbeck.training.distiller import Distiller
from limbeck.training.finding import Finding
from limbeck.training.method import Method, Phases
from limbeck.training.network import Network
from limbeck.training.phases import Fit, Journal, Phase, Solve, Training, Update
from limbeck.training.seeding import derive
from limbeck.training.taps import Taps
from limbeck.training.task import Answer, Batch, Terms
from limbeck.training.teacher import Teacher

MASKED, LOW = -10000.0, -100.0
"""What a score of padding is lowered by, and the score from which on it counts as none."""

PURPOSE = "as layers are matched token by token"
RIVALS = {
    "prediction": "prediction stage alone",
    "no-general": "without general stage",
    "no-intermediate": "without intermediate stage",
    "no-augmentation": "without augmentation",
}
Rival = Literal["prediction", "no-general", "no-intermediate", "no-augmentation"]
_LEFT_OUT = {
    "prediction": {"general", "intermediate", "augmentation"},
    "no-general": {"general"},
    "no-intermediate": {"intermediate"},
    "no-augmentation": {"augmentation"},
}
_AT_ONCE, _PIECE = 256, 512
_SHOWN, _LONGEST, _PIXELS = 12, 16, 8
T = TypeVar("T")


# The losses.


def attention_scores(queries: Tensor, keys: Tensor, heads: int, padding: Tensor) -> Tensor:
    r"""Attention scores before the softmax, :math:`Q K^\top / \sqrt{d_k}` and the mask (Eq. 1).

    Args:
        queries, keys: (B, L, heads d_k).
        heads: h.
        padding: bool (B, L), true where a token fills up; such keys are lowered by 10,000.

    Returns:
        (B, h, L, L), queries before keys.

    >>> attention_scores(torch.ones(1, 2, 4), torch.ones(1, 2, 4), 1, torch.tensor([[False, True]]))
    tensor([[[[ 2.0000e+00, -9.9980e+03],
              [ 2.0000e+00, -9.9980e+03]]]])
    """
    q, k = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (queries, keys))
    scores: Tensor = q @ k.mT / math.sqrt(q.shape[-1])
    return scores + MASKED * padding[:, None, None].to(q)


def attention_distance(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Distance of attention scores head by head (Eq. 7).

    .. math:: \frac{1}{h} \sum_i \mathrm{MSE}(A_i^S, A_i^T)

    As in the published code scores of -100 or less, which are padding's, become 0 in both, and
    count in the mean.

    Args:
        student: (B, h, L, L), before the softmax.
        teacher: of the same shape; no gradient flows into it.

    Returns:
        A scalar at least 0.

    Raises:
        UserError: the shapes differ.

    >>> student = torch.tensor([[[[1.0, -10001.0], [2.0, -9998.0]]]])
    >>> attention_distance(student, torch.tensor([[[[0.0, -10003.0], [4.0, -9999.0]]]]))
    tensor(1.2500)
    """
    _alike(student, teacher, "attention scores")
    ours, theirs = (x.masked_fill(x <= LOW, 0.0) for x in (student, teacher.detach().to(student)))
    return F.mse_loss(ours, theirs)


def hidden_distance(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Distance of hidden states (Eq. 8) or of embeddings (Eq. 9).

    .. math:: \mathrm{MSE}(H^S W, H^T)

    The mean is over all positions, padding's included, as in the published code.

    Args:
        student: (B, L, d'), lifted to the teacher's width.
        teacher: of the same shape; no gradient flows into it.

    >>> hidden_distance(torch.zeros(1, 2, 2), torch.tensor([[[1.0, 0.0], [0.0, 2.0]]]))
    tensor(1.2500)
    """
    _alike(student, teacher, "hidden states")
    return F.mse_loss(student, teacher.detach().to(student))


def prediction_distance(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    r"""Soft cross-entropy of logits (Eq. 10), the mean over samples *and* classes.

    .. math::
        -\frac{1}{B C} \sum_{b, c}
        \mathrm{softmax}(z^T / t)_{bc} \log \mathrm{softmax}(z^S / t)_{bc}

    The paper writes no mean over the classes; its published learning rates belong to the code's,
    which has it. There is no factor t^2.

    Args:
        student: (B, C).
        teacher: of the same shape; no gradient flows into it.
        temperature: t, above 0.

    >>> prediction_distance(torch.zeros(3, 2), torch.zeros(3, 2))
    tensor(0.3466)
    """
    _alike(student, teacher, "logits")
    if not 0 < temperature < math.inf:
        raise UserError(f"a temperature is a number above 0, not {temperature}")
    wanted = (teacher.detach().to(student) / temperature).softmax(-1)
    return -(wanted * (student / temperature).log_softmax(-1)).mean()


def _alike(student: Tensor, teacher: Tensor, what: str) -> None:
    if student.shape != teacher.shape:
        raise UserError(
            f"the student's {what} have the shape {tuple(student.shape)}, the teacher's "
            f"{tuple(teacher.shape)}; both must be equal"
        )


def uniform_layers(student: int, teacher: int) -> tuple[int, ...]:
    """g(m) = m N / M: the teacher's layer, from 1 on, for each layer m of the student.

    >>> uniform_layers(4, 12)
    (3, 6, 9, 12)

    Raises:
        UserError: N is no multiple of M.
    """
    if teacher % student:
        raise UserError(
            f"the teacher's {teacher} layers cannot be shared out evenly among the student's "
            f"{student}; say which layer each learns from, as in "
            f"layers={list(range(teacher - student + 1, teacher + 1))}"
        )
    return tuple(m * teacher // student for m in range(1, student + 1))


# More training texts.


class Augmentation(BaseModel):
    """How training texts are made more by other words in their places (Algorithm 1).

    ``copies`` is N_a, ``candidates`` K and ``probability`` p_t. Words of one piece are replaced by
    what a masked language model would put there, those of several by their neighbours among
    ``vectors``, a file in GloVe's text format of which the first ``words`` are read, if there is
    one. With ``paired`` the model sees the whole text behind the one with a gap. The language model
    is the teacher's own (``pretraining``) unless ``language_model`` names one of transformers.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    copies: int = Field(default=20, ge=0, le=1000)
    candidates: int = Field(default=15, ge=1, le=1000)
    probability: float = Field(default=0.4, ge=0, le=1)
    vectors: str | None = None
    words: int = Field(default=100_000, ge=1)
    paired: bool = True
    language_model: str | None = None


def replaceable(word: str) -> bool:
    """Whether a word may be replaced: letters alone, and no stop word.

    >>> [replaceable(word) for word in ("Film", "the", "3d", "!")]
    [True, False, False, False]
    """
    return word.isascii() and word.isalpha() and word.lower() not in ENGLISH_STOP_WORDS


def replaced(
    words: Sequence[str],
    candidates: Mapping[int, Sequence[str]],
    copies: int,
    probability: float,
    draw: random.Random,
) -> list[str]:
    """New texts from one (Algorithm 1): each place draws a candidate and takes it with p_t.

    Args:
        words: of the text.
        candidates: what may stand at each place that may change.
        copies: N_a, how often it is tried.
        probability: p_t.
        draw: decides.

    Returns:
        Those that are new, in order, without the text itself; at most N_a.

    >>> replaced(["a", "fine", "day"], {1: ["warm"]}, 3, 1.0, random.Random(0))
    ['a warm day']
    """
    seen, found = {tuple(words)}, []
    for _ in range(copies):
        other = list(words)
        for place, options in candidates.items():
            chosen = draw.choice(options)
            if draw.random() < probability:
                other[place] = chosen
        if tuple(other) not in seen:
            seen.add(tuple(other))
            found.append(" ".join(other))
    return found


class Neighbours:
    """Words near to one another by the cosine of their vectors.

    Args:
        path: lines of a word and its numbers.
        words: how many lines are read.

    Raises:
        UserError: the file cannot be read, or holds something else.
    """

    def __init__(self, path: Path, words: int) -> None:
        names, rows = [], []
        try:
            with path.open(encoding="utf-8") as file:
                for line, _ in zip(file, range(words), strict=False):
                    name, *numbers = line.rstrip().split(" ")
                    names.append(name)
                    rows.append(np.array(numbers, dtype=np.float32))
            self.matrix = F.normalize(torch.from_numpy(np.stack(rows)), dim=1)
        except OSError as error:
            reason = (error.strerror or "error").lower()
            raise UserError(f"the word vectors {path} cannot be read: {reason}") from None
        except ValueError:
            raise UserError(
                f"{path} holds no word vectors, which are lines of a word and as many numbers each"
            ) from None
        self.names = names
        self.places = {name: place for place, name in enumerate(names)}

    def of(self, word: str, number: int) -> list[str]:
        """The nearest words, itself excluded; none of a word that has no vector."""
        place = self.places.get(word)
        if place is None:
            return []
        near = (self.matrix @ self.matrix[place]).topk(min(number + 1, len(self.names))).indices
        return [self.names[i] for i in near.tolist() if i != place][:number]


class Augmenter:
    """Makes texts more: finds candidates for their words, and puts them in.

    Args:
        settings: how.
        input: the tokenizer of the language model.
        language: logits over tokens at places of a batch.
        neighbours: for words of several pieces, if there are vectors.
        seed: decides, together with a text's identity.
    """

    def __init__(
        self,
        settings: Augmentation,
        input: TextInput,
        language: nn.Module,
        neighbours: Neighbours | None,
        seed: int = 0,
    ) -> None:
        self.settings, self.input, self.language = settings, input, language
        self.neighbours, self.seed = neighbours, seed
        self.tokens = {number: token for token, number in input.tokens.items()}
        self.special = set(special_ids(input))

    def __call__(self, split: Texts, positions: Sequence[int]) -> list[list[tuple[str, ...]]]:
        """New samples from each of these; of a pair one side changes at a time."""
        sides = [(p, side) for p in positions for side in range(len(split.read(p)))]
        words = [self.input.words(split.read(p)[side]) for p, side in sides]
        found: dict[int, list[tuple[str, ...]]] = {p: [] for p in positions}
        settings = self.settings
        for (p, side), text, options in zip(sides, words, self.candidates(words), strict=True):
            draw = random.Random(derive(self.seed, int(split.rows[p]), side))
            new = replaced(text, options, settings.copies, settings.probability, draw)
            old = split.read(p)
            found[p] += [(*old[:side], other, *old[side + 1 :]) for other in new]
        return [found[p] for p in positions]

    def candidates(self, texts: Sequence[Sequence[str]]) -> list[dict[int, list[str]]]:
        """What may stand at each place of each text that may change; itself where nothing else."""
        found: list[dict[int, list[str]]] = [{} for _ in texts]
        gaps = []
        for number, words in enumerate(texts):
            for place, word in enumerate(words):
                if not replaceable(word):
                    continue
                found[number][place] = [word]
                if word in self.input.tokens:
                    gaps.append((number, place))
                elif self.neighbours is not None:
                    near = self.neighbours.of(word, self.settings.candidates)
                    found[number][place] = near or [word]
        for some in _slices(gaps, _AT_ONCE):
            for (number, place), options in zip(some, self._fillings(texts, some), strict=True):
                found[number][place] = options or [texts[number][place]]
        return found

    @torch.no_grad()
    def _fillings(
        self, texts: Sequence[Sequence[str]], gaps: Sequence[tuple[int, int]]
    ) -> Iterator[list[str]]:
        """What the language model would put into each gap, but for pieces within words."""
        view = []
        for number, place in gaps:
            words = texts[number]
            gap = " ".join([*words[:place], MASK, *words[place + 1 :]])
            view.append((gap, " ".join(words)) if self.settings.paired else (gap,))
        fed = self.input(view)
        where = fed["input_ids"] == self.input.tokens[MASK]
        best = self.language(fed, where).topk(self.settings.candidates).indices.tolist()
        # A gap that was cut off has nothing to fill.
        rows = iter(best)
        for there in where.any(1).tolist():
            options = next(rows) if there else []
            yield [
                self.tokens[i]
                for i in options
                if i not in self.special and not self.tokens[i].startswith("##")
            ]


def _slices(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


# The stages.


class Layers(Method):
    """The intermediate stage (Eq. 7 to 9): layers of the student like those of the teacher.

    Args:
        student, teacher: where their parts lie.
        layers: the teacher's layer, from 1 on, for each of the student's.
        maps: one linear map for embeddings and hidden states, as in the published code, or one for
            each, as in the paper.

    Raises:
        UserError: the heads differ in number, or the layers do not fit.
    """

    tasks = ("text",)
    label_weight = 0.0
    teacher_outputs = False

    def __init__(
        self,
        student: Encoder,
        teacher: Encoder,
        layers: tuple[int, ...],
        maps: Literal["shared", "separate"] = "shared",
    ) -> None:
        super().__init__()
        if student.heads != teacher.heads:
            raise UserError(
                f"attention is matched head by head, but the student has {student.heads} heads and "
                f"the teacher {teacher.heads}; choose models with as many of them"
            )
        count = len(teacher.hidden)
        if len(layers) != len(student.hidden) or not all(1 <= g <= count for g in layers):
            raise UserError(
                f"layers={list(layers)} must name one of the teacher's layers, 1 to {count}, for "
                f"each of the student's {len(student.hidden)}"
            )
        self.places = student, teacher
        self.layers, self.maps = layers, maps
        self.student_taps = (student.ids, student.embedding)
        self.student_taps += (*student.hidden, *student.queries, *student.keys)
        chosen = sorted({g - 1 for g in layers})
        parts = (teacher.hidden, teacher.queries, teacher.keys)
        chosen_paths = (paths[g] for paths in parts for g in chosen)
        self.teacher_taps = (teacher.ids, teacher.embedding, *chosen_paths)
        self.fit_dense = nn.ModuleList()

    def build(self, student: Answer, teacher: Answer, batch: Batch) -> None:
        """Make the maps from the student's width to the teacher's."""
        narrow, wide = (
            answer.features[where.embedding].shape[-1]
            for answer, where in zip((student, teacher), self.places, strict=True)
        )
        number = 1 if self.maps == "shared" else 2
        self.fit_dense.extend(nn.Linear(narrow, wide) for _ in range(number))

    def scores(self, answer: Answer, where: Encoder, layer: int) -> Tensor:
        """The attention scores of a layer, from 0 on, (B, h, L, L)."""
        seen = answer.features
        padding = seen[where.ids] == where.padding
        return attention_scores(
            seen[where.queries[layer]], seen[where.keys[layer]], where.heads, padding
        )

    def terms(self, student: Answer, teacher: Answer, batch: Batch) -> Terms:
        """Eq. 11 below its last layer, all weights 1."""
        ours, theirs = self.places
        s, t = student.features, teacher.features
        lift_embedding, lift = self.fit_dense[0], self.fit_dense[-1]
        hidden, attention = [], []
        for m, g in enumerate(self.layers):
            hidden.append(hidden_distance(lift(s[ours.hidden[m]]), t[theirs.hidden[g - 1]]))
            attention.append(
                attention_distance(
                    self.scores(student, ours, m), self.scores(teacher, theirs, g - 1)
                )
            )
        embedding = hidden_distance(lift_embedding(s[ours.embedding]), t[theirs.embedding])
        return {
            "embedding": embedding,
            "hidden": torch.stack(hidden).sum(),
            "attention": torch.stack(attention).sum(),
        }


class TinyBERT(Method):
    """General distillation, then intermediate and prediction stage of the task.

    In a loop of your own it is the prediction stage; :class:`Layers` is the other. Gold labels are
    not used. What the layers' maps have learned in general they bring to the task.

    Args:
        pretraining: how the teacher becomes a language model, on the raw text, before it learns the
            task; a teacher with weights of its own needs it for nothing but the augmentation.
        general: how the student learns from that language model on the raw text; left out if not
            given.
        intermediate: how it learns from the task's teacher layer by layer; left out if 0 epochs.
        prediction: how it learns the teacher's predictions; the student's training if not given.
        temperature: t of the prediction stage.
        text: a file of raw text, a passage a line; the training texts if not given.
        augmentation: how the training texts are made more; not at all if not given.
        layers: the teacher's layer, from 1 on, for each of the student's; N / M apart if not given.
        maps: see :class:`Layers`.
        rivals: further students that go without a part, with as many steps in what is left.
    """

    tasks = ("text",)
    label_weight = 0.0
    roles: Mapping[str, str] = {"student": "TinyBERT", **RIVALS}

    def __init__(
        self,
        pretraining: Training | None = None,
        general: Training | None = None,
        intermediate: Training = Training(  # noqa: B008  (frozen)
            epochs=20,
            batch_size=32,
            optimiser="adamw",
            lr=5e-5,
            weight_decay=0.01,
            decay="kernels",
            schedule="constant",
            clip_norm=1.0,
        ),
        prediction: Training | None = None,
        temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0,
        text: str | None = None,
        augmentation: Augmentation | None = None,
        layers: tuple[Annotated[int, Field(ge=1)], ...] | None = None,
        maps: Literal["shared", "separate"] = "shared",
        rivals: tuple[Rival, ...] = (),
    ) -> None:
        super().__init__()
        self.pretraining, self.general = pretraining, general
        self.intermediate, self.prediction = intermediate, prediction
        self.temperature = temperature
        self.text = text
        self.augmentation = augmentation
        self.layers = layers
        self.maps: Literal["shared", "separate"] = maps
        self.rivals = rivals
        self.made: list[tuple[str, str]] = []

    def terms(self, student: Answer, teacher: Answer, batch: Batch) -> Terms:
        """Eq. 10, the last layer's."""
        distance = prediction_distance(student["logits"], teacher["logits"], self.temperature)
        return {"prediction": distance}

    def rehearse(self, bench: Bench) -> None:
        self.check_task(bench.task)
        if len(bench.candidates) != 1:
            raise UserError(
                f"layers are matched with those of one teacher, not of {len(bench.candidates)}"
            )
        teacher = bench.candidates[0].network
        student = bench.laid_out(bench.make_student(bench.seeds[0]))
        layers = self._layers(student, teacher)
        super().rehearse(bench)
        frozen = bench.frozen([bench.laid_out(copy.deepcopy(teacher))], None)
        sample = bench.sample()
        Distiller(student, frozen, layers, bench.task, sample).to(bench.device)(sample)
        if self.text is not None:
            passages(Path(self.text))
        tokens = _input(teacher).tokens
        if (self.pretraining or self.augmentation) is not None and MASK not in tokens:
            raise UserError(
                f"pretraining and augmentation need the token {MASK}, which the tokenizer has not"
            )
        if self.augmentation is not None:
            self._neighbours()
            self._check_language(self.augmentation.language_model, max(tokens.values()) + 1)

    def _check_language(self, name: str | None, tokens: int) -> None:
        """See to it that there is a language model of the teacher's tokens for the augmentation."""
        if name is None and self.pretraining is None:
            raise UserError(
                "augmentation asks a masked language model for words: name one with "
                "augmentation.language_model, or say with pretraining how the teacher becomes one"
            )
        if name is not None:
            known = PublishedLanguageModel(name).tokens
            if known != tokens:
                raise UserError(
                    f"{name} knows {known:,} tokens and the teacher {tokens:,}; augmentation needs "
                    "a language model of the teacher's tokens"
                )

    def _layers(self, student: Network, teacher: Network) -> Layers:
        check_same_tokens(student.input, teacher.input, PURPOSE)
        ours, theirs = encoder(student.model), encoder(teacher.model)
        chosen = self.layers or uniform_layers(len(ours.hidden), len(theirs.hidden))
        return Layers(ours, theirs, chosen, self.maps)

    def _neighbours(self) -> Neighbours | None:
        settings = self.augmentation
        if settings is None or settings.vectors is None:
            return None
        return Neighbours(Path(settings.vectors), settings.words)

    def phases(self, bench: Bench) -> Phases:
        untuned, language = yield from self._learn_language(bench)
        yield from bench.teach()
        texts = yield from self._augment(bench, language)
        for seed in bench.seeds:
            yield from bench.plain(seed)
            yield from self._stages(bench, seed, bench.student(seed), untuned, texts)
            for way in dict.fromkeys(self.rivals):
                student = bench.laid_out(bench.make_student(seed))
                bench.deliver(way, seed, student)
                yield from self._stages(bench, seed, student, untuned, texts, way)

    def _learn_language(
        self, bench: Bench
    ) -> Generator[Phase, Any, tuple[Network, LanguageModel | None]]:
        """Make the teacher, or a copy of one that is ready, a masked language model."""
        candidate, language = bench.candidates[0], None
        network = bench.laid_out(candidate.network)
        if candidate.training is None:
            network = copy.deepcopy(network).requires_grad_(True)
        if self.pretraining is not None:
            with torch.random.fork_rng():
                torch.manual_seed(bench.seeds[0])
                language = LanguageModel(network).to(bench.device)
            yield self._language_fit(bench, language, self.pretraining)
            # The teacher goes on from here.
            language = copy.deepcopy(language).requires_grad_(False).eval()
        return copy.deepcopy(network), language

    def _language_fit(self, bench: Bench, language: LanguageModel, settings: Training) -> Fit:
        """Devlin et al. 2019, section 3.1, without the next sentence."""
        input = _input(language.network)
        special, mask = special_ids(input), input.tokens[MASK]

        def terms(batch: Batch) -> Terms:
            fed = input(batch["text"])
            ids = fed["input_ids"]
            fed["input_ids"], chosen = masked(ids, special, mask, len(input.tokens))
            if not chosen.any():
                chosen[:, 1] = True  # a batch of next to no words
            wanted = ids[chosen].to(bench.device)
            return {"masked words": F.cross_entropy(language(fed, chosen), wanted)}

        seed = bench.seeds[0]
        return Fit(
            name="language",
            seed=seed,
            updates=[
                Update(
                    name="language", train={"language": language}, terms=terms, settings=settings
                )
            ],
            batches=bench.task.batches(
                self._raw(bench), batch_size=settings.batch_size, seed=seed, train=True
            ),
            epochs=settings.epochs,
        )

    def _raw(self, bench: Bench) -> Texts:
        """The raw text, a passage a sample."""
        if self.text is not None:
            found = passages(Path(self.text))
        else:
            split = bench.train
            found = tuple(text for place in range(len(split)) for text in split.read(place))
        return Texts("raw", tuple((text,) for text in found), None)

    def _augment(
        self, bench: Bench, language: LanguageModel | None
    ) -> Generator[Phase, Any, Texts]:
        """Make the training texts more, once for all students."""
        settings = self.augmentation
        split: Texts = bench.transfer
        if settings is None:
            return split
        model: nn.Module | None = language
        if settings.language_model is not None:
            model = PublishedLanguageModel(settings.language_model).to(bench.device).eval()
        assert model is not None, "the rehearsal has seen to it"
        input = _input(bench.candidates[0].network)
        augmenter = Augmenter(settings, input, model, self._neighbours(), bench.seeds[0])

        def run(journal: Journal) -> list[list[list[str]]]:
            found: list[list[list[str]]] = []
            for number, some in enumerate(_slices(range(len(split)), _PIECE)):

                def work(some: Sequence[int] = some) -> list[list[list[str]]]:
                    return [[list(texts) for texts in new] for new in augmenter(split, some)]

                found += journal.remember(f"texts-{number}", work)
            return found

        new = yield Solve(name="augmentation", seed=bench.seeds[0], run=run)
        samples: list[tuple[str, ...]] = []
        source: list[int] = []
        for place, others in enumerate(new):
            samples += [split.read(place), *map(tuple, others)]
            source += [place] * (1 + len(others))
            if others and len(self.made) < _SHOWN:
                self.made.append((" ∥ ".join(split.read(place)), " ∥ ".join(others[0])))
        bench.voice.say(f"{len(split):,} training texts have become {len(samples):,}")
        labels = None if split.labels is None else split.labels[source]
        return Texts("augmented", tuple(samples), labels)

    def _stages(
        self,
        bench: Bench,
        seed: int,
        student: Network,
        untuned: Network,
        texts: Texts,
        way: str = "",
    ) -> Phases:
        """All stages of one student, but for what its way leaves out."""
        teacher, task, sample = bench.teacher, bench.task, bench.sample()
        assert teacher is not None, "it was taught before"
        prefix, without = (f"{way}-", _LEFT_OUT[way]) if way else ("", set())
        split, factor = texts, 1.0
        if "augmentation" in without:
            split, factor = bench.transfer, len(texts) / len(bench.transfer)
        layers = self._layers(student, teacher.networks[0])
        stages = [
            ("general", untuned, self.general, self._raw(bench), 1.0),
            ("intermediate", teacher, self.intermediate, split, factor),
        ]
        for name, taught_by, settings, read, stretch in stages:
            if settings is None or not settings.epochs or name in without:
                continue
            if isinstance(taught_by, Network):
                taught_by = bench.frozen([copy.deepcopy(taught_by)], None)
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                # The maps that one stage has trained serve in the next.
                probe = None if len(layers.fit_dense) else sample
                distiller = Distiller(student, taught_by, layers, task, probe).to(bench.device)
            label = bench.label(prefix + name, seed)
            yield self._fit(bench, label, seed, distiller, settings.stretched(stretch), read)
            distiller.release()
        distiller = bench.distiller(student, self, seed)
        settings = (self.prediction or bench.training).stretched(factor)
        last = self._fit(
            bench, bench.label(way or "student", seed), seed, distiller, settings, split
        )
        yield replace(last, evaluate=bench.watch(student), select=bench.select)

    def _fit(
        self,
        bench: Bench,
        name: str,
        seed: int,
        distiller: Distiller,
        settings: Training,
        split: Texts,
    ) -> Fit:
        """One stage of a student."""
        train = {"student": distiller.student, "method": distiller.method}
        batches = bench.task.batches(split, batch_size=settings.batch_size, seed=seed, train=True)
        return Fit(
            name=name,
            seed=seed,
            updates=[Update(train=train, terms=distiller, settings=settings)],
            batches=batches,
            epochs=settings.epochs,
        )

    def findings(self, bench: Bench, metrics: Sequence[Mapping[str, Any]]) -> list[Finding]:
        """Where student and teacher look in a test text, and what the augmentation made."""
        found = self._looks(bench)
        if self.made:
            table = [["training text", "one made from it"], *map(list, self.made)]
            caption = "Texts that the student learned from besides; what the teacher says of them."
            found.append(Finding("Augmented texts", caption, table))
        return found

    @torch.no_grad()
    def _looks(self, bench: Bench) -> list[Finding]:
        """Attention of the first seed's networks in the first test text that is short."""
        delivered = bench.delivered(bench.seeds[0])
        teacher = delivered["teacher"]
        assert isinstance(teacher, Teacher)
        networks = {"teacher": teacher.networks[0]} | {
            role: network
            for role, network in delivered.items()
            if role in ("student", "baseline") and isinstance(network, Network)
        }
        input = _input(networks["teacher"])
        every = (bench.test.read(place) for place in range(len(bench.test)))
        text = next((t for t in every if 6 <= len(input.pieces(t)) <= _LONGEST), None)
        if text is None:
            return []
        layers = self._layers(networks["student"], networks["teacher"])
        pictures = {}
        for m, g in enumerate(layers.layers):
            for role, network in networks.items():
                try:
                    where = encoder(network.model)
                    layer = g - 1 if role == "teacher" else m
                    paths = (where.ids, where.queries[layer], where.keys[layer])
                except (IndexError, UserError):  # a rival of another make
                    continue
                with Taps(network.model, paths) as taps:
                    answer = bench.task.run(network.eval(), {"text": [text]}, taps)
                looks = layers.scores(answer, where, layer).softmax(-1).mean(1)[0].cpu()
                name = self.roles.get(role, "plain student" if role == "baseline" else role)
                pictures[f"{name}, layer {layer + 1}"] = _grey(looks)
        caption = (
            "How much each token (row) looks at each other (column), mean over the heads; black is "
            f"most. The tokens are {' '.join(input.pieces(text))}"
        )
        return [Finding("Attention", caption, pictures=pictures)]


def _grey(shares: Tensor) -> Tensor:
    """Shares (L, L) as an image, black where they are largest."""
    shade = 255 * (1 - shares / shares.max())
    return shade.round().to(torch.uint8).repeat_interleave(_PIXELS, 0).repeat_interleave(_PIXELS, 1)


def _input(network: Network) -> TextInput:
    assert isinstance(network.input, TextInput), "the rehearsal has seen to it"
    return network.input
