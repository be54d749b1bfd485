"""Step `evolve`: an instruction made harder, or another one beside it, round by round."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Annotated, Literal

import torch
from pydantic import Field

from limbeck.core.exchange import Question, Reply
from limbeck.core.random import stream
from limbeck.core.registry import register
from limbeck.synth import verdicts
from limbeck.synth.elimination import bad_answer, bad_evolution
from limbeck.synth.grouped import asked
from limbeck.synth.judging import draws, why_not
from limbeck.synth.rows import Row
from limbeck.synth.step import Desk
from limbeck.synth.template import filled, template

Positive = Annotated[int, Field(gt=0)]
Text = Annotated[str, Field(min_length=1)]
Way = Literal["constraint", "deepen", "concrete", "reasoning", "broaden"]
Asked = Way | Literal["same"]

WAYS: tuple[Way, ...] = ("constraint", "deepen", "concrete", "reasoning", "broaden")
PLACES: Mapping[Asked, tuple[str, ...]] = {
    **dict.fromkeys(WAYS, ("instruction",)),
    "same": ("first", "second"),
}

COPIED = (
    "given prompt",
    "rewritten prompt",
    "created prompt",
    "given instruction",
    "rewritten instruction",
    "rewritten text",
    "instruction below",
)
"""Phrases of requests to rewrite, which nobody says who just wants something."""


@dataclass(frozen=True)
class Line:
    """A row and its descendants: all that came of it, and who has the next child."""

    rows: tuple[Row, ...]
    parent: Row


@register("step", "evolve")
@dataclass(frozen=True, kw_only=True)
class Evolve:
    """A teacher rewrites each row's instruction, then what came of it, for some rounds.

    In each round a way is drawn: one of those that deepen (a further requirement, deeper, more
    particular, more steps of thought), or to broaden (another instruction of the field). Round k
    makes `ID~k`. One that is eliminated fails, and its parent goes on into the next round.
    Eliminated is: what does not differ from an ancestor, in words; what has phrases of the request
    in it, or its marks; what refuses; what is too long; with `compare`, what the teacher calls
    equal to its parent; with `answer`, what it cannot answer well.

    It is the last turn of a conversation that evolves. A known `answer` is not handed down.

    Attributes:
        teacher: who writes, and judges.
        rounds: how often each row evolves.
        ways: that are drawn from, each as likely as the others; one named twice is twice as likely.
        compare: also ask whether parent and child are equal; what is neither a yes nor a no
            is unparsable, and the child fails.
        answer: also answer each child, and each row without a completion, and take the answer as
            completion. Then no step `answers` is needed. An answer is bad that has nothing but stop
            words in it, or is sorry in less than `sorry_words` words.
        sorry_words: longer answers may be sorry.
        max_words: of an evolved instruction.
        copied: phrases that it must not have, unless its parent has them.
        templates: files of the requests by way, each with a place {instruction}; and `same`, of the
            comparison, with {first}, {second}. Those that are not named are ours.
        temperature, top_p, max_tokens: of the evolved instruction; `max_tokens` also of a
            comparison, which may need some where the teacher reasons.
        answer_temperature, answer_max_tokens: of the answers.

    Source: Xu et al., "WizardLM" (arXiv 2304.12244): four rounds, five ways, and the elimination,
        which the authors' code lacks. The requests' texts are our own.
    """

    teacher: Text
    rounds: Positive = 4
    ways: Annotated[tuple[Way, ...], Field(min_length=1)] = WAYS
    compare: bool = False
    answer: bool = False
    sorry_words: Annotated[int, Field(ge=0)] = 80
    max_words: Positive = 400
    copied: tuple[Text, ...] = COPIED
    templates: Mapping[Asked, Text] = field(default_factory=dict)
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.9
    max_tokens: Positive = 1024
    answer_temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    answer_max_tokens: Positive = 1024

    @property
    def asks(self) -> Sequence[str]:
        """Who writes and judges."""
        return (self.teacher,)

    @property
    def files(self) -> Sequence[str]:
        """What decides the rows besides the fields; relative to the recipe."""
        return tuple(self.templates.values())

    def run(self, rows: Iterable[Row], desk: Desk) -> Iterator[Row]:
        """Each row, and behind it all that came of it, good or failed."""
        texts = {
            name: template(
                self.templates.get(name), f"evolve_{name}", desk.folder, places, f"templates.{name}"
            )
            for name, places in PLACES.items()
        }
        lines: Iterator[Line] = (Line((row,), row) for row in rows)
        if self.answer:
            lines = self._answered_roots(lines, desk)
        for turn in range(1, self.rounds + 1):
            lines = self._round(lines, turn, texts, desk)
        # Rows of one group stay together, before all that came of them, which is of no group.
        for _, line_of_group in groupby(lines, _group):
            same = list(line_of_group)
            yield from (line.rows[0] for line in same)
            for line in same:
                yield from line.rows[1:]

    def _round(
        self, lines: Iterator[Line], turn: int, texts: Mapping[str, str], desk: Desk
    ) -> Iterator[Line]:
        """Each line with one more descendant, if it is still alive."""
        children = self._evolved(lines, turn, texts, desk)
        if self.compare:
            children = self._compared(children, texts["same"], desk)
        if self.answer:
            children = self._answered(children, desk)
        for line, child in children:
            if child is None:
                yield line
                continue
            fit = child.failure is None
            desk.counts["instructions that evolved"] += fit
            desk.counts["instructions that were eliminated"] += not fit
            yield Line((*line.rows, child), child if fit else line.parent)

    def _evolved(
        self, lines: Iterator[Line], turn: int, texts: Mapping[str, str], desk: Desk
    ) -> Iterator[tuple[Line, Row | None]]:
        def requests() -> Iterator[tuple[tuple[Line, Way, str], Question | None]]:
            for line in lines:
                root, parent = line.rows[0], line.parent
                if parent.failure is not None or not parent.prompt:
                    yield (line, WAYS[0], ""), None
                    continue
                drawn = stream(desk.seed, f"evolve/{root.id}", turn)
                way = self.ways[int(torch.randint(len(self.ways), (1,), generator=drawn))]
                name = f"{root.id}/evolve{turn}"
                shown = instruction_of(parent)
                code = verdicts.code_for(desk.seed, name, [shown])
                marked = verdicts.enclosed("INSTRUCTION", shown, code)
                asks = filled(texts[way], instruction=marked)
                prompt = verdicts.framed(asks, parent.prompt)
                yield (line, way, code), Question(id=name, prompt=prompt)

        sampling = draws(
            desk.seed,
            "evolve",
            temperature=self.temperature,
            max_tokens=self.max_tokens,
            top_p=self.top_p,
        )
        writer = desk.writer(self.teacher)
        for (line, way, code), replies in asked(requests(), writer, sampling):
            if replies is None:
                yield line, None
            else:
                yield line, self._child(line, turn, way, code, replies[0])

    def _child(self, line: Line, turn: int, way: Way, code: str, reply: Reply) -> Row:
        root, parent = line.rows[0], line.parent
        *before, last = parent.prompt
        text = reply.text.strip()
        ending = last.text[len(last.text.rstrip()) :]
        child = Row(
            id=f"{root.id}~{turn}",
            prompt=(*before, replace(last, text=text + ending)),
            weight=root.weight,
            channel=root.channel,
            # An answer has a part in the row whose completion it is, but none in its child.
            source=tuple(entry for entry in parent.source if entry.get("part") != "answer"),
            notes={"evolved": way, "parent": parent.id},
        ).made_by(
            "evolve",
            self.teacher,
            reply,
            part=way,
            temperature=self.temperature,
            top_p=self.top_p,
        )
        fault = why_not(reply, self.teacher) or bad_evolution(
            text,
            [instruction_of(row) for row in line.rows if row.failure is None],
            max_words=self.max_words,
            copied=(*(p for p in self.copied if p.casefold() not in last.text.casefold()), code),
        )
        return child if fault is None else child.failed(fault)

    def _compared(
        self, children: Iterator[tuple[Line, Row | None]], text: str, desk: Desk
    ) -> Iterator[tuple[Line, Row | None]]:
        def requests() -> Iterator[tuple[tuple[Line, Row | None], Question | None]]:
            for line, child in children:
                if child is None or child.failure is not None:
                    yield (line, child), None
                    continue
                name = f"{child.id}/same"
                both = [instruction_of(line.parent), instruction_of(child)]
                code = verdicts.code_for(desk.seed, name, both)
                first, second = (verdicts.enclosed("INSTRUCTION", one, code) for one in both)
                asks = filled(text, first=first, second=second)
                prompt = verdicts.framed(asks, child.prompt)
                yield (line, child), Question(id=name, prompt=prompt)

        sampling = draws(desk.seed, "evolve/same", temperature=0.0, max_tokens=self.max_tokens)
        for (line, child), replies in asked(requests(), desk.writer(self.teacher), sampling):
            if child is not None and replies is not None:
                child = child.made_by("evolve", self.teacher, replies[0], part="same")
                said = replies[0].text.strip(" \n.*").casefold() if replies[0].whole else ""
                if said == "equal":
                    child = child.failed(f"{self.teacher} calls it equal to its parent")
                elif said != "different":
                    desk.counts["unparsable comparisons"] += 1
                    child = child.failed(f"{self.teacher} did not say whether it differs")
            yield line, child

    def _answered_roots(self, lines: Iterator[Line], desk: Desk) -> Iterator[Line]:
        """Lines whose row has a completion; one that cannot be answered has failed."""
        pairs = ((line, line.parent if line.parent.completion is None else None) for line in lines)
        for line, root in self._answered(pairs, desk):
            yield line if root is None else Line((root,), root)

    def _answered(
        self, rows: Iterable[tuple[Line, Row | None]], desk: Desk
    ) -> Iterator[tuple[Line, Row | None]]:
        def requests() -> Iterator[tuple[tuple[Line, Row | None], Question | None]]:
            for line, row in rows:
                open_ = row is not None and row.failure is None and row.prompt
                asks = Question(id=f"{row.id}/answer", prompt=row.prompt) if row and open_ else None
                yield (line, row), asks

        sampling = draws(
            desk.seed,
            "evolve/answer",
            temperature=self.answer_temperature,
            max_tokens=self.answer_max_tokens,
        )
        for (line, row), replies in asked(requests(), desk.writer(self.teacher), sampling):
            if row is not None and replies is not None:
                reply = replies[0]
                row = replace(row, completion=reply.text, rationale=None).made_by(
                    "evolve",
                    self.teacher,
                    reply,
                    part="answer",
                    temperature=self.answer_temperature,
                )
                fault = why_not(reply, self.teacher) or bad_answer(reply.text, self.sorry_words)
                row = row if fault is None else row.failed(fault)
            yield line, row


def _group(line: Line) -> tuple[str | None, str]:
    root = line.rows[0]
    return root.group, "" if root.group else root.id


def instruction_of(row: Row) -> str:
    """The last turn of a row's prompt, without white space around it."""
    return row.prompt[-1].text.strip()
