"""Which bytes of text each token of a vocabulary stands for."""

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

WORD_BEGINNINGS = (b" ", b"\n", b"\t", b"\r")
BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
MARK = "\N{LOWER ONE EIGHTH BLOCK}"
"""Stands for a space in vocabularies of the SentencePiece kind."""


def token_bytes(tokenizer: PreTrainedTokenizerBase, columns: int) -> list[bytes | None]:
    """The bytes of each id; None for special tokens and for columns that are no token.

    Args:
        tokenizer: a fast tokenizer.
        columns: of the model's logits, which may be more than there are tokens.
    """
    state: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())  # pyright: ignore
    kinds = set(_kinds(state.get("decoder"))) | set(_kinds(state.get("pre_tokenizer")))
    special = set(tokenizer.all_special_ids)
    added = {entry["id"]: entry["content"] for entry in state.get("added_tokens", ())}
    special |= {entry["id"] for entry in state.get("added_tokens", ()) if entry["special"]}
    found: list[bytes | None] = [None] * columns
    for token, index in tokenizer.get_vocab().items():
        if index >= columns or index in special:
            continue
        if index in added:  # written as it is, whatever the rest of the vocabulary does
            found[index] = token.encode()
        elif "ByteLevel" in kinds:
            found[index] = _of_byte_level(token)
        elif match := BYTE.fullmatch(token):
            found[index] = bytes([int(match[1], 16)])
        else:
            found[index] = token.replace(MARK, " ").encode()
    return found


def word_beginnings(tokens: Sequence[bytes | None], ends: Sequence[int]) -> list[bool]:
    """For each id, whether what comes before it was a whole word: it begins with white space, or
    is one of `ends`, the tokens that end a text."""
    finals = set(ends)
    return [
        index in finals or (token is not None and token.startswith(WORD_BEGINNINGS))
        for index, token in enumerate(tokens)
    ]


def _kinds(part: Any) -> Iterator[str]:
    """The types of all parts of a tokenizer's component."""
    if isinstance(part, dict):
        yield str(part.get("type"))  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType]
        for value in part.values():  # pyright: ignore[reportUnknownVariableType]
            yield from _kinds(value)
    elif isinstance(part, list):
        for value in part:  # pyright: ignore[reportUnknownVariableType]
            yield from _kinds(value)


def _byte_characters() -> dict[str, int]:
    """The printable characters in which byte-level vocabularies write bytes (as GPT-2 does)."""
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(256) if byte not in kept]
    table = {chr(byte): byte for byte in kept}
    return table | {chr(256 + place): byte for place, byte in enumerate(moved)}


BYTE_CHARACTERS = _byte_characters()


def _of_byte_level(token: str) -> bytes:
    if all(character in BYTE_CHARACTERS for character in token):
        return bytes(BYTE_CHARACTERS[character] for character in token)
    return token.encode()
