"""Packed or padded, accumulated or not: the same rows, the same losses, and a known waste."""

import json
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.align.spans import alone, pair
from limbeck.core.term import Term
from limbeck.core.types import Encoding, Sample, Turn
from limbeck.models.causal import CausalModel
from limbeck.models.encode import Encoder
from limbeck.models.packing import packing
from limbeck.objectives import CrossEntropy, ForwardKL, SortedL1
from limbeck.recipe.run import run
from limbeck.train.batches import Batches
from limbeck.train.loop import Trainer
from limbeck.train.mesh import Mesh

STEPS = 20
WORDS = "the cat sat on a mat and saw two dogs run past three old red trees near the river".split()


class Rows:
    """An endless source of samples of many lengths, some with words that only a teacher reads."""

    ahead: ClassVar[bool] = True
    holdout: ClassVar[list[Sample]] = []

    def __init__(self, privileged=False):
        self.place, self.privileged = 0, privileged

    def __iter__(self):
        return self

    def __next__(self):
        self.place += 1
        row = self.place
        words = [WORDS[(row * 7 + k) % len(WORDS)] for k in range(3 + row * 5 % 23)]
        secret = (Turn(text=f"\n{' '.join(words[: row % 4])}\n"),) if self.privileged else ()
        turns = (Turn(text="\n" + " ".join(words[:2])), Turn(text=" ".join(words[2:]), learn=True))
        return Sample(id=str(row), turns=turns, privileged=secret, weight=1 + row % 3)

    def state_dict(self):
        return {"place": self.place}

    def load_state_dict(self, state):
        self.place = state["place"]


def model_of(tokenizer, *, layers, seed, trains=False):
    from tests.conftest import tiny_config
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    config = tiny_config(len(tokenizer), num_hidden_layers=layers, initializer_range=0.2)
    module = AutoModelForCausalLM.from_config(config).requires_grad_(trains)
    return CausalModel(module.train(trains), tokenizer, name="tiny", max_length=64)


def losses(wish, *, tokenizer, other, terms, accumulate=1, privileged=False):
    student = model_of(tokenizer, layers=2, seed=1, trains=True)
    teacher = model_of(other, layers=3, seed=2)
    trainer = Trainer(
        student=student,
        readers={"big": teacher} if any(term.teacher for term in terms) else {},
        batches=Batches(Rows(privileged), student, 150, 0),
        terms=terms,
        optimizer=torch.optim.SGD(student.module.parameters(), lr=0.3),
        rate=lambda step: 0.3,
        mesh=Mesh("ddp", "cpu"),
        steps=STEPS,
        clip=1.0,
        accumulate=accumulate,
        patience=5,
        seed=0,
    )
    seen = []

    @dataclass
    class Keep:
        def on_step(self, step):
            seen.append(step.metrics)

    trainer.listeners = [Keep()]
    with packing(wish, [student, teacher]) as on:
        assert on == (wish == "always")
        trainer.train()
    return seen


