"""Losses of attention against loops over Python floats, closed forms and properties."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck import losses
from limbeck.losses import attention

INF = torch.inf
MAPS = [attention.attention_kl, attention.attention_mse]
maps = pytest.mark.parametrize("loss", MAPS, ids=lambda loss: loss.__name__)
SAMPLE = torch.tensor([0, 0, 1, 0, 2, 1, 0])


def scores(n=5, h=3, g=None, t=6, seed=0, dtype=torch.float64):
    """(student, teacher) scores; row i looks at positions 0 .. i."""
    random = torch.Generator().manual_seed(seed)
    hidden = torch.arange(t) > torch.arange(n)[:, None]
    pair = (
        2 * torch.randn(n, heads, t, generator=random, dtype=torch.float64) for heads in (h, g or h)
    )
    return tuple(x.masked_fill(hidden[:, None], -INF).to(dtype) for x in pair)


def vectors(n=7, d=12, w=None, seed=0, dtype=torch.float64):
    random = torch.Generator().manual_seed(seed)
    pair = (torch.randn(n, width, generator=random, dtype=torch.float64) for width in (d, w or d))
    return tuple(x.to(dtype) for x in pair)


# --- references ---------------------------------------------------------------------------------


def softmax(values):
    top = max(values)
    weights = [math.exp(x - top) for x in values]
    return [x / math.fsum(weights) for x in weights]


def kl(p, q):
    return math.fsum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True) if a > 0)


def mean(values):
    return math.fsum(values) / len(values)


def looks(row_s, row_t):
    """The positions that no head of either leaves out."""
    rows = [*row_s, *row_t]
    return [j for j in range(len(rows[0])) if all(row[j] > -math.inf for row in rows)]


def over_heads(rows):
    return [mean(column) for column in zip(*rows, strict=True)]


def attention_kl_of(student, teacher):
    values = []
    for row_s, row_t in zip(student, teacher, strict=True):
        seen = looks(row_s, row_t)
        q, p = ([softmax([head[j] for j in seen]) for head in row] for row in (row_s, row_t))
        if len(p) != len(q):
            p, q = [over_heads(p)], [over_heads(q)]
        values.append(mean([kl(a, b) for a, b in zip(p, q, strict=True)]))
    return values


def attention_mse_of(student, teacher):
    values = []
    for row_s, row_t in zip(student, teacher, strict=True):
        seen = looks(row_s, row_t)
        s, t = ([[head[j] for j in seen] for head in row] for row in (row_s, row_t))
        if len(s) != len(t):
            s, t = [over_heads(s)], [over_heads(t)]
        gaps = [(a - b) ** 2 for x, y in zip(s, t, strict=True) for a, b in zip(x, y, strict=True)]
        values.append(mean(gaps))
    return values


def relation_kl_of(student, teacher, sample, heads):
    def relation(x, i, head):
        size = len(x[0]) // heads
        part = [row[head * size : (head + 1) * size] for row in x]
        before = [j for j in range(i + 1) if sample[j] == sample[i]]
        dots = [sum(a * b for a, b in zip(part[i], part[j], strict=True)) for j in before]
        return softmax([dot / math.sqrt(size) for dot in dots])

    return [
        mean([kl(relation(teacher, i, h), relation(student, i, h)) for h in range(heads)])
        for i in range(len(sample))
    ]


def near(value, expected, tolerance=1e-12):
    expected = torch.as_tensor(expected, dtype=value.dtype)
    return torch.allclose(value, expected, rtol=tolerance, atol=tolerance)


# --- maps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("h", "g"), [(3, 3), (1, 1), (2, 4), (4, 1)])
def test_maps_are_their_definitions(h, g):
    s, t = scores(h=h, g=g)
    for loss, of in ((MAPS[0], attention_kl_of), (MAPS[1], attention_mse_of)):
        value = loss(s, t)
        assert near(value, of(s.tolist(), t.tolist()), 1e-9)
        assert value.max() > 0.1


def test_a_closed_form():
    p, q = torch.tensor([0.7, 0.2, 0.1, 0.0]).log(), torch.tensor([0.5, 0.3, 0.2, 0.0]).log()
    assert attention.attention_kl(q[None, None], p[None, None]).item() == pytest.approx(0.0851228)
    value = attention.attention_mse(q[None, None], p[None, None])
    assert value.item() == pytest.approx(
        (math.log(1.4) ** 2 + math.log(1.5) ** 2 + math.log(2) ** 2) / 3
    )


def test_one_head_is_the_divergence_of_next_tokens():
    """A map is a distribution like any other."""
    s, t = (
        torch.randn(4, 1, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(x))
        for x in (1, 2)
    )
    assert near(attention.attention_kl(s, t), losses.forward_kl(s[:, 0], t[:, 0]))


def test_averaged_maps_are_distributions():
    """Against uniform maps, the KL is log t - H(mean map), which only holds if rows sum to 1."""
    _, t = scores(n=6, t=6, g=4)
    uniform = t[:, :1].masked_fill(t[:, :1] > -INF, 0.0)
    value = attention.attention_kl(uniform, t)
    p = t.softmax(-1).mean(1)
    assert near(p.sum(-1), [1.0] * 6)
    entropy = -torch.special.xlogy(p, p).sum(-1)
    assert near(value, torch.arange(1.0, 7, dtype=torch.float64).log() - entropy)


@maps
def test_a_position_that_one_does_not_see_plays_no_part(loss):
    """A window in one model: both are compared on what both see."""
    s, t = scores(n=6)
    narrow = t.clone()
    narrow[4:, :, 0] = -INF
    value = loss(s, narrow)
    assert near(value[4:], loss(s[4:, :, 1:], t[4:, :, 1:]))
    changed = s.clone()
    changed[4:, :, 0] = 99.0
    assert torch.equal(loss(changed, narrow), value)
    assert near(loss(narrow, s)[4:], loss(t[4:, :, 1:], s[4:, :, 1:]))


@maps
def test_columns_of_padding_change_nothing(loss):
    s, t = scores()
    wider = [torch.cat([x, torch.full((5, 3, 4), -INF, dtype=x.dtype)], -1) for x in (s, t)]
    assert near(loss(*wider), loss(s, t))


@maps
def test_nothing_seen_is_nothing_lost(loss):
    s, t = scores(n=2)
    s[1], t[1] = -INF, -INF
    s.requires_grad_()
    value = loss(s, t)
    value.sum().backward()
    assert value[1] == 0
    assert s.grad.isfinite().all()


def test_the_softmax_does_not_see_an_offset_and_the_scores_do():
    s, t = scores()
    assert near(attention.attention_kl(s + 5, t), attention.attention_kl(s, t))
    assert near(attention.attention_mse(t + 5, t), [25.0] * 5)


def test_heads_are_compared_one_by_one_where_both_have_as_many():
    s, _ = scores(n=6)
    swapped = s.flip(1)
    assert attention.attention_kl(swapped, s)[1:].min() > 1e-3
    again = torch.cat([swapped, swapped], 1)  # six heads: only their mean is compared
    assert near(attention.attention_kl(again, s), [0.0] * 6)
    assert near(attention.attention_mse(again, s), [0.0] * 6)


def test_maps_that_are_certain_stay_finite():
    s, t = scores(n=6, dtype=torch.float32)
    value = attention.attention_kl(200 * s, 200 * t)
    more = attention.attention_kl(200 * s, 200 * torch.cat([t, t], 1))
    assert value.isfinite().all()
    assert more.isfinite().all()
    assert value.max() > 100


# --- relations ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("d", "w", "heads"), [(12, 12, 3), (12, 8, 4), (4, 20, 1), (6, 12, 6)])
def test_relations_are_their_definition(d, w, heads):
    s, t = vectors(d=d, w=w)
    value = attention.relation_kl(s, t, SAMPLE, heads)
    assert near(value, relation_kl_of(s.tolist(), t.tolist(), SAMPLE.tolist(), heads), 1e-9)
    assert (value[[0, 2, 4]] == 0).all()  # the first of each sample
    assert value[[1, 3, 5, 6]].min() > 1e-3


def test_relations_of_heads_are_of_their_own_parts():
    """With one head fewer dimensions meet: the number of heads is not only a scale."""
    s, t = vectors()
    one = attention.relation_kl(s, t, SAMPLE, 1)
    assert not torch.allclose(one, attention.relation_kl(s, t, SAMPLE, 3), rtol=0.01)


def test_relations_do_not_see_a_turned_head():
    s, _ = vectors(d=8)
    random = torch.Generator().manual_seed(5)
    turn = torch.linalg.qr(torch.randn(4, 4, generator=random, dtype=torch.float64)).Q
    turned = (s.view(7, 2, 4) @ turn).reshape(7, 8)
    assert near(attention.relation_kl(turned, s, SAMPLE, 2), [0.0] * 7, 1e-9)
    assert attention.relation_kl(turned, s, SAMPLE, 4).max() > 1e-3


def test_text_that_follows_changes_no_row_before_it():
    s, t = vectors()
    sample = torch.zeros(7, dtype=torch.long)
    before = attention.relation_kl(s, t, sample, 3)
    s[5], t[5] = 9.0, -9.0
    after = attention.relation_kl(s, t, sample, 3)
    assert torch.equal(after[:5], before[:5])
    assert not torch.allclose(after[5:], before[5:])


@settings(max_examples=40)
@given(st.integers(0, 2**32 - 1), st.lists(st.integers(0, 3), min_size=1, max_size=15))
def test_samples_can_be_taken_one_at_a_time(seed, sample):
    index = torch.tensor(sample)
    s, t = vectors(len(sample), 4, 6, seed=seed)
    value = attention.relation_kl(s, t, index, 2)
    assert (value >= -1e-12).all()
    for of in set(sample):
        rows = index == of
        alone = attention.relation_kl(s[rows], t[rows], index[rows], 2)
        assert near(value[rows], alone, 1e-9)


@pytest.mark.parametrize("heads", [0, 5, 24])
def test_heads_that_do_not_divide_are_refused(heads):
    s, t = vectors(d=12, w=18)
    message = f"{heads} heads do not divide the widths 12 .* 18 .*these do: 1, 2, 3, 6"
    with pytest.raises(ValueError, match=message):
        attention.relation_kl(s, t, SAMPLE, heads)


# --- all ----------------------------------------------------------------------------------------


def relations(student, teacher):
    """On the same kind of input as the others."""
    return attention.relation_kl(student.flatten(1), teacher.flatten(1), SAMPLE[: len(student)], 2)


def ready(loss, dtype=torch.float64, seed=0):
    if loss is relations:
        return tuple(x.view(7, 3, 4) for x in vectors(seed=seed, dtype=dtype))
    return scores(seed=seed, dtype=dtype)


every = pytest.mark.parametrize("loss", [*MAPS, relations], ids=lambda loss: loss.__name__)


@every
def test_it_is_nothing_between_equals_and_more_otherwise(loss):
    s, t = ready(loss)
    own = s.clone().requires_grad_()
    value = loss(own, s)
    (gradient,) = torch.autograd.grad(value.sum(), own)
    assert value.abs().max() < 1e-12
    assert gradient.abs().max() < 1e-12
    assert (loss(s, t) >= 0).all()


@every
def test_gradients(loss):
    s, t = ready(loss)
    masked = s == -INF

    def finite(a, b):
        """gradcheck wants finite input; the mask is put on inside."""
        return loss(a.masked_fill(masked, -INF), b.masked_fill(masked, -INF))

    inputs = tuple(x.masked_fill(masked, 0.0).requires_grad_() for x in (s, t))
    assert torch.autograd.gradcheck(finite, inputs)


def test_gradients_where_heads_differ():
    s, t = scores(h=2, g=3, t=5)
    masked = s[:, :1] == -INF
    inputs = tuple(x.masked_fill(masked, 0.0).requires_grad_() for x in (s, t))
    for loss in MAPS:
        assert torch.autograd.gradcheck(
            lambda a, b, loss=loss: loss(a.masked_fill(masked, -INF), b.masked_fill(masked, -INF)),
            inputs,
        )


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(loss, dtype):
    s, t = ready(loss, dtype)
    value = loss(s, t)
    assert value.dtype == torch.float32
    assert torch.equal(value, loss(s.float(), t.float()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(loss(s, t), value)


@every
def test_a_teacher_read_in_inference_mode_can_be_learnt_from(loss):
    s, t = ready(loss)
    with torch.inference_mode():
        t = t.clone()
    s.requires_grad_()
    loss(s, t).sum().backward()
    assert s.grad.isfinite().all()
    assert s.grad.abs().sum() > 0


@every
def test_no_rows_at_all(loss):
    s, t = (x[:0] for x in ready(loss))
    value = loss(s.requires_grad_(), t)
    assert value.shape == (0,)
    value.sum().backward()


def test_shapes_that_do_not_fit():
    s, t = scores()
    for loss in MAPS:
        for other in (t[:4], t[..., :5], t[:, 0], t[:, :0]):
            with pytest.raises(ValueError, match=r"it is \[5, 3, 6\] \(student\)"):
                loss(s, other)
    with pytest.raises(ValueError, match="of the same rows"):
        attention.relation_kl(torch.ones(3, 4), torch.ones(2, 4), torch.zeros(3), 2)
