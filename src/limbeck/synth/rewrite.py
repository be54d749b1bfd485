"""The given answer in the model's own words, which it forgets less by learning."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

from pydantic import Field

from limbeck.core.exchange import Question
from limbeck.core.registry import register
from limbeck.core.types import Sampling, Turn
from limbeck.evals.verifiers import Match, Verifier
from limbeck.synth.grouped import asked
from limbeck.synth.rows import Row
from limbeck.synth.step import Desk
from limbeck.synth.template import filled

Positive = Annotated[int, Field(gt=0)]

ABOUT_THE_TASK = (
    "reference answer",
    "given answer",
    "original answer",
    "my own words",
)
"""Words of an answer that talks about rewriting instead of doing it."""


@register("step", "rewrite")
@dataclass(frozen=True, kw_only=True)
class Rewrite:
    """Asks for each row's answer again, with the given one in sight; keeps it where it is as good.

    A rewrite that fails, is cut, talks about the task, or no longer gives the known `answer` is
    left: the row stays as it was. So there are as many rows as before.

    Attributes:
        teacher: who rewrites; by default the student itself.
        instruction: what is asked, with `{prompt}` and `{completion}` where they go.
        match: how a rewrite is compared with the row's `answer`, where it has one; null does not.
        temperature, max_tokens: how the text is drawn.

    Source: Yang et al., "Self-Distillation Bridges Distribution Gap in Language Model Fine-Tuning"
    (arXiv 2402.13669).
    """

    teacher: str = "student"
    instruction: Annotated[str, Field(pattern=r"(?s)\{prompt\}.*\{completion\}")] = (
        "{prompt}\n\nHere is an answer:\n{completion}\n\n"
        "Give this answer in your own words, and nothing else.\n"
    )
    match: Match | None = "last_number"
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    max_tokens: Positive = 512

    @property
    def asks(self) -> Sequence[str]:
        """The teacher."""
        return (self.teacher,)

    def run(self, rows: Iterable[Row], desk: Desk) -> Iterator[Row]:
        """Each row, rewritten or as it was; the note `rewritten` says which."""
        sampling = Sampling(
            max_tokens=self.max_tokens, temperature=self.temperature, seed=desk.seed
        )
        total = kept = 0
        items = ((row, self._question(row)) for row in rows)
        for row, replies in asked(items, desk.writer(self.teacher), sampling):
            total += 1
            reply = replies[0] if replies else None
            if reply is None or not reply.whole or not self._good(row, reply.text):
                desk.counts["rows that stay as they were"] += 1
                yield row.noted(rewritten=False)
                continue
            kept += 1
            made = replace(row, completion=reply.text, rationale=None)
            yield made.made_by("rewrite", self.teacher, reply).noted(rewritten=True)
        if total:
            desk.figures["share of rows that stay as they were"] = round(1 - kept / total, 4)

    def _question(self, row: Row) -> Question | None:
        if row.completion is None or not row.prompt:
            return None
        *before, last = row.prompt
        text = filled(self.instruction, prompt=last.text, completion=row.text)
        return Question(id=f"{row.id}/rewrite", prompt=(*before, Turn(text=text, role=last.role)))

    def _good(self, row: Row, text: str) -> bool:
        low = text.casefold()
        if not text.strip() or any(words in low for words in ABOUT_THE_TASK):
            return False
        if self.match is None or row.answer is None:
            return True
        return Verifier(match=self.match).check(text, row.answer).right
