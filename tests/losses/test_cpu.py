"""When a CPU's kernel is taken, and what it does with logits and threads that are not as usual."""

import logging
import subprocess
import sys
import threading
import time

import pytest
import torch

from limbeck import losses
from limbeck.losses import cpu, native
from limbeck.losses.fused import (
    divergence_term,
    fused_linear_divergence,
    label_term,
    sum_over_rows,
)
from limbeck.losses.projection import Projection

pytestmark = pytest.mark.skipif(
    native.library("sums.c", TYPE="bfloat16") is None, reason="no C compiler"
)


def case(n=6, v=301, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    hidden, weight, theirs, head = (
        torch.randn(size, 16, generator=generator) * scale for size in (n, v, n, v)
    )
    return hidden.requires_grad_(), weight.requires_grad_(), theirs, head


def both(tensors, *, kinds=("native", "naive"), **options):
    totals = [fused_linear_divergence(*tensors, implementation=by, **options) for by in kinds]
    return [(total.detach(), *torch.autograd.grad(total, tensors[:2])) for total in totals]


def assert_alike(found, **bounds):
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, **bounds)


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    native._threads.cache_clear()


@pytest.fixture
def untried():
    def clear():
        native.library.cache_clear()
        native._say.cache_clear()

    clear()
    yield
    clear()


def test_it_is_the_default(monkeypatch):
    called = []
    real = cpu._in_place
    monkeypatch.setattr(cpu, "_in_place", lambda *a: called.append(1) or real(*a))
    fused_linear_divergence(*case()).backward()
    assert called


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        ("", "there is no C compiler (cc)"),
        ("false", "false: it failed and did not say why"),
        ("no-such-compiler", "No such file"),
        ("true", "cannot open shared object file"),
    ],
)
def test_where_no_kernel_can_be_made_losses_are_chunked(
    untried, monkeypatch, caplog, compiler, reason
):
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setattr(native.shutil, "which", lambda _: None)
    with caplog.at_level(logging.INFO):
        found = both(case(), kinds=("auto", "chunked"))
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("no kernel can be made for cpu, so losses are `chunked`: ")
    assert reason in said
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*found, strict=True))


def test_float64_is_chunked():
    found = both([t.detach().double().requires_grad_() for t in case()], kinds=("auto", "chunked"))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*found, strict=True))


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jensen_shannon", "skew_reverse_kl"])
@pytest.mark.parametrize("scale", [1e-3, 3.0, 30.0])
def test_flat_and_steep_rows(name, scale):
    """Up to logits of thousands, where most probabilities are 0 and log-ratios are cut."""
    tensors = case(scale=scale)
    truth = [t.detach().double().requires_grad_() for t in tensors]
    (mine, naive), (exact, _) = both(tensors, divergence=name), both(truth, divergence=name)

    def errors(found):
        return [
            float((one.double() - right).norm()) for one, right in zip(found, exact, strict=True)
        ]

    for own, other, right in zip(errors(mine), errors(naive), exact, strict=True):
        assert own <= 1.5 * other + 2e-6 * max(1e-2, float(right.norm())), (own, other)


@pytest.mark.parametrize("share", [1e-9, 1e-3, 1 - 1e-6])
@pytest.mark.parametrize("name", ["skew_forward_kl", "skew_reverse_kl", "jensen_shannon"])
def test_mixtures_with_almost_nothing_of_one(name, share):
    """Where the mixture cannot be told from nothing in float32, the definition is asked."""
    setting = {"beta" if name == "jensen_shannon" else "alpha": share}
    found = both(case(scale=2.0), kinds=("native", "chunked"), divergence=name, **setting)
    assert_alike(found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("whose", [0, 2])
def test_logits_that_are_no_numbers_are_the_definitions(bad, whose):
    tensors = case()
    with torch.no_grad():
        tensors[whose][3, 2] = bad
    (mine, *_), (naive, *_) = both(tensors)
    assert mine.isfinite() == naive.isfinite()


def test_a_label_of_no_token_is_refused_not_read():
    hidden, weight, *_ = case()
    labels = torch.tensor([0, 1, 2, 10**9, -100, 5])
    head = Projection(hidden=hidden, weight=weight)
    with pytest.raises(IndexError):
        sum_over_rows(head, {}, [label_term(labels, torch.ones(6))], implementation="native")


def test_any_number_of_threads_gives_the_same(monkeypatch):
    monkeypatch.setattr(native, "SHARE_ELEMENTS", 1)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3, 9):
            torch.set_num_threads(threads)
            found += both(case(), kinds=("native",), divergence="reverse_kl")
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert_alike((other, found[0]), rtol=2e-6, atol=1e-7)  # torch's products share work too


def test_rows_do_not_depend_on_threads(monkeypatch):
    """The kernel's part alone, to the last bit: ready logits of both."""
    monkeypatch.setattr(native, "SHARE_ELEMENTS", 1)
    logits = torch.randn(2, 7, 301, generator=torch.Generator().manual_seed(1))
    head = Projection(hidden=torch.eye(7, requires_grad=True), weight=logits[0].T.contiguous())
    terms = [divergence_term(losses.jensen_shannon, "t", torch.ones(7))]
    found = []
    for threads in (1, 3):
        monkeypatch.setattr(native.torch, "get_num_threads", lambda count=threads: count)
        total, _ = sum_over_rows(head, {"t": logits[1]}, terms, implementation="native")
        found.append((total.detach(), *torch.autograd.grad(total, head.hidden)))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_one_pool_of_threads(monkeypatch):
    """Whatever the number of rows, and however often torch's number of threads changes."""
    monkeypatch.setattr(native, "SHARE_ELEMENTS", 1)
    before = threading.active_count()
    for threads in (4, 2, 3):
        monkeypatch.setattr(native.torch, "get_num_threads", lambda count=threads: count)
        for rows in (2, 3, 7):
            native.in_threads(lambda first, last: None, rows, 100)
    deadline = time.monotonic() + 10
    while threading.active_count() > before + 3 and time.monotonic() < deadline:
        time.sleep(0.01)  # those of the pools before end by themselves
    assert threading.active_count() <= before + 3


FORKED = """
import os, torch
from limbeck.losses import native
from limbeck.losses.fused import fused_linear_divergence
native.SHARE_ELEMENTS = 1
torch.get_num_threads = lambda: 2
tensors = [torch.randn(6, 16, requires_grad=i < 2) for i in range(4)]
first = fused_linear_divergence(*tensors, implementation="native")
child = os.fork()
if not child:
    again = fused_linear_divergence(*tensors, implementation="native")
    os._exit(0 if torch.equal(first, again) else 3)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_forked_process_makes_threads_of_its_own():
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORKED]
    assert subprocess.run(command, timeout=60).returncode == 0
