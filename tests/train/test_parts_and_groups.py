"""A text whose parts have channels of their own, and samples that are compared with each other."""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

from limbeck.core.specs import LocalTeacher
from limbeck.core.term import Term
from limbeck.core.types import Sample, Turn
from limbeck.models.load import load_student, load_teacher
from limbeck.objectives import CrossEntropy, ForwardKL
from limbeck.sources.dataset import Samples, open_samples, to_sample
from limbeck.train.batches import Batches, Item
from limbeck.train.loss import loss_of
from limbeck.train.prepare import Preparation

CPU = torch.device("cpu")


@pytest.fixture
def student(make_recipe):
    return load_student(make_recipe().student, make_recipe().teachers, CPU, 0)


def prepared(student, samples, terms, readers=None, packed=False):
    """The micro-batch of these samples."""
    from limbeck.models.packing import packing

    readers = readers or {}
    source = open_samples(Listed(samples), 0, 0)
    preparation = Preparation(
        student,
        readers,
        terms,
        Batches(source, student, 10_000, 0),
        wanted={name: frozenset({"logits"}) for name in readers},
        rank=0,
        processes=1,
        accumulate=1,
        pin=False,
    )
    items = [Item(sample, student.encode(sample)) for sample in samples]
    with packing("always" if packed else "never", [student]):
        return preparation.prepare(items)


class Listed(list):
    """Samples in a list, as a file's rows."""

    bundles = None


def sums(student, micro, terms):
    said = student.read(micro.views[None], frozenset({"logits", "chosen"}))
    return loss_of(said, terms, micro.pairings, torch.ones(len(terms)), {}, "naive")[1]


ROWS = (
    {"prompt": "the cat sat. ", "rationale": "a mat and two dogs, ", "completion": "three"},
    {"prompt": "see é ", "rationale": "été near ", "completion": "red river", "weight": 0.5},
    {"prompt": "the cat ", "completion": "ran"},
)


@pytest.mark.parametrize("packed", [False, True])
def test_each_part_is_learnt_by_the_terms_of_its_channel(student, packed):
    samples = [to_sample(row, str(i)) for i, row in enumerate(ROWS)]
    channels = (None, "rationale", "answer", "main", "nowhere")
    terms = [Term(objective=CrossEntropy(), channel=c, name=str(c)) for c in channels]
    micro = prepared(student, samples, terms, packed=packed)
    found = dict(zip(channels, sums(student, micro, terms).tolist(), strict=True))
    assert found["nowhere"] == 0
    parts = found["rationale"] + found["answer"] + found["main"]
    assert parts == pytest.approx(found[None], rel=1e-5)
    # An independent count: the loss of the answer's tokens is that of a text in which all before
    # them is a prompt, as long as no token lies over the border.
    alone = [
        Sample(
            id="x",
            weight=sample.weight,
            turns=(
                Turn(text=sample.turns[0].text + row["rationale"]),
                Turn(text=row["completion"], learn=True),
            ),
        )
        for sample, row in zip(samples[:2], ROWS[:2], strict=True)
    ]
    plain = [Term(objective=CrossEntropy())]
    expected = sums(student, prepared(student, alone, plain), plain).item()
    assert found["answer"] == pytest.approx(expected, rel=1e-5)
    counts = [pairing.weight.sum().item() for pairing in micro.pairings]
    assert counts[0] == pytest.approx(counts[1] + counts[2] + counts[3])


def test_the_end_of_the_text_belongs_to_its_last_part(student):
    sample = to_sample(ROWS[0], "1")
    terms = [Term(objective=CrossEntropy(), channel="answer")]
    micro = prepared(student, [sample], terms)
    (pairing,) = micro.pairings
    rows = pairing.weight > 0 if pairing.student is None else pairing.student
    labels = micro.views[None].labels[rows]
    assert labels[-1] == student.encoder.eos
    assert student.tokenizer.decode(labels[:-1]) == " three"  # its token brings the space


@dataclass(frozen=True, kw_only=True)
class Seen:
    """An objective that shows what it is given."""

    asks: ClassVar = frozenset({"chosen"})
    needs: ClassVar = frozenset()
    unit: ClassVar = "sequence"
    shared_vocabulary: ClassVar = False
    kind: ClassVar = "seen"
    given: list

    def __call__(self, student, teacher):
        del teacher
        self.given.append(student)
        return -student.chosen


def family(k, group, **more):
    words = ("a mat", "two dogs run past", "three")
    return [
        Sample(
            id=f"{group}#{i}",
            turns=(Turn(text="the cat "), Turn(text=words[i], learn=True)),
            group=group,
            score=float(i),
            **more,
        )
        for i in range(k)
    ]


