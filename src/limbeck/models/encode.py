"""From text to token ids: templates, which tokens are learnt, and where each stands in the text."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from limbeck.core.errors import DataError
from limbeck.core.types import NO_OFFSET, Encoding, Sample, Turn, View

IntArray = NDArray[np.int64]

LARGEST_OF_BYTES = (0x7F, 0x7FF, 0xFFFF)
"""Largest characters that take one, two and three bytes of UTF-8."""


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
        self.tokenizer, self.max_length = tokenizer, max_length
        eos: Any = tokenizer.eos_token_id
        self.eos: int | None = eos
        pad: Any = tokenizer.pad_token_id
        self.pad: int = pad if pad is not None else (self.eos or 0)

    def encode(self, sample: Sample) -> Encoding:
        """One sample's tokens, what is learnt of them, and their byte offsets."""
        turns = (*sample.privileged, *sample.turns)
        privileged = sum(len(turn.text) for turn in sample.privileged)
        chat = any(turn.role for turn in turns)
        if chat:
            text, spans = self._render(turns, sample.id)
        else:
            text, spans = _join(turns)
        encoded: Any = self.tokenizer(
            text,
            add_special_tokens=not chat,  # a chat template writes its own
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        ids: list[int] = encoded["input_ids"]
        offsets = np.array(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
        learnt = [span for span, turn in zip(spans, turns, strict=True) if turn.learn]
        learn = _inside(offsets, learnt).tolist()
        starts, ends = _to_bytes(offsets, len(text), spans, turns, privileged)
        ends_learnt = bool(turns) and turns[-1].learn
        if ends_learnt and not chat and self.eos is not None and ids[-1:] != [self.eos]:
            ids = [*ids, self.eos]
            last = len("".join(turn.text for turn in sample.turns).encode())
            learn, starts, ends = [*learn, True], [*starts, last], [*ends, last]
        kept = slice(0, self.max_length)
        return Encoding(
            ids=ids[kept],
            learn=learn[kept],
            starts=starts[kept],
            ends=ends[kept],
            truncated=max(0, len(ids) - self.max_length),
            name=sample.id,
        )

    def prompt_ids(self, prompt: Sample) -> list[int]:
        """Token ids of a prompt, ready to be continued."""
        turns = (*prompt.privileged, *prompt.prompt)
        if any(turn.role for turn in turns):
            text: str = self._template(turns, add_generation_prompt=True)
            return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        ids = list(self.tokenizer("".join(turn.text for turn in turns))["input_ids"])
        return ids[:-1] if ids and ids[-1] == self.eos else ids

    def collate(self, encodings: Sequence[Encoding], *, packed: bool = False) -> View:
        """Pad on the right to the longest of `encodings`, or lay them end to end in one line."""
        if packed:
            return self._pack(encodings)
        width = max((len(encoding.ids) for encoding in encodings), default=0)
        shape = (len(encodings), width)
        ids = torch.full(shape, self.pad, dtype=torch.int64)
        offsets = torch.full((*shape, 2), NO_OFFSET, dtype=torch.int64)
        attend = torch.zeros(shape, dtype=torch.bool)
        learn = torch.zeros(shape, dtype=torch.bool)
        for row, encoding in enumerate(encodings):
            length = len(encoding.ids)
            ids[row, :length] = torch.tensor(encoding.ids)
            attend[row, :length] = True
            learn[row, :length] = torch.tensor(encoding.learn, dtype=torch.bool)
            offsets[row, :length, 0] = torch.tensor(encoding.starts)
            offsets[row, :length, 1] = torch.tensor(encoding.ends)
        learn[:, :1] = False  # nothing stands before the first token that could predict it
        rows = learn.flatten().nonzero().flatten() - 1
        names = tuple(encoding.name for encoding in encodings)
        return View(ids=ids, attend=attend, offsets=offsets, rows=rows, names=names)

    def _pack(self, encodings: Sequence[Encoding]) -> View:
        # A sample without tokens keeps its place in the count with one token of padding.
        nothing = Encoding(ids=[self.pad], learn=[False], starts=[NO_OFFSET], ends=[NO_OFFSET])
        parts = [encoding if encoding.ids else nothing for encoding in encodings]
        positions = [place for part in parts for place in range(len(part.ids))]
        places = torch.tensor(positions, dtype=torch.int64)
        # Position 0 would be predicted from another sample's last token.
        learn = torch.tensor([flag for part in parts for flag in part.learn]) & (places > 0)
        starts = [start for part in parts for start in part.starts]
        ends = [end for part in parts for end in part.ends]
        return View(
            ids=torch.tensor([[token for part in parts for token in part.ids]]),
            attend=torch.tensor([[part is not nothing for part in parts for _ in part.ids]]),
            offsets=torch.tensor([starts, ends]).T[None],
            rows=learn.nonzero().flatten() - 1,
            positions=places[None],
            names=tuple(encoding.name for encoding in encodings),
        )

    def _template(self, turns: Sequence[Turn], *, add_generation_prompt: bool) -> str:
        messages = [{"role": turn.role or "user", "content": turn.text} for turn in turns]
        text = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )
        assert isinstance(text, str)
        return text

    def _render(self, turns: Sequence[Turn], name: str) -> tuple[str, list[tuple[int, int]]]:
        """The whole conversation, and the characters of it that each turn owns.

        An assistant's turn owns what the template writes from the generation prompt on, without
        trailing white space: its words and the end-of-turn mark.
        """
        if not self.tokenizer.chat_template:
            raise DataError(
                f"row {name} is a conversation, but the tokenizer has no chat template; "
                "give rows with `prompt` and `completion` or `text`, or a chat model's tokenizer"
            )
        text = self._template(turns, add_generation_prompt=False)
        spans: list[tuple[int, int]] = []
        for index, turn in enumerate(turns):
            upto = self._template(turns[: index + 1], add_generation_prompt=False)
            if turn.learn:
                before = self._template(turns[:index], add_generation_prompt=True)
                start = len(before) if text.startswith(before) else -1
            else:
                start = upto.rfind(turn.text.strip())
            if start < 0 or not text.startswith(upto.rstrip()):
                raise DataError(
                    f"row {name}: the chat template rewrites earlier turns, so the assistant's "
                    "words cannot be found in it; give this row one assistant turn only"
                )
            end = len(upto.rstrip()) if turn.learn else start + len(turn.text.strip())
            spans.append((start, end))
        return text, spans


def _join(turns: Sequence[Turn]) -> tuple[str, list[tuple[int, int]]]:
    spans: list[tuple[int, int]] = []
    text = ""
    for turn in turns:
        spans.append((len(text), len(text) + len(turn.text)))
        text += turn.text
    return text, spans


def _inside(offsets: IntArray, spans: Sequence[tuple[int, int]]) -> NDArray[np.bool_]:
    """Whether each token has characters, the last of which lies in one of the spans."""
    starts, ends = offsets.T
    inside = np.zeros(len(offsets), dtype=np.bool_)
    for first, last in spans:
        inside |= (first < ends) & (ends <= last)
    return inside & (ends > starts)


def _to_bytes(
    offsets: IntArray,
    rendered: int,
    spans: Sequence[tuple[int, int]],
    turns: Sequence[Turn],
    privileged: int,
) -> tuple[list[int], list[int]]:
    """Byte offsets of tokens in the sample's text, from character offsets in the rendered text.

    Characters that the template added have no offset; an end-of-turn mark right behind a turn's
    words has the empty span there. `privileged` counts the characters before the sample's text.
    """
    words = "".join(turn.text for turn in turns)
    place = np.full(rendered + 1, NO_OFFSET)  # character as rendered -> character in `words`
    position = 0
    for (start, end), turn in zip(spans, turns, strict=True):
        lead = len(turn.text) - len(turn.text.lstrip()) if turn.role else 0
        length = min(end - start, len(turn.text) - lead) + 1
        place[start : start + length] = np.arange(length) + position + lead
        position += len(turn.text)
    points = np.frombuffer(words.encode("utf-32-le", "surrogatepass"), dtype="<u4")
    sizes = 1 + sum((points > largest).astype(np.int64) for largest in LARGEST_OF_BYTES)
    byte_of = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
    first, last = place[offsets].T
    last = np.where(last < 0, first, last)
    known = (first >= privileged) & (offsets[:, 1] > offsets[:, 0])
    base = byte_of[privileged]
    starts = np.where(known, byte_of[first] - base, NO_OFFSET)
    ends = np.where(known, byte_of[last] - base, NO_OFFSET)
    return starts.tolist(), ends.tolist()
