"""The KL divergence in two parts: how sure of the text's own token, and how the others compare."""

import torch
from torch import Tensor

from limbeck.losses.divergences import forward_kl
from limbeck.losses.labels import IGNORE
from limbeck.losses.shared import factor, shared_columns

__all__ = ["decoupled_kd"]

NEVER = -1e30
"""A logit whose probability is exactly 0, and which, unlike -inf, needs no care in a difference."""


def decoupled_kd(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    temperature: float = 1.0,
    scale_by_t2: bool = True,
) -> Tensor:
    """Decoupled knowledge distillation: target and non-target tokens with weights of their own.

    T^2 * (alpha KL(b || c) + beta KL(p' || q'))

    b = (p_y, 1 - p_y) and c = (q_y, 1 - q_y) are the probabilities of the label y and of anything
    else; p' and q' are those of the other tokens, divided by their sum. The plain divergence is
    KL(p || q) = KL(b || c) + (1 - p_y) KL(p' || q'): it hardly looks at the other tokens where the
    teacher is sure of the label, and this loss does, beta / (1 - p_y) times as much.

    Args:
        student: [n, v] logits.
        teacher: [n, w] logits; the first min(v, w) columns are compared.
        labels: [n] int64, the target in these columns, or -100 for a row without, whose loss is 0.
        alpha: weight of the target's part.
        beta: weight of the other tokens' part.
        temperature: T, divides both models' logits.
        scale_by_t2: multiply by T^2.

    Returns:
        [n] nats, >= 0; 0 with zero gradient where p = q.

    Raises:
        ValueError: alpha or beta is negative, shapes do not fit, or the temperature is not
            positive.

    Source: Zhao et al., "Decoupled Knowledge Distillation" (arXiv 2203.08679), eq. 7. There the
    target is the image's class; in text it is the token that the text goes on with.

    >>> p, q = torch.tensor([[0.7, 0.2, 0.1]]), torch.tensor([[0.5, 0.3, 0.2]])
    >>> label = torch.tensor([0])
    >>> parts = [decoupled_kd(q.log(), p.log(), label, alpha=a, beta=1 - a) for a in (1.0, 0.0)]
    >>> [round(part.item(), 5) for part in parts]
    [0.08228, 0.00947]
    """
    if not (alpha >= 0 and beta >= 0):
        raise ValueError(f"alpha and beta must not be negative; they are {alpha} and {beta}")
    scale = factor(temperature, scale_by_t2)
    student, teacher = shared_columns(student, teacher)
    if labels.shape != student.shape[:1]:
        raise ValueError(f"labels must be [{len(student)}]; they are {list(labels.shape)}")
    place = labels.clamp(min=0)[:, None]
    mine, mine_others, mine_alone = _split(student / temperature, place)
    theirs, their_others, theirs_alone = _split(teacher / temperature, place)
    value = student[:, :0].sum(-1)  # 0, but part of the graph
    if alpha:
        value = value + alpha * forward_kl(mine, theirs)
    if beta:
        # A teacher that is certain says nothing of the others.
        within = forward_kl(
            mine_others.masked_fill(theirs_alone, 0.0), their_others.masked_fill(theirs_alone, 0.0)
        )
        impossible = (mine_alone & ~theirs_alone).squeeze(-1)
        value = value + beta * within.masked_fill(impossible, torch.inf)
    return scale * value.masked_fill(labels == IGNORE, 0.0)


def _split(logits: Tensor, place: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[n, 2] logits of target and rest, [n, v] of the rest alone, and [n, 1] if there is none."""
    others = logits.scatter(-1, place, NEVER)
    alone = (others <= NEVER).all(-1, keepdim=True)
    others = others.masked_fill(alone, 0.0)  # a softmax of nothing would be NaN
    rest = others.logsumexp(-1, keepdim=True).masked_fill(alone, -torch.inf)
    return torch.cat([logits.gather(-1, place), rest], -1), others, alone
