"""Transport distances between distributions over two different vocabularies."""

import torch
from torch import Tensor

from limbeck.losses.shared import factor, same_precision

CHUNK_BYTES = 2**26
"""Size of one [rows, w, v] array in `sinkhorn`, about three of which exist at a time."""

RELAXATION = 1.8
"""Steps of `sinkhorn` relative to plain ones, between 1 and 2."""


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
    with torch.no_grad():
        cost = cost.to(student) / epsilon
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
        # Rounding of the exponents alone moves the marginals this much.
        rounding = 4 * torch.finfo(cost.dtype).eps * max(high, 1.0)
        tolerance = max(1e-9 if cost.dtype == torch.float64 else 1e-6, rounding)
        same_space = _one_space(cost, 1e-5 * high)
        rows = max(1, CHUNK_BYTES // (cost.numel() * cost.element_size()))
        solved = [
            _potentials(p, q, cost, same_space, iterations, tolerance)
            for p, q in zip(logp.detach().split(rows), logq.detach().split(rows), strict=True)
        ]
        f, g = (torch.cat(parts) for parts in zip(*solved, strict=True))
    return scale * epsilon * ((logp.exp() * f).sum(-1) + (logq.exp() * g).sum(-1))


def _one_space(cost: Tensor, rounding: float) -> bool:
    """Whether rows and columns are the same points: symmetric, and each at no cost from itself."""
    if cost.shape[0] != cost.shape[1]:
        return False
    return bool(((cost - cost.T).abs() <= rounding).all() and (cost.diagonal() <= rounding).all())


def _potentials(
    logp: Tensor, logq: Tensor, cost: Tensor, same_space: bool, iterations: int, tolerance: float
) -> tuple[Tensor, Tensor]:
    """Gradients [n, w] and [n, v] of the value to p and q, all in units of epsilon.

    <p, f> + <q, g> is the value too, since each transport's optimal plan has mass 1.
    """
    if not same_space:
        f, g = logp.new_zeros(logp.shape), logq.new_zeros(logq.shape)
        return _transport(logp, logq, cost, f, g, iterations, tolerance)
    cost = (cost + cost.T) / 2
    # At p = q the two self transports solve the third: it stops where it starts, at exactly 0.
    own_p = _self_transport(logp, cost, iterations, tolerance)
    own_q = _self_transport(logq, cost, iterations, tolerance)
    f, g = _transport(logp, logq, cost, own_p, own_q, iterations, tolerance)
    return f - own_p, g - own_q


def _transport(
    logp: Tensor,
    logq: Tensor,
    cost: Tensor,
    f: Tensor,
    g: Tensor,
    iterations: int,
    tolerance: float,
) -> tuple[Tensor, Tensor]:
    """Both potentials of OT(p, q) from the given start; a row that has converged stays put."""
    back = cost.T.contiguous()
    done = _close(logp, f, _best(logq, g, cost), tolerance)
    done &= _close(logq, g, _best(logp, f, back), tolerance)
    for _ in range(iterations - 1):
        if bool(done.all()):
            return f, g
        f = torch.where(done[:, None], f, _beyond(logp, f, _best(logq, g, cost)))
        best = _best(logp, f, back)
        # The last step of a row is a plain one, so that its plan has mass 1.
        close = _close(logq, g, best, tolerance)
        step = torch.where(close[:, None], best, _beyond(logq, g, best))
        g = torch.where(done[:, None], g, step)
        done |= close
    f = torch.where(done[:, None], f, _best(logq, g, cost))
    return f, torch.where(done[:, None], g, _best(logp, f, back))


def _beyond(logp: Tensor, f: Tensor, best: Tensor) -> Tensor:
    """Over-relaxation: go past the best f given g, where the dual value still does not decrease.

    Plain steps stall exactly where distillation ends, at p near q; these are some ten times faster.
    """
    step = best - f
    beyond = f + RELAXATION * step
    # sum p (f' - f) - (mass after - mass before), where the mass is sum p exp(f - best)
    after, before = (beyond - best).clamp(max=60).exp(), (-step).clamp(max=60).exp()
    gain = (logp.exp() * (RELAXATION * step - after + before)).sum(-1, keepdim=True)
    return torch.where(gain > 0, beyond, best)


def _self_transport(logp: Tensor, cost: Tensor, iterations: int, tolerance: float) -> Tensor:
    """The one potential of OT(p, p); half steps, since full ones would go back and forth."""
    f = torch.zeros_like(logp)
    for _ in range(iterations):
        best = _best(logp, f, cost)
        done = _close(logp, f, best, tolerance)
        if bool(done.all()):
            break
        f = torch.where(done[:, None], f, (f + best) / 2)
    return f


def _best(logq: Tensor, g: Tensor, cost: Tensor) -> Tensor:
    """The f that gives the plan p q^T exp(f + g - cost) its marginal p; finite where p is 0 too."""
    return -((logq + g)[:, None, :] - cost).logsumexp(-1)


def _close(logp: Tensor, f: Tensor, best: Tensor, tolerance: float) -> Tensor:
    """[n] whether the plan's marginal is p up to `tolerance` in L1; True for broken rows."""
    error = (logp.exp() * (f - best).clamp(max=60).expm1().abs()).sum(-1)  # exp(60) is finite
    return ~(error > tolerance)
