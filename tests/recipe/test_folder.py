"""Whose folder a run may take: what a try left that trained nothing makes room, all else stays."""

import json

import pytest
import yaml

from limbeck.core.errors import DataError, RecipeError
from limbeck.recipe.folder import look
from limbeck.recipe.run import run

ONE_STEP = {"steps": 1}


@pytest.fixture
def no_labels(tmp_path):
    """Rows on which training fails at its first batch."""
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": "hello\n"}) + "\n" for _ in range(3)))
    return {"path": str(path)}


@pytest.mark.parametrize("resume", [False, True])
def test_a_try_that_failed_at_its_first_batch_makes_room(make_recipe, no_labels, tmp_path, resume):
    out = tmp_path / "out"
    with pytest.raises(DataError, match="no token to learn"):
        run(make_recipe(ONE_STEP, source=no_labels, evals=["perplexity"]), out)
    (out / "terms" / "old").mkdir(parents=True)
    kept = json.loads((out / "evals.json").read_text())
    report = run(make_recipe(ONE_STEP, evals=["perplexity"]), out, resume)
    assert report.train.steps == 1
    assert not (out / "terms").exists()
    assert kept["before"] == {}  # nothing was held out; what is measured now must not be this
    assert report.evals["perplexity"].before is not None
    with pytest.raises(RecipeError, match="holds a run"):
        run(make_recipe(ONE_STEP), out)


def test_a_try_that_failed_in_its_terms_makes_room(make_recipe, tmp_path):
    layers = {"kind": "features", "pairs": [["hidden:0", "hidden:99"]]}
    with pytest.raises(RecipeError) as error:
        run(make_recipe(ONE_STEP, terms=[{"objective": layers}]), tmp_path / "out")
    assert error.value.field.startswith("terms.0.objective")
    assert run(make_recipe(ONE_STEP), tmp_path / "out").train.steps == 1


def test_what_was_found_out_for_the_same_recipe_stays_for_a_resume(
    make_recipe, no_labels, tmp_path
):
    recipe, out = make_recipe(ONE_STEP, source=no_labels), tmp_path / "out"
    for resume in (False, True):
        with pytest.raises(DataError, match="no token to learn"):
            run(recipe, out, resume)
        (out / "terms").mkdir(exist_ok=True)
    with pytest.raises(DataError, match="no token to learn"):
        run(recipe, out, resume=True)
    assert (out / "terms").exists()


@pytest.mark.parametrize("resume", [False, True])
def test_a_recipe_of_the_user_is_not_written_over(make_recipe, tmp_path, resume):
    """It lies alone in its folder, or beside the data."""
    mine = tmp_path / "recipe.yaml"
    mine.write_text("# mine\nseed: 0\n")
    with pytest.raises(RecipeError, match="holds your recipe; give a folder of its own") as error:
        run(make_recipe(ONE_STEP), tmp_path, resume)
    assert error.value.field == "--out"
    (tmp_path / "rows.jsonl").touch()
    with pytest.raises(RecipeError, match="holds your recipe"):
        look(tmp_path, resume)
    assert mine.read_text() == "# mine\nseed: 0\n"


def test_what_is_not_a_runs_own_is_never_removed(make_recipe, no_labels, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(DataError):
        run(make_recipe(ONE_STEP, source=no_labels), out)
    (out / "notes.txt").touch()
    with pytest.raises(RecipeError, match="holds a run"):
        run(make_recipe(ONE_STEP), out)
    with pytest.raises(RecipeError, match="of another recipe"):
        run(make_recipe(ONE_STEP), out, resume=True)
    assert yaml.safe_load((out / "recipe.yaml").read_text())["source"]["path"] == no_labels["path"]
