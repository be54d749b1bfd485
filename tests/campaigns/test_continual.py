"""Tasks in sequence: the measures by hand, what each stage is given, and going on after a stop."""

import json

import pytest

from limbeck.campaigns.continual import Matrix, Stage, continual, stage_values
from limbeck.core.errors import RecipeError
from limbeck.recipe.document import Document

STAGES = [Stage(name=name, train=f"{name}.train", test=f"{name}.test") for name in "abc"]


def test_measures_by_hand():
    accuracy = [[0.1, 0.2, 0.3], [0.9, 0.25, 0.3], [0.5, 0.8, 0.45], [0.6, 0.7, 0.85]]
    matrix = Matrix(tasks="abc", accuracy=accuracy)
    assert matrix.average == pytest.approx((0.6 + 0.7 + 0.85) / 3)
    assert matrix.forgetting == pytest.approx(((0.9 - 0.6) + (0.8 - 0.7)) / 2)
    assert matrix.transfer == pytest.approx(((0.25 - 0.2) + (0.45 - 0.3)) / 2)
    alone = Matrix(tasks="a", accuracy=[[0.1], [0.2]])
    assert (alone.forgetting, alone.transfer) == (None, None)


def base(source):
    values = {"student": {"from": "teacher", "layers": [0]}, "source": source, "terms": []}
    return Document(values, {}, None)


def test_each_stage_goes_on_with_what_the_one_before_left(tmp_path):
    document = base({"path": "x", "holdout": 3})
    first = stage_values(document, STAGES, 0, None, 0.0, {"match": "exact"})
    assert first["student"] == document.values["student"]
    assert first["source"] == {"path": "a.train", "holdout": 3}
    assert [task["path"] for task in first["evals"]] == ["a.test", "b.test", "c.test"]
    assert first["evals"][0]["match"] == "exact"
    third = stage_values(document, STAGES, 2, tmp_path, 0.2, {})
    assert third["student"] == {"name": str(tmp_path)}
    assert third["source"]["kind"] == "mixture"
    assert [part["path"] for part in third["source"]["of"]] == ["c.train", "a.train", "b.train"]
    assert third["source"]["shares"] == pytest.approx([0.8, 0.1, 0.1])
    assert document.values["source"]["path"] == "x"  # the recipe itself is left alone


def test_data_are_replaced_under_what_is_made_of_them(tmp_path):
    document = base({"kind": "rollouts", "of": {"path": "x"}, "share": 0.5})
    values = stage_values(document, STAGES, 1, tmp_path, 0.0, {})
    assert values["source"] == {"kind": "rollouts", "of": {"path": "b.train"}, "share": 0.5}


def test_two_tasks_of_one_name_are_refused(tmp_path):
    with pytest.raises(RecipeError, match="one name"):
        continual({}, [STAGES[0], STAGES[0]], tmp_path)


@pytest.fixture
def tasks(tmp_path):
    """Two tasks whose answers are one word each."""
    stages = []
    for name, word in (("red", "red"), ("old", "old")):
        train, test = tmp_path / f"{name}.jsonl", tmp_path / f"{name}-test.jsonl"
        prompts = [f"the {x} is\n" for x in ("cat", "mat", "dog", "tree", "river")]
        rows = [{"prompt": f"{name}: {p}", "completion": word} for p in prompts]
        train.write_text("".join(json.dumps(row) + "\n" for row in rows))
        tests = [{"prompt": f"{name}: {p}", "answer": word} for p in prompts]
        test.write_text("".join(json.dumps(row) + "\n" for row in tests))
        stages.append(Stage(name=name, train=str(train), test=str(test)))
    return stages


def test_a_campaign_from_end_to_end(tasks, tiny_teacher, tmp_path, call):
    recipe = tmp_path / "plain.yaml"
    recipe.write_text(
        f"""
student: {{config: {{model_type: llama, hidden_size: 16, intermediate_size: 32,
  num_hidden_layers: 1, num_attention_heads: 2}}, tokenizer: {tiny_teacher}, max_length: 64}}
source: {{path: x.jsonl, holdout: 0}}
terms: [{{objective: cross_entropy}}]
train: {{steps: 40, batch_tokens: 100, learning_rate: 0.03}}
"""
    )
    kept = tmp_path / "kept.yaml"
    kept.write_text(
        recipe.read_text().replace(
            "terms: [",
            "teachers: {me: {kind: self, update: frozen}}\n"
            "terms: [{objective: forward_kl, teacher: me}, ",
        )
    )
    out = tmp_path / "out"
    command = ["continual", recipe, kept, "--out", out, "--match", "exact", "--max-tokens", "4"]
    command += [f"--task={t.name}={t.train},{t.test}" for t in tasks]
    done = call(*map(str, command), "--replay", "plain=0.4")
    assert done.code == 0, done.err
    figures = json.loads((out / "continual.json").read_text())
    assert figures["plain"]["accuracy"][0] == [0.0, 0.0]
    assert figures["plain"]["accuracy"][1][0] == 1.0  # five prompts, one word
    assert "| plain |" in done.out
    assert (out / "continual.png").stat().st_size > 1000
    before = {path: path.stat().st_mtime_ns for path in out.rglob("student/model.safetensors")}
    assert len(before) == 4
    # Started again it learns nothing again.
    (out / "kept" / "2-old" / "report.json").unlink()
    assert call(*map(str, command), "--replay", "plain=0.4").code == 0
    same = [path for path in before if path.stat().st_mtime_ns == before[path]]
    assert len(same) == 3
    assert json.loads((out / "continual.json").read_text()) == figures


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--task", "a=b"], "NAME=TRAIN,TEST"),
        (["--task", "a=b,c", "--replay", "x=0.5"], "--replay"),
        (["--task", "a=b,c", "--replay", "plain=2"], "--replay"),
    ],
)
def test_wrong_arguments_are_one_line(more, said, tmp_path, call):
    recipe = tmp_path / "plain.yaml"
    recipe.write_text("student: {name: x}")
    done = call("continual", str(recipe), "--out", str(tmp_path / "o"), *more)
    assert done.code == 2
    assert said in done.err
    assert done.err.count("\n") == 1
