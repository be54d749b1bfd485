"""Memory in huge pages is a tensor like any other."""

import gc
import mmap

import pytest
import torch

from limbeck.losses import pages

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
