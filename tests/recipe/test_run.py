"""What a run does about what cannot be measured or learnt, and when it says so."""

import json
from pathlib import Path

import pytest

from limbeck.core import registry
from limbeck.core.errors import RecipeError
from limbeck.recipe.document import Document
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


TYPO = {"objective": "reverse_kl", "channel": "typo"}


def test_a_run_in_which_no_term_has_a_row_says_that_nothing_was_trained(make_recipe, tmp_path):
    said = run(make_recipe(TWO_STEPS, terms=[TYPO]), tmp_path / "out").train.warnings
    assert said[0].startswith("terms.0: no row of channel 'typo' in any step")
    assert said[1].startswith("nothing was trained")


def test_a_term_that_never_had_a_row_is_told_of(make_recipe, tmp_path, caplog):
    recipe = make_recipe(TWO_STEPS, terms=[{"objective": "forward_kl"}, TYPO])
    report = run(recipe, tmp_path / "out")
    (said,) = report.train.warnings
    assert said.startswith("terms.1: no row of channel 'typo' in any step")
    assert f"distilling: {said}" in caplog.messages
    assert f"- {said}" in (tmp_path / "out" / "report.md").read_text().splitlines()
    assert run(recipe, tmp_path / "out", resume=True).train.warnings == (said,)


@pytest.mark.parametrize("kind", ["group_policy", "candidates", "sequence_ranking"])
def test_groups_are_missed_where_rows_have_none(make_recipe, tmp_path, kind):
    report = run(make_recipe(TWO_STEPS, terms=[{"objective": kind}]), tmp_path / "out")
    assert "bring `group` and `score`" in report.train.warnings[0]
    assert run(make_recipe(TWO_STEPS), tmp_path / "other").train.warnings == ()


SERVER = {
    "kind": "server",
    "url": "http://api.invalid/v1",
    "model": "m",
    "key_variable": "NO_SUCH_KEY",
    "api": "completions",
}


def test_a_missing_key_names_its_teacher_and_line(make_recipe, tiny_teacher, tmp_path):
    recipe = make_recipe(
        TWO_STEPS,
        teachers={
            "big": {"name": str(tiny_teacher)},
            "api": {**SERVER, "tokenizer": str(tiny_teacher)},
        },
        terms=[{"objective": "sparse_kl", "teacher": "api"}],
    )
    document = Document({}, {"teachers.api": 3}, "gen.yaml")
    with pytest.raises(RecipeError) as error:
        run(recipe, tmp_path / "out", document=document)
    assert str(error.value).startswith("gen.yaml:3: teachers.api.key_variable: the environment")


def test_the_evaluation_of_the_contributors_guide_works(make_recipe, tmp_path):
    """As it is printed there."""
    guide = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text()
    code = guide.split("## Add an evaluation")[1].split("```python\n")[1].split("```")[0]
    exec(compile(code, "CONTRIBUTING.md", "exec"), {"__name__": __name__})
    try:
        report = run(make_recipe(TWO_STEPS, evals=["length"]), tmp_path / "out")
    finally:
        del registry._kinds["eval"]["length"]
    assert report.evals["words"].after is not None
