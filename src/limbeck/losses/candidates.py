"""Divergences over whole answers: those that a teacher gave, as if there were no others."""

from typing import Literal

import torch
from torch import Tensor

Kind = Literal["forward", "reverse", "jensen_shannon"]


def candidates(
    logp: Tensor,
    share: Tensor,
    group: Tensor,
    *,
    divergence: Kind = "forward",
    beta: float = 0.5,
) -> Tensor:
    """A divergence of two distributions over the answers of a group.

    P(y) = share_y / sum of shares, the teacher's;   Q(y) = q(y) / sum of q over the group, the
    student's, renormalised over the same answers

    forward         KL(P || Q)
    reverse         KL(Q || P)
    jensen_shannon  beta KL(P || M) + (1 - beta) KL(Q || M),   M = beta P + (1 - beta) Q

    Each member of a group of k is given k times its own term, so that the mean over the members is
    the group's divergence. A term may be negative; the mean is not. A group of one gives 0.

    Because Q is renormalised, only the ratios of the student's probabilities count: how likely it
    finds these answers together does not. A cross-entropy teaches that.

    Args:
        logp: [s] the student's log-probability of each answer, nats, with gradient.
        share: [s] how often the teacher gave it; not negative, some of a group positive.
        group: [s] which group it is of.
        divergence: which.
        beta: the teacher's part of the mixture, in (0, 1).

    Returns:
        [s].

    Raises:
        ValueError: shapes differ, or beta is not inside (0, 1).

    >>> q, p = torch.tensor([0.5, 0.3, 0.2]).log(), torch.tensor([0.7, 0.2, 0.1])
    >>> same = torch.zeros(3, dtype=torch.int64)
    >>> round(candidates(q, p, same, divergence="reverse").mean().item(), 5)
    0.09203
    """
    if not logp.shape == share.shape == group.shape or logp.ndim != 1:
        raise ValueError(
            "log-probabilities, shares and groups must be [s] each; they are"
            f" {list(logp.shape)}, {list(share.shape)} and {list(group.shape)}"
        )
    if divergence == "jensen_shannon" and not 0 < beta < 1:
        raise ValueError(f"beta must be inside (0, 1); it is {beta}")
    if not len(logp):
        return logp * 0
    _, place, count = group.unique(return_inverse=True, return_counts=True)
    logq = logp - _log_sum(logp, place, len(count))[place]
    total = torch.zeros(len(count), dtype=logp.dtype, device=logp.device)
    p = share.to(logp.dtype)
    p = p / total.index_add(0, place, p)[place]
    q, log_p = logq.exp(), p.log()
    if divergence == "forward":
        value = torch.xlogy(p, p) - torch.where(p > 0, p * logq, 0.0)
    elif divergence == "reverse":
        value = q * (logq - log_p)
    else:
        mixture = beta * p + (1 - beta) * q
        log_m = mixture.clamp(min=torch.finfo(mixture.dtype).tiny).log()
        value = beta * (torch.xlogy(p, p) - p * log_m) + (1 - beta) * q * (logq - log_m)
    return value * count[place]


def _log_sum(values: Tensor, place: Tensor, groups: int) -> Tensor:
    """[g] log of the sum of exp over each group."""
    low = torch.full((groups,), -torch.inf, dtype=values.dtype, device=values.device)
    top = low.scatter_reduce(0, place, values.detach(), "amax")
    total = torch.zeros_like(top).index_add(0, place, (values - top[place]).exp())
    return top + total.log()
