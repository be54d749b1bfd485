"""What a teacher said of one sample's rows, as a few named byte strings, and back.

A row's tokens come as a set: all (row, token) entries of a sample are stored token by token. A
frequent token is then one id and a run of small steps from row to row, so what a text repeats is
paid once, whatever the tokenizer's numbering. Integers are split into byte planes, each a zstd
buffer. Everything is checked on the way back: damaged bytes give `ValueError`.

Shapes: n rows, k kept tokens, d width.
"""

from collections.abc import Mapping
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from limbeck.teachers.planes import Cell, Integers, pack_bytes, pack_integers, varints

Cells = Mapping[str, bytes]
FloatName = Literal["float32", "bfloat16", "float16"]

LOGP_ERROR = 0.125
"""Nats by which a stored log-probability can differ at most, before a row is normalised."""

HEAD_ERROR = 1 / 64
"""The same near probability 1. Between, the bound is `HEAD_ERROR * (1 - logp)`: it grows as the
probability falls and stops at `LOGP_ERROR`, at exp(-7)."""

REST_ERROR = 1 / 1600
"""Bound on the relative error of a row's rest, and on that of its mass."""

MEAN_ERROR = 1 / 1024
"""Nats by which a mean log-probability of draws can differ at most."""

_BEND = LOGP_ERROR / HEAD_ERROR - 1  # nats at which the bound stops growing
_HEAD_CODES = np.log1p(_BEND) / (2 * HEAD_ERROR)
_RULED_OUT = 2**20  # codes of at least thousands of nats: such a probability is 0 in any float
_EXTRA_BITS = range(-2, 7)
_REST_MIDDLE, _REST_ONE = 2**15, 2**16 - 1
_FLOATS = {"float32": 4, "bfloat16": 2, "float16": 2}


def pack_topk(
    ids: NDArray[np.integer], logp: NDArray[np.floating], vocabulary: int, extra_bits: int = 0
) -> dict[str, bytes]:
    """The k most likely tokens of n rows, and how much probability is left for all others.

    Args:
        ids: [n, k], different within a row.
        logp: [n, k] natural log-probabilities; minus infinity where a token is ruled out.
        vocabulary: v; all ids are below it.
        extra_bits: of each log-probability; one more halves the bounds above, one fewer doubles
            them.

    Raises:
        ValueError: shapes differ, an id is out of range or twice in a row, a row is not one of
            log-probabilities, or `extra_bits` is not one of -2 .. 6.
    """
    if extra_bits not in _EXTRA_BITS:
        raise ValueError(f"extra_bits must lie in {_EXTRA_BITS[0]} .. {_EXTRA_BITS[-1]}")
    values = np.asarray(logp, np.float64)
    if values.shape != ids.shape:
        raise ValueError(f"ids are {ids.shape} and log-probabilities {values.shape}")
    rows, k = ids.shape
    mass = np.exp(np.minimum(values, 1)).sum(axis=1)
    if not (mass < 1.001).all():  # nor NaN
        raise ValueError("a row's probabilities are not numbers, or sum to more than 1")
    tokens, row = _entries(ids, vocabulary)
    order = _stored_order(tokens, row)
    codes = _quantise(values, extra_bits)
    known = codes < _RULED_OUT
    lowest = np.where(known, codes, 0).max(axis=1, initial=0)
    # counted from the row's least likely token, since rows differ in how deep their k tokens reach
    above = np.where(known, lowest[:, None] - codes + 1, 0).ravel()
    return {
        "ids": varints(vocabulary, k) + _pack_entries(tokens[order], row[order]),
        "logp": varints(extra_bits - _EXTRA_BITS[0])
        + pack_integers(lowest)
        + pack_integers(above[order]),
        "rest": pack_integers(_quantise_rest(mass, whole=k == vocabulary)),
    }


