"""The losses of a step are handed to a GPU without waiting for it."""

import pytest
import torch

from limbeck.recipe.run import run
from limbeck.train import loop


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
@pytest.mark.parametrize(
    "terms",
    [
        [{"objective": "cross_entropy"}],
        [{"objective": "forward_kl"}, {"objective": "cross_entropy"}],
        [{"objective": "jensen_shannon", "skip": 1}],
    ],
    ids=["labels", "both", "some rows"],
)
def test_no_wait_in_the_losses_of_a_step(make_recipe, tmp_path, monkeypatch, terms):
    passes, real = [], loop.loss_of

    def watched(*parts):
        passes.append(1)
        # The first one compiles kernels, and makes their libraries ready.
        torch.cuda.set_sync_debug_mode("error" if len(passes) > 1 else "default")
        try:
            return real(*parts)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(loop, "loss_of", watched)
    recipe = make_recipe({"steps": 3, "save_every": 3}, terms=terms)
    run(recipe, tmp_path / "run")
    assert len(passes) >= 3
