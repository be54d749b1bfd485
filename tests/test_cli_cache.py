"""`limbeck cache`, and what a run says of a cache that is absent, damaged, or of something else."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

from limbeck.teachers.fill import Filling


@pytest.fixture
def teacher(tmp_path, tiny_teacher):
    """A copy of the teacher's folder, to be changed or removed."""
    return shutil.copytree(tiny_teacher, tmp_path / "teacher")


@pytest.fixture
def write(tmp_path, teacher, tiny_data):
    """Writes a recipe of a cached teacher; returns its path."""

    def make(keep="sampled", objective="sparse_kl", name="recipe.yaml", rows=None, **changes):
        cache = {
            "kind": "cache",
            "path": str(tmp_path / "cache"),
            "of": {"kind": "local", "name": str(teacher)},
            "keep": keep,
            "k": 12,
            **changes,
        }
        recipe = {
            "student": {"from": "big", "layers": [0, 3]},
            "teachers": {"big": cache},
            "source": {"path": str(rows or tiny_data), "holdout": 4},
            "terms": [{"objective": objective}],
            "train": {"steps": 2, "batch_tokens": 200},
            "evals": ["agreement"],
        }
        path = tmp_path / name
        path.write_text(yaml.safe_dump(recipe, sort_keys=False))
        return path

    return make


def refused(line, *parts, code=2):
    """One line on stderr, no traceback; returns it."""
    assert line.code == code, line
    last = line.err.strip().splitlines()[-1]
    assert "Traceback" not in line.err
    for part in parts:
        assert str(part) in last, last
    return last


