"""A ranking of whole answers to one prompt, as a loss on how likely each of them is."""

import torch
from torch import Tensor

from limbeck.losses.blocks import Blocks


def sequence_ranking(
    logp: Tensor,
    length: Tensor,
    score: Tensor,
    group: Tensor,
    *,
    margin: float = 0.0,
    mean: bool = False,
) -> Tensor:
    """How far the log-probabilities of a group's answers are from the order of their scores.

    L_g = sum_{i, j in g: r_i < r_j} max(0, p_i - p_j + margin),   p = log q(y) / |y|

    or the mean over these pairs. Each answer of a group is given L_g, so that the mean over the
    group is L_g too, whichever of its answers are counted. Answers with equal scores are no pair;
    an answer with score NaN is in none.

    The sum is that of the paper: it grows with the square of a group's size. The mean does not,
    and lets groups of different sizes weigh alike.

    Args:
        logp: [s] log-probability of each answer, with gradient; nats.
        length: [s] how many tokens it has.
        score: [s] r, higher is better; NaN where nothing is known.
        group: [s] which group it is of.
        margin: by how much a better answer should be likelier, nats a token.
        mean: average over pairs instead of summing.

    Returns:
        [s] nats a token, >= 0; 0 where the order is right by the margin.

    Raises:
        ValueError: the margin is negative.

    Source: Yuan et al., "RRHF" (arXiv 2304.05302); Hong et al., "CycleAlign"
        (arXiv 2310.16271).

    >>> logp, length = torch.tensor([-2.0, -6.0]), torch.tensor([2.0, 4.0])
    >>> sequence_ranking(logp, length, torch.tensor([0.0, 1.0]), torch.tensor([7, 7])).tolist()
    [0.5, 0.5]
    """
    if not margin >= 0:
        raise ValueError(f"margin must be at least 0; it is {margin}")
    if not len(logp):
        return logp * 1.0
    wide = torch.promote_types(logp.dtype, torch.float32)
    each = logp.to(wide) / length.to(wide).clamp(min=1)
    groups = Blocks.of(group)
    p, r, there = groups.scatter(each), groups.scatter(score.to(torch.float64)), groups.there
    # NaN compares as False, so an unknown score is in no pair.
    pair = (r[:, :, None] < r[:, None, :]) & there[:, :, None] & there[:, None, :]
    left, right = p[:, :, None], p[:, None, :]
    # Both may be impossible (-inf), and then neither is the likelier one.
    gap = torch.where(pair & (left != right), left - right, 0.0)
    hinge = torch.where(pair, (gap + margin).clamp(min=0), 0.0)
    loss = hinge.sum((1, 2))
    if mean:
        loss = loss / pair.sum((1, 2)).clamp(min=1)
    return loss[groups.sample]
