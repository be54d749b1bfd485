"""The loss of a micro-batch, from terms, pairings and signals; in two ways that agree.

`over_signals` hands every objective whole signals. `over_head` stands in the place of the student's
output head, where logits are not made yet, and works chunk by chunk; it serves all objectives that
compare one row with one row.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from limbeck.core.term import Term
from limbeck.core.types import Needs, Pairing, Signals
from limbeck.losses.chunks import RowTerm
from limbeck.losses.fused import sum_over_rows
from limbeck.losses.projection import Projection

IN_A_CHUNK: Needs = frozenset({"logits", "sparse", "chosen"})
"""Signals of which any few rows can be had alone."""


def fits_chunks(terms: Sequence[Term]) -> bool:
    """Whether each term can do with some rows' logits at a time.

    An objective must say that it is `rowwise`: one that looks at several rows together would give
    other values on fewer of them, and one with parameters of its own would lose their gradient.
    """
    return all(
        getattr(term.objective, "rowwise", False)
        and not isinstance(term.objective, nn.Module)
        and term.objective.asks <= {"logits"}
        and term.objective.needs <= IN_A_CHUNK
        for term in terms
    )


@record_function("limbeck.loss")
def over_signals(
    student: Signals,
    terms: Sequence[Term],
    pairings: Sequence[Pairing],
    factors: Tensor,
    heard: Mapping[str, Signals],
) -> tuple[Tensor, Tensor]:
    """The sum of factor * sum_i weight_i loss_i over terms, and each term's own sum.

    Args:
        student: its signals, with gradient.
        terms: k of them.
        pairings: which rows stand beside which, for each term.
        factors: [k].
        heard: the teachers' signals, by name.
    """
    total = torch.zeros((), device=factors.device)
    sums: list[Tensor] = []
    for term, pairing, factor in zip(terms, pairings, factors, strict=True):
        teacher = heard[term.teacher].select(pairing.teacher) if term.teacher else student
        rows = term.objective(student.select(pairing.student), teacher)
        # Not just a product: a row that does not count may be infinite, and 0 * inf is NaN.
        summed = (pairing.weight * torch.where(pairing.weight > 0, rows, 0.0)).sum()
        sums.append(summed.detach())
        total = total + factor * summed
    return total, torch.stack(sums)


@record_function("limbeck.loss")
def over_head(
    student: Projection,
    labels: Tensor,
    terms: Sequence[Term],
    pairings: Sequence[Pairing],
    factors: Tensor,
    heard: Mapping[str, Signals],
    implementation: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The same from logits that have not been made; `labels` [n] are the student's."""
    teachers: dict[str, Projection | Tensor] = {}
    made: list[RowTerm] = []
    for term, pairing, factor in zip(terms, pairings, factors, strict=True):
        weight, beside = _spread(pairing, len(labels))
        theirs = Signals(labels=labels)
        name = None
        if term.teacher is not None:
            theirs = heard[term.teacher].select(beside)
            logits = theirs.projection if theirs.logits is None else theirs.logits
            if logits is not None and "logits" in term.objective.needs:
                name = term.teacher
                teachers[name] = logits
            theirs = replace(theirs, projection=None, logits=None)
        made.append(
            RowTerm(
                loss=_rowwise(term.objective, labels, theirs),
                weight=weight,
                factor=factor,
                teacher=name,
                kernel=getattr(term.objective, "kernel", None),
                beside=labels if theirs.sparse is None else theirs.sparse,
                temperature=getattr(term.objective, "temperature", 1.0),
            )
        )
    return sum_over_rows(student, teachers, made, implementation=implementation)


def _spread(pairing: Pairing, rows: int) -> tuple[Tensor, Tensor | None]:
    """A weight and a teacher's row for each of the student's rows; 0 where it has no partner."""
    if pairing.student is None:
        return pairing.weight, pairing.teacher
    weight = pairing.weight.new_zeros(rows)
    weight[pairing.student] = pairing.weight
    if pairing.teacher is None:
        return weight, None
    beside = pairing.teacher.new_zeros(rows)
    beside[pairing.student] = pairing.teacher
    return weight, beside


def _rowwise(
    objective: Any, labels: Tensor, theirs: Signals
) -> Callable[[Tensor, Tensor | None, Tensor], Tensor]:
    """The objective on the logits of some rows."""

    def loss(student: Tensor, teacher: Tensor | None, index: Tensor) -> Tensor:
        beside = replace(theirs.select(index), logits=teacher)
        return objective(Signals(labels=labels[index], logits=student), beside)

    return loss
