"""Step `mixed`: the teacher goes on from where the student got lost."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from pydantic import Field

from limbeck.core.exchange import Question, Reply
from limbeck.core.random import stream
from limbeck.core.registry import register
from limbeck.core.types import Sampling, Turn
from limbeck.synth.grouped import asked, grouped
from limbeck.synth.rows import NO_PROMPT, Row
from limbeck.synth.step import Desk
from limbeck.synth.words import UNSPACED

ENDED = "the student ended its answer"
"""Why there is no new row where none is needed."""

Positive = Annotated[int, Field(gt=0)]
Temperature = Annotated[float, Field(ge=0, allow_inf_nan=False)]

_PLACE = re.compile(rf"(?<=\S)(?=\s|{UNSPACED})")


@register("step", "mixed")
@dataclass(frozen=True, kw_only=True)
class Mixed:
    """Adds to each prompt's answers one that the student begins and the teacher ends.

    The student answers the prompt. Where it has not come to an end within `max_ratio` times the
    length of the prompt's first known answer (in characters), what it wrote is cut at a random
    place between words, and the teacher continues it. Such rows show the student a way out of where
    it gets by itself.

    Attributes:
        teacher: name of the teacher that continues; it must be able to go on from a given prefix.
        student: name of the model that begins: the student as it is now.
        max_ratio: longest answer of the student, in lengths of the known one.
        cut: which answers are continued: those that are `truncated`, or `all` of them.
        beyond: share of the student's text that stays at least; the place of the cut is drawn
            evenly from the rest.
        learn: `all` trains on the whole answer; `teacher` moves the student's part to the prompt,
            so that only the teacher's is learnt (plain text only).
        keep: also give on the rows that came, beside the new ones.
        max_tokens: of the teacher's continuation, and of the student's answer.
        temperature, student_temperature: of both.
        seed: of the draws of both.

    Source: mixed-policy distillation of Yan et al., "DASD" (arXiv 2601.09088). A figure of theirs
        is worse where the student's part is not learnt.
    """

    teacher: Annotated[str, Field(min_length=1)]
    student: Annotated[str, Field(min_length=1)] = "student"
    max_ratio: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.5
    cut: Literal["truncated", "all"] = "truncated"
    beyond: Annotated[float, Field(ge=0, lt=1)] = 0.5
    learn: Literal["all", "teacher"] = "all"
    keep: bool = True
    max_tokens: Positive = 512
    temperature: Temperature = 1.0
    student_temperature: Temperature = 1.0
    seed: Annotated[int, Field(ge=0)] = 0

    @property
    def asks(self) -> Sequence[str]:
        """Who writes."""
        return (self.student, self.teacher)

    def run(self, rows: Iterable[Row], desk: Desk) -> Iterator[Row]:
        """The rows that came, each group with its new row behind it."""
        begun = self._begun(grouped(rows), desk)
        sampling = Sampling(
            max_tokens=self.max_tokens, temperature=self.temperature, seed=self.seed
        )
        questions = (((group, new), _question(new)) for group, new in begun)
        writer = desk.writer(self.teacher)
        for (group, new), replies in asked(questions, writer, sampling, thoughts=True):
            kept = (
                row if self.keep else row.failed("mixed answers alone are kept") for row in group
            )
            yield from kept
            if replies is not None:
                new = self._ended(new, replies[0])
            if new.failure is None:
                desk.counts["mixed answers"] += 1
            if new.failure != ENDED or not self.keep:
                yield new

    def _begun(self, groups: Iterable[list[Row]], desk: Desk) -> Iterator[tuple[list[Row], Row]]:
        """Each group with a row that holds the student's part, or has failed."""
        sampling = Sampling(
            max_tokens=self.max_tokens, temperature=self.student_temperature, seed=self.seed
        )
        questions = ((group, _asked_first(group[0])) for group in groups)
        writer = desk.writer(self.student)
        for group, replies in asked(questions, writer, sampling, thoughts=True):
            if replies is None:
                yield group, _new(group[0]).failed(NO_PROMPT)
            else:
                yield group, self._first_part(group[0], replies[0], desk)

    def _first_part(self, known: Row, reply: Reply, desk: Desk) -> Row:
        """The student's part of an answer to a prompt with a known one."""
        row = _new(known).made_by(
            "mixed", self.student, reply, temperature=self.student_temperature, part="begin"
        )
        if reply.failure is not None:
            return row.failed(f"{self.student} gave no answer: {reply.failure}")
        longest = int(self.max_ratio * len(known.text))
        if not longest:
            return row.failed("there is no known answer that says how long one may be")
        whole = reply.whole and len(reply.text) <= longest
        desk.counts["answers that the student ended"] += whole
        if whole and self.cut == "truncated":
            return row.failed(ENDED)
        text = reply.text[:longest]
        place = cut_place(text, self.beyond, stream(desk.seed, f"mixed/{known.id}"))
        if place is None:
            return row.failed("what the student wrote has no place between words to cut it at")
        return replace(row, completion=text[:place])

    def _ended(self, row: Row, reply: Reply) -> Row:
        """The row with the teacher's part behind the student's."""
        begun = row.text
        row = row.made_by("mixed", self.teacher, reply, temperature=self.temperature, part="end")
        if reply.failure is not None:
            return row.failed(f"{self.teacher} gave no answer: {reply.failure}")
        if not reply.whole:
            return row.failed(f"the teacher's part is not whole: it ended with {reply.finish!r}")
        if not reply.text.strip():
            return row.failed("the teacher added nothing")
        share = len(begun) / len(begun + reply.text)
        row = replace(row, completion=begun + reply.text).noted(student_share=share)
        if self.learn == "all":
            return row
        if any(turn.role for turn in row.prompt):
            return row.failed("in a conversation an answer cannot be learnt in part")
        return replace(row, prompt=(*row.prompt, Turn(text=begun)), completion=reply.text)


def _new(known: Row) -> Row:
    """The row beside a known one, as yet without a text."""
    return replace(
        known,
        id=f"{known.id}/mixed",
        completion=None,
        rationale=None,
        weight=1.0,
        score=None,
        source=(),
        notes={},
    )


def _asked_first(row: Row) -> Question | None:
    """What the student is asked."""
    return Question(id=row.id, prompt=row.prompt) if row.question else None


def _question(row: Row) -> Question | None:
    """What the teacher is asked: to go on; nothing where there is nothing to go on from."""
    if row.failure is not None:
        return None
    return Question(id=row.id, prompt=row.prompt, prefix=row.text)


def cut_place(text: str, beyond: float, generator: torch.Generator) -> int | None:
    """A place between words in the last part of a text, drawn evenly; None where none is.

    White space stays with what follows: most tokenizers have it in the next word's token. In
    scripts without it, such as Chinese or Thai, any place between two characters will do.

    Args:
        text: to be cut.
        beyond: share of its characters that stand before every place that may be drawn.
        generator: of the draw.
    """
    first = int(beyond * len(text))
    places = [found.start() for found in _PLACE.finditer(text) if found.start() >= first]
    if not places:
        return None
    return places[int(torch.randint(len(places), (1,), generator=generator))]
