"""The recipes of synthetic data, from seeds to a student, with a server that misbehaves."""

import json
import random
import re
from pathlib import Path

import pytest
from fakes import FakeWriter
from making import HOSTILE

from limbeck.teachers.mock import Faults, MockTeacher

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
WORDS = "the cat sat on a mat and saw two dogs run past three old red trees near river".split()


def teacher(question, index):
    """Plays every part that these recipes ask for; sometimes badly."""
    text = question.prompt[-1].text
    draw = random.Random(f"{text}/{index}")
    if draw.random() < 0.15:
        bad = draw.choice([said for said in HOSTILE if isinstance(said, str) and len(said) < 2000])
        return bad or " "  # a server that says nothing at all is asked again
    words = " ".join(draw.sample(WORDS, 9))
    if (number := re.search(r"Come up with (\d+) new tasks", text)) is not None:
        return "\n".join(
            f"{k}. {' '.join(draw.sample(WORDS, 9))}." for k in range(1, int(number[1]) + 1)
        )
    if "EQUAL if they do" in text:
        return draw.choice(["EQUAL", "DIFFERENT", "DIFFERENT"])
    return f"{words}."


@pytest.fixture
def seeds(tmp_path):
    path = tmp_path / "seeds.jsonl"
    prompts = [f"{WORDS[k]} {WORDS[-k]} {WORDS[k + 3]} cat\n" for k in range(12)]
    # Draws follow a row's name; without one it is the file's path, which is another in each run.
    rows = [{"id": f"seed-{k}", "prompt": prompt} for k, prompt in enumerate(prompts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("self_instruct", ["source.steps.0.make=30"]),
        ("evolve", ["source.steps.0.rounds=3"]),
    ],
)
def test_a_recipe_from_seeds_to_a_student(name, changes, seeds, tiny_teacher, tmp_path, call):
    data, recipe = tmp_path / "data", RECIPES / f"{name}.yaml"
    with MockTeacher(FakeWriter(teacher), faults=Faults(rate=0.2, seed=1)) as mock:
        settings = [
            f"teachers.api.url={mock.url}",
            f"teachers.api.ledger={tmp_path / 'ledger.sqlite'}",
            "teachers.api.attempts=20",
            f"source.path={data}",
            f"source.of.path={seeds}",
            "source.holdout=4",
            f"student.name={tiny_teacher}",
            "student.dtype=float32",
            "student.max_length=128",
            *changes,
        ]
        done = call("generate", recipe, *settings, "--dry-run")
        assert done.code == 0, done.err
        assert "questions, 1 answers each" in done.out
        assert not mock.requests
        done = call("generate", recipe, *settings)
        assert done.code == 0, done.err
        first = (data / "rows.jsonl").read_bytes()
        sent = len(mock.requests)
        assert call("generate", recipe, *settings).code == 0
        assert (data / "rows.jsonl").read_bytes() == first
        assert len(mock.requests) == sent
        tiny = ["train.steps=2", "train.batch_tokens=300", "evals=[]"]
        done = call("run", recipe, *settings, *tiny, "--out", tmp_path / "run")
        assert done.code == 0, done.err
    rows, failed = lines(data / "rows.jsonl"), lines(data / "failed.jsonl")
    assert len(rows) >= 10
    assert len(failed) >= 3
    assert all(row["completion"].strip() and row["source"] for row in rows)
    assert len({row["prompt"] for row in rows}) == len(rows)
    names = [row["id"] for row in (*rows, *failed)]
    assert len(set(names)) == len(names)
    card = json.loads((data / "card.json").read_text())
    assert sum(card["failed"].values()) == len(failed)
    counted = "new instructions" if name == "self_instruct" else "instructions that evolved"
    assert card["counts"][counted] >= 4
