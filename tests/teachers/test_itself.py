"""The student as its own teacher: frozen, live, and following slowly."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from limbeck.core.specs import SelfTeacher
from limbeck.core.types import Sample, Turn
from limbeck.models.load import load_student
from limbeck.recipe.run import run
from limbeck.teachers.itself import Itself, needs_copy

CPU = torch.device("cpu")
LOGITS = frozenset({"logits"})


def pair(make_recipe, update, **changes):
    recipe = make_recipe()
    spec = replace(recipe.student, **changes)
    student = load_student(spec, recipe.teachers, CPU, 0)
    teacher = SelfTeacher(update=update, decay=0.9)
    copy = None
    if needs_copy(teacher, adapters=spec.lora is not None):
        copy = load_student(spec, recipe.teachers, CPU, 0)
    return student, Itself(teacher, student, copy)


def nudge(student, by=0.01):
    with torch.no_grad():
        for parameter in student.module.parameters():
            if parameter.requires_grad:
                parameter.add_(by)


def said(reader, student):
    view = student.collate(
        [student.encode(Sample(id="1", turns=(Turn(text="the cat", learn=True),)))]
    )
    return reader.read(view, LOGITS).logits.detach()


def test_frozen_stays_live_moves(make_recipe):
    student, frozen = pair(make_recipe, "frozen")
    _, live = pair(make_recipe, "live")
    live.student = student
    before = said(student, student)
    nudge(student)
    frozen.on_step(None)
    assert torch.equal(said(frozen, student), before)
    assert torch.equal(said(live, student), said(student, student))
    assert not torch.equal(said(live, student), before)


def test_adapters_need_no_copy_to_be_frozen(make_recipe):
    from limbeck.core.specs import Lora

    student, frozen = pair(make_recipe, "frozen", lora=Lora(rank=2))
    assert frozen.copy is None
    before = said(student, student)
    nudge(student, 0.3)
    assert not torch.allclose(said(student, student), before)
    assert torch.allclose(said(frozen, student), before)
    assert not torch.allclose(said(student, student), before)  # they are back on


def test_it_follows_as_the_closed_form_says(make_recipe):
    """With a student that stays, phi_n = theta - decay^n (theta - phi_0)."""
    student, teacher = pair(make_recipe, "ema")
    start = [p.clone() for p in student.module.parameters()]
    nudge(student, 0.5)
    for _ in range(7):
        teacher.on_step(None)
    for first, theta, phi in zip(
        start, student.module.parameters(), teacher.copy.module.parameters(), strict=True
    ):
        assert torch.allclose(phi, theta - 0.9**7 * (theta - first), atol=1e-6)


@pytest.mark.parametrize("update", ["frozen", "live", "ema"])
def test_it_gives_no_gradient_and_takes_none(make_recipe, update):
    student, teacher = pair(make_recipe, update)
    view = student.collate(
        [student.encode(Sample(id="1", turns=(Turn(text="the cat", learn=True),)))]
    )
    student.module.train()
    heard = teacher.read(view, frozenset({"projection"})).projection
    assert not heard.hidden.requires_grad
    assert not heard.weight.requires_grad
    assert student.module.training
    assert all(p.requires_grad for p in student.module.parameters())


SELF = {
    "teachers": {"me": {"kind": "self", "update": "frozen"}},
    "student": {
        "config": {
            "model_type": "llama",
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "vocab_size": 320,
        }
    },
}


def self_recipe(make_recipe, tiny_teacher, update, kind="forward_kl", **train):
    return make_recipe(
        student={**SELF["student"], "tokenizer": str(tiny_teacher)},
        teachers={"me": {"kind": "self", "update": update}},
        terms=[
            {"objective": {"kind": kind}},
            {"objective": {"kind": "cross_entropy"}, "weight": train.pop("labels", 0.0)},
        ],
        train=train,
    )


KINDS = ["forward_kl", "reverse_kl", "jensen_shannon", "skew_forward_kl", "total_variation"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_that_is_its_teacher_has_no_loss_and_stays(
    make_recipe, tiny_teacher, tmp_path, kind
):
    recipe = self_recipe(make_recipe, tiny_teacher, "frozen", kind, steps=5, weight_decay=0.0)
    run(recipe, tmp_path / "run")
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        assert json.loads(line)["loss"] == pytest.approx(0, abs=1e-6)


def test_a_resumed_run_has_the_same_teacher(make_recipe, tiny_teacher, tmp_path):
    """What follows the student is in the checkpoint."""
    straight = self_recipe(make_recipe, tiny_teacher, "ema", labels=1.0, steps=6, save_every=3)
    run(straight, tmp_path / "a")
    half = replace(straight)
    run(half, tmp_path / "b")
    import shutil

    for path in (tmp_path / "b" / "checkpoints").iterdir():
        if path.name == "step-6":
            shutil.rmtree(path)
    (tmp_path / "b" / "report.json").unlink()
    run(half, tmp_path / "b", resume=True)
    a, b = (
        load_file(tmp_path / x / "checkpoints" / "step-6" / "carried.safetensors") for x in "ab"
    )
    assert a.keys() == b.keys()
    assert a
    assert all(torch.equal(a[name], b[name]) for name in a)
    start, end = (
        load_file(tmp_path / "a" / "checkpoints" / f"step-{n}" / "carried.safetensors")
        for n in (3, 6)
    )
    assert any(not torch.equal(start[name], end[name]) for name in start)
