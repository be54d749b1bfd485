"""TAID's target on the way from the student to the teacher."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck import losses
from limbeck.losses import kernels
from limbeck.losses.kernels import Softened

INF = torch.inf
ROW = st.lists(st.floats(-20, 20, width=32), min_size=6, max_size=6)


def pair(n=6, v=9, seed=0, spread=2.0):
    random = torch.Generator().manual_seed(seed)
    return spread * torch.randn(2, n, v, generator=random, dtype=torch.float64)


def slope(value, leaf):
    return torch.autograd.grad(value.sum(), leaf)[0]


@pytest.mark.parametrize("t", [0.0, 0.2, 0.7, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_papers_formula(t, temperature):
    """Equations 2 and 3: the student within the target is a constant."""
    student, teacher = pair()
    student.requires_grad_()
    constant = ((1 - t) * student.detach() + t * teacher) / temperature
    target, q = constant.softmax(-1), (student / temperature).softmax(-1)
    expected = temperature**2 * (target * (target.log() - q.log())).sum(-1)
    value = losses.taid(student, teacher, t=t, temperature=temperature)
    torch.testing.assert_close(value, expected)
    found = slope(value, student)
    torch.testing.assert_close(found, slope(expected, student))
    torch.testing.assert_close(found, temperature * (q - target).detach())


def test_at_the_start_nothing_is_learnt_and_at_the_end_it_is_the_forward_kl():
    student, teacher = pair()
    student.requires_grad_()
    start = losses.taid(student, teacher, t=0.0)
    assert not start.any()
    assert slope(start, student).abs().max() < 1e-15
    end, plain = losses.taid(student, teacher, t=1.0), losses.forward_kl(student, teacher)
    assert torch.equal(end, plain)
    assert torch.equal(slope(end, student), slope(plain, student))


def test_near_the_teacher_the_value_goes_with_t_squared_and_the_gradient_with_t():
    student, teacher = pair()
    student = (teacher + 1e-4 * student).requires_grad_()
    plain = losses.forward_kl(student, teacher)
    for t in (0.1, 0.5, 0.9):
        value = losses.taid(student, teacher, t=t)
        torch.testing.assert_close(value, t**2 * plain, rtol=1e-3, atol=0)
        wanted = t * slope(losses.forward_kl(student, teacher), student)
        torch.testing.assert_close(slope(value, student), wanted, rtol=1e-2, atol=1e-8)


@settings(max_examples=100)
@given(student=ROW, teacher=ROW, low=st.floats(0, 1), high=st.floats(0, 1))
def test_it_grows_with_t(student, teacher, low, high):
    low, high = sorted((low, high))
    s, z = torch.tensor([student]).double(), torch.tensor([teacher]).double()
    values = [losses.taid(s, z, t=t).item() for t in (low, high)]
    assert -1e-14 <= values[0] <= values[1] * (1 + 1e-9) + 1e-12


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_what_either_rules_out_is_not_in_the_target(t):
    student, teacher = pair(n=3, v=5)
    student[:, 1] = teacher[:, 2] = -INF
    student[:, 3] = teacher[:, 3] = -INF
    leaf = student.clone().requires_grad_()
    value = losses.taid(leaf, teacher, t=t)
    assert slope(value, leaf).isfinite().all()
    if t == 1:
        assert value.isinf().all()
        return
    outside = [1, 2, 3] if t else [1, 3]
    target = ((1 - t) * student + (t * teacher if t else 0.0)).index_fill(
        1, torch.tensor(outside), -INF
    )
    q, m = student.log_softmax(-1), target.log_softmax(-1)
    kept = [i for i in range(5) if i not in outside]
    expected = (m.exp() * (m - q))[:, kept].sum(-1)
    torch.testing.assert_close(value, expected)


def test_gradients_into_the_teacher_are_those_of_finite_differences():
    """As in all losses; it is the caller who wants none."""
    student, teacher = pair(n=2, v=4)
    assert torch.autograd.gradcheck(
        lambda z: losses.taid(student, z, t=0.4, temperature=1.5), teacher.requires_grad_()
    )


def test_kernel_at_both_ends():
    student, teacher = pair()
    for t in (0.0, 1.0):
        value, gradient = kernels.taid(Softened(student), Softened(teacher), t=t)
        leaf = student.clone().requires_grad_()
        expected = losses.taid(leaf, teacher, t=t)
        torch.testing.assert_close(value, expected.detach())
        torch.testing.assert_close(gradient, slope(expected, leaf))
