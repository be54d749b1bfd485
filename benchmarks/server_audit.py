"""What really happened between a client and the mock: the mock's own book against the ledger.

The mock's canned answers follow from the request, so what a client should have heard can be said
afterwards, to the letter.
"""

import json
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from limbeck.teachers.mock.api import parsed
from limbeck.teachers.mock.minds import Canned

WHOLE = (None, "nan_logprobs", "wrong_count")
"""Faults that leave a text as it was, where no log-probabilities are asked for."""

BANG = "!" * 40


def audit(log: Path, ledger: Path, wholes: Mapping[str, str]) -> dict[str, Any]:
    """Compare.

    Args:
        log: of the mock, which was started with seed 7.
        ledger: of the client.
        wholes: the answers that were handed out as whole, by question.

    Returns:
        - recorded: answers that the ledger has.
        - requests: how many the mock received.
        - faults: how many of each kind.
        - wrong_texts: answers handed out as whole that the mock has not sent so.
        - asked_though_recorded: requests for an answer that was on the disk.
        - not_in_ledger: requests that are not in it.
        - billed_usd, counted_usd: what the mock has billed, and what the ledger counts at most.
    """
    requests = [json.loads(line) for line in log.read_text().splitlines()]
    sent: dict[str, set[str]] = defaultdict(set)
    mind = Canned(7)
    billed = 0.0
    for request in requests:
        billed += (request["prompt_tokens"] + 2 * request["completion_tokens"]) / 1e6
        text = request["body"]["messages"][0]["content"]
        if text.startswith("question") and request["billed_choices"]:
            sent[text.replace("question ", "q")] |= _wholes(mind, request)
    recorded = _recorded(ledger)
    return {
        "recorded": recorded["answers"],
        "requests": len(requests),
        "faults": dict(Counter(request["fault"] or "none" for request in requests)),
        "wrong_texts": sum(text not in sent[question] for question, text in wholes.items()),
        "asked_though_recorded": recorded["again"],
        "not_in_ledger": max(0, len(requests) - recorded["requests"]),
        "billed_usd": billed,
        "counted_usd": recorded["counted_usd"],
    }


def _wholes(mind: Canned, request: Mapping[str, Any]) -> set[str]:
    """The text that a client may take for a whole answer to this request, if there is one."""
    fault = request["fault"]
    if fault == "bang":
        return {BANG}
    if fault not in WHOLE:
        return set()
    (reply,) = mind.answer(parsed(request["body"], chat=True))
    return {reply.text} if reply.finish == "stop" else set()


def _recorded(path: Path) -> dict[str, Any]:
    """What the ledger's own tables say, read without limbeck."""
    with closing(sqlite3.connect(path)) as database:
        answered = dict(database.execute("SELECT key, request FROM answers"))
        again = count = 0
        for number, keys in database.execute("SELECT id, keys FROM requests"):
            count += 1
            again += sum(answered.get(key, number) < number for key in json.loads(keys))
        (nano,) = database.execute(
            "SELECT sum(spent_nanousd + reserved_nanousd) FROM accounts"
        ).fetchone()
    database.close()
    return {"answers": len(answered), "again": again, "requests": count, "counted_usd": nano / 1e9}
