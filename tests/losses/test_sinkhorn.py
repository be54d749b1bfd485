"""Optimal transport between two vocabularies, against formulas, plain Python and POT."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.losses import potentials, sinkhorn, total_variation

P, Q = (0.7, 0.2, 0.1), (0.5, 0.3, 0.2)
SYNONYMS = torch.tensor([[0.0, 0.1, 1.0], [0.1, 0.0, 1.0], [1.0, 1.0, 0.0]], dtype=torch.float64)
WIDE = torch.tensor([[0.0, 1.0, 0.5], [1.0, 0.0, 0.5]], dtype=torch.float64)
ROW = st.lists(st.floats(-30, 30, width=32), min_size=3, max_size=3)


def logits(*row):
    return torch.tensor([row], dtype=torch.float64).log()


def distance(p, q, cost, **kw):
    """The value for teacher p and student q."""
    return sinkhorn(logits(*q), logits(*p), cost, **{"iterations": 20_000} | kw).item()


def problem(n=4, w=6, v=6, seed=0, square=True):
    """Student and teacher logits and a cost: Euclidean in the plane, or without any structure."""
    random = torch.Generator().manual_seed(seed)
    student = torch.randn(n, v, generator=random, dtype=torch.float64)
    teacher = torch.randn(n, w, generator=random, dtype=torch.float64)
    if not square:
        return student, teacher, torch.rand(w, v, generator=random, dtype=torch.float64)
    points = torch.rand(v, 2, generator=random, dtype=torch.float64)
    return student, teacher, (points[:, None] - points).norm(dim=-1)


def plan(p, q, cost, epsilon):
    """(<P, C>, <P, C> + epsilon KL(P || p q^T)) of Cuturi's scaling, entry by entry."""
    rows, columns = range(len(p)), range(len(q))
    kernel = [[math.exp(-cost[i][j] / epsilon) for j in columns] for i in rows]
    a, b = [1.0] * len(p), [1.0] * len(q)
    for _ in range(2000):  # half steps on both sides: full ones stall at p = q
        reach = [sum(kernel[i][j] * q[j] * b[j] for j in columns) for i in rows]
        back = [sum(kernel[i][j] * p[i] * a[i] for i in rows) for j in columns]
        a = [math.sqrt(a[i] / reach[i]) for i in rows]
        b = [math.sqrt(b[j] / back[j]) for j in columns]
    moved = {(i, j): p[i] * a[i] * kernel[i][j] * b[j] * q[j] for i in rows for j in columns}
    paid = sum(mass * cost[i][j] for (i, j), mass in moved.items())
    bits = sum(mass * math.log(mass / (p[i] * q[j])) for (i, j), mass in moved.items())
    return paid, paid + epsilon * bits


# --- values -----------------------------------------------------------------------------------


def test_worked_numbers():
    """The plan's cost is .12166, and .01873 for p to itself; S counts the regulariser as well."""
    cost = SYNONYMS.tolist()
    assert plan(P, Q, cost, 0.1)[0] == pytest.approx(0.12166, abs=5e-6)
    assert plan(P, P, cost, 0.1)[0] == pytest.approx(0.01873, abs=5e-6)
    between, own_p, own_q = (plan(*two, cost, 0.1)[1] for two in ((P, Q), (P, P), (Q, Q)))
    divergence = between - own_p / 2 - own_q / 2
    assert divergence == pytest.approx(0.07833, abs=7e-6)
    assert distance(P, Q, SYNONYMS) == pytest.approx(divergence, abs=1e-9)
    assert distance(P, Q, SYNONYMS, iterations=100) == pytest.approx(divergence, abs=1e-7)
    assert distance(P, Q, SYNONYMS, epsilon=0.002) == pytest.approx(0.11, abs=1e-3)


def test_certain_predictions_pay_the_cost_between_their_tokens():
    a, b, c = torch.eye(3).tolist()
    assert distance(a, b, SYNONYMS) == pytest.approx(0.1, abs=1e-12)
    assert distance(a, c, SYNONYMS) == pytest.approx(1.0, abs=1e-12)
    assert distance((1.0, 0.0), c, WIDE) == pytest.approx(0.5, abs=1e-12)


