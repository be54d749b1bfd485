"""Processes that compare mathematics: what they find, and that nothing makes them hang."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("math_verify")

from limbeck.core.errors import RecipeError
from limbeck.evals import math_pool
from limbeck.evals.child import bare_environment
from limbeck.evals.math_pool import MathPool, Worker

TOWER = "$9^{9^{9}}$"
FINE = {"verdict": "right", "found": "\\frac{1}{2}"}


@pytest.fixture
def pool():
    made = MathPool(2)
    yield made
    made.close()


def alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def ids(pool: MathPool) -> list[int]:
    return [worker._process.pid for worker in pool._idle]


def test_the_known_answer_is_the_first(pool):
    assert pool.check_all([("$1/2$", "$\\frac{1}{2}$"), ("$1/2$", "$1/3$")]) == [
        FINE,
        {"verdict": "wrong", "found": "\\frac{1}{3}"},
    ]
    # A solution stands for its value, and not the other way round.
    verdicts = [pool.check_all([pair])[0]["verdict"] for pair in (("$5$", "$x=5$"), ("$5$", "x"))]
    assert verdicts == ["right", "unclear"]


def test_what_hangs_is_killed_and_the_others_are_answered(pool):
    pairs = [("$1/2$", "$0.5$"), ("$1$", TOWER), ("$2$", "$2$"), ("$3$", "$3$")]
    replies = pool.check_all(pairs, 1.0)
    assert [reply["verdict"] for reply in replies] == ["right", "unclear", "right", "right"]
    assert replies[1]["reason"] == "comparing it took more than 1 s"


def test_a_worker_is_used_again_and_replaced_when_killed():
    pool = MathPool(1)
    pool.check_all([("$1$", "$1$")])
    first = ids(pool)
    pool.check_all([("$1$", "$2$"), ("$1$", "$3$")])
    assert ids(pool) == first
    pool.check_all([("$1$", TOWER)], 0.5)
    assert ids(pool) == []
    assert not alive(first[0])
    assert pool.check_all([("$1$", "$1$")])[0]["verdict"] == "right"
    second = ids(pool)
    pool.close()
    assert not alive(second[0])


def test_a_worker_that_dies_is_replaced(pool):
    pool.check_all([("$1$", "$1$")])
    os.kill(ids(pool)[0], signal.SIGKILL)
    assert pool.check_all([("$1$", "$1$")])[0]["reason"] == "comparing it broke down"
    assert pool.check_all([("$1$", "$1$")])[0]["verdict"] == "right"


def test_it_works_from_any_thread(pool):
    found: list[object] = []

    def ask() -> None:
        found.append(pool.check_all([("$1/2$", "$0.5$"), ("$1$", TOWER)], 1.0))

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [[r["verdict"] for r in replies] for replies in found] == [["right", "unclear"]] * 2


def test_there_are_no_more_processes_than_it_may_have(monkeypatch):
    """Six threads share a pool of two."""
    lock, now, most = threading.Lock(), 0, 0

    class Counted:
        alive = True

        def __init__(self) -> None:
            nonlocal now, most
            with lock:
                now += 1
                most = max(most, now)

        def ask(self, gold: str, text: str, seconds: float) -> dict[str, str]:
            time.sleep(0.005)
            self.alive = text != "$3$"  # it broke down
            if not self.alive:
                self.close()
            return {"verdict": "right"}

        def close(self) -> None:
            nonlocal now
            with lock:
                now -= 1

    monkeypatch.setattr(math_pool, "Worker", Counted)
    pool = MathPool(2)
    pairs = [("$1$", f"${number}$") for number in range(8)]
    threads = [threading.Thread(target=pool.check_all, args=(pairs,)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 2


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_worker_does_not_outlive_who_started_it():
    """The parent is killed while a tower is being computed; the system ends the worker."""
    program = (
        "from limbeck.evals.math_pool import Worker\n"
        "worker = Worker()\n"
        "print(worker._process.pid, flush=True)\n"
        f"worker.ask('$1$', '{TOWER}', 2.0)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    end = time.monotonic() + 30
    while alive(child) and time.monotonic() < end:
        time.sleep(0.1)
    assert not alive(child)


def test_no_key_is_handed_on(monkeypatch):
    monkeypatch.setenv("TEACHER_API_KEY", "secret")
    assert "TEACHER_API_KEY" not in bare_environment()
    worker = Worker()
    try:
        if sys.platform == "linux":
            shown = Path(f"/proc/{worker._process.pid}/environ").read_bytes()
            assert b"PATH=" in shown
            assert b"secret" not in shown
    finally:
        worker.close()


def test_without_the_package_there_is_one_clear_line(monkeypatch, tmp_path):
    (tmp_path / "math_worker.py").write_text('print(\'{"missing": "math_verify"}\')\n')
    monkeypatch.setattr(math_pool, "__file__", str(tmp_path / "math_pool.py"))
    with pytest.raises(RecipeError, match=r"pip install 'limbeck\[synth\]'"):
        MathPool(1).check_all([("$1$", "$1$")])
    from limbeck.evals import verifiers

    monkeypatch.setattr(verifiers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"pip install 'limbeck\[synth\]'"):
        verifiers.Verifier(match="math")


def test_a_process_has_one_pool_of_its_own(monkeypatch):
    first = math_pool.pool()
    assert math_pool.pool() is first
    monkeypatch.setattr(os, "getpid", lambda: -1)  # as in a fork
    monkeypatch.setattr(math_pool, "_pools", dict(math_pool._pools))
    assert math_pool.pool() is not first
