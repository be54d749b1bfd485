"""limbeck generate --dry-run: nothing is sent, read or written, and the most it costs is told."""

import json
import re

import pytest
import yaml

from limbeck.teachers.mock import MockTeacher

ROWS = 20


@pytest.fixture
def mock():
    with MockTeacher() as one:
        yield one


@pytest.fixture
def dry(tmp_path, tiny_teacher, mock, call):
    """What a dry run of some steps says; their teachers are `t`, a server, and the student."""
    data = tmp_path / "rows.jsonl"
    rows = [
        {"prompt": f"the cat {k} ", "completion": " sat. It ran.", "group": str(k // 2)}
        for k in range(ROWS)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(*steps, path="made", of=None):
        server = {
            "kind": "server",
            "url": mock.url,
            "model": "m",
            "api": "completions",
            "tokenizer": str(tiny_teacher),
            "ledger": str(tmp_path / "ledger.sqlite"),
            "price": {"input": 1.0, "output": 2.0},
        }
        values = {
            "student": {"name": str(tiny_teacher), "max_length": 64},
            "teachers": {"t": server},
            "source": {
                "kind": "generated",
                "path": str(tmp_path / path),
                "of": of or {"path": str(data), "holdout": 0},
                "steps": list(steps),
            },
        }
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(values))
        return call("generate", recipe, "--dry-run")

    return run


def dearest(said):
    """The last "at most $..." of a page: that of all together."""
    return float(re.findall(r"at most \$([\d.,]+)", said)[-1].replace(",", ""))


READING = [
    {"kind": "weights", "by": "probability", "teacher": "t"},
    {"kind": "divergence", "teacher": "t"},
    {"kind": "rank", "teacher": "t"},
]


@pytest.mark.parametrize("step", READING, ids=lambda step: step["kind"])
def test_nobody_reads_and_nothing_is_written(dry, step, mock, tmp_path, monkeypatch):
    """The rows have completions, which a server would be paid for reading; no model is loaded."""
    monkeypatch.setattr("limbeck.recipe.desk.load_student", None)
    done = dry(step, {"kind": "mixed", "teacher": "t"})
    assert done.code == 0, done.err
    assert not mock.requests
    assert not (tmp_path / "ledger.sqlite").exists()
    assert not (tmp_path / "made").exists()
    name = step["kind"]
    assert f"{name} lets a teacher read the rows" in done.out
    assert "of what follows (mixed) is not said here" in done.out


def test_what_comes_before_a_step_that_reads_is_told(dry):
    done = dry({"kind": "answers", "teacher": "t", "max_tokens": 5}, READING[0])
    assert f"{ROWS} questions, 1 answers each" in done.out
    assert "weights lets a teacher read the rows: the cost of that is not said here" in done.out


def test_all_that_a_step_asks_is_summed_whenever_it_asks(dry):
    """Each round of `evolve` asks about each row, at the same price; of what is compared and
    answered it depends on the answers how much there is, and that is said."""
    one, four = (dry({"kind": "evolve", "teacher": "t", "rounds": n}).out for n in (1, 4))
    assert f"{ROWS} questions" in one
    assert f"{4 * ROWS} questions" in four
    assert dearest(four) == pytest.approx(4 * dearest(one), rel=0.05)
    assert "depends on the answers" not in one
    assert "to this is added what depends on the answers: evolve" in four


def test_each_teacher_is_told_and_the_sum_of_them(dry):
    """The student writes on this machine, at no price; what the teacher then goes on from depends
    on it."""
    step = {"kind": "mixed", "teacher": "t"}
    done = dry(step)
    assert "--- student" in done.out
    assert dearest(done.out) == 0.0
    assert "to this is added what depends on the answers: mixed" in done.out
    seeds = {"kind": "self_instruct", "teacher": "t", "make": 1000}
    done = dry(seeds, {"kind": "answers", "teacher": "t", "n": 2, "max_tokens": 8}, step)
    first, second = (float(x) for x in re.findall(r"tokens: at most \$([\d.]+)\n", done.out))
    assert "all together" in done.out
    assert dearest(done.out) == pytest.approx(first + second, abs=0.01)
    assert done.out.index("self_instruct/0.0") < done.out.index("the cat")  # the first step's first
    assert "depends on the answers: self_instruct, answers, mixed" in done.out


def test_a_teacher_that_is_not_there_is_named(dry):
    done = dry({"kind": "answers", "teacher": "big"})
    assert done.code == 2
    assert "no 'big'" in done.err


def test_rows_that_are_yet_to_be_made_are_named(dry, tmp_path, call):
    """And once they are there, the questions about them are told."""
    ask = {"kind": "answers", "teacher": "t", "max_tokens": 5}
    first = {
        "kind": "generated",
        "path": str(tmp_path / "first"),
        "of": {"path": str(tmp_path / "rows.jsonl"), "holdout": 0},
        "steps": ["two_tasks"],
    }
    for of in (first, {"kind": "stages", "of": [first]}):
        assert f"begins with rows that {tmp_path / 'first'} is to have" in dry(ask, of=of).out
    recipe = tmp_path / "first.yaml"
    recipe.write_text(yaml.safe_dump({"source": first}))
    assert call("generate", recipe).code == 0
    for of in (first, {"kind": "stages", "of": [first]}):
        assert f"{ROWS} questions, 1 answers each" in dry(ask, of=of).out
