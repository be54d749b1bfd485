"""The ledger's promises within one process; `test_faults.py` has kills and other processes."""

import asyncio
import json
import math
import os
import pickle
import sqlite3
import threading
from contextlib import closing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.core.errors import BudgetError, LedgerError, LimbeckError
from limbeck.ledger.store import Ledger, Totals


@pytest.fixture
def path(tmp_path):
    return tmp_path / "deep" / "ledger.sqlite"


@pytest.fixture
def ledger(path):
    with Ledger(path) as opened:
        yield opened


def test_an_answer_is_known_also_when_opened_again(path):
    answer = {"text": "caf\u00e9 \ud800 \x00", "scores": [["a", -0.5], ["b", -math.inf]]}
    with Ledger(path) as ledger:
        request = ledger.begin(["a", "b"], {"messages": ["\ud800"]}, None, "api", None)
        assert ledger.known(["a", "b"]) == {}
        ledger.finish(request, {"a": answer, "b": {}}, None, 3, 4)
        assert ledger.known(["a", "b", "c"]) == {"a": answer, "b": {}}
    with Ledger(path) as ledger:
        assert ledger.known(["a"]) == {"a": answer}
        assert ledger.totals("api") == Totals(
            requests=1, answers=2, prompt_tokens=3, completion_tokens=4, unknown_usd_count=1
        )


def test_many_keys_are_looked_up(ledger):
    keys = [str(number) for number in range(1700)]
    request = ledger.begin(keys, {}, None, "api", None)
    ledger.finish(request, {key: {"key": key} for key in keys[::2]}, None, None, None)
    assert ledger.known(keys) == {key: {"key": key} for key in keys[::2]}
    assert ledger.known([]) == {}


def test_the_first_answer_stays(ledger):
    for text in ("first", "second"):
        request = ledger.begin(["a"], {}, 1.0, "api", None)
        ledger.finish(request, {"a": {"text": text}}, 0.5, 1, 1)
    assert ledger.known(["a"]) == {"a": {"text": "first"}}
    totals = ledger.totals("api")
    assert (totals.answers, totals.spent_usd, totals.prompt_tokens) == (1, 1.0, 2)


def ended(ledger, how):
    request = ledger.begin(["a"], {}, 0.3, "api", 1.0)
    if how[0] == "finish":
        ledger.finish(request, {}, how[1], None, None)
    else:
        ledger.fail(request, "why", how[1])
    return ledger.totals("api")


@pytest.mark.parametrize(
    ("how", "spent", "reserved", "failures", "unknown_usd"),
    [
        (("finish", 0.1), 0.1, 0.0, 0, 0),
        (("finish", 0.7), 0.7, 0.0, 0, 0),  # a server that charges more than it could
        (("finish", None), 0.3, 0.0, 0, 1),
        (("fail", 0.0), 0.0, 0.0, 1, 0),
        (("fail", 0.2), 0.2, 0.0, 1, 0),
        (("fail", None), 0.0, 0.3, 1, 1),
    ],
)
def test_what_counts_after_each_end(ledger, how, spent, reserved, failures, unknown_usd):
    totals = ended(ledger, how)
    assert (totals.spent_usd, totals.reserved_usd) == (spent, reserved)
    assert (totals.failures, totals.unknown_usd_count) == (failures, unknown_usd)
    left = 1.0 - spent - reserved
    with pytest.raises(BudgetError):
        ledger.begin(["b"], {}, left + 1e-6, "api", 1.0)
    ledger.begin(["b"], {}, round(left, 9), "api", 1.0)