@pytest.mark.parametrize("epsilon", [0.05, 0.3, 2.0])
def test_other_costs_give_the_regularised_value(epsilon):
    want = plan((0.6, 0.4), Q, WIDE.tolist(), epsilon)[1]
    assert distance((0.6, 0.4), Q, WIDE, epsilon=epsilon) == pytest.approx(want, abs=1e-9)
    want = plan(Q, (0.6, 0.4), WIDE.T.tolist(), epsilon)[1]
    assert distance(Q, (0.6, 0.4), WIDE.T, epsilon=epsilon) == pytest.approx(want, abs=1e-9)


def test_limits_of_epsilon():
    assert distance((0.6, 0.4), Q, WIDE, epsilon=0.002) == pytest.approx(0.1, abs=3e-3)
    lopsided = SYNONYMS + torch.eye(3) * 0.01  # no debiasing: the diagonal is not 0
    independent = torch.tensor(P).double() @ lopsided @ torch.tensor(Q).double()
    assert distance(P, Q, lopsided, epsilon=1e4) == pytest.approx(independent.item(), abs=1e-4)
    student, teacher, _ = problem()
    got = sinkhorn(student, teacher, 1 - torch.eye(6), epsilon=0.01, iterations=1000)
    torch.testing.assert_close(got, total_variation(student, teacher), atol=0.02, rtol=0)


@pytest.mark.parametrize("moved", [0.05, 0.3])
def test_two_by_two_linear_programme(moved):
    """P = [[x, p - x], [q - x, 1 - p - q + x]]: <P, C> is linear in x, least at an end."""
    p, q = 0.6, 0.6 - moved
    c = [[0.3, 0.9], [0.2, 0.1]]
    ends = (max(0.0, p + q - 1), min(p, q))
    best = min(
        x * c[0][0] + (p - x) * c[0][1] + (q - x) * c[1][0] + (1 - p - q + x) * c[1][1]
        for x in ends
    )
    got = distance((p, 1 - p), (q, 1 - q), torch.tensor(c, dtype=torch.float64), epsilon=1e-3)
    assert got == pytest.approx(best, abs=1e-3)


def test_agrees_with_pot():
    import ot

    student, teacher, cost = problem(w=5, square=False)
    got = sinkhorn(student, teacher, cost, iterations=5000)
    exact = sinkhorn(student, teacher, cost, epsilon=0.002, iterations=3000)
    for i in range(4):
        p, q = teacher[i].softmax(-1).numpy(), student[i].softmax(-1).numpy()
        moved = ot.sinkhorn(p, q, cost.numpy(), reg=0.1, stopThr=1e-13, numItermax=100_000)
        moved = torch.tensor(moved)
        independent = torch.tensor(p)[:, None] * torch.tensor(q)
        want = (moved * cost).sum() + 0.1 * (moved * (moved / independent).log()).sum()
        assert got[i].item() == pytest.approx(want.item(), abs=1e-8)
        assert exact[i].item() == pytest.approx(ot.emd2(p, q, cost.numpy()), abs=5e-3)


def test_temperature():
    student, teacher, cost = problem()
    want = sinkhorn(student / 2.5, teacher / 2.5, cost)
    plain = sinkhorn(student, teacher, cost, temperature=2.5, scale_by_t2=False)
    torch.testing.assert_close(plain, want)
    torch.testing.assert_close(sinkhorn(student, teacher, cost, temperature=2.5), want * 6.25)


# --- gradient ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("w", "square"), [(6, True), (6, False), (4, False)])
def test_gradient(w, square):
    student, teacher, cost = problem(n=2, w=w, square=square)

    def loss(student, teacher):
        return sinkhorn(student, teacher, cost, iterations=1000, temperature=1.5)

    inputs = (student.requires_grad_(), teacher.requires_grad_())
    assert torch.autograd.gradcheck(loss, inputs)


