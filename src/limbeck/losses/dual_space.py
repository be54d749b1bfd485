"""Distillation in two spaces: each model's states, projected, are read by the other one's head.

No two vocabularies are compared. In the student's space both distributions come from the student's
head, in the teacher's space both from the teacher's.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from limbeck.losses.blocks import Blocks
from limbeck.losses.by_rows import chunk_rows, in_chunks
from limbeck.losses.divergences import forward_kl
from limbeck.losses.labels import cross_entropy
from limbeck.losses.projection import Projection


def student_space(
    student: Projection,
    projected: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    rows: int | None = None,
) -> Tensor:
    """The projector's own loss, and the student's where the projector is right.

    CE(p, y) + [argmax p = y] T^2 KL(stop(p_T) || q_T),   p = softmax(head(projected))

    with q the student's own distribution. The cross-entropy trains the projector alone: the head is
    held still in p. The KL trains the student, its head included, and not the projector.

    Args:
        student: its states and head, of n rows.
        projected: [n, d] the teacher's states in the student's space.
        labels: [n] the student's next tokens.
        temperature: T, of the KL.
        rows: rows at a time; None for as many as `CHUNK_BYTES` hold.

    Returns:
        [n] nats.

    Source: Zhang et al., "Dual-Space Knowledge Distillation for Large Language Models" (arXiv
    2406.17328), L_ce^{t->s} and L_kd^stu; T^2 is not in the paper.
    """
    student = _ready(student)

    def loss(own: Projection, projected: Tensor, labels: Tensor) -> Tensor:
        theirs = _through(student, projected).logits()
        value = cross_entropy(theirs, labels)
        right = theirs.argmax(-1) == labels
        distance = forward_kl(own.logits(), theirs.detach(), temperature=temperature)
        return value + torch.where(right, distance, 0.0)

    return _by_rows(loss, student, projected, labels, rows=rows)


def teacher_space(teacher: Projection, projected: Tensor, *, temperature: float = 1.0) -> Tensor:
    """T^2 KL(p_T || q_T),   q = softmax(head(projected)): both through the teacher's head.

    Args:
        teacher: its states and head, of m rows; neither gets a gradient.
        projected: [m, d] the student's states in the teacher's space.
        temperature: T.

    Returns:
        [m] nats, on the device of `projected`.

    Source: as `student_space`, L_kd^tea; T^2 is not in the paper.
    """
    teacher = _ready(teacher)

    def loss(own: Projection, projected: Tensor) -> Tensor:
        with torch.no_grad():
            theirs = own.logits()
        return forward_kl(_through(teacher, projected).logits(), theirs, temperature=temperature)

    value = _by_rows(loss, teacher, projected.to(teacher.device))
    return value.to(projected.device)


def cross_attention(
    query: Tensor,
    key: Tensor,
    student: Tensor,
    teacher: Tensor,
    student_sample: Tensor,
    teacher_sample: Tensor,
) -> tuple[Tensor, Tensor]:
    """Each student row's mix of the teacher rows of its sample, and each teacher row's the reverse.

    With a = query key^T / sqrt(e), softmax(a) teacher and softmax(a^T) student, within samples.

    Args:
        query: [n, e], the student's.
        key: [m, e], the teacher's.
        student: [n, w] what teacher rows mix.
        teacher: [m, d] what student rows mix.
        student_sample: [n] which sample each row is of.
        teacher_sample: [m] likewise.

    Returns:
        to_student: [n, d].
        to_teacher: [m, w].

    Raises:
        ValueError: one side has a sample that the other has not.

    Source: as `student_space`, cross-model attention.

    >>> one = torch.tensor([0])
    >>> x, y = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0]])  # a row alone is all there is
    >>> cross_attention(x, x, x, y, one, one)
    (tensor([[3.]]), tensor([[1., 2.]]))
    """
    if not torch.equal(student_sample.unique(), teacher_sample.unique()):
        raise ValueError("student and teacher rows must be of the same samples")
    mine, theirs = Blocks.of(student_sample), Blocks.of(teacher_sample)
    scores = mine.scatter(query) @ theirs.scatter(key).mT * query.shape[1] ** -0.5
    to_student = _masked_softmax(scores, theirs) @ theirs.scatter(teacher)
    to_teacher = _masked_softmax(scores.mT, mine) @ mine.scatter(student)
    return mine.gather(to_student), theirs.gather(to_teacher)


def mean_of_sample(values: Tensor, sample: Tensor, of: Tensor) -> Tensor:
    """For each row of `of`, the mean of `values` [m] over the rows of its sample; 0 of none.

    Args:
        values: [m].
        sample: [m] which sample each value is of.
        of: [n] which sample each answer is for.

    Returns:
        [n].

    >>> mean_of_sample(torch.tensor([1.0, 3.0]), torch.tensor([5, 5]), torch.tensor([5, 6, 5]))
    tensor([2., 0., 2.])
    """
    line = torch.cat([sample, of]).unique(return_inverse=True)[1]
    total = values.new_zeros(len(line)).index_add(0, line[: len(sample)], values)
    count = torch.zeros_like(total).index_add(0, line[: len(sample)], torch.ones_like(values))
    return (total / count.clamp(min=1))[line[len(sample) :]]


def _masked_softmax(scores: Tensor, keys: Blocks) -> Tensor:
    return scores.masked_fill(~keys.there[:, None], -torch.inf).softmax(-1)


def _by_rows(
    loss: Callable[..., Tensor], head: Projection, *tensors: Tensor, rows: int | None = None
) -> Tensor:
    """`loss(head of some rows, *tensors)` a few rows at a time."""

    def of_rows(hidden: Tensor, *parts: Tensor) -> Tensor:
        low, rest = (None, parts) if head.low_hidden is None else (parts[0], parts[1:])
        return loss(replace(head, hidden=hidden, low_hidden=low), *rest)

    own = [head.hidden] if head.low_hidden is None else [head.hidden, head.low_hidden]
    return in_chunks(of_rows, *own, *tensors, rows=rows or chunk_rows(head.vocabulary))


def _ready(head: Projection) -> Projection:
    """With weights in the type of the states, so that they are not cast anew for each chunk."""
    dtype = head.hidden.dtype

    def cast(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.to(dtype)

    low = cast(head.low_hidden), cast(head.low_weight)
    weight, bias = head.weight.to(dtype), cast(head.bias)
    return replace(head, weight=weight, bias=bias, low_hidden=low[0], low_weight=low[1])


def _through(head: Projection, hidden: Tensor) -> Projection:
    """Other states at the same head, which is held still.

    An adapter on the head is left out: what it adds depends on more than the head's own input.
    """
    return replace(
        head,
        hidden=hidden.to(head.hidden.dtype),
        weight=head.weight.detach(),
        bias=None if head.bias is None else head.bias.detach(),
        low_hidden=None,
        low_weight=None,
    )
