"""What a step needs before any model runs, made one step ahead in another thread.

Tokenizing, padding, pairing rows and reading a cached teacher take no part of the model's time
then. The thread draws from the source, so its place in the stream is that of the last step handed
out, not of the one that waits.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from limbeck.align.spans import alone, pair
from limbeck.core.protocols import Reader
from limbeck.core.term import Term
from limbeck.core.types import Needs, Pairing, Sample, Signals, Spans, View
from limbeck.train.batches import Batches, Item

log = logging.getLogger(__name__)

NAMED_SAMPLES = 5
"""How many samples that cannot be aligned are named in the log, for each term."""


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass works on.

    Attributes:
        views: each participant's view, by name; None is the student.
        pairings: one for each term.
        heard: signals of teachers that need no model, such as a cache.
        tokens: of the student's view, without padding and spare copies.
        unaligned: for each term, ids of samples of which no row stands beside one of the teacher.
    """

    views: Mapping[str | None, View]
    pairings: Sequence[Pairing]
    heard: Mapping[str, Signals]
    tokens: int
    unaligned: Sequence[Sequence[str]] = ()


class Preparation:
    """Makes each step's micro-batches.

    Args:
        student: tokenizes for itself, and for teachers with the same tokenizer.
        readers: the teachers by name.
        terms: for which rows are paired.
        batches: what the samples come from.
        wanted: what is asked of each teacher.
        rank, processes, accumulate: which micro-batches of a step are this process's.
        pin: hold tensors in memory that a GPU can copy from while it computes.

    Attributes:
        unaligned: by a term's label, samples so far that the term could not learn from, because no
            row of the student stands beside one of the teacher; of this process.
    """

    def __init__(
        self,
        student: Reader,
        readers: Mapping[str, Reader],
        terms: Sequence[Term],
        batches: Batches,
        *,
        wanted: Mapping[str, Needs],
        rank: int,
        processes: int,
        accumulate: int,
        pin: bool,
    ) -> None:
        self.student, self.readers, self.terms, self.batches = student, readers, terms, batches
        self.wanted, self.processes, self.accumulate, self.pin = wanted, processes, accumulate, pin
        self.mine = slice(rank * accumulate, (rank + 1) * accumulate)
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="prepare")
        self.unaligned = {term.label: 0 for term in terms}
        self._waiting: Future[list[MicroBatch]] | None = None
        self._place = batches.state_dict()

    @record_function("limbeck.prepare")
    def next(self, *, more: bool) -> list[MicroBatch]:
        """The next step's micro-batches; `more` says that another step will follow."""
        made = self._make() if self._waiting is None else self._waiting.result()
        self._waiting, self._place = None, self.batches.state_dict()
        if more and self.batches.source.ahead:
            self._waiting = self.thread.submit(self._make)
        for micro in made:
            self._count(micro.unaligned)
        return made

    def _count(self, unaligned: Sequence[Sequence[str]]) -> None:
        """Count samples without a pair, and name the first."""
        for term, names in zip(self.terms, unaligned, strict=True):
            known = self.unaligned[term.label]
            self.unaligned[term.label] = known + len(names)
            for name in names[: max(0, NAMED_SAMPLES - known)]:
                log.warning(
                    "row %s is skipped for %s: no token of the student stands beside one of"
                    " teacher %s (another cut, or text that a tokenizer cannot write)",
                    name,
                    term.label,
                    term.teacher,
                )
            if known < NAMED_SAMPLES <= known + len(names):
                log.warning("further rows skipped for %s are only counted", term.label)

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stood after the last step that was handed out."""
        return {**self._place, "unaligned": dict(self.unaligned)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`; what it counted goes on in the first process alone."""
        self.batches.load_state_dict(state)
        counted = state.get("unaligned", {}) if self.mine.start == 0 else {}
        self.unaligned = {term.label: int(counted.get(term.label, 0)) for term in self.terms}
        self._waiting, self._place = None, self.batches.state_dict()

    def _make(self) -> list[MicroBatch]:
        parts = self.batches.next(self.processes * self.accumulate)
        return [self.prepare(items) for items in parts[self.mine]]

    def prepare(self, items: Sequence[Item]) -> MicroBatch:
        """Views and pairings of a micro-batch; no model runs."""
        samples = [item.sample for item in items]
        channels = tuple(sample.channel for sample in samples)
        collated = self.student.collate([item.encoding for item in items])
        view = replace(collated, channels=channels, **_groups(samples), **_behaviour(items))
        views: dict[str | None, View] = {None: view}
        plain = not any(sample.privileged for sample in samples)
        heard: dict[str, Signals] = {}
        for name, reader in self.readers.items():
            if plain and reader.vocabulary == self.student.vocabulary:
                views[name] = view  # the same tokenizer says the same: encode once
            else:
                own = reader.collate([reader.encode(sample) for sample in samples])
                views[name] = replace(own, channels=channels)
            if getattr(reader, "ahead", False):
                heard[name] = reader.read(views[name], self.wanted[name])
        pairings: list[Pairing] = []
        unaligned: list[list[str]] = []
        for term in self.terms:
            weights = [s.weight if _hears(term, s) else 0.0 for s in samples]
            other = views.get(term.teacher)
            pairing = self._pair(term, views, weights)
            pairing = of_channel(pairing, term.channel, view, other, samples)
            pairing = without_first(pairing, term.skip, view, other)
            unaligned.append(_without_pair(pairing, view, samples, weights))
            if term.teacher is not None:
                pairing = _usable(pairing, heard.get(term.teacher))
            # A mean over rows, say, must not see those that do not count.
            rowwise = getattr(term.objective, "rowwise", False)
            pairings.append(pairing if rowwise else _without_idle(pairing))
        if self.pin:
            views = {name: view.pinned() for name, view in views.items()}
        return MicroBatch(
            views,
            pairings,
            heard,
            tokens=sum(len(item.encoding.ids) for item in items if item.sample.weight > 0),
            unaligned=unaligned,
        )

    def _pair(
        self, term: Term, views: Mapping[str | None, View], weights: Sequence[float]
    ) -> Pairing:
        if term.teacher is None:
            return alone(views[None], weights, unit=term.objective.unit)
        return pair(
            views[None],
            views[term.teacher],
            weights,
            same_vocabulary=self.readers[term.teacher].vocabulary == self.student.vocabulary,
            unit=term.objective.unit,
        )