@pytest.mark.parametrize("packed", [False, True])
def test_a_sequence_is_all_that_is_learnt_of_a_sample(student, packed):
    samples = [*family(3, "g"), replace(family(1, None)[0], id="alone", score=None)]
    given = []
    terms = [Term(objective=Seen(given=given))]
    micro = prepared(student, samples, terms, packed=packed)
    sums(student, micro, terms)
    (said,) = given
    assert said.group.tolist() == [0, 0, 0, 1]
    assert said.score[:3].tolist() == [0.0, 1.0, 2.0]
    assert math.isnan(said.score[3])
    expected = [student.encode(sample).rows for sample in samples]
    assert said.length.tolist() == expected
    tokens = [Term(objective=CrossEntropy())]
    for index, sample in enumerate(samples):
        nll = sums(student, prepared(student, [sample], tokens), tokens).item()
        assert -said.chosen[index].item() == pytest.approx(nll, rel=1e-5)


def test_a_group_weighs_as_much_as_its_samples_together(student):
    weights = (0.5, 0.25, 0.25)
    samples = [replace(s, weight=w) for s, w in zip(family(3, "g"), weights, strict=True)]
    samples += [*family(2, "h"), replace(family(1, None)[0], id="alone", weight=3.0)]
    terms = [Term(objective=Seen(given=[]))]
    (pairing,) = prepared(student, samples, terms).pairings
    assert pairing.weight.tolist() == pytest.approx([1 / 3] * 3 + [1.0] * 2 + [3.0])


def test_a_member_that_does_not_count_leaves_the_others_their_weight(student):
    samples = family(3, "g")
    samples[1] = replace(samples[1], channel="other")
    terms = [Term(objective=Seen(given=[]), channel="main")]
    (pairing,) = prepared(student, samples, terms).pairings
    assert pairing.weight.tolist() == [1.0, 1.0]
    assert pairing.student.rows.tolist() != []


def test_a_sequence_of_a_part_is_that_part(student):
    samples = [to_sample(row, str(i)) for i, row in enumerate(ROWS)]
    given = []
    terms = [Term(objective=Seen(given=given), channel="answer")]
    micro = prepared(student, samples, terms)
    sums(student, micro, terms)
    assert micro.pairings[0].weight.tolist() == [1.0, 0.5]
    tokens = [Term(objective=CrossEntropy(), channel="answer")]
    (row,) = prepared(student, samples[:1], tokens).pairings
    assert given[0].length[0] == row.weight.sum()


def test_a_teacher_says_how_likely_the_same_sequence_is(student, make_recipe):
    recipe = make_recipe()
    teacher = load_teacher(recipe.teachers["big"], CPU, 64)

    @dataclass(frozen=True, kw_only=True)
    class Both(Seen):
        needs: ClassVar = frozenset({"chosen"})

    terms = [Term(objective=Both(given=[]), teacher="big")]
    micro = prepared(student, family(3, "g"), terms, {"big": teacher})
    (pairing,) = micro.pairings
    heard = teacher.read(micro.views["big"], frozenset({"chosen"})).select(pairing.teacher)
    assert len(heard.chosen) == len(pairing.weight) == 3
    assert heard.length.tolist() == [student.encode(s).rows for s in family(3, "g")]


