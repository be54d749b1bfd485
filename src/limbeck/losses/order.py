"""Keep the order in which the teacher ranks its likeliest tokens."""

import torch
from torch import Tensor

from limbeck.losses.shared import check_share, factor, shared_columns

__all__ = ["ranking"]


def ranking(
    student: Tensor,
    teacher: Tensor,
    *,
    k: int = 10,
    margin: float = 1.0,
    temperature: float = 1.0,
    scale_by_t2: bool = True,
) -> Tensor:
    """Pairwise hinge on logits: of two tokens, the student must prefer the one the teacher does.

    T^2 * mean over pairs (i, j) with z_i > z_j of max(0, margin (z_i - z_j) - (s_i - s_j)) / T

    The pairs are those of the teacher's k likeliest tokens; z are its logits and s the student's.
    What is asked for is a share of the teacher's own distance, not a number of logits: so if both
    models' logits are multiplied by c, so is the loss, and which pairs are in order stays the same.
    A student that is surer than the teacher pays nothing, and tokens beyond the k are not looked
    at. Tokens that the teacher finds equally likely are in no pair. Only differences of logits
    count, so a constant added to all of one model's changes nothing.

    Args:
        student: [n, v] logits.
        teacher: [n, w] logits; the first min(v, w) columns are compared.
        k: how many of the teacher's tokens are ranked; all, where there are fewer.
        margin: share of the teacher's distance that the student must keep, in [0, 1].
        temperature: T, divides both models' logits.
        scale_by_t2: multiply by T^2; as in other losses, and here the loss then grows with T.

    Returns:
        [n] logits, >= 0; 0 with zero gradient where both are equal.

    Raises:
        ValueError: k is below 2, the margin is outside [0, 1], shapes do not fit, or the
            temperature is not positive.

    Source: Burges et al., "Learning to Rank using Gradient Descent" (ICML 2005), for pairs; the
    hinge as in Joachims, "Optimizing Search Engines using Clickthrough Data" (KDD 2002).

    >>> s, z = torch.tensor([[1.0, 2.0, 0.0]]), torch.tensor([[3.0, 2.0, 0.0]])
    >>> round(ranking(s, z).item(), 4)  # hinges 1 + 1 = 2, 3 - 1 = 2 and 2 - 2 = 0
    1.3333
    """
    check_share("margin", margin)
    scale = factor(temperature, scale_by_t2) / temperature
    student, teacher = shared_columns(student, teacher)
    top, ids = likeliest(teacher, k)
    mine = student.gather(-1, ids)
    first, second = pairs(top)
    wanted, found = top[:, first] - top[:, second], mine[:, first] - mine[:, second]
    # What the teacher rules out has no rank.
    ranked = ((wanted > 0) | wanted.isnan()) & (top[:, second] != -torch.inf)
    ruled_out = (mine[:, first] == -torch.inf) & ranked
    left_out = ~ranked | ruled_out
    hinge = (margin * wanted.masked_fill(left_out, 0.0) - found.masked_fill(left_out, 0.0)).relu()
    value = hinge.sum(-1) / ranked.sum(-1).clamp(min=1)
    return scale * value.masked_fill(ruled_out.any(-1), torch.inf)


def likeliest(teacher: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """[n, k] the largest logits, falling, and their columns."""
    if k < 2:
        raise ValueError(f"k must be at least 2, so that there is a pair; it is {k}")
    return teacher.topk(min(k, teacher.shape[1]), sorted=True)


def pairs(top: Tensor) -> tuple[Tensor, Tensor]:
    """Places of all pairs in a row of k, the first of each before the second."""
    k = top.shape[1]
    first, second = torch.triu_indices(k, k, 1, device=top.device)
    return first, second
