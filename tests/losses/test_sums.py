"""Sums in float32 of half precision: torch's own, to the last bit."""

import pytest
import torch

from limbeck.losses import native, sums

TYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def draw(seed, *shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture(params=[True, False], ids=["compiled", "without a compiler"])
def compiled(request, monkeypatch):
    """With C, in several threads, or without."""
    if request.param:
        monkeypatch.setattr(native, "SHARE_ELEMENTS", 100)
        monkeypatch.setattr(native.torch, "get_num_threads", lambda: 3)
    else:
        monkeypatch.setattr(native, "library", lambda *_, **__: None)
    yield
    native._threads.cache_clear()


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_add(compiled, dtype):
    total, part = draw(0, 37, 11), draw(1, 37, 11, dtype=dtype)
    expected = total + part.float() if dtype != torch.float64 else total + part
    if dtype == torch.float64:
        total = total.double()
    assert sums.add(total, part) is total
    assert torch.equal(total, expected)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", [(37, 11), (401,)])
def test_times(compiled, dtype, shape):
    total, factor = draw(0, *shape), torch.tensor(0.37)
    total.view(-1)[:3] = torch.tensor([torch.inf, -torch.inf, 1e-41])
    expected = (total * factor).to(dtype)
    assert torch.equal(sums.times(total, factor, dtype), expected)


def test_numbers_between_two_are_rounded_to_even():
    """Ties in both directions, and one that carries into the exponent."""
    bits = torch.tensor([0x3F808000, 0x3F818000, 0x3FFF8000, 0x3F808001], dtype=torch.int32)
    total = bits.view(torch.float32)
    expected = total.bfloat16()
    assert torch.equal(sums.times(total, torch.tensor(1.0), torch.bfloat16), expected)
    assert sums.times(total, torch.tensor(1.0), torch.float32) is total


def test_rows_that_lie_apart_are_torchs():
    total = draw(0, 8, 6)
    expected = total[:, ::2] + 1
    sums.add(total[:, ::2], torch.ones(8, 3, dtype=torch.bfloat16))
    assert torch.equal(total[:, ::2], expected)
