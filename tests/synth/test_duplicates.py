"""The step `duplicates`: which rows fail, and that it is done when it is done."""

import random

import pytest
import torch
from fakes import good, prompt, row, run_step
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.core.errors import RecipeError
from limbeck.core.types import Signals
from limbeck.synth.duplicates import Duplicates, mean_states, text_of
from limbeck.synth.words import jaccard, shingles

BY_WORDS = pytest.mark.parametrize("by", ["ngrams", "minhash"])


def asked(*texts, **more):
    return [row(f"r{k}", prompt=prompt(text), **more) for k, text in enumerate(texts)]


@BY_WORDS
def test_the_first_of_those_that_are_nearly_the_same_stays(by):
    rows = asked(
        "Name three rivers in Europe.",
        "Explain how a steam engine works to a child of ten years.",
        "name three rivers in europe",
        "Explain how a steam engine works to a child of ten years, please.",
        "Name three lakes in Europe.",
    )
    made, desk = run_step(Duplicates(by=by), rows)
    assert [one.id for one in good(made)] == ["r0", "r1", "r4"]
    reasons = {one.id: one.failure for one in made if one.failure}
    assert reasons == {
        "r2": "repeats 'r0' (similarity 1.00)",
        "r3": "repeats 'r1' (similarity 0.91)",
    }
    assert desk.counts["duplicates"] == 2
    assert [one.id for one in made] == [one.id for one in rows]


TEXT = st.lists(st.sampled_from("a b c d".split()), min_size=0, max_size=7).map(" ".join)


@given(
    st.lists(TEXT, max_size=14),
    st.sampled_from((0.3, 0.5, 1.0)),
    st.integers(1, 3),
    st.sampled_from(("ngrams", "minhash")),
)
@settings(max_examples=150)
def test_no_two_that_stay_are_alike_and_a_second_pass_drops_nothing(texts, threshold, words, by):
    step = Duplicates(by=by, threshold=threshold, words=words)
    made, _ = run_step(step, asked(*texts))
    assert len(made) == len(texts)
    kept = good(made)
    again, _ = run_step(step, kept)
    assert good(again) == kept
    sets = [shingles(text_of(one, "prompt"), words) for one in kept]
    if by == "ngrams":
        pairs = ((a, b) for k, a in enumerate(sets) for b in sets[:k])
        assert all(jaccard(a, b) < threshold for a, b in pairs)
    names = {one.id: shingles(text_of(one, "prompt"), words) for one in kept}
    for one in made:
        if one.failure is not None:  # what is named has stayed, and is as near as it is said to be
            name = one.failure.split("'")[1]
            near = jaccard(names[name], shingles(text_of(one, "prompt"), words))
            assert near >= threshold


@given(st.lists(TEXT, min_size=2, max_size=8), st.randoms(use_true_random=False))
@settings(max_examples=50)
def test_equal_texts_leave_one_whatever_their_order(texts, draw):
    distinct = {tuple(text.split()) for text in texts if text}
    draw.shuffle(texts)
    for by in ("ngrams", "minhash"):
        made, _ = run_step(Duplicates(by=by, threshold=1.0, words=9), asked(*texts))
        assert len([one for one in good(made) if one.prompt[0].text]) == len(distinct)


def test_minhash_finds_what_ngrams_find():
    """Long texts with some words changed, around the threshold."""
    draw = random.Random(3)
    vocabulary = [f"word{k}" for k in range(500)]
    texts = []
    for _ in range(60):
        text = draw.choices(vocabulary, k=120)
        for changed in (0, 2, 5, 30):
            near = list(text)
            for place in draw.sample(range(len(text)), changed):
                near[place] = draw.choice(vocabulary)
            texts.append(" ".join(near))
    exact, _ = run_step(Duplicates(by="ngrams"), asked(*texts))
    quick, _ = run_step(Duplicates(by="minhash"), asked(*texts))
    dropped = [{one.id for one in made if one.failure} for made in (exact, quick)]
    assert 110 <= len(dropped[0]) <= 140
    assert len(dropped[1] & dropped[0]) >= 0.97 * len(dropped[0])
    assert dropped[1] <= dropped[0]


