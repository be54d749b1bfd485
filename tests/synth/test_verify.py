"""Rows that are right go on; the others say why not."""

import pytest
from fakes import FakeWriter, good, prompt, row, run_step

from limbeck.core.errors import RecipeError
from limbeck.synth.hint import Hint
from limbeck.synth.revise import Revise
from limbeck.synth.verify import WINDOW, Verify

ASKED = prompt("Which?\n(a) park\n(b) gravity\n")


def made(name, completion, answer, teacher="big", **more):
    source = ({"step": "answers", "teacher": teacher},) if teacher else ()
    return row(name, completion, answer=answer, source=source, **more)


def test_what_is_not_right_fails_with_its_reason():
    rows = [made("1", "It is 18.", "18"), made("2", "It is 17.", "18"), made("3", "no idea", "18")]
    found, desk = run_step(Verify(), [*rows, made("4", "It is 18.", None)])
    assert [one.id for one in found] == ["1", "2", "3", "4"]
    assert [one.failure for one in found] == [
        None,
        "the answer is wrong",
        "the answer is unclear: it has no number",
        "there is no known `answer` to compare with",
    ]
    assert [one.notes.get("verdict") for one in found] == ["right", "wrong", "unclear", None]
    assert [one.notes.get("said") for one in found] == ["18", "17", None, None]
    assert desk.counts == {
        "answers that are right": 1,
        "answers that are wrong": 1,
        "answers that are unclear": 1,
    }
    assert desk.figures == {"right answers of big (answers)": 0.3333}


def test_all_pass_where_a_later_step_looks_at_the_verdict():
    rows = [made("1", "18", "18"), made("2", "17", "18"), made("3", "", "18")]
    found, _ = run_step(Verify(keep="all"), rows)
    assert good(found) == found
    assert [one.notes["verdict"] for one in found] == ["right", "wrong", "unclear"]


def test_each_teacher_has_a_share_of_its_own_and_rows_count_once():
    rows = [made("1", "1", "1", "a"), made("2", "2", "1", "a"), made("3", "1", "1", "b")]
    found, desk = run_step(Verify(keep="all"), [*rows, made("4", "1", "1", None)])
    assert desk.figures == {
        "right answers of a (answers)": 0.5,
        "right answers of b (answers)": 1.0,
        "right answers": 1.0,
    }
    again, desk = run_step(Verify(), found)
    assert [one.failure for one in again] == [None, "the answer is wrong", None, None]
    assert not desk.figures
    assert not desk.counts


def test_the_answer_alone_is_read_where_the_rationale_was_split_off():
    whole = made("1", "I do not know.", "18", rationale="9 * 2 = 18. ")
    alone = made("2", "So it is 18.", "18", rationale="9 * 2 = 18. ")
    found, _ = run_step(Verify(), [whole, alone])
    assert [one.notes["verdict"] for one in found] == ["unclear", "right"]


def test_a_rationale_can_be_asked_for():
    rows = [
        made("1", "18", "18", rationale="9 * 2 = 18. "),
        made("2", "18", "18", rationale=" \n"),
        made("3", "18", "18"),
    ]
    found, _ = run_step(Verify(must_have_rationale=True), rows)
    assert [one.failure for one in found] == [
        None,
        "there is no rationale",
        "there is no rationale",
    ]
    found, _ = run_step(Verify(), rows)
    assert good(found) == found


def test_options_are_read_from_the_prompt():
    rows = [
        made("1", "So the answer is (b).", "gravity", prompt=ASKED),
        made("2", "So the answer is (a).", "gravity", prompt=ASKED),
        made("3", "Either (a) or (b).", "gravity", prompt=ASKED),
    ]
    found, _ = run_step(Verify(match="choice"), rows)
    assert [one.notes["verdict"] for one in found] == ["right", "wrong", "unclear"]


def test_a_pattern_catches_the_answer_in_windows_of_rows():
    rows = [made(str(k), f"so #### {k}", str(k - k % 2)) for k in range(WINDOW + 3)]
    found, desk = run_step(Verify(match="regex", pattern=r"####\s*(\d+)"), rows)
    assert [one.id for one in found] == [one.id for one in rows]
    assert [one.failure is None for one in found] == [k % 2 == 0 for k in range(WINDOW + 3)]
    assert sum(desk.counts.values()) == WINDOW + 3


def test_rows_stream():
    """It takes a window, not all."""
    taken = []

    def rows():
        for k in range(3 * WINDOW):
            taken.append(k)
            yield made(str(k), "1", "1")

    from limbeck.synth.step import Desk

    step = Verify().run(rows(), Desk(seed=0, writer={}.__getitem__, reader={}.__getitem__))
    next(step)
    assert len(taken) == WINDOW


def test_mathematics_that_never_ends_fails_one_row_alone():
    pytest.importorskip("math_verify")
    rows = [made("1", "It is $9^{9^{9}}$.", "18"), made("2", "It is $\\frac{36}{2}$.", "18")]
    found, _ = run_step(Verify(match="math", seconds=2), rows)
    assert found[0].failure == "the answer is unclear: comparing it took more than 2 s"
    assert found[1].failure is None


@pytest.mark.parametrize(
    "fields", [{"match": "regex"}, {"pattern": "(a)"}, {"match": "regex", "pattern": "a"}]
)
def test_a_pattern_goes_with_regex_alone(fields):
    with pytest.raises(RecipeError, match="pattern"):
        Verify(**fields)


def test_a_revised_answer_is_counted_as_one_that_was_not_verified():
    first, _ = run_step(Verify(keep="all"), [made("1", "It is 41.", "42")])
    writer = FakeWriter(lambda *_: "It is 42.")
    told = [one.noted(critique="wrong") for one in first]
    revised, _ = run_step(Revise(by="t"), told, {"t": writer})
    assert (revised[0].notes["verdict"], revised[0].notes["said"]) == (None, None)
    with pytest.raises(RecipeError, match="needs verdicts"):
        run_step(Hint(teacher="t"), revised, {"t": writer})
    found, desk = run_step(Verify(), revised)
    assert good(found) == found
    assert desk.counts == {"answers that are right": 1}


def test_a_known_answer_that_cannot_be_compared_makes_no_text_wrong():
    """Else `hint` would pay for each of them again."""
    rows = [made("1", "It is Paris, of 2 million.", "Paris"), made("2", "18", "18")]
    found, desk = run_step(Verify(keep="all"), rows)
    assert [one.failure for one in found] == [
        "the known answer 'Paris' has no number; choose another `match` than last_number",
        None,
    ]
    assert "verdict" not in found[0].notes
    assert desk.counts == {"answers that are right": 1}
    assert good(run_step(Verify(match="exact"), [made("1", "Paris", "Paris")])[0])
