"""The pairwise hinge on logits: which pairs there are, and what it asks for."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck import losses
from limbeck.losses import kernels
from limbeck.losses.kernels import Softened

INF = torch.inf
EIGHTH = st.integers(-72, 72).map(lambda eighths: eighths / 8)
"""Sums of these are exact, so that a shift neither makes a tie nor breaks one."""
ROW = st.lists(EIGHTH, min_size=6, max_size=6)


def pair(n=6, v=9, seed=0):
    random = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(2, n, v, generator=random, dtype=torch.float64)


def reference(student, teacher, k, margin):
    """Pair by pair, in Python."""
    values = []
    for s, z in zip(student.tolist(), teacher.tolist(), strict=True):
        top = sorted(range(len(z)), key=lambda i: -z[i])[:k]
        hinges = [
            max(0.0, margin * (z[i] - z[j]) - (s[i] - s[j])) if z[i] > z[j] else None
            for i, j in itertools.combinations(top, 2)
        ]
        hinges = [hinge for hinge in hinges if hinge is not None]
        values.append(sum(hinges) / max(1, len(hinges)))
    return torch.tensor(values, dtype=student.dtype)


@pytest.mark.parametrize("k", [2, 5, 9, 50])
@pytest.mark.parametrize("margin", [0.0, 0.4, 1.0])
def test_pair_by_pair(k, margin):
    student, teacher = pair()
    value = losses.ranking(student, teacher, k=k, margin=margin)
    torch.testing.assert_close(value, reference(student, teacher, k, margin))


def test_gradcheck():
    student, teacher = pair(n=4, v=5)
    leaves = student.requires_grad_(), teacher.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda s, z: losses.ranking(s, z, k=4, margin=0.6, temperature=2.0), leaves
    )


def test_a_student_that_is_surer_pays_nothing_and_one_that_is_less_sure_does():
    _, teacher = pair()
    assert not losses.ranking(1.7 * teacher, teacher).any()
    assert (losses.ranking(0.9 * teacher, teacher) > 0).all()
    assert not losses.ranking(0.9 * teacher, teacher, margin=0.8).any()
    flat = losses.ranking(torch.zeros_like(teacher), teacher, margin=0.5)
    torch.testing.assert_close(flat, 0.5 * losses.ranking(torch.zeros_like(teacher), teacher))


@settings(max_examples=100)
@given(student=ROW, teacher=ROW, scale=st.floats(0.1, 10), shift=EIGHTH)
def test_it_has_no_scale_of_its_own(student, teacher, scale, shift):
    s, z = torch.tensor([student]).double(), torch.tensor([teacher]).double()
    plain = losses.ranking(s, z, k=4)
    assert plain.item() >= 0
    near = {"rtol": 1e-9, "atol": 1e-12}
    scaled = losses.ranking(scale * s, scale * z, k=4)
    torch.testing.assert_close(scaled, scale * plain, **near)
    own = {"temperature": scale, "scale_by_t2": False}
    torch.testing.assert_close(losses.ranking(scale * s, scale * z, k=4, **own), plain, **near)
    shifted = losses.ranking(s + shift, z - shift, k=4)
    torch.testing.assert_close(shifted, plain, **near)
    assert losses.ranking(z, z, k=4).item() == 0


def test_tokens_beyond_the_k_are_not_looked_at():
    student, teacher = pair()
    student.requires_grad_()
    value = losses.ranking(student, teacher, k=3)
    (gradient,) = torch.autograd.grad(value.sum(), student)
    top = teacher.topk(3).indices
    outside = torch.ones_like(gradient, dtype=torch.bool).scatter(-1, top, False)
    assert not gradient[outside].any()
    assert (gradient != 0).any(-1).all()
    torch.testing.assert_close(gradient.sum(-1), torch.zeros(6, dtype=torch.float64))


def test_equally_likely_tokens_are_in_no_pair():
    teacher = torch.tensor([[2.0, 2.0, 0.0], [1.0, 1.0, 1.0]])
    student = torch.tensor([[5.0, 0.0, 0.0], [7.0, 0.0, -3.0]], requires_grad=True)
    value = losses.ranking(student, teacher)
    assert value.tolist() == [1.0, 0.0]  # (2 - 5)+ = 0 and (2 - 0)+ = 2 in two pairs
    (gradient,) = torch.autograd.grad(value.sum(), student)
    assert not gradient[1].any()


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        ([0.0, 1.0, -INF], [2.0, 0.0, -INF], 3.0),  # out of both: as if it were not there
        ([0.0, 1.0, 9.0], [2.0, 0.0, -INF], 3.0),  # out of the teacher's: it has no rank
        ([0.0, 1.0, -INF], [2.0, 1.0, 0.0], 2 / 3),  # last, and the student rules it out
        ([-INF, 1.0, 0.0], [2.0, 1.0, 0.0], INF),  # first, and the student rules it out
        ([-INF, -INF, 0.0], [2.0, 1.0, 0.0], INF),
        ([0.0, 1.0, 2.0], [2.0, -INF, -INF], 0.0),
    ],
)
def test_holes(student, teacher, expected):
    s = torch.tensor([student], requires_grad=True)
    z = torch.tensor([teacher], requires_grad=True)
    value = losses.ranking(s, z)
    assert value.item() == pytest.approx(expected)
    for gradient in torch.autograd.grad(value.sum(), (s, z)):
        assert gradient.isfinite().all()
        assert expected != INF or not gradient.any()


@pytest.mark.parametrize("k", [2, 4, 30])
@pytest.mark.parametrize("margin", [0.0, 0.5, 1.0])
def test_kernel(k, margin):
    student, teacher = pair()
    teacher[0, :4] = teacher[0, 0]  # ties
    value, gradient = kernels.ranking(Softened(student), Softened(teacher), k=k, margin=margin)
    leaf = student.clone().requires_grad_()
    expected = losses.ranking(leaf, teacher, k=k, margin=margin)
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), leaf)[0])


def test_one_column_has_no_pair_and_one_place_is_refused():
    assert losses.ranking(torch.zeros(2, 1), torch.ones(2, 1)).tolist() == [0.0, 0.0]
    for loss in (losses.ranking, lambda *x, k: kernels.ranking(*map(Softened, x), k=k)):
        with pytest.raises(ValueError, match="k must be at least 2"):
            loss(*pair(), k=1)
