"""Spans of bytes: groups are those that a walk along both texts finds, and nothing is lost."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.align.spans import pair
from limbeck.core.types import NO_OFFSET, Encoding, Signals, Spans
from limbeck.models.encode import Encoder


class Vocabulary:
    """All that `collate` needs of a tokenizer."""

    eos_token_id, pad_token_id = 1, 0


ENCODER = Encoder(Vocabulary(), 10_000)


@dataclass
class Stretch:
    """Consecutive rows that cover the same bytes."""

    start: int
    end: int
    rows: list[int]


def stretches(view, sample):
    """The learnt stretches of a sample that are whole, by walking its tokens."""
    offsets = view.offsets.flatten(0, 1).tolist()
    row_of = {int(position) + 1: row for row, position in enumerate(view.rows)}
    positions = (view.sample_of(torch.arange(len(offsets))) == sample).nonzero().flatten().tolist()
    found, previous = [], None
    for position in positions:
        start, end = offsets[position]
        if start == NO_OFFSET:
            previous = None
            continue
        if (start, end) != previous:
            found.append(Stretch(start, end, []))
        previous = (start, end)
        found[-1].rows.append(row_of.get(position))
    return [s for s in found if s.end != NO_OFFSET and None not in s.rows]


def walk(student, teacher):
    """Pairs of groups of rows, by two pointers, one sample after the other."""
    groups = []
    for sample in range(student.sample_count):
        left, right = stretches(student, sample), stretches(teacher, sample)
        begins = {(s.start, s.start == s.end): place for place, s in enumerate(right)}
        i = 0
        while i < len(left):
            x, y = i, begins.get((left[i].start, left[i].start == left[i].end))
            if y is None:
                i += 1
                continue
            first = y
            while x < len(left) and y < len(right) and left[x].end != right[y].end:
                side, at = (left, x) if left[x].end < right[y].end else (right, y)
                ahead = at + 1 < len(side) and side[at + 1].start == side[at].end
                if not ahead or side[at + 1].end == side[at + 1].start:
                    break
                x, y = (x + 1, y) if side is left else (x, y + 1)
            if left[x].end == right[y].end:
                mine = [row for s in left[i : x + 1] for row in s.rows]
                theirs = [row for s in right[first : y + 1] for row in s.rows]
                groups.append((mine, theirs, (sample, left[i].start, left[x].end)))
                i = x + 1
            else:
                i += 1
    return groups


def members(spans: Spans) -> list[list[int]]:
    groups = [[] for _ in spans.after]
    for row, span in zip(spans.rows.tolist(), spans.span.tolist(), strict=True):
        groups[span].append(row)
    return groups


def behind(view, group, end):
    """The row that predicts what comes behind a group, -1 where there is none."""
    target = view.rows + 1
    last = group[-1]
    if last + 1 == len(target) or target[last + 1] != target[last] + 1:
        return -1
    if view.sample_of(target[last + 1 :])[0] != view.sample_of(target[last:])[0]:
        return -1
    return last + 1 if view.offsets.flatten(0, 1)[target[last + 1], 0] == end else -1


def check(student, teacher):
    """Pairs by span, compared with the walk in every respect."""
    pairing = pair(
        student, teacher, [1.0] * student.sample_count, same_vocabulary=False, unit="span"
    )
    expected = walk(student, teacher)
    assert members(pairing.student) == [mine for mine, _, _ in expected]
    assert members(pairing.teacher) == [theirs for _, theirs, _ in expected]
    for spans in (pairing.student, pairing.teacher):
        assert torch.equal(spans.rows, spans.rows.unique())  # ascending, each once
    after = [
        (behind(student, mine, end), behind(teacher, theirs, end))
        for mine, theirs, (_, _, end) in expected
    ]
    after = [both if min(both) >= 0 else (-1, -1) for both in after]
    assert list(
        zip(pairing.student.after.tolist(), pairing.teacher.after.tolist(), strict=True)
    ) == (after)
    return pairing, expected


@st.composite
def encodings(draw, lengths):
    """Texts of these many bytes, each cut into tokens at random, with all that may go wrong."""
    found = []
    for length in lengths:
        cuts = sorted({0, length, *draw(st.lists(st.integers(0, length), max_size=12))})
        tokens = [(NO_OFFSET, NO_OFFSET)] * draw(st.integers(0, 2))
        for start, end in zip(cuts, cuts[1:], strict=False):
            unknown = draw(st.integers(0, 9)) == 0
            tokens += [(NO_OFFSET, NO_OFFSET)] * (draw(st.integers(0, 9)) == 0)  # a template's
            tokens += [(start, NO_OFFSET if unknown else end)] * draw(st.sampled_from([1, 1, 1, 3]))
        tokens += [(length, length)] * draw(st.integers(0, 2))
        tokens = tokens[: draw(st.integers(0, len(tokens)))] if draw(st.booleans()) else tokens
        first = draw(st.integers(0, len(tokens)))
        learn = [place >= first for place in range(len(tokens))]
        if draw(st.booleans()) and len(learn) > 2:
            learn[draw(st.integers(0, len(learn) - 1))] ^= True
        found.append(
            Encoding(
                ids=list(range(2, 2 + len(tokens))),
                learn=learn,
                starts=[start for start, _ in tokens],
                ends=[end for _, end in tokens],
            )
        )
    return found


@settings(max_examples=250)
@given(st.data())
def test_groups_are_those_of_a_walk_along_both_texts(data):
    lengths = data.draw(st.lists(st.integers(0, 14), min_size=1, max_size=4))
    left, right = data.draw(encodings(lengths)), data.draw(encodings(lengths))
    found = []
    for packed in ((False, False), (True, False), (True, True)):
        views = [
            ENCODER.collate(side, packed=how)
            for side, how in zip((left, right), packed, strict=True)
        ]
        found.append(check(*views)[1])
    assert found[0] == found[1] == found[2]


def encoding(*tokens, learn=None):
    return Encoding(
        ids=list(range(2, 2 + len(tokens))),
        learn=[True] * len(tokens) if learn is None else learn,
        starts=[start for start, _ in tokens],
        ends=[end for _, end in tokens],
    )


def spans_of(left, right):
    views = [ENCODER.collate([side]) for side in (left, right)]
    pairing, _ = check(*views)
    return members(pairing.student), members(pairing.teacher), pairing


BOS = (NO_OFFSET, NO_OFFSET)


def test_a_group_ends_where_both_have_a_boundary_and_the_end_is_its_own():
    left = encoding(BOS, (0, 2), (2, 5), (5, 6), (6, 6))
    right = encoding(BOS, (0, 1), (1, 5), (5, 6), (6, 6))
    mine, theirs, pairing = spans_of(left, right)
    assert mine == [[0, 1], [2], [3]]
    assert theirs == [[0, 1], [2], [3]]
    assert pairing.student.after.tolist() == [2, 3, -1]
    assert pairing.weight.tolist() == [1, 1, 1]


def test_a_token_that_straddles_the_prompt_is_left_over():
    left = encoding((0, 3), (3, 6), (6, 9), learn=[False, True, True])  # the prompt has 4 bytes
    right = encoding((0, 4), (4, 6), (6, 9), learn=[False, True, True])
    assert spans_of(left, right)[:2] == ([[1]], [[1]])


def test_an_end_that_one_side_lacks_and_what_is_cut_off_are_left_over():
    left = encoding(BOS, (0, 2), (2, 4), (4, 6), (6, 6))
    right = encoding(BOS, (0, 2), (2, 3))
    mine, theirs, pairing = spans_of(left, right)
    assert (mine, theirs) == ([[0]], [[0]])
    assert pairing.student.after.tolist() == [1]
    # Cut at a boundary, the teacher cannot say what follows; nor may the student be asked then.
    _, _, pairing = spans_of(left, encoding(BOS, (0, 2)))
    assert pairing.student.after.tolist() == pairing.teacher.after.tolist() == [-1]


def test_what_stands_for_unknown_text_is_in_no_group():
    left = encoding(BOS, (0, 1), (1, NO_OFFSET), (3, 4))
    right = encoding(BOS, (0, 1), (1, 3), (3, 4))
    assert spans_of(left, right)[:2] == ([[0], [2]], [[0], [2]])


def test_tokens_that_share_bytes_are_never_parted():
    left = encoding(BOS, (0, 4), (0, 4), (4, 5))
    right = encoding(BOS, (0, 2), (2, 4), (4, 5))
    assert spans_of(left, right)[:2] == ([[0, 1], [2]], [[0, 1], [2]])
    # The first of them has no prefix: what is left of them does not stand for the bytes.
    assert spans_of(encoding((0, 4), (0, 4), (4, 5)), right)[:2] == ([[1]], [[2]])


def test_rows_that_read_part_of_a_character_are_not_paired_as_if_they_had_not():
    left = ENCODER.collate([encoding((0, 4), (0, 4), (4, 5))])  # its first row is within a stretch
    right = ENCODER.collate([encoding(BOS, (0, 4), (4, 5))])
    pairing = pair(left, right, [1.0], same_vocabulary=False)
    assert (pairing.student.tolist(), pairing.teacher.tolist()) == ([1], [1])
    # With one tokenizer the second token of a stretch stands beside the second.
    right = ENCODER.collate([encoding(BOS, (0, 4), (0, 4), (4, 5))])
    pairing = pair(left, right, [1.0], same_vocabulary=True)
    assert (pairing.student.tolist(), pairing.teacher.tolist()) == ([0, 1], [1, 2])


def test_within_a_stretch_another_tokenizer_has_read_something_else():
    view = ENCODER.collate([encoding(BOS, (0, 4), (0, 4), (4, 5))])
    pairing = pair(view, view, [1.0], same_vocabulary=False)
    assert pairing.student.tolist() == pairing.teacher.tolist() == [0, 2]


def test_the_end_of_a_turn_is_not_taken_for_the_beginning_of_the_next():
    # An empty turn of another speaker lies between; both turns meet at byte 2.
    left = encoding(BOS, (0, 2), (2, 2), BOS, (2, 4), learn=[False, True, True, False, True])
    right = encoding(BOS, (0, 2), BOS, (2, 4), learn=[False, True, False, True])
    views = [ENCODER.collate([side]) for side in (left, right)]
    pairing = pair(*views, [1.0], same_vocabulary=False)
    assert (pairing.student.tolist(), pairing.teacher.tolist()) == ([0, 2], [0, 1])
    mine, theirs, pairing = spans_of(left, right)
    assert (mine, theirs) == ([[0], [2]], [[0], [1]])
    assert pairing.student.after.tolist() == [-1, -1]


def test_of_two_turns_that_end_at_the_same_byte_one_cannot_say_which_is_which():
    left = encoding(BOS, (0, 2), (2, 2), BOS, (2, 2), learn=[False, True, True, False, True])
    right = encoding(BOS, (0, 2), (2, 2))  # the second end is cut off
    views = [ENCODER.collate([side]) for side in (left, right)]
    for student, teacher in (views, views[::-1]):
        pairing = pair(student, teacher, [1.0], same_vocabulary=False)
        assert pairing.student.tolist() == pairing.teacher.tolist() == [0]
        pairing = pair(student, teacher, [1.0], same_vocabulary=False, unit="span")
        assert members(pairing.student) == members(pairing.teacher) == [[0]]


@settings(max_examples=100)
@given(st.data())
def test_order_pairs_the_first_with_the_first_up_to_the_shorter(data):
    lengths = data.draw(st.lists(st.integers(0, 14), min_size=1, max_size=4))
    left, right = data.draw(encodings(lengths)), data.draw(encodings(lengths))
    weights = [float(place + 1) for place in range(len(lengths))]
    for packed in (False, True):
        views = [ENCODER.collate(side, packed=packed) for side in (left, right)]
        pairing = pair(*views, weights, same_vocabulary=False, unit="order")
        rows = [view.sample_of(view.rows).tolist() for view in views]
        expected, other, weight = [], [], []
        for sample in range(len(lengths)):
            mine, theirs = ([row for row, of in enumerate(side) if of == sample] for side in rows)
            count = min(len(mine), len(theirs))
            expected += mine[:count]
            other += theirs[:count]
            weight += [weights[sample]] * count
        assert pairing.student.tolist() == expected
        assert pairing.teacher.tolist() == other
        assert pairing.weight.tolist() == weight


@settings(max_examples=60)
@given(st.data())
def test_the_same_view_gives_singletons_that_change_no_signal(data):
    lengths = data.draw(st.lists(st.integers(0, 14), min_size=1, max_size=4))
    view = ENCODER.collate(data.draw(encodings(lengths)))
    pairing = pair(view, view, [1.0] * len(lengths), same_vocabulary=True, unit="span")
    count = len(view.rows)
    assert members(pairing.student) == [[row] for row in range(count)]
    values = torch.randn(2, count)
    said = Signals(labels=view.labels, chosen=values[0], boundary=values[1]).select(pairing.student)
    assert torch.equal(said.chosen, values[0])
    target = (view.rows + 1).tolist()
    follow = [row + 1 < count and target[row + 1] == target[row] + 1 for row in range(count)]
    expected = [values[1, row + 1].item() if follow[row] else 0.0 for row in range(count)]
    assert said.boundary.tolist() == expected


def test_a_sample_of_which_the_teacher_has_no_row_weighs_nothing():
    left = ENCODER.collate([encoding(BOS, (0, 2), (2, 4)), encoding(BOS, (0, 3))])
    right = ENCODER.collate([encoding(BOS), encoding(BOS, (0, 1), (1, 3))])
    pairing = pair(left, right, [1.0, 2.0], same_vocabulary=False, unit="sample")
    assert pairing.student is None
    assert pairing.teacher is None
    assert pairing.weight.tolist() == [0, 0, 2]


@pytest.mark.parametrize("unit", ["token", "order", "span", "sample"])
def test_no_rows_at_all_make_an_empty_pairing(unit):
    full = ENCODER.collate([encoding(BOS, (0, 2))])
    for nothing in (ENCODER.collate([encoding()]), ENCODER.collate([encoding(BOS)])):
        for views in ((full, nothing), (nothing, full), (nothing, nothing)):
            pairing = pair(*views, [1.0], same_vocabulary=False, unit=unit)
            assert pairing.unit == unit
            assert pairing.weight.sum() == 0
