"""The rows of one prompt together, and questions about rows that keep their order."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from limbeck.core.errors import DataError
from limbeck.core.exchange import Question, Reply, Writer
from limbeck.core.types import Sampling
from limbeck.synth.parsing import spoken
from limbeck.synth.rows import Row

Item = TypeVar("Item")


def grouped(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """The rows of each group; a row without a group is one of its own.

    Rows of a group stand together, as steps leave them; so only one group is held at a time.

    Raises:
        DataError: a group comes a second time.
    """
    group: list[Row] = []
    seen: set[str] = set()
    for row in rows:
        if group and (row.group is None or row.group != group[0].group):
            yield group
            group = []
        if not group and row.group is not None:
            if row.group in seen:
                raise DataError(
                    f"row {row.id}: rows of group {row.group!r} stand apart; give the rows of one"
                    " prompt one after the other, or without `group`"
                )
            seen.add(row.group)
        group.append(row)
    if group:
        yield group


def asked(
    items: Iterable[tuple[Item, Question | None]],
    writer: Writer,
    sampling: Sampling,
    n: int = 1,
    *,
    thoughts: bool = False,
) -> Iterator[tuple[Item, Sequence[Reply] | None]]:
    """Each item with the replies to its question, in order; None where it has no question.

    Items are taken as the writer takes questions, so that it may work on many at a time.

    Args:
        items: what is asked about, with its question.
        writer: who answers.
        sampling: how replies are drawn.
        n: replies to each question.
        thoughts: whether reasoning stays in the replies, for who trains on it; see `spoken`.
    """
    waiting: deque[tuple[Item, bool]] = deque()

    def questions() -> Iterator[Question]:
        for item, question in items:
            waiting.append((item, question is not None))
            if question is not None:
                yield question

    for replies in writer.answers(questions(), sampling, n):
        while not waiting[0][1]:
            yield waiting.popleft()[0], None
        yield waiting.popleft()[0], replies if thoughts else [spoken(one) for one in replies]
    for item, _ in waiting:  # behind the last question
        yield item, None
