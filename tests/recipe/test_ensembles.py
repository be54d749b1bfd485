"""Whole runs with an ensemble, and with schedules."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from limbeck.core.specs import EnsembleTeacher
from limbeck.models.packing import packing
from limbeck.recipe.calibrate import step_time
from limbeck.recipe.check import check
from limbeck.recipe.plan import plan
from limbeck.recipe.run import run


@pytest.fixture(scope="session")
def another_teacher(tiny_teacher, tmp_path_factory):
    """The same architecture with other weights."""
    folder = tmp_path_factory.mktemp("models") / "another"
    model = AutoModelForCausalLM.from_pretrained(tiny_teacher)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_teacher).save_pretrained(folder)
    return folder


@pytest.fixture
def make(make_recipe, tiny_teacher, another_teacher):
    def made(how, terms=None, train=None, **parts):
        teachers = {
            "both": {"kind": "ensemble", "of": {"a": 2, "b": 1}, "how": how},
            "a": {"name": str(tiny_teacher)},
            "b": {"name": str(another_teacher)},
        }
        terms = terms or [{"objective": "forward_kl", "teacher": "both"}]
        student = {"from": "a", "layers": [0, 3]}
        return make_recipe(train, student=student, teachers=teachers, terms=terms, **parts)

    return made


def metrics(folder, name="loss"):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)[name] for line in lines]


def test_its_models_are_asked_whether_they_keep_packed_samples_apart(make, tmp_path, monkeypatch):
    asked = []

    def watching(wish, models):
        asked.extend(model.name for model in models)
        return packing(wish, models)

    monkeypatch.setattr("limbeck.recipe.run.packing", watching)
    recipe = make("mixture")
    run(recipe, tmp_path / "run")
    assert asked[1:] == [recipe.teachers[name].name for name in "ab"]


@pytest.mark.parametrize("how", ["mixture", "geometric", "route"])
@pytest.mark.parametrize("train", [{"packing": "always"}, {"accumulate": 2}, {"logits": "naive"}])
def test_a_run_learns_and_its_layout_changes_nothing(make, tmp_path, how, train):
    run(make(how), tmp_path / "plain")
    run(make(how, train=train), tmp_path / "other")
    first = metrics(tmp_path / "plain")
    assert first[-1] < first[0]
    assert metrics(tmp_path / "other") == pytest.approx(first, rel=2e-3)


def test_terms_with_weights_are_the_mixture_step_by_step(make, tmp_path):
    apart = [
        {"objective": "forward_kl", "teacher": "a", "weight": 2 / 3, "name": "a"},
        {"objective": "forward_kl", "teacher": "b", "weight": 1 / 3, "name": "b"},
    ]
    run(make("mixture"), tmp_path / "one")
    run(make("mixture", apart), tmp_path / "two")
    norms = [metrics(tmp_path / name, "grad_norm") for name in ("one", "two")]
    assert norms[0] == pytest.approx(norms[1], rel=2e-3)
    assert metrics(tmp_path / "two")[0] > metrics(tmp_path / "one")[0]


def test_route_is_a_term_for_each_channel(make, tiny_data, tmp_path):
    rows = [json.loads(line) for line in tiny_data.read_text().splitlines()]
    path = tmp_path / "rows.jsonl"
    with path.open("w") as file:
        for index, row in enumerate(rows):
            print(json.dumps({**row, "channel": "ab"[index % 2]}), file=file)
    source = {"path": str(path), "holdout": 4}
    apart = [
        {"objective": "forward_kl", "teacher": name, "channel": name, "name": name} for name in "ab"
    ]
    run(make("route", source=source), tmp_path / "one")
    run(make("route", apart, source=source), tmp_path / "two")
    # The two terms are means of their own: only their sums can be compared.
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    a, b = metrics(tmp_path / "two", "loss/a"), metrics(tmp_path / "two", "loss/b")
    assert min(a[0], b[0]) < one[0] < max(a[0], b[0])
    assert two[0] == pytest.approx(a[0] + b[0], rel=1e-5)


def test_the_plan_counts_its_models_once(make, another_teacher):
    recipe = make("mixture")
    made = plan(recipe)
    assert made.facts.teachers["both"].parameters == 2 * made.facts.teachers["a"].parameters
    alone = {n: s for n, s in recipe.teachers.items() if not isinstance(s, EnsembleTeacher)}
    term = replace(recipe.terms[0], teacher="a")
    other = plan(replace(recipe, teachers=alone, terms=(term,)))
    assert made.memory.weights_bytes == other.memory.weights_bytes
    assert made.memory.loss_bytes > other.memory.loss_bytes  # its logits are whole
    made.render()


def test_a_schedule_moves_the_loss(make_recipe, tmp_path):
    def ramp(**changes):
        objective = {"kind": "taid", "t": 0.0}
        return [{"objective": objective, "schedule": changes}]

    flat = make_recipe(terms=ramp(t={"from": 1.0, "to": 1.0}))
    run(flat, tmp_path / "flat")
    run(make_recipe(terms=[{"objective": "forward_kl"}]), tmp_path / "plain")
    assert metrics(tmp_path / "flat") == pytest.approx(metrics(tmp_path / "plain"), rel=1e-5)
    run(make_recipe(terms=ramp(t={"from": 0.0, "to": 1.0})), tmp_path / "rising")
    rising = metrics(tmp_path / "rising")
    assert rising[0] == 0.0
    assert rising[-1] > 0


def test_a_weight_that_falls_to_nothing(make_recipe, tmp_path):
    terms = [
        {"objective": "forward_kl"},
        {"objective": "cross_entropy", "schedule": {"weight": {"from": 1, "to": 0, "until": 0.5}}},
    ]
    run(make_recipe(terms=terms), tmp_path / "run")
    total, kl, ce = (
        metrics(tmp_path / "run", n) for n in ("loss", "loss/forward_kl", "loss/cross_entropy")
    )
    weights = [(t - k) / c for t, k, c in zip(total, kl, ce, strict=True)]
    assert weights == pytest.approx([1, 0.75, 0.5, 0.25, 0, 0, 0, 0], abs=1e-5)


def test_a_resumed_run_goes_on_where_the_schedule_was(make_recipe, tmp_path):
    terms = [{"objective": "taid", "schedule": {"t": {"from": 0.2, "to": 1.0}}}]
    recipe = make_recipe({"steps": 8, "save_every": 3}, terms=terms)
    run(recipe, tmp_path / "whole")
    run(recipe, tmp_path / "parts")
    for step in (6, 8):
        folder = tmp_path / "parts" / "checkpoints" / f"step-{step}"
        for file in folder.glob("*"):
            file.unlink()
        if folder.exists():
            folder.rmdir()
    run(recipe, tmp_path / "parts", resume=True)
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")


def test_the_time_of_a_step_is_measured_with_all_models(make):
    recipe = make("mixture")
    time = step_time(recipe, check(recipe))
    assert set(time.teacher_layer) == {"a", "b"}
    assert time.seconds > 0
