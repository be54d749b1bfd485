"""The kernels for whole rows against whole logits in float64.

The one for GPUs runs on a GPU, or as Triton interprets it; the one for CPUs where there is a C
compiler.
"""

from functools import partial

import pytest
import torch

from limbeck import losses
from limbeck.losses import chunks, cpu, kernels, native, row_forms
from limbeck.losses.fused import (
    divergence_term,
    fused_linear_divergence,
    fused_linear_sparse_kl,
    label_term,
    sum_over_rows,
)
from limbeck.losses.projection import Projection
from limbeck.losses.sparse import Sparse, sparse_kl

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
"""NumPy's, which stands in for a GPU: what lies beyond a row's end is computed and left out."""

FORMS = {
    "forward_kl": {},
    "reverse_kl": {},
    "jensen_shannon": {"beta": 0.3},
    "skew_forward_kl": {"alpha": 0.2},
    "skew_reverse_kl": {"alpha": 0.2},
    "total_variation": {},
}
N, V, W = 7, 301, 290

DEVICE = torch.device("cpu")


@pytest.fixture(params=["triton", "native"], autouse=True)
def kind(request, monkeypatch):
    """Which kernel, on its own device, with rows of several tiles."""
    name = request.param
    if name == "native":
        if native.library("sums.c", TYPE="bfloat16") is None:
            pytest.skip("no C compiler")
        module, place = cpu, "cpu"
    else:
        module = pytest.importorskip("limbeck.losses.gpu", reason="Triton is not installed")
        place = "cuda" if torch.cuda.is_available() else "cpu"
    monkeypatch.setattr(module, "TILE_BYTES" if name == "native" else "TILE", 256)
    monkeypatch.setitem(globals(), "DEVICE", torch.device(place))
    return name


def draw(seed, *shape, scale=1.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(*shape, generator=generator, dtype=torch.float64) * scale
    return drawn.to(DEVICE, dtype)


def case(dtype=torch.float32, seed=0, width=W):
    hidden, weight = draw(seed, N, 16, dtype=dtype), draw(seed + 1, V, 16, scale=0.5, dtype=dtype)
    theirs = draw(seed + 2, N, 24, dtype=dtype), draw(seed + 3, width, 24, scale=0.5, dtype=dtype)
    return hidden.requires_grad_(), weight.requires_grad_(), *theirs


def row_weights():
    weight = torch.rand(N, generator=torch.Generator().manual_seed(5)).to(DEVICE)
    weight[4] = 0.0
    return weight


def row_labels():
    labels = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(6))
    labels[2], labels[5] = -100, V - 1  # no label, and one that the teacher does not have
    return labels.to(DEVICE)


def logits_in_float64(tensors, soft_cap):
    h, w, th, tw = (t.detach().double() for t in tensors)
    h.requires_grad_(), w.requires_grad_()
    both = [h @ w.T, th @ tw.T]
    if soft_cap:
        both = [soft_cap * torch.tanh(z / soft_cap) for z in both]
    return both, (h, w)


def reference(name, tensors, *, temperature, soft_cap, share, own):
    (student, teacher), leaves = logits_in_float64(tensors, soft_cap)
    rows = getattr(losses, name)(student, teacher, temperature=temperature, **own)
    rows = rows + share * losses.cross_entropy(student, row_labels())
    total = (rows * row_weights().double()).sum()
    return total.detach(), *torch.autograd.grad(total, leaves)


def found(total, tensors):
    return total.detach(), *torch.autograd.grad(total, tensors[:2])


def errors(got, expected):
    return [
        float((mine.double() - theirs).norm() / theirs.norm())
        for mine, theirs in zip(got, expected, strict=True)
    ]


@pytest.mark.parametrize("soft_cap", [None, 2.0])
@pytest.mark.parametrize("share", [0.0, 0.7])
@pytest.mark.parametrize(("temperature", "width"), [(1.0, W), (1.0, V), (2.5, W)])
@pytest.mark.parametrize("name", FORMS)
def test_no_less_accurate_than_whole_logits(kind, name, temperature, width, share, soft_cap):
    tensors, own = case(width=width), FORMS[name]
    also = {"labels": row_labels(), "cross_entropy_weight": share} if share else {}
    options = {"divergence": name, "temperature": temperature, "soft_cap": soft_cap, **also, **own}
    expected = reference(
        name, tensors, temperature=temperature, soft_cap=soft_cap, share=share, own=own
    )
    mine, naive = (
        errors(
            found(
                fused_linear_divergence(
                    *tensors, row_weight=row_weights(), implementation=by, chunk=3, **options
                ),
                tensors,
            ),
            expected,
        )
        for by in (kind, "naive")
    )
    floor = 30 * torch.finfo(torch.float32).eps
    assert all(m <= 1.1 * n + floor for m, n in zip(mine, naive, strict=True)), (mine, naive)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", FORMS)