@settings(max_examples=40)
@given(row=ROW, epsilon=st.floats(0.02, 2.0))
def test_equal_distributions_give_zero_and_no_gradient(row, epsilon):
    for dtype in (torch.float32, torch.float64):
        student = torch.tensor([row], dtype=dtype, requires_grad=True)
        teacher = student.detach().clone().requires_grad_()
        value = sinkhorn(student, teacher, SYNONYMS, epsilon=epsilon)
        value.sum().backward()
        assert value.item() == 0
        assert not student.grad.any()
        assert not teacher.grad.any()


def test_default_iterations_suffice_near_the_optimum():
    student, _, cost = problem(n=20)
    teacher = student + 0.1 * problem(n=20, seed=1)[0]
    slopes = []
    for iterations in (100, 1000):
        moving = student.clone().requires_grad_()
        sinkhorn(moving, teacher, cost, iterations=iterations).sum().backward()
        slopes.append(moving.grad)
    assert (slopes[0] - slopes[1]).norm() < 0.02 * slopes[1].norm()


def test_descent_reaches_the_teacher():
    student, teacher, cost = problem()
    student.requires_grad_()
    optimiser = torch.optim.Adam([student], lr=0.05)
    for _ in range(120):
        optimiser.zero_grad()
        sinkhorn(student, teacher, cost).sum().backward()
        optimiser.step()
    assert total_variation(student, teacher).max() < 0.02


# --- properties -------------------------------------------------------------------------------


@settings(max_examples=40)
@given(student=ROW, teacher=ROW, epsilon=st.floats(0.05, 2.0))
def test_never_negative_and_finite(student, teacher, epsilon):
    for dtype, rounding in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        s = torch.tensor([student], dtype=dtype, requires_grad=True)
        value = sinkhorn(s, torch.tensor([teacher], dtype=dtype), SYNONYMS, epsilon=epsilon)
        value.sum().backward()
        assert -rounding <= value.item() <= 1 + rounding
        assert s.grad.isfinite().all()


def test_a_cost_whose_kernel_is_not_positive_may_give_less_than_zero():
    free = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    assert distance((0.5, 0.0, 0.5), (0.0, 1.0, 0.0), free) < -0.01


def test_symmetric_in_its_arguments():
    student, teacher, cost = problem()
    forward = sinkhorn(student, teacher, cost, iterations=3000)
    torch.testing.assert_close(sinkhorn(teacher, student, cost, iterations=3000), forward)


@pytest.mark.parametrize("square", [True, False])
def test_joint_permutation_changes_nothing(square):
    student, teacher, cost = problem(square=square)
    order, other = torch.tensor([3, 1, 0, 5, 2, 4]), torch.tensor([5, 4, 0, 1, 3, 2])
    rows = order if square else other
    got = sinkhorn(student[:, order], teacher[:, rows], cost[rows][:, order])
    torch.testing.assert_close(got, sinkhorn(student, teacher, cost))


def test_rounding_of_a_square_cost_does_not_undo_the_debiasing():
    student, teacher, cost = problem()
    noise = 1e-7 * torch.rand(6, 6, generator=torch.Generator().manual_seed(2))
    want = sinkhorn(student, teacher, cost)
    torch.testing.assert_close(sinkhorn(student, teacher, cost + noise), want, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("w", "square"), [(6, True), (4, False)])
def test_rows_do_not_see_each_other_nor_their_chunk(w, square, monkeypatch):
    student, teacher, cost = problem(n=7, w=w, square=square)
    whole = sinkhorn(student, teacher, cost)
    bad = student.clone()
    bad[2] = torch.nan
    value = sinkhorn(bad, teacher, cost)
    assert value.isnan().tolist() == [i == 2 for i in range(7)]
    keep = [0, 1, 3, 4, 5, 6]
    torch.testing.assert_close(value[keep], whole[keep])
    monkeypatch.setattr(potentials, "CHUNK_BYTES", 3 * cost.numel() * 8)
    torch.testing.assert_close(sinkhorn(student, teacher, cost), whole)
    monkeypatch.setattr(potentials, "CHUNK_BYTES", 1)
    torch.testing.assert_close(sinkhorn(student, teacher, cost), whole)