def unpack_topk(cells: Cells, rows: int, k: int) -> tuple[Integers, NDArray[np.float32]]:
    """([n, k] int64 ids, [n, k] float32 log-probabilities), in another order within a row.

    Each row is scaled so that its probabilities and `unpack_rest` sum to 1. That moves all its
    log-probabilities by their mean error (weighted by probability), so each is within twice the
    bounds above; in a row with a likely token that mean is close to `HEAD_ERROR`.

    Raises:
        ValueError: the cells are damaged, or do not hold `rows` rows of `k`.
    """
    cell = Cell(cells, "ids")
    vocabulary, stored = cell.varint(), cell.varint()
    if stored != k:
        raise ValueError(f"{stored} tokens a row are stored, not {k}")
    tokens, row = _unpack_entries(cell, rows, rows * k, vocabulary)
    if not (np.bincount(row, minlength=rows) == k).all():
        raise ValueError("a row has too few or too many tokens")
    cell = Cell(cells, "logp")
    extra_bits = cell.varint() + _EXTRA_BITS[0]
    lowest, above = cell.integers(rows), cell.integers(rows * k)
    cell.end()
    codes = np.where(above > 0, lowest[row] - above + 1, _RULED_OUT)
    if codes.min(initial=0) < 0 or lowest.max(initial=0) >= _RULED_OUT:
        raise ValueError("a log-probability is out of range")
    if extra_bits not in _EXTRA_BITS:
        raise ValueError(f"log-probabilities of {extra_bits} extra bits are unknown")
    order = np.argsort(row, kind="stable")
    logp = _dequantise(codes[order], extra_bits).reshape(rows, k)
    with np.errstate(divide="ignore"):
        now = np.log(np.exp(logp).sum(axis=1))
    wanted = -np.logaddexp(0, _rest_odds(cells, rows))
    some = np.isfinite(now) & np.isfinite(wanted)
    shift = np.where(some, wanted, 0) - np.where(some, now, 0)
    return tokens[order].reshape(rows, k), (logp + shift[:, None]).astype(np.float32)


def unpack_rest(cells: Cells, rows: int) -> NDArray[np.float32]:
    """[n] float32, the probability of all tokens together that `pack_topk` was not given.

    Below about 1e-6 it is what float32 log-probabilities leave when they are summed.

    Raises:
        ValueError: the cells are damaged, or do not hold `rows` rows.
    """
    return np.exp(-np.logaddexp(0, -_rest_odds(cells, rows))).astype(np.float32)


def pack_draws(
    ids: NDArray[np.integer], mean_logp: NDArray[np.floating], vocabulary: int
) -> dict[str, bytes]:
    """Tokens drawn from n distributions, with repetition.

    Args:
        ids: [n, draws].
        mean_logp: [n] mean log-probability of a row's draws, nats.
        vocabulary: v; all ids are below it.

    Raises:
        ValueError: shapes differ, an id is out of range, or a mean is not a log-probability.
    """
    rows, draws = ids.shape
    means = np.asarray(mean_logp, np.float64)
    if means.shape != (rows,) or not np.isfinite(means).all() or means.max(initial=0) > 1e-3:
        raise ValueError(f"need {rows} finite means of log-probabilities")
    tokens, row = _entries(ids, vocabulary)
    keys, counts = np.unique(tokens * rows + row, return_counts=True)
    tokens, row = np.divmod(keys, max(rows, 1))
    order = _stored_order(tokens, row)
    return {
        "ids": varints(vocabulary, draws) + _pack_entries(tokens[order], row[order]),
        "counts": pack_integers(counts[order] - 1),
        "mean": pack_integers(np.rint(np.clip(-means, 0, 1e9) / (2 * MEAN_ERROR))),
    }


