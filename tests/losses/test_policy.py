"""Estimates of the reverse KL by enumeration of a tiny vocabulary; returns and advantages."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.losses import reverse_kl
from limbeck.losses.policy import (
    advantages,
    returns,
    reverse_kl_estimate,
    surrogate,
    top_k_reverse_kl,
)


def pair(seed, v=5, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(2, v, generator=generator, dtype=torch.float64)).unbind(0)


def moments(estimator, s, z):
    """Mean and variance over all tokens, each with its probability."""
    logq, logp = s.log_softmax(-1), z.log_softmax(-1)
    values = reverse_kl_estimate(logq, logp, estimator)
    mean = (logq.exp() * values).sum()
    return mean.item(), (logq.exp() * (values - mean).square()).sum().item()


@pytest.mark.parametrize("seed", range(6))
def test_k1_and_k3_have_no_bias(seed):
    s, z = pair(seed)
    exact = reverse_kl(s[None], z[None]).item()
    assert moments("k1", s, z)[0] == pytest.approx(exact, abs=1e-9)
    assert moments("k3", s, z)[0] == pytest.approx(exact, abs=1e-9)


@pytest.mark.parametrize("seed", range(6))
def test_near_equality_k2_and_k3_vary_less_and_k2_has_little_bias(seed):
    s, z = pair(seed)
    z = s + 0.05 * z
    exact = reverse_kl(s[None], z[None]).item()
    mean = {k: moments(k, s, z)[0] for k in ("k1", "k2", "k3")}
    variance = {k: moments(k, s, z)[1] for k in ("k1", "k2", "k3")}
    assert mean["k2"] == pytest.approx(exact, rel=0.1)
    assert variance["k2"] < 0.05 * variance["k1"]
    assert variance["k3"] < 0.05 * variance["k1"]


def test_far_from_equality_k2_is_biased():
    s, z = torch.tensor([2.0, 0.0, -2.0]), torch.tensor([-2.0, 0.0, 2.0])
    exact = reverse_kl(s[None], z[None]).item()
    assert abs(moments("k2", s, z)[0] - exact) > 0.5


@pytest.mark.parametrize("seed", range(4))
def test_the_gradient_of_k2_is_the_divergences(seed):
    """Its expectation over the draws, which k1 (0) and k3 (another one) do not have."""
    s, z = pair(seed)

    def gradient(value):
        own = s.clone().requires_grad_()
        value(own).backward()
        return own.grad

    exact = gradient(lambda own: reverse_kl(own[None], z[None]).sum())
    q = s.softmax(-1)

    def of(estimator):
        return gradient(
            lambda own: (
                q * reverse_kl_estimate(own.log_softmax(-1), z.log_softmax(-1), estimator)
            ).sum()
        )

    assert torch.allclose(of("k2"), exact, atol=1e-9)
    assert torch.allclose(of("k1"), torch.zeros_like(s), atol=1e-9)
    assert not torch.allclose(of("k3"), exact, atol=1e-4)


@pytest.mark.parametrize("seed", range(4))
def test_the_policy_gradient_is_the_divergences(seed):
    """Enumerated: sum_y q(y) * grad of the surrogate with advantage log p - log q."""
    s, z = pair(seed)
    exact_student = s.clone().requires_grad_()
    reverse_kl(exact_student[None], z[None]).sum().backward()
    own = s.clone().requires_grad_()
    logq = own.log_softmax(-1)
    loss = surrogate(logq, logq.detach(), z.log_softmax(-1) - logq.detach())
    (s.softmax(-1) * loss).sum().backward()
    assert torch.allclose(own.grad, exact_student.grad, atol=1e-9)


def test_draws_of_another_policy_are_weighted():
    """Drawn from r, the gradient's expectation is still that under q."""
    s, z = pair(1)
    r = torch.tensor([0.3, 0.2, 0.2, 0.2, 0.1], dtype=torch.float64)
    exact = s.clone().requires_grad_()
    reverse_kl(exact[None], z[None]).sum().backward()
    own = s.clone().requires_grad_()
    logq = own.log_softmax(-1)
    loss = surrogate(logq, r.log(), z.log_softmax(-1) - logq.detach())
    (r * loss).sum().backward()
    assert torch.allclose(own.grad, exact.grad, atol=1e-9)


def test_the_clip_stops_what_went_far_enough():
    behaviour = torch.zeros(4)
    logp = torch.tensor([0.5, 0.5, -0.5, -0.5]).requires_grad_()
    gain = torch.tensor([1.0, -1.0, 1.0, -1.0])
    loss = surrogate(logp, behaviour, gain, clip=0.2)
    assert loss.tolist() == pytest.approx([-1.2, math.exp(0.5), -math.exp(-0.5), 0.8], rel=1e-5)
    loss.sum().backward()
    assert (logp.grad != 0).tolist() == [False, True, True, False]


