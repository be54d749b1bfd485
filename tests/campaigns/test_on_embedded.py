"""Whole rounds on the embedded domain: the real generate, with a judge that knows the answers."""

import json
import re
from pathlib import Path

import pytest
import yaml

from limbeck.core.exchange import Reply
from limbeck.demo import model_path, problems, verify, write_jsonl
from limbeck.recipe.desk import Teachers


class Judge:
    """Says what it finds of answers to problems of which it knows the right one."""

    name = "judge"

    def __init__(self, known):
        self.known = known

    def answers(self, questions, sampling, n=1):
        del sampling
        for question in questions:
            text = "".join(turn.text for turn in question.prompt)
            yield [
                Reply(
                    question=question.id,
                    index=index,
                    text=self.said(text),
                    finish="stop",
                    model="judge-1",
                    usd=0.001,
                )
                for index in range(n)
            ]

    def said(self, text):
        if text in self.known:
            return self.known[text].completion
        word, code = re.findall(r"^(SCORES|RANKING) (\w+)", text, re.MULTILINE)[-1]
        asked = text[text.rindex("[BEGIN QUESTION") :]
        problem = self.known[re.search(r"\]\n(.*?)\n\[END QUESTION", asked, re.DOTALL)[1]]
        answers = re.findall(r"\[BEGIN ANSWER.*?\]\n(.*?)\n\[END ANSWER", asked, re.DOTALL)
        marks = [9 if verify(problem, answer) else 3 for answer in answers]
        if word == "RANKING":
            marks = sorted(range(1, len(answers) + 1), key=lambda place: -marks[place - 1])
        return f"Look at it.\n{word} {code} {' '.join(map(str, marks))}"


@pytest.fixture
def rounds(tmp_path, monkeypatch, call):
    """Runs two rounds of steps and terms; gives the folder and what was printed."""
    known = list(problems(0, "train", 24))
    write_jsonl(tmp_path / "prompts.jsonl", known)
    write_jsonl(tmp_path / "test.jsonl", problems(0, "test", 8))
    judge = Judge({problem.prompt: problem for problem in known})
    opened = Teachers.writer
    monkeypatch.setattr(
        Teachers, "writer", lambda self, name: judge if name == "api" else opened(self, name)
    )

    def run(steps, terms):
        recipe = {
            "student": {"name": str(model_path("student")), "max_length": 256},
            "teachers": {"api": {"kind": "server", "url": "http://127.0.0.1:9/v1", "model": "m"}},
            "source": {
                "kind": "generated",
                "path": str(tmp_path / "never"),
                "of": {"path": str(tmp_path / "prompts.jsonl"), "holdout": 0},
                "steps": steps,
                "holdout": 2,
            },
            "terms": terms,
            "train": {"steps": 3, "batch_tokens": 512, "learning_rate": 1.0e-3},
            "evals": [
                {
                    "kind": "task",
                    "name": "right",
                    "path": str(tmp_path / "test.jsonl"),
                    "match": "last_number",
                    "max_tokens": 60,
                }
            ],
        }
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        out = tmp_path / "out"
        said = call("iterate", tmp_path / "recipe.yaml", "--out", out, "--rounds", 2)
        assert said.code == 0, said.err
        assert "# 2 rounds" in said.out
        assert not (tmp_path / "never").exists()
        return out

    return run


def rows(out: Path, number: int):
    lines = (out / f"round-{number}" / "data" / "rows.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_refinement(rounds):
    out = rounds(
        [
            {"kind": "answers", "teacher": "student", "temperature": 1.0, "max_tokens": 60},
            {"kind": "critique", "teacher": "api"},
            {"kind": "better", "judge": "api", "teacher": "api"},
        ],
        [{"objective": "cross_entropy"}],
    )
    made = rows(out, 1)
    assert {row["won"] for row in made} == {"earlier", "teacher"}
    # A right answer of the student's own stays, and a wrong one is replaced by the teacher's.
    for row in made:
        assert row["critique_score"] == (9 if row["won"] == "earlier" else 3)
        assert {entry["step"] for entry in row["source"]} == {"answers", "critique", "better"}
    assert rows(out, 2) != made
    table = json.loads((out / "rounds.json").read_text())["rounds"]
    assert table[0]["counts"]["better: teacher"] == sum(row["won"] == "teacher" for row in made)
    assert table[0]["evals"]["right"]["after"] is not None


def test_cycle_align(rounds):
    out = rounds(
        [
            {"kind": "answers", "teacher": "student", "n": 3, "temperature": 1.0, "max_tokens": 60},
            {"kind": "rank", "teacher": "api", "both_orders": False},
        ],
        [
            {"objective": "sequence_ranking"},
            {"objective": "cross_entropy", "channel": "best"},
        ],
    )
    made = rows(out, 1)
    best = [row for row in made if row["channel"] == "best"]
    assert len(best) == len({row["group"] for row in made})
    assert all(row["teacher_rank"] < 3 for row in best)
    steps = (out / "round-2" / "metrics.jsonl").read_text().splitlines()
    assert all(json.loads(step)["loss/sequence_ranking"] >= 0 for step in steps)
