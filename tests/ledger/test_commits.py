"""Group commit: those who wait share a commit, and none of them suffers for another."""

import sqlite3
import threading

import pytest

from limbeck.core.errors import LedgerError
from limbeck.ledger.commits import Committer


@pytest.fixture
def committer(tmp_path):
    database = sqlite3.connect(
        tmp_path / "some.sqlite", timeout=0.05, isolation_level=None, check_same_thread=False
    )
    database.execute("CREATE TABLE written (value)")
    statements = []
    database.set_trace_callback(statements.append)
    made = Committer(database, tmp_path / "some.sqlite")
    made.statements = statements
    yield made
    made.close()


def write(value):
    def work(database):
        database.execute("INSERT INTO written VALUES (?)", (value,))
        return value

    return work


def held(committer):
    """Keeps the thread busy until the event is set."""
    began, go = threading.Event(), threading.Event()
    future = committer.submit(lambda _: began.set() or go.wait(30))
    assert began.wait(30)
    return go, future


def written(tmp_path):
    database = sqlite3.connect(tmp_path / "some.sqlite")
    found = [value for (value,) in database.execute("SELECT value FROM written")]
    database.close()
    return found


def test_those_who_wait_share_one_commit(committer, tmp_path):
    go, first = held(committer)
    futures = [committer.submit(write(number)) for number in range(256)]
    assert not any(future.done() for future in futures)
    go.set()
    assert [future.result(30) for future in futures] == list(range(256))
    assert first.result()
    assert committer.statements.count("COMMIT") == 2
    assert written(tmp_path) == list(range(256))


def test_a_result_is_on_the_disk(committer, tmp_path):
    for number in range(20):
        assert committer.submit(write(number)).result(30) == number
        assert written(tmp_path) == list(range(number + 1))


def test_a_refusal_does_not_spoil_the_others(committer, tmp_path):
    def refuse(_):
        raise LedgerError("no")

    go, _ = held(committer)
    futures = [committer.submit(work) for work in (write(1), refuse, write(2))]
    go.set()
    assert futures[0].result(30) == 1
    with pytest.raises(LedgerError, match="no"):
        futures[1].result(30)
    assert futures[2].result(30) == 2
    assert committer.statements.count("COMMIT") == 2
    assert written(tmp_path) == [1, 2]


def test_a_fault_undoes_its_own_work_only(committer, tmp_path):
    def fault(database):
        write("half")(database)
        raise ZeroDivisionError

    def wrong(database):
        write("half")(database)
        database.execute("NONSENSE")

    go, _ = held(committer)
    futures = [committer.submit(work) for work in (write(1), fault, write(2), wrong, write(3))]
    go.set()
    assert [futures[place].result(30) for place in (0, 2, 4)] == [1, 2, 3]
    with pytest.raises(ZeroDivisionError):
        futures[1].result(30)
    with pytest.raises(LedgerError, match=r"some\.sqlite.*syntax error"):
        futures[3].result(30)
    assert written(tmp_path) == [1, 2, 3]


def test_a_file_that_another_holds_is_not_waited_for_once_for_each(committer, tmp_path):
    tries = []
    real = committer._commit
    committer._commit = lambda jobs: tries.append(len(jobs)) or real(jobs)
    other = sqlite3.connect(tmp_path / "some.sqlite", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    futures = [committer.submit(write(number)) for number in range(100)]
    for future in futures:
        with pytest.raises(LedgerError, match="another process"):
            future.result(30)
    assert sum(tries) == 100
    assert len(tries) < 20
    other.execute("ROLLBACK")
    other.close()
    assert committer.submit(write(7)).result(30) == 7
    assert written(tmp_path) == [7]


def test_what_is_cancelled_while_it_waits_is_not_done(committer, tmp_path):
    go, _ = held(committer)
    futures = [committer.submit(write(number)) for number in range(3)]
    assert futures[1].cancel()
    go.set()
    assert futures[2].result(30) == 2
    assert written(tmp_path) == [0, 2]


def test_closing_finishes_what_waits(committer, tmp_path):
    go, _ = held(committer)
    futures = [committer.submit(write(number)) for number in range(1500)]
    go.set()
    committer.close()
    committer.close()
    assert all(future.done() for future in futures)
    assert written(tmp_path) == list(range(1500))
    with pytest.raises(LedgerError, match="closed"):
        committer.submit(write(1))
