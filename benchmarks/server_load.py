"""A teacher behind an API under load, and a mock that misbehaves: what arrives, and who pays.

    python benchmarks/server_load.py            # all parts, about half an hour
    python benchmarks/server_load.py --quick    # a few hundred prompts, nothing written
    python benchmarks/server_load.py --part faults

client    requests a second that the mock can answer, asked by bare sockets; the same through
          limbeck, ledger and all; the share of the limit; processor time; memory as it goes
faults    10,000 prompts at four rates of faults of all kinds
budget    256 requests in flight, faults, and a budget that is not enough
kills     a client that is killed fifty times and started again

The mock runs in a process of its own and writes down every request. `server_audit.py` checks that
against the ledger: each prompt has one final row; what is handed out as whole is to the letter what
the mock sent as whole; no answer that was on the disk is asked for again; the bill is within what
the ledger counts, and within the budget.
"""

import argparse
import asyncio
import itertools
import json
import math
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from environment import environment
from server_audit import audit
from table import markdown

RESULTS = Path(__file__).with_name("results") / "server_load.json"
ASKING = Path(__file__).resolve().parents[1] / "tests" / "teachers" / "asking.py"
RATES = (0.0, 0.1, 0.3, 0.6)
IN_FLIGHT = (64, 256)
LATENCIES = (0.0, 0.1, 0.5)
"""Seconds until the mock answers: none, which no model can; and what quick ones take."""
BODY = {
    "model": "m",
    "messages": [{"role": "user", "content": "question 1"}],
    "temperature": 1.0,
    "top_p": 1.0,
    "max_tokens": 30,
    "stream": False,
    "seed": 1,
    "n": 1,
}


