"""A teacher behind an API under load, and a mock that misbehaves: what arrives, and who pays.

    python benchmarks/server_load.py            # all parts, about half an hour
    python benchmarks/server_load.py --quick    # a few hundred prompts, nothing written
    python benchmarks/server_load.py --part faults

limit     requests a second that the mock can answer, asked by bare sockets
client    the same through limbeck, ledger and all; the share of the limit; memory as it goes
faults    10,000 prompts at four rates of faults of all kinds
kills     a client that is killed fifty times and started again

The mock runs in a process of its own and writes down every request. What is checked against that:
each prompt has one final row; no text that was cut is taken for whole; a prompt whose answer has
arrived is not asked again; what is billed is within what the ledger counts, and within the budget.
"""

import argparse
import asyncio
import itertools
import json
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
from table import markdown

RESULTS = Path(__file__).with_name("results") / "server_load.json"
ASKING = Path(__file__).resolve().parents[1] / "tests" / "teachers" / "asking.py"
RATES = (0.0, 0.1, 0.3, 0.6)
IN_FLIGHT = (64, 256)
LATENCIES = (0.0, 0.5)
"""Seconds until the mock answers: none, which no model can, and what a quick one takes."""
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
            child.send_signal(signal.SIGINT)
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
    wholes: list[str] = []
    with Server(spec, display=False) as server:
        began = 0.0
        sampling = Sampling(max_tokens=30, temperature=1.0, seed=9)
        for number, (reply,) in enumerate(server.answers(asked, sampling)):
            began = began or time.monotonic()
            seen[reply.question] += 1
            outcomes["failed" if reply.failure else reply.finish] += 1
            if reply.whole:
                wholes.append(reply.text)
            if number % max(1, count // 5) == 0:
                memory.append(resident_mb())
        totals = server.totals
        seconds = time.monotonic() - began
    return {
        "seconds": seconds,
        "answers_per_second": count / seconds,
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


def audit(log: Path, found: dict[str, Any]) -> dict[str, Any]:
    """What the mock has to say about it."""
    requests = [json.loads(line) for line in log.read_text().splitlines()]
    arrived: set[str] = set()
    again = 0
    faults: Counter[str] = Counter()
    billed = 0.0
    for request in requests:
        text = request["body"]["messages"][0]["content"]
        faults[request["fault"] or "none"] += 1
        billed += (request["prompt_tokens"] + 2 * request["completion_tokens"]) / 1e6
        if not text.startswith("question"):
            continue
        again += text in arrived
        if request["fault"] in (None, "bang", "length", "nan_logprobs") or (
            request["fault"] == "wrong_count" and request["billed_choices"]
        ):
            arrived.add(text)
    return {
        "requests": len(requests),
        "faults": dict(faults),
        "asked_again_though_known": again,
        "billed_usd": billed,
        "billed_within_ledger": billed <= found["spent_usd"] + found["reserved_usd"] + 1e-9,
        # Every `length` fault arrives as an answer: it must not count as whole.
        "cut_taken_for_whole": max(0, faults["length"] - found["outcomes"].get("length", 0)),
    }


def limit_and_client(quick: bool) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for latency, in_flight in itertools.product(LATENCIES, IN_FLIGHT):
        with tempfile.TemporaryDirectory() as name, mock(Path(name), 0.0, latency) as (url, _):
            port = int(url.split(":")[2].split("/")[0])
            limit = asyncio.run(bare(port, in_flight, 1 if quick else 5))
            found = ask(url, Path(name) / "l.sqlite", 300 if quick else 10_000, in_flight=in_flight)
        row = {"latency_seconds": latency, "in_flight": in_flight, "limit": limit}
        rows.append({**row, **found, "wholes": None})
        rate = found["answers_per_second"]
        print(f"{latency:g} s, {in_flight} in flight: mock {limit:.0f}/s, limbeck {rate:.0f}/s")
    return rows


def faults(quick: bool) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for rate in RATES:
        count = 200 if quick else 10_000
        with tempfile.TemporaryDirectory() as name, mock(Path(name), rate) as (url, log):
            ledger = Path(name) / "l.sqlite"
            budget = count * 400e-6
            found = ask(url, ledger, count, in_flight=64, attempts=12, budget_usd=budget)
            checked = audit(log, found)
        row = {"rate": rate, "prompts": count, "budget_usd": budget, **found, **checked}
        row["budget_kept"] = checked["billed_usd"] <= budget
        rows.append({**row, "wholes": None})
        print(f"{rate:.0%} faults: {json.dumps({k: row[k] for k in SHOWN})}", flush=True)
    return rows


SHOWN = (
    "final_rows",
    "rows_twice",
    "outcomes",
    "requests",
    "asked_again_though_known",
    "cut_taken_for_whole",
    "billed_within_ledger",
    "budget_kept",
    "answers_per_second",
)


def kills(quick: bool) -> dict[str, Any]:
    """A client that is killed again and again, and at last left alone."""
    wanted, count = (3, 200) if quick else (50, 4000)
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
                time.sleep(draw.uniform(0.05, 1.0))
                child.send_signal(signal.SIGKILL)
                if child.wait() >= 0:
                    break  # it had finished before
            killed += 1
        found = ask(url, ledger, count, in_flight=8)
        checked = audit(log, found)
    row = {"kills": killed, "prompts": count, **found, **checked, "wholes": None}
    asked = {k: v for k, v in row.items() if k in (*SHOWN, "kills", "prompts")}
    print(f"kills: {json.dumps(asked)}", flush=True)
    return row


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
            "memory, MB",
        ]
        parts.append(markdown(head, lines))
    if "faults" in results:
        lines = [
            [
                f"{r['rate']:.0%}",
                f"{r['final_rows']:,}",
                f"{r['outcomes'].get('failed', 0):,}",
                f"{r['requests']:,}",
                f"{r['asked_again_though_known']}",
                "yes" if r["billed_within_ledger"] else "NO",
                "yes" if r["budget_kept"] else "NO",
            ]
            for r in results["faults"]
        ]
        head = ["faults", "final rows", "of these failed", "requests", "asked again though known"]
        parts.append(markdown([*head, "bill within the ledger", "budget kept"], lines))
    if "kills" in results:
        r = results["kills"]
        parts.append(
            f"{r['kills']} kills: {r['final_rows']:,} of {r['prompts']:,} prompts have a row,"
            f" {r['asked_again_though_known']} were asked again whose answer the client may have"
            " seen, because it died before that was on the disk"
        )
    return "\n\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="A teacher behind an API under load.")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--table", action="store_true", help="print what is in results/ alone")
    parser.add_argument("--part", choices=["client", "faults", "kills"], action="append")
    chosen = parser.parse_args(arguments)
    known: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if not chosen.table:
        made = {"client": limit_and_client, "faults": faults, "kills": kills}
        for part in chosen.part or list(made):
            known[part] = made[part](chosen.quick)
            known["environment"] = environment()
            if not chosen.quick:
                RESULTS.write_text(json.dumps(known, indent=1) + "\n")
    print(table(known))


if __name__ == "__main__":
    main()
