"""The comparisons' tables."""

from collections.abc import Callable, Mapping, Sequence
from statistics import mean
from typing import Any

from table import markdown

Rows = Sequence[Mapping[str, Any]]
Arms = Mapping[str, Rows]
Column = tuple[str, Callable[[Rows, Arms], str]]
"""A heading, and a cell from the runs of an arm and those of all arms."""

NOTHING = "–"


def tables(results: Mapping[str, Any], columns: Sequence[Column]) -> str:
    """A table for each setting, arms down; columns in which there is nothing are left out."""
    parts: list[str] = []
    for setting in dict.fromkeys(row["setting"] for row in results["rows"]):
        mine = [row for row in results["rows"] if row["setting"] == setting]
        arms = {
            arm: [row for row in mine if row["arm"] == arm]
            for arm in dict.fromkeys(row["arm"] for row in mine)
        }
        lines = [[arm, *(cell(rows, arms) for _, cell in columns)] for arm, rows in arms.items()]
        header = ["method", *(heading for heading, _ in columns)]
        keep = [i for i in range(len(header)) if any(line[i] != NOTHING for line in lines)]
        chosen = [[line[i] for i in keep] for line in [header, *lines]]
        parts += [f"**{setting}**", markdown(chosen[0], chosen[1:])]
    return "\n\n".join(parts)


def of_seeds(name: str) -> Callable[[Rows, Arms], str]:
    """The column of a figure, over the seeds."""
    return lambda rows, _: spread([row.get(name) for row in rows], "{:.4f}")


def beside_arm(name: str, other: str) -> Callable[[Rows, Arms], str]:
    """The column of a figure's difference to another arm."""
    return lambda rows, arms: beside(rows, arms.get(other, []), name)


COSTS: Sequence[Column] = (
    ("accuracy (95%)", lambda rows, _: accuracy(rows)),
    ("step time", lambda rows, arms: relative(rows, arms.get("labels", []))),
    ("memory, MB", lambda rows, arms: more_memory(rows, arms.get("labels", []))),
)
"""Columns that all comparisons have."""


def spread(values: Sequence[float | None], form: str) -> str:
    """Mean and [lowest, highest] over the seeds."""
    known = [value for value in values if value is not None]
    if not known:
        return NOTHING
    shown = form.format(mean(known))
    if len(known) == 1:
        return shown
    return f"{shown} [{form.format(min(known))}, {form.format(max(known))}]"


def accuracy_of(name: str) -> Callable[[Rows, Arms], str]:
    """The column of another file of problems."""
    return lambda rows, _: accuracy(rows, name)


def accuracy(rows: Rows, name: str = "right") -> str:
    """Share of right answers over all seeds, with its 95% interval.

    The seeds answer the same problems, so the interval is over problems, each with its mean.
    """
    from limbeck.evals.score import share_interval

    answers = [row[name] for row in rows if row.get(name)]
    if not answers:
        return NOTHING
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
        return NOTHING
    return f"{mean(pairs):+.4f} ({sum(pair < 0 for pair in pairs)} of {len(pairs)})"


def relative(rows: Rows, other: Rows) -> str:
    """Processor time of a step beside that of the other arm, each at its fastest seed."""
    name = "step_processor_seconds"
    mine = [row[name] for row in rows if row.get(name)]
    theirs = [row[name] for row in other if row.get(name)]
    return f"{min(mine) / min(theirs):.2f}" if mine and theirs else NOTHING


def more_memory(rows: Rows, other: Rows) -> str:
    """Megabytes of peak memory beside the other arm's."""
    mine = [row["peak_bytes"] for row in rows if row.get("peak_bytes")]
    theirs = [row["peak_bytes"] for row in other if row.get("peak_bytes")]
    return f"{(mean(mine) - mean(theirs)) / 1e6:+.0f}" if mine and theirs else NOTHING