def unpack_draws(cells: Cells, rows: int) -> tuple[Integers, Integers, NDArray[np.float32]]:
    """([n, k] int64 ids, [n, k] int64 counts, [n] float32 mean log-probabilities).

    Ids are different within a row; k is the number of the row that has most. The other rows are
    filled up with id 0 and count 0.

    Raises:
        ValueError: the cells are damaged, or do not hold `rows` rows.
    """
    cell = Cell(cells, "ids")
    vocabulary, draws = cell.varint(), cell.varint()
    tokens, row = _unpack_entries(cell, rows, rows * draws, vocabulary)
    cell = Cell(cells, "counts")
    counts = cell.integers(len(tokens)) + 1
    cell.end()
    if not (np.bincount(row, weights=counts, minlength=rows) == draws).all():
        raise ValueError(f"the counts of a row do not sum to {draws}")
    cell = Cell(cells, "mean")
    means = cell.integers(rows)
    cell.end()
    order = np.argsort(row, kind="stable")
    kept = np.bincount(row, minlength=rows)
    column = np.arange(len(row)) - np.repeat(np.cumsum(kept) - kept, kept)
    table = np.zeros((2, rows, int(kept.max(initial=0))), np.int64)
    table[:, row[order], column] = tokens[order], counts[order]
    return table[0], table[1], (means * (-2 * MEAN_ERROR)).astype(np.float32)


def pack_floats(array: NDArray[np.floating], dtype: FloatName) -> dict[str, bytes]:
    """[n, d] numbers, rounded to `dtype`: to nearest, ties to even, as torch does.

    Raises:
        ValueError: not two dimensions, or another dtype.
    """
    if array.ndim != 2:
        raise ValueError(f"need an array of two dimensions, not {array.shape}")
    if dtype not in _FLOATS:
        raise ValueError(f"dtype must be one of {', '.join(_FLOATS)}, not {dtype}")
    if dtype == "bfloat16":
        bits = np.ascontiguousarray(array, np.float32).view(np.uint32).astype(np.uint64)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        words = np.where(np.isnan(array), 0x7FC0, rounded).astype("<u2")
    else:
        with np.errstate(over="ignore"):
            words = array.astype("<f2" if dtype == "float16" else "<f4")
    table = np.ascontiguousarray(words).reshape(-1, 1).view(np.uint8)
    return {"floats": varints(list(_FLOATS).index(dtype), array.shape[1]) + pack_bytes(table)}


def unpack_floats(cells: Cells, rows: int, width: int) -> NDArray[np.float32]:
    """[n, d] float32; exactly the rounded numbers.

    Raises:
        ValueError: the cells are damaged, or do not hold `rows` rows of `width`.
    """
    cell = Cell(cells, "floats")
    number, stored = cell.varint(), cell.varint()
    if stored != width or number >= len(_FLOATS):
        raise ValueError(f"rows of {stored} numbers are stored, not {width}")
    name = list(_FLOATS)[number]
    table = cell.table(rows * width, _FLOATS[name])
    cell.end()
    if name == "bfloat16":
        numbers = (table.reshape(-1).view("<u2").astype(np.uint32) << 16).view(np.float32)
    else:
        numbers = table.reshape(-1).view("<f2" if name == "float16" else "<f4")
    return numbers.astype(np.float32).reshape(rows, width)


def _entries(ids: NDArray[np.integer], vocabulary: int) -> tuple[Integers, Integers]:
    """(token, row) of all entries, row by row."""
    if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
        raise ValueError(f"token ids must lie in 0 .. {vocabulary - 1}")
    rows, k = ids.shape
    return ids.astype(np.int64).ravel(), np.repeat(np.arange(rows), k)


def _classes(counts: Integers) -> Integers:
    """1, 2, 2, 3, 3, 3, 3, ...: tokens found in about as many rows have steps of about one size."""
    return np.frexp(counts)[1].astype(np.int64)


def _stored_order(tokens: Integers, row: Integers) -> Integers:
    """Where each stored entry is among the given ones: by class of token, by token, by row."""
    _, which, counts = np.unique(tokens, return_inverse=True, return_counts=True)
    return np.lexsort((row, which, _classes(counts)[which]))


