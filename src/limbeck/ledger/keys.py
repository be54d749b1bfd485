"""The name of an answer: a hash of everything that was sent for it, and of its index."""

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

from limbeck.core.errors import RecipeError

FORMAT = "limbeck answer 1"
"""Goes into every key, so that another way of making keys can never meet an old one."""


def answer_key(endpoint: str, model: str, parameters: Mapping[str, Any], index: int) -> str:
    """SHA-256 of the canonical JSON of endpoint, model, parameters and index.

    Two calls give the same key exactly where they ask for the same answer. The order of keys does
    not matter, and numbers are compared as JSON compares them: 1, 1.0 and 1e0 are one number, so
    `top_k: 1` and `top_k: 1.0` do not cost twice. True is not 1. Text is taken as it is, with no
    Unicode normalisation. A slash at the end of the endpoint does not count.

    Args:
        endpoint: base of the API.
        model: its name there.
        parameters: all that is sent (messages, temperature, seed, ...), without `n`.
        index: which of the samples of one request, from 0.

    Returns:
        64 hexadecimal digits.

    Raises:
        RecipeError: something in `parameters` is not JSON, such as NaN, or `n` is among them.

    Example:
        >>> first = answer_key("http://a/v1", "big", {"seed": 1, "top_k": 2}, 0)
        >>> first == answer_key("http://a/v1/", "big", {"top_k": 2.0, "seed": 1}, 0)
        True
        >>> first == answer_key("http://a/v1", "big", {"top_k": 2, "seed": 1}, 1)
        False
    """
    if "n" in parameters:
        raise RecipeError(
            "n", "has no place in an answer's key: the same answer may come alone or with others"
        )
    if isinstance(index, bool) or not isinstance(index, int) or index < 0:
        raise RecipeError("index", f"is {index!r}; an answer's index is an integer from 0")
    parts = [FORMAT, endpoint.rstrip("/"), model, _canonical(parameters, ""), index]
    # ASCII with escapes: also half a surrogate pair, which UTF-8 cannot say, has a key of its own.
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def _canonical(value: Any, place: str) -> Any:
    """The value with lists for tuples and integers for whole floats; refuses what is not JSON."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise RecipeError(place, f"is {value}, which cannot be sent as JSON; give a number")
        return int(value) if value.is_integer() else value
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise RecipeError(place, f"has the key {key!r}; JSON has text as keys only")
        return {key: _canonical(inner, _join(place, key)) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_canonical(inner, _join(place, at)) for at, inner in enumerate(value)]
    raise RecipeError(place, f"is a {type(value).__name__}, which cannot be sent as JSON")


def _join(place: str, name: object) -> str:
    return f"{place}.{name}" if place else str(name)