@contextmanager
def mock(folder: Path, rate: float = 0.0, latency: float = 0.0) -> Iterator[tuple[str, Path]]:
    """A mock in a process of its own: its address, and its log."""
    log = folder / "mock.jsonl"
    command = [sys.executable, "-m", "limbeck", "mock-teacher", "--port", "0", "--log", str(log)]
    command += ["--fault-rate", str(rate), "--seed", "7", "--latency", str(latency)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        url = child.stdout.readline().split("serving at ")[1].split(";")[0]
        try:
            yield url, log
        finally:
            child.terminate()  # SIGINT may be ignored where this runs in the background
            child.communicate()


async def bare(port: int, connections: int, seconds: float) -> float:
    """Requests a second of a client that does nothing but write and read."""
    body = json.dumps(BODY).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ncontent-length: {len(body)}\r\n\r\n"
    sent, stop, done = head.encode() + body, time.monotonic() + seconds, 0

    async def one() -> None:
        nonlocal done
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while time.monotonic() < stop:
            writer.write(sent)
            length = 0
            while (line := await reader.readline()) != b"\r\n":
                if line.lower().startswith(b"content-length:"):
                    length = int(line.split(b":")[1])
            await reader.readexactly(length)
            done += 1
        writer.close()

    began = time.monotonic()
    await asyncio.gather(*(one() for _ in range(connections)))
    return done / (time.monotonic() - began)


def ask(url: str, ledger: Path, count: int, **fields: Any) -> dict[str, Any]:
    """Ask `count` questions in this process; rates, outcomes, memory."""
    from limbeck.core.errors import BudgetError
    from limbeck.core.exchange import Question
    from limbeck.core.specs import ServerTeacher, TokenPrice
    from limbeck.core.types import Sampling, Turn
    from limbeck.teachers.server import Server

    price = TokenPrice(input=1.0, output=2.0)
    spec = ServerTeacher(url=url, model="m", ledger=str(ledger), price=price, **fields)
    asked = (
        Question(id=f"q{k}", prompt=(Turn(text=f"question {k}", role="user"),))
        for k in range(count)
    )
    outcomes: Counter[str] = Counter()
    seen: Counter[str] = Counter()
    memory: list[float] = []
    wholes: dict[str, str] = {}
    stopped = False
    with Server(spec, display=False) as server:
        began = worked = 0.0
        sampling = Sampling(max_tokens=30, temperature=1.0, seed=9)
        try:
            for number, (reply,) in enumerate(server.answers(asked, sampling)):
                began, worked = began or time.monotonic(), worked or time.process_time()
                seen[reply.question] += 1
                outcomes["failed" if reply.failure else reply.finish] += 1
                if reply.whole:
                    wholes[reply.question] = reply.text
                if number % max(1, count // 5) == 0:
                    memory.append(resident_mb())
        except BudgetError:
            stopped = True
        totals = server.totals
        seconds, worked = time.monotonic() - began, time.process_time() - worked
    return {
        "seconds": seconds,
        "processor_ms_per_answer": 1000 * worked / len(seen),
        "answers_per_second": len(seen) / seconds,
        "stopped_by_budget": stopped,
        "outcomes": dict(outcomes),
        "final_rows": len(seen),
        "rows_twice": sum(c - 1 for c in seen.values()),
        "memory_mb": memory,
        "spent_usd": totals.spent_usd,
        "reserved_usd": totals.reserved_usd,
        "wholes": wholes,
    }


def resident_mb() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return 0.0


def limit_and_client(quick: bool) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for latency, in_flight in itertools.product(LATENCIES, IN_FLIGHT):
        with tempfile.TemporaryDirectory() as name, mock(Path(name), 0.0, latency) as (url, _):
            port = int(url.split(":")[2].split("/")[0])
            limit = asyncio.run(bare(port, in_flight, 1 if quick else 5))
            found = ask(url, Path(name) / "l.sqlite", 300 if quick else 10_000, in_flight=in_flight)
        row = {"latency_seconds": latency, "in_flight": in_flight, "limit": limit}
        found.pop("wholes")
        rows.append({**row, **found})
        rate = found["answers_per_second"]
        work = found["processor_ms_per_answer"]
        said = f"mock {limit:.0f}/s, limbeck {rate:.0f}/s, {work:.2f} ms of work for each"
        print(f"{latency:g} s, {in_flight} in flight: {said}", flush=True)
    return rows


def faults(quick: bool) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for rate in RATES:
        count = 200 if quick else 10_000
        with tempfile.TemporaryDirectory() as name, mock(Path(name), rate) as (url, log):
            ledger = Path(name) / "l.sqlite"
            found = ask(url, ledger, count, in_flight=64, attempts=12, budget_usd=count * 4e-4)
            checked = audit(log, ledger, found.pop("wholes"))
        rows.append({"rate": rate, "prompts": count, **found, **checked})
        show(f"{rate:.0%} faults", rows[-1])
    return rows


def budget(quick: bool) -> dict[str, Any]:
    """A budget for some of the prompts; then one for all of them, with the same ledger."""
    count = 400 if quick else 10_000
    limit = count * 4e-5
    with tempfile.TemporaryDirectory() as name, mock(Path(name), 0.3) as (url, log):
        ledger = Path(name) / "l.sqlite"
        settings = {"in_flight": 256, "attempts": 12}
        stopped = ask(url, ledger, count, budget_usd=limit, **settings)
        wholes = stopped.pop("wholes")
        then = audit(log, ledger, wholes)
        found = ask(url, ledger, count, budget_usd=count * 4e-4, **settings)
        checked = audit(log, ledger, found.pop("wholes"))
    row = {
        "prompts": count,
        "budget_usd": limit,
        "billed_by_then_usd": then["billed_usd"],
        **found,
        **checked,
    }
    row["first"] = {k: stopped[k] for k in ("final_rows", "stopped_by_budget", "spent_usd")}
    row["first"] |= {"reserved_usd": stopped["reserved_usd"], "recorded": then["recorded"]}
    show("budget", row)
    return row


def kills(quick: bool) -> dict[str, Any]:
    """A client that is killed again and again, and at last left alone."""
    wanted, count = (3, 400) if quick else (50, 10_000)
    draw, killed = random.Random(0), 0
    with tempfile.TemporaryDirectory() as name, mock(Path(name), 0.1) as (url, log):
        ledger = Path(name) / "l.sqlite"
        while killed < wanted:
            command = [sys.executable, str(ASKING), url, str(ledger), str(count)]
            with subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            ) as child:
                assert child.stdout is not None
                child.stdout.readline()
                time.sleep(draw.uniform(0.05, 2.5))
                child.send_signal(signal.SIGKILL)
                if child.wait() >= 0:
                    break  # it had finished before
            killed += 1
        done = len(log.read_text().splitlines())
        found = ask(url, ledger, count, in_flight=8)
        checked = audit(log, ledger, found.pop("wholes"))
    row = {"kills": killed, "prompts": count, "requests_before": done, **found, **checked}
    show(f"{killed} kills", row)
    return row


SHOWN = (
    "prompts",
    "final_rows",
    "rows_twice",
    "outcomes",
    "requests",
    "wrong_texts",
    "asked_though_recorded",
    "not_in_ledger",
    "billed_usd",
    "counted_usd",
    "budget_usd",
    "billed_by_then_usd",
    "first",
    "requests_before",
    "answers_per_second",
)


def show(name: str, row: dict[str, Any]) -> None:
    print(f"{name}: {json.dumps({k: row[k] for k in SHOWN if k in row})}", flush=True)


def table(results: dict[str, Any]) -> str:
    parts: list[str] = []
    if "client" in results:
        lines = [
            [
                f"{r['latency_seconds']:g} s",
                f"{r['in_flight']}",
                f"{r['limit']:,.0f}",
                f"{r['answers_per_second']:,.0f}",
                f"{r['answers_per_second'] / r['limit']:.0%}",
                f"{r.get('processor_ms_per_answer', math.nan):.2f} ms",
                " ".join(f"{m:.0f}" for m in r["memory_mb"]),
            ]
            for r in results["client"]
        ]
        head = [
            "latency",
            "in flight",
            "mock, requests/s",
            "limbeck, requests/s",
            "share",
            "processor time of each",
            "memory, MB",
        ]
        parts.append(markdown(head, lines))
    lines = [[f"{row['rate']:.0%} faults", *checks(row)] for row in results.get("faults", [])]
    if row := results.get("budget"):
        lines.append(["30%, too small a budget, then a larger one", *checks(row)])
    if row := results.get("kills"):
        lines.append([f"10%, {row['kills']} kills", *checks(row)])
    if lines:
        head = ["run", "prompts", "with one row", "of these failed", "requests"]
        more = ["wrong text taken for whole", "asked though recorded", "billed", "counted"]
        parts.append(markdown([*head, *more], lines))
    if row := results.get("budget"):
        parts.append(
            f"With a budget of ${row['budget_usd']:.4f} the run stopped by itself with"
            f" {row['first']['recorded']:,} answers recorded; the mock had billed"
            f" ${row['billed_by_then_usd']:.4f}, and the worst case of what ended unknown was"
            f" ${row['first']['reserved_usd']:.4f}."
        )
    return "\n\n".join(parts)


def checks(row: dict[str, Any]) -> list[str]:
    return [
        f"{row['prompts']:,}",
        f"{row['final_rows'] - row['rows_twice']:,}",
        f"{row['outcomes'].get('failed', 0):,}",
        f"{row['requests']:,}",
        f"{row['wrong_texts']}",
        f"{row['asked_though_recorded']}",
        f"${row['billed_usd']:.4f}",
        f"${row['counted_usd']:.4f}",
    ]


PARTS = {"client": limit_and_client, "faults": faults, "budget": budget, "kills": kills}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="A teacher behind an API under load.")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--table", action="store_true", help="print what is in results/ alone")
    parser.add_argument("--part", choices=list(PARTS), action="append")
    chosen = parser.parse_args(arguments)
    known: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if not chosen.table:
        for part in chosen.part or PARTS:
            known[part] = PARTS[part](chosen.quick)
            known["environment"] = environment()
            if not chosen.quick:
                RESULTS.write_text(json.dumps(known, indent=1) + "\n")
    print(table(known))


if __name__ == "__main__":
    main()
