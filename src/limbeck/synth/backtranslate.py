"""Step `backtranslate`: the instruction that a given text answers."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import numpy as np
from pydantic import Field

from limbeck.core.exchange import Question, Reply
from limbeck.core.registry import register
from limbeck.core.types import Turn
from limbeck.synth import verdicts
from limbeck.synth.grounded import prompt_of
from limbeck.synth.grouped import asked
from limbeck.synth.judging import UNPARSABLE, draws, why_not
from limbeck.synth.rows import Row
from limbeck.synth.step import Desk
from limbeck.synth.template import filled, template
from limbeck.synth.words import runs, size, words

Positive = Annotated[int, Field(gt=0)]
Text = Annotated[str, Field(min_length=1)]

BEST = 5
"""Upper end of the scale of scores, which begins with 1."""

GIVEN_AWAY = 13
"""Words in a row of the text that an instruction may not have."""


@register("step", "backtranslate")
@dataclass(frozen=True, kw_only=True)
class Backtranslate:
    """A teacher writes the instruction to which each text would be the answer.

    The rows are rows of a {text}. The text becomes the completion, the instruction the prompt.
    An instruction fails that is too long, has marks of the request in it, or 13 words in a row of
    the text: those give the answer away.

    Attributes:
        teacher: who writes; the student itself in the paper (`student`).
        at_least: also ask for a score from 1 to 5 of the text as an answer to the instruction, and
            fail rows below this. A reply that does not end with a score in the form that was asked
            for is unparsable, and the row fails.
        scorer: who scores, if not the teacher.
        max_words: of an instruction.
        chat: make conversations; else prompts are plain text, and end in a line break.
        max_characters: of a text; longer ones fail.
        template: file of the request, with a place {text}; without one it is ours.
        score_template: file of the scorer's question, with {instruction}, {text}, {form}.
        temperature, top_p, max_tokens: of the instruction.
        score_max_tokens: of the scorer's reply, which is drawn at temperature 0.

    Source: Li et al., "Self-Alignment with Instruction Backtranslation" (arXiv 2308.06259), one
        round of it. The requests' texts are our own.
    """

    teacher: Text
    at_least: Annotated[int, Field(ge=1, le=BEST)] | None = None
    scorer: Text | None = None
    max_words: Positive = 200
    chat: bool = False
    max_characters: Positive = 20_000
    template: str | None = None
    score_template: str | None = None
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.7
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_tokens: Positive = 256
    score_max_tokens: Positive = 256

    @property
    def asks(self) -> Sequence[str]:
        """Who writes, and who scores."""
        if self.at_least is None:
            return (self.teacher,)
        return tuple(dict.fromkeys((self.teacher, self.scorer or self.teacher)))

    @property
    def files(self) -> Sequence[str]:
        """What decides the rows besides the fields; relative to the recipe."""
        return tuple(path for path in (self.template, self.score_template) if path is not None)

    def run(self, rows: Iterable[Row], desk: Desk) -> Iterator[Row]:
        """The same rows, each with a prompt."""
        made = self._written(rows, desk)
        yield from made if self.at_least is None else self._scored(made, self.at_least, desk)

    def _written(self, rows: Iterable[Row], desk: Desk) -> Iterator[Row]:
        text = template(self.template, "backtranslate", desk.folder, ("text",))
        sampling = draws(
            desk.seed,
            "backtranslate",
            temperature=self.temperature,
            max_tokens=self.max_tokens,
            top_p=self.top_p,
        )
        items = ((row, self._question(row, text, desk)) for row in rows)
        for row, replies in asked(items, desk.writer(self.teacher), sampling):
            if replies is None:
                yield row.failed(self._unfit(row) or "")
            else:
                yield self._instructed(row, replies[0], desk)

    def _unfit(self, row: Row) -> str | None:
        if row.prompt:
            return "it has a prompt already"
        if not row.text.strip():
            return "there is no text"
        length = len(row.text)
        if length > self.max_characters:
            return f"the text has {length} characters, more than {self.max_characters}"
        return None

    def _question(self, row: Row, text: str, desk: Desk) -> Question | None:
        if self._unfit(row) is not None:
            return None
        asks = filled(text, text=verdicts.enclosed("ANSWER", row.text, _code(row, desk)))
        return Question(id=_name(row), prompt=self._framed(asks))

    def _framed(self, text: str) -> tuple[Turn, ...]:
        return (Turn(text=text, role="user" if self.chat else None),)

    def _instructed(self, row: Row, reply: Reply, desk: Desk) -> Row:
        text = reply.text.strip()
        made = replace(row, prompt=prompt_of(text, chat=self.chat)).made_by(
            "backtranslate",
            self.teacher,
            reply,
            part="instruction",
            temperature=self.temperature,
            top_p=self.top_p,
        )
        fault = why_not(reply, self.teacher) or self._fault(text, row.text, _code(row, desk))
        desk.counts["instructions"] += fault is None
        return made if fault is None else made.failed(fault)

    def _fault(self, instruction: str, text: str, code: str) -> str | None:
        found = words(instruction)
        if not found:
            return "the instruction has no word in it"
        if code in instruction:
            return "the instruction copies marks of the request"
        if (length := size(instruction)) > self.max_words:
            return f"the instruction has {length} words, more than {self.max_words}"
        shared = np.isin(runs(found, GIVEN_AWAY), runs(words(text), GIVEN_AWAY))
        if shared.any() or found == words(text):
            return "the instruction gives the answer away"
        return None

    def _scored(self, rows: Iterable[Row], at_least: int, desk: Desk) -> Iterator[Row]:
        places = ("instruction", "text", "form")
        text = template(
            self.score_template, "backtranslate_score", desk.folder, places, "score_template"
        )
        sampling = draws(
            desk.seed, "backtranslate/score", temperature=0.0, max_tokens=self.score_max_tokens
        )
        scorer = self.scorer or self.teacher
        items = (self._score_question(row, text, desk) for row in rows)
        for (row, code), replies in asked(items, desk.writer(scorer), sampling):
            if replies is None:
                yield row
                continue
            reply = replies[0]
            row = row.made_by("backtranslate", scorer, reply, part="score")
            if (reason := why_not(reply, scorer)) is not None:
                yield row.failed(reason)
                continue
            score = verdicts.scores(reply.text, code, 1)
            if score is None or score[0] > BEST:
                desk.counts[UNPARSABLE] += 1
                yield row.failed(f"no score in the form asked for in the reply of {scorer}")
                continue
            row = row.noted(instruction_score=score[0])
            low = score[0] < at_least
            yield row.failed(f"its score is {score[0]}, less than {at_least}") if low else row

    def _score_question(
        self, row: Row, text: str, desk: Desk
    ) -> tuple[tuple[Row, str], Question | None]:
        if row.failure is not None:
            return (row, ""), None
        name, asked_for = f"{row.id}/score", verdicts.plain(row.prompt).strip()
        code = verdicts.code_for(desk.seed, name, [asked_for, row.text])
        asks = filled(
            text,
            instruction=verdicts.enclosed("REQUEST", asked_for, code),
            text=verdicts.enclosed("ANSWER", row.text, code),
            form=(
                "End with one last line of exactly this form, where N is a whole number from 1"
                f" (worst) to {BEST} (best):\nSCORES {code} N"
            ),
        )
        return (row, code), Question(id=name, prompt=self._framed(asks))


def _name(row: Row) -> str:
    return f"{row.id}/backtranslate"


def _code(row: Row, desk: Desk) -> str:
    return verdicts.code_for(desk.seed, _name(row), [row.text])