@BY_WORDS
def test_answers_of_one_group_share_their_prompt(by):
    def group(name, text):
        return [row(f"{name}#{k}", "yes", prompt=prompt(text), group=name) for k in range(3)]

    rows = [*group("a", "Is the sky blue today?"), *group("b", "Is the sky blue, today?")]
    made, _ = run_step(Duplicates(by=by), rows)
    assert [one.id for one in good(made)] == ["a#0", "a#1", "a#2"]
    made, _ = run_step(Duplicates(by=by, of="completion"), rows)
    assert [one.id for one in good(made)] == ["a#0"]
    made, _ = run_step(Duplicates(by=by, of="both"), rows)
    assert [one.id for one in good(made)] == ["a#0"]


@BY_WORDS
def test_rows_without_the_text_are_left_alone(by):
    rows = [row("a"), row("b"), row("c", "  "), row("d", "?!"), row("e", "?!")]
    made, desk = run_step(Duplicates(by=by, of="completion"), rows)
    assert good(made) == rows
    assert not desk.counts["duplicates"]


class States:
    """A reader whose hidden state at each place is a direction: that of the word there."""

    name, offers = "states", frozenset({"hidden"})

    def __init__(self, offers=("hidden",)):
        from fakes import FakeReader

        self.offers = frozenset(offers)
        self.inner = FakeReader(lambda text: [f"{w} " for w in text.split()], lambda *_: 0.0)
        self.texts = {}

    def encode(self, sample):
        self.texts[sample.id] = sample.turns[0].text.split()
        return self.inner.encode(sample)

    def collate(self, encodings):
        return self.inner.collate(encodings)

    def read(self, view, needs):
        assert needs == {"hidden:-1"}
        of, seen, states = view.sample_of(view.rows).tolist(), {}, []
        for sample in of:
            place = seen[sample] = seen.get(sample, -1) + 1
            word = self.texts[view.names[sample]][place]
            states.append(torch.eye(26)[ord(word[0]) - ord("a")])
        return Signals(labels=view.labels, hidden={"-1": torch.stack(states)})


def test_embeddings_are_means_over_each_text():
    found = mean_states(["a", "b b a", "a b"], States())
    expected = torch.zeros(3, 26)
    expected[0, 0] = 1
    expected[1, :2] = torch.tensor([1.0, 2.0]) / 5**0.5
    expected[2, :2] = 0.5**0.5
    assert torch.allclose(torch.from_numpy(found), expected)


def test_embeddings_that_point_the_same_way_are_duplicates():
    texts = ["a b", "c", "b a b a", "", "a b c", "", "c c c"] + ["d"] * 300
    step = Duplicates(by="embedding", reader="student", threshold=0.99)
    made, desk = run_step(step, asked(*texts), readers={"student": States()})
    assert [one.id for one in good(made)] == ["r0", "r1", "r3", "r4", "r5", "r7"]
    assert made[2].failure == "repeats 'r0' (similarity 1.00)"
    assert desk.counts["duplicates"] == 301
    again, _ = run_step(step, good(made), readers={"student": States()})
    assert not [one for one in again if one.failure]
    assert step.reads == ("student",)


def test_a_reader_must_have_states():
    step = Duplicates(by="embedding", reader="api")
    with pytest.raises(RecipeError, match="does not give hidden states"):
        run_step(step, asked("a"), readers={"api": States(offers=("chosen",))})


@pytest.mark.parametrize("fields", [{"by": "embedding"}, {"reader": "t"}])
def test_a_reader_goes_with_embeddings(fields):
    with pytest.raises(RecipeError, match="reader"):
        Duplicates(**fields)


def test_a_real_model_reads(tiny_teacher):
    from limbeck.core.specs import LocalTeacher
    from limbeck.models.load import load_teacher

    model = load_teacher(LocalTeacher(name=str(tiny_teacher)), torch.device("cpu"), 64)
    texts = ["the cat sat on a mat", "two dogs run", "the cat sat on a mat", "old red trees"]
    found = mean_states(texts, model)
    alone = [mean_states([text], model)[0] for text in texts]
    assert torch.allclose(
        torch.from_numpy(found), torch.stack(list(map(torch.tensor, alone))), atol=1e-5
    )
    step = Duplicates(by="embedding", reader="t", threshold=1.0)
    made, _ = run_step(step, asked(*texts), readers={"t": model})
    assert [one.id for one in good(made)] == ["r0", "r1", "r3"]
