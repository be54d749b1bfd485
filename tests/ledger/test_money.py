"""Money against exact fractions; a prompt's bound against real tokenizers."""

import math
from fractions import Fraction
from unicodedata import normalize

import pytest
from hypothesis import given
from hypothesis import strategies as st

from limbeck.core.specs import TokenPrice
from limbeck.ledger.money import (
    cost_usd,
    dollars,
    from_nano,
    nano_down,
    nano_up,
    prompt_tokens_upper,
    worst_case_usd,
)

PRICES = st.decimals(0, 1000, places=4).map(float)
COUNTS = st.integers(0, 10_000_000)


def exact(price):
    return Fraction(repr(price))


@given(PRICES, PRICES, COUNTS, COUNTS)
def test_a_cost_is_the_nearest_number_to_the_exact_one(input, output, prompt, completion):
    found = cost_usd(TokenPrice(input=input, output=output), prompt, completion)
    truth = (exact(input) * prompt + exact(output) * completion) / 1_000_000
    assert found == float(truth)


@given(PRICES, PRICES, COUNTS, st.integers(1, 9999), st.integers(1, 64), st.data())
def test_nothing_within_the_bounds_costs_more_than_the_worst_case(
    input, output, prompt, longest, n, data
):
    price = TokenPrice(input=input, output=output)
    worst = worst_case_usd(price, prompt, longest, n)
    fewer = data.draw(st.integers(0, prompt)), data.draw(st.integers(0, longest * n))
    assert nano_up(cost_usd(price, *fewer)) <= nano_up(worst)
    assert worst == cost_usd(price, prompt, longest * n)


def test_what_is_unknown_is_not_0():
    full = TokenPrice(input=1.0, output=2.0)
    assert cost_usd(TokenPrice(output=2.0), 1, 1) is None
    assert cost_usd(TokenPrice(input=1.0), 0, 0) is None
    assert cost_usd(full, None, 1) is None
    assert cost_usd(full, 1, None) is None
    assert worst_case_usd(TokenPrice(), 1, 1, 1) is None
    assert cost_usd(TokenPrice(input=0.0, output=0.0), 5, 5) == 0.0


@given(st.floats(0, 1e6))
def test_costs_round_up_and_caps_down(usd):
    up, down = Fraction(nano_up(usd), 10**9), Fraction(nano_down(usd), 10**9)
    assert down <= exact(usd) <= up
    assert up - down in (0, Fraction(1, 10**9))


@given(st.integers(0, 10**15))
def test_whole_nano_dollars_come_back(nano):
    assert nano_up(from_nano(nano)) == nano_down(from_nano(nano)) == nano


@pytest.mark.parametrize("usd", [-0.01, math.nan, math.inf])
def test_an_amount_is_a_number_from_0(usd):
    with pytest.raises(ValueError, match="amount"):
        nano_up(usd)
    with pytest.raises(ValueError, match="amount"):
        nano_down(usd)


@given(st.lists(st.text(st.characters()), max_size=4))
def test_a_prompt_has_no_more_tokens_than_bytes_in_any_form(texts):
    texts = [text * 200 for text in texts]  # or the margins alone would be enough
    bound = prompt_tokens_upper(texts)
    whole = "".join(texts)
    for text in (whole, *(normalize(form, whole) for form in ("NFC", "NFD", "NFKC", "NFKD"))):
        assert len(text.encode("utf-8", "surrogatepass")) <= bound
    assert prompt_tokens_upper([*texts, ""]) > bound


def test_the_bound_holds_for_real_tokenizers(shared):
    from transformers import AutoTokenizer

    folders = sorted(path for path in (shared / "tokenizers").iterdir() if path.is_dir())
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in folders]
    assert tokenizers
    texts = ["", "x", "    \n\n\t", "Grüße, 世界! \ufdfa 각각 🙂‍↔️", "\u0344" * 40, "0" * 99]
    for tokenizer in tokenizers:
        for text in texts:
            assert len(tokenizer(text)["input_ids"]) <= prompt_tokens_upper([text])


@pytest.mark.parametrize(
    ("usd", "shown"),
    [
        (None, "unknown"),
        (0.0, "$0.00"),
        (0.1, "$0.10"),
        (1234567.891, "$1,234,567.89"),
        (0.0999, "$0.100"),
        (0.012345, "$0.012"),
        (1.5e-7, "$0.00000015"),
    ],
)
def test_amounts_as_they_are_shown(usd, shown):
    assert dollars(usd) == shown