def test_half_precision(kind, name, dtype):
    """The logits are rounded as they are anywhere else, and the gradient once more."""
    tensors, own = case(dtype), FORMS[name]
    expected = reference(name, tensors, temperature=1.5, soft_cap=None, share=0.0, own=own)
    options = {"divergence": name, "temperature": 1.5, "row_weight": row_weights(), **own}
    mine, naive = (
        errors(
            found(fused_linear_divergence(*tensors, implementation=by, **options), tensors),
            expected,
        )
        for by in (kind, "naive")
    )
    # Triton's interpreter cuts bfloat16 where a GPU rounds it.
    rounded = 2.0 if kind == "triton" and DEVICE.type == "cpu" else 1.1
    assert all(m <= rounded * n + 1e-5 for m, n in zip(mine, naive, strict=True)), (mine, naive)


@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("name", FORMS)
def test_equal_models_have_exactly_nothing(kind, name, temperature):
    hidden, weight, *_ = case()
    tensors = (hidden, weight, hidden.detach(), weight.detach())
    total = fused_linear_divergence(
        *tensors, divergence=name, temperature=temperature, implementation=kind, **FORMS[name]
    )
    assert all(not value.any() for value in found(total, tensors))


@pytest.mark.parametrize("share", [0.0, 0.7])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("tail", [True, False])
def test_a_few_tokens_of_a_teacher(kind, tail, temperature, share):
    """One row of which nothing is known, a place without mass, a label that is a known token."""
    hidden, weight, *_ = case()
    places = torch.stack(
        [torch.randperm(V, generator=torch.Generator().manual_seed(i))[:5] for i in range(N)]
    ).to(DEVICE)
    labels = row_labels()
    labels[3] = places[3, 1]
    mass = torch.rand(N, 5, generator=torch.Generator().manual_seed(7)).to(DEVICE)
    places[:, 4], mass[:, 4], mass[6] = places[:, 0], 0.0, 0.0
    mass = mass / mass.sum(-1, keepdim=True).clamp(min=1e-9)
    teacher = Sparse(
        ids=places,
        mass=mass,
        rest=torch.zeros(N, device=DEVICE),
        negentropy=draw(8, N),
        temperature=temperature,
    )
    h, w = (t.detach().double().requires_grad_() for t in (hidden, weight))
    student = 2.0 * torch.tanh(h @ w.T / 2.0)
    rows = sparse_kl(student, teacher, temperature=temperature, tail=tail)
    rows = rows + share * losses.cross_entropy(student, labels)
    total = (rows * row_weights().double()).sum()
    expected = (total.detach(), *torch.autograd.grad(total, (h, w)))
    total = fused_linear_sparse_kl(
        hidden,
        weight,
        teacher,
        tail=tail,
        row_weight=row_weights(),
        labels=labels,
        cross_entropy_weight=share,
        soft_cap=2.0,
        implementation=kind,
    )
    got = found(total, (hidden, weight))
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=2e-5, atol=2e-6)


