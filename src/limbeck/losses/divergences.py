"""Divergences between two next-token distributions, one value per row.

Logits in, [n, v] -> [n] out, in nats; argument order is always (student, teacher). Values are
computed in float32 whatever the inputs, and in float64 when one of them is. Below, p is the
teacher's distribution and q the student's, each the softmax of logits / T over the columns that
both have. All multiply their value by T^2, so that gradients keep their size as T grows (Hinton et
al. 2015, section 2), unless `scale_by_t2` is False.

A column that is -inf in both models is as if it were not there. Where one model gives probability
to what the other rules out, a KL divergence may be infinite: it is then inf, and that row's
gradient is 0. Gradients flow into both arguments; who wants none in the teacher detaches it.
"""

import math

import torch
from torch import Tensor

from limbeck.losses.shared import all_finite, check_share, factor, log_probabilities

__all__ = [
    "adaptive_kl",
    "forward_kl",
    "jensen_shannon",
    "reverse_kl",
    "skew_forward_kl",
    "skew_reverse_kl",
    "total_variation",
]


def forward_kl(
    student: Tensor, teacher: Tensor, *, temperature: float = 1.0, scale_by_t2: bool = True
) -> Tensor:
    """KL(teacher || student): the student must cover all that the teacher finds likely.

    T^2 * sum_i p_i (log p_i - log q_i)

    Args:
        student: [n, v] logits.
        teacher: [n, w] logits; the first min(v, w) columns are compared.
        temperature: T, divides both models' logits.
        scale_by_t2: multiply by T^2.

    Returns:
        [n] nats, >= 0; 0 with zero gradient where p = q.

    Raises:
        ValueError: shapes do not fit, or the temperature is not positive.

    Source: Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network"
    (arXiv 1503.02531), section 2, less the teacher's entropy: a KL divergence, not a cross-entropy.

    >>> p, q = torch.tensor([[0.7, 0.2, 0.1]]), torch.tensor([[0.5, 0.3, 0.2]])
    >>> round(forward_kl(q.log(), p.log()).item(), 5)
    0.08512
    """
    scale = factor(temperature, scale_by_t2)
    logq, logp = log_probabilities(student, teacher, temperature)
    return scale * _kl(logp, logq)


def reverse_kl(
    student: Tensor, teacher: Tensor, *, temperature: float = 1.0, scale_by_t2: bool = True
) -> Tensor:
    """KL(student || teacher): the student may leave out modes, but must not invent any.

    T^2 * sum_i q_i (log q_i - log p_i)

    Args:
        student: [n, v] logits.
        teacher: [n, w] logits; the first min(v, w) columns are compared.
        temperature: T, divides both models' logits.
        scale_by_t2: multiply by T^2.

    Returns:
        [n] nats, >= 0; 0 with zero gradient where p = q.

    Raises:
        ValueError: shapes do not fit, or the temperature is not positive.

    Source: Gu et al., "MiniLLM: Knowledge Distillation of Large Language Models"
    (arXiv 2306.08543), eq. 1, per token and summed exactly over the vocabulary.

    >>> p, q = torch.tensor([[0.7, 0.2, 0.1]]), torch.tensor([[0.5, 0.3, 0.2]])
    >>> round(reverse_kl(q.log(), p.log()).item(), 5)
    0.09203
    """
    scale = factor(temperature, scale_by_t2)
    logq, logp = log_probabilities(student, teacher, temperature)
    return scale * _kl(logq, logp)


def jensen_shannon(
    student: Tensor,
    teacher: Tensor,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    scale_by_t2: bool = True,
) -> Tensor:
    """Generalised Jensen-Shannon divergence: bounded, and symmetric at beta = 1/2.

    T^2 * (beta KL(p || m) + (1 - beta) KL(q || m)),   m = beta p + (1 - beta) q

    It is 0 at both ends, whatever p and q, so a beta near one of them makes a weak loss. Divided by
    beta it tends to KL(p || q) as beta -> 0; divided by 1 - beta, to KL(q || p) as beta -> 1.

    Args:
        student: [n, v] logits.
        teacher: [n, w] logits; the first min(v, w) columns are compared.
        beta: the teacher's share of the mixture and the weight of its divergence, in [0, 1].
        temperature: T, divides both models' logits.
        scale_by_t2: multiply by T^2.

    Returns:
        [n] nats, between 0 and T^2 log 2; finite even where the supports differ.

    Raises:
        ValueError: beta is outside [0, 1], shapes do not fit, or the temperature is not positive.

    Source: Agarwal et al., "On-Policy Distillation of Language Models: Learning from Self-Generated
    Mistakes" (arXiv 2306.13649), eq. 1.

    >>> p, q = torch.tensor([[0.7, 0.2, 0.1]]), torch.tensor([[0.5, 0.3, 0.2]])
    >>> [round(jensen_shannon(q.log(), p.log(), beta=b).item(), 5) for b in (0.1, 0.5, 0.9)]
    [0.00769, 0.0219, 0.00818]
    """
    check_share("beta", beta)
    scale = factor(temperature, scale_by_t2)
    logq, logp = log_probabilities(student, teacher, temperature)
    if beta in (0, 1):
        return _zero(logq, logp)
    teachers, students = _skew_kl(logp, logq, beta), _skew_kl(logq, logp, 1 - beta)
    return scale * (beta * teachers + (1 - beta) * students)


