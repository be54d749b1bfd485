"""Draws depend on seed, name and numbers alone; the global generator is left as it was."""

from itertools import product

import torch
from hypothesis import given
from hypothesis import strategies as st

from limbeck.core.random import seeded, stream, stream_seed


def test_streams_differ_and_repeat():
    keys = list(product(range(3), ["a", "b", "a/1"], [(), (0,), (1,), (0, 1), (1, 0)]))
    seeds = {stream_seed(seed, name, *numbers) for seed, name, numbers in keys}
    assert len(seeds) >= len(keys) - 9  # ("a", 1) may be written as ("a/1",)
    first = torch.rand(3, generator=stream(0, "a", 1))
    assert torch.equal(first, torch.rand(3, generator=stream(0, "a", 1)))


@given(st.integers(0, 2**63), st.text(st.characters(codec="utf-8")), st.integers())
def test_seeds_fit_a_generator(seed, name, number):
    assert 0 <= stream_seed(seed, name, number) < 2**63
    stream(seed, name, number)


def test_the_global_generator_is_untouched():
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    with seeded(1, "x"):
        inside = torch.rand(2)
    assert torch.equal(torch.rand(2), expected)
    with seeded(1, "x"):
        assert torch.equal(torch.rand(2), inside)
