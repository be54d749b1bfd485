"""Which row of the student stands beside which row of the teacher.

A row predicts the token that starts at some byte of the text. Two rows may be compared when both
models have read the same text, that is, when the tokens they predict start at the same byte. With
one tokenizer that pairs every row with itself; with a privileged prompt it skips what only the
teacher saw; with two tokenizers it keeps the places where both have a boundary.

Tokens that cover a stretch of bytes together (see `models/offsets.py`) have the same offsets; they
are never parted. A learnt end of a text or of a turn covers nothing: it has the empty span there.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from limbeck.core.types import NO_OFFSET, Pairing, Spans, Unit, View


def alone(view: View, weights: Sequence[float], *, unit: Unit = "token") -> Pairing:
    """Every row of the student with no teacher beside it; `weights` holds one factor a sample.

    For the unit `sequence` a row is all that is learnt of a sample. Samples of a group weigh alike,
    each as much as they do on average, so that a mean over a group can be taken.
    """
    if unit != "sequence":
        return Pairing(student=None, teacher=None, weight=_row_weights(view, weights))
    samples = view.sample_of(view.rows).unique()
    return Pairing(
        student=_sequences(view, samples),
        teacher=None,
        weight=_sequence_weights(view, samples, weights),
        unit=unit,
    )


def pair(
    student: View,
    teacher: View,
    weights: Sequence[float],
    *,
    same_vocabulary: bool,
    unit: Unit = "token",
) -> Pairing:
    """Pair the rows of two views of the same samples.

    A pair weighs what its sample weighs. For the unit `span` that is one weight for each span, be
    it long or short; what is left over on either side weighs nothing.

    Args:
        student: the student's view.
        teacher: the teacher's view of the same samples, in the same order.
        weights: one factor per sample.
        same_vocabulary: both have the same tokenizer, so equal views need no search, and tokens
            that share a start pair in order.
        unit: what a row is.

    Raises:
        ValueError: the views hold different numbers of samples.
    """
    if (mine := student.sample_count) != (theirs := teacher.sample_count):
        raise ValueError(f"{mine} student and {theirs} teacher samples")
    if unit == "sequence":
        samples = _common(*(v.sample_of(v.rows).unique() for v in (student, teacher)))
        return Pairing(
            student=_sequences(student, samples),
            teacher=_sequences(teacher, samples),
            weight=_sequence_weights(student, samples, weights),
            unit=unit,
        )
    weight = _row_weights(student, weights)
    if unit == "sample":
        heard = torch.isin(student.sample_of(student.rows), teacher.sample_of(teacher.rows))
        weight = torch.where(heard, weight, 0.0)  # nothing stands beside a sample that is cut off
        return Pairing(student=None, teacher=None, weight=weight, unit=unit)
    if same_vocabulary and (student is teacher or _same(student, teacher)):
        if unit == "span":
            single = _single(_rows(student))
            return Pairing(student=single, teacher=single, weight=weight, unit=unit)
        return Pairing(student=None, teacher=None, weight=weight, unit=unit)
    left, right = _rows(student), _rows(teacher)
    if unit == "span":
        return _pair_spans(left, right, torch.tensor(weights, dtype=torch.float32))
    if unit == "order":
        rows, other = _matches(_order(left), _order(right))
    else:
        mine, theirs = (_prefixes(side, every=same_vocabulary) for side in (left, right))
        found, beside = _matches(_reading(left)[mine], _reading(right)[theirs])
        rows, other = mine[found], theirs[beside]
    return Pairing(student=rows, teacher=other, weight=weight[rows], unit=unit)


def _sequences(view: View, samples: Tensor) -> Spans:
    """The rows of each of these samples as a group."""
    sample = view.sample_of(view.rows)
    rows = _where(torch.isin(sample, samples))
    span = torch.searchsorted(samples, sample[rows])
    return Spans(rows=rows, span=span, after=torch.full_like(samples, -1))


def _sequence_weights(view: View, samples: Tensor, weights: Sequence[float]) -> Tensor:
    """[g] the mean weight of those of each sample's group that count; 0 for one that does not."""
    own = torch.tensor(weights, dtype=torch.float32)[samples]
    if view.groups is None:
        return own
    group, counts = view.groups[samples], (own > 0).float()
    size = int(view.groups.max()) + 1 if len(view.groups) else 0
    total, many = (own.new_zeros(size).index_add(0, group, values) for values in (own, counts))
    return counts * (total / many.clamp(min=1))[group]


