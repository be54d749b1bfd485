"""Dual potentials of regularised optimal transport, in the log domain: Sinkhorn's iterations.

OT(p, q) = min <P, C> + epsilon KL(P || p q^T)   over P >= 0, P 1 = p, P^T 1 = q

Here costs, values and potentials are in units of epsilon. A cost serves all rows alike, [w, v], or
each row has its own, [n, w, v]. The potentials are the gradients of the value to p and q (envelope
theorem), so nobody has to differentiate through the iterations.
"""

import torch
from torch import Tensor

CHUNK_BYTES = 2**26
"""Size of one [rows, w, v] array, about three of which exist at a time."""

RELAXATION = 1.8
"""Size of steps relative to plain ones, between 1 and 2."""


@torch.no_grad()
def potentials(
    logp: Tensor,
    logq: Tensor,
    cost: Tensor,
    own_p: Tensor | None = None,
    own_q: Tensor | None = None,
    *,
    iterations: int,
) -> tuple[Tensor, Tensor]:
    """Gradients of OT(p, q), or with costs within each side of the Sinkhorn divergence, to p and q.

    S(p, q) = OT(p, q) - 1/2 OT(p, p) - 1/2 OT(q, q)

    <p, f> + <q, g> is the value too, since each transport's optimal plan has mass 1. A row stops
    when its marginals are within 1e-6 (float64: 1e-9) in total, or what rounding allows.

    Args:
        logp: [n, w] log-probabilities.
        logq: [n, v].
        cost: [w, v] or [n, w, v], divided by epsilon; finite and not negative.
        own_p: [w, w] or [n, w, w], symmetric with a zero diagonal, for OT(p, p); None leaves both
            self transports out.
        own_q: [v, v] or [n, v, v], for OT(q, q).
        iterations: the most for each transport; one iteration updates both of its potentials.

    Returns:
        f: [n, w]; g: [n, v].
    """
    logp, logq = logp.detach(), logq.detach()
    high = cost.max().item() if cost.numel() else 0.0
    # Rounding of the exponents alone moves the marginals this much.
    rounding = 4 * torch.finfo(cost.dtype).eps * max(high, 1.0)
    tolerance = max(1e-9 if cost.dtype == torch.float64 else 1e-6, rounding)
    entries = logq.shape[1] * logp.shape[1]
    if own_p is not None and own_q is not None:
        entries = max(logp.shape[1], logq.shape[1]) ** 2
    step = max(1, CHUNK_BYTES // (entries * cost.element_size()))
    f, g = torch.zeros_like(logp), torch.zeros_like(logq)
    for first in range(0, len(logp), step):
        rows = slice(first, first + step)
        between = cost if cost.ndim == 2 else cost[rows]
        within = [each if each is None or each.ndim == 2 else each[rows] for each in (own_p, own_q)]
        f[rows], g[rows] = _solve(
            logp[rows], logq[rows], between, within[0], within[1], iterations, tolerance
        )
    return f, g


def _solve(
    logp: Tensor,
    logq: Tensor,
    cost: Tensor,
    own_p: Tensor | None,
    own_q: Tensor | None,
    iterations: int,
    tolerance: float,
) -> tuple[Tensor, Tensor]:
    """The potentials of some rows."""
    if own_p is None or own_q is None:
        f, g = torch.zeros_like(logp), torch.zeros_like(logq)
        return _transport(logp, logq, cost, f, g, iterations, tolerance)
    # At p = q the two self transports solve the third: it stops where it starts, at exactly 0.
    self_p = _self_transport(logp, own_p, iterations, tolerance)
    self_q = _self_transport(logq, own_q, iterations, tolerance)
    f, g = _transport(logp, logq, cost, self_p, self_q, iterations, tolerance)
    return f - self_p, g - self_q


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
    back = cost.mT.contiguous()
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
