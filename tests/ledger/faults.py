"""Kill a program that uses a ledger, wherever it can be killed, and look at what is left.

    python faults.py statements FOLDER       die before and after every statement that SQLite runs
    python faults.py random FOLDER COUNT     die at random moments, with 32 requests in flight
    python faults.py cap LEDGER COUNT CAP    two processes begin COUNT requests of 1 dollar each
    python faults.py hold LEDGER             begin one request, say so, and wait to be killed
    python faults.py full LEDGER             record until the disk is full
    python faults.py memory LEDGER COUNT     print the resident memory after a fifth of the records
                                             and after all of them

Imports are paid once: each attempt is a fork. Attempts say on a pipe what they
were told is durable.
"""

import asyncio
import json
import os
import random
import signal
import sqlite3
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

from limbeck.core.errors import BudgetError, LedgerError
from limbeck.ledger import database as opening
from limbeck.ledger.store import Ledger

REQUESTS = 7
RESERVE = 10  # nano-dollars, as all amounts here
COST = 4

Say = Callable[[str], None]


class Dying(sqlite3.Connection):
    """Kills the process at one of its statements, counted over all connections."""

    point = 0
    target = 0

    def execute(self, *arguments):
        Dying._step()
        result = super().execute(*arguments)
        Dying._step()
        return result

    @staticmethod
    def _step():
        Dying.point += 1
        if Dying.point == Dying.target:
            os.kill(os.getpid(), signal.SIGKILL)


def keys_of(number: int) -> list[str]:
    return [f"{number}/{index}" for index in range(1 + number % 2)]


def answers_of(number: int) -> dict[str, dict[str, str]]:
    return {key: {"text": f"answer {key}"} for key in keys_of(number)}


def workload(ledger: Ledger, say: Say) -> None:
    """Each way in which a request can end, one after the other; says what is durable."""
    for number in range(REQUESTS):
        if len(ledger.known(keys_of(number))) == len(keys_of(number)):
            continue
        request = ledger.begin(keys_of(number), {"number": number}, RESERVE / 1e9, "api", 1.0)
        say(f"begun {number} {request}")
        if number % 4 == 0:
            ledger.finish(request, answers_of(number), COST / 1e9, 5, 6)
        elif number % 4 == 1:
            ledger.finish(request, answers_of(number), None, None, None)
        elif number % 4 == 2:
            ledger.fail(request, "refused", 0.0)
        else:
            ledger.fail(request, "timed out", None)
        say(f"ended {number} {request}")


def expected(said: list[str]) -> tuple[int, int]:
    """(spent, reserved) that follow from what was said, reckoned without the ledger's code."""
    spent = reserved = 0
    for line in said:
        what, number = line.split()[0], int(line.split()[1])
        if what == "begun":
            reserved += RESERVE
        elif number % 4 != 3:
            reserved -= RESERVE
            spent += (COST, RESERVE, 0)[number % 4]
    return spent, reserved


def sums_agree(path: Path) -> tuple[int, int]:
    """The account's sums are those of its requests and answers; gives (spent, reserved)."""
    with closing(sqlite3.connect(path)) as database:
        requests = database.execute(
            "SELECT state, reserved_nanousd, usd_nanousd, prompt_tokens, completion_tokens"
            " FROM requests"
        ).fetchall()
        answers = database.execute("SELECT count(*) FROM answers").fetchone()[0]
        sums = database.execute(
            "SELECT requests, answers, failures, unknown, prompt_tokens, completion_tokens,"
            " spent_nanousd, reserved_nanousd, unknown_usd_count FROM accounts"
        ).fetchall()
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    spent = reserved = unpriced = 0
    for state, held, usd, _, _ in requests:
        if state == "answered":
            spent += held if usd is None else usd
        elif state == "failed" and usd is not None:
            spent += usd
        else:
            reserved += held
        unpriced += state != "open" and usd is None
    states = [row[0] for row in requests]
    wanted = (
        len(requests),
        answers,
        states.count("failed"),
        states.count("unknown"),
        sum(row[3] or 0 for row in requests),
        sum(row[4] or 0 for row in requests),
        spent,
        reserved,
        unpriced,
    )
    assert sums == ([wanted] if requests else []), (sums, wanted)
    return spent, reserved


