"""Matchers on written cases, and on real answers of GPT-3 that were marked by hand."""

import json
import time
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from limbeck.core.errors import RecipeError
from limbeck.evals.matching import captures, check_pattern, last_number, same_text

SOLUTIONS = Path(__file__).parents[3] / "shared/data/gsm8k/example_model_solutions.jsonl"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The answer is 19", "19"),
        ("19.0", "19"),
        ("19.", "19"),
        ("It costs $1,234.50.", "1234.5"),
        ("1,450,000", "1450000"),
        ("-5", "-5"),
        ("−5", "-5"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        ("+5", "5"),
        ("x = -4.", "-4"),
        ("16-7", "7"),
        ("(10)-3", "3"),
        ("between 3-5", "5"),
        ("3/4", "3/4"),
        ("-3/4", "-3/4"),
        ("1 1/2", "3/2"),
        (r"\frac{3}{4}", "3/4"),
        (r"\boxed{-12}", "-12"),
        ("**18**", "18"),
        (".5", "1/2"),
        ("50%", "50"),
        ("1e3", "1000"),
        ("10, 20", "20"),
        ("10,20", "20"),
        ("18 g of H2O", "18"),
        ("the 18th", "18"),
        ("<<2*9=18>>18 per day\nA: 18", "18"),
        ("3 left, 2/0 undefined", "3"),
        (r"$-\frac{1}{2}$", "-1/2"),
        (r"\boxed{\frac{-1}{2}}", "-1/2"),
        (r"x=4, so \boxed{\frac12}", "1/2"),
        (r"\tfrac1{12}", "1/12"),
        (r"1\frac{1}{2}", "3/2"),
        (r"10-\frac{1}{2}", "1/2"),
        (r"10 - \frac{1}{2}", "1/2"),
        (r"x\frac{1}{2}", "1/2"),
        (r"\boxed{1{,}234}", "1234"),
        (r"\boxed{12\,345}", "12345"),
        (r"\$32,\!348", "32348"),
        (r"11,\! 111,\! 100", "11111100"),
        (r"(1,\,2)", "2"),
        ("25 cm^2", "25"),
        ("5 m/s^2.", "5"),
        (r"$25\text{ cm}^2$", "25"),
        ("25 cm^{2}", "25"),
        ("2^10", "10"),
        ("x = \u20137", "-7"),
        ("3\u20135", "5"),
        ("pages 3 \u2013 5", "5"),
    ],
)
def test_last_number(text: str, number: str) -> None:
    assert last_number(text) == Fraction(number)


@pytest.mark.parametrize("text", ["", "none", "H2O", "v2", "9" * 5000])
def test_no_number(text: str) -> None:
    assert last_number(text) is None


@given(
    st.decimals(
        allow_nan=False, allow_infinity=False, places=3, max_value=10**9, min_value=-(10**9)
    )
)
def test_written_numbers_are_read_back(number) -> None:
    for text in (f"so {number:f}", f"= {number:,}.", f"about {number:f} km"):
        assert last_number(text) == Fraction(number)


@given(st.integers(-999, 999), st.integers(1, 999))
def test_fractions_of_latex_are_read_back(top: int, bottom: int) -> None:
    sign = "-" if top < 0 else ""
    for text in (
        rf"${sign}\frac{{{abs(top)}}}{{{bottom}}}$",
        rf"so x = \dfrac{{{top}}}{{{bottom}}}.",
        rf"\boxed{{{sign}\tfrac{{{abs(top)}}}{{ {bottom} }}}}",
    ):
        assert last_number(text) == Fraction(top, bottom)


@given(st.text(alphabet="0123456789,.-/ $eE\\frac{}+x\n", max_size=200))
def test_any_text_is_read_without_error(text: str) -> None:
    last_number(text)


def test_long_noise_is_read_quickly() -> None:
    start = time.perf_counter()
    for text in ("1" * 100_000, "1,111" * 20_000, "1 1/" * 20_000, "- " * 50_000, "1.1" * 30_000,
                 "1,\\! " * 20_000, "\\frac1" * 20_000, "x^{" * 30_000,
                 "\\frac " * 20_000):  # fmt: skip
        last_number(text)
    assert time.perf_counter() - start < 3


def test_same_text_but_for_white_space() -> None:
    assert same_text(" a  b\n", "a b")
    assert not same_text("A b", "a b")


@pytest.mark.skipif(not SOLUTIONS.exists(), reason="the shared GSM8K solutions are not here")
def test_last_number_judges_as_the_authors_of_gsm8k_did() -> None:
    """5276 solutions of four GPT-3 models; on all of them the verdict is that of the labels."""
    agree, total = 0, 0
    for line in SOLUTIONS.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        truth = last_number(row["ground_truth"])
        for solution in row.values():
            if isinstance(solution, dict):
                total += 1
                agree += (last_number(solution["solution"]) == truth) == solution["is_correct"]
    print(f"last_number agrees with {agree} of {total} labels")
    assert total == 5276
    assert agree / total >= 0.999


def test_captures_the_first_match() -> None:
    texts = ["A: 7\nA: 8", "nothing", "A: \ud800", "A: é"]
    assert captures(r"A: (\S+)", texts) == ["7", None, "\ud800", "é"]
    assert captures("(a)|b", ["b"]) == [None]


def test_an_endless_pattern_is_stopped() -> None:
    start = time.perf_counter()
    with pytest.raises(RecipeError, match="repeats inside of repeats"):
        captures(r"(a+)+$", ["a" * 40 + "b"], limit_seconds=0.5)
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize(
    ("pattern", "reason"), [("(", "not a regular"), ("a", "0 groups"), ("(a)(b)", "2 groups")]
)
def test_patterns_are_checked(pattern: str, reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        check_pattern(pattern)
