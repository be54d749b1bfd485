"""Agreement against a float64 loop over single rows."""

import logging
import math
from dataclasses import replace

import pytest
import torch
from tests.evals.conftest import HOLDOUT, ByteReader, sample

from limbeck.core.errors import DataError
from limbeck.core.types import Sample
from limbeck.evals import Agreement, reading


def reference(
    student: ByteReader, teacher: ByteReader, holdout: list[Sample]
) -> tuple[float, float, int]:
    """Mean KL(teacher || student), share of equal top tokens, rows; one row at a time."""
    divergences: list[float] = []
    same = 0
    for item in holdout:
        public = "".join(turn.text for turn in item.turns).encode()
        private = "".join(turn.text for turn in item.privileged).encode()
        learnt = len(item.turns[-1].text.encode())
        for end in range(max(1, len(public) - learnt), len(public)):
            own = student.logits(torch.tensor(list(public[:end])))[-1]
            theirs = teacher.logits(torch.tensor(list(private + public[:end])))[-1]
            width = min(len(own), len(theirs))
            q, p = own[:width].double().softmax(-1), theirs[:width].double().softmax(-1)
            divergences.append(float((p * (p.log() - q.log())).sum()))
            same += int(q.argmax()) == int(p.argmax())
    rows = len(divergences)
    return math.fsum(divergences) / rows, same / rows, rows


def close_pair(**settings: object) -> tuple[ByteReader, ByteReader]:
    """A student that often, but not always, agrees with its teacher."""
    teacher, other = ByteReader(0), ByteReader(1)
    student = ByteReader(2)
    student.table = teacher.table + 0.35 * other.table
    return student, teacher


def test_scores_are_those_of_the_loop() -> None:
    student, teacher = close_pair()
    kl, top1, rows = reference(student, teacher, HOLDOUT)
    scores = Agreement().measure(student, teacher, HOLDOUT)
    assert scores["kl_nats"].value == pytest.approx(kl, rel=1e-5)
    assert scores["top1"].value == pytest.approx(top1)
    assert 0 < top1 < 1
    assert scores["kl_nats"].n == scores["top1"].n == rows
    for score in scores.values():
        assert score.interval95 is not None
        assert score.interval95[0] <= score.value <= score.interval95[1]


@pytest.mark.parametrize("budget", [1, 40, 100])
def test_batches_do_not_change_the_scores(budget: int) -> None:
    student, teacher = close_pair()
    whole = Agreement().measure(student, teacher, HOLDOUT)
    split = Agreement(batch_tokens=budget).measure(student, teacher, HOLDOUT)
    assert split["kl_nats"].value == pytest.approx(whole["kl_nats"].value, rel=1e-6)
    assert split["top1"] == whole["top1"]
    assert len(student.batches) > 2


def test_chunks_do_not_change_the_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = close_pair()
    whole = Agreement().measure(student, teacher, HOLDOUT)
    monkeypatch.setattr(reading, "CHUNK_BYTES", 4 * 256 * 3)
    assert len(list(reading.chunks(10, 256))) == 4
    split = Agreement().measure(student, teacher, HOLDOUT)
    assert split["kl_nats"].value == pytest.approx(whole["kl_nats"].value, rel=1e-6)


def test_a_model_agrees_with_itself() -> None:
    scores = Agreement().measure(ByteReader(0), ByteReader(0), HOLDOUT)
    assert scores["kl_nats"].value == pytest.approx(0, abs=1e-6)
    assert scores["top1"].value == 1.0


def test_only_the_shared_columns_are_compared() -> None:
    student, teacher = close_pair()
    teacher.table = torch.cat([teacher.table, 50 + torch.zeros(256, 64)], dim=1)
    kl, top1, _ = reference(student, teacher, HOLDOUT)
    scores = Agreement().measure(student, teacher, HOLDOUT)
    assert scores["kl_nats"].value == pytest.approx(kl, rel=1e-5)
    assert scores["top1"].value == pytest.approx(top1)


def test_only_the_teacher_reads_what_is_privileged() -> None:
    student, teacher = close_pair()
    holdout = [
        replace(item, privileged=sample("", "", privileged="hint: ").privileged)
        for item in HOLDOUT[:4]
    ]
    kl, top1, _ = reference(student, teacher, holdout)
    scores = Agreement().measure(student, teacher, holdout)
    # The first byte of a text without prompt has a prefix for the teacher only: not compared.
    assert scores["kl_nats"].n == sum(len(s.turns[-1].text.encode()) for s in holdout) - 1
    assert scores["kl_nats"].value == pytest.approx(kl, rel=1e-5)
    assert scores["top1"].value == pytest.approx(top1)


def test_different_lengths_compare_what_both_have_read() -> None:
    student, teacher = close_pair()
    teacher.max_length = 8
    scores = Agreement().measure(student, teacher, [sample("ab", "cdefghijkl")] * 3)
    assert scores["kl_nats"].n == 3 * 6


def test_absent_and_told_once_where_tokenizers_differ(caplog: pytest.LogCaptureFixture) -> None:
    reading.tell_once.cache_clear()
    student = ByteReader(0, vocabulary="other")
    with caplog.at_level(logging.WARNING):
        assert Agreement().measure(student, ByteReader(1), HOLDOUT) == {}
        assert Agreement().measure(student, ByteReader(1), HOLDOUT) == {}
    assert len(caplog.records) == 1
    assert "different tokenizers" in caplog.text


def test_absent_where_a_model_gives_no_logits() -> None:
    mute = ByteReader(1, offers=frozenset({"chosen"}))
    assert Agreement().measure(ByteReader(0), mute, HOLDOUT) == {}


def test_no_learnt_token_is_an_error() -> None:
    with pytest.raises(DataError, match="no learnt token"):
        Agreement().measure(ByteReader(0), ByteReader(1), [sample("only a prompt", "")])


class Dropping(ByteReader):
    """Has a module whose mode is asked for while reading."""

    def __init__(self) -> None:
        super().__init__(0)
        self.module = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Dropout())
        self.module[1].eval()

    def read(self, view, needs):
        assert not any(part.training for part in self.module.modules())
        return super().read(view, needs)


def test_models_are_evaluated_without_dropout_and_put_back() -> None:
    model = Dropping()
    Agreement().measure(model, ByteReader(1), HOLDOUT)
    assert [part.training for part in model.module.modules()] == [True, True, False]


def test_batches_fit_the_budget_and_lose_nothing() -> None:
    lengths = [5, 0, 30, 7, 7, 100, 1]
    groups = reading.batches(lengths, 30)
    assert sorted(index for group in groups for index in group) == [0, 2, 3, 4, 5, 6]
    for group in groups:
        assert len(group) == 1 or len(group) * max(lengths[i] for i in group) <= 30
    assert reading.batches([], 10) == []
