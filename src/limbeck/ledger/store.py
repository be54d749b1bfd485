"""The ledger: what was asked, what was answered and what it cost, durable before it is used."""

import asyncio
import json
import os
import sqlite3
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

from limbeck.core.errors import LedgerError
from limbeck.ledger.commits import Committer, Work
from limbeck.ledger.database import connect, open_ledger, plainly
from limbeck.ledger.money import from_nano, nano_down, nano_up
from limbeck.ledger.owners import Owner, alive, sweep
from limbeck.ledger.records import begin, end_open, fail, finish

LOOK_UP = 500
"""Keys in one query; SQLite takes some thousands."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """What an account has asked for so far, over all processes and runs that share the ledger.

    Attributes:
        requests: that were begun.
        answers: that were recorded, each counted once.
        failures: requests that ended without an answer.
        unknown: requests of processes that died, or closed the ledger, before they ended.
        prompt_tokens, completion_tokens: as far as they are known.
        spent_usd: what requests cost. One that was answered at a cost nobody knows counts with its
            worst case.
        reserved_usd: the worst case of requests that are under way, and of those that failed or
            ended unknown at a cost nobody knows: they may have been billed.
        unknown_usd_count: requests that ended without a known cost.
    """

    requests: int = 0
    answers: int = 0
    failures: int = 0
    unknown: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    spent_usd: float = 0.0
    reserved_usd: float = 0.0
    unknown_usd_count: int = 0


class Ledger:
    """A file of requests and answers. One process or several may have it open.

    `begin` before a request is sent, `finish` or `fail` when it has ended. Each returns when its
    record is on the disk. The forms `abegin`, `afinish` and `afail` are for coroutines; all forms
    share one writing thread, and records that wait at the same time are committed together.

    Args:
        path: the file; it is made where there is none.

    Example:
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> with folder as name, Ledger(Path(name) / "ledger.sqlite") as ledger:
        ...     request = ledger.begin(["k1"], {"messages": []}, 0.02, "api", cap_usd=1.0)
        ...     ledger.finish(request, {"k1": {"text": "yes"}}, 0.001, 12, 1)
        ...     ledger.known(["k1", "k2"]), ledger.totals("api").spent_usd
        ({'k1': {'text': 'yes'}}, 0.001)
    """

    def __init__(self, path: Path) -> None:
        # One file has one name: those who have it open find each other by it.
        self.path = Path(os.path.realpath(path))
        self._committer: Committer | None = None

    def __enter__(self) -> Self:
        self._process = os.getpid()
        writing = open_ledger(self.path)
        try:
            with plainly(self.path):
                self._reading = connect(self.path)
                self._owner = Owner(self.path)
        except BaseException:
            writing.close()
            raise
        self._reading_lock = threading.Lock()
        self._committer = Committer(writing, self.path)
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Record what is still under way as unknown, and close the file; twice does no harm."""
        if self._committer is None:
            return
        committer, self._committer = self._committer, None
        try:
            own, reason = [self._owner.name], "the ledger was closed before it ended"
            committer.submit(lambda database: end_open(database, own, reason)).result()
        finally:
            committer.close()
            self._reading.close()
            self._owner.release()

    def known(self, keys: Sequence[str]) -> dict[str, Mapping[str, Any]]:
        """The recorded answers among these keys.

        Raises:
            LedgerError: the file is damaged.
        """
        self._open_here()
        found: dict[str, Mapping[str, Any]] = {}
        with plainly(self.path), self._reading_lock:
            for start in range(0, len(keys), LOOK_UP):
                some = keys[start : start + LOOK_UP]
                marks = ",".join("?" * len(some))
                query = f"SELECT key, answer FROM answers WHERE key IN ({marks})"
                for key, answer in self._reading.execute(query, tuple(some)):
                    found[key] = self._parsed(key, answer)
        return found

    def begin(
        self,
        keys: Sequence[str],
        request: Mapping[str, Any],
        reserve_usd: float | None,
        account: str,
        cap_usd: float | None,
    ) -> int:
        """Record that these answers are about to be asked for, and reserve their worst case.

        Args:
            keys: of the answers.
            request: what is sent, without any secret.
            reserve_usd: the most that it can cost; None where no price is known.
            account: on which it is counted.
            cap_usd: the most that spent and reserved may be together; None for no cap.

        Returns:
            The request's number, for `finish` or `fail`.

        Raises:
            BudgetError: spent + reserved + reserve_usd > cap_usd, or there is a cap and no price;
                nothing was recorded. Exact, whatever other callers and processes do.
            LedgerError: it could not be recorded, so it must not be sent.
        """
        future = self._submit(self._begin(keys, request, reserve_usd, account, cap_usd))
        try:
            return future.result()
        except BaseException:
            future.add_done_callback(self._never_sent)
            raise

    async def abegin(
        self,
        keys: Sequence[str],
        request: Mapping[str, Any],
        reserve_usd: float | None,
        account: str,
        cap_usd: float | None,
    ) -> int:
        """`begin` for coroutines. If it is cancelled, the request counts as never sent."""
        waiter = asyncio.get_running_loop().create_future()
        future = self._submit(self._begin(keys, request, reserve_usd, account, cap_usd), waiter)
        try:
            await waiter
            return future.result()
        except BaseException:
            future.add_done_callback(self._never_sent)
            raise

    def finish(
        self,
        id: int,
        answers: Mapping[str, Mapping[str, Any]],
        usd: float | None,
        prompt_tokens: int | None,
        completion_tokens: int | None,
    ) -> None:
        """Record answers, and what they truly cost instead of what was reserved.

        A key that has an answer keeps it. A request that was taken for dead may still be finished.

        Args:
            id: from `begin`.
            answers: by key.
            usd: their cost; None where it is not known: then the reservation counts as spent.
            prompt_tokens, completion_tokens: as the server counted them.

        Raises:
            LedgerError: there is no such request under way, or it could not be recorded.
        """
        self._submit(self._finish(id, answers, usd, prompt_tokens, completion_tokens)).result()

    async def afinish(
        self,
        id: int,
        answers: Mapping[str, Mapping[str, Any]],
        usd: float | None,
        prompt_tokens: int | None,
        completion_tokens: int | None,
    ) -> None:
        """`finish` for coroutines. If it is cancelled, the answers are recorded all the same."""
        await self._done(self._finish(id, answers, usd, prompt_tokens, completion_tokens))

    def fail(self, id: int, reason: str, usd: float | None) -> None:
        """Record that there is no answer.

        Args:
            id: from `begin`.
            reason: why, without any secret.
            usd: what it cost: 0.0 where surely nothing was billed; None where nobody knows: then
                the reservation stays.

        Raises:
            LedgerError: there is no such request under way, or it could not be recorded.
        """
        self._submit(self._fail(id, reason, usd)).result()

    async def afail(self, id: int, reason: str, usd: float | None) -> None:
        """`fail` for coroutines. If it is cancelled, the failure is recorded all the same."""
        await self._done(self._fail(id, reason, usd))

    def close_stale(self) -> int:
        """Record requests of dead processes as unknown; their reservations stay.

        Returns:
            How many there were.
        """

        def work(database: sqlite3.Connection) -> int:
            owners = database.execute("SELECT DISTINCT owner FROM requests WHERE state = 'open'")
            dead = [name for (name,) in owners.fetchall() if not alive(self.path, name)]
            return end_open(database, dead, "its process died before it ended")

        count = self._submit(work).result()
        sweep(self.path)
        return count

    def totals(self, account: str) -> Totals:
        """What the account has asked for; zeros where it is not known."""
        self._open_here()
        with plainly(self.path), self._reading_lock:
            row = self._reading.execute(
                "SELECT requests, answers, failures, unknown, prompt_tokens, completion_tokens,"
                " spent_nanousd, reserved_nanousd, unknown_usd_count FROM accounts WHERE name = ?",
                (account,),
            ).fetchone()
        if row is None:
            return Totals()
        return Totals(
            requests=row[0],
            answers=row[1],
            failures=row[2],
            unknown=row[3],
            prompt_tokens=row[4],
            completion_tokens=row[5],
            spent_usd=from_nano(row[6]),
            reserved_usd=from_nano(row[7]),
            unknown_usd_count=row[8],
        )

    def _begin(
        self,
        keys: Sequence[str],
        request: Mapping[str, Any],
        reserve_usd: float | None,
        account: str,
        cap_usd: float | None,
    ) -> Work:
        self._open_here()
        return partial(
            begin,
            owner=self._owner.name,
            account=account,
            keys=json.dumps(list(keys)),
            request=_json(request),
            reserve=None if reserve_usd is None else nano_up(reserve_usd),
            cap=None if cap_usd is None else nano_down(cap_usd),
        )

    def _finish(
        self,
        id: int,
        answers: Mapping[str, Mapping[str, Any]],
        usd: float | None,
        prompt_tokens: int | None,
        completion_tokens: int | None,
    ) -> Work:
        texts = {key: _json(answer) for key, answer in answers.items()}
        nano = None if usd is None else nano_up(usd)
        return lambda database: finish(database, id, texts, nano, prompt_tokens, completion_tokens)

    def _fail(self, id: int, reason: str, usd: float | None) -> Work:
        nano = None if usd is None else nano_up(usd)
        return lambda database: fail(database, id, reason, nano)

    def _never_sent(self, begun: "Future[int]") -> None:
        """Undo a `begin` whose caller was cancelled, so that it does not hold its reservation."""
        if begun.cancelled() or begun.exception() is not None:
            return
        with suppress(LedgerError):  # closed by now: then it is recorded as unknown
            self._submit(self._fail(begun.result(), "cancelled before it was sent", 0.0))

    async def _done(self, work: Work) -> None:
        """Have it done, also where the coroutine that waits for it is cancelled."""
        waiter = asyncio.get_running_loop().create_future()
        future = self._submit(work, waiter)
        await waiter
        future.result()

    def _submit(self, work: Work, waiter: "asyncio.Future[None] | None" = None) -> "Future[Any]":
        return self._open_here().submit(work, waiter)

    def _open_here(self) -> Committer:
        if self._committer is None:
            raise LedgerError(f"{self.path}: the ledger is not open; use `with Ledger(path)`")
        if self._process != os.getpid():  # neither SQLite nor threads survive a fork
            raise LedgerError(f"{self.path}: was opened by another process; open it in this one")
        return self._committer

    def _parsed(self, key: str, answer: str) -> Mapping[str, Any]:
        try:
            return json.loads(answer)
        except ValueError as error:
            raise LedgerError(
                f"{self.path}: the answer {key} is damaged ({error}); delete its row from the table"
                " `answers` and start again, and it will be asked for again"
            ) from error


def _json(value: Mapping[str, Any]) -> str:
    """Readable JSON. NaN may stand in it: an answer that was paid for is kept as it came."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair, for which UTF-8 has no bytes
        return json.dumps(value, separators=(",", ":"))
    return text
