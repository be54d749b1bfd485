"""A writer with a memory: what was written once is not written again."""

import sys
from pathlib import Path

import pytest

from limbeck.core.exchange import Question, Reply, Scored
from limbeck.core.types import Sampling, Turn
from limbeck.ledger.store import Ledger
from limbeck.teachers.recorded import Recorded, payload_of, reply_of

sys.path.insert(0, str(Path(__file__).parents[1] / "synth"))
from fakes import FakeWriter, broken  # noqa: E402


def ask(*texts):
    return [Question(id=f"q{k}", prompt=(Turn(text=t),)) for k, t in enumerate(texts)]


@pytest.fixture
def ledger(tmp_path):
    with Ledger(tmp_path / "answers.sqlite") as opened:
        yield opened


def test_only_what_is_new_is_written(ledger):
    inner = FakeWriter(lambda question, index: f"{question.prompt[0].text}{index}")
    writer = Recorded(inner, ledger, "weights-1")
    first = list(writer.answers(ask("a", "b"), Sampling(), 2))
    assert [[r.text for r in group] for group in first] == [["a0", "a1"], ["b0", "b1"]]
    again = list(writer.answers(ask("c", "a"), Sampling(), 2))
    assert [q.prompt[0].text for q in inner.questions] == ["a", "b", "c"]
    assert [r.text for r in again[1]] == ["a0", "a1"]
    assert again[1][0].question == "q1"  # as it is called now
    list(writer.answers(ask("a"), Sampling(), 3))
    assert len(inner.questions) == 4  # the third is new


@pytest.mark.parametrize(
    "other",
    [
        Sampling(temperature=0.5),
        Sampling(seed=1),
        Sampling(max_tokens=3),
        Sampling(stop=("x",)),
        Sampling(top_p=0.5),
        Sampling(scores=1),
    ],
)
def test_another_setting_is_another_question(ledger, other):
    inner = FakeWriter(lambda question, index: "x")
    writer = Recorded(inner, ledger, "weights-1")
    for sampling in (Sampling(), other):
        list(writer.answers(ask("a"), sampling))
    assert len(inner.questions) == 2


def test_other_weights_never_meet_old_answers(ledger):
    inner = FakeWriter(lambda question, index: "x")
    for weights in ("one", "two"):
        list(Recorded(inner, ledger, weights).answers(ask("a"), Sampling()))
    assert len(inner.questions) == 2


def test_a_failure_is_not_remembered(ledger):
    said = [broken("gone"), "fine"]
    inner = FakeWriter(lambda question, index: said[len(inner.questions) > 1])
    writer = Recorded(inner, ledger, "w")
    ((first,),) = writer.answers(ask("a"), Sampling())
    ((second,),) = writer.answers(ask("a"), Sampling())
    assert (first.failure, second.text) == ("gone", "fine")


def test_a_reply_survives():
    reply = Reply(
        question="q",
        index=2,
        text="é",
        finish="length",
        model="m",
        usd=0.1,
        scores=(Scored(text="é", logp=-0.5, top=(("é", -0.5), ("e", -1.0))),),
    )
    import json

    assert reply_of(json.loads(json.dumps(payload_of(reply))), "q") == reply
