"""Decoupled knowledge distillation against its paper."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck import losses

INF = torch.inf
ROW = st.lists(st.floats(-20, 20, width=32), min_size=6, max_size=6)


def case(n=6, v=9, seed=0, spread=2.0):
    random = torch.Generator().manual_seed(seed)
    student, teacher = spread * torch.randn(2, n, v, generator=random, dtype=torch.float64)
    return student, teacher, torch.randint(v, (n,), generator=random)


def reference(student, teacher, labels, a, b, temperature=1.0):
    """Equations 2 to 7, a row at a time; probabilities of the others are divided by their sum."""
    values = []
    for s, z, y in zip(student / temperature, teacher / temperature, labels, strict=True):
        p, q = z.softmax(-1), s.softmax(-1)
        others = [i for i in range(len(p)) if i != y]
        binary = p[y] * (p[y] / q[y]).log()
        binary = binary + (1 - p[y]) * ((1 - p[y]) / (1 - q[y])).log()
        left_p, left_q = p[others] / p[others].sum(), q[others] / q[others].sum()
        values.append(a * binary + b * (left_p * (left_p / left_q).log()).sum())
    return temperature**2 * torch.stack(values)


@pytest.mark.parametrize(("a", "b"), [(1, 1), (1, 8), (0, 1), (1, 0), (0.3, 2.5)])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_papers_formula(a, b, temperature):
    student, teacher, labels = case()
    student.requires_grad_()
    value = losses.decoupled_kd(student, teacher, labels, alpha=a, beta=b, temperature=temperature)
    expected = reference(student, teacher, labels, a, b, temperature)
    torch.testing.assert_close(value, expected)
    found, wanted = (torch.autograd.grad(x.sum(), student)[0] for x in (value, expected))
    torch.testing.assert_close(found, wanted)


def test_with_the_teachers_doubt_as_weight_it_is_the_forward_kl():
    student, teacher, labels = case()
    target = losses.decoupled_kd(student, teacher, labels, beta=0.0)
    others = losses.decoupled_kd(student, teacher, labels, alpha=0.0)
    doubt = 1 - teacher.softmax(-1).gather(-1, labels[:, None]).squeeze(-1)
    torch.testing.assert_close(target + doubt * others, losses.forward_kl(student, teacher))


def test_gradcheck():
    student, teacher, labels = case(n=3, v=4)
    student.requires_grad_(), teacher.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda s, z: losses.decoupled_kd(s, z, labels, beta=2.0, temperature=1.5),
        (student, teacher),
    )


@settings(max_examples=100)
@given(student=ROW, teacher=ROW, label=st.integers(0, 5), a=st.floats(0, 4), b=st.floats(0, 4))
def test_never_negative_and_zero_at_equality(student, teacher, label, a, b):
    s, z = torch.tensor([student]).double(), torch.tensor([teacher]).double()
    y = torch.tensor([label])
    assert losses.decoupled_kd(s, z, y, alpha=a, beta=b).item() >= -1e-12
    s.requires_grad_()
    value = losses.decoupled_kd(s, s.detach(), y, alpha=a, beta=b)
    assert value.item() == 0
    assert torch.autograd.grad(value.sum(), s)[0].abs().max() < 1e-13 * (1 + a + b)


def test_a_sure_teacher_loses_no_digits():
    """1 - p_y is far below rounding, and is never formed by a difference."""
    student = torch.tensor([[0.0, 1.0, 2.0, 0.0]])
    teacher = torch.tensor([[60.0, 0.0, 1.0, -1.0]])
    label = torch.tensor([0])
    value = losses.decoupled_kd(student, teacher, label, alpha=0.0)
    others = losses.forward_kl(student[:, 1:], teacher[:, 1:])
    torch.testing.assert_close(value, others)
    assert losses.decoupled_kd(teacher, student, label).isfinite().all()


def test_rows_without_label_do_not_count():
    student, teacher, labels = case()
    labels[2] = -100
    student.requires_grad_()
    value = losses.decoupled_kd(student, teacher, labels)
    assert value[2] == 0
    (gradient,) = torch.autograd.grad(value.sum(), student)
    assert not gradient[2].any()
    assert gradient[[0, 1, 3, 4, 5]].any(-1).all()


def test_padding_and_holes():
    student, teacher, labels = case(v=9)
    wide = torch.cat([student, torch.full((6, 3), 5.0, dtype=torch.float64)], 1)
    plain = losses.decoupled_kd(student, teacher, labels)
    assert torch.equal(losses.decoupled_kd(wide, teacher, labels), plain)
    hole = torch.full((6, 1), -INF, dtype=torch.float64)
    masked = losses.decoupled_kd(
        torch.cat([student, hole], 1), torch.cat([teacher, hole], 1), labels
    )
    torch.testing.assert_close(masked, plain)


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        ([0.0, -INF, -INF], [0.0, 0.0, 1.0], INF),  # it knows the label alone
        ([0.0, 0.0, 1.0], [0.0, -INF, -INF], math.log(2 + math.e)),  # and here the teacher does
        ([0.0, -INF, -INF], [3.0, -INF, -INF], 0.0),
        ([-INF, 0.0, 1.0], [-INF, 1.0, 0.0], math.tanh(0.5)),  # the label is ruled out by both
        ([-INF, 0.0, 1.0], [0.0, 0.0, 0.0], INF),
    ],
)
def test_certain_models(student, teacher, expected):
    s, z = torch.tensor([student], requires_grad=True), torch.tensor([teacher])
    value = losses.decoupled_kd(s, z, torch.tensor([0]))
    assert value.item() == pytest.approx(expected, abs=1e-6)
    assert torch.autograd.grad(value.sum(), s)[0].isfinite().all()


def test_the_others_alone_of_a_student_that_knows_the_label_alone():
    student = torch.tensor([[0.0, -INF, -INF]], requires_grad=True)
    value = losses.decoupled_kd(student, torch.zeros(1, 3), torch.tensor([0]), alpha=0.0)
    assert value.item() == INF
    assert not torch.autograd.grad(value.sum(), student)[0].any()


def test_no_rows_and_no_weights():
    none = losses.decoupled_kd(
        torch.zeros(0, 4), torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)
    )
    assert none.shape == (0,)
    student, teacher, labels = case()
    value = losses.decoupled_kd(student.requires_grad_(), teacher, labels, alpha=0.0, beta=0.0)
    value.sum().backward()
    assert not student.grad.any()


def test_bad_input():
    student, teacher, labels = case()
    with pytest.raises(ValueError, match=r"labels must be \[6\]; they are \[5\]"):
        losses.decoupled_kd(student, teacher, labels[:5])
    for own in ({"alpha": -1.0}, {"beta": math.nan}):
        with pytest.raises(ValueError, match="must not be negative"):
            losses.decoupled_kd(student, teacher, labels, **own)
    with pytest.raises(ValueError, match="temperature"):
        losses.decoupled_kd(student, teacher, labels, temperature=0.0)
