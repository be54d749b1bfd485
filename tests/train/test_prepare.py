"""Steps prepared ahead are the same steps, and the stream stands where the last one was taken."""

import pytest
import torch

from limbeck.core.types import Signals
from limbeck.models.load import load_student, load_teacher
from limbeck.train.batches import Batches
from limbeck.train.prepare import Preparation

CPU = torch.device("cpu")


@pytest.fixture
def parts(make_recipe):
    """Makes a preparation over the tiny data, and what it is made of."""
    recipe = make_recipe()
    student = load_student(recipe.student, recipe.teachers, CPU, 0)
    teacher = load_teacher(recipe.teachers["big"], CPU, student.encoder.max_length)

    def make(reader=teacher, ahead=True):
        source = recipe.source.open(0)
        source.ahead = ahead
        batches = Batches(source, student, 200, 0)
        return Preparation(
            student,
            {"big": reader},
            recipe.terms,
            batches,
            wanted={"big": frozenset({"logits"})},
            rank=0,
            processes=1,
            accumulate=2,
            pin=False,
        )

    return make


def ids(micros):
    return [micro.views[None].ids.tolist() for micro in micros]


def test_the_thread_changes_no_step(parts):
    ahead, batches = parts(), parts().batches
    for _ in range(5):
        expected = [[item.encoding.ids for item in items] for items in batches.next(2)]
        found = ahead.next(more=True)
        for micro, items in zip(found, expected, strict=True):
            kept = micro.views[None]
            assert [
                row[mask].tolist() for row, mask in zip(kept.ids, kept.attend, strict=True)
            ] == items


def test_the_place_is_that_of_the_step_handed_out(parts):
    """A checkpoint after two steps goes on with the third, which waits already."""
    first = parts()
    for _ in range(2):
        first.next(more=True)
    place = first.state_dict()
    third = ids(first.next(more=True))
    again = parts()
    again.load_state_dict(place)
    assert ids(again.next(more=True)) == third
    assert place != first.state_dict()


def test_nothing_is_drawn_ahead_where_it_depends_on_the_student(parts):
    preparation = parts(ahead=False)
    preparation.next(more=True)
    assert preparation.state_dict() == preparation.batches.state_dict()
    assert preparation._waiting is None


def test_an_error_in_the_thread_is_raised_where_the_step_is_taken(parts, monkeypatch):
    preparation = parts()
    preparation.next(more=False)
    monkeypatch.setattr(preparation.batches, "next", lambda parts: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        preparation.next(more=True)


class Silent:
    """A cached teacher that has nothing to say about every other row."""

    ahead = True
    name = "big"

    def __init__(self, student):
        self.vocabulary = student.vocabulary

    def read(self, view, needs):
        valid = torch.arange(len(view.rows)) % 2 == 0
        return Signals(labels=view.labels, valid=valid)


def test_rows_of_which_a_cache_knows_nothing_are_not_counted(parts):
    preparation = parts()
    preparation = parts(reader=Silent(preparation.student))
    for micro in preparation.next(more=False):
        rows = len(micro.views[None].rows)
        heard, alone = micro.pairings  # forward_kl listens to the teacher, cross_entropy does not
        assert heard.weight.sum() == (rows + 1) // 2
        assert alone.weight.sum() == rows
        assert set(micro.heard) == {"big"}
