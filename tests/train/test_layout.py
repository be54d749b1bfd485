"""How a step is laid out changes nothing: accumulation, DDP and FSDP2 give the same losses."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

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


@pytest.fixture
def alone_and_split(make_recipe, tmp_path, torchrun):
    """The folders of four steps on one process, and of the same on two that split the student."""

    def train(**parts):
        run(make_recipe({"steps": 4}, **parts), tmp_path / "one")
        path = tmp_path / "recipe.yaml"
        path.write_text(dump(make_recipe({"steps": 4, "parallel": "fsdp"}, **parts)))
        torchrun(path, tmp_path / "two")
        return tmp_path / "one", tmp_path / "two"

    return train


def test_adapters_of_a_split_student_are_merged_into_its_own_layers(alone_and_split):
    """The export needs nothing else: not the teacher that the layers are cut from."""
    student = {
        "from": "big",
        "layers": [0, 3],
        "lora": {"rank": 2, "targets": ["q_proj", "lm_head"]},
    }
    one, two = (
        AutoModelForCausalLM.from_pretrained(folder / "student")
        for folder in alone_and_split(student=student)
    )
    assert type(two).__name__ == "LlamaForCausalLM"
    assert two.config.num_hidden_layers == 2
    assert two.config.tie_word_embeddings is one.config.tie_word_embeddings is False
    weights = one.state_dict()
    for name, weight in two.state_dict().items():
        torch.testing.assert_close(weight, weights[name], rtol=1e-4, atol=1e-5, msg=name)


def test_a_copy_follows_a_split_student(alone_and_split, losses, tiny_teacher):
    one, two = alone_and_split(
        teachers={"big": {"name": str(tiny_teacher)}, "me": {"kind": "self", "update": "ema"}},
        terms=[
            {"objective": "forward_kl", "teacher": "big", "weight": 0.5},
            {"objective": "reverse_kl", "teacher": "me", "weight": 0.5},
        ],
    )
    for mine, theirs in zip(losses(two), losses(one), strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5)
    expected, kept = (
        load_file(folder / "checkpoints" / "step-4" / "carried.safetensors")
        for folder in (one, two)
    )
    assert kept.keys() == expected.keys()
    for name, weight in kept.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-4, atol=1e-5, msg=name)
