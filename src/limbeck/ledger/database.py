"""The ledger's file: an SQLite database in WAL mode, its tables, and errors that say what to do."""

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from limbeck.core.errors import LedgerError
from limbeck.core.files import sync

APPLICATION = 0x6C696D62
"""`limb`: tells a ledger from any other program's database."""

VERSION = 1
"""Of the tables below; a file with a later one is refused."""

BUSY_SECONDS = 60.0
"""How long one process waits for another's commit, which takes milliseconds."""

TABLES = (
    """CREATE TABLE accounts (
        name TEXT PRIMARY KEY,
        requests INTEGER NOT NULL DEFAULT 0,
        answers INTEGER NOT NULL DEFAULT 0,
        failures INTEGER NOT NULL DEFAULT 0,
        unknown INTEGER NOT NULL DEFAULT 0,
        prompt_tokens INTEGER NOT NULL DEFAULT 0,
        completion_tokens INTEGER NOT NULL DEFAULT 0,
        spent_nanousd INTEGER NOT NULL DEFAULT 0,
        reserved_nanousd INTEGER NOT NULL DEFAULT 0,
        unknown_usd_count INTEGER NOT NULL DEFAULT 0
    )""",
    # AUTOINCREMENT: an id is never given twice, even if somebody deletes rows.
    """CREATE TABLE requests (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        account TEXT NOT NULL REFERENCES accounts (name),
        owner TEXT NOT NULL,
        state TEXT NOT NULL CHECK (state IN ('open', 'answered', 'failed', 'unknown')),
        begun TEXT NOT NULL,
        ended TEXT,
        reserved_nanousd INTEGER,
        usd_nanousd INTEGER,
        prompt_tokens INTEGER,
        completion_tokens INTEGER,
        reason TEXT,
        keys TEXT NOT NULL,
        request TEXT NOT NULL
    )""",
    "CREATE INDEX open_requests ON requests (owner) WHERE state = 'open'",
    """CREATE TABLE answers (
        key TEXT PRIMARY KEY,
        request INTEGER NOT NULL REFERENCES requests (id),
        answer TEXT NOT NULL
    )""",
)


def open_ledger(path: Path) -> sqlite3.Connection:
    """Open the ledger in `path`, or make it; whole and ours, or an error.

    Raises:
        LedgerError: the file is damaged, of another program or of a later version of limbeck.
    """
    with plainly(path):
        new = not path.exists()
        path.parent.mkdir(parents=True, exist_ok=True)
        database = connect(path)
        try:
            _expect_ours(database, path)
            _use_wal(database)
            _make_tables(database)
            found = " ".join(database.execute("PRAGMA quick_check(1)").fetchone()[0].split())
            if found != "ok":
                raise LedgerError(f"{path}: the ledger is damaged ({found}); {REMEDY}")
            if new:
                sync(path.parent)
        except BaseException:
            database.close()
            raise
    return database


def connect(path: Path) -> sqlite3.Connection:
    """A connection that commits durably, waits for other processes, and may change threads."""
    database = sqlite3.connect(
        path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
    )
    try:
        database.execute("PRAGMA synchronous = FULL")  # NORMAL could lose the last commits
        database.execute("PRAGMA fullfsync = ON")  # macOS: through the disk's own cache too
    except BaseException:  # what is no database is found out here
        database.close()
        raise
    return database


REMEDY = (
    "put a copy of it back, or save what can be read with"
    " `sqlite3 LEDGER .recover | sqlite3 NEW`, or give another path"
)


def _expect_ours(database: sqlite3.Connection, path: Path) -> None:
    application = database.execute("PRAGMA application_id").fetchone()[0]
    version = database.execute("PRAGMA user_version").fetchone()[0]
    tables = database.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]
    if application != APPLICATION and (application or version or tables):
        raise LedgerError(f"{path}: is a database of another program; give another path")
    if version > VERSION:
        raise LedgerError(
            f"{path}: was written by a later limbeck (its version {version}, here {VERSION});"
            " update limbeck or give another path"
        )


def _make_tables(database: sqlite3.Connection) -> None:
    """All of them or none, also where two processes open a new file at the same time."""
    database.execute("BEGIN IMMEDIATE")
    try:
        if database.execute("PRAGMA user_version").fetchone()[0] == 0:
            for statement in TABLES:
                database.execute(statement)
            database.execute(f"PRAGMA application_id = {APPLICATION}")
            database.execute(f"PRAGMA user_version = {VERSION}")
        database.execute("COMMIT")
    except BaseException:
        roll_back(database)
        raise


def _use_wal(database: sqlite3.Connection) -> None:
    """Switch it on, which SQLite refuses at once, without waiting, while another opens the file."""
    end = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            database.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if not _busy(error) or time.monotonic() > end:
                raise
            time.sleep(0.01)


def roll_back(database: sqlite3.Connection) -> None:
    """Undo the open transaction, if SQLite has not done so itself."""
    if database.in_transaction:
        database.execute("ROLLBACK")


@contextmanager
def plainly(path: Path) -> Iterator[None]:
    """SQLite's errors as a `LedgerError` that says what to do."""
    try:
        yield
    except LedgerError:
        raise
    except (sqlite3.Error, OSError) as error:
        raise LedgerError(f"{path}: {_explained(error)}") from error


def _explained(error: Exception) -> str:
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the upper bits only say more of it
    if code == sqlite3.SQLITE_FULL:
        return (
            "the disk is full, so the ledger cannot record requests; free some space and start"
            " again: what was recorded is kept"
        )
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return f"the ledger is damaged or not a ledger ({error}); {REMEDY}"
    if _busy(error):
        return (
            f"another process has held the ledger for {BUSY_SECONDS:.0f} s; end the program that"
            " has it open (such as an sqlite3 shell in a transaction) and start again"
        )
    if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM):
        return f"the ledger cannot be opened for writing ({error}); check the path and its rights"
    return f"the ledger could not be read or written ({error}); check the disk and start again"


def _busy(error: Exception) -> bool:
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    return code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
