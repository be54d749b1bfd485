"""The ranking objective on what a model says of ranked answers, and in a run."""

import json

import pytest
import torch

from limbeck.core.errors import RecipeError
from limbeck.core.types import Sample, Signals, Turn
from limbeck.objectives import SequenceRanking
from limbeck.recipe.run import run

WORDS = ("a mat", "two dogs run past the old river", "three")


def said(**more):
    base = {
        "labels": torch.zeros(3, dtype=torch.int64),
        "chosen": torch.tensor([-3.0, -2.0, -1.0], requires_grad=True),
        "length": torch.tensor([1.0, 1.0, 1.0]),
    }
    return Signals(**{**base, **more})


def test_it_hands_on_what_the_signals_hold():
    student = said(score=torch.tensor([2.0, 1.0, 0.0]), group=torch.zeros(3, dtype=torch.int64))
    found = SequenceRanking()(student, student)
    assert found.tolist() == [4.0] * 3
    assert SequenceRanking(mean=True)(student, student).tolist() == pytest.approx([4 / 3] * 3)
    assert SequenceRanking(margin=1.0)(student, student).tolist() == [7.0] * 3


@pytest.mark.parametrize("given", [{}, {"score": torch.ones(3)}, {"group": torch.ones(3)}])
def test_without_scores_or_groups_there_is_nothing_to_rank(given):
    student = said(**given)
    found = SequenceRanking()(student, student)
    assert found.tolist() == [0.0] * 3
    found.sum().backward()
    assert not student.chosen.grad.any()


@pytest.mark.parametrize("margin", [-0.1, float("nan"), "wide"])
def test_margin_is_checked(make_recipe, margin):
    with pytest.raises(RecipeError, match=r"terms\.0\.objective\.margin"):
        make_recipe(terms=[{"objective": {"kind": "sequence_ranking", "margin": margin}}])


@pytest.fixture
def ranked(tmp_path):
    """Forty groups of three answers, the wordiest of which is the best."""
    path = tmp_path / "ranked.jsonl"
    with path.open("w") as file:
        for group in range(40):
            for place, answer in enumerate(("the cat sat", "two dogs", "red")):
                row = {
                    "id": f"{group}#{place}",
                    "prompt": f"see {group} ",
                    "completion": answer,
                    "group": str(group),
                    "score": float(2 - place),
                    "channel": "best" if place == 0 else "rest",
                }
                file.write(json.dumps(row) + "\n")
    return path


def order(out, tmp_path):
    """Mean log-probability a token of each answer under the student of a run."""
    from limbeck.core.specs import LocalTeacher
    from limbeck.models.load import load_teacher

    model = load_teacher(LocalTeacher(name=str(out / "student")), torch.device("cpu"), 64)
    found = []
    for text in ("the cat sat", "two dogs", "red"):
        sample = Sample(id="x", turns=(Turn(text="see 99 "), Turn(text=text, learn=True)))
        view = model.collate([model.encode(sample)])
        with torch.no_grad():
            found.append(model.read(view, frozenset({"chosen"})).chosen.mean().item())
    return found


def test_a_run_learns_the_order(make_recipe, ranked, tmp_path):
    recipe = make_recipe(
        {"steps": 25, "batch_tokens": 300, "learning_rate": 0.01, "save_every": 100},
        source={"path": str(ranked), "holdout": 3},
        teachers={},
        student={"config": {"model_type": "llama", **TINY}, "tokenizer": str(tmp_path / "t")},
        terms=[
            {"objective": {"kind": "sequence_ranking", "margin": 0.5}},
            {"objective": {"kind": "cross_entropy"}, "channel": "best", "weight": 0.1},
        ],
    )
    run(recipe, tmp_path / "out")
    steps = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    losses = [step["loss/sequence_ranking"] for step in steps]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    first, second, third = order(tmp_path / "out", tmp_path)
    assert first > second > third


TINY = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


@pytest.fixture(autouse=True)
def _tokenizer_at_hand(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "t")