def _pack_entries(tokens: Integers, row: Integers) -> bytes:
    """Entries in the stored order: different tokens, in how many rows each is, steps of the row."""
    different, which, counts = np.unique(tokens, return_inverse=True, return_counts=True)
    new = np.diff(tokens, prepend=-1) != 0
    steps = np.where(new, row, np.diff(row, prepend=-1) - 1)
    if steps.min(initial=0) < 0:
        raise ValueError("a token id is twice in a row")
    out = varints(len(different)) + pack_integers(np.diff(different, prepend=-1) - 1)
    out += pack_integers(counts - 1)
    classes = _classes(counts)
    for name in np.unique(classes):
        out += pack_integers(steps[classes[which] == name])
    return out


def _unpack_entries(cell: Cell, rows: int, most: int, vocabulary: int) -> tuple[Integers, Integers]:
    """(token, row) of the entries in the stored order; nothing may follow them in the cell."""
    different = cell.varint()
    if different > min(most, vocabulary):
        raise ValueError("there are more tokens than there can be")
    tokens, counts = np.cumsum(cell.integers(different) + 1) - 1, cell.integers(different) + 1
    last = tokens.max(initial=0)
    if tokens.min(initial=0) < 0 or last >= max(vocabulary, 1) or counts.max(initial=0) > rows:
        raise ValueError("a token id, or in how many rows it is, is out of range")
    if int(counts.sum()) > most:
        raise ValueError("there are more entries than there can be")
    order = np.argsort(_classes(counts), kind="stable")
    tokens, counts = tokens[order], counts[order]
    sizes = np.bincount(_classes(counts), weights=counts).astype(np.int64)
    steps = np.concatenate([cell.integers(int(size)) for size in sizes if size] or [counts[:0]])
    cell.end()
    ahead = np.cumsum(steps + 1)
    start = np.cumsum(counts) - counts  # of each token's run; there the row counts from 0 again
    before = ahead[start] - steps[start] - 1
    row = ahead - np.repeat(before, counts) - 1
    if row.min(initial=0) < 0 or row.max(initial=-1) >= rows:
        raise ValueError("a row is out of range")
    return np.repeat(tokens, counts), row


def _quantise(logp: NDArray[np.float64], extra_bits: int) -> Integers:
    """Codes that grow as the probability falls: of log(1 - logp) at first, then of logp itself."""
    nats = np.clip(-logp, 0, 1e9)
    head = np.log1p(nats) / (2 * HEAD_ERROR)
    codes = np.where(nats <= _BEND, head, _HEAD_CODES + (nats - _BEND) / (2 * LOGP_ERROR))
    return np.minimum(np.rint(codes * 2.0**extra_bits), _RULED_OUT).astype(np.int64)


def _dequantise(codes: Integers, extra_bits: int) -> NDArray[np.float64]:
    coarse = codes / 2.0**extra_bits
    tail = _BEND + (coarse - _HEAD_CODES) * (2 * LOGP_ERROR)
    head = np.expm1(np.minimum(coarse, _HEAD_CODES) * (2 * HEAD_ERROR))
    nats = np.where(coarse <= _HEAD_CODES, head, tail)
    return np.where(codes == _RULED_OUT, -np.inf, -nats)


def _quantise_rest(mass: NDArray[np.float64], whole: bool) -> Integers:
    """Log-odds of the rest, so that neither a small rest nor a small mass loses precision."""
    if whole:
        return np.zeros(len(mass), np.int64)
    rest = np.maximum(1 - mass, 0)
    with np.errstate(divide="ignore"):
        codes = np.rint((np.log(rest) - np.log(mass)) / (2 * REST_ERROR)) + _REST_MIDDLE
    codes = np.clip(codes, 1, _REST_ONE - 1)
    return np.select([rest == 0, mass == 0], [0, _REST_ONE], codes).astype(np.int64)


def _rest_odds(cells: Cells, rows: int) -> NDArray[np.float64]:
    cell = Cell(cells, "rest")
    codes = cell.integers(rows)
    cell.end()
    if codes.max(initial=0) > _REST_ONE:
        raise ValueError("a rest is out of range")
    odds = (codes - _REST_MIDDLE) * (2 * REST_ERROR)
    return np.select([codes == 0, codes == _REST_ONE], [-np.inf, np.inf], odds)
