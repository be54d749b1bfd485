"""Verdicts: right, wrong or unclear; on written cases, and on answers that people marked."""

import json
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from limbeck.core.errors import RecipeError
from limbeck.evals.matching import Json, json_in, places, read_json
from limbeck.evals.verifiers import Verdict, Verifier

SOLUTIONS = Path(__file__).parents[3] / "shared/data/gsm8k/example_model_solutions.jsonl"
RIGHT, WRONG, UNCLEAR = "right", "wrong", "unclear"


def verdict(match, text, answer, question="", **more):
    return Verifier(match=match, **more).check(text, answer, question).verdict


@pytest.mark.parametrize(
    ("match", "text", "answer", "said"),
    [
        ("exact", " a  b\n", "a b", RIGHT),
        ("exact", "A b", "a b", WRONG),
        ("exact", " ", "a", UNCLEAR),
        ("last_number", "2 * 9 = 18 dollars", "18", RIGHT),
        ("last_number", "18 of 20", "18", WRONG),
        ("last_number", "none", "18", UNCLEAR),
        ("last_number", "<<16-3=13>>13\nA: 18", "#### 18.0", RIGHT),
        ("choice", "The answer is (b) y.", "y", RIGHT),
        ("choice", "The answer is (a) x.", "y", WRONG),
        ("choice", "Either (a) or (b).", "y", UNCLEAR),
        ("arithmetic", "The answer is (84 / 2).", "( 84.0 / 2.0 )", RIGHT),
        ("arithmetic", "The answer is (7 * 36).", "( 7.0 * 30.0 )", WRONG),
        ("arithmetic", "The answer is (2 * x).", "( 7.0 * 30.0 )", UNCLEAR),
        ("arithmetic", "The answer is **42**.", "42", RIGHT),
        ("arithmetic", "**Answer:** (84 / 2)", "42", RIGHT),
        ("arithmetic", "#### 42", "42", RIGHT),
        ("arithmetic", "The answer is $\\boxed{42}$.", "42", RIGHT),
        ("arithmetic", "The answer is (84 / 2) = 42.", "42", RIGHT),
        ("arithmetic", "The answer is (84 / 2) = 43.", "42", WRONG),
        ("last_number", "The answer is 18.\nShe sells 9 eggs.", "18", RIGHT),
        ("last_number", "The answer is **18**.\n\nQ: Tom has 9 eggs.", "18", RIGHT),
        ("last_number", "The answer is 3 + 4.\n#### 7", "7", RIGHT),
        ("last_number", "The answer is as follows:\n3 + 4 = 7", "7", RIGHT),
        ("last_number", "A: She has 3 + 4 = 7.\nShe sells 2, so 5", "5", RIGHT),  # the solution
        ("json", '{"b": 2, "a": 1.0}', '{"a": 1, "b": 2}', RIGHT),
        ("json", "I call: {}", '{"a": 1}', WRONG),
        ("json", "nothing to call", '{"a": 1}', UNCLEAR),
    ],
)
def test_verdicts(match, text, answer, said):
    assert verdict(match, text, answer, "Which?\n(a) x\n(b) y\n") == said


def test_a_pattern_catches_the_answer():
    check = Verifier(match="regex", pattern=r"####\s*(-?\d+)")
    verdicts = check.check_all(["x #### 7 #### 8", "7", "####8"], ["7"] * 3)
    assert [one.verdict for one in verdicts] == [RIGHT, UNCLEAR, WRONG]
    assert [one.found for one in verdicts] == ["7", None, "8"]


def test_the_options_are_read_from_the_question():
    assert verdict("choice", "D", "gravity") == WRONG  # nobody knows what D is
    assert verdict("choice", "B", "gravity", "Which?\n(a) park\n(b) gravity\n") == RIGHT


HEDGED = [
    ("not 18", "18", UNCLEAR),
    ("The answer is not 18.", "18", UNCLEAR),
    ("The answer isn't $18$", "18", UNCLEAR),
    ("18 eggs, not 20", "20", UNCLEAR),
    ("18, or maybe 20", "20", UNCLEAR),
    ("18, or maybe 20", "18", UNCLEAR),
    ("It is \\boxed{18} or \\boxed{20}.", "20", UNCLEAR),
    ("- 5", "-5", RIGHT),
    ("- 5", "5", WRONG),
    ("The answer is - 5.", "-5", RIGHT),
    ("The answer is - $5.", "-5", RIGHT),
    ("x = - 5", "-5", RIGHT),
    ("x = \u2212 5", "5", WRONG),
    ("10 - 5", "-5", WRONG),
    ("We have:\n- 3 pears\n- 5 apples", "5", RIGHT),  # a list
    ("She does not pay.\nA: 18", "18", RIGHT),
    ("He takes 2 or 3 each day.\nA: 18", "18", RIGHT),
]


