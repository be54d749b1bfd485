"""Wrong input ends with one line that says where, exit code 2, and no traceback."""

import errno
import json
import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import pytest

from limbeck.core import registry
from limbeck.core.types import Needs

GOOD = """\
student: {from: big, layers: [0, 3]}
teachers:
  big: {name: TEACHER}
source: {path: DATA, holdout: 4}
terms:
  - objective: {kind: forward_kl}
    weight: 0.7
  - objective: {kind: cross_entropy}
    weight: 0.3
train:
  steps: 2
  batch_tokens: 200
evals: []
seed: 0
"""


@pytest.fixture
def write(tmp_path, tiny_teacher, tiny_data):
    """Writes the good recipe with some text replaced; gives its path."""

    def make(*changes):
        text = GOOD.replace("TEACHER", str(tiny_teacher)).replace("DATA", str(tiny_data))
        for old, new in zip(changes[::2], changes[1::2], strict=True):
            assert old in text
            text = text.replace(old, new, 1)
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return make


@pytest.fixture
def copied(tmp_path, tiny_teacher):
    """A copy of the teacher's folder, to be spoilt."""
    return shutil.copytree(tiny_teacher, tmp_path / "copied")


def refused(line, *parts):
    """One line on stderr, exit code 2, nothing on stdout; returns the line."""
    assert line.code == 2, line
    assert line.err.endswith("\n"), line.err
    assert line.err.count("\n") == 1, line.err
    assert "Traceback" not in line.err
    assert line.out == ""
    for part in parts:
        assert str(part) in line.err, line.err
    return line.err


