"""Divergences against the papers' formulas, written here as loops over Python floats."""

import math

import pytest
import torch

from limbeck import losses

P, Q = (0.7, 0.2, 0.1), (0.5, 0.3, 0.2)  # teacher, student: the design's contract values
INF = torch.inf


# --- references: lists of probabilities in, a float out ---------------------------------------


def softmax(logits, temperature=1.0):
    top = max(logits)
    weights = [math.exp((x - top) / temperature) for x in logits]
    return [w / math.fsum(weights) for w in weights]


def kl(p, q):
    return math.fsum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True) if a > 0)


def mix(p, q, share):
    return [share * a + (1 - share) * b for a, b in zip(p, q, strict=True)]


def js(p, q, beta):
    m = mix(p, q, beta)
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


def gaps(p, q, mu):
    """Head and tail gap: take the likeliest tokens one by one until their mass reaches mu."""
    left, mass, head = sorted(range(len(p)), key=lambda i: -p[i]), 0.0, 0.0
    while left and mass < mu:
        i = left.pop(0)
        mass += p[i]
        head += abs(p[i] - q[i])
    return head, sum(abs(p[i] - q[i]) for i in left)


def akl(p, q, mu):
    head, tail = gaps(p, q, mu)
    w = head / (head + tail) if head + tail else 0.5
    return w * kl(p, q) + (1 - w) * kl(q, p)


REFERENCES = [
    (losses.forward_kl, {}, kl),
    (losses.reverse_kl, {}, lambda p, q: kl(q, p)),
    (losses.jensen_shannon, {"beta": 0.5}, lambda p, q: js(p, q, 0.5)),
    (losses.jensen_shannon, {"beta": 0.1}, lambda p, q: js(p, q, 0.1)),
    (losses.jensen_shannon, {"beta": 0.85}, lambda p, q: js(p, q, 0.85)),
    (losses.skew_forward_kl, {}, lambda p, q: kl(p, mix(p, q, 0.1))),
    (losses.skew_forward_kl, {"alpha": 0.7}, lambda p, q: kl(p, mix(p, q, 0.7))),
    (losses.skew_reverse_kl, {}, lambda p, q: kl(q, mix(q, p, 0.1))),
    (losses.skew_reverse_kl, {"alpha": 0.7}, lambda p, q: kl(q, mix(q, p, 0.7))),
    (
        losses.total_variation,
        {},
        lambda p, q: sum(abs(a - b) for a, b in zip(p, q, strict=True)) / 2,
    ),
    (losses.adaptive_kl, {}, lambda p, q: akl(p, q, 0.5)),
    (losses.adaptive_kl, {"mu": 0.8}, lambda p, q: akl(p, q, 0.8)),
]
IDS = [f"{loss.__name__}-{'-'.join(map(str, kw.values()))}" for loss, kw, _ in REFERENCES]


def logits(*rows):
    return torch.tensor(rows, dtype=torch.float64).log()


def pair(n=6, v=9, seed=0, spread=2.0):
    """(student, teacher) logits in float64."""
    random = torch.Generator().manual_seed(seed)
    return spread * torch.randn(2, n, v, generator=random, dtype=torch.float64)


def gradient(loss, student, teacher, **settings):
    student = student.clone().requires_grad_()
    loss(student, teacher, **settings).sum().backward()
    return student.grad


# --- values -----------------------------------------------------------------------------------

CONTRACT = [
    (losses.forward_kl, {}, 0.0851228),
    (losses.reverse_kl, {}, 0.0920329),
    (losses.jensen_shannon, {}, 0.0219012),
    (losses.jensen_shannon, {"beta": 0.5}, 0.0219012),
    (losses.jensen_shannon, {"beta": 0.1}, 0.0076947),
    (losses.jensen_shannon, {"beta": 0.9}, 0.0081848),
    (losses.skew_forward_kl, {}, 0.0695780),
    (losses.skew_forward_kl, {"alpha": 0.1}, 0.0695780),
    (losses.skew_reverse_kl, {}, 0.0728275),
    (losses.skew_reverse_kl, {"alpha": 0.1}, 0.0728275),
    (losses.total_variation, {}, 0.2),
]


