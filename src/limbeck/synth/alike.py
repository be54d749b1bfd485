"""Indexes of texts that have been kept, which find the first one that a new text repeats."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from limbeck.core.random import stream_seed
from limbeck.synth.words import Hashes, jaccard

CHUNK = 4096
"""Runs of words that are hashed together."""

RECALL = 0.99
"""Share of pairs at the threshold that MinHash's bands find; of closer ones they find more."""

ROUNDING = 1e-5
"""Of a cosine: the same text, read beside others, has not quite the same state."""


@dataclass(frozen=True)
class Prefixes:
    """Exact: two sets of which |A and B| >= t |A| and >= t |B| share one of their first elements.

    In any order of all elements, that is one of the first |A| - ceil(t |A|) + 1 of A and one of as
    many of B, since the others are too few to hold so much in common. Jaccard >= t implies both.

    Attributes:
        threshold: t.

    Source: Chaudhuri, Ganti and Kaushik, "A Primitive Operator for Similarity Joins in Data
        Cleaning" (ICDE 2006), the prefix filter.
    """

    threshold: float

    def marks(self, shingles: Hashes) -> Hashes:
        """Its first elements; they are in the order of their hashes, which is as good as any."""
        needed = math.ceil(self.threshold * len(shingles) - 1e-9)  # 0.7 * 10 is a bit above 7
        return shingles[: len(shingles) - needed + 1]