def subprocess_line(*arguments, cwd=None):
    done = subprocess.run(
        [sys.executable, "-m", "limbeck", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        timeout=120,
    )
    return SimpleNamespace(code=done.returncode, err=done.stderr, out=done.stdout)


TRAIN = "  steps: 2\n"
BAD_FIELDS = {
    # what: (old text, new text, line, field, part of the reason)
    "unknown at the top": ("seed: 0", "sed: 0", 14, "sed", "did you mean 'seed'?"),
    "unknown in train": (TRAIN, "  stps: 2\n", 11, "train.stps", "did you mean 'steps'?"),
    "unknown in lora": (
        "layers: [0, 3]}",
        "layers: [0, 3],\n  lora: {rnk: 4}}",
        2,
        "student.lora.rnk",
        "did you mean 'rank'?",
    ),
    "unknown in an objective": (
        "kind: forward_kl}",
        "kind: forward_kl, temprature: 2}",
        6,
        "terms.0.objective.temprature",
        "did you mean 'temperature'?",
    ),
    "unknown in a teacher": ("name: TEACHER", "nam: x", 3, "teachers.big.nam", "'name'?"),
    "unknown in the source": ("holdout: 4", "holdot: 4", 4, "source.holdot", "'holdout'?"),
    "unknown in a term": ("    weight: 0.3", "    wait: 0.3", 9, "terms.1.wait", "'weight'?"),
    "unknown objective": (
        "forward_kl",
        "foward_kl",
        6,
        "terms.0.objective.kind",
        "did you mean 'forward_kl'?",
    ),
    "unknown evaluation": ("[]", "[agrement]", 13, "evals.0.kind", "did you mean 'agreement'?"),
    "unknown student": ("{from", "{kind: casual, from", 1, "student.kind", "'causal'?"),
    "text for a number": (TRAIN, "  steps: many\n", 11, "train.steps", "it is 'many'"),
    "list for a number": (TRAIN, "  steps: [2]\n", 11, "train.steps", "it is [2]"),
    "fraction for a count": (TRAIN, "  steps: 2.5\n", 11, "train.steps", "it is 2.5"),
    "list for a mapping": (TRAIN, "  steps: 2\nprice: [1]\n#", 12, "price", "a mapping is wanted"),
    "text for a list": ("evals: []", "evals: agreement", 13, "evals", "a list is wanted"),
    "number for text": ("from: big", "from: 7", 1, "student.from", "it is 7"),
    "NaN": ("weight: 0.7", "weight: .nan", 7, "terms.0.weight", "it is nan"),
    "infinite": (TRAIN, "  learning_rate: .inf\n", 11, "train.learning_rate", "it is inf"),
    "negative": (TRAIN, "  steps: -2\n", 11, "train.steps", "greater than 0; it is -2"),
    "negative weight": ("weight: 0.3", "weight: -0.3", 9, "terms.1.weight", "it is -0.3"),
    "zero": (TRAIN, "  steps: 0\n", 11, "train.steps", "it is 0"),
    "true for a count": (
        TRAIN,
        "  steps: true\n",
        11,
        "train.steps",
        "a number is wanted, not true or false",
    ),
    "true for a rate": (
        TRAIN,
        "  clip: true\n",
        11,
        "train.clip",
        "a number is wanted, not true or false",
    ),
    "true for a weight": (
        "weight: 0.7",
        "weight: true",
        7,
        "terms.0.weight",
        "a number is wanted, not true or false",
    ),
    "true for a temperature": (
        "kind: forward_kl}",
        "kind: forward_kl, temperature: true}",
        6,
        "terms.0.objective.temperature",
        "a number is wanted, not true or false",
    ),
    "true for a rank": (
        "layers: [0, 3]}",
        "layers: [0, 3],\n  lora: {rank: true}}",
        2,
        "student.lora.rank",
        "a number is wanted, not true or false",
    ),
    "true for a layer": (
        "[0, 3]",
        "[0, true]",
        1,
        "student.layers.1",
        "a number is wanted, not true or false",
    ),
    "true for a holdout": (
        "holdout: 4",
        "holdout: true",
        4,
        "source.holdout",
        "a number is wanted, not true or false",
    ),
    "choice that is none": (
        TRAIN,
        "  schedule: cosin\n",
        11,
        "train.schedule",
        "'cosine', 'linear', 'wsd' or 'constant'",
    ),
    "unknown teacher": (
        "weight: 0.7",
        "teacher: bgi",
        7,
        "terms.0.teacher",
        "no teacher 'bgi'; did you mean 'big'?",
    ),
    "unknown origin": ("from: big", "from: bgi", 1, "student.from", "did you mean 'big'?"),
    "layer that is not there": (
        "[0, 3]",
        "[0, 4]",
        1,
        "student.layers",
        "layer 4 does not exist; the teacher has 0 to 3",
    ),
    "negative layer": ("[0, 3]", "[0, -1]", 1, "student.layers.1", "it is -1"),
    "one kind twice": (
        "kind: cross_entropy",
        "kind: forward_kl",
        8,
        "terms.1",
        "a second 'forward_kl'; give this term a `name` of its own",
    ),
    "one evaluation twice": (
        "[]",
        "[perplexity, perplexity]",
        13,
        "evals",
        "'perplexity' is measured 2 times",
    ),
    "pattern without a group": (
        "evals: []",
        "evals:\n  - {kind: task, name: t, path: p, match: regex, pattern: '('}",
        14,
        "evals.0.pattern",
        "not a regular expression",
    ),
    "nothing to learn with": ("seed: 0", "seed: -1", 14, "seed", "it is -1"),
}


@pytest.mark.parametrize("what", BAD_FIELDS)
def test_a_bad_field_is_named_with_its_line(what, call, write, tiny_teacher):
    old, new, line, field, reason = BAD_FIELDS[what]
    path = write(old.replace("TEACHER", str(tiny_teacher)), new)
    refused(call("plan", path), f"{path}:{line}: {field}: ", reason)


def test_missing_parts_are_named(call, write, tiny_data, tiny_teacher):
    path = write("student: {from: big, layers: [0, 3]}\n", "")
    refused(call("plan", path), f"{path}:1: student: is missing")
    path = write(f"source: {{path: {tiny_data}, holdout: 4}}\n", "")
    refused(call("plan", path), f"{path}:1: source: is missing")
    path = write(f"path: {tiny_data}, ", "")
    refused(call("plan", path), f"{path}:4: source.path: is missing")
    path = write("  - objective: {kind: forward_kl}\n    weight: 0.7\n", "  - weight: 0.7\n")
    refused(call("plan", path), f"{path}:6: terms.0: has no objective")
    whole = write().read_text().split("terms:")[0]
    path.write_text(whole + "terms: []\n")
    refused(call("plan", path), f"{path}:5: terms: there is no term")
    path = write(
        f"teachers:\n  big: {{name: {tiny_teacher}}}\n", "", "{from: big", "{from: teacher"
    )
    refused(call("plan", path), "terms.0.teacher", "the recipe has no `teachers`")


BOMB = "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n"
BAD_TEXTS = {
    "a list": ("- 1\n- 2\n", 1, "a recipe is a mapping"),
    "a word": ("hello", 1, "a recipe is a mapping"),
    "nothing": ("", 1, "a recipe is a mapping"),
    "a key twice": ("seed: 0\nstudent: {name: x}\nseed: 1\n", 3, "seed: is given twice"),
    "a key twice inside": ("train:\n  steps: 1\n  steps: 2\n", 3, "train.steps: is given twice"),
    "tag on a scalar": ("seed: !!python/name:os.system x\n", 1, "seed: "),
    "tag on a mapping": ("seed: 1\ntrain: !!python/object:os.x {a: 1}\n", 2, "train: "),
    "tag on a list": (
        "seed: 1\n\nevals: !!python/object/apply:os.system ['touch CANARY']\n",
        3,
        "evals: ",
    ),
    "tag of its own": ("seed: !mine 1\n", 1, "'!mine' is not a plain value"),
    "an alias bomb": (BOMB, 1, "anchors and aliases are not allowed"),
    "an alias of nothing": ("seed: *x\n", 1, "anchors and aliases are not allowed"),
    "a merge": ("train:\n  <<: {steps: 1}\n", 2, "keys must be plain words"),
    "a tab": ("train:\n\tsteps: 1\n", 2, "not YAML"),
    "an open bracket": ("evals: [agreement\nseed: 0\n", 2, "not YAML"),
    "too deep": ("seed: " + "[" * 30 + "]" * 30, 1, "nested deeper than 20 levels"),
    "far too deep": ("seed: " + "[" * 30000 + "]" * 30000, 1, "nested deeper than 20 levels"),
    "a NUL": ("seed: \0\n", 1, "not YAML"),
    "a date": ("seed: 2020-01-01\n", 1, "seed: 'timestamp' is not a plain value"),
    "a number as key": ("1: x\n", 1, "keys must be plain words"),
    "a list as key": ("? [a]\n: x\n", 1, "keys must be plain words"),
    "two documents": ("seed: 0\n---\nseed: 1\n", 2, "not YAML"),
    "a huge number": ("train:\n  steps: " + "9" * 6000 + "\n", 2, "train.steps: "),
}


@pytest.mark.parametrize("what", BAD_TEXTS)
def test_only_plain_yaml_is_read(what, call, tmp_path):
    text, line, reason = BAD_TEXTS[what]
    path = tmp_path / "recipe.yaml"
    path.write_text(text.replace("CANARY", str(tmp_path / "canary")), encoding="utf-8")
    refused(call("plan", path), f"{path}:{line}: ", reason)
    assert not (tmp_path / "canary").exists()


def test_a_file_that_is_no_text(call, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"seed: \xff\xfe\n")
    refused(call("plan", path), f"{path}:1: not UTF-8 text")
    path.write_bytes(b"#" * (2**20 + 1))
    refused(call("plan", path), "too many for a recipe")
    refused(call("plan", tmp_path / "none.yaml"), f"{tmp_path / 'none.yaml'}:1: No such file")
    refused(call("plan", tmp_path), f"{tmp_path}:1: Is a directory")


OVERRIDES = {
    "train.stps=3": "train.stps: unknown field; did you mean 'steps'? (given on the command line)",
    "train.steps=many": "train.steps: ",
    "train.steps=": "train.steps: ",
    "nonsense": "'nonsense' is not a setting such as train.steps=10",
    "=3": "'=3' is not a setting such as train.steps=10",
    "terms.7.weight=1": "terms.7.weight: there is no terms.7 to set",
    "terms.0=3": "terms.0: a mapping is wanted; it is 3 (given on the command line)",
    "terms.x.weight=1": "terms.x.weight: ",
    "seed.x=1": "seed.x: ",
    "train.steps=[": "not YAML",
    "train.steps=!!python/name:os.x y": "is not a plain value",
    "student.layers=[9]": "student.layers: layer 9 does not exist",
    "train.clip=.nan": "train.clip: ",
    "terms.0.objective.temprature=2": "unknown field; did you mean 'temperature'?",
}


@pytest.mark.parametrize("setting", OVERRIDES)
def test_a_bad_override_is_named(setting, call, write):
    refused(call("plan", write(), setting), OVERRIDES[setting])


def test_a_good_override_counts(call, write):
    line = call("plan", write(), "train.steps=77", "train.batch_tokens=1000")
    assert line.code == 0
    assert "77 steps of 1,000 tokens: 77,000 tokens" in line.out
    assert line.err == ""


def test_folders_that_hold_no_model(call, write, tmp_path, copied, tiny_teacher):
    refused(call("plan", write(str(tiny_teacher), "/nowhere/at/all")), "/nowhere/at/all: no such")
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(
        call("plan", write(str(tiny_teacher), str(empty))), f"{empty}: the folder has no config"
    )
    path = write(str(tiny_teacher), str(copied))
    assert call("plan", path).code == 0
    (copied / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    refused(call("plan", path), f"{copied}: the folder has no tokenizer.json")
    shutil.copy(tmp_path / "tokenizer.json", copied)
    (copied / "config.json").write_text("{oops")
    refused(call("plan", path), f"{copied}")
    (copied / "config.json").write_text('{"model_type": "no_such_architecture"}')
    refused(call("plan", path), f"{copied}")
    (copied / "config.json").write_text("[]")
    refused(call("plan", path), f"{copied}")
    (copied / "config.json").write_bytes(b"\xff\xfe\x00")
    refused(call("plan", path), f"{copied}")
    refused(call("plan", write(str(tiny_teacher), "no-such-model-at-all")), "no model can be found")


def test_a_pickle_is_refused(call, write, copied, tmp_path, tiny_teacher):
    canary = tmp_path / "canary"
    evil = pickle.dumps(_Evil(str(canary)))
    path = write(str(tiny_teacher), str(copied))
    weights = copied / "model.safetensors"
    kept = weights.read_bytes()
    weights.write_bytes(evil)
    for command in (("plan", path), ("run", path, "--out", tmp_path / "out")):
        refused(call(*command), f"{weights}: not a safetensors file")
    weights.unlink()
    (copied / "pytorch_model.bin").write_bytes(evil)
    for command in (("plan", path), ("run", path, "--out", tmp_path / "out")):
        refused(call(*command), f"{copied}: weights are a pickle (pytorch_model.bin)")
    (copied / "pytorch_model.bin").unlink()
    refused(call("plan", path), f"{copied}: the folder has no .safetensors weights")
    weights.write_bytes(kept[: len(kept) // 2])
    refused(call("plan", path), f"{weights}: cut off or damaged")
    weights.write_bytes(kept[:8] + b"{" * (len(kept) - 8))
    refused(call("plan", path), f"{weights}: not a safetensors file (its header is damaged)")
    weights.write_bytes(b"")
    refused(call("plan", path), "not a safetensors file")
    assert not canary.exists()
    assert not (tmp_path / "out" / "student").exists()


class _Evil:
    """Unpickling it writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.mark.parametrize("where", ["config.json", "tokenizer_config.json"])
def test_a_model_with_code_of_its_own_is_refused(
    where, call, write, copied, tmp_path, tiny_teacher
):
    canary = tmp_path / "canary"
    (copied / "evil.py").write_text(
        f"open({str(canary)!r}, 'w').close()\n"
        "from transformers import LlamaConfig as C, LlamaForCausalLM as M\n"
        "from transformers import PreTrainedTokenizerFast as T\n"
    )
    values = json.loads((copied / where).read_text())
    values["auto_map"] = {
        "AutoConfig": "evil.C",
        "AutoModelForCausalLM": "evil.M",
        "AutoTokenizer": ["evil.T", "evil.T"],
    }
    if where == "config.json":
        values["model_type"] = "evil"
    (copied / where).write_text(json.dumps(values))
    path = write(str(tiny_teacher), str(copied))
    for command in (("plan", path), ("run", path, "--out", tmp_path / "out")):
        refused(call(*command), f"{copied}: {where} asks to run code", "trust_remote_code: true")
    as_student = write("{from: big, layers: [0, 3]}", f"{{name: {copied}}}")
    refused(call("plan", as_student), f"{copied}: {where} asks to run code")
    new = "{config: {model_type: llama, num_hidden_layers: 1}, tokenizer: " + f"{copied}}}"
    refused(call("plan", write("{from: big, layers: [0, 3]}", new)), "asks to run code")
    assert not canary.exists()


def test_bad_data_is_named(call, write, tmp_path, tiny_data):
    rows = tmp_path / "rows.jsonl"
    path = write(str(tiny_data), str(rows))

    count = iter(range(100))

    def run(text):
        rows.write_text(text)
        return call("run", path, "--out", tmp_path / f"out{next(count)}")

    good = '{"prompt": "a", "completion": "b"}\n'
    refused(call("run", path, "--out", tmp_path / "out-a"), f"{rows}: no such file")
    refused(run(""), f"{rows}: there are no rows")
    refused(run("\n\n"), f"{rows}: there are no rows")
    refused(run(good + "\n" + good + '{"prompt": "a", \n'), f"{rows}:4: not JSON")
    refused(run(good + "[1]\n"), f"{rows}:2: not a JSON object")
    refused(run(good + '{"promt": "a"}\n'), f"{rows}:2: a row needs `prompt`")
    refused(run(good + '{"prompt": 3, "completion": "b"}\n'), f"{rows}:2: `prompt` is int")
    refused(run('{"prompt": "a", "completion": "b", "weight": -1}\n'), f"{rows}:1: `weight`")
    refused(run('{"text": ""}\n' * 5), "no token to learn")
    folder = tmp_path / "folder"
    folder.mkdir()
    path = write(str(tiny_data), str(folder))
    refused(call("run", path, "--out", tmp_path / "out-b"), "holds no .jsonl or .parquet")
    (folder / "x.parquet").write_bytes(b"PAR1 this is not it")
    refused(subprocess_line("run", path, "--out", tmp_path / "out-c"), "not a readable Parquet")
    (tmp_path / "rows.csv").write_text("a,b\n")
    path = write(str(tiny_data), str(tmp_path / "rows.csv"))
    refused(call("run", path, "--out", tmp_path / "out-d"), "unknown kind of file '.csv'")


def test_rows_that_are_all_cut_away(call, write, tmp_path):
    path = write("layers: [0, 3]}", "layers: [0, 3], max_length: 2}", "holdout: 4", "holdout: 0")
    refused(call("run", path, "--out", tmp_path / "out"), "raise student.max_length")


def test_tokenizers_that_differ(call, write, tmp_path, copied, tiny_teacher):
    state = json.loads((copied / "tokenizer.json").read_text())
    words = state["model"]["vocab"]
    first, second = list(words)[-2:]
    words[first], words[second] = words[second], words[first]
    (copied / "tokenizer.json").write_text(json.dumps(state))
    path = write("{from: big, layers: [0, 3]}", f"{{name: {copied}}}")
    said = refused(call("plan", path), f"{path}:6: terms.0.objective: ", "different tokenizers")
    assert {"sorted_l1", "cross_entropy"} <= {w.strip() for w in said.split("work:")[1].split(",")}
    assert call("plan", path, "terms.0.objective={kind: sorted_l1}").code == 0


@pytest.fixture
def silent_teacher():
    """A kind of teacher that only writes."""

    @registry.register("teacher", "silent")
    @dataclass(frozen=True, kw_only=True)
    class Silent:
        """Only writes text."""

        offers: ClassVar[Needs] = frozenset({"text"})
        name: str = "silent"

    yield
    del registry._kinds["teacher"]["silent"]


@pytest.mark.usefixtures("silent_teacher")
def test_a_teacher_that_does_not_offer_what_is_needed(call, write, tiny_teacher):
    path = write(f"{{name: {tiny_teacher}}}", "{kind: silent}")
    said = refused(call("plan", path), f"{path}:6: terms.0.objective: forward_kl needs logits")
    assert "teacher 'big' offers text. These would work: " in said
    assert "cross_entropy" in said
    assert "reverse_kl" not in said.partition("would work")[2]


def test_an_output_folder_that_is_not_free(call, write, tmp_path, held_elsewhere):
    path, out = write(), tmp_path / "out"
    out.write_text("a file")
    refused(call("run", path, "--out", out), "--out: ", "is a file, not a folder")
    out.unlink()
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    refused(call("run", path, "--out", out), "--out: ", "is not empty and holds no run")
    refused(call("run", path, "--out", out, "--resume"), "is not empty and holds no run")
    (out / "thesis.txt").unlink()
    with held_elsewhere(out):
        refused(call("run", path, "--out", out), "--out: ", "is in use by another run")
    assert call("run", path, "--out", out).code == 0
    refused(call("run", path, "--out", out), "holds a run; go on with --resume")
    before = sorted(p.name for p in out.iterdir())
    other = call("run", path, "--out", out, "--resume", "train.learning_rate=0.5")
    refused(other, "--out: ", "of another recipe")
    assert sorted(p.name for p in out.iterdir()) == before


USAGE = {
    "unknown command": (["distil"], "distil"),
    "unknown option": (["plan", "x.yaml", "--frobnicate"], "frobnicate"),
    "missing argument": (["plan"], "RECIPE"),
    "missing option": (["run", "x.yaml"], "--out"),
    "option without value": (["run", "x.yaml", "--out"], "--out"),
    "text for a number": (["demo", "--seeds", "many"], "seeds"),
    "too small": (["demo", "--seeds", "0"], "seeds"),
    "unknown method": (["init", "foward_kl"], "did you mean 'forward_kl'?"),
}


@pytest.mark.parametrize("what", USAGE)
def test_wrong_usage_is_one_line(what, call):
    arguments, part = USAGE[what]
    refused(call(*arguments), part)


def test_an_unwritable_place(call, write, tmp_path):
    (tmp_path / "file").write_text("")
    line = call("run", write(), "--out", tmp_path / "file" / "out")
    assert line.code in (1, 2)
    assert line.err.count("\n") == 1


def test_the_process_itself_says_one_line(write, tmp_path, tiny_data):
    """The same through a real process, where logs and warnings could slip in."""
    path = write(TRAIN, "  stps: 2\n")
    line = refused(subprocess_line("plan", path))
    assert line == f"{path}:11: train.stps: unknown field; did you mean 'steps'?\n"
    refused(subprocess_line("plan", write(), "nonsense"), "'nonsense' is not a setting")
    refused(subprocess_line("frobnicate"), "frobnicate")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n{oops\n')
    path = write(str(tiny_data), str(rows))
    refused(subprocess_line("run", path, "--out", tmp_path / "out"), f"{rows}:2: not JSON")


def test_debug_shows_a_traceback(call, write):
    line = call("plan", write(TRAIN, "  stps: 2\n"), "--debug")
    assert line.code == 2
    assert "Traceback" in line.err
    assert line.err.splitlines()[-1].endswith("did you mean 'steps'?")


def test_what_is_not_a_mistake_of_the_user_is_exit_code_1(call, write, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("the\nmoon is full")

    monkeypatch.setattr("limbeck.recipe.plan.plan", fails)
    line = call("plan", write())
    assert line.code == 1
    assert line.err.startswith("RuntimeError: the moon is full (in test_cli.py:")
    assert line.err.count("\n") == 1


def test_interrupted_is_exit_code_130(call, write, monkeypatch):
    def stops(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("limbeck.recipe.plan.plan", stops)
    line = call("plan", write())
    assert line.code == 130
    assert "Traceback" not in line.err


def test_methods_lists_every_kind(call):
    line = call("methods")
    assert line.code == 0
    for slot in ("objective", "student", "teacher", "source", "eval"):
        for name in registry.kinds(slot):
            assert name in line.out


def test_version_and_help(call):
    assert call("--version").out.startswith("limbeck ")
    for command in ([], ["plan"], ["run"], ["init"], ["demo"], ["methods"]):
        line = call(*command, "--help")
        assert line.code == 0
        assert "Usage" in line.out


def test_init_writes_a_recipe_once(call, tmp_path, tiny_teacher, tiny_data):
    out = tmp_path / "mine.yaml"
    settings = ("--teacher", tiny_teacher, "--student", tiny_teacher, "--data", tiny_data)
    assert call("init", "reverse_kl", "--out", out, *settings).code == 0
    assert call("plan", out).code == 0
    text = out.read_text()
    refused(call("init", "forward_kl", "--out", out), "--out: ", "exists; name another file")
    assert out.read_text() == text


def test_init_and_run_in_one_folder_keep_the_recipe(call, tmp_path, tiny_teacher, tiny_data):
    """The advice to resume would have replaced it."""
    out = tmp_path / "recipe.yaml"
    settings = ("--teacher", tiny_teacher, "--student", tiny_teacher, "--data", tiny_data)
    assert call("init", "forward_kl", "--out", out, *settings).code == 0
    text = out.read_text()
    for more in ((), ("--resume",)):
        line = call("run", out, "--out", tmp_path, "train.steps=1", *more)
        refused(line, f"--out: {tmp_path} holds your recipe; give a folder of its own")
    assert out.read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_a_demo_of_a_recipe_writes_nothing_into_a_folder_that_it_refuses(call, write, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").touch()
    refused(call("run", write(), "--out", tmp_path / "out", "--demo"), "holds no run")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_two_arms_of_one_name_are_refused(call, write, tmp_path):
    (tmp_path / "other").mkdir()
    other = shutil.copy(write(), tmp_path / "other")
    more = ("--task", "a=x.jsonl,y.jsonl", "--out", tmp_path / "out")
    line = call("continual", tmp_path / "recipe.yaml", other, *more)
    refused(line, "RECIPE: two recipes are called 'recipe'; rename one")


SECRETS = {
    "a key as the variable": ("key_variable: sk-SECRET", "key_variable: the name of"),
    "a key in a list": ("key_variable: [sk-SECRET]", "key_variable: the name of"),
    "a password in the address": ("url: 'https://u:SECRET@h/v1'", "url: an address such as"),
    "no text": ("url: [SECRET]", "url: an address such as"),
}


@pytest.mark.parametrize("what", SECRETS)
def test_a_secret_in_the_wrong_place_is_not_repeated(what, call, write, tiny_teacher):
    field, reason = SECRETS[what]
    fields = {"url": "url: 'http://127.0.0.1:1/v1'", "key_variable": "key_variable: KEY"}
    fields[field.partition(":")[0]] = field
    server = f"{{kind: server, model: m,\n    {', '.join(fields.values())}}}"
    path = write(f"{{name: {tiny_teacher}}}", server)
    said = refused(call("plan", path), f"{path}:4: teachers.big.{reason}")
    assert "SECRET" not in said


def test_a_place_that_is_read_only_is_the_users_affair(call, write, tmp_path, monkeypatch):
    def refuses(path, *_, **__):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr("pathlib.Path.mkdir", refuses)
    out = tmp_path / "out"
    refused(call("run", write(), "--out", out), f"{out}: Read-only file system")
    monkeypatch.undo()
    (tmp_path / "file").touch()
    refused(call("run", write(), "--out", tmp_path / "file" / "out"), "out: Not a directory")


@pytest.mark.parametrize(("command", "advice"), [("run", True), ("generate", False)])
def test_only_a_run_is_told_to_resume(call, write, tmp_path, monkeypatch, command, advice):
    def stops(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"limbeck.recipe.{command}.{command}", stops)
    line = call(command, write(), *(["--out", tmp_path / "out"] if advice else []))
    assert line.code == 130
    assert ("--resume" in line.err) == advice


def test_faults_without_a_rate_are_refused(call):
    refused(call("mock-teacher", "--faults", "429"), "--faults: ", "--fault-rate 0.3")


def test_a_log_that_cannot_be_written_is_refused(call, tmp_path):
    log = tmp_path / "none" / "log.jsonl"
    refused(call("mock-teacher", "--log", log), f"--log: {log}: No such file")


@pytest.mark.parametrize(("closed", "left"), [("1", "2"), ("2", "1")])
def test_a_closed_stream_is_no_error(write, closed, left):
    shown = f'exec "$0" -m limbeck plan "$1" {closed}>&-'
    command = ["sh", "-c", shown, sys.executable, str(write())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert ("steps" in done.stdout) == (left == "1")
    assert done.stderr == ""


def test_letters_that_the_terminal_lacks_are_no_error(write, tmp_path):
    """They would lose a complete run its exit code."""
    out = tmp_path / "Läufe"
    command = [sys.executable, "-m", "limbeck", "run", str(write()), "--out", str(out)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr
    assert b"L?ufe" in done.stdout
    assert (out / "report.md").exists()
