"""The objective on a cache's few tokens is its loss with its settings."""

from dataclasses import FrozenInstanceError, replace

import pytest
import torch

from limbeck import losses
from limbeck.core.protocols import Objective
from limbeck.core.registry import kinds
from limbeck.core.types import Signals
from limbeck.losses.sparse import Sparse
from limbeck.objectives import SparseKL


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([0, 3, 2, 1])
    mass, ids = torch.randn(4, 5, generator=generator).softmax(-1).topk(2)
    rest = 1 - mass.sum(-1)
    negentropy = torch.xlogy(mass, mass).sum(-1) + torch.xlogy(rest, rest)
    sparse = Sparse(ids=ids, mass=mass, rest=rest, negentropy=negentropy, temperature=2.0)
    logits = torch.randn(4, 5, generator=generator)
    return Signals(labels=labels, logits=logits), Signals(labels=labels, sparse=sparse)


@pytest.mark.parametrize("tail", [True, False])
def test_it_is_its_loss_with_its_settings(pair, tail):
    student, teacher = pair
    value = SparseKL(temperature=2.0, tail=tail)(student, teacher)
    expected = losses.sparse_kl(student.logits, teacher.sparse, temperature=2.0, tail=tail)
    assert value.shape == (4,)
    assert torch.equal(value, expected)
    assert not torch.equal(value, SparseKL(temperature=2.0, tail=not tail)(student, teacher))


def test_rows_are_selected_together(pair):
    student, teacher = pair
    objective, index = SparseKL(temperature=2.0), torch.tensor([3, 0])
    some = objective(student.select(index), teacher.select(index))
    assert torch.equal(some, objective(student, teacher)[index])


def test_a_cache_of_another_temperature_is_refused(pair):
    with pytest.raises(ValueError, match=r"read at 2\.0"):
        SparseKL()(*pair)


def test_it_is_a_frozen_value_of_the_protocol():
    assert kinds("objective")["sparse_kl"] is SparseKL
    assert isinstance(SparseKL(), Objective)
    assert hash(SparseKL()) == hash(replace(SparseKL()))
    assert SparseKL.needs == frozenset({"sparse"})
    assert SparseKL.asks == frozenset({"logits"})
    assert SparseKL.unit == "token"
    assert SparseKL.shared_vocabulary
    with pytest.raises(FrozenInstanceError):
        SparseKL().tail = False
