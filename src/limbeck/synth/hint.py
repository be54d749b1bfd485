"""A second try with the answer in sight: how one gets there, for those who did not (STaR)."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

from pydantic import Field

from limbeck.core.exchange import Question
from limbeck.core.registry import register
from limbeck.core.types import Sampling, Turn
from limbeck.synth.grouped import asked
from limbeck.synth.rows import Row
from limbeck.synth.step import Desk

Positive = Annotated[int, Field(gt=0)]


@register("step", "hint")
@dataclass(frozen=True, kw_only=True)
class Hint:
    """Asks again where the verdict is not `right`, with the right answer in the question.

    It stands behind `{kind: verify, keep: all}`, and another `verify` behind it. The row keeps the
    prompt without the hint, so that the student learns to get there by itself.

    Attributes:
        teacher: who is asked; `student` is the recipe's student.
        instruction: what is asked, with `{prompt}` and `{answer}` where they go.
        temperature, max_tokens: how the answer is drawn.

    Source: Zelikman et al., "STaR" (arXiv 2203.14465), rationalization.
    """

    teacher: str
    instruction: Annotated[str, Field(pattern=r"(?s)\{prompt\}.*\{answer\}")] = (
        "{prompt}\n(The answer is {answer}. Explain how one gets there.)\n"
    )
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.7
    max_tokens: Positive = 512

    @property
    def asks(self) -> Sequence[str]:
        """The teacher."""
        return (self.teacher,)

    @property
    def reads(self) -> Sequence[str]:
        """Nobody."""
        return ()

    def run(self, rows: Iterable[Row], desk: Desk) -> Iterator[Row]:
        """Right rows as they are; the others with a new text, without the old verdict."""
        sampling = Sampling(
            max_tokens=self.max_tokens, temperature=self.temperature, seed=desk.seed
        )
        items = ((row, self._question(row)) for row in rows)
        for row, replies in asked(items, desk.writer(self.teacher), sampling):
            if replies is None:
                yield row
                continue
            (reply,) = replies
            desk.counts["tries with a hint"] += 1
            made = replace(row, completion=reply.text, rationale=None)
            made = made.made_by("hint", self.teacher, reply).noted(hinted=True, verdict=None)
            yield made if reply.whole else made.failed(reply.failure or "cut at max_tokens")

    def _question(self, row: Row) -> Question | None:
        if row.notes.get("verdict") == "right" or row.answer is None or not row.prompt:
            return None
        *before, last = row.prompt
        parts = self.instruction.partition("{answer}")
        text = parts[0].replace("{prompt}", last.text) + row.answer + parts[2]
        turn = Turn(text=text, role=last.role)
        return Question(id=f"{row.id}/hint", prompt=(*before, turn))
