"""Two answers share a key exactly where all that was sent for them is equal as JSON."""

import hashlib
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from limbeck.core.errors import RecipeError
from limbeck.ledger.keys import answer_key

SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
)
TEXTS = st.text(st.characters(), max_size=4)
VALUES = st.recursive(
    SCALARS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
PARAMETERS = st.dictionaries(TEXTS.filter(lambda name: name != "n"), VALUES, max_size=3)


def key(parameters, index=0):
    return answer_key("http://host/v1", "big", parameters, index)


def equal(a, b):
    """Equality of JSON values: Python's, but that it takes True for 1."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(equal(a[name], b[name]) for name in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b and isinstance(a, str) == isinstance(b, str)


def upside_down(value):
    """The same value, with every object's keys in the other order, and floats where they fit."""
    if isinstance(value, dict):
        return {name: upside_down(value[name]) for name in reversed(value)}
    if isinstance(value, list):
        return tuple(upside_down(inner) for inner in value)
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53:
        return float(value)
    return value


@given(PARAMETERS, PARAMETERS)
def test_equal_keys_are_equal_requests(one, other):
    assert (key(one) == key(other)) == equal(one, other)


@given(PARAMETERS)
def test_order_and_the_kind_of_number_do_not_matter(parameters):
    assert key(parameters) == key(upside_down(parameters))


@given(PARAMETERS, st.integers(0, 50), st.integers(0, 50))
def test_each_sample_has_its_own(parameters, first, second):
    assert (key(parameters, first) == key(parameters, second)) == (first == second)


def test_the_key_of_a_known_request():
    """Written out by hand: keys must stay what they are, or all that was paid for is lost."""
    text = (
        '["limbeck answer 1","http://host/v1","big",'
        '{"messages":[{"content":"caf\\u00e9","role":"user"}],"seed":7,"temperature":0.7},3]'
    )
    parameters = {
        "temperature": 0.7,
        "seed": 7,
        "messages": [{"role": "user", "content": "caf\u00e9"}],
    }
    assert key(parameters, 3) == hashlib.sha256(text.encode()).hexdigest()


def test_text_is_taken_as_it_is():
    composed, decomposed = "\u00e9", "e\u0301"
    assert key({"prompt": composed}) != key({"prompt": decomposed})
    assert key({"prompt": "\ud800"}) != key({"prompt": "?"})
    assert key({"seed": True}) != key({"seed": 1})
    assert key({"seed": "1"}) != key({"seed": 1})


def test_endpoint_and_model_count():
    same = answer_key("http://host/v1/", "big", {}, 0)
    assert same == answer_key("http://host/v1", "big", {}, 0)
    assert same != answer_key("http://host/v2", "big", {}, 0)
    assert same != answer_key("http://host/v1", "small", {}, 0)


@pytest.mark.parametrize(
    ("parameters", "place"),
    [
        ({"extra": {"top_k": math.nan}}, "extra.top_k"),
        ({"a": [1.0, math.inf]}, "a.1"),
        ({"a": {1: 2}}, "a"),
        ({"a": b"bytes"}, "a"),
        ({"a": {1, 2}}, "a"),
        ({"n": 4}, "n"),
    ],
)
def test_what_is_not_json_is_refused(parameters, place):
    with pytest.raises(RecipeError) as wrong:
        key(parameters)
    assert wrong.value.field == place


@pytest.mark.parametrize("index", [-1, 1.0, True])
def test_an_index_counts_from_0(index):
    with pytest.raises(RecipeError, match="index"):
        key({}, index)
