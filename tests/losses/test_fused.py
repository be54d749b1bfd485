"""The fused sum of losses against whole logits in float64, and its promises."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck import losses
from limbeck.losses import chunks, fused, pages
from limbeck.losses.fused import (
    divergence_term,
    fused_linear_divergence,
    fused_linear_sparse_kl,
    label_term,
    named,
    sum_over_rows,
)
from limbeck.losses.projection import Projection
from limbeck.losses.sparse import Sparse

DIVERGENCES = {
    "forward_kl": {},
    "reverse_kl": {},
    "jensen_shannon": {"beta": 0.3},
    "skew_forward_kl": {"alpha": 0.1},
    "skew_reverse_kl": {"alpha": 0.1},
    "total_variation": {},
    "adaptive_kl": {"mu": 0.5},
    "alpha_beta": {"alpha": 0.3, "beta": 0.9},
    "taid": {"t": 0.4},
    "ranking": {"k": 5, "margin": 0.7},
    "logit_mse": {},
    "sorted_l1": {},
}
COMPILES = pytest.mark.skipif(fused.why_not("compiled") is not None, reason="torch before 2.12")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def case(n=37, v=301, w=301, ds=16, dt=24, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, scale=1.0):
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

    hidden, weight = draw(n, ds), draw(v, ds, scale=0.4)
    teacher_hidden, teacher_weight = draw(n, dt), draw(w, dt, scale=0.4)
    return hidden.requires_grad_(), weight.requires_grad_(), teacher_hidden, teacher_weight


def reference(name, tensors, weight, *, temperature=1.0, soft_cap=None, **own):
    """Whole logits in float64: value and the gradients to hidden states and head."""
    h, w, th, tw = (t.detach().double() for t in tensors)
    h.requires_grad_(), w.requires_grad_()
    student, teacher = h @ w.T, th @ tw.T
    if soft_cap:
        student = soft_cap * torch.tanh(student / soft_cap)
        teacher = soft_cap * torch.tanh(teacher / soft_cap)
    rows = getattr(losses, name)(student, teacher, temperature=temperature, **own)
    total = (rows * weight.double()).sum()
    return total.detach(), *torch.autograd.grad(total, (h, w))


def found(tensors, weight, **settings):
    total = fused_linear_divergence(*tensors, row_weight=weight, **settings)
    return total.detach(), *torch.autograd.grad(total, tensors[:2])


def weights(n, seed=1, zeros=True):
    drawn = torch.rand(n, generator=torch.Generator().manual_seed(seed))
    return drawn * (drawn > 0.3) if zeros else drawn


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_value_and_gradients_are_those_of_whole_logits(name, temperature):
    tensors, weight = case(), weights(37)
    own = DIVERGENCES[name]
    expected = reference(name, tensors, weight, temperature=temperature, **own)
    got = found(tensors, weight, divergence=name, temperature=temperature, chunk=10, **own)
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_definition_by_automatic_differentiation_is_the_kernel(name, monkeypatch):
    """Every loss also works without its kernel, as those do that have none."""
    tensors, weight = case(), weights(37)
    loss = getattr(losses, name)
    with_kernel = found(tensors, weight, divergence=loss, **DIVERGENCES[name])
    monkeypatch.setattr(chunks.kernels, "KERNELS", {})
    without = found(tensors, weight, divergence=loss, **DIVERGENCES[name])
    for mine, theirs in zip(with_kernel, without, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)


def error(got, expected):
    return [
        float((mine.double() - theirs).norm() / theirs.norm())
        for mine, theirs in zip(got, expected, strict=True)
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", DIVERGENCES)
def test_no_less_accurate_than_whole_logits_in_the_same_precision(name, dtype):
    """Relative error of value, hidden gradient and head gradient, over ten draws."""
    mine, naive = torch.zeros(3), torch.zeros(3)
    for seed in range(10):
        n = 20 + 7 * seed
        h, w, th, tw = case(n=n, v=1000, w=1000, seed=seed, dtype=dtype)
        # As under autocast: hidden states in half precision, the trained head in float32.
        tensors = (h, w.detach().float().requires_grad_(), th, tw)
        weight = weights(n, seed) / n
        own = DIVERGENCES[name]
        expected = reference(name, tensors, weight, temperature=1.5, **own)
        for into, implementation in ((mine, "chunked"), (naive, "naive")):
            got = found(
                tensors,
                weight,
                divergence=name,
                temperature=1.5,
                implementation=implementation,
                chunk=16,
                **own,
            )
            into += torch.tensor(error(got, expected))
    # A tenth for the luck of rounding; in bfloat16 the logits themselves are rounded alike.
    floor = 30 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    assert (mine <= 1.1 * naive + floor).all(), (mine, naive)


@settings(max_examples=60)
@given(
    n=st.integers(0, 40),
    v=st.integers(2, 200),
    extra=st.integers(-60, 60),
    chunk=st.integers(1, 50),
    temperature=st.floats(0.3, 5),
    name=st.sampled_from(sorted(DIVERGENCES)),
    seed=st.integers(0, 1000),
)
def test_any_shape(n, v, extra, chunk, temperature, name, seed):
    """Ragged chunks, no rows at all, padded vocabularies on either side."""
    tensors = case(n=n, v=v, w=max(2, v + extra), seed=seed)
    weight = weights(n, seed)
    own = DIVERGENCES[name]
    expected = reference(name, tensors, weight, temperature=temperature, **own)
    got = found(tensors, weight, divergence=name, temperature=temperature, chunk=chunk, **own)
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-9)


@COMPILES
@pytest.mark.parametrize("name", sorted(set(DIVERGENCES) - {"alpha_beta", "taid", "sorted_l1"}))
def test_compiling_takes_a_block_whole(name, monkeypatch):
    """From the logits to the gradient in their place without a break, or nothing is fused."""
    torch._dynamo.reset()  # it compiles a function for so many occasions only
    compiled = torch.compile(chunks.in_place, backend="eager", fullgraph=True, dynamic=True)
    monkeypatch.setattr(fused, "compiled_block", lambda: compiled)
    tensors, weight = case(), weights(37)
    for option in ({}, {"temperature": 2.0, "soft_cap": 5.0, "labels": torch.arange(37)}):
        option = {**option, "cross_entropy_weight": 0.5} if option else {}
        both = [
            found(tensors, weight, divergence=name, implementation=i, **option, **DIVERGENCES[name])
            for i in ("compiled", "chunked")
        ]
        for mine, theirs in zip(*both, strict=True):
            torch.testing.assert_close(mine, theirs)


def test_a_compiler_that_makes_wrong_losses_is_refused(monkeypatch):
    """torch 2.11's reads the student's logits after the gradient has taken their place."""
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.11.0+cu130"))
    with pytest.raises(ValueError, match=r"compiled: before torch 2.12 .* this is torch 2.11.0"):
        fused_linear_divergence(*case(), implementation="compiled")
    for version in ("2.12.0", "2.13.0+cpu", "3.0.0"):
        monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(version))
        assert fused.why_not("compiled") is None


@pytest.mark.parametrize(
    "implementation", ["chunked", pytest.param("compiled", marks=COMPILES), "naive"]
)
def test_labels_in_the_same_pass(implementation):
    """CE reads all of the student's columns, the divergence those that both models have."""
    tensors, weight = case(v=301, w=280), weights(37)
    labels = torch.randint(0, 301, (37,), generator=torch.Generator().manual_seed(3))
    labels[5] = -100
    h, w, th, tw = (t.detach().requires_grad_() for t in tensors)
    student, teacher = h @ w.T, (th @ tw.T).detach()
    rows = losses.forward_kl(student, teacher, temperature=2.0)
    rows = rows + 0.7 * losses.cross_entropy(student, labels)
    total = (rows * weight.double()).sum()
    expected = (total.detach(), *torch.autograd.grad(total, (h, w)))
    got = found(
        tensors,
        weight,
        temperature=2.0,
        labels=labels,
        cross_entropy_weight=0.7,
        implementation=implementation,
    )
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-10)


