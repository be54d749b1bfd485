"""The alpha-beta divergence against its paper in float64, at its limits, and its kernel."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck import losses
from limbeck.losses import kernels
from limbeck.losses.kernels import Softened

INF = torch.inf
CORNERS = [(1, 0), (0, 1), (0, 0), (0.7, -0.7), (-1, 1), (2, 0), (0, 0.5)]
INSIDE = [
    (0.01, 0.02),
    (0.2, 0.7),
    (0.5, 0.5),
    (1, 1),
    (1.5, -0.5),
    (-0.5, 1.2),
    (-0.3, -0.4),
    (0.3, -0.9),
]
POWER = st.floats(-1.5, 1.5)
ROW = st.lists(st.floats(-6, 6, width=32), min_size=5, max_size=5)


def pair(n=6, v=9, seed=0, spread=1.5, dtype=torch.float64):
    random = torch.Generator().manual_seed(seed)
    drawn = spread * torch.randn(2, n, v, generator=random, dtype=torch.float64)
    return drawn.to(dtype)


def reference(student, teacher, a, b):
    """Cichocki, Cruces and Amari (2011), eq. 6 and 9 to 12, term by term."""
    logp, logq = teacher.double().log_softmax(-1), student.double().log_softmax(-1)
    p, q = logp.exp(), logq.exp()
    if a and b and a + b:
        each = p**a * q**b - a / (a + b) * p ** (a + b) - b / (a + b) * q ** (a + b)
        each = -each / (a * b)
    elif a and not b:
        each = (p**a * (a * logp - a * logq) - p**a + q**a) / a**2
    elif b and not a:
        each = (q**b * (b * logq - b * logp) - q**b + p**b) / b**2
    elif a:
        each = ((q / p) ** a).log() + (p / q) ** a - 1
        each = each / a**2
    else:
        each = 0.5 * (logp - logq) ** 2
    return each.sum(-1)


def slopes(value, *leaves):
    return torch.autograd.grad(value.sum(), leaves)


@pytest.mark.parametrize(("a", "b"), CORNERS + INSIDE)
def test_the_papers_formula(a, b):
    student, teacher = pair()
    value = losses.alpha_beta(student, teacher, alpha=a, beta=b)
    torch.testing.assert_close(value, reference(student, teacher, a, b), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("a", "b"), CORNERS + INSIDE)
def test_gradients_into_both(a, b):
    student, teacher = pair(n=3, v=4)

    def value(s, t):
        return losses.alpha_beta(s, t, alpha=a, beta=b, temperature=1.5)

    leaves = student.requires_grad_(), teacher.requires_grad_()
    assert torch.autograd.gradcheck(value, leaves)


@pytest.mark.parametrize(("a", "b"), CORNERS + INSIDE)
def test_the_gradient_that_the_docstring_states(a, b):
    student, teacher = pair()
    student.requires_grad_()
    (found,) = slopes(losses.alpha_beta(student, teacher, alpha=a, beta=b), student)
    p, q = teacher.softmax(-1), student.detach().softmax(-1)
    g = q**b * (q**a - p**a) / a if a else q**b * (q.log() - p.log())
    torch.testing.assert_close(found, g - q * g.sum(-1, keepdim=True))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_its_ends_are_the_kl_divergences(temperature):
    student, teacher = pair()
    student.requires_grad_()
    for a, loss in ((1.0, losses.forward_kl), (0.0, losses.reverse_kl)):
        value = losses.alpha_beta(student, teacher, alpha=a, beta=1 - a, temperature=temperature)
        expected = loss(student, teacher, temperature=temperature)
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(*(slopes(x, student) for x in (value, expected)))


def test_other_known_members():
    student, teacher = pair()
    p, q = teacher.softmax(-1), student.softmax(-1)
    half = losses.alpha_beta(student, teacher, alpha=0.5, beta=0.5)
    hellinger = 0.5 * (p.sqrt() - q.sqrt()).square().sum(-1)
    torch.testing.assert_close(half, 4 * hellinger)
    whole = losses.alpha_beta(student, teacher, alpha=1, beta=1)
    torch.testing.assert_close(whole, 0.5 * (p - q).square().sum(-1))
    swapped = losses.alpha_beta(teacher, student, alpha=0.7, beta=0.2)
    torch.testing.assert_close(losses.alpha_beta(student, teacher), swapped)


@pytest.mark.parametrize(("a", "b"), CORNERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_no_jump_and_no_lost_digits_on_the_way_to_a_limit(a, b, dtype):
    """Naively, one over a power near 0 multiplies the rounding."""
    student, teacher = pair(dtype=dtype)
    limit = losses.alpha_beta(student.double(), teacher.double(), alpha=a, beta=b)
    rounding = 1e-5 if dtype == torch.float32 else 1e-11
    for step in (1e-2, 1e-4, 1e-6, 1e-8, 1e-12):
        for da, db in ((step, 0), (0, step), (-step, 0), (step, -step), (step, step)):
            for loss in (losses.alpha_beta, by_kernel):
                value = loss(student, teacher, alpha=a + da, beta=b + db).double()
                # Near (0, 0) a step below the root of rounding counts as none.
                near_zero = 0 if a or b else 8 * torch.finfo(dtype).eps ** 0.5
                slack = rounding + 60 * step + near_zero
                torch.testing.assert_close(value, limit, rtol=slack, atol=0)


def by_kernel(student, teacher, *, alpha, beta):
    made = Softened(student), Softened(teacher)
    return kernels.alpha_beta(*made, alpha=alpha, beta=beta)[0]


@pytest.mark.parametrize(("a", "b"), CORNERS + INSIDE)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_kernel(a, b, dtype):
    student, teacher = pair(n=20, v=60, spread=3.0, dtype=dtype)
    teacher[3] = student[3]  # equality is a corner of its own
    value, gradient = kernels.alpha_beta(Softened(student), Softened(teacher), alpha=a, beta=b)
    exact = student.double().requires_grad_()
    expected = losses.alpha_beta(exact, teacher.double(), alpha=a, beta=b)
    largest = max(1.0, float(expected.detach().abs().max()))
    tight = {"rtol": 1e-9, "atol": 1e-13 * largest}
    if dtype == torch.float32:
        tight = {"rtol": 2e-4, "atol": 3e-6 * largest}
    torch.testing.assert_close(value.double(), expected.detach(), **tight)
    torch.testing.assert_close(gradient.double(), slopes(expected, exact)[0], **tight)


@settings(max_examples=150)
@given(student=ROW, teacher=ROW, a=POWER, b=POWER)
def test_never_negative_and_zero_at_equality(student, teacher, a, b):
    s, t = torch.tensor([student]).double(), torch.tensor([teacher]).double()
    value = losses.alpha_beta(s, t, alpha=a, beta=b)
    assert value.item() >= 0
    assert value.isfinite().all()
    s.requires_grad_()
    value = losses.alpha_beta(s, s.detach(), alpha=a, beta=b)
    assert value.item() == 0
    largest = s.softmax(-1).min().item() ** min(0, a + b)  # the largest power in the sum
    widest = max(0, b, a + b) - min(0, b, a + b)  # by which the last difference is divided
    rounding = 1e-12 + 1e-15 / max(widest, 1e-8)
    assert slopes(value, s)[0].abs().max() <= rounding * max(1, largest)


@pytest.mark.parametrize(
    ("a", "b", "student_hole", "teacher_hole"),
    [
        (0.3, 0.9, 0.2**1.2 / (0.9 * 1.2), 0.3**1.2 / (0.3 * 1.2)),
        (1, 0, INF, 0.3),
        (0, 1, 0.2, INF),
        (1.5, -0.5, INF, 0.3 / 1.5),
        (-0.5, 1.5, 0.2 / 1.5, INF),
        (0, 0, INF, INF),
        (0.5, -0.5, INF, INF),
        (-0.3, -0.4, INF, INF),
        (0.5, -0.9, INF, INF),
    ],
)
def test_holes_have_the_values_of_the_limit(a, b, student_hole, teacher_hole):
    """A token with probability 0.2 in the teacher and none in the student, and the other way."""
    full = torch.tensor([[0.5, 0.3, 0.2]]).double().log()
    other = torch.tensor([[0.7, 0.3, 0.0]]).double().log()
    full_other = torch.tensor([[0.3, 0.4, 0.3]]).double().log()
    for student, teacher, hole in ((other, full, student_hole), (full_other, other, teacher_hole)):
        s, t = student.clone().requires_grad_(), teacher.clone().requires_grad_()
        value = losses.alpha_beta(s, t, alpha=a, beta=b)
        gradients = slopes(value, s, t)
        assert all(g.isfinite().all() for g in gradients)
        if hole == INF:
            assert value.item() == INF
            assert not any(g.any() for g in gradients)
            continue
        near = 1e-12
        nearly = [x.exp().clamp(min=near).log() for x in (student, teacher)]
        torch.testing.assert_close(
            value, losses.alpha_beta(*nearly, alpha=a, beta=b), rtol=3e-2, atol=0
        )
        kept = [x[:, :2].exp() for x in (teacher, student)]
        p, q = kept
        if a and b:
            each = p**a * q**b - a / (a + b) * p ** (a + b) - b / (a + b) * q ** (a + b)
            rest = (-each / (a * b)).sum()
        elif a:
            rest = (p * (p / q).log() - p + q).sum()
        else:
            rest = (q * (q / p).log() - q + p).sum()
        assert value.item() == pytest.approx(rest.item() + hole)


def test_more_than_a_float_can_hold_is_infinite_without_gradient():
    student = torch.tensor([[0.0, -200.0, 1.0], [0.0, -1.0, 1.0]], requires_grad=True)
    teacher = torch.tensor([[0.0, 0.0, 1.0], [0.5, -2.0, 1.0]])
    value = losses.alpha_beta(student, teacher, alpha=0.5, beta=-1.2)
    (gradient,) = slopes(value, student)
    assert value.isinf().tolist() == [True, False]
    assert gradient.isfinite().all()
    assert not gradient[0].any()
    assert gradient[1].any()


@pytest.mark.parametrize("bad", [INF, math.nan])
@pytest.mark.parametrize("name", ["alpha", "beta"])
def test_powers_must_be_finite(name, bad):
    with pytest.raises(ValueError, match="alpha and beta must be finite"):
        losses.alpha_beta(*pair(), **{name: bad})
