"""Intervals against closed forms, published values and simulated coverage."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from limbeck.evals.score import (
    Score,
    ratio_interval,
    share_interval,
    student_t95,
    wilson_interval,
)


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [
        # Newcombe (1998), "Two-sided confidence intervals for the single proportion", table I.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_gives_the_published_intervals(hits: int, n: int, low: float, high: float) -> None:
    assert wilson_interval(hits / n, n) == pytest.approx((low, high), abs=5e-5)


@given(n=st.integers(1, 10_000), data=st.data())
def test_wilson_solves_its_equation(n: int, data: st.DataObject) -> None:
    """Its ends are the p for which the observed share lies z standard errors away."""
    share = data.draw(st.integers(0, n)) / n
    low, high = wilson_interval(share, n, 1.96)
    assert 0 <= low <= share <= high <= 1
    for end in (low, high):
        squared = 1.96**2 * end * (1 - end) / n
        assert (share - end) ** 2 == pytest.approx(squared, rel=1e-6, abs=1e-9)


def test_wilson_refuses_what_is_no_proportion() -> None:
    for share, n in ((1.1, 10), (-0.1, 10), (0.5, 0), (math.nan, 10)):
        with pytest.raises(ValueError, match="no interval"):
            wilson_interval(share, n)


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(4, 2.776445), (5, 2.570582), (10, 2.228139), (30, 2.042272)]
)
def test_student_quantiles_are_those_of_the_tables(freedom: int, quantile: float) -> None:
    assert student_t95(freedom) == pytest.approx(quantile, rel=1e-3)


def test_student_is_close_even_with_two_degrees_of_freedom() -> None:
    assert student_t95(2) == pytest.approx(4.302653, rel=0.02)


def test_ratio_with_equal_sizes_is_the_interval_of_a_mean() -> None:
    values = np.array([0.4, 0.9, 1.4, 0.2, 0.7, 1.1])
    mean, interval = ratio_interval(list(values * 7), [7.0] * 6)
    reach = student_t95(5) * values.std(ddof=1) / math.sqrt(6)
    assert mean == pytest.approx(values.mean())
    assert interval == pytest.approx((mean - reach, mean + reach))


def test_samples_without_size_do_not_count() -> None:
    sums, sizes = [1.0, 2.0, 4.0], [2.0, 3.0, 5.0]
    assert ratio_interval([*sums, 0.0], [*sizes, 0.0]) == ratio_interval(sums, sizes)


def test_too_few_samples_give_no_interval() -> None:
    assert ratio_interval([1.0, 2.0], [10.0, 10.0]) == (0.15, None)
    assert share_interval([5.0, 5.0], [10.0, 10.0]) == (0.5, None)


def test_nothing_has_no_ratio() -> None:
    with pytest.raises(ValueError, match="over nothing"):
        ratio_interval([0.0], [0.0])


def test_a_diverged_model_gives_nan_without_interval() -> None:
    value, interval = ratio_interval([1.0, math.nan, 2.0, 3.0], [1.0] * 4)
    assert math.isnan(value)
    assert interval is None


def test_full_agreement_is_still_uncertain() -> None:
    value, interval = share_interval([10.0] * 8, [10.0] * 8)
    assert interval is not None
    assert value == 1.0 == interval[1]
    assert interval[0] == pytest.approx(wilson_interval(1.0, 8, student_t95(7))[0])


def _coverage(kind: str, samples: int, rounds: int = 2000) -> float:
    """Share of simulated data sets whose interval holds the true value.

    Each sample has its own rate and its own size, and the two are independent, so the true ratio
    is the mean rate.
    """
    random = np.random.default_rng(7)
    hits = 0
    for _ in range(rounds):
        sizes = random.integers(5, 60, samples)
        if kind == "share":
            rates = random.beta(8, 2, samples)
            _, interval = share_interval(random.binomial(sizes, rates).tolist(), sizes.tolist())
            true = 0.8
        else:
            rates = random.gamma(4, 0.25, samples)
            _, interval = ratio_interval(random.gamma(sizes, rates).tolist(), sizes.tolist())
            true = 1.0
        assert interval is not None
        hits += interval[0] <= true <= interval[1]
    return hits / rounds


@pytest.mark.parametrize(
    ("kind", "samples"), [("mean", 12), ("mean", 60), ("share", 12), ("share", 60)]
)
def test_intervals_hold_the_truth_about_as_often_as_they_say(kind: str, samples: int) -> None:
    assert _coverage(kind, samples) == pytest.approx(0.95, abs=0.035)


def test_counting_rows_as_independent_would_not_hold() -> None:
    """Why samples are the unit: Wilson over rows is far too sure of itself."""
    random = np.random.default_rng(7)
    hits = 0
    for _ in range(500):
        sizes = random.integers(5, 60, 30)
        right = random.binomial(sizes, random.beta(8, 2, 30))
        low, high = wilson_interval(right.sum() / sizes.sum(), int(sizes.sum()))
        hits += low <= 0.8 <= high
    assert hits / 500 < 0.75


def test_score_is_json_without_nan() -> None:
    good = Score(value=0.5, n=4, interval95=(0.2, 0.8), better="higher", unit="share")
    assert good.to_json() == {
        "value": 0.5,
        "n": 4,
        "interval95": [0.2, 0.8],
        "better": "higher",
        "unit": "share",
    }
    assert Score.from_json(good.to_json()) == good
    bad = Score(value=math.inf, n=4, interval95=(0.2, math.nan), better="lower", unit="x")
    assert bad.to_json()["value"] is None
    assert bad.to_json()["interval95"] is None
    assert math.isnan(Score.from_json(bad.to_json()).value)
