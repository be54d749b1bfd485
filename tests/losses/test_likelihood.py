"""Approximate Likelihood Matching, against mpmath, its limits and its closed forms."""

import math

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.losses.likelihood import likelihood_matching

LOGP = st.floats(1e-9, 1000).map(lambda x: -x)


def value(student, teacher, temperature=100.0, dtype=torch.float64):
    """The loss of one stretch, and its gradient to the student."""
    q = torch.tensor([student], dtype=dtype, requires_grad=True)
    loss = likelihood_matching(q, torch.tensor([teacher], dtype=dtype), temperature=temperature)
    loss.sum().backward()
    return loss.item(), q.grad.item()


def exact(student, teacher, temperature):
    """(value, gradient) of the formula with 60 digits."""
    with mpmath.workdps(60):
        p, q = (mpmath.exp(mpmath.mpf(x) / temperature) for x in (teacher, student))
        loss = temperature * (p * mpmath.log(p / q) + (1 - p) * mpmath.log((1 - p) / (1 - q)))
        return float(loss), float((q - p) / (1 - q))


def test_worked_numbers():
    teacher, student = math.log(0.54), math.log(0.3)
    assert value(student, teacher, 1.0)[0] == pytest.approx(0.12427, abs=5e-6)
    limit = (teacher - student) + teacher * math.log(student / teacher)
    assert limit == pytest.approx(0.17504, abs=5e-6)
    assert value(student, teacher, 1e6)[0] == pytest.approx(limit, abs=1e-6)
    plain = 0.54 * math.log(0.54 / 0.3) + 0.46 * math.log(0.46 / 0.7)
    assert value(student, teacher, 1.0)[0] == pytest.approx(plain, abs=1e-12)


@settings(max_examples=200)
@given(student=LOGP, teacher=LOGP, temperature=st.sampled_from([1.0, 3.0, 100.0, 1e4]))
def test_against_sixty_digits(student, teacher, temperature):
    got, slope = value(student, teacher, temperature)
    want, want_slope = exact(student, teacher, temperature)
    assert got == pytest.approx(want, rel=2e-5, abs=1e-12)
    assert slope == pytest.approx(want_slope, rel=2e-5, abs=1e-12)


@settings(max_examples=100)
@given(
    student=LOGP,
    factor=st.floats(0.5, 2.0),
    temperature=st.sampled_from([1.0, 100.0]),
)
def test_near_equality_nothing_cancels(student, factor, temperature):
    """In float32 a value of 1e-6 of its parts is right, and never below 0."""
    teacher = student * factor
    student, teacher = (torch.tensor(x).item() for x in (student, teacher))  # as float32 holds them
    got, slope = value(student, teacher, temperature, torch.float32)
    assert got >= 0
    assert math.isfinite(slope)
    if student < -1e-3 and teacher < -1e-3:
        want, want_slope = exact(student, teacher, temperature)
        assert got == pytest.approx(want, rel=2e-3, abs=1e-9)
        assert slope == pytest.approx(want_slope, rel=2e-3, abs=1e-5)


@settings(max_examples=100)
@given(both=st.floats(0, 1000).map(lambda x: -x), temperature=st.sampled_from([1.0, 100.0]))
def test_equal_probabilities_give_zero_and_no_gradient(both, temperature):
    for dtype in (torch.float32, torch.float64):
        assert value(both, both, temperature, dtype) == (0.0, 0.0)


@settings(max_examples=100)
@given(
    student=st.one_of(st.just(0.0), LOGP),
    teacher=st.one_of(st.just(0.0), LOGP),
    temperature=st.sampled_from([1.0, 100.0, 1e4]),
)
def test_finite_and_not_negative_at_certainty_too(student, teacher, temperature):
    got, slope = value(student, teacher, temperature, torch.float32)
    assert got >= 0
    assert math.isfinite(got)
    assert math.isfinite(slope)
    if abs(student - teacher) > 1e-3 and temperature > 1:  # at 1 both may be 0 in float32
        assert got > 0
        assert (slope > 0) == (student > teacher) or slope == 0


def test_a_certain_and_wrong_student_still_learns():
    got, slope = value(0.0, -1.0, dtype=torch.float32)
    assert got > 1
    assert slope > 1


@pytest.mark.parametrize("above", [1e-7, 1.9e-6, 1e-3])
def test_what_rounding_put_above_certainty_is_certain_and_still_learns(above):
    for teacher in (0.0, -0.01, -1.0):
        assert value(above, teacher, dtype=torch.float32) == value(
            0.0, teacher, dtype=torch.float32
        )
        assert value(teacher, above, dtype=torch.float32) == value(
            teacher, 0.0, dtype=torch.float32
        )


def test_the_impossible_is_finite():
    assert value(-math.inf, -1.0)[1] == 0.0
    assert math.isfinite(value(-math.inf, -1.0)[0])
    assert value(-math.inf, -math.inf) == (0.0, 0.0)
    got, slope = value(-1.0, -math.inf)
    assert math.isfinite(got)
    assert math.isfinite(slope)
    assert got > 0


def test_gradcheck():
    random = torch.Generator().manual_seed(0)
    student, teacher = -5 * torch.rand(2, 20, generator=random, dtype=torch.float64) - 0.01
    for temperature in (1.0, 100.0):
        inputs = (student.clone().requires_grad_(), teacher.clone().requires_grad_())
        assert torch.autograd.gradcheck(
            lambda s, t, tau=temperature: likelihood_matching(s, t, temperature=tau), inputs
        )


def test_low_precision_and_no_stretches():
    low = torch.tensor([-1.0, -2.0], dtype=torch.bfloat16)
    loss = likelihood_matching(low, low.flip(0))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, likelihood_matching(low.float(), low.float().flip(0)))
    assert likelihood_matching(torch.zeros(0), torch.zeros(0)).shape == (0,)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_wrong_temperature(temperature):
    with pytest.raises(ValueError, match="temperature must be positive and finite"):
        likelihood_matching(torch.zeros(2), torch.zeros(2), temperature=temperature)


def test_wrong_shapes():
    with pytest.raises(ValueError, match=r"\[3\] \(student\) and \[2\] \(teacher\)"):
        likelihood_matching(torch.zeros(3), torch.zeros(2))