def fork(work: Callable[[Say], None]) -> tuple[int, int]:
    """Run it in a child; gives the child and the end of the pipe on which it says things."""
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        return child, reading
    os.close(reading)
    try:
        work(lambda line: void(os.write(writing, (line + "\n").encode())))
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def void(_: object) -> None:
    """Nothing, whatever it is given."""


def heard(child: int, reading: int) -> tuple[int, list[str]]:
    """Wait for the child; its status and the lines that it said."""
    with os.fdopen(reading) as pipe:
        lines = pipe.read().splitlines()
    return os.waitpid(child, 0)[1], lines


def durable(path: Path, said: list[str]) -> None:
    """All that was said is in the file."""
    with closing(sqlite3.connect(path)) as database:
        for line in said:
            what, number, request = line.split()
            state = database.execute(
                "SELECT state FROM requests WHERE id = ?", (int(request),)
            ).fetchone()
            assert state is not None, line
            if what == "ended":
                answered = int(number) % 4 < 2
                assert state[0] == ("answered" if answered else "failed"), (line, state)
                for key, answer in answers_of(int(number)).items() if answered else ():
                    kept = database.execute("SELECT answer FROM answers WHERE key = ?", (key,))
                    assert json.loads(kept.fetchone()[0]) == answer, line


def run_statement(path: Path, target: int) -> tuple[int, list[str]]:
    def work(say: Say) -> None:
        Dying.point, Dying.target = 0, target
        real = sqlite3.connect
        opening.sqlite3.connect = lambda *args, **kwargs: real(*args, factory=Dying, **kwargs)
        with Ledger(path) as ledger:
            workload(ledger, say)

    return heard(*fork(work))


def statements(folder: Path) -> Iterator[str]:
    for target in range(1, 10_000):
        path = folder / f"{target}.sqlite"
        status, said = run_statement(path, target)
        if status == 0:
            yield f"done after {target - 1} points"
            return
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
        with Ledger(path) as ledger:  # what a program that starts again does first
            durable(path, said)
            before = sums_agree(path)
            # At most one step was under way: it was recorded as a whole, or not at all.
            last = int(said[-1].split()[1]) if said else -1
            begun = bool(said) and said[-1].startswith("begun")
            step = f"ended {last} 0" if begun else f"begun {last + 1} 0"
            allowed = [expected(said)]
            if begun or last + 1 < REQUESTS:
                allowed.append(expected([*said, step]))
            assert before in allowed, (target, said, before)
            stale = ledger.close_stale()
            assert stale <= 1
            assert sums_agree(path) == before, "an unknown outcome changed what is counted"
            again: list[str] = []
            workload(ledger, again.append)
            asked = {line.split()[1] for line in again}
            answered = {line.split()[1] for line in said if line.startswith("ended")}
            known = {number for number in answered if int(number) % 4 < 2}
            assert not asked & known, "a known answer was asked for again"
            assert not ledger.close_stale()
        sums_agree(path)
        assert not list(folder.glob(f"{target}.sqlite-*")), "something was left behind"


async def busily(ledger: Ledger, say: Say) -> None:
    async def one(start: int) -> None:
        for number in range(start, 100_000, 32):
            request = await ledger.abegin(keys_of(number), {}, RESERVE / 1e9, "api", 1.0)
            say(f"begun {number} {request}")
            if number % 4 < 2:
                usd = COST / 1e9 if number % 4 == 0 else None
                await ledger.afinish(request, answers_of(number), usd, 1, 1)
            else:
                await ledger.afail(request, "no", 0.0 if number % 4 == 2 else None)
            say(f"ended {number} {request}")

    await asyncio.gather(*map(one, range(32)))


