"""The loop's promises: honest counting, skipped steps, terms by channel, frozen teachers."""

import json
import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from limbeck import losses
from limbeck.core.errors import DataError, DivergedError
from limbeck.core.types import Needs, Unit
from limbeck.recipe.run import run
from limbeck.recipe.schema import Term


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@dataclass
class Poisoned:
    """Cross-entropy that turns non-finite in chosen calls."""

    asks: ClassVar[Needs] = frozenset({"logits"})
    needs: ClassVar[Needs] = frozenset()
    unit: ClassVar[Unit] = "token"
    shared_vocabulary: ClassVar[bool] = False
    kind: ClassVar[str] = "poisoned"

    bad: tuple[int, ...] = ()
    value: float = math.nan
    calls: int = 0

    def __call__(self, student, teacher):
        self.calls += 1
        rows = losses.cross_entropy(student.logits, student.labels)
        return rows * self.value if self.calls in self.bad else rows


def with_objective(recipe, objective):
    import dataclasses

    return dataclasses.replace(recipe, terms=(Term(objective=objective),), teachers={})


@pytest.fixture
def alone(make_recipe, tiny_teacher):
    """A recipe without teacher whose one objective the test gives."""

    def make(objective, **train):
        recipe = make_recipe(
            train,
            student={"name": str(tiny_teacher)},
            teachers={},
            terms=[{"objective": "cross_entropy"}],
        )
        return with_objective(recipe, objective)

    return make


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bad_step_is_skipped_and_counted(alone, tmp_path, value, monkeypatch):
    plain(monkeypatch)
    run(alone(Poisoned(bad=(3,), value=value)), tmp_path / "a")
    seen = metrics(tmp_path / "a")
    assert [m["skipped"] for m in seen] == [0, 0, 1, 1, 1, 1, 1, 1]
    assert seen[2]["loss"] is None
    assert all(m["loss"] is not None for i, m in enumerate(seen) if i != 2)
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    assert report["train"]["skipped_steps"] == 1


def test_bad_steps_in_a_row_stop_at_the_last_good_state(alone, tmp_path, monkeypatch):
    plain(monkeypatch)
    run(alone(Poisoned(), steps=4, save_every=4), tmp_path / "good")
    with pytest.raises(DivergedError, match="3 times in a row"):
        run(
            alone(Poisoned(bad=(5, 6, 7)), steps=20, save_every=4, patience=3, schedule="constant"),
            tmp_path / "bad",
        )
    from safetensors.torch import load_file

    saved = [
        load_file(tmp_path / "bad" / "checkpoints" / f"step-{n}" / "weights.safetensors")
        for n in (4, 7)
    ]
    assert all(torch.equal(saved[0][name], saved[1][name]) for name in saved[0])
    assert all(torch.isfinite(value).all() for value in saved[1].values())


def plain(monkeypatch):
    """Let a test's objective, which is no registered kind, be written into recipe.yaml."""
    from limbeck.recipe import resolve

    monkeypatch.setattr(resolve, "describe", lambda value: {"kind": value.kind})


def test_each_term_is_logged_alone_and_they_add_up(make_recipe, tmp_path):
    run(make_recipe(), tmp_path / "a")
    for m in metrics(tmp_path / "a"):
        assert m["loss"] == pytest.approx(
            0.7 * m["loss/forward_kl"] + 0.3 * m["loss/cross_entropy"]
        )
        assert {"tokens", "seconds", "learning_rate", "grad_norm"} <= set(m)


def test_a_student_equal_to_its_teacher_has_no_loss(make_recipe, tiny_teacher, tmp_path):
    recipe = make_recipe(
        {"steps": 2},
        student={"name": str(tiny_teacher)},
        terms=[{"objective": "forward_kl"}],
    )
    run(recipe, tmp_path / "a")
    first = metrics(tmp_path / "a")[0]
    assert abs(first["loss"]) < 1e-6
    assert first["grad_norm"] < 1e-4


