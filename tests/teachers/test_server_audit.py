"""The load benchmark's audit finds what is wrong, and nothing where nothing is."""

import sqlite3
import sys
from pathlib import Path

import pytest

from limbeck.core.exchange import Question
from limbeck.core.specs import ServerTeacher, TokenPrice
from limbeck.core.types import Sampling, Turn
from limbeck.teachers import server as module
from limbeck.teachers.mock import Faults, MockTeacher
from limbeck.teachers.mock.minds import Canned
from limbeck.teachers.server import Server

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from server_audit import audit


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """The log, the ledger and the whole answers of a short run against a mock that misbehaves."""
    folder = tmp_path_factory.mktemp("audit")
    log, ledger = folder / "log.jsonl", folder / "ledger.sqlite"
    before, module.FIRST_WAIT_SECONDS = module.FIRST_WAIT_SECONDS, 0.001
    faults = Faults(rate=0.3, seed=2)
    with MockTeacher(Canned(7), faults=faults, log_path=log) as mock:
        spec = ServerTeacher(
            url=mock.url,
            model="m",
            ledger=str(ledger),
            price=TokenPrice(input=1.0, output=2.0),
            attempts=20,
        )
        questions = (
            Question(id=f"q{k}", prompt=(Turn(text=f"question {k}", role="user"),))
            for k in range(40)
        )
        sampling = Sampling(max_tokens=30, temperature=1.0, seed=9)
        with Server(spec, display=False) as server:
            found = [reply for (reply,) in server.answers(questions, sampling)]
    module.FIRST_WAIT_SECONDS = before
    return log, ledger, {reply.question: reply.text for reply in found if reply.whole}


def test_nothing_is_found_where_nothing_is_wrong(asked):
    log, ledger, wholes = asked
    found = audit(log, ledger, wholes)
    assert len(wholes) > 30
    assert found["wrong_texts"] == found["asked_though_recorded"] == found["not_in_ledger"] == 0
    assert found["recorded"] == 40
    assert found["requests"] > 40
    assert 0 < found["billed_usd"] <= found["counted_usd"]


def test_a_text_that_was_cut_is_found(asked):
    log, ledger, wholes = asked
    name = max(wholes, key=lambda one: len(wholes[one]))
    assert audit(log, ledger, {**wholes, name: wholes[name][:-3]})["wrong_texts"] == 1


@pytest.mark.parametrize(
    ("statement", "what"),
    [
        (
            "INSERT INTO requests (account, owner, state, begun, keys, request)"
            " SELECT account, owner, state, begun, keys, request FROM requests"
            " WHERE id = (SELECT request FROM answers LIMIT 1)",
            "asked_though_recorded",
        ),
        ("DELETE FROM requests WHERE state = 'failed' OR id < 4", "not_in_ledger"),
    ],
)
def test_a_book_that_does_not_fit_is_found(asked, statement, what, tmp_path):
    log, ledger, wholes = asked
    changed = tmp_path / "ledger.sqlite"
    database = sqlite3.connect(ledger)
    database.execute(f"VACUUM INTO '{changed}'")
    database.close()
    database = sqlite3.connect(changed, isolation_level=None)
    database.execute(statement)
    database.close()
    assert audit(log, changed, wholes)[what] > 0
