"""Two processes share the writing, and train as one would."""

import pytest

from limbeck.recipe.run import run


def test_two_processes_share_the_writing_and_learn_the_same(
    rollout_recipe, tmp_path, torchrun, losses
):
    from limbeck.recipe.resolve import dump

    recipe = rollout_recipe(steps=6, save_every=6)
    run(recipe, tmp_path / "one")
    (tmp_path / "recipe.yaml").write_text(dump(recipe))
    torchrun(tmp_path / "recipe.yaml", tmp_path / "two")
    for mine, theirs in zip(losses(tmp_path / "two"), losses(tmp_path / "one"), strict=True):
        assert mine == pytest.approx(theirs, abs=1e-4)
