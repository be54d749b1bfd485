"""Accuracy against tokens spent, between never reasoning and always: is choosing worth it?"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from limbeck.core.random import stream

Floats = NDArray[np.float64]
Interval = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Point:
    """Where reasoning is used from `threshold` on: its share, mean tokens, and what is right."""

    threshold: float
    reasoned: float
    tokens: float
    accuracy: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """What a choice between direct answers and reasoning buys.

    Attributes:
        points: from never (first) to always (last) reasoning, as the threshold falls.
        chosen: at the threshold that was asked about.
        area: mean height of the curve above the chord between its ends, over the budgets between
            them; 0 in expectation for a choice by lot, so no threshold has to be picked for it.
        above_chord: accuracy at `chosen` beyond a choice by lot that spends as many tokens.
        above_ends: accuracy at `chosen` beyond the better end.
        area95, above_chord95, above_ends95: 95% bootstrap intervals over the problems.
    """

    points: tuple[Point, ...]
    chosen: Point
    area: float
    area95: Interval
    above_chord: float
    above_chord95: Interval
    above_ends: float
    above_ends95: Interval

    @property
    def never(self) -> Point:
        """Direct answers alone."""
        return self.points[0]

    @property
    def always(self) -> Point:
        """Reasoning alone."""
        return self.points[-1]

    @property
    def verdict(self) -> str:
        """What may be said of it, in a sentence."""
        if self.above_ends95[0] > 0:
            return "Choosing is better than both ends, with fewer tokens than always reasoning."
        if self.above_chord95[0] > 0:
            return "Choosing is better than a choice by lot of the same cost, not than both ends."
        return "Choosing is not shown to be better than a choice by lot of the same cost."


def budget_curve(
    probability: Sequence[float] | Floats,
    *,
    direct: tuple[Sequence[bool], Sequence[float]],
    reasoned: tuple[Sequence[bool], Sequence[float]],
    threshold: float = 0.5,
    draws: int = 1000,
    seed: int = 0,
) -> Curve:
    """Accuracy against tokens as the threshold of reasoning moves from above 1 to 0.

    Choose `threshold` on other problems than these, or the figures at it say too much.

    Args:
        probability: of each problem, that reasoning helps.
        direct: which problems are right without reasoning, and the tokens of each answer.
        reasoned: the same with reasoning.
        threshold: reasoning is used from this probability on, for the figures at one point.
        draws: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        ValueError: there is no problem, or the lengths differ.
    """
    p = np.asarray(probability, dtype=np.float64)
    columns = [np.asarray(c, dtype=np.float64) for c in (*direct, *reasoned)]
    if not len(p) or any(len(column) != len(p) for column in columns):
        raise ValueError("give as many outcomes and tokens as probabilities, at least one")
    table = np.stack(columns)
    found = _figures(p, table, threshold)
    samples: list[Floats] = []
    generator = stream(seed, "budget curve")
    for _ in range(draws):
        pick = torch.randint(len(p), (len(p),), generator=generator).numpy()
        samples.append(_figures(p[pick], table[:, pick], threshold))
    low, high = np.quantile(np.stack(samples), [0.025, 0.975], axis=0)
    intervals = [(float(a), float(b)) for a, b in zip(low, high, strict=True)]
    steps = [np.inf, *np.unique(p)[::-1].tolist()]
    return Curve(
        points=tuple(_point(p, table, step) for step in steps),
        chosen=_point(p, table, threshold),
        area=float(found[0]),
        area95=intervals[0],
        above_chord=float(found[1]),
        above_chord95=intervals[1],
        above_ends=float(found[2]),
        above_ends95=intervals[2],
    )


def _point(p: Floats, table: Floats, threshold: float) -> Point:
    reason = p >= threshold
    right, tokens = np.where(reason, table[2:], table[:2]).mean(1)
    return Point(float(threshold), float(reason.mean()), float(tokens), float(right))


def _figures(p: Floats, table: Floats, threshold: float) -> Floats:
    """[3] area above the chord, height above it at the threshold, and above the better end."""
    order = np.argsort(-p, kind="stable")
    gains = (table[2:] - table[:2])[:, order]
    # Equal probabilities are switched together.
    last = np.append(np.diff(p[order]) != 0, True)
    steps = np.concatenate([np.zeros((2, 1)), np.cumsum(gains, axis=1)[:, last]], axis=1) / len(p)
    right, tokens = table[:2].mean(1)[:, None] + steps
    slope = (right[-1] - right[0]) / (tokens[-1] - tokens[0]) if tokens[-1] != tokens[0] else 0.0
    height = right - right[0] - slope * (tokens - tokens[0])
    width = tokens[-1] - tokens[0]
    area = float(np.trapezoid(height, tokens) / width) if width else 0.0
    at = _point(p, table, threshold)
    above = at.accuracy - right[0] - slope * (at.tokens - tokens[0])
    return np.array([area, above, at.accuracy - max(right[0], right[-1])])
