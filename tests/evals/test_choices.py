"""Which option a text chooses."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from limbeck.evals.choices import chosen, options_in, same_option

OPTIONS = {"A": "park", "B": "a dog", "C": "gravity", "D": "gravity"}


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("So the answer is (b) a dog.", "B"),
        ("So the answer is (b)", "B"),
        ("The answer is B", "B"),
        ("the answer is b.", "B"),
        ("The answer is (b). Hope it helps!", "B"),
        ("**Answer:** (B)", "B"),
        ("The correct answer is option B: a dog", "B"),
        ("Answer: B. a dog", "B"),
        ("\\boxed{B}", "B"),
        ("The answer is \\boxed{\\text{B}}.", "B"),
        ("First it seems (a).\nBut the answer is (b).", "B"),
        ("The answer is (a).\nNo, the answer is (b).", "B"),
        ("B", "B"),
        ("(b) a dog", "B"),
        ("B) a dog", "B"),
        ("A dog", "B"),  # an option, not the letter A
        ("The answer is A dog.", "B"),
        ("The answer is gravity", "C"),
        ("It can only be one.\n(c)", "C"),
        ("The answer is (C) Gravity!", "C"),
        ("The answer is (a) a park", "A"),  # no option's very text: the letter counts
        ("The correct answer is **B**.", "B"),
        ("The answer is $B$.", "B"),
        ('The answer is "B".', "B"),
        ("Final answer: `B`.", "B"),
        ("The answer is **B.** a dog", "B"),
        ("The answer is **B**, as dogs bark.", "B"),
        ("The answer is B (a dog).", "B"),
        ("The answer is B - a dog", "B"),
        ("The answer is B. P(A) = 0.5", "B"),  # a function, not an option
        ("The answer is B, since f(a) > 0", "B"),
        ("The answer is B, A park is no animal", "B"),
    ],
)
def test_the_chosen_letter(text, letter):
    assert chosen(text, OPTIONS).letter == letter


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("The answer is either (a) park or (b) a dog.", "several"),
        ("The answer is (a) or (b).", "several"),
        ("The answer is A or B", "no option"),
        ("The answer is A, B.", "several"),
        ("The answer is A; C", "several"),
        ("The answer is A, B and C.", "several"),
        ("The answer is B. Not (A) but (C)", "several"),
        ("The answer is not (b).", "is not"),
        ("The answer is (b) park.", "another option"),
        ("The answer is (e) none.", "no option E"),
        ("The answer is E (", "no option"),
        ("So the answer is one of these four.", "no option"),
        ("I like dogs.", "no option"),
        (" \n", "empty"),
    ],
)
def test_what_is_unclear(text, reason):
    found = chosen(text, OPTIONS)
    assert found.letter is None
    assert reason in found.unclear


def test_an_option_with_brackets_or_letters_in_it_is_itself():
    options = {"A": "A 501(c) charity", "B": "Vitamin A, C and D", "C": "5", "D": "-5"}
    for letter, option in options.items():
        for text in (f"{letter}. {option}", f"{letter}) {option}.", f"**{letter}. {option}**"):
            assert chosen(f"The answer is {text}", options).letter == letter
    assert "another option" in chosen("The answer is C. -5", options).unclear


def test_options_with_the_same_text_are_the_same():
    assert same_option(chosen("(c)", OPTIONS), "D", OPTIONS)
    assert same_option(chosen("(d)", OPTIONS), "gravity", OPTIONS) is True
    assert same_option(chosen("(d) gravity", OPTIONS), "(c) gravity", OPTIONS)
    assert not same_option(chosen("(a)", OPTIONS), "gravity", OPTIONS)


@pytest.mark.parametrize(
    ("text", "answer", "same"),
    [("(b) a dog.", "a dog", True), ("(b)", "B", True), ("a dog", "A Dog.", True),
     ("(b) a dog", "(c) a dog", False), ("(b)", "a dog", False), ("cat", "a dog", False),
     ("The correct answer is **B**.", "B", True), ("The answer is B. P(A) = 0.5", "A", False)],
)  # fmt: skip
def test_without_known_options(text, answer, same):
    assert same_option(chosen(text, {}), answer, {}) is same


def test_options_of_the_question_itself():
    question = (
        "Q: Example?\n(a) one\n(b) two\nA: The answer is (a) one.\n\n"
        "Q: Which?\nAnswer Choices:\n(a) park\n(b) a dog\nA:"
    )
    assert options_in(question) == {"A": "park", "B": "a dog"}
    assert options_in("Which?\nA. x y\nB. z\n\nAnswer:") == {"A": "x y", "B": "z"}
    assert options_in("A) x\nB) y") == {"A": "x", "B": "y"}


@pytest.mark.parametrize("question", ["", "Which?", "A: no", "(a) one alone", "(b) x\n(c) y"])
def test_no_options(question):
    assert options_in(question) == {}


@given(st.text(alphabet="abcdAB()\\boxed{}answer is.,:;\n or not", max_size=120))
def test_any_text_gets_a_choice_or_a_reason(text):
    found = chosen(text, OPTIONS)
    assert bool(found.unclear) == (found.letter is None)
    assert found.letter is None or found.letter in OPTIONS
    assert found == chosen(text, OPTIONS)
