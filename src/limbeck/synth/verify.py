"""Keep what is right."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from limbeck.core.registry import register
from limbeck.evals.verifiers import Match, Verifier
from limbeck.synth.rows import Row
from limbeck.synth.step import Desk

WINDOW = 512
"""Rows that are judged together."""


@register("step", "verify")
@dataclass(frozen=True, kw_only=True)
class Verify:
    """Compares what a row says with its known `answer`.

    Attributes:
        match: how; see `evals.verifiers`.
        pattern: for `regex`, with one group that catches the answer.
        keep: `right` fails all others; `all` lets them pass, with the note `verdict`.
    """

    match: Match = "last_number"
    pattern: str | None = None
    keep: Literal["right", "all"] = "right"

    def __post_init__(self) -> None:
        _ = self.verifier  # which finds what is wrong with it

    @property
    def verifier(self) -> Verifier:
        """What compares."""
        return Verifier(match=self.match, pattern=self.pattern)

    @property
    def asks(self) -> Sequence[str]:
        """Nobody."""
        return ()

    @property
    def reads(self) -> Sequence[str]:
        """Nobody."""
        return ()

    def run(self, rows: Iterable[Row], desk: Desk) -> Iterator[Row]:
        """Each row with its verdict: right, wrong or unclear."""
        waiting = iter(rows)
        while window := list(islice(waiting, WINDOW)):
            known = [row for row in window if row.answer is not None]
            judged = self.verifier.check_all(
                [row.text for row in known],
                [str(row.answer) for row in known],
                ["".join(turn.text for turn in row.prompt) for row in known],
            )
            verdicts = {row.id: verdict for row, verdict in zip(known, judged, strict=True)}
            for row in window:
                if row.id not in verdicts:
                    yield row.failed("there is no known `answer` to compare with")
                    continue
                verdict = verdicts[row.id]
                desk.counts[f"answers that are {verdict.verdict}"] += 1
                noted = row.noted(verdict=verdict.verdict, said=verdict.found)
                kept = verdict.right or self.keep == "all"
                why = f": {verdict.reason}" if verdict.reason else ""
                yield noted if kept else noted.failed(f"the answer is {verdict.verdict}{why}")
        self._tell(desk)

    def _tell(self, desk: Desk) -> None:
        names = [f"answers that are {name}" for name in ("right", "wrong", "unclear")]
        counts = [desk.counts[name] for name in names]
        if sum(counts):
            desk.figures["share of answers that are right"] = round(counts[0] / sum(counts), 4)
