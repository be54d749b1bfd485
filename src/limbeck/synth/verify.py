"""Step `verify`: is a row's answer the known one?"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Annotated, Literal

from pydantic import Field

from limbeck.core.registry import register
from limbeck.evals.math_pool import SECONDS
from limbeck.evals.verifiers import Match, Verdict, Verifier
from limbeck.synth.rows import Row
from limbeck.synth.step import Desk

WINDOW = 512
"""Rows that are judged together."""

UNKNOWN = "there is no known `answer` to compare with"
NO_REASONS = "there is no rationale"


@register("step", "verify")
@dataclass(frozen=True, kw_only=True)
class Verify:
    """Compares what a row says with its known `answer`; what is not right fails.

    So does a row whose known answer cannot be compared in this way, whatever `keep` says.

    Where the rationale was split off, the completion alone is read, and else the whole text. Each
    row gets the note `verdict` (`right`, `wrong` or `unclear`), and `said`: the answer as it was
    read. The share of right answers, unclear ones counted as not right, stands in the card for
    each teacher. Rows that were verified before are checked again and not counted again.

    Attributes:
        match: how; see `evals.verifiers.Match`. For `choice` the options are read from the prompt.
        pattern: for `regex`, with one group that catches the answer.
        keep: `right` fails all others; `all` lets them pass, for a step that looks at the verdict.
            What passes is trained on unless such a step fails it.
        must_have_rationale: also fail a row without one; for rows that were split.
        seconds: how long a comparison by `math` may take; a longer one is unclear.
    """

    match: Match = "last_number"
    pattern: str | None = None
    keep: Literal["right", "all"] = "right"
    must_have_rationale: bool = False
    seconds: Annotated[float, Field(gt=0, le=600)] = SECONDS

    def __post_init__(self) -> None:
        _ = self.verifier  # which finds what is wrong with it

    @property
    def verifier(self) -> Verifier:
        """What compares."""
        return Verifier(match=self.match, pattern=self.pattern, seconds=self.seconds)

    def run(self, rows: Iterable[Row], desk: Desk) -> Iterator[Row]:
        """Each row with its verdict."""
        waiting = iter(rows)
        shares: dict[str, list[bool]] = {}
        while window := list(islice(waiting, WINDOW)):
            faults = [self._unknown(row) for row in window]
            known = [row for row, fault in zip(window, faults, strict=True) if fault is None]
            judged = iter(
                self.verifier.check_all(
                    [row.text if row.rationale is None else row.completion or "" for row in known],
                    [row.answer or "" for row in known],
                    [row.question for row in known],
                )
            )
            for row, fault in zip(window, faults, strict=True):
                if fault is not None:
                    yield row.failed(fault)
                    continue
                verdict = next(judged)
                if row.notes.get("verdict") is None:
                    desk.counts[f"answers that are {verdict.verdict}"] += 1
                    shares.setdefault(_maker(row), []).append(verdict.right)
                yield self._judged(row, verdict)
        for maker, right in shares.items():
            desk.figures[f"right answers{maker}"] = round(sum(right) / len(right), 4)

    def _unknown(self, row: Row) -> str | None:
        """Why there is nothing to compare a row with; no text could be right."""
        if row.answer is None:
            return UNKNOWN
        problem = self.verifier.problem_with(row.answer)
        if problem is None:
            return None
        answer = f"the known answer {row.answer[:40]!r} {problem}"
        return f"{answer}; choose another `match` than {self.match}"

    def _judged(self, row: Row, verdict: Verdict) -> Row:
        row = row.noted(verdict=verdict.verdict, said=verdict.found)
        if self.keep == "right" and not verdict.right:
            why = f": {verdict.reason}" if verdict.reason else ""
            return row.failed(f"the answer is {verdict.verdict}{why}")
        if self.must_have_rationale and not (row.rationale or "").strip():
            return row.failed(NO_REASONS)
        return row


def _maker(row: Row) -> str:
    """Who wrote a row last, and in which step; nothing for rows that were given."""
    if not row.source:
        return ""
    return f" of {row.source[-1]['teacher']} ({row.source[-1]['step']})"
