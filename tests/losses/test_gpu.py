"""When a GPU's kernel is taken."""

import pytest
import torch

from limbeck.losses.fused import fused_linear_divergence

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
