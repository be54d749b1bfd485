"""What a run does about measurements that cannot be made, and when it says so."""

import json

import pytest

from limbeck.core.errors import RecipeError
from limbeck.recipe.run import run

TWO_STEPS = {"steps": 2, "save_every": 2}


@pytest.fixture
def prompts(tmp_path):
    """Rows of which there are prompts alone."""
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"the cat {n}\n"}) + "\n" for n in range(40)))
    return path


def rollouts(path):
    of = {"path": str(path), "holdout": 4}
    return {"kind": "rollouts", "of": of, "max_tokens": 4, "batch": 6}


def lines_of(out):
    return (out / "metrics.jsonl").read_text().splitlines()


REVERSE = [{"objective": "reverse_kl"}]


def test_agreement_on_the_way_is_left_out_where_nothing_held_out_is_learnt(
    make_recipe, prompts, tmp_path
):
    report = run(make_recipe(TWO_STEPS, source=rollouts(prompts), terms=REVERSE), tmp_path / "out")
    assert report.train.steps == 2
    rows = [json.loads(line) for line in lines_of(tmp_path / "out")]
    assert not any(key.startswith("eval/") for row in rows for key in row)


def test_a_share_cannot_follow_held_out_prompts_alone(make_recipe, prompts, tmp_path):
    source = {**rollouts(prompts), "adaptive": {}}
    with pytest.raises(RecipeError) as error:
        run(make_recipe(TWO_STEPS, source=source, terms=REVERSE), tmp_path / "out")
    assert error.value.field == "source.adaptive"


def test_agreement_on_the_way_takes_the_samples_that_have_something(
    make_recipe, tiny_data, tmp_path
):
    held = tmp_path / "held.jsonl"
    whole, part = {"prompt": "the cat\n", "completion": "sat on a mat"}, {"prompt": "the dogs\n"}
    held.write_text("".join(json.dumps(row) + "\n" for row in (part, whole, part)))
    source = {"path": str(tiny_data), "holdout": str(held)}
    run(make_recipe(TWO_STEPS, source=source), tmp_path / "out")
    assert json.loads(lines_of(tmp_path / "out")[-1])["eval/kl_nats"] > 0


def test_a_control_arm_without_labels_is_refused_before_anything_is_trained(
    make_recipe, prompts, tmp_path
):
    made = make_recipe(TWO_STEPS, source=rollouts(prompts), terms=REVERSE, compare="labels")
    with pytest.raises(RecipeError, match="no labels to train a control arm on") as error:
        run(made, tmp_path / "out")
    assert error.value.field == "compare"
    assert not (tmp_path / "out" / "recipe.yaml").exists()


def test_a_control_arm_with_labels_sees_the_rows_from_the_first(make_recipe, tiny_data, tmp_path):
    """Looking for them takes none away."""
    kinds = {"of": {"path": str(tiny_data), "holdout": 4}, "share": 0.0, "batch": 6}
    labels = [{"objective": "cross_entropy"}]
    train = {**TWO_STEPS, "packing": "never"}
    mixed = make_recipe(train, source={"kind": "rollouts", **kinds}, terms=labels, compare="labels")
    run(mixed, tmp_path / "mixed")
    run(make_recipe(train, terms=labels), tmp_path / "plain")
    control, plain = (
        [json.loads(line)["loss"] for line in lines_of(tmp_path / of)]
        for of in ("mixed/control", "plain")
    )
    assert control == plain


GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 128}


@pytest.mark.parametrize(("words", "measured"), [(20, True), (80, False)])
def test_speed_is_measured_where_there_is_room_for_an_answer(
    make_recipe, tiny_data, tmp_path, words, measured
):
    held = tmp_path / "held.jsonl"
    rows = [{"prompt": "river " * words, "completion": "sat"}, {"prompt": "", "completion": "on"}]
    held.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = run(
        make_recipe(
            TWO_STEPS,
            source={"path": str(tiny_data), "holdout": str(held)},
            student={"config": GPT2, "max_length": 128},
            evals=["perplexity"],
        ),
        tmp_path / "out",
    )
    assert (report.speed.student_tokens_per_second is not None) == measured
    assert (report.speed.teacher_tokens_per_second is not None) == measured
