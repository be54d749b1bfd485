"""The loss of a micro-batch, at the head and of whole logits."""

import pytest
import torch

from limbeck.core.term import Term
from limbeck.core.types import Pairing, Signals
from limbeck.losses.projection import Projection
from limbeck.objectives import CrossEntropy, ForwardKL, SortedL1
from limbeck.train.loss import loss_of

ROWS, WIDTH, VOCABULARY = 5, 8, 11
NONE = torch.zeros(0, dtype=torch.int64)
UNPAIRED = Pairing(student=NONE, teacher=NONE, weight=torch.zeros(0))
ALL = Pairing(student=None, teacher=None, weight=torch.ones(ROWS))
SOME = Pairing(
    student=torch.tensor([3, 0]), teacher=torch.tensor([0, 1]), weight=torch.tensor([1.0, 0.5])
)

CASES = {
    "a teacher without rows": ((CrossEntropy(), None, ALL), (SortedL1(), 0, UNPAIRED)),
    "it alone": ((SortedL1(), 0, UNPAIRED),),
    "two teachers": ((ForwardKL(), 0, UNPAIRED), (ForwardKL(), 2, SOME), (SortedL1(), 2, SOME)),
    "a teacher whose rows nobody pairs": ((CrossEntropy(), None, ALL), (ForwardKL(), 2, UNPAIRED)),
}


def drawn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def losses(case, *, whole, adapted=False):
    """Sums of the terms, and the gradients of all that the head is made of."""
    parts = {
        "hidden": drawn(ROWS, WIDTH),
        "weight": drawn(VOCABULARY, WIDTH),
        **({"low_hidden": drawn(ROWS, 2), "low_weight": drawn(VOCABULARY, 2)} if adapted else {}),
    }
    for part in parts.values():
        part.requires_grad_()
    head = Projection(**parts)
    student = Signals(
        labels=torch.arange(ROWS),
        logits=head.logits() if whole else None,
        projection=None if whole else head,
    )
    heard = {
        f"of {rows}": Signals(labels=torch.arange(rows), logits=drawn(rows, VOCABULARY))
        for rows in (0, 2)
    }
    terms = [
        Term(objective=objective, teacher=None if rows is None else f"of {rows}", name=str(index))
        for index, (objective, rows, _) in enumerate(case)
    ]
    pairings = [pairing for _, _, pairing in case]
    total, sums = loss_of(student, terms, pairings, torch.ones(len(terms)), heard)
    total.backward()
    return sums, [part.grad for part in parts.values()]


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_terms_without_a_pair_are_worth_nothing(name, adapted):
    sums, gradients = losses(CASES[name], whole=False, adapted=adapted)
    expected, whole_gradients = losses(CASES[name], whole=True, adapted=adapted)
    torch.testing.assert_close(sums, expected)
    assert [float(sum) == 0 for sum in sums] == [case[2] is UNPAIRED for case in CASES[name]]
    # None is missing: DDP waits for each.
    for found, wanted in zip(gradients, whole_gradients, strict=True):
        torch.testing.assert_close(found, wanted)
