"""An objective is its loss with settings: nothing more, and no gradient for the teacher."""

from dataclasses import FrozenInstanceError, fields

import pytest
import torch

from limbeck import losses, objectives
from limbeck.core.protocols import Objective
from limbeck.core.registry import kinds
from limbeck.core.types import Signals

OBJECTIVES = {kind: cls for kind, cls in kinds("objective").items() if hasattr(losses, kind)}
SETTINGS = {"temperature": 2.5, "beta": 0.3, "alpha": 0.2, "mu": 0.6}


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([0, 3, 2, 1])
    student, teacher = (torch.randn(4, 5, generator=generator) for _ in range(2))
    return Signals(labels=labels, logits=student), Signals(labels=labels, logits=teacher)


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_it_is_its_loss_with_its_settings(kind, pair):
    student, teacher = pair
    settings = {field.name: SETTINGS[field.name] for field in fields(OBJECTIVES[kind])}
    objective = OBJECTIVES[kind](**settings)
    against = teacher.logits if objective.needs else student.labels
    expected = getattr(losses, kind)(student.logits, against, **settings)
    assert torch.equal(objective(student, teacher), expected)
    assert expected.shape == (4,)


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_it_is_a_frozen_value_of_the_protocol(kind):
    cls = OBJECTIVES[kind]
    assert isinstance(cls(), Objective)
    assert cls() == cls()
    assert hash(cls()) == hash(cls())
    assert cls.kind == kind
    assert cls.__name__ in objectives.__all__
    assert cls.unit == "token"
    assert cls.shared_vocabulary is (kind not in ("sorted_l1", "cross_entropy"))
    for field in fields(cls):
        with pytest.raises(FrozenInstanceError):
            setattr(cls(), field.name, 1.0)


def test_every_loss_over_tokens_has_an_objective():
    assert set(OBJECTIVES) >= {n for n in losses.__all__ if n != "sinkhorn"}


def test_labels_need_no_teacher(pair):
    student, _ = pair
    objective = objectives.CrossEntropy()
    assert objective.needs == frozenset()
    expected = -student.logits.log_softmax(-1)[range(4), student.labels]
    assert torch.allclose(objective(student, student), expected)
