"""Value and gradient of a loss in one go, for a block of rows that fits the processor's cache.

Each kernel takes both models' logits as `Softened` blocks and returns ([r] values, [r, v] gradient
with respect to the student's logits over T), without T^2 and without weights. They are the same
losses as in `divergences.py`, which stays the readable definition; only finite logits are handled
here, and a value that comes out NaN tells the caller to use the definition instead.

With q = softmax(s / T), the gradient of sum_i phi(p_i, q_i) is q (a - <q, a>) where a = dphi / dq;
so most kernels only have to say what phi and a are.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from limbeck.losses import divergences, interpolated, labels, order, powers, regression
from limbeck.losses.shared import check_share, factor
from limbeck.losses.sparse import Sparse

FAR = 80.0
"""Log-ratio beyond which exp() would overflow; what lies there is far below rounding."""

Kernel = Callable[..., tuple[Tensor, Tensor]]


class Softened:
    """Logits of r rows divided by a temperature; what is made of them is made once.

    What a kernel takes, it may overwrite. So that a block stays in the cache, that is no copy where
    no other kernel will ask: a kernel first asks for the probabilities it will need beside the
    log-probabilities that it takes.

    Attributes:
        spare: the logits may be overwritten, and are by their log-probabilities.
        last: no other kernel will ask.
    """

    # No cached_property: its lock is more than `torch.compile` can follow.
    def __init__(self, logits: Tensor, *, spare: bool = False, last: bool = False) -> None:
        self._logits: Tensor | None = logits
        self.spare, self.last = spare, last
        self._log_probabilities: Tensor | None = None
        self._probabilities: Tensor | None = None

    @property
    def logits(self) -> Tensor:
        """[r, v] float32 or float64; not to be changed in place."""
        assert self._logits is not None
        return self._logits

    @property
    def log_probabilities(self) -> Tensor:
        """[r, v] log softmax; not to be changed in place."""
        if self._log_probabilities is None:
            if self.spare:
                torch.log_softmax(self.logits, -1, out=self.logits)
                self._log_probabilities, self._logits = self._logits, None
            else:
                self._log_probabilities = self.logits.log_softmax(-1)
        assert self._log_probabilities is not None
        return self._log_probabilities

    @property
    def probabilities(self) -> Tensor:
        """[r, v] softmax; not to be changed in place."""
        if self._probabilities is None:
            self._probabilities = self.log_probabilities.exp()
        return self._probabilities

    def take_log_probabilities(self) -> Tensor:
        """[r, v] log softmax, to be overwritten."""
        if not self.last:
            return self.log_probabilities.clone()
        taken, self._log_probabilities, self._logits = self.log_probabilities, None, None
        return taken

    def take_probabilities(self) -> Tensor:
        """[r, v] softmax, to be overwritten."""
        if self.last:
            if self._probabilities is None:
                return self.take_log_probabilities().exp_()
            taken, self._probabilities = self._probabilities, None
            return taken
        made = self._probabilities
        return self.log_probabilities.exp() if made is None else made.clone()


def forward_kl(student: Softened, teacher: Softened) -> tuple[Tensor, Tensor]:
    """KL(p || q) and q - p."""
    p = teacher.probabilities
    ratio = _log_ratio(teacher, student)
    return ratio.mul_(p).sum(-1), student.take_probabilities().sub_(p)


def reverse_kl(student: Softened, teacher: Softened) -> tuple[Tensor, Tensor]:
    """KL(q || p); a = log q - log p."""
    q = student.probabilities
    return _centred(q, _log_ratio(student, teacher).mul_(q))


def jensen_shannon(
    student: Softened, teacher: Softened, *, beta: float = 0.5
) -> tuple[Tensor, Tensor]:
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q; a = log(q / m)."""
    check_share("beta", beta)
    if beta in (0, 1):
        return _nothing(student)
    q = student.probabilities
    log_ratio = _log_ratio(student, teacher).clamp_(max=FAR)  # log q - log p
    log_mixture = log_ratio.exp().mul_(1 - beta).add_(beta).log_()  # log m - log p
    students, gradient = _centred(q, log_ratio.sub_(log_mixture).mul_(q))
    teachers = log_mixture.mul_(teacher.take_probabilities()).sum(-1)
    return (1 - beta) * students - beta * teachers, gradient.mul_(1 - beta)


def skew_forward_kl(
    student: Softened, teacher: Softened, *, alpha: float = 0.1
) -> tuple[Tensor, Tensor]:
    """KL(p || m), m = alpha p + (1 - alpha) q; a = (1 - alpha) (m - p) / m.

    A constant has been added to a, which changes nothing but that equal models have exactly 0.
    """
    check_share("alpha", alpha)
    if alpha == 0:
        return forward_kl(student, teacher)
    if alpha == 1:
        return _nothing(student)
    q = student.probabilities
    excess = _log_ratio(student, teacher).clamp_(max=FAR).expm1_().mul_(1 - alpha)  # m / p - 1
    value = excess.log1p().mul_(teacher.take_probabilities()).sum(-1).neg_()
    return value, _centred(q, _relative(excess).mul_(1 - alpha).mul_(q))[1]


