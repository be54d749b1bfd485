"""Samples from files or the hub, shuffled anew each epoch, resumable at any row."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

import torch
from pydantic import Field

from limbeck.core.errors import DataError
from limbeck.core.random import stream
from limbeck.core.registry import register
from limbeck.core.text import is_whole
from limbeck.core.types import Sample, Turn, numbered
from limbeck.sources.files import Rows, open_rows
from limbeck.sources.held_out import Question, question

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

CALLS = ("tool_calls", "function_call")
"""Of a message: calls of tools beside its text, which templates are not told of."""

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
        holdout: how many rows to keep from training for evaluation (at most a tenth; groups stay
            whole, and the last one may go beyond), or the path of a file of held-out rows.
    """

    ahead: ClassVar[bool] = True

    path: str
    split: str = "train"
    columns: Mapping[Column, str] = field(default_factory=dict[Column, str])
    holdout: Annotated[int, Field(ge=0)] | str = 64

    def open(self, seed: int, prefix: str = "") -> "DatasetStream":
        """Read and check every row, set the held-out rows aside, and start the stream.

        Args:
            seed: of the held-out rows and of the order.
            prefix: of the names of rows that have no id.

        Raises:
            DataError: a row is malformed (the message names file and line), or there is none; or a
                split is asked of files, which have none.
        """
        if self.split != "train" and Path(self.path).expanduser().exists():
            raise DataError(
                f"{self.path}: files have no `split`; name the file or folder of {self.split!r}"
            )
        return open_samples(
            Samples(open_rows(self.path, self.split), self.columns, prefix),
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
        holdout: how many to hold out (at most a tenth, and the rest of the last one's group), or
            other samples.
        seed: of the choice and of the order.
    """
    if not isinstance(holdout, int):
        return DatasetStream(
            samples, torch.arange(len(samples)), list(holdout), seed, samples.bundles
        )
    count = min(holdout, int(len(samples) * HOLDOUT_SHARE))
    order = torch.randperm(len(samples), generator=stream(seed, "holdout"))
    held, rows = order[:count], order[count:]
    if samples.bundles is not None:
        out = _first_groups(samples.bundles, order, count)
        held, rows = (flags.nonzero().flatten() for flags in (out, ~out))
        if not len(rows):
            raise DataError(
                f"all {len(samples)} rows are held out, because rows of one group stay together;"
                " set `holdout: 0`, or name a file of held-out rows"
            )
    chosen = [samples[int(index)] for index in held.sort().values]
    return DatasetStream(samples, rows.sort().values, chosen, seed, samples.bundles)


def _first_groups(bundles: torch.Tensor, order: torch.Tensor, count: int) -> torch.Tensor:
    """[rows] True in the groups that come first in an order, as many as have `count` rows."""
    sizes, rows = bundles.bincount(), 0
    taken: set[int] = set()
    for bundle in bundles[order].tolist():
        if rows >= count:
            break
        if bundle not in taken:
            taken.add(bundle)
            rows += int(sizes[bundle])
    return torch.isin(bundles, torch.tensor(sorted(taken), dtype=bundles.dtype))


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

    def leave_out(self, questions: AbstractSet[Question]) -> None:
        """Visit no row that asks one of these questions, and none of its group.

        Raises:
            DataError: no row is left.
        """
        out = torch.tensor([question(sample) in questions for sample in self.training])
        if self.bundles is not None:
            bundles = self.bundles[self.rows]
            out = torch.isin(bundles, bundles[out])
        if out.all():
            raise DataError(
                f"all {len(out)} rows ask what is held out, here or by another source beside it;"
                " set `holdout: 0`, or name a file of held-out rows"
            )
        self.rows = self.rows[~out]
        self._order = self._shuffled()

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

    Args:
        rows: the rows.
        columns: renames, ours to theirs.
        prefix: of the names of rows that have no id.

    Attributes:
        bundles: [rows] a number that the rows of a group share; None where there are no groups.
    """

    def __init__(self, rows: Rows, columns: Mapping[Column, str], prefix: str = "") -> None:
        self.rows, self.columns, self.prefix = rows, columns, prefix
        self._gone = set(columns.values())
        own = {name: name for name in get_args(Column) if name not in self._gone}
        self._read: dict[str, str] = {**own, **columns}
        names = [sample.group for sample in self]
        self.bundles: torch.Tensor | None = None
        if any(name is not None for name in names):
            self.bundles = torch.tensor(numbered(names))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        row = self.rows[index]
        absent = [theirs for theirs in self.columns.values() if theirs not in row]
        if absent:
            raise DataError(f"{self.rows.place(index)}: no column {absent[0]!r}")
        # All names, for a message; but values only of what is read.
        names = dict.fromkeys(name for name in row if name not in self._gone)
        try:
            read = {ours: row[theirs] for ours, theirs in self._read.items() if theirs in row}
            return to_sample({**names, **read}, self.prefix + self.rows.name(index))
        except (ValueError, OverflowError) as error:  # the latter of an Arrow date without a value
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
    if not _is_number(weight) or not 0 <= weight < 1e9:
        raise ValueError(f"`weight` is {weight!r:.60}, not a number >= 0")
    score = row.get("score")
    # Not NaN, no infinity, and no integer beyond what a float can be.
    if score is not None and not (_is_number(score) and abs(score) <= sys.float_info.max):
        raise ValueError(f"`score` is {score!r:.60}, not a number that can be used")
    own, channel, group = (_named(row, key) for key in ("id", "channel", "group"))
    return Sample(
        id=name if own is None else own,
        turns=turns,
        privileged=privileged_turns(row.get("privileged"), chat=any(turn.role for turn in turns)),
        weight=float(weight),
        channel="main" if channel is None else channel,
        parts=parts,
        group=group,
        score=None if score is None else float(score),
        answer=_known(row.get("answer")),
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _named(row: Mapping[str, Any], key: str) -> str | None:
    """A name that the row may give, as text."""
    return None if row.get(key) is None else _whole(str(row[key]), key)


def _known(answer: Any) -> str | None:
    """The right answer as text; an object or a list as JSON."""
    if answer is None or isinstance(answer, str):
        return answer
    # A table's cell may hold dates and the like within.
    return json.dumps(answer, default=str) if isinstance(answer, dict | list) else str(answer)


def privileged_turns(value: Any, *, chat: bool) -> tuple[Turn, ...]:
    """What only a teacher reads, text or messages; before a conversation a text is the system's."""
    if value is None:
        return ()
    if isinstance(value, str) and chat:
        return (Turn(text=_whole(value, "privileged"), role="system"),)
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
        if not isinstance(message, dict):
            raise ValueError(f"`{name}` holds {message!r:.60}, not {{role, content}}")
        if called := next((key for key in CALLS if message.get(key)), None):
            raise ValueError(
                f"`{name}` holds a message with `{called}`, which nobody would read; write the call"
                " into its `content`, as the student is to write it"
            )
        role, content = message.get("role", ""), message.get("content")
        if not isinstance(role, str) or not isinstance(content, str):
            raise ValueError(f"`{name}` holds {message!r:.60}, not {{role, content}}")
        mine = role == "assistant" if learn is None else learn
        text, role = _whole(content, name), _whole(role, name) or "user"
        turns.append(Turn(text=text, role=role, learn=mine))
    return tuple(turns)


def _whole(text: str, name: str) -> str:
    """The text; said before the training, and not when a tokenizer meets it."""
    if not is_whole(text):
        raise ValueError(f"`{name}` holds half a character (a lone surrogate); remove it")
    return text
