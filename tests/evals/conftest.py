"""Readers that need no model: bytes are tokens, and logits come from a fixed table."""

from collections.abc import Sequence

import torch
from torch import Tensor

from limbeck.core.types import NO_OFFSET, Encoding, Needs, Sample, Sampling, Signals, Turn, View

VOCABULARY = 256


class ByteReader:
    """Logits of a row are `table[token read] (+ table2[token before])`: position matters."""

    def __init__(
        self,
        seed: int,
        *,
        vocabulary: str = "bytes",
        width: int = VOCABULARY,
        offers: Needs = frozenset({"logits", "chosen"}),
        scale: float = 2.0,
        max_length: int = 10_000,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.table = scale * torch.randn(VOCABULARY, width, generator=generator)
        self.name, self.vocabulary, self.offers = f"bytes-{seed}", vocabulary, offers
        self.max_length = max_length
        self.batches: list[tuple[int, int]] = []

    def encode(self, sample: Sample) -> Encoding:
        ids: list[int] = []
        learn: list[bool] = []
        starts: list[int] = []
        place = 0
        for turn in (*sample.privileged, *sample.turns):
            private = len(ids) < sum(len(t.text.encode()) for t in sample.privileged)
            for byte in turn.text.encode():
                ids.append(byte)
                learn.append(turn.learn)
                starts.append(NO_OFFSET if private else place)
                place += 0 if private else 1
        ends = [NO_OFFSET if start == NO_OFFSET else start + 1 for start in starts]
        kept = slice(0, self.max_length)
        return Encoding(
            ids=ids[kept],
            learn=learn[kept],
            starts=starts[kept],
            ends=ends[kept],
            truncated=max(0, len(ids) - self.max_length),
        )

    def collate(self, encodings: Sequence[Encoding]) -> View:
        shape = len(encodings), max(len(encoding.ids) for encoding in encodings)
        ids = torch.zeros(shape, dtype=torch.int64)
        attend = torch.zeros(shape, dtype=torch.bool)
        learn = torch.zeros(shape, dtype=torch.bool)
        offsets = torch.full((*shape, 2), NO_OFFSET, dtype=torch.int64)
        for row, encoding in enumerate(encodings):
            length = len(encoding.ids)
            ids[row, :length] = torch.tensor(encoding.ids)
            attend[row, :length] = True
            learn[row, 1:length] = torch.tensor(encoding.learn[1:], dtype=torch.bool)
            offsets[row, :length, 0] = torch.tensor(encoding.starts)
            offsets[row, :length, 1] = torch.tensor(encoding.ends)
        rows = learn.flatten().nonzero().flatten() - 1
        return View(ids=ids, attend=attend, offsets=offsets, rows=rows)

    def logits(self, ids: Tensor) -> Tensor:
        """[m, width] after each of the ids of one text."""
        before = torch.cat([ids.new_zeros(1), ids[:-1]])
        return self.table[ids] + 0.5 * self.table[before]

    def read(self, view: View, needs: Needs) -> Signals:
        assert not torch.is_grad_enabled()
        self.batches.append(tuple(view.ids.shape))
        logits = torch.cat([self.logits(row) for row in view.ids])[view.rows]
        chosen = logits.log_softmax(-1).gather(-1, view.labels[:, None]).squeeze(-1)
        return Signals(
            labels=view.labels,
            logits=logits if "logits" in needs else None,
            chosen=chosen if "chosen" in needs else None,
        )


class Parrot:
    """Writes what a dictionary says, and remembers how it was asked."""

    name = "parrot"
    vocabulary = "words"
    offers: Needs = frozenset({"text"})

    def __init__(self, answers: dict[str, str]) -> None:
        self.answers = answers
        self.asked: list[Sampling] = []

    def speak(self, prompts: Sequence[Sample], sampling: Sampling) -> list[str]:
        self.asked.append(sampling)
        return [self.answers["".join(turn.text for turn in prompt.turns)] for prompt in prompts]

    def encode(self, sample: Sample) -> Encoding:
        """One token a word, after a beginning-of-sequence token."""
        words = sum(len(turn.text.split()) for turn in sample.turns)
        lists = [0] * (words + 1)
        return Encoding(ids=lists, learn=[False] * len(lists), starts=lists, ends=lists)


def sample(prompt: str, completion: str, name: str = "s", privileged: str = "") -> Sample:
    """A prompt and what is learnt after it."""
    return Sample(
        id=name,
        turns=(Turn(text=prompt), Turn(text=completion, learn=True)),
        privileged=(Turn(text=privileged),) if privileged else (),
    )


HOLDOUT = [
    sample("2+2=", "4, of course"),
    sample("", "all of this is learnt, but for the first byte"),
    sample("a longer prompt than the others have: ", "x"),
    sample("crème ", "brûlée"),
    sample("only a prompt", ""),
]
