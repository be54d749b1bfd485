"""The candidates objective on what a model says of answers that a teacher was seen to give."""

import pytest
import torch

from limbeck.core.types import Signals
from limbeck.losses import candidates
from limbeck.objectives import Candidates


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jensen_shannon"])
def test_an_answer_that_the_teacher_never_gave_leaves_the_loss_finite(divergence):
    logp = torch.tensor([-1.0, -2.0, -1.5], requires_grad=True)
    student = Signals(
        labels=torch.zeros(3, dtype=torch.int64),
        chosen=logp,
        length=torch.ones(3),
        score=torch.tensor([3.0, 1.0, 0.0]),
        group=torch.zeros(3, dtype=torch.int64),
    )
    found = Candidates(divergence=divergence)(student, student)
    found.sum().backward()
    assert found.isfinite().all()
    assert logp.grad.isfinite().all()
    if divergence == "reverse":  # it is left out of the group
        assert student.score is not None
        assert student.group is not None
        rest = candidates.candidates(
            logp[:2], student.score[:2], student.group[:2], divergence="reverse"
        )
        assert found.tolist() == [*rest.tolist(), 0.0]
