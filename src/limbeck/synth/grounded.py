"""Step `grounded`: questions with answers from a document, or requests of a persona."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from limbeck.core.errors import RecipeError
from limbeck.core.exchange import Question, Reply
from limbeck.core.registry import register
from limbeck.core.types import Turn
from limbeck.synth import verdicts
from limbeck.synth.grouped import asked
from limbeck.synth.judging import draws, why_not
from limbeck.synth.parsing import blocks, numbered
from limbeck.synth.rows import Row
from limbeck.synth.step import Desk
from limbeck.synth.template import filled, template
from limbeck.synth.words import words

Positive = Annotated[int, Field(gt=0)]
Text = Annotated[str, Field(min_length=1)]

FEWEST_QUOTED = 3
"""Words of a quote; anything is found somewhere that is short enough."""


@register("step", "grounded")
@dataclass(frozen=True, kw_only=True)
class Grounded:
    """A teacher reads a document, or of somebody, and writes what could be asked.

    The rows are rows of a {text}, which is not learnt here. In its place come new ones, `ID/1`,
    `ID/2`, ..., whose note `document` names it. The row itself only comes out where nothing could
    be made of it, and says why. A reply without exactly the form that was asked for is unparsable.
    What has the marks of the request in it fails.

    Attributes:
        teacher: who writes.
        from_: (`from`) what the rows are: `documents` or `personas`.
        make: `questions` with their answers (of documents), or `instructions` alone, which the step
            `answers` answers. By default what suits `from`.
        per_row: how many are asked for.
        quote: also ask for the words of the document that hold the answer, and fail where they do
            not stand there. White space and what quotation marks look like make no difference.
        open_book: put the document before the question in the student's prompt, too.
        chat: make conversations; else prompts are plain text, and end in a line break.
        max_characters: of a document; longer ones fail.
        template: file of the request, with places {document}, {number}; without one it is ours.
        temperature, top_p, max_tokens: of the replies.
    """

    teacher: Text
    from_: Annotated[Literal["documents", "personas"], Field(alias="from")] = "documents"
    make: Literal["questions", "instructions"] | None = None
    per_row: Annotated[int, Field(gt=0, le=100)] = 4
    quote: bool = False
    open_book: bool = False
    chat: bool = False
    max_characters: Positive = 20_000
    template: str | None = None
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.7
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_tokens: Positive = 1024

    def __post_init__(self) -> None:
        if self.from_ == "personas" and self.makes == "questions":
            raise RecipeError("make", "a persona has no answers; make `instructions`")
        if self.from_ == "personas" and self.open_book:
            raise RecipeError("open_book", "is for documents")
        if self.quote and self.makes != "questions":
            raise RecipeError("quote", "goes with `make: questions`")

    @property
    def makes(self) -> str:
        """What is made."""
        return self.make or ("questions" if self.from_ == "documents" else "instructions")

    @property
    def asks(self) -> Sequence[str]:
        """Who writes."""
        return (self.teacher,)

    def run(self, rows: Iterable[Row], desk: Desk) -> Iterator[Row]:
        """The rows that were made of each document."""
        name = "quoted" if self.quote else self.makes if self.from_ == "documents" else "personas"
        text = template(self.template, f"grounded_{name}", desk.folder, ("document", "number"))
        sampling = draws(
            desk.seed,
            "grounded",
            temperature=self.temperature,
            max_tokens=self.max_tokens,
            top_p=self.top_p,
        )
        items = ((row, self._question(row, text, desk)) for row in rows)
        for row, replies in asked(items, desk.writer(self.teacher), sampling):
            if replies is None:
                size = len(document_of(row))
                yield row.failed(
                    f"the document has {size} characters, more than {self.max_characters}"
                    if size
                    else "there is no text"
                )
            else:
                yield from self._made(row, replies[0], desk)

    def _question(self, row: Row, text: str, desk: Desk) -> Question | None:
        document = document_of(row)
        if not document or len(document) > self.max_characters:
            return None
        code = _code(row, desk)
        label = "TEXT" if self.from_ == "documents" else "DESCRIPTION"
        marked = verdicts.enclosed(label, document, code)
        asks = filled(text, document=marked, number=str(self.per_row))
        return Question(
            id=_name(row), prompt=(Turn(text=asks, role="user" if self.chat else None),)
        )

    def _made(self, row: Row, reply: Reply, desk: Desk) -> Iterator[Row]:
        found = self._parsed(reply)
        if isinstance(found, str):
            desk.counts["unparsable replies"] += reply.whole
            yield row.made_by("grounded", self.teacher, reply).failed(found)
            return
        document, code = document_of(row), _code(row, desk)
        for place, (question, quote, answer) in enumerate(found[: self.per_row], start=1):
            shown = f"{document}\n\n{question}" if self.open_book else question
            made = Row(
                id=f"{row.id}/{place}",
                prompt=prompt_of(shown, chat=self.chat),
                completion=answer,
                weight=row.weight,
                channel=row.channel,
                source=row.source,
                notes={"document": row.id, "quote": quote},
            ).made_by(
                "grounded",
                self.teacher,
                reply,
                item=place,
                temperature=self.temperature,
                top_p=self.top_p,
            )
            fault = None
            if code in f"{question} {answer}":
                fault = "it copies marks of the request"
            elif quote is not None and not quoted(quote, document):
                fault = "the quote does not stand in the document"
            desk.counts["questions" if answer else "instructions"] += fault is None
            yield made if fault is None else made.failed(fault)

    def _parsed(self, reply: Reply) -> list[tuple[str, str | None, str | None]] | str:
        """Question, quote and answer of each that was made; or why there are none."""
        if (reason := why_not(reply, self.teacher)) is not None:
            return reason
        if self.makes == "instructions":
            listed = numbered(reply.text)
            if listed is not None:
                return [(text, None, None) for text in listed]
        elif self.quote:
            triples = blocks(reply.text, ("QUESTION", "QUOTE", "ANSWER"))
            if triples is not None:
                return [(question, quote, answer) for question, quote, answer in triples]
        elif (pairs := blocks(reply.text, ("QUESTION", "ANSWER"))) is not None:
            return [(question, None, answer) for question, answer in pairs]
        return f"the reply of {self.teacher} does not have the form that was asked for"


def _name(row: Row) -> str:
    return f"{row.id}/grounded"


def _code(row: Row, desk: Desk) -> str:
    return verdicts.code_for(desk.seed, _name(row), [document_of(row)])


def document_of(row: Row) -> str:
    """A row's text, which a source of {text} gives as what is to be learnt; or its prompt."""
    return row.text.strip() or row.question.strip()


def prompt_of(text: str, *, chat: bool) -> tuple[Turn, ...]:
    """A user's message; or plain text that ends in a line break, so that an answer can follow."""
    return (Turn(text=text, role="user") if chat else Turn(text=f"{text.rstrip()}\n"),)


def quoted(quote: str, document: str) -> bool:
    """Whether a quote of three words or more stands in a document, letter by letter.

    White space, and what quotation marks look like, make no difference.

    >>> quoted('"The cat  sat on"', "So the cat. The cat\\nsat on the mat.")
    True
    >>> quoted("the cat sat on", "The cat sat on the mat.")
    False
    """
    bare = quote.strip().strip("\"'\u2018\u2019\u201c\u201d\u00ab\u00bb").strip()
    return len(words(bare)) >= FEWEST_QUOTED and _even(bare) in _even(document)


_QUOTES = str.maketrans("\u2018\u2019\u201c\u201d", "''\"\"")


def _even(text: str) -> str:
    return " ".join(text.translate(_QUOTES).split())