def skew_reverse_kl(
    student: Softened, teacher: Softened, *, alpha: float = 0.1
) -> tuple[Tensor, Tensor]:
    """KL(q || m), m = alpha q + (1 - alpha) p; a = log(q / m) + alpha (m - q) / m."""
    check_share("alpha", alpha)
    if alpha == 0:
        return reverse_kl(student, teacher)
    if alpha == 1:
        return _nothing(student)
    q = student.probabilities
    excess = _log_ratio(teacher, student).clamp_(max=FAR).expm1_().mul_(1 - alpha)  # m / q - 1
    log_mixture = excess.log1p().mul_(q)
    value = log_mixture.sum(-1).neg_()
    return value, _centred(q, _relative(excess).mul_(alpha).mul_(q).sub_(log_mixture))[1]


def total_variation(student: Softened, teacher: Softened) -> tuple[Tensor, Tensor]:
    """1/2 sum |p - q|; a = 1/2 sign(q - p)."""
    q = student.probabilities
    gap = teacher.take_probabilities().sub_(q)
    return gap.abs().sum(-1).mul_(0.5), _centred(q, gap.sign_().mul_(-0.5).mul_(q))[1]


def adaptive_kl(student: Softened, teacher: Softened, *, mu: float = 0.5) -> tuple[Tensor, Tensor]:
    """w KL(p || q) + (1 - w) KL(q || p); the weight w is a constant to the gradient."""
    student.last = teacher.last = False
    share = divergences.head_share(teacher.probabilities, student.probabilities, mu)
    value, gradient = forward_kl(student, teacher)
    backward, other = reverse_kl(student, teacher)
    return torch.lerp(backward, value, share), torch.lerp(other, gradient, share[:, None])


def alpha_beta(
    student: Softened, teacher: Softened, *, alpha: float = 0.2, beta: float = 0.7
) -> tuple[Tensor, Tensor]:
    """The alpha-beta divergence; q a = q^beta (q^alpha - p^alpha) / alpha."""
    whole = alpha + beta
    q, logp = student.probabilities, teacher.log_probabilities
    ratio = _log_ratio(student, teacher)
    points = powers.nodes(alpha, beta, logp.dtype)
    if points is None:
        return ratio.square().sum(-1).mul_(0.5), _centred(q, ratio)[1]
    low, middle, high = points
    slopes: dict[tuple[float, float], Tensor] = {}
    for pair in ((low, middle), (middle, high), (min(beta, whole), max(beta, whole))):
        if pair not in slopes:
            slopes[pair] = _slope(logp, ratio, whole, *pair)
    value = (slopes[middle, high].sum(-1) - slopes[low, middle].sum(-1)).div_(high - low)
    return value, _centred(q, slopes[min(beta, whole), max(beta, whole)])[1]


def taid(student: Softened, teacher: Softened, *, t: float = 0.5) -> tuple[Tensor, Tensor]:
    """KL(m || q) and q - m, m = softmax((1 - t) s + t z)."""
    check_share("t", t)
    target = interpolated.between(student.logits, teacher.logits, t)
    return forward_kl(student, Softened(target, last=True))


