"""Reasoning that a teacher leaves in its replies is neither an instruction nor an answer."""

import pytest
from fakes import FakeWriter, good, prompt, row, run_step

from limbeck.synth.answers import Answers
from limbeck.synth.backtranslate import Backtranslate
from limbeck.synth.best import Better
from limbeck.synth.critique import Critique
from limbeck.synth.evolve import Evolve
from limbeck.synth.grounded import Grounded
from limbeck.synth.hint import Hint
from limbeck.synth.revise import Revise
from limbeck.synth.rewrite import Rewrite
from limbeck.synth.rows import Row
from limbeck.synth.self_instruct import SelfInstruct

THOUGHT = "<think>\nOkay, one more.\n1. perhaps a lake\nSCORES 0 1\n</think>\n\n"
ASKED = "Name three rivers in Peru, and say how long each is."


def last(step, rows, say):
    """The last row that comes of a step whose teacher reasons first."""
    writer = FakeWriter(lambda question, index: THOUGHT + say(question))
    return run_step(step, rows, {"t": writer})[0][-1]


def score(question):
    return "Vague.\nSCORES " + question.prompt[-1].text.rpartition("SCORES ")[2].split()[0]


@pytest.mark.parametrize(
    ("step", "rows"),
    [
        (Evolve(teacher="t", rounds=1), [row("a", prompt=prompt("Name a river."))]),
        (SelfInstruct(teacher="t", make=1), [row("a", prompt=prompt("Why is the sky blue?"))]),
        (Backtranslate(teacher="t"), [row("a", "The Ucayali is long.", prompt=())]),
        (
            Grounded(teacher="t", make="instructions", per_row=1),
            [row("a", "A text on Peru.", prompt=())],
        ),
    ],
)
def test_it_is_no_instruction(step, rows):
    listed = "1. " if isinstance(step, SelfInstruct | Grounded) else ""
    made = last(step, rows, lambda _: listed + ASKED)
    assert (made.failure, made.question.strip()) == (None, ASKED)


@pytest.mark.parametrize(
    ("step", "given"),
    [
        (Revise(by="t"), row("a", "x").noted(critique="too short")),
        (Rewrite(teacher="t"), row("a", "x")),
        (Evolve(teacher="t", rounds=1, answer=True), row("a")),
    ],
)
def test_it_is_no_answer(step, given):
    made = last(step, [given], lambda _: "The Ucayali.")
    assert (made.completion, made.source[-1]["finish"]) == ("The Ucayali.", "stop")


def test_a_judges_reasoning_is_no_verdict_and_no_critique():
    def say(question):
        return score(question) + " 8"

    made = last(Critique(teacher="t"), [row("a", "x")], say)
    assert (made.notes["critique"], made.notes["critique_score"]) == ("Vague.", 8)
    revised = row("a", "y").noted(earlier_id="b", earlier="x", earlier_rationale=None)
    made = last(Better(judge="t"), [revised], lambda question: score(question) + " 8 7")
    assert made.notes["margin"] == 0


def test_reasoning_without_an_end_is_not_whole():
    writer = FakeWriter(lambda *_: THOUGHT.replace("</think>", "") + ASKED)
    made, _ = run_step(Evolve(teacher="t", rounds=1), [row("a")], {"t": writer})
    assert made[1].failure == (
        "the answer of t is not whole: it ended with 'reasoning without an end'"
    )
    rows = [row("a", prompt=prompt("Why?"))]
    made, desk = run_step(SelfInstruct(teacher="t", make=1), rows, {"t": writer})
    assert made == rows
    assert desk.counts["requests without an answer"] > 0


def test_what_a_student_is_to_learn_keeps_it():
    """`answers` and `hint`: a step `split` parts it, or the student learns to reason so."""
    made = last(Answers(teacher="t"), [row("a")], lambda _: "42")
    assert made.completion == THOUGHT + "42"
    wrong = row("a", "7", answer="42").noted(verdict="wrong")
    assert last(Hint(teacher="t"), [wrong], lambda _: "42").completion == THOUGHT + "42"


def test_a_comparison_may_take_some_reasoning_and_no_capitals():
    said = {"a~1/same": "Different.", "b~1/same": "**equal**", "c~1/same": "Hard to say."}

    def say(question, index):
        return THOUGHT + said.get(question.id, f"Write on {question.id}.")

    writer = FakeWriter(say)
    step = Evolve(teacher="t", rounds=1, compare=True, max_tokens=700)
    rows = [row(name, prompt=prompt("Name a river.")) for name in "abc"]
    made, desk = run_step(step, rows, {"t": writer})
    assert [one.id for one in good(made)] == ["a", "a~1", "b", "c"]
    assert desk.counts["unparsable comparisons"] == 1
    assert [sampling.max_tokens for sampling, _ in writer.samplings] == [700, 700]


def test_a_row_without_a_prompt_is_not_answered_by_the_teacher_of_better():
    text = Row(id="a", prompt=(), completion="Tom has 7 apples.")
    writer = FakeWriter(lambda *_: "x")
    made, _ = run_step(Better(judge="t", teacher="t"), [text], {"t": writer})
    assert made[0].failure == "there is nothing to compare the answer with"
    assert not writer.questions
