"""Step `distinct`: of several right ways to one answer, those that differ."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Annotated, Literal

from pydantic import Field

from limbeck.core.errors import RecipeError
from limbeck.core.registry import register
from limbeck.evals.arithmetic import equations
from limbeck.synth.grouped import grouped
from limbeck.synth.rows import Row
from limbeck.synth.step import Desk
from limbeck.synth.words import words

By = Literal["equations", "text", "words"]
Prefer = Literal["different", "shortest", "first"]


@register("step", "distinct")
@dataclass(frozen=True, kw_only=True)
class Distinct:
    """One row of each kind in a group, and no more than so many (rejection sampling's data).

    Rows are taken one after the other, each of a kind that was not taken yet. A second pass over
    what is left changes nothing.

    Attributes:
        by: what makes two the same: the `equations` in them, in order (see `evals.arithmetic`; a
            text without any counts by its words); their `text`; or their `words`, whatever the case
            and punctuation.
        cap: most rows of a group; null keeps one of each kind.
        prefer: which is taken next: the one that differs most from those taken, by the sum of the
            edit distances (`different`, which starts with the first), the `shortest`, or the
            `first`.
        true_equations: fail rows in which an equation does not hold, or there is none.

    Source: Yuan et al., "Scaling Relationship on Learning Mathematical Reasoning" (arXiv
    2308.01825), rejection sampling fine-tuning.
    """

    by: By = "equations"
    cap: Annotated[int, Field(gt=0)] | None = None
    prefer: Prefer = "different"
    true_equations: bool = False

    def __post_init__(self) -> None:
        if self.prefer == "different" and find_spec("rapidfuzz") is None:
            raise RecipeError(
                "prefer",
                "edit distances need rapidfuzz: pip install 'limbeck[synth]'; or take"
                " `prefer: shortest`",
            )

    def run(self, rows: Iterable[Row], desk: Desk) -> Iterator[Row]:
        """Each group's chosen rows in their order; the others fail, saying why."""
        for group in grouped(rows):
            usable = [row for row in group if not (self.true_equations and _untrue(row))]
            kinds = {row.id: self._kind(row) for row in group}
            taken = {kinds[row.id]: row for row in self._taken(usable, kinds)}
            desk.counts["distinct answers"] += len(taken)
            for row in group:
                same = taken.get(kinds[row.id])
                if row is same:
                    yield row
                elif row not in usable:
                    yield row.failed("an equation in it does not hold, or there is none")
                elif same is not None:
                    yield row.failed(f"says the same as {same.id}")
                else:
                    yield row.failed(f"there are {self.cap} others to this prompt already")

    def _taken(self, rows: Sequence[Row], kinds: dict[str, object]) -> list[Row]:
        left, taken = list(rows), list[Row]()
        distances = dict.fromkeys((row.id for row in rows), 0)
        while left and (self.cap is None or len(taken) < self.cap):
            best = left[0]
            if self.prefer == "shortest":
                best = min(left, key=lambda row: len(row.text))
            elif self.prefer == "different":
                best = max(left, key=lambda row: distances[row.id])
            taken.append(best)
            left = [row for row in left if kinds[row.id] != kinds[best.id]]
            if self.prefer == "different":
                for row in left:
                    distances[row.id] += _distance(row.text, best.text)
        return taken

    def _kind(self, row: Row) -> object:
        if self.by == "text":
            return row.text.strip()
        found = tuple(map(str, equations(row.text))) if self.by == "equations" else ()
        return ("equations", *found) if found else tuple(words(row.text))


def _distance(a: str, b: str) -> int:
    from rapidfuzz.distance import Levenshtein

    return Levenshtein.distance(a, b)


def _untrue(row: Row) -> bool:
    found = equations(row.text)
    return not found or not all(equation.true for equation in found)
