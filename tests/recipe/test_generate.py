"""limbeck generate: rows once, the same again, and nothing half taken for whole."""

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing

import pytest
import torch
import yaml

from limbeck.core.files import held
from limbeck.core.specs import LocalTeacher, TokenPrice
from limbeck.core.types import Turn
from limbeck.models.load import load_teacher
from limbeck.recipe.card import Tally
from limbeck.recipe.output import write_rows
from limbeck.synth.rows import Row
from limbeck.teachers.local import LocalWriter
from limbeck.teachers.mock import Faults, MockTeacher


@pytest.fixture
def recipe(tmp_path, tiny_teacher):
    """Writes a recipe whose rows a server or a local model makes."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        "".join(json.dumps({"prompt": f"the cat {k} ", "answer": str(k)}) + "\n" for k in range(20))
    )

    def write(teacher=None, steps=None, **more):
        values = {
            "student": {"name": str(tiny_teacher), "max_length": 64},
            "teachers": {"t": teacher or {"name": str(tiny_teacher), "max_length": 64}},
            "source": {
                "kind": "generated",
                "path": str(tmp_path / "data"),
                "of": {"path": str(prompts), "holdout": 0},
                "steps": steps
                or [
                    {
                        "kind": "answers",
                        "teacher": "t",
                        "n": 2,
                        "max_tokens": 5,
                        "keep_truncated": True,
                    },
                    "distribution",
                ],
                "holdout": 4,
            },
            "terms": [{"objective": "cross_entropy"}],
            "train": {"steps": 2, "batch_tokens": 200},
            **more,
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    return write


def lines(folder, name="rows.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_rows_are_made_once_and_trained_on(recipe, tmp_path, call):
    path, data = recipe(), tmp_path / "data"
    done = call("run", path, "--out", tmp_path / "run")
    assert done.code == 2
    assert "limbeck generate RECIPE" in done.err
    done = call("generate", path)
    assert done.code == 0, done.err
    rows = lines(data)
    assert sum(row.get("weight", 1.0) for row in rows) == pytest.approx(20)
    assert all(row["source"] and row["answer"] for row in rows)
    card = json.loads((data / "card.json").read_text())
    assert card["rows"] == len(rows)
    assert set(card["columns"]) >= {"id", "prompt", "completion", "source"}
    import pyarrow.parquet

    assert pyarrow.parquet.read_table(data / "rows.parquet").num_rows == len(rows)
    before = (data / "rows.jsonl").read_bytes()
    assert call("generate", path).code == 0
    assert (data / "rows.jsonl").read_bytes() == before
    done = call("run", path, "--out", tmp_path / "run")
    assert done.code == 0, done.err


def test_rows_of_another_recipe_are_refused(recipe, tmp_path, call):
    path = recipe()
    assert call("generate", path).code == 0
    for change in (
        "seed=4",
        "source.steps.0.temperature=0.5",
        "source.of.columns={answer: prompt}",
    ):
        done = call("run", path, "--out", tmp_path / "run", change)
        assert done.code == 2, change
        assert "another recipe" in done.err
        assert done.err.count("\n") == 1
        assert call("generate", path, change).code == 2
    assert call("run", path, "--out", tmp_path / "run", "train.steps=1").code == 0


def test_every_prompt_is_asked(recipe, tmp_path, call):
    assert call("generate", recipe(), "source.of.holdout=64").code == 0
    data = tmp_path / "data"
    made = [row for name in ("rows.jsonl", "failed.jsonl") for row in lines(data, name)]
    assert {str(row["answer"]) for row in made} == {str(k) for k in range(20)}


def stages(tmp_path, word):
    """Two files of fifty rows each as stages, which hold some out by themselves."""
    for name in "ab":
        rows = ({"id": f"{name}{k}", "prompt": f"{word} {name} {k} "} for k in range(50))
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"kind": "stages", "of": [{"path": str(tmp_path / f"{name}.jsonl")} for name in "ab"]}


def test_every_row_of_every_stage_is_taken_and_their_content_counts(recipe, tmp_path, call):
    """What a stage would hold out of a training is no reason to leave a row out here."""
    of = stages(tmp_path, "cat")
    path = recipe()
    values = yaml.safe_load(path.read_text())
    values["source"] |= {"of": of, "steps": [{"kind": "answers", "teacher": "t", "max_tokens": 2}]}
    path.write_text(yaml.safe_dump(values))
    assert call("generate", path).code == 0
    made = [
        row for name in ("rows.jsonl", "failed.jsonl") for row in lines(tmp_path / "data", name)
    ]
    assert len({row["id"].split("/")[0] for row in made}) == 100
    assert call("generate", path, "source.of.of.0.holdout=0").code == 0  # nor does that matter
    (tmp_path / "elsewhere").mkdir()
    moved = (tmp_path / "b.jsonl").rename(tmp_path / "elsewhere" / "b.jsonl")
    assert call("generate", path, f"source.of.of.1.path={moved}").code == 0
    stages(tmp_path, "dog")
    done = call("generate", path)
    assert done.code == 2
    assert "another recipe" in done.err


def test_it_is_the_content_of_the_data_that_counts_and_not_its_place(recipe, tmp_path, call):
    path, prompts = recipe(), tmp_path / "prompts.jsonl"
    assert call("generate", path).code == 0
    (tmp_path / "elsewhere").mkdir()
    moved = prompts.rename(tmp_path / "elsewhere" / prompts.name)
    run = ("run", path, "--out", tmp_path / "run", "train.steps=1")
    assert call(*run, f"source.of.path={moved}").code == 0
    assert call(*run[:3], tmp_path / "again", "train.steps=1").code == 0  # nobody needs it any more
    prompts.write_text(moved.read_text().replace("cat", "dog"))
    done = call(*run[:3], tmp_path / "third", "train.steps=1")
    assert done.code == 2
    assert "another recipe made (its steps, teachers, data or seed differ)" in done.err


def test_only_one_at_a_time_makes_them(recipe, tmp_path, call):
    path, data = recipe(), tmp_path / "data"
    data.mkdir()
    with held(data):
        done = call("generate", path)
    assert done.code == 2
    assert "another process; wait for its end, or stop it" in done.err
    assert done.err.count("\n") == 1
    assert not list(data.glob("*rows*"))
    assert call("generate", path).code == 0


def test_the_most_that_it_costs_counts_a_prompt_for_each_request(recipe, tmp_path, call):
    """As many as there are answers, unless the server is known to give several to one."""
    with MockTeacher() as mock:
        server = {
            "kind": "server",
            "url": mock.url,
            "model": "m",
            "ledger": str(tmp_path / "ledger.sqlite"),
            "price": {"input": 1.0, "output": 1.0},
        }

        def prompt_tokens(path):
            said = call("generate", path, "--dry-run").out
            return int(re.search(r"at most ([\d,]+) prompt tokens", said)[1].replace(",", ""))

        path = recipe(server)
        before = prompt_tokens(path)
        assert call("generate", path).code == 0
        assert before == 2 * prompt_tokens(path)
        tools = {"tools": ["a tool"]}
        assert prompt_tokens(recipe({**server, "extra": tools})) > before / 2 + 20 * 20


def test_a_server_makes_them_and_its_price_is_told(recipe, tmp_path, call):
    with MockTeacher(faults=Faults(rate=0.2, seed=3)) as mock:
        server = {
            "kind": "server",
            "url": mock.url,
            "model": "m",
            "ledger": str(tmp_path / "ledger.sqlite"),
            "price": {"input": 1.0, "output": 2.0},
            "attempts": 20,
        }
        path = recipe(server)
        done = call("generate", path, "--dry-run")
        assert done.code == 0, done.err
        assert "20 questions, 2 answers each" in done.out
        assert "the cat 0" in done.out
        assert "at most $0.0" in done.out
        assert not mock.requests
        assert not (tmp_path / "data").exists()
        done = call("generate", path)
        assert done.code == 0, done.err
        card = json.loads((tmp_path / "data" / "card.json").read_text())
        assert card["usd"] > 0
        assert card["teachers"]["t"]["versions"] == {"mock-1": 40}
        assert card["teachers"]["t"]["terms"] == "unknown"
        assert "terms of use" in (tmp_path / "data" / "README.md").read_text()
        sent = len(mock.requests)
        assert call("generate", path).code == 0
        assert len(mock.requests) == sent
        # A run has no use for a teacher that only writes.
        assert call("run", path, "--out", tmp_path / "run").code == 0
        assert len(mock.requests) == sent


def test_what_a_server_is_paid_for_reading_is_on_the_card(recipe, tmp_path, tiny_teacher, call):
    """Each text once; and the same when it is made again from what is recorded."""
    here = load_teacher(LocalTeacher(name=str(tiny_teacher)), torch.device("cpu"), 64)
    price = TokenPrice(input=1.0, output=2.0)
    with MockTeacher(LocalWriter(here, "mock-1")) as mock:
        server = {
            "kind": "server",
            "url": mock.url,
            "model": "mock-1",
            "api": "completions",
            "tokenizer": str(tiny_teacher),
            "ledger": str(tmp_path / "ledger.sqlite"),
            "price": {"input": 1.0, "output": 2.0},
        }
        weights = {"kind": "weights", "teacher": "t"}
        values = yaml.safe_load(recipe(server, [weights, dict(weights)]).read_text())
        rows = [{"prompt": f"the cat {k} ", "completion": "sat"} for k in range(5)]
        data = tmp_path / "read.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        values["source"]["of"]["path"] = str(data)
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(values))
        for _ in range(2):
            assert call("generate", path).code == 0
            card = json.loads((tmp_path / "data" / "card.json").read_text())
            assert card["usd"] == pytest.approx(mock.billed_usd(price))
            assert card["usd"] > 0


def test_what_no_tokenizer_can_read_is_not_trained_on(tmp_path):
    """An emoji that was cut in the middle, of which JSON can hold the half."""
    prompt = (Turn(text="smile"),)
    said = {"a": "\U0001f600", "b": "\ud83d"}
    rows = [Row(id=name, prompt=prompt, completion=text) for name, text in said.items()]
    write_rows(tmp_path, rows, Tally())
    assert [row["id"] for row in lines(tmp_path)] == ["a"]
    (failed,) = lines(tmp_path, "failed.jsonl")
    assert failed["failure"] == "it holds half a character, which no tokenizer can read"


def test_every_prompt_has_a_final_row(recipe, tmp_path, call):
    steps = [{"kind": "answers", "teacher": "t", "n": 3, "max_tokens": 5}]
    done = call("generate", recipe(steps=steps))
    assert done.code == 0
    data = tmp_path / "data"
    names = [row["id"] for row in (*lines(data), *lines(data, "failed.jsonl"))]
    assert len(names) == len(set(names)) == 60
    assert all(row["failure"] for row in lines(data, "failed.jsonl"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("source.steps.0.teacher=nobody", "no 'nobody'"),
        ("source.steps.0.kind=anwsers", "did you mean 'answers'"),
        ("source.steps.0.n=0", "greater than 0"),
        ("source.kind=dataset", "unknown field"),
    ],
)
def test_a_wrong_recipe_is_one_line(recipe, change, said, call):
    done = call("generate", recipe(), change)
    assert done.code == 2
    assert said in done.err
    assert done.err.count("\n") == 1


def test_a_missing_key_says_whose_it_is(recipe, call):
    server = {"kind": "server", "url": "http://api.invalid/v1", "model": "m"}
    done = call("generate", recipe({**server, "key_variable": "NO_SUCH_KEY"}))
    assert done.code == 2
    assert "teachers.t.key_variable: the environment variable NO_SUCH_KEY" in done.err


def test_killed_and_started_again_it_arrives_at_the_same_rows(recipe, tmp_path):
    with MockTeacher(latency_seconds=0.02) as mock:
        server = {"kind": "server", "url": mock.url, "model": "m", "in_flight": 4}
        whole = recipe({**server, "ledger": str(tmp_path / "a.sqlite")})
        command = [sys.executable, "-m", "limbeck", "generate", str(whole)]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, env=environment, **quiet)
        first = (tmp_path / "data" / "rows.jsonl").read_text()
        (tmp_path / "data").rename(tmp_path / "kept")
        again = recipe({**server, "ledger": str(tmp_path / "b.sqlite")})
        sent = len(mock.requests)
        for more in (2, 12):
            child = subprocess.Popen([*command[:-1], str(again)], env=environment, **quiet)
            wanted = len(mock.requests) + more
            while len(mock.requests) < wanted and child.poll() is None:
                time.sleep(0.005)
            child.send_signal(signal.SIGKILL)
            child.wait()
            assert not (tmp_path / "data" / "card.json").exists()
        subprocess.run([*command[:-1], str(again)], check=True, env=environment, **quiet)
        assert (tmp_path / "data" / "rows.jsonl").read_text() == first
        asked = len(mock.requests) - sent
        assert asked <= 7 + 20 + 2 * 4  # the probe, the prompts, what was under way at each kill


def test_ctrl_c_waits_for_what_is_paid_and_says_how_to_go_on(recipe, tmp_path):
    with MockTeacher(latency_seconds=0.3) as mock:
        server = {"kind": "server", "url": mock.url, "model": "m", "in_flight": 4}
        path = recipe({**server, "ledger": str(tmp_path / "a.sqlite")})
        child = subprocess.Popen(
            [sys.executable, "-m", "limbeck", "generate", str(path)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # A shell that runs in the background has its children ignore Ctrl-C.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        while len(mock.requests) < 12 and child.poll() is None:
            time.sleep(0.005)
        child.send_signal(signal.SIGINT)
        _, said = child.communicate(timeout=60)
        assert child.returncode == 130
        assert "give the same command again" in said.splitlines()[-1]
        for noise in ("Traceback", "Task was destroyed", "HTTP Request"):
            assert noise not in said
        assert not (tmp_path / "data" / "card.json").exists()
        with closing(sqlite3.connect(tmp_path / "a.sqlite")) as ledger:
            ends = ledger.execute("SELECT state, reason FROM requests").fetchall()
        assert ends == [("answered", None)] * len(mock.requests)
