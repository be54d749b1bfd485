"""What a teacher is told of the student's own answers (SDPO)."""

import json
from dataclasses import replace

import pytest
from safetensors.torch import load_file

from limbeck.core.errors import DataError, RecipeError
from limbeck.core.types import Sample, Turn
from limbeck.recipe.run import run
from limbeck.synth.feedback import HELPED, Feedback


def group(*texts, answer="4", role=None):
    """Answers to one prompt."""
    return [
        Sample(
            id=f"p#{k}",
            turns=(
                Turn(text="2 + 2 =", role=role and "user"),
                Turn(text=text, role=role, learn=True),
            ),
            channel="student",
            group="p",
            siblings=len(texts) - 1 - k,
            answer=answer,
        )
        for k, text in enumerate(texts)
    ]


def told(samples, **fields):
    """What the teacher reads before each answer, and the scores."""
    (judged,) = Feedback(**fields).open(None, None, 0).judge([None], [samples])
    return (
        ["".join(t.text for t in s.privileged) for s in judged],
        [s.score for s in judged],
        judged,
    )


def test_failures_learn_from_the_one_success_which_stays_out_of_it():
    texts, scores, judged = told(group("5", " It is 4.", "no idea"), solution="Right:{solution}\n")
    assert texts == ["Right: It is 4.\n", "", "Right: It is 4.\n"]
    assert scores == [0.0, 1.0, 0.0]
    assert [sample.channel for sample in judged] == [HELPED, "student", HELPED]
    assert all(
        sample.turns == group("5", " It is 4.", "no idea")[k].turns
        for k, sample in enumerate(judged)
    )


def test_two_successes_see_each_other_and_never_themselves():
    texts, _, _ = told(group("4", "5", "four: 4"), solution="{solution}")
    assert texts == ["four: 4", "four: 4", "4"]


def test_without_a_success_nothing_is_told():
    texts, scores, judged = told(group("5", "6"))
    assert texts == ["", ""]
    assert scores == [0.0, 0.0]
    assert {sample.channel for sample in judged} == {"student"}


def test_what_is_wrong_can_be_told_without_a_success():
    texts, _, _ = told(group("5", "none"), solution=None, mistake="Not {found}: {reason}.")
    assert texts[0] == "Not 5: it is wrong."
    assert texts[1].startswith("Not nothing: ")
    texts, _, _ = told(group("5", "4"), solution="Like {solution}. ", mistake="Not {found}.")
    assert texts == ["Like 4. Not 5.", ""]


def test_braces_in_an_answer_are_text():
    texts, _, _ = told(
        group("{found} {solution} 4", "5"), mistake="Not {found}.", solution="{solution}|"
    )
    assert texts == ["", "{found} {solution} 4|Not 5."]


def test_in_a_conversation_the_system_tells_it():
    _, _, judged = told(group("4", "5", role="assistant"))
    assert [turn.role for turn in judged[1].privileged] == ["system"]


def test_what_was_privileged_before_stays():
    samples = [replace(s, privileged=(Turn(text="Old. "),)) for s in group("4", "5")]
    texts, _, _ = told(samples, solution="New: {solution}. ")
    assert texts == ["Old. ", "New: 4. Old. "]


def test_figures_say_how_many():
    teller = Feedback().open(None, None, 0)
    teller.judge([None, None], [group("4", "5"), group("6", "7")])
    assert teller.figures == {"right": 0.25, "helped": 0.25}


def test_what_cannot_work_is_said():
    with pytest.raises(RecipeError, match="nothing to tell"):
        Feedback(solution=None)
    with pytest.raises(RecipeError, match="pattern"):
        Feedback(match="regex")
    with pytest.raises(RecipeError, match="2 or more"):
        told(group("5"))
    with pytest.raises(DataError, match="no `answer`"):
        told(group("5", "4", answer=None))


@pytest.fixture
def recipe(make_recipe, tiny_teacher, tmp_path):
    """Builds a recipe that learns from what it is told; `answer` is that of all rows."""

    def make(answer, **fields):
        rows = tmp_path / "rows.jsonl"
        rows.write_text(
            "".join(
                json.dumps({"prompt": f"the cat {k} ", "answer": answer}) + "\n" for k in "abcd" * 4
            )
        )
        return make_recipe(
            {"steps": 3, "weight_decay": 0.0},
            student={"name": str(tiny_teacher)},
            teachers={"me": {"kind": "self", "update": "frozen"}},
            source={
                "kind": "rollouts",
                "of": {"path": str(rows), "holdout": 0},
                "answers": 4,
                "max_tokens": 6,
                "batch": 4,
                "scorer": {"kind": "feedback", "match": "regex", "pattern": "([a-z])", **fields},
            },
            terms=[{"objective": {"kind": "jensen_shannon"}, "teacher": "me", "channel": HELPED}],
        )

    return make


def metrics(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "loss" in line]


def test_a_student_that_is_never_right_learns_nothing(recipe, tiny_teacher, tmp_path):
    run(recipe("no such letter"), tmp_path / "out")
    assert [line["loss"] for line in metrics(tmp_path / "out")] == [0.0] * 3
    assert {line["feedback/helped"] for line in metrics(tmp_path / "out")} == {0.0}
    before = load_file(tiny_teacher / "model.safetensors")
    after = load_file(tmp_path / "out" / "student" / "model.safetensors")
    assert all(value.equal(before[name]) for name, value in after.items())


def test_a_student_that_is_sometimes_right_learns_from_it(recipe, tmp_path):
    run(recipe("t"), tmp_path / "out")
    lines = metrics(tmp_path / "out")
    assert any(0 < line["feedback/right"] < 1 for line in lines)
    assert any(line["loss"] > 1e-4 for line in lines)


def test_a_recipe_names_it(recipe):
    with pytest.raises(RecipeError, match="solution"):
        recipe("t", solution="nothing to fill in")
