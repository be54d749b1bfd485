"""Transport between the likeliest tokens: a written-out reference, limits and properties."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.losses import sinkhorn
from limbeck.losses.semantic import Costs, semantic_transport

RANDOM = torch.Generator().manual_seed(0)
WIDTHS = 7, 9
POINTS = [torch.rand(width, 2, generator=RANDOM, dtype=torch.float64) for width in WIDTHS]
SCALE = math.sqrt(2)  # so that no two points are further apart than 1


def pricing(first, second, debiased=True, rest=1.0):
    """Distances in the plane between the tokens of two vocabularies."""

    def picked(a, b, points, others):
        return torch.cdist(points, others)[a[:, :, None], b[:, None, :]] / SCALE

    def costs(teacher, student):
        return Costs(
            between=picked(teacher, student, first, second),
            teacher=picked(teacher, teacher, first, first) if debiased else None,
            student=picked(student, student, second, second) if debiased else None,
            rest=rest,
        )

    return costs


BETWEEN = pricing(*POINTS)


def pair(n=5, seed=1):
    random = torch.Generator().manual_seed(seed)
    teacher, student = (
        1.5 * torch.randn(n, width, generator=random, dtype=torch.float64) for width in WIDTHS
    )
    return student, teacher


def reference(student, teacher, k, epsilon, debiased=True):
    """Row by row: cut, add up the rest, and iterate in the plain domain with half steps."""

    def cut(row):
        p = row.softmax(-1)
        ids = p.argsort(descending=True)[:k].tolist()
        return [p[i].item() for i in ids] + [1 - sum(p[i].item() for i in ids)], ids

    def cost(ids, others, points, other_points):
        table = [
            [math.dist(points[i].tolist(), other_points[j].tolist()) / SCALE for j in others] + [1]
            for i in ids
        ]
        return torch.tensor([*table, [1.0] * len(others) + [0.0]], dtype=torch.float64)

    def transport(p, q, c):
        kernel, p, q = (-c / epsilon).exp(), torch.tensor(p).double(), torch.tensor(q).double()
        a, b = torch.ones_like(p), torch.ones_like(q)
        for _ in range(4000):
            a, b = (a / (kernel @ (q * b))).sqrt(), (b / (kernel.T @ (p * a))).sqrt()
        moved = (p * a)[:, None] * kernel * (b * q)
        return (moved * c + epsilon * moved * (moved / (p[:, None] * q)).log()).sum().item()

    values = []
    for mine, theirs in zip(student, teacher, strict=True):
        (q, b), (p, a) = cut(mine), cut(theirs)
        value = transport(p, q, cost(a, b, *POINTS))
        if debiased:
            value -= transport(p, p, cost(a, a, POINTS[0], POINTS[0])) / 2
            value -= transport(q, q, cost(b, b, POINTS[1], POINTS[1])) / 2
        values.append(value)
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(("k", "epsilon"), [(1, 0.1), (4, 0.1), (6, 0.5)])
def test_reference(k, epsilon):
    student, teacher = pair(n=3)
    for debiased in (True, False):
        got = semantic_transport(
            student,
            teacher,
            pricing(*POINTS, debiased=debiased),
            k=k,
            epsilon=epsilon,
            iterations=20_000,
        )
        want = reference(student, teacher, k, epsilon, debiased)
        torch.testing.assert_close(got, want, atol=1e-7, rtol=0)


def test_gradient():
    student, teacher = pair(n=2)

    def loss(student, teacher):
        return semantic_transport(
            student, teacher, BETWEEN, k=3, iterations=20_000, temperature=1.5
        )

    assert torch.autograd.gradcheck(loss, (student.requires_grad_(), teacher.requires_grad_()))


def test_all_tokens_and_one_space_are_sinkhorn():
    student, _ = pair()
    teacher = student.flip(0)
    same = pricing(POINTS[1], POINTS[1])
    cost = torch.cdist(POINTS[1], POINTS[1]) / SCALE
    got = semantic_transport(student, teacher, same, k=9, temperature=2.0)
    torch.testing.assert_close(got, sinkhorn(student, teacher, cost, temperature=2.0))


def test_temperature():
    student, teacher = pair()
    want = semantic_transport(student / 2.5, teacher / 2.5, BETWEEN, k=4)
    plain = semantic_transport(student, teacher, BETWEEN, k=4, temperature=2.5, scale_by_t2=False)
    torch.testing.assert_close(plain, want)
    scaled = semantic_transport(student, teacher, BETWEEN, k=4, temperature=2.5)
    torch.testing.assert_close(scaled, want * 6.25)


def test_a_synonym_is_cheap_and_a_stranger_is_not():
    points = torch.tensor([[0.0, 0.0], [0.1, 0.0], [1.0, 0.0]], dtype=torch.float64) * SCALE
    same = pricing(points, points)
    e = torch.eye(3).double().log()
    value = semantic_transport(e[[1, 2]], e[[0, 0]], same, k=1)
    torch.testing.assert_close(value, torch.tensor([0.1, 1.0]).double())


def test_what_is_in_both_rests_costs_nothing():
    """Only how much is outside counts, not on what."""
    _, teacher = pair()
    tail = teacher.argsort(descending=True)[:, 3:]
    student = teacher.scatter(1, tail, teacher.gather(1, tail.flip(1)))
    same = pricing(POINTS[0], POINTS[0])
    value = semantic_transport(student, teacher, same, k=3)
    torch.testing.assert_close(value, torch.zeros(5).double(), atol=1e-12, rtol=0)
    assert (semantic_transport(student, teacher, same, k=7) > 1e-4).all()


@settings(max_examples=60)
@given(
    rows=st.lists(st.floats(-20, 20, width=32), min_size=16, max_size=16),
    k=st.integers(1, 7),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_never_negative_for_distances_in_the_plane(rows, k, dtype):
    teacher = torch.tensor([rows[:7]], dtype=dtype)
    student = torch.tensor([rows[7:]], dtype=dtype, requires_grad=True)
    value = semantic_transport(student, teacher, BETWEEN, k=k)
    value.sum().backward()
    assert -1e-5 <= value.item() <= 1 + 1e-5
    assert student.grad.isfinite().all()
    assert student.grad.sum().abs() < 1e-4


@settings(max_examples=40)
@given(row=st.lists(st.floats(-20, 20, width=32), min_size=7, max_size=7), k=st.integers(1, 7))
def test_equal_models_have_no_loss_and_no_gradient(row, k):
    student = torch.tensor([row], requires_grad=True)
    teacher = student.detach().clone()
    value = semantic_transport(student, teacher, pricing(POINTS[0], POINTS[0]), k=k)
    value.sum().backward()
    assert value.item() == 0
    assert not student.grad.any()


def test_the_gradient_moves_probability_towards_what_is_alike():
    points = torch.tensor([[0.0, 0.0], [0.2, 0.0], [0.9, 0.0]], dtype=torch.float64)
    student = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[9.0, 0.0, 0.0]], dtype=torch.float64)
    semantic_transport(student, teacher, pricing(points, points), k=3).sum().backward()
    towards = -student.grad[0]
    assert towards[0] > towards[1] > towards[2]
    assert towards[2] < 0


def test_rows_do_not_see_each_other():
    student, teacher = pair()
    whole = semantic_transport(student, teacher, BETWEEN, k=4)
    order = torch.tensor([3, 0, 4, 2, 1])
    got = semantic_transport(student[order], teacher[order], BETWEEN, k=4)
    torch.testing.assert_close(got, whole[order])
    student[2] = torch.nan
    broken = semantic_transport(student, teacher, BETWEEN, k=4)
    assert broken.isnan().tolist() == [False, False, True, False, False]
    torch.testing.assert_close(broken[[0, 1, 3, 4]], whole[[0, 1, 3, 4]])


def test_holes_and_certainty_stay_finite():
    student, teacher = pair()
    student[0, 3:] = teacher[1, :] = teacher[2, 1:] = -torch.inf
    teacher[1, 2] = 6e4
    student.requires_grad_()
    value = semantic_transport(student, teacher, BETWEEN, k=4)
    value.sum().backward()
    assert value.isfinite().all()
    assert student.grad.isfinite().all()


def test_no_rows():
    student = torch.zeros(0, 9, requires_grad=True)
    value = semantic_transport(student, torch.zeros(0, 7), BETWEEN, k=3)
    assert value.shape == (0,)
    value.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    student, teacher = (side.to(dtype) for side in pair())
    value = semantic_transport(student, teacher, BETWEEN, k=4)
    assert value.dtype == torch.float32
    want = semantic_transport(student.double(), teacher.double(), BETWEEN, k=4)
    torch.testing.assert_close(value.double(), want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("kw", "message"),
    [
        ({"k": 0}, "k must be between 1 and 7"),
        ({"k": 8}, "k must be between 1 and 7"),
        ({"epsilon": 0.0}, "epsilon must be positive"),
        ({"epsilon": math.inf}, "epsilon must be positive"),
        ({"iterations": 0}, "iterations must be at least 1"),
        ({"temperature": -1.0}, "temperature must be positive"),
    ],
)
def test_wrong_numbers_are_refused(kw, message):
    with pytest.raises(ValueError, match=message):
        semantic_transport(*pair(), BETWEEN, **{"k": 3} | kw)
