"""Step `adaptive`: a direct answer where the student needs no reasoning, else a short trace."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

from pydantic import Field

from limbeck.core.exchange import Question, Reply
from limbeck.core.registry import register
from limbeck.core.types import Sampling
from limbeck.evals.task import Match, Task
from limbeck.synth.grouped import asked, grouped
from limbeck.synth.rows import NO_PROMPT, Row
from limbeck.synth.step import Desk


@register("step", "adaptive")
@dataclass(frozen=True, kw_only=True)
class Adaptive:
    """Makes one row of each prompt's verified traces: without reasoning where that is enough.

    The student answers each prompt `tries` times, made to answer at once by `prefix`. Where it is
    right every time, the row is the direct answer; else it is the shortest trace. Each row's text
    begins with a tag that says which of both it is, so that the trained student writes the tag
    first and thereby decides for itself; and whoever asks it can decide by writing the tag.

    Attributes:
        student: name of the model that tries.
        tries: direct answers that must all be right.
        match, pattern: how an answer is compared with the known one; as in the evaluation `task`.
        prefix: how a direct answer begins; the student goes on from it.
        answer: a direct answer of a row whose reasoning was not split off; `{answer}` is the known
            one, and all else stays as it is. Where it was (step `split`), what stands behind the
            reasoning is used.
        direct_tag, reason_tag: what stands before the text of both kinds of rows. Any text will do;
            models with a token for it, such as `<think>`, may have that.
        decide: `tries` as said above; `always` takes the trace of every prompt, and `never` the
            direct answer: the two ends to compare with.
        max_tokens: of a direct answer.
        temperature: of the tries.
        seed: of their draws.
    """

    student: Annotated[str, Field(min_length=1)] = "student"
    tries: Annotated[int, Field(gt=0)] = 4
    match: Match = "last_number"
    pattern: str | None = None
    prefix: str = ""
    answer: Annotated[str, Field(pattern=r"\{answer\}")] = "{answer}"
    direct_tag: str = "<direct> "
    reason_tag: str = "<think> "
    decide: Literal["tries", "always", "never"] = "tries"
    max_tokens: Annotated[int, Field(gt=0)] = 32
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.7
    seed: Annotated[int, Field(ge=0)] = 0

    def __post_init__(self) -> None:
        self._task  # noqa: B018  # says what is wrong with match and pattern

    @property
    def asks(self) -> Sequence[str]:
        """Who tries."""
        return (self.student,) if self.decide == "tries" else ()

    @property
    def _task(self) -> Task:
        """Knows how answers are compared."""
        return Task(name="adaptive", path="", match=self.match, pattern=self.pattern)

    def run(self, rows: Iterable[Row], desk: Desk) -> Iterator[Row]:
        """One row of each group; the others have failed."""
        for group, replies in self._tried(grouped(rows), desk):
            answer = group[0].answer
            if not group[0].question:
                yield from (row.failed(NO_PROMPT) for row in group)
                continue
            if answer is None:
                yield from (row.failed("there is no known answer") for row in group)
                continue
            if replies is None:
                yield from self._group(group, self.decide == "never", desk)
                continue
            passes = self._passes(group[0], replies, answer)
            noted = [row.noted(direct_passes=passes, direct_tries=self.tries) for row in group]
            for row in self._group(noted, passes == self.tries, desk):
                for reply in replies if row.failure is None else ():
                    row = row.made_by("adaptive", self.student, reply, temperature=self.temperature)
                yield row

    def _tried(
        self, groups: Iterable[list[Row]], desk: Desk
    ) -> Iterator[tuple[list[Row], Sequence[Reply] | None]]:
        """Each group with the student's direct answers, where they are wanted."""
        if self.decide != "tries":
            yield from ((group, None) for group in groups)
            return
        sampling = Sampling(
            max_tokens=self.max_tokens, temperature=self.temperature, seed=self.seed
        )
        questions = ((group, self._question(group[0])) for group in groups)
        writer = desk.writer(self.student)
        yield from asked(questions, writer, sampling, self.tries, thoughts=True)

    def _question(self, row: Row) -> Question | None:
        if row.answer is None or not row.question:
            return None
        return Question(id=row.id, prompt=row.prompt, prefix=self.prefix)

    def _passes(self, row: Row, replies: Sequence[Reply], answer: str) -> int:
        """How many direct answers are right; one that is cut is not."""
        texts = [self.prefix + reply.text for reply in replies if reply.whole]
        return sum(self._task.judge(texts, [answer] * len(texts), [row.question] * len(texts)))

    def _group(self, group: Sequence[Row], direct: bool, desk: Desk) -> Iterator[Row]:
        """The group's row of the wanted kind, and the others as failed."""
        shortest = min(group, key=lambda row: len(row.text))
        desk.counts["direct answers" if direct else "reasoned answers"] += 1
        for row in group:
            if row is not shortest:
                yield row.failed(
                    "a direct answer is enough" if direct else "another trace is shorter"
                )
            elif direct:
                text = (row.completion or "").lstrip()
                if row.rationale is None:
                    text = self.answer.replace("{answer}", row.answer or "")
                row = replace(row, rationale=None, completion=self.direct_tag + text)
                yield row.noted(reasoned=False)
            elif row.rationale is None:
                yield replace(row, completion=self.reason_tag + row.text).noted(reasoned=True)
            else:
                yield replace(row, rationale=self.reason_tag + row.rationale).noted(reasoned=True)
