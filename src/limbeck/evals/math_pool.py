"""Processes that compare mathematics, each of which is killed where it takes too long.

A text can hold sums that never end, and no thread can be stopped from outside. So every comparison
is made by a process, which is used again and again, and replaced where it had to be killed.
"""

import atexit
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from limbeck.core.errors import RecipeError
from limbeck.evals.child import bare_environment

SECONDS = 5.0
"""How long a comparison may take."""

START_SECONDS = 120.0
"""How long a process may take to start; it loads SymPy."""

PROCESSES = min(4, os.cpu_count() or 1)

Reply = dict[str, str]


class Worker:
    """A process that answers one question at a time."""

    def __init__(self) -> None:
        self.alive = True
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__).with_name("math_worker.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
            env=bare_environment(),
        )
        first, _ = self._reply("", START_SECONDS)
        if first is None or "missing" in first:
            self.close()
            raise RecipeError("match", "math needs math-verify: pip install 'limbeck[synth]'")

    def ask(self, gold: str, text: str, seconds: float) -> Reply:
        """What it finds; that the time is up, or that the process broke down, is a reply too."""
        question = {"gold": gold, "text": text, "seconds": seconds}
        reply, late = self._reply(json.dumps(question) + "\n", seconds)
        if reply is not None:
            return reply
        reason = f"comparing it took more than {seconds:g} s" if late else "comparing it broke down"
        return {"verdict": "unclear", "reason": reason}

    def close(self) -> None:
        """End the process."""
        self.alive = False
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(OSError):  # what was not sent is lost
                    pipe.close()

    def _reply(self, line: str, seconds: float) -> tuple[Any, bool]:
        """The next line, and whether the time was up; a process that gave none is ended."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        late = threading.Event()

        def stop() -> None:
            late.set()
            self._process.kill()

        timer = threading.Timer(seconds, stop)
        timer.daemon = True
        timer.start()
        try:
            stdin.write(line)
            stdin.flush()
            reply = json.loads(stdout.readline())
        except (OSError, ValueError):
            reply = None
        finally:
            timer.cancel()
            timer.join()  # else it could kill the process in the middle of the next question
        if reply is None or late.is_set():
            self.close()
        return reply, late.is_set()


class MathPool:
    """A few workers, started when they are needed. Several threads may share it, and its limit."""

    def __init__(self, processes: int = PROCESSES) -> None:
        self.processes = processes
        self._idle: list[Worker] = []
        self._lock = threading.Lock()
        self._room = threading.BoundedSemaphore(processes)

    def check_all(self, pairs: Sequence[tuple[str, str]], seconds: float = SECONDS) -> list[Reply]:
        """For each pair of a known answer and a text what `math_worker` finds, in order.

        Raises:
            RecipeError: math-verify is not installed.
        """

        def check(pair: tuple[str, str]) -> Reply:
            with self._room, self._worker() as worker:
                return worker.ask(*pair, seconds)

        distinct = list(dict.fromkeys(pairs))
        count = min(self.processes, len(distinct))
        if count < 2:
            known = dict(zip(distinct, map(check, distinct), strict=True))
        else:
            with ThreadPoolExecutor(count) as threads:
                known = dict(zip(distinct, threads.map(check, distinct), strict=True))
        return [known[pair] for pair in pairs]

    def close(self) -> None:
        """End all workers; new ones are started where the pool is used again."""
        with self._lock:
            idle, self._idle = self._idle, []
        for worker in idle:
            worker.close()

    @contextmanager
    def _worker(self) -> Iterator[Worker]:
        with self._lock:
            worker = self._idle.pop() if self._idle else None
        worker = worker or Worker()
        try:
            yield worker
        except BaseException:
            worker.close()  # it may still be at work on a question that nobody waits for
            raise
        if worker.alive:
            with self._lock:
                self._idle.append(worker)


_pools: dict[int, MathPool] = {}


def pool() -> MathPool:
    """The pool of this process; a forked one gets its own, as it cannot share the pipes."""
    own = os.getpid()
    if own not in _pools:
        _pools.clear()
        _pools[own] = MathPool()
        atexit.register(_pools[own].close)
    return _pools[own]
