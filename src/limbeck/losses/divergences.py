"""Divergences between two next-token distributions, one value per row.

Logits in, [n, v] -> [n], in nats; argument order is always (student, teacher). Values are computed
in float32 (float64 stays float64) whatever the inputs. Below, p is the teacher's distribution and
q the student's, each the softmax of logits / T over the vocabulary that both have: a model whose
output is padded (151,936 columns beside 152,064) is compared on the columns they share.

All take `temperature` T > 0 and multiply the value by T squared, so that gradients keep their size
as T grows (Hinton et al. 2015, section 2.1), unless `scale_by_t2` is False. A column that is -inf
has probability 0 and adds nothing where p log p says so.
"""

import torch
from torch import Tensor

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
        temperature: T, divides both.
        scale_by_t2: multiply by T^2.

    Returns:
        [n] nats, >= 0, and 0 with zero gradient where both are equal.

    Raises:
        ValueError: shapes do not fit, or the temperature is not positive.

    Source: Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network" (2015), with
    the teacher's entropy subtracted, so that it is a KL divergence and not a cross-entropy.

    >>> p, q = torch.tensor([[0.7, 0.2, 0.1]]), torch.tensor([[0.5, 0.3, 0.2]])
    >>> round(forward_kl(q.log(), p.log()).item(), 5)
    0.08512
    """
    logq, logp = _log_probabilities(student, teacher, temperature)
    return _kl(logp, logq) * _scale(temperature, scale_by_t2)


def reverse_kl(
    student: Tensor, teacher: Tensor, *, temperature: float = 1.0, scale_by_t2: bool = True
) -> Tensor:
    """KL(student || teacher): the student may leave out modes, but must not invent any.

    T^2 * sum_i q_i (log q_i - log p_i)

    Arguments, result and errors are those of `forward_kl`.

    Source: Gu et al., "MiniLLM: Knowledge Distillation of Large Language Models" (2023), eq. 1,
    summed exactly over the vocabulary.

    >>> p, q = torch.tensor([[0.7, 0.2, 0.1]]), torch.tensor([[0.5, 0.3, 0.2]])
    >>> round(reverse_kl(q.log(), p.log()).item(), 5)
    0.09203
    """
    logq, logp = _log_probabilities(student, teacher, temperature)
    return _kl(logq, logp) * _scale(temperature, scale_by_t2)


def jensen_shannon(
    student: Tensor,
    teacher: Tensor,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    scale_by_t2: bool = True,
) -> Tensor:
    """Generalised Jensen-Shannon divergence; bounded, symmetric at beta = 1/2.

    T^2 * (beta KL(p || m) + (1 - beta) KL(q || m)),   m = beta p + (1 - beta) q

    It tends to 0 at both ends; divided by beta it tends to KL(p || q) as beta -> 0, divided by
    1 - beta to KL(q || p) as beta -> 1.

    Args:
        student: [n, v] logits.
        teacher: [n, w] logits.
        beta: the teacher's share of the mixture, in [0, 1].
        temperature: T.
        scale_by_t2: multiply by T^2.

    Returns:
        [n] nats, between 0 and T^2 log 2.

    Raises:
        ValueError: beta is outside [0, 1], or as in `forward_kl`.

    Source: Agarwal et al., "On-Policy Distillation of Language Models" (GKD, 2023), eq. 1.

    >>> p, q = torch.tensor([[0.7, 0.2, 0.1]]), torch.tensor([[0.5, 0.3, 0.2]])
    >>> [round(jensen_shannon(q.log(), p.log(), beta=b).item(), 5) for b in (0.1, 0.5, 0.9)]
    [0.00769, 0.0219, 0.00818]
    """
    _check_share("beta", beta)
    logq, logp = _log_probabilities(student, teacher, temperature)
    logm = _log_mixture(logp, logq, beta)
    value = beta * _kl(logp, logm) + (1 - beta) * _kl(logq, logm)
    return value * _scale(temperature, scale_by_t2)


def skew_forward_kl(
    student: Tensor,
    teacher: Tensor,
    *,
    alpha: float = 0.1,
    temperature: float = 1.0,
    scale_by_t2: bool = True,
) -> Tensor:
    """Forward KL against a mixture, so that its gradient stays bounded.

    T^2 * KL(p || alpha p + (1 - alpha) q)

    It is KL(p || q) at alpha = 0, 0 at alpha = 1, and never above -T^2 log alpha.

    Args:
        student: [n, v] logits.
        teacher: [n, w] logits.
        alpha: the teacher's share of the mixture, in [0, 1].
        temperature: T.
        scale_by_t2: multiply by T^2.

    Returns:
        [n] nats.

    Raises:
        ValueError: alpha is outside [0, 1], or as in `forward_kl`.

    Source: Ko et al., "DistiLLM: Towards Streamlined Distillation for Large Language Models"
    (2024), definition 1.

    >>> p, q = torch.tensor([[0.7, 0.2, 0.1]]), torch.tensor([[0.5, 0.3, 0.2]])
    >>> round(skew_forward_kl(q.log(), p.log()).item(), 5)
    0.06958
    """
    _check_share("alpha", alpha)
    logq, logp = _log_probabilities(student, teacher, temperature)
    return _kl(logp, _log_mixture(logp, logq, alpha)) * _scale(temperature, scale_by_t2)


def skew_reverse_kl(
    student: Tensor,
    teacher: Tensor,
    *,
    alpha: float = 0.1,
    temperature: float = 1.0,
    scale_by_t2: bool = True,
) -> Tensor:
    """Reverse KL against a mixture; the gradient flows through the mixture too.

    T^2 * KL(q || alpha q + (1 - alpha) p)

    Arguments are those of `skew_forward_kl`, with alpha the student's share.

    Source: Ko et al., "DistiLLM" (2024), definition 1 with the roles exchanged.

    >>> p, q = torch.tensor([[0.7, 0.2, 0.1]]), torch.tensor([[0.5, 0.3, 0.2]])
    >>> round(skew_reverse_kl(q.log(), p.log()).item(), 5)
    0.07283
    """
    _check_share("alpha", alpha)
    logq, logp = _log_probabilities(student, teacher, temperature)
    return _kl(logq, _log_mixture(logq, logp, alpha)) * _scale(temperature, scale_by_t2)


def total_variation(
    student: Tensor, teacher: Tensor, *, temperature: float = 1.0, scale_by_t2: bool = True
) -> Tensor:
    """Half the L1 distance: the largest difference in probability of any event.

    T^2 * 1/2 sum_i |p_i - q_i|

    Arguments and errors are those of `forward_kl`; the result is a probability times T^2, not nats.

    Source: Wen et al., "f-Divergence Minimization for Sequence-Level Knowledge Distillation"
    (2023), section 3.

    >>> p, q = torch.tensor([[0.7, 0.2, 0.1]]), torch.tensor([[0.5, 0.3, 0.2]])
    >>> round(total_variation(q.log(), p.log()).item(), 5)
    0.2
    """
    logq, logp = _log_probabilities(student, teacher, temperature)
    return 0.5 * (logp.exp() - logq.exp()).abs().sum(-1) * _scale(temperature, scale_by_t2)


def adaptive_kl(
    student: Tensor,
    teacher: Tensor,
    *,
    mu: float = 0.5,
    temperature: float = 1.0,
    scale_by_t2: bool = True,
) -> Tensor:
    """Forward and reverse KL, weighted by where the two distributions differ.

    T^2 * (w KL(p || q) + (1 - w) KL(q || p)),   w = g_head / (g_head + g_tail)

    g sums |p_i - q_i| over the head (the teacher's most likely tokens, the fewest that together
    reach probability mu) and over the tail (all others). The weight is a constant to the gradient,
    and 1/2 where both gaps are 0.

    Args:
        student: [n, v] logits.
        teacher: [n, w] logits.
        mu: probability of the head, in (0, 1).
        temperature: T.
        scale_by_t2: multiply by T^2.

    Returns:
        [n] nats.

    Raises:
        ValueError: mu is outside (0, 1), or as in `forward_kl`.

    Source: Wu et al., "Rethinking Kullback-Leibler Divergence in Knowledge Distillation for Large
    Language Models" (2024), section 4.
    """
    if not 0 < mu < 1:
        raise ValueError(f"mu must be between 0 and 1, both excluded; it is {mu}")
    logq, logp = _log_probabilities(student, teacher, temperature)
    with torch.no_grad():
        p = logp.exp()
        gap = (p - logq.exp()).abs()
        ordered, order = p.sort(dim=-1, descending=True)
        # A token is in the head while the mass before it has not yet reached mu.
        in_head = ordered.cumsum(-1) - ordered < mu
        head = (gap.gather(-1, order) * in_head).sum(-1)
        both = gap.sum(-1)
        weight = torch.where(both > 0, head / both.clamp(min=torch.finfo(both.dtype).tiny), 0.5)
    value = weight * _kl(logp, logq) + (1 - weight) * _kl(logq, logp)
    return value * _scale(temperature, scale_by_t2)


def shared_columns(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """The columns both have, in at least float32.

    Raises:
        ValueError: they are not [n, v] and [n, w].
    """
    if student.ndim != 2 or teacher.ndim != 2 or len(student) != len(teacher):
        raise ValueError(
            "logits must be [n, v] of the same n rows; they are "
            f"{list(student.shape)} (student) and {list(teacher.shape)} (teacher)"
        )
    width = min(student.shape[1], teacher.shape[1])
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    return student[:, :width].to(dtype), teacher[:, :width].to(dtype)


def _log_probabilities(
    student: Tensor, teacher: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    _scale(temperature, True)
    student, teacher = shared_columns(student, teacher)
    if temperature != 1.0:
        student, teacher = student / temperature, teacher / temperature
    return student.log_softmax(-1), teacher.log_softmax(-1)


def _kl(logp: Tensor, logq: Tensor) -> Tensor:
    """sum p (log p - log q), where a probability of 0 adds 0 and has no gradient."""
    # Without a hole, 0 * inf cannot arise, and two full-size temporaries are saved.
    if torch.isfinite(logp).all():
        return (logp.exp() * (logp - logq)).sum(-1)
    there = logp != -torch.inf
    safe_p = logp.masked_fill(~there, 0.0)
    safe_q = logq.masked_fill(~there, 0.0)
    return (safe_p.exp() * (safe_p - safe_q)).masked_fill(~there, 0.0).sum(-1)


def _log_mixture(first: Tensor, second: Tensor, share: float) -> Tensor:
    """log(share * exp(first) + (1 - share) * exp(second)), exact where a share or term is 0."""
    if share == 0:
        return second
    if share == 1:
        return first
    left = first + torch.tensor(share, dtype=torch.float64).log().to(first)
    right = second + torch.tensor(1 - share, dtype=torch.float64).log().to(second)
    hole = (left == -torch.inf) & (right == -torch.inf)
    if hole.any():  # logaddexp(-inf, -inf) has a NaN gradient
        mixed = torch.logaddexp(left.masked_fill(hole, 0.0), right.masked_fill(hole, 0.0))
        return mixed.masked_fill(hole, -torch.inf)
    return torch.logaddexp(left, right)


def _scale(temperature: float, scale_by_t2: bool) -> float:
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be positive and finite; it is {temperature}")
    return temperature**2 if scale_by_t2 else 1.0


def _check_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be between 0 and 1; it is {value}")
