"""Losses straight from hidden states and output heads; no [n, v] tensor is ever made.

How it is done stands in `chunks.py`; here is what is asked for: one divergence by name, or any sum
of losses over rows.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from limbeck.losses import cpu, kernels
from limbeck.losses.chunks import Chunked, RowTerm, Run, Work, in_place
from limbeck.losses.divergences import adaptive_kl
from limbeck.losses.labels import cross_entropy
from limbeck.losses.projection import Projection
from limbeck.losses.sparse import Sparse, sparse_kl
from limbeck.losses.transport import sorted_l1

__all__ = [
    "IMPLEMENTATIONS",
    "RowTerm",
    "divergence_term",
    "fused_linear_divergence",
    "fused_linear_sparse_kl",
    "label_term",
    "sum_over_rows",
]

IMPLEMENTATIONS = ("auto", "chunked", "compiled", "native", "triton", "naive")


def fused_linear_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    divergence: str | Callable[..., Tensor] = "forward_kl",
    temperature: float = 1.0,
    row_weight: Tensor | None = None,
    labels: Tensor | None = None,
    cross_entropy_weight: float = 0.0,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    soft_cap: float | None = None,
    chunk: int | None = None,
    implementation: str = "auto",
    **settings: Any,
) -> Tensor:
    """sum_i w_i (D(s_i, t_i) + c CE(s_i, y_i)) without ever holding the logits s and t.

    s = student_hidden student_weight^T + student_bias, and t likewise; each soft-capped with
    `soft_cap` where that is given.

    Args:
        student_hidden: [n, ds].
        student_weight: [v, ds]; its gradient is accumulated in float32.
        teacher_hidden: [n, dt]; receives no gradient, nor does its head.
        teacher_weight: [w, dt]; the first min(v, w) columns are compared.
        divergence: a loss of `limbeck.losses` by name, or any function (student [r, v], teacher
            [r, w], *, temperature, **settings) -> [r].
        temperature: T, of the divergence.
        row_weight: [n]; 1 by default. Rows of weight 0 are dropped before anything else.
        labels: [n] for the cross-entropy, -100 for rows without.
        cross_entropy_weight: c.
        student_bias, teacher_bias: [v] and [w].
        soft_cap: as of Gemma: c tanh(z / c), of both models.
        chunk: rows at a time; by default as many as `chunks.sizes` says.
        implementation: `auto`, or as in `sum_over_rows`.
        settings: of the divergence, such as `beta`.

    Returns:
        Scalar float32 (float64 if the student is), with gradients to the student's hidden states,
        weight and bias.

    Raises:
        ValueError: shapes do not fit, the divergence is not known, labels are missing.

    >>> h, w = torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    >>> round(fused_linear_divergence(h, w, 2 * h, w).item(), 4)
    0.08
    """
    loss = named(divergence) if isinstance(divergence, str) else divergence
    n = len(student_hidden)
    if len(teacher_hidden) != n:
        raise ValueError(f"{n} rows of the student, {len(teacher_hidden)} of the teacher")
    if row_weight is None:
        row_weight = student_hidden.new_ones(n, dtype=torch.float32)
    student = Projection(
        hidden=student_hidden, weight=student_weight, bias=student_bias, soft_cap=soft_cap
    )
    teacher = Projection(
        hidden=teacher_hidden, weight=teacher_weight, bias=teacher_bias, soft_cap=soft_cap
    )
    terms = [divergence_term(loss, "teacher", row_weight, temperature, settings)]
    if cross_entropy_weight:
        if labels is None:
            raise ValueError("cross_entropy_weight needs labels")
        terms.append(label_term(labels, row_weight, factor=cross_entropy_weight))
    total, _ = sum_over_rows(
        student, {"teacher": teacher}, terms, implementation=implementation, chunk=chunk
    )
    return total


def fused_linear_sparse_kl(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher: Sparse,
    *,
    tail: bool = True,
    row_weight: Tensor | None = None,
    labels: Tensor | None = None,
    cross_entropy_weight: float = 0.0,
    student_bias: Tensor | None = None,
    soft_cap: float | None = None,
    chunk: int | None = None,
    implementation: str = "auto",
) -> Tensor:
    """The same of a teacher of whom a few tokens a row are known: top-k, or random draws.

    sum_i w_i (sparse_kl(s_i, teacher_i) + c CE(s_i, y_i)), at the teacher's own temperature

    Arguments, result and errors are those of `fused_linear_divergence` and `sparse_kl`.

    >>> h, w = torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    >>> draws = Sparse(
    ...     ids=torch.tensor([[0, 2], [1, 0]]),
    ...     mass=torch.tensor([[0.5, 0.5], [1.0, 0.0]]),
    ...     rest=torch.zeros(2),
    ...     negentropy=torch.tensor([-0.69315, 0.0]),
    ... )
    >>> round(fused_linear_sparse_kl(h, w, draws).item(), 4)
    1.0308
    """
    weight = student_hidden.new_ones(len(student_hidden), dtype=torch.float32)
    weight = weight if row_weight is None else row_weight
    student = Projection(
        hidden=student_hidden, weight=student_weight, bias=student_bias, soft_cap=soft_cap
    )
    temperature = teacher.temperature

    def call(logits: Tensor, _: Tensor | None, index: Tensor) -> Tensor:
        return sparse_kl(logits, teacher[index], temperature=temperature, tail=tail)

    kernel = partial(kernels.sparse_kl, tail=tail)
    terms = [
        RowTerm(loss=call, weight=weight, kernel=kernel, beside=teacher, temperature=temperature)
    ]
    if cross_entropy_weight:
        if labels is None:
            raise ValueError("cross_entropy_weight needs labels")
        terms.append(label_term(labels, weight, factor=cross_entropy_weight))
    return sum_over_rows(student, {}, terms, implementation=implementation, chunk=chunk)[0]


def named(divergence: str) -> Callable[..., Tensor]:
    """The loss of two models' logits that has this name."""
    found = {loss.__name__: loss for loss in (*kernels.KERNELS, adaptive_kl, sorted_l1)}
    if divergence not in found:
        raise ValueError(f"no divergence {divergence!r}; one of: {', '.join(sorted(found))}")
    return found[divergence]


