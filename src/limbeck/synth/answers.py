"""Ask a teacher each prompt, once or many times."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

from pydantic import Field

from limbeck.core.exchange import Question, Reply
from limbeck.core.registry import register
from limbeck.core.types import Sampling, Turn
from limbeck.synth.grouped import asked
from limbeck.synth.rows import NO_PROMPT, Row
from limbeck.synth.scoring import SCORES
from limbeck.synth.step import Desk
from limbeck.synth.template import filled

Positive = Annotated[int, Field(gt=0)]


@register("step", "answers")
@dataclass(frozen=True, kw_only=True)
class Answers:
    """Each prompt's n answers, a row each; those of one prompt are a group.

    A completion that a row has already is dropped; its `answer` stays, for those who check.

    Attributes:
        teacher: who answers; `student` is the recipe's student.
        n: answers to each prompt.
        temperature, top_p, max_tokens, stop: how they are drawn.
        instruction: text that is put around the prompt, with `{prompt}` where it goes. The student
            is still asked the bare prompt.
        system: what the teacher is told before; it makes a conversation of a plain prompt.
        scores: also keep each token's log-probability, which some steps weigh answers by.
        keep_truncated: take answers that were cut at `max_tokens` for whole.
    """

    teacher: str
    n: Positive = 1
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_tokens: Positive = 512
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    instruction: Annotated[str, Field(pattern=r"\{prompt\}")] | None = None
    system: str | None = None
    scores: bool = False
    keep_truncated: bool = False

    @property
    def asks(self) -> Sequence[str]:
        """The teacher."""
        return (self.teacher,)

    def run(self, rows: Iterable[Row], desk: Desk) -> Iterator[Row]:
        """n rows of each row, `ID#0` to `ID#(n-1)`; failures and cut answers say what they are."""
        sampling = Sampling(
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=desk.seed,
            stop=self.stop,
            scores=0 if self.scores else None,
        )
        items = ((row, self._question(row)) for row in rows)
        writer = desk.writer(self.teacher)
        for row, replies in asked(items, writer, sampling, self.n, thoughts=True):
            if replies is None:
                yield row.failed(NO_PROMPT)
                continue
            for reply in replies:
                yield self._answered(row, reply)

    def _question(self, row: Row) -> Question | None:
        prompt = row.prompt
        if not row.question:
            return None
        if self.instruction is not None:
            *before, last = prompt
            text = filled(self.instruction, prompt=last.text)
            prompt = (*before, replace(last, text=text))
        if self.system is not None:
            prompt = (
                Turn(text=self.system, role="system"),
                *(replace(turn, role=turn.role or "user") for turn in prompt),
            )
        return Question(id=row.id, prompt=prompt)

    def _answered(self, row: Row, reply: Reply) -> Row:
        made = replace(
            row,
            id=f"{row.id}#{reply.index}",
            completion=reply.text,
            rationale=None,
            conversation=(),
            group=row.id if self.n > 1 else row.group,
        )
        drawn: dict[str, Any] = {"temperature": self.temperature, "top_p": self.top_p}
        made = made.made_by("answers", self.teacher, reply, **drawn)
        if reply.scores is not None:
            made = made.noted(**{SCORES: [[token.text, token.logp] for token in reply.scores]})
        fault = fault_of(reply, self.max_tokens, keep_truncated=self.keep_truncated)
        return made if fault is None else made.failed(fault)


def fault_of(reply: Reply, max_tokens: int, *, keep_truncated: bool = False) -> str | None:
    """Why a reply is no answer to train on; None where it is one."""
    if reply.failure is not None:
        return reply.failure
    if reply.finish == "length" and not keep_truncated:
        return f"cut at max_tokens ({max_tokens})"
    if reply.finish not in ("stop", "length"):
        return f"ended by {reply.finish!r}"
    return None if reply.text.strip() else "the answer is empty"
