"""A teacher that writes during training: here, with another tokenizer, and behind an API."""

import json
import sqlite3
from contextlib import closing

import pytest
import torch
from safetensors.torch import load_file

from limbeck.core.errors import BudgetError, RecipeError, ServerError
from limbeck.core.exchange import Question, Reply
from limbeck.core.types import Sample, Sampling, Turn
from limbeck.models.load import load_student, load_teacher
from limbeck.recipe.run import run
from limbeck.synth.teacher_speaker import TeacherSpeaker
from limbeck.teachers.local import LocalWriter
from limbeck.teachers.mock import Faults, MockTeacher

CPU = torch.device("cpu")
SAMPLING = Sampling(max_tokens=6, temperature=1.0, scores=0)


@pytest.fixture
def models(make_recipe):
    recipe = make_recipe()
    student = load_student(recipe.student, recipe.teachers, CPU, 0)
    return student, load_teacher(recipe.teachers["big"], CPU, 64)


def prompts(*texts):
    return [Sample(id=f"r{k}", turns=(Turn(text=text),)) for k, text in enumerate(texts)]


class Fake:
    """Says its lines in turn, whatever is asked."""

    name = "fake"

    def __init__(self, *lines):
        self.lines, self.calls = list(lines), []

    def answers(self, questions, sampling, n=1):
        asked = list(questions)
        self.calls.append((asked, sampling, n))
        for question in asked:
            yield [self.lines.pop(0)(question, k) for k in range(n)]


def says(text, finish="stop", failure=None):
    return lambda question, k: Reply(
        question=question.id, index=k, text=text, finish=finish, failure=failure
    )


def test_a_model_here_writes_what_it_writes_as_a_teacher(models):
    student, teacher = models
    asked = prompts("the cat ", "two", "the cat ")
    said = TeacherSpeaker(teacher="big").write(
        student, {"big": teacher}, asked, [5, 6, 7], SAMPLING
    )
    sampling = Sampling(max_tokens=6, temperature=1.0, seed=5)
    own = LocalWriter(teacher)
    (cats,) = own.answers([Question(id="x", prompt=asked[0].turns)], sampling, 2)
    (two,) = own.answers([Question(id="x", prompt=asked[1].turns)], sampling, 1)
    for one, reply in zip(said, (cats[0], two[0], cats[1]), strict=True):
        assert (one.text if one else None) == (reply.text if reply.whole else None)


def test_what_was_cut_or_failed_is_left_out(models):
    student, _ = models
    fake = Fake(says("sat"), says("half", "length"), says("", failure="no"), says("  "))
    said = TeacherSpeaker(teacher="t").write(
        student, {"t": fake}, prompts("a ", "b ", "c ", "d "), [1, 2, 3, 4], SAMPLING
    )
    assert [one and one.text for one in said] == ["sat", None, None, None]
    assert said[0].logp is None
    assert student.tokenizer.decode(said[0].ids, skip_special_tokens=True).strip() == "sat"
    assert fake.calls[0][1].scores is None
    assert fake.calls[0][1].seed == 1


def test_no_answer_at_all_ends_it(models):
    student, _ = models
    fake = Fake(says("", failure="503"), says("", failure="503"))
    with pytest.raises(ServerError, match="no answer at all: 503"):
        TeacherSpeaker(teacher="t").write(student, {"t": fake}, prompts("a", "b"), [1, 2], SAMPLING)


def test_who_does_not_write_is_refused(models, make_recipe, tiny_data):
    student, _ = models
    with pytest.raises(RecipeError, match="no teacher that writes"):
        TeacherSpeaker(teacher="t").write(student, {}, prompts("a"), [1], SAMPLING)
    source = {"kind": "rollouts", "of": {"path": str(tiny_data)}}
    with pytest.raises(RecipeError, match="did you mean 'big'") as error:
        make_recipe(source={**source, "speaker": {"kind": "teacher", "teacher": "bag"}})
    assert error.value.field == "source.speaker.teacher"


@pytest.fixture
def recipe(make_recipe, tiny_teacher, tiny_data, tmp_path):
    """Builds a recipe whose rows a server writes while it trains."""

    def make(mock, steps=4, **fields):
        server = {
            "kind": "server",
            "url": mock.url,
            "model": "m",
            "ledger": str(tmp_path / "ledger.sqlite"),
            "price": {"input": 1.0, "output": 1.0},
            "attempts": 20,
        }
        return make_recipe(
            {"steps": steps, "save_every": 100},
            student={"name": str(tiny_teacher)},
            teachers={"api": {**server, **fields}},
            source={
                "kind": "rollouts",
                "of": {"path": str(tiny_data), "holdout": 0},
                "speaker": {"kind": "teacher", "teacher": "api"},
                "batch": 4,
                "max_tokens": 8,
            },
            terms=[{"objective": {"kind": "cross_entropy"}}],
        )

    return make


def weights(folder):
    return load_file(folder / "student" / "model.safetensors")


def test_a_server_writes_and_is_paid_once(recipe, tmp_path, monkeypatch):
    with MockTeacher(faults=Faults(rate=0.3, seed=2, kinds=("429", "500", "length"))) as mock:
        run(recipe(mock), tmp_path / "a")
        sent = len(mock.requests)
        assert sent > 8
        run(recipe(mock), tmp_path / "b")
        assert len(mock.requests) == sent  # the same prompts and draws
    lines = (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()
    steps = [line for line in map(json.loads, lines) if "loss" in line]
    assert all(line["loss"] > 0 for line in steps)
    written = [line for line in steps if "rollouts/ended" in line]
    assert any(line["rollouts/ended"] < 1 for line in written)  # some were cut, and left out
    assert all("rollouts/entropy_nats" not in line for line in written)
    first, second = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(value.equal(second[name]) for name, value in first.items())


def test_a_spent_budget_stops_it_and_a_larger_one_goes_on(recipe, tmp_path):
    with MockTeacher() as mock:
        run(recipe(mock, steps=9, ledger=str(tmp_path / "whole.sqlite")), tmp_path / "whole")
        with closing(sqlite3.connect(tmp_path / "whole.sqlite")) as ledger:
            ((spent,),) = ledger.execute("SELECT spent_nanousd FROM accounts")
        with pytest.raises(BudgetError):
            run(recipe(mock, steps=9, budget_usd=0.7 * spent / 1e9), tmp_path / "out")
        assert not (tmp_path / "out" / "student").exists()
        lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
        reached = max(json.loads(line)["step"] for line in lines)
        assert 0 < reached < 9
        assert (tmp_path / "out" / "checkpoints" / f"step-{reached}").exists()
        run(recipe(mock, steps=9, budget_usd=1.0), tmp_path / "out", resume=True)
    whole, stopped = weights(tmp_path / "whole"), weights(tmp_path / "out")
    assert all(value.equal(stopped[name]) for name, value in whole.items())
