"""What two vocabularies have in common, and which tokens are alike, by the bytes of their tokens.

A token is its bytes: so the space marks of different tokenizers do not matter. None stands for a
special token or a column that is no token; such a one is like no other, unless `roles` says so.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from limbeck.core.errors import RecipeError

Tokens = Sequence[bytes | None]

NO_PARTNER = -1

BLOCK_PAIRS = 2**25
"""Pairs of tokens whose distances are held at a time."""


def shared_tokens(
    teacher: Tokens, student: Tokens, roles: Mapping[int, int] | None = None
) -> tuple[Tensor, Tensor]:
    """Columns of the tokens that both have, the teacher's and the student's, by the student's id.

    Of several with the same bytes, each side's lowest id counts.

    Args:
        teacher: its tokens.
        student: its tokens.
        roles: the teacher's special tokens and the student's that play the same part.

    >>> shared_tokens([b"a", None, b"b"], [b"b", b"ab", b"a", None], roles={1: 3})
    (tensor([2, 0, 1]), tensor([0, 2, 3]))
    """
    theirs, mine = _first(teacher), _first(student)
    pairs = [(index, theirs[token]) for token, index in mine.items() if token in theirs]
    pairs += [(index, other) for other, index in (roles or {}).items()]
    pairs.sort()
    ids = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)
    return ids[:, 1].contiguous(), ids[:, 0].contiguous()


def openings(teacher: Tokens, student: Tokens, roles: Mapping[int, int] | None = None) -> Tensor:
    """The token with which the student would begin to write each of the teacher's.

    It is the longest of the student's tokens with which the teacher's bytes begin. A byte-pair
    encoding may cut otherwise now and then.

    Args:
        teacher: its w tokens.
        student: its tokens.
        roles: the teacher's special tokens and the student's that play the same part.

    Returns:
        [w] int64 columns of the student; -1 where there is none.

    >>> openings([b"abc", b"b", b"x", None], [b"ab", b"a", b"b", None], roles={3: 3}).tolist()
    [0, 2, -1, 3]
    """
    mine = _first(student)
    lengths = sorted({len(token) for token in mine}, reverse=True)
    found = [NO_PARTNER] * len(teacher)
    for index, token in enumerate(teacher):
        if token is None:
            continue
        fitting = (mine.get(token[:length]) for length in lengths if length <= len(token))
        found[index] = next((own for own in fitting if own is not None), NO_PARTNER)
    for theirs, own in (roles or {}).items():
        found[theirs] = own
    return torch.tensor(found, dtype=torch.int64)


def nearest(
    teacher: Tokens,
    student: Tokens,
    roles: Mapping[int, int] | None = None,
    *,
    max_distance: int | None = None,
) -> Tensor:
    """The teacher's token with the least edit distance to each of the student's.

    The distance is Levenshtein's, in bytes: how many must be inserted, deleted or replaced. Equal
    bytes come first, and of equally near tokens the lowest id.

    Args:
        teacher: its tokens.
        student: its tokens.
        roles: the teacher's special tokens and the student's that play the same part.
        max_distance: beyond it a token has no partner.

    Returns:
        [v] int64, -1 for special tokens without a role, and what has no partner.

    Raises:
        RecipeError: rapidfuzz is not installed.

    >>> nearest([b"the", b"cat", None], [b" the", b"cat", None, b"cut"], roles={2: 2})
    tensor([0, 1, 2, 1])
    """
    theirs = _first(teacher)
    found = np.full(len(student), NO_PARTNER, dtype=np.int64)
    open_by_length: dict[int, list[int]] = defaultdict(list)
    for index, token in enumerate(student):
        if token is not None and token in theirs:
            found[index] = theirs[token]
        elif token is not None:
            open_by_length[len(token)].append(index)
    if max_distance != 0 and theirs:
        by_length: dict[int, list[tuple[int, bytes]]] = defaultdict(list)
        for token, index in theirs.items():
            by_length[len(token)].append((index, token))
        for length, members in open_by_length.items():
            tokens = [student[index] or b"" for index in members]
            found[members] = _nearest_of_length(tokens, length, by_length, max_distance)
    for other, index in (roles or {}).items():
        found[index] = other
    return torch.from_numpy(found)


def edit_costs(first: Tokens, second: Tokens) -> Tensor:
    """[len(first), len(second)] float16: edit distance over the longer one's length, 0 to 1.

    A special token is at distance 1 of everything.

    Raises:
        RecipeError: rapidfuzz is not installed.

    >>> edit_costs([b"cat", None], [b"cut", b"at"]).tolist()
    [[0.333251953125, 0.333251953125], [1.0, 1.0]]
    """
    process, levenshtein = _rapidfuzz()
    table = np.ones((len(first), len(second)), dtype=np.float16)
    columns = np.array([i for i, token in enumerate(second) if token is not None], dtype=np.int64)
    others = [second[i] for i in columns]
    step = max(1, BLOCK_PAIRS // max(1, len(others)))
    for start in range(0, len(first), step) if others else ():
        part = first[start : start + step]
        rows = np.array([i for i, token in enumerate(part) if token is not None], dtype=np.int64)
        if len(rows):
            table[np.ix_(rows + start, columns)] = process.cdist(
                [part[i] for i in rows],
                others,
                scorer=levenshtein.normalized_distance,
                dtype=np.float32,
            )
    return torch.from_numpy(table)


def edit_costs_of_pairs(
    first: NDArray[np.object_], second: NDArray[np.object_], pairs: NDArray[np.int64]
) -> NDArray[np.float16]:
    """[m] the same as `edit_costs` for [m, 2] pairs of indices only; equal pairs are found once.

    Args:
        first: [w] tokens, as `as_array` makes them.
        second: [v] tokens.
        pairs: [m, 2].
    """
    process, levenshtein = _rapidfuzz()
    codes, inverse = np.unique(pairs[:, 0] * len(second) + pairs[:, 1], return_inverse=True)
    left, right = first[codes // len(second)], second[codes % len(second)]
    known = _is_token(left) & _is_token(right)
    costs = np.ones(len(codes), dtype=np.float16)
    if known.any():
        costs[known] = process.cpdist(
            left[known], right[known], scorer=levenshtein.normalized_distance, dtype=np.float32
        )
    return costs[inverse]


def _is_token(tokens: NDArray[np.object_]) -> NDArray[np.bool_]:
    return np.fromiter((token is not None for token in tokens), dtype=np.bool_, count=len(tokens))


def as_array(tokens: Tokens) -> NDArray[np.object_]:
    """The tokens as an array of objects, which can be indexed by arrays."""
    array = np.empty(len(tokens), dtype=np.object_)
    array[:] = tokens
    return array


def _first(tokens: Tokens) -> dict[bytes, int]:
    """The lowest id of each token's bytes."""
    found: dict[bytes, int] = {}
    for index, token in enumerate(tokens):
        if token is not None:
            found.setdefault(token, index)
    return found