def ranking(
    student: Softened, teacher: Softened, *, k: int = 10, margin: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The mean hinge; a pair out of order pulls at its two tokens."""
    check_share("margin", margin)
    top, ids = order.likeliest(teacher.logits, k)
    first, second = order.pairs(top)
    wanted = top[:, first] - top[:, second]
    found = student.logits.gather(-1, ids[:, first]) - student.logits.gather(-1, ids[:, second])
    ranked = wanted > 0
    count = ranked.sum(-1, keepdim=True).clamp(min=1)
    hinge = wanted.mul(margin).sub_(found).relu_().mul_(ranked).div_(count)
    pull = (hinge > 0).to(hinge.dtype).div_(count)
    gradient = torch.zeros_like(student.logits).scatter_add_(-1, ids[:, second], pull)
    return hinge.sum(-1), gradient.scatter_add_(-1, ids[:, first], pull.neg_())


def logit_mse(student: Softened, teacher: Softened) -> tuple[Tensor, Tensor]:
    """Mean squared difference, and 2 / v times the difference."""
    difference = student.logits - teacher.logits
    value = difference.square().mean(-1)
    return value, difference.mul_(2 / difference.shape[-1])


def cross_entropy(student: Softened, label: Tensor) -> tuple[Tensor, Tensor]:
    """-log q[label] and q - onehot; rows without label (-100) give 0."""
    labelled = label != labels.IGNORE
    place = label.clamp(min=0)[:, None]
    value = -student.log_probabilities.gather(-1, place).squeeze(-1)
    gradient = student.take_probabilities().mul_(labelled[:, None])
    gradient.scatter_add_(-1, place, -labelled[:, None].to(gradient))
    return value.masked_fill(~labelled, 0.0), gradient


def sparse_kl(student: Softened, teacher: Sparse, *, tail: bool = True) -> tuple[Tensor, Tensor]:
    """KL from a few tokens; q - mass where it is known, q (1 - rest / q_rest) elsewhere.

    Rows of which nothing is known give 0.
    """
    logq = student.log_probabilities.gather(-1, teacher.ids)
    mass, rest, constant = known(teacher, logq.dtype, tail=tail)
    total = mass.sum(-1) + rest if tail else (mass.sum(-1) > 0).to(mass)
    value = constant - torch.where(mass > 0, mass * logq, 0.0).sum(-1)
    gradient = student.take_probabilities().mul_(total[:, None])
    if tail and bool((rest > 0).any()):
        # Places without mass may name any token, even one that has mass at another place.
        own = torch.where(mass > 0, gradient.gather(-1, teacher.ids), 0.0)
        others = gradient.scatter_add(-1, teacher.ids, -own).clamp_(min=0.0)
        q_rest = others.sum(-1)
        value = value - torch.xlogy(rest, q_rest)
        gradient.addcmul_(others, (-rest / q_rest.clamp(min=torch.finfo(logq.dtype).tiny))[:, None])
    gradient.scatter_add_(-1, teacher.ids, -mass)
    return value.masked_fill(total == 0, 0.0), gradient


def known(teacher: Sparse, dtype: torch.dtype, *, tail: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Mass [r, k], that of the rest [r], and the teacher's part of the value [r].

    Without `tail` the rest is nothing, and the masses are divided by their sum.
    """
    mass, rest, constant = (x.to(dtype) for x in (teacher.mass, teacher.rest, teacher.negentropy))
    if tail:
        return mass, rest, constant
    mass = mass / mass.sum(-1, keepdim=True).clamp(min=torch.finfo(dtype).tiny)
    return mass, torch.zeros_like(rest), torch.xlogy(mass, mass).sum(-1)


KERNELS: dict[Callable[..., Tensor], Kernel] = {
    divergences.forward_kl: forward_kl,
    divergences.reverse_kl: reverse_kl,
    divergences.jensen_shannon: jensen_shannon,
    divergences.skew_forward_kl: skew_forward_kl,
    divergences.skew_reverse_kl: skew_reverse_kl,
    divergences.total_variation: total_variation,
    divergences.adaptive_kl: adaptive_kl,
    powers.alpha_beta: alpha_beta,
    interpolated.taid: taid,
    order.ranking: ranking,
    regression.logit_mse: logit_mse,
}
"""The losses of two models' logits that have a kernel."""

OF_LOGITS = (taid, ranking, logit_mse)
"""Kernels that read the logits themselves."""


def scales(temperature: float, scale_by_t2: bool) -> tuple[float, float]:
    """What a kernel's value and gradient are multiplied by: T^2 (or 1), and that over T."""
    scale = factor(temperature, scale_by_t2)
    return scale, scale / temperature


def _relative(excess: Tensor) -> Tensor:
    """(m - p) / m from m / p - 1, in place."""
    return excess.div_(excess + 1)


def _log_ratio(over: Softened, under: Softened) -> Tensor:
    """[r, v] log p - log q, in place of the first; equal logits give exactly 0."""
    return over.take_log_probabilities().sub_(under.log_probabilities)


def _slope(logp: Tensor, ratio: Tensor, whole: float, first: float, second: float) -> Tensor:
    """[r, v] divided difference of c -> p^(whole - c) q^c between two points; see `alpha_beta`."""
    gap = ratio * (second - first)
    larger = gap.clamp(min=0.0).add_(logp, alpha=whole).add_(ratio, alpha=first).exp_()
    if second - first < torch.finfo(ratio.dtype).eps:
        return larger.mul_(ratio)
    change = torch.copysign(gap.abs().neg_().expm1_(), gap)
    return change.mul_(larger).div_(second - first)


def _centred(q: Tensor, pulled: Tensor) -> tuple[Tensor, Tensor]:
    """<q, a> and q a - q <q, a>, the latter in place of q a."""
    mean = pulled.sum(-1)
    return mean, pulled.addcmul_(q, mean[:, None], value=-1)


def _nothing(student: Softened) -> tuple[Tensor, Tensor]:
    like = student.log_probabilities
    return like.new_zeros(len(like)), torch.zeros_like(like)