def test_soft_cap_and_bias():
    tensors, weight = case(), weights(37)
    expected = reference("reverse_kl", tensors, weight, soft_cap=1.5)
    got = found(tensors, weight, divergence="reverse_kl", soft_cap=1.5, chunk=9)
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)
    h, w, th, tw = tensors
    bias = torch.randn(301, dtype=torch.float64, requires_grad=True)
    ones = torch.ones(37, 1, dtype=torch.float64)
    joined = (torch.cat([h, ones], 1), torch.cat([w, bias[:, None]], 1), th, tw)
    plain = fused_linear_divergence(*joined, row_weight=weight)
    biased = fused_linear_divergence(h, w, th, tw, student_bias=bias, row_weight=weight)
    torch.testing.assert_close(plain, biased)
    torch.testing.assert_close(*(torch.autograd.grad(x, bias)[0] for x in (plain, biased)))


def one_term(weight, name="forward_kl"):
    return [divergence_term(named(name), "t", weight)]


def test_a_head_with_adapters_trains_the_adapters_alone():
    h, w, th, tw = case()
    down = torch.randn(4, 16, dtype=torch.float64, requires_grad=True)
    up = torch.randn(301, 4, dtype=torch.float64, requires_grad=True)
    weight = weights(37)
    frozen = w.detach()
    student = Projection(hidden=h, weight=frozen, low_hidden=0.5 * h @ down.T, low_weight=up)
    teacher = Projection(hidden=th, weight=tw)
    total, _ = sum_over_rows(student, {"t": teacher}, one_term(weight), chunk=8)
    got = torch.autograd.grad(total, (h, down, up))
    logits = h @ (frozen + 0.5 * up @ down).T
    rows = losses.forward_kl(logits, (th @ tw.T).detach())
    expected = torch.autograd.grad((rows * weight.double()).sum(), (h, down, up))
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-10)


