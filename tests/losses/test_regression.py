"""Mean squared error of the logits."""

import pytest
import torch

from limbeck.losses import forward_kl, logit_mse


def pair(n=4, v=6):
    random = torch.Generator().manual_seed(0)
    return torch.randn(2, n, v, generator=random, dtype=torch.float64)


def test_is_the_mean_over_the_vocabulary_of_the_squared_difference():
    student, teacher = pair()
    want = [
        sum((a - b) ** 2 for a, b in zip(s, t, strict=True)) / len(s)
        for s, t in zip(student.tolist(), teacher.tolist(), strict=True)
    ]
    torch.testing.assert_close(logit_mse(student, teacher), torch.tensor(want).double())


def test_gradient():
    student, teacher = pair()
    logit_mse(student.requires_grad_(), teacher).sum().backward()
    torch.testing.assert_close(student.grad, (student.detach() - teacher) / 3)
    assert torch.autograd.gradcheck(logit_mse, (student, teacher.clone().requires_grad_()))


def test_temperature_cancels_unless_told_otherwise():
    student, teacher = pair()
    plain = logit_mse(student, teacher)
    torch.testing.assert_close(logit_mse(student, teacher, temperature=3.0), plain)
    small = logit_mse(student, teacher, temperature=3.0, scale_by_t2=False)
    torch.testing.assert_close(small, plain / 9)


def test_it_sees_a_constant_and_the_kl_does_not():
    student, teacher = pair()
    shifted = teacher + 2.0
    torch.testing.assert_close(logit_mse(shifted, teacher), torch.full((4,), 4.0).double())
    assert forward_kl(shifted, teacher).abs().max() < 1e-12
    # At a high temperature KL is half of it, once the mean difference is out.
    centred = student - (student - teacher).mean(-1, keepdim=True)
    high = forward_kl(student, teacher, temperature=1e4)
    torch.testing.assert_close(high, logit_mse(centred, teacher) / 2, rtol=1e-3, atol=1e-4)


def test_columns_masked_in_both_do_not_dilute_the_mean():
    hole = -torch.inf
    student = torch.tensor([[1.0, hole, 3.0], [hole, hole, hole], [1.0, 1.0, 1.0]])
    teacher = torch.tensor([[0.0, hole, 1.0], [hole, hole, hole], [1.0, hole, 0.0]])
    student.requires_grad_()
    value = logit_mse(student, teacher)
    assert value.tolist() == pytest.approx([2.5, 0.0, torch.inf])
    value[:2].sum().backward()
    want = torch.tensor([[1.0, 0.0, 2.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(student.grad, want)
