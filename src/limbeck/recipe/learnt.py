"""Whether a training had anything to learn from, as its metrics tell."""

import json
from collections.abc import Sequence
from pathlib import Path

from limbeck.core.term import Term


def warnings(metrics: Path, terms: Sequence[Term]) -> tuple[str, ...]:
    """What a reader should know of terms that taught nothing.

    It is no error: a student that is never right has nothing to learn from its own words.

    Args:
        metrics: a line of JSON for each step, of a resumed run for those before it, too.
        terms: that were trained with.
    """
    steps = [json.loads(line) for line in metrics.read_text().splitlines()]
    # Where a step as a whole has a loss, null is that of a term without rows, not of a bad one.
    sound = [step for step in steps if step["loss"] is not None]
    if not sound:
        return ()
    idle = [
        f"terms.{index}: no row{f' of channel {term.channel!r}' if term.channel else ''} in any"
        " step, so it had no part in the training"
        for index, term in enumerate(terms)
        if all(step[f"loss/{term.label}"] is None for step in sound)
    ]
    if len(idle) == len(terms):
        idle.append("nothing was trained: no term had a row; look at `channel` in terms and rows")
    elif not idle and all(step["grad_norm"] == 0 for step in sound):
        idle.append(
            "the gradient was 0 in every step, so nothing was learnt; an objective of groups needs"
            " rows that bring `group` and `score`, and scores that differ"
        )
    return tuple(idle)
