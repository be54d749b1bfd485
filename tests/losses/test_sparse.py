"""What a few tokens of the teacher say: unbiased for draws, a coarser KL for top-k."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck import losses
from limbeck.losses.sparse import Sparse

INF = torch.inf
DOUBLE = torch.float64


def pair(n=5, v=9, seed=0, spread=2.0):
    """(student, teacher) logits in float64."""
    random = torch.Generator().manual_seed(seed)
    return spread * torch.randn(2, n, v, generator=random, dtype=DOUBLE)


def topk(teacher, k, temperature=1.0):
    """What a perfect cache would keep of the k likeliest tokens."""
    p = (teacher / temperature).softmax(-1)
    mass, ids = p.topk(k, dim=-1)
    rest = (1 - mass.sum(-1)).clamp(min=0) if k < p.shape[-1] else torch.zeros_like(mass[:, 0])
    negentropy = torch.xlogy(mass, mass).sum(-1) + torch.xlogy(rest, rest)
    return Sparse(ids=ids, mass=mass, rest=rest, negentropy=negentropy, temperature=temperature)


def drawn(sequence, p, temperature=1.0):
    """A row of random draws: the share of each token, and the mean of log p."""
    ids = sorted(set(sequence))
    k = len(sequence)
    mass = [sequence.count(i) / k for i in ids] + [0.0] * (k - len(ids))
    negentropy = math.fsum(math.log(p[i]) for i in sequence) / k
    return Sparse(
        ids=torch.tensor([ids + [0] * (k - len(ids))]),
        mass=torch.tensor([mass], dtype=DOUBLE),
        rest=torch.zeros(1, dtype=DOUBLE),
        negentropy=torch.tensor([negentropy], dtype=DOUBLE),
        temperature=temperature,
    )


def coarse_kl(student, teacher, k, temperature=1.0):
    """KL over the partition {1}, ..., {k}, {others}, from its definition in Python floats."""
    values = []
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        q, p = ([math.exp(x / temperature) for x in row] for row in (s, t))
        q, p = ([x / math.fsum(row) for x in row] for row in (q, p))
        top = sorted(range(len(p)), key=lambda i: -p[i])[:k]
        others = [i for i in range(len(p)) if i not in top]
        cells = [(p[i], q[i]) for i in top]
        cells += [(math.fsum(p[i] for i in others), math.fsum(q[i] for i in others))]
        values.append(math.fsum(a * math.log(a / b) for a, b in cells if a > 0))
    return torch.tensor(values, dtype=DOUBLE)


def with_gradient(student, sparse, **kw):
    student = student.clone().requires_grad_()
    value = losses.sparse_kl(student, sparse, **kw)
    value.sum().backward()
    return value.detach(), student.grad


# --- random draws -----------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("draws", [1, 2, 3])
def test_draws_are_unbiased_in_target_value_and_gradient(draws, temperature):
    """Every sequence of draws with its probability: expectations are sums, and exact."""
    student, teacher = pair(n=1, v=4, seed=3, spread=1.5)
    p = (teacher / temperature).softmax(-1)[0]
    q = (student / temperature).softmax(-1)[0]
    target, gradient = torch.zeros(4, dtype=DOUBLE), torch.zeros(1, 4, dtype=DOUBLE)
    value, certain = 0.0, 0.0
    for sequence in itertools.product(range(4), repeat=draws):
        chance = math.prod(p[i].item() for i in sequence)
        row = drawn(sequence, p.tolist(), temperature)
        one, slope = with_gradient(student, row, temperature=temperature)
        certain += chance
        value += chance * one.item()
        gradient += chance * slope
        target.index_add_(0, row.ids[0], chance * row.mass[0])
    assert certain == pytest.approx(1, abs=1e-12)
    torch.testing.assert_close(target, p, rtol=0, atol=1e-12)
    kl = losses.forward_kl(student, teacher, temperature=temperature)
    assert value == pytest.approx(kl.item(), abs=1e-12)
    torch.testing.assert_close(gradient[0], temperature * (q - p), rtol=0, atol=1e-12)


def test_a_top_k_without_tail_is_biased_where_draws_are_not():
    student, teacher = pair(n=1, v=6, seed=1)
    p, q = teacher.softmax(-1), student.softmax(-1)
    _, cut = with_gradient(student, topk(teacher, 3), tail=False)
    assert (cut - (q - p)).abs().max() > 0.05
    assert (cut - (q - p))[p < p.topk(3).values.min()].min() > 0  # what was cut is pushed down


@pytest.mark.parametrize("tail", [True, False])
def test_the_tail_makes_no_difference_to_the_gradient_of_draws(tail):
    student, teacher = pair(n=1, v=5)
    row = drawn((0, 3, 3), teacher.softmax(-1)[0].tolist())
    _, slope = with_gradient(student, row, tail=tail)
    share = torch.zeros(1, 5, dtype=DOUBLE)
    share[0, 0], share[0, 3] = 1 / 3, 2 / 3
    torch.testing.assert_close(slope, student.softmax(-1) - share)


# --- top-k ------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(
    st.integers(0, 10**6),
    st.integers(1, 12),
    st.integers(2, 12),
    st.sampled_from([0.5, 1.0, 3.0]),
    st.floats(0.1, 6),
)
def test_top_k_is_the_kl_of_the_coarser_partition(seed, k, v, temperature, spread):
    k = min(k, v)
    student, teacher = pair(n=3, v=v, seed=seed, spread=spread)
    sparse = topk(teacher, k, temperature)
    settings = {"temperature": temperature, "scale_by_t2": False}
    value = losses.sparse_kl(student, sparse, **settings)
    expected = coarse_kl(student, teacher, k, temperature)
    torch.testing.assert_close(value, expected, rtol=1e-8, atol=1e-9)
    full = losses.forward_kl(student, teacher, **settings)
    assert (value <= full + 1e-9).all()
    assert (value >= -1e-9).all()
    if k == v:
        torch.testing.assert_close(value, full, rtol=1e-8, atol=1e-9)
    same, slope = with_gradient(teacher, sparse, **settings)
    assert same.abs().max() < 1e-9
    assert slope.abs().max() < 1e-9


def test_without_tail_it_is_the_kl_from_the_renormalised_top():
    student, teacher = pair()
    value = losses.sparse_kl(student, topk(teacher, 4), tail=False)
    p, ids = teacher.softmax(-1).topk(4)
    m = p / p.sum(-1, keepdim=True)
    expected = (m * (m.log() - student.log_softmax(-1).gather(-1, ids))).sum(-1)
    torch.testing.assert_close(value, expected)
    assert (losses.sparse_kl(teacher, topk(teacher, 4), tail=False) > 1e-3).all()  # q = p is not 0


def test_a_tiny_rest_is_summed_and_not_subtracted():
    """1 - sum of float32 probabilities would be 0 or noise here."""
    student = torch.tensor([[20.0, 0.0, -1.0, -2.0]])
    sparse = Sparse(
        ids=torch.tensor([[0]]),
        mass=torch.tensor([[0.9]]),
        rest=torch.tensor([0.1]),
        negentropy=torch.tensor([0.9 * math.log(0.9) + 0.1 * math.log(0.1)]),
    )
    exact = student.double().log_softmax(-1)[0]
    expected = sparse.negentropy[0].double() - 0.9 * exact[0] - 0.1 * exact[1:].logsumexp(0)
    torch.testing.assert_close(
        losses.sparse_kl(student, sparse)[0].double(), expected, rtol=1e-6, atol=0
    )


# --- gradients, shapes and types --------------------------------------------------------------


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("k", [1, 4, 9])
def test_gradients(k, tail):
    student, teacher = pair()
    sparse = topk(teacher, k, 1.5)

    def loss(logits):
        return losses.sparse_kl(logits, sparse, temperature=1.5, tail=tail)

    assert torch.autograd.gradcheck(loss, student.requires_grad_())


def test_temperature_scales_by_its_square():
    student, teacher = pair()
    sparse = topk(teacher, 3, 2.0)
    scaled = losses.sparse_kl(student, sparse, temperature=2.0)
    plain = losses.sparse_kl(student, sparse, temperature=2.0, scale_by_t2=False)
    torch.testing.assert_close(scaled, 4 * plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, DOUBLE])
def test_at_least_float32(dtype):
    student, teacher = pair()
    low = student.to(dtype)
    value, slope = with_gradient(low, topk(teacher, 4))
    assert value.dtype == torch.promote_types(dtype, torch.float32)
    assert slope.dtype == dtype
    exact = losses.sparse_kl(low.double(), topk(teacher, 4))
    torch.testing.assert_close(value.double(), exact, rtol=3e-6, atol=3e-6)


def test_no_rows():
    student = torch.zeros(0, 4)
    value, slope = with_gradient(student, topk(student.double(), 2))
    assert value.shape == (0,)
    assert slope.shape == (0, 4)


# --- infinities and rows that say nothing -----------------------------------------------------


def test_columns_that_are_ruled_out():
    student, teacher = pair(n=4, v=6)
    teacher[:, 5] = student[:, 5] = -INF  # as if it were not there
    value, slope = with_gradient(student, topk(teacher, 3))
    torch.testing.assert_close(value, coarse_kl(student[:, :5], teacher[:, :5], 3))
    assert slope.isfinite().all()
    assert (slope[:, 5] == 0).all()


@pytest.mark.parametrize("tail", [True, False])
def test_a_student_that_rules_out_a_kept_token(tail):
    student, teacher = pair(n=3, v=6)
    sparse = topk(teacher, 3)
    student[1, sparse.ids[1, 0]] = -INF
    value, slope = with_gradient(student, sparse, tail=tail)
    assert value.isinf().tolist() == [False, True, False]
    assert slope.isfinite().all()
    assert (slope[1] == 0).all()
    assert (slope[0] != 0).any()


def test_a_student_that_rules_out_all_others():
    student, teacher = pair(n=2, v=6)
    sparse = topk(teacher, 3)
    kept = torch.zeros(6, dtype=torch.bool)
    kept[sparse.ids[0]] = True
    student[0, ~kept] = -INF
    value, slope = with_gradient(student, sparse)
    assert value[0] == INF
    assert value[1].isfinite()
    assert slope.isfinite().all()
    assert (slope[0] == 0).all()


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("rest", [0.0, 0.3])
def test_rows_without_mass_are_zero_with_zero_gradient(tail, rest):
    student, teacher = pair(n=3)
    sparse = topk(teacher, 4)
    if not rest:
        sparse = replace(sparse, mass=sparse.mass / sparse.mass.sum(-1, keepdim=True))
        sparse = replace(sparse, rest=torch.zeros_like(sparse.rest))
    before, slope_before = with_gradient(student, sparse, tail=tail)
    for value in (sparse.mass, sparse.rest, sparse.negentropy):
        value[1] = 0
    value, slope = with_gradient(student, sparse, tail=tail)
    assert value[1] == 0
    assert (slope[1] == 0).all()
    torch.testing.assert_close(value[[0, 2]], before[[0, 2]])
    torch.testing.assert_close(slope[[0, 2]], slope_before[[0, 2]])


def test_places_without_mass_may_name_any_id():
    """Token 0 has mass in the first place; the last two are filling and name it again."""
    student, _ = pair(n=1, v=5)
    short = Sparse(
        ids=torch.tensor([[0, 3]]),
        mass=torch.tensor([[0.5, 0.2]], dtype=DOUBLE),
        rest=torch.tensor([0.3], dtype=DOUBLE),
        negentropy=torch.tensor([-1.0], dtype=DOUBLE),
    )
    for filling in ([0, 0], [4, 1]):
        long = replace(
            short,
            ids=torch.tensor([[0, 3, *filling]]),
            mass=torch.tensor([[0.5, 0.2, 0.0, 0.0]], dtype=DOUBLE),
        )
        torch.testing.assert_close(
            losses.sparse_kl(student, long), losses.sparse_kl(student, short)
        )


# --- what is refused --------------------------------------------------------------------------


def test_another_temperature_is_refused():
    student, teacher = pair()
    with pytest.raises(ValueError, match=r"temperature is 2\.0.*read at 1\.0.*cannot serve"):
        losses.sparse_kl(student, topk(teacher, 2), temperature=2.0)


def test_ids_beyond_the_students_columns_are_refused():
    student, teacher = pair(v=9)
    sparse = topk(teacher, 9)
    losses.sparse_kl(torch.cat([student, student], dim=-1), sparse)  # more columns are padding
    with pytest.raises(ValueError, match=r"ids go from 0 to 8.*has 8 columns"):
        losses.sparse_kl(student[:, :8], sparse)
    with pytest.raises(ValueError, match="ids go from -1"):
        losses.sparse_kl(student, replace(sparse, ids=sparse.ids - 1))


def test_shapes_and_temperature_are_checked():
    student, teacher = pair()
    with pytest.raises(ValueError, match="same n rows"):
        losses.sparse_kl(student[:2], topk(teacher, 2))
    with pytest.raises(ValueError, match="positive"):
        losses.sparse_kl(student, topk(teacher, 2), temperature=0.0)


def test_selecting_and_moving_keep_the_temperature():
    _, teacher = pair()
    sparse = topk(teacher, 2, 3.0)
    some = sparse[torch.tensor([4, 1])].to(torch.device("cpu"))
    assert some.temperature == 3.0
    assert torch.equal(some.ids, sparse.ids[[4, 1]])
    assert torch.equal(some.negentropy, sparse.negentropy[[4, 1]])
