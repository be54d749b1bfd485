"""A target between the student and its teacher."""

import torch
from torch import Tensor

from limbeck.losses.divergences import forward_kl
from limbeck.losses.shared import all_finite, check_share, shared_columns

__all__ = ["between", "taid"]


def taid(
    student: Tensor,
    teacher: Tensor,
    *,
    t: float = 0.5,
    temperature: float = 1.0,
    scale_by_t2: bool = True,
) -> Tensor:
    """Forward KL from a target on the way from the student to the teacher.

    T^2 * KL(m || q),   m = softmax(((1 - t) s + t z) / T)

    s are the student's logits, which are a constant within m, and z the teacher's. At t = 0 the
    target is the student itself: 0, without gradient. At t = 1 it is KL(p || q). In between the
    value goes to 0 with p = q too, and near it is about t^2 times as large, with a gradient of
    about t times.

    Args:
        student: [n, v] logits.
        teacher: [n, w] logits; the first min(v, w) columns are compared.
        t: how far the target is from the student, in [0, 1].
        temperature: T, divides both models' logits.
        scale_by_t2: multiply by T^2.

    Returns:
        [n] nats, >= 0; 0 with zero gradient where p = q.

    Raises:
        ValueError: t is outside [0, 1], shapes do not fit, or the temperature is not positive.

    Source: Shing et al., "TAID: Temporally Adaptive Interpolated Distillation for Efficient
    Knowledge Transfer in Language Models" (arXiv 2501.16937), eq. 2 and 3, less the target's
    entropy: a KL divergence, not a cross-entropy.

    >>> p, q = torch.tensor([[0.7, 0.2, 0.1]]), torch.tensor([[0.5, 0.3, 0.2]])
    >>> [round(taid(q.log(), p.log(), t=t).item(), 5) for t in (0.0, 0.5, 1.0)]
    [0.0, 0.02314, 0.08512]
    """
    check_share("t", t)
    student, teacher = shared_columns(student, teacher)
    target = between(student.detach(), teacher, t)
    return forward_kl(student, target, temperature=temperature, scale_by_t2=scale_by_t2)


def between(student: Tensor, teacher: Tensor, t: float) -> Tensor:
    """(1 - t) student + t teacher: exactly the student where both are equal; -inf where one is.

    At t = 0 and t = 1 the other is not looked at.
    """
    if t == 0:
        return student + teacher[:, :0].sum()  # stays part of the graph
    if t == 1:
        return teacher
    mixed = student + t * (teacher - student)
    if all_finite(mixed):
        return mixed
    return mixed.masked_fill(student == -torch.inf, -torch.inf)  # inf - inf is NaN
