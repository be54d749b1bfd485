"""How many requests a second the ledger records, by how many callers wait at the same time.

Each caller begins a request (durably), finishes it with one answer (durably), and goes on with the
next: two records a request. Beside it stands what the disk allows: commits of SQLite alone, one row
each, with the same settings.

    python benchmarks/ledger.py [--seconds 5] [--folder DIR] [--quick]

`--folder` is where the file is made: the disk decides. `processor` is the part of one core that was
used, `resident` the growth of the process's memory while the row was measured.
"""

import argparse
import asyncio
import os
import sqlite3
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from table import markdown

from limbeck.ledger.keys import answer_key
from limbeck.ledger.store import Ledger

CALLERS = (1, 16, 64, 256)
PROMPT = {"messages": [{"role": "user", "content": "word " * 200}], "temperature": 1.0}
ANSWER = {"text": "word " * 200, "finish": "stop", "completion_tokens": 200}


def bare_commits(folder: Path, seconds: float) -> float:
    """Commits a second of SQLite alone, in WAL mode with every commit synced."""
    database = sqlite3.connect(folder / "bare.sqlite", isolation_level=None)
    database.execute("PRAGMA journal_mode = WAL")
    database.execute("PRAGMA synchronous = FULL")
    database.execute("CREATE TABLE bare (value)")
    commits, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        database.execute("INSERT INTO bare VALUES (1)")
        commits += 1
    rate = commits / (time.perf_counter() - start)
    database.close()
    return rate


def requests(ledger: Ledger, callers: int, seconds: float) -> int:
    """Requests that so many callers begin and finish in the time."""
    end = time.perf_counter() + seconds

    async def one(caller: int) -> int:
        done = 0
        while time.perf_counter() < end:
            key = answer_key("http://host/v1", f"{callers}/{caller}", PROMPT, done)
            ledger.known([key])
            request = await ledger.abegin([key], PROMPT, 1e-4, "bench", 1e6)
            await ledger.afinish(request, {key: ANSWER}, 5e-5, 250, 200)
            done += 1
        return done

    async def all_of_them() -> list[int]:
        return await asyncio.gather(*map(one, range(callers)))

    return sum(asyncio.run(all_of_them()))


def measured(work: Callable[[], int]) -> tuple[float, float, float]:
    """(requests a second, part of a core, megabytes that the memory grew)."""
    before, used, start = resident_bytes(), time.process_time(), time.perf_counter()
    done = work()
    seconds = time.perf_counter() - start
    grown = (resident_bytes() - before) / 1e6
    return done / seconds, (time.process_time() - used) / seconds, grown


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=5.0, help="for each row")
    parser.add_argument("--folder", type=Path, help="where the file is made; by default /tmp")
    parser.add_argument("--quick", action="store_true", help="half a second for each row")
    options = parser.parse_args()
    seconds = 0.5 if options.quick else options.seconds
    rows: list[list[str]] = []
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        bare = bare_commits(Path(name), seconds)
        with Ledger(Path(name) / "ledger.sqlite") as ledger:
            for callers in CALLERS:
                rate, share, grown = measured(
                    lambda callers=callers: requests(ledger, callers, seconds)
                )
                rows.append(
                    [
                        str(callers),
                        f"{rate:,.0f}",
                        f"{2 * rate:,.0f}",
                        f"{share:.0%}",
                        f"{grown:.1f} MB",
                    ]
                )
    header = ["callers", "requests/s", "records/s", "processor", "resident"]
    print(markdown(header, rows))
    print(f"\nSQLite alone: {bare:,.0f} commits/s. Load of the machine: {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
