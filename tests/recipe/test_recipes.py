"""The recipes that ship: short, free of machine paths, and each runs offline on tiny models."""

from pathlib import Path

import pytest

from limbeck.recipe.document import override, read
from limbeck.recipe.resolve import resolve
from limbeck.recipe.run import run

FOLDER = Path(__file__).resolve().parents[2] / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))

METHODS = {"forward_kl", "reverse_kl", "kl_and_labels", "layers_of_teacher", "lora"}


def test_the_five_are_there():
    assert {path.stem for path in RECIPES} >= METHODS


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_it_is_short_and_names_no_machine(path):
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 100
    assert lines[0].startswith("# ")
    assert sum("#" in line for line in lines) >= 6
    assert f"recipes/{path.name}" in text
    resolved = resolve(read(path))
    assert resolved.teachers["big"].name == "Qwen/Qwen3-4B"
    assert resolved.source.path == "data.jsonl"
    assert not any(mark in text for mark in ("/home", "/work", "/tmp", "~/", "C:\\"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_it_runs_two_steps_on_tiny_models(path, tiny_teacher, tiny_data, tmp_path):
    settings = [
        f"teachers.big.name={tiny_teacher}",
        f"source.path={tiny_data}",
        "source.holdout=4",
        "train.steps=2",
        "train.batch_tokens=300",
        "train.device=cpu",
    ]
    document = read(path)
    student = document.values["student"]
    settings.append(
        "student.layers=[0, 3]" if "from" in student else f"student.name={tiny_teacher}"
    )
    recipe = resolve(override(document, settings))
    report = run(recipe, tmp_path / "run")
    assert report.train.steps == 2
    assert (tmp_path / "run" / "report.md").exists()