@pytest.mark.parametrize(("text", "answer", "said"), HEDGED)
def test_numbers_that_are_not_said_plainly(text, answer, said):
    assert verdict("last_number", text, answer) == said


def test_mathematics_that_is_not_said_plainly():
    pytest.importorskip("math_verify")
    texts, answers, expected = zip(*HEDGED, strict=True)
    verdicts = Verifier(match="math").check_all(texts, answers)
    found = dict(zip(texts, (one.verdict for one in verdicts), strict=True))
    # A bare difference is its value for mathematics.
    assert found.pop("10 - 5") == WRONG
    assert found == {t: s for t, s in zip(texts, expected, strict=True) if t != "10 - 5"}


MATHEMATICS = [
    ("0.5", "1/2", RIGHT),
    ("so it is $0.5$", "\\frac{1}{2}", RIGHT),
    ("The answer is (1, 2).", "(1, 2)", RIGHT),
    ("The answer is (2, 1).", "(1, 2)", WRONG),
    ("The answer is (1, 2).", "2", WRONG),
    ("\\boxed{\\sqrt{8}}", "2\\sqrt{2}", RIGHT),
    ("The answer is $1,200.00.", "$1,200", RIGHT),
    ("The answer is 50%.", "$0.5$", RIGHT),
    ("x=1 or x=2", "x=1 or x=2", RIGHT),
    ("The answer is (84 / 2).", "42", RIGHT),
    ("none", "18", UNCLEAR),
    ("", "18", UNCLEAR),
    ("$x$", "", UNCLEAR),
    # Bold, italics and code are no mathematics.
    ("The answer is **42**.", "42", RIGHT),
    ("**42**", "42", RIGHT),
    ("Steps.\n\n*42*", "42", RIGHT),
    ("The answer is **-5**.", "-5", RIGHT),
    ("The answer is **3/4.**", "3/4", RIGHT),
    ("Answer: `1,234`.", "1234", RIGHT),
    ("The answer is **43**.", "42", WRONG),
    # Small numbers differ by what they are, not in the sixth decimal.
    ("The answer is $9.1\\times10^{-31}$ kg", "1.6\\times10^{-19}", WRONG),
    ("The answer is 0.0000002", "0.0000001", WRONG),
    ("The answer is 0.0000001", "0", WRONG),
    ("The answer is 0.0000001", "1\\times10^{-7}", RIGHT),
    ("\\boxed{0.333333}", "\\frac{1}{3}", RIGHT),
    ("\\boxed{0.016667}", "\\frac{1}{60}", RIGHT),
    ("The answer is $50\\%$", "0.5", RIGHT),
    ("The answer is $50\\%$", "50", RIGHT),
    # A space between digits parts them, but for thousands.
    ("The answer is 1 1/2.", "11/2", WRONG),
    ("The answer is 1 1/2.", "3/2", RIGHT),
    ("The answer is 1.5", "1 1/2", RIGHT),
    ("The answer is 1 1/2 cups.", "1/2", WRONG),
    ("The answer is 1 2.", "12", WRONG),
    ("The answer is 1 000.", "1000", RIGHT),
    # LaTeX without dollars is not cut at its first number.
    ("The answer is 3\\sqrt{13}.", "3", WRONG),
    ("The answer is 3\\sqrt{13} cm, as shown.", "3\\sqrt{13}", RIGHT),
    ("The answer is 5\\frac{1}{2}.", "1/2", WRONG),
    ("The answer is 5\\frac{1}{2}.", "11/2", RIGHT),
    ("Therefore, 3\\sqrt{13}.", "3", WRONG),
    ("The answer is \\pi.\nThat is about 3.", "\\pi", RIGHT),
    ("The answer is \\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "2", WRONG),
    ("\\boxed{7}\nNote that \\frac{1}{2} of it is not asked for.", "7", RIGHT),
    # Money, as MATH's answers have it.
    ("It costs $\\boxed{\\$18.90}$.", "\\$18.90", RIGHT),
    ("The answer is \\$5.", "\\$5", RIGHT),
    ("$\\boxed{\\$32,\\!348}$", "\\$32,\\!348", RIGHT),
    ("$\\boxed{\\$18.91}$", "\\$18.90", WRONG),
]


def test_mathematics():
    pytest.importorskip("math_verify")
    texts, answers, expected = zip(*MATHEMATICS, strict=True)
    verdicts = Verifier(match="math").check_all(texts, answers)
    assert [one.verdict for one in verdicts] == list(expected)


def test_a_power_tower_is_unclear():
    pytest.importorskip("math_verify")
    said = Verifier(match="math", seconds=1).check("It is $9^{9^{9}}$.", "18")
    assert said == Verdict(verdict=UNCLEAR, reason="comparing it took more than 1 s")


values = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | st.text("ab1", max_size=2),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab", max_size=2), inner),
    max_leaves=6,
)


