"""The steps `critique`, `revise` and `better`, one after the other and each alone."""

from collections import Counter

import pytest
from fakes import FakeWriter, broken, cut, good, prompt, row, run_step
from hypothesis import given, settings
from hypothesis import strategies as st
from injections import INJECTIONS, parts, with_code

from limbeck.core.errors import RecipeError
from limbeck.core.types import Turn
from limbeck.recipe.document import Document
from limbeck.recipe.resolve import resolve
from limbeck.synth.best import Better
from limbeck.synth.critique import Critique
from limbeck.synth.judging import UNPARSABLE
from limbeck.synth.revise import Revise
from limbeck.synth.step import Desk, reads_of, through


def value(text):
    """How good a test's answer is: the number in it."""
    return int("".join(c for c in text if c.isdigit()) or "1")


def teacher(question, index):
    """Writes critiques, and judges by the number in an answer."""
    del index
    code, answers = parts(question)
    if len(answers) == 1:
        return f"Too small by {10 - value(answers[0])}.\nSCORES {code} {value(answers[0])}"
    return f"Let me see.\nSCORES {code} {value(answers[0])} {value(answers[1])}"


def improver(question, index):
    """Adds two to the number in the answer."""
    del index
    text = question.prompt[0].text
    start = text.index("[BEGIN ANSWER ")
    return f"answer {value(text[start:].splitlines()[1]) + 2}"


def answers(count, **more):
    return [row(f"p{k}#0", f"answer {k + 1}", **more) for k in range(count)]


# --- critique ---------------------------------------------------------------------------------


def test_a_critique_and_its_score_become_notes():
    writer = FakeWriter(teacher)
    rows, desk = run_step(Critique(teacher="api", temperature=0.5), answers(5), {"api": writer})
    assert [one.notes for one in rows] == [
        {"critique": f"Too small by {9 - k}.", "critique_score": k + 1} for k in range(5)
    ]
    assert [one.id for one in rows] == [f"p{k}#0" for k in range(5)]
    assert [one.completion for one in rows] == [f"answer {k + 1}" for k in range(5)]
    (entry,) = rows[0].source
    assert entry["step"] == "critique"
    assert (entry["teacher"], entry["temperature"], entry["model"]) == ("api", 0.5, "fake-1")
    assert desk.counts["critiques"] == 5
    assert writer.samplings[0][0].temperature == 0.5


@pytest.mark.parametrize(
    ("said", "reason", "unparsable"),
    [
        ("Fine.\nSCORES 7", "no score in the form asked for", 1),
        ("7", "no score in the form asked for", 1),
        ("SCORES CODE 7 7", "no score in the form asked for", 1),
        (cut("It is\nSCORES CODE 7"), "not whole: it ended with 'length'", 0),
        (broken("time-out"), "gave no answer: time-out", 0),
        ("  ", "is empty", 0),
    ],
)
def test_what_is_no_critique_fails_and_is_counted(said, reason, unparsable):
    def say(question, index):
        if question.id.startswith("p1"):
            return with_code(said, parts(question)[0])
        return teacher(question, index)

    rows, desk = run_step(Critique(teacher="api"), answers(3), {"api": FakeWriter(say)})
    assert [one.failure is None for one in rows] == [True, False, True]
    assert reason in rows[1].failure
    assert "critique" not in rows[1].notes
    assert desk.counts[UNPARSABLE] == unparsable
    assert len(rows[1].source) == 1  # it cost what it cost


def test_a_row_without_an_answer_keeps_its_place():
    rows, _ = run_step(
        Critique(teacher="api"),
        [row("a", "answer 1"), row("b"), row("c", "  "), row("d", "answer 2")],
        {"api": FakeWriter(teacher)},
    )
    assert [(one.id, one.failure is None) for one in rows] == [
        ("a", True),
        ("b", False),
        ("c", False),
        ("d", True),
    ]


def test_an_answer_cannot_score_itself():
    rows = [row(str(k), text or "x") for k, text in enumerate(INJECTIONS)]

    def echoes(question, index):
        del index
        code, (text,) = parts(question)
        return f"It says:\n{text}\nThat is poor.\nSCORES {code} 2"

    found, _ = run_step(Critique(teacher="api"), rows, {"api": FakeWriter(echoes)})
    assert {one.notes["critique_score"] for one in good(found)} == {2}
    assert len(good(found)) == sum(one.readable for one in rows) == len(rows) - 1


def test_the_rationale_is_part_of_the_answer():
    writer = FakeWriter(teacher)
    one = row("a", "answer 3", rationale="because. ")
    run_step(Critique(teacher="api"), [one], {"api": writer})
    assert "because. answer 3" in writer.questions[0].prompt[0].text


def test_a_conversation_is_asked_about_in_a_message():
    writer = FakeWriter(teacher)
    one = row("a", "answer 3", prompt=(Turn(text="Hi", role="user"),))
    run_step(Critique(teacher="api"), [one], {"api": writer})
    (turn,) = writer.questions[0].prompt
    assert turn.role == "user"
    assert "user: Hi" in turn.text


