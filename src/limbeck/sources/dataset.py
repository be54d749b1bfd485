"""Samples from files or the hub, shuffled anew each epoch, resumable at any row."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field

from limbeck.core.errors import DataError
from limbeck.core.random import stream
from limbeck.core.registry import register
from limbeck.core.text import is_whole
from limbeck.core.types import Sample, Turn
from limbeck.sources.files import Rows, open_rows

RATIONALE, ANSWER = "rationale", "answer"
"""Channels of the two parts of a row that has a rationale."""

Column = Literal[
    "prompt",
    "completion",
    "messages",
    "text",
    "rationale",
    "privileged",
    "id",
    "weight",
    "channel",
    "group",
    "score",
    "answer",
]
"""What is read of a row."""

FORMS = ("messages", "prompt", "text")
"""Columns by which the three forms of a row are told; the first that holds something counts."""

HOLDOUT_SHARE = 0.1
"""At most this share of the rows is held out when `holdout` is a number."""


@register("source", "dataset")
@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Rows of `{prompt, completion}`, `{messages}` or `{text}` from a file, a folder or the hub.

    Attributes:
        path: a .jsonl or .parquet file, a folder of them, or a hub id.
        split: which split of a hub dataset.
        columns: renames, such as `{prompt: question, completion: answer}`.
        holdout: how many rows to keep from training for evaluation (at most a tenth), or the
            path of a file of held-out rows.
    """

    ahead: ClassVar[bool] = True

    path: str
    split: str = "train"
    columns: Mapping[Column, str] = field(default_factory=dict[Column, str])
    holdout: Annotated[int, Field(ge=0)] | str = 64

    def open(self, seed: int) -> "DatasetStream":
        """Read and check every row, set the held-out rows aside, and start the stream.

        Raises:
            DataError: a row is malformed (the message names file and line), or there is none.
        """
        return open_samples(
            Samples(open_rows(self.path, self.split), self.columns),
            self.holdout
            if isinstance(self.holdout, int)
            else Samples(open_rows(self.holdout, self.split), self.columns),
            seed,
        )


def open_samples(
    samples: "Samples", holdout: "int | Sequence[Sample]", seed: int
) -> "DatasetStream":
    """A stream of these samples without those that are held out.

    Args:
        samples: all of them.
        holdout: how many to hold out (at most a tenth; groups are not parted), or other samples.
        seed: of the choice and of the order.
    """
    if not isinstance(holdout, int):
        return DatasetStream(
            samples, torch.arange(len(samples)), list(holdout), seed, samples.bundles
        )
    count = min(holdout, int(len(samples) * HOLDOUT_SHARE))
    order = torch.randperm(len(samples), generator=stream(seed, "holdout"))
    held, rows = order[:count], order[count:]
    if samples.bundles is not None:  # whoever has a held-out sibling is held out too
        out = torch.isin(samples.bundles, samples.bundles[held])
        held, rows = (flags.nonzero().flatten() for flags in (out, ~out))
        if not len(rows):
            raise DataError(
                f"all {len(samples)} rows are held out, because rows of one group stay together;"
                " set `holdout: 0`, or name a file of held-out rows"
            )
    chosen = [samples[int(index)] for index in held.sort().values]
    return DatasetStream(samples, rows.sort().values, chosen, seed, samples.bundles)


