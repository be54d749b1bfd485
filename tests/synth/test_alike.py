"""Indexes: what they find against all pairs, and MinHash against its own probability."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.synth.alike import RECALL, Kept, MinHash, Near, Places, Prefixes
from limbeck.synth.words import jaccard

SETS = st.sets(st.integers(0, 2**64 - 1), max_size=30)


def sorted_set(values):
    return np.array(sorted(values), dtype=np.uint64)


@given(
    st.lists(st.sets(st.integers(0, 12), max_size=9), max_size=12), st.sampled_from((1, 3, 7, 10))
)
def test_prefixes_find_every_pair(sets, tenths):
    """Small universes, so that there are many pairs exactly at the threshold."""
    threshold = tenths / 10
    mixed = [sorted_set((v * 0x9E3779B97F4A7C15) % 2**64 for v in one) for one in sets]
    index, kept = Prefixes(threshold), Kept(threshold)
    for place, one in enumerate(mixed):
        expected = {
            number: similarity
            for number in range(place)
            if (similarity := jaccard(mixed[number], one)) >= threshold
        }
        assert dict(kept.repeated(one, index.marks(one))) == expected
        assert kept.add(one, index.marks(one)) == place


@given(SETS)
def test_equal_sets_have_equal_marks(values):
    one, minhash = sorted_set(values), MinHash(0.7)
    assert minhash.marks(one).tolist() == MinHash(0.7).marks(one.copy()).tolist()
    assert bool(len(minhash.marks(one))) == bool(values)


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 0.9, 1.0])
def test_bands_are_as_wide_as_the_recall_allows(threshold):
    minhash = MinHash(threshold)
    assert minhash.rows == 1 or minhash.recall(minhash.rows) >= RECALL
    assert threshold == 1.0 or minhash.recall(minhash.rows + 1) < RECALL


@given(st.lists(st.sets(st.integers(0, 20), max_size=6), max_size=40), st.integers(1, 30))
def test_places_are_those_of_a_dictionary(texts, fresh):
    """Whatever the number of marks after which they become arrays."""
    places, expected = Places(fresh), {}
    for number, values in enumerate(texts):
        marks = sorted_set(values)
        assert places.find(marks) == sorted({n for v in values for n in expected.get(v, ())})
        places.add(marks, number)
        for value in values:
            expected.setdefault(value, []).append(number)
    for value in range(21):
        assert places.find(sorted_set({value})) == expected.get(value, [])


def test_there_are_few_arrays():
    places = Places(1)
    for number in range(1000):
        places.add(sorted_set({number, number + 1}), number)
    assert len(places._arrays) <= 12  # they double
    assert places.find(sorted_set({500})) == [499, 500]


def pair(draw, shared, alone):
    values = draw.sample(range(2**62), shared + 2 * alone)
    return sorted_set(values[: shared + alone]), sorted_set(
        values[:shared] + values[shared + alone :]
    )


@pytest.mark.parametrize("permutations", [64, 128])
def test_minima_agree_as_often_as_the_sets_are_alike(permutations):
    """The estimate of J is a mean over permutations; 200 pairs make its error small."""
    draw, minhash = random.Random(0), MinHash(0.7, permutations)
    for shared, alone in ((30, 10), (10, 10), (5, 40)):
        expected = shared / (shared + 2 * alone)
        shares = []
        for _ in range(200):
            one, other = pair(draw, shared, alone)
            shares.append(float((minhash.signature(one) == minhash.signature(other)).mean()))
        error = (expected * (1 - expected) / permutations / 200) ** 0.5
        assert np.mean(shares) == pytest.approx(expected, abs=5 * error)


def test_pairs_at_the_threshold_are_found():
    draw, minhash = random.Random(1), MinHash(0.6)
    found = 0
    for _ in range(400):
        one, other = pair(draw, 30, 10)  # J = 0.6
        found += bool(np.isin(minhash.marks(one), minhash.marks(other)).any())
    assert found >= 0.97 * 400
    far = 0
    for _ in range(400):
        one, other = pair(draw, 5, 40)
        far += bool(np.isin(minhash.marks(one), minhash.marks(other)).any())
    assert far < 0.2 * 400


def test_it_agrees_with_datasketch():
    """Another implementation, with other permutations: the estimates differ by chance alone."""
    datasketch = pytest.importorskip("datasketch")
    draw, minhash = random.Random(2), MinHash(0.7, 256)
    differences = []
    for _ in range(50):
        one, other = pair(draw, 40, 15)
        theirs = []
        for values in (one, other):
            sketch = datasketch.MinHash(num_perm=256)
            for value in values.tolist():
                sketch.update(value.to_bytes(8, "little"))
            theirs.append(sketch)
        own = (minhash.signature(one) == minhash.signature(other)).mean()
        differences.append(own - theirs[0].jaccard(theirs[1]))
    assert abs(np.mean(differences)) < 5 * (2 * 0.25 / 256 / 50) ** 0.5


def test_a_long_text_takes_no_more_memory_than_a_piece_of_it():
    import tracemalloc

    values = np.arange(200_000, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    minhash = MinHash(0.7)
    tracemalloc.start()
    minhash.marks(values)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6  # all at once would be 128 * 200,000 * 8 bytes


@given(st.lists(st.integers(0, 5), max_size=80))
@settings(max_examples=30)
def test_near_finds_every_vector_within_the_cosine(numbers):
    directions = np.eye(6, dtype=np.float32)
    near, kept = Near(0.99), []
    for number in numbers:
        expected = [place for place, one in enumerate(kept) if one == number]
        assert [place for place, _ in near.repeated(directions[number])] == expected
        assert near.add(directions[number]) == len(kept)
        kept.append(number)