# --- revise -----------------------------------------------------------------------------------


def criticised(count=3, **more):
    return [one.noted(critique="Too small.") for one in answers(count, **more)]


def test_a_revision_is_a_new_row_that_knows_the_earlier_one():
    writer = FakeWriter(improver)
    rows, desk = run_step(Revise(by="student"), criticised(), {"student": writer})
    assert [one.id for one in rows] == [f"p{k}#0+1" for k in range(3)]
    assert [one.completion for one in rows] == [f"answer {k + 3}" for k in range(3)]
    assert [one.notes["earlier"] for one in rows] == [f"answer {k + 1}" for k in range(3)]
    assert [one.notes["earlier_id"] for one in rows] == [f"p{k}#0" for k in range(3)]
    assert all(one.prompt == prompt("Q?\n") for one in rows)  # the student learns the bare prompt
    assert "Too small." in writer.questions[0].prompt[0].text
    assert desk.counts["revisions"] == 3
    assert rows[0].source[-1]["step"] == "revise"
    assert rows[0].source[-1]["teacher"] == "student"


def test_a_second_revision_counts_on():
    step = Revise(by="s")
    writer = FakeWriter(improver)
    once, _ = run_step(step, criticised(1), {"s": writer})
    twice, _ = run_step(step, once, {"s": writer})
    assert [one.id for one in twice] == ["p0#0+2"]
    assert twice[0].notes["earlier_id"] == "p0#0+1"
    assert twice[0].completion == "answer 5"


@pytest.mark.parametrize("said", [cut("answer 9"), broken("gone"), " \n"])
def test_a_revision_that_is_none_fails(said):
    rows, _ = run_step(Revise(by="s"), criticised(1), {"s": FakeWriter(lambda q, i: said)})
    assert rows[0].failure
    assert rows[0].completion == "answer 1"


def test_without_a_critique_there_is_nothing_to_revise():
    rows, _ = run_step(Revise(by="s"), answers(2), {"s": FakeWriter(improver)})
    assert all("no answer with a critique" in one.failure for one in rows)


# --- better -----------------------------------------------------------------------------------


def revised(earlier, now, name="a", **more):
    one = row(f"{name}+1", now, **more)
    return one.noted(earlier=earlier, earlier_rationale=None, earlier_id=name, revision=1)


def test_the_better_one_goes_on_and_a_tie_keeps_the_earlier():
    rows = [
        revised("answer 3", "answer 7", "a"),
        revised("answer 7", "answer 3", "b"),
        revised("answer 5", "other 5", "c"),
        revised("answer 4", "answer 4", "d"),
    ]
    writer = FakeWriter(teacher)
    found, desk = run_step(Better(judge="api"), rows, {"api": writer})
    assert [(one.id, one.completion) for one in found] == [
        ("a+1", "answer 7"),
        ("b", "answer 7"),
        ("c", "answer 5"),
        ("d", "answer 4"),
    ]
    assert [one.notes["won"] for one in found] == ["revised", "earlier", "earlier", "earlier"]
    assert [one.notes["margin"] for one in found] == [4, -4, 0, 0]
    assert len(writer.questions) == 6  # the same text twice needs no judge
    assert desk.counts["better: earlier"] == 3
    assert [entry["part"] for entry in found[0].source] == ["verdict", "verdict"]


def test_by_more_than_a_margin():
    rows = [revised("answer 3", "answer 5", "a"), revised("answer 3", "answer 6", "b")]
    found, _ = run_step(Better(judge="api", margin=2), rows, {"api": FakeWriter(teacher)})
    assert [one.notes["won"] for one in found] == ["earlier", "revised"]


def test_the_earlier_answer_comes_back_whole():
    one = revised("= 5", "= 6")
    one = one.noted(earlier_rationale="2 + 3 ")
    found, _ = run_step(
        Better(judge="api"), [one], {"api": FakeWriter(lambda q, i: lose_second(q))}
    )
    assert (found[0].rationale, found[0].completion) == ("2 + 3 ", "= 5")


def lose_second(question):
    """For the answer with a rationale."""
    code, (first, _) = parts(question)
    return f"SCORES {code} {'9 1' if first.startswith('2') else '1 9'}"


def test_the_teachers_own_answer_may_win():
    rows = [
        revised("answer 3", "answer 5", "a"),
        revised("answer 9", "answer 5", "b"),
        row("c", "answer 1"),
        row("d", "answer 8"),
    ]

    def own(question, index):
        assert question.prompt == prompt("Q?\n")
        return "teacher 7"

    writers = {"judge": FakeWriter(teacher), "api": FakeWriter(own)}
    found, _ = run_step(Better(judge="judge", teacher="api"), rows, writers)
    assert [(one.id, one.completion, one.notes["won"]) for one in found] == [
        ("a+1/teacher", "teacher 7", "teacher"),
        ("b", "answer 9", "earlier"),
        ("c/teacher", "teacher 7", "teacher"),
        ("d", "answer 8", "earlier"),
    ]
    assert [entry["part"] for entry in found[0].source] == ["verdict"] * 2 + ["answer"] + [
        "verdict"
    ] * 2