@dataclass(frozen=True)
class MinHash:
    """As many numbers for each text, however long it is: bands of minima of random permutations.

    Two sets have the same minimum under a permutation with probability J, so they share a whole
    band of r minima with J^r, and one of b bands with 1 - (1 - J^r)^b. r is as great as a recall of
    `RECALL` at the threshold allows.

    Attributes:
        threshold: t, the Jaccard similarity to be found.
        permutations: how many there are, b r of them used.

    Source: Broder, "On the resemblance and containment of documents" (1997); bands: Leskovec,
        Rajaraman and Ullman, "Mining of Massive Datasets", chapter 3.
    """

    threshold: float
    permutations: int = 128
    _factors: Hashes = field(init=False, repr=False)

    def __post_init__(self) -> None:
        drawn = [stream_seed(0, "minhash", k) for k in range(self.permutations)]
        factors = np.array(drawn, dtype=np.uint64)
        object.__setattr__(self, "_factors", factors * np.uint64(2) + np.uint64(1))

    @property
    def rows(self) -> int:
        """Minima in a band."""
        return max(
            (r for r in range(2, self.permutations + 1) if self.recall(r) >= RECALL), default=1
        )

    def recall(self, rows: int) -> float:
        """Probability that two texts at the threshold share a band of so many minima."""
        return 1 - (1 - self.threshold**rows) ** (self.permutations // rows)

    def signature(self, shingles: Hashes) -> Hashes:
        """[permutations] the minima. An odd factor modulo 2^64 is a permutation; its low bits are
        weak ones, which a minimum hardly looks at."""
        minima = np.full(self.permutations, np.iinfo(np.uint64).max, dtype=np.uint64)
        for start in range(0, len(shingles), CHUNK):
            permuted = self._factors[:, None] * shingles[None, start : start + CHUNK]
            np.minimum(minima, permuted.min(axis=1), out=minima)
        return minima

    def marks(self, shingles: Hashes) -> Hashes:
        """A number for each band."""
        if not len(shingles):
            return shingles
        rows = self.rows
        bands = self.permutations // rows
        minima = self.signature(shingles)[: bands * rows].reshape(bands, rows)
        folded = np.arange(1, bands + 1, dtype=np.uint64) * self._factors[0]  # one band's own
        for column in minima.T:
            folded = (folded ^ (column >> np.uint64(7))) * self._factors[1] + column
        return folded


class Places:
    """Which texts have a mark, in 12 bytes for each; a dictionary takes ten times as much.

    New marks are in a dictionary. When there are many they become a sorted array, and arrays of
    about one size become one: so there are few of them, the older the greater.
    """

    def __init__(self, fresh: int = 1 << 15) -> None:
        self._most = fresh
        self._fresh: dict[int, list[int]] = {}
        self._count = 0
        self._arrays: list[tuple[Hashes, NDArray[np.int32]]] = []

    def add(self, marks: Hashes, number: int) -> None:
        """Note that a text has these marks."""
        for mark in marks.tolist():
            self._fresh.setdefault(mark, []).append(number)
        self._count += len(marks)
        if self._count >= self._most:
            numbers = [n for found in self._fresh.values() for n in found]
            keys = [mark for mark, found in self._fresh.items() for _ in found]
            made = _sorted(np.array(keys, dtype=np.uint64), np.array(numbers, dtype=np.int32))
            while self._arrays and len(self._arrays[-1][0]) <= 2 * len(made[0]):
                keys_before, numbers_before = self._arrays.pop()
                made = _sorted(
                    np.concatenate([keys_before, made[0]]),
                    np.concatenate([numbers_before, made[1]]),
                )
            self._arrays.append(made)
            self._fresh, self._count = {}, 0

    def find(self, marks: Hashes) -> list[int]:
        """Numbers of the texts that have one of these marks, ascending."""
        found: set[int] = set()
        for mark in marks.tolist():
            found.update(self._fresh.get(mark, ()))
        for keys, numbers in self._arrays:
            first = np.searchsorted(keys, marks, side="left")
            last = np.searchsorted(keys, marks, side="right")
            for place in np.flatnonzero(last > first).tolist():
                found.update(numbers[first[place] : last[place]].tolist())
        return sorted(found)


def _sorted(keys: Hashes, numbers: NDArray[np.int32]) -> tuple[Hashes, NDArray[np.int32]]:
    order = keys.argsort(kind="stable")
    return keys[order], numbers[order]


class Kept:
    """Sets of kept texts; of a new one it finds the first with at least so great a Jaccard index.

    Sets that are alike share a mark, of `Prefixes` or `MinHash`. What the marks find is confirmed
    on the sets themselves, so nothing is called alike that is not.
    Of a text, only the hashes of its runs of words stay in memory.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self._sets: list[Hashes] = []
        self._places = Places()

    def repeated(self, shingles: Hashes, marks: Hashes) -> Iterator[tuple[int, float]]:
        """Numbers of the kept sets that it repeats, ascending, each with the similarity."""
        for number in self._places.find(marks):
            other = self._sets[number]
            small, great = sorted((len(other), len(shingles)))
            if small >= self.threshold * great - 1e-9:  # else they cannot be so alike
                similarity = jaccard(other, shingles)
                if similarity >= self.threshold:
                    yield number, similarity

    def add(self, shingles: Hashes, marks: Hashes) -> int:
        """Keep it; its number, from 0."""
        number = len(self._sets)
        self._sets.append(shingles)
        self._places.add(marks, number)
        return number


class Near:
    """Vectors of length 1 of kept texts; of a new one it finds those with so great a cosine."""

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self._vectors: NDArray[np.float32] | None = None
        self._count = 0

    def repeated(self, vector: NDArray[np.float32]) -> Iterator[tuple[int, float]]:
        """Numbers of the kept vectors that it repeats, ascending, each with the cosine."""
        if self._vectors is not None:
            cosines = self._vectors[: self._count] @ vector
            for number in np.flatnonzero(cosines >= self.threshold - ROUNDING).tolist():
                yield number, float(cosines[number])

    def add(self, vector: NDArray[np.float32]) -> int:
        """Keep it; its number, from 0."""
        if self._vectors is None:
            self._vectors = np.empty((64, len(vector)), dtype=np.float32)
        elif self._count == len(self._vectors):
            self._vectors = np.concatenate([self._vectors, np.empty_like(self._vectors)])
        self._vectors[self._count] = vector
        self._count += 1
        return self._count - 1
