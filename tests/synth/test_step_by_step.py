"""Rationale and answer as two tasks."""

import pytest
from fakes import row, run_step

from limbeck.core.errors import RecipeError
from limbeck.core.types import Turn
from limbeck.sources.dataset import to_sample
from limbeck.synth.rows import to_json
from limbeck.synth.step_by_step import TwoTasks


def parted(name, **more):
    return row(name, "So the answer is 7.", rationale="4 + 3 = 7. ", answer="7", **more)


def test_each_row_becomes_two_with_prefixes_and_channels():
    (explain, predict), desk = run_step(TwoTasks(), [parted("a", weight=0.5)])
    assert [explain.id, predict.id] == ["a#explain", "a#predict"]
    assert explain.prompt == (Turn(text="explain: Q?\n"),)
    assert predict.prompt == (Turn(text="predict: Q?\n"),)
    assert (explain.channel, explain.completion) == ("rationale", "4 + 3 = 7.")
    assert (predict.channel, predict.completion) == ("answer", "So the answer is 7.")
    for one in (explain, predict):
        assert one.rationale is None
        assert (one.weight, one.answer, one.group) == (0.5, "7", "a")
        sample = to_sample(to_json(one), "x")  # a file's row, read again
        assert (sample.channel, sample.parts) == (one.channel, ())
    assert not desk.counts


def test_the_prefix_stands_before_the_last_turn():
    turns = (Turn(text="Be short.", role="system"), Turn(text="Q?", role="user"))
    found, _ = run_step(TwoTasks(explain="Why? ", predict=""), [parted("a", prompt=turns)])
    assert found[0].prompt == (turns[0], Turn(text="Why? Q?", role="user"))
    assert found[1].prompt == turns


def test_rows_of_one_group_stay_together():
    found, _ = run_step(TwoTasks(), [parted("a", group="g"), parted("b", group="g")])
    assert [one.group for one in found] == ["g"] * 4
    assert len({one.id for one in found}) == 4


@pytest.mark.parametrize("rationale", [None, "", " \n"])
def test_a_row_without_a_rationale_only_learns_to_answer(rationale):
    found, desk = run_step(TwoTasks(), [row("a", "7", rationale=rationale)])
    assert [(one.id, one.channel) for one in found] == [("a#predict", "answer")]
    assert desk.counts == {"rows without a rationale": 1}


def test_a_row_without_prompt_or_completion_fails():
    found, _ = run_step(TwoTasks(), [row("a", "7", prompt=()), row("b")])
    assert [one.failure for one in found] == ["two tasks need a prompt and a completion"] * 2


def test_the_tasks_are_told_apart():
    with pytest.raises(RecipeError, match="explain"):
        TwoTasks(explain="do: ", predict="do: ")
