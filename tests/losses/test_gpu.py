"""When a GPU's kernel is taken."""

import pytest
import torch

from limbeck import losses
from limbeck.losses.fused import divergence_term, fused_linear_divergence, label_term, sum_over_rows
from limbeck.losses.projection import Projection

gpu = pytest.importorskip("limbeck.losses.gpu", reason="Triton is not installed")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def test_where_no_kernel_can_be_made_losses_are_chunked(monkeypatch, caplog):
    gpu.works.cache_clear()
    assert gpu.works(DEVICE)
    gpu.works.cache_clear()
    monkeypatch.setattr(gpu.row_kernel, "one", None)  # as without a C compiler
    assert not gpu.works(DEVICE)
    assert not gpu.works(DEVICE)
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith(f"no kernel can be made for {DEVICE}, so losses are `chunked`: ")
    gpu.works.cache_clear()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_takes_it_by_default(monkeypatch):
    called = []
    real = gpu._in_place
    monkeypatch.setattr(gpu, "_in_place", lambda *a: called.append(1) or real(*a))
    tensors = [torch.randn(5, 8, device=DEVICE, requires_grad=i < 2) for i in range(4)]
    fused_linear_divergence(*tensors).backward()
    assert called


def test_when_no_one_need_look_at_the_values():
    """Bias, ready logits, half precision and nearly nothing of a model can make them infinite."""
    hidden, weight = torch.randn(3, 4, device=DEVICE), torch.randn(5, 4, device=DEVICE)
    ones = torch.ones(3)
    plain = Projection(hidden=hidden, weight=weight)
    biased = Projection(hidden=hidden, weight=weight, bias=torch.zeros(5, device=DEVICE))
    half = Projection(hidden=hidden.half(), weight=weight.half())
    kl = divergence_term(losses.forward_kl, "t", ones)
    mixtures = {
        share: divergence_term(losses.jensen_shannon, "t", ones, settings={"beta": share})
        for share in (0.5, 1e-9, 1 - 1e-6)
    }
    for student, teacher, term, sure in (
        (plain, plain, kl, True),
        (plain, plain, mixtures[0.5], True),
        (plain, plain, mixtures[1e-9], False),
        (plain, plain, mixtures[1 - 1e-6], False),
        (biased, plain, kl, False),
        (plain, biased, kl, False),
        (half, half, kl, False),
        (plain, hidden @ weight.T, kl, False),
    ):
        run = gpu.kernel(student, {"t": teacher}, [term])
        assert run is not None
        assert run.sure is sure


def test_a_label_of_no_token_is_not_read():
    weight = torch.randn(5, 4, device=DEVICE)
    head = Projection(hidden=torch.randn(3, 4, device=DEVICE), weight=weight)
    labels = torch.tensor([0, 2**40, -100], device=DEVICE)
    term = label_term(labels, torch.ones(3))
    total, _ = sum_over_rows(head, {}, [term], implementation="triton")
    assert not total.isfinite()
