"""Memory in huge pages is memory like any other."""

import gc
import mmap
import sys
from pathlib import Path

import pytest
import torch

from limbeck.losses import pages
from limbeck.losses.fused import fused_linear_divergence

CPU = torch.device("cpu")
LARGE = (3, 2**20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 3), LARGE, (0, 5)])
def test_zeros_of_any_size(shape, dtype):
    made = pages.zeros(shape, dtype, CPU)
    assert made.shape == shape
    assert made.dtype == dtype
    assert not made.any()
    assert made.is_contiguous()
    made += 1
    assert made.sum() == made.numel() or dtype != torch.float32


def test_the_memory_lives_as_long_as_a_view_of_it():
    part = pages.zeros(LARGE, torch.float32, CPU)[1]
    part.fill_(7)
    gc.collect()
    assert (part == 7).all()


def test_a_kernel_without_them_serves_small_pages(monkeypatch):
    class Refusing(mmap.mmap):
        def madvise(self, option, start=0, length=0):
            raise OSError("not here")

    monkeypatch.setattr(mmap, "mmap", Refusing)
    assert pages.zeros(LARGE, torch.float32, CPU).shape == LARGE
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    assert pages.zeros(LARGE, torch.float32, CPU).shape == LARGE


def huge_kilobytes(tensor):
    """What the kernel says of the memory in which this tensor begins."""
    found = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0] and not line.split()[0].endswith(":"):
            first, last = (int(end, 16) for end in line.split()[0].split("-"))
            found = first <= tensor.data_ptr() < last
        elif found and line.startswith("AnonHugePages:"):
            return int(line.split()[1])
    return 0


@pytest.fixture
def has_huge_pages():
    """Skips where the system has none to give, or does not gather pages on demand."""
    if not sys.platform.startswith("linux"):
        pytest.skip("huge pages are asked for on Linux only")
    if not pages.gather(torch.randn(LARGE)) or "[never]" in pages.SWITCH.read_text():
        pytest.skip("this kernel does not gather pages")


def test_gathered_memory_is_in_huge_pages_and_says_the_same(has_huge_pages):
    drawn = torch.randn(LARGE)
    before, place = drawn.clone(), drawn.data_ptr()
    for _ in range(2):  # again is no harm
        assert pages.gather(drawn)
        assert drawn.data_ptr() == place
        assert torch.equal(drawn, before)
        assert huge_kilobytes(drawn) >= 8 * 2**10  # of 12 MiB, less the ends


def test_a_file_in_memory_cannot_be_gathered(has_huge_pages, tmp_path):
    file = tmp_path / "weights"
    file.write_bytes(torch.ones(2**21).numpy().tobytes())
    storage = torch.UntypedStorage.from_file(str(file), False, 2**23)
    mapped = torch.empty(0).set_(storage, 0, (2**21,))
    assert not pages.gather(mapped)
    assert mapped.sum() == 2**21


def test_what_gains_nothing_is_left_alone(monkeypatch, tmp_path):
    def never(*_):
        raise AssertionError("the kernel was asked")

    monkeypatch.setattr(pages, "_advise", never)
    assert pages.gather(torch.randn(100))
    assert pages.gather(torch.empty(LARGE, device="meta"))
    monkeypatch.setattr(pages, "SWITCH", tmp_path / "enabled")  # a system that has no such thing
    assert pages.gather(torch.randn(LARGE))
    (tmp_path / "enabled").write_text("always madvise [never]\n")
    assert pages.gather(torch.randn(LARGE))


def resident_kilobytes():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Rss:"))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_what_is_forgotten_takes_no_memory_and_nothing_else_is_touched():
    whole = torch.ones(3, 2**22)
    before = resident_kilobytes()
    pages.forget(whole[1])
    assert resident_kilobytes() < before - 15 * 2**10  # of 16 MiB
    assert (whole[0] == 1).all()
    assert (whole[2] == 1).all()
    pages.forget(torch.ones(3))  # of no whole page
    pages.forget(torch.empty(3, device="meta"))


@pytest.mark.parametrize("shape", [(2, 3), LARGE])
def test_a_cast_is_like_any_other(shape):
    drawn = torch.randn(shape, requires_grad=True)
    assert pages.cast(drawn, torch.float32).data_ptr() == drawn.data_ptr()
    made = pages.cast(drawn, torch.bfloat16)
    assert torch.equal(made, drawn.to(torch.bfloat16))
    assert not made.requires_grad


@pytest.fixture
def nothing_waits():
    """No memory of other tests', and afterwards none of this one's."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        pytest.skip("only memory in huge pages is kept")
    pages.release()
    yield
    pages.release()


def large(rows, **settings):
    return pages.empty((rows, 2**20), torch.float32, CPU, **settings)


def test_memory_waits_for_the_next_tensor_of_its_size(nothing_waits):
    first, second = large(3), large(3)
    places = {first.data_ptr(), second.data_ptr()}
    assert len(places) == 2  # what is in use is nobody else's
    part = first[1]
    del first, second
    assert large(3).data_ptr() in places - {part.data_ptr() - 2**22}  # a view holds all of it
    del part
    again = large(3).fill_(5), large(3).fill_(5)
    assert {tensor.data_ptr() for tensor in again} == places
    del again
    assert not pages.zeros((3, 2**20), torch.float32, CPU).any()


def test_tensors_that_may_come_to_one_size_share_memory(nothing_waits):
    place = large(2, at_most_bytes=2**24).data_ptr()
    made = large(3, at_most_bytes=2**24)
    assert made.data_ptr() == place
    assert made.shape == (3, 2**20)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("leave", [pages.release, lambda: large(5)], ids=["release", "other size"])
def test_memory_that_no_one_will_ask_for_goes_back(nothing_waits, leave):
    large(16).fill_(1)
    before = resident_kilobytes()
    leave()
    assert resident_kilobytes() < before - 60 * 2**10  # of 64 MiB


def test_a_gradient_is_not_overwritten_by_the_next(nothing_waits):
    hidden, head = torch.randn(4, 128), torch.randn(2**14, 128).requires_grad_()
    teacher_head = torch.randn(2**14, 128)

    def gradient(row):
        loss = fused_linear_divergence(hidden[row:], head, hidden[row:], teacher_head)
        return torch.autograd.grad(loss, head)[0]

    first = gradient(0)
    kept = first.clone()
    second = gradient(2)
    assert second.data_ptr() != first.data_ptr()
    assert torch.equal(first, kept)
    del first, second
    assert torch.equal(gradient(0), kept)  # in memory that said something else
