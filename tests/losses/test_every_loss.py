"""What all losses between two models promise, whatever their formula."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck import losses

INF = torch.inf
EVERY = [
    (losses.forward_kl, {}),
    (losses.reverse_kl, {}),
    (losses.jensen_shannon, {"beta": 0.3}),
    (losses.skew_forward_kl, {"alpha": 0.2}),
    (losses.skew_reverse_kl, {"alpha": 0.2}),
    (losses.total_variation, {}),
    (losses.adaptive_kl, {"mu": 0.6}),
    (losses.alpha_beta, {"alpha": 0.3, "beta": 0.9}),
    (losses.taid, {"t": 0.4}),
    (losses.ranking, {"k": 5}),
    (losses.logit_mse, {}),
    (losses.sorted_l1, {}),
]
BOUNDED = {losses.jensen_shannon, losses.skew_forward_kl, losses.skew_reverse_kl}
BOUNDED |= {losses.total_variation, losses.sorted_l1}


def every_but(*left_out):
    """Run a test for all losses but those that are documented to differ."""
    cases = [(loss, kw) for loss, kw in EVERY if loss not in left_out]
    return pytest.mark.parametrize(("loss", "kw"), cases, ids=[loss.__name__ for loss, _ in cases])


every = every_but()


def pair(n=6, v=9, seed=0, spread=2.0, dtype=torch.float64):
    """(student, teacher) logits."""
    random = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(2, n, v, generator=random, dtype=torch.float64)).to(dtype)


def with_gradients(loss, student, teacher, **kw):
    """The value and the gradients of both arguments."""
    student, teacher = student.clone().requires_grad_(), teacher.clone().requires_grad_()
    value = loss(student, teacher, **kw)
    value.sum().backward()
    return value.detach(), student.grad, teacher.grad


def test_public_names():
    assert losses.__all__ == sorted(losses.__all__)
    assert set(losses.__all__) >= {loss.__name__ for loss, _ in EVERY} | {"cross_entropy"}
    for name in losses.__all__:
        assert getattr(losses, name).__doc__, name


# --- shape and type ---------------------------------------------------------------------------


@every
@pytest.mark.parametrize(
    ("student", "teacher", "result"),
    [
        (torch.float32, torch.float32, torch.float32),
        (torch.float64, torch.float64, torch.float64),
        (torch.float32, torch.float64, torch.float64),
        (torch.bfloat16, torch.float16, torch.float32),
        (torch.bfloat16, torch.float32, torch.float32),
    ],
)
def test_one_value_a_row_in_at_least_float32(loss, kw, student, teacher, result):
    s, t = pair()
    value = loss(s.to(student), t.to(teacher), **kw)
    assert value.shape == (6,)
    assert value.dtype == result


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_lose_nothing_but_their_own_rounding(loss, kw, dtype):
    student, teacher = pair(v=500, spread=3.0, dtype=dtype)
    exact, slope, _ = with_gradients(loss, student.double(), teacher.double(), **kw)
    single, slope_single, _ = with_gradients(loss, student.float(), teacher.float(), **kw)
    value, slope_low, _ = with_gradients(loss, student, teacher, **kw)
    assert torch.equal(value, single)
    torch.testing.assert_close(value.double(), exact, rtol=2e-6, atol=2e-6)
    assert slope_low.dtype == dtype
    assert torch.equal(slope_low, slope_single.to(dtype))
    torch.testing.assert_close(slope_single.double(), slope, rtol=1e-4, atol=1e-6)


@every
def test_no_rows_give_no_values_and_a_working_backward(loss, kw):
    value, student, teacher = with_gradients(loss, torch.zeros(0, 5), torch.zeros(0, 5), **kw)
    assert value.shape == (0,)
    assert value.dtype == torch.float32
    assert student.shape == teacher.shape == (0, 5)


@every
def test_arguments_are_left_as_they_were(loss, kw):
    student, teacher = pair()
    student[:, 0] = teacher[:, 0] = -INF
    before = student.clone(), teacher.clone()
    loss(student, teacher, temperature=2.0, **kw)
    assert torch.equal(student, before[0])
    assert torch.equal(teacher, before[1])


@every
def test_a_detached_teacher_is_enough_for_backward(loss, kw):
    student, teacher = pair()
    loss(student.requires_grad_(), teacher, **kw).mean().backward()
    assert student.grad is not None
    assert student.grad.abs().sum() > 0


# --- temperature ------------------------------------------------------------------------------


@every
def test_temperature_divides_logits_and_multiplies_the_loss_by_its_square(loss, kw):
    student, teacher = pair()
    want = loss(student / 2.5, teacher / 2.5, **kw)
    plain = loss(student, teacher, temperature=2.5, scale_by_t2=False, **kw)
    torch.testing.assert_close(plain, want)
    torch.testing.assert_close(loss(student, teacher, temperature=2.5, **kw), want * 6.25)


# --- invariances ------------------------------------------------------------------------------


@every
def test_rows_do_not_see_each_other(loss, kw):
    student, teacher = pair()
    whole = loss(student, teacher, **kw)
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    torch.testing.assert_close(loss(student[order], teacher[order], **kw), whole[order])
    parts = [loss(student[i : i + 1], teacher[i : i + 1], **kw) for i in range(6)]
    torch.testing.assert_close(torch.cat(parts), whole)
    bad = student.clone()
    bad[2] = torch.nan  # a broken row shows, and stays alone
    value = loss(bad, teacher, **kw)
    assert value.isnan().tolist() == [False, False, True, False, False, False]
    keep = torch.tensor([0, 1, 3, 4, 5])
    torch.testing.assert_close(value[keep], whole[keep])


@every
def test_joint_permutation_of_the_vocabulary_changes_nothing(loss, kw):
    student, teacher = pair()
    order = torch.tensor([3, 8, 1, 0, 7, 2, 6, 4, 5])
    value = loss(student[:, order], teacher[:, order], **kw)
    torch.testing.assert_close(value, loss(student, teacher, **kw))


@every_but(losses.logit_mse)  # see test_regression.py
def test_a_constant_added_to_the_logits_changes_nothing(loss, kw):
    student, teacher = pair()
    value = loss(student + 31.0, teacher - 17.0, **kw)
    torch.testing.assert_close(value, loss(student, teacher, **kw))


# --- padding and holes ------------------------------------------------------------------------


@every_but(losses.sorted_l1)  # other tokenizers have other widths: all its columns count
@pytest.mark.parametrize("wider", ["student", "teacher"])
def test_padding_columns_are_cut(loss, kw, wider):
    student, teacher = pair()
    junk = torch.full((6, 4), 7.0, dtype=torch.float64)
    wide = {"student": student, "teacher": teacher}
    wide[wider] = torch.cat([wide[wider], junk], 1)
    value, *slopes = with_gradients(loss, wide["student"], wide["teacher"], **kw)
    want, *slopes_want = with_gradients(loss, student, teacher, **kw)
    torch.testing.assert_close(value, want)
    for slope, slope_want in zip(slopes, slopes_want, strict=True):
        torch.testing.assert_close(slope[:, :9], slope_want)
        assert not slope[:, 9:].any()


@every_but(losses.logit_mse)  # see test_regression.py
@pytest.mark.parametrize("fill", [-INF, torch.finfo(torch.float32).min])
def test_a_vocabulary_masked_in_both_is_as_if_it_were_smaller(loss, kw, fill):
    student, teacher = pair(dtype=torch.float32)
    mask = torch.zeros(6, 9, dtype=torch.bool)
    mask[:, [1, 4, 8]] = True
    holes = student.masked_fill(mask, fill), teacher.masked_fill(mask, fill)
    value, *slopes = with_gradients(loss, *holes, **kw)
    kept = [0, 2, 3, 5, 6, 7]
    want, *slopes_want = with_gradients(loss, student[:, kept], teacher[:, kept], **kw)
    torch.testing.assert_close(value, want)
    for slope, slope_want in zip(slopes, slopes_want, strict=True):
        torch.testing.assert_close(slope[:, kept], slope_want)
        assert not slope[:, [1, 4, 8]].any()


@every
@pytest.mark.parametrize("side", ["student", "teacher", "each its own"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_hole_on_one_side_makes_no_nan(loss, kw, side, dtype):
    student, teacher = pair(dtype=dtype)
    if side != "teacher":
        student[1:4, 2] = -INF
    if side != "student":
        teacher[1:4, 5] = -INF
    for temperature in (1.0, 3.0):
        value, *slopes = with_gradients(loss, student, teacher, temperature=temperature, **kw)
        assert not value.isnan().any()
        assert all(slope.isfinite().all() for slope in slopes)
        assert (value >= 0).all()
        if loss in BOUNDED:
            assert value.isfinite().all()
        infinite = [False, True, True, True, False, False]
        if loss is losses.forward_kl:
            assert value.isinf().tolist() == (infinite if side != "teacher" else [False] * 6)
        if loss is losses.reverse_kl:
            assert value.isinf().tolist() == (infinite if side != "student" else [False] * 6)


def test_one_sided_holes_have_the_values_of_the_formula():
    student = torch.tensor([[0.5, 0.3, 0.2]]).double().log()
    teacher = torch.tensor([[0.8, 0.2, 0.0]]).double().log()
    want = 0.8 * math.log(0.8 / 0.5) + 0.2 * math.log(0.2 / 0.3)
    value, slope, _ = with_gradients(losses.forward_kl, student, teacher)
    assert value.item() == pytest.approx(want)
    torch.testing.assert_close(slope, student.exp() - teacher.exp())
    assert losses.reverse_kl(teacher, student).item() == pytest.approx(want)
    m = [0.65, 0.25, 0.1]
    own = 0.8 * math.log(0.8 / m[0]) + 0.2 * math.log(0.2 / m[1])
    other = sum(a * math.log(a / b) for a, b in zip((0.5, 0.3, 0.2), m, strict=True))
    assert losses.jensen_shannon(student, teacher).item() == pytest.approx((own + other) / 2)
    assert losses.total_variation(student, teacher).item() == pytest.approx(0.3)


@every
def test_certain_and_opposed_predictions_stay_finite(loss, kw):
    """Logits as far apart as float16 allows: nothing may overflow in the exponentials."""
    student = torch.tensor([[6e4, -6e4, 0.0], [90.0, -90.0, 0.0]])
    teacher = torch.tensor([[-6e4, 6e4, 0.0], [-90.0, 90.0, 0.0]])
    value, *slopes = with_gradients(loss, student, teacher, **kw)
    assert value.isfinite().all()
    assert (value[0] >= 0).all()
    assert all(slope.isfinite().all() for slope in slopes)


# --- properties -------------------------------------------------------------------------------

ROW = st.lists(st.floats(-30, 30, width=32), min_size=7, max_size=7)
TEMPERATURE = st.floats(0.25, 8.0)


@every
@settings(max_examples=40)
@given(student=ROW, teacher=ROW, temperature=TEMPERATURE)
def test_never_negative(loss, kw, student, teacher, temperature):
    for dtype, rounding in ((torch.float64, 1e-14), (torch.float32, 2e-6)):
        s, t = torch.tensor([student], dtype=dtype), torch.tensor([teacher], dtype=dtype)
        value, *slopes = with_gradients(loss, s, t, temperature=temperature, **kw)
        assert value.item() >= -rounding * temperature**2
        assert all(slope.isfinite().all() for slope in slopes)


@every
@settings(max_examples=40)
@given(row=ROW, temperature=TEMPERATURE)
def test_zero_with_zero_gradient_where_both_are_equal(loss, kw, row, temperature):
    for dtype, rounding in ((torch.float64, 1e-14), (torch.float32, 1e-6)):
        logits = torch.tensor([row], dtype=dtype)
        value, *slopes = with_gradients(loss, logits, logits, temperature=temperature, **kw)
        assert value.item() == 0
        assert all(slope.abs().max() <= rounding * temperature for slope in slopes)


@pytest.mark.parametrize("v", [1, 2, 3, 8, 17, 1001])
def test_mixtures_are_exactly_zero_at_equality_whatever_the_share(v):
    logits = pair(n=5, v=v, dtype=torch.float32)[0]
    for share in torch.rand(60, generator=torch.Generator().manual_seed(0)).double().tolist():
        share += 1e-9  # no float32: rounding it must not show
        assert not losses.jensen_shannon(logits, logits, beta=share).any()
        assert not losses.skew_forward_kl(logits, logits, alpha=share).any()
        assert not losses.skew_reverse_kl(logits, logits, alpha=share).any()


@settings(max_examples=60)
@given(student=ROW, teacher=ROW, share=st.floats(0.001, 0.999))
def test_bounds(student, teacher, share):
    s, t = torch.tensor([student]).double(), torch.tensor([teacher]).double()
    slack = 1e-12
    assert losses.jensen_shannon(s, t, beta=share).item() <= math.log(2) + slack
    assert losses.skew_forward_kl(s, t, alpha=share).item() <= -math.log(share) + slack
    assert losses.skew_reverse_kl(s, t, alpha=share).item() <= -math.log(share) + slack
    variation = losses.total_variation(s, t).item()
    assert variation <= 1 + slack
    assert losses.sorted_l1(s, t).item() <= 2 * variation + slack  # the best matching, or better
    assert 2 * variation**2 <= losses.forward_kl(s, t).item() + slack  # Pinsker's inequality
    swapped = losses.jensen_shannon(t, s, beta=1 - share)
    torch.testing.assert_close(losses.jensen_shannon(s, t, beta=share), swapped)


# --- wrong arguments --------------------------------------------------------------------------


@every
@pytest.mark.parametrize("temperature", [0, 0.0, -1.0, INF, math.nan])
def test_temperature_must_be_positive(loss, kw, temperature):
    with pytest.raises(ValueError, match="temperature must be positive"):
        loss(*pair(), temperature=temperature, **kw)


@every
@pytest.mark.parametrize(
    ("student", "teacher"),
    [((5,), (5,)), ((2, 3, 5), (2, 3, 5)), ((2, 5), (3, 5)), ((2, 5), (2,)), ((2, 0), (2, 5))],
)
def test_shapes_must_fit(loss, kw, student, teacher):
    with pytest.raises(ValueError, match=r"logits must be \[n, v\]"):
        loss(torch.zeros(student), torch.zeros(teacher), **kw)


@pytest.mark.parametrize(
    ("loss", "name", "value"),
    [
        (losses.jensen_shannon, "beta", -0.1),
        (losses.jensen_shannon, "beta", 1.1),
        (losses.jensen_shannon, "beta", math.nan),
        (losses.skew_forward_kl, "alpha", -1e-9),
        (losses.skew_forward_kl, "alpha", 2),
        (losses.skew_reverse_kl, "alpha", -0.5),
        (losses.skew_reverse_kl, "alpha", INF),
        (losses.adaptive_kl, "mu", 0),
        (losses.adaptive_kl, "mu", 1),
        (losses.adaptive_kl, "mu", math.nan),
        (losses.taid, "t", -0.1),
        (losses.taid, "t", 1.5),
        (losses.ranking, "margin", -0.1),
        (losses.ranking, "margin", math.nan),
    ],
)
def test_shares_must_be_between_zero_and_one(loss, name, value):
    with pytest.raises(ValueError, match=f"{name} must be between 0 and 1.*it is"):
        loss(*pair(), **{name: value})