@pytest.mark.parametrize(("w", "square"), [(6, True), (4, False)])
def test_impossible_tokens_are_as_if_they_were_not_there(w, square):
    student, teacher, cost = problem(w=w, square=square)
    student[:, 1] = teacher[:, 1] = -torch.inf
    student.requires_grad_()
    value = sinkhorn(student, teacher, cost)
    value.sum().backward()
    rows, columns = [i for i in range(w) if i != 1], [0, 2, 3, 4, 5]
    small = student.detach()[:, columns].requires_grad_()
    want = sinkhorn(small, teacher[:, rows], cost[rows][:, columns])
    want.sum().backward()
    torch.testing.assert_close(value, want)
    torch.testing.assert_close(student.grad[:, columns], small.grad)
    assert not student.grad[:, 1].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_and_one_sided_holes(dtype):
    student, teacher, cost = problem()
    student[1, 2] = teacher[2, 3] = -torch.inf
    student, teacher = student.to(dtype).requires_grad_(), teacher.to(dtype)
    value = sinkhorn(student, teacher, cost.to(dtype))
    assert value.dtype == torch.float32
    value.sum().backward()
    assert student.grad.isfinite().all()
    exact = sinkhorn(student.detach().double(), teacher.double(), cost.to(dtype).double())
    torch.testing.assert_close(value.double(), exact, atol=2e-6, rtol=1e-5)


def test_logits_far_apart_stay_finite():
    student = torch.tensor([[6e4, -6e4, 0.0], [90.0, -90.0, 0.0]], requires_grad=True)
    value = sinkhorn(student, -student.detach(), SYNONYMS, epsilon=0.01)
    value.sum().backward()
    torch.testing.assert_close(value, torch.full((2,), 0.1), atol=1e-5, rtol=0)
    assert student.grad.isfinite().all()


def test_no_rows():
    student = torch.zeros(0, 3, requires_grad=True)
    for cost, width in ((WIDE, 2), (SYNONYMS, 3)):
        value = sinkhorn(student, torch.zeros(0, width), cost)
        assert value.shape == (0,)
        value.sum().backward()
    assert student.grad.shape == (0, 3)


# --- wrong arguments --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cost", "message"),
    [
        (torch.ones(2, 3), "same for all"),
        (torch.zeros(2, 3), "same for all"),
        (torch.tensor([[1.0, 1.0, 1.0], [2.0, 2.0, 2.0]]), "same for all"),
        (WIDE.T, r"\[w, v\].*here \[2, 3\]; it is \[3, 2\]"),
        (WIDE[0], r"\[w, v\]"),
        (WIDE - 0.1, "not negative"),
        (WIDE / 0, "finite"),
        (WIDE * torch.inf, "finite"),
        (WIDE * 1e38, "finite"),
    ],
)
def test_useless_costs_are_refused(cost, message):
    with pytest.raises(ValueError, match=message):
        sinkhorn(torch.zeros(4, 3), torch.zeros(4, 2), cost)


@pytest.mark.parametrize(
    ("kw", "message"),
    [
        ({"epsilon": 0.0}, "epsilon must be positive"),
        ({"epsilon": -1.0}, "epsilon must be positive"),
        ({"epsilon": math.nan}, "epsilon must be positive"),
        ({"epsilon": math.inf}, "epsilon must be positive"),
        ({"iterations": 0}, "iterations must be at least 1"),
        ({"temperature": 0.0}, "temperature must be positive"),
    ],
)
def test_wrong_numbers_are_refused(kw, message):
    with pytest.raises(ValueError, match=message):
        sinkhorn(torch.zeros(4, 3), torch.zeros(4, 2), WIDE, **kw)


def test_rows_must_fit():
    with pytest.raises(ValueError, match=r"logits must be \[n, v\]"):
        sinkhorn(torch.zeros(4, 3), torch.zeros(5, 2), WIDE)


