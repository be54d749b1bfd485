"""Optimal transport between the likeliest tokens of two models, each row with costs of its own."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from limbeck.losses.potentials import potentials
from limbeck.losses.shared import factor, same_precision


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What it costs to move probability between a few tokens of each of n rows.

    Attributes:
        between: [n, a, b], from the teacher's token i to the student's token j.
        teacher: [n, a, a] between the teacher's own, symmetric with a zero diagonal; None where it
            is not known, and then nothing is debiased.
        student: [n, b, b], the same of the student.
        rest: what it costs to or from all tokens that were not kept.
    """

    between: Tensor
    teacher: Tensor | None = None
    student: Tensor | None = None
    rest: float = 1.0


class Pricing(Protocol):
    """Knows what tokens are alike."""

    def __call__(self, teacher: Tensor, student: Tensor) -> Costs:
        """The costs between [n, a] teacher token ids and [n, b] student token ids."""
        ...


def semantic_transport(
    student: Tensor,
    teacher: Tensor,
    costs: Pricing,
    *,
    k: int = 20,
    epsilon: float = 0.1,
    iterations: int = 100,
    temperature: float = 1.0,
    scale_by_t2: bool = True,
) -> Tensor:
    """What it costs to make the student's likeliest tokens the teacher's, synonyms being cheap.

    p' = the teacher's k likeliest tokens and one rest, q' = the student's
    T^2 * S(p', q'),   S = OT(p', q') - 1/2 OT(p', p') - 1/2 OT(q', q')

    OT is the regularised transport of `sinkhorn`. The rests of both sides are one thing: between
    them nothing is paid, and from a rest to any kept token `Costs.rest`. So probability that the
    student gives to tokens of no meaning to the teacher is paid in full, and how it is spread over
    tokens that were not kept is not learnt. The kept sets are constants of the gradient, which
    comes from the dual potentials and does not pass through the iterations.

    S is 0 with zero gradient where both sides keep equal tokens with equal probability. It is >= 0
    where exp(-C / epsilon) of all kept tokens of both sides together is positive semidefinite: so
    it is for 1 - cosine. Edit distances promise no such thing, and S may then be a little negative.
    Where costs within a side are not known the value is OT(p', q') itself, which epsilon biases
    (see `sinkhorn`). With k the whole vocabulary and one table of costs it is `sinkhorn`.

    Args:
        student: [n, v] logits.
        teacher: [n, w] logits; v and w may differ.
        costs: prices the kept tokens.
        k: how many tokens of each side are kept.
        epsilon: strength of the regulariser, in the unit of the cost.
        iterations: the most for each transport.
        temperature: T, divides both models' logits.
        scale_by_t2: multiply by T^2, for the common interface.

    Returns:
        [n], in the unit of the cost.

    Raises:
        ValueError: k is not between 1 and both vocabularies' sizes, epsilon or iterations are not
            positive, shapes do not fit, or the temperature is not positive.

    Source: the optimal transport problem of Boizard et al. (arXiv 2402.12030, section 3) with a
    cost that knows tokens; Sinkhorn divergences as in `sinkhorn`. Top-k and the rest are ours.

    >>> distance = torch.tensor([[0.0, 0.1, 1.0], [0.1, 0.0, 1.0], [1.0, 1.0, 0.0]])
    >>> def costs(teacher, student):
    ...     def between(a, b):
    ...         return distance[a[:, :, None], b[:, None, :]]
    ...     return Costs(
    ...         between=between(teacher, student),
    ...         teacher=between(teacher, teacher),
    ...         student=between(student, student),
    ...     )
    >>> p, q = torch.tensor([[0.7, 0.2, 0.1]]), torch.tensor([[0.5, 0.3, 0.2]])
    >>> round(semantic_transport(q.log(), p.log(), costs, k=3).item(), 4)
    0.0783
    >>> round(semantic_transport(q.log(), p.log(), costs, k=2).item(), 4)  # the third is the rest
    0.0783
    """
    scale = factor(temperature, scale_by_t2)
    student, teacher = same_precision(student, teacher)
    least = min(student.shape[1], teacher.shape[1])
    if not 1 <= k <= least:
        raise ValueError(f"k must be between 1 and {least}, the smaller vocabulary; it is {k}")
    if not 0 < epsilon < float("inf"):
        raise ValueError(f"epsilon must be positive and finite; it is {epsilon}")
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1; it is {iterations}")
    p, teacher_ids = _kept(teacher / temperature, k)
    q, student_ids = _kept(student / temperature, k)
    with torch.no_grad():
        priced = costs(teacher_ids, student_ids)
        between, own_p, own_q = (
            None if each is None else _with_rest(each.to(q), priced.rest) / epsilon
            for each in (priced.between, priced.teacher, priced.student)
        )
    assert between is not None
    f, g = potentials(
        p.detach().log(), q.detach().log(), between, own_p, own_q, iterations=iterations
    )
    return scale * epsilon * ((p * f).sum(-1) + (q * g).sum(-1))


def _kept(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """[n, k + 1] probabilities, the last being the rest's, and [n, k] ids."""
    probabilities = logits.softmax(-1)
    ids = probabilities.detach().topk(k, sorted=False).indices
    # Not 1 - sum: near 0 that is nothing but rounding.
    rest = probabilities.scatter(-1, ids, 0.0).sum(-1, keepdim=True)
    return torch.cat([probabilities.gather(-1, ids), rest], -1), ids


def _with_rest(cost: Tensor, rest: float) -> Tensor:
    """[n, a + 1, b + 1]: one more token on each side, far from all others but not from itself."""
    grown = cost.new_full((cost.shape[0], cost.shape[1] + 1, cost.shape[2] + 1), rest)
    grown[:, :-1, :-1] = cost
    grown[:, -1, -1] = 0.0
    return grown
