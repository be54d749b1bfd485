"""Whatever a recipe says, only errors that name the place escape."""

import copy
import json
import os
import random
import subprocess
import sys
import time

import pytest
import yaml

from limbeck.core.errors import DataError, ModelError, RecipeError
from limbeck.models import facts
from limbeck.recipe.check import check
from limbeck.recipe.document import override, parse
from limbeck.recipe.resolve import resolve

MUTATIONS = 500
SECONDS = 100
"""Of the processor: some times what they take, and far less than what something quadratic would."""

JUNK = [
    None, True, False, 0, -1, 10**30, -(10**30), 0.5, float("nan"), float("inf"), -0.0, 1e308,
    "", " ", "x", "1", "null", "теacher", "💥", "a.b.c", "../..", "/", "~", "\u202e", "\u2028",
    "%s", "{}", [], {}, [[]], [{}], {"": ""}, {"kind": "x"}, {"kind": None}, {"kind": []},
    {"kind": {}},
    {"a": {"b": {"c": {"d": [1, {"e": 2}]}}}}, [1, 2, 3], ["agreement"], "forward_kl", "causal",
    {"model_type": "llama"}, {"model_type": "llama", "num_hidden_layers": 0, "hidden_size": -4},
    {"model_type": "llama", "hidden_size": "x"}, {"model_type": "bert"}, {"model_type": 3},
    {"model_type": "llama", "vocab_size": 10**12}, {"model_type": "llama", "torch_dtype": "x"},
    {"model_type": "gpt2", "n_head": 7}, {"model_type": "t5"}, {"model_type": "llama", "x": {}},
    list(range(100)), "x" * 5000, "2020-01-01", [None], {"layers": None},
]  # fmt: skip
KEYS = ["from", "from_", "name", "kind", "layers", "config", "lora", "quantize", "weight", "needs",
        "__class__", "self", "", "0", "train", "é", "x y", "teacher", "tokenizer"]  # fmt: skip
TEXTS = ["\t", ":", "- ", "{", "}", "[", "]", "&a ", "*a ", "!!python/name:os.x ", "\0", "'", '"',
         "\ud7ff", "#", "---\n", "? ", "|\n", "<<: ", "\x85", "%YAML 9\n", "9" * 40]  # fmt: skip


@pytest.fixture(autouse=True)
def _looked_up_once(monkeypatch):
    """The same few models are asked for hundreds of times; reading a tokenizer takes a while."""
    kept = {}
    real = facts.AutoTokenizer.from_pretrained

    def once(where, **settings):
        if where not in kept:
            kept[where] = real(where, **settings)
        return kept[where]

    monkeypatch.setattr(facts.AutoTokenizer, "from_pretrained", once)


def good(teacher, data):
    return {
        "student": {
            "from": "big",
            "layers": [0, 3],
            "max_length": 64,
            "lora": {"rank": 2, "targets": "all-linear"},
        },
        "teachers": {"big": {"kind": "local", "name": str(teacher)}},
        "source": {"path": str(data), "holdout": 4, "columns": {"prompt": "prompt"}},
        "terms": [
            {"objective": {"kind": "forward_kl", "temperature": 2.0}, "teacher": "big"},
            {"objective": "cross_entropy", "weight": 0.5, "channel": "main"},
        ],
        "train": {"steps": 3, "schedule": "wsd", "learning_rate": 0.1},
        "evals": ["agreement", {"kind": "task", "name": "t", "path": "t.jsonl"}],
        "compare": "labels",
        "price": {"teacher_usd_per_hour": 2},
        "seed": 0,
    }


def places(value):
    """All (container, key) pairs of nested values."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in list(items):
        yield value, key
        if isinstance(inner, dict | list):
            yield from places(inner)


def mutated(values, chance):
    """A changed copy, as text, and overrides to go with it."""
    values = copy.deepcopy(values)
    settings = []
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        container, key = chance.choice(list(places(values)))
        what = chance.randrange(6)
        if what == 0:
            del container[key]
        elif what in (1, 2):
            container[key] = copy.deepcopy(chance.choice(JUNK))
        elif what == 3 and isinstance(container, dict):
            container[chance.choice(KEYS)] = container.pop(key)
        elif what == 4 and isinstance(container, dict):
            container[chance.choice(KEYS)] = copy.deepcopy(chance.choice(JUNK))
        elif isinstance(container, list):
            container.insert(chance.randrange(3), copy.deepcopy(container[key]))
        else:
            path = chance.choice(["train.steps", "terms.0", "terms.9", "a.b", "student.layers.0",
                                  "student", "evals", "", ".", "teachers.big.name"])  # fmt: skip
            settings.append(path + chance.choice(["", "=", "=x", "=[", "=-1", "=null", "={a: 1}"]))
        if not values:
            break
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    if chance.random() < 0.3:
        place = chance.randrange(len(text))
        text = text[:place] + chance.choice(TEXTS) + text[place + chance.randrange(3) :]
    if chance.random() < 0.1:
        lines = text.splitlines(keepends=True)
        lines.insert(chance.randrange(len(lines)), chance.choice(lines))
        text = "".join(lines)
    return text, settings


def cases(teacher, data, count):
    chance = random.Random(20_240_501)
    values = good(teacher, data)
    return [mutated(values, chance) for _ in range(count)]


def test_only_named_errors_escape(tiny_teacher, tiny_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    began = time.process_time()
    said = []
    for text, settings in cases(tiny_teacher, tiny_data, MUTATIONS):
        try:
            document = override(parse(text, "f.yaml"), settings)
            check(resolve(document), document)
        except (RecipeError, DataError, ModelError) as error:
            said.append(str(error).strip())
        except Exception as error:
            raise AssertionError(f"{settings}\n{text}") from error
    assert time.process_time() - began < SECONDS
    assert all(said)
    assert 0.5 * MUTATIONS < len(said) < MUTATIONS  # most are wrong, some are still right


def test_the_good_one_is_good(tiny_teacher, tiny_data):
    document = parse(yaml.safe_dump(good(tiny_teacher, tiny_data)))
    check(resolve(document), document)


CLI = """
import json, sys
from limbeck.cli import main
for arguments in json.loads(sys.argv[1]):
    try:
        main(arguments)
    except SystemExit as stopped:
        print("code", stopped.code, flush=True)
        print("code", stopped.code, file=sys.stderr, flush=True)
"""


def test_ten_of_them_through_a_process(tiny_teacher, tiny_data, tmp_path):
    arguments = []
    for index, (text, settings) in enumerate(cases(tiny_teacher, tiny_data, 30)[::3]):
        path = tmp_path / f"{index}.yaml"
        path.write_text(text, encoding="utf-8", errors="replace")
        arguments.append(["plan", str(path), *(s for s in settings if s)])
    done = subprocess.run(
        [sys.executable, "-c", CLI, json.dumps(arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"},
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    said = done.stderr.splitlines()
    codes = [line for line in said if line.startswith("code ")]
    assert len(codes) == 10
    assert set(codes) <= {"code 0", "code 2"}
    assert len(said) == 10 + codes.count("code 2"), done.stderr  # each refusal is one line
