"""Step `hint`: a second try with the answer in sight, for prompts that nobody got right (STaR)."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

from pydantic import Field

from limbeck.core.errors import RecipeError
from limbeck.core.exchange import Question, Reply
from limbeck.core.registry import register
from limbeck.core.types import Sampling
from limbeck.synth.answers import fault_of
from limbeck.synth.grouped import asked, grouped
from limbeck.synth.rows import Row
from limbeck.synth.step import Desk
from limbeck.synth.template import filled


@register("step", "hint")
@dataclass(frozen=True, kw_only=True)
class Hint:
    """Asks once more for each prompt without a right answer, with the known answer in the question.

    It stands behind `{kind: verify, keep: all}`, and another `verify` behind it: with the answer in
    sight one may still arrive at another. The new row, `.../hint`, has the prompt without the hint,
    so that the student learns to get there by itself. Wrong and unclear rows fail here.

    Attributes:
        teacher: who is asked; `student` is the recipe's student.
        instruction: what is asked, with `{prompt}` and `{answer}` where they go.
        temperature, max_tokens: how the answer is drawn.
        forbidden: words that give the hint away, and whose answers therefore fail; case does not
            count.

    Source: Zelikman et al., "STaR" (arXiv 2203.14465), rationalization. The words are limbeck's.
    """

    teacher: Annotated[str, Field(min_length=1)]
    instruction: Annotated[str, Field(pattern=r"(?s)\{prompt\}.*\{answer\}")] = (
        "{prompt}\n(The answer is {answer}. Explain how one gets there.)\n"
    )
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.7
    max_tokens: Annotated[int, Field(gt=0)] = 512
    forbidden: tuple[Annotated[str, Field(min_length=1)], ...] = (
        *("hint", "given answer", "answer is given", "provided answer", "the answer you"),
    )

    @property
    def asks(self) -> Sequence[str]:
        """The teacher."""
        return (self.teacher,)

    def run(self, rows: Iterable[Row], desk: Desk) -> Iterator[Row]:
        """Right rows as they are, the others as failed, and a new one where none is right."""
        sampling = Sampling(
            max_tokens=self.max_tokens, temperature=self.temperature, seed=desk.seed
        )
        items = ((group, self._question(group)) for group in grouped(rows))
        for group, replies in asked(items, desk.writer(self.teacher), sampling, thoughts=True):
            for row in group:
                verdict = row.notes["verdict"]
                yield row if verdict == "right" else row.failed(f"the answer is {verdict}")
            if replies is not None:
                desk.counts["tries with a hint"] += 1
                yield self._made(group[0], replies[0])

    def _question(self, group: Sequence[Row]) -> Question | None:
        if any(row.notes.get("verdict") is None for row in group):
            raise RecipeError(
                "steps", "hint needs verdicts: put {kind: verify, keep: all} before it"
            )
        first = group[0]
        right = any(row.notes["verdict"] == "right" for row in group)
        if right or first.answer is None or not first.prompt:
            return None
        *before, last = first.prompt
        text = filled(self.instruction, prompt=last.text, answer=first.answer)
        return Question(id=_name(first), prompt=(*before, replace(last, text=text)))

    def _made(self, first: Row, reply: Reply) -> Row:
        row = replace(
            first,
            id=_name(first),
            completion=reply.text,
            rationale=None,
            weight=1.0,
            score=None,
            source=(),
            notes={"hinted": True},
        ).made_by("hint", self.teacher, reply, temperature=self.temperature)
        if (fault := fault_of(reply, self.max_tokens)) is not None:
            return row.failed(fault)
        given_away = "|".join(map(re.escape, self.forbidden))
        if given_away and re.search(rf"\b(?:{given_away})\b", reply.text, re.IGNORECASE):
            return row.failed("it speaks of the hint")
        return row


def _name(row: Row) -> str:
    return f"{row.group or row.id}/hint"
