"""Steps prepared ahead are the same steps, and the stream stands where the last one was taken."""

import logging
import os
import signal
import time
from dataclasses import dataclass, replace

import pytest
import torch

from limbeck.core.term import Term
from limbeck.core.types import NO_OFFSET, Pairing, Sample, Signals, Spans, Turn, View
from limbeck.losses.projection import Projection
from limbeck.models.load import load_student, load_teacher
from limbeck.train import prepare
from limbeck.train.batches import Batches, Item
from limbeck.train.prepare import NAMED_SAMPLES, Preparation
from limbeck.train.rows import usable, without_idle
from limbeck.train.worker import WorkerDied

CPU = torch.device("cpu")


@pytest.fixture(params=["process", "thread", "loop"])
def way(request, monkeypatch):
    """Where steps are made; in the loop itself where there is one core."""
    monkeypatch.setattr(prepare, "can_work_beside", lambda: request.param == "process")
    monkeypatch.setattr(prepare, "cores", lambda: 1 if request.param == "loop" else 2)
    return request.param


@pytest.fixture
def parts(make_recipe):
    """Makes a preparation over the tiny data, and what it is made of."""
    recipe = make_recipe()
    student = load_student(recipe.student, recipe.teachers, CPU, 0)
    teacher = load_teacher(recipe.teachers["big"], CPU, student.encoder.max_length)

    def make(reader=teacher, ahead=True, terms=None, rank=0, pin=False):
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
            pin=pin,
        )

    return make


def ids(micros):
    return [micro.views[None].ids.tolist() for micro in micros]


def test_made_ahead_they_are_the_same_steps(way, parts):
    ahead, batches = parts(), parts().batches
    for _ in range(5):
        expected = [[item.encoding.ids for item in items] for items in batches.next(2)]
        found = ahead.next(more=True)
        for micro, items in zip(found, expected, strict=True):
            kept = micro.views[None]
            assert [
                row[mask].tolist() for row, mask in zip(kept.ids, kept.attend, strict=True)
            ] == items
        assert ahead.truncated_tokens == batches.truncated_tokens
        assert ahead.dropped_samples == batches.dropped_samples
    assert (ahead._worker is not None) == (way == "process")
    assert (ahead._waiting is not None) == (way == "thread")
    # What the other process has drawn is not drawn here.
    assert (ahead.batches.window == 0) == (way == "process")


def test_the_place_is_that_of_the_step_handed_out(way, parts):
    """A checkpoint after two steps goes on with the third, which waits already."""
    first = parts()
    for _ in range(2):
        first.next(more=True)
    place = first.state_dict()
    third = ids(first.next(more=True))
    again = parts()
    again.next(more=True)
    again.load_state_dict(place)
    assert ids(again.next(more=True)) == third
    assert place != first.state_dict()


def test_what_is_cut_and_dropped_is_counted_wherever_steps_are_made(way, make_recipe):
    recipe = make_recipe(student={"from": "teacher", "layers": [0], "max_length": 12})
    student = load_student(recipe.student, recipe.teachers, CPU, 0)
    batches = Batches(recipe.source.open(0), student, 200, 0)
    fields = {"wanted": {}, "rank": 0, "processes": 1, "accumulate": 1, "pin": False}
    preparation = Preparation(student, {}, [], batches, **fields)
    preparation.next(more=True)
    found = preparation.truncated_tokens, preparation.dropped_samples
    again = Batches(recipe.source.open(0), student, 200, 0)
    again.next(1)
    assert found == (again.truncated_tokens, again.dropped_samples)
    assert found[0] > 0
    preparation.load_state_dict(preparation.state_dict())
    assert preparation.truncated_tokens == preparation.batches.truncated_tokens
    preparation.close()


def test_nothing_is_drawn_ahead_where_it_depends_on_the_student(way, parts):
    preparation = parts(ahead=False)
    preparation.next(more=True)
    assert preparation.state_dict().items() >= preparation.batches.state_dict().items()
    assert preparation._waiting is preparation._worker is None


def test_the_place_is_that_of_a_source_that_moves_on_after_the_step(parts):
    preparation = parts(ahead=False)
    preparation.next(more=True)
    source = preparation.batches.source
    next(source)  # what `on_step` does to it
    assert preparation.state_dict()["source"] == source.state_dict()


def test_a_step_that_does_not_come_about_is_begun_again(parts, monkeypatch):
    preparation = parts(ahead=False)
    preparation.next(more=True)
    source = preparation.batches.source
    next(source)
    place = preparation.state_dict()

    def half(_):
        next(source)
        raise ZeroDivisionError

    monkeypatch.setattr(preparation.batches, "next", half)
    with pytest.raises(ZeroDivisionError):
        preparation.next(more=True)
    assert preparation.state_dict() == place


@pytest.mark.parametrize("why", ["a GPU computes meanwhile", "a teacher's server does"])
def test_one_core_makes_them_ahead_where_it_would_wait(why, parts, monkeypatch):
    monkeypatch.setattr(prepare, "cores", lambda: 1)
    monkeypatch.setattr(prepare, "can_work_beside", lambda: False)
    monkeypatch.setattr(prepare, "_pinned", lambda made: made)
    pin = why == "a GPU computes meanwhile"
    monkeypatch.setattr(prepare, "_movable", lambda *_: pin)
    preparation = parts(pin=pin)
    preparation.next(more=True)
    assert preparation._waiting is not None