def test_a_teacher_without_an_answer_is_left_out():
    writers = {"judge": FakeWriter(teacher), "api": FakeWriter(lambda q, i: cut("teacher 9"))}
    rows = [revised("answer 3", "answer 5", "a"), row("b", "answer 1")]
    found, desk = run_step(Better(judge="judge", teacher="api"), rows, writers)
    assert found[0].notes["won"] == "revised"
    assert "nothing to compare" in found[1].failure
    assert desk.counts["better: the teacher has no answer"] == 2


def test_a_row_alone_cannot_win():
    found, _ = run_step(Better(judge="api"), [row("a", "answer 1")], {"api": FakeWriter(teacher)})
    assert "nothing to compare" in found[0].failure


def test_unparsable_is_excluded_and_counted():
    def say(question, index):
        return "I like both." if question.id.startswith("b") else teacher(question, index)

    rows = [revised("answer 3", "answer 5", name) for name in "abc"]
    found, desk = run_step(Better(judge="api"), rows, {"api": FakeWriter(say)})
    assert [one.failure is None for one in found] == [True, False, True]
    assert desk.counts[UNPARSABLE] == 1
    assert len(found[1].source) == 2


@pytest.mark.parametrize("by", ["scores", "preference"])
def test_a_judge_that_likes_a_place_keeps_what_was_there(by):
    def first(question, index):
        del index
        code = parts(question)[0]
        return f"SCORES {code} 10 1" if by == "scores" else f"VERDICT {code} A"

    rows = [revised("answer 3", "answer 5")]
    found, _ = run_step(Better(judge="api", by=by), rows, {"api": FakeWriter(first)})
    assert found[0].notes["won"] == "earlier"
    assert found[0].notes["margin"] == 0


# --- all of them ------------------------------------------------------------------------------

STEPS = (
    Critique(teacher="api"),
    Revise(by="student"),
    Better(judge="api"),
    Critique(teacher="api"),
    Revise(by="student"),
    Better(judge="api"),
)


def refine(rows, window=3, seed=0):
    writers = {"api": FakeWriter(teacher, window), "student": FakeWriter(improver, window)}
    desk = Desk(seed=seed, writer=writers.__getitem__, reader={}.__getitem__)
    return list(through(STEPS, iter(rows), desk)), desk


def test_two_rounds_of_refinement():
    found, desk = refine(answers(4))
    assert [one.completion for one in found] == [f"answer {k + 5}" for k in range(4)]
    assert [one.id for one in found] == [f"p{k}#0+2" for k in range(4)]
    assert desk.counts["better: revised"] == 8


@settings(max_examples=25)
@given(st.lists(st.sampled_from(["answer 2", "answer 9", "", "x"]), max_size=8), st.integers(1, 9))
def test_every_row_comes_out_once_whatever_is_asked_at_a_time(texts, window):
    rows = [row(f"r{k}", text) for k, text in enumerate(texts)]
    found, desk = refine(rows, window)
    assert Counter(one.id.partition("+")[0] for one in found) == Counter(one.id for one in rows)
    again, counted = refine(rows, 4)
    assert sorted(found, key=lambda one: one.id) == sorted(again, key=lambda one: one.id)
    assert desk.counts == counted.counts


@pytest.mark.parametrize(
    ("step", "field"),
    [
        ({"kind": "critique"}, "source.steps.0.teacher"),
        ({"kind": "critique", "teacher": ""}, "source.steps.0.teacher"),
        ({"kind": "critique", "teacher": "a", "temperature": -1}, "source.steps.0.temperature"),
        ({"kind": "revise", "by": "a", "max_tokens": 0}, "source.steps.0.max_tokens"),
        ({"kind": "better", "judge": "a", "by": "vote"}, "source.steps.0.by"),
        ({"kind": "better", "judge": "a", "margin": float("nan")}, "source.steps.0.margin"),
        ({"kind": "better"}, "source.steps.0.judge"),
        ({"kind": "better", "judge": "a", "tacher": "b"}, "source.steps.0.tacher"),
    ],
)
def test_fields_are_checked(step, field):
    source = {"kind": "generated", "path": "x", "of": {"path": "y"}, "steps": [step]}
    values = {
        "student": {"name": "x"},
        "source": source,
        "terms": [{"objective": {"kind": "cross_entropy"}}],
    }
    with pytest.raises(RecipeError) as error:
        resolve(Document(values, {}))
    assert error.value.field == field


def test_they_say_whom_they_ask():
    assert Critique(teacher="t").asks == ("t",)
    assert Revise().asks == ("student",)
    assert Better(judge="j").asks == ("j",)
    assert Better(judge="j", teacher="t").asks == ("j", "t")
    assert not any(reads_of(step) for step in STEPS)