# --- a cost of its own for each row -----------------------------------------------------------


def solved(student, teacher, cost, own_p=None, own_q=None, epsilon=0.1, iterations=20_000):
    """The value in units of the cost, differentiable in both."""
    logp, logq = teacher.log_softmax(-1), student.log_softmax(-1)
    own = [None if each is None else each / epsilon for each in (own_p, own_q)]
    f, g = potentials.potentials(logp, logq, cost / epsilon, *own, iterations=iterations)
    return epsilon * ((logp.exp() * f).sum(-1) + (logq.exp() * g).sum(-1))


def clouds(n=4, w=5, v=7, seed=3):
    """Costs of one kind between and within two sets of points, other ones for each row."""
    random = torch.Generator().manual_seed(seed)
    a, b = (torch.rand(n, m, 2, generator=random, dtype=torch.float64) for m in (w, v))
    return torch.cdist(a, b), torch.cdist(a, a), torch.cdist(b, b)


def test_rows_with_their_own_costs_are_rows_alone():
    student, teacher, _ = problem(w=5, v=7)
    cost, own_p, own_q = clouds()
    whole = solved(student, teacher, cost, own_p, own_q)
    plain = solved(student, teacher, cost)
    for i in range(4):
        row = student[i : i + 1], teacher[i : i + 1], cost[i]
        torch.testing.assert_close(solved(*row), plain[i : i + 1])
        torch.testing.assert_close(solved(*row, own_p[i], own_q[i]), whole[i : i + 1])
    assert not torch.allclose(plain, whole)


def test_the_same_cost_for_every_row_is_one_cost():
    student, teacher, cost = problem()
    many = cost.expand(4, 6, 6)
    got = solved(student, teacher, many, many, many, iterations=100)
    torch.testing.assert_close(got, sinkhorn(student, teacher, cost))


def test_costs_of_rows_agree_with_pot():
    import ot

    student, teacher, _ = problem(w=5, v=7)
    p, q = teacher.softmax(-1), student.softmax(-1)
    costs = clouds()
    got = solved(student, teacher, *costs)
    exact = solved(student, teacher, costs[0], epsilon=0.001, iterations=20_000)

    def value(a, b, cost):
        moved = ot.sinkhorn(a.numpy(), b.numpy(), cost.numpy(), 0.1, "sinkhorn_log", 20_000, 1e-10)
        moved = torch.tensor(moved)
        bits = (moved * (moved / (a[:, None] * b)).log()).nan_to_num().sum()
        return ((moved * cost).sum() + 0.1 * bits).item()

    for i in range(4):
        between, own_p, own_q = (each[i] for each in costs)
        want = value(p[i], q[i], between)
        want -= (value(p[i], p[i], own_p) + value(q[i], q[i], own_q)) / 2
        assert got[i].item() == pytest.approx(want, abs=1e-6)
        assert want > 0
        cheapest = ot.emd2(p[i].numpy(), q[i].numpy(), between.numpy())
        assert exact[i].item() == pytest.approx(cheapest, abs=3e-3)


def test_gradient_of_debiased_rows():
    student, teacher, _ = problem(n=3, w=5, v=7)
    costs = clouds(n=3)
    inputs = (student.requires_grad_(), teacher.requires_grad_())
    assert torch.autograd.gradcheck(lambda s, t: solved(s, t, *costs), inputs)


def test_no_gradient_passes_through_the_iterations():
    """A value that is far from converged still has exactly its potentials as gradient."""
    student, teacher, cost = problem(w=4, square=False)
    student.requires_grad_()
    f, g = potentials.potentials(
        teacher.log_softmax(-1), student.log_softmax(-1), cost / 0.1, iterations=2
    )
    assert not f.requires_grad
    assert not g.requires_grad
    sinkhorn(student, teacher, cost, iterations=2).sum().backward()
    q = student.detach().softmax(-1)
    want = 0.1 * q * (g - (q * g).sum(-1, keepdim=True))
    torch.testing.assert_close(student.grad, want)
