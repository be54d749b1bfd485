"""Accuracy against tokens, beside a naive reference."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from limbeck.synth.budget import budget_curve


def by_hand(p, direct, reasoned, threshold):
    """Accuracy and mean tokens where reasoning is used from a threshold on."""
    chosen = [(reasoned if one >= threshold else direct, place) for place, one in enumerate(p)]
    right = sum(bool(side[0][place]) for side, place in chosen) / len(p)
    tokens = sum(side[1][place] for side, place in chosen) / len(p)
    return right, tokens


def made(count, skill, seed):
    """Problems of which half need reasoning, and probabilities that know it with some skill."""
    draw = np.random.default_rng(seed)
    needs = draw.random(count) < 0.5
    direct = (~needs, draw.integers(3, 6, count))
    reasoned = (draw.random(count) < 0.8, draw.integers(40, 60, count))
    p = np.clip(skill * needs + (1 - skill) * draw.random(count), 0, 1)
    return p, direct, reasoned


problems = st.lists(
    st.tuples(
        st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]),
        st.booleans(),
        st.integers(1, 9),
        st.booleans(),
        st.integers(1, 30),
    ),
    min_size=1,
    max_size=12,
)


@given(problems, st.floats(-0.1, 1.1))
def test_each_point_is_what_one_counts_by_hand(rows, threshold):
    p, right, short, reasoned_right, long = map(list, zip(*rows, strict=True))
    direct, reasoned = (right, short), (reasoned_right, long)
    curve = budget_curve(p, direct=direct, reasoned=reasoned, threshold=threshold, draws=4)
    for point in (*curve.points, curve.chosen):
        wanted = by_hand(p, direct, reasoned, point.threshold)
        assert (point.accuracy, point.tokens) == pytest.approx(wanted)
    assert curve.never.reasoned == 0
    assert curve.always.reasoned == 1
    assert len(curve.points) == 1 + len(set(p))
    ends = (curve.never.accuracy, curve.always.accuracy)
    assert curve.above_ends == pytest.approx(curve.chosen.accuracy - max(ends))
    width = curve.always.tokens - curve.never.tokens
    if width:
        along = (curve.chosen.tokens - curve.never.tokens) / width
        chord = ends[0] + along * (ends[1] - ends[0])
        assert curve.above_chord == pytest.approx(curve.chosen.accuracy - chord)
        area = sum(
            (b.tokens - a.tokens) * (a.accuracy + b.accuracy) / 2
            for a, b in zip(curve.points, curve.points[1:], strict=False)
        )
        assert curve.area == pytest.approx(area / width - sum(ends) / 2, abs=1e-9)


def test_a_choice_that_knows_is_better_than_both_ends():
    p, direct, reasoned = made(400, 0.8, 0)
    curve = budget_curve(p, direct=direct, reasoned=reasoned, draws=300)
    assert curve.area95[0] > 0.05
    assert curve.above_ends95[0] > 0
    assert curve.chosen.tokens < 0.7 * curve.always.tokens
    assert curve.verdict.startswith("Choosing is better than both ends")


def test_a_choice_by_lot_is_not():
    """Of 20 such choices, a 95% interval of the area leaves out 0 in a few at most."""
    outside = 0
    for seed in range(20):
        p, direct, reasoned = made(200, 0.0, seed)
        curve = budget_curve(p, direct=direct, reasoned=reasoned, draws=200, seed=seed)
        outside += not curve.area95[0] <= 0 <= curve.area95[1]
    assert outside <= 4
    assert curve.verdict.startswith("Choosing is not shown")


def test_between_the_two_verdicts():
    draw = np.random.default_rng(1)
    needs = draw.random(600) < 0.5
    direct = (~needs, np.full(600, 5))
    reasoned = (np.ones(600, dtype=bool), np.full(600, 50))
    p = np.where(needs, 0.8, 0.2)
    p[draw.random(600) < 0.1] = 0.4  # a tenth is unknown, so some that need it go without
    curve = budget_curve(p, direct=direct, reasoned=reasoned, draws=300)
    assert curve.verdict.startswith("Choosing is better than a choice by lot")


def test_the_bootstrap_is_of_its_seed_and_wrong_input_is_refused():
    p, direct, reasoned = made(60, 0.5, 2)
    one, same, other = (
        budget_curve(p, direct=direct, reasoned=reasoned, draws=50, seed=seed).area95
        for seed in (0, 0, 1)
    )
    assert one == same != other
    with pytest.raises(ValueError, match="as many"):
        budget_curve(p[:-1], direct=direct, reasoned=reasoned)
    with pytest.raises(ValueError, match="at least one"):
        budget_curve([], direct=([], []), reasoned=([], []))
