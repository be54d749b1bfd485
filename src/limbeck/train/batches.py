"""From a stream of samples to the micro-batches of each step.

A step holds about `batch_tokens` tokens however it is laid out: the same samples are dealt to
ranks and micro-batches, so more processes or more accumulation change nothing but the speed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from limbeck.core.errors import DataError
from limbeck.core.protocols import Reader, Source
from limbeck.core.random import stream
from limbeck.core.types import Encoding, Sample

WINDOW_STEPS = 16
"""Steps whose samples are drawn together and sorted, so that a step holds similar lengths."""

PATIENCE_SAMPLES = 1000
"""Unusable samples in a row after which the data is called useless."""


@dataclass(frozen=True, slots=True)
class Item:
    """A sample and the student's encoding of it."""

    sample: Sample
    encoding: Encoding


Bundle = list[Item]
"""A sample, or all samples of a group: what a step never parts."""


class Batches:
    """Steps of about `batch_tokens` tokens each, resumable between any two of them.

    Args:
        source: where samples come from.
        student: encodes them; its lengths count.
        batch_tokens: tokens of a step over all ranks and micro-batches, without padding.
        seed: of the order of steps within a window.

    Attributes:
        truncated_tokens: tokens cut from samples so far.
        dropped_samples: samples so far that had nothing learnt after the cut.
    """

    def __init__(self, source: Source, student: Reader, batch_tokens: int, seed: int) -> None:
        self.source, self.student = source, student
        self.batch_tokens, self.seed = batch_tokens, seed
        self.window_steps = WINDOW_STEPS if source.ahead else 1
        self.window, self.position = 0, 0
        self.truncated_tokens, self.dropped_samples, self._useless = 0, 0, 0
        self._steps: list[list[Bundle]] = []
        self._before = self._mark()

    def next(self, parts: int) -> list[list[Item]]:
        """The next step's items in `parts` micro-batches of about equal size.

        A part that would be empty gets a copy with weight 0, since every rank must run.
        """
        if self.position == len(self._steps):
            self._before = self._mark()
            self._fill()
        items = self._steps[self.position]
        self.position += 1
        first = next(item for bundle in items for item in bundle)
        spare = replace(first, sample=replace(first.sample, weight=0.0, group=None))
        return [_flat(part) or [spare] for part in _cut(items, parts)]

    def state_dict(self) -> dict[str, Any]:
        """The stream's state before the current window, and the steps taken since.

        Behind the last step of a window that is the state now: what a source made with weights that
        are gone cannot be made again.
        """
        if self.position == len(self._steps):
            return {**self._mark(), "position": 0}
        return {**self._before, "position": self.position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`; the window is drawn again, which gives the same steps."""
        self.source.load_state_dict(state["source"])
        self.window = int(state["window"])
        self.truncated_tokens = int(state["truncated_tokens"])
        self.dropped_samples = int(state["dropped_samples"])
        self._steps, self.position, self._before = [], 0, self._mark()
        if state["position"]:
            self._fill()
            self.position = int(state["position"])

    def _mark(self) -> dict[str, Any]:
        return {
            "source": self.source.state_dict(),
            "window": self.window,
            "truncated_tokens": self.truncated_tokens,
            "dropped_samples": self.dropped_samples,
        }

    def _fill(self) -> None:
        bundles: list[Bundle] = []
        tokens = 0
        while tokens < self.window_steps * self.batch_tokens:
            if bundle := self._bundle():
                bundles.append(bundle)
                tokens += _length(bundle)
        bundles.sort(key=lambda bundle: _length(bundle) / len(bundle))
        steps = [step for step in _cut(bundles, self.window_steps) if step]
        order = torch.randperm(len(steps), generator=stream(self.seed, "steps", self.window))
        self._steps = [steps[int(index)] for index in order]
        self.window, self.position = self.window + 1, 0

    def _bundle(self) -> Bundle:
        """The next sample and all that belong with it, as far as there is something to learn."""
        items: Bundle = []
        more = True
        while more:
            sample = next(self.source)
            more = sample.siblings > 0
            # What is privileged only a teacher may read.
            ours = replace(sample, privileged=()) if sample.privileged else sample
            encoding = self.student.encode(ours)
            self.truncated_tokens += encoding.truncated
            if encoding.rows:
                items.append(Item(sample, encoding))
                self._useless = 0
                continue
            self.dropped_samples += 1
            self._useless += 1
            if self._useless == PATIENCE_SAMPLES:
                raise DataError(
                    f"no token to learn in {self._useless:,} samples in a row (the last:"
                    f" {sample.id}, {encoding.truncated:,} tokens cut); raise student.max_length,"
                    " or check that the rows have a completion"
                )
        return items


def _cut(bundles: Sequence[Bundle], parts: int) -> list[list[Bundle]]:
    """Consecutive parts with about equal numbers of tokens; some may be empty."""
    total = sum(map(_length, bundles))
    result: list[list[Bundle]] = [[] for _ in range(parts)]
    before = 0
    for bundle in bundles:
        length = _length(bundle)
        middle = before + length / 2  # a bundle goes to the part that holds its middle
        result[min(int(middle * parts / total), parts - 1)].append(bundle)
        before += length
    return result


def _length(bundle: Bundle) -> int:
    return sum(len(item.encoding.ids) for item in bundle)


def _flat(bundles: Sequence[Bundle]) -> list[Item]:
    return [item for bundle in bundles for item in bundle]
