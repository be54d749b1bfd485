"""Rows of one prompt together; questions that keep their order."""

import pytest
from fakes import FakeWriter, prompt, row
from hypothesis import given
from hypothesis import strategies as st

from limbeck.core.errors import DataError
from limbeck.core.exchange import Question
from limbeck.core.types import Sampling
from limbeck.synth.grouped import asked, grouped


def test_rows_of_a_group_stand_together_and_others_alone():
    names = [None, "a", "a", None, None, "b", "c", "c"]
    rows = [row(str(index), group=name) for index, name in enumerate(names)]
    found = [[one.id for one in group] for group in grouped(iter(rows))]
    assert found == [["0"], ["1", "2"], ["3"], ["4"], ["5"], ["6", "7"]]
    assert list(grouped([])) == []


def test_a_group_that_comes_twice_is_refused():
    rows = [row("1", group="a"), row("2", group="b"), row("3", group="a")]
    with pytest.raises(DataError, match="row 3: rows of group 'a' stand apart"):
        list(grouped(rows))


@given(st.lists(st.booleans(), max_size=12), st.integers(1, 5))
def test_items_keep_their_order_whatever_is_asked(asks, window):
    writer = FakeWriter(lambda question, index: f"{question.id}-{index}", window)
    items = (
        (place, Question(id=str(place), prompt=prompt("?")) if wanted else None)
        for place, wanted in enumerate(asks)
    )
    found = list(asked(items, writer, Sampling(), 2))
    assert [place for place, _ in found] == list(range(len(asks)))
    for (place, replies), wanted in zip(found, asks, strict=True):
        texts = None if replies is None else [reply.text for reply in replies]
        assert texts == ([f"{place}-0", f"{place}-1"] if wanted else None)