@pytest.mark.parametrize(("loss", "settings", "value"), CONTRACT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_contract_values(loss, settings, value, dtype):
    got = loss(logits(Q).to(dtype), logits(P).to(dtype), **settings)
    assert got.item() == pytest.approx(value, abs=1e-7 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize(("loss", "settings", "reference"), REFERENCES, ids=IDS)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_equals_the_papers_formula(loss, settings, reference, temperature):
    student, teacher = pair()
    want = torch.tensor(
        [
            reference(softmax(t, temperature), softmax(s, temperature))
            for s, t in zip(student.tolist(), teacher.tolist(), strict=True)
        ],
        dtype=torch.float64,
    )
    plain = loss(student, teacher, temperature=temperature, scale_by_t2=False, **settings)
    torch.testing.assert_close(plain, want, rtol=1e-10, atol=1e-12)
    scaled = loss(student, teacher, temperature=temperature, **settings)
    torch.testing.assert_close(scaled, want * temperature**2, rtol=1e-10, atol=1e-12)


def test_a_swapped_beta_would_show():
    student, teacher = logits(Q), logits(P)
    low = losses.jensen_shannon(student, teacher, beta=0.1)
    high = losses.jensen_shannon(student, teacher, beta=0.9)
    assert (low - high).abs().item() > 4e-4
    torch.testing.assert_close(low, losses.jensen_shannon(teacher, student, beta=0.9))


def test_cross_entropy_less_kl_is_the_teachers_entropy():
    student, teacher = pair()
    p = teacher.softmax(-1)
    soft_cross_entropy = -(p * student.log_softmax(-1)).sum(-1)
    entropy = -(p * p.log()).sum(-1)
    torch.testing.assert_close(soft_cross_entropy - losses.forward_kl(student, teacher), entropy)
    entropy_of_p = -sum(x * math.log(x) for x in P)
    assert entropy_of_p == pytest.approx(0.8018186, abs=1e-7)


# --- gradients --------------------------------------------------------------------------------


# The weight of adaptive_kl is a constant to the gradient, so finite differences cannot agree there.
SMOOTH = [(loss, settings) for loss, settings, _ in REFERENCES if loss is not losses.adaptive_kl]


@pytest.mark.parametrize(("loss", "settings"), SMOOTH)
def test_gradients_of_both_arguments_agree_with_finite_differences(loss, settings):
    student, teacher = pair(n=3, v=5, seed=1)
    student, teacher = student.requires_grad_(), teacher.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda s, t: loss(s, t, temperature=1.5, **settings), (student, teacher)
    )


def test_closed_form_gradients():
    student, teacher = pair()
    q, p, a = student.softmax(-1), teacher.softmax(-1), 0.1
    torch.testing.assert_close(gradient(losses.forward_kl, student, teacher), q - p)

    r = (q / p).log()
    want = q * (r - (q * r).sum(-1, keepdim=True))
    torch.testing.assert_close(gradient(losses.reverse_kl, student, teacher), want)

    w = (1 - a) * p / (a * p + (1 - a) * q)
    want = q * ((q * w).sum(-1, keepdim=True) - w)
    torch.testing.assert_close(gradient(losses.skew_forward_kl, student, teacher, alpha=a), want)

    m = a * q + (1 - a) * p  # d/dq of q log(q/m) is log(q/m) + 1 - a q/m: the last is the mixture's
    f = (q / m).log() - a * q / m
    want = q * (f - (q * f).sum(-1, keepdim=True))
    got = gradient(losses.skew_reverse_kl, student, teacher, alpha=a)
    torch.testing.assert_close(got, want)
    f = (q / m).log()  # what it would be if the mixture were detached
    detached = q * (f - (q * f).sum(-1, keepdim=True))
    assert (got - detached).norm() > 0.05 * got.norm()

    m = 0.3 * p + 0.7 * q
    f = 0.7 * (q / m).log()
    want = q * (f - (q * f).sum(-1, keepdim=True))
    torch.testing.assert_close(gradient(losses.jensen_shannon, student, teacher, beta=0.3), want)

    f = (q - p).sign() / 2
    want = q * (f - (q * f).sum(-1, keepdim=True))
    torch.testing.assert_close(gradient(losses.total_variation, student, teacher), want)


@pytest.mark.parametrize(("loss", "settings", "reference"), REFERENCES, ids=IDS)
def test_gradients_sum_to_zero_over_the_vocabulary(loss, settings, reference):
    del reference
    student, teacher = pair(seed=2)
    total = gradient(loss, student, teacher, temperature=1.7, **settings).sum(-1)
    torch.testing.assert_close(total, torch.zeros_like(total), atol=1e-13, rtol=0)


def test_a_tie_at_one_token_does_not_bend_the_mixtures_gradient():
    student, teacher = logits((0.5, 0.3, 0.2)), logits((0.5, 0.2, 0.3))
    q, p = student.exp(), teacher.exp()
    f = 0.7 * (q / (0.3 * p + 0.7 * q)).log()
    want = q * (f - (q * f).sum(-1, keepdim=True))
    torch.testing.assert_close(gradient(losses.jensen_shannon, student, teacher, beta=0.3), want)


# --- limits -----------------------------------------------------------------------------------


@pytest.mark.parametrize("end", [0, 0.0, 1, 1.0])
def test_jensen_shannon_is_zero_at_both_ends_even_on_disjoint_supports(end):
    student, teacher = pair(n=3, v=4)
    student[0, 1:], teacher[0, :3] = -INF, -INF
    got = losses.jensen_shannon(student, teacher, beta=end)
    assert torch.equal(got, torch.zeros(3, dtype=torch.float64))
    assert torch.equal(
        gradient(losses.jensen_shannon, student, teacher, beta=end), torch.zeros(3, 4).double()
    )
    near = losses.jensen_shannon(student, teacher, beta=abs(end - 1e-9))
    torch.testing.assert_close(near, got, atol=1e-7, rtol=0)


def test_jensen_shannon_over_beta_tends_to_the_kls():
    student, teacher, b = *pair(), 1e-7
    forward, reverse = losses.forward_kl(student, teacher), losses.reverse_kl(student, teacher)
    low = losses.jensen_shannon(student, teacher, beta=b)
    high = losses.jensen_shannon(student, teacher, beta=1 - b)
    torch.testing.assert_close(low / b, forward, rtol=1e-4, atol=0)
    torch.testing.assert_close(high / b, reverse, rtol=1e-4, atol=0)


def test_skew_ends():
    student, teacher = pair()
    for skew, plain in (
        (losses.skew_forward_kl, losses.forward_kl),
        (losses.skew_reverse_kl, losses.reverse_kl),
    ):
        want, slope = plain(student, teacher), gradient(plain, student, teacher)
        assert torch.equal(skew(student, teacher, alpha=0.0), want)
        torch.testing.assert_close(skew(student, teacher, alpha=1e-9), want, rtol=1e-5, atol=0)
        got = gradient(skew, student, teacher, alpha=1e-9)
        torch.testing.assert_close(got, slope, rtol=1e-4, atol=1e-8)
        assert torch.equal(skew(student, teacher, alpha=1.0), torch.zeros(6).double())
        assert torch.equal(gradient(skew, student, teacher, alpha=1.0), torch.zeros(6, 9).double())
        near = skew(student, teacher, alpha=1 - 1e-9)
        torch.testing.assert_close(near, torch.zeros(6).double(), atol=1e-8, rtol=0)


def test_disjoint_supports_reach_the_bounds():
    student = torch.tensor([[0.0, 1.0, -INF, -INF]])
    teacher = torch.tensor([[-INF, -INF, 0.5, 0.0]])
    bound = -math.log(0.1)
    assert losses.skew_forward_kl(student, teacher).item() == pytest.approx(bound)
    assert losses.skew_reverse_kl(student, teacher).item() == pytest.approx(bound)
    assert losses.jensen_shannon(student, teacher).item() == pytest.approx(math.log(2))
    assert losses.total_variation(student, teacher).item() == pytest.approx(1)
    assert losses.forward_kl(student, teacher).item() == INF
    assert losses.reverse_kl(student, teacher).item() == INF


def test_a_small_alpha_stays_exact_where_one_side_is_all_but_zero():
    student, teacher = torch.tensor([[0.0, -60.0]]), torch.tensor([[-60.0, 0.0]])
    for alpha in (0.1, 1e-3, 1e-6, 1e-12):
        want = -math.log(alpha)  # far larger than q / p = e^-60
        assert losses.skew_forward_kl(student, teacher, alpha=alpha).item() == pytest.approx(want)
        assert losses.skew_reverse_kl(student, teacher, alpha=alpha).item() == pytest.approx(want)


@pytest.mark.parametrize(("temperature", "error"), [(100.0, 0.02), (1000.0, 0.002)])
def test_high_temperature_compares_centred_logits(temperature, error):
    student, teacher = pair(n=4, v=7, spread=1.0)
    difference = student - teacher
    centred = difference - difference.mean(-1, keepdim=True)
    for loss in (losses.forward_kl, losses.reverse_kl):
        got = loss(student, teacher, temperature=temperature)
        torch.testing.assert_close(got, centred.square().sum(-1) / 14, rtol=0, atol=error)
        slope = gradient(loss, student, teacher, temperature=temperature)
        torch.testing.assert_close(slope, centred / 7, rtol=0, atol=error)


def test_forward_covers_both_modes_and_reverse_picks_one():
    places = torch.arange(41, dtype=torch.float64)
    teacher = ((-((places - 10) ** 2) / 18).exp() + 0.8 * (-((places - 30) ** 2) / 18).exp()).log()

    def best(loss):
        """Grid search over discretised Gaussians: (centre, width) of the closest."""
        shapes = [(c / 2, w) for c in range(81) for w in (2.0, 3.0, 5.0, 8.0, 10.0, 14.0)]
        family = torch.stack([-((places - c) ** 2) / (2 * w * w) for c, w in shapes])
        return shapes[int(loss(family, teacher.expand_as(family)).argmin())]

    centre, width = best(losses.forward_kl)
    assert 15 < centre < 22
    assert width >= 8
    assert best(losses.reverse_kl) == (10.0, 3.0)


# --- adaptive KL ------------------------------------------------------------------------------


def test_adaptive_head_includes_the_crossing_token():
    p, q = (0.45, 0.3, 0.25), (0.3, 0.4, 0.3)
    assert gaps(p, q, 0.5) == pytest.approx((0.25, 0.05))
    w = 0.25 / 0.3  # a head without the crossing token would give gaps (.15, .15) and w = 1/2
    want = w * kl(p, q) + (1 - w) * kl(q, p)
    for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0]):  # gaps follow the sort, in any vocabulary order
        got = losses.adaptive_kl(logits(q)[:, order], logits(p)[:, order])
        assert got.item() == pytest.approx(want, abs=1e-12)
    other = kl(p, q) / 2 + kl(q, p) / 2
    assert abs(want - other) > 5e-4


