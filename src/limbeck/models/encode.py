"""From text to token ids: templates, which tokens are learnt, and where each stands in the text."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jinja2 import TemplateError
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from limbeck.core.errors import DataError, ModelError
from limbeck.core.types import NO_OFFSET, Encoding, Sample, Turn, View
from limbeck.models.offsets import IntArray, byte_places, cover, of_written, untrimmed
from limbeck.models.tokens import token_bytes


@dataclass(frozen=True, slots=True)
class Place:
    """Where a turn is in the text that is tokenized, and in the sample's text.

    Attributes:
        learn: first and last byte of what is learnt of it; the same where nothing is.
        words: first and last byte of its words, as tokenized; the same where they are not there.
        at: the byte of the sample's text where these words begin.
        end: the byte of the sample's text where the turn ends.
    """

    learn: tuple[int, int]
    words: tuple[int, int]
    at: int
    end: int


class Encoder:
    """Turns samples into `Encoding`s and batches of them into `View`s.

    Plain text is tokenized in one piece; a token that straddles prompt and completion counts as
    completion. A conversation is rendered by the tokenizer's chat template, and what the template
    adds behind an assistant's words (its end-of-turn mark) is learnt with them.

    Args:
        tokenizer: a fast tokenizer of transformers (offsets are needed).
        max_length: tokens kept of a sample; the rest is counted in `Encoding.truncated`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        if not getattr(tokenizer, "is_fast", True):
            raise ModelError(
                f"{tokenizer.name_or_path}: its tokenizer gives no offsets, so tokens cannot be "
                "placed in the text; use a model with a tokenizer.json, or convert it with "
                "AutoTokenizer.from_pretrained(..., use_fast=True).save_pretrained(FOLDER)"
            )
        self.tokenizer, self.max_length = tokenizer, max_length
        eos: Any = tokenizer.eos_token_id
        self.eos: int | None = eos
        pad: Any = tokenizer.pad_token_id
        self.pad: int = pad if pad is not None else (self.eos or 0)

    @cached_property
    def _placing(self) -> PreTrainedTokenizerBase:
        return untrimmed(self.tokenizer)

    @cached_property
    def table(self) -> list[bytes | None]:
        """The bytes that each token stands for; None for special ones."""
        return token_bytes(self.tokenizer, len(self.tokenizer))

    @cached_property
    def _silent(self) -> NDArray[np.bool_]:
        """Whether a token stands for no text: special ones, and the one for all that is not known.

        What lies behind the last of them does, and so does the last entry.
        """
        added: Any = getattr(self.tokenizer, "added_tokens_decoder", {})
        special = {index for index, token in added.items() if token.special}
        special.update(getattr(self.tokenizer, "all_special_ids", ()))
        flags = np.zeros(max(special, default=-1) + 2, dtype=np.bool_)
        flags[list(special)] = True
        return flags

    def encode(self, sample: Sample) -> Encoding:
        """One sample's tokens, what is learnt of them, and their byte offsets.

        Raises:
            DataError: the text cannot be written as UTF-8, or no place for its turns is found.
        """
        turns = (*sample.privileged, *sample.turns)
        chat = any(turn.role for turn in turns)
        try:
            with _named(sample.id):
                text, places = self._render(turns, sample.id) if chat else _join(turns)
        except UnicodeEncodeError as error:
            raise DataError(
                f"row {sample.id} holds half a character, {error.object[error.start]!a} (a lone "
                "surrogate), which cannot be written as UTF-8; remove it from the data"
            ) from error
        encoded: Any = self._placing(
            text,
            add_special_tokens=not chat,  # a chat template writes its own
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        ids: list[int] = encoded["input_ids"]
        characters = np.array(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
        spans = cover(text, characters, ids, self.table)
        learn = _inside(spans, [place.learn for place in places]).tolist()
        before = sum(len(turn.text.encode()) for turn in sample.privileged)
        spans = _in_sample(spans, places, clip=chat) - before
        spans[spans[:, 0] < 0] = NO_OFFSET
        starts, ends = spans[:, 0].tolist(), spans[:, 1].tolist()
        if turns and turns[-1].learn and not chat and self.eos is not None:
            if ids[-1:] != [self.eos]:
                ids = [*ids, self.eos]
                learn, starts, ends = [*learn, True], [*starts, NO_OFFSET], [*ends, NO_OFFSET]
            if starts[-1] == NO_OFFSET:  # it was added, here or by the tokenizer
                learn[-1], starts[-1], ends[-1] = True, *[places[-1].end - before] * 2
        return self._cut(ids, learn, starts, ends, sample.id)

    def encode_written(self, sample: Sample, written: Sequence[int]) -> Encoding:
        """The same for a completion that is given as tokens.

        Another cut of the same text would be other tokens, of other probabilities.
        """
        prompt = self.prompt_ids(sample)
        pieces = [self.table[token] or b"" if token < len(self.table) else b"" for token in written]
        spans = of_written(pieces, sample.completion or "")
        spans[spans != NO_OFFSET] += sum(len(turn.text.encode()) for turn in sample.prompt)
        nowhere = [NO_OFFSET] * len(prompt)
        ids = [*prompt, *written]
        learn = [False] * len(prompt) + [True] * len(written)
        starts, ends = [*nowhere, *spans[:, 0].tolist()], [*nowhere, *spans[:, 1].tolist()]
        return self._cut(ids, learn, starts, ends, sample.id)

    def _cut(
        self, ids: list[int], learn: list[bool], starts: list[int], ends: list[int], name: str
    ) -> Encoding:
        """What fits. Where the cut parts tokens that cover something together, those that are left
        do not cover it: their end is not known."""
        kept = min(len(ids), self.max_length)
        last = kept - 1
        if 0 < kept < len(ids) and starts[last] != NO_OFFSET:
            whole = (starts[kept], ends[kept])
            while last >= 0 and (starts[last], ends[last]) == whole:
                ends[last] = NO_OFFSET
                last -= 1
        return Encoding(
            ids=ids[:kept],
            learn=learn[:kept],
            starts=starts[:kept],
            ends=ends[:kept],
            truncated=len(ids) - kept,
            name=name,
        )

    def prompt_ids(self, prompt: Sample, prefix: str = "") -> list[int]:
        """Token ids of a prompt and the beginning of an answer, ready to be continued."""
        turns = (*prompt.privileged, *prompt.prompt)
        if any(turn.role for turn in turns):
            with _named(prompt.id):
                text = self._template(turns, add_generation_prompt=True) + prefix
            return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        ids = list(self.tokenizer("".join(turn.text for turn in turns) + prefix)["input_ids"])
        return ids[:-1] if ids and ids[-1] == self.eos else ids

    def collate(self, encodings: Sequence[Encoding], *, packed: bool = False) -> View:
        """Pad on the right to the longest of `encodings`, or lay them end to end in one line."""
        if packed:
            return self._pack(encodings)
        width = max((len(encoding.ids) for encoding in encodings), default=0)
        shape = (len(encodings), width)
        # In NumPy, which takes lists several times faster than torch does.
        ids, learn = np.full(shape, self.pad, dtype=np.int64), np.zeros(shape, dtype=np.bool_)
        offsets = np.full((*shape, 2), NO_OFFSET, dtype=np.int64)
        for row, encoding in enumerate(encodings):
            length = len(encoding.ids)
            ids[row, :length] = encoding.ids
            learn[row, :length] = encoding.learn
            offsets[row, :length, 0] = encoding.starts
            offsets[row, :length, 1] = self._known_ends(encoding)
        learn[:, :1] = False  # nothing stands before the first token that could predict it
        lengths = np.array([len(encoding.ids) for encoding in encodings], dtype=np.int64)
        return View(
            ids=torch.from_numpy(ids),
            attend=torch.from_numpy(np.arange(width) < lengths[:, None]),
            offsets=torch.from_numpy(offsets),
            rows=torch.from_numpy(np.flatnonzero(learn) - 1),
            names=tuple(encoding.name for encoding in encodings),
        )

    def _pack(self, encodings: Sequence[Encoding]) -> View:
        # A sample without tokens keeps its place in the count with one token of padding.
        nothing = Encoding.without_text([self.pad], [False])
        parts = [encoding if encoding.ids else nothing for encoding in encodings]
        positions = [place for part in parts for place in range(len(part.ids))]
        places = torch.tensor(positions, dtype=torch.int64)
        # Position 0 would be predicted from another sample's last token.
        learn = torch.tensor([flag for part in parts for flag in part.learn]) & (places > 0)
        starts = [start for part in parts for start in part.starts]
        ends = [end for part in parts for end in self._known_ends(part)]
        return View(
            ids=torch.tensor([[token for part in parts for token in part.ids]]),
            attend=torch.tensor([[part is not nothing for part in parts for _ in part.ids]]),
            offsets=torch.tensor([starts, ends]).T[None],
            rows=learn.nonzero().flatten() - 1,
            positions=places[None],
            names=tuple(encoding.name for encoding in encodings),
        )

    def _known_ends(self, encoding: Encoding) -> Sequence[int]:
        """Ends of tokens; `NO_OFFSET` for those of the text that stand for no known text.

        These are unknown characters, and special tokens that are spelt out in the text.
        """
        ids, starts, ends = (
            np.array(numbers, dtype=np.int64)
            for numbers in (encoding.ids, encoding.starts, encoding.ends)
        )
        covers = ends > starts
        silent = covers & self._silent[np.minimum(ids, len(self._silent) - 1)]
        if not silent.any():
            return encoding.ends
        return np.where(covers & np.isin(starts, starts[silent]), NO_OFFSET, ends).tolist()

    def _template(self, turns: Sequence[Turn], *, add_generation_prompt: bool) -> str:
        messages = [{"role": turn.role or "user", "content": turn.text} for turn in turns]
        text = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )
        assert isinstance(text, str)
        return text

    def _render(self, turns: Sequence[Turn], name: str) -> tuple[str, list[Place]]:
        """The whole conversation, and where each turn is in it.

        Of an assistant's turn is learnt what the template writes from the generation prompt on,
        without trailing white space: its words and the end-of-turn mark.
        """
        if not self.tokenizer.chat_template:
            raise DataError(
                f"row {name} is a conversation, but the tokenizer has no chat template; "
                "give rows with `prompt` and `completion` or `text`, or a chat model's tokenizer"
            )
        text = self._template(turns, add_generation_prompt=False)
        byte = byte_places(text)
        places: list[Place] = []
        end = written = 0
        for index, turn in enumerate(turns):
            upto = self._upto(turns[: index + 1], text, written)
            owned = len(upto.rstrip())
            if turn.learn:
                before = self._template(turns[:index], add_generation_prompt=True)
                first = len(before) if text.startswith(before) else -1
                words, lead = _find(turn.text, text, first, owned)
            else:
                words, lead = _find_last(turn.text, upto, written)
                first = words[0]
            if first < 0 or not text.startswith(upto.rstrip()):
                raise DataError(
                    f"row {name}: the chat template rewrites earlier turns, so the assistant's "
                    "words cannot be found in it; give this row one assistant turn only"
                )
            written = owned
            begin, end = end, end + len(turn.text.encode())
            places.append(
                Place(
                    learn=(int(byte[first]), int(byte[owned if turn.learn else first])),
                    words=(int(byte[words[0]]), int(byte[words[1]])),
                    at=begin + len(turn.text[:lead].encode()),
                    end=end,
                )
            )
        return text, places

    def _upto(self, turns: Sequence[Turn], text: str, written: int) -> str:
        """What the template writes for a conversation's first turns.

        Some write none before a user's turn. What such a turn says, is looked for in the `text` of
        all turns, behind what the turns before it have `written`.
        """
        try:
            return self._template(turns, add_generation_prompt=False)
        except TemplateError:
            if turns[-1].learn:
                raise
        words = turns[-1].text.strip()
        first = text.find(words, written)
        return text[: written if first < 0 else first + len(words)]


@contextmanager
def _named(row: str) -> Iterator[None]:
    """Where a chat template refuses a conversation, say which one."""
    try:
        yield
    except TemplateError as error:
        raise DataError(
            f"row {row}: the chat template refuses this conversation: {error}; change the roles of"
            " its turns, or use a tokenizer with another template"
        ) from error


def _find(words: str, text: str, first: int, last: int) -> tuple[tuple[int, int], int]:
    """Where a turn's words stand between two characters, and how many of their first ones do not.

    Templates write them as they are or without white space around them. Where they are written
    otherwise, nothing is found.
    """
    for wanted in (words, words.strip()):
        # White space at the very end may lie behind what is learnt.
        stop = last + len(wanted) - len(wanted.rstrip())
        start = first + len(text[first:stop]) - len(text[first:stop].lstrip())
        if not text.startswith(wanted, start):
            start = first if text.startswith(wanted, first) else text.rfind(wanted, first, stop)
        if wanted and start >= 0:
            return (start, start + len(wanted)), words.index(wanted)
    return (first, first), 0 if words.strip() else len(words)


def _find_last(words: str, text: str, first: int) -> tuple[tuple[int, int], int]:
    """The same at the end of a text, behind what earlier turns wrote."""
    for wanted in (words, words.strip()):
        start = text.rfind(wanted, first)
        if start >= 0:
            return (start, start + len(wanted)), words.index(wanted)
    return (0, 0), 0


def _join(turns: Sequence[Turn]) -> tuple[str, list[Place]]:
    """Plain text: all turns one after the other, with nothing between them."""
    places: list[Place] = []
    end = 0
    for turn in turns:
        begin, end = end, end + len(turn.text.encode())
        owned = (begin, end) if turn.learn else (begin, begin)
        places.append(Place(learn=owned, words=(begin, end), at=begin, end=end))
    return "".join(turn.text for turn in turns), places


def _inside(spans: IntArray, parts: Sequence[tuple[int, int]]) -> NDArray[np.bool_]:
    """Whether each token covers bytes, the last of which lies in one of the parts."""
    starts, ends = spans.T
    inside = np.zeros(len(spans), dtype=np.bool_)
    for first, last in parts:
        inside |= (first < ends) & (ends <= last)
    return inside & (ends > starts)


def _in_sample(spans: IntArray, places: Sequence[Place], *, clip: bool) -> IntArray:
    """[t, 2] bytes in the sample's text (of all turns), from those in the tokenized text.

    What a template wrote has no offset; but learnt tokens behind a turn's words, its end-of-turn
    mark, have the empty span at the turn's end. Where a token covers words and something of the
    template, `clip` keeps the words; in plain text such a token belongs to two turns and is whole.
    """
    if not clip:
        return spans.copy()
    starts, ends = spans.T
    found = np.full_like(spans, NO_OFFSET)
    for place in places:
        first, last = place.words
        if first == last and place.at < place.end:
            continue  # its words are not there
        within = (starts < last) & (ends > first)
        clipped = np.stack([np.maximum(starts, first), np.minimum(ends, last)], axis=1)
        found[within] = clipped[within] + (place.at - first)
        marks = (starts >= last) & (ends > starts) & (ends <= place.learn[1])
        found[marks] = place.end
    return found
