"""The roles that parts play. A part is whatever has these methods; nothing is inherited."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor

from limbeck.core.types import Encoding, Needs, Sample, Sampling, Signals, Unit, View


@runtime_checkable
class Reader(Protocol):
    """Scores given text. `vocabulary` is a fingerprint: equal ones mean the same tokenizer.

    A reader may have more. `ahead` says that it may read before its step is due, beside other work;
    `apart`, that it may do so in a process forked from this one: it uses no device, thread or
    connection then, and what it counts is lost.
    """

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


class Speaking(Reader, Speaker, Protocol):
    """A model that reads, speaks, and can tell how it wrote."""

    def prompt_ids(self, prompt: Sample, prefix: str = "") -> list[int]:
        """Token ids of a prompt and the beginning of an answer."""
        ...

    def write(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        sampling: Sampling,
        shift: Any = None,
    ) -> Sequence[Any]:
        """Continue token ids, each with draws of its own; see `models.writing.Continuation`."""
        ...


class Carried(Protocol):
    """What trains or changes beside the student and is saved with it, such as a critic."""

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Everything that a resumed run needs, by name: the tensors themselves, which a checkpoint
        reads and writes. They are there before the first step. All processes must ask."""
        ...


@runtime_checkable
class Objective(Protocol):
    """Turns what student and teacher say about n paired rows into n losses, in nats.

    It may also have `finish(scene) -> Objective`, called once before training; see `Scene`.

    Attributes:
        asks: Signals it reads of the student.
        needs: Signals it reads of the teacher; empty means that it has no teacher. Before `finish`,
            both may leave out where in the network; a finished module has them as its own.
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


class Network(Reader, Protocol):
    """A reader that one can look into."""

    @property
    def depth(self) -> int:
        """How many decoder layers it has."""
        ...

    def width(self, site: str) -> int:
        """How many numbers a hidden state has at a site (see `core.types.Needs`).

        Raises:
            RecipeError: there is no such site; it names near ones.
        """
        ...

    def heads(self) -> int:
        """How many attention heads a layer has."""
        ...

    def architecture(self) -> str:
        """What transformers calls its kind of network, such as `llama`."""
        ...

    def layer_name(self, layer: int) -> str:
        """The name of a decoder layer in the network, such as `model.layers.3`."""
        ...

    def embedding_name(self) -> str:
        """The name of the input embedding in the network."""
        ...

    @property
    def end_token(self) -> int | None:
        """The id of the token that ends a text; None where the tokenizer has none."""
        ...

    def token_bytes(self) -> Sequence[bytes | None]:
        """The bytes that each token id stands for; None for special tokens and unused columns."""
        ...

    def embeddings(self) -> Tensor:
        """[v, d] its input embeddings, detached."""
        ...

    def attribution(self, view: View, site: str) -> Tensor:
        """[n, d] |d sum of log p(label) / d hidden|, at each row of a view."""
        ...


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What an objective may look at once, before training, to get ready.

    `Objective.finish(scene)` returns the objective that is trained with: with its projectors made
    to measure, its layers chosen, its vocabularies matched. What it computes from data it keeps in
    `folder`, so that a resumed run finds it there.

    Attributes:
        student: the student before training.
        teacher: the one that the objective listens to, where it is a model at hand.
        samples: the first of the training data, as many as an estimate needs.
        seed: for a stream of random numbers (`core.random.stream`).
        folder: where its own files go; it makes the folder, if it has any.
    """

    student: Network
    teacher: Network | None
    samples: Sequence[Sample]
    seed: int
    folder: Path


class SourceSpec(Protocol):
    """What a recipe's `source` is: it opens the stream, and knows the rows held out of it."""

    def open(self, seed: int) -> "Source":
        """Check all rows and start; the same seed gives the same stream."""
        ...


@runtime_checkable
class Source(Protocol):
    """An endless, resumable stream of samples.

    `ahead` says whether samples may be drawn before they are needed, which lets batches group
    them by length; a source that depends on the student's present weights says False. They may
    then be drawn in a process forked from this one, unless the source has `on_step`.

    A source may have more: `bind(student, teachers, mesh)` is called before the first sample is
    drawn, with the models that train and teach (see `Speaking`) and the processes; `on_step` makes
    it a listener, which is told of each step and may add its own figures; `given` is the stream of
    data under it, where it has one. In a run with several processes all draw the same samples.
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
