"""What a model thinks of each token of a row's text: read by it, or as it wrote the text."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from limbeck.core.protocols import Reader
from limbeck.core.types import Encoding, Sample, Turn
from limbeck.synth.rows import UNREADABLE, Row

WINDOW = 256
"""Rows that are sorted by length together."""

BATCH_TOKENS = 4096
"""Most tokens, padding counted, of a batch that has more than one row."""

SCORES = "scores"
"""Note in which a step keeps the tokens that a teacher wrote, each as [text, log-probability]."""

MARK = "\N{REPLACEMENT CHARACTER}"

PARTS = (
    "the teacher's scores do not spell the text: of tokens that are a part of a character, its"
    " server does not say which part; let it read the text instead (`scores: read`)"
)

NOT_SHOWN = "the chat template does not show this text as it is written, so it cannot be scored"

_PART = re.compile(r"bytes:(?:\\x[0-9a-f]{2})+")


@dataclass(frozen=True, slots=True)
class Token:
    """Bytes `start` to `end` of a row's text, and the log-probability (nats) of the token there.

    The token that ends the text is empty and stands at its end.
    """

    start: int
    end: int
    logp: float


def sample_of(row: Row) -> Sample:
    """The row as the sample that a student would learn from, its whole text as one answer."""
    role = "assistant" if any(turn.role for turn in row.prompt) else None
    answer = Turn(text=row.text, role=role, learn=True)
    return Sample(id=row.id, turns=(*row.prompt, answer))


def read_tokens(rows: Iterable[Row], reader: Reader) -> Iterator[tuple[Row, list[Token] | str]]:
    """Each row, in order, with the tokens of its text under a model; or why there are none."""
    waiting = iter(rows)
    while window := list(islice(waiting, WINDOW)):
        found: dict[int, list[Token] | str] = {
            place: UNREADABLE for place, row in enumerate(window) if not row.readable
        }
        encodings = {
            place: reader.encode(sample_of(row))
            for place, row in enumerate(window)
            if place not in found
        }
        readable: list[int] = []
        for place, encoding in encodings.items():
            if encoding.truncated:
                found[place] = f"{reader.name} cannot read so long a text"
            elif not encoding.rows:
                found[place] = "there is no text to score"
            else:
                readable.append(place)
        for batch in _batches(readable, encodings):
            read = _read(reader, [encodings[place] for place in batch])
            for place, tokens in zip(batch, read, strict=True):
                before = sum(len(turn.text.encode()) for turn in window[place].prompt)
                own = [
                    Token(max(0, token.start - before), token.end - before, token.logp)
                    for token in tokens
                    if token.start >= 0
                ]
                # Of nothing but the end, any text would be as good as certain.
                bare = all(token.start == token.end for token in own)
                found[place] = NOT_SHOWN if bare and window[place].text.strip() else own
        for place, row in enumerate(window):
            yield row, found[place]


def _batches(places: Sequence[int], encodings: Mapping[int, Encoding]) -> Iterator[list[int]]:
    """Places sorted by length, so many at a time that their padded tokens fit."""
    batch: list[int] = []
    for place in sorted(places, key=lambda place: len(encodings[place].ids)):
        if batch and len(encodings[place].ids) * (len(batch) + 1) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


def _read(reader: Reader, encodings: Sequence[Encoding]) -> list[list[Token]]:
    view = reader.collate(encodings)
    with torch.no_grad():
        said = reader.read(view, frozenset({"chosen"})).chosen
    assert said is not None
    of = view.sample_of(view.rows).tolist()
    spans = view.offsets.flatten(0, 1)[view.rows + 1].tolist()
    lines: list[list[Token]] = [[] for _ in encodings]
    for sample, (start, end), logp in zip(of, spans, said.float().tolist(), strict=True):
        lines[sample].append(Token(start, end, logp))
    return lines


def written_tokens(row: Row) -> list[Token] | str:
    """The tokens of a row's text as the teacher wrote them, from the note `scores`; or why not.

    What comes behind the text is left out: some servers show the token, or the stop string, that
    ended it, others do not.
    """
    kept: Any = row.notes.get(SCORES)
    if not kept:
        return "the teacher's scores are not there; ask for them with `scores: true` in `answers`"
    tokens: list[Token] = []
    written = b""
    for one in kept:
        text, logp = (one["text"], one["logp"]) if isinstance(one, Mapping) else one[:2]
        place, written = len(written), written + _bytes_of(text)
        tokens.append(Token(place, len(written), float(logp)))
    spelt = written.decode(errors="replace")
    if not spelt.lstrip().startswith(row.text.strip()):
        return PARTS if MARK in spelt else "the teacher's scores do not spell the text"
    # White space before the first word may have been taken off the text since.
    lead = len(spelt[: len(spelt) - len(spelt.lstrip())].encode())
    lead -= len(row.text[: len(row.text) - len(row.text.lstrip())].encode())
    size = len(row.text.encode())
    return [
        Token(max(0, t.start - lead), min(size, t.end - lead), t.logp)
        for t in tokens
        if t.end > lead and t.start - lead < size
    ]


def _bytes_of(token: str) -> bytes:
    """What a token stands for; a part of a character is written `bytes:\\xf0\\x9f`."""
    if _PART.fullmatch(token) is not None:
        return bytes.fromhex(token.removeprefix("bytes:").replace("\\x", ""))
    return token.encode(errors="replace")
