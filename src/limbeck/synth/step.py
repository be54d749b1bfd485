"""What a step is, and the desk it works at."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from limbeck.core.exchange import Writer
from limbeck.core.protocols import Reader
from limbeck.synth.rows import UNREADABLE, Row


@dataclass(frozen=True, kw_only=True)
class Desk:
    """What a step may use.

    Attributes:
        seed: of the recipe; draws come from `core.random` streams of it, named after the step.
        writer: opens a teacher of the recipe by name, as one that writes; `student` is the recipe's
            student. All that it writes is recorded, so a step may ask again without cost: steps
            keep no notes of their own, and a run that was stopped is simply run again.
        reader: opens one as a model that reads, in which weights are at hand or a server's
            log-probabilities.
        folder: where the recipe's relative paths start, such as those of templates.
        counts: what a step counts for the card and the screen, such as `unparsable verdicts`.
        figures: what a step measures for them, such as a mean.
    """

    seed: int
    writer: Callable[[str], Writer]
    reader: Callable[[str], Reader]
    folder: Path = Path()
    counts: Counter[str] = field(default_factory=Counter[str])
    figures: dict[str, float] = field(default_factory=dict[str, float])


class Step(Protocol):
    """Turns rows into other rows: makes, changes, judges, drops or orders them.

    A step is a frozen value of a registered kind (slot `step`). Rows with a `failure`, and those
    that are not `readable`, never reach it. It gives each row on with a reason in `failure` rather
    than losing it, so that every prompt has a final row.

    Attributes:
        asks: names of the teachers that it asks for text; absent where it asks none.
        reads: names of the teachers that it lets read text; absent where it lets none.
        files: what decides its rows besides its fields, such as templates, relative to the recipe;
            absent where that is at most its field `template`.
    """

    def run(self, rows: Iterable[Row], desk: Desk) -> Iterator[Row]:
        """The rows that come of these."""
        ...


def asks_of(step: Step) -> Sequence[str]:
    """The teachers that a step asks for text."""
    return getattr(step, "asks", ())


def reads_of(step: Step) -> Sequence[str]:
    """The teachers that a step lets read."""
    return getattr(step, "reads", ())


def files_of(step: Step) -> Sequence[str]:
    """The files that decide a step's rows besides its fields."""
    own = getattr(step, "template", None)
    return getattr(step, "files", () if own is None else (own,))


def through(steps: Sequence[Step], rows: Iterable[Row], desk: Desk) -> Iterator[Row]:
    """Rows through all steps, one at a time where the steps allow it.

    A row that fails leaves at once and is given out in its turn.
    """
    flow = iter(rows)
    for step in steps:
        flow = _through(step, flow, desk)
    return flow


def _through(step: Step, rows: Iterator[Row], desk: Desk) -> Iterator[Row]:
    failed: list[Row] = []

    def good() -> Iterator[Row]:
        for row in rows:
            if row.failure is not None:
                failed.append(row)
            elif not row.readable:
                failed.append(row.failed(UNREADABLE))
            else:
                yield row

    for row in step.run(good(), desk):
        yield from failed
        failed.clear()
        yield row
    yield from failed
