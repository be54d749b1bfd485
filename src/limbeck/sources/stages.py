"""Sources one after the other, each for so many epochs: easy data first, say, then hard."""

from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import Field

from limbeck.core.errors import RecipeError
from limbeck.core.registry import register
from limbeck.core.types import Sample
from limbeck.sources.dataset import Dataset
from limbeck.sources.files import file_names
from limbeck.sources.held_out import Question, held_out_of, leave_out


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
        opened = [
            # What was generated has ids.
            spec.open(seed, prefix) if isinstance(spec, Dataset) else spec.open(seed)
            for spec, prefix in zip(self.of, _prefixes(self.of), strict=True)
        ]
        return StagesStream(opened, epochs)


def _prefixes(specs: Sequence[Any]) -> list[str]:
    """What the names of rows without an id begin with: the stage's number where another stage has
    a file of the same name. A file that comes twice keeps its names."""
    data = [(spec.path, spec.split) if isinstance(spec, Dataset) else None for spec in specs]
    names = [file_names(one[0]) if one else frozenset[str]() for one in data]

    def clash(place: int) -> bool:
        pairs = zip(data, names, strict=True)
        return any(one != data[place] and own & names[place] for one, own in pairs)

    return [f"{data.index(one)}/" if clash(place) else "" for place, one in enumerate(data)]


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
        self.streams, self.epochs = list(streams), tuple(epochs)
        self.stage, self.drawn = 0, 0
        self.holdout = held_out_of(self.streams)
        self._measure()

    def _measure(self) -> None:
        """Count the rows of each stage."""
        self.ends = [
            count * len(stream) for stream, count in zip(self.streams, self.epochs, strict=False)
        ]
        self.training = _Joined([stream.training for stream in self.streams])

    def leave_out(self, questions: AbstractSet[Question]) -> None:
        """Give no row that asks one of these questions."""
        leave_out(self.streams, questions)
        self._measure()

    def __iter__(self) -> Iterator[Sample]:
        return self

    def __next__(self) -> Sample:
        place = self.stage
        sample: Sample = next(self.streams[place])
        self.drawn += 1
        # At once, so that `stage` is that of the sample to come.
        if place < len(self.ends) and self.drawn >= self.ends[place]:
            self.stage, self.drawn = place + 1, 0
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
