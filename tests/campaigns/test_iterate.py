"""Rounds of making data and training on it: what begins where, what resumes, what is refused."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from small import generate

from limbeck.campaigns import iterate as module
from limbeck.campaigns.iterate import iterate, round_document
from limbeck.campaigns.rounds import read_round
from limbeck.core.errors import DataError, Interrupted, LimbeckError, RecipeError
from limbeck.core.files import write_json, write_text
from limbeck.recipe.document import Document, override, read
from limbeck.recipe.resolve import resolve

SMALL = Path(__file__).with_name("small.py")


def values(tokenizer_folder, data, **parts):
    return {
        "student": {
            "config": {
                "model_type": "llama",
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "initializer_range": 0.3,
            },
            "tokenizer": str(tokenizer_folder),
            "max_length": 64,
        },
        "source": {
            "kind": "generated",
            "path": "unused",
            "of": {"path": str(data), "holdout": 0},
            "steps": [
                {
                    "kind": "answers",
                    "teacher": "student",
                    "n": 2,
                    "max_tokens": 6,
                    "keep_truncated": True,
                }
            ],
            "holdout": 4,
        },
        "terms": [{"objective": {"kind": "cross_entropy"}}],
        "train": {"steps": 3, "batch_tokens": 200, "learning_rate": 0.01, "save_every": 1},
        "evals": ["perplexity"],
        **parts,
    }


@pytest.fixture
def document(tokenizer, tiny_data, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values(tmp_path / "tokenizer", tiny_data)))
    return read(path)


def weights(folder):
    data = (folder / "student" / "model.safetensors").read_bytes()
    return hashlib.sha256(data).hexdigest()


def seeing(said):
    """A generate that notes the student it is given."""

    def make(document):
        said.append(document.values["student"])
        generate(document)

    return make


def test_each_round_begins_with_the_student_of_the_last(document, tmp_path):
    said = []
    out = tmp_path / "out"
    campaign = iterate(document, 3, out, generate=seeing(said))
    assert "config" in said[0]
    assert [one["name"] for one in said[1:]] == [
        str(out / "round-1" / "student"),
        str(out / "round-2" / "student"),
    ]
    assert said[1]["max_length"] == 64  # what is not about the weights stays
    trained = [resolve(read(out / f"round-{k}" / "recipe.yaml")).student for k in (1, 2, 3)]
    assert trained[0].config is not None
    assert [spec.name for spec in trained[1:]] == [one["name"] for one in said[1:]]
    assert len({weights(out / f"round-{k}") for k in (1, 2, 3)}) == 3
    rows = [(out / f"round-{k}" / "data" / "rows.jsonl").read_text() for k in (1, 2, 3)]
    assert len(set(rows)) == 3  # each student writes what it would write
    assert [one.number for one in campaign.rounds] == [1, 2, 3]
    after = [one.score("perplexity", "after") for one in campaign.rounds]
    assert None not in after


def test_restart_trains_the_recipes_own_student(document, tmp_path):
    said = []
    out = tmp_path / "out"
    iterate(document, 2, out, restart=True, generate=seeing(said))
    assert said[1]["name"] == str(out / "round-1" / "student")  # it still makes the data
    trained = resolve(read(out / "round-2" / "recipe.yaml")).student
    assert trained.config is not None
    assert trained.name is None


def test_the_first_round_is_a_generate_and_a_run(document, tmp_path):
    """The same weights as by hand."""
    from limbeck.recipe.run import run

    iterate(document, 1, tmp_path / "out", generate=generate)
    generate(override(document, [f"source.path={tmp_path / 'data'}"]))
    by_hand = {
        **document.values,
        "source": {"path": str(tmp_path / "data/rows.jsonl"), "holdout": 4},
    }
    run(resolve(Document(by_hand, {})), tmp_path / "hand")
    assert weights(tmp_path / "hand") == weights(tmp_path / "out" / "round-1")


def test_finished_rounds_are_not_run_again_and_more_may_be_asked_for(document, tmp_path):
    out = tmp_path / "out"
    iterate(document, 1, out, generate=generate)
    before = (out / "round-1" / "report.json").stat().st_mtime_ns
    said = []
    iterate(document, 2, out, generate=seeing(said))
    assert len(said) == 1
    assert (out / "round-1" / "report.json").stat().st_mtime_ns == before

    def never(document):
        raise AssertionError("all rounds are finished")

    iterate(document, 2, out, generate=never)
    iterate(document, 2, tmp_path / "whole", generate=generate)
    assert weights(out / "round-2") == weights(tmp_path / "whole" / "round-2")


def test_the_table_of_the_rounds(document, tmp_path):
    out = tmp_path / "out"
    campaign = iterate(document, 2, out, generate=generate)
    told = json.loads((out / "rounds.json").read_text())
    assert [one["round"] for one in told["rounds"]] == [1, 2]
    assert told["restart"] is False
    for one in told["rounds"]:
        data = out / f"round-{one['round']}" / "data"
        assert one["rows"] == len((data / "rows.jsonl").read_text().splitlines())
        failed = len((data / "failed.jsonl").read_text().splitlines())
        assert sum(one["failed"].values()) == failed
        report = json.loads((data.parent / "report.json").read_text())
        assert one["evals"]["perplexity"]["after"] == report["evals"]["perplexity"]["after"]
        assert one["usd"] == 0.25
        assert one["train"]["steps"] == 3
    page = (out / "rounds.md").read_text()
    assert page == campaign.to_markdown()
    assert "| start |" in page
    assert "| 2 |" in page
    assert "0.25" in page


def test_what_steps_counted_stands_in_the_table(tmp_path):
    folder = tmp_path / "round-1"
    for name, count in (("data", 2), ("data-2", 3)):
        card = {"rows": count, "failed": {"why": 1}, "counts": {"unparsable verdicts": count}}
        write_json(folder / name / "card.json", card | {"usd": 1.0})
        write_json(folder / name / "of" / "card.json", card | {"usd": 0.5})
    write_json(folder / "report.json", {})
    found = read_round(1, folder)
    assert (found.made.rows, found.made.failed, found.made.usd) == (5, {"why": 4}, 3.0)
    from limbeck.campaigns.rounds import Campaign

    page = Campaign(restart=True, rounds=[found]).to_markdown()
    write_json(folder / "data" / "card.json", {"rows": 2, "usd": None})
    assert read_round(1, folder).made.usd is None  # one that is not known makes the sum unknown
    assert "| unparsable verdicts | 10 |" in page
    assert "the recipe's own student" in page


def test_what_steps_measured_is_not_added_up(tmp_path):
    """A share of two sources is two shares, each named after its source; of one it has its name.
    Cards of before had shares among the counts."""
    from limbeck.campaigns.rounds import Campaign

    folder, share = tmp_path / "round-1", "right answers of big (answers)"
    write_json(folder / "report.json", {})
    new = {"rows": 10, "usd": 0.0, "counts": {"right": 9}, "figures": {share: 0.9}}
    old = {"rows": 10, "usd": 0.0, "counts": {"right": 8, share: 0.8}}
    write_json(folder / "data" / "card.json", new)
    alone = read_round(1, folder)
    assert (alone.made.counts, alone.made.figures) == ({"right": 9}, {share: 0.9})
    write_json(folder / "data-2" / "card.json", old)
    both = read_round(1, folder)
    assert both.made.counts == {"right": 17}
    assert both.made.figures == {f"data: {share}": 0.9, f"data-2: {share}": 0.8}
    assert both.to_json()["figures"] == both.made.figures
    page = Campaign(restart=True, rounds=[both]).to_markdown()
    assert "| right | 17 |" in page
    assert f"| data-2: {share} | 0.8 |" in page


# --- what goes wrong --------------------------------------------------------------------------


def test_a_source_that_is_not_made_is_refused(document, tiny_data, tmp_path):
    plain = override(document, [f"source={{path: {tiny_data}}}"])
    with pytest.raises(RecipeError, match="kind: generated") as error:
        iterate(plain, 2, tmp_path / "out", generate=generate)
    assert error.value.field == "source"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", ["seed=1", "train.steps=4", "source.steps.0.n=3"])
def test_a_folder_with_rounds_of_another_recipe_is_refused(document, tmp_path, change):
    out = tmp_path / "out"
    iterate(document, 1, out, generate=generate)
    with pytest.raises(RecipeError, match="rounds of another recipe"):
        iterate(override(document, [change]), 1, out, generate=generate)
    with pytest.raises(RecipeError, match="another --restart"):
        iterate(document, 1, out, restart=True, generate=generate)
    iterate(override(document, ["evals=[]", "train.keep=1"]), 1, out, generate=generate)


def test_the_command_says_what_is_wrong_in_one_line(document, call, tiny_data, tmp_path):
    plain = f"source={{path: {tiny_data}}}"
    said = call("iterate", document.file, plain, "--out", tmp_path / "out")
    assert said.code == 2
    assert said.err.count("\n") == 1
    assert "kind: generated" in said.err
    assert call("iterate", document.file, "--out", tmp_path, "--rounds", "0").code == 2


def test_a_folder_with_something_else_is_refused(document, tmp_path):
    (tmp_path / "x").write_text("")
    with pytest.raises(RecipeError, match="not empty and holds no rounds"):
        iterate(document, 1, tmp_path, generate=generate)
    with pytest.raises(RecipeError, match="is a file"):
        iterate(document, 1, tmp_path / "x", generate=generate)


def test_one_process_at_a_time(document, tmp_path):
    out = tmp_path / "out"

    def again(inner):
        del inner
        with pytest.raises(RecipeError, match="in use by another process"):
            iterate(document, 1, out, generate=generate)
        raise DataError("seen")

    with pytest.raises(DataError, match="seen"):
        iterate(document, 1, out, generate=again)


def test_several_processes_are_refused(document, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RecipeError, match="one process"):
        iterate(document, 1, tmp_path / "out", generate=generate)


def test_a_round_without_rows_says_where_to_look(document, tmp_path):
    def nothing(document):
        folder = Path(document.values["source"]["path"])
        write_text(folder / "rows.jsonl", "")
        write_text(folder / "failed.jsonl", "{}\n")

    out = tmp_path / "out"
    with pytest.raises(DataError, match=r"no row was left.*failed\.jsonl"):
        iterate(document, 1, out, generate=nothing)
    iterate(document, 1, out, generate=generate)  # nothing of it stays


def test_data_that_could_not_be_made_are_made_again(document, tmp_path):
    out = tmp_path / "out"

    def half(document):
        folder = Path(document.values["source"]["path"])
        write_text(folder / "rows.jsonl", '{"prompt": "a", "completion": "b"}\n')
        raise LimbeckError("the budget is used up")

    with pytest.raises(LimbeckError, match="budget"):
        iterate(document, 1, out, generate=half)
    iterate(document, 1, out, generate=generate)
    iterate(document, 1, tmp_path / "whole", generate=generate)
    assert weights(out / "round-1") == weights(tmp_path / "whole" / "round-1")


def test_an_interruption_says_how_to_go_on(document, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="round 1; the same command goes on"):
        iterate(document, 2, out, generate=stop)
    with monkeypatch.context() as patch:
        patch.setattr(module, "run", stop)
        with pytest.raises(Interrupted, match="round 1; the same command goes on"):
            iterate(document, 2, out, generate=generate)
    made = (out / "round-1" / "data" / "rows.jsonl").stat().st_mtime_ns
    said = []
    iterate(document, 2, out, generate=seeing(said))
    assert len(said) == 1  # the data of round 1 were finished
    assert (out / "round-1" / "data" / "rows.jsonl").stat().st_mtime_ns == made


@pytest.mark.slow
def test_killed_anywhere_the_students_are_the_same(document, tmp_path):
    command = [sys.executable, str(SMALL), str(document.file), str(tmp_path / "out"), "4", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    whole, *killed = done.stdout.split()
    assert killed == [whole] * 3


# --- the documents of a round -----------------------------------------------------------------


def test_sources_inside_of_sources(tmp_path):
    made = {"kind": "generated", "path": "x", "of": {"path": "y"}, "steps": []}
    source = {"kind": "stages", "of": [made, {"path": "z"}, {**made, "holdout": 7}]}
    first = {**made, "path": "w"}
    source["of"][2]["of"] = first
    document = Document({"student": {"name": "s"}, "source": source, "terms": []}, {})
    before = round_document(document, tmp_path, student=None, made=False).values
    assert before["student"] == {"name": "s"}
    assert [one["path"] for one in before["source"]["of"]] == [
        str(tmp_path / "data"),
        "z",
        str(tmp_path / "data-2"),
    ]
    assert before["source"]["of"][2]["of"] == {**first, "path": str(tmp_path / "data-2" / "of")}
    after = round_document(document, tmp_path, student=Path("w"), made=True).values
    assert after["student"] == {"name": "w"}
    assert after["source"]["of"] == [
        {"kind": "dataset", "path": str(tmp_path / "data" / "rows.jsonl")},
        {"path": "z"},
        {"kind": "dataset", "path": str(tmp_path / "data-2" / "rows.jsonl"), "holdout": 7},
    ]
    assert document.values["source"] == source
