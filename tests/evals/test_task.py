"""Tasks, the suite and the speed of writing, with a model that answers from a dictionary."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError
from tests.evals.conftest import HOLDOUT, ByteReader, Parrot, sample

from limbeck.core.errors import DataError, RecipeError
from limbeck.core.registry import kinds
from limbeck.evals import Agreement, Perplexity, Task, run_suite, tokens_per_second
from limbeck.evals.score import wilson_interval

ROWS: list[dict[str, Any]] = [
    {"prompt": "1+1=", "answer": 2, "source": "ignored"},
    {"prompt": "6*3=", "answer": "#### 18"},
    {"prompt": [{"role": "user", "content": "7-9?"}], "answer": -2.0},
    {"prompt": "5/2=", "answer": "2.5"},
]
ANSWERS = {"1+1=": "It is 2.00.", "6*3=": "6*3=17", "7-9?": "-2", "5/2=": "2 1/2\n\nQ: 3+3="}


@pytest.fixture
def path(tmp_path: Path) -> str:
    file = tmp_path / "problems.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in ROWS) + "\n\n", encoding="utf-8")
    return str(file)


def test_accuracy_with_its_interval(path: str) -> None:
    parrot = Parrot(ANSWERS)
    task = Task(name="sums", path=path, match="last_number", stop=("\n\nQ:",), max_tokens=9)
    (name, score), *rest = task.measure(parrot, None, []).items()
    assert (name, score.value, score.n, rest) == ("sums", 0.75, 4, [])
    assert score.interval95 == wilson_interval(0.75, 4)
    assert (score.better, score.unit) == ("higher", "share")
    assert (parrot.asked[0].max_tokens, parrot.asked[0].temperature) == (9, 0.0)


def test_messages_become_turns(path: str) -> None:
    problems = Task(name="sums", path=path).problems()
    assert [turn.role for sample, _ in problems for turn in sample.turns] == [
        None,
        None,
        "user",
        None,
    ]
    assert problems[2][0].id == "problems.jsonl:3"
    assert not any(turn.learn for sample, _ in problems for turn in sample.turns)


def test_limit_takes_the_first(path: str) -> None:
    task = Task(name="sums", path=path, match="last_number", limit=1)
    assert task.measure(Parrot(ANSWERS), None, [])["sums"].n == 1


def test_exact_and_regex() -> None:
    assert Task(name="t", path="-").judge([" 4 2\n", "42"], ["4 2", "4 2"]) == [True, False]
    task = Task(name="t", path="-", match="regex", pattern=r"####\s*(-?\d+)")
    assert task.judge(["x #### 7 #### 8", "7", "####8"], ["7", "7", "7"]) == [True, False, False]


def measured(tmp_path: Path, rows: list[dict[str, Any]], said: list[str], **more: Any) -> float:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    parrot = Parrot({row["prompt"]: text for row, text in zip(rows, said, strict=True)})
    return Task(name="t", path=str(file), **more).measure(parrot, None, [])["t"].value


def test_options_are_read_from_the_prompt(tmp_path: Path) -> None:
    asked = "Which?\n(a) park\n(b) gravity\n"
    rows = [{"prompt": f"{k}. {asked}", "answer": "gravity"} for k in range(4)]
    said = ["The answer is (b).", "B", "So the answer is (a) park.", "Either (a) or (b)."]
    assert measured(tmp_path, rows, said, match="choice") == 0.5


def test_the_answer_may_be_json(tmp_path: Path) -> None:
    known: list[Any] = [{"a": 1, "b": [True]}, '{"a": 1, "b": [true]}', [1, 2], None]
    rows = [{"prompt": str(k), "answer": answer} for k, answer in enumerate(known)]
    said = ['I call {"b": [true], "a": 1.0}.', '{"a": 1, "b": [1]}', "[1, 2]", "null"]
    assert measured(tmp_path, rows, said, match="json") == 0.75


def test_mathematics(tmp_path: Path) -> None:
    pytest.importorskip("math_verify")
    rows = [{"prompt": str(k), "answer": "1/2"} for k in range(3)]
    said = ["It is $\\frac{2}{4}$.", "It is 0.5.", "It is $2^{-2}$."]
    assert measured(tmp_path, rows, said, match="math") == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not JSON"),
        ("[1]", "not a JSON object"),
        ('{"question": "a", "answer": "b"}', "no `prompt`; it has question, answer"),
        ('{"prompt": "a"}', "no `answer`"),
        ('{"prompt": "", "answer": "1"}', "not empty"),
        ('{"prompt": ["a"], "answer": "1"}', "`role` and `content`"),
        ('{"prompt": "a", "answer": true}', "string or a number"),
        ('{"prompt": "a", "answer": null}', "string or a number"),
        ('{"prompt": "a", "answer": "none"}', "no number"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, line: str, reason: str) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text(json.dumps(ROWS[0]) + "\n\n" + line, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        Task(name="t", path=str(file), match="last_number").problems()
    assert str(caught.value).startswith(f"{file}:3: ")
    assert reason in str(caught.value)


def test_a_file_may_be_given_from_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "t.jsonl").write_text('{"prompt": "2+2=", "answer": "4"}\n')
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(Task(name="t", path="~/t.jsonl", match="last_number").problems()) == 1


def test_empty_missing_and_binary_files(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name, reason in (("empty", "no problems"), ("none", "No such file"), ("binary", "UTF-8")):
        with pytest.raises(DataError, match=reason):
            Task(name="t", path=str(tmp_path / name)).problems()


def test_absent_for_a_model_that_does_not_write(path: str) -> None:
    assert Task(name="t", path=path).measure(ByteReader(0), None, []) == {}


def test_recipe_values() -> None:
    assert {name: kinds("eval")[name] for name in ("agreement", "perplexity", "task")} == {
        "agreement": Agreement,
        "perplexity": Perplexity,
        "task": Task,
    }
    adapter = TypeAdapter(Task)
    task = adapter.validate_python(
        {"name": "gsm", "path": "p", "match": "last_number", "stop": ["Q:"]}
    )
    assert task == Task(name="gsm", path="p", match="last_number", stop=("Q:",))
    for wrong in (
        {"name": "", "path": "p"},
        {"name": "a", "path": "p", "match": "fuzzy"},
        {"name": "a", "path": "p", "limit": 0},
        {"name": "a", "path": "p", "match": "regex"},
        {"name": "a", "path": "p", "pattern": "(a)"},
        {"name": "a", "path": "p", "match": "regex", "pattern": "("},
        {"name": "a", "path": "p", "temperature": float("nan")},
    ):
        with pytest.raises(ValidationError):
            adapter.validate_python(wrong)


class Both(ByteReader, Parrot):
    """Reads bytes and answers from the dictionary."""

    def __init__(self, seed: int) -> None:
        Parrot.__init__(self, ANSWERS)
        ByteReader.__init__(self, seed)


def test_suite_puts_all_scores_in_one(path: str) -> None:
    evals = [Agreement(), Perplexity(), Task(name="sums", path=path, match="last_number")]
    student, teacher = Both(0), Both(1)
    scores = run_suite(evals, student, teacher, HOLDOUT)
    assert list(scores) == ["kl_nats", "top1", "perplexity", "bits_per_byte", "sums"]
    alone = ["perplexity", "bits_per_byte", "sums"]
    assert list(run_suite(evals, teacher, None, HOLDOUT)) == alone
    assert list(run_suite(evals, teacher, teacher, HOLDOUT)) == alone
    assert list(run_suite(evals, student, teacher, [])) == ["sums"]


def test_suite_refuses_equal_names(path: str) -> None:
    with pytest.raises(RecipeError, match="'sums' is measured 2 times"):
        run_suite([Task(name="sums", path=path)] * 2, Parrot({}), None, [])
    with pytest.raises(RecipeError, match="'top1'"):
        run_suite([Agreement(), Task(name="top1", path=path)], Parrot({}), None, [])
    with pytest.raises(RecipeError, match="'kl_nats' is what `agreement` finds"):
        run_suite([Task(name="kl_nats", path=path)], Parrot({}), None, [])


def test_speed_is_the_median_after_a_warm_up() -> None:
    parrot = Parrot({"a": "one two three", "b": ""})
    ticks = iter([0.0, 1.0, 10.0, 13.0, 20.0, 20.5])
    prompts = [sample("a", ""), sample("b", "")]
    assert tokens_per_second(parrot, prompts, 5, clock=lambda: next(ticks)) == 3.0
    assert [sampling.max_tokens for sampling in parrot.asked] == [5] * 4


def test_speed_of_silence_is_not_measured() -> None:
    assert tokens_per_second(Parrot({"b": ""}), [sample("b", "")], 5) is None
    assert tokens_per_second(Parrot({}), [], 5) is None
