"""Losses between attention maps, and between relations of queries, keys or values.

Maps come as the scores before their softmax, [n, h, t], with -inf where a row does not look.
Argument order is always (student, teacher), one value a row comes out, in float32 or wider. Where
the numbers of heads differ, the mean over heads of one model is compared with that of the other.
"""

import math

import torch
from torch import Tensor

from limbeck.losses.blocks import Blocks
from limbeck.losses.features import both, exact
from limbeck.losses.shared import widened

__all__ = ["attention_kl", "attention_mse", "relation_kl"]

NEVER = -1e30
"""A score whose probability is exactly 0, and which, unlike -inf, has a gradient."""


def attention_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) of where a row looks, mean over the heads.

    1 / h * sum_h sum_t p_ht (log p_ht - log q_ht), with p and q softmaxes over the positions at
    which both look. Where the numbers of heads differ, p and q are first averaged over heads.

    Args:
        student: [n, h, t] scores.
        teacher: [n, g, t] scores.

    Returns:
        [n] nats, >= 0; 0 where both look alike, and where there is no position that both look at.

    Raises:
        ValueError: they are not of the same rows and positions.

    Source: Wang et al., "MiniLM" (arXiv 2002.10957), L_AT.

    >>> p, q = torch.tensor([[[0.7, 0.2, 0.1, 0.0]]]), torch.tensor([[[0.5, 0.3, 0.2, 0.0]]])
    >>> round(attention_kl(q.log(), p.log()).item(), 5)
    0.08512
    """
    student, teacher, seen = _scores(student, teacher)
    logq, logp = _log_maps(student, seen), _log_maps(teacher, seen)
    if logq.shape[1] != logp.shape[1]:
        logq, logp = (x.logsumexp(1, keepdim=True) - math.log(x.shape[1]) for x in (logq, logp))
        logq, logp = logq.masked_fill(~seen, 0.0), logp.masked_fill(~seen, 0.0)
    return _kl(logp, logq).mean(-1)


def attention_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of the scores before the softmax.

    Over heads and over the positions at which both look. Where the numbers of heads differ, the
    scores are first averaged over heads. A softmax does not see a number that is added to all
    scores of a row; this loss does.

    Args:
        student: [n, h, t] scores.
        teacher: [n, g, t] scores.

    Returns:
        [n] >= 0; 0 where there is no position that both look at.

    Raises:
        ValueError: they are not of the same rows and positions.

    Source: Jiao et al., "TinyBERT" (arXiv 1909.10351), L_attn.

    >>> attention_mse(torch.tensor([[[1.0, 2.0, -torch.inf]]]), torch.tensor([[[1.0, 4.0, 9.0]]]))
    tensor([2.])
    """
    student, teacher, seen = _scores(student, teacher)
    student, teacher = student.masked_fill(~seen, 0.0), teacher.masked_fill(~seen, 0.0)
    if student.shape[1] != teacher.shape[1]:
        student, teacher = student.mean(1, keepdim=True), teacher.mean(1, keepdim=True)
    total = (student - teacher).square().sum((1, 2))
    return total / (student.shape[1] * seen.sum((1, 2)).clamp(min=1))


def relation_kl(student: Tensor, teacher: Tensor, sample: Tensor, heads: int) -> Tensor:
    """KL(teacher || student) of how a row's vector lies to those before it, mean over heads.

    Each vector is cut into `heads` equal parts. R_i = softmax_j(x_i . x_j / sqrt(d / heads)) over
    the rows j <= i of the same sample, and the loss of row i is KL(R_i of the teacher || R_i of the
    student). Rows behind i are left out: in a causal model no row can read them, and a row's loss
    must not depend on the text that follows.

    Args:
        student: [n, d] queries, keys or values.
        teacher: [n, w] of the same.
        sample: [n] which sample each row is of; rows of one sample are in the order of the text.
        heads: equal parts; must divide both widths, and need not be the models' own heads.

    Returns:
        [n] nats, >= 0; 0 for the first row of each sample, which stands alone.

    Raises:
        ValueError: the numbers of rows differ, or `heads` does not divide a width.

    Source: Wang et al., "MiniLMv2" (arXiv 2012.15828), there over all pairs.

    >>> rows = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 2.0]])
    >>> relation_kl(rows, rows.flip(1), torch.tensor([0, 0, 0]), heads=1).abs() < 1e-6
    tensor([True, True, True])
    """
    student, teacher = both(student, teacher)
    widths = student.shape[1], teacher.shape[1]
    if heads < 1 or any(width % heads for width in widths):
        raise ValueError(
            f"{heads} heads do not divide the widths {widths[0]} (student) and {widths[1]}"
            f" (teacher); these do: {', '.join(map(str, common_divisors(*widths)))}"
        )
    blocks = Blocks.of(sample)
    # A sample's rows fill the first places, so what stands before a row is never padding.
    before = torch.ones(blocks.longest, blocks.longest, dtype=torch.bool, device=sample.device)
    before = before.tril()
    with exact(student):
        scores = [_relations(blocks.scatter(x), heads) for x in (student, teacher)]
    logq, logp = (_log_maps(x, before) for x in scores)
    return blocks.gather(_kl(logp, logq).mean(1))


def common_divisors(*widths: int) -> list[int]:
    """The numbers that divide all widths, ascending.

    >>> common_divisors(12, 18)
    [1, 2, 3, 6]
    """
    largest = math.gcd(*widths)
    return [number for number in range(1, largest + 1) if largest % number == 0]


def _relations(vectors: Tensor, heads: int) -> Tensor:
    """[b, t, d] -> [b, heads, t, t] products of their parts, scaled."""
    parts = vectors.unflatten(-1, (heads, -1)).transpose(1, 2)
    return parts @ parts.mT * parts.shape[-1] ** -0.5


def _scores(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Both in float32 or wider, and [n, 1, t] where all heads of both look."""
    fits = student.ndim == teacher.ndim == 3
    if (
        not fits
        or student.shape[::2] != teacher.shape[::2]
        or 0 in (*student.shape[1:], *teacher.shape[1:])
    ):
        raise ValueError(
            "attention must be [n, heads, positions] of the same rows and positions; it is "
            f"{list(student.shape)} (student) and {list(teacher.shape)} (teacher)"
        )
    student, teacher = widened(student, teacher)
    seen = [(scores > -torch.inf).all(1, keepdim=True) for scores in (student, teacher)]
    return student, teacher, seen[0] & seen[1]


def _log_maps(scores: Tensor, seen: Tensor) -> Tensor:
    """log softmax over the positions that are seen; 0 at the others, which cancels in a KL."""
    return scores.masked_fill(~seen, NEVER).log_softmax(-1).masked_fill(~seen, 0.0)


def _kl(logp: Tensor, logq: Tensor) -> Tensor:
    return (logp.exp() * (logp - logq)).sum(-1)