def _groups(samples: Sequence[Sample]) -> dict[str, Tensor]:
    """What a view knows of groups and scores; nothing where there are none."""
    found: dict[str, Tensor] = {}
    if any(sample.group is not None for sample in samples):
        numbers: dict[Any, int] = {}
        keys = [i if sample.group is None else sample.group for i, sample in enumerate(samples)]
        found["groups"] = torch.tensor([numbers.setdefault(key, len(numbers)) for key in keys])
    if any(sample.score is not None for sample in samples):
        scores = [math.nan if sample.score is None else sample.score for sample in samples]
        found["scores"] = torch.tensor(scores, dtype=torch.float32)
    return found


def _behaviour(items: Sequence[Item]) -> dict[str, Tensor]:
    """The log-probabilities with which the rows of samples were drawn; nothing where none were."""
    if not any(item.sample.written for item in items):
        return {}
    found: list[float] = []
    for item in items:
        rows, written = item.encoding.rows, item.sample.written
        logp = written.logp[:rows] if written else ()
        found += logp if len(logp) == rows else [math.nan] * rows
    return {"behaviour": torch.tensor(found, dtype=torch.float32)}


def _hears(term: Term, sample: Sample) -> bool:
    """Whether a term's channel is that of the sample, or of a part of it."""
    channels = {sample.channel, *(name for _, name in sample.parts)}
    return term.channel is None or term.channel in channels


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


def _without_pair(
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


def _usable(pairing: Pairing, heard: Signals | None) -> Pairing:
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


def _without_idle(pairing: Pairing) -> Pairing:
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
