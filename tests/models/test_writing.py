"""How tokens are drawn: by each line's own numbers, from the distribution that was asked for."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from limbeck.core.specs import LocalTeacher
from limbeck.core.types import Sample, Sampling, Turn
from limbeck.models.drawing import pick
from limbeck.models.load import load_teacher
from limbeck.models.taps import inside


@pytest.fixture(scope="module")
def model(tiny_teacher):
    return load_teacher(LocalTeacher(name=str(tiny_teacher)), torch.device("cpu"), 64)


def prompts(model, *texts):
    return [model.prompt_ids(Sample(id=text, turns=(Turn(text=text),))) for text in texts]


def test_a_number_picks_the_token_in_whose_stretch_it_falls():
    logits = torch.tensor([[0.2, 0.5, 0.3]]).log()
    drawn = [
        int(pick(logits, torch.tensor([[u]]), 1.0)) for u in (0.0, 0.19, 0.21, 0.69, 0.71, 0.999)
    ]
    assert drawn == [0, 0, 1, 1, 2, 2]


def test_draws_have_the_distribution_of_the_logits():
    logits = torch.tensor([0.05, 0.6, 0.25, 0.1]).log().expand(20_000, 4)
    uniform = (torch.arange(20_000)[:, None] + 0.5) / 20_000
    share = torch.bincount(pick(logits, uniform, 1.0).flatten(), minlength=4) / 20_000
    assert torch.allclose(share, logits[0].exp(), atol=1e-4)


def test_top_p_leaves_the_likeliest_tokens_in_their_proportion():
    logits = torch.tensor([0.05, 0.6, 0.25, 0.1]).log().expand(20_000, 4)
    uniform = (torch.arange(20_000)[:, None] + 0.5) / 20_000
    share = torch.bincount(pick(logits, uniform, 0.8).flatten(), minlength=4) / 20_000
    assert torch.allclose(share, torch.tensor([0.0, 0.6 / 0.85, 0.25 / 0.85, 0.0]), atol=1e-4)
    assert set(pick(logits, uniform, 0.01).flatten().tolist()) == {1}


@given(st.lists(st.floats(-80, 80), min_size=1, max_size=12), st.floats(0, 1, exclude_max=True))
def test_what_is_impossible_is_never_drawn(values, number):
    logits = torch.tensor([[*values, -math.inf, -math.inf]])
    assert int(pick(logits, torch.tensor([[number]]), 1.0)) < len(values)
    assert int(pick(logits, torch.tensor([[0.99999994]]), 0.9)) < len(values)


def test_a_line_draws_the_same_in_any_company(model):
    asked = prompts(model, "a", "the cat", "b c d")
    sampling = Sampling(max_tokens=12, temperature=1.0)
    together = model.write(asked, [7, 8, 9], sampling)
    alone = [
        model.write([ids], [seed], sampling)[0] for ids, seed in zip(asked, (7, 8, 9), strict=True)
    ]
    assert [one.ids for one in together] == [one.ids for one in alone]
    other = model.write(asked, [17, 18, 19], sampling)
    assert [one.ids for one in together] != [one.ids for one in other]


def test_scores_are_the_models_own_whatever_the_temperature(model):
    (ids,) = prompts(model, "the cat")
    (said,) = model.write([ids], [3], Sampling(max_tokens=6, temperature=2.0, top_p=0.9, scores=3))
    with torch.no_grad():
        logits = model.transformer(torch.tensor([[*ids, *said.ids]])).logits[0].log_softmax(-1)
    for place, (token, logp, top) in enumerate(zip(said.ids, said.logp, said.top, strict=True)):
        row = logits[len(ids) + place - 1]
        assert logp == pytest.approx(row[token].item(), abs=1e-4)
        assert [t for t, _ in top] == row.topk(3).indices.tolist()
        assert [v for _, v in top] == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)
    assert model.write([ids], [3], Sampling(max_tokens=6))[0].logp is None


def test_a_stop_string_ends_the_text_before_it(model):
    (ids,) = prompts(model, "the cat")
    (whole,) = model.write([ids], [5], Sampling(max_tokens=24, temperature=1.0))
    stop = whole.text[5:7]
    (cut,) = model.write([ids], [5], Sampling(max_tokens=24, temperature=1.0, stop=(stop,)))
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.ended
    assert len(cut.ids) <= len(whole.ids)


def test_a_stop_string_is_not_seen_in_the_prompt(model):
    (ids,) = prompts(model, "the cat")
    (whole,) = model.write([ids], [3], Sampling(max_tokens=24, temperature=1.0))
    across = "cat" + whole.text[:2]
    assert across.isascii()
    sampling = Sampling(max_tokens=24, temperature=1.0, stop=(across, "cat"))
    assert model.write([ids], [3], sampling) == [whole]


@pytest.mark.parametrize("most", [6, 24])
def test_a_line_that_a_stop_string_ended_has_no_padding(model, most):
    """Nor is it said to be over because others beside it are."""
    asked = prompts(model, "a", "the cat", "b c d", "see")
    seeds = (7, 8, 9, 10)
    sampling = Sampling(max_tokens=most, temperature=1.0, scores=2)
    whole = model.write(asked, seeds, sampling)
    stops = tuple(one.text[2:4] for one in whole[:2])
    sampling = replace(sampling, stop=stops)
    together = model.write(asked, seeds, sampling)
    assert len({len(one.ids) for one in together}) > 1
    for ids, seed, one, free in zip(asked, seeds, together, whole, strict=True):
        (alone,) = model.write([ids], [seed], sampling)
        assert (one.text, one.ended, one.ids) == (alone.text, alone.ended, alone.ids)
        assert len(one.logp) == len(one.top) == len(one.ids)
        assert list(one.ids) == list(free.ids)[: len(one.ids)]
        assert one.ended == (free.ended or any(stop in free.text for stop in stops))
        if one.text != free.text:  # the last token is the one that ended it
            before = model.tokenizer.decode(one.ids[:-1])
            assert not any(stop in before for stop in stops)


def test_an_end_of_the_model_ends_the_text_too(model):
    """Chat models end a turn with a token that is not the tokenizer's own end."""
    (ids,) = prompts(model, "the cat")
    (whole,) = model.write([ids], [5], Sampling(max_tokens=8))
    assert not whole.ended
    assert len(whole.ids) == 8
    config = inside(model.transformer).generation_config
    before = config.eos_token_id
    config.eos_token_id = [int(whole.ids[3])]
    try:
        (cut,) = model.write([ids], [5], Sampling(max_tokens=8))
        assert cut.ended
        assert len(cut.ids) <= 4
    finally:
        config.eos_token_id = before


def test_habits_of_a_model_do_not_leak_in(model):
    (ids,) = prompts(model, "the cat")
    plain = model.write([ids], [5], Sampling(max_tokens=8))
    config = inside(model.transformer).generation_config
    config.repetition_penalty, config.no_repeat_ngram_size = 5.0, 1
    try:
        assert model.write([ids], [5], Sampling(max_tokens=8)) == plain
        assert inside(model.transformer).generation_config is config
    finally:
        config.repetition_penalty, config.no_repeat_ngram_size = 1.0, 0


def test_a_prefix_is_continued(model):
    sample = Sample(id="1", turns=(Turn(text="the cat"),))
    assert model.prompt_ids(sample, " sat") == model.prompt_ids(
        replace(sample, turns=(Turn(text="the cat sat"),))
    )


def test_a_part_of_a_character_is_named_by_its_bytes(model, monkeypatch):
    """As servers do; a mark in its place would not spell the text."""
    table = [b"\xf0\x9f", b"a", " é".encode(), b" \xc3"]
    monkeypatch.setitem(model.encoder.__dict__, "table", table)
    texts = [model.token_text(token) for token in range(len(table))]
    assert texts == [r"bytes:\xf0\x9f", "a", " é", r"bytes:\x20\xc3"]
