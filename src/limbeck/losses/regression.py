"""Losses on the logits themselves, without a softmax."""

import torch
from torch import Tensor

from limbeck.losses.shared import all_finite, factor, shared_columns


def logit_mse(
    student: Tensor, teacher: Tensor, *, temperature: float = 1.0, scale_by_t2: bool = True
) -> Tensor:
    """Mean squared difference of the raw logits.

    T^2 / v * sum_i (s_i / T - t_i / T)^2

    The temperature cancels, unless `scale_by_t2` is False: then the loss is divided by T^2. It asks
    for more than equal distributions: a constant added to all of one model's logits changes it.
    (Where that is unwanted, `forward_kl` at a high temperature tends to half this loss with the
    mean difference taken out.) A column that is -inf in both models is as if it were not there; in
    one of them, the loss is inf and the row's gradient 0.

    Args:
        student: [n, v] logits.
        teacher: [n, w] logits; the first min(v, w) columns are compared, and averaged over.
        temperature: T, divides both models' logits.
        scale_by_t2: multiply by T^2.

    Returns:
        [n] squared logits, >= 0; 0 with zero gradient where both are equal.

    Raises:
        ValueError: shapes do not fit, or the temperature is not positive.

    Source: Kim et al., "Comparing Kullback-Leibler Divergence and Mean Squared Error Loss in
    Knowledge Distillation" (arXiv 2105.08919), L_MSE, there a sum over classes and here a mean.

    >>> logit_mse(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 4.0]]))
    tensor([2.])
    """
    scale = factor(temperature, scale_by_t2) / temperature**2
    student, teacher = shared_columns(student, teacher)
    difference = student - teacher
    if all_finite(difference):
        return scale * difference.square().mean(-1)
    neither = (student == -torch.inf) & (teacher == -torch.inf)
    one = difference.isinf()
    columns = (~neither).sum(-1).clamp(min=1)
    value = difference.masked_fill(neither | one, 0.0).square().sum(-1) / columns
    return scale * value.masked_fill(one.any(-1), torch.inf)
