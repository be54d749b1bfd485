"""Where reasoning ends and the answer begins, in the forms that models write."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Annotated, Literal

from pydantic import Field

from limbeck.core.errors import RecipeError
from limbeck.core.registry import register
from limbeck.core.text import until
from limbeck.evals import matching
from limbeck.synth.rows import Row
from limbeck.synth.step import Desk

Form = Literal["the_answer_is", "hashes", "boxed", "think", "regex"]

_STATEMENT = re.compile(
    r"(?:\*\*)?(?:"
    r"(?:(?:So|Thus|Therefore|Hence),? )?[Tt]he (?:final |correct )?answer is:?"
    r"|(?:[Tt]he )?[Ff]inal [Aa]nswer(?:\*\*)?:"
    r")(?:\*\*(?=\s))?"
)
_HASHES = re.compile(r"####")
_BOXED = re.compile(r"\\boxed\{")
_THOUGHT = re.compile(r"</think>\s*")
_SENTENCE = re.compile(r"[.!?]\s+|\n")

WINDOW = 512
"""Rows whose pattern is looked for together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """A text in two: `rationale + answer` is the text.

    Attributes:
        rationale: the reasoning, with the white space behind it.
        answer: the rest, with the words that announce it.
        bare: the answer alone.
    """

    rationale: str
    answer: str
    bare: str


def split(text: str, form: Form, pattern: str | None = None) -> Parts | None:
    """A text in rationale and answer; None where one of both is missing.

    The last mark of its kind counts. `the_answer_is` (or `Final answer:`) takes the rest of that
    line for the bare answer, without the full stop and the marks of bold letters; `hashes` what
    stands behind `####`; `boxed` what is in the braces of `boxed`, whose sentence is the answer;
    `think` all behind `</think>`; `regex` what the pattern's one group catches, and the answer
    begins where the match does.

    Args:
        text: what a model wrote.
        form: how it says its answer.
        pattern: for `regex`.

    Raises:
        RecipeError: the pattern backtracks without end.

    >>> parts = split("4 + 3 = 7. So the answer is (b) seven.", "the_answer_is")
    >>> parts.rationale, parts.answer, parts.bare
    ('4 + 3 = 7. ', 'So the answer is (b) seven.', '(b) seven')
    """
    return split_all([text], form, pattern)[0]


def split_all(texts: Sequence[str], form: Form, pattern: str | None = None) -> list[Parts | None]:
    """`split` of many texts; faster where there is a pattern."""
    if form == "regex":
        if pattern is None:
            raise RecipeError("pattern", "is missing, and `form: regex` needs one")
        found = matching.places(pattern, texts, last=True)
        return [_caught(text, place) for text, place in zip(texts, found, strict=True)]
    find = {
        "the_answer_is": lambda text: _behind(text, _STATEMENT),
        "hashes": lambda text: _behind(text, _HASHES),
        "boxed": _boxed,
        "think": _thought,
    }[form]
    return [find(text) for text in texts]


def _parts(text: str, start: int, bare: str) -> Parts | None:
    """The text cut at a place, if something is left on both sides."""
    if not text[:start].strip() or not bare.strip():
        return None
    return Parts(rationale=text[:start], answer=text[start:], bare=bare.strip())


def _behind(text: str, mark: re.Pattern[str]) -> Parts | None:
    last = _last(mark, text)
    if last is None:
        return None
    line = text[last.end() :].strip().partition("\n")[0].rstrip()
    return _parts(text, last.start(), _bare(line))


def _bare(line: str) -> str:
    """An answer without the marks of bold letters around it, and without the full stop."""
    line = line.removesuffix(".").rstrip()
    if line.endswith("**"):
        line = line.removeprefix("**").removesuffix("**")
    return line.removesuffix(".")


def _boxed(text: str) -> Parts | None:
    last = _last(_BOXED, text)
    if last is None:
        return None
    depth, end = 1, last.end()
    while end < len(text) and depth:
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        end += 1
    if depth:
        return None
    before = _last(_SENTENCE, text[: last.start()])
    return _parts(text, before.end() if before else 0, text[last.end() : end - 1])


def _thought(text: str) -> Parts | None:
    last = _last(_THOUGHT, text)
    if last is None or not text[: last.start()].replace("<think>", "").strip():
        return None
    return _parts(text, last.end(), text[last.end() :])


def _caught(text: str, place: matching.Place | None) -> Parts | None:
    if place is None or place[2] < 0:
        return None
    return _parts(text, place[0], text[place[2] : place[3]])


def _last(mark: re.Pattern[str], text: str) -> re.Match[str] | None:
    found = None
    for found in mark.finditer(text):  # noqa: B007  # the last one is wanted
        pass
    return found


@register("step", "split")
@dataclass(frozen=True, kw_only=True)
class Split:
    """Parts a row's text into its rationale and its answer, which become channels of their own.

    Attributes:
        form: how texts say their answer: `the_answer_is`, `hashes` (####), `boxed`, `think` (the
            end of `<think>...</think>`), or `regex`.
        pattern: for `regex`, with one group that catches the answer.
        answer: `sentence` leaves the text as it is, so that the completion is "So the answer is
            7."; `bare` makes it "7".
        stop: a text ends before the first of these strings; for models that go on with a next
            question.
    """

    form: Form = "the_answer_is"
    pattern: str | None = None
    answer: Literal["sentence", "bare"] = "sentence"
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()

    def __post_init__(self) -> None:
        if (self.pattern is not None) != (self.form == "regex"):
            raise RecipeError("pattern", "goes with `form: regex`, and only with it")
        if self.pattern is not None:
            matching.check_pattern(self.pattern)

    def run(self, rows: Iterable[Row], desk: Desk) -> Iterator[Row]:
        """Each row in two parts; one that cannot be parted fails."""
        waiting = iter(rows)
        while window := list(islice(waiting, WINDOW)):
            texts = [until(row.text, self.stop).rstrip() for row in window]
            for row, parts in zip(window, split_all(texts, self.form, self.pattern), strict=True):
                if parts is None:
                    desk.counts["texts without a rationale and an answer"] += 1
                    yield row.failed(f"no rationale and answer in the form {self.form!r}")
                    continue
                completion = parts.bare if self.answer == "bare" else parts.answer
                yield replace(row, rationale=parts.rationale, completion=completion)
