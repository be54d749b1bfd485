"""What is packed comes back: ids and counts exactly, log-probabilities within the stated bounds."""

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from limbeck.teachers.codec import (
    HEAD_ERROR,
    LOGP_ERROR,
    MEAN_ERROR,
    REST_ERROR,
    pack_draws,
    pack_floats,
    pack_topk,
    unpack_draws,
    unpack_floats,
    unpack_rest,
    unpack_topk,
)

SLACK = 1e-5
"""For float32, in which log-probabilities are given back."""


def teacher(seed, rows, vocabulary, k, sharpness, ruled_out=0.0):
    """Ids and log-probabilities of the k likeliest tokens, shuffled, in float64."""
    generator = np.random.default_rng(seed)
    logits = generator.gumbel(size=(rows, vocabulary)) * sharpness
    logits[generator.random(logits.shape) < ruled_out] = -np.inf
    logits[:, 0] = np.maximum(logits[:, 0], -5.0)  # one token at least is possible
    top = logits.max(axis=1, keepdims=True)
    logp = logits - top - np.log(np.exp(logits - top).sum(axis=1, keepdims=True))
    ids = np.argsort(-logp, axis=1, kind="stable")[:, :k]
    ids = generator.permuted(ids, axis=1)
    return ids, np.take_along_axis(logp, ids, axis=1)


def by_id(ids, values):
    order = np.argsort(ids, axis=1)
    return np.take_along_axis(ids, order, axis=1), np.take_along_axis(values, order, axis=1)


def bound(logp):
    """How far a stored log-probability may be off, written from the module's description."""
    return np.minimum(HEAD_ERROR * (1 - logp), LOGP_ERROR)


@st.composite
def sizes(draw):
    """Rows, vocabulary and k: small ones often, and vocabularies above 131,072."""
    small = st.integers(2, 300)
    vocabulary = draw(st.one_of(small, st.sampled_from([131_072, 131_073, 151_936, 300_000])))
    rows = draw(st.integers(0, 40 if vocabulary <= 300 else 3))
    k = draw(st.one_of(st.integers(1, min(vocabulary, 200)), st.just(vocabulary)))
    return rows, vocabulary, k


@settings(max_examples=120)
@example((300, 20, 20), 0, 1.0, 0.0)  # more rows than a byte can count
@example((2, 300_000, 300_000), 1, 3.0, 0.5)
@given(
    sizes(),
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.0, 0.3, 1.0, 4.0, 30.0, 3000.0]),
    st.sampled_from([0.0, 0.1, 0.9]),
)
def test_top_k_comes_back(size, seed, sharpness, ruled_out):
    rows, vocabulary, k = size
    ids, exact = teacher(seed, rows, vocabulary, k, sharpness, ruled_out)
    given_logp = exact.astype(np.float32)
    cells = pack_topk(ids, given_logp, vocabulary)
    found, logp = unpack_topk(cells, rows, k)
    rest = unpack_rest(cells, rows).astype(np.float64)
    assert (found.dtype, logp.dtype, found.shape) == (np.int64, np.float32, (rows, k))

    found, logp = by_id(found, logp.astype(np.float64))
    wanted, exact = by_id(ids, exact)
    np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(np.isneginf(logp), np.isneginf(exact))

    true_mass = np.exp(exact).sum(axis=1)
    mass = np.exp(logp).sum(axis=1)
    np.testing.assert_allclose((mass + rest)[true_mass > 0], 1, atol=1e-5)
    odds_off = math.expm1(REST_ERROR) + 1e-6
    floor = 3e-7 * k  # float32 log-probabilities cannot say less
    assert (np.abs(rest - (1 - true_mass)) <= odds_off * np.minimum(rest, mass) + floor).all()

    known = np.isfinite(logp)
    error = np.abs(np.where(known, logp - np.where(known, exact, 0), 0))
    weighed = np.exp(exact) * bound(np.where(known, exact, 0))
    shift = (weighed.sum(axis=1) / np.maximum(true_mass, 1e-300)) * 1.2 + floor + 2 * odds_off
    allowed = bound(np.where(known, exact, 0)) * 1.01 + shift[:, None]
    assert (error <= allowed + SLACK * (1 + np.abs(np.where(known, exact, 0)))).all()
    assert (error <= 2 * LOGP_ERROR + 0.01 + 1e-6 * np.abs(np.where(known, exact, 0))).all()


def test_a_likely_token_is_kept_more_closely_than_an_unlikely_one():
    logp = np.log(np.array([[0.9, 0.06, 0.03, 0.009, 0.0009, 1e-5]]))
    found, back = unpack_topk(pack_topk(np.arange(6)[None], logp, 10), 1, 6)
    error = np.abs(by_id(found, back)[1] - logp)[0]
    assert error[0] < 0.002
    assert error[1:4].max() < 3 * HEAD_ERROR * 6
    assert error.max() < LOGP_ERROR + 0.02


