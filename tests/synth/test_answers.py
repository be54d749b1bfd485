"""Answers to prompts, and their distribution."""

import math

import pytest
from fakes import FakeWriter, broken, cut
from hypothesis import given
from hypothesis import strategies as st

from limbeck.core.text import is_whole
from limbeck.core.types import Turn
from limbeck.synth.answers import Answers
from limbeck.synth.distribution import Distribution, coverage, entropy, normal
from limbeck.synth.rows import NO_PROMPT, UNREADABLE, Row
from limbeck.synth.step import Desk, through


def rows(*prompts):
    return [
        Row(id=f"r{k}", prompt=(Turn(text=p),), completion="label", answer="7")
        for k, p in enumerate(prompts)
    ]


def run(steps, given, writer):
    desk = Desk(seed=3, writer=lambda name: writer, reader=lambda name: None)
    return list(through(steps, given, desk)), desk


def test_each_prompt_gets_n_rows_that_are_a_group():
    writer = FakeWriter(lambda question, index: f"{question.id} says {index}")
    found, _ = run([Answers(teacher="t", n=3, max_tokens=9)], rows("a", "b"), writer)
    assert [row.id for row in found] == ["r0#0", "r0#1", "r0#2", "r1#0", "r1#1", "r1#2"]
    assert [row.completion for row in found[:2]] == ["r0 says 0", "r0 says 1"]
    assert {row.group for row in found} == {"r0", "r1"}
    assert all(row.answer == "7" and row.prompt[0].text in "ab" for row in found)
    entry = found[4].source[0]
    assert (entry["teacher"], entry["question"], entry["index"], entry["step"]) == (
        "t",
        "r1",
        1,
        "answers",
    )
    sampling, n = writer.samplings[0]
    assert (sampling.max_tokens, sampling.seed, n) == (9, 3, 3)


def test_what_is_no_whole_answer_says_what_it_is():
    said = [cut("half"), broken("gone"), "  ", "good"]
    writer = FakeWriter(lambda question, index: said[index])
    found, _ = run([Answers(teacher="t", n=4)], rows("a"), writer)
    failures = sorted(str(row.failure) for row in found)
    assert failures == ["None", "cut at max_tokens (512)", "gone", "the answer is empty"]
    kept, _ = run([Answers(teacher="t", n=1, keep_truncated=True)], rows("a"), writer)
    assert kept[0].failure is None


def test_the_teacher_may_be_told_more_than_the_student():
    writer = FakeWriter(lambda question, index: "x")
    step = Answers(teacher="t", instruction="Be brief: {prompt}!", system="You are kind.")
    found, _ = run([step], rows("why {prompt}"), writer)
    turns = writer.questions[0].prompt
    assert [(t.role, t.text) for t in turns] == [
        ("system", "You are kind."),
        ("user", "Be brief: why {prompt}!"),
    ]
    assert found[0].prompt == (Turn(text="why {prompt}"),)


def test_equal_answers_are_counted():
    said = ["Yes", "no", " Yes", "Yes", "maybe", "no"]
    writer = FakeWriter(lambda question, index: said[index])
    steps = [Answers(teacher="t", n=6), Distribution(normalise="strip")]
    found, desk = run(steps, rows("a"), writer)
    assert [(row.completion, row.weight) for row in found] == [
        ("Yes", 3 / 6),
        ("no", 2 / 6),
        ("maybe", 1 / 6),
    ]
    assert sum(row.weight for row in found) == pytest.approx(1)
    assert [row.score for row in found] == [row.weight for row in found]
    assert len(found[0].source) == 3
    expected = -sum(p * math.log(p) for p in (3 / 6, 2 / 6, 1 / 6))
    assert found[0].notes["entropy_nats"] == pytest.approx(expected)
    assert found[0].notes["coverage"] == pytest.approx(5 / 6)
    assert desk.counts["distinct answers"] == 3
    assert desk.figures["mean coverage"] == pytest.approx(5 / 6, abs=1e-4)


@pytest.mark.parametrize(
    ("how", "same", "other"),
    [
        ("exact", ("a", "a"), ("a", "a ")),
        ("strip", ("a", " a\n"), ("a", "A")),
        ("lower", ("a", " A"), ("a", "a.")),
        ("words", ("It's, 5!", "it s 5"), ("a b", "ab")),
        ("last_number", ("so 1,000", "it is 1000.0"), ("7", "8")),
    ],
)
def test_what_is_equal(how, same, other):
    assert normal(same[0], how) == normal(same[1], how)
    assert normal(other[0], how) != normal(other[1], how)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=10))
def test_entropy_and_coverage_have_their_bounds(counts):
    assert -1e-12 <= entropy(counts) <= math.log(len(counts)) + 1e-9
    assert 0 <= coverage(counts) <= 1
    assert coverage([count + 1 for count in counts]) == 1


def test_what_no_tokenizer_can_read_gets_no_further_than_the_step_that_wrote_it():
    def say(question, index):
        assert is_whole(question.prompt[0].text)
        return "half \ud83d" if question.prompt[0].text == "b" else "whole"

    writer = FakeWriter(say)
    steps = [Answers(teacher="t", max_tokens=9), Distribution()]
    found, _ = run(steps, rows("a", "b", "\ud83d", "c"), writer)
    assert {row.id: row.failure for row in found} == {
        "r0#0": None,
        "r1#0": UNREADABLE,
        "r2": UNREADABLE,
        "r3#0": None,
    }


def test_a_text_without_a_prompt_is_not_asked_about():
    """Noise would come, or an error of a model that was given no token."""
    writer = FakeWriter(lambda question, index: "noise")
    text = Row(id="t", prompt=(), completion="Tom has 7 apples.")
    empty = Row(id="e", prompt=(Turn(text=""),))
    found, _ = run([Answers(teacher="t", system="You are kind.")], [text, empty], writer)
    assert [(row.id, row.failure) for row in found] == [("t", NO_PROMPT), ("e", NO_PROMPT)]
    assert not writer.questions


def test_words_keep_the_marks_of_their_vowels():
    assert normal("\u092c\u093e\u0932", "words") != normal("\u092c\u093f\u0932", "words")
    assert normal("\uff21 b", "words") == normal("a, B", "words")