def test_everything_is_finite_however_far():
    logq, logp = torch.tensor([-1e4, 0.0]), torch.tensor([0.0, -1e4])
    for estimator in ("k1", "k2", "k3"):
        assert reverse_kl_estimate(logq, logp, estimator).isfinite().all()
    assert surrogate(torch.tensor([0.0]), torch.tensor([-1e4]), torch.ones(1)).isfinite().all()


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.integers(1, 12), st.floats(0.3, 5))
def test_top_k_is_below_the_exact_and_reaches_it(seed, k, temperature):
    s, z = pair(seed, v=9, scale=2.0)
    exact = reverse_kl(s[None], z[None], temperature=temperature).item()
    found = top_k_reverse_kl(s[None], z[None], k=k, temperature=temperature).item()
    assert -1e-12 <= found <= exact + 1e-9
    if k >= 9:
        assert found == pytest.approx(exact, abs=1e-12)


def test_top_k_against_a_sum_by_hand():
    q = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    p = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    expected = 0.5 * math.log(5) + 0.3 * math.log(1.5) + 0.2 * math.log(0.2 / 0.7)
    assert top_k_reverse_kl(q.log()[None], p.log()[None], k=2).item() == pytest.approx(expected)
    with pytest.raises(ValueError, match="k must be"):
        top_k_reverse_kl(q.log()[None], p.log()[None], k=0)


def test_top_k_has_a_gradient_where_the_student_rules_out():
    s = torch.tensor([[1.0, 0.5, -math.inf, -math.inf]]).requires_grad_()
    top_k_reverse_kl(s, torch.zeros(1, 4), k=2).sum().backward()
    assert s.grad.isfinite().all()


@pytest.mark.parametrize("temperature", [0.05, 0.1])
def test_top_k_holds_what_no_probability_could(temperature):
    """Where the teacher's are below the smallest float32, their logarithms are not."""
    generator = torch.Generator().manual_seed(0)
    s, z = 3 * torch.randn(2, 4, 500, generator=generator)
    few, every = s.clone().requires_grad_(), s.clone().requires_grad_()
    found = top_k_reverse_kl(few, z, k=100, temperature=temperature)
    expected = reverse_kl(every, z, temperature=temperature)
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(few.grad, every.grad, rtol=1e-4, atol=1e-6)


def test_top_k_of_a_row_that_does_not_count_leaves_the_others_alone():
    s, z = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0))
    z[1] = torch.where(torch.arange(6) == s[1].argmax(), -math.inf, z[1])  # it must not be said
    z[2] = torch.where(s[2] < s[2].topk(2).values[1], -math.inf, z[2])  # nor must any other here
    s.requires_grad_()
    found = top_k_reverse_kl(s, z, k=2)
    assert found.isfinite().tolist() == [True, False, False]
    torch.where(torch.tensor([True, False, False]), found, 0.0).sum().backward()
    alone = s.detach()[:1].clone().requires_grad_()
    top_k_reverse_kl(alone, z[:1], k=2).sum().backward()
    torch.testing.assert_close(s.grad[:1], alone.grad)
    assert not s.grad[1:].any()


def by_hand(rewards, lengths, discount, own, mean):
    found, start = [], 0
    for length in lengths:
        mine = rewards[start : start + length]
        for t in range(length):
            first = t if own else t + 1
            powers = [discount ** (u - first) for u in range(first, length)]
            total = sum(w * mine[u] for w, u in zip(powers, range(first, length), strict=True))
            found.append(total / sum(powers) if mean and sum(powers) else total)
        start += length
    return found


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("discount", [0.0, 0.5, 1.0])
def test_returns_against_the_sum_as_it_is_written(own, mean, discount):
    lengths = [3, 1, 4]
    rewards = torch.linspace(-1, 2, 8, dtype=torch.float64)
    sample = torch.tensor([2, 2, 2, 5, 7, 7, 7, 7])
    found = returns(rewards, sample, discount=discount, own=own, mean=mean)
    expected = by_hand(rewards.tolist(), lengths, discount, own, mean)
    assert found.tolist() == pytest.approx(expected)
    assert len(returns(rewards[:0], sample[:0], discount=1.0, own=True, mean=mean)) == 0


@pytest.mark.parametrize("mean", [True, False])
def test_returns_are_exact_within_a_models_autocast(mean):
    rewards = torch.randn(300, generator=torch.Generator().manual_seed(0))
    expected = by_hand(rewards.tolist(), [300], 0.999, True, mean)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = returns(
            rewards, torch.zeros(300, dtype=torch.int64), discount=0.999, own=True, mean=mean
        )
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx(expected, abs=1e-4)


def test_advantages_compare_within_a_group():
    score = torch.tensor([1.0, 3.0, 5.0, 7.0, 7.0, 2.0])
    group = torch.tensor([0, 1, 0, 1, 1, 4])
    found = advantages(score, group)
    assert found[[0, 2]].tolist() == pytest.approx([-1, 1], abs=1e-5)
    assert found[5] == 0
    three = torch.tensor([3.0, 7.0, 7.0])
    expected = (three - three.mean()) / three.std(correction=0)
    assert found[[1, 3, 4]].tolist() == pytest.approx(expected.tolist(), abs=1e-5)
    assert advantages(score, group, spread=False)[[0, 2]].tolist() == [-2, 2]


def test_equal_scores_teach_nothing():
    same = torch.full((4,), 0.1)
    assert advantages(same, torch.zeros(4, dtype=torch.int64)).abs().max() < 1e-6
