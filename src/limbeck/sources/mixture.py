"""Several sources at once, each with its share: new rows with a few of the old ones, say."""

from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field

from limbeck.core.errors import RecipeError
from limbeck.core.random import stream
from limbeck.core.registry import register
from limbeck.core.types import Sample
from limbeck.sources.held_out import Question, held_out_of, leave_out


@register("source", "mixture")
@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Samples of several sources; which one the next comes from is drawn by their shares.

    What one of them holds out is not trained on in any of them: rows of a held-out prompt are left
    out everywhere, with all of their group.

    Attributes:
        of: the sources.
        shares: of the samples (groups count as one) that each gives; divided by their sum. Equal
            ones where nothing is said.
    """

    parts: ClassVar[dict[str, str]] = {"of": "sources"}

    of: tuple[Any, ...]
    shares: tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...] = ()

    def __post_init__(self) -> None:
        if not self.of:
            raise RecipeError("of", "there is no source; give two or more")
        if self.shares and len(self.shares) != len(self.of):
            raise RecipeError(
                "shares", f"has {len(self.shares)} numbers for {len(self.of)} sources"
            )

    def open(self, seed: int) -> "MixtureStream":
        """Open all of them with the same seed, so that equal files hold out equal rows.

        Raises:
            DataError: a source cannot be read, or all of its rows are held out.
        """
        shares = self.shares or (1.0,) * len(self.of)
        return MixtureStream([spec.open(seed) for spec in self.of], shares, seed)


class MixtureStream:
    """Endless samples; see `Mixture`."""

    def __init__(self, streams: Sequence[Any], shares: Sequence[float], seed: int) -> None:
        self.streams, self.seed = list(streams), seed
        self.bounds = torch.tensor(shares, dtype=torch.float64).cumsum(0) / sum(shares)
        self.ahead = all(stream.ahead for stream in streams)
        self.holdout = held_out_of(self.streams)
        self.drawn = 0
        self.inside: int | None = None  # whose group is being given
        # Only where a part looks on: what does not may be drawn in another process.
        self._lookers = [stream for stream in streams if hasattr(stream, "on_step")]
        if self._lookers:
            self.on_step = self._tell

    def __iter__(self) -> Iterator[Sample]:
        return self

    def __next__(self) -> Sample:
        if self.inside is None:
            generator = stream(self.seed, "mixture", self.drawn)
            number = torch.rand((), generator=generator, dtype=torch.float64)
            place = int(torch.searchsorted(self.bounds, number, right=True))
            self.inside = min(place, len(self.streams) - 1)
            self.drawn += 1
        place = self.inside
        sample: Sample = next(self.streams[place])
        if not sample.siblings:
            self.inside = None
        return sample

    def leave_out(self, questions: AbstractSet[Question]) -> None:
        """Give no row that asks one of these questions."""
        leave_out(self.streams, questions)

    def bind(self, student: Any, teachers: Mapping[str, Any], mesh: Any = None) -> None:
        """Pass on who writes."""
        for inner in self.streams:
            if hasattr(inner, "bind"):
                inner.bind(student, teachers, mesh)

    def _tell(self, step: Any) -> None:
        """Pass on what step it is."""
        for inner in self._lookers:
            inner.on_step(step)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """What changes in its parts; see `core.protocols.Carried`."""
        for place, inner in enumerate(self.streams):
            if hasattr(inner, "tensors"):
                yield from ((f"{place}/{name}", value) for name, value in inner.tensors())

    def state_dict(self) -> dict[str, Any]:
        """How many were drawn, and where each source stands."""
        inner = [each.state_dict() for each in self.streams]
        return {"drawn": self.drawn, "inside": self.inside, "of": inner}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`."""
        self.drawn, self.inside = int(state["drawn"]), state["inside"]
        for each, inner in zip(self.streams, state["of"], strict=True):
            each.load_state_dict(inner)