def test_adaptive_head_stops_once_it_reaches_mu():
    # The first token has mass .5 already; among equal tokens, the lower id comes first.
    q = (0.4, 0.3, 0.2, 0.1)
    for p in ((0.5, 0.25, 0.125, 0.125), (0.25,) * 4):
        got = losses.adaptive_kl(logits(q), logits(p))
        assert got.item() == pytest.approx(akl(p, q, 0.5), abs=1e-12)
    student = pair(n=1, v=256)[0]
    got = losses.adaptive_kl(student, torch.zeros(1, 256, dtype=torch.float64))
    want = akl([1 / 256] * 256, softmax(student[0].tolist()), 0.5)
    assert got.item() == pytest.approx(want, abs=1e-12)


def test_adaptive_weight_is_constant_to_the_gradient():
    student, teacher = pair(n=4)
    for i, (s, t) in enumerate(zip(student.tolist(), teacher.tolist(), strict=True)):
        head, tail = gaps(softmax(t), softmax(s), 0.5)
        w = head / (head + tail)
        forward = gradient(losses.forward_kl, student, teacher)[i]
        reverse = gradient(losses.reverse_kl, student, teacher)[i]
        got = gradient(losses.adaptive_kl, student, teacher)[i]
        torch.testing.assert_close(got, w * forward + (1 - w) * reverse)


def test_adaptive_leaves_out_an_infinite_divergence_of_no_weight():
    # Head gap 0, so w = 0; the forward KL is infinite, for the student rules out the last token.
    student, teacher = logits((0.6, 0.4, 0.0)), logits((0.6, 0.3, 0.1))
    assert losses.forward_kl(student, teacher).item() == INF
    got = losses.adaptive_kl(student, teacher)
    assert got.item() == pytest.approx(0.4 * math.log(0.4 / 0.3), abs=1e-12)
    assert gradient(losses.adaptive_kl, student, teacher).isfinite().all()


def test_adaptive_with_all_of_the_mass_in_the_head():
    student, teacher = pair(n=4)
    got = losses.adaptive_kl(student, teacher, mu=1 - 1e-15)
    torch.testing.assert_close(got, losses.forward_kl(student, teacher))
