"""Equal answers counted: what a teacher's distribution of answers looks like from outside."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from limbeck.core.registry import register
from limbeck.evals.matching import last_number
from limbeck.synth.grouped import grouped
from limbeck.synth.rows import Row
from limbeck.synth.step import Desk
from limbeck.synth.words import words

Normal = Literal["exact", "strip", "lower", "words", "last_number"]


@register("step", "distribution")
@dataclass(frozen=True, kw_only=True)
class Distribution:
    """Equal answers of a group become one row, whose weight is their share.

    A cross-entropy with these weights is that of the approximate distribution P(y) = count / n:

        sum_y P(y) * -log q(y)  =  H(P) + KL(P || q)

    so its minimum over q is P. `score` is the share too, for the objective `candidates`.

    Attributes:
        normalise: when two answers are equal: `exact`; but for white space at the ends (`strip`);
            and for case (`lower`); by their words alone (`words`: case, punctuation and white
            space do not count); or where their last numbers are (`last_number`).
    """

    normalise: Normal = "strip"

    def run(self, rows: Iterable[Row], desk: Desk) -> Iterator[Row]:
        """A row for each distinct answer, the first of its kind; the likeliest first."""
        totals: Counter[str] = Counter()
        for group in grouped(rows):
            kinds: dict[object, list[Row]] = {}
            for row in group:
                kinds.setdefault(normal(row.text, self.normalise), []).append(row)
            counts = [len(same) for same in kinds.values()]
            notes = {
                "answers": len(group),
                "distinct": len(kinds),
                "entropy_nats": entropy(counts),
                "coverage": coverage(counts),
            }
            totals.update(notes | {"prompts": 1})
            for same in sorted(kinds.values(), key=len, reverse=True):
                share = len(same) / len(group)
                source = tuple(entry for row in same for entry in row.source)
                made = replace(same[0], weight=share, score=share, source=source)
                yield made.noted(count=len(same), **notes)
        desk.counts["prompts with answers"] += totals["prompts"]
        desk.counts["distinct answers"] += totals["distinct"]
        if prompts := totals["prompts"]:
            desk.figures["mean entropy, nats"] = round(totals["entropy_nats"] / prompts, 4)
            desk.figures["mean coverage"] = round(totals["coverage"] / prompts, 4)


def normal(text: str, how: Normal) -> object:
    """What two equal answers share.

    >>> normal(" Yes! ", "words") == normal("yes", "words")
    True
    """
    if how == "strip":
        return text.strip()
    if how == "lower":
        return text.strip().casefold()
    if how == "words":
        return tuple(words(text))
    if how == "last_number":
        number = last_number(text)
        return text if number is None else number
    return text


def entropy(counts: Sequence[int]) -> float:
    """-sum p log p of the shares, in nats.

    It is that of what was seen, and below the true one: what was not seen has no part in it.
    """
    total = sum(counts)
    return -sum(c / total * math.log(c / total) for c in counts) if total else 0.0


def coverage(counts: Sequence[int]) -> float:
    """Estimate of the probability of all answers that were seen: 1 - (answers seen once) / n.

    Source: Good, "The population frequencies of species" (Biometrika 1953), after Turing.

    >>> coverage([3, 1])
    0.75
    """
    total = sum(counts)
    return 1 - sum(c == 1 for c in counts) / total if total else 0.0
