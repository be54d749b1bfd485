"""Of several right ways to one answer, those that differ."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from limbeck.core.registry import register
from limbeck.evals.arithmetic import equations
from limbeck.synth.grouped import grouped
from limbeck.synth.rows import Row
from limbeck.synth.step import Desk

By = Literal["equations", "text", "words"]
Prefer = Literal["different", "shortest", "first"]


@register("step", "distinct")
@dataclass(frozen=True, kw_only=True)
class Distinct:
    """One row of each kind in a group, and no more than so many (rejection sampling's data).

    Attributes:
        by: what makes two the same: the `equations` in them, in order; their `text`; or their
            `words`, whatever the case and punctuation.
        cap: most rows of a group; null keeps one of each kind.
        prefer: which of those of one kind, and which kinds where there are more than `cap`: the
            most `different` from those taken (edit distance), the `shortest`, or the `first`.
        true_equations: fail rows in which an equation does not hold, or there is none.

    Source: Yuan et al., "Scaling Relationship on Learning Mathematical Reasoning" (arXiv
    2308.01825), rejection sampling fine-tuning.
    """

    by: By = "equations"
    cap: Annotated[int, Field(gt=0)] | None = None
    prefer: Prefer = "different"
    true_equations: bool = False

    @property
    def asks(self) -> Sequence[str]:
        """Nobody."""
        return ()

    @property
    def reads(self) -> Sequence[str]:
        """Nobody."""
        return ()

    def run(self, rows: Iterable[Row], desk: Desk) -> Iterator[Row]:
        """Each group's chosen rows in their order; the others fail, saying like which they are."""
        del desk
        for group in grouped(rows):
            usable = [row for row in group if not (self.true_equations and _wrong(row))]
            taken = self._taken(usable)
            names = {self._kind(row): row.id for row in taken}
            for row in group:
                if any(row is one for one in taken):
                    yield row
                elif not any(row is one for one in usable):
                    yield row.failed("an equation in it does not hold, or there is none")
                elif self._kind(row) in names:
                    yield row.failed(f"says the same as {names[self._kind(row)]}")
                else:
                    yield row.failed(f"there are {self.cap} others to this prompt already")

    def _taken(self, rows: Sequence[Row]) -> list[Row]:
        left, taken = list(rows), list[Row]()
        kinds: set[object] = set()
        while left and (self.cap is None or len(taken) < self.cap):
            best = min(left, key=self._rank(taken)) if self.prefer != "first" else left[0]
            taken.append(best)
            kinds.add(self._kind(best))
            left = [row for row in left if self._kind(row) not in kinds]
        return taken

    def _rank(self, taken: Sequence[Row]) -> Callable[[Row], float]:
        """Lower is taken first; of equals the first."""
        if self.prefer == "shortest" or not taken:
            return lambda row: len(row.text) if self.prefer == "shortest" else 0
        from rapidfuzz.distance import Levenshtein

        return lambda row: -sum(Levenshtein.distance(row.text, one.text) for one in taken)

    def _kind(self, row: Row) -> object:
        if self.by == "equations":
            return tuple(map(str, equations(row.text)))
        if self.by == "words":
            letters = (c if c.isalnum() else " " for c in row.text.casefold())
            return tuple("".join(letters).split())
        return row.text.strip()


def _wrong(row: Row) -> bool:
    found = equations(row.text)
    return not found or not all(equation.true for equation in found)