def test_scaled_logits():
    h, w, th, tw = case()
    weight = weights(37)
    student = Projection(hidden=h, weight=w, scale=0.25, soft_cap=2.0)
    teacher = Projection(hidden=th, weight=tw, scale=2.0)
    both = [
        sum_over_rows(student, {"t": teacher}, one_term(weight), implementation=name, chunk=8)[0]
        for name in ("chunked", "naive")
    ]
    torch.testing.assert_close(*both)
    for mine, theirs in zip(*(torch.autograd.grad(x, (h, w)) for x in both), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-10)


def test_a_tied_head_gets_both_gradients():
    """The embedding is the head: autograd adds what comes from either use."""
    table = torch.randn(50, 8, dtype=torch.float64, requires_grad=True)
    ids = torch.arange(12)
    _, _, th, tw = case(n=12, v=50, w=50)
    total = fused_linear_divergence(table[ids].tanh(), table, th, tw)
    rows = losses.forward_kl(table[ids].tanh() @ table.T, th @ tw.T)
    for mine, theirs in zip(
        torch.autograd.grad(total, table), torch.autograd.grad(rows.sum(), table), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


def test_a_frozen_head_gets_no_gradient_and_nothing_is_kept_without_one():
    h, w, th, tw = case()
    total = fused_linear_divergence(h, w.detach(), th, tw)
    total.backward()
    assert w.grad is None
    assert h.grad is not None
    with torch.no_grad():
        assert not fused_linear_divergence(h, w, th, tw).requires_grad


def test_rows_without_weight_are_never_looked_at():
    h, w, th, tw = case()
    weight = weights(37)
    clean = found((h, w, th, tw), weight)
    with torch.no_grad():
        th[weight == 0] = torch.nan
        h[weight == 0] = torch.inf
    dirty = found((h, w, th, tw), weight)
    torch.testing.assert_close(clean, dirty)
    assert (dirty[1][weight == 0] == 0).all()


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jensen_shannon", "skew_reverse_kl"])
def test_columns_that_a_model_rules_out(name):
    """Minus infinity in both: as if not there. In one: what the definition says, per row."""
    tensors = case(n=9, v=20, w=20)
    weight = torch.ones(9)
    outside = torch.zeros(20, dtype=torch.float64)
    outside[7:] = -torch.inf
    got = found(tensors, weight, divergence=name, student_bias=outside, teacher_bias=outside)
    cut = (tensors[0], tensors[1][:7].detach().requires_grad_(), *tensors[2:])
    expected = reference(name, cut, weight)
    torch.testing.assert_close(got[0], expected[0])
    torch.testing.assert_close(got[1], expected[1])
    one_sided = {
        kind: found(
            tensors, weight, divergence=name, teacher_bias=outside, implementation=kind, chunk=4
        )
        for kind in ("chunked", "naive")
    }
    for mine, theirs in zip(*one_sided.values(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_equal_models_have_no_loss_and_no_gradient():
    h, w, _, _ = case()
    for name, own in DIVERGENCES.items():
        value, *gradients = found(
            (h, w, h.detach(), w.detach()), torch.ones(37), divergence=name, **own
        )
        assert abs(value) < 1e-12, name
        assert all(g.abs().max() < 1e-12 for g in gradients), name


def test_each_term_is_summed_alone():
    h, w, th, tw = case()
    first, second = weights(37), weights(37, 2)
    terms = [
        *one_term(first),
        replace(one_term(second, "reverse_kl")[0], factor=torch.tensor(3.0)),
        label_term(torch.arange(37), second, factor=0.0),
    ]
    student, teacher = Projection(hidden=h, weight=w), Projection(hidden=th, weight=tw)
    results = [
        sum_over_rows(student, {"t": teacher}, terms, implementation=name, chunk=11)
        for name in ("chunked", "naive")
    ]
    for (total, sums), (other, others) in zip(results[:1], results[1:], strict=True):
        torch.testing.assert_close(sums, others)
        torch.testing.assert_close(total, other)
        torch.testing.assert_close(total, sums[0] + 3 * sums[1])
        assert sums[2] > 0  # logged, though it does not count
        mine, theirs = (torch.autograd.grad(x, (h, w)) for x in (total, other))
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-10)


def test_small_weights_do_not_vanish_in_half_precision():
    """Weights are 1 / count: within the sum they must not push float16 below its range."""
    tensors = case(dtype=torch.float16)
    weight = torch.full((37,), 1e-7)
    expected = reference("forward_kl", tensors, weight)
    scale = 2.0**16
    total = fused_linear_divergence(*tensors, row_weight=weight) * scale
    gradients = [g.double() / scale for g in torch.autograd.grad(total, tensors[:2])]
    assert max(error(gradients, expected[1:])) < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [41, 64, 333])
def test_what_memory_said_before_is_nothing_to_the_loss(dtype, width, monkeypatch):
    tensors = case(n=96, v=width, w=width, dtype=dtype)

    def found():
        total = fused_linear_divergence(*tensors, implementation="chunked", chunk=48)
        return total, *torch.autograd.grad(total, tensors[:2])

    expected = found()
    empty = pages.empty
    monkeypatch.setattr(pages, "empty", lambda *a, **k: empty(*a, **k).fill_(torch.nan))
    for mine, theirs in zip(found(), expected, strict=True):
        assert torch.equal(mine, theirs)


def test_no_tensor_of_all_logits_is_made():
    n, v = 512, 4096
    tensors = case(n=n, v=v, w=v, dtype=torch.float32)

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made = func(*args, **(kwargs or {}))
            for value in made if isinstance(made, tuple | list) else (made,):
                if isinstance(value, torch.Tensor):
                    self.elements = max(self.elements, value.numel())
            return made

    with Largest() as seen:
        fused_linear_divergence(*tensors, chunk=64).backward()
    assert seen.elements <= 64 * (v + 32)  # a row's padding
    with Largest() as seen:
        fused_linear_divergence(*tensors, implementation="naive").backward()
    assert seen.elements == n * v  # the measure does see them


def test_bad_input_is_named():
    h, w, th, tw = case()
    with pytest.raises(ValueError, match="no divergence 'kl'; one of: .*forward_kl"):
        fused_linear_divergence(h, w, th, tw, divergence="kl")
    with pytest.raises(ValueError, match="37 rows of the student, 36 of the teacher"):
        fused_linear_divergence(h, w, th[1:], tw)
    with pytest.raises(ValueError, match="needs labels"):
        fused_linear_divergence(h, w, th, tw, cross_entropy_weight=1.0)
    with pytest.raises(ValueError, match="no implementation 'fast'"):
        fused_linear_divergence(h, w, th, tw, implementation="fast")
    with pytest.raises(ValueError, match="temperature must be positive"):
        fused_linear_divergence(h, w, th, tw, temperature=0.0)
    with pytest.raises(ValueError, match="beta"):
        fused_linear_divergence(h, w, th, tw, divergence="jensen_shannon", beta=2.0)
    total = fused_linear_divergence(h, w, th, tw)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once only"):
        total.backward()


def sparse(n, v, k, *, rest, seed=0):
    """Some tokens a row, in one row none, and in one a place without mass that names another's."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(n, v, generator=generator).topk(k).indices
    p = torch.rand(n, k + 1, generator=generator)
    p[:, k] *= float(rest)
    p = p / p.sum(-1, keepdim=True)
    mass, other = p[:, :k].clone(), p[:, k].clone()
    negentropy = torch.xlogy(p, p).sum(-1)
    if n > 2:
        mass[0], other[0] = 0.0, 0.0
        mass[1, 1], ids[1, 1] = 0.0, ids[1, 0]
    return Sparse(ids=ids, mass=mass, rest=other, negentropy=negentropy, temperature=1.5)


@pytest.mark.parametrize("rest", [True, False])
@pytest.mark.parametrize("tail", [True, False])
def test_a_teacher_of_few_tokens(rest, tail):
    h, w, _, _ = case()
    teacher, weight = sparse(37, 301, 5, rest=rest), weights(37)
    labels = torch.randint(0, 301, (37,), generator=torch.Generator().manual_seed(3))
    rows = losses.sparse_kl(h @ w.T, teacher, temperature=1.5, tail=tail)
    rows = rows + 0.3 * losses.cross_entropy(h @ w.T, labels)
    expected = (rows * weight.double()).sum()
    for name in ("chunked", "naive"):
        total = fused_linear_sparse_kl(
            h,
            w,
            teacher,
            tail=tail,
            row_weight=weight,
            labels=labels,
            cross_entropy_weight=0.3,
            chunk=8,
            implementation=name,
        )
        torch.testing.assert_close(total, expected, rtol=1e-7, atol=0)
        mine, theirs = (
            torch.autograd.grad(x, (h, w), retain_graph=x is expected) for x in (total, expected)
        )
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-9)


def test_a_student_that_rules_out_what_the_teacher_draws():
    """The loss is infinite and has no gradient, as by definition."""
    h, w, _, _ = case(n=4, v=20)
    teacher = sparse(4, 20, 3, rest=False)
    outside = torch.zeros(20, dtype=torch.float64)
    outside[teacher.ids[3, 0]] = -torch.inf
    found = {
        name: fused_linear_sparse_kl(h, w, teacher, student_bias=outside, implementation=name)
        for name in ("chunked", "naive")
    }
    assert all(value == torch.inf for value in found.values())
    for mine, theirs in zip(*(torch.autograd.grad(x, (h, w)) for x in found.values()), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_very_certain_student_beside_a_tail():
    """Rounding of the masses must not be taken for the probability of other tokens."""
    generator = torch.Generator().manual_seed(0)
    teacher = sparse(50, 300, 8, rest=True)
    hidden = torch.randn(50, 16, generator=generator, dtype=torch.float64)
    weight = torch.randn(300, 16, generator=generator, dtype=torch.float64)
    hidden = hidden + 3 * weight[teacher.ids[:, 2]]  # nearly all on one of the known tokens
    results = []
    for dtype, name in ((torch.float32, "chunked"), (torch.float64, "naive")):
        h = hidden.to(dtype).requires_grad_()
        total = fused_linear_sparse_kl(h, weight.to(dtype), teacher, implementation=name)
        results.append((total.double(), torch.autograd.grad(total, h)[0].double()))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-4)


def test_a_models_head_is_moved_into_huge_pages_and_what_passes_is_not(monkeypatch):
    hidden, weight, theirs, head = case(n=20, v=50, w=50, dtype=torch.float32)
    asked = []
    monkeypatch.setattr(chunks.pages, "gather", asked.append)
    fused_linear_divergence(hidden, weight, theirs, head)
    assert not asked
    mine, its = torch.nn.Parameter(weight.detach()), torch.nn.Parameter(head)
    fused_linear_divergence(hidden, mine, theirs, its)
    assert [id(x) for x in asked] == [id(mine), id(its)]
    half = hidden.to(torch.bfloat16), theirs.to(torch.bfloat16)
    fused_linear_divergence(half[0], mine, half[1], its)  # what is read is a copy
    assert len(asked) == 2


def test_within_autocast_the_loss_stays_exact():
    """It runs inside a model's forward pass, where products would be rounded."""
    tensors = case(n=20, v=500, w=500, dtype=torch.float32)
    weight = torch.ones(20)
    for name in DIVERGENCES:
        plain = found(tensors, weight, divergence=name, **DIVERGENCES[name])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            within = found(tensors, weight, divergence=name, **DIVERGENCES[name])
        assert all(map(torch.equal, plain, within)), name