def skew_forward_kl(
    student: Tensor,
    teacher: Tensor,
    *,
    alpha: float = 0.1,
    temperature: float = 1.0,
    scale_by_t2: bool = True,
) -> Tensor:
    """Forward KL against a mixture, so that no token's gradient explodes.

    T^2 * KL(p || alpha p + (1 - alpha) q)

    It is KL(p || q) at alpha = 0 and 0 at alpha = 1.

    Args:
        student: [n, v] logits.
        teacher: [n, w] logits; the first min(v, w) columns are compared.
        alpha: the teacher's share of the mixture, in [0, 1].
        temperature: T, divides both models' logits.
        scale_by_t2: multiply by T^2.

    Returns:
        [n] nats, between 0 and -T^2 log(alpha), which it reaches on disjoint supports.

    Raises:
        ValueError: alpha is outside [0, 1], shapes do not fit, or the temperature is not positive.

    Source: Ko et al., "DistiLLM: Towards Streamlined Distillation for Large Language Models"
    (arXiv 2402.03898), the skew KL divergence of section 3.

    >>> p, q = torch.tensor([[0.7, 0.2, 0.1]]), torch.tensor([[0.5, 0.3, 0.2]])
    >>> round(skew_forward_kl(q.log(), p.log(), alpha=0.1).item(), 5)
    0.06958
    """
    check_share("alpha", alpha)
    scale = factor(temperature, scale_by_t2)
    logq, logp = log_probabilities(student, teacher, temperature)
    return scale * _skew_kl(logp, logq, alpha)


def skew_reverse_kl(
    student: Tensor,
    teacher: Tensor,
    *,
    alpha: float = 0.1,
    temperature: float = 1.0,
    scale_by_t2: bool = True,
) -> Tensor:
    """Reverse KL against a mixture, so that it stays bounded where the teacher is certain.

    T^2 * KL(q || alpha q + (1 - alpha) p)

    The mixture holds the student too, and the gradient flows through it. It is KL(q || p) at
    alpha = 0 and 0 at alpha = 1.

    Args:
        student: [n, v] logits.
        teacher: [n, w] logits; the first min(v, w) columns are compared.
        alpha: the student's share of the mixture, in [0, 1].
        temperature: T, divides both models' logits.
        scale_by_t2: multiply by T^2.

    Returns:
        [n] nats, between 0 and -T^2 log(alpha), which it reaches on disjoint supports.

    Raises:
        ValueError: alpha is outside [0, 1], shapes do not fit, or the temperature is not positive.

    Source: Ko et al., "DistiLLM: Towards Streamlined Distillation for Large Language Models"
    (arXiv 2402.03898), the skew reverse KL divergence of section 3.

    >>> p, q = torch.tensor([[0.7, 0.2, 0.1]]), torch.tensor([[0.5, 0.3, 0.2]])
    >>> round(skew_reverse_kl(q.log(), p.log(), alpha=0.1).item(), 5)
    0.07283
    """
    check_share("alpha", alpha)
    scale = factor(temperature, scale_by_t2)
    logq, logp = log_probabilities(student, teacher, temperature)
    return scale * _skew_kl(logq, logp, alpha)


def total_variation(
    student: Tensor, teacher: Tensor, *, temperature: float = 1.0, scale_by_t2: bool = True
) -> Tensor:
    """Half the L1 distance: the most by which the two differ on the probability of any event.

    T^2 * 1/2 sum_i |p_i - q_i|

    Args:
        student: [n, v] logits.
        teacher: [n, w] logits; the first min(v, w) columns are compared.
        temperature: T, divides both models' logits.
        scale_by_t2: multiply by T^2.

    Returns:
        [n], between 0 and T^2: a probability, not nats. The gradient of a tie p_i = q_i is 0.

    Raises:
        ValueError: shapes do not fit, or the temperature is not positive.

    Source: Wen et al., "f-Divergence Minimization for Sequence-Level Knowledge Distillation"
    (arXiv 2307.15190), the TVD distillation loss, per token.

    >>> p, q = torch.tensor([[0.7, 0.2, 0.1]]), torch.tensor([[0.5, 0.3, 0.2]])
    >>> round(total_variation(q.log(), p.log()).item(), 5)
    0.2
    """
    scale = factor(temperature, scale_by_t2)
    logq, logp = log_probabilities(student, teacher, temperature)
    return scale * 0.5 * (logp.exp() - logq.exp()).abs().sum(-1)


