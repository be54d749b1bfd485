"""The plan counts what the real model has, and its memory is near what a run takes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from limbeck.core.errors import ModelError
from limbeck.core.registry import kinds
from limbeck.models.load import load_student, load_teacher
from limbeck.recipe.memory import LOSS_COPIES, OTHER_COPIES
from limbeck.recipe.plan import plan

CPU = torch.device("cpu")
TOLERANCE = 0.25

SHAPES = {
    "wide and shallow": {
        "vocabulary": 8000,
        "layers": 4,
        "width": 768,
        "inner": 2048,
        "batch_tokens": 1200,
    },
    "deep and narrow": {
        "vocabulary": 4000,
        "layers": 16,
        "width": 256,
        "inner": 768,
        "batch_tokens": 1200,
    },
    "a big vocabulary": {
        "vocabulary": 30000,
        "layers": 2,
        "width": 256,
        "inner": 768,
        "batch_tokens": 1200,
    },
    "a small vocabulary": {
        "vocabulary": 1000,
        "layers": 8,
        "width": 512,
        "inner": 1536,
        "batch_tokens": 1200,
    },
    "few tokens": {
        "vocabulary": 8000,
        "layers": 6,
        "width": 768,
        "inner": 2048,
        "batch_tokens": 240,
    },
}


def shown(made):
    console = Console(width=120, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(made.render())
    console.file.close()
    return console.export_text()


def test_it_shows_recipe_terms_and_figures(make_recipe):
    made = plan(make_recipe({"steps": 7, "batch_tokens": 200}))
    text = shown(made)
    for part in (
        "forward_kl",
        "0.7",
        "logits",
        "big",
        "hidden, logits, projection, text",
        f"{made.facts.student.parameters:,}",
        f"{made.facts.teachers['big'].parameters:,}",
        "7 steps of 200 tokens: 1,400 tokens",
        "MiB",
    ):
        assert part in text


def test_parameters_are_those_of_the_real_models(make_recipe):
    made = plan(make_recipe())
    recipe = made.recipe
    teacher = load_teacher(recipe.teachers["big"], CPU, 64)
    student = load_student(recipe.student, recipe.teachers, CPU, 0)
    count = sum(p.numel() for p in student.module.parameters())
    assert made.facts.student.parameters == made.memory.trainable == count
    assert made.facts.teachers["big"].parameters == sum(
        p.numel() for p in teacher.module.parameters()
    )


NEW = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2}
STUDENTS = {
    "cut": {"from": "teacher", "layers": [0, 3]},
    "whole": {"from": "teacher"},
    "llama": {
        "config": {"model_type": "llama", "intermediate_size": 24, **NEW, "num_key_value_heads": 1}
    },
    "untied": {"config": {"model_type": "llama", **NEW, "tie_word_embeddings": False}},
    "qwen3": {"config": {"model_type": "qwen3", "intermediate_size": 24, "head_dim": 12, **NEW}},
    "gpt2": {"config": {"model_type": "gpt2", "n_layer": 2, "n_embd": 16, "n_head": 2}},
}


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")  # PEFT sets it right itself
@pytest.mark.parametrize("name", STUDENTS)
@pytest.mark.parametrize("targets", [None, "all-linear", "one"])
def test_trained_parameters_are_those_of_the_real_student(make_recipe, name, targets):
    values = dict(STUDENTS[name])
    one = "c_attn" if name == "gpt2" else "q_proj"
    if targets is not None:
        values["lora"] = {"rank": 3, "targets": [one] if targets == "one" else targets}
    made = plan(make_recipe(student=values))
    student = load_student(made.recipe.student, made.recipe.teachers, CPU, 0)
    trained = sum(p.numel() for p in student.module.parameters() if p.requires_grad)
    assert made.memory.trainable == trained
    if targets is None:
        assert made.facts.student.parameters == trained


def test_adapters_on_what_is_not_there(make_recipe):
    student = {"from": "teacher", "lora": {"targets": ["no_such_layer"]}}
    with pytest.raises(ModelError, match=r"student\.lora\.targets: .*no_such_layer"):
        plan(make_recipe(student=student))


def test_memory_follows_what_the_recipe_says(make_recipe):
    def of(processes=1, train=None, **parts):
        made = plan(make_recipe({"device": "cpu", **(train or {})}, **parts), processes=processes)
        return made.memory

    def student(**changes):
        return {"from": "teacher", "layers": [0, 3], **changes}

    base = of()
    assert base.activations_bytes == 2 * of(train={"accumulate": 2}).activations_bytes
    assert base.activations_bytes == 2 * of(processes=2).activations_bytes
    assert base.weights_bytes == of(processes=2).weights_bytes
    assert base.weights_bytes == 2 * of(processes=2, train={"parallel": "fsdp"}).weights_bytes
    waiting = of(train={"accumulate": 2})
    assert waiting.peak_bytes == (
        waiting.weights_bytes
        + waiting.gradients_bytes
        + waiting.activations_bytes
        + waiting.loss_bytes
    )
    assert of(student=student(gradient_checkpointing=True)).peak_bytes < base.peak_bytes
    assert of(student=student(lora={"rank": 1})).weights_bytes < base.weights_bytes
    assert of(student=student(dtype="bfloat16")).activations_bytes < base.activations_bytes
    alone = of(terms=[{"objective": "cross_entropy"}])
    assert alone.loss_bytes < base.loss_bytes
    naive = of(train={"logits": "naive"})
    assert naive.activations_bytes == base.activations_bytes
    assert naive.loss_bytes > base.loss_bytes  # although the chunk holds all rows of so few
    assert of(train={"device": "cuda"}).gradients_bytes < base.gradients_bytes


def test_every_objective_is_in_the_table():
    assert {kind for kind in kinds("objective") if kind in LOSS_COPIES} == set(LOSS_COPIES)
    assert min(LOSS_COPIES.values()) < OTHER_COPIES < max(LOSS_COPIES.values())


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux counts the peak")
def test_memory_is_near_what_a_run_takes():
    script = Path(__file__).with_name("measure_memory.py")
    # Freed blocks go back at once, so that what is measured is what lives.
    allocator = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, str(script), json.dumps(list(SHAPES.values()))],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **allocator, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    found = lines[1:]  # the first one warms up
    assert len(found) == len(SHAPES)
    for name, line in zip(SHAPES, found, strict=True):
        ratio = line["planned"] / line["measured"]
        assert abs(ratio - 1) < TOLERANCE, f"{name}: {line}"