def test_labels_alone_and_the_scale_of_logits(kind):
    hidden, weight, *_ = case()
    terms = [label_term(row_labels(), row_weights())]
    head = Projection(hidden=hidden, weight=weight, scale=0.6)
    both = [
        found(sum_over_rows(head, {}, terms, implementation=by)[0], (hidden, weight))
        for by in (kind, "naive")
    ]
    for mine, theirs in zip(*both, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_ready_logits_of_a_teacher(kind):
    hidden, weight, th, tw = case()
    head = Projection(hidden=hidden, weight=weight)
    terms = [divergence_term(losses.jensen_shannon, "t", row_weights())]
    both = [
        found(sum_over_rows(head, {"t": th @ tw.T}, terms, implementation=by)[0], (hidden, weight))
        for by in (kind, "naive")
    ]
    for mine, theirs in zip(*both, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_a_ruled_out_token_goes_to_the_definition(kind):
    """A teacher that gives a token no chance at all: its logit is -inf."""
    hidden, weight, *_ = case()
    outside = torch.zeros(V, device=DEVICE)
    outside[3] = -torch.inf
    teacher = Projection(hidden=hidden.detach() * 0.5, weight=weight.detach().flip(0), bias=outside)
    terms = [divergence_term(losses.forward_kl, "t", row_weights())]
    head = Projection(hidden=hidden, weight=weight)
    both = [
        found(sum_over_rows(head, {"t": teacher}, terms, implementation=by)[0], (hidden, weight))
        for by in (kind, "naive")
    ]
    for mine, theirs in zip(*both, strict=True):
        assert mine.isfinite().all()
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("token", [-1, V, 2**40])
def test_a_teacher_that_speaks_of_a_token_that_is_not_there(kind, token):
    """Nothing is read or written there, and it is said."""
    hidden, weight, *_ = case()
    known = Sparse(
        ids=torch.tensor([[0, 1], [2, token]] + [[3, 4]] * (N - 2), device=DEVICE),
        mass=torch.full((N, 2), 0.5, device=DEVICE),
        rest=torch.zeros(N, device=DEVICE),
        negentropy=torch.zeros(N, device=DEVICE),
    )
    with pytest.raises(ValueError, match=f"the student has {V} columns"):
        fused_linear_sparse_kl(hidden, weight, known, implementation=kind)


def test_what_has_a_form():
    weight = row_weights()
    kl = divergence_term(losses.forward_kl, "t", weight)
    labels = label_term(row_labels(), weight)
    for terms in ([kl], [labels], [labels, kl], [kl, labels]):
        assert row_forms.asked(terms) is not None
    mse = divergence_term(losses.logit_mse, "t", weight)
    one_sided = divergence_term(losses.jensen_shannon, "t", weight, settings={"beta": 1.0})
    for terms in ([kl, kl], [labels, labels], [mse], [one_sided]):
        assert row_forms.asked(terms) is None
    for tail, rest, right in ((True, 0.5, False), (False, 0.5, True), (True, 0.0, True)):
        found = row_forms.asked([known_places(1, tail=tail, rest=rest)])
        assert (found is not None) is right


def known_places(places, *, tail, rest=0.5):
    known = Sparse(
        ids=torch.zeros(1, places, dtype=torch.int64),
        mass=torch.full((1, places), 0.5),
        rest=torch.full((1,), rest),
        negentropy=torch.zeros(1),
    )
    kernel = partial(kernels.sparse_kl, tail=tail)
    return chunks.RowTerm(loss=lambda *_: 0, weight=torch.ones(1), kernel=kernel, beside=known)


@pytest.mark.parametrize("kind", ["triton"], indirect=True)
@pytest.mark.parametrize("places", [1024, 1025])
def test_how_many_tokens_a_gpu_can_know_of_a_row(places, kind):
    gpu = pytest.importorskip("limbeck.losses.gpu", reason="Triton is not installed")
    head = Projection(hidden=draw(0, 1, 4), weight=draw(1, 3, 4))
    found = gpu.kernel(head, {}, [known_places(places, tail=False)])
    assert (found is not None) is (places <= gpu.MOST_PLACES)


def test_what_has_no_form_is_taken_as_chunked(kind):
    tensors = case()
    both = [
        found(fused_linear_divergence(*tensors, divergence="logit_mse", implementation=by), tensors)
        for by in (kind, "chunked")
    ]
    for mine, theirs in zip(*both, strict=True):
        assert torch.equal(mine, theirs)


def test_whatever_lies_otherwise_in_memory(kind):
    """Logits and known tokens by columns, labels and ids in 32 bits."""
    hidden, weight, th, tw = case()
    head = Projection(hidden=hidden, weight=weight)
    ready = (th @ tw.T).T.contiguous().T
    labels = row_labels().int()
    terms = [
        divergence_term(losses.reverse_kl, "t", row_weights()),
        label_term(labels, row_weights()),
    ]
    wide = [terms[0], label_term(labels.long(), row_weights())]
    ids = torch.arange(N * 3, device=DEVICE).reshape(3, N).T
    mass = torch.full((3, N), 1 / 3, device=DEVICE).T
    flat = torch.zeros(N, device=DEVICE)
    known = Sparse(ids=ids, mass=mass, rest=flat, negentropy=flat)
    for mine, theirs in zip(
        *(
            found(sum_over_rows(head, {"t": ready}, these, implementation=by)[0], (hidden, weight))
            for by, these in ((kind, terms), ("naive", wide))
        ),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    for mine, theirs in zip(
        *(
            found(
                fused_linear_sparse_kl(hidden, weight, known, implementation=by), (hidden, weight)
            )
            for by in (kind, "naive")
        ),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
