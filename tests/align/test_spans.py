"""Pairing: rows stand beside each other exactly when both models have read the same text."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.align.spans import alone, pair
from limbeck.core.types import Sample, Turn
from limbeck.models.encode import Encoder

TEXT = st.text(st.characters(blacklist_categories=["Cs"]), min_size=1, max_size=40)


def sample(prompt: str, completion: str, privileged: str = "", weight: float = 1.0) -> Sample:
    secret = (Turn(text=privileged),) if privileged else ()
    turns = (Turn(text=prompt), Turn(text=completion, learn=True))
    return Sample(id="s", turns=turns, privileged=secret, weight=weight)


@pytest.fixture(scope="module")
def encoder(tokenizer):
    return Encoder(tokenizer, 512)


@pytest.fixture(scope="module")
def characters():
    """A second tokenizer: one token a character."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, "<eos>": 1} | {chr(c): c for c in range(32, 127)}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return Encoder(PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>"), 512)


@settings(max_examples=60)
@given(TEXT, TEXT, TEXT)
def test_a_privileged_prompt_shifts_rows_and_loses_none(prompt, completion, secret):
    encoder = _global_encoder()
    open_view = encoder.collate([encoder.encode(sample(prompt, completion))])
    # A newline keeps the tokens of the secret and the prompt apart.
    told = encoder.collate([encoder.encode(sample("\n" + prompt, completion, secret + "\n"))])
    open_view = encoder.collate([encoder.encode(sample("\n" + prompt, completion))])
    pairing = pair(open_view, told, [1.0], same_vocabulary=True)
    if pairing.student is None:
        pytest.fail("the teacher saw more, so positions cannot be equal")
    mine = open_view.labels[pairing.student]
    theirs = told.labels[pairing.teacher]
    assert torch.equal(mine, theirs)
    assert len(pairing.student) == len(open_view.rows)


_ENCODERS: list[Encoder] = []


def _global_encoder() -> Encoder:
    return _ENCODERS[0]


@pytest.fixture(autouse=True, scope="module")
def _provide(encoder):
    _ENCODERS.append(encoder)
    yield
    _ENCODERS.clear()


def test_equal_views_pair_every_row_without_an_index(encoder):
    samples = [sample("the cat", " sat on"), sample("two dogs", " run past three trees")]
    views = [encoder.collate([encoder.encode(s) for s in samples]) for _ in range(2)]
    pairing = pair(*views, [1.0, 0.5], same_vocabulary=True)
    assert pairing.student is None
    assert pairing.teacher is None
    counts = [encoder.encode(s).rows for s in samples]
    assert pairing.weight.tolist() == [1.0] * counts[0] + [0.5] * counts[1]


def test_two_tokenizers_pair_where_both_have_a_boundary(encoder, characters):
    one = sample("the cat", " sat on a mat")
    left = encoder.collate([encoder.encode(one)])
    right = characters.collate([characters.encode(one)])
    pairing = pair(left, right, [1.0], same_vocabulary=False)
    assert pairing.student is not None
    starts = left.offsets[0, left.rows + 1, 0][pairing.student]
    others = right.offsets[0, right.rows + 1, 0][pairing.teacher]
    assert torch.equal(starts, others)
    # Characters have a boundary everywhere, so each of the student's rows finds a partner.
    assert len(pairing.student) == len(left.rows)


def test_truncation_on_one_side_drops_only_what_is_missing(tokenizer, encoder):
    one = sample("the cat", " sat on a mat and saw two dogs")
    short = Encoder(tokenizer, 8)
    left = encoder.collate([encoder.encode(one)])
    right = short.collate([short.encode(one)])
    pairing = pair(left, right, [1.0], same_vocabulary=True)
    assert pairing.teacher is not None
    assert len(pairing.teacher) == len(right.rows)
    assert torch.equal(left.labels[pairing.student], right.labels)


def test_alone_weighs_each_row_by_its_sample(encoder):
    samples = [sample("a", " mat"), sample("a", " river")]
    view = encoder.collate([encoder.encode(s) for s in samples])
    assert set(alone(view, [2.0, 0.0]).weight.tolist()) == {2.0, 0.0}


def test_different_numbers_of_samples_are_refused(encoder):
    one = encoder.collate([encoder.encode(sample("a", "b"))])
    two = encoder.collate([encoder.encode(sample("a", "b"))] * 2)
    with pytest.raises(ValueError, match="1 student and 2 teacher"):
        pair(one, two, [1.0], same_vocabulary=True)
