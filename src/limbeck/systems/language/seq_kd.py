"""Sequence-Level Knowledge Distillation. Kim, Rush, EMNLP 2016 (arXiv 1606.07947).

A network that translates says word after word, so a teacher may be followed in two ways. Word by
word: the student matches the teacher's distribution over the next word, behind the same words of
the reference. Sentence by sentence: the teacher's distribution over all sentences is replaced by
its mode, which beam search finds, so the student is trained on what the teacher makes of the
training sentences. That is more regular than what people write: a small student fits it, becomes
sure of it, and hardly needs a beam any more. In between, the student goes on with that hypothesis
of a wide beam which is most like the reference. What is left may be pruned.

Needs: the task ``translation``; for the word level one vocabulary for teacher and student.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from limbeck.data.parallel import Pairs
from limbeck.errors import UserError
from limbeck.extras import need
from limbeck.models.sentences import PAD
from limbeck.report.table import ROLES
from limbeck.report.verdict import said
from limbeck.tasks.translation import Hypothesis, Translation
from limbeck.training.bench import Bench
from limbeck.training.finding import Finding
from limbeck.training.method import Method, Phases
from limbeck.training.network import Network
from limbeck.training.phases import Fit, Journal, Solve, Training
from limbeck.training.task import Answer, Batch, Terms

ORDERS = 4  # n-grams of one to four words
PIECE = 2048  # sentences that are translated before the work is put down


def word_kd(student_logits: Tensor, teacher_logits: Tensor, there: Tensor | None = None) -> Tensor:
    r"""Word-level distillation (Eq. 2), mean over the tokens.

    .. math:: -\sum_k q(t_j = k \mid s, t_{<j}) \log p(t_j = k \mid s, t_{<j})

    Args:
        student_logits: (..., V), of p.
        teacher_logits: (..., V), of q behind the same words; no gradient flows into them.
        there: (...), true where there is a token and no filling; everywhere if not given.

    Returns:
        A scalar in nats; the mean entropy of q where p = q.

    Raises:
        UserError: logits of different shapes, or no token.

    >>> p, q = torch.tensor([[0.2, 0.5, 0.3]]), torch.tensor([[0.6, 0.3, 0.1]])
    >>> round(float(word_kd(p.log(), q.log())), 6)
    1.294004
    """
    if student_logits.shape != teacher_logits.shape:
        raise UserError(
            f"the student's logits have the shape {tuple(student_logits.shape)}, the teacher's "
            f"{tuple(teacher_logits.shape)}; both must speak of the same words"
        )
    if there is None:
        there = torch.ones(student_logits.shape[:-1], dtype=torch.bool)
    if not there.any():
        raise UserError("there is no token to compare on: everything is filling")
    ours, theirs = student_logits[there], teacher_logits.detach()[there]
    wide = torch.promote_types(ours.dtype, torch.float32)
    return F.cross_entropy(ours.to(wide), theirs.to(wide).softmax(-1))


def sentence_bleu(candidate: Sequence[str], reference: Sequence[str]) -> float:
    """How alike two sentences are, 0..1: BLEU with n-grams up to four, smoothed (section 3.3).

    An order without a match counts 1/2 match, the next such 1/4 and so on; an order that the
    candidate is too short for is skipped. It ranks hypotheses for one reference and is no measure:
    short sentences without any match score high.

    >>> round(sentence_bleu("a b c".split(), "a b d".split()), 6)
    0.638943
    """
    if not candidate:
        return 0.0
    product, smooth = 1.0, 1.0
    for order in range(1, ORDERS + 1):
        ours, theirs = _grams(candidate, order), _grams(reference, order)
        if not ours:
            continue
        matches: float = (ours & theirs).total()
        if not matches:
            smooth /= 2
            matches = smooth
        product *= matches / ours.total()
    brevity = math.exp(1 - max(1.0, len(reference) / len(candidate)))
    return float(product ** (1 / ORDERS) * brevity)


def gleu(candidate: Sequence[str], reference: Sequence[str]) -> float:
    """How alike two sentences are, 0..1: the share of different n-grams that both have.

    Of the candidate's or of the reference's, whichever is less.

    >>> gleu("a b c".split(), "a b d".split())
    0.5
    """
    ours, theirs = (
        {gram for order in range(1, ORDERS + 1) for gram in _grams(words, order)}
        for words in (candidate, reference)
    )
    return len(ours & theirs) / max(len(ours), len(theirs), 1)


def _grams(words: Sequence[str], order: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[n : n + order]) for n in range(len(words) - order + 1))


SIMILARITIES: dict[str, Callable[[Sequence[str], Sequence[str]], float]] = {
    "bleu": sentence_bleu,
    "gleu": gleu,
}


def best_of(hypotheses: Sequence[Hypothesis]) -> str | None:
    """The most probable sentence of a beam (Eq. 3); ``None`` where none was finished.

    Hypotheses that were cut off and empty ones do not count.
    """
    return next((h.text for h in hypotheses if h.finished and h.text), None)


def closest_to(
    reference: str,
    hypotheses: Sequence[Hypothesis],
    similarity: Callable[[Sequence[str], Sequence[str]], float] = sentence_bleu,
) -> str | None:
    """The sentence of a beam that is most like the reference (Eq. 4), the more probable of equals.

    >>> beam = [Hypothesis("a cat", -1.0, True), Hypothesis("the dog", -2.0, True)]
    >>> closest_to("the dog", beam)
    'the dog'
    """
    there = [h.text for h in hypotheses if h.finished and h.text]
    if not there:
        return None
    words = need("sacrebleu.tokenizers.tokenizer_13a").Tokenizer13a()
    gold = words(reference).split()
    return max(there, key=lambda text: similarity(words(text).split(), gold))


def magnitude_masks(
    weights: Mapping[str, Tensor], fraction: float, scope: Literal["all", "layer"] = "all"
) -> dict[str, Tensor]:
    """Which weights stay when a fraction of the smallest in magnitude goes (section 5).

    Args:
        weights: tensors by name.
        fraction: that goes, in [0, 1).
        scope: ``all`` takes the smallest of all together (class-blind), ``layer`` so many of each
            tensor (class-uniform).

    Returns:
        Masks by name, true where a weight stays.

    >>> magnitude_masks({"w": torch.tensor([0.1, -0.5, 0.2, -0.05])}, 0.5)["w"]
    tensor([False,  True,  True, False])
    """
    if not 0 <= fraction < 1:
        raise UserError(f"the fraction that is pruned lies in [0, 1), not at {fraction}")
    if scope == "layer":
        return {n: magnitude_masks({n: w}, fraction)[n] for n, w in weights.items()}
    every = torch.cat([w.detach().abs().flatten() for w in weights.values()])
    stays = torch.ones_like(every, dtype=torch.bool)
    stays[every.argsort(stable=True)[: round(fraction * len(every))]] = False
    parts = stays.split([w.numel() for w in weights.values()])
    return {n: part.view_as(w) for (n, w), part in zip(weights.items(), parts, strict=True)}


def matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """What is pruned of a model: its weight matrices, embeddings among them, and no bias."""
    return {name: p for name, p in model.named_parameters() if p.ndim > 1}


class SeqKD(Method):
    """Distillation by the teacher's sentences, by its words, or both.

    The student is trained on the teacher's translations of the training sentences and then, with a
    small rate, on those that are most like the references. The student between the two is
    delivered as ``seq-kd``, a pruned one as ``pruned``.

    Args:
        sequence: train on the teacher's sentences (Seq-KD); else on the references.
        word: alpha, the share of the word-level term in the loss, 0..1; the labels have the rest.
        beam: K of the search for the teacher's sentences.
        inter: epochs on the sentences that are most like the references (Seq-Inter); 0 for none.
        inter_rate: their learning rate as a share of the student's; it stays as it is.
        best: K of the search that these come from.
        similarity: what likeness is, smoothed ``bleu`` or ``gleu``.
        prune: share of the student's weights that goes in the end, 0 for none.
        scope: whether the smallest go of ``all`` weights or of each ``layer``.
        retrain: epochs on the last sentences with what is left, at ``inter_rate``.
        rival: alpha of a student beside, trained on the references with the word-level term
            (Word-KD) and delivered as ``word-kd``; 0 for none.
    """

    tasks = ("translation",)
    roles = {  # noqa: RUF012
        "student": "Seq-KD + Seq-Inter",
        "seq-kd": "Seq-KD",
        "word-kd": "Word-KD",
        "pruned": "pruned student",
    }

    def __init__(
        self,
        sequence: bool = True,
        word: Annotated[float, Field(ge=0, le=1)] = 0.0,
        beam: Annotated[int, Field(ge=1, le=1000)] = 5,
        inter: Annotated[int, Field(ge=0)] = 1,
        inter_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.1,
        best: Annotated[int, Field(ge=1, le=1000)] = 35,
        similarity: Literal["bleu", "gleu"] = "bleu",
        prune: Annotated[float, Field(ge=0, lt=1)] = 0.0,
        scope: Literal["all", "layer"] = "all",
        retrain: Annotated[int, Field(ge=0)] = 1,
        rival: Annotated[float, Field(ge=0, le=1)] = 0.0,
    ) -> None:
        super().__init__()
        self.sequence, self.word, self.rival = sequence, word, rival
        self.beam, self.best, self.similarity = beam, best, similarity
        self.inter, self.inter_rate = inter, inter_rate
        self.prune, self.scope, self.retrain = prune, scope, retrain
        self.label_weight = 1 - word
        before = ["Seq-KD"] * sequence + ["Word-KD"] * bool(word)
        after = before + ["Seq-Inter"] * bool(inter)
        self.roles = {
            **type(self).roles,
            "student": " + ".join(after) or "student",
            "seq-kd": " + ".join(before) or "before Seq-Inter",
        }

    def terms(self, student: Answer, teacher: Answer, batch: Batch) -> Terms:
        """The word-level term; beside it stand the labels with 1 - alpha."""
        if not self.word:
            return {}
        there = batch["label"] != PAD
        return {"words": self.word * word_kd(student["logits"], teacher["logits"], there)}

    def rehearse(self, bench: Bench) -> None:
        task = _translation(bench)
        if len(bench.candidates) != 1:
            raise UserError(
                f"one teacher is needed, which searches for sentences, and not "
                f"{len(bench.candidates)}; name it with --teacher"
            )
        if self.word or self.rival:
            super().rehearse(bench)
        student = bench.make_student(bench.seeds[0])
        for network in (bench.candidates[0].network, student):
            task.translate(bench.laid_out(network), bench.transfer.source[:2], beam=2)
        sample = bench.sample()
        task.loss(task.run(student, sample), sample)

    def phases(self, bench: Bench) -> Phases:
        yield from bench.teach()
        gold = bench.transfer
        first = last = gold
        if self.sequence:
            sentences = yield self._search(bench, "rewrite", self.beam, _most_probable)
            first = last = gold.rewritten(sentences)
        if self.inter:
            sentences = yield self._search(bench, "choose", self.best, self._closest)
            last = gold.rewritten(sentences)
        for seed in bench.seeds:
            yield from bench.plain(seed)
            yield from self._seed(bench, seed, first, last)

    def _seed(self, bench: Bench, seed: int, first: Pairs, last: Pairs) -> Phases:
        """The students of a seed, on the sentences they are trained on first and last."""
        training, gently = bench.training, self._gently(bench.training, self.inter)
        if self.rival:
            word = bench.laid_out(bench.make_student(seed))
            yield self._fit(bench, "word-kd", seed, word, bench.transfer, training, self.rival)
            bench.deliver("word-kd", seed, word)
        student = bench.student(seed)
        yield self._fit(bench, "student", seed, student, first, training, self.word)
        if self.inter:
            bench.deliver("seq-kd", seed, copy.deepcopy(student))
            yield self._fit(bench, "inter", seed, student, last, gently, self.word)
        if self.prune:
            pruned = copy.deepcopy(student)
            yield Solve(
                name=bench.label("prune", seed),
                seed=seed,
                run=lambda _: self._cut(pruned),
                writes={"pruned": pruned},
            )
            kept = [keep_zeros(p) for p in matrices(pruned.model).values()]
            again = self._gently(training, self.retrain)
            yield self._fit(bench, "pruned", seed, pruned, last, again, self.word)
            for handle in kept:
                handle.remove()
            bench.deliver("pruned", seed, pruned)

    def _gently(self, training: Training, epochs: int) -> Training:
        rate = self.inter_rate * training.lr
        return training.model_copy(
            update={"epochs": epochs, "lr": rate, "schedule": "constant", "warmup": 0.0}
        )

    def _fit(
        self,
        bench: Bench,
        role: str,
        seed: int,
        network: Network,
        pairs: Pairs,
        training: Training,
        alpha: float,
    ) -> Fit:
        """Training on these sentences, with a share of the word-level term if there is one."""
        name = bench.label(role, seed)
        fit = bench.fit(name, network, training, seed=seed, split=pairs)
        if not alpha:
            return fit
        distiller = bench.distiller(network, SeqKD(word=alpha), seed)
        return replace(fit, updates=[replace(fit.updates[0], terms=distiller)])

    def _search(
        self,
        bench: Bench,
        name: str,
        beam: int,
        choose: Callable[[str, Sequence[Hypothesis]], str | None],
    ) -> Solve:
        """The teacher's sentence for each training pair; the reference where it finds none."""
        task, pairs, teacher = _translation(bench), bench.transfer, bench.teacher
        assert teacher is not None, "it has been taught"

        def piece(begin: int) -> list[str | None]:
            part = slice(begin, begin + PIECE)
            found = task.translate(teacher, pairs.source[part], beam, best=beam)
            return [choose(*pair) for pair in zip(pairs.target[part], found, strict=True)]

        def run(journal: Journal) -> list[str]:
            chosen: list[str | None] = []
            for begin in range(0, len(pairs), PIECE):
                chosen += journal.remember(f"from-{begin}", partial(piece, begin))
            missing = sum(text is None for text in chosen)
            bench.voice.say(
                f"{name}: {len(pairs) - missing:,} sentences of the teacher by a beam of {beam}"
                + (f", {missing:,} references where it found no end" if missing else "")
            )
            return [text or gold for text, gold in zip(chosen, pairs.target, strict=True)]

        return Solve(name=name, run=run)

    def _closest(self, reference: str, hypotheses: Sequence[Hypothesis]) -> str | None:
        return closest_to(reference, hypotheses, SIMILARITIES[self.similarity])

    def _cut(self, network: Network) -> dict[str, int]:
        """Set the smallest weights to zero; how many stay, biases among them."""
        weights = matrices(network.model)
        masks = magnitude_masks(weights, self.prune, self.scope)
        with torch.no_grad():
            for name, mask in masks.items():
                weights[name].mul_(mask)
        return {"parameters": nonzero(network)}

    def findings(self, bench: Bench, metrics: Sequence[Mapping[str, Any]]) -> list[Finding]:
        """Greedy and beam search side by side over the seeds, as in the paper's Table 1 and 2."""
        task = _translation(bench)
        roles = bench.delivered(bench.seeds[0])
        beam = f"BLEU, beam {task.beam}"
        rows = [["", "BLEU, greedy", beam, "gain of the beam", "mode mass", "nonzero weights"]]
        for role, network in roles.items():
            if role == "teacher":
                every = [task.searched(network, bench.test)]
            else:
                every = [task.searched(bench.delivered(s)[role], bench.test) for s in bench.seeds]
            single = network if isinstance(network, Network) else network.networks[0]
            rows.append(
                [
                    {**ROLES, **self.roles}[role],
                    said([found["BLEU"] for found in every]),
                    said([found[beam] for found in every]),
                    said([found[beam] - found["BLEU"] for found in every]),
                    said([found["mode mass"] for found in every], percent=True),
                    f"{nonzero(single):,}",
                ]
            )
        caption = (
            "On the test data. Mode mass: the probability that a network gives to the best "
            "sentence that beam search finds, mean over sentences; a network that is sure of one "
            "translation gains little by searching for it"
        )
        caption += "; ± is half the 95 % interval over the seeds." if len(bench.seeds) > 1 else "."
        return [Finding("How sure the networks are", caption, rows)]


def keep_zeros(weight: nn.Parameter) -> RemovableHandle:
    """Have the zeros of a weight stay zero in training: no gradient reaches them.

    For optimisers that begin afresh, as a new phase's do; weight decay leaves a zero as it is.
    """
    stays = weight.detach() != 0
    return weight.register_hook(lambda gradient: gradient * stays)  # type: ignore[no-any-return]


def nonzero(network: Network) -> int:
    """How many of a network's parameters are not zero."""
    return sum(int(p.count_nonzero()) for p in network.parameters())


def _most_probable(reference: str, hypotheses: Sequence[Hypothesis]) -> str | None:
    return best_of(hypotheses)


def _translation(bench: Bench) -> Translation:
    if not isinstance(bench.task, Translation):
        raise UserError(f"SeqKD works on translation, not on {bench.task.name}")
    return bench.task