@given(values, st.randoms())
def test_json_does_not_care_for_the_order_of_keys(value, order):
    def shuffled(one):
        if isinstance(one, dict):
            keys = list(one)
            order.shuffle(keys)
            return {key: shuffled(one[key]) for key in keys}
        return [shuffled(inner) for inner in one] if isinstance(one, list) else one

    assert verdict("json", json.dumps(shuffled(value), indent=1), json.dumps(value)) == RIGHT


@given(values, values)
def test_json_is_compared_strictly(a, b):
    same = json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)
    assert (verdict("json", json.dumps(a), json.dumps(b)) == RIGHT) is same


@given(
    st.decimals("1e-30", "1e-3", allow_nan=False, places=33),
    st.decimals("1e-30", "1e-3", allow_nan=False, places=33),
)
@settings(max_examples=30, deadline=None)
def test_small_numbers_are_right_where_four_digits_are_the_same(a, b):
    pytest.importorskip("math_verify")
    apart = abs(a - b) / max(a, b)
    if apart > Decimal("1e-2"):
        assert verdict("math", f"The answer is {a:f}", f"{b:f}") == WRONG
    assert verdict("math", f"The answer is ${a:f}$.", f"{a:f}") == RIGHT


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("1", "1.0", True),
        ("0.1", "1e-1", True),
        ("0.1", "0.10000000000000001", False),  # exact
        ("1", "true", False),
        ("0", "false", False),
        ('"1"', "1", False),
        ("null", "0", False),
        ('{"a": 1}', '{"a": 1, "b": null}', False),
        ("[1, 2]", "[2, 1]", False),
        ('{"a": [1, {"b": 2.0}]}', '{"a": [1.0, {"b": 2}]}', True),
    ],
)
def test_types_of_json(a, b, same):
    assert (read_json(a) == read_json(b)) is same
    assert (read_json(b) == read_json(a)) is same


@pytest.mark.parametrize("text", ['{"a": 1, "a": 2}', "NaN", "[Infinity]", "{'a': 1}", "", "{",
                                  "[" * 100_000, "[" * 101 + "]" * 101,
                                  '{"x": 1e99999999999999999999}'])  # fmt: skip
def test_what_is_no_json(text):
    assert read_json(text) is None


def test_json_within_a_text():
    call = Json({"a": 1})
    assert json_in('Sure:\n```json\n{"a": 1}\n```\nnot [2]') == (call,)
    assert json_in('use f(x) [see below] with {"a": 1} now') == (call,)
    assert json_in('{"a": 1} and again {"a": 1.0}') == (call, call)
    assert verdict("json", '{"a": 1} or {"a": 2}', '{"a": 1}') == UNCLEAR
    assert verdict("json", '{"a": 1}, so {"a": 1.0}', '{"a": 1}') == RIGHT
    assert json_in("{" * 100_000) == ()
    assert json_in('for x in [0, 1) I call {"a": 1}') == (call,)


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "x", "arguments": {"a": 1}',  # cut off
        '[{"a": 2}, {"a": 1}',
        '{"name": "}", "arguments": {"a": 1}, "name": "x"}',  # a key twice
        '{"a": 1e99999999999999999999, "b": {"a": 1}}',
        "{'name': 'x', 'arguments': {\"a\": 1}}",
        '{"a": "never closed {"a": 1}',
    ],
)
def test_what_stands_within_broken_json_is_no_answer(text):
    assert json_in(text) == ()
    assert json_in(f'[see here] {{"a": 1}} {text}') == (Json({"a": 1}),)


@given(values, st.integers(0, 100))
def test_what_was_cut_off_gives_nothing(value, place):
    text = json.dumps({"call": value})
    cut = text[: place % len(text)]
    assert json_in(cut) == ()


@pytest.mark.parametrize(
    "text", ["[" * 100 + "]" * 100, "[" * 700 + "]" * 700, '{"x": 1e99999999999999999999}']
)
def test_no_json_ends_a_run(text):
    """What no model should write, and any model can, is a verdict and not an error."""
    assert verdict("json", text, "[]") in (WRONG, UNCLEAR)
    assert verdict("json", f"I call {text} now", '{"x": 1}') in (WRONG, UNCLEAR)


