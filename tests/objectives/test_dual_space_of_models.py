"""Dual space with models at hand: what is made to measure, what is refused, a whole run."""

from dataclasses import replace

import pytest
import torch

from limbeck import objectives
from limbeck.core.errors import RecipeError

TEXTS = (" the cat sat", " on a mat and saw two dogs", " run")


@pytest.fixture
def scene(small_network, make_scene):
    return make_scene(small_network(8, seed=1), small_network(16), TEXTS)


@pytest.mark.parametrize("align", ["attention", "bytes"])
def test_finished_it_fits_the_models(scene, align):
    objective = objectives.DualSpace(align=align)
    module = objective.finish(scene)
    again = objective.finish(scene)
    other = objective.finish(replace(scene, seed=4))
    for name, value in module.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
        assert not torch.equal(value, other.state_dict()[name])
    assert module.unit == objective.unit
    embedding = {"hidden:model.embed_tokens"} if align == "attention" else set()
    assert module.asks == module.needs == {"projection"} | embedding
    shapes = {name: tuple(value.shape) for name, value in module.named_parameters()}
    expected = {
        "to_student.weight": (8, 16),
        "to_student.bias": (8,),
        "to_teacher.weight": (16, 8),
        "to_teacher.bias": (16,),
    }
    if align == "attention":
        expected |= {"query.weight": (32, 16), "query.bias": (32,)}
    assert shapes == expected
    views = [
        n.collate([n.encode(s) for s in scene.samples]) for n in (scene.student, scene.teacher)
    ]
    said, heard = (
        scene.student.read(views[0], module.asks),
        scene.teacher.read(views[1], module.needs),
    )
    value = module(said, heard)
    value.sum().backward()
    for name, parameter in [*module.named_parameters(), *scene.student.module.named_parameters()]:
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        # The head moves once the projector is right about a token, which at random it is not.
        assert parameter.grad.any() or name == "lm_head.weight", name
    assert all(parameter.grad is None for parameter in scene.teacher.module.parameters())


def test_a_head_that_is_not_known_is_refused(scene):
    scene.teacher.head = None
    with pytest.raises(RecipeError, match="teacher's output head"):
        objectives.DualSpace().finish(scene)


@pytest.mark.parametrize("align", ["attention", "bytes"])
def test_a_run_trains_its_projectors_and_exports_none(make_recipe, narrow_student, tmp_path, align):
    from safetensors.torch import load_file

    from limbeck.recipe.run import run

    terms = [{"objective": {"kind": "dual_space", "align": align}}, {"objective": "cross_entropy"}]
    recipe = make_recipe(student=narrow_student, terms=terms, evals=[])
    report = run(recipe, tmp_path / "run")
    assert report.train.steps == 8
    kept = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))
    first, last = (load_file(folder / "weights.safetensors") for folder in (kept[0], kept[-1]))
    names = [name for name in last if name.startswith("terms.0.")]
    assert len(names) == (6 if align == "attention" else 4)
    for name in names:
        assert not torch.equal(first[name], last[name])
    exported = load_file(tmp_path / "run" / "student" / "model.safetensors")
    assert not [name for name in exported if "terms" in name or "to_student" in name]
