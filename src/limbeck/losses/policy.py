"""Learning from what the student wrote itself: estimates of the reverse KL, rewards, advantages.

All take log-probabilities of the tokens that were drawn, not logits. A loss whose gradient is that
of an expectation over the student's own draws has a value of its own: what is reported is the
estimate, what is followed is the score function's gradient.
"""

from typing import Literal

import torch
from torch import Tensor

from limbeck.losses.blocks import Blocks
from limbeck.losses.divergences import reverse_kl
from limbeck.losses.shared import factor, log_probabilities, log_sum

Estimator = Literal["k1", "k2", "k3"]

FAR = 80.0
"""Log-ratio beyond which exp() would overflow."""


def reverse_kl_estimate(student: Tensor, teacher: Tensor, estimator: Estimator = "k3") -> Tensor:
    """KL(q || p) from one draw y ~ q, with q the student's and p the teacher's probability of y.

    k1 = log q - log p              unbiased; may be negative
    k2 = (log q - log p)^2 / 2      biased, little so where p and q are near; its gradient is not
    k3 = p / q - 1 - log(p / q)     unbiased, never negative, and of small variance

    Args:
        student: [n] log q(y).
        teacher: [n] log p(y).
        estimator: which.

    Returns:
        [n] nats.

    Source: J. Schulman, "Approximating KL divergence" (2020).

    >>> q, p = torch.tensor([0.5]).log(), torch.tensor([0.7]).log()
    >>> [round(reverse_kl_estimate(q, p, k).item(), 4) for k in ("k1", "k2", "k3")]
    [-0.3365, 0.0566, 0.0635]
    """
    ratio = teacher - student
    if estimator == "k1":
        return -ratio
    if estimator == "k2":
        return ratio.square() / 2
    return ratio.clamp(max=FAR).expm1() - ratio


def top_k_reverse_kl(
    student: Tensor,
    teacher: Tensor,
    *,
    k: int = 100,
    temperature: float = 1.0,
    scale_by_t2: bool = True,
) -> Tensor:
    """KL(student || teacher) of the student's k likeliest tokens and one outcome for all others.

    T^2 * (sum_{i in K} q_i log(q_i / p_i) + q_rest log(q_rest / p_rest))

    It is never above the exact divergence, because putting outcomes together hides what they differ
    in, and equal to it where k is all tokens.

    Args:
        student: [n, v] logits.
        teacher: [n, w] logits; the first min(v, w) columns are compared.
        k: how many tokens are told apart; all, where there are fewer.
        temperature: T, divides both models' logits.
        scale_by_t2: multiply by T^2, so that gradients keep their size.

    Returns:
        [n] nats, >= 0; 0 where both are equal.

    Raises:
        ValueError: k is below 1, shapes do not fit, or the temperature is not positive.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1; it is {k}")
    scale = factor(temperature, scale_by_t2)
    logq, logp = log_probabilities(student, teacher, temperature)
    if k >= logq.shape[-1]:
        return reverse_kl(student, teacher, temperature=temperature, scale_by_t2=scale_by_t2)
    ids = logq.topk(k).indices
    few = [torch.cat([x.gather(-1, ids), _rest(x, ids)], -1) for x in (logq, logp)]
    return scale * reverse_kl(few[0], few[1])


def _rest(logp: Tensor, ids: Tensor) -> Tensor:
    """[n, 1] log-probability of all tokens but some; minus infinity, without gradient, of none."""
    return log_sum(logp.scatter(-1, ids, -torch.inf))


def returns(rewards: Tensor, sample: Tensor, *, discount: float, own: bool, mean: bool) -> Tensor:
    """What comes after each token, summed within its sample.

    R_t = sum_{u >= t} discount^(u - t) r_u,   over u > t where `own` is False (then from
    discount^0 at u = t + 1); divided by the number of its terms where `mean` is True

    Args:
        rewards: [n] of each token, in order within its sample.
        sample: [n] which sample each is of, ascending.
        discount: in [0, 1]; 0 looks at the first term alone.
        own: whether a token's own reward is part of it.
        mean: average instead of summing.
    """
    if not len(rewards):
        return rewards
    blocks = Blocks.of(sample)
    exact = torch.promote_types(rewards.dtype, torch.float32)
    steps = torch.arange(blocks.longest, device=rewards.device)
    ahead = steps[:, None] - steps[None, :] - (0 if own else 1)  # [u, t]
    power = torch.where(ahead >= 0, discount ** ahead.clamp(min=0).to(exact), 0.0)

    def summed(values: Tensor) -> Tensor:
        # Within a model's autocast, products of float32 would be rounded to half precision.
        with torch.autocast(values.device.type, enabled=False):
            return blocks.gather(values @ power)

    total = summed(blocks.scatter(rewards.to(exact)))
    if not mean:
        return total
    weight = summed(blocks.there.to(exact))
    return torch.where(weight > 0, total / weight.clamp(min=torch.finfo(exact).tiny), 0.0)


def advantages(score: Tensor, group: Tensor, *, spread: bool = True) -> Tensor:
    """How much better each answer is than the mean of its group.

    A_i = (s_i - mean_g) / (std_g + 1e-6), or without the division

    A group whose answers are all worth the same gives 0, and so does one of a single answer.

    Args:
        score: [s] of each answer.
        group: [s] which group it is of.
        spread: divide by the group's standard deviation (of the population).

    Source: Shao et al., "DeepSeekMath" (arXiv 2402.03300), GRPO.
    """
    _, place, count = group.unique(return_inverse=True, return_counts=True)
    # In float64: scores may be large, and their differences small.
    wide = score.double()
    mean = torch.zeros(len(count), dtype=wide.dtype, device=wide.device)
    mean = mean.index_add(0, place, wide) / count
    gap = wide - mean[place]
    if not spread:
        return gap.to(score.dtype)
    variance = torch.zeros_like(mean).index_add(0, place, gap.square()) / count
    return (gap / (variance.sqrt() + 1e-6)[place]).to(score.dtype)


def surrogate(
    logp: Tensor, behaviour: Tensor, advantage: Tensor, *, clip: float | None = None
) -> Tensor:
    """-min(rho A, clip(rho, 1 - c, 1 + c) A), whose gradient is the policy gradient's.

    with rho = q(y) / q_old(y), and A the advantage, taken as constant. Where the text was written
    by the very weights that learn, rho is 1 and the gradient is -A grad log q(y).

    Args:
        logp: [n] log q(y), with gradient.
        behaviour: [n] log q_old(y) when it was drawn.
        advantage: [n].
        clip: c; None follows the ratio wherever it goes.

    Source: Schulman et al., "Proximal Policy Optimization" (arXiv 1707.06347), eq. 7.
    """
    ratio = (logp - behaviour.detach()).clamp(max=FAR).exp()
    advantage = advantage.detach()
    plain = ratio * advantage
    if clip is None:
        return -plain
    return -torch.minimum(plain, ratio.clamp(1 - clip, 1 + clip) * advantage)


def reported(value: Tensor, followed: Tensor) -> Tensor:
    """`value` as a number, with the gradient of `followed`."""
    return value.detach() + followed - followed.detach()
