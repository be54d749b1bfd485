"""Things made in a process beside this one: they come whole and in order, and nobody is left."""

import gc
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from limbeck.core.errors import BudgetError, DataError, RecipeError
from limbeck.train.worker import Worker, WorkerDied, can_work_beside

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux")


@pytest.fixture
def work():
    """Makes workers, and ends them."""
    made = []

    def start(make, unneeded=()):
        made.append(Worker(make, unneeded))
        return made[-1]

    yield start
    for each in made:
        each.close()


def alive(pid):
    """Whether a process runs; one that has ended and that nobody has asked after does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(holds, seconds=20):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.01)


TENSORS = {
    "float32": torch.randn(3, 4),
    "bfloat16": torch.randn(5).bfloat16(),
    "bool": torch.tensor([True, False]),
    "int64": torch.arange(6).view(2, 3),
    "a number": torch.tensor(7),
    "nothing": torch.zeros(0, 3, dtype=torch.int32),
    "nothing of NumPy's": torch.from_numpy(np.flatnonzero([0, 0]) - 1),
    "transposed": torch.randn(3, 4).T,
    "a part": torch.arange(10)[2:5],
    "not a number": torch.tensor([float("nan"), float("inf")]),
    "large": torch.arange(2**20),
}


@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_comes_as_it_was(name, work):
    sent = TENSORS[name]
    found = work(lambda: {"x": [sent]}).next()["x"][0]
    assert (found.dtype, found.shape) == (sent.dtype, sent.shape)
    assert torch.equal(found.nan_to_num(), sent.nan_to_num())
    found.zero_()  # it is ours to change


def test_what_was_one_thing_stays_one(work):
    tensor = torch.ones(3)
    a, b = work(lambda: [tensor, tensor]).next()
    assert a is b


def test_they_come_in_order_and_in_another_process(work):
    numbers = itertools.count()
    beside = work(lambda: (next(numbers), os.getpid()))
    found = [beside.next() for _ in range(50)]
    assert [number for number, _ in found] == list(range(50))
    assert {pid for _, pid in found} == {beside._process.pid}
    assert next(numbers) == 0


def test_it_is_not_far_ahead(work):
    made = torch.zeros(()).share_memory_()

    def make():
        made.add_(1)
        return torch.zeros(2**15)  # twice what the pipe holds

    beside = work(make)
    beside.next()
    wait_until(lambda: made == 2)
    time.sleep(0.3)
    assert made == 2


@pytest.mark.parametrize(
    "error",
    [
        RecipeError("terms.0", "no such layer", "a.yaml", 3),
        DataError("no token to learn"),
        BudgetError("dear", 1.0, 2.0, None, 3.0),
        ZeroDivisionError("division"),
    ],
)
def test_an_error_is_raised_where_the_thing_is_taken(error, work):
    things = iter([1, 2])

    def make():
        for thing in things:
            return thing
        raise error

    beside = work(make)
    assert [beside.next(), beside.next()] == [1, 2]
    with pytest.raises(type(error)) as caught:
        beside.next()
    assert str(caught.value) == str(error)
    assert "in make" in caught.value.__notes__[0]
    with pytest.raises(WorkerDied, match="exit code 0"):
        beside.next()


def test_an_error_that_cannot_be_sent_is_told_in_words(work):
    class Odd(Exception):
        def __init__(self, a, b):
            super().__init__(f"{a} and {b}")

    def make():
        raise Odd(1, 2)

    with pytest.raises(RuntimeError, match="^Odd: 1 and 2$"):
        work(make).next()


def test_one_that_is_killed_is_told(work):
    beside = work(lambda: torch.zeros(2**15))
    beside.next()
    os.kill(beside._process.pid, signal.SIGKILL)
    with pytest.raises(WorkerDied, match="exit code -9"):
        list(iter(beside.next, None))


@pytest.mark.parametrize("how", ["closed", "forgotten"])
def test_it_ends_with_who_wanted_it(how):
    beside = Worker(lambda: torch.zeros(2**15))
    beside.next()
    pid = beside._process.pid
    assert alive(pid)
    if how == "closed":
        beside.close()
    del beside
    gc.collect()
    assert not alive(pid)


ORPHAN = """
import os, time, torch
from limbeck.train.worker import Worker
beside = Worker(lambda: torch.zeros(2**15))
beside.next()
print(beside._process.pid, flush=True)
time.sleep(60)
"""


def test_it_ends_when_its_parent_is_killed():
    with subprocess.Popen([sys.executable, "-c", ORPHAN], stdout=subprocess.PIPE) as parent:
        pid = int(parent.stdout.readline())
        assert alive(pid)
        parent.kill()
    wait_until(lambda: not alive(pid))


def test_ctrl_c_is_not_for_it_and_the_handlers_here_are_not_its_own(work):
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        beside = work(lambda: torch.zeros(2**15))
        beside.next()
    finally:
        signal.signal(signal.SIGTERM, before)
    os.kill(beside._process.pid, signal.SIGINT)
    for _ in range(3):
        beside.next()
    os.kill(beside._process.pid, signal.SIGTERM)
    wait_until(lambda: not alive(beside._process.pid))


def private_bytes(pid):
    """Memory that a process shares with nobody."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_Dirty"))


@pytest.mark.parametrize("told", [True, False])
def test_what_changes_here_is_not_kept_there(told, work):
    size = 64 * 2**20
    weights = torch.ones(size // 4)
    beside = work(lambda: torch.zeros(2**15), [weights] if told else [])
    beside.next()
    weights.mul_(2)
    kept = private_bytes(beside._process.pid)
    assert kept < size / 4 if told else kept > size * 0.9
    assert (weights == 2).all()


def test_a_tokenizer_that_was_used_here_with_threads_works_there(work, tokenizer, capfd):
    texts = ["some words"] * 1000
    expected = tokenizer(texts)["input_ids"]
    assert work(lambda: tokenizer(texts)["input_ids"]).next() == expected
    assert not capfd.readouterr().err


def test_what_was_left_over_here_is_not_cleared_away_there(work):
    """As of a tensor on a GPU, of which a forked process must not even dispose."""
    here = os.getpid()

    class Precious:
        def __del__(self):
            if os.getpid() != here:
                os.abort()

    gc.disable()
    try:
        left = Precious()
        left.itself = left
        del left
        worker = work(lambda: (gc.collect(), gc.isenabled()))
        assert not gc.isenabled()
    finally:
        gc.enable()
    assert worker.next()[1] is True
    again = work(lambda: 0)
    assert gc.isenabled()
    assert again.next() == 0


def test_a_process_that_may_have_no_children_works_alone():
    context = multiprocessing.get_context("fork")
    said = context.SimpleQueue()
    child = context.Process(target=lambda: said.put(can_work_beside()), daemon=True)
    child.start()
    child.join()
    assert said.get() is False
