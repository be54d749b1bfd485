"""What several sources hold out together, so that none of them trains on it."""

from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

from limbeck.core.errors import DataError
from limbeck.core.types import Sample, Turn

Question = tuple[Turn, ...]


def question(sample: Sample) -> Question:
    """What makes two samples the same question: the prompt, or the whole of a text without one."""
    asked = sample.prompt
    return asked if any(turn.text for turn in asked) else sample.turns


def held_out_of(streams: Sequence[Any]) -> list[Sample]:
    """The samples that any of some streams holds out, each once; none of them trains on these.

    Raises:
        DataError: of one of them nothing is left to train on.
    """
    held: dict[tuple[Question, str | None], Sample] = {}
    for stream in streams:
        for sample in stream.holdout:
            held.setdefault((question(sample), sample.completion), sample)
    leave_out(streams, {question(sample) for sample in held.values()})
    return list(held.values())


def leave_out(streams: Iterable[Any], questions: AbstractSet[Question]) -> None:
    """Let streams give no row that asks one of these questions, where they can leave rows out.

    Raises:
        DataError: of one of them nothing is left.
    """
    if not questions:
        return  # which saves reading all rows
    for place, stream in enumerate(streams):
        if hasattr(stream, "leave_out"):
            try:
                stream.leave_out(questions)
            except DataError as error:
                raise DataError(f"of.{place}: {error}") from None
