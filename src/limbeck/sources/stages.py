"""Sources one after the other, each for so many epochs: easy data first, say, then hard."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import Field

from limbeck.core.errors import DataError, RecipeError
from limbeck.core.registry import register
from limbeck.core.types import Sample, Turn

Text = tuple[Turn, ...]


@register("source", "stages")
@dataclass(frozen=True, kw_only=True)
class Stages:
    """Several sources of given rows, one after the other; the last one has no end.

    What one of them holds out is not trained on in any of them: rows of a held-out prompt are left
    out everywhere, with all of their group.

    Attributes:
        of: the sources, in their order.
        epochs: how often the rows of each but the last are visited, once each where nothing is
            said.

    Source: the temperature schedule of Yan et al., "DASD" (arXiv 2601.09088), which trains on what
        the teacher wrote at a low temperature first, then on what it wrote at a high one.
    """

    ahead: ClassVar[bool] = True
    parts: ClassVar[dict[str, str]] = {"of": "sources"}

    of: tuple[Any, ...]
    epochs: tuple[Annotated[int, Field(gt=0)], ...] = ()

    def __post_init__(self) -> None:
        if not self.of:
            raise RecipeError("of", "there is no source; give one or more")
        others = len(self.of) - 1
        if self.epochs and len(self.epochs) != others:
            raise RecipeError(
                "epochs",
                f"has {len(self.epochs)} numbers for {len(self.of)} sources; give {others}, since"
                " the last one has no end",
            )
        for index, spec in enumerate(self.of):
            if not getattr(spec, "ahead", False):
                raise RecipeError(
                    f"of.{index}",
                    f"{getattr(spec, 'kind', 'it')} makes its rows while the student trains, and"
                    " only given rows can be a stage",
                )

    def open(self, seed: int) -> "StagesStream":
        """Open all of them with the same seed, so that equal files hold out equal rows.

        Raises:
            DataError: a source cannot be read, or all of its rows are held out.
        """
        epochs = self.epochs or (1,) * (len(self.of) - 1)
        return StagesStream([spec.open(seed) for spec in self.of], epochs)


class StagesStream:
    """Endless samples; see `Stages`.

    Args:
        streams: with a length (rows of an epoch) and `training`, as those of data sets.
        epochs: of each but the last.

    Attributes:
        stage: which source the next sample comes from, from 0.
        holdout: the samples that any of them holds out, each prompt's once.
        training: every sample that is trained on, stage by stage.
    """

    ahead = True

    def __init__(self, streams: Sequence[Any], epochs: Sequence[int]) -> None:
        self.streams = list(streams)
        self.ends = [
            count * len(stream) for stream, count in zip(self.streams, epochs, strict=False)
        ]
        self.stage, self.drawn = 0, 0
        held: dict[tuple[Text, str | None], Sample] = {}
        for stream in self.streams:
            for sample in stream.holdout:
                held.setdefault((_asked(sample), sample.completion), sample)
        self.holdout = list(held.values())
        self._held = {_asked(sample) for sample in self.holdout}
        # Groups are left out whole: a step never parts one.
        self._groups: list[set[str]] = [set() for _ in self.streams]
        self.training = _Joined([self._kept(place) for place in range(len(self.streams))])

    def _kept(self, place: int) -> "_Some":
        """The rows of a stage that are trained on."""
        rows: Sequence[Sample] = self.streams[place].training
        if not self._held:
            return _Some(rows, np.arange(len(rows)))
        groups = self._groups[place]
        flags = np.zeros(len(rows), dtype=np.bool_)
        names: list[str | None] = []
        for index in range(len(rows)):
            sample = rows[index]
            names.append(sample.group)
            flags[index] = _asked(sample) in self._held
            if flags[index] and sample.group is not None:
                groups.add(sample.group)
        flags |= np.array([name is not None and name in groups for name in names], dtype=np.bool_)
        if flags.all():
            raise DataError(
                f"all {len(rows)} rows of stage {place} are held out, by it or another stage; lower"
                " `holdout`, or name a file of held-out rows"
            )
        return _Some(rows, (~flags).nonzero()[0])

    def __iter__(self) -> Iterator[Sample]:
        return self

    def __next__(self) -> Sample:
        while True:
            place = self.stage
            sample: Sample = next(self.streams[place])
            self.drawn += 1
            # At once, so that `stage` is that of the sample to come.
            if place < len(self.ends) and self.drawn == self.ends[place]:
                self.stage, self.drawn = place + 1, 0
            out = sample.group in self._groups[place] or _asked(sample) in self._held
            if not out:
                return sample

    def state_dict(self) -> dict[str, Any]:
        """Which stage it is, how many of its rows are drawn, and where each source stands."""
        inner = [stream.state_dict() for stream in self.streams]
        return {"stage": self.stage, "drawn": self.drawn, "of": inner}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`."""
        self.stage, self.drawn = int(state["stage"]), int(state["drawn"])
        for stream, inner in zip(self.streams, state["of"], strict=True):
            stream.load_state_dict(inner)


def _asked(sample: Sample) -> Text:
    """What makes two samples the same question: the prompt, or the whole of a plain text."""
    return sample.prompt or sample.turns


class _Some(Sequence[Sample]):
    """Some of a sequence's samples, read when they are asked for."""

    def __init__(self, samples: Sequence[Sample], places: Any) -> None:
        self.samples, self.places = samples, places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self.samples[int(place)] for place in self.places[index]]
        return self.samples[int(self.places[index])]


class _Joined(Sequence[Sample]):
    """Sequences one after the other."""

    def __init__(self, parts: Sequence[Sequence[Sample]]) -> None:
        self.parts = parts
        self.starts = np.cumsum([0, *(len(part) for part in parts)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        place = index + len(self) if index < 0 else index
        if not 0 <= place < len(self):
            raise IndexError(index)
        part = int(np.searchsorted(self.starts, place, side="right")) - 1
        return self.parts[part][int(place - self.starts[part])]
