"""What answers cost: prices of tokens, the worst case before asking, and whole nano-dollars.

Inside the ledger money is a whole number of nano-dollars (1e-9 dollars), so that a sum of a million
small amounts is exact and does not depend on its order. Costs and reservations are rounded up and
caps down: rounding can stop a run a nano-dollar early, and never lets it pass its cap.
"""

import math
from collections import Counter
from collections.abc import Iterable
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from unicodedata import normalize

from limbeck.core.specs import TokenPrice

MILLION = Decimal(1_000_000)
NANO = Decimal(1_000_000_000)


def cost_usd(
    price: TokenPrice, prompt_tokens: int | None, completion_tokens: int | None
) -> float | None:
    """(input * prompt tokens + output * completion tokens) / 1,000,000.

    None where a price or a count is not known: an unknown cost is not 0.

    Example:
        >>> cost_usd(TokenPrice(input=0.15, output=0.6), 1000, 500)
        0.00045
        >>> cost_usd(TokenPrice(input=0.15), 1000, 500) is None
        True
    """
    if price.input is None or price.output is None:
        return None
    if prompt_tokens is None or completion_tokens is None:
        return None
    total = _exact(price.input) * prompt_tokens + _exact(price.output) * completion_tokens
    return float(total / MILLION)


def worst_case_usd(
    price: TokenPrice, prompt_tokens_upper: int, max_tokens: int, n: int
) -> float | None:
    """The most that one request can cost: its prompt once, and n answers of full length.

    Args:
        price: of a million tokens.
        prompt_tokens_upper: at least as many as the prompt has.
        max_tokens: longest answer.
        n: answers of the request. Where a server takes one at a time, each is a request.

    Returns:
        US dollars, or None where a price is not known.
    """
    return cost_usd(price, prompt_tokens_upper, max_tokens * n)


MESSAGE_MARGIN_TOKENS = 16
"""What a chat template puts around one message: its role, start, end and line breaks."""

REQUEST_MARGIN_TOKENS = 128
"""What a chat template puts before all messages, such as a system prompt of its own."""


def prompt_tokens_upper(texts: Iterable[str]) -> int:
    """A bound on a prompt's tokens where its tokenizer is not known.

    Every token stands for at least one byte, so a text has no more tokens than it has bytes in
    UTF-8. Some tokenizers first replace characters by others (Unicode normalisation: a Korean
    syllable by its letters), so each character counts with the longest form that it may get. A
    margin is added for what the server's chat template writes, which nobody sees from outside.

    Args:
        texts: the text of each message.

    Example:
        >>> prompt_tokens_upper(["Hello"]) - prompt_tokens_upper([""])
        5
    """
    return REQUEST_MARGIN_TOKENS + sum(MESSAGE_MARGIN_TOKENS + _longest(text) for text in texts)


def _longest(text: str) -> int:
    if text.isascii():
        return len(text)
    return sum(
        count * max(_bytes(letter), _bytes(normalize("NFKD", letter)))
        for letter, count in Counter(text).items()
    )


def _bytes(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))


def nano_up(usd: float) -> int:
    """Whole nano-dollars, rounded up: for costs and reservations.

    Raises:
        ValueError: the amount is negative or not a number.

    Example:
        >>> nano_up(1.5e-7), nano_up(1.01e-9)
        (150, 2)
    """
    return int((_exact(usd) * NANO).to_integral_value(ROUND_CEILING))


def nano_down(usd: float) -> int:
    """Whole nano-dollars, rounded down: for caps."""
    return int((_exact(usd) * NANO).to_integral_value(ROUND_FLOOR))


def from_nano(nano: int) -> float:
    """US dollars of whole nano-dollars, the nearest float."""
    return float(Decimal(nano) / NANO)


def dollars(usd: float | None) -> str:
    """An amount to show: two decimals, small ones with two digits that count, or `unknown`.

    Example:
        >>> dollars(12.346), dollars(0.00042), dollars(0.0), dollars(None)
        ('$12.35', '$0.00042', '$0.00', 'unknown')
    """
    if usd is None:
        return "unknown"
    amount = Decimal(repr(usd))
    if amount == 0 or abs(amount) >= Decimal("0.1"):
        return f"${amount:,.2f}"
    return f"${amount:.{1 - amount.adjusted()}f}"


def _exact(value: float) -> Decimal:
    """The decimal number that was written: 0.15 is 15/100 here, and not its nearest float."""
    if not 0 <= value < math.inf:
        raise ValueError(f"an amount of money is a number from 0, not {value}")
    return Decimal(repr(float(value)))
