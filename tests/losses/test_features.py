"""Losses between hidden states against loops over Python floats, closed forms and properties."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.losses import features
from limbeck.losses.blocks import Blocks

SAMPLE = torch.tensor([0, 0, 1, 0, 2, 1, 0])  # not sorted, and one sample of a single row
SAME_WIDTH = [features.hidden_mse, features.hidden_cosine, features.hidden_correlation]


def by_sample(student, teacher):
    return features.similarity(student, teacher, SAMPLE[: len(student)])


EVERY = [*SAME_WIDTH, by_sample, features.cka_loss]
every = pytest.mark.parametrize("loss", EVERY, ids=lambda loss: loss.__name__)


def pair(n=7, d=5, w=None, seed=0, dtype=torch.float64):
    random = torch.Generator().manual_seed(seed)
    student = torch.randn(n, d, generator=random, dtype=torch.float64)
    teacher = torch.randn(n, w or d, generator=random, dtype=torch.float64)
    return student.to(dtype), teacher.to(dtype)


def rotation(d, seed=1):
    random = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(d, d, generator=random, dtype=torch.float64)).Q


# --- references: lists in, a list out -----------------------------------------------------------


def dot(a, b):
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def cosine(a, b):
    return dot(a, b) / math.sqrt(dot(a, a) * dot(b, b))


def pearson(a, b):
    a, b = ([x - math.fsum(v) / len(v) for x in v] for v in (a, b))
    return cosine(a, b)


def mse_of(s, t):
    return [
        math.fsum((x - y) ** 2 for x, y in zip(a, b, strict=True)) / len(a)
        for a, b in zip(s, t, strict=True)
    ]


def similarity_of(s, t, sample):
    values = []
    for i, of in enumerate(sample):
        others = [j for j, other in enumerate(sample) if other == of and j != i]
        gaps = [(cosine(s[i], s[j]) - cosine(t[i], t[j])) ** 2 for j in others]
        values.append(math.fsum(gaps) / len(gaps) if gaps else 0.0)
    return values


def gram(x):
    return [[dot(a, b) for b in x] for a in x]


def debiased_hsic_of(x, y):
    """The definition: zero diagonals, three sums over all pairs and triples of rows."""
    n, k, m = len(x), gram(x), gram(y)
    for i in range(n):
        k[i][i] = m[i][i] = 0.0
    trace = math.fsum(k[i][j] * m[j][i] for i in range(n) for j in range(n))
    total = math.fsum(map(math.fsum, k)) * math.fsum(map(math.fsum, m))
    chain = math.fsum(k[i][j] * m[j][q] for i in range(n) for j in range(n) for q in range(n))
    return (trace + total / ((n - 1) * (n - 2)) - 2 * chain / (n - 2)) / (n * (n - 3))


def biased_hsic_of(x, y):
    """trace(K H L H) / (n - 1)^2."""
    n = len(x)

    def centred(k):
        rows = [math.fsum(r) / n for r in k]
        mean = math.fsum(rows) / n
        return [[k[i][j] - rows[i] - rows[j] + mean for j in range(n)] for i in range(n)]

    k, m = centred(gram(x)), centred(gram(y))
    return math.fsum(k[i][j] * m[j][i] for i in range(n) for j in range(n)) / (n - 1) ** 2


def near(value, expected, tolerance=1e-12):
    expected = torch.as_tensor(expected, dtype=value.dtype)
    return torch.allclose(value, expected, rtol=tolerance, atol=tolerance)


# --- values -------------------------------------------------------------------------------------


def test_mse_is_its_definition():
    s, t = pair()
    assert near(features.hidden_mse(s, t), mse_of(s.tolist(), t.tolist()))


def test_cosine_is_its_definition():
    s, t = pair()
    expected = [1 - cosine(a, b) for a, b in zip(s.tolist(), t.tolist(), strict=True)]
    assert near(features.hidden_cosine(s, t), expected)


def test_correlation_has_the_mean_of_pearsons():
    s, t = pair()
    values = features.hidden_correlation(s, t)
    expected = [pearson(a, b) for a, b in zip(s.T.tolist(), t.T.tolist(), strict=True)]
    assert values.shape == (7,)
    assert near(values.mean(), 1 - math.fsum(expected) / len(expected))


def test_each_row_has_its_own_part_in_the_correlation():
    s, t = pair(n=3, d=1)
    a, b = ((x - x.mean()) / (x - x.mean()).norm() for x in (s[:, 0], t[:, 0]))
    assert near(features.hidden_correlation(s, t), 1 - 3 * a * b)


def test_similarity_is_its_definition():
    s, t = pair(w=9)
    expected = similarity_of(s.tolist(), t.tolist(), SAMPLE.tolist())
    value = features.similarity(s, t, SAMPLE)
    assert near(value, expected)
    assert value[4] == 0  # alone in its sample
    assert value[0] > 0.01


@pytest.mark.parametrize(("n", "d", "w"), [(4, 2, 3), (9, 2, 3), (5, 12, 8), (6, 30, 2)])
def test_hsic_and_cka_are_their_definitions(n, d, w):
    """The shapes reach both ways of computing: through widths, and through rows."""
    s, t = pair(n, d, w)
    s, t = s + 3, t - 1  # columns that are not centred
    x, y = s.tolist(), t.tolist()
    for debiased, of in ((True, debiased_hsic_of), (False, biased_hsic_of)):
        assert near(features.hsic(s, t, debiased=debiased), of(x, y), 1e-9)
        expected = of(x, y) / math.sqrt(of(x, x) * of(y, y))
        assert near(features.linear_cka(s, t, debiased=debiased), expected, 1e-9)
    assert near(features.cka_loss(s, t), [1 - features.linear_cka(s, t)] * n)


def test_two_grams_make_the_debiased_hsic():
    s, t = pair(8, 3, 6)
    a, b = features.unbiased_gram(s + 2), features.unbiased_gram(t)
    assert near((a * b).sum() / (8 * 5), features.hsic(s, t))
    assert near(a.sum(0), [0.0] * 8)
    assert a.diagonal().abs().max() == 0


@pytest.mark.parametrize(("n", "biased"), [(16, 0.85), (64, 0.57), (256, 0.25), (4096, 0.02)])
def test_the_bias_of_unrelated_features(n, biased):
    """The figures of the research notes, random 64-d beside 128-d; debiased there is none."""
    many = max(4, 640 // n)
    draws = [pair(n, 64, 128, seed=seed) for seed in range(many)]
    found = [sum(features.linear_cka(*x, debiased=d) for x in draws) / many for d in (False, True)]
    assert found[0].item() == pytest.approx(biased, abs=0.02)
    assert abs(found[1].item()) < 0.03


# --- invariances --------------------------------------------------------------------------------


@every
def test_it_is_nothing_between_equals(loss):
    s, _ = pair()
    s.requires_grad_()
    value = loss(s, s.detach())
    assert value.mean().item() == pytest.approx(0, abs=1e-12)
    (gradient,) = torch.autograd.grad(value.mean(), s)
    assert gradient.abs().max() < 1e-12


@pytest.mark.parametrize("loss", [by_sample, features.cka_loss])
def test_spaces_may_be_turned_and_scaled(loss):
    s, t = pair(w=8)
    turned = 3 * t @ rotation(8)
    assert near(loss(s, turned), loss(s, t), 1e-9)
    assert near(loss(turned, t), torch.zeros(7), 1e-9)


def test_cka_does_not_see_where_a_space_begins():
    s, t = pair(w=8)
    assert near(features.linear_cka(s + 100, t), features.linear_cka(s, t), 1e-9)
    assert near(features.linear_cka(t @ rotation(8) - 7, t), 1.0, 1e-9)


def test_correlation_does_not_see_scale_and_offset_but_sign():
    s, t = pair()
    scale = torch.tensor([1.0, 2.0, 0.1, 5.0, 3.0], dtype=torch.float64)
    same = features.hidden_correlation(s * scale + 4, t)
    assert near(same, features.hidden_correlation(s, t), 1e-9)
    assert near(features.hidden_correlation(-s, s).mean(), 2.0)


def test_cosine_does_not_see_length():
    s, t = pair()
    assert near(features.hidden_cosine(5 * s, 0.1 * t), features.hidden_cosine(s, t))


@settings(max_examples=40)
@given(st.integers(0, 2**32 - 1), st.integers(2, 12))
def test_the_order_of_rows_changes_nothing(seed, n):
    s, t = pair(n, 4, seed=seed)
    random = torch.Generator().manual_seed(seed)
    sample = torch.randint(3, (n,), generator=random)
    order = torch.randperm(n, generator=random)
    for loss in [*SAME_WIDTH, features.cka_loss]:
        assert near(loss(s[order], t[order]), loss(s, t)[order], 1e-8)
    moved = features.similarity(s[order], t[order], sample[order])
    assert near(moved, features.similarity(s, t, sample)[order], 1e-8)


def test_samples_do_not_meet():
    s, t = pair()
    before = features.similarity(s, t, SAMPLE)
    s[SAMPLE == 0] += 10
    after = features.similarity(s, t, SAMPLE)
    assert torch.equal(after[SAMPLE != 0], before[SAMPLE != 0])
    assert not torch.allclose(after[SAMPLE == 0], before[SAMPLE == 0])


@settings(max_examples=60)
@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.floats(-30, 30))
def test_ranges(seed, n, power):
    s, t = pair(n, 3, seed=seed)
    s = s * 2.0**power
    sample = torch.arange(n) // 2
    assert (features.hidden_mse(s, t) >= 0).all()
    assert (
        (features.hidden_cosine(s, t) > -1e-9) & (features.hidden_cosine(s, t) < 2 + 1e-9)
    ).all()
    assert -1e-9 < features.hidden_correlation(s, t).mean() < 2 + 1e-9
    value = features.similarity(s, t, sample)
    assert ((value >= 0) & (value < 4 + 1e-9)).all()
    value = features.cka_loss(s, t)
    assert ((value > -1e-9) & (value < 2 + 1e-9)).all()


# --- gradients ----------------------------------------------------------------------------------


@every
def test_gradients(loss):
    s, t = (x.requires_grad_() for x in pair())
    assert torch.autograd.gradcheck(loss, (s, t))


@pytest.mark.parametrize("shape", [(5, 12, 8), (12, 3, 2)])
def test_gradients_of_cka_both_ways(shape):
    s, t = (x.requires_grad_() for x in pair(*shape))
    assert torch.autograd.gradcheck(features.linear_cka, (s, t))
    assert torch.autograd.gradcheck(lambda a, b: features.linear_cka(a, b, debiased=False), (s, t))


@every
def test_a_teacher_read_in_inference_mode_can_be_learnt_from(loss):
    s, t = pair()
    with torch.inference_mode():
        t = t.clone()
    loss(s.requires_grad_(), t).sum().backward()
    assert s.grad is not None
    assert s.grad.abs().sum() > 0


# --- degenerate input ---------------------------------------------------------------------------


@every
@pytest.mark.parametrize("constant", ["student", "teacher", "both"])
@pytest.mark.parametrize("value", [0.0, 0.1, 1e4])
def test_units_that_never_vary_are_no_trouble(loss, constant, value):
    for dtype in (torch.float32, torch.float64):
        s, t = pair(dtype=dtype)
        s[:, :] = value if constant in ("student", "both") else s
        t[:, :] = value if constant in ("teacher", "both") else t
        s.requires_grad_()
        result = loss(s, t)
        result.sum().backward()
        assert result.isfinite().all()
        assert s.grad.isfinite().all()


@pytest.mark.parametrize("value", [0.0, 0.1, 1234.5678])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_constant_unit_correlates_with_nothing(value, dtype):
    """Rounding leaves a constant less its mean near 0, and must not be blown up to length 1."""
    s, t = pair(n=1000, d=2, dtype=dtype)
    t[:, 0] = s[:, 0]
    t[:, 1] = value
    assert near(features.hidden_correlation(s, t).mean(), 0.5, 1e-5)
    s[:, 1] = value
    assert near(features.hidden_correlation(s, t).mean(), 0.5, 1e-5)
    assert near(features.linear_cka(s[:, 1:], t), 0.0)
    assert near(features.linear_cka(s[:, 1:], t[:, 1:]), 0.0)


def test_one_row_that_stands_out_has_no_debiased_estimate():
    """The debiased HSIC of such features with themselves is exactly 0."""
    for dtype in (torch.float32, torch.float64):
        s, t = pair(n=50, dtype=dtype)
        s = torch.zeros_like(s)
        s[3] = 7.0
        s.requires_grad_()
        value = features.linear_cka(s, t)
        value.backward()
        assert value == 0
        assert (s.grad == 0).all()


@pytest.mark.parametrize("n", [0, 1, 2, 3])
def test_few_rows_give_no_cka_and_no_gradient(n):
    s, t = pair(n)
    s.requires_grad_()
    value = features.cka_loss(s, t)
    value.sum().backward()
    assert torch.equal(value, torch.zeros(n, dtype=torch.float64))
    assert s.grad.abs().sum() == 0
    with pytest.raises(ValueError, match=f"{n} rows are too few; at least 4"):
        features.linear_cka(s, t)
    with pytest.raises(ValueError, match=f"{n} rows are too few"):
        features.unbiased_gram(t)


@every
def test_no_rows_at_all(loss):
    s, t = pair(0)
    value = loss(s.requires_grad_(), t)
    assert value.shape == (0,)
    value.sum().backward()


@pytest.mark.parametrize("size", [1e-12, 1e8, 1e12])
def test_cka_of_small_and_of_large_features(size):
    s, t = pair(n=40, dtype=torch.float32)
    value = features.linear_cka(s * size, t)
    assert value.item() == pytest.approx(features.linear_cka(s, t).item(), abs=1e-4)


# --- types and shapes ---------------------------------------------------------------------------


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(loss, dtype):
    s, t = pair(dtype=dtype)
    value = loss(s, t)
    assert value.dtype == torch.float32
    assert near(value, loss(s.float(), t.float()), 0.0)
    assert loss(s.double(), t).dtype == torch.float64


@every
def test_autocast_changes_nothing(loss):
    s, t = pair(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = loss(s, t)
    assert torch.equal(inside, loss(s, t))


def test_shapes_that_do_not_fit():
    s, t = pair(w=6)
    for loss in SAME_WIDTH:
        with pytest.raises(ValueError, match=r"\[7, 5\] \(student\) and \[7, 6\] \(teacher\)"):
            loss(s, t)
    for loss in (by_sample, features.cka_loss, features.linear_cka, features.hsic):
        with pytest.raises(ValueError, match=r"of the same rows; they are \[7, 5\]"):
            loss(s, t[:6])


@settings(max_examples=60)
@given(st.lists(st.integers(0, 4), max_size=20))
def test_blocks_hold_each_row_once_and_in_order(sample):
    index = torch.tensor(sample, dtype=torch.long)
    blocks = Blocks.of(index)
    values = torch.arange(1.0, len(sample) + 1)
    laid = blocks.scatter(values)
    assert torch.equal(blocks.gather(laid), values)
    assert (laid > 0).sum() == len(sample)
    for line, of in zip(laid, sorted(set(sample)), strict=True):
        assert line[line > 0].tolist() == values[index == of].tolist()