def adaptive_kl(
    student: Tensor,
    teacher: Tensor,
    *,
    mu: float = 0.5,
    temperature: float = 1.0,
    scale_by_t2: bool = True,
) -> Tensor:
    """Forward KL where the head of the distribution is off, reverse KL where its tail is.

    T^2 * (w KL(p || q) + (1 - w) KL(q || p)),   w = g_head / (g_head + g_tail)

    The head is the teacher's most likely tokens, as few as reach probability mu together, with the
    token that crosses it; of equally likely ones, the lower id comes first. The tail is all others.
    g sums |p_i - q_i| over each. The weight w is a constant to the gradient, and 1/2 where both
    gaps are 0.

    Args:
        student: [n, v] logits.
        teacher: [n, w] logits; the first min(v, w) columns are compared.
        mu: probability that the head must reach, in (0, 1).
        temperature: T, divides both models' logits.
        scale_by_t2: multiply by T^2.

    Returns:
        [n] nats, >= 0; 0 with zero gradient where p = q.

    Raises:
        ValueError: mu is outside (0, 1), shapes do not fit, or the temperature is not positive.

    Source: Wu et al., "Rethinking Kullback-Leibler Divergence in Knowledge Distillation for Large
    Language Models" (arXiv 2404.02657), the adaptive KL divergence.

    >>> p, q = torch.tensor([[0.7, 0.2, 0.1]]), torch.tensor([[0.5, 0.3, 0.2]])
    >>> round(adaptive_kl(q.log(), p.log()).item(), 5)  # both gaps are 0.2: the mean of both KLs
    0.08858
    """
    if not 0 < mu < 1:
        raise ValueError(f"mu must be between 0 and 1, both excluded; it is {mu}")
    scale = factor(temperature, scale_by_t2)
    logq, logp = log_probabilities(student, teacher, temperature)
    with torch.no_grad():
        weight = head_share(logp.exp(), logq.exp(), mu)
    # A weight of 0 leaves its divergence out, even an infinite one.
    forward = (weight * _kl(logp, logq)).masked_fill(weight == 0, 0.0)
    reverse = ((1 - weight) * _kl(logq, logp)).masked_fill(weight == 1, 0.0)
    return scale * (forward + reverse)


def head_share(p: Tensor, q: Tensor, mu: float) -> Tensor:
    """[n] share of the gap |p - q| that lies in the head of p; 1/2 where there is no gap."""
    mass, order = p.sort(dim=-1, descending=True, stable=True)
    gap = (p - q).abs().gather(-1, order).cumsum(-1)
    # Rounding may keep the mass below a mu near 1; then all tokens are the head.
    crossing = (mass.cumsum(-1) < mu).sum(-1, keepdim=True).clamp(max=p.shape[-1] - 1)
    head, both = gap.gather(-1, crossing).squeeze(-1), gap[:, -1]
    return torch.where(both == 0, 0.5, head / both)


def _kl(logp: Tensor, logq: Tensor) -> Tensor:
    """KL(p || q) = sum p (log p - log q), [n]; inf without gradient where q rules out some of p."""
    p = logp.exp()
    ratio = logp - logq
    if all_finite(ratio):
        return (p * ratio).sum(-1)
    ratio = ratio.masked_fill(p == 0, 0.0)  # 0 * inf is not a number, in value and gradient
    ruled_out = ratio == torch.inf
    value = (p * ratio.masked_fill(ruled_out, 0.0)).sum(-1)
    return value.masked_fill(ruled_out.any(-1), torch.inf)


def _skew_kl(logp: Tensor, logq: Tensor, share: float) -> Tensor:
    """KL(p || share p + (1 - share) q), [n]; its gradient includes the p within the mixture."""
    if share == 0:
        return _kl(logp, logq)
    if share == 1:
        return _zero(logp, logq)
    p = logp.exp()
    ratio = logq - logp
    if not all_finite(ratio):
        ratio = ratio.masked_fill(p == 0, 0.0)
    # mixture / p is exactly 1 at p = q, and then the value is exactly 0. Where exp would overflow,
    # p is far below rounding.
    limit = math.log(torch.finfo(p.dtype).max) - 1
    mixture = share + (1 - share) * ratio.clamp(max=limit).exp()
    return -(p * mixture.log()).sum(-1)


def _zero(first: Tensor, second: Tensor) -> Tensor:
    """[n] zeros that stay part of the graph, so that backward works and gives zeros."""
    return first[:, :0].sum(-1) + second[:, :0].sum(-1)
