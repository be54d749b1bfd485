"""The alpha-beta divergence: one family that holds both KL divergences and what lies between."""

import math

import torch
from torch import Tensor

from limbeck.losses.shared import all_finite, factor, log_probabilities

__all__ = ["alpha_beta"]


def alpha_beta(
    student: Tensor,
    teacher: Tensor,
    *,
    alpha: float = 0.2,
    beta: float = 0.7,
    temperature: float = 1.0,
    scale_by_t2: bool = True,
) -> Tensor:
    """Alpha-beta divergence: how much the gap and how much the student's own certainty count.

    T^2 * sum_i (alpha p_i^(alpha + beta) + beta q_i^(alpha + beta)
                 - (alpha + beta) p_i^alpha q_i^beta) / (alpha beta (alpha + beta))

    Where a denominator is 0 it is the limit, which it also tends to without a jump: alpha = 1,
    beta = 0 is KL(p || q); alpha = 0, beta = 1 is KL(q || p); alpha = beta = 0 is
    1/2 sum_i (log p_i - log q_i)^2. At 1/2 and 1/2 it is four times the squared Hellinger distance,
    at 1 and 1 half the squared Euclidean one. The gradient in the student's logits is
    g - q sum_j g_j with g_i = q_i^beta (q_i^alpha - p_i^alpha) / alpha: a small alpha evens out
    gaps of different sizes, a small beta listens also where the student sees no probability.

    With alpha and beta above 0 it is finite whatever the models rule out. Where alpha, beta or
    their sum is not positive, what one model alone rules out can make it infinite; with a negative
    one, the rarest tokens decide.

    Args:
        student: [n, v] logits.
        teacher: [n, w] logits; the first min(v, w) columns are compared.
        alpha: power of the teacher's probability.
        beta: power of the student's probability.
        temperature: T, divides both models' logits.
        scale_by_t2: multiply by T^2.

    Returns:
        [n], >= 0; 0 with zero gradient where p = q; nats at the two KL divergences.

    Raises:
        ValueError: alpha or beta is not finite, shapes do not fit, or the temperature is not
            positive.

    Source: Cichocki, Cruces and Amari, "Generalized Alpha-Beta Divergences and Their Application to
    Robust Nonnegative Matrix Factorization" (Entropy 13(1), 2011), eq. 6 and its limits; Wang et
    al., "ABKD: Pursuing a Proper Allocation of the Probability Mass in Knowledge Distillation via
    alpha-beta-Divergence" (arXiv 2505.04560), for distillation.

    >>> p, q = torch.tensor([[0.7, 0.2, 0.1]]), torch.tensor([[0.5, 0.3, 0.2]])
    >>> round(alpha_beta(q.log(), p.log(), alpha=1.0, beta=1.0).item(), 5)
    0.03
    >>> [round(alpha_beta(q.log(), p.log(), alpha=a, beta=1 - a).item(), 5) for a in (1.0, 0.5)]
    [0.08512, 0.08809]
    """
    if not math.isfinite(alpha) or not math.isfinite(beta):
        raise ValueError(f"alpha and beta must be finite; they are {alpha} and {beta}")
    scale = factor(temperature, scale_by_t2)
    logq, logp = log_probabilities(student, teacher, temperature)
    value = _each(logp, logq, alpha, beta).sum(-1)
    if all_finite(value):  # it is not where a model rules something out
        return scale * value
    return scale * _with_holes(logp, logq, alpha, beta)


def nodes(alpha: float, beta: float, dtype: torch.dtype) -> tuple[float, float, float] | None:
    """0, beta and alpha + beta in order; None where rounding could not tell them apart."""
    low, middle, high = sorted((0.0, beta, alpha + beta))
    return (low, middle, high) if high - low >= torch.finfo(dtype).eps ** 0.5 else None


def _each(logp: Tensor, logq: Tensor, alpha: float, beta: float) -> Tensor:
    """[n, v] what each token adds.

    It is the second divided difference of c -> p^(alpha + beta - c) q^c at 0, beta and alpha +
    beta. So no limit is a case of its own, and no digits are lost near one: the differences are
    taken of two powers that lie together, and divided at last by the widest gap.
    """
    ratio = logq - logp
    points = nodes(alpha, beta, logp.dtype)
    if points is None:
        return 0.5 * ratio.square()
    low, middle, high = points
    upper, lower = (
        _slope(logp, logq, ratio, alpha + beta, *pair) for pair in ((middle, high), (low, middle))
    )
    return (upper - lower) / (high - low)


def _slope(
    logp: Tensor, logq: Tensor, ratio: Tensor, whole: float, first: float, second: float
) -> Tensor:
    """First divided difference of c -> p^(whole - c) q^c between two points, or its derivative."""
    start = ((whole - first) * logp + first * logq).exp()
    if second - first < torch.finfo(ratio.dtype).eps:
        return ratio * start
    end = ((whole - second) * logp + second * logq).exp()
    gap = (second - first) * ratio
    up = gap.relu()
    down = gap - up
    # From the larger of the two powers, so that no exponential overflows.
    return (start * down.expm1() - end * (-up).expm1()) / (second - first)


def _with_holes(logp: Tensor, logq: Tensor, alpha: float, beta: float) -> Tensor:
    """[n] where tokens may be ruled out; an infinite value has no gradient."""
    whole = alpha + beta
    no_p, no_q = logp == -torch.inf, logq == -torch.inf
    hole = no_p | no_q
    with torch.no_grad():
        tried = _each(logp.masked_fill(hole, 0.0), logq.masked_fill(hole, 0.0), alpha, beta)
        beyond = ~tried.isfinite() & ~(logp.isnan() | logq.isnan())  # more than a float can hold
    left_out = hole | beyond
    filled = logp.masked_fill(left_out, 0.0), logq.masked_fill(left_out, 0.0)
    value = _each(*filled, alpha, beta).sum(-1)
    infinite = beyond.any(-1)
    # What is left of a token's part where one of its probabilities goes to 0.
    for alone, log_other, power in ((no_p & ~no_q, logq, alpha), (no_q & ~no_p, logp, beta)):
        if power > 0 and whole > 0:
            rest = (whole * log_other.masked_fill(~alone, -torch.inf)).exp().sum(-1)
            value = value + rest / (power * whole)
        else:
            infinite = infinite | alone.any(-1)
    return value.masked_fill(infinite, torch.inf)
