"""How a step is laid out changes nothing: accumulation, DDP and FSDP2 give the same losses."""

import json

import pytest

from limbeck.recipe.resolve import dump
from limbeck.recipe.run import run

STEPS = 20


@pytest.fixture
def one_process(make_recipe, tmp_path, losses):
    run(make_recipe({"steps": STEPS}), tmp_path / "one")
    found = losses(tmp_path / "one")
    assert found[-1][0] < found[0][0]  # it learns, or all layouts would agree about nothing
    return found


def test_accumulation_changes_nothing(make_recipe, tmp_path, one_process, losses, assert_same):
    for parts in (2, 4, 8):
        run(make_recipe({"steps": STEPS, "accumulate": parts}), tmp_path / str(parts))
        assert_same(losses(tmp_path / str(parts)), one_process)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_change_nothing(
    make_recipe, tmp_path, one_process, parallel, losses, assert_same, torchrun
):
    recipe = make_recipe(
        {"steps": STEPS, "parallel": parallel, "accumulate": 2}, evals=["agreement"]
    )
    path = tmp_path / "recipe.yaml"
    path.write_text(dump(recipe))
    torchrun(path, tmp_path / parallel)
    assert_same(losses(tmp_path / parallel), one_process)
    report = json.loads((tmp_path / parallel / "report.json").read_text())
    assert report["agreement"]["after"]["kl_nats"] < report["agreement"]["before"]["kl_nats"]

    from transformers import AutoModelForCausalLM

    student = AutoModelForCausalLM.from_pretrained(tmp_path / parallel / "student")
    assert student.config.num_hidden_layers == 2


def test_a_run_may_resume_on_another_number_of_processes(
    make_recipe, tmp_path, one_process, losses, assert_same, torchrun
):
    recipe = make_recipe({"steps": STEPS, "parallel": "fsdp"})
    path, out = tmp_path / "recipe.yaml", tmp_path / "moved"
    path.write_text(dump(recipe))
    torchrun(path, out)
    for checkpoint in (out / "checkpoints").glob("step-20"):
        for file in checkpoint.iterdir():
            file.unlink()
        checkpoint.rmdir()
    run(recipe, out, resume=True)  # from step 18, on one process
    assert_same(losses(out), one_process)
