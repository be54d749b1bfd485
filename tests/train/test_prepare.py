"""Steps prepared ahead are the same steps, and the stream stands where the last one was taken."""

import logging
from dataclasses import dataclass, replace

import pytest
import torch

from limbeck.core.term import Term
from limbeck.core.types import NO_OFFSET, Pairing, Sample, Signals, Spans, Turn
from limbeck.models.load import load_student, load_teacher
from limbeck.train.batches import Batches, Item
from limbeck.train.prepare import NAMED_SAMPLES, Preparation, _usable, _without_idle

CPU = torch.device("cpu")


@pytest.fixture
def parts(make_recipe):
    """Makes a preparation over the tiny data, and what it is made of."""
    recipe = make_recipe()
    student = load_student(recipe.student, recipe.teachers, CPU, 0)
    teacher = load_teacher(recipe.teachers["big"], CPU, student.encoder.max_length)

    def make(reader=teacher, ahead=True, terms=None, rank=0):
        source = recipe.source.open(0)
        source.ahead = ahead
        batches = Batches(source, student, 200, 0)
        return Preparation(
            student,
            {"big": reader},
            recipe.terms if terms is None else terms,
            batches,
            wanted={"big": frozenset({"logits"})},
            rank=rank,
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
    assert preparation.state_dict().items() >= preparation.batches.state_dict().items()
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


@dataclass(frozen=True)
class Asking:
    """An objective of which only the unit matters here."""

    unit: str
    rowwise: bool = False
    kind: str = "asking"
    asks = needs = frozenset({"chosen"})
    shared_vocabulary = False


def term(unit, **fields) -> Term:
    objective = Asking(unit, rowwise=fields.pop("rowwise", False))
    return Term(objective=objective, teacher="big", name=fields.pop("name", unit), **fields)


class Other:
    """A teacher of another vocabulary, to which some samples' bytes are unknown."""

    name, vocabulary = "other", "another one"

    def __init__(self, student, mute=lambda sample: False):
        self.student, self.mute = student, mute

    def encode(self, sample):
        encoding = self.student.encode(sample)
        if not self.mute(sample):
            return encoding
        nowhere = [NO_OFFSET] * len(encoding.ids)
        return replace(encoding, starts=nowhere, ends=nowhere, learn=[False] * len(nowhere))

    def collate(self, encodings):
        return self.student.collate(encodings)


UNITS = ("token", "order", "span", "sample")


def items(preparation, weights, channel="main"):
    """A micro-batch of equal samples, every other one in another channel where asked."""
    samples = [
        Sample(
            id=f"row {index}",
            turns=(Turn(text="the cat"), Turn(text=" sat on a mat", learn=True)),
            weight=weight,
            channel=channel if index % 2 else "main",
        )
        for index, weight in enumerate(weights)
    ]
    return [Item(sample, preparation.student.encode(sample)) for sample in samples]


def samples_of(preparation, micro, name, index):
    view = micro.views[name]
    if index is None:
        return set(range(view.sample_count))
    rows = index.rows if isinstance(index, Spans) else index
    return set(view.sample_of(view.rows)[rows].tolist())


@pytest.mark.parametrize("another", [False, True])
@pytest.mark.parametrize("unit", UNITS)
def test_what_weighs_nothing_is_not_seen_by_objectives_of_many_rows(parts, unit, another):
    preparation = parts()
    reader = Other(preparation.student) if another else preparation.readers["big"]
    terms = [term(unit), term(unit, name="by row", rowwise=True), term(unit, channel="x", name="x")]
    preparation = parts(reader=reader, terms=terms)
    micro = preparation.prepare(items(preparation, [1.0, 0.0, 2.0], channel="x"))
    dense, by_row, none = micro.pairings
    assert (dense.weight > 0).all()
    assert samples_of(preparation, micro, None, dense.student) == {0, 2}
    if unit == "sample":
        assert dense.teacher is None  # the teacher's rows are others
    else:
        assert samples_of(preparation, micro, "big", dense.teacher) == {0, 2}
        count = len(dense.weight)
        for index in (dense.student, dense.teacher):
            groups = len(index.after) if isinstance(index, Spans) else len(index)
            assert groups == count
            if isinstance(index, Spans):
                assert index.span.unique().tolist() == list(range(count))
    # Rows that are asked for one by one need not be dropped, only not counted.
    assert by_row.weight.sum() == dense.weight.sum()
    assert (by_row.weight == 0).any()
    assert len(none.weight) == 0
    assert [*map(list, micro.unaligned)] == [[], [], []]


@pytest.mark.parametrize("unit", UNITS)
def test_where_all_count_the_pairing_stays_as_it_is(parts, unit):
    preparation = parts(terms=[term(unit)])
    micro = preparation.prepare(items(preparation, [1.0, 2.0]))
    if unit != "span":
        assert micro.pairings[0].student is None
        assert micro.pairings[0].teacher is None
    assert set(micro.pairings[0].weight.tolist()) == {1.0, 2.0}


@pytest.mark.parametrize("unit", UNITS)
def test_samples_that_cannot_be_aligned_are_skipped_counted_and_named(parts, unit, caplog):
    plain = parts()
    reader = Other(plain.student, mute=lambda sample: sample.id in ("row 1", "row 2"))
    preparation = parts(reader=reader, terms=[term(unit), term(unit, channel="x", name="x")])
    micro = preparation.prepare(items(preparation, [1.0, 1.0, 0.0, 1.0], channel="x"))
    # Row 2 weighs nothing, and what is not in a term's channel is not missed.
    assert [*map(list, micro.unaligned)] == [["row 1"], ["row 1"]]
    assert samples_of(preparation, micro, None, micro.pairings[0].student) == {0, 3}
    with caplog.at_level(logging.WARNING):
        preparation._count(micro.unaligned)
    assert preparation.unaligned == {unit: 1, "x": 1}
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2
    assert said[0].startswith(f"row row 1 is skipped for {unit}: ")


def mute_run(parts):
    plain = parts()
    return parts(reader=Other(plain.student, mute=lambda sample: True), terms=[term("span")])


def test_skipped_samples_are_counted_through_a_resume_and_only_the_first_are_named(parts, caplog):
    first = mute_run(parts)
    with caplog.at_level(logging.WARNING):
        seen = [sum(m.views[None].sample_count for m in first.next(more=True)) for _ in range(3)]
    assert seen[0] > NAMED_SAMPLES
    # The step that waits is made already, but it has not been handed out.
    assert first.unaligned == {"span": sum(seen)}
    assert len(caplog.records) == NAMED_SAMPLES + 1
    assert "only counted" in caplog.records[-1].getMessage()
    caplog.clear()

    again = mute_run(parts)
    again.load_state_dict(first.state_dict())
    with caplog.at_level(logging.WARNING):
        more = sum(m.views[None].sample_count for m in again.next(more=False))
    assert again.unaligned == {"span": sum(seen) + more}
    assert not caplog.records
    first.thread.shutdown()


def test_counts_of_one_process_are_not_added_to_those_of_another(parts):
    state = {**mute_run(parts).state_dict(), "unaligned": {"span": 7}}
    for rank, counted in ((0, 7), (1, 0)):
        preparation = parts(terms=[term("span")], rank=rank)
        preparation.load_state_dict(state)
        assert preparation.unaligned == {"span": counted}


def test_a_checkpoint_of_before_has_no_counts(parts):
    preparation = parts()
    state = preparation.state_dict()
    del state["unaligned"]
    preparation.load_state_dict(state)
    assert set(preparation.unaligned.values()) == {0}


def test_a_span_counts_where_the_teacher_knows_all_its_rows():
    def spans(*groups):
        rows = torch.tensor([row for group in groups for row in group])
        span = torch.tensor([place for place, group in enumerate(groups) for _ in group])
        return Spans(rows=rows, span=span, after=torch.full((len(groups),), -1))

    student, teacher = spans([0], [1, 2], [3]), spans([0, 1], [2], [4, 5, 6])
    pairing = Pairing(student=student, teacher=teacher, weight=torch.ones(3), unit="span")
    heard = Signals(labels=torch.zeros(7).long(), valid=torch.arange(7) != 5)
    usable = _usable(pairing, heard)
    assert usable.weight.tolist() == [1, 1, 0]
    dense = _without_idle(usable)
    assert (dense.student.rows.tolist(), dense.teacher.rows.tolist()) == ([0, 1, 2], [0, 1, 2])
    # Row 3, of which no span is made, is not missed.
    heard = Signals(labels=torch.zeros(7).long(), valid=torch.arange(7) != 3)
    assert _usable(pairing, heard).weight.tolist() == [1, 1, 1]
    heard = Signals(labels=torch.zeros(7).long(), valid=torch.arange(7) != 0)
    dense = _without_idle(_usable(pairing, heard))
    assert (dense.student.rows.tolist(), dense.student.span.tolist()) == ([1, 2, 3], [0, 0, 1])
    assert (dense.teacher.rows.tolist(), dense.teacher.span.tolist()) == (
        [2, 4, 5, 6],
        [0, 1, 1, 1],
    )
