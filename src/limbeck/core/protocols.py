"""The roles that parts play. A part is whatever has these methods; nothing is inherited."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor

from limbeck.core.types import Encoding, Needs, Sample, Sampling, Signals, Unit, View


@runtime_checkable
class Reader(Protocol):
    """Scores given text. `vocabulary` is a fingerprint: equal ones mean the same tokenizer."""

    name: str
    vocabulary: str

    @property
    def offers(self) -> Needs:
        """All signals it can give."""
        ...

    def encode(self, sample: Sample) -> Encoding:
        """Tokenize one sample; truncation is counted in the result."""
        ...

    def collate(self, encodings: Sequence[Encoding]) -> View:
        """Pad encodings into one batch."""
        ...

    def read(self, view: View, needs: Needs) -> Signals:
        """Say what `needs` asks about every row of `view`."""
        ...


@runtime_checkable
class Speaker(Protocol):
    """Writes text."""

    def speak(self, prompts: Sequence[Sample], sampling: Sampling) -> list[str]:
        """One completion for each prompt, in order."""
        ...


@runtime_checkable
class Objective(Protocol):
    """Turns what student and teacher say about n paired rows into n losses, in nats.

    Attributes:
        asks: Signals it reads of the student.
        needs: Signals it reads of the teacher; empty means that it has no teacher.
        unit: what a row is.
        rowwise: (may be absent, then False) True where a row's loss depends on that row alone, so
            that a few rows may be asked for at a time and logits need not all be made.
        shared_vocabulary: True where row i is compared token by token, so that both models must
            have the same tokenizer.
    """

    asks: ClassVar[Needs]
    needs: ClassVar[Needs]
    unit: ClassVar[Unit]
    shared_vocabulary: ClassVar[bool]

    def __call__(self, student: Signals, teacher: Signals) -> Tensor:
        """[n] losses."""
        ...


class SourceSpec(Protocol):
    """What a recipe's `source` is: it opens the stream, and knows the rows held out of it."""

    def open(self, seed: int) -> "Source":
        """Check all rows and start; the same seed gives the same stream."""
        ...


@runtime_checkable
class Source(Protocol):
    """An endless, resumable stream of samples.

    `ahead` says whether samples may be drawn before they are needed, which lets batches group
    them by length; a source that depends on the student's present weights says False.
    """

    ahead: bool
    holdout: list[Sample]

    def __iter__(self) -> Iterator[Sample]: ...

    def __next__(self) -> Sample: ...

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, as JSON values."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`."""
        ...
