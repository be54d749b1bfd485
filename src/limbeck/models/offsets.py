"""Which bytes of a text each of its tokens covers, whatever the tokenizer did to the text.

Tokenizers give offsets in characters, and not all of them without gaps or overlaps: the tokens of
one character each claim all of it, a prefix that was added claims the first character, what a
normaliser took out belongs to none. Here the text is cut into stretches at the places where all
tokens before have ended and none behind has begun; where a stretch has several tokens, they are
told apart by the bytes that they stand for.
"""

import copy
import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from tokenizers import processors
from transformers import PreTrainedTokenizerBase

from limbeck.core.types import NO_OFFSET

IntArray = NDArray[np.int64]

LARGEST_OF_BYTES = (0x7F, 0x7FF, 0xFFFF)
"""Largest characters that take one, two and three bytes of UTF-8."""

PIECES = re.compile("([\udc80-\udcff]+)|.", re.DOTALL)
"""One character; or, as `surrogateescape` has them, bytes that are none."""

MARKS = re.compile(b"(?:\xef\xbf\xbd)*")
"""What a tokenizer writes in their place."""

SPACES = np.array([point for point in range(0x3001) if chr(point).isspace()], dtype=np.int64)


def untrimmed(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The same tokenizer, with offsets that hold a token's leading and trailing spaces too.

    GPT-NeoX and Llama 3 leave them out, so that a token of spaces only would cover nothing. The
    one given is returned where it does not do so, and is not changed where it does.
    """
    parts = _parts(tokenizer)
    if not any(getattr(part, "trim_offsets", False) for part in parts):
        return tokenizer
    changed = copy.deepcopy(tokenizer)
    for part in _parts(changed):
        if hasattr(part, "trim_offsets"):
            setattr(part, "trim_offsets", False)  # noqa: B010 - not all parts have it
    return changed


def byte_places(text: str) -> IntArray:
    """[characters + 1] the byte at which each character of a text begins, and its length.

    >>> byte_places("né").tolist()
    [0, 1, 3]
    """
    if text.isascii():
        return np.arange(len(text) + 1, dtype=np.int64)
    points = _points(text)
    sizes = 1 + sum((points > largest).astype(np.int64) for largest in LARGEST_OF_BYTES)
    return np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])


def cover(
    text: str,
    characters: IntArray,
    ids: Sequence[int],
    table: Sequence[bytes | None],
) -> IntArray:
    """[t, 2] the bytes of a text that each token covers.

    The stretches of tokens follow one another without gap from the first byte to the last. Tokens
    that cannot be told apart all have the stretch that they cover together. Tokens that are not
    of the text have `NO_OFFSET`.

    Args:
        text: what was tokenized.
        characters: [t, 2] the tokenizer's offsets, in characters; empty for added tokens.
        ids: the tokens.
        table: the bytes of each token id, None where it stands for none (`models/tokens.py`).

    >>> pieces = [b"a", b" \\xf0\\x9f", b"\\x90", b"\\x88"]
    >>> offsets = np.array([(0, 1), (1, 3), (2, 3), (2, 3)])
    >>> cover("a \N{CAT}", offsets, [0, 1, 2, 3], pieces).tolist()
    [[0, 1], [1, 4], [4, 5], [5, 6]]
    """
    found = np.full((len(ids), 2), NO_OFFSET, dtype=np.int64)
    real = np.flatnonzero(characters[:, 1] > characters[:, 0])
    if not len(real):
        return found
    starts, ends = characters[real].T
    place = byte_places(text)
    if starts[0] == 0 and ends[-1] == len(text) and (starts[1:] == ends[:-1]).all():
        found[real] = place[characters[real]]  # one behind the other, as most tokenizers have it
        return found
    starts, ends = _without_gaps(starts, ends, _points(text))
    # Where all before have ended and none behind has begun.
    ended = np.maximum.accumulate(ends)
    begun = np.minimum.accumulate(starts[::-1])[::-1]
    cut = np.concatenate([[True], ended[:-1] <= begun[1:]])
    stretch, first = np.cumsum(cut) - 1, np.flatnonzero(cut)
    left = place[np.minimum.reduceat(starts, first)]
    right = place[np.maximum.reduceat(ends, first)]
    spans = np.stack([left, right], axis=1)[stretch]
    several = np.bincount(stretch)[stretch] > 1
    if several.any():
        pieces = [table[ids[index]] or b"" for index in real[several]]
        spans[several] = _told_apart(spans[several], stretch[several], pieces, text)
    found[real] = spans
    return found


def of_written(pieces: Sequence[bytes], text: str) -> IntArray:
    """[t, 2] the bytes that each token covers of the text as which a model's tokens were decoded.

    Some tokens begin at a known place, but are not what stands there: half a character, of which
    the text has U+FFFD, and a space that the tokenizer left out. Their end is `NO_OFFSET`. From
    where the text goes on otherwise, nothing is known but its end.

    Args:
        pieces: what each token stands for; nothing where it is a special one.
        text: what became of them.

    >>> of_written([b"a", b"\\xf0\\x9f", b" b", b""], "a\N{REPLACEMENT CHARACTER} b").tolist()
    [[0, 1], [1, -1], [4, 6], [6, 6]]
    """
    written, whole = b"".join(pieces), text.encode()
    place, same = _followed(written, whole)
    cuts = np.cumsum([0, *map(len, pieces)])
    starts, through = place[cuts[:-1]], np.concatenate([[0], np.cumsum(~same)])
    ends = np.where(through[cuts[1:]] > through[cuts[:-1]], NO_OFFSET, place[cuts[1:]])
    if pieces and not pieces[-1] and starts[-1] == NO_OFFSET:
        starts[-1] = ends[-1] = len(whole)
    return np.stack([starts, ends], axis=1)


def _followed(written: bytes, text: bytes) -> tuple[IntArray, NDArray[np.bool_]]:
    """Where each byte that was written, and their end, stands in a text; and which are there."""
    place = np.arange(len(written) + 1, dtype=np.int64)
    same = np.ones(len(written), dtype=np.bool_)
    if written == text:
        return place, same
    place[:], same[:] = NO_OFFSET, False
    here = there = 0
    for match in PIECES.finditer(written.decode(errors="surrogateescape")):
        raw = match[0].encode(errors="surrogateescape")
        place[here] = there
        behind = here + len(raw)
        if match[1]:
            marks = MARKS.match(text, there)
            if not marks or not marks[0]:
                return place, same
            place[here:behind], there = there, marks.end()
        elif text.startswith(raw, there):
            place[here:behind], same[here:behind] = range(there, there + len(raw)), True
            there += len(raw)
        elif raw != b" ":
            return place, same
        here = behind
    place[here] = there
    return place, same


def _told_apart(spans: IntArray, stretch: IntArray, pieces: Sequence[bytes], text: str) -> IntArray:
    """Spans of tokens that share stretches; each its own where their bytes are the text's."""
    fresh = np.concatenate([[True], stretch[1:] != stretch[:-1]])
    which, first = np.cumsum(fresh) - 1, np.flatnonzero(fresh)
    sizes = np.array([len(piece) for piece in pieces], dtype=np.int64)
    offered = np.add.reduceat(sizes, first)
    left, right = spans[first].T
    fits = (offered == right - left) & np.logical_and.reduceat(sizes > 0, first)
    if not fits.any():
        return spans
    theirs = np.frombuffer(b"".join(pieces), dtype=np.uint8)[np.repeat(fits, offered)]
    written = np.frombuffer(text.encode(), dtype=np.uint8)
    kept = np.flatnonzero(fits)
    before = np.cumsum(offered[kept]) - offered[kept]  # bytes of the fitting stretches before each
    at = np.arange(len(theirs)) + np.repeat(left[kept] - before, offered[kept])
    fits[kept] = np.logical_and.reduceat(theirs == written[at], before)
    through = np.cumsum(sizes)
    ends = through - (through - sizes)[first][which] + left[which]
    return np.where(fits[which][:, None], np.stack([ends - sizes, ends], axis=1), spans)


def _without_gaps(starts: IntArray, ends: IntArray, points: IntArray) -> tuple[IntArray, IntArray]:
    """Offsets that leave no character out.

    White space that was left out belongs to the token behind it, as most tokenizers have it;
    anything else to the token before, with which a normaliser has made it one.
    """
    ended = np.maximum.accumulate(ends)
    before = np.concatenate([[0], ended[:-1]])
    if (starts <= before).all() and ended[-1] == len(points):
        return starts, ends
    word = np.where(np.isin(points, SPACES), 0, np.arange(1, len(points) + 1))
    last_word = np.concatenate([[0], np.maximum.accumulate(word)])
    split = np.where(starts > before, np.maximum(before, last_word[starts]), starts)
    split[0] = min(0, split[0])
    grown = np.concatenate([split[1:], [len(points)]])
    gap = np.concatenate([(starts > before)[1:], [ended[-1] < len(points)]])
    return split, np.where(gap, np.maximum(ends, grown), ends)


def _points(text: str) -> IntArray:
    return np.frombuffer(text.encode("utf-32-le"), dtype="<u4").astype(np.int64)


def _parts(tokenizer: PreTrainedTokenizerBase) -> list[processors.PostProcessor]:
    """The parts of what a tokenizer does last."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    whole = getattr(backend, "post_processor", None)
    if isinstance(whole, processors.Sequence):
        return list(iter(whole))  # pyright: ignore[reportArgumentType, reportCallIssue]
    return [] if whole is None else [whole]