def test_an_error_is_raised_where_the_step_is_taken(way, parts, monkeypatch):
    preparation = parts()
    preparation.next(more=False)
    monkeypatch.setattr(preparation.batches, "next", lambda parts: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        preparation.next(more=True)


def test_where_the_process_dies_the_work_goes_on_here_and_no_step_is_lost(
    parts, monkeypatch, caplog
):
    monkeypatch.setattr(prepare, "can_work_beside", lambda: True)
    whole, broken = parts(), parts()
    expected = [ids(whole.next(more=True)) for _ in range(20)]
    found = [ids(broken.next(more=True)) for _ in range(2)]
    os.kill(broken._worker._process.pid, signal.SIGKILL)
    found += [ids(broken.next(more=True)) for _ in range(18)]
    assert found == expected
    (said,) = [record.getMessage() for record in caplog.records]
    assert said == "the process that prepares steps ended (exit code -9); this one goes on"
    assert broken._worker is None


def test_where_none_can_be_made_a_thread_does_it(parts, monkeypatch):
    monkeypatch.setattr(prepare, "can_work_beside", lambda: True)
    monkeypatch.setattr(prepare, "cores", lambda: 2)

    def full(*_, **__):
        raise OSError("cannot allocate memory")

    monkeypatch.setattr(prepare, "Worker", full)
    preparation = parts()
    preparation.next(more=True)
    assert preparation._waiting is not None


def test_a_thread_that_waits_for_the_process_is_let_go(parts, monkeypatch, caplog):
    """With a GPU a thread takes what the process made, and may be at it when all ends."""
    monkeypatch.setattr(prepare, "can_work_beside", lambda: True)
    monkeypatch.setattr(prepare, "_pinned", lambda made: made)
    preparation = parts(pin=True)
    preparation.next(more=True)
    preparation.next(more=True)
    preparation._waiting.result()
    take = preparation._worker.next
    monkeypatch.setattr(preparation._worker, "next", lambda: list(iter(take, None)))  # for ever
    waiting = preparation._waiting = preparation.thread.submit(preparation._take)
    while not waiting.running():
        time.sleep(0.01)
    preparation.close()
    assert isinstance(waiting.exception(10), WorkerDied)
    assert not caplog.records


def test_all_that_goes_to_a_gpu_is_pinned_but_no_head(monkeypatch):
    """Views, pairings and what cached teachers said; a head would be copied at every step."""
    seen = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: seen.append(self) or self)
    view = View(
        ids=torch.tensor([[1, 2]]),
        attend=torch.ones(1, 2, dtype=torch.bool),
        offsets=torch.zeros(1, 2, 2, dtype=torch.int64),
        rows=torch.tensor([0]),
        names=("a",),
    )
    head = Projection(hidden=torch.zeros(1, 3), weight=torch.zeros(5, 3))
    told = Signals(labels=torch.tensor([2]), projection=head, hidden={"-1": torch.zeros(1, 3)})
    pairing = Pairing(student=torch.tensor([0]), teacher=None, weight=torch.ones(1))
    micro = prepare.MicroBatch({None: view}, [pairing], {"big": told}, tokens=2)
    (pinned,) = prepare._pinned([micro])
    assert pinned.heard["big"].projection is head
    expected = [view.ids, view.attend, view.offsets, view.rows]
    expected += [pairing.student, pairing.weight, told.labels, told.hidden["-1"]]
    assert {id(tensor) for tensor in seen} == {id(tensor) for tensor in expected}
    assert pinned.views[None].names == ("a",)


class Bound:
    """A source or a teacher of which only one thing matters here."""

    def __init__(self, **fields):
        self.__dict__.update(fields)


@pytest.mark.parametrize(
    ("source", "readers", "expected"),
    [
        (Bound(ahead=True), [], True),
        (Bound(ahead=True), [Bound(), Bound(ahead=True, apart=True)], True),
        (Bound(ahead=False), [], False),
        (Bound(ahead=True, on_step=print), [], False),
        (Bound(ahead=True), [Bound(ahead=True)], False),  # a server
        (Bound(ahead=True), [Bound(ahead=True, apart=False)], False),  # a cache with a head
    ],
)
def test_what_is_bound_to_this_process_keeps_the_work_here(source, readers, expected):
    assert prepare._movable(source, readers) == expected


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
    found = usable(pairing, heard)
    assert found.weight.tolist() == [1, 1, 0]
    dense = without_idle(found)
    assert (dense.student.rows.tolist(), dense.teacher.rows.tolist()) == ([0, 1, 2], [0, 1, 2])
    # Row 3, of which no span is made, is not missed.
    heard = Signals(labels=torch.zeros(7).long(), valid=torch.arange(7) != 3)
    assert usable(pairing, heard).weight.tolist() == [1, 1, 1]
    heard = Signals(labels=torch.zeros(7).long(), valid=torch.arange(7) != 0)
    dense = without_idle(usable(pairing, heard))
    assert (dense.student.rows.tolist(), dense.student.span.tolist()) == ([1, 2, 3], [0, 0, 1])
    assert (dense.teacher.rows.tolist(), dense.teacher.span.tolist()) == (
        [2, 4, 5, 6],
        [0, 1, 1, 1],
    )
