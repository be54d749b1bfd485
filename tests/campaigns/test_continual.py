"""Tasks in sequence: the measures by hand, what each stage is given, and going on after a stop."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from limbeck.campaigns import continual as campaign
from limbeck.campaigns.continual import Matrix, Stage, continual, stage_values
from limbeck.core.errors import RecipeError
from limbeck.core.files import write_json
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


@pytest.fixture
def learnt(monkeypatch):
    """Runs that take no time and know every task; the folders in which one was begun."""
    begun = []

    def run(recipe, folder, resume=False):
        begun.append(f"{folder.parent.name}/{folder.name}")
        evals = {task.name: {"before": 0.0, "after": 0.5} for task in recipe.evals}
        write_json(folder / "report.json", evals)
        return report(evals)

    def report(evals):
        return SimpleNamespace(evals={n: SimpleNamespace(**one) for n, one in evals.items()})

    def from_json(path):
        return report(json.loads(path.read_text()))

    monkeypatch.setattr(campaign, "run", run)
    monkeypatch.setattr(campaign, "Report", SimpleNamespace(from_json=from_json))
    return begun


@pytest.fixture
def arm():
    def make(**train):
        values = {
            "student": {"name": "small"},
            "source": {"path": "", "holdout": 0},
            "terms": [{"objective": "cross_entropy"}],
            "train": {"steps": 2, **train},
        }
        return Document(values, {}, None)

    return make


def test_what_is_finished_is_taken_for_the_same_campaign_alone(tasks, arm, learnt, tmp_path):
    """Else the figures of another recipe, share, evaluation or task would be given for this one."""
    out = tmp_path / "out"
    plain = {"plain": arm()}
    continual(plain, tasks, out, test={"match": "exact"})
    assert learnt == ["plain/1-red", "plain/2-old"]
    for other in (
        {"arms": {"plain": arm(learning_rate=0.9)}},
        {"replay": {"plain": 0.5}},
        {"test": {"match": "last_number"}},
        {"stages": tasks[::-1]},
        {"stages": tasks[:1]},
    ):
        given = {"arms": plain, "stages": tasks, "test": {"match": "exact"}, **other}
        with pytest.raises(RecipeError, match="holds another recipe") as refused:
            continual(given.pop("arms"), given.pop("stages"), out, **given)
        assert refused.value.field == "--out"
    for file in (tasks[0].train, tasks[1].test):
        text = Path(file).read_text()
        Path(file).write_text(text.replace("cat", "cow"))
        with pytest.raises(RecipeError, match="holds another recipe"):
            continual(plain, tasks, out, test={"match": "exact"})
        Path(file).write_text(text)
    assert len(learnt) == 2


def test_what_does_not_decide_the_figures_may_change(tasks, arm, learnt, tmp_path):
    """Another arm beside it, the layout of the runs, and the folder of the tasks' files."""
    out, moved = tmp_path / "out", tmp_path / "moved"
    continual({"plain": arm()}, tasks, out)
    moved.mkdir()
    for task in tasks:
        for path in map(Path, (task.train, task.test)):
            path.rename(moved / path.name)
    elsewhere = [
        Stage(
            name=task.name,
            train=str(moved / Path(task.train).name),
            test=str(moved / Path(task.test).name),
        )
        for task in tasks
    ]
    continual({"plain": arm(save_every=7), "new": arm()}, elsewhere, out, replay={"new": 0.3})
    assert learnt == ["plain/1-red", "plain/2-old", "new/1-red", "new/2-old"]


def test_a_folder_of_something_else_is_refused(tasks, arm, learnt, tmp_path):
    out = tmp_path / "out"
    write_json(out / "plain" / "1-red" / "report.json", {})
    with pytest.raises(RecipeError, match="does not say what it was made with"):
        continual({"plain": arm()}, tasks, out)
    with pytest.raises(RecipeError, match="is a file"):
        continual({"plain": arm()}, tasks, out / "plain" / "1-red" / "report.json")


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
