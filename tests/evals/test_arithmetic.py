"""Expressions and equations in text, beside Python's own arithmetic on fractions."""

import json
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from limbeck.evals.arithmetic import arithmetic, equations

TRAIN = Path(__file__).parents[3] / "shared/data/gsm8k/train.jsonl"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("84", "84"),
        ("( 84.0 / 2.0 )", "42"),
        ("10 - (3 + 6)", "1"),
        ("2 - 3 - 4", "-5"),
        ("24 / 4 / 2", "3"),
        ("2 + 3 * 4", "14"),
        ("-(5 - 3)", "-2"),
        ("- 5", "-5"),
        ("2--3", "5"),
        ("3*-2", "-6"),
        ("$1,234.50 + 1", "1235.5"),
        ("50% * 4", "2"),
        ("6 \u00d7 7 \u00f7 2 \u2212 1", "20"),
        ("9 x 2", "18"),
    ],
)
def test_values(text, value):
    assert arithmetic(text) == Fraction(value)


@pytest.mark.parametrize(
    "text",
    ["", "x", "2 * x", "(some - 8)", "(9 + 6", "9 + 6)", "1 2", "1 / 0", "+5", "3 +", "2 ** 3",
     "(14, 21)", "__import__('os')", "1" * 501, "(" * 60 + "1" + ")" * 60],
)  # fmt: skip
def test_what_has_no_value(text):
    assert arithmetic(text) is None


expressions = st.recursive(
    st.integers(0, 99).map(str),
    lambda inner: st.tuples(inner, st.sampled_from("+-*/"), inner).map(
        lambda parts: f"({parts[0]} {parts[1]} {parts[2]})"
    ),
    max_leaves=8,
)


@given(expressions)
def test_it_is_python_s_arithmetic(text):
    exact = "".join(f"Fraction({part})" if part.isdigit() else part for part in _pieces(text))
    try:
        expected = Fraction(eval(exact, {"Fraction": Fraction}))  # the reference
    except ZeroDivisionError:
        expected = None
    assert arithmetic(text) == expected


def _pieces(text):
    return text.replace("(", " ( ").replace(")", " ) ").split()


@given(st.text(alphabet="0123456789 ()+-*/=x.,$%<>\n", max_size=300))
def test_any_text_is_read_without_error(text):
    arithmetic(text)
    for found in equations(text):
        assert arithmetic(found.left) is not None


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("So 16 - 3 - 4 = 9.", "16-3-4=9"),
        ("sells 16 - 3 = <<16-3=13>>13 eggs, 9 * $2 = $<<9*2=18>>18", "16-3=13 9*2=18"),
        ("10-3 = 7 = 14/2", "10-3=7 7=14/2"),
        ("(3 + 4 = 7) and (2 * (3 + 1) = 8).", "3+4=7 2*(3+1)=8"),
        ("total = 3 + 4 = 7", "3+4=7"),
        ("- 3 + 4 = 7\n* 2 + 2 = 4", "3+4=7 2+2=4"),
        ("-3 + 4 = 1", "-3+4=1"),
        ("x - 3 + 4 = 7", ""),  # the middle of a longer one
        ("2 * x = 8, x = 4, 5 = 5, 3 + 4 = 7th", ""),
        ("12 / 5 = 2.4km", ""),
        ("4 1/2 + 1 = 5 1/2", ""),  # numbers that are mixed
        ("1/2 + 1 = 1 1/2", ""),
        ("12:30 - 1 = 11", ""),  # a time of day
        ("Day 1: 5 + 5 = 10", "5+5=10"),
        ("2 + 3 = 5 4 + 3 = 7", "2+3=5 4+3=7"),
    ],
)
def test_equations(text, found):
    assert " ".join(map(str, equations(text))) == found


@pytest.mark.parametrize(
    ("text", "true"),
    [
        ("1 / 3 = 0.33", True),
        ("1 / 3 = 0.34", False),
        ("10 / 3 = 3", False),  # a whole number is meant as it stands
        ("3 + 4 = 7.5", False),
        ("2 * 3 + 4 = 7 + 3", True),
        ("2 + 2 = 5", False),
        ("1 / 3 = 33.3%", True),
        ("1 / 3 = 33.4%", False),
        ("1 / 3 = 33%", False),
        ("10 * 33.3% = 333%", True),
    ],
)
def test_which_equations_hold(text, true):
    assert [found.true for found in equations(text)] == [true]


@pytest.mark.parametrize(
    "text",
    ["1 " * 50_000, "(" * 100_000, "1+" * 50_000, "1 + " * 20_000 + "=", "1=1" * 30_000,
     "<<1=" * 30_000, "1,111" * 20_000, "-(" * 40_000, "=<<" * 40_000],
)  # fmt: skip
def test_long_noise_is_read(text):
    equations(text)  # exponential or cubic time would not come back
    assert arithmetic(text) is None


@pytest.mark.skipif(not TRAIN.exists(), reason="the shared GSM8K problems are not here")
def test_equations_of_people_hold():
    """GSM8K's solutions were written with a calculator; what does not hold was misread."""
    found = [
        equation.true
        for line in TRAIN.read_text(encoding="utf-8").splitlines()
        for equation in equations(json.loads(line)["answer"])
    ]
    assert len(found) > 19_000
    assert sum(found) / len(found) > 0.99
