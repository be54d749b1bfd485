"""Divergences over candidate answers: by hand, their gradient, and what they do not see."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.losses.candidates import candidates

KINDS = ("forward", "reverse", "jensen_shannon")


def by_hand(q, p, kind, beta):
    q, p = [x / sum(q) for x in q], [x / sum(p) for x in p]

    def kl(a, b):
        return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True) if x > 0)

    if kind == "forward":
        return kl(p, q)
    if kind == "reverse":
        return kl(q, p)
    m = [beta * x + (1 - beta) * y for x, y in zip(p, q, strict=True)]
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


def groups_of(sizes):
    return torch.tensor([g for g, size in enumerate(sizes) for _ in range(size)])


@settings(max_examples=60)
@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=4),
    st.sampled_from(KINDS),
    st.floats(0.05, 0.95),
    st.integers(0, 10**6),
)
def test_each_groups_mean_is_its_divergence(sizes, kind, beta, seed):
    generator = torch.Generator().manual_seed(seed)
    count = sum(sizes)
    logp = -20 * torch.rand(count, generator=generator, dtype=torch.float64)
    share = torch.rand(count, generator=generator, dtype=torch.float64) + 1e-3
    order = torch.randperm(count, generator=generator)  # groups need not stand together
    group = groups_of(sizes)
    found = torch.empty(count, dtype=torch.float64)
    found[order] = candidates(
        logp[order], share[order], 7 - group[order], divergence=kind, beta=beta
    )
    for g, size in enumerate(sizes):
        mine = group == g
        expected = by_hand(logp[mine].exp().tolist(), share[mine].tolist(), kind, beta)
        assert found[mine].mean().item() == pytest.approx(expected, abs=1e-9)
        if size == 1:
            assert found[mine].item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_distributions_cost_nothing_and_move_nothing(kind):
    share = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    logp = (share.log() - 30).requires_grad_()  # however unlikely all of them are together
    value = candidates(logp, share, torch.zeros(3, dtype=torch.int64), divergence=kind).mean()
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-12)
    assert logp.grad.abs().max() < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind):
    logp = torch.tensor([-3.0, -1.0, -2.0, -5.0, -4.0], dtype=torch.float64, requires_grad=True)
    share = torch.tensor([0.5, 0.3, 0.2, 0.9, 0.1], dtype=torch.float64)
    group = torch.tensor([0, 0, 0, 1, 1])
    assert torch.autograd.gradcheck(lambda x: candidates(x, share, group, divergence=kind), (logp,))


@pytest.mark.parametrize("kind", KINDS)
def test_far_and_unlikely_answers_stay_finite(kind):
    logp = torch.tensor([-1e4, 0.0, -1e4]).requires_grad_()
    share = torch.tensor([1.0, 1.0, 1.0])
    value = candidates(logp, share, torch.zeros(3, dtype=torch.int64), divergence=kind)
    assert value.isfinite().all()
    value.sum().backward()
    assert logp.grad.isfinite().all()


def test_an_answer_that_the_teacher_never_gave():
    logp = torch.tensor([0.5, 0.5]).log().requires_grad_()
    share, group = torch.tensor([1.0, 0.0]), torch.zeros(2, dtype=torch.int64)
    forward = candidates(logp, share, group, divergence="forward").mean()
    assert forward.item() == pytest.approx(math.log(2))
    forward.backward()
    assert logp.grad.isfinite().all()
    assert candidates(logp, share, group, divergence="reverse").mean() == math.inf
    shannon = candidates(logp, share, group, divergence="jensen_shannon").mean()
    assert shannon.item() == pytest.approx(by_hand([0.5, 0.5], [1, 0], "jensen_shannon", 0.5))


def test_weighted_cross_entropy_is_that_of_the_approximate_distribution():
    """sum_y P(y) (-log q(y)) = H(P) + KL(P || q), over all answers that there are."""
    q = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    counts = torch.tensor([5.0, 2.0, 1.0, 0.0], dtype=torch.float64)
    p = counts / counts.sum()
    cross = -(p * q.log()).sum()
    entropy = -torch.xlogy(p, p).sum()
    same = torch.zeros(4, dtype=torch.int64)
    assert (cross - entropy).item() == pytest.approx(
        candidates(q.log(), p, same, divergence="forward").mean().item()
    )


def test_wrong_shapes():
    with pytest.raises(ValueError, match="must be"):
        candidates(torch.zeros(2), torch.zeros(3), torch.zeros(2))
    with pytest.raises(ValueError, match="beta"):
        candidates(
            torch.zeros(1), torch.ones(1), torch.zeros(1), divergence="jensen_shannon", beta=1
        )
    assert len(candidates(torch.zeros(0), torch.zeros(0), torch.zeros(0))) == 0
