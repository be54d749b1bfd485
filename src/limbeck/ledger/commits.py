"""Group commit: one thread writes, and everything that waits goes to the disk with one sync.

A sync takes milliseconds, however much it writes. With one for each record, 256 requests in flight
would wait for each other; here those that come while a commit is under way share the next.
"""

import asyncio
import sqlite3
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from limbeck.core.errors import LedgerError, LimbeckError
from limbeck.ledger.database import plainly, roll_back

Work = Callable[[sqlite3.Connection], Any]
"""Reads and writes within a transaction. It raises a `LimbeckError` only before it has written, so
that it can be refused without undoing what others wrote in the same transaction."""

LARGEST = 1024
"""Records in one commit, which bounds how long the first of them waits."""


@dataclass(frozen=True, slots=True)
class _Job:
    work: Work
    future: "Future[Any]"
    waiter: "asyncio.Future[None] | None"


class Committer:
    """Runs work in transactions, in the order in which it came.

    Args:
        database: a connection that nobody else uses from now on.
        path: its file, for errors.
    """

    def __init__(self, database: sqlite3.Connection, path: Path) -> None:
        self._database, self._path = database, path
        self._queue: SimpleQueue[_Job | None] = SimpleQueue()
        self._closing = threading.Lock()
        self._closed = False
        # A daemon: whoever forgets to close must still be able to end. All that was acknowledged
        # is on the disk by then.
        self._thread = threading.Thread(target=self._serve, name="limbeck-ledger", daemon=True)
        self._thread.start()

    def submit(self, work: Work, waiter: "asyncio.Future[None] | None" = None) -> "Future[Any]":
        """Have it done; the future has its value when the commit is on the disk.

        Args:
            work: what to do.
            waiter: done in its own loop when the future is.

        Raises:
            LedgerError: the committer is closed.
        """
        future: Future[Any] = Future()
        with self._closing:  # or a job could come behind the end of the queue and wait for ever
            if self._closed:
                raise LedgerError(f"{self._path}: the ledger is closed")
            self._queue.put(_Job(work, future, waiter))
        return future

    def close(self) -> None:
        """Finish what waits, end the thread, and close the connection."""
        with self._closing:
            if self._closed:
                return
            self._closed = True
            self._queue.put(None)
        self._thread.join()
        self._database.close()

    def _serve(self) -> None:
        while True:
            jobs, more = self._waiting()
            jobs = [job for job in jobs if job.future.set_running_or_notify_cancel()]
            if jobs:
                self._commit(jobs)
                _wake([job.waiter for job in jobs if job.waiter is not None])
            del jobs  # or the last answers would be kept until the next come
            if not more:
                return

    def _waiting(self) -> tuple[list[_Job], bool]:
        """All jobs that wait, at least one; and whether more may come."""
        jobs: list[_Job] = []
        job = self._queue.get()
        while job is not None:
            jobs.append(job)
            if len(jobs) == LARGEST:
                return jobs, True
            try:
                job = self._queue.get_nowait()
            except Empty:
                return jobs, True
        return jobs, False

    def _commit(self, jobs: list[_Job]) -> None:
        try:
            with plainly(self._path):
                # Immediate: what is read in it, such as a budget, cannot change before its end.
                self._database.execute("BEGIN IMMEDIATE")
        except Exception as error:  # none of them is at fault, and to wait again would help none
            for job in jobs:
                job.future.set_exception(error)
            return
        try:
            with plainly(self._path):
                outcomes = self._transaction(jobs)
        except Exception as error:
            if len(jobs) == 1:
                jobs[0].future.set_exception(error)
                return
            for job in jobs:  # one of them is at fault, or the disk: each is told what holds for it
                self._commit([job])
            return
        for job, (value, error) in zip(jobs, outcomes, strict=True):
            if error is None:
                job.future.set_result(value)
            else:
                job.future.set_exception(error)

    def _transaction(self, jobs: list[_Job]) -> list[tuple[Any, LimbeckError | None]]:
        """Do all of them and commit, or undo all; for each its value, or why it was refused."""
        outcomes: list[tuple[Any, LimbeckError | None]] = []
        try:
            for job in jobs:
                try:
                    outcomes.append((job.work(self._database), None))
                except LimbeckError as refused:
                    outcomes.append((None, refused))
            self._database.execute("COMMIT")
        except BaseException:
            with suppress(sqlite3.Error):
                roll_back(self._database)
            raise
        return outcomes


def _wake(waiters: "Sequence[asyncio.Future[None]]") -> None:
    """Let coroutines go on: once for all of them, since each call interrupts their loop."""
    for loop in {waiter.get_loop() for waiter in waiters}:
        own = [waiter for waiter in waiters if waiter.get_loop() is loop]
        with suppress(RuntimeError):  # it is closed
            loop.call_soon_threadsafe(_go_on, own)


def _go_on(waiters: "Sequence[asyncio.Future[None]]") -> None:
    for waiter in waiters:
        if not waiter.done():
            waiter.set_result(None)