def test_a_budget_error_says_all_and_records_nothing(ledger, path):
    first = ledger.begin(["a"], {}, 0.2, "api", 1.0)
    ledger.finish(first, {}, 0.15, 1, 1)
    ledger.begin(["b"], {}, 0.4, "api", 1.0)
    with pytest.raises(BudgetError) as refused:
        ledger.begin(["c"], {}, 0.5, "api", 1.0)
    error = refused.value
    assert isinstance(error, LimbeckError)
    assert (error.spent_usd, error.reserved_usd, error.asked_usd) == (0.15, 0.4, 0.5)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    for said in ("api", "$0.15", "$0.4", "$0.5", "$1", "budget_usd"):
        assert said in str(error)
    assert ledger.totals("api").requests == 2
    with pytest.raises(BudgetError, match=r"price\.input"):
        ledger.begin(["d"], {}, None, "api", 1.0)
    ledger.begin(["c"], {}, 0.5, "another", 1.0)  # each account has its own
    ledger.begin(["c"], {}, 0.5, "api", None)


@settings(max_examples=25)
@given(
    st.lists(
        st.tuples(
            st.integers(1, 50),  # reserved
            st.none() | st.integers(0, 50),  # cost
            st.sampled_from(["finish", "fail", "leave"]),
        ),
        max_size=15,
    ),
    st.integers(1, 200),
)
def test_sums_are_those_of_a_simple_account(tmp_path_factory, requests, cap):
    """Whole numbers of a tenth of a cent, added in plain Python."""
    spent = reserved = 0
    with Ledger(tmp_path_factory.mktemp("sums") / "ledger.sqlite") as ledger:
        for worst, cost, end in requests:
            if spent + reserved + worst > cap:
                with pytest.raises(BudgetError):
                    ledger.begin(["k"], {}, worst / 1000, "api", cap / 1000)
                continue
            request = ledger.begin(["k"], {}, worst / 1000, "api", cap / 1000)
            usd = None if cost is None else min(cost, worst) / 1000
            if end == "finish":
                ledger.finish(request, {}, usd, None, None)
                spent += worst if cost is None else min(cost, worst)
            elif end == "fail":
                ledger.fail(request, "no", usd)
                spent += 0 if cost is None else min(cost, worst)
                reserved += worst if cost is None else 0
            else:
                reserved += worst
            totals = ledger.totals("api")
            assert totals.spent_usd == spent / 1000
            assert totals.reserved_usd == reserved / 1000
            assert spent + reserved <= cap


def test_a_cap_is_kept_to_the_last_nano_dollar(ledger):
    ledger.begin(["a"], {}, 0.3, "api", 0.3)
    with pytest.raises(BudgetError):
        ledger.begin(["b"], {}, 1e-9, "api", 0.3)
    ledger.begin(["b"], {}, 0.0, "api", 0.3)
    ledger.begin(["c"], {}, 1e-9, "api", 0.300000001)


def test_256_at_once_never_pass_the_cap(ledger):
    async def one(number):
        try:
            return await ledger.abegin([str(number)], {}, 0.01, "api", 1.0)
        except BudgetError:
            return None

    async def all_at_once():
        return await asyncio.gather(*map(one, range(256)))

    begun = [request for request in asyncio.run(all_at_once()) if request is not None]
    assert len(begun) == len(set(begun)) == 100
    assert ledger.totals("api").reserved_usd == 1.0


