"""Integers as bytes: split into byte planes, each plane a zstd buffer, or plain where that is
smaller. How many integers there are is not stored; the reader must know."""

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

Integers = NDArray[np.int64]

_SEARCH_LEVEL = 15  # 4% less than level 1 for ids, at a quarter more time
_FAST_LEVEL = 1  # for floats nothing is found by searching, and level 15 takes 20 times as long
_MOST_BYTES = 8


def varints(*values: int) -> bytes:
    """Non-negative integers, seven bits a byte, lowest first; the high bit says there is more."""
    out = bytearray()
    for value in values:
        while value > 127:
            out.append(value & 127 | 128)
            value >>= 7
        out.append(value)
    return bytes(out)


def pack_integers(values: ArrayLike) -> bytes:
    """Non-negative integers, with as many planes as the largest of them needs."""
    words = np.asarray(values).astype("<i8").ravel()
    largest = int(words.max(initial=0))
    planes = (largest.bit_length() + 7) // 8
    table = words.view(np.uint8).reshape(-1, _MOST_BYTES)[:, :planes]
    return varints(planes) + pack_bytes(table, _SEARCH_LEVEL)


def pack_bytes(table: NDArray[np.uint8], level: int = _FAST_LEVEL) -> bytes:
    """[m, planes] bytes, each column for itself: a varint of its size, then its content."""
    codec = pa.Codec("zstd", compression_level=level)
    out = b""
    for plane in table.T:
        plain = plane.tobytes()
        packed = codec.compress(plain, asbytes=True)
        out += varints(min(len(packed), len(plain)))
        out += packed if len(packed) < len(plain) else plain
    return out


class Cell:
    """Reads one cell from its start to its end.

    Raises:
        ValueError: the cell is absent, or a read does not fit what is in it.
    """

    def __init__(self, cells: Mapping[str, bytes], name: str) -> None:
        if name not in cells:
            raise ValueError(f"there is no cell {name}")
        self.name, self.data, self.place = name, cells[name], 0

    def varint(self) -> int:
        """The next integer of `varints`."""
        value = shift = 0
        while shift < 63:
            byte = self._take(1)[0]
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
        raise self._damaged()

    def integers(self, count: int) -> Integers:
        """The next `count` integers of `pack_integers`."""
        planes = self.varint()
        if planes > _MOST_BYTES:
            raise self._damaged()
        words = np.zeros((count, _MOST_BYTES), np.uint8)
        words[:, :planes] = self.table(count, planes)
        values = words.reshape(-1).view("<i8").astype(np.int64)
        if values.min(initial=0) < 0:
            raise self._damaged()
        return values

    def table(self, count: int, planes: int) -> NDArray[np.uint8]:
        """The next [count, planes] of `pack_bytes`."""
        columns = [self._plane(count) for _ in range(planes)]
        return np.stack(columns, 1) if columns else np.zeros((count, 0), np.uint8)

    def end(self) -> None:
        """Nothing may be left."""
        if self.place != len(self.data):
            raise self._damaged()

    def _plane(self, count: int) -> NDArray[np.uint8]:
        stored = self._take(self.varint())
        if len(stored) < count:
            try:
                stored = pa.decompress(stored, count, codec="zstd", asbytes=True)
            except (OSError, ValueError) as error:
                raise self._damaged() from error
        plane = np.frombuffer(stored, np.uint8)
        if len(plane) != count:
            raise self._damaged()
        return plane

    def _take(self, size: int) -> bytes:
        taken = self.data[self.place : self.place + size]
        self.place += size
        if len(taken) != size:
            raise self._damaged()
        return taken

    def _damaged(self) -> ValueError:
        return ValueError(f"cell {self.name} is damaged")