def _nearest_of_length(
    tokens: Sequence[bytes],
    length: int,
    by_length: Mapping[int, Sequence[tuple[int, bytes]]],
    max_distance: int | None,
) -> NDArray[np.int64]:
    """The nearest ids to tokens of one length, looking at ever more different lengths."""
    process, levenshtein = _rapidfuzz()
    far = np.iinfo(np.int64).max
    limit = far - 1 if max_distance is None else max_distance
    least = np.full(len(tokens), far, dtype=np.int64)
    found = np.full(len(tokens), NO_PARTNER, dtype=np.int64)
    widest = max(abs(other - length) for other in by_length)
    for difference in range(min(widest, limit) + 1):
        # Lengths that differ by this much are at least this far apart; an equal one may still win
        # by its id.
        unsettled = (least >= difference).nonzero()[0]
        if not len(unsettled):
            break
        for other in sorted({length - difference, length + difference} & by_length.keys()):
            ids = np.array([index for index, _ in by_length[other]])
            choices = [token for _, token in by_length[other]]
            step = max(1, BLOCK_PAIRS // len(choices))
            for start in range(0, len(unsettled), step):
                rows = unsettled[start : start + step]
                distances = process.cdist(
                    [tokens[i] for i in rows], choices, scorer=levenshtein.distance, dtype=np.int32
                )
                best = distances.argmin(1)  # the first of equals, and ids ascend
                value, index = distances[np.arange(len(rows)), best], ids[best]
                nearer = (value < least[rows]) | ((value == least[rows]) & (index < found[rows]))
                nearer &= value <= limit
                least[rows[nearer]], found[rows[nearer]] = value[nearer], index[nearer]
    return found


def _rapidfuzz() -> tuple[Any, Any]:
    try:
        from rapidfuzz import process
        from rapidfuzz.distance import Levenshtein
    except ImportError:
        raise RecipeError(
            "", "edit distances of tokens need rapidfuzz: pip install 'limbeck[align]'"
        ) from None
    return process, Levenshtein
