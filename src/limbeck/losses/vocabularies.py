"""KL divergences of two models whose vocabularies are others, but have tokens in common."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from limbeck.losses.divergences import forward_kl, reverse_kl
from limbeck.losses.shared import factor, log_sum, same_precision
from limbeck.losses.transport import sorted_l1


def mapped_kl(
    student: Tensor,
    teacher: Tensor,
    nearest: Tensor,
    *,
    reverse: bool = False,
    temperature: float = 1.0,
    scale_by_t2: bool = True,
) -> Tensor:
    """KL divergence after the teacher's logits were put into the student's columns.

    p_j = softmax over j of (teacher logit nearest(j) / T);   T^2 * KL(p || q), or KL(q || p)

    A teacher's token that is nearest to several of the student's counts once for each of them, so
    that p is a distribution over the student's tokens but not the teacher's any more. A student's
    token without a partner has p_j = 0: the forward KL takes its probability away, and the reverse
    one, which would be infinite, does not look at it (q is normalised over the others).

    Args:
        student: [n, v] logits.
        teacher: [n, w] logits.
        nearest: [v] int64, the teacher's column beside each of the student's; -1 where there is
            none. Columns of the student beyond them have none.
        reverse: KL(q || p) in the place of KL(p || q).
        temperature: T, divides both models' logits.
        scale_by_t2: multiply by T^2.

    Returns:
        [n] nats, >= 0.

    Raises:
        ValueError: nothing has a partner, or one is beyond the teacher's columns, shapes do not
            fit, or the temperature is not positive.

    Source: Wan et al., "Knowledge Fusion of Large Language Models" (arXiv 2401.10491) and
    Minixhofer et al. (arXiv 2503.20083), the MinED baseline.

    >>> p, q = torch.tensor([[0.7, 0.2, 0.1]]), torch.tensor([[0.3, 0.5, 0.2]])
    >>> round(mapped_kl(q.log(), p.log(), torch.tensor([1, 0, 2])).item(), 5)
    0.08512
    """
    student, teacher = same_precision(student, teacher)
    nearest = nearest[: student.shape[1]]
    found = nearest >= 0
    if not bool(found.any()) or int(nearest.max()) >= teacher.shape[1]:
        raise ValueError(
            f"nearest must name columns of the teacher's {teacher.shape[1]}; it names "
            f"{f'up to {int(nearest.max())}' if bool(found.any()) else 'none'}"
        )
    moved = teacher[:, nearest.clamp(min=0)]
    kw = {"temperature": temperature, "scale_by_t2": scale_by_t2}
    if reverse:
        return reverse_kl(student[:, : len(nearest)][:, found], moved[:, found], **kw)
    missing = student.shape[1] - len(nearest)
    if missing or not bool(found.all()):
        moved = moved.masked_fill(~found, -torch.inf)
        moved = torch.nn.functional.pad(moved, (0, missing), value=-torch.inf)
    return forward_kl(student, moved, **kw)


def prefix_kl(
    student: Tensor,
    teacher: Tensor,
    openings: Tensor,
    *,
    temperature: float = 1.0,
    scale_by_t2: bool = True,
) -> Tensor:
    """KL divergence after each teacher's token gave its probability to the student's first token.

    p'_j = sum of p_i over the teacher's tokens i that the student would begin with token j
    T^2 * KL(p' || q),   p = softmax(teacher / T), q = softmax(student / T)

    Where both have read the same text, p' is the teacher's distribution of the student's next
    token, as far as the teacher's tokens are long enough to say it. A teacher of shorter tokens
    asks for shorter ones than the student would write. Probability of tokens that the student
    cannot begin is left out, and p' normalised.

    Args:
        student: [n, v] logits.
        teacher: [n, w] logits.
        openings: [w] int64, the student's column for each of the teacher's; -1 where there is none.
            Columns of the teacher beyond them have none.
        temperature: T, divides both models' logits.
        scale_by_t2: multiply by T^2.

    Returns:
        [n] nats, >= 0; 0 where the teacher finds nothing likely that the student can begin.

    Raises:
        ValueError: a column is beyond the student's, shapes do not fit, or the temperature is not
            positive.

    >>> p = torch.tensor([[0.5, 0.3, 0.2]])  # of the tokens "ab", "a", "b"
    >>> q = torch.tensor([[0.8, 0.2]])  # of "a" and "b"
    >>> abs(prefix_kl(q.log(), p.log(), torch.tensor([0, 0, 1])).item()) < 1e-6
    True
    """
    scale = factor(temperature, scale_by_t2)
    student, teacher = same_precision(student, teacher)
    openings = openings[: teacher.shape[1]]
    if int(openings.max()) >= student.shape[1]:
        raise ValueError(
            f"openings must name columns of the student's {student.shape[1]}; they name up to"
            f" {int(openings.max())}"
        )
    p = (teacher / temperature).softmax(-1)[:, : len(openings)]
    known = openings >= 0
    moved = p.new_zeros(student.shape).index_add(1, openings[known], p[:, known])
    total = moved.sum(-1, keepdim=True)
    tiny = torch.finfo(total.dtype).tiny
    sure = total > tiny
    # Any distribution will do where there is none: its value is not looked at.
    target = torch.where(sure, moved / total.clamp(min=tiny), 1 / student.shape[1])
    value = forward_kl(student / temperature, target.log())
    return scale * torch.where(sure.squeeze(-1), value, 0.0)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Partition:
    """Which tokens two vocabularies have in common; all are int64 column numbers.

    Attributes:
        student: [m] the student's columns of tokens that both have.
        teacher: [m] the same tokens' columns of the teacher.
        student_rest: [r] its other tokens.
        teacher_rest: [s] its other tokens.
        student_other: columns of the student that are nobody's token: the teacher gives them no
            probability. The teacher's own such columns are in no list, as if they were not there.
    """

    student: Tensor
    teacher: Tensor
    student_rest: Tensor
    teacher_rest: Tensor
    student_other: Tensor

    def to(self, device: torch.device) -> "Partition":
        """The same on `device`."""
        names = self.__slots__
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


def hybrid_kl(
    student: Tensor,
    teacher: Tensor,
    partition: Partition,
    *,
    transport: float = 1.0,
    temperature: float = 1.0,
    scale_by_t2: bool = True,
) -> Tensor:
    """KL divergence on the tokens that both have and one rest, and transport within the rest.

    T^2 * (sum_i p_i log(p_i / q_i) + p_R log(p_R / q_R) + transport p_R sorted_l1(p | R, q | R))

    i are the shared tokens, R each side's other ones together. By the chain rule KL(p || q) is this
    with KL(p | R || q | R) in the place of the last, which cannot be had: the tokens of the two
    rests are others. All terms are normalised distributions' and never negative. With one
    vocabulary R is empty, and it is the forward KL; with no token in common it is `sorted_l1`.

    Where the student has no other tokens it can give R no probability; then the teacher's shared
    tokens alone are compared, their probabilities divided by their sum.

    Args:
        student: [n, v] logits.
        teacher: [n, w] logits.
        partition: which tokens both have.
        transport: weight of the last term.
        temperature: T, divides both models' logits.
        scale_by_t2: multiply by T^2.

    Returns:
        [n], >= 0; nats, but for the last term, which is `transport` times a probability.

    Raises:
        ValueError: the student has no tokens, shapes do not fit, or the temperature is not
            positive.

    Source: the chain rule of the KL divergence (Cover and Thomas, theorem 2.5.3). Patino et al.'s
    GOLD mixes unnormalised parts of both, which may be negative; this is not that.

    >>> def ids(*columns):
    ...     return torch.tensor(columns, dtype=torch.int64)
    >>> both = Partition(
    ...     student=ids(0), teacher=ids(1), student_rest=ids(1, 2), teacher_rest=ids(0),
    ...     student_other=ids(),
    ... )
    >>> p, q = torch.tensor([[0.4, 0.6]]), torch.tensor([[0.6, 0.3, 0.1]])
    >>> round(hybrid_kl(q.log(), p.log(), both).item(), 6)  # 0.4 * (|1 - 3/4| + |0 - 1/4|)
    0.2
    """
    scale = factor(temperature, scale_by_t2)
    student, teacher = same_precision(student, teacher)
    shared, rest = partition.student, partition.student_rest
    if not len(shared) and not len(rest):
        raise ValueError("the student has no tokens to compare")
    teacher = teacher / temperature
    student = student / temperature
    theirs = teacher[:, partition.teacher_rest]
    mine = student[:, rest]
    parts = [student[:, shared]], [teacher[:, partition.teacher]]
    if len(rest):  # else the teacher's rest is left out here, and its shared tokens add up to 1
        parts[0].append(log_sum(mine))
        parts[1].append(log_sum(theirs))
    if len(partition.student_other):
        parts[0].append(log_sum(student[:, partition.student_other]))
        parts[1].append(torch.full_like(parts[0][-1], -torch.inf))
    coarse, coarse_teacher = (torch.cat(side, -1) for side in parts)
    value = forward_kl(coarse, coarse_teacher)
    if len(rest) and theirs.shape[1] and transport:
        within = sorted_l1(_no_holes(mine), _no_holes(theirs))
        share = coarse_teacher.softmax(-1)[:, len(shared)]
        value = value + transport * share * within
    return scale * value


def _no_holes(logits: Tensor) -> Tensor:
    """Rows in which nothing is possible become uniform, so that they are finite."""
    return logits.masked_fill((logits == -torch.inf).all(-1, keepdim=True), 0.0)