@pytest.mark.parametrize("head", [0.5, 0.999999, 1.0])
def test_the_rest_keeps_its_precision_at_both_ends(head):
    logp = np.log(np.array([[head], [1e-9], [1e-3]]))
    cells = pack_topk(np.zeros((3, 1), int), logp, 7)
    rest = unpack_rest(cells, 3)
    assert rest[0] == pytest.approx(1 - head, rel=1e-3)
    _, back = unpack_topk(cells, 3, 1)
    np.testing.assert_allclose(back, logp, atol=2 * REST_ERROR)  # one token: scaled to 1 - rest


def test_rows_of_which_nothing_or_everything_is_kept():
    nothing = np.full((1, 2), -np.inf)
    cells = pack_topk(np.array([[3, 1]]), nothing, 5)
    assert np.isneginf(unpack_topk(cells, 1, 2)[1]).all()
    assert unpack_rest(cells, 1) == 1
    whole = np.log(np.array([[0.25, 0.75]]))
    assert unpack_rest(pack_topk(np.array([[1, 0]]), whole, 2), 1) == 0


@pytest.mark.parametrize("extra_bits", range(-2, 7))
def test_each_bit_more_halves_the_error(extra_bits):
    ids, logp = teacher(3, 50, 3000, 60, 1.5)
    found, back = unpack_topk(pack_topk(ids, logp, 3000, extra_bits), 50, 60)
    error = np.abs(by_id(found, back)[1] - by_id(ids, logp)[1])
    allowed = 2.0**-extra_bits * bound(by_id(ids, logp)[1]) + 2.0**-extra_bits * 0.03
    assert (error <= allowed + 2 * REST_ERROR).all()
    assert error.max() > 2.0**-extra_bits * LOGP_ERROR / 2  # the bits are not spent for nothing


def test_bits_beyond_what_is_known_are_refused():
    ids, logp = teacher(3, 2, 30, 6, 1.5)
    for extra_bits in (-3, 7):
        with pytest.raises(ValueError, match=r"-2 \.\. 6"):
            pack_topk(ids, logp, 30, extra_bits)


def test_the_lowest_logit_a_mask_writes_rules_a_token_out():
    logp = np.array([[0.0, np.finfo(np.float32).min]], np.float32)
    _, back = unpack_topk(pack_topk(np.array([[0, 1]]), logp, 4), 1, 2)
    assert by_id(np.array([[0, 1]]), back)[1].tolist() == [[0.0, -np.inf]]


@settings(max_examples=120)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(0, 300),
    st.integers(1, 70),
    st.sampled_from([2, 3, 50, 1000, 131_073, 300_000]),
    st.floats(0.01, 3),
)
def test_draws_come_back(seed, rows, draws, vocabulary, spread):
    generator = np.random.default_rng(seed)
    ids = (generator.random((rows, draws)) ** (1 / spread) * vocabulary).astype(np.int64)
    mean_logp = -generator.exponential(5, rows).astype(np.float32)
    cells = pack_draws(ids, mean_logp, vocabulary)
    found, counts, means = unpack_draws(cells, rows)
    assert found.shape == counts.shape
    assert means.dtype == np.float32
    np.testing.assert_allclose(means, mean_logp, atol=MEAN_ERROR * 1.0001, rtol=1e-6)
    widest = 0
    for row in range(rows):
        wanted = dict(zip(*np.unique(ids[row], return_counts=True), strict=True))
        there = counts[row] > 0
        assert dict(zip(found[row][there], counts[row][there], strict=True)) == wanted
        assert (found[row][~there] == 0).all()
        widest = max(widest, len(wanted))
    assert found.shape == (rows, widest)


@settings(max_examples=60)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(0, 20),
    st.integers(1, 30),
    st.sampled_from(["float32", "bfloat16", "float16"]),
)
def test_floats_come_back_as_torch_rounds_them(seed, rows, width, dtype):
    bits = np.random.default_rng(seed).integers(0, 2**32, (rows, width), dtype=np.uint32)
    array = bits.view(np.float32)  # any float32 at all: infinities, NaN, subnormal
    back = unpack_floats(pack_floats(array, dtype), rows, width)
    wanted = torch.from_numpy(array).to(getattr(torch, dtype)).float().numpy()
    assert back.dtype == np.float32
    np.testing.assert_array_equal(back, wanted)


def test_a_float_half_way_goes_to_the_even_neighbour():
    halves = (np.arange(64, dtype=np.uint32) * 0x8000 + 0x3F800000).view(np.float32)[None]
    back = unpack_floats(pack_floats(halves, "bfloat16"), 1, 64)
    np.testing.assert_array_equal(back, torch.from_numpy(halves).bfloat16().float().numpy())


def test_floats_of_a_hidden_state_take_less_than_their_bits():
    array = np.random.default_rng(0).normal(size=(64, 256)).astype(np.float32)
    (cell,) = pack_floats(array, "bfloat16").values()
    assert len(cell) < 0.85 * array.size * 2


