"""Step `divergence`: prefers answers whose sentences are the teacher's own, not the student's."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import tee
from typing import Annotated, Literal

from pydantic import Field

from limbeck.core.errors import RecipeError
from limbeck.core.random import stream_seed
from limbeck.core.registry import register
from limbeck.synth.grouped import grouped
from limbeck.synth.rows import Row
from limbeck.synth.scoring import Token, read_tokens, written_tokens
from limbeck.synth.sentences import Sentence, sentences
from limbeck.synth.step import Desk

Unit = Literal["token", "character"]
Whose = Literal["teacher", "student", "shared"]
Share = Annotated[float, Field(ge=0, le=1)]


@register("step", "divergence")
@dataclass(frozen=True, kw_only=True)
class Divergence:
    """Keeps the answers that have most of what only the teacher would say.

    A sentence's score is its log-probability under a model divided by its length. Where the
    teacher's is higher than the student's by `threshold`, it is a teacher's sentence; where lower
    by as much, a student's; otherwise both share it. An answer's share is that of its characters
    that stand in teacher's sentences.

    Attributes:
        teacher: name of the teacher.
        student: name of the model before distillation.
        scores: `read` lets the teacher read each answer; `written` takes the log-probabilities that
            it wrote the answer with, which `answers` keeps where `scores` is set there.
        unit: a length is counted in each model's own `token`s, or in `character`s, which do not
            depend on how a tokenizer cuts the text: better where the tokenizers differ.
        threshold: nats for each token or character.
        best: keep so many answers of each prompt, those with the largest shares; equal ones by lot.
        keep: keep this part of all answers instead. All rows are then held in memory.
        min_share: an answer with a smaller share is left out.

    Source: divergence-aware sampling of Yan et al., "DASD" (arXiv 2601.09088); threshold, number of
        candidates and selection are not given there.
    """

    teacher: Annotated[str, Field(min_length=1)]
    student: Annotated[str, Field(min_length=1)] = "student"
    scores: Literal["read", "written"] = "read"
    unit: Unit = "character"
    threshold: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.05
    best: Annotated[int, Field(gt=0)] | None = None
    keep: Annotated[float, Field(gt=0, le=1)] | None = None
    min_share: Share = 0.0

    def __post_init__(self) -> None:
        if self.best is not None and self.keep is not None:
            raise RecipeError("keep", "is of all rows and `best` is of each prompt's; give one")

    @property
    def reads(self) -> Sequence[str]:
        """Who reads the rows."""
        return (self.student,) if self.scores == "written" else (self.teacher, self.student)

    def run(self, rows: Iterable[Row], desk: Desk) -> Iterator[Row]:
        """Rows with what was found of their sentences; those that are not kept have failed."""
        found = (_counted(row, desk.counts) for row in self._compared(rows, desk))
        if self.keep is not None:
            every = list(found)
            good = sum(row.failure is None for row in every)
            count = math.ceil(self.keep * good - 1e-9)  # 0.55 * 100 is a bit above 55
            yield from self._chosen(every, count, desk.seed)
        elif self.best is not None:
            for group in grouped(found):
                yield from self._chosen(group, self.best, desk.seed)
        else:
            yield from found

    def _compared(self, rows: Iterable[Row], desk: Desk) -> Iterator[Row]:
        """Each row with the kinds of its sentences."""
        first, second = tee(rows)
        student = read_tokens(first, desk.reader(self.student))
        if self.scores == "read":
            teacher = read_tokens(second, desk.reader(self.teacher))
        else:
            teacher = ((row, written_tokens(row)) for row in second)
        for (row, theirs), (_, own) in zip(teacher, student, strict=True):
            wrong = next((reason for reason in (theirs, own) if isinstance(reason, str)), None)
            if wrong is not None or isinstance(theirs, str) or isinstance(own, str):
                yield row.failed(wrong or "")
                continue
            kinds = kinds_of(row.text, theirs, own, unit=self.unit, threshold=self.threshold)
            row = _noted(row, kinds)
            share = row.notes["teacher_share"]
            if share < self.min_share:
                row = row.failed(f"only {share:.2f} of it is the teacher's own")
            yield row

    def _chosen(self, rows: Sequence[Row], count: int, seed: int) -> Iterator[Row]:
        """The same rows, of which all but `count` have failed."""

        def order(row: Row) -> tuple[float, int]:
            return -row.notes["teacher_share"], stream_seed(seed, f"divergence/{row.id}")

        good = sorted((row for row in rows if row.failure is None), key=order)
        kept = {row.id for row in good[:count]}
        for row in rows:
            if row.failure is None and row.id not in kept:
                row = row.failed("other answers have more of the teacher's own sentences")
            yield row


def kinds_of(
    text: str, teacher: Sequence[Token], student: Sequence[Token], *, unit: Unit, threshold: float
) -> list[tuple[Sentence, Whose]]:
    """Whose each sentence of a text is.

    score(m, s) = sum of log p_m(token) over the tokens of s / their number, or the characters of s

    A token is of the sentence in which its last byte lies. A sentence without a token of its own
    under one of the models is shared.

    Args:
        text: of an answer.
        teacher, student: its tokens under both models.
        unit: what a sentence's length is counted in.
        threshold: how far the scores must lie apart, nats for each unit.
    """
    found = sentences(text)
    high, low = (sentence_scores(found, tokens, unit) for tokens in (teacher, student))
    kinds: list[tuple[Sentence, Whose]] = []
    for sentence, theirs, own in zip(found, high, low, strict=True):
        kind: Whose = "shared"
        if theirs is not None and own is not None:
            if theirs - own >= threshold:
                kind = "teacher"
            elif theirs - own <= -threshold:
                kind = "student"
        kinds.append((sentence, kind))
    return kinds


def sentence_scores(
    found: Sequence[Sentence], tokens: Sequence[Token], unit: Unit
) -> list[float | None]:
    """The score of each sentence under one model; None where it has no token."""
    sums, counts = [0.0] * len(found), [0] * len(found)
    at = 0
    for token in tokens:
        if token.end <= token.start:
            continue  # the end of the text is in no sentence
        while at < len(found) - 1 and token.end > found[at].end:
            at += 1
        sums[at] += token.logp
        counts[at] += 1
    lengths = counts if unit == "token" else [len(sentence.text) for sentence in found]
    return [
        total / length if count else None
        for total, count, length in zip(sums, counts, lengths, strict=True)
    ]


def _noted(row: Row, kinds: Sequence[tuple[Sentence, Whose]]) -> Row:
    counts = Counter(kind for _, kind in kinds)
    own = sum(len(sentence.text) for sentence, kind in kinds if kind == "teacher")
    return row.noted(
        teacher_sentences=counts["teacher"],
        student_sentences=counts["student"],
        shared_sentences=counts["shared"],
        teacher_share=own / max(1, len(row.text)),
    )


def _counted(row: Row, counts: Counter[str]) -> Row:
    for kind in ("teacher", "student", "shared"):
        counts[f"{kind} sentences"] += row.notes.get(f"{kind}_sentences", 0)
    return row
