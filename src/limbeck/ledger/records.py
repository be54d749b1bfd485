"""What a begin, a finish or a failure writes, as work within a transaction.

Each account has one row of sums, changed in the same transaction as the request itself: a budget is
checked without adding up the past, and the sums can never say anything else than the requests do.
"""

import sqlite3
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from limbeck.core.errors import BudgetError, LedgerError
from limbeck.ledger.money import from_nano


def begin(
    database: sqlite3.Connection,
    *,
    owner: str,
    account: str,
    keys: str,
    request: str,
    reserve: int | None,
    cap: int | None,
) -> int:
    """Record a request and its reservation; the request's number.

    Args:
        database: within a transaction.
        owner: the open ledger that asks.
        account: on which it is counted.
        keys, request: as JSON.
        reserve: the worst case in nano-dollars, where it is known.
        cap: in nano-dollars, where there is one.

    Raises:
        BudgetError: the cap could be passed; nothing was written.
    """
    if cap is not None:
        row = database.execute(
            "SELECT spent_nanousd, reserved_nanousd FROM accounts WHERE name = ?", (account,)
        ).fetchone()
        spent, reserved = row or (0, 0)
        if reserve is None or spent + reserved + reserve > cap:
            asked = None if reserve is None else from_nano(reserve)
            raise BudgetError(account, from_nano(spent), from_nano(reserved), asked, from_nano(cap))
    change = {"requests": 1, "reserved_nanousd": reserve or 0}
    if not _add(database, account, change):
        database.execute("INSERT INTO accounts (name) VALUES (?)", (account,))
        _add(database, account, change)
    made = database.execute(
        "INSERT INTO requests (account, owner, state, begun, reserved_nanousd, keys, request)"
        " VALUES (?, ?, 'open', ?, ?, ?, ?)",
        (account, owner, _now(), reserve, keys, request),
    )
    assert made.lastrowid is not None
    return made.lastrowid


def finish(
    database: sqlite3.Connection,
    request: int,
    answers: Mapping[str, str],
    usd: int | None,
    prompt_tokens: int | None,
    completion_tokens: int | None,
) -> None:
    """Record answers (JSON by key) and replace the reservation by the cost, in nano-dollars.

    Raises:
        LedgerError: the request is not under way; nothing was written.
    """
    account, reserved, change = _ending(database, request)
    new = 0
    for key, answer in answers.items():
        # The first answer stays: another process may have used it already.
        new += database.execute(
            "INSERT OR IGNORE INTO answers (key, request, answer) VALUES (?, ?, ?)",
            (key, request, answer),
        ).rowcount
    change["answers"] = new
    change["prompt_tokens"] = prompt_tokens or 0
    change["completion_tokens"] = completion_tokens or 0
    change["reserved_nanousd"] = -reserved
    change["spent_nanousd"] = reserved if usd is None else usd
    change["unknown_usd_count"] += usd is None
    _add(database, account, change)
    database.execute(
        "UPDATE requests SET state = 'answered', ended = ?, usd_nanousd = ?, prompt_tokens = ?,"
        " completion_tokens = ?, reason = NULL WHERE id = ?",
        (_now(), usd, prompt_tokens, completion_tokens, request),
    )


def fail(database: sqlite3.Connection, request: int, reason: str, usd: int | None) -> None:
    """Record that there is no answer; the reservation goes only where the cost is known.

    Raises:
        LedgerError: the request is not under way; nothing was written.
    """
    account, reserved, change = _ending(database, request)
    change["failures"] = 1
    if usd is None:
        change["unknown_usd_count"] += 1
    else:
        change["reserved_nanousd"] = -reserved
        change["spent_nanousd"] = usd
    _add(database, account, change)
    database.execute(
        "UPDATE requests SET state = 'failed', ended = ?, usd_nanousd = ?, reason = ? WHERE id = ?",
        (_now(), usd, reason, request),
    )


def end_open(database: sqlite3.Connection, owners: Sequence[str], reason: str) -> int:
    """Record the open requests of these owners as unknown; how many there were.

    What was reserved stays reserved: the request may have been sent, answered and billed.
    """
    ended = 0
    for owner in owners:
        of_accounts = database.execute(
            "SELECT account, count(*) FROM requests WHERE state = 'open' AND owner = ?"
            " GROUP BY account",
            (owner,),
        ).fetchall()
        for account, count in of_accounts:
            _add(database, account, {"unknown": count, "unknown_usd_count": count})
            ended += count
        database.execute(
            "UPDATE requests SET state = 'unknown', ended = ?, reason = ?"
            " WHERE state = 'open' AND owner = ?",
            (_now(), reason, owner),
        )
    return ended


def _ending(database: sqlite3.Connection, request: int) -> tuple[str, int, dict[str, int]]:
    """Account and reservation of a request under way, and what its end changes in any case."""
    row = database.execute(
        "SELECT account, state, reserved_nanousd FROM requests WHERE id = ?", (request,)
    ).fetchone()
    if row is None:
        raise LedgerError(f"request {request} is not in the ledger; begin it before it ends")
    account, state, reserved = row
    if state not in ("open", "unknown"):
        raise LedgerError(f"request {request} has ended already ({state}); it can end once only")
    back = -1 if state == "unknown" else 0  # taken for dead, and yet it ends
    return account, reserved or 0, {"unknown": back, "unknown_usd_count": back}


def _add(database: sqlite3.Connection, account: str, change: Mapping[str, int]) -> bool:
    """Change an account's sums; whether there is such an account."""
    sums = ", ".join(f"{column} = {column} + ?" for column in change)
    values = (*change.values(), account)
    return database.execute(f"UPDATE accounts SET {sums} WHERE name = ?", values).rowcount > 0


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