def at_random(folder: Path, count: int) -> Iterator[str]:
    """Each attempt goes on with the same file, so it also holds what earlier ones left."""
    draws, path, all_said = random.Random(0), folder / "random.sqlite", []

    def work(say: Say) -> None:
        with Ledger(path) as ledger:
            ledger.close_stale()
            asyncio.run(busily(ledger, say))

    for _ in range(count):
        child, reading = fork(work)
        time.sleep(draws.uniform(0.02, 0.25))
        os.kill(child, signal.SIGKILL)
        all_said += heard(child, reading)[1]
        before = sums_agree(path) if path.exists() else None
        durable(path, all_said)
        with Ledger(path) as ledger:
            stale = ledger.close_stale()
            assert stale <= 32, stale
            assert sums_agree(path) == before
    yield f"done, {len(all_said)} records"


def cap(path: Path, count: int, most: int) -> Iterator[str]:
    """Prints how many requests were begun, which must be as many dollars as the cap has."""

    def work(say: Say) -> None:
        with Ledger(path) as ledger:
            for number in range(count):
                try:
                    request = ledger.begin([str(number)], {}, 1.0, "api", float(most))
                except BudgetError:
                    say("refused")
                    continue
                totals = ledger.totals("api")
                assert totals.spent_usd + totals.reserved_usd <= most
                if number % 2:
                    ledger.finish(request, {}, 1.0, None, None)
                say("begun")

    children = [fork(work) for _ in range(2)]
    results = [heard(*child) for child in children]
    assert [status for status, _ in results] == [0, 0]
    assert all("begun" in said for _, said in results), "one of them never came to its turn"
    yield str(sum(said.count("begun") for _, said in results))


def hold(path: Path) -> Iterator[str]:
    with Ledger(path) as ledger:
        yield str(ledger.begin(["held"], {}, 1.0, "api", None))
        signal.pause()


def full(path: Path) -> Iterator[str]:
    """Prints what was acknowledged, then the error, and whether all of it is still there."""
    said: list[str] = []
    with Ledger(path) as ledger:
        try:
            for number in range(0, 100_000, 4):
                request = ledger.begin(keys_of(number), {"text": "x" * 3000}, 1e-8, "api", None)
                said.append(f"begun {number} {request}")
                ledger.finish(request, answers_of(number), COST / 1e9, 1, 1)
                said.append(f"ended {number} {request}")
        except LedgerError as error:
            yield f"{error}"
        durable(path, said)
    sums_agree(path)
    yield f"kept {len(said)}"


def memory(path: Path, count: int) -> Iterator[str]:
    def resident() -> str:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return str(pages * os.sysconf("SC_PAGE_SIZE"))

    async def records(ledger: Ledger, numbers: range) -> None:
        async def one(number: int) -> None:
            request = await ledger.abegin([str(number)], {"text": "x" * 500}, 1e-9, "api", 1.0)
            answer = {str(number): {"text": "y" * 500}}
            await ledger.afinish(request, answer, 1e-9, 1, 1)

        for start in range(numbers.start, numbers.stop, 250):
            await asyncio.gather(*map(one, range(start, min(start + 250, numbers.stop))))

    with Ledger(path) as ledger:
        asyncio.run(records(ledger, range(count // 5)))
        yield resident()
        asyncio.run(records(ledger, range(count // 5, count)))
        yield resident()


def main() -> None:
    mode, path, numbers = sys.argv[1], Path(sys.argv[2]), map(int, sys.argv[3:])
    modes = {
        "statements": statements,
        "random": at_random,
        "cap": cap,
        "hold": hold,
        "full": full,
        "memory": memory,
    }
    for line in modes[mode](path, *numbers):
        print(line, flush=True)


if __name__ == "__main__":
    main()