def test_places_of_the_first_and_the_last_match():
    texts = ["a1 a2", "b", "a\u00e93"]
    assert places(r"a\D?(\d)", texts) == [(0, 2, 1, 2), None, (0, 3, 2, 3)]
    assert places(r"a\D?(\d)", texts, last=True)[0] == (3, 5, 4, 5)
    assert places("(a)|b", ["b"]) == [(0, 1, -1, -1)]


@pytest.mark.parametrize(
    ("match", "answer", "problem"),
    [
        ("last_number", "none", "has no number"),
        ("last_number", "#### 18", None),
        ("arithmetic", "2 * x", "is no expression of numbers"),
        ("json", "{", "is not JSON"),
        ("math", " ", "is empty"),
        ("choice", "", "is empty"),
        ("exact", "", None),
    ],
)
def test_answers_that_cannot_be_the_known_one(match, answer, problem):
    assert Verifier(match=match).problem_with(answer) == problem


def test_fields_are_checked():
    adapter = TypeAdapter(Verifier)
    for wrong in (
        {"match": "fuzzy"},
        {"match": "regex"},
        {"pattern": "(a)"},
        {"match": "regex", "pattern": "("},
        {"match": "math", "seconds": 0},
    ):
        with pytest.raises((ValidationError, RecipeError)):
            adapter.validate_python(wrong)


@given(st.text(max_size=80), st.sampled_from(["exact", "last_number", "choice", "json",
                                              "arithmetic"]))  # fmt: skip
def test_any_text_gets_a_verdict(text, match):
    said = Verifier(match=match).check(text, "18")
    assert said.verdict in (RIGHT, WRONG, UNCLEAR)
    assert bool(said.reason) == (said.verdict == UNCLEAR)
    assert (said.found is None) == (said.verdict == UNCLEAR)


@given(
    st.lists(
        st.text("12/ \\${}()*_.,:\n-xa")
        | st.sampled_from(
            ["The answer is \\pi.\nThen 5", "The answer is no \\\nbut 5", "\\frac", "\\sqrt{2"]
        ),
        max_size=20,
    )
)
@settings(max_examples=5, deadline=None)  # fmt: skip
def test_any_text_gets_a_verdict_as_mathematics(texts):
    pytest.importorskip("math_verify")
    for said in Verifier(match="math").check_all(texts, ["18"] * len(texts)):
        assert bool(said.reason) == (said.verdict == UNCLEAR)


LONG = """
from limbeck.evals.arithmetic import equations
from limbeck.evals.verifiers import Verifier
from limbeck.synth.rationales import split
for part in (
    "\\n", " \\n", "answer", "answer is\\n", "A:\\n", "1 or ", "not ", "is - ", "1+", "1 = ", "((",
    "<<1=1>>", "\\\\boxed{", "So the answer is ", "####", "</think>", "a) x\\n", "[", "1,000,",
    '{"', '["\\\\', "1,\\\\!", "\\\\frac1", "3\\\\sqrt{", "x^", "#### ",
):
    text = part * (200_000 // len(part))
    equations(text)
    for form in ("the_answer_is", "hashes", "boxed", "think"):
        split(text, form)
    for match in ("exact", "last_number", "choice", "json", "arithmetic"):
        Verifier(match=match).check(text, "7", text)
"""


def test_no_long_text_hangs_them():
    """In a process of its own, as what hangs cannot be stopped from within."""
    subprocess.run([sys.executable, "-c", LONG], check=True, timeout=120)


@pytest.mark.skipif(not SOLUTIONS.exists(), reason="the shared GSM8K solutions are not here")
@pytest.mark.parametrize(("match", "every"), [("last_number", 1), ("math", 8)])
def test_verdicts_are_those_of_the_authors_of_gsm8k(match, every):
    """All 5276 by the last number; an eighth by mathematics (benchmarks/verifiers.py has all)."""
    if match == "math":
        pytest.importorskip("math_verify")
    texts: list[str] = []
    answers: list[str] = []
    labels: list[bool] = []
    for line in SOLUTIONS.read_text(encoding="utf-8").splitlines()[::every]:
        row = json.loads(line)
        for said in row.values():
            if isinstance(said, dict):
                texts.append(said["solution"])
                answers.append(row["ground_truth"].rpartition("A:")[2].strip())
                labels.append(said["is_correct"])
    verdicts = Verifier(match=match).check_all(texts, answers)
    assert [one.right for one in verdicts] == labels
