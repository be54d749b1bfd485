"""Log-probabilities of a few outcomes: against the definition, and where rounding shows."""

import torch

from limbeck.losses.chosen import outcomes, outcomes_of
from limbeck.losses.projection import Projection


def drawn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_outcomes_are_those_of_whole_logits():
    head = Projection(hidden=drawn(7, 4), weight=drawn(9, 4))
    labels, among = torch.arange(7), torch.arange(9) % 3 == 0
    probability = head.logits().softmax(-1)
    chosen, within = outcomes(head, labels, among)
    torch.testing.assert_close(chosen, probability[torch.arange(7), labels].log())
    torch.testing.assert_close(within, probability[:, among].sum(-1).log())
    assert outcomes(head, labels)[1] is None


def test_what_is_certain_is_never_more_than_that():
    """Two sums of the same numbers, each rounded in its own order."""
    among = torch.arange(2000) % 2 == 0
    logits = 2 * drawn(500, 2000).float() + 20 - 60 * (~among).float()
    logits.requires_grad_()
    _, within = outcomes_of(logits, torch.zeros(500, dtype=torch.int64), among)
    assert within.max().item() <= 0
    assert within.min().item() > -1e-5
    within.sum().backward()
    assert logits.grad.isfinite().all()
