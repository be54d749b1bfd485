"""Where the sentences of a text begin and end, by rules that need no language and no model."""

import re
from dataclasses import dataclass
from itertools import pairwise

_CLOSERS = r"[\"')\]}»”’*]*+"
# A run is looked at once, from its beginning and without going back: else long ones take for ever.
_ENDS = re.compile(
    rf"(?P<break>(?<![^\S\n])[^\S\n]*+\n\s*)"
    rf"|(?P<wide>[。！？]+[」』”’）]*\s*)"
    rf"|(?P<mark>(?<![.!?…])[.!?…]++{_CLOSERS})(?P<space>\s++)(?P<next>[\"'(\[{{«“‘¿¡*$€£¥+−-]*\S)"
)
_ITEM = re.compile(r"\s*\(?(?:[0-9]{1,3}|[A-Za-z])[.)]\Z")
"""The mark before an item of a list, such as `2.` or `b)`, which is no sentence."""


@dataclass(frozen=True, slots=True)
class Sentence:
    """A stretch of a text: `text`, which begins at byte `start` of it and ends before `end`."""

    text: str
    start: int
    end: int


def sentences(text: str) -> list[Sentence]:
    """The sentences of a text, one after the other without a gap.

    A sentence ends at a line break; behind `.`, `!` or `?` (with closing quotes and brackets) where
    white space follows and then a capital, a digit or a letter that has no capitals; and behind a
    full stop of East Asian scripts. White space belongs to the sentence before it. So a point
    inside of `3.14` or `a.b` ends nothing, nor does `2.` before an item of a list; but `Dr.` before
    a name does, as the rules know no abbreviations.

    >>> [one.text for one in sentences("Half of 7 is 3.5. So it is 3.5. Right?")]
    ['Half of 7 is 3.5. ', 'So it is 3.5. ', 'Right?']
    """
    cuts = [0]
    place = 0
    while (match := _ENDS.search(text, place)) is not None:
        if match["mark"] is None:
            end = match.end()
        else:
            end = match.end("space")
            if "\n" not in match["space"] and not _begins(match["next"]):
                place = end
                continue
        place = end
        piece = text[cuts[-1] : end]
        if piece.strip() and not _ITEM.match(piece.rstrip()):
            cuts.append(end)
    if cuts[-1] != len(text):
        cuts.append(len(text))
    if len(cuts) > 2 and not text[cuts[-2] :].strip():
        del cuts[-2]
    found: list[Sentence] = []
    byte = 0
    for first, last in pairwise(cuts):
        piece = text[first:last]
        size = len(piece.encode(errors="replace"))
        found.append(Sentence(piece, byte, byte + size))
        byte += size
    return found


def _begins(opening: str) -> bool:
    """Whether a sentence can begin so: with its first character behind quotes and brackets."""
    first = opening[-1]
    return (
        first.isupper() or first.isdigit() or (first.isalpha() and first.lower() == first.upper())
    )
