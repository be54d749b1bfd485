"""What a step needs before any model runs, made one step ahead in another thread.

Tokenizing, padding, pairing rows and reading a cached teacher take no part of the model's time
then. The thread draws from the source, so its place in the stream is that of the last step handed
out, not of the one that waits.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.profiler import record_function

from limbeck.align.spans import alone, pair
from limbeck.core.protocols import Reader
from limbeck.core.term import Term
from limbeck.core.types import Needs, Pairing, Signals, View
from limbeck.train.batches import Batches, Item


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass works on.

    Attributes:
        views: each participant's view, by name; None is the student.
        pairings: one for each term.
        heard: signals of teachers that need no model, such as a cache.
        tokens: of the student's view, without padding and spare copies.
    """

    views: Mapping[str | None, View]
    pairings: Sequence[Pairing]
    heard: Mapping[str, Signals]
    tokens: int


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
        self._waiting: Future[list[MicroBatch]] | None = None
        self._place = batches.state_dict()

    @record_function("limbeck.prepare")
    def next(self, *, more: bool) -> list[MicroBatch]:
        """The next step's micro-batches; `more` says that another step will follow."""
        made = self._make() if self._waiting is None else self._waiting.result()
        self._waiting, self._place = None, self.batches.state_dict()
        if more and self.batches.source.ahead:
            self._waiting = self.thread.submit(self._make)
        return made

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stood after the last step that was handed out."""
        return self._place

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`."""
        self.batches.load_state_dict(state)
        self._waiting, self._place = None, self.batches.state_dict()

    def _make(self) -> list[MicroBatch]:
        parts = self.batches.next(self.processes * self.accumulate)
        return [self.prepare(items) for items in parts[self.mine]]

    def prepare(self, items: Sequence[Item]) -> MicroBatch:
        """Views and pairings of a micro-batch; no model runs."""
        samples = [item.sample for item in items]
        view = self.student.collate([item.encoding for item in items])
        views: dict[str | None, View] = {None: view}
        plain = not any(sample.privileged for sample in samples)
        heard: dict[str, Signals] = {}
        for name, reader in self.readers.items():
            if plain and reader.vocabulary == self.student.vocabulary:
                views[name] = view  # the same tokenizer says the same: encode once
            else:
                views[name] = reader.collate([reader.encode(sample) for sample in samples])
            if getattr(reader, "ahead", False):
                heard[name] = reader.read(views[name], self.wanted[name])
        pairings: list[Pairing] = []
        for term in self.terms:
            weights = [s.weight if term.channel in (None, s.channel) else 0.0 for s in samples]
            if term.teacher is None:
                pairings.append(alone(view, weights))
                continue
            same = self.readers[term.teacher].vocabulary == self.student.vocabulary
            unit = term.objective.unit
            pairing = pair(view, views[term.teacher], weights, same_vocabulary=same, unit=unit)
            pairings.append(_usable(pairing, heard.get(term.teacher)))
        if self.pin:
            views = {name: view.pinned() for name, view in views.items()}
        return MicroBatch(
            views,
            pairings,
            heard,
            tokens=sum(len(item.encoding.ids) for item in items if item.sample.weight > 0),
        )


def _usable(pairing: Pairing, heard: Signals | None) -> Pairing:
    """Without the rows that the teacher has nothing to say about: they must not be counted."""
    if heard is None or heard.valid is None:
        return pairing
    valid = heard.valid if pairing.teacher is None else heard.valid[pairing.teacher]
    return replace(pairing, weight=torch.where(valid.cpu(), pairing.weight, 0.0))
