"""Step `duplicates`: of texts that are nearly the same, the first."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Annotated, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from limbeck.core.errors import RecipeError
from limbeck.core.protocols import Reader
from limbeck.core.registry import register
from limbeck.core.types import Sample, Turn
from limbeck.synth.alike import Kept, MinHash, Near, Prefixes
from limbeck.synth.rows import Row
from limbeck.synth.step import Desk
from limbeck.synth.words import shingles

Of = Literal["prompt", "completion", "both"]

ALIKE = {"ngrams": 0.7, "minhash": 0.7, "embedding": 0.98}
"""Similarity from which a text repeats another one, where a recipe does not say."""

WINDOW = 256
"""Rows that a model reads before the first of them is judged."""

BATCH = 16
SITE = "hidden:-1"


@register("step", "duplicates")
@dataclass(frozen=True, kw_only=True)
class Duplicates:
    """Fails rows that repeat an earlier one, and says which; the first one stays.

    Texts are compared as sets of runs of words (Jaccard index; see `synth.words` for what a word
    is), or as a model's mean hidden state (cosine). A row without the text is left alone.

    Attributes:
        by: `minhash` finds near texts by their signatures: about 99 in 100 at the threshold, more
            above it, and every find is confirmed on the sets; `ngrams` finds all, but takes long
            where very many texts share their phrases; `embedding` compares with every kept row.
        of: which text: the `prompt`, the `completion` with its rationale, or `both`. Where it is
            the prompt, answers of one group are not compared with each other: they share it.
        words: in a run; a shorter text is one run.
        threshold: similarity from which one repeats another: 0.7, and 0.98 for `embedding`.
        permutations: of `minhash`.
        reader: for `embedding`, the name of a teacher (or `student`) that reads.
    """

    by: Literal["ngrams", "minhash", "embedding"] = "minhash"
    of: Of = "prompt"
    words: Annotated[int, Field(gt=0)] = 3
    threshold: Annotated[float, Field(gt=0, le=1)] | None = None
    permutations: Annotated[int, Field(ge=16, le=1024)] = 128
    reader: str | None = None

    def __post_init__(self) -> None:
        if (self.by == "embedding") != (self.reader is not None):
            raise RecipeError("reader", "names a model that reads, for `by: embedding` alone")

    @property
    def reads(self) -> Sequence[str]:
        """The reader, if there is one."""
        return () if self.reader is None else (self.reader,)

    @property
    def alike(self) -> float:
        """The threshold, given or not."""
        return ALIKE[self.by] if self.threshold is None else self.threshold

    def run(self, rows: Iterable[Row], desk: Desk) -> Iterator[Row]:
        """The same rows; those that repeat one have failed."""
        found = self._by_states(rows, desk) if self.by == "embedding" else self._by_words(rows)
        for row, first in found:
            if first is None:
                yield row
            else:
                desk.counts["duplicates"] += 1
                yield row.failed(f"repeats {first[0]!r} (similarity {first[1]:.2f})")

    def _by_words(self, rows: Iterable[Row]) -> Iterator[tuple[Row, tuple[str, float] | None]]:
        exact = self.by == "ngrams"
        index = Prefixes(self.alike) if exact else MinHash(self.alike, self.permutations)
        kept = Kept(self.alike)
        names: list[Row] = []
        for row in rows:
            own = shingles(text_of(row, self.of), self.words)
            marks = index.marks(own)
            first = self._first(row, names, kept.repeated(own, marks))
            if first is None and len(own):
                kept.add(own, marks)
                names.append(_named(row))
            yield row, first

    def _by_states(
        self, rows: Iterable[Row], desk: Desk
    ) -> Iterator[tuple[Row, tuple[str, float] | None]]:
        assert self.reader is not None
        reader = desk.reader(self.reader)
        if "hidden" not in reader.offers:
            raise RecipeError("reader", f"{self.reader} does not give hidden states")
        near = Near(self.alike)
        names: list[Row] = []
        waiting = iter(rows)
        while window := list(islice(waiting, WINDOW)):
            texts = [text_of(row, self.of) for row in window]
            full = [text for text in texts if text.strip()]
            states = iter(mean_states(full, reader) if full else ())
            for row, text in zip(window, texts, strict=True):
                if not text.strip():
                    yield row, None
                    continue
                state = next(states)
                first = self._first(row, names, near.repeated(state))
                if first is None:
                    near.add(state)
                    names.append(_named(row))
                yield row, first

    def _first(
        self, row: Row, names: Sequence[Row], repeated: Iterable[tuple[int, float]]
    ) -> tuple[str, float] | None:
        """Name and similarity of the first kept row that it repeats and may be compared with."""
        for number, similarity in repeated:
            other = names[number]
            if self.of != "prompt" or row.group is None or other.group != row.group:
                return other.id, similarity
        return None


def _named(row: Row) -> Row:
    """What is remembered of a kept row: its name and group."""
    return Row(id=row.id, prompt=(), group=row.group)


def text_of(row: Row, of: Of) -> str:
    """The text of a row that a step looks at; turns and parts stand on lines of their own."""
    prompt = row.question
    return {"prompt": prompt, "completion": row.text, "both": f"{prompt}\n{row.text}"}[of]


def mean_states(texts: Sequence[str], reader: Reader) -> NDArray[np.float32]:
    """[n, d] the mean of each text's last hidden states, scaled to length 1.

    Args:
        texts: one or more, none empty; of one that is too long for the reader, what it can read.
        reader: a model that offers `hidden`.
    """
    order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
    found: dict[int, NDArray[np.float32]] = {}
    for start in range(0, len(order), BATCH):
        batch = order[start : start + BATCH]
        samples = [Sample(id=str(p), turns=(Turn(text=texts[p], learn=True),)) for p in batch]
        view = reader.collate([reader.encode(sample) for sample in samples])
        with torch.no_grad():
            hidden = reader.read(view, frozenset({SITE})).hidden[SITE.partition(":")[2]]
        of = view.sample_of(view.rows)
        sums = torch.zeros(len(batch), hidden.shape[-1], dtype=torch.float64)
        sums.index_add_(0, of.cpu(), hidden.double().cpu())
        means = torch.nn.functional.normalize(sums, dim=-1)  # a sum points where its mean does
        found.update(zip(batch, means.float().numpy(), strict=True))
    return np.stack([found[place] for place in range(len(texts))])
