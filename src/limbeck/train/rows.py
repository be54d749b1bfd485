"""Which rows of a pairing count: of a term's channel, behind the first, known to the teacher."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from limbeck.core.types import Pairing, Sample, Signals, Spans, View


def of_channel(
    pairing: Pairing,
    channel: str | None,
    student: View,
    teacher: View | None,
    samples: Sequence[Sample],
) -> Pairing:
    """Only what a channel says of samples whose parts have channels of their own.

    A row is of the part in which the token that it predicts ends, as with prompt and completion: a
    word's token often brings the space before it. A span is of the part of its last token, and a
    sequence is cut to the part's tokens.
    """
    if channel is None or not any(sample.parts for sample in samples):
        return pairing
    beside = None if teacher is None else _rows_inside(channel, teacher, samples)
    return _only(pairing, _rows_inside(channel, student, samples), beside)


def without_first(pairing: Pairing, skip: int, student: View, teacher: View | None) -> Pairing:
    """Without the first `skip` rows of each sample; for sequences, of each side its own."""
    if not skip:
        return pairing
    beside = None if teacher is None else _behind(skip, teacher)
    return _only(pairing, _behind(skip, student), beside)


def _behind(skip: int, view: View) -> Tensor:
    """[n] whether a row is not one of its sample's first."""
    of = view.sample_of(view.rows)
    return torch.arange(len(of)) - torch.searchsorted(of, of) >= skip


def _only(pairing: Pairing, inside: Tensor, beside: Tensor | None) -> Pairing:
    """Only what lies in these rows [n] of the student, and of the teacher.

    A span counts by its last row; a sequence is cut to the rows.
    """
    of = pairing.student
    if pairing.unit != "sequence" or not isinstance(of, Spans):
        kept = inside if of is None else inside[of.last() if isinstance(of, Spans) else of]
        return replace(pairing, weight=torch.where(kept, pairing.weight, 0.0))
    sides = {"student": (of, inside)}
    if beside is not None and isinstance(pairing.teacher, Spans):
        sides["teacher"] = (pairing.teacher, beside)
    cut = {name: _rows_of_spans(spans, mask[spans.rows]) for name, (spans, mask) in sides.items()}
    said = torch.stack([torch.bincount(s.span, minlength=len(s.after)) for s in cut.values()])
    kept = (said > 0).all(0)
    narrowed = {name: _some_spans(spans, kept) for name, spans in cut.items()}
    return replace(pairing, weight=pairing.weight[kept], **narrowed)


def _rows_of_spans(spans: Spans, kept: Tensor) -> Spans:
    """The groups with only those of their rows for which `kept` [m] is True."""
    return replace(spans, rows=spans.rows[kept], span=spans.span[kept])


def _rows_inside(channel: str, view: View, samples: Sequence[Sample]) -> Tensor:
    """[n] whether the last byte of each row's token lies in a part of this channel."""
    target = view.rows + 1
    (start, end), of = view.offsets.flatten(0, 1)[target].T, view.sample_of(target)
    last = torch.where(end > start, end - 1, start)
    inside = torch.zeros_like(target, dtype=torch.bool)
    for index, sample in enumerate(samples):
        mine = of == index
        begins = torch.tensor([0, *(begin for begin, _ in sample.parts)])
        names = [sample.channel, *(name for _, name in sample.parts)]
        part = torch.searchsorted(begins, last[mine].clamp(min=0), right=True) - 1
        inside[mine] = torch.tensor([name == channel for name in names])[part]
    return inside


def without_pair(
    pairing: Pairing, view: View, samples: Sequence[Sample], weights: Sequence[float]
) -> list[str]:
    """Ids of the samples that count and have rows, but none in the pairing."""
    if pairing.student is None and pairing.unit != "sample":
        return []
    if isinstance(pairing.student, Spans):
        paired = pairing.student.rows
    elif pairing.student is None:  # unit `sample`, in which a weight of 0 says it
        paired = (pairing.weight > 0).nonzero().flatten()
    else:
        paired = pairing.student
    of = view.sample_of(view.rows)
    found, wanted = of[paired].unique().tolist(), of.unique().tolist()
    return [samples[i].id for i in wanted if weights[i] > 0 and i not in found]


def usable(pairing: Pairing, heard: Signals | None) -> Pairing:
    """Without the rows that the teacher has nothing to say about: they must not be counted.

    A span counts where the teacher knows all its rows.
    """
    if heard is None or heard.valid is None or pairing.unit == "sample":
        return pairing
    valid, beside = heard.valid.cpu(), pairing.teacher
    if isinstance(beside, Spans):
        valid = beside.sum((~valid).float()) == 0
    elif beside is not None:
        valid = valid[beside]
    return replace(pairing, weight=torch.where(valid, pairing.weight, 0.0))


def without_idle(pairing: Pairing) -> Pairing:
    """Only the pairs that count; the same where all do."""
    counts = pairing.weight > 0
    if bool(counts.all()):
        return pairing
    kept = counts.nonzero().flatten()

    def narrowed(index: Tensor | Spans | None) -> Tensor | Spans:
        if isinstance(index, Spans):
            return _some_spans(index, counts)
        return kept if index is None else index[kept]

    return replace(
        pairing,
        student=narrowed(pairing.student),
        # Nothing is paired by `sample`: the teacher's rows are others.
        teacher=None if pairing.unit == "sample" else narrowed(pairing.teacher),
        weight=pairing.weight[kept],
    )


def _some_spans(spans: Spans, counts: Tensor) -> Spans:
    """The groups for which `counts` [g] is True."""
    number = counts.cumsum(0) - 1
    rows = counts[spans.span]
    return Spans(rows=spans.rows[rows], span=number[spans.span[rows]], after=spans.after[counts])
