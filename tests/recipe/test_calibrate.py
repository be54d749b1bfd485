"""The time of a step is put together from what shallow models take."""

import pytest

from limbeck.recipe import calibrate
from limbeck.recipe.calibrate import StepTime, step_time
from limbeck.recipe.check import check


def test_layers_are_counted_in_a_straight_line(make_recipe, monkeypatch):
    """With made-up timings: 1 s fixed, 0.2 s a student's layer, 0.05 s a teacher's."""
    asked = []

    def timed(recipe, facts, live, student_layers, teacher_layers):
        asked.append((student_layers, teacher_layers))
        return 1.0 + 0.2 * student_layers + 0.05 * teacher_layers["big"]

    monkeypatch.setattr(calibrate, "_timed", timed)
    recipe = make_recipe()  # two layers of the teacher's four
    found = step_time(recipe, check(recipe))
    assert asked == [(1, {"big": 1}), (2, {"big": 1}), (1, {"big": 2})]
    assert found.fixed == pytest.approx(1.0)
    assert found.seconds == pytest.approx(1.0 + 2 * 0.2 + 4 * 0.05)
    assert found.render(100) == "about 1.6 s a step on this machine; 100 steps take 0:02:40"


@pytest.mark.parametrize(
    "student",
    [
        {"from": "teacher", "layers": [0, 3]},
        {"from": "teacher", "layers": [0], "lora": {"rank": 2}, "gradient_checkpointing": True},
        {"from": "teacher", "dtype": "bfloat16"},
    ],
)
def test_it_runs_the_real_loop(make_recipe, student):
    recipe = make_recipe(student=student)
    found = step_time(recipe, check(recipe))
    assert isinstance(found, StepTime)
    assert found.seconds > 0
    assert set(found.teacher_layer) == {"big"}


def test_a_run_is_not_touched(make_recipe):
    """It draws no random number that someone else would have drawn."""
    import torch

    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    recipe = make_recipe()
    step_time(recipe, check(recipe))
    assert torch.equal(torch.rand(3), expected)