def write(tmp_path, sizes):
    import json

    path = tmp_path / "rows.jsonl"
    rows = [
        {"prompt": "the cat ", "completion": f"sat {g} {k}", "group": f"g{g}" if size > 1 else None}
        for k in range(max(sizes))
        for g, size in enumerate(sizes)
        if k < size
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    from limbeck.sources.files import open_rows

    return Samples(open_rows(str(path), "train"), {})


def test_a_stream_keeps_groups_together(tmp_path):
    samples = write(tmp_path, [3, 1, 2, 4, 1, 5])
    stream = open_samples(samples, 0, 7)
    orders = []
    for _ in range(3):
        epoch = [next(stream) for _ in range(len(samples))]
        assert len({sample.id for sample in epoch}) == len(samples)
        orders.append([sample.group for sample in epoch])
        for here, there in zip(epoch, [*epoch[1:], None], strict=True):
            same = there is not None and here.group is not None and here.group == there.group
            assert (here.siblings > 0) == same
            if same:
                assert here.siblings == there.siblings + 1
    assert orders[0] != orders[1]
    again = open_samples(samples, 0, 7)
    again.load_state_dict({"epoch": 1, "index": 2})
    fresh = open_samples(samples, 0, 7)
    skipped = [next(fresh) for _ in range(len(samples) + 2)]
    assert len(skipped) > 2
    assert [next(again) for _ in range(20)] == [next(fresh) for _ in range(20)]


def test_whole_groups_are_held_out(tmp_path):
    samples = write(tmp_path, [3] * 20)
    stream = open_samples(samples, 3, 1)
    held = {sample.group for sample in stream.holdout}
    assert held
    assert held.isdisjoint(sample.group for sample in stream.training)
    assert len(stream.holdout) == 3 * len(held)


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_a_step_never_parts_a_group(student, tmp_path, parts):
    samples = write(tmp_path, [3, 1, 2, 4, 1, 5, 2, 2])
    batches = Batches(open_samples(samples, 0, 7), student, 60, 0)
    for _ in range(40):
        for micro in (step := batches.next(parts)):
            for item in micro:
                group = item.sample.group
                if group is not None:
                    whole = sum(sample.group == group for sample in samples)
                    # A small file goes round more than once in a step.
                    assert sum(other.sample.group == group for other in micro) % whole == 0
        assert sum(map(len, step)) > 0


def test_what_a_model_wrote_is_read_as_it_wrote_it(student):
    """Another cut of the same text would be other tokens."""
    from limbeck.align.spans import pair
    from limbeck.core.types import Written

    sample = Sample(
        id="1", turns=(Turn(text="the cat "), Turn(text="sat é", learn=True)), channel="x"
    )
    letters = [student.tokenizer.encode(letter)[0] for letter in "sat "]
    letters += [*student.tokenizer.encode("é"), student.encoder.eos]
    logp = tuple(-0.5 * k for k in range(len(letters)))
    written = Written(vocabulary=student.vocabulary, ids=tuple(letters), logp=logp)
    ours = replace(sample, written=written)
    encoding = student.encode(ours)
    rows = [i for i, learn in zip(encoding.ids, encoding.learn, strict=True) if learn]
    assert rows == letters
    assert encoding.ids[: -len(letters)] == student.prompt_ids(sample)
    assert encoding.starts[-len(letters) :][:4] == [8, 9, 10, 11]
    assert encoding.starts[-1] == encoding.ends[-1] == len("the cat sat é".encode())
    assert student.encode(replace(ours, written=replace(written, vocabulary="other"))) == (
        student.encode(sample)
    )
    terms = [Term(objective=CrossEntropy())]
    micro = prepared(student, [ours, sample], terms)
    behaviour = micro.views[None].behaviour
    assert behaviour[: len(logp)].tolist() == pytest.approx(list(logp))
    assert behaviour[len(logp) :].isnan().all()
    # A teacher that reads something first pairs with it token by token.
    known = replace(ours, privileged=(Turn(text="psst, two dogs. "),))
    mine, theirs = student.collate([encoding]), student.collate([student.encode(known)])
    pairing = pair(mine, theirs, [1.0], same_vocabulary=True)
    assert len(pairing.weight) == len(letters)
    assert theirs.labels[pairing.teacher].tolist() == mine.labels[pairing.student].tolist()


@pytest.mark.parametrize("packed", [False, True])
def test_the_first_rows_of_each_sample_can_be_left_out(student, packed):
    samples = [to_sample(row, str(k)) for k, row in enumerate(ROWS)]
    terms = [Term(objective=CrossEntropy(), skip=skip, name=str(skip)) for skip in (0, 1, 3, 1000)]
    micro = prepared(student, samples, terms, packed=packed)
    found = sums(student, micro, terms)
    view = micro.views[None]
    said = student.read(view, frozenset({"chosen"})).chosen.detach()
    of = view.sample_of(view.rows).tolist()
    place = [of[:k].count(sample) for k, sample in enumerate(of)]
    for term, total in zip(terms, found.tolist(), strict=True):
        kept = [
            -samples[sample].weight * float(logp)
            for logp, sample, p in zip(said, of, place, strict=True)
            if p >= term.skip
        ]
        assert total == pytest.approx(sum(kept), rel=1e-5, abs=1e-6)


def test_what_a_teacher_knows_does_not_move_the_first_rows(student, tiny_teacher):
    """They are counted in the student's rows, whatever stands before them at the teacher."""
    row = {"prompt": "the cat ", "completion": "sat on a mat", "privileged": "two old cats "}
    teacher = load_teacher(LocalTeacher(name=str(tiny_teacher)), CPU, 64)
    terms = [
        Term(objective=ForwardKL(), teacher="big", skip=skip, name=str(skip)) for skip in (0, 2)
    ]
    micro = prepared(student, [to_sample(row, "1")], terms, {"big": teacher})
    whole, later = micro.pairings
    assert whole.weight.tolist() == [1.0] * len(whole.weight)
    assert later.weight.tolist() == [0.0, 0.0, *whole.weight.tolist()[2:]]
