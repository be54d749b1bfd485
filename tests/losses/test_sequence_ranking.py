"""The ranking loss against a loop over pairs that is written from the paper."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from limbeck.losses.sequence_ranking import sequence_ranking

NAN = math.nan


def by_loop(logp, length, score, group, margin=0.0, mean=False):
    """Sum over pairs r_i < r_j of max(0, p_i - p_j + margin), for each answer that of its group."""
    p = [a / b for a, b in zip(logp, length, strict=True)]
    found = []
    for mine in group:
        members = [i for i, other in enumerate(group) if other == mine]
        pairs = [(i, j) for i in members for j in members if score[i] < score[j]]
        total = sum(max(0.0, p[i] - p[j] + margin) for i, j in pairs)
        found.append(total / max(1, len(pairs)) if mean else total)
    return found


def tensors(logp, length, score, group):
    return (
        torch.tensor(logp, dtype=torch.float64),
        torch.tensor(length, dtype=torch.float32),
        torch.tensor(score, dtype=torch.float32),
        torch.tensor(group),
    )


rows = st.lists(
    st.tuples(
        st.floats(-50, 0),
        st.integers(1, 9),
        st.sampled_from([0.0, 1.0, 2.0, 2.5, NAN]),
        st.integers(0, 3),
    ),
    min_size=1,
    max_size=14,
)


@given(rows, st.sampled_from([0.0, 0.5]), st.booleans())
def test_it_is_the_sum_over_pairs(table, margin, mean):
    columns = [list(column) for column in zip(*table, strict=True)]
    found = sequence_ranking(*tensors(*columns), margin=margin, mean=mean)
    assert found.tolist() == pytest.approx(by_loop(*columns, margin, mean), abs=1e-9)


@given(rows, st.randoms())
def test_the_order_of_rows_and_the_numbers_of_groups_mean_nothing(table, draw):
    before = sequence_ranking(*tensors(*[list(c) for c in zip(*table, strict=True)]))
    order = list(range(len(table)))
    draw.shuffle(order)
    moved = [(*table[i][:3], 7 - 2 * table[i][3]) for i in order]
    after = sequence_ranking(*tensors(*[list(c) for c in zip(*moved, strict=True)]))
    assert after.tolist() == pytest.approx(before[order].tolist(), abs=1e-9)


def test_a_right_order_costs_nothing_and_a_wrong_one_its_distance():
    logp, length = torch.tensor([-1.0, -4.0, -9.0]), torch.tensor([1.0, 2.0, 3.0])  # p: -1 -2 -3
    group = torch.zeros(3, dtype=torch.int64)
    assert sequence_ranking(logp, length, torch.tensor([2.0, 1.0, 0.0]), group).tolist() == [0] * 3
    wrong = sequence_ranking(logp, length, torch.tensor([0.0, 1.0, 2.0]), group)
    assert wrong.tolist() == [1 + 1 + 2] * 3
    near = sequence_ranking(logp, length, torch.tensor([2.0, 1.0, 0.0]), group, margin=1.5)
    assert near.tolist() == [0.5 + 0.5 + 0] * 3
    mean = sequence_ranking(logp, length, torch.tensor([0.0, 1.0, 2.0]), group, mean=True)
    assert mean.tolist() == pytest.approx([4 / 3] * 3)


def test_the_mean_over_a_group_is_its_loss_whichever_of_it_counts():
    logp, length = torch.tensor([-1.0, -2.0, -5.0]), torch.ones(3)
    score, group = torch.tensor([0.0, 1.0, NAN]), torch.zeros(3, dtype=torch.int64)
    found = sequence_ranking(logp, length, score, group)
    assert found.tolist() == [1.0, 1.0, 1.0]  # the third has no score, and its group's loss


def test_equal_scores_single_answers_and_none_at_all_cost_nothing():
    logp, length = torch.tensor([-1.0, -2.0, -3.0]), torch.ones(3)
    alone = torch.arange(3)
    same = torch.zeros(3, dtype=torch.int64)
    assert not sequence_ranking(logp, length, torch.ones(3), same).any()
    assert not sequence_ranking(logp, length, torch.arange(3.0), alone).any()
    empty = torch.zeros(0)
    assert sequence_ranking(empty, empty, empty, torch.zeros(0, dtype=torch.int64)).shape == (0,)


def test_length_is_what_a_token_is_worth():
    """The same text in twice as many tokens of the same probability each is ranked alike."""
    short = sequence_ranking(
        torch.tensor([-2.0, -3.0]),
        torch.tensor([2.0, 3.0]),
        torch.tensor([0.0, 1.0]),
        torch.ones(2),
    )
    long = sequence_ranking(
        torch.tensor([-4.0, -3.0]),
        torch.tensor([4.0, 3.0]),
        torch.tensor([0.0, 1.0]),
        torch.ones(2),
    )
    assert short.tolist() == long.tolist() == [0.0, 0.0]


def test_gradient():
    generator = torch.Generator().manual_seed(0)
    logp = (-5 * torch.rand(9, generator=generator, dtype=torch.float64)).requires_grad_()
    length = torch.tensor([1.0, 2, 3, 1, 2, 3, 4, 1, 1], dtype=torch.float64)
    score = torch.tensor([0.0, 1, 2, 3, 1, 0, NAN, 2, 1])
    group = torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 2])

    def loss(x):
        return sequence_ranking(x, length, score, group, margin=0.1)

    assert torch.autograd.gradcheck(loss, logp)
    (gradient,) = torch.autograd.grad(loss(logp)[[0, 3, 7]].sum(), logp)
    assert gradient[6] == 0  # an answer without a score is not moved
    # The worse answer of a wrong pair is pushed down and the better one up: they even out.
    assert (gradient * length)[group == 2].sum() == pytest.approx(0, abs=1e-12)


def test_an_impossible_answer():
    logp = torch.tensor([-math.inf, -1.0, -math.inf], requires_grad=True)
    one, group = torch.ones(3), torch.zeros(3, dtype=torch.int64)
    fine = sequence_ranking(logp, one, torch.tensor([0.0, 2.0, 1.0]), group)
    assert fine.tolist() == [0.0] * 3
    fine.sum().backward()
    assert logp.grad.tolist() == [0.0] * 3
    assert sequence_ranking(logp, one, torch.tensor([2.0, 1.0, 0.0]), group)[0] == math.inf


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_at_least_float32(dtype):
    logp = torch.tensor([-1.0, -2.0], dtype=dtype)
    found = sequence_ranking(logp, torch.ones(2), torch.tensor([0.0, 1.0]), torch.zeros(2))
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    assert found.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("margin", [-1.0, NAN])
def test_a_margin_is_not_negative(margin):
    one = torch.ones(1)
    with pytest.raises(ValueError, match="margin"):
        sequence_ranking(one, one, one, one, margin=margin)
