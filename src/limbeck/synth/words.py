"""Texts as words, and runs of words as numbers, for all that asks whether two texts are alike.

Case, punctuation, white space, and the width and form of letters make no difference: a text is
normalised (Unicode NFKC) and casefolded, and its words are the runs of letters and digits, with
the marks that stand on them, such as the vowels of Indic scripts. In scripts that put no space
between words (Chinese, Japanese, Thai, Lao, Khmer, Burmese), each character is a word.
"""

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]

CHARACTERS = 20


def _marks() -> str:
    """Marks that combine with the letter before them, as ranges of a class of characters."""
    ranges: list[list[int]] = []
    for code in (*range(0x300, 0x1F000), *range(0xE0100, 0xE01F0)):
        if unicodedata.category(chr(code)).startswith("M"):
            if ranges and ranges[-1][1] == code - 1:
                ranges[-1][1] = code
            else:
                ranges.append([code, code])
    return "".join(f"{chr(first)}-{chr(last)}" for first, last in ranges)


_MARKS = _marks()
UNSPACED = (
    f"(?![{_MARKS}])"
    "[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]"
)
"""Pattern of a character, without its marks, of a script that puts no space between words."""

_ALONE = re.compile(rf"{UNSPACED}[{_MARKS}]*")
_ASCII_WORD, _WORD = re.compile(r"[^\W_]+"), re.compile(rf"[^\W_]+(?:[{_MARKS}]+[^\W_]*)*")
_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_SHIFT = np.uint64(29)
_MIX = np.uint64(0xBF58476D1CE4E5B9)


def words(text: str) -> list[str]:
    """The words of a text.

    >>> words("The CAT's 2 hats\\u2026")
    ['the', 'cat', 's', '2', 'hats']
    >>> words("\\u732b\\u304c cat")
    ['\u732b', '\u304c', 'cat']
    """
    if text.isascii():
        return _ASCII_WORD.findall(text.casefold())
    folded = unicodedata.normalize("NFKC", text).casefold()
    return _WORD.findall(_ALONE.sub(r" \g<0> ", unicodedata.normalize("NFKC", folded)))


def size(text: str) -> int:
    """How many words a text has, but one at least for each 20 characters: nothing long is short.

    >>> size("Name a river."), size("x" * 100)
    (3, 5)
    """
    return max(len(words(text)), len(text.strip()) // CHARACTERS)


def runs(found: Sequence[str], n: int) -> Hashes:
    """A 64-bit number for each run of n words, in order; the same in every process.

    Args:
        found: the words.
        n: words in a run; there is no run in a shorter text.
    """
    count = len(found) - n + 1
    if count < 1:
        return np.empty(0, dtype=np.uint64)
    codes = np.fromiter(map(_code, found), dtype=np.uint64, count=len(found))
    numbers = np.zeros(count, dtype=np.uint64)
    for k in range(n):
        numbers = numbers * _FACTOR + codes[k : k + count]
    return (numbers ^ (numbers >> _SHIFT)) * _MIX


def shingles(text: str, n: int) -> Hashes:
    """The distinct runs of n words in a text, ascending; a shorter text is one run of its own."""
    found = words(text)
    return np.unique(runs(found, min(n, len(found)))) if found else np.empty(0, dtype=np.uint64)


def jaccard(first: Hashes, second: Hashes) -> float:
    """|A and B| / |A or B| of two sets of distinct numbers; 0 where both are empty."""
    shared = len(np.intersect1d(first, second, assume_unique=True))
    union = len(first) + len(second) - shared
    return shared / union if union else 0.0


@lru_cache(maxsize=1 << 17)
def _code(word: str) -> int:
    digest = blake2b(word.encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")
