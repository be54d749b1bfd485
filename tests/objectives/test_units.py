"""Flex-KD: which units are kept, that the choice is made once, and what is then compared."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from limbeck import objectives
from limbeck.core.errors import RecipeError
from limbeck.core.protocols import Objective
from limbeck.core.types import Sample, Signals, Turn
from limbeck.models.causal import CausalModel
from limbeck.objectives.selection import attribution, principal_components

TEXTS = [" the cat sat", " on a mat and saw", " two dogs", " run past three old red trees", " near"]


class Counting(CausalModel):
    """Counts what it is asked of samples."""

    looked = 0
    planted = None

    def attribution(self, view, site):
        self.looked += 1
        if self.planted is not None:
            return self.planted.expand(len(view.rows), -1)
        return super().attribution(view, site)

    def read(self, view, needs):
        self.looked += view.names != ("", "")  # not where its width is asked for
        return super().read(view, needs)


@pytest.fixture
def network(small_network):
    return partial(small_network, of=Counting)


@pytest.fixture
def scene(network, make_scene):
    return make_scene(network(8, "small", seed=1), network(16, "big", layers=3), TEXTS)


def finished(scene, **settings):
    return objectives.FlexKD(**{"examples": len(TEXTS), **settings}).finish(scene)


def units(objective):
    kept = [part.units for part in objective.of_teacher]
    return [unit.tolist() for unit in kept]


def states(n, width, seed):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def signals(**hidden):
    n = len(next(iter(hidden.values())))
    return Signals(labels=torch.zeros(n, dtype=torch.int64), hidden=hidden)


def test_it_is_an_objective_that_must_be_finished():
    objective = objectives.FlexKD()
    assert isinstance(objective, Objective)
    assert objective == objectives.FlexKD(layers="last", select="attribution", examples=64)
    with pytest.raises(RecipeError, match="must be finished"):
        objective(signals(a=states(3, 2, 0)), signals(a=states(3, 2, 0)))
    with pytest.raises(RecipeError, match="is none of"):
        objectives.FlexKD(layers="first")


def test_the_units_that_matter_most_are_kept_in_the_order_they_have(scene):
    scores = torch.tensor([3.0, 0, 9, 1, 0, 5, 0, 7, 0, 2, 8, 0, 6, 0, 4, 0])
    scene.teacher.planted = scores
    objective = finished(scene)
    assert units(objective) == [[0, 2, 5, 7, 9, 10, 12, 14]]
    assert objective.asks == {"hidden:1"}
    assert objective.needs == {"hidden:2"}
    assert objective.kind == "flex_kd"
    assert list(objective.parameters()) == []


def test_equal_scores_keep_the_first_units(scene):
    scene.teacher.planted = torch.ones(16)
    assert units(finished(scene)) == [list(range(8))]


def test_attribution_is_the_mean_over_all_learnt_rows_of_the_gradient(scene):
    """Sample by sample, through hidden states that transformers itself gives."""
    teacher, total, count = scene.teacher, torch.zeros(16, dtype=torch.float64), 0
    for sample in scene.samples:
        view = teacher.collate([teacher.encode(sample)])
        output = teacher.module.model(input_ids=view.ids, output_hidden_states=True)
        hidden = output.hidden_states[2]  # of layer 1, which layer 2 reads
        rest = teacher.module.model.layers[2]
        places = torch.arange(view.ids.shape[1])[None]
        rotary = teacher.module.model.rotary_emb(hidden, places)
        last = rest(hidden, position_embeddings=rotary)
        logits = teacher.module.lm_head(teacher.module.model.norm(last))[0, view.rows]
        chosen = logits.log_softmax(-1)[range(len(view.rows)), view.labels]
        (gradient,) = torch.autograd.grad(chosen.sum(), hidden)
        total += gradient[0, view.rows].abs().double().sum(0)
        count += len(view.rows)
    got = attribution(teacher, scene.samples, "1")
    torch.testing.assert_close(got, total / count, rtol=1e-4, atol=1e-5)
    kept = units(finished(scene, layers=((0, 1),)))[0]
    assert set(kept) == set((total / count).topk(8).indices.tolist())


def test_samples_without_a_learnt_token_do_not_count(scene):
    prompt = Sample(id="prompt", turns=(Turn(text="only a prompt"),))
    alone = attribution(scene.teacher, scene.samples, "2")
    mixed = attribution(scene.teacher, [prompt, *scene.samples], "2")
    torch.testing.assert_close(mixed, alone)
    with pytest.raises(RecipeError, match="anything to learn"):
        attribution(scene.teacher, [prompt], "2")


@pytest.mark.parametrize("broken", [0.0, float("nan"), float("inf")])
def test_an_attribution_that_ranks_nothing_is_refused(scene, broken):
    scene.teacher.planted = torch.full((16,), broken)
    with pytest.raises(RecipeError, match="ranks no units"):
        finished(scene)
    assert not (scene.folder / "selection.safetensors").exists()


def test_the_loss_is_one_less_the_mean_correlation_with_the_kept_units(scene):
    scene.teacher.planted = torch.arange(16.0)
    objective = finished(scene)
    mine, theirs = states(20, 8, 0), states(20, 16, 1)
    value = objective(signals(**{"1": mine}), signals(**{"2": theirs}))
    assert value.shape == (20,)
    kept = theirs[:, 8:].double().numpy()
    expected = [np.corrcoef(mine[:, j].double().numpy(), kept[:, j])[0, 1] for j in range(8)]
    assert value.mean().item() == pytest.approx(1 - np.mean(expected), abs=1e-5)
    copied = objective(signals(**{"1": 2 * theirs[:, 8:] + 1}), signals(**{"2": theirs}))
    assert copied.mean().abs() < 1e-5


def test_layer_pairs_are_averaged(scene):
    objective = finished(scene, layers="last-2")
    assert objective.asks == {"hidden:0", "hidden:1"}
    assert objective.needs == {"hidden:1", "hidden:2"}
    mine = {"0": states(9, 8, 0), "1": states(9, 8, 1)}
    theirs = {"1": states(9, 16, 2), "2": states(9, 16, 3)}
    value = objective(signals(**mine), signals(**theirs))
    pairs = [(("0", "1"), 0), (("1", "2"), 1)]
    alone = []
    for (a, b), index in pairs:
        kept = theirs[b][:, units(objective)[index]]
        alone.append(np.mean([np.corrcoef(mine[a].T, kept.T)[j, 8 + j] for j in range(8)]))
    assert value.mean().item() == pytest.approx(1 - np.mean(alone), abs=1e-5)


def test_of_a_wider_student_its_own_units_are_kept(scene, network):
    scene = replace(scene, student=network(16, "wide"), teacher=network(8, "narrow"))
    scene.student.planted = torch.arange(16.0)
    objective = finished(scene)
    assert scene.teacher.looked == 0
    mine, theirs = states(12, 16, 0).requires_grad_(), states(12, 8, 1)
    value = objective(signals(**{"1": mine}), signals(**{"1": theirs}))
    value.sum().backward()
    assert (mine.grad[:, :8] == 0).all()
    assert (mine.grad[:, 8:] != 0).any(0).all()
    copied = torch.cat([mine.detach()[:, :8], theirs], 1)
    assert objective(signals(**{"1": copied}), signals(**{"1": theirs})).mean().abs() < 1e-5


@pytest.mark.parametrize("select", ["attribution", "random"])
def test_of_equal_widths_all_is_kept_and_nothing_is_asked(scene, network, select):
    scene = replace(scene, student=network(16, "same"))
    assert units(finished(scene, select=select)) == [list(range(16))]
    assert scene.teacher.looked == scene.student.looked == 0


@pytest.mark.parametrize("select", ["attribution", "random", "pca"])
def test_the_choice_is_made_once(scene, select):
    first = finished(scene, select=select)
    written = (scene.folder / "selection.safetensors").read_bytes()
    looked = scene.teacher.looked
    assert (looked > 0) is (select != "random")
    second = finished(scene, select=select)
    assert scene.teacher.looked == looked
    assert (scene.folder / "selection.safetensors").read_bytes() == written
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name])


@pytest.mark.parametrize(
    "change", ["seed", "samples", "text", "name", "vocabulary", "site", "select", "width"]
)
def test_of_anything_else_it_is_made_anew(scene, network, change):
    finished(scene)
    looked = scene.teacher.looked
    settings = {}
    if change == "seed":
        scene = replace(scene, seed=4)
    elif change == "samples":
        settings["examples"] = 3
    elif change == "text":
        turns = (scene.samples[0].turns[0], Turn(text=" a mat", learn=True))
        other = replace(scene.samples[0], turns=turns)
        scene = replace(scene, samples=[other, *scene.samples[1:]])
    elif change in ("name", "vocabulary"):
        setattr(scene.teacher, change, "other")
    elif change == "site":
        settings["layers"] = ((1, 0),)
    elif change == "select":
        settings["select"] = "pca"
    else:
        scene = replace(scene, student=network(4, "small"))
    finished(scene, **settings)
    assert scene.teacher.looked > looked


@pytest.mark.parametrize("damage", [b"", b"nothing of ours", None])
def test_a_damaged_choice_is_made_anew(scene, damage):
    first, path = finished(scene), scene.folder / "selection.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-9] if damage is None else damage)
    looked = scene.teacher.looked
    assert units(finished(scene)) == units(first)
    assert scene.teacher.looked > looked
    assert path.read_bytes() == whole
    assert not list(scene.folder.glob(".*.tmp"))


def test_a_choice_with_a_part_missing_is_made_anew(scene):
    from safetensors import safe_open
    from safetensors.torch import save_file

    first, path = finished(scene), scene.folder / "selection.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file({"0.scores": load_file(path)["0.scores"]}, path, metadata)
    assert units(finished(scene)) == units(first)


def test_random_units_come_from_the_seed(scene):
    chosen = [
        units(finished(replace(scene, seed=s, folder=scene.folder / str(i)), select="random"))[0]
        for i, s in enumerate((3, 3, 4))
    ]
    assert chosen[0] == chosen[1] != chosen[2]
    assert chosen[0] == sorted(set(chosen[0]))
    assert len(chosen[0]) == 8
    state = torch.get_rng_state()
    finished(replace(scene, seed=9), select="random")
    assert torch.equal(torch.get_rng_state(), state)


def test_components_are_those_of_the_centred_states(scene):
    teacher = scene.teacher
    view = teacher.collate([teacher.encode(sample) for sample in scene.samples])
    hidden = teacher.read(view, frozenset({"hidden:2"})).hidden["2"].detach().double()
    centred = hidden - hidden.mean(0)
    _, singular, rows = torch.linalg.svd(centred, full_matrices=False)
    directions, variance = principal_components(teacher, scene.samples, "2", 8)
    torch.testing.assert_close(variance, singular.square() / len(hidden), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(directions.T @ directions, torch.eye(8, dtype=torch.float64))
    cosines = (directions * rows[:8].T).sum(0)
    torch.testing.assert_close(cosines.abs(), torch.ones(8).double(), rtol=0, atol=1e-4)
    assert (directions.max(0).values >= -directions.min(0).values).all()
    objective = finished(scene, select="pca")
    mapped = objective.of_teacher[0](hidden.float())
    torch.testing.assert_close(mapped, (hidden @ directions).float(), rtol=1e-4, atol=1e-4)
    assert list(objective.parameters()) == []


def test_too_few_rows_for_so_many_components_are_refused(scene):
    with pytest.raises(RecipeError, match="components need at least 9"):
        finished(scene, select="pca", examples=1)


def test_more_examples_than_there_are_is_refused(scene):
    with pytest.raises(RecipeError, match="6 are more than the 5 samples"):
        finished(scene, examples=6)


def test_the_scores_are_drawn(scene):
    finished(scene, layers="last-2")
    picture = scene.folder / "selection.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    scores = load_file(scene.folder / "selection.safetensors")
    assert scores["0.scores"].shape == scores["1.scores"].shape == (16,)
    picture.unlink()
    finished(scene, select="random")
    assert not picture.exists()
    finished(scene, select="pca")
    assert picture.exists()


@pytest.mark.parametrize("select", ["attribution", "random", "pca"])
def test_a_run_trains_with_it_and_goes_on(make_recipe, narrow_student, tmp_path, select):
    from limbeck.recipe.run import run

    terms = [{"objective": {"kind": "flex_kd", "select": select}}, {"objective": "cross_entropy"}]
    recipe = make_recipe(student=narrow_student, terms=terms, evals=[])
    report = run(recipe, tmp_path / "run")
    assert report.train.steps == 8
    stored = list((tmp_path / "run").rglob("selection.safetensors"))
    assert len(stored) == 1
    key = "0.directions" if select == "pca" else "0.units"
    assert load_file(stored[0])[key].shape[-1] == 8
    written = stored[0].stat().st_mtime_ns
    assert run(recipe, tmp_path / "run", resume=True).train.steps == 8
    assert stored[0].stat().st_mtime_ns == written