def test_a_text_that_repeats_its_tokens_costs_little():
    """Entries are stored token by token, so ids that come again in every row are nearly free."""
    generator = np.random.default_rng(0)
    same = np.repeat(generator.choice(151_936, (1, 50), replace=False), 200, axis=0)
    different = np.stack([generator.choice(151_936, 50, replace=False) for _ in range(200)])
    logp = np.full((200, 50), math.log(0.01))
    repeated = len(pack_topk(same, logp, 151_936)["ids"])
    assert repeated < 0.05 * len(pack_topk(different, logp, 151_936)["ids"])


@pytest.mark.parametrize(
    ("ids", "logp", "message"),
    [
        ([[0, 5]], [[-1.0, -1.0]], "0 .. 4"),
        ([[-1, 2]], [[-1.0, -1.0]], "0 .. 4"),
        ([[2, 2]], [[-1.0, -1.0]], "twice"),
        ([[1, 2]], [[-1.0, math.nan]], "not numbers"),
        ([[1, 2]], [[-0.1, -0.1]], "more than 1"),
        ([[1, 2]], [[-1.0]], "log-probabilities"),
    ],
)
def test_what_is_no_distribution_is_refused(ids, logp, message):
    with pytest.raises(ValueError, match=message):
        pack_topk(np.array(ids), np.array(logp), 5)


def test_draws_that_are_none_are_refused():
    with pytest.raises(ValueError, match=r"0 \.\. 4"):
        pack_draws(np.array([[0, 5]]), np.array([-1.0]), 5)
    for means in ([math.nan], [0.5], [-math.inf], [-1.0, -1.0]):
        with pytest.raises(ValueError, match="finite means"):
            pack_draws(np.array([[0, 1]]), np.array(means), 5)


def test_cells_of_another_shape_are_refused():
    ids, logp = teacher(0, 4, 30, 5, 1.0)
    cells = pack_topk(ids, logp, 30)
    for rows, k in ((4, 6), (3, 5), (5, 5), (0, 5)):
        with pytest.raises(ValueError, match=r"cell|row|tokens"):
            unpack_topk(cells, rows, k)
    with pytest.raises(ValueError, match="no cell logp"):
        unpack_topk({"ids": cells["ids"]}, 4, 5)
    draws = pack_draws(ids, logp.mean(axis=1), 30)
    for rows in (3, 5):
        with pytest.raises(ValueError, match=r"cell|row|counts|entries"):
            unpack_draws(draws, rows)
    floats = pack_floats(logp, "float16")
    for rows, width in ((4, 4), (3, 5), (5, 4)):
        with pytest.raises(ValueError, match=r"cell|rows"):
            unpack_floats(floats, rows, width)
    with pytest.raises(ValueError, match="dtype must be one of"):
        pack_floats(logp, "float8")


def test_ids_and_counts_are_checked_against_what_the_cell_says():
    """Written by hand: one row with token 4 twice, of a vocabulary of 3 or with three draws."""
    from limbeck.teachers.planes import pack_integers, varints

    def cells(vocabulary, draws, token, count):
        entries = varints(1) + pack_integers([token]) + pack_integers([0]) + pack_integers([0])
        return {
            "ids": varints(vocabulary, draws) + entries,
            "counts": pack_integers([count - 1]),
            "mean": pack_integers([0]),
        }

    assert unpack_draws(cells(5, 2, 4, 2), 1)[1].tolist() == [[2]]
    with pytest.raises(ValueError, match="out of range"):
        unpack_draws(cells(3, 2, 4, 2), 1)
    with pytest.raises(ValueError, match="do not sum to 3"):
        unpack_draws(cells(5, 3, 4, 2), 1)


@settings(max_examples=300)
@given(st.data())
def test_damaged_cells_give_a_value_error_or_arrays_of_the_right_shape(data):
    """No other error, no endless loop, no memory without bound; SHA-256 is the store's affair."""
    ids, logp = teacher(1, 9, 400, 12, 2.0)
    kind = data.draw(st.sampled_from(["topk", "draws", "floats"]))
    cells = {
        "topk": lambda: pack_topk(ids, logp, 400),
        "draws": lambda: pack_draws(ids // 40, logp.mean(axis=1), 400),
        "floats": lambda: pack_floats(logp, "bfloat16"),
    }[kind]()
    name = data.draw(st.sampled_from(sorted(cells)))
    cell = bytearray(cells[name])
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(cell) - 1))
        cell[place] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del cell[data.draw(st.integers(0, len(cell) - 1)) :]
    cells[name] = bytes(cell)
    try:
        if kind == "topk":
            found, values = unpack_topk(cells, 9, 12)
            unpack_rest(cells, 9)
            assert found.shape == values.shape == (9, 12)
        elif kind == "draws":
            found, counts, _ = unpack_draws(cells, 9)
            assert found.shape == counts.shape
        else:
            assert unpack_floats(cells, 9, 12).shape == (9, 12)
    except ValueError:
        return
    if kind != "floats":
        assert (found >= 0).all()
