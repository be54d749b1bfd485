"""Terms that look inside the network, in a whole run: layouts, resume, what is exported."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from limbeck.core.errors import RecipeError
from limbeck.recipe.document import Document
from limbeck.recipe.resolve import dump, resolve
from limbeck.recipe.run import run

# The squared distance of all four layers is 50 at first, where float32 tells 4e-6 apart: too few
# steps to 1e-5. So it stands alone, at 17, and what stands beside a KL is a cosine, below 1.
FEATURES = {"kind": "features", "layers": [[0, 1], [-1, -1]], "loss": "cosine", "projector": "mlp"}
INSIDE = [
    {"objective": {"kind": "forward_kl"}},
    {"objective": FEATURES},
    {"objective": {"kind": "attention_maps"}},
    {"objective": {"kind": "attention_relations", "heads": 2}},
]
ALONE = [{"objective": {"kind": "features", "layers": [[0, 1]]}}]


@pytest.mark.parametrize("terms", [INSIDE, ALONE], ids=["beside a KL", "alone"])
def test_layouts_change_nothing(terms, make_recipe, tmp_path, losses, assert_same, torchrun):
    run(make_recipe({"steps": 20}, terms=terms), tmp_path / "one")
    expected = losses(tmp_path / "one")
    assert expected[-1][0] < expected[0][0]
    run(
        make_recipe({"steps": 20, "accumulate": 2, "packing": "never"}, terms=terms), tmp_path / "2"
    )
    assert_same(losses(tmp_path / "2"), expected)
    for parallel in ("ddp", "fsdp"):
        path = tmp_path / "recipe.yaml"
        path.write_text(dump(make_recipe({"steps": 20, "parallel": parallel}, terms=terms)))
        torchrun(path, tmp_path / parallel)
        assert_same(losses(tmp_path / parallel), expected)


def test_whole_logits_give_the_same(make_recipe, tmp_path, losses, assert_same):
    for name in ("naive", "chunked"):
        run(make_recipe({"steps": 20, "logits": name}, terms=INSIDE), tmp_path / name)
    assert_same(losses(tmp_path / "naive"), losses(tmp_path / "chunked"))


NOBODY = {
    **{
        f"features {loss}": {"kind": "features", "loss": loss} for loss in ("cosine", "correlation")
    },
    "features similarity": {"kind": "features", "loss": "similarity"},
    "features cka": {"kind": "features", "loss": "cka"},
    **{kind: {"kind": kind} for kind in ("flex_kd", "attention_maps", "attention_relations")},
    **{kind: {"kind": kind} for kind in ("dual_space", "likelihood_matching")},
}


@pytest.mark.parametrize("case", NOBODY)
def test_a_term_without_rows_changes_nothing(case, make_recipe, tmp_path, losses):
    alone = [{"objective": "forward_kl"}]
    run(make_recipe({"steps": 2}, terms=alone), tmp_path / "alone")
    term = {"objective": NOBODY[case], "channel": "nobody"}
    run(make_recipe({"steps": 2}, terms=[*alone, term]), tmp_path / "both")
    for mine, theirs in zip(losses(tmp_path / "both"), losses(tmp_path / "alone"), strict=True):
        assert mine[:2] == pytest.approx([theirs[0], theirs[1]], abs=1e-6)
        assert mine[2] is None  # it has no loss in these steps


def test_dual_space_stands_beside_whole_logits(make_recipe, tmp_path, losses):
    terms = [{"objective": {"kind": "dual_space"}}, {"objective": "cross_entropy"}]
    for name in ("naive", "chunked"):
        run(make_recipe({"steps": 4, "logits": name}, terms=terms), tmp_path / name)
    naive, chunked = losses(tmp_path / "naive"), losses(tmp_path / "chunked")
    for mine, theirs in zip(naive, chunked, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-4)


def test_projectors_train_are_kept_and_are_not_exported(make_recipe, tmp_path):
    run(make_recipe({"steps": 6, "save_every": 3}, terms=INSIDE), tmp_path / "run")
    early, late = (
        load_file(tmp_path / "run" / "checkpoints" / f"step-{n}" / "weights.safetensors")
        for n in (3, 6)
    )
    mine = [name for name in late if name.startswith("terms.1.projectors.")]
    assert len(mine) == 8  # two projectors of two linear layers
    assert all(not torch.equal(early[name], late[name]) for name in mine)
    exported = load_file(tmp_path / "run" / "student" / "model.safetensors")
    assert not any("projector" in name for name in exported)


def test_a_resumed_run_has_the_same_projectors(make_recipe, tmp_path):
    recipe = make_recipe({"steps": 6, "save_every": 3}, terms=INSIDE)
    run(recipe, tmp_path / "whole")
    run(recipe, tmp_path / "parts")
    for folder in (tmp_path / "parts" / "checkpoints").glob("step-6"):
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    run(recipe, tmp_path / "parts", resume=True)
    weights = [
        load_file(tmp_path / name / "checkpoints" / "step-6" / "weights.safetensors")
        for name in ("whole", "parts")
    ]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_more_processes_go_on_with_what_one_found_out(
    make_recipe, tmp_path, losses, assert_same, torchrun
):
    """All must look at the models together, or none: it would hang where only some have notes."""
    found_out = {"kind": "features", "layers": "cka", "loss": "cosine"}
    terms = [{"objective": "forward_kl"}, {"objective": found_out}]
    recipe = make_recipe({"steps": 20, "parallel": "fsdp"}, terms=terms)
    path, out = tmp_path / "recipe.yaml", tmp_path / "run"
    path.write_text(dump(recipe))
    run(recipe, out)
    expected, kept = losses(out), sorted((out / "terms").rglob("*"))
    shutil.rmtree(out / "checkpoints" / "step-20")
    torchrun(path, out, "--resume")  # from step 18
    assert_same(losses(out), expected)
    assert sorted((out / "terms").rglob("*")) == kept


def test_one_forward_pass_of_each_model_serves_all_terms(make_recipe, tmp_path, monkeypatch):
    from limbeck.models.causal import CausalModel

    counts = {"student": 0, "teacher": 0}
    before = CausalModel._seen

    def counting(self, view, seen):
        counts["student" if self.trains else "teacher"] += (
            torch.is_grad_enabled() or not self.trains
        )
        return before(self, view, seen)

    monkeypatch.setattr(CausalModel, "_seen", counting)
    run(make_recipe({"steps": 2, "save_every": 5}, terms=INSIDE), tmp_path / "run")
    probes = counts["teacher"] - 2
    assert counts["student"] == 2
    assert probes <= 2 * 4  # widths are looked up before training


@pytest.mark.parametrize(
    ("objective", "line", "said"),
    [
        ({"kind": "features", "layers": [[0, 9]]}, 5, "no layer 9"),
        ({"kind": "features", "layers": [["model.layers.0.mpl", 0]]}, 5, "model.layers.0.mlp"),
        ({"kind": "attention_maps", "layers": [[0, 4]]}, 5, "0 to 3"),
    ],
)
def test_a_site_that_is_not_there_is_told_before_anything_is_measured(
    objective, line, said, make_recipe, tmp_path
):
    recipe = make_recipe(terms=[{"objective": objective}])
    document = Document({}, {"terms.0.objective": line}, "recipe.yaml")
    with pytest.raises(RecipeError, match=said) as caught:
        run(recipe, tmp_path / "run", document=document)
    assert str(caught.value).startswith(f"recipe.yaml:{line}: terms.0.objective")
    assert not (tmp_path / "run" / "evals.json").exists()


def test_the_recipe_stays_what_it_was(make_recipe, tmp_path):
    recipe = make_recipe({"steps": 1}, terms=INSIDE)
    run(recipe, tmp_path / "run")
    written = (tmp_path / "run" / "recipe.yaml").read_text()
    assert "projector: mlp" in written
    from limbeck.recipe.document import read

    assert resolve(read(tmp_path / "run" / "recipe.yaml")) == recipe
    assert json.loads((tmp_path / "run" / "report.json").read_text())["train"]["steps"] == 1
