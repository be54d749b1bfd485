"""Step `quality`: simple rules by which a text is fit to learn, each of them optional."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from limbeck.core.errors import RecipeError
from limbeck.core.registry import register
from limbeck.synth.rows import Row
from limbeck.synth.step import Desk
from limbeck.synth.words import words

Share = Annotated[float, Field(ge=0, le=1)]
Size = Annotated[int, Field(ge=0)]
Texts = tuple[Annotated[str, Field(min_length=1)], ...]

REFUSALS = (
    "i'm sorry",
    "i am sorry",
    "sorry, ",
    "i apologize",
    "i can't",
    "i cannot",
    "i'm unable",
    "i am unable",
    "i'm not able",
    "as an ai",
    "as a language model",
    "as a large language model",
)
"""How answers begin that are none. Some prompts deserve one: judge by your own data."""

FORBIDDEN = ("as an ai language model", "as a large language model")

RUN = 4
"""Words in the runs that are counted as repeated."""

FEWEST_RUNS = 8
"""A text with fewer runs is too short to tell."""

LONGEST_WORD = 40
"""Longer ones are counted by their characters, so that what has no spaces cannot hide."""

_END = re.compile(
    r"[.!?:;\u2026\u3002\uff01\uff1f][\"'\u2019\u201d\u00bb)\]*_`]*$|```$|[\u0964}\])>$|]$"
)


@register("step", "quality")
@dataclass(frozen=True, kw_only=True)
class Quality:
    """Fails rows whose text breaks a rule; the reason names the first that it breaks.

    Attributes:
        of: the `completion` with its rationale, or the `prompt`.
        min_characters, max_characters: of the text without white space around it; null: no limit.
        degenerate: fail texts without a letter or digit, and those of four characters or more
            that are all the same one.
        repetition: greatest share of runs of four words that stood in the text before, where it
            has eight runs or more; null lets all pass.
        refusals: how a text must not begin, whatever its case.
        forbidden: what must not stand anywhere in it, whatever its case.
        ascii_letters: smallest share of its letters that are ASCII ones, which tells scripts apart;
            null lets all pass.
        must_end: whether its last character must be one that ends a sentence, a formula or code.
    """

    of: Literal["completion", "prompt"] = "completion"
    min_characters: Size = 1
    max_characters: Size | None = None
    degenerate: bool = True
    repetition: Share | None = 0.5
    refusals: Texts = REFUSALS
    forbidden: Texts = FORBIDDEN
    ascii_letters: Share | None = None
    must_end: bool = False

    def __post_init__(self) -> None:
        if self.max_characters is not None and self.max_characters < self.min_characters:
            raise RecipeError("max_characters", "is less than min_characters")

    def run(self, rows: Iterable[Row], desk: Desk) -> Iterator[Row]:
        """The same rows; those that break a rule have failed."""
        for row in rows:
            text = row.text if self.of == "completion" else "".join(t.text for t in row.prompt)
            fault = self.fault(text.strip())
            if fault is None:
                yield row
            else:
                rule, said = fault
                desk.counts[f"{self.of}s that break the rule {rule}"] += 1
                yield row.failed(f"the {self.of} {said}")

    def fault(self, text: str) -> tuple[str, str] | None:
        """The first rule that a text breaks, and how; None where it is fit."""
        size = len(text)
        lower = plain(text)
        if size < self.min_characters:
            return "min_characters", "is empty" if not size else f"has only {size} characters"
        if self.max_characters is not None and size > self.max_characters:
            return "max_characters", f"has {size} characters, more than {self.max_characters}"
        if self.degenerate and size and not any(map(str.isalnum, text)):
            return "degenerate", "has no letter and no digit"
        if self.degenerate and size > 3 and len(set(text)) == 1:
            return "degenerate", f"is the one character {text[0]!r}"
        if (opening := next(filter(lower.startswith, map(plain, self.refusals)), None)) is not None:
            return "refusals", f"begins with {opening!r}"
        if (found := next((t for t in map(plain, self.forbidden) if t in lower), None)) is not None:
            return "forbidden", f"holds {found!r}"
        if self.repetition is not None and (share := repeated(text)) > self.repetition:
            return "repetition", f"repeats itself: {share:.0%} of its runs of words"
        if self.ascii_letters is not None and (share := ascii_share(text)) < self.ascii_letters:
            return "ascii_letters", f"is in other letters: {share:.0%} are ASCII"
        if self.must_end and _END.search(text) is None:
            return "must_end", "does not end where a sentence does"
        return None


def plain(text: str) -> str:
    """Lower case, with straight apostrophes, so that a phrase is found however it is typeset."""
    return text.casefold().replace("\u2019", "'")


def repeated(text: str) -> float:
    """1 - (different runs) / (runs) of four words; 0 where there are fewer than eight runs.

    >>> round(repeated("go on and on and on and on and on and on"), 3)
    0.667
    >>> repeated("ha" * 100) > 0.9
    True
    """
    found: list[str] = []
    for word in words(text):
        found.extend(word if len(word) > LONGEST_WORD else (word,))
    runs = len(found) - RUN + 1
    if runs < FEWEST_RUNS:
        return 0.0
    return 1 - len({tuple(found[k : k + RUN]) for k in range(runs)}) / runs


def ascii_share(text: str) -> float:
    """Of a text's letters, those that are ASCII; 1 where it has none."""
    letters = [character for character in text if character.isalpha()]
    return sum(map(str.isascii, letters)) / len(letters) if letters else 1.0