# --- making one -------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", ["sampled", "topk", "chosen", "hidden", "full"])
def test_it_says_what_it_made_and_a_run_needs_no_more(call, write, tmp_path, keep):
    objective = {"sampled": "sparse_kl", "topk": "sparse_kl", "chosen": "cross_entropy"}
    path = write(keep, objective.get(keep, "forward_kl"))
    line = call("cache", path)
    assert line.code == 0, line
    assert "56 samples" in line.out
    assert " bytes a token), 0 dropped, " in line.out
    assert "56/56 samples" in line.err
    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").glob("shard-*")}
    again = call("cache", path)
    assert again.out.split(", 0 dropped")[0] == line.out.split(", 0 dropped")[0]
    assert again.err == ""
    assert files == {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").glob("shard-*")}
    assert call("run", path, "--out", tmp_path / "run").code == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["agreement"]["before"]["kl_nats"] > 0
    assert report["agreement"]["after"]["kl_nats"] > 0
    assert report["teacher"]["name"].endswith("teacher")


def test_a_run_without_the_teachers_files(call, write, tmp_path, teacher):
    path = write()
    text = yaml.safe_load(path.read_text())
    text["student"] = {"config": {"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 1}}
    text["student"]["config"] |= {"num_attention_heads": 2, "intermediate_size": 24}
    path.write_text(yaml.safe_dump(text))
    assert call("cache", path).code == 0
    shutil.rmtree(teacher)
    line = call("run", path, "--out", tmp_path / "run")
    assert line.code == 0, line.err
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["teacher"]["parameters"] > 0
    assert report["agreement"]["after"]["kl_nats"] is None
    assert call("cache", path).code == 0  # whole: nothing to ask the teacher
    text["student"] = {"from": "big", "layers": [0]}
    path.write_text(yaml.safe_dump(text))
    refused(call("plan", path), "student.from", "the weights of teacher 'big' are gone")


def test_a_shard_that_is_damaged_is_named_and_made_again_alone(call, write, tmp_path, monkeypatch):
    monkeypatch.setattr("limbeck.teachers.fill.SHARD_SAMPLES", 8)
    monkeypatch.setattr("limbeck.recipe.cache.SHARD_SAMPLES", 8)
    path = write()
    assert call("cache", path).code == 0
    shards = sorted((tmp_path / "cache").glob("*.arrow"))
    assert len(shards) == 7
    content = shards[3].read_bytes()
    shards[3].write_bytes(content[:-100] + bytes([content[-100] ^ 1]) + content[-99:])
    line = call("run", path, "--out", tmp_path / "run")
    refused(line, shards[3].name, "damaged", "limbeck cache RECIPE", code=1)
    before = {p: p.stat().st_mtime_ns for p in shards}
    assert call("cache", path).code == 0
    after = {p: p.stat().st_mtime_ns for p in shards}
    assert {p for p in shards if before[p] != after[p]} == {shards[3]}
    assert shards[3].read_bytes() == content
    shards[5].with_suffix(".json").unlink()
    refused(
        call("run", path, "--out", tmp_path / "other"),
        "teachers.big.path",
        "is not finished: 1 of 7 shards are missing; go on with: limbeck cache RECIPE",
    )
    seal = shards[2].with_suffix(".json")
    seal.write_text("{}")
    refused(call("run", path, "--out", tmp_path / "other"), seal.name, "damaged", code=1)
    assert call("cache", path).code == 0
    assert call("run", path, "--out", tmp_path / "other").code == 0


def test_a_damaged_head_is_named_and_written_again(call, write, tmp_path):
    path = write("hidden", "forward_kl")
    assert call("cache", path).code == 0
    head = tmp_path / "cache" / "teacher" / "head.safetensors"
    content = head.read_bytes()
    head.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    refused(call("run", path, "--out", tmp_path / "run"), "head.safetensors", "damaged", code=1)
    assert call("cache", path).code == 0
    assert head.read_bytes() == content


def test_ctrl_c_keeps_what_is_whole(call, write, tmp_path, monkeypatch):
    monkeypatch.setattr("limbeck.teachers.fill.SHARD_SAMPLES", 8)
    monkeypatch.setattr("limbeck.recipe.cache.SHARD_SAMPLES", 8)
    path, real = write(), Filling.records

    def stops(self, shard):
        if shard == 2:
            raise KeyboardInterrupt
        yield from real(self, shard)

    monkeypatch.setattr(Filling, "records", stops)
    line = call("cache", path)
    refused(line, "stopped; the finished shards", "the same command goes on", code=130)
    assert len(list((tmp_path / "cache").glob("*.arrow"))) == 2
    monkeypatch.setattr(Filling, "records", real)
    line = call("cache", path)
    assert line.code == 0
    assert "40/40 samples" in line.err  # 16 of 56 were there


@pytest.mark.slow
def test_a_process_that_is_ended_and_two_that_share_the_rest(write, tmp_path):
    rows = tmp_path / "rows.jsonl"
    lines = [
        json.dumps({"prompt": f"two and {i}", "completion": " the cat sat on a mat " * (1 + i % 7)})
        for i in range(3000)
    ]
    rows.write_text("\n".join(lines))
    path = write(rows=rows)
    command = [sys.executable, "-m", "limbeck", "cache", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def start():
        return subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    first = start()
    deadline = time.monotonic() + 60
    while not list((tmp_path / "cache").glob("shard-*.json")) and time.monotonic() < deadline:
        time.sleep(0.02)
    first.send_signal(signal.SIGTERM)
    _, err = first.communicate(timeout=60)
    assert first.returncode == 130, err
    assert err.strip().splitlines()[-1].startswith("stopped; the finished shards")
    done = set((tmp_path / "cache").glob("shard-*.json"))
    assert 0 < len(done) < 12
    both = [start(), start()]
    said = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert all("2,996 samples" in out for out, _ in said)


# --- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"k": 0}, ["teachers.big.k", "greater than 0; it is 0"]),
        ({"k": 1000}, ["teachers.big.k", "1,000 is more than the teacher's 308 tokens"]),
        ({"keep": "topk", "k": 309}, ["teachers.big.k", "`k: 308` keeps all"]),
        ({"keep": "top-k"}, ["teachers.big.keep", "'sampled', 'topk'", "it is 'top-k'"]),
        (
            {"temperature": 2.0},
            ["terms.0.objective.temperature", "is kept at 2.0", "set it to 2.0"],
        ),
        ({"temperature": 0.0}, ["teachers.big.temperature", "greater than 0"]),
        ({"keep": "full", "temperature": 2.0}, ["teachers.big.temperature", "only goes with"]),
        ({"keep": "full"}, ["terms.0.objective", "needs sparse", "offers logits"]),
        ({"path": ""}, ["teachers.big.path", "at least 1 character"]),
        ({"seed": -1}, ["teachers.big.seed", "greater than or equal to 0"]),
        ({"kk": 3}, ["teachers.big.kk", "did you mean 'k'?"]),
        ({"of": {"nam": "x"}}, ["teachers.big.of.nam", "did you mean 'name'?"]),
        ({"of": {"kind": "lokal", "name": "x"}}, ["teachers.big.of.kind", "'local'?"]),
        ({"of": 3}, ["teachers.big.of", "a mapping is wanted"]),
        ({"of": {}}, ["teachers.big.of.name", "is missing"]),
        ({"of": {"name": "/no/such"}}, ["/no/such: no such folder"]),
        (
            {"of": {"kind": "cache", "path": "x", "of": {"name": "x"}}},
            ["teachers.big.of", "LocalTeacher"],
        ),
    ],
)
def test_a_recipe_that_cannot_work(call, write, tmp_path, changes, parts):
    path = write(**changes)
    for command in (["plan", path], ["cache", path], ["run", path, "--out", tmp_path / "run"]):
        line = call(*command)
        refused(line, *parts)
        assert line.err.count("\n") == 1
    assert not (tmp_path / "cache").exists()


def test_without_a_cached_teacher(call, write, teacher):
    path = write()
    settings = ["teachers.big={name: " + str(teacher) + "}", "terms.0.objective=forward_kl"]
    refused(call("cache", path, *settings), "teachers", "none of them is a cache", "kind: cache")
    refused(
        call("plan", path, settings[0]),
        "sparse_kl needs sparse; teacher 'big' offers attention, boundary, chosen",
        "These would work: ",
        "forward_kl",
        "or teachers.big: {kind: cache, path: FOLDER, of: {name: ...}, keep: sampled}",
    )


def test_an_absent_cache(call, write, tmp_path):
    line = call("run", write(), "--out", tmp_path / "run")
    refused(line, "recipe.yaml:", "teachers.big.path", "make it first: limbeck cache RECIPE")
    line = call("plan", write())
    assert line.code == 0
    assert "nothing yet: limbeck cache RECIPE" in line.out


def test_plan_shows_what_is_there(call, write):
    path = write()
    without = call("plan", path).out
    call("cache", path)
    line = call("plan", path)
    assert line.code == 0
    assert "sampled, k 12" in line.out
    assert "KiB" in line.out
    assert "nothing yet" in without


CHANGES = {
    "another teacher": ("weights", {}, ["the teacher's weights changed: SHA-256"]),
    "another template": ("template", {}, ["the chat template or the special tokens changed"]),
    "another tokenizer": ("tokenizer", {}, ["the tokenizer changed: SHA-256"]),
    "other rows": ("rows", {}, ["the training rows changed"]),
    "another seed of the holdout": ("", {"seed": 1}, ["the training rows changed"]),
    "another revision": ("", {"teachers.big.of.revision": "v2"}, ["revision was main", "v2 now"]),
    "another dtype": (
        "",
        {"teachers.big.of.dtype": "bfloat16"},
        ["the dtype the teacher computes in was auto when", "bfloat16 now"],
    ),
    "another length": ("", {"student.max_length": 30}, ["student.max_length was 1024", "30 now"]),
    "another k": ("", {"teachers.big.k": 13}, ["k was 12 when it was made and is 13 now"]),
    "another kind": ("", {"teachers.big.keep": "topk"}, ["keep was sampled", "topk now"]),
    "another seed": ("", {"teachers.big.seed": 5}, ["seed was 0", "5 now"]),
    "another temperature": (
        "",
        {"teachers.big.temperature": 2.0, "terms.0.objective": "{kind: sparse_kl, temperature: 2}"},
        ["temperature was 1.0", "2.0 now"],
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_cache_of_something_else(call, write, tmp_path, teacher, tiny_data, what):
    spoilt, settings, parts = CHANGES[what]
    rows = tmp_path / "rows.jsonl"
    rows.write_text(tiny_data.read_text())
    path = write(rows=rows)
    assert call("cache", path).code == 0
    if spoilt == "weights":
        import torch
        from safetensors.torch import load_file, save_file

        weights = load_file(teacher / "model.safetensors")
        weights["model.norm.weight"] = weights["model.norm.weight"] + torch.tensor(1e-3)
        save_file(weights, teacher / "model.safetensors", metadata={"format": "pt"})
    elif spoilt == "template":
        file = teacher / "chat_template.jinja"
        file.write_text(file.read_text() + " ")
    elif spoilt == "tokenizer":
        file = teacher / "tokenizer.json"
        values = json.loads(file.read_text())
        values["model"]["merges"] = values["model"]["merges"][:-1]
        file.write_text(json.dumps(values))
    elif spoilt == "rows":
        rows.write_text(rows.read_text().replace("the cat", "the cats"))
    given = [f"{key}={value}" for key, value in settings.items()]
    for command in (["run", path, *given, "--out", tmp_path / "run"], ["cache", path, *given]):
        line = call(*command)
        said = refused(line, "recipe.yaml:", "teachers.big.path", "a cache of something else")
        for part in parts:
            assert part in said
        assert "name another folder" in said


def test_settings_without_influence_do_not_refuse(call, write, tmp_path):
    path = write("full", "forward_kl")
    assert call("cache", path).code == 0
    settings = ["teachers.big.k=3", "teachers.big.seed=9", "teachers.big.of.device=cpu"]
    assert call("run", path, *settings, "--out", tmp_path / "run").code == 0


def test_the_data_may_be_moved(call, write, tmp_path, tiny_data):
    path = write()
    assert call("cache", path).code == 0
    (tmp_path / "there").mkdir()
    moved = shutil.copy(tiny_data, tmp_path / "there")
    done = call("run", path, "--out", tmp_path / "run", f"source.path={moved}")
    assert done.code == 0, done.err


def test_a_cache_may_be_moved(call, write, tmp_path):
    assert call("cache", write()).code == 0
    (tmp_path / "cache").rename(tmp_path / "elsewhere")
    path = write(path=str(tmp_path / "elsewhere"))
    assert call("run", path, "--out", tmp_path / "run").code == 0


def test_help(call):
    line = call("cache", "--help")
    assert line.code == 0
    assert "Usage" in line.out
