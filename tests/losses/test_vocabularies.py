"""KL divergences across vocabularies: written-out references, the chain rule and its edges."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.losses import forward_kl, reverse_kl, sorted_l1
from limbeck.losses.vocabularies import Partition, hybrid_kl, mapped_kl, prefix_kl


def ids(*columns):
    return torch.tensor(columns, dtype=torch.int64)


def pair(n=5, w=6, v=8, seed=0):
    random = torch.Generator().manual_seed(seed)
    student, teacher = (
        1.5 * torch.randn(n, width, generator=random, dtype=torch.float64) for width in (v, w)
    )
    return student, teacher


# --- mapped -----------------------------------------------------------------------------------

NEAREST = ids(3, 0, -1, 5, 0, 2, -1, 1)


def written_out(student, teacher, reverse, t=1.0):
    values = []
    for mine, theirs in zip(student.tolist(), teacher.tolist(), strict=True):
        known = [j for j, i in enumerate(NEAREST.tolist()) if i >= 0]
        weights = {j: math.exp(theirs[NEAREST[j]] / t) for j in known}
        p = {j: weight / sum(weights.values()) for j, weight in weights.items()}
        counted = known if reverse else range(8)
        total = sum(math.exp(mine[j] / t) for j in counted)
        q = {j: math.exp(mine[j] / t) / total for j in known}
        if reverse:
            values.append(sum(q[j] * math.log(q[j] / p[j]) for j in known))
        else:
            values.append(sum(p[j] * math.log(p[j] / q[j]) for j in known))
    return t**2 * torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_mapped_reference(reverse, temperature):
    student, teacher = pair()
    got = mapped_kl(student, teacher, NEAREST, reverse=reverse, temperature=temperature)
    torch.testing.assert_close(got, written_out(student, teacher, reverse, temperature))


def test_mapped_with_itself_is_the_plain_kl():
    student, teacher = pair(w=8)
    same = torch.arange(8)
    torch.testing.assert_close(mapped_kl(student, teacher, same), forward_kl(student, teacher))
    got = mapped_kl(student, teacher, same, reverse=True)
    torch.testing.assert_close(got, reverse_kl(student, teacher))


def test_mapped_follows_a_permutation():
    student, _ = pair()
    order = ids(4, 2, 7, 0, 1, 6, 3, 5)
    teacher = torch.empty_like(student)
    teacher[:, order] = student  # token j of the student is order[j] of the teacher
    value = mapped_kl(student, teacher, order)
    torch.testing.assert_close(value, torch.zeros(5).double(), atol=1e-14, rtol=0)
    assert (mapped_kl(student, teacher, order.flip(0)) > 0.1).all()


@pytest.mark.parametrize("reverse", [False, True])
def test_mapped_gradient(reverse):
    student, teacher = pair(n=2)
    inputs = (student.requires_grad_(), teacher.requires_grad_())
    assert torch.autograd.gradcheck(
        lambda s, t: mapped_kl(s, t, NEAREST, reverse=reverse, temperature=1.5), inputs
    )


def test_columns_that_nobody_maps_lose_probability():
    """Both columns without a partner and columns beyond the map."""
    student, teacher = pair(v=10)
    student.requires_grad_()
    mapped_kl(student, teacher, NEAREST).sum().backward()
    q = student.detach().softmax(-1)
    for column in (2, 6, 8, 9):
        torch.testing.assert_close(student.grad[:, column], q[:, column])


@pytest.mark.parametrize(
    ("nearest", "message"),
    [(ids(0, 6, 1), r"teacher's 6; it names up to 6"), (ids(-1, -1), "names none")],
)
def test_bad_maps(nearest, message):
    with pytest.raises(ValueError, match=message):
        mapped_kl(*pair(), nearest)


# --- hybrid -----------------------------------------------------------------------------------

PARTITION = Partition(
    student=ids(1, 4, 5),
    teacher=ids(2, 0, 5),
    student_rest=ids(0, 2, 7),
    teacher_rest=ids(1, 4),
    student_other=ids(3, 6),
)


def explicit(p, q, both, weight):
    """One row, from probabilities."""
    theirs = [*both.teacher.tolist(), *both.teacher_rest.tolist()]
    if not len(both.student_rest):
        theirs = both.teacher.tolist()
    total = sum(p[i] for i in theirs)
    p = {i: p[i] / total for i in theirs}
    shared = zip(both.teacher.tolist(), both.student.tolist(), strict=True)
    value = sum(p[i] * math.log(p[i] / q[j]) for i, j in shared if p[i])
    rest_p = sum(p.get(i, 0.0) for i in both.teacher_rest.tolist())
    rest_q = sum(q[j] for j in both.student_rest.tolist())
    if rest_p and len(both.student_rest):
        value += rest_p * math.log(rest_p / rest_q)
        a = sorted((p[i] / rest_p for i in both.teacher_rest.tolist()), reverse=True)
        b = sorted((q[j] / rest_q for j in both.student_rest.tolist()), reverse=True)
        a += [0.0] * (len(b) - len(a))
        b += [0.0] * (len(a) - len(b))
        value += weight * rest_p * sum(abs(x - y) for x, y in zip(a, b, strict=True))
    return value


@st.composite
def partitions(draw):
    """Any way to share 6 and 8 columns, with nothing shared, no rest on a side, or no others."""
    teacher = draw(st.permutations(range(6)))
    student = draw(st.permutations(range(8)))
    m = draw(st.integers(0, 6))
    s, r = draw(st.integers(0, 6 - m)), draw(st.integers(0, 8 - m))
    if not m:
        s, r = max(1, s), max(1, r)
    return Partition(
        student=ids(*student[:m]),
        teacher=ids(*teacher[:m]),
        student_rest=ids(*student[m : m + r]),
        teacher_rest=ids(*teacher[m : m + s]),
        student_other=ids(*student[m + r :]),
    )


@settings(max_examples=150)
@given(
    both=partitions(),
    seed=st.integers(0, 1000),
    spread=st.sampled_from([0.1, 1.0, 8.0]),
    weight=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_hybrid_reference_and_never_negative(both, seed, spread, weight):
    student, teacher = (spread * side for side in pair(seed=seed))
    student.requires_grad_()
    value = hybrid_kl(student, teacher, both, transport=weight)
    p, q = teacher.softmax(-1).tolist(), student.softmax(-1).tolist()
    want = [explicit(*row, both, weight) for row in zip(p, q, strict=True)]
    torch.testing.assert_close(value.tolist(), want, atol=1e-9, rtol=1e-9)
    assert (value >= -1e-12).all()
    value.sum().backward()
    assert student.grad.isfinite().all()
    torch.testing.assert_close(student.grad.sum(-1), torch.zeros(5).double(), atol=1e-10, rtol=0)


def test_hybrid_with_one_vocabulary_is_the_forward_kl():
    student, teacher = pair(w=8)
    everything = torch.arange(8)
    both = Partition(
        student=everything,
        teacher=everything,
        student_rest=ids(),
        teacher_rest=ids(),
        student_other=ids(),
    )
    got = hybrid_kl(student, teacher, both, temperature=2.0)
    torch.testing.assert_close(got, forward_kl(student, teacher, temperature=2.0))


def test_hybrid_with_nothing_in_common_is_transport():
    student, teacher = pair()
    both = Partition(
        student=ids(),
        teacher=ids(),
        student_rest=torch.arange(8),
        teacher_rest=torch.arange(6),
        student_other=ids(),
    )
    got = hybrid_kl(student, teacher, both, transport=0.7, temperature=2.0)
    torch.testing.assert_close(got, 0.7 * sorted_l1(student, teacher, temperature=2.0))


def test_chain_rule():
    """With the KL of what is within the rests in the place of transport it is the whole KL."""
    student, teacher = pair(w=8)
    columns = torch.arange(8)
    both = Partition(
        student=columns[:3],
        teacher=columns[:3],
        student_rest=columns[3:],
        teacher_rest=columns[3:],
        student_other=ids(),
    )
    coarse = hybrid_kl(student, teacher, both, transport=0.0)
    rest = teacher.softmax(-1)[:, 3:].sum(-1)
    within = forward_kl(student[:, 3:], teacher[:, 3:])
    torch.testing.assert_close(coarse + rest * within, forward_kl(student, teacher))
    assert (hybrid_kl(student, teacher, both) > coarse).all()


def test_equal_models_have_no_hybrid_loss_and_no_gradient():
    student, _ = pair()
    order = ids(4, 2, 7, 0, 1, 6, 3, 5)
    teacher = torch.empty_like(student)
    teacher[:, order] = student
    both = Partition(
        student=ids(0, 1, 2, 3),
        teacher=order[:4],
        student_rest=ids(4, 5, 6, 7),
        teacher_rest=order[4:],
        student_other=ids(),
    )
    student.requires_grad_()
    value = hybrid_kl(student, teacher, both)
    value.sum().backward()
    torch.testing.assert_close(value, torch.zeros(5).double(), atol=1e-14, rtol=0)
    assert student.grad.abs().max() < 1e-14


def test_hybrid_gradient():
    student, teacher = pair(n=2)
    inputs = (student.requires_grad_(), teacher.requires_grad_())
    assert torch.autograd.gradcheck(
        lambda s, t: hybrid_kl(s, t, PARTITION, transport=0.5, temperature=1.5), inputs
    )


def test_hybrid_temperature():
    student, teacher = pair()
    want = hybrid_kl(student / 2.5, teacher / 2.5, PARTITION)
    plain = hybrid_kl(student, teacher, PARTITION, temperature=2.5, scale_by_t2=False)
    torch.testing.assert_close(plain, want)
    scaled = hybrid_kl(student, teacher, PARTITION, temperature=2.5)
    torch.testing.assert_close(scaled, want * 6.25)


@pytest.mark.parametrize("loss", ["hybrid", "mapped", "reverse"])
def test_rows_are_alone_and_holes_make_no_nan(loss):
    def of(student, teacher):
        if loss == "hybrid":
            return hybrid_kl(student, teacher, PARTITION)
        return mapped_kl(student, teacher, NEAREST, reverse=loss == "reverse")

    student, teacher = pair()
    whole = of(student, teacher)
    student[0, [0, 2, 7]] = -torch.inf  # the student rules out its whole rest: an infinite KL
    teacher[1, [1, 4]] = -torch.inf  # the teacher its own
    teacher[2, 0] = student[2, 5] = -torch.inf
    student.requires_grad_()
    value = of(student, teacher)
    value.sum().backward()
    assert not value.isnan().any()
    assert (value >= 0).all()
    assert student.grad.isfinite().all()
    torch.testing.assert_close(value[3:].detach(), whole[3:])
    if loss == "hybrid":
        assert value.isinf().tolist() == [True, False, True, False, False]


def test_hybrid_without_tokens_is_refused():
    nothing = Partition(
        student=ids(), teacher=ids(), student_rest=ids(), teacher_rest=ids(), student_other=ids(0)
    )
    with pytest.raises(ValueError, match="no tokens"):
        hybrid_kl(*pair(), nothing)


OPENINGS = torch.tensor([2, 0, 2, -1, 1])
"""For each of five teacher's tokens the student's, of four; nobody begins with the last."""


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_prefix_kl_is_the_kl_of_the_moved_distribution(temperature):
    torch.manual_seed(0)
    student, teacher = torch.randn(6, 4).double(), torch.randn(6, 5).double()
    expected = []
    for s, t in zip(student, teacher, strict=True):
        p, q = (t / temperature).softmax(0), (s / temperature).softmax(0)
        moved = [p[1], p[4], p[0] + p[2], torch.tensor(0.0)]
        total = sum(moved)
        expected.append(
            temperature**2
            * sum((m / total) * ((m / total) / q[j]).log() for j, m in enumerate(moved) if m > 0)
        )
    got = prefix_kl(student, teacher, OPENINGS, temperature=temperature)
    torch.testing.assert_close(got, torch.stack(expected))


def test_prefix_kl_of_one_vocabulary_is_the_forward_kl():
    torch.manual_seed(0)
    student, teacher = torch.randn(5, 7).double(), torch.randn(5, 7).double()
    got = prefix_kl(student, teacher, torch.arange(7))
    torch.testing.assert_close(got, forward_kl(student, teacher))
    torch.testing.assert_close(
        prefix_kl(teacher, teacher, torch.arange(7)), torch.zeros(5).double()
    )


def test_prefix_kl_has_the_right_gradient_and_none_where_nothing_can_be_begun():
    torch.manual_seed(0)
    student = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(3, 5).double()
    assert torch.autograd.gradcheck(lambda s: prefix_kl(s, teacher, OPENINGS), student)
    certain = torch.full((3, 5), -torch.inf).double()
    certain[:, 3] = 0.0  # all is on the token that the student cannot begin
    value = prefix_kl(student, certain, OPENINGS)
    (gradient,) = torch.autograd.grad(value.sum(), student)
    assert value.tolist() == [0.0] * 3
    assert gradient.abs().max() == 0


def test_prefix_kl_refuses_columns_that_are_not_there():
    with pytest.raises(ValueError, match="student's 4"):
        prefix_kl(torch.randn(2, 4), torch.randn(2, 5), torch.tensor([4, 0, 0, 0, 0]))
