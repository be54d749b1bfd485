"""The sorted L1 distance of Universal Logit Distillation."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.losses import sorted_l1

WEIGHTS = st.lists(st.floats(0.0, 1.0), min_size=1, max_size=5).filter(lambda w: sum(w) > 0.1)


def logits(*row):
    return torch.tensor([row], dtype=torch.float64).log()


@pytest.mark.parametrize(
    ("teacher", "student", "value"),
    [
        ((0.7, 0.2, 0.1), (0.5, 0.3, 0.2), 0.4),
        ((0.6, 0.4), (0.5, 0.3, 0.2), 0.4),
        ((1.0, 0.0, 0.0, 0.0), (0.25, 0.25, 0.25, 0.25), 1.5),
        ((1.0, 0.0, 0.0), (0.0, 0.0, 1.0), 0.0),
        ((1.0,), (0.5, 0.5), 1.0),
    ],
)
def test_closed_forms(teacher, student, value):
    assert sorted_l1(logits(*student), logits(*teacher)).item() == pytest.approx(value, abs=1e-12)
    assert sorted_l1(logits(*teacher), logits(*student)).item() == pytest.approx(value, abs=1e-12)


@settings(max_examples=25)
@given(WEIGHTS, WEIGHTS)
def test_is_the_least_l1_over_all_ways_to_match_the_vocabularies(left, right):
    p, q = [w / sum(left) for w in left], [w / sum(right) for w in right]
    width = max(len(p), len(q))
    p_wide, q_wide = p + [0.0] * (width - len(p)), q + [0.0] * (width - len(q))
    best = min(
        sum(abs(a - b) for a, b in zip(p_wide, order, strict=True))
        for order in itertools.permutations(q_wide)
    )
    got = sorted_l1(logits(*q), logits(*p)).item()
    assert got == pytest.approx(best, abs=1e-12)
    assert got <= 2 * (1 - 1 / width) + 1e-12


@settings(max_examples=50)
@given(WEIGHTS, WEIGHTS)
def test_is_v_times_the_wasserstein_distance_of_the_histograms_of_values(left, right):
    """By the integral over all x of |F_p(x) - F_q(x)|, F the share of tokens up to x."""
    p, q = [w / sum(left) for w in left], [w / sum(right) for w in right]
    width = max(len(p), len(q))
    p_wide, q_wide = p + [0.0] * (width - len(p)), q + [0.0] * (width - len(q))
    places = sorted({*p_wide, *q_wide})
    distance = 0.0
    for x, after in itertools.pairwise(places):
        apart = sum(value <= x for value in p_wide) - sum(value <= x for value in q_wide)
        distance += (after - x) * abs(apart) / width
    got = sorted_l1(logits(*q), logits(*p)).item()
    assert got == pytest.approx(width * distance, abs=1e-12)


def test_what_the_student_has_given_up_gets_no_gradient():
    student = torch.tensor([[0.0, -40.0, -40.0]], dtype=torch.float64, requires_grad=True)
    sorted_l1(student, logits(0.2, 0.5, 0.3)).sum().backward()
    assert student.grad.abs().max() < 1e-16
    assert sorted_l1(student, logits(0.2, 0.5, 0.3)).item() == pytest.approx(1.0)


def test_each_vocabulary_may_be_permuted_alone():
    random = torch.Generator().manual_seed(0)
    student = torch.randn(4, 7, generator=random, dtype=torch.float64)
    teacher = torch.randn(4, 5, generator=random, dtype=torch.float64)
    value = sorted_l1(student, teacher)
    torch.testing.assert_close(sorted_l1(student.flip(-1), teacher), value)
    torch.testing.assert_close(sorted_l1(student, teacher[:, [3, 0, 4, 1, 2]]), value)
    padding = torch.full((4, 3), -torch.inf, dtype=torch.float64)
    torch.testing.assert_close(sorted_l1(student, torch.cat([teacher, padding], 1)), value)


@pytest.mark.parametrize(("v", "w"), [(6, 6), (6, 4), (4, 6)])
def test_gradient(v, w):
    random = torch.Generator().manual_seed(1)
    student = torch.randn(3, v, generator=random, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(3, w, generator=random, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(sorted_l1, (student, teacher))
    sorted_l1(student, teacher).sum().backward()
    q = student.detach().softmax(-1)
    ranked = torch.zeros(3, max(v, w), dtype=torch.float64)
    ranked[:, :w] = teacher.detach().softmax(-1).sort(-1, descending=True).values
    matched = ranked.gather(1, q.argsort(-1, descending=True).argsort(-1))
    sign = (q - matched).sign()
    want = q * (sign - (q * sign).sum(-1, keepdim=True))
    torch.testing.assert_close(student.grad, want)


def test_widths_of_no_rows():
    student = torch.zeros(0, 5, requires_grad=True)
    sorted_l1(student, torch.zeros(0, 3)).sum().backward()
    assert student.grad.shape == (0, 5)
