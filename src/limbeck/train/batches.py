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
        self.truncated_tokens, self.dropped_samples = 0, 0
        self._steps: list[list[Item]] = []
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
        spare = replace(items[0], sample=replace(items[0].sample, weight=0.0))
        return [part or [spare] for part in _cut(items, parts)]

    def state_dict(self) -> dict[str, Any]:
        """The stream's state before the current window, and the steps taken since."""
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
        items: list[Item] = []
        tokens, useless = 0, 0
        while tokens < self.window_steps * self.batch_tokens:
            sample = next(self.source)
            # What is privileged only a teacher may read.
            encoding = self.student.encode(replace(sample, privileged=()))
            self.truncated_tokens += encoding.truncated
            if not encoding.rows:
                self.dropped_samples += 1
                useless += 1
                if useless == PATIENCE_SAMPLES:
                    raise DataError(
                        f"no token to learn in {useless:,} samples in a row (the last: {sample.id},"
                        f" {encoding.truncated:,} tokens cut); raise student.max_length, or check"
                        " that the rows have a completion"
                    )
                continue
            useless = 0
            items.append(Item(sample, encoding))
            tokens += len(encoding.ids)
        items.sort(key=lambda item: len(item.encoding.ids))
        steps = [step for step in _cut(items, self.window_steps) if step]
        order = torch.randperm(len(steps), generator=stream(self.seed, "steps", self.window))
        self._steps = [steps[int(index)] for index in order]
        self.window, self.position = self.window + 1, 0


def _cut(items: Sequence[Item], parts: int) -> list[list[Item]]:
    """Consecutive parts with about equal numbers of tokens; some may be empty."""
    total = sum(len(item.encoding.ids) for item in items)
    result: list[list[Item]] = [[] for _ in range(parts)]
    before = 0
    for item in items:
        length = len(item.encoding.ids)
        middle = before + length / 2  # an item goes to the part that holds its middle
        result[min(int(middle * parts / total), parts - 1)].append(item)
        before += length
    return result
