"""Losses taken chunk by chunk at the head train the same student as whole logits do."""

import dataclasses
import json
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file

from limbeck.core.term import Term
from limbeck.losses import chunks, fused
from limbeck.models.causal import CausalModel
from limbeck.objectives import ForwardKL
from limbeck.recipe.run import run
from limbeck.train.checkpoint import sorted_checkpoints
from limbeck.train.loss import fits_chunks

STEPS = 20
FEW = 4
"""Steps where gradients jump, as they do where a sorting changes: rounding is told apart sooner."""

TWO = [
    {"objective": {"kind": "forward_kl", "temperature": 2.0}, "weight": 0.7},
    {"objective": {"kind": "cross_entropy"}, "weight": 0.3},
]
TERMS = {
    "kl and labels": TWO,
    "labels alone": [{"objective": "cross_entropy"}],
    "one channel": [{"objective": "jensen_shannon", "channel": "main"}, *TWO],
}


def trained(folder):
    newest = sorted_checkpoints(folder / "checkpoints")[0]
    weights = load_file(newest / "weights.safetensors")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return weights, [{k: v for k, v in json.loads(x).items() if "loss" in k} for x in lines]


def assert_same(first, second, atol=1e-5):
    weights, losses = trained(first)
    others, other_losses = trained(second)
    for name, weight in weights.items():
        torch.testing.assert_close(weight, others[name], rtol=0, atol=atol)
    for mine, theirs in zip(losses, other_losses, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5)


@pytest.fixture
def few_rows_a_chunk(monkeypatch):
    few = dataclasses.replace(chunks.CPU, chunk_bytes=320 * 4 * 7)
    monkeypatch.setattr(chunks, "CPU", few)
    monkeypatch.setattr(chunks, "GPU", few)


@pytest.mark.parametrize("terms", TERMS)
def test_chunked_and_naive_give_the_same_weights(make_recipe, tmp_path, terms, few_rows_a_chunk):
    for name in ("naive", "chunked"):
        train = {"steps": STEPS, "logits": name, "accumulate": 2}
        run(make_recipe(train, terms=TERMS[terms], evals=[]), tmp_path / name)
    assert_same(tmp_path / "naive", tmp_path / "chunked")


def test_losses_without_kernel(make_recipe, tmp_path, few_rows_a_chunk):
    terms = [{"objective": "adaptive_kl"}, {"objective": "sorted_l1"}]
    for name in ("naive", "chunked"):
        run(make_recipe({"steps": FEW, "logits": name}, terms=terms, evals=[]), tmp_path / name)
    assert_same(tmp_path / "naive", tmp_path / "chunked")


@pytest.mark.skipif(fused.why_not("compiled") is not None, reason="torch before 2.12")
def test_a_compiled_block_too(make_recipe, tmp_path):
    for name in ("naive", "compiled"):
        run(make_recipe({"steps": STEPS, "logits": name}, evals=[]), tmp_path / name)
    assert_same(tmp_path / "naive", tmp_path / "compiled")


def test_a_teacher_with_another_tokenizer(make_recipe, tmp_path, shared, few_rows_a_chunk):
    """Rows are paired by bytes: some rows have no partner, others stand in another order."""
    other = shared / "models" / "stories260K"
    for name in ("naive", "chunked"):
        recipe = make_recipe(
            {"steps": FEW, "logits": name},
            teachers={"big": {"name": str(other)}},
            student={
                "config": {
                    "model_type": "llama",
                    "hidden_size": 16,
                    "intermediate_size": 32,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                    "num_key_value_heads": 1,
                },
                "tokenizer": str(shared / "tokenizers" / "tinystories_bpe2k"),
            },
            terms=[{"objective": "sorted_l1"}, {"objective": "cross_entropy", "weight": 0.1}],
            evals=[],
        )
        run(recipe, tmp_path / name)
    # Adam makes whole steps of gradients that are next to nothing, and a sorted loss has many:
    # where two probabilities are equal but for rounding, the processor decides which comes first.
    assert_same(tmp_path / "naive", tmp_path / "chunked", atol=1e-4)


def test_the_default_makes_no_logits(make_recipe, tmp_path, monkeypatch):
    """Neither of the two models is asked for them; and the head is read where it stands."""
    asked = []
    read = CausalModel.read

    def noted(self, view, needs):
        asked.append(needs)
        return read(self, view, needs)

    monkeypatch.setattr(CausalModel, "read", noted)
    monkeypatch.setattr(fused, "_naive", None)
    run(make_recipe({"steps": 2, "packing": "never"}, evals=[]), tmp_path / "a")
    assert set(asked) == {frozenset({"projection"})}
    run(make_recipe({"steps": 2, "logits": "naive", "packing": "never"}, evals=[]), tmp_path / "b")
    assert frozenset({"logits"}) in asked


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_follows_whole_logits(make_recipe, tmp_path, dtype):
    curves = {}
    for name in ("naive", "chunked"):
        student = {"from": "teacher", "layers": [0, 3], "dtype": dtype}
        recipe = make_recipe({"steps": STEPS, "logits": name}, student=student, evals=[])
        run(recipe, tmp_path / name)
        curves[name] = [m["loss"] for m in trained(tmp_path / name)[1]]
    assert curves["chunked"] == pytest.approx(curves["naive"], rel=0.02)
    assert curves["chunked"][-1] < curves["chunked"][0]


class Together(ForwardKL):
    """Looks at all rows together, and does not say that it would do with some."""

    rowwise: ClassVar[bool] = False
    seen: ClassVar[list[int]] = []

    def __call__(self, student, teacher):
        self.seen.append(len(student.labels))
        rows = super().__call__(student, teacher)
        return rows / rows.detach().mean()


def test_an_objective_over_all_rows_gets_all_rows(make_recipe, tmp_path, few_rows_a_chunk):
    recipe = make_recipe({"steps": 2, "packing": "never"}, evals=[])
    term = Term(objective=Together(), teacher="big")
    run(dataclasses.replace(recipe, terms=(term,)), tmp_path / "a")
    assert all(m["loss"] == pytest.approx(1.0) for m in trained(tmp_path / "a")[1])
    assert min(Together.seen) > 7


def test_an_objective_with_weights_of_its_own_is_not_cut_off_from_them():
    class Owning(torch.nn.Module):
        rowwise, unit, asks, needs = True, "token", frozenset({"logits"}), frozenset()

    term = Term.__new__(Term)
    object.__setattr__(term, "objective", Owning())
    assert not fits_chunks([term])
    assert fits_chunks([Term(objective=ForwardKL())])
