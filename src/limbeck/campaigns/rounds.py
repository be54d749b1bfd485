"""What rounds found, side by side: read from the files that they left."""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from limbeck.core.errors import DataError
from limbeck.core.files import write_json, write_text
from limbeck.recipe.card import plus
from limbeck.recipe.report import Report

STARTED = "start"
"""What the line of the student before the first round is called."""


@dataclass(frozen=True, kw_only=True)
class Made:
    """The data of a round.

    Attributes:
        rows: how many rows to train on.
        failed: how many were made and left out, by reason.
        counts: what the steps counted, such as verdicts that could not be parsed; sums over the
            round's sources.
        figures: what they measured, such as shares and means; where a round has several sources,
            each figure is named after its source's folder.
        usd: what the teachers' answers cost; None where that is not known.
    """

    rows: int = 0
    failed: Mapping[str, int] = field(default_factory=dict[str, int])
    counts: Mapping[str, int] = field(default_factory=dict[str, int])
    figures: Mapping[str, float] = field(default_factory=dict[str, float])
    usd: float | None = None


@dataclass(frozen=True, kw_only=True)
class Round:
    """One finished round."""

    number: int
    made: Made
    report: Report

    def score(self, name: str, arm: str) -> float | None:
        """A figure of the student `before` or `after` the round, or of the `teacher`."""
        if name in ("kl_nats", "top1"):
            figures = getattr(self.report.agreement, arm, None)
            return None if figures is None else getattr(figures, name)
        found = self.report.evals.get(name)
        return None if found is None else getattr(found, arm)

    @property
    def names(self) -> list[str]:
        """The figures that it has."""
        agreement = [n for n in ("kl_nats", "top1") if self.score(n, "after") is not None]
        return [*self.report.evals, *agreement]

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        arms = ("teacher", "before", "after")
        return {
            "round": self.number,
            "rows": self.made.rows,
            "failed": dict(self.made.failed),
            "counts": dict(self.made.counts),
            "figures": dict(self.made.figures),
            "usd": self.made.usd,
            "evals": {name: {arm: self.score(name, arm) for arm in arms} for name in self.names},
            "train": {
                name: getattr(self.report.train, name) for name in ("steps", "tokens", "seconds")
            },
        }


@dataclass(frozen=True, kw_only=True)
class Campaign:
    """All rounds."""

    restart: bool
    rounds: Sequence[Round]

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return {"restart": self.restart, "rounds": [one.to_json() for one in self.rounds]}

    def to_markdown(self) -> str:
        """The page: a line a round, and what the steps counted."""
        names = list(dict.fromkeys(name for one in self.rounds for name in one.names))
        begins = "the recipe's own student" if self.restart else "the student of the round before"
        lines = [f"# {len(self.rounds)} rounds", "", f"Each round trains {begins}.", ""]
        lines += _table(["round", "rows", "failed", "teachers, $", *names], self._lines(names))
        heads = ["", *(f"round {one.number}" for one in self.rounds)]
        counts = _rows([one.made.counts for one in self.rounds], lambda n: f"{n or 0:,}")
        figures = _rows([one.made.figures for one in self.rounds], _shown)
        for title, rows in (("counted", counts), ("measured", figures)):
            if rows:
                lines += ["", f"What the steps {title}:", "", *_table(heads, rows)]
        return "\n".join(lines) + "\n"

    def _lines(self, names: Sequence[str]) -> list[list[str]]:
        first = self.rounds[0]
        found = [
            [arm, "", "", "", *(_shown(first.score(name, key)) for name in names)]
            for arm, key in (("teacher", "teacher"), (STARTED, "before"))
            if any(first.score(name, key) is not None for name in names)
        ]
        for one in self.rounds:
            made = [
                f"{one.made.rows:,}",
                f"{sum(one.made.failed.values()):,}",
                _shown(one.made.usd),
            ]
            scores = [_shown(one.score(name, "after")) for name in names]
            found.append([str(one.number), *made, *scores])
        return found

    def write(self, out: Path) -> None:
        """Write `rounds.json` and `rounds.md`."""
        write_json(out / "rounds.json", self.to_json())
        write_text(out / "rounds.md", self.to_markdown())


def read_round(number: int, folder: Path) -> Round:
    """A finished round from its folder.

    Raises:
        DataError: a file of it is missing or broken.
    """
    counts: Counter[str] = Counter()
    figures: dict[str, float] = {}
    failed: Counter[str] = Counter()
    rows = 0
    usd: float | None = 0.0
    paths = sorted(folder.glob("data*/**/card.json"))
    for path in paths:
        card = read_json(path)
        counted: dict[str, Any] = card.get("counts") or {}
        # Older cards have figures among the counts, which are whole numbers.
        measured = card.get("figures") or {k: v for k, v in counted.items() if isinstance(v, float)}
        counts.update({k: v for k, v in counted.items() if k not in measured})
        place = f"{path.parent.relative_to(folder)}: " if len(paths) > 1 else ""
        figures |= {f"{place}{name}": value for name, value in measured.items()}
        failed.update(card.get("failed") or {})
        # What other rows were made from is not trained on.
        rows += card.get("rows") or 0 if path.parent.parent == folder else 0
        usd = plus(usd, card.get("usd"))
    made = Made(rows=rows, failed=failed, counts=counts, figures=figures, usd=usd)
    return Round(number=number, made=made, report=Report.from_json(folder / "report.json"))


def read_json(path: Path) -> Any:
    """A JSON file.

    Raises:
        DataError: it is missing or broken.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None
    except ValueError as error:
        raise DataError(f"{path}: not JSON: {error}") from None


def _rows(rounds: Sequence[Mapping[str, Any]], shown: Callable[[Any], str]) -> list[list[str]]:
    """A line for each name, with its value in each round."""
    names = dict.fromkeys(name for one in rounds for name in one)
    return [[name, *(shown(one.get(name)) for one in rounds)] for name in names]


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    line = "| " + " | ".join(["---", *["---:"] * (len(heads) - 1)]) + " |"
    return [f"| {' | '.join(heads)} |", line, *(f"| {' | '.join(row)} |" for row in rows)]


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
