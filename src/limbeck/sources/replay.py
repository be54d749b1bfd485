"""Samples as JSON, and a buffer of those that were written a while ago."""

from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import torch
from pydantic import ConfigDict, Field

from limbeck.core.types import Sample, Turn, Written


def to_json(sample: Sample) -> dict[str, Any]:
    """Everything of a sample as JSON values, without what has its default."""
    empty = Sample(id="", turns=())
    return {
        name: value
        for name, value in asdict(sample).items()
        if name in ("id", "turns") or value != getattr(empty, name)
    }


def from_json(values: Mapping[str, Any]) -> Sample:
    """The sample of which `to_json` made these values."""

    def turns(listed: Any) -> tuple[Turn, ...]:
        return tuple(Turn(**turn) for turn in listed)

    kept: dict[str, Any] = dict(values)
    kept["turns"] = turns(values["turns"])
    kept["privileged"] = turns(values.get("privileged", ()))
    kept["parts"] = tuple((int(start), name) for start, name in values.get("parts", ()))
    if values.get("written") is not None:
        written = values["written"]
        kept["written"] = Written(
            vocabulary=written["vocabulary"],
            ids=tuple(written["ids"]),
            logp=tuple(written["logp"]),
        )
    return Sample(**kept)


@dataclass(frozen=True, kw_only=True)
class Replay:
    """How samples are used again.

    Attributes:
        size: most samples in the buffer; the oldest leave first.
        share: of the student's samples that come from the buffer, once it holds some.
        age_steps: a sample that was written more steps ago is not used again.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    size: Annotated[int, Field(gt=0)] = 1024
    share: Annotated[float, Field(ge=0, lt=1)] = 0.5
    age_steps: Annotated[int, Field(gt=0)] = 200


class Buffer:
    """Groups of samples, each with the step at which it was written."""

    def __init__(self, replay: Replay) -> None:
        self.replay = replay
        self.kept: deque[tuple[int, list[Sample]]] = deque()

    def __len__(self) -> int:
        return sum(len(group) for _, group in self.kept)

    def add(self, step: int, group: list[Sample]) -> None:
        """Keep a group; the oldest make room."""
        self.kept.append((step, group))
        while len(self) > self.replay.size and len(self.kept) > 1:
            self.kept.popleft()

    def draw(self, step: int, generator: torch.Generator) -> tuple[int, list[Sample]] | None:
        """A group and the step at which it was written; None where none is young enough."""
        while self.kept and step - self.kept[0][0] > self.replay.age_steps:
            self.kept.popleft()
        if not self.kept:
            return None
        return self.kept[int(torch.randint(len(self.kept), (), generator=generator))]

    def state_dict(self) -> list[Any]:
        """The groups as JSON values."""
        return [[step, [to_json(sample) for sample in group]] for step, group in self.kept]

    def load_state_dict(self, state: list[Any]) -> None:
        """Continue from a `state_dict`."""
        self.kept = deque(
            (int(step), [from_json(sample) for sample in group]) for step, group in state
        )