def test_coroutines_and_threads_share_the_ledger(ledger):
    async def one(number):
        request = await ledger.abegin([str(number)], {}, 0.1, "api", None)
        if number % 2:
            await ledger.afinish(request, {str(number): {"number": number}}, 0.05, 1, 2)
        else:
            await ledger.afail(request, "no", 0.0)

    async def some(numbers):
        await asyncio.gather(*map(one, numbers))

    threads = [
        threading.Thread(target=lambda start=start: asyncio.run(some(range(start, 200, 4))))
        for start in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    totals = ledger.totals("api")
    assert (totals.requests, totals.answers, totals.failures) == (200, 100, 100)
    assert (totals.spent_usd, totals.reserved_usd) == (5.0, 0.0)
    assert len(ledger.known([str(number) for number in range(200)])) == 100


def busy(ledger):
    """Holds the writing thread; call what is returned to let it go on."""
    began, go = threading.Event(), threading.Event()
    ledger._committer.submit(lambda _: began.set() or go.wait(30))
    assert began.wait(30)
    return go.set


@pytest.mark.parametrize("late", [False, True])
def test_a_cancelled_begin_holds_no_money(ledger, late):
    async def main():
        let_go = busy(ledger)
        task = asyncio.create_task(ledger.abegin(["a"], {}, 0.5, "api", 1.0))
        await asyncio.sleep(0)
        if late:
            let_go()
            ledger._submit(lambda _: None).result()  # the begin before it is on the disk
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        let_go()

    asyncio.run(main())
    ledger._submit(lambda _: None).result()
    ledger._submit(lambda _: None).result()  # the first may have come before the undoing
    totals = ledger.totals("api")
    assert (totals.reserved_usd, totals.spent_usd, totals.unknown_usd_count) == (0.0, 0.0, 0)


def test_a_cancelled_finish_is_recorded_all_the_same(ledger):
    request = ledger.begin(["a"], {}, 0.5, "api", 1.0)

    async def main():
        let_go = busy(ledger)
        task = asyncio.create_task(ledger.afinish(request, {"a": {"text": "paid"}}, 0.4, 1, 1))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        let_go()

    asyncio.run(main())
    ledger._submit(lambda _: None).result()
    assert ledger.known(["a"]) == {"a": {"text": "paid"}}


def test_a_request_ends_once(ledger):
    request = ledger.begin(["a"], {}, 1.0, "api", None)
    ledger.finish(request, {}, 0.5, 1, 1)
    before = ledger.totals("api")
    for end in (
        lambda: ledger.finish(request, {"a": {}}, 0.5, 1, 1),
        lambda: ledger.fail(request, "no", None),
        lambda: ledger.fail(request + 1, "no", None),
    ):
        with pytest.raises(LedgerError, match=r"once only|not in the ledger"):
            end()
    assert ledger.totals("api") == before
    assert ledger.known(["a"]) == {}


def test_closing_leaves_unknown_what_never_ended(path):
    with Ledger(path) as ledger:
        request = ledger.begin(["a"], {}, 1.0, "api", None)
        assert ledger.close_stale() == 0
    ledger.close()
    assert [file.name for file in path.parent.iterdir()] == ["ledger.sqlite"]
    with Ledger(path) as ledger:
        totals = ledger.totals("api")
        assert (totals.unknown, totals.reserved_usd) == (1, 1.0)
        ledger.fail(request, "was never sent", 0.0)
        totals = ledger.totals("api")
        assert (totals.unknown, totals.failures, totals.reserved_usd) == (0, 1, 0.0)
        assert totals.unknown_usd_count == 0


def test_two_ledgers_of_one_process_are_both_alive(path):
    with Ledger(path) as one:
        one.begin(["a"], {}, 1.0, "api", None)
        with Ledger(path) as other:
            assert other.close_stale() == 0
        assert one.close_stale() == 0
        assert one.totals("api").unknown == 0


@pytest.mark.parametrize("what", ["folder", "file"])
def test_one_file_by_two_spellings_is_one_ledger(tmp_path, what):
    """A link to it, or to its folder: its requests are alive, and its lock stays."""
    real, link = tmp_path / "real", tmp_path / "link"
    real.mkdir()
    if what == "folder":
        link.symlink_to(real)
        other = link / "ledger.sqlite"
    else:
        link.mkdir()
        other = link / "another.sqlite"
        other.symlink_to(real / "ledger.sqlite")
    with Ledger(real / "ledger.sqlite") as one, Ledger(other) as two:
        request = one.begin(["a"], {}, 1.0, "api", None)
        assert two.close_stale() == 0
        assert one.close_stale() == 0
        assert one.totals("api").unknown == 0
        assert len(list(real.glob("*.owner"))) == 2
        one.finish(request, {"a": {"text": "yes"}}, 0.5, 1, 1)
        assert two.known(["a"])


def test_what_was_asked_can_be_read(ledger, path):
    request = ledger.begin(["a", "b"], {"messages": ["caf\u00e9"]}, 0.25, "api", None)
    ledger.fail(request, "429 three times", 0.0)
    with closing(sqlite3.connect(path)) as database:
        row = database.execute(
            "SELECT state, keys, request, reason, reserved_nanousd, begun <= ended FROM requests"
        ).fetchone()
    assert row[0] == "failed"
    assert json.loads(row[1]) == ["a", "b"]
    assert row[2] == '{"messages":["caf\u00e9"]}'
    assert row[3:] == ("429 three times", 250_000_000, 1)


def test_a_file_that_is_no_ledger_is_left_as_it_is(tmp_path):
    text = tmp_path / "text"
    text.write_text("these are not the bytes you are looking for\n" * 200)
    other = tmp_path / "other.sqlite"
    with closing(sqlite3.connect(other)) as database:
        database.execute("CREATE TABLE accounts (name)")
    later = tmp_path / "later.sqlite"
    with Ledger(later):
        pass
    with closing(sqlite3.connect(later)) as database:
        database.execute("PRAGMA user_version = 99")
    for file, said in (
        (text, "not a ledger"),
        (other, "another program"),
        (later, "later limbeck"),
        (tmp_path, "cannot be opened"),
    ):
        before = file.read_bytes() if file.is_file() else b""
        with pytest.raises(LedgerError, match=said) as wrong, Ledger(file):
            pass
        assert isinstance(wrong.value, OSError)
        assert str(file) in str(wrong.value)
        assert not file.is_file() or file.read_bytes() == before


def test_a_damaged_ledger_is_found_when_it_is_opened(path):
    with Ledger(path) as ledger:
        keys = [str(number) for number in range(400)]
        request = ledger.begin(keys, {}, 1.0, "api", None)
        ledger.finish(request, {key: {"text": "x" * 400} for key in keys}, 1.0, 1, 1)
    whole = path.read_bytes()
    for page in (2, 3, len(whole) // 4096 // 2):
        path.write_bytes(whole[: page * 4096] + b"\xa5" * 4096 + whole[page * 4096 + 4096 :])
        with pytest.raises(LedgerError, match=r"damaged.*\.recover"), Ledger(path):
            pass
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(LedgerError, match="damaged"), Ledger(path):
        pass


def test_a_damaged_answer_says_how_to_get_it_again(ledger, path):
    request = ledger.begin(["a"], {}, None, "api", None)
    ledger.finish(request, {"a": {"text": "yes"}}, None, None, None)
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("UPDATE answers SET answer = substr(answer, 4)")
    with pytest.raises(LedgerError, match="answer a is damaged.*delete its row"):
        ledger.known(["a"])


def test_another_programs_transaction_is_waited_for_and_then_named(path, monkeypatch):
    monkeypatch.setattr("limbeck.ledger.database.BUSY_SECONDS", 0.05)
    with Ledger(path) as ledger, closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(LedgerError, match="another process has held the ledger"):
            ledger.begin(["a"], {}, None, "api", None)
        assert ledger.known(["a"]) == {}  # reading does not wait
        other.execute("ROLLBACK")
        ledger.begin(["a"], {}, None, "api", None)


def test_it_is_used_while_it_is_open_and_where_it_was_opened(path, monkeypatch):
    ledger = Ledger(path)
    with pytest.raises(LedgerError, match="with Ledger"):
        ledger.known(["a"])
    with ledger:
        monkeypatch.setattr(os, "getpid", lambda: -1)
        with pytest.raises(LedgerError, match="another process"):
            ledger.begin(["a"], {}, None, "api", None)
        monkeypatch.undo()
    with pytest.raises(LedgerError, match="not open"):
        ledger.totals("api")


def test_wrong_amounts_are_refused_before_anything_is_written(ledger):
    for reserve in (-1.0, math.nan):
        with pytest.raises(ValueError, match="amount"):
            ledger.begin(["a"], {}, reserve, "api", None)
    assert ledger.totals("api") == Totals()
