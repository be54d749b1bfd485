"""What a step needs before any model runs, made ahead in another process or in a thread.

Tokenizing, padding, pairing rows and reading a cached teacher take no part of the model's time
then. What draws from the source is ahead of the loop, so its place in the stream comes with each
step that is handed out.
"""

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from limbeck.align.spans import alone, pair
from limbeck.core.protocols import Reader, Source
from limbeck.core.term import Term
from limbeck.core.types import Needs, Pairing, Sample, Signals, View, numbered
from limbeck.losses.projection import Projection
from limbeck.train.batches import Batches, Item
from limbeck.train.phases import phase
from limbeck.train.rows import of_channel, usable, without_first, without_idle, without_pair
from limbeck.train.worker import Worker, WorkerDied, can_work_beside, cores

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


@dataclass(frozen=True)
class Prepared:
    """A step that can be taken.

    Attributes:
        micros: this process's micro-batches.
        place: `Batches.state_dict` behind this step; None where the source moves on with the
            training, so that only the batches themselves know it.
        truncated_tokens, dropped_samples: of `Batches`, until now.
    """

    micros: list[MicroBatch]
    place: Mapping[str, Any] | None
    truncated_tokens: int
    dropped_samples: int


class Preparation:
    """Makes each step's micro-batches.

    They are made ahead where the source allows it: in a process beside this one, or in a thread if
    something that they need is bound to this one. On one core that has nothing to wait for they are
    made when they are due: a thread would only take turns with the loop.

    Args:
        student: tokenizes for itself, and for teachers with the same tokenizer.
        readers: the teachers by name.
        terms: for which rows are paired.
        batches: what the samples come from.
        wanted: what is asked of each teacher.
        rank, processes, accumulate: which micro-batches of a step are this process's.
        pin: hold tensors in memory that a GPU can copy from while it computes.
        changing: gives the tensors that training changes; nothing is prepared of them.

    Attributes:
        unaligned: by a term's label, samples so far that the term could not learn from, because no
            row of the student stands beside one of the teacher; of this process.
        truncated_tokens, dropped_samples: of `Batches`, up to the last step that was handed out.
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
        changing: Callable[[], Iterable[Tensor]] = tuple,
    ) -> None:
        self.student, self.readers, self.terms, self.batches = student, readers, terms, batches
        self.wanted, self.processes, self.accumulate, self.pin = wanted, processes, accumulate, pin
        self.changing = changing
        self.mine = slice(rank * accumulate, (rank + 1) * accumulate)
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="prepare")
        self.unaligned = {term.label: 0 for term in terms}
        movable = _movable(batches.source, readers.values())
        self.apart = can_work_beside() and movable
        waits = pin or not movable or cores() > 1
        self.threaded = batches.source.ahead and waits
        self._start()

    def _start(self) -> None:
        """Stand where the batches stand, with nothing made."""
        self._waiting: Future[Prepared] | None = None
        self._worker: Worker | None = None
        self._place: Mapping[str, Any] | None = self.batches.state_dict()
        self.truncated_tokens = self.batches.truncated_tokens
        self.dropped_samples = self.batches.dropped_samples

    @phase("limbeck.prepare")
    def next(self, *, more: bool) -> list[MicroBatch]:
        """The next step's micro-batches; `more` says that another step will follow."""
        if more and self.apart and self._worker is None:
            self._fork()
        self._place = self._standing()  # here it stays, should the step not come about
        made = self._take() if self._waiting is None else self._waiting.result()
        self._waiting, self._place = None, made.place
        self.truncated_tokens = made.truncated_tokens
        self.dropped_samples = made.dropped_samples
        # Of what another process has made, a thread need only spare the loop the pinning.
        if more and self.threaded and (self._worker is None or self.pin):
            self._waiting = self.thread.submit(self._take)
        for micro in made.micros:
            self._count(micro.unaligned)
        return made.micros

    def close(self) -> None:
        """Let go of what is made ahead, and of the process that makes it."""
        if self._waiting is not None:
            self._waiting.cancel()
        worker, self._waiting, self._worker = self._worker, None, None
        if worker is not None:
            worker.close()

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
        """Where the next step begins: behind the last one that was handed out."""
        return {**self._standing(), "unaligned": dict(self.unaligned)}

    def _standing(self) -> Mapping[str, Any]:
        return self.batches.state_dict() if self._place is None else self._place

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`; what it counted goes on in the first process alone."""
        self.close()
        self.batches.load_state_dict(state)
        counted = state.get("unaligned", {}) if self.mine.start == 0 else {}
        self.unaligned = {term.label: int(counted.get(term.label, 0)) for term in self.terms}
        self._start()

    def _fork(self) -> None:
        try:
            self._worker = Worker(self.make, unneeded=self.changing())
        except OSError as error:
            log.info("no process can be made (%s); steps are prepared in a thread", error)
            self.apart = False

    def _take(self) -> Prepared:
        """The next step, from whoever makes them."""
        made = None if self._worker is None else self._from(self._worker)
        if made is None:
            made = self.make()
        return replace(made, micros=_pinned(made.micros)) if self.pin else made

    def _from(self, worker: Worker) -> Prepared | None:
        """The process's next step; None where it has died, and the work goes on in this one."""
        try:
            return worker.next()
        except WorkerDied as died:
            if self._worker is not worker:
                raise  # it was closed while a thread waited for it
            log.warning("the process that prepares steps ended (%s); this one goes on", died)
            self._worker, self.apart = None, False
            self.batches.load_state_dict(self._standing())
            return None

    def make(self) -> Prepared:
        """Draw the next step from the batches, and prepare it."""
        parts = self.batches.next(self.processes * self.accumulate)
        return Prepared(
            [self.prepare(items) for items in parts[self.mine]],
            place=self.batches.state_dict() if self.batches.source.ahead else None,
            truncated_tokens=self.batches.truncated_tokens,
            dropped_samples=self.batches.dropped_samples,
        )

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
            unaligned.append(without_pair(pairing, view, samples, weights))
            if term.teacher is not None:
                pairing = usable(pairing, heard.get(term.teacher))
            # A mean over rows, say, must not see those that do not count.
            rowwise = getattr(term.objective, "rowwise", False)
            pairings.append(pairing if rowwise else without_idle(pairing))
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


def _movable(source: Source, readers: Iterable[Reader]) -> bool:
    """Whether steps can be made in another process: nothing that they need is bound to this one.

    A source may follow the training, and a teacher that is read ahead may be a server, whose
    connections, money and ledger are this process's.
    """
    follows = not source.ahead or hasattr(source, "on_step")
    read = [reader for reader in readers if getattr(reader, "ahead", False)]
    return not follows and all(getattr(reader, "apart", False) for reader in read)


def _pinned(value: Any) -> Any:
    """The same in memory that a GPU can copy from while it computes; an output head stays."""
    if isinstance(value, Tensor):
        return value.pin_memory() if value.device.type == "cpu" else value
    if is_dataclass(value) and not isinstance(value, Projection | type):
        parts = {field.name: getattr(value, field.name) for field in fields(value) if field.init}
        return replace(value, **{name: _pinned(part) for name, part in parts.items()})
    if isinstance(value, Mapping):
        return {key: _pinned(part) for key, part in value.items()}
    return [_pinned(part) for part in value] if isinstance(value, list) else value


def _groups(samples: Sequence[Sample]) -> dict[str, Tensor]:
    """What a view knows of groups and scores; nothing where there are none."""
    found: dict[str, Tensor] = {}
    if any(sample.group is not None for sample in samples):
        found["groups"] = torch.tensor(numbered(sample.group for sample in samples))
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
