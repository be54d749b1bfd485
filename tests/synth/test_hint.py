"""A second try with the answer in sight."""

import pytest
from fakes import FakeWriter, broken, cut, good, prompt, row, run_step
from pydantic import TypeAdapter, ValidationError

from limbeck.core.errors import RecipeError
from limbeck.synth.hint import Hint
from limbeck.synth.verify import Verify


def judged(name, verdict, **more):
    more = {"completion": f"I say {name}.", "answer": "18", **more}
    return row(name, **more).noted(verdict=verdict)


def hinted(rows, say=lambda question, index: "9 * 2 = 18.", **more):
    writer = FakeWriter(say)
    found, desk = run_step(Hint(teacher="t", **more), rows, {"t": writer})
    return found, writer, desk


def test_a_wrong_row_fails_and_its_prompt_is_asked_again_with_the_answer():
    wrong = judged("a", "wrong", prompt=prompt("What is 9 * 2?"), rationale="Well. ", weight=0.5,
                   source=({"step": "answers"},))  # fmt: skip
    found, writer, desk = hinted([wrong], instruction="{prompt} [{answer}]")
    old, new = found
    assert old.failure == "the answer is wrong"
    assert (new.id, new.failure) == ("a/hint", None)
    assert [question.prompt for question in writer.questions] == [prompt("What is 9 * 2? [18]")]
    # Trained on without the hint, and without anything of the wrong answer.
    assert new.prompt == wrong.prompt
    assert (new.completion, new.rationale, new.weight) == ("9 * 2 = 18.", None, 1.0)
    assert new.notes == {"hinted": True}
    assert [(e["step"], e["teacher"], e["temperature"]) for e in new.source] == [("hint", "t", 0.7)]
    assert desk.counts == {"tries with a hint": 1}


def test_right_rows_pass_and_are_not_asked_for():
    rows = [
        judged("a#0", "wrong", group="a"),
        judged("a#1", "right", group="a"),
        judged("b#0", "unclear", group="b"),
        judged("b#1", "wrong", group="b"),
        judged("c", "right"),
    ]
    found, writer, _ = hinted(rows)
    assert [one.id for one in good(found)] == ["a#1", "b/hint", "c"]
    assert [question.id for question in writer.questions] == ["b/hint"]
    assert [one.id for one in found] == ["a#0", "a#1", "b#0", "b#1", "b/hint", "c"]
    assert found[4].group == "b"


def test_it_is_verified_again():
    say = lambda question, index: "It is 18." if "9" in question.id else "It is 19."  # noqa: E731
    found, *_ = hinted([judged("9", "wrong"), judged("8", "wrong")], say)
    again, desk = run_step(Verify(), found)
    assert [one.id for one in good(again)] == ["9/hint"]
    assert desk.figures == {"right answers of t (hint)": 0.5}


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (broken("HTTP 500"), "HTTP 500"),
        (cut("9 * 2 = "), "cut at max_tokens (512)"),
        (" \n", "the answer is empty"),
        ("By the hint it is 18.", "it speaks of the hint"),
        ("As the Given Answer says, 18.", "it speaks of the hint"),
    ],
)
def test_what_is_no_explanation_fails(said, why):
    found, *_ = hinted([judged("a", "wrong")], lambda question, index: said)
    assert [one.failure for one in found] == ["the answer is wrong", why]


def test_words_that_only_hold_a_forbidden_one_pass():
    found, *_ = hinted([judged("a", "wrong")], lambda question, index: "He uses chintz. 18")
    assert good(found)
    found, *_ = hinted([judged("a", "wrong")], lambda q, i: "The hint says 18", forbidden=())
    assert good(found)


def test_a_prompt_that_holds_the_places_itself_is_not_filled_in():
    rows = [judged("a", "wrong", prompt=prompt("Write {answer} and {prompt}."), answer="{prompt}")]
    _, writer, _ = hinted(rows, instruction="{prompt}|{answer}")
    assert writer.questions[0].prompt == prompt("Write {answer} and {prompt}.|{prompt}")


def test_it_needs_verdicts():
    with pytest.raises(RecipeError, match="keep: all"):
        hinted([row("a", "x", answer="18")])


@pytest.mark.parametrize("instruction", ["", "{prompt}", "{answer} of {prompt}", "what?"])
def test_an_instruction_has_both_places(instruction):
    with pytest.raises(ValidationError, match="instruction"):
        TypeAdapter(Hint).validate_python({"teacher": "t", "instruction": instruction})


def test_the_order_does_not_depend_on_how_many_the_writer_takes():
    rows = [judged(str(k), "wrong" if k % 3 else "right") for k in range(20)]
    orders = []
    for window in (1, 4, 100):
        writer = FakeWriter(lambda question, index: "18", window)
        found, _ = run_step(Hint(teacher="t"), rows, {"t": writer})
        orders.append([(one.id, one.failure) for one in found])
    assert orders[0] == orders[1] == orders[2]
    assert len(orders[0]) == 20 + 13
