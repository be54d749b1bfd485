"""Cells of the comparisons' tables."""

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

Rows = Sequence[Mapping[str, Any]]


def spread(values: Sequence[float | None], form: str) -> str:
    """Mean and [lowest, highest] over the seeds."""
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    shown = form.format(mean(known))
    if len(known) == 1:
        return shown
    return f"{shown} [{form.format(min(known))}, {form.format(max(known))}]"


def accuracy(rows: Rows) -> str:
    """Share of right answers over all seeds, with its 95% interval.

    The seeds answer the same problems, so the interval is over problems, each with its mean.
    """
    from limbeck.evals.score import share_interval

    answers = [row["right"] for row in rows if row.get("right")]
    if not answers:
        return "–"
    right = [float(column.count("1")) for column in map("".join, zip(*answers, strict=True))]
    share, ends = share_interval(right, [float(len(answers))] * len(right))
    return f"{share:.1%}" + (f" ({ends[0]:.1%} to {ends[1]:.1%})" if ends else "")


def beside(rows: Rows, other: Rows, name: str) -> str:
    """Mean difference to the other arm's runs of the same seeds, and in how many it is lower."""
    theirs = {row["seed"]: row.get(name) for row in other}
    pairs = [
        row[name] - theirs[row["seed"]]
        for row in rows
        if row.get(name) is not None and theirs.get(row["seed"]) is not None
    ]
    if not pairs or rows is other:
        return "–"
    return f"{mean(pairs):+.4f} ({sum(pair < 0 for pair in pairs)} of {len(pairs)})"


def relative(rows: Rows, other: Rows) -> str:
    """Processor time of a step beside that of the other arm, each at its fastest seed."""
    name = "step_processor_seconds"
    mine = [row[name] for row in rows if row.get(name)]
    theirs = [row[name] for row in other if row.get(name)]
    return f"{min(mine) / min(theirs):.2f}" if mine and theirs else "–"


def more_memory(rows: Rows, other: Rows) -> str:
    """Megabytes of peak memory beside the other arm's."""
    mine = [row["peak_bytes"] for row in rows if row.get("peak_bytes")]
    theirs = [row["peak_bytes"] for row in other if row.get("peak_bytes")]
    return f"{(mean(mine) - mean(theirs)) / 1e6:+.0f}" if mine and theirs else "–"
