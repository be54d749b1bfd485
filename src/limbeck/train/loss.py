"""The loss of a micro-batch, from terms, pairings and signals.

Where the student's logits have been made, every objective is handed whole signals. Where a
`projection` stands in their place, objectives of logits are taken chunk by chunk, all in one pass;
those of other signals are handed theirs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.term import Term
from limbeck.core.types import Needs, Pairing, Signals, Spans
from limbeck.losses.chunks import RowTerm
from limbeck.losses.fused import sum_over_rows
from limbeck.losses.projection import Projection
from limbeck.train.phases import phase

IN_A_CHUNK: Needs = frozenset({"logits", "sparse", "chosen"})
"""Signals of which any few rows can be had alone."""


def rowwise(objective: Any) -> bool:
    """Whether an objective of logits can do with some rows at a time.

    It must say that it is `rowwise`: one that looks at several rows together would give other
    values on fewer of them, and one with parameters of its own would lose their gradient.
    """
    return (
        getattr(objective, "rowwise", False)
        and not isinstance(objective, nn.Module)
        and objective.asks <= {"logits"}
        and objective.needs <= IN_A_CHUNK
    )


def fits_chunks(terms: Sequence[Term]) -> bool:
    """Whether no term needs all of the student's logits together."""
    return all(rowwise(t.objective) or "logits" not in t.objective.asks for t in terms)


@phase("limbeck.loss")
def loss_of(
    student: Signals,
    terms: Sequence[Term],
    pairings: Sequence[Pairing],
    factors: Tensor,
    heard: Mapping[str, Signals],
    implementation: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The sum of factor * sum_i weight_i loss_i over terms, and each term's own sum.

    Args:
        student: its signals, with gradient.
        terms: k of them.
        pairings: which rows stand beside which, for each term; they may be on the host still.
        factors: [k].
        heard: the teachers' signals, by name.
        implementation: how losses of logits are taken at a projection; see `sum_over_rows`.
    """
    at_head = student.logits is None and student.projection is not None
    chunked = [i for i, term in enumerate(terms) if at_head and "logits" in term.objective.asks]
    sums = list(torch.zeros_like(factors))
    total = torch.zeros((), device=factors.device)
    # Of a term without pairs, no row of the teacher's may be there to stand beside the student's.
    paired = [i for i in chunked if len(pairings[i].weight)]
    if paired:
        total, found = _over_head(
            student,
            [terms[i] for i in paired],
            [pairings[i] for i in paired],
            [factors[i] for i in paired],
            heard,
            implementation,
        )
        for index, summed in zip(paired, found, strict=True):
            sums[index] = summed.to(factors.dtype)
    for index, (term, host) in enumerate(zip(terms, pairings, strict=True)):
        if index in chunked:
            continue
        pairing = host.to(factors.device)
        teacher = heard[term.teacher].select(pairing.teacher) if term.teacher else student
        rows = term.objective(student.select(pairing.student), teacher)
        # Not just a product: a row that does not count may be infinite, and 0 * inf is NaN.
        summed = (pairing.weight * torch.where(pairing.weight > 0, rows, 0.0)).sum()
        sums[index] = summed.detach().to(factors.dtype)
        total = total + factors[index] * summed
    if at_head and not paired:
        total = total + _nothing(student.projection)
    return total, torch.stack(sums)


def _nothing(projection: Projection | None) -> Tensor:
    """0, but every weight of the model has a part in it: DDP waits for the gradient of each."""
    assert projection is not None
    return projection[:0].logits().float().sum()


def _over_head(
    student: Signals,
    terms: Sequence[Term],
    pairings: Sequence[Pairing],
    factors: Sequence[Tensor],
    heard: Mapping[str, Signals],
    implementation: str,
) -> tuple[Tensor, Tensor]:
    """The same for objectives of logits, from logits that have not been made."""
    labels, head = student.labels, student.projection
    assert head is not None
    teachers: dict[str, Projection | Tensor] = {}
    made: list[RowTerm] = []
    for term, pairing, factor in zip(terms, pairings, factors, strict=True):
        weight, beside = _spread(pairing, len(labels))
        if beside is not None:
            beside = beside.to(labels.device, non_blocking=True)
        theirs = Signals(labels=labels)
        name = None
        if term.teacher is not None:
            theirs = heard[term.teacher].select(beside)
            logits = theirs.projection if theirs.logits is None else theirs.logits
            if logits is not None and "logits" in term.objective.needs:
                # Two terms may pair the rows of one teacher each in its own way.
                name = f"{term.teacher} {term.objective.unit}"
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
    return sum_over_rows(head, teachers, made, implementation=implementation)


def _spread(pairing: Pairing, rows: int) -> tuple[Tensor, Tensor | None]:
    """A weight and a teacher's row for each of the student's rows; 0 where it has no partner."""
    assert not isinstance(pairing.student, Spans)
    assert not isinstance(pairing.teacher, Spans)
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
