"""Transport distances between distributions over two different vocabularies."""

from torch import Tensor

from limbeck.losses.potentials import potentials
from limbeck.losses.shared import factor, same_precision


def sorted_l1(
    student: Tensor, teacher: Tensor, *, temperature: float = 1.0, scale_by_t2: bool = True
) -> Tensor:
    """Universal Logit Distillation's closed form: L1 distance of the sorted probabilities.

    T^2 * sum_i |p_(i) - q_(i)|,   p_(1) >= p_(2) >= ..., the shorter one padded with zeros

    It compares how probable the most likely token, the second, ... is to each model, and does not
    see which token that is: two different certain predictions have distance 0. In terms of
    transport it is twice the least total variation over all ways to match the two vocabularies one
    to one. Its gradient vanishes where the student's probability does and is 0 at p_(i) = q_(i).
    The factor T^2 is there for the common interface; nothing in this loss asks for it.

    Args:
        student: [n, v] logits.
        teacher: [n, w] logits; v and w may differ, and all columns count.
        temperature: T, divides both models' logits.
        scale_by_t2: multiply by T^2.

    Returns:
        [n], between 0 and 2 T^2: probability, not nats.

    Raises:
        ValueError: shapes do not fit, or the temperature is not positive.

    Source: Boizard et al., "Towards Cross-Tokenizer Distillation: the Universal Logit Distillation
    Loss for LLMs" (arXiv 2402.12030), the closed form of its Wasserstein distance.

    >>> import torch
    >>> p, q = torch.tensor([[0.6, 0.4]]), torch.tensor([[0.5, 0.3, 0.2]])
    >>> round(sorted_l1(q.log(), p.log()).item(), 4)
    0.4
    """
    scale = factor(temperature, scale_by_t2)
    student, teacher = same_precision(student, teacher)
    q = (student / temperature).softmax(-1).sort(-1, descending=True).values
    p = (teacher / temperature).softmax(-1).sort(-1, descending=True).values
    both = min(p.shape[1], q.shape[1])
    overlap = (p[:, :both] - q[:, :both]).abs().sum(-1)
    return scale * (overlap + p[:, both:].sum(-1) + q[:, both:].sum(-1))


def sinkhorn(
    student: Tensor,
    teacher: Tensor,
    cost: Tensor,
    *,
    epsilon: float = 0.1,
    iterations: int = 100,
    temperature: float = 1.0,
    scale_by_t2: bool = True,
) -> Tensor:
    """Optimal transport: the least cost of moving the teacher's probability onto the student's.

    OT(p, q) = min <P, C> + epsilon KL(P || p q^T)   over P >= 0, P 1 = p, P^T 1 = q

    It knows which tokens are alike: a student pays little for a synonym. With one space on both
    sides, that is a square C, symmetric with a zero diagonal (up to rounding: 1e-5 of its largest
    entry), the value is T^2 times the Sinkhorn divergence

    S(p, q) = OT(p, q) - 1/2 OT(p, p) - 1/2 OT(q, q),

    which is exactly 0 with zero gradient at p = q. It is >= 0 where exp(-C / epsilon) is positive
    semidefinite, which it is for 1 - cosine, for any Euclidean distance, its square, and for the
    0-1 cost; for other costs S may be negative, and p = q is then not its minimum.

    With any other C the value is T^2 OT(p, q) itself. It is not 0 at its minimum, and epsilon pulls
    the student away from what is cheapest. Only the student's part of C teaches: what is added to a
    whole row of C adds a constant to the value.

    Gradients come from the dual potentials, d OT / dp = f and d OT / dq = g (envelope theorem), and
    do not pass through the iterations; they flow into both models' logits and not into C. They are
    exact once the iterations have converged; before that, OT(p, q) is a lower bound of itself. A
    row stops when its marginals are within 1e-6 (float64: 1e-9) in total, or what rounding allows.
    Default settings suffice for max(C) = 1; a fifth of epsilon needs some ten times the iterations,
    and without them gradients come out too small near p = q. Memory and time grow with w * v, so
    keep to the top tokens of each side: full vocabularies are out of reach.

    Args:
        student: [n, v] logits, for q.
        teacher: [n, w] logits, for p; v and w may differ, and all columns count.
        cost: [w, v], C: what it costs to move probability from teacher token i to student token j.
        epsilon: strength of the regulariser, in the unit of the cost.
        iterations: the most for each transport; one iteration updates both of its potentials.
        temperature: T, divides both models' logits.
        scale_by_t2: multiply by T^2; as in `sorted_l1`, for the common interface only.

    Returns:
        [n], in the unit of the cost.

    Raises:
        ValueError: the cost is not [w, v], has negative or infinite entries (also divided by
            epsilon), or is the same for all student tokens, so that it teaches nothing; epsilon or
            iterations are not positive; shapes do not fit, or the temperature is not positive.

    Source: Cuturi, "Sinkhorn Distances: Lightspeed Computation of Optimal Transport" (arXiv
    1306.0895), with the regulariser relative to p q^T; Feydy et al., "Interpolating between Optimal
    Transport and MMD using Sinkhorn Divergences" (arXiv 1810.08278), for S; Thibault et al.,
    "Overrelaxed Sinkhorn-Knopp Algorithm for Regularized Optimal Transport" (arXiv 1711.01851).

    >>> import torch
    >>> p, q = torch.tensor([[0.7, 0.2, 0.1]]), torch.tensor([[0.5, 0.3, 0.2]])
    >>> cost = torch.tensor([[0.0, 0.1, 1.0], [0.1, 0.0, 1.0], [1.0, 1.0, 0.0]])
    >>> round(sinkhorn(q.log(), p.log(), cost).item(), 4)  # the first two are synonyms
    0.0783
    """
    if not 0 < epsilon < float("inf"):
        raise ValueError(f"epsilon must be positive and finite; it is {epsilon}")
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1; it is {iterations}")
    scale = factor(temperature, scale_by_t2)
    student, teacher = same_precision(student, teacher)
    shape = (teacher.shape[1], student.shape[1])
    if cost.shape != shape:
        raise ValueError(
            f"cost must be [w, v], a row for each teacher token and a column for each student "
            f"token, here {list(shape)}; it is {list(cost.shape)}"
        )
    logq = (student / temperature).log_softmax(-1)
    logp = (teacher / temperature).log_softmax(-1)
    cost = cost.detach().to(student) / epsilon
    low, high = cost.min().item(), cost.max().item()
    if not 0 <= low <= high < float("inf"):
        raise ValueError(
            "cost must be finite and not negative, also divided by epsilon; cost / epsilon is "
            f"between {low} and {high} (clamp what rounding made negative)"
        )
    if bool((cost == cost[:, :1]).all()):
        raise ValueError(
            "cost must differ between student tokens; this one is the same for all of them, "
            "so that no student is better than another"
        )
    own = None
    if _one_space(cost, 1e-5 * high):
        cost = own = (cost + cost.T) / 2
    f, g = potentials(logp, logq, cost, own, own, iterations=iterations)
    return scale * epsilon * ((logp.exp() * f).sum(-1) + (logq.exp() * g).sum(-1))


def _one_space(cost: Tensor, rounding: float) -> bool:
    """Whether rows and columns are the same points: symmetric, and each at no cost from itself."""
    if cost.shape[0] != cost.shape[1]:
        return False
    return bool(((cost - cost.T).abs() <= rounding).all() and (cost.diagonal() <= rounding).all())
