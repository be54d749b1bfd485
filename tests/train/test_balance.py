"""Scales of terms: the rules by themselves, and what they do in a run."""

import json

import pytest
import torch

from limbeck.core.term import Term
from limbeck.objectives import CrossEntropy, ForwardKL
from limbeck.recipe.run import run
from limbeck.train.balance import by_gradient, by_uncertainty, shared_layer

TERMS = [
    {"objective": {"kind": "forward_kl"}, "weight": 2.0},
    {"objective": {"kind": "logit_mse"}, "weight": 1.0},
]


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_first_term_keeps_its_size_and_the_others_follow():
    assert by_gradient([1.0, 1.0, 1.0], [2.0, 8.0, 0.5]) == [1.0, 0.25, 4.0]


def test_a_later_measurement_moves_half_way_in_the_logarithm():
    first, second = by_gradient([1.0, 0.25], [1.0, 1.0])
    assert (first, second) == (1.0, pytest.approx(0.5))


@pytest.mark.parametrize("norms", [[0.0, 3.0], [1.0, 0.0]])
def test_a_term_without_gradient_breaks_nothing(norms):
    assert by_gradient([1.0, 0.5], norms) == pytest.approx([1.0, 0.5])


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_gradient_that_overflowed_changes_no_scale(bad):
    assert by_gradient([1.0, 0.5], [bad, 2.0]) == [1.0, 0.5]
    assert by_gradient([1.0, 0.5, 0.5], [2.0, bad, 4.0]) == pytest.approx([1.0, 0.5, 0.5])
    assert by_gradient([1.0, 1.0, 1.0], [2.0, bad, 4.0]) == [1.0, 1.0, 0.5]


def test_uncertainty_comes_to_rest_where_each_term_has_size_one():
    losses, scales = [40.0, 0.01, 1.0], [1.0, 1.0, 1.0]
    for _ in range(3000):
        scales = by_uncertainty(scales, losses)
    assert [s * loss for s, loss in zip(scales, losses, strict=True)] == pytest.approx(
        [1, 1, 1], rel=0.01
    )


def test_uncertainty_ignores_a_loss_that_is_no_number():
    assert by_uncertainty([0.5], [float("nan")]) == [0.5]


def test_uncertainty_is_the_gradient_of_kendalls_objective():
    s = torch.tensor([0.3, -1.0], dtype=torch.float64, requires_grad=True)
    losses = torch.tensor([2.0, 0.4], dtype=torch.float64)
    ((-s).exp() * losses + s).sum().backward()
    scales = by_uncertainty((-s).exp().tolist(), losses.tolist())
    expected = (-(s.detach() - 0.05 * s.grad)).exp()
    assert scales == pytest.approx(expected.tolist())


def test_the_shared_layer_is_below_the_lowest_tap(tiny_teacher):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_teacher)

    class Deep(CrossEntropy):
        asks = frozenset({"hidden:1", "hidden:model.layers.2.mlp"})

    layers = model.model.layers
    assert shared_layer(model, [Term(objective=ForwardKL())]) is layers[3]
    assert shared_layer(model, [Term(objective=ForwardKL()), Term(objective=Deep())]) is layers[2]


def test_a_term_without_rows_in_a_step_keeps_its_scale(make_recipe, tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": "the cat\n", "completion": "sat", "channel": "a"} for _ in range(60)]
    rows[7]["channel"] = "b"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    terms = [{"objective": "cross_entropy", "channel": c, "name": c} for c in ("a", "b")]
    train = {"balance": "uncertainty", "batch_tokens": 40, "steps": 40, "learning_rate": 1e-9}
    run(make_recipe(train, source={"path": str(path), "holdout": 0}, terms=terms), tmp_path / "run")
    found = metrics(tmp_path / "run")
    with_rows = [row for row in found if row["loss/b"] is not None]
    assert 0 < len(with_rows) < 10
    assert all(row["loss"] == row["scaled/a"] for row in found if row["scaled/b"] is None)
    scales = [row["scaled/b"] / row["loss/b"] for row in with_rows]
    # As if there had been no steps between them.
    expected = [1.0]
    for row in with_rows[:-1]:
        expected += by_uncertainty(expected[-1:], [row["loss/b"]])
    assert scales == pytest.approx(expected, rel=1e-5)


def test_every_terms_raw_and_scaled_size_is_logged(make_recipe, tmp_path):
    run(make_recipe(terms=TERMS), tmp_path / "run")
    for row in metrics(tmp_path / "run"):
        assert row["scaled/forward_kl"] == pytest.approx(2 * row["loss/forward_kl"])
        assert row["loss"] == pytest.approx(row["scaled/forward_kl"] + row["scaled/logit_mse"])


@pytest.mark.parametrize("rule", ["gradient", "uncertainty"])
def test_a_resumed_run_goes_on_with_the_same_scales(rule, make_recipe, tmp_path):
    whole = make_recipe(train={"balance": rule}, terms=TERMS)
    run(whole, tmp_path / "whole")
    from limbeck.train.loop import Trainer

    step = Trainer.step

    def stopping(self):
        if self.state.step == 5 and not self.state.skipped:
            raise KeyboardInterrupt
        return step(self)

    Trainer.step = stopping
    try:
        with pytest.raises(BaseException):  # noqa: B017, PT011
            run(whole, tmp_path / "parts")
    finally:
        Trainer.step = step
    run(whole, tmp_path / "parts", resume=True)
    drop = ("seconds",)
    left, right = (
        [{k: v for k, v in row.items() if k not in drop} for row in metrics(tmp_path / name)]
        for name in ("whole", "parts")
    )
    assert left == right


def test_equal_gradients_make_the_pull_equal(make_recipe, tmp_path):
    run(make_recipe(train={"balance": "gradient", "steps": 1}, terms=TERMS), tmp_path / "run")
    (row,) = metrics(tmp_path / "run")
    scale = row["scaled/logit_mse"] / row["loss/logit_mse"]
    assert scale != pytest.approx(1.0)
    # Measured by hand: two runs of one term each, whose first gradient is theirs alone.
    from safetensors.torch import load_file

    pulls = []
    for term in TERMS:
        alone = make_recipe(
            train={"steps": 1, "clip": 1e9, "learning_rate": 1e-9, "weight_decay": 0.0},
            terms=[{**term, "weight": 1.0}],
        )
        run(alone, tmp_path / term["objective"]["kind"])
        folder = tmp_path / term["objective"]["kind"] / "checkpoints" / "step-1"
        moments = load_file(folder / "optimizer.safetensors")
        layer = [v for k, v in moments.items() if "layers.1." in k and k.endswith("exp_avg")]
        pulls.append(sum(v.square().sum() for v in layer).sqrt().item())
    assert scale == pytest.approx(pulls[0] / pulls[1], rel=1e-3)