def divergence_term(
    loss: Callable[..., Tensor],
    teacher: str,
    weight: Tensor,
    temperature: float = 1.0,
    settings: dict[str, Any] | None = None,
    **more: Any,
) -> RowTerm:
    """The term of a loss of two models' logits, with its kernel where it has one."""
    own = dict(settings or {})
    scale_by_t2 = own.pop("scale_by_t2", True)
    kernel = kernels.KERNELS.get(loss)

    def call(student: Tensor, teachers: Tensor | None, _: Tensor) -> Tensor:
        return loss(student, teachers, temperature=temperature, scale_by_t2=scale_by_t2, **own)

    return RowTerm(
        loss=call,
        weight=weight,
        teacher=teacher,
        kernel=None if kernel is None else partial(kernel, **own),
        temperature=temperature,
        scale_by_t2=scale_by_t2,
        **more,
    )


def label_term(labels: Tensor, weight: Tensor, **more: Any) -> RowTerm:
    """The term of the cross-entropy with `labels` [n]."""

    def call(student: Tensor, _: Tensor | None, index: Tensor) -> Tensor:
        return cross_entropy(student, labels[index])

    return RowTerm(loss=call, weight=weight, kernel=kernels.cross_entropy, beside=labels, **more)


def sum_over_rows(
    student: Projection,
    teachers: Mapping[str, Projection | Tensor],
    terms: Sequence[RowTerm],
    *,
    implementation: str = "auto",
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The weighted sum of all terms, and each term's own sum over rows, without its factor.

    Args:
        student: its hidden states and head; receives the gradient.
        teachers: by name, hidden states with a head, or ready logits.
        terms: what is summed.
        implementation: `chunked` as described above; `compiled`, the same with a compiled block;
            `native`, the same with a kernel in C for CPUs; `triton`, with one for GPUs; `naive`,
            the definitions on whole logits. `auto` takes `triton` on a GPU and `native` on a CPU.
            Terms without such a kernel (see `row_forms.py`) are `chunked`, and so is all where
            none can be made.
        chunk: rows at a time.

    Returns:
        total: scalar, differentiable: sum over terms of factor * sum_i weight_i loss_i.
        sums: [terms], detached.
    """
    if implementation == "naive":
        return _naive(student, teachers, terms)
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"no implementation {implementation!r}; one of: {', '.join(IMPLEMENTATIONS)}"
        )
    if reason := why_not(implementation):
        raise ValueError(f"{implementation}: {reason}")
    run = _run(implementation, student, teachers, terms)
    parts = (student.hidden, student.weight, student.bias, student.low_hidden, student.low_weight)
    # Within a model's autocast, products of float32 would be rounded to half precision.
    with torch.autocast(student.device.type, enabled=False):
        work = Work(student, teachers, terms, chunk, run)
        return Chunked.apply(work, *parts)  # pyright: ignore[reportReturnType]  # torch says Any


def why_not(implementation: str) -> str | None:
    """Why this implementation cannot be used here; None where it can."""
    if implementation == "compiled" and torch.__version__ < "2.12":
        return (
            "before torch 2.12 the compiler may read logits that it has already overwritten, and"
            f" the loss comes out wrong; this is torch {torch.__version__}. Use `chunked`"
        )
    if implementation == "triton" and find_spec("triton") is None:
        return "Triton is not installed. Use `chunked`"
    return None


def _run(
    implementation: str,
    student: Projection,
    teachers: Mapping[str, Projection | Tensor],
    terms: Sequence[RowTerm],
) -> Run:
    """Who takes the losses of these terms."""
    device = student.hidden.device.type
    if implementation == "compiled":
        return Run(compiled_block(), by_blocks=device == "cpu")
    auto, run = implementation == "auto", None
    if (auto or implementation == "native") and device == "cpu":
        run = cpu.kernel(student, teachers, terms)
    elif (auto and device == "cuda" and not why_not("triton")) or implementation == "triton":
        from limbeck.losses import gpu

        run = gpu.kernel(student, teachers, terms)
    return run or Run()


@functools.cache
def compiled_block() -> Callable[..., Tensor]:
    """`in_place` through `torch.compile`, which makes a few passes of its many."""
    return torch.compile(in_place, dynamic=True)


def _naive(
    student: Projection, teachers: Mapping[str, Projection | Tensor], terms: Sequence[RowTerm]
) -> tuple[Tensor, Tensor]:
    """The definitions on whole logits: what the others are held to."""
    logits = student.logits()
    made = {k: t.logits() if isinstance(t, Projection) else t for k, t in teachers.items()}
    every = torch.arange(len(logits), device=logits.device)
    sums: list[Tensor] = []
    total = logits.new_zeros((), dtype=torch.promote_types(logits.dtype, torch.float32))
    for term in terms:
        theirs = None if term.teacher is None else made[term.teacher].detach()
        rows = term.loss(logits, theirs, every)
        summed = (term.weight * torch.where(term.weight > 0, rows, 0.0)).sum()
        sums.append(summed.detach())
        total = total + term.factor * summed
    return total, torch.stack(sums)
