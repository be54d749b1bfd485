"""Where reasoning ends and the answer begins, in the forms that models write."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from limbeck.core.errors import RecipeError
from limbeck.core.registry import register
from limbeck.evals import matching
from limbeck.synth.rows import Row
from limbeck.synth.step import Desk

Form = Literal["the_answer_is", "hashes", "boxed", "think", "regex"]

MARKS = {
    "the_answer_is": re.compile(r"(?:(?:So|Thus|Therefore|Hence),? )?[Tt]he (?:final )?answer is"),
    "hashes": re.compile(r"####"),
    "boxed": re.compile(r"[^\n.]*\\boxed\{"),
    "think": re.compile(r"(?<=</think>)\s*(?=\S)"),
}


def split(text: str, form: Form, pattern: str | None = None) -> tuple[str, str] | None:
    """Reasoning, with the white space behind it, and answer; None where the mark is not there.

    The last mark counts. `regex` is a pattern whose group begins where the answer does.

    >>> split("4 + 3 = 7. So the answer is 7.", "the_answer_is")
    ('4 + 3 = 7. ', 'So the answer is 7.')
    """
    mark = re.compile(pattern) if pattern is not None else MARKS[form]
    found = list(mark.finditer(text))
    if not found:
        return None
    last = found[-1]
    place = last.start(1) if mark.groups else last.end() if form == "think" else last.start()
    if place < 0 or not text[:place].strip() or not text[place:].strip():
        return None
    return text[:place], text[place:]


@register("step", "split")
@dataclass(frozen=True, kw_only=True)
class Split:
    """Parts a row's text into its rationale and its answer, which become channels of their own.

    Attributes:
        form: what stands before the answer: `the_answer_is`, `hashes` (####), `boxed`, `think`
            (the end of `<think>...</think>`), or `regex`.
        pattern: for `regex`, with one group that catches the answer.
    """

    form: Form = "the_answer_is"
    pattern: str | None = None

    def __post_init__(self) -> None:
        if (self.pattern is not None) != (self.form == "regex"):
            raise RecipeError("pattern", "goes with `form: regex`, and only with it")
        if self.pattern is not None:
            matching.check_pattern(self.pattern)

    @property
    def asks(self) -> Sequence[str]:
        """Nobody."""
        return ()

    @property
    def reads(self) -> Sequence[str]:
        """Nobody."""
        return ()

    def run(self, rows: Iterable[Row], desk: Desk) -> Iterator[Row]:
        """Each row in two parts; one that cannot be parted fails."""
        for row in rows:
            parts = split(row.text, self.form, self.pattern)
            if parts is None:
                desk.counts["texts without a rationale and an answer"] += 1
                yield row.failed(f"no rationale and answer in the form {self.form!r}")
            else:
                yield replace(row, rationale=parts[0], completion=parts[1])