def _row_weights(view: View, weights: Sequence[float]) -> Tensor:
    return torch.tensor(weights, dtype=torch.float32)[view.sample_of(view.rows)]


def _same(student: View, teacher: View) -> bool:
    return (
        torch.equal(student.ids, teacher.ids)
        and torch.equal(student.rows, teacher.rows)
        and torch.equal(student.sample_of(student.rows), teacher.sample_of(teacher.rows))
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """What the tokens that n rows predict cover; all [n].

    Attributes:
        sample: which sample they are of.
        start, end: in bytes; `NO_OFFSET` where not known.
        rank: how many tokens before it cover the same bytes.
        whole: all tokens that cover these bytes are learnt.
        next: the following row predicts the following token.
    """

    sample: Tensor
    start: Tensor
    end: Tensor
    rank: Tensor
    whole: Tensor
    next: Tensor

    @property
    def empty(self) -> Tensor:
        """[n] ends of a turn."""
        return self.start == self.end


def _rows(view: View) -> Rows:
    target = view.rows + 1
    start, end = view.offsets.flatten(0, 1).T
    place = torch.arange(len(start))
    sample = view.sample_of(place)
    covers = torch.stack([sample, start, end])
    fresh = torch.ones_like(place, dtype=torch.bool)
    fresh[1:] = (covers[:, 1:] != covers[:, :-1]).any(0) | (start[1:] == NO_OFFSET)
    opened = torch.where(fresh, place, 0).cummax(0).values if len(place) else place
    learnt = torch.zeros_like(place).index_add(0, opened[target], torch.ones_like(target))
    size = torch.zeros_like(place).index_add(0, opened, torch.ones_like(place))
    follows = torch.zeros_like(target, dtype=torch.bool)
    follows[:-1] = (target[1:] == target[:-1] + 1) & (sample[target][1:] == sample[target][:-1])
    return Rows(
        sample=sample[target],
        start=start[target],
        end=end[target],
        rank=(place - opened)[target],
        whole=(learnt == size)[opened[target]],
        next=follows,
    )


def _order(side: Rows) -> Tensor:
    """[n, 2] sample, and how many learnt tokens of it come before."""
    before = torch.arange(len(side.sample)) - torch.searchsorted(side.sample, side.sample)
    return torch.stack([side.sample, before], dim=1)


def _prefixes(side: Rows, *, every: bool) -> Tensor:
    """Rows that have read the text up to a known byte; `every` one, or where a stretch begins."""
    known = side.start != NO_OFFSET
    return _where(known if every else known & (side.rank == 0))


def _reading(side: Rows) -> Tensor:
    """[n, 3] what has been read: sample, bytes (a turn's end before the next), tokens beyond."""
    return torch.stack([side.sample, 2 * side.start + ~side.empty, side.rank], dim=1)


def _matches(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of the lines of [n, c] that are in [m, c] too, and there; both are in order."""
    both = torch.cat([left, right])
    codes = torch.zeros(len(both), dtype=torch.int64)
    for column in both.T:
        codes = codes * (1 + int(column.max()) if len(column) else 1) + column
    mine, theirs = codes[: len(left)], codes[len(left) :]
    common = _common(_once(mine), _once(theirs))
    return _where(torch.isin(mine, common)), _where(torch.isin(theirs, common))


def _where(mask: Tensor) -> Tensor:
    return mask.nonzero().flatten()


def _common(left: Tensor, right: Tensor) -> Tensor:
    return left[torch.isin(left, right)].unique()


def _once(codes: Tensor) -> Tensor:
    """What occurs once only: of two empty turns one cannot say which is which."""
    found, count = codes.unique(return_counts=True)
    return found[count == 1]


def _single(rows: Rows) -> Spans:
    """Each row as a group of its own."""
    index = torch.arange(len(rows.sample))
    return Spans(rows=index, span=index, after=torch.where(rows.next, index + 1, -1))


def _pair_spans(left: Rows, right: Rows, weights: Tensor) -> Pairing:
    """The finest groups that cover the same bytes on both sides.

    A cut is a byte at which both sides have a boundary. Between two neighbouring cuts each side
    has its tokens within, since none crosses a boundary of its own side. They make a group where
    they cover all bytes on both sides: where the lengths add up, as tokens do not overlap.
    """
    width = 2 + int(max((side.end.max() for side in (left, right) if len(side.end)), default=0))
    common = _common(*(_boundaries(side, width) for side in (left, right)))
    cuts = torch.cat([torch.tensor([-1]), common])  # so that each token lies behind one
    covered = _covered(left, cuts, width) & _covered(right, cuts, width)
    ends = _common(*(_once(_ends(side, width)) for side in (left, right)))
    keys = torch.cat([2 * cuts[covered] + 1, 2 * ends]).sort().values  # an end before what follows
    spans = [_groups(side, cuts, keys, width) for side in (left, right)]
    # What one side cannot say it must not be compared with.
    said = (spans[0].after >= 0) & (spans[1].after >= 0)
    student, teacher = (
        Spans(rows=s.rows, span=s.span, after=torch.where(said, s.after, -1)) for s in spans
    )
    weight = weights[keys // 2 // width]
    return Pairing(student=student, teacher=teacher, weight=weight, unit="span")


def _usable(side: Rows) -> Tensor:
    return (side.start != NO_OFFSET) & (side.end != NO_OFFSET) & side.whole


def _boundaries(side: Rows, width: int) -> Tensor:
    """Bytes, numbered through all samples, at which stretches of a side begin or end."""
    at = _usable(side) & ~side.empty
    return torch.cat([side.sample * width + side.start, side.sample * width + side.end])[
        at.repeat(2)
    ]


def _ends(side: Rows, width: int) -> Tensor:
    """Bytes, numbered likewise, at which a turn ends."""
    return (side.sample * width + side.start)[_usable(side) & side.empty & (side.rank == 0)]


def _cut_before(side: Rows, cuts: Tensor, width: int) -> Tensor:
    """[n] the last cut that is not behind the start of a token."""
    return torch.searchsorted(cuts, side.sample * width + side.start, right=True) - 1


def _covered(side: Rows, cuts: Tensor, width: int) -> Tensor:
    """[cuts] whether a side has tokens for all bytes up to the next cut."""
    first = _usable(side) & (side.rank == 0)
    at = _cut_before(side, cuts, width)[first]
    length = torch.zeros_like(cuts).index_add(0, at, (side.end - side.start)[first])
    covered = torch.zeros_like(cuts, dtype=torch.bool)
    covered[:-1] = length[:-1] == cuts.diff()
    return covered


def _groups(side: Rows, cuts: Tensor, keys: Tensor, width: int) -> Spans:
    """The rows of a side in the groups of which `keys` holds all, ascending."""
    words = 2 * cuts[_cut_before(side, cuts, width).clamp(min=0)] + 1
    key = torch.where(side.empty, 2 * (side.sample * width + side.start), words)
    rows = _where(_usable(side) & torch.isin(key, keys))
    span = torch.searchsorted(keys, key[rows])
    last = torch.ones_like(rows, dtype=torch.bool)
    last[:-1] = span[1:] != span[:-1]
    final = rows[last]
    behind = (final + 1).clamp(max=len(side.start) - 1)
    follows = side.next[final] & (side.start[behind] == side.end[final])
    return Spans(rows=rows, span=span, after=torch.where(follows, behind, -1))
