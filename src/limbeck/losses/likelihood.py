"""A loss on how likely stretches of text are to both models, however each cuts them into tokens."""

import math

import torch
from torch import Tensor

from limbeck.losses.shared import at_most_certain

LEAST = -1e6
"""Log-probability of the impossible; an infinity would have no gradient but NaN."""


def likelihood_matching(
    student_logp: Tensor, teacher_logp: Tensor, *, temperature: float = 100.0
) -> Tensor:
    """Approximate Likelihood Matching: both models should find each stretch of text as likely.

    tau * KL(Bernoulli(P^(1/tau)) || Bernoulli(R^(1/tau)))

    with P the teacher's and R the student's probability that the text goes on with this stretch.
    All else that could have come is one other outcome. As tau grows the value tends to

    (log P - log R) + log P * log(log R / log P),

    the KL divergence of two Poisson distributions with rates -log P and -log R: it compares the
    log-probabilities themselves, so that unlikely stretches teach too. At tau = 1 it is the plain
    KL divergence of "this, or something else".

    It is computed as a sum of terms that are never negative, so that nothing cancels. Probabilities
    nearer to 1 than the type can tell (1.2e-7 in float32) are taken as that near, so that gradients
    stay finite, and so is what rounding put above 1; what has no probability at all is taken as
    log P = -1e6.

    Args:
        student_logp: [g] log-probability of each stretch, nats: the sum over its tokens.
        teacher_logp: [g] the same of the teacher.
        temperature: tau. Gradients keep their size as it grows, because of the factor tau.

    Returns:
        [g] nats, >= 0; 0 with zero gradient where both are equal.

    Raises:
        ValueError: shapes differ, or the temperature is not positive and finite.

    Source: Minixhofer, Vulic and Ponti, "Universal Cross-Tokenizer Distillation via Approximate
    Likelihood Matching" (arXiv 2503.20083), the binarised f-divergence with f the KL divergence.
    The factor tau is ours, for a scale that does not depend on it.

    >>> p, q = torch.tensor([0.54]).log(), torch.tensor([0.3]).log()
    >>> [round(likelihood_matching(q, p, temperature=t).item(), 5) for t in (1.0, 1e5)]
    [0.12427, 0.17504]
    """
    if student_logp.shape != teacher_logp.shape or student_logp.ndim != 1:
        raise ValueError(
            "log-probabilities must be [g] and [g]; they are "
            f"{list(student_logp.shape)} (student) and {list(teacher_logp.shape)} (teacher)"
        )
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be positive and finite; it is {temperature}")
    dtype = torch.promote_types(student_logp.dtype, teacher_logp.dtype)
    dtype = torch.promote_types(dtype, torch.float32)
    nearest = torch.finfo(dtype).eps
    # Moved, not clamped: a student that is certain and wrong must still have a gradient.
    logq, logp = (
        (at_most_certain(x.to(dtype).clamp(min=LEAST)) - nearest) / temperature
        for x in (student_logp, teacher_logp)
    )
    return temperature * (_excess(logp, logq) + _excess(_log1mexp(logp), _log1mexp(logq)))


def _excess(logp: Tensor, logq: Tensor) -> Tensor:
    """p log(p / q) - p + q, which is >= 0; over all outcomes the last two add up to nothing."""
    ratio = logq - logp
    near = ratio.abs() < 0.1
    small = torch.where(near, ratio, 0.0)
    # exp(x) - 1 - x: the difference would be nothing but rounding.
    series = 1 + small / 3 * (1 + small / 4 * (1 + small / 5 * (1 + small / 6 * (1 + small / 7))))
    p = logp.exp()
    far = logq.exp() - p * (1 + torch.where(near, 0.0, ratio))
    return torch.where(near, p * small.square() / 2 * series, far)


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, exact at both ends (Maechler 2012)."""
    near = x > -math.log(2)
    return torch.where(
        near,
        (-torch.where(near, x, -1.0).expm1()).log(),
        (-torch.where(near, -1.0, x).exp()).log1p(),
    )