class DatasetStream:
    """Endless samples; epoch e visits the rows in the order drawn from (seed, e).

    Args:
        samples: all that there are.
        rows: the indices of those to visit.
        holdout: the others, or some from elsewhere.
        seed: of the order.
        bundles: [samples] a number that the rows of a group share, which are visited one after the
            other; None where there are no groups.
    """

    ahead = True

    def __init__(
        self,
        samples: Sequence[Sample],
        rows: torch.Tensor,
        holdout: list[Sample],
        seed: int,
        bundles: torch.Tensor | None = None,
    ) -> None:
        self.samples, self.rows, self.holdout, self.seed = samples, rows, holdout, seed
        self.bundles = bundles
        self.epoch, self.index = 0, 0
        self._order = self._shuffled()

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def training(self) -> Sequence[Sample]:
        """Every sample of an epoch once, in the order of the rows; the stream does not move."""
        return _Picked(self.samples, self.rows)

    def __iter__(self) -> Iterator[Sample]:
        return self

    def __next__(self) -> Sample:
        if self.index == len(self._order):
            self.epoch, self.index = self.epoch + 1, 0
            self._order = self._shuffled()
        sample = self.samples[int(self._order[self.index])]
        if self.bundles is not None and sample.group is not None:
            sample = replace(sample, siblings=self._siblings(self.index))
        self.index += 1
        return sample

    def _siblings(self, index: int) -> int:
        """How many rows of the same group follow."""
        assert self.bundles is not None
        own, last = self.bundles[self._order[index]], index
        while last + 1 < len(self._order) and self.bundles[self._order[last + 1]] == own:
            last += 1
        return last - index

    def state_dict(self) -> dict[str, Any]:
        """Epoch and row within it."""
        return {"epoch": self.epoch, "index": self.index}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`."""
        self.epoch, self.index = int(state["epoch"]), int(state["index"])
        self._order = self._shuffled()

    def _shuffled(self) -> torch.Tensor:
        generator = stream(self.seed, "data", self.epoch)
        if self.bundles is None:
            return self.rows[torch.randperm(len(self.rows), generator=generator)]
        _, bundle = self.bundles[self.rows].unique(return_inverse=True)
        place = torch.randperm(int(bundle.max()) + 1, generator=generator)
        return self.rows[place[bundle].argsort(stable=True)]


class _Picked(Sequence[Sample]):
    """Some of a sequence's samples, read when they are asked for."""

    def __init__(self, samples: Sequence[Sample], rows: torch.Tensor) -> None:
        self.samples, self.rows = samples, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self.samples[row] for row in self.rows[index].tolist()]
        return self.samples[int(self.rows[index])]


class Samples(Sequence[Sample]):
    """Rows seen as samples; all of them are checked once, up front.

    Attributes:
        bundles: [rows] a number that the rows of a group share; None where there are no groups.
    """

    def __init__(self, rows: Rows, columns: Mapping[Column, str]) -> None:
        self.rows, self.columns = rows, columns
        names = [sample.group for sample in self]
        self.bundles: torch.Tensor | None = None
        if any(name is not None for name in names):
            numbers: dict[Any, int] = {}
            keys = (index if name is None else name for index, name in enumerate(names))
            self.bundles = torch.tensor([numbers.setdefault(key, len(numbers)) for key in keys])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        row = self.rows[index]
        renamed = {ours: row[theirs] for ours, theirs in self.columns.items() if theirs in row}
        if len(renamed) < len(self.columns):
            absent = next(theirs for theirs in self.columns.values() if theirs not in row)
            raise DataError(f"{self.rows.place(index)}: no column {absent!r}")
        gone = set(self.columns.values())
        rest = {name: value for name, value in row.items() if name not in gone}
        try:
            return to_sample({**rest, **renamed}, self.rows.name(index))
        except ValueError as error:
            raise DataError(f"{self.rows.place(index)}: {error}") from None


def to_sample(row: Mapping[str, Any], name: str) -> Sample:
    """A row as a sample.

    `id`, `weight`, `channel`, `group`, `score` and `answer` are taken where the row has them.
    What is `privileged`, text or messages, only a teacher reads, before the rest; before a
    conversation a text is the system's. A `rationale` is learnt before the completion, in the
    channel `rationale`; the completion is then in the channel `answer`.

    Raises:
        ValueError: the row has none of the three forms, or a value of the wrong type.
    """
    parts: tuple[tuple[int, str], ...] = ()
    there = [form for form in FORMS if form in row]
    # A table of several forms has all their columns in each row.
    filled = [form for form in there if row[form] is not None]
    form = next(iter(filled or there), None)
    if form == "messages":
        turns = _turns(row["messages"], "messages", None)
    elif form == "prompt":
        turns, parts = _with_rationale(row)
    elif form == "text":
        turns = _turns(row["text"], "text", True)
    else:
        raise ValueError(
            "a row needs `prompt` and `completion`, or `messages`, or `text`; it has "
            + (", ".join(f"`{key}`" for key in row) or "nothing")
        )
    weight = 1.0 if row.get("weight") is None else row["weight"]
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < 1e9:
        raise ValueError(f"`weight` is {weight!r}, not a number >= 0")
    score = row.get("score")
    number = isinstance(score, int | float) and not isinstance(score, bool)
    if score is not None and not (number and math.isfinite(score)):
        raise ValueError(f"`score` is {score!r}, not a number")
    return Sample(
        id=name if row.get("id") is None else str(row["id"]),
        turns=turns,
        privileged=privileged_turns(row.get("privileged"), chat=any(turn.role for turn in turns)),
        weight=float(weight),
        channel="main" if row.get("channel") is None else str(row["channel"]),
        parts=parts,
        group=None if row.get("group") is None else str(row["group"]),
        score=None if score is None else float(score),
        answer=_known(row.get("answer")),
    )


def _known(answer: Any) -> str | None:
    """The right answer as text; an object or a list as JSON."""
    if answer is None or isinstance(answer, str):
        return answer
    return json.dumps(answer) if isinstance(answer, dict | list) else str(answer)


def privileged_turns(value: Any, *, chat: bool) -> tuple[Turn, ...]:
    """What only a teacher reads, text or messages; before a conversation a text is the system's."""
    if value is None:
        return ()
    if isinstance(value, str) and chat:
        return (Turn(text=value, role="system"),)
    return _turns(value, "privileged", False)


def _with_rationale(row: Mapping[str, Any]) -> tuple[tuple[Turn, ...], tuple[tuple[int, str], ...]]:
    """Turns of a row with a prompt, and where its rationale and its answer begin."""
    asked = _turns(row["prompt"], "prompt", False)
    completion, rationale = row.get("completion"), row.get("rationale")
    if completion is None:
        return asked, ()
    if rationale is not None and not (isinstance(rationale, str) and isinstance(completion, str)):
        raise ValueError("`rationale` goes with a `completion`, and both are text")
    parts: tuple[tuple[int, str], ...] = ()
    if rationale is not None:
        start = sum(len(turn.text.encode()) for turn in asked)
        behind = start + len(_whole(rationale, "rationale").encode())
        parts = ((start, RATIONALE), (behind, ANSWER))
        completion = rationale + completion
    if isinstance(completion, str) and any(turn.role for turn in asked):
        completion = [{"role": "assistant", "content": completion}]
    return asked + _turns(completion, "completion", True), parts


def _turns(value: Any, name: str, learn: bool | None) -> tuple[Turn, ...]:
    """Text or messages as turns; `learn` None means the assistant's words."""
    if isinstance(value, str) and learn is not None:
        return (Turn(text=_whole(value, name), learn=learn),)
    if not isinstance(value, list):
        raise ValueError(f"`{name}` is {type(value).__name__}, not text or a list of messages")
    if not value and learn is None:
        raise ValueError(f"`{name}` is empty; leave the row out")
    turns: list[Turn] = []
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise ValueError(f"`{name}` holds {message!r:.60}, not {{role, content}}")
        role = str(message.get("role", ""))
        mine = role == "assistant" if learn is None else learn
        text = _whole(message["content"], name)
        turns.append(Turn(text=text, role=role or "user", learn=mine))
    return tuple(turns)


def _whole(text: str, name: str) -> str:
    """The text; said before the training, and not when a tokenizer meets it."""
    if not is_whole(text):
        raise ValueError(f"`{name}` holds half a character (a lone surrogate); remove it")
    return text
