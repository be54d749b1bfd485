"""Perplexity and bits per byte against a float64 loop."""

import math
from dataclasses import replace

import pytest
import torch
from tests.evals.conftest import HOLDOUT, ByteReader, Parrot, sample

from limbeck.core.errors import DataError
from limbeck.core.types import NO_OFFSET, Encoding
from limbeck.evals import Perplexity, reading
from limbeck.evals.perplexity import learnt_bytes
from limbeck.evals.score import ratio_interval


def reference(model: ByteReader) -> tuple[list[float], list[float]]:
    """Each sample's nats and tokens over its learnt bytes, one byte at a time."""
    nats, tokens = [0.0] * len(HOLDOUT), [0.0] * len(HOLDOUT)
    for index, item in enumerate(HOLDOUT):
        text = "".join(turn.text for turn in item.turns).encode()
        for end in range(max(1, len(text) - len(item.turns[-1].text.encode())), len(text)):
            logits = model.logits(torch.tensor(list(text[:end])))[-1].double()
            nats[index] -= float(logits.log_softmax(-1)[text[end]])
            tokens[index] += 1
    return nats, tokens


@pytest.mark.parametrize("offers", ["logits", "chosen"])
def test_scores_are_those_of_the_loop(offers: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "CHUNK_BYTES", 4 * 256 * 5)
    model = ByteReader(3, scale=0.5, offers=frozenset({offers}))
    each, sizes = reference(model)
    nats, tokens = math.fsum(each), int(sum(sizes))
    scores = Perplexity(batch_tokens=90).measure(model, None, HOLDOUT)
    perplexity, bits = scores["perplexity"], scores["bits_per_byte"]
    assert perplexity.value == pytest.approx(math.exp(nats / tokens), rel=1e-5)
    assert bits.value == pytest.approx(nats / math.log(2) / tokens, rel=1e-5)  # a token is a byte
    assert perplexity.n == bits.n == tokens
    # The unit of the interval is the sample, so each row's nats must go to its own sample.
    low, high = ratio_interval(each, sizes)[1] or (math.nan, math.nan)
    assert perplexity.interval95 == pytest.approx((math.exp(low), math.exp(high)), rel=1e-4)
    assert bits.interval95 == pytest.approx((low / math.log(2), high / math.log(2)), rel=1e-4)
    assert perplexity.better == bits.better == "lower"


def test_a_uniform_model_is_as_perplexed_as_its_vocabulary_is_large() -> None:
    scores = Perplexity().measure(ByteReader(0, scale=0.0), None, HOLDOUT)
    assert scores["perplexity"].value == pytest.approx(256, rel=1e-5)
    assert scores["bits_per_byte"].value == pytest.approx(8, rel=1e-5)


def test_hopeless_is_infinite_not_an_error() -> None:
    model = ByteReader(0, scale=0.0)
    model.table[:, ord("x")] = -3000.0
    scores = Perplexity().measure(model, None, [sample("a", "xx")] * 3)
    assert scores["perplexity"].value == math.inf
    assert scores["perplexity"].to_json()["value"] is None


def test_absent_for_a_model_that_only_writes() -> None:
    assert Perplexity().measure(Parrot({}), None, HOLDOUT) == {}


def test_no_learnt_token_is_an_error() -> None:
    with pytest.raises(DataError, match="no learnt token"):
        Perplexity().measure(ByteReader(0), None, [sample("only a prompt", "")])


def test_it_is_said_where_the_text_is_not_the_same_for_all_models(caplog) -> None:
    """What is cut off is not in the bytes, and an unknown character costs next to nothing."""
    reading.tell_once.cache_clear()
    Perplexity().measure(ByteReader(0), None, HOLDOUT)
    assert not caplog.messages
    short = Perplexity().measure(ByteReader(0, max_length=20), None, HOLDOUT)["bits_per_byte"]
    assert "2 of 5 held-out samples are cut" in caplog.messages[0]
    assert f"{short.n} bytes" in caplog.messages[0]

    class Knowing(ByteReader):
        def collate(self, encodings):
            view = super().collate(encodings)
            unknown = view.ids > 127
            return replace(view, offsets=view.offsets.index_put(
                (*unknown.nonzero().T, torch.tensor(1)), torch.tensor(NO_OFFSET)))  # fmt: skip

    Perplexity().measure(Knowing(1), None, HOLDOUT)
    assert "1 of 5 held-out samples" in caplog.messages[1]


def encoding(learn: list[int], spans: list[tuple[int, int]]) -> Encoding:
    return Encoding(
        ids=[0] * len(learn),
        learn=[bool(value) for value in learn],
        starts=[start for start, _ in spans],
        ends=[end for _, end in spans],
    )


def test_bytes_of_learnt_tokens() -> None:
    none = (NO_OFFSET, NO_OFFSET)
    # The first token has no prefix, so its bytes are not predicted.
    assert learnt_bytes(encoding([1, 1], [(0, 4), (4, 9)])) == 5
    # Tokens of one character share its span; a space left out of a span counts.
    assert learnt_bytes(encoding([0, 1, 1, 1], [(0, 1), (1, 5), (1, 5), (6, 9)])) == 8
    # Two answers of a conversation, with template tokens around and an end mark of no bytes.
    spans = [none, (0, 3), (3, 7), (7, 7), none, (7, 9), (9, 12), none]
    assert learnt_bytes(encoding([0, 0, 1, 1, 0, 0, 1, 1], spans)) == 7
    assert learnt_bytes(encoding([], [])) == 0
