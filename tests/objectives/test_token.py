"""An objective is its loss with settings: nothing more, and no gradient for the teacher."""

from dataclasses import FrozenInstanceError, fields

import pytest
import torch

from limbeck import losses, objectives
from limbeck.core.protocols import Objective
from limbeck.core.registry import kinds
from limbeck.core.types import Signals
from limbeck.losses.kernels import Softened

OBJECTIVES = {
    kind: cls for kind, cls in kinds("objective").items() if callable(getattr(losses, kind, None))
}
SETTINGS = {"temperature": 2.5, "beta": 0.3, "alpha": 0.2, "mu": 0.6, "t": 0.4}
SETTINGS |= {"k": 3, "margin": 0.7}
NOT_OF_THE_LOSS = {"pairing"}


def settings_of(kind):
    names = {field.name for field in fields(OBJECTIVES[kind])} - NOT_OF_THE_LOSS
    return {name: SETTINGS[name] for name in names}


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([0, 3, 2, 1])
    student, teacher = (torch.randn(4, 5, generator=generator) for _ in range(2))
    return Signals(labels=labels, logits=student), Signals(labels=labels, logits=teacher)


@pytest.mark.parametrize("kind", [kind for kind in OBJECTIVES if kind != "sparse_kl"])
def test_it_is_its_loss_with_its_settings(kind, pair):
    student, teacher = pair
    settings = settings_of(kind)
    objective = OBJECTIVES[kind](**settings)
    against = teacher.logits if objective.needs else student.labels
    labels = (student.labels,) if kind == "decoupled_kd" else ()
    expected = getattr(losses, kind)(student.logits, against, *labels, **settings)
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


@pytest.mark.parametrize("kind", [kind for kind in OBJECTIVES if kind != "sparse_kl"])
def test_its_kernel_is_the_same_loss(kind, pair):
    """Where it has one, it gives the value before T^2, and that value's gradient."""
    student, teacher = pair
    objective = OBJECTIVES[kind](**settings_of(kind))
    if kind in ("decoupled_kd", "sorted_l1", "top_k_reverse_kl"):
        assert objective.kernel is None
        return
    t = getattr(objective, "temperature", 1.0)
    beside = Softened(teacher.logits / t) if objective.needs else student.labels
    leaf = (student.logits / t).requires_grad_()
    value, gradient = objective.kernel(Softened(leaf.detach()), beside)
    labelled = Signals(labels=student.labels, logits=leaf * t)
    expected = objective(labelled, teacher) / t**2
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), leaf)[0])


def test_a_subclass_with_another_formula_is_not_mistaken_for_its_parent(pair):
    class Doubled(objectives.ForwardKL):
        def __call__(self, student, teacher):
            return 2 * super().__call__(student, teacher)

    assert objectives.ForwardKL().kernel is not None
    assert Doubled().kernel is None
