"""Step `contamination`: no row that shares text with an evaluation set."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from limbeck.core.errors import DataError, RecipeError
from limbeck.core.registry import register
from limbeck.sources.files import open_rows
from limbeck.synth.duplicates import Of
from limbeck.synth.rows import Row
from limbeck.synth.step import Desk
from limbeck.synth.words import Hashes, runs, words


@register("step", "contamination")
@dataclass(frozen=True, kw_only=True)
class Contamination:
    """Fails rows that have a run of words in common with an evaluation set, and says where.

    Case, punctuation and spacing make no difference; see `synth.words` for what a word is. A text
    of the evaluation set that is shorter than such a run is looked for as a whole. One that has
    less than `least` words would be found everywhere: it only counts where it is a whole prompt.

    Attributes:
        against: files of evaluation sets, .jsonl or .parquet; paths start where those of data do.
        columns: which columns of them hold the texts; by default all, whatever is inside.
        words: in a run. GPT-3's training data were searched for 13.
        least: words that a shorter text must have to be looked for inside others.
        of: in which text of a row: the `prompt`, the `completion` with its rationale, or `both`.
        common: a run that stands in more than so many rows of the evaluation sets is no sign of
            them, such as an instruction that is put before each question; null: all count.

    Source: Brown et al., "Language Models are Few-Shot Learners" (arXiv 2005.14165), appendix C.
    """

    against: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)]
    columns: tuple[str, ...] | None = None
    words: Annotated[int, Field(gt=1)] = 13
    least: Annotated[int, Field(gt=1)] = 5
    of: Of = "both"
    common: Annotated[int, Field(gt=0)] | None = None

    def __post_init__(self) -> None:
        if self.least > self.words:
            raise RecipeError("least", f"may be {self.words} at most, as many as `words`")

    @property
    def files(self) -> Sequence[str]:
        """What decides the rows besides the fields."""
        return tuple(os.path.abspath(os.path.expanduser(path)) for path in self.against)

    def run(self, rows: Iterable[Row], desk: Desk) -> Iterator[Row]:
        """The same rows; those that overlap have failed."""
        known = self._known(desk)
        for row in rows:
            found = self._found(row, known)
            if found is None:
                yield row
                continue
            desk.counts["rows that overlap with an evaluation set"] += 1
            text, count, place = found
            what = f"shares {count} words with" if count else "is the whole of a text in"
            yield row.failed(f"the {text} {what} {place}")

    def _known(self, desk: Desk) -> "Runs":
        known = Runs()
        for path in self.against:
            if not os.path.isfile(os.path.expanduser(path)):
                raise RecipeError("against", f"{path}: no such file")
            try:
                table = open_rows(path, "test")
                for index in range(len(table)):
                    found = [words(text) for text in self._texts(table[index], table.place(index))]
                    known.add(found, table.place(index), self.words, self.least)
            except DataError as error:
                raise RecipeError("against", str(error)) from None
        if self.common is not None:
            known.drop(self.common)
        for name, count in (("runs of words", known.size), ("short texts", len(known.short))):
            desk.counts[f"{name} of evaluation sets"] += count
        return known

    def _texts(self, row: Mapping[str, Any], place: str) -> Iterator[str]:
        for name in row if self.columns is None else self.columns:
            if name not in row:
                raise DataError(f"{place}: no column {name!r}")
            yield from strings(row[name])

    def _found(self, row: Row, known: "Runs") -> tuple[str, int, str] | None:
        """Which text, how many words of it, and where they stand; 0 words where it is no more."""
        prompt = words(row.question)
        last = words(row.prompt[-1].text) if row.prompt else []
        if self.of != "completion":
            for whole in (prompt, last):
                if (place := known.short.get(tuple(whole))) is not None:
                    return "prompt", 0, place
        texts = {"prompt": prompt, "completion": words(row.text)}
        for name in texts if self.of == "both" else (self.of,):
            if (hit := known.find(texts[name])) is not None:
                return name, *hit
        return None


class Runs:
    """Runs of words of evaluation sets, and where each stands first.

    Attributes:
        short: whole texts that are too short to be looked for inside others.
    """

    def __init__(self) -> None:
        self.short: dict[tuple[str, ...], str] = {}
        self._places: dict[int, dict[int, str]] = {}
        self._rows: dict[int, dict[int, int]] = {}
        self._sorted: dict[int, Hashes] = {}

    @property
    def size(self) -> int:
        """How many there are."""
        return sum(map(len, self._places.values()))

    def add(self, texts: Iterable[Sequence[str]], place: str, n: int, least: int) -> None:
        """Add the texts of a row: runs of n words, or all words where there are fewer."""
        seen: set[tuple[int, int]] = set()
        for text in texts:
            if len(text) >= least:
                size = min(n, len(text))
                seen.update((size, run) for run in runs(text, size).tolist())
            elif text:
                self.short.setdefault(tuple(text), place)
        for size, run in seen:
            self._places.setdefault(size, {}).setdefault(run, place)
            counts = self._rows.setdefault(size, {})
            counts[run] = counts.get(run, 0) + 1

    def drop(self, common: int) -> None:
        """Forget runs that stand in more than so many rows."""
        for size, counts in self._rows.items():
            places = self._places[size]
            self._places[size] = {r: p for r, p in places.items() if counts[r] <= common}

    def find(self, text: Sequence[str]) -> tuple[int, str] | None:
        """Words of the first known run in a text, and its place; the longest runs are tried first.

        Call it when all have been added.
        """
        for size in sorted(self._places, reverse=True):
            own = runs(text, size)
            if not len(own):
                continue
            places = self._places[size]
            if size not in self._sorted:
                self._sorted[size] = np.sort(np.fromiter(places, dtype=np.uint64))
            known = self._sorted[size]
            at = np.searchsorted(known, own)
            at[at == len(known)] = 0
            hits = np.flatnonzero(known[at] == own) if len(known) else at[:0]
            if len(hits):
                return size, places[int(own[hits[0]])]
        return None


def strings(value: Any) -> Iterator[str]:
    """All texts in a JSON value, not its keys.

    >>> list(strings({"a": ["x", {"b": "y"}], "c": 3}))
    ['x', 'y']
    """
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from strings(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from strings(inner)
