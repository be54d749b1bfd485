"""Divergences from a teacher of whom only a few tokens a row are known: top-k, or random draws."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from limbeck.losses.shared import factor, log_sum


@dataclass(frozen=True, slots=True, kw_only=True)
class Sparse:
    """What is known of n distributions: some tokens with their probability, and the rest's.

    Attributes:
        ids: [n, k] int64 token ids, different within a row. Where a row has fewer than k, the
            others have mass 0 (and any valid id).
        mass: [n, k] float32. Top-k: the probability itself. Random draws: the share of draws that
            fell on the token, which has the probability as its expectation.
        rest: [n] float32, probability of all other tokens together; 0 for random draws. Mass and
            rest sum to 1.
        negentropy: [n] float32, the teacher's part of the KL divergence, in nats. Top-k:
            sum mass log mass + rest log rest. Random draws: the mean of log p over the draws,
            whose expectation is sum p log p.
        temperature: at which the teacher's logits were softened.
    """

    ids: Tensor
    mass: Tensor
    rest: Tensor
    negentropy: Tensor
    temperature: float = 1.0

    def __getitem__(self, index: Tensor | slice) -> "Sparse":
        """The rows that `index` names."""
        return replace(
            self,
            ids=self.ids[index],
            mass=self.mass[index],
            rest=self.rest[index],
            negentropy=self.negentropy[index],
        )

    def to(self, device: torch.device) -> "Sparse":
        """The same on `device`."""
        return replace(
            self,
            ids=self.ids.to(device, non_blocking=True),
            mass=self.mass.to(device, non_blocking=True),
            rest=self.rest.to(device, non_blocking=True),
            negentropy=self.negentropy.to(device, non_blocking=True),
        )


def sparse_kl(
    student: Tensor,
    sparse: Sparse,
    *,
    temperature: float = 1.0,
    scale_by_t2: bool = True,
    tail: bool = True,
) -> Tensor:
    """KL(teacher || student) from a few tokens of the teacher's distribution.

    T^2 * (negentropy - sum_j mass_j log q_j - rest log q_rest),   q_rest = 1 - sum_j q_j

    Of random draws the value is an unbiased estimate of KL(p || q), whose gradient in the student's
    logits has the expectation T (q - p); a single value may be negative. Of top-k it is the KL
    divergence of the two distributions after all other tokens were made one: >= 0, 0 at p = q, at
    most KL(p || q), and equal to it at k = v. Without `tail` the rest is left out and the masses
    divided by their sum, as is often done; the student that minimises this is not the teacher, but
    the teacher cut to its top k, which is too sure of itself.

    Args:
        student: [n, v] logits.
        sparse: what is known of the teacher, n rows.
        temperature: T, divides the student's logits; the teacher's were divided when it was read.
        scale_by_t2: multiply by T^2.
        tail: count the probability of all other tokens.

    Returns:
        [n] nats. Rows in which no token has mass are 0 with zero gradient; where the student rules
        out a token that has mass, the value is inf and the gradient 0.

    Raises:
        ValueError: shapes do not fit, an id is beyond the student's columns, or the temperature is
            not positive or not the one of `sparse`.

    Source: draws: Anshumann et al., "Sparse Logit Sampling: Accelerating Knowledge Distillation in
    LLMs" (arXiv 2503.16870), random sampling KD with the proposal p. Top-k with a tail: the KL
    divergence (arXiv 1503.02531, section 2) over the partition {1}, ..., {k}, {all others}.

    >>> half = torch.tensor([0.5])
    >>> top = Sparse(ids=torch.tensor([[0]]), mass=half[None], rest=half, negentropy=half.log())
    >>> abs(round(sparse_kl(torch.tensor([[0.5, 0.3, 0.2]]).log(), top).item(), 6))
    0.0
    """
    scale = factor(temperature, scale_by_t2)
    _check(student, sparse, temperature)
    logits = student.to(torch.promote_types(student.dtype, torch.float32))
    if temperature != 1.0:
        logits = logits / temperature
    mass = sparse.mass.to(logits.dtype)
    normalizer = logits.logsumexp(-1)
    logq = logits.gather(-1, sparse.ids) - normalizer[:, None]
    if tail:
        value = sparse.negentropy.to(logits.dtype) + _cross_entropy(mass, logq)
        if bool((sparse.rest > 0).any()):
            rest = sparse.rest.to(logits.dtype)[:, None]
            # Not 1 - sum: near 0 that is nothing but rounding.
            others = logits.masked_fill(_kept(sparse, logits.shape[-1]), -torch.inf)
            value = value + _cross_entropy(rest, log_sum(others) - normalizer[:, None])
    else:
        mass = mass / mass.sum(-1, keepdim=True).clamp(min=torch.finfo(mass.dtype).tiny)
        value = torch.xlogy(mass, mass).sum(-1) + _cross_entropy(mass, logq)
    value = value.masked_fill((mass == 0).all(-1), 0.0)
    return scale * value.masked_fill(value == torch.inf, torch.inf)  # an infinity has no gradient


def _check(student: Tensor, sparse: Sparse, temperature: float) -> None:
    if student.ndim != 2 or sparse.ids.ndim != 2 or len(student) != len(sparse.ids):
        raise ValueError(
            "logits must be [n, v] and ids [n, k] of the same n rows; they are "
            f"{list(student.shape)} and {list(sparse.ids.shape)}"
        )
    if temperature != sparse.temperature:
        raise ValueError(
            f"temperature is {temperature}, but the teacher was read at {sparse.temperature} and "
            "what was kept of it cannot serve another one; use that temperature, or make the "
            "cache again"
        )
    # On a GPU a bad index would stop the process without a word.
    if (
        sparse.ids.numel()
        and not 0 <= int(sparse.ids.min()) <= int(sparse.ids.max()) < (student.shape[1])
    ):
        raise ValueError(
            f"ids go from {int(sparse.ids.min())} to {int(sparse.ids.max())}, but the student has "
            f"{student.shape[1]} columns; it needs the teacher's tokenizer"
        )


def _kept(sparse: Sparse, columns: int) -> Tensor:
    """[n, v] bool, True at the tokens that have mass of their own."""
    # Places without mass name any id; they go to a column that is cut off.
    ids = sparse.ids.where(sparse.mass > 0, columns)
    kept = torch.zeros(len(ids), columns + 1, dtype=torch.bool, device=ids.device)
    return kept.scatter_(1, ids, True)[:, :columns]


def _cross_entropy(mass: Tensor, logq: Tensor) -> Tensor:
    """-sum mass log q, [n]; inf where q rules out what has mass."""
    logq = logq.masked_fill(mass == 0, 0.0)  # 0 * inf is not a number, in value and gradient
    ruled_out = logq == -torch.inf
    value = -(mass * logq.masked_fill(ruled_out, 0.0)).sum(-1)
    return value.masked_fill(ruled_out.any(-1), torch.inf)
