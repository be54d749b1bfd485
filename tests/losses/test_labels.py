"""Cross-entropy against the text's own token."""

import math

import pytest
import torch

from limbeck.losses import cross_entropy, forward_kl


def test_is_the_negative_log_probability_of_the_label():
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 7, generator=random, dtype=torch.float64)
    labels = torch.tensor([0, 6, 3, 3, 2])
    want = [
        math.log(sum(math.exp(x) for x in row)) - row[label]
        for row, label in zip(logits.tolist(), labels.tolist(), strict=True)
    ]
    got = cross_entropy(logits, labels)
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64))
    one_hot = torch.full_like(logits, -torch.inf).scatter(1, labels[:, None], 0.0)
    torch.testing.assert_close(got, forward_kl(logits, one_hot))  # KL from certainty


def test_gradient_is_probability_less_one_hot():
    logits = torch.randn(4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    labels = torch.tensor([1, 0, 5, 2])
    cross_entropy(logits.requires_grad_(), labels).sum().backward()
    want = logits.detach().softmax(-1) - torch.nn.functional.one_hot(labels, 6)
    torch.testing.assert_close(logits.grad, want)


@pytest.mark.parametrize("labels", [[1, -100, 0], [-100, -100, -100]])
def test_a_row_without_label_gives_zero_and_no_gradient(labels):
    logits = torch.randn(3, 4, generator=torch.Generator().manual_seed(2), requires_grad=True)
    value = cross_entropy(logits, torch.tensor(labels))
    value.sum().backward()
    for row, label in enumerate(labels):
        assert (value[row].item() == 0) == (label == -100)
        assert bool(logits.grad[row].any()) == (label != -100)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_values_are_at_least_float32(dtype):
    logits = torch.randn(8, 300, generator=torch.Generator().manual_seed(3)).to(dtype)
    labels = torch.arange(8)
    value = cross_entropy(logits, labels)
    assert value.dtype == torch.float32
    exact = cross_entropy(logits.double(), labels)
    torch.testing.assert_close(value.double(), exact, rtol=1e-6, atol=1e-6)


def test_masked_vocabulary():
    logits = torch.tensor([[0.0, -torch.inf, 0.0], [0.0, -torch.inf, 0.0]], requires_grad=True)
    value = cross_entropy(logits, torch.tensor([0, 1]))
    assert value.tolist() == pytest.approx([math.log(2), torch.inf])
    value.sum().backward()
    assert not logits.grad.isnan().any()


def test_no_rows():
    logits = torch.zeros(0, 5, requires_grad=True)
    value = cross_entropy(logits, torch.zeros(0, dtype=torch.int64))
    value.sum().backward()
    assert value.shape == (0,)
    assert logits.grad.shape == (0, 5)


@pytest.mark.parametrize(("logits", "labels"), [((2, 5), (3,)), ((5,), (5,)), ((2, 3, 5), (2, 3))])
def test_shapes_must_fit(logits, labels):
    with pytest.raises(ValueError, match=r"\[n, v\] and labels \[n\]"):
        cross_entropy(torch.zeros(logits), torch.zeros(labels, dtype=torch.int64))
