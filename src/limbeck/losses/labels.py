"""Losses on a label or on the logits themselves."""

import torch
from torch import Tensor

from limbeck.losses.divergences import shared_columns

IGNORE = -100
"""Label of a row that has none; its loss and gradient are 0."""


def cross_entropy(student: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood of the label: plain fine-tuning.

    -log q[label]

    Args:
        student: [n, v] logits.
        labels: [n] integers in 0 .. v-1, or -100 for a row without label.

    Returns:
        [n] nats.

    >>> cross_entropy(torch.tensor([[0.0, 0.0]]), torch.tensor([1]))
    tensor([0.6931])
    """
    dtype = torch.promote_types(student.dtype, torch.float32)
    return torch.nn.functional.cross_entropy(
        student.to(dtype), labels, ignore_index=IGNORE, reduction="none"
    )


def logit_mse(
    student: Tensor, teacher: Tensor, *, temperature: float = 1.0, scale_by_t2: bool = True
) -> Tensor:
    """Mean squared difference of the logits.

    T^2 / v * sum_i (s_i / T - t_i / T)^2

    With the factor T^2 the temperature cancels; without it the loss shrinks by T^2. Unlike the
    divergences it sees a constant added to all logits of one model. Columns that are -inf in both
    are left out of the sum.

    Args:
        student: [n, v] logits.
        teacher: [n, w] logits; the first min(v, w) columns are compared.
        temperature: T.
        scale_by_t2: multiply by T^2.

    Returns:
        [n] squared logits.

    Raises:
        ValueError: shapes do not fit, or the temperature is not positive.

    Source: Kim et al., "Comparing Kullback-Leibler Divergence and Mean Squared Error Loss in
    Knowledge Distillation" (2021), eq. 2.

    >>> logit_mse(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 4.0]]))
    tensor([2.])
    """
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be positive and finite; it is {temperature}")
    student, teacher = shared_columns(student, teacher)
    hole = (student == -torch.inf) & (teacher == -torch.inf)
    if hole.any():
        student, teacher = student.masked_fill(hole, 0.0), teacher.masked_fill(hole, 0.0)
    value = (student - teacher).square().mean(-1)
    return value if scale_by_t2 else value / temperature**2
