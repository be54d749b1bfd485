"""What `faults.py` finds: kills at every statement and at random, a shared cap, a full disk."""

import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
from contextlib import closing
from pathlib import Path

import pytest

from limbeck.core.errors import LedgerError
from limbeck.ledger.store import Ledger

FAULTS = Path(__file__).with_name("faults.py")


@pytest.fixture
def folder(tmp_path):
    """A folder in memory where there is one: a kill does not touch what the kernel has taken."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as name:
        yield Path(name)


def faults(*arguments, seconds=120):
    done = subprocess.run(
        [sys.executable, FAULTS, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_kill_at_any_statement_loses_nothing_that_was_acknowledged(folder):
    (done,) = faults("statements", folder)
    assert int(done.split()[2]) > 150


def test_random_kills_with_many_in_flight_lose_nothing(folder):
    (done,) = faults("random", folder, 8)
    assert int(done.split()[1]) > 100


def test_two_processes_never_pass_one_cap_and_use_all_of_it(folder):
    assert faults("cap", folder / "ledger.sqlite", 150, 180) == ["180"]


def test_a_live_process_is_not_taken_for_dead(tmp_path):
    path = tmp_path / "ledger.sqlite"
    holder = subprocess.Popen([sys.executable, FAULTS, "hold", path], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None
        request = int(holder.stdout.readline())
        with Ledger(path) as ledger:
            assert ledger.close_stale() == 0
            assert ledger.totals("api").unknown == 0
            os.kill(holder.pid, signal.SIGKILL)
            holder.wait()
            assert ledger.close_stale() == 1
            totals = ledger.totals("api")
            assert (totals.unknown, totals.reserved_usd, totals.unknown_usd_count) == (1, 1.0, 1)
            assert ledger.close_stale() == 0
            ledger.finish(request, {}, 0.25, 1, 1)  # whoever knows better may still say so
            totals = ledger.totals("api")
            assert (totals.unknown, totals.reserved_usd, totals.spent_usd) == (0, 0.0, 0.25)
            assert totals.unknown_usd_count == 0
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    assert [file.name for file in tmp_path.iterdir()] == ["ledger.sqlite"]


def test_a_full_disk_is_one_clear_error_and_keeps_what_was_acknowledged(tmp_path):
    if subprocess.run(["unshare", "-Urm", "true"], capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here")
    disk = tmp_path / "disk"
    disk.mkdir()
    script = (
        f"mount -t tmpfs -o size=600k none {disk} || exit\n"
        f"exec {sys.executable} {FAULTS} full {disk / 'ledger.sqlite'}"
    )
    done = subprocess.run(
        ["unshare", "-Urm", "sh", "-c", script], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    error, kept = done.stdout.splitlines()
    assert "the disk is full" in error
    assert int(kept.split()[1]) >= 2


def test_a_limit_on_pages_does_the_same_everywhere(tmp_path, monkeypatch):
    """SQLite's own fault: it may not make the file larger; then it may again."""
    from limbeck.ledger import store

    connections = []
    real = store.open_ledger
    monkeypatch.setattr(store, "open_ledger", lambda path: keep(connections, real(path)))
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        connections[0].execute("PRAGMA max_page_count = 40")
        kept, said = 0, ""
        while not said and kept < 1000:
            try:
                ledger.begin([str(kept)], {"text": "x" * 3000}, 0.5, "api", None)
                kept += 1
            except LedgerError as error:
                said = str(error)
        assert "the disk is full" in said
        assert kept > 3
        assert ledger.totals("api").requests == kept
        assert ledger.totals("api").reserved_usd == kept * 0.5
        connections[0].execute("PRAGMA max_page_count = 4000")
        ledger.begin(["more"], {}, 0.5, "api", None)
        assert ledger.totals("api").requests == kept + 1


def keep(kept, value):
    kept.append(value)
    return value


def test_a_power_cut_loses_nothing_that_was_acknowledged(tmp_path):
    """The log may end anywhere behind its last sync, or hold rubbish there."""
    path = tmp_path / "ledger.sqlite"
    log = Path(f"{path}-wal")
    steps = []
    with Ledger(path) as ledger:
        for number in range(6):
            request = ledger.begin([str(number)], {}, 1.0, "api", None)
            steps.append((log.stat().st_size, number, "open"))
            ledger.finish(request, {str(number): {"text": "yes"}}, 0.5, 1, 1)
            steps.append((log.stat().st_size, number, "answered"))
        whole, everything = path.read_bytes(), log.read_bytes()
    draws = random.Random(0)
    cuts = [size for size, *_ in steps]
    cuts += [size - 1 for size, *_ in steps[1:]]
    cuts += [draws.randrange(cuts[0], len(everything)) for _ in range(30)]
    for cut in cuts:
        rubbish = draws.randbytes(draws.choice([0, 5000]))
        after = tmp_path / "after"
        after.mkdir()
        (after / "ledger.sqlite").write_bytes(whole)
        (after / "ledger.sqlite-wal").write_bytes(everything[:cut] + rubbish)
        with closing(sqlite3.connect(after / "ledger.sqlite")) as database:
            states = dict(database.execute("SELECT keys, state FROM requests"))
            sums = database.execute("SELECT spent_nanousd, reserved_nanousd FROM accounts")
            spent, reserved = sums.fetchone()
        durable = {number: state for size, number, state in steps if size <= cut}
        found = {int(keys[2:-2]): state for keys, state in states.items()}
        assert found == durable
        answered = list(found.values()).count("answered")
        assert spent == answered * 500_000_000
        assert reserved == (len(found) - answered) * 1_000_000_000
        shutil.rmtree(after)


def test_commits_are_synced(tmp_path):
    """Without these two settings, the test above would cut where nothing was promised."""
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        assert ledger._committer is not None
        database = ledger._committer._database
        assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert database.execute("PRAGMA synchronous").fetchone() == (2,)


def test_memory_is_flat_over_ten_thousand_records(folder):
    early, late = map(int, faults("memory", folder / "ledger.sqlite", 10_000))
    assert late - early < 10e6