def test_a_channel_selects_rows_and_its_absence_costs_nothing(make_recipe, tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [
        {"prompt": "the cat\n", "completion": "sat", "channel": "a" if i % 2 else "b"}
        for i in range(40)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    terms = [{"objective": "cross_entropy", "channel": c, "name": c} for c in ("a", "b", "absent")]
    terms[-1]["weight"] = 100.0  # its factor stays finite, whatever it is divided by
    run(make_recipe(source={"path": str(path)}, terms=terms), tmp_path / "run")
    for m in metrics(tmp_path / "run"):
        assert m["loss/absent"] is m["scaled/absent"] is None
        assert m["loss"] == pytest.approx(m["loss/a"] + m["loss/b"])
        assert m["skipped"] == 0


def test_weights_of_samples_weigh_their_rows(make_recipe, tmp_path):
    def first_loss(weights):
        path = tmp_path / "w.jsonl"
        rows = [
            {"prompt": "the\n", "completion": "xx", "weight": weights[0]},
            {"prompt": "the\n", "completion": "qq", "weight": weights[1]},
        ] * 4
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        out = tmp_path / str(weights)
        recipe = make_recipe(
            {"steps": 1, "batch_tokens": 400},
            source={"path": str(path), "holdout": 0},
            terms=[{"objective": "cross_entropy"}],
        )
        run(recipe, out)
        return metrics(out)[0]["loss"]

    left, right, both = first_loss((1, 0)), first_loss((0, 1)), first_loss((2, 2))
    assert left != right
    assert min(left, right) < both < max(left, right)


def test_padding_changes_nothing(make_recipe, tiny_teacher):
    from limbeck.core.types import Sample, Turn
    from limbeck.models.load import load_teacher

    recipe = make_recipe()
    model = load_teacher(recipe.teachers["big"], torch.device("cpu"), 64)
    short = Sample(id="s", turns=(Turn(text="the cat\n"), Turn(text="sat", learn=True)))
    long = Sample(
        id="l", turns=(Turn(text="a\n"), Turn(text="mat on a mat near the river", learn=True))
    )
    needs = frozenset({"logits"})
    alone_view = model.collate([model.encode(short)])
    padded = model.collate([model.encode(short), model.encode(long)])
    with torch.no_grad():
        one, two = model.read(alone_view, needs), model.read(padded, needs)
    count = len(one.labels)
    assert torch.equal(one.labels, two.labels[:count])
    assert torch.allclose(one.logits, two.logits[:count], atol=1e-5)


def test_the_head_sees_only_rows(make_recipe):
    from limbeck.core.types import Sample, Turn
    from limbeck.models.load import load_teacher

    model = load_teacher(make_recipe().teachers["big"], torch.device("cpu"), 64)
    sample = Sample(id="s", turns=(Turn(text="the cat saw a\n"), Turn(text="mat", learn=True)))
    view = model.collate([model.encode(sample)])
    needs = frozenset({"logits", "chosen"})
    with torch.no_grad():
        signals = model.read(view, needs)
        whole = model.module(view.ids).logits[0]
    assert signals.logits.shape == (len(view.rows), whole.shape[-1])
    assert torch.allclose(signals.logits, whole[view.rows], atol=1e-5)
    expected = whole.log_softmax(-1)[view.rows, view.labels]
    assert torch.allclose(signals.chosen, expected, atol=1e-5)


def test_rows_that_are_all_cut_away_are_an_error(make_recipe, tmp_path):
    with pytest.raises(DataError, match="raise student.max_length"):
        run(
            make_recipe(student={"from": "big", "layers": [0], "max_length": 2}),
            tmp_path / "a",
        )


def test_truncation_is_reported(make_recipe, tmp_path):
    run(make_recipe(student={"from": "big", "layers": [0], "max_length": 12}), tmp_path / "a")
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    assert report["train"]["truncated_tokens"] > 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_learns(make_recipe, tmp_path, dtype):
    student = {"from": "big", "layers": [0, 3], "dtype": dtype}
    run(make_recipe({"steps": 12}, student=student), tmp_path / "a")
    seen = [m for m in metrics(tmp_path / "a") if m["loss"] is not None]
    assert seen[-1]["loss"] < seen[0]["loss"]
    from safetensors.torch import load_file

    stored = load_file(tmp_path / "a" / "student" / "model.safetensors")
    assert {value.dtype for value in stored.values()} == {getattr(torch, dtype)}


def test_gradient_checkpointing_changes_nothing(make_recipe, tmp_path):
    for on in (False, True):
        student = {"from": "big", "layers": [0, 3], "gradient_checkpointing": on}
        run(make_recipe({"steps": 3}, student=student), tmp_path / str(on))
    off, on = (metrics(tmp_path / str(flag)) for flag in (False, True))
    assert [m["loss"] for m in off] == pytest.approx([m["loss"] for m in on], abs=1e-6)


def test_lora_trains_adapters_and_saves_a_merged_student(make_recipe, tiny_teacher, tmp_path):
    student = {"name": str(tiny_teacher), "lora": {"rank": 2}}
    recipe = make_recipe(student=student, terms=[{"objective": "cross_entropy"}])
    run(recipe, tmp_path / "a")
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    saved = load_file(tmp_path / "a" / "checkpoints" / "step-8" / "weights.safetensors")
    assert saved
    assert all("lora_" in name for name in saved)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "a" / "student")
    before = AutoModelForCausalLM.from_pretrained(tiny_teacher)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert not torch.allclose(merged(ids).logits, before(ids).logits, atol=1e-3)
    assert type(merged).__name__ == "LlamaForCausalLM"


def test_a_teacher_with_padded_vocabulary_just_works(
    make_recipe, tiny_teacher, tmp_path, tokenizer
):
    from transformers import AutoModelForCausalLM

    wide = tmp_path / "wide"
    model = AutoModelForCausalLM.from_pretrained(tiny_teacher)
    model.resize_token_embeddings(len(tokenizer) + 8)
    model.save_pretrained(wide)
    tokenizer.save_pretrained(wide)
    recipe = make_recipe(
        teachers={"big": {"name": str(wide)}},
        student={"name": str(tiny_teacher)},
        evals=["agreement"],
        terms=[
            {"objective": kind}
            for kind in ("forward_kl", "reverse_kl", "jensen_shannon", "logit_mse")
        ],
    )
    run(recipe, tmp_path / "a")
    assert all(math.isfinite(m["loss"]) for m in metrics(tmp_path / "a"))


def test_another_tokenizer_works_with_sorted_l1(make_recipe, tmp_path, shared):
    teacher = shared / "models" / "babyllama105"
    student = {"name": str(shared / "models" / "stories260K"), "max_length": 128}
    recipe = make_recipe(
        {"steps": 2},
        teachers={"big": {"name": str(teacher)}},
        student=student,
        terms=[{"objective": "sorted_l1"}],
    )
    run(recipe, tmp_path / "a")
    assert all(0 < m["loss"] < 2 for m in metrics(tmp_path / "a"))
