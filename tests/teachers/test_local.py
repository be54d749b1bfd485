"""A local model as a writer: replies by question and index alone, in order."""

import pytest
import torch

from limbeck.core.exchange import Question, Writer
from limbeck.core.specs import LocalTeacher
from limbeck.core.types import Sampling, Turn
from limbeck.models.load import load_teacher
from limbeck.teachers import local
from limbeck.teachers.local import LocalWriter


@pytest.fixture(scope="module")
def writer(tiny_teacher):
    model = load_teacher(LocalTeacher(name=str(tiny_teacher)), torch.device("cpu"), 64)
    return LocalWriter(model, "tiny")


def ask(*texts):
    return [Question(id=f"q{i}", prompt=(Turn(text=text),)) for i, text in enumerate(texts)]


SAMPLING = Sampling(max_tokens=9, temperature=1.0, seed=4)


def test_each_question_gets_n_replies_in_order(writer):
    assert isinstance(writer, Writer)
    found = list(writer.answers(iter(ask("a", "the cat", "b")), SAMPLING, 3))
    assert [[(r.question, r.index) for r in group] for group in found] == [
        [(f"q{i}", k) for k in range(3)] for i in range(3)
    ]
    assert len({reply.text for group in found for reply in group}) > 3
    first = found[0][0]
    assert (first.model, first.usd, first.scores) == ("tiny", None, None)
    assert first.completion_tokens is not None
    assert first.completion_tokens <= 9
    assert {reply.finish for group in found for reply in group} <= {"stop", "length"}


def test_a_reply_depends_on_question_and_index_alone(writer, monkeypatch):
    (alone,) = writer.answers(ask("the cat"), SAMPLING, 2)
    found = list(writer.answers(ask("b", "the cat", "the cat"), SAMPLING, 4))
    assert [reply.text for reply in found[1][:2]] == [reply.text for reply in alone]
    assert [reply.text for reply in found[1]] == [reply.text for reply in found[2]]
    monkeypatch.setattr(local, "WINDOW", 1)
    small = list(writer.answers(ask("b", "the cat", "the cat"), SAMPLING, 4))
    assert small == found


def test_questions_are_taken_as_they_are_needed(writer, monkeypatch):
    monkeypatch.setattr(local, "WINDOW", 2)
    taken = []

    def endless():
        for number in range(1_000_000):
            taken.append(number)
            yield Question(id=str(number), prompt=(Turn(text="a"),))

    replies = writer.answers(endless(), SAMPLING)
    next(replies)
    assert len(taken) <= 2


def bytes_of(token):
    """What it stands for; a part of a character is named by its bytes."""
    named = token.startswith("bytes:")
    return bytes.fromhex(token[6:].replace("\\x", "")) if named else token.encode()


def test_scores_join_to_the_text(writer):
    (group,) = writer.answers(ask("the cat"), Sampling(max_tokens=9, scores=2), 1)
    (reply,) = group
    assert reply.scores is not None
    spelt = b"".join(map(bytes_of, (score.text for score in reply.scores)))
    assert spelt.decode(errors="replace") == reply.text
    assert all(len(score.top) == 2 and score.logp <= 0 for score in reply.scores)
    assert all(score.top[0][0] == score.text for score in reply.scores)  # greedy