@pytest.fixture(scope="module")
def characters():
    """A second tokenizer: one token a character."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted({character for word in WORDS for character in word} | {" ", "\n"})
    vocabulary = {"<unk>": 0, "<eos>": 1} | {c: place + 2 for place, c in enumerate(letters)}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>", pad_token="<unk>")


TWO = (
    Term(objective=ForwardKL(), teacher="big", weight=0.7),
    Term(objective=CrossEntropy(), weight=0.3),
)


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("case", ["one term", "two terms", "privileged", "another tokenizer"])
def test_a_packed_run_has_the_losses_of_a_padded_one(case, accumulate, tokenizer, characters):
    terms = TWO
    if case == "one term":
        terms = (Term(objective=CrossEntropy()),)
    if case == "another tokenizer":
        terms = (Term(objective=SortedL1(), teacher="big"), Term(objective=CrossEntropy()))
    runs = [
        losses(
            wish,
            tokenizer=tokenizer,
            other=characters if case == "another tokenizer" else tokenizer,
            terms=terms,
            accumulate=parts,
            privileged=case == "privileged",
        )
        for wish, parts in (("never", 1), ("always", accumulate))
    ]
    for padded, packed in zip(*runs, strict=True):
        names = [name for name in padded if name.startswith("loss")]
        assert len(names) == 1 + len(terms)
        for name in names:
            assert packed[name] == pytest.approx(padded[name], abs=1e-5)
        assert packed["tokens"] == padded["tokens"]
        assert packed["padding"] == 0
    assert sum(step["padding"] for step in runs[0]) > 0
    assert runs[0][-1]["loss"] < runs[0][0]["loss"]


def test_a_run_says_how_much_was_padding(make_recipe, tmp_path):
    shares = {}
    for wish in ("never", "always"):
        run(make_recipe({"packing": wish}), tmp_path / wish)
        lines = (tmp_path / wish / "metrics.jsonl").read_text().splitlines()
        report = json.loads((tmp_path / wish / "report.json").read_text())
        shares[wish] = [json.loads(line)["padding"] for line in lines]
        assert min(shares[wish]) <= report["train"]["padding_share"] <= max(shares[wish])
    assert set(shares["always"]) == {0}
    recipe = make_recipe()
    source = recipe.source.open(recipe.seed)
    from limbeck.models.load import load_teacher

    model = load_teacher(recipe.teachers["big"], torch.device("cpu"), recipe.student.max_length)
    batches = Batches(source, model, recipe.train.batch_tokens, recipe.seed)
    for share in shares["never"]:
        lengths = [len(item.encoding.ids) for item in batches.next(1)[0]]
        assert share == pytest.approx(1 - sum(lengths) / (max(lengths) * len(lengths)))


def test_layout_may_change_at_a_resume(make_recipe, tmp_path):
    run(make_recipe({"packing": "never", "steps": 6, "batch_tokens": 400}), tmp_path / "a")
    expected = (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()
    import shutil

    shutil.rmtree(tmp_path / "a" / "checkpoints" / "step-6")
    train = {"packing": "always", "steps": 6, "batch_tokens": 400}
    run(make_recipe(train), tmp_path / "a", resume=True)
    found = (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()
    assert len(found) == len(expected) == 6
    for mine, theirs in zip(found, expected, strict=True):
        assert json.loads(mine)["loss"] == pytest.approx(json.loads(theirs)["loss"], abs=1e-5)
    padding = [[json.loads(line)["padding"] for line in lines] for lines in (found, expected)]
    assert padding[0][:3] == padding[1][:3]
    assert padding[0][3:] == [0, 0, 0]
    assert max(padding[1][:3]) > 0
    assert max(padding[1][3:]) > 0


ENCODING = st.integers(0, 6).flatmap(
    lambda length: st.builds(
        Encoding,
        ids=st.lists(st.integers(1, 9), min_size=length, max_size=length),
        learn=st.lists(st.booleans(), min_size=length, max_size=length),
        starts=st.just(list(range(length))),
        ends=st.just(list(range(1, length + 1))),
        name=st.text("abc", max_size=3),
    )
)


@settings(max_examples=200)
@given(encodings=st.lists(ENCODING, min_size=1, max_size=6))
def test_both_layouts_hold_the_same_rows(encodings):
    padded, packed = views(encodings)
    assert packed.sample_count == padded.sample_count == len(encodings)
    assert packed.names == padded.names == tuple(encoding.name for encoding in encodings)
    assert packed.tokens == padded.tokens == sum(len(encoding.ids) for encoding in encodings)
    assert torch.equal(packed.labels, padded.labels)
    assert torch.equal(packed.sample_of(packed.rows), padded.sample_of(padded.rows))
    assert torch.equal(packed.sample_of(packed.rows + 1), padded.sample_of(padded.rows + 1))
    where = [view.offsets.flatten(0, 1)[view.rows + 1] for view in (packed, padded)]
    assert torch.equal(*where)
    assert sum(encoding.rows for encoding in encodings) == len(packed.rows)
    moved = packed.to(torch.device("cpu"))
    assert moved.names == packed.names
    assert torch.equal(moved.positions, packed.positions)
    weights = [float(place) for place in range(len(encodings))]
    assert torch.equal(alone(packed, weights).weight, alone(padded, weights).weight)


@settings(max_examples=100)
@given(st.lists(st.tuples(ENCODING, ENCODING), min_size=1, max_size=5), st.booleans())
def test_rows_pair_alike_in_any_two_layouts(couples, same_vocabulary):
    students, teachers = views([c[0] for c in couples]), views([c[1] for c in couples])
    weights = [1.0 + place for place in range(len(couples))]
    found = []
    for student in students:
        for teacher in teachers:
            pairing = pair(student, teacher, weights, same_vocabulary=same_vocabulary)
            rows, other = pairing.student, pairing.teacher
            found.append(
                (
                    list(range(len(student.rows))) if rows is None else rows.tolist(),
                    list(range(len(teacher.rows))) if other is None else other.tolist(),
                    pairing.weight.tolist(),
                )
            )
    assert all(item == found[0] for item in found)


def test_the_same_tokens_cut_into_other_samples_are_not_the_same():
    def view(*samples):
        encodings = [
            Encoding(
                ids=ids,
                learn=[token == 4 for token in ids],
                starts=list(range(len(ids))),
                ends=list(range(1, len(ids) + 1)),
            )
            for ids in samples
        ]
        return encoder().collate(encodings, packed=True)

    one, two = view([1], [2, 3, 4], [5]), view([1], [2], [3, 4, 5])
    assert torch.equal(one.ids, two.ids)
    assert torch.equal(one.rows, two.rows)
    assert pair(one, one, [1.0] * 3, same_vocabulary=True).student is None
    found = pair(one, two, [1.0] * 3, same_vocabulary=True)
    assert found.student is not None
    assert len(found.student) == len(found.teacher) == len(found.weight) == 0


def views(encodings):
    return [encoder().collate(encodings, packed=packed) for packed in (False, True)]


class Padding:
    eos_token_id, pad_token_id = 1, 0


def encoder():
    return Encoder(Padding(), 64)
