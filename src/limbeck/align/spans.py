"""Which row of the student stands beside which row of the teacher.

A row predicts the token that starts at some byte of the text. Two rows may be compared when both
models have read the same text, that is, when the tokens they predict start at the same byte. With
one tokenizer that pairs every row with itself; with a privileged prompt it skips what only the
teacher saw; with two tokenizers it keeps the places where both have a boundary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from limbeck.core.types import NO_OFFSET, Pairing, Unit, View


def alone(view: View, weights: Sequence[float]) -> Pairing:
    """Every row of the student with no teacher beside it; `weights` holds one factor a sample."""
    return Pairing(student=None, teacher=None, weight=_row_weights(view, weights))


def pair(
    student: View,
    teacher: View,
    weights: Sequence[float],
    *,
    same_vocabulary: bool,
    unit: Unit = "token",
) -> Pairing:
    """Pair the rows of two views of the same samples.

    Args:
        student: the student's view.
        teacher: the teacher's view of the same samples, in the same order.
        weights: one factor per sample.
        same_vocabulary: both have the same tokenizer, so equal views need no search, and tokens
            that share a start (the bytes of one character) pair in order.
        unit: what a row is.

    Raises:
        ValueError: the views hold different numbers of samples.
    """
    if (mine := student.sample_count) != (theirs := teacher.sample_count):
        raise ValueError(f"{mine} student and {theirs} teacher samples")
    weight = _row_weights(student, weights)
    if same_vocabulary and (student is teacher or _same(student, teacher)):
        return Pairing(student=None, teacher=None, weight=weight, unit=unit)
    left, right = _keys(student), _keys(teacher)
    if not same_vocabulary:  # keep only the first token that starts at a byte: the prefix is equal
        left, right = left[left[:, 2] == 0], right[right[:, 2] == 0]
    # A key is (sample, start, how many tokens before it share that start), made one number.
    width = 1 + int(max((keys[:, 1].max() for keys in (left, right) if len(keys)), default=0))
    depth = 1 + int(max((keys[:, 2].max() for keys in (left, right) if len(keys)), default=0))

    def code(keys: Tensor) -> Tensor:
        return (keys[:, 0] * width + keys[:, 1]) * depth + keys[:, 2]

    codes, other = code(left), code(right)
    where = torch.searchsorted(other, codes).clamp(max=max(len(other) - 1, 0))
    found = (other[where] == codes) if len(other) else torch.zeros(len(codes), dtype=torch.bool)
    rows = left[:, 3][found]
    return Pairing(student=rows, teacher=right[:, 3][where[found]], weight=weight[rows], unit=unit)


def _row_weights(view: View, weights: Sequence[float]) -> Tensor:
    return torch.tensor(weights, dtype=torch.float32)[view.sample_of(view.rows)]


def _same(student: View, teacher: View) -> bool:
    return (
        torch.equal(student.ids, teacher.ids)
        and torch.equal(student.rows, teacher.rows)
        and torch.equal(student.sample_of(student.rows), teacher.sample_of(teacher.rows))
    )


def _keys(view: View) -> Tensor:
    """[m, 4]: sample, start byte, rank among tokens of that start, row; ascending."""
    target = view.rows + 1
    start = view.offsets[..., 0].flatten()[target]
    sample = view.sample_of(target)
    row = torch.arange(len(target))
    kept = start != NO_OFFSET
    sample, start, row = sample[kept], start[kept], row[kept]
    place = torch.arange(len(row))
    fresh = torch.ones(len(row), dtype=torch.bool)
    fresh[1:] = (start[1:] != start[:-1]) | (sample[1:] != sample[:-1])
    opened = torch.cummax(torch.where(fresh, place, 0), dim=0).values if len(row) else place
    return torch.stack([sample, start, place - opened, row], dim=1)
