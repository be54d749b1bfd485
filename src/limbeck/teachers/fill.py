"""Making a cache: the teacher reads every training sample once, and what is kept goes to disk."""

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from limbeck.core.random import stream
from limbeck.core.types import Encoding, Sample, Signals
from limbeck.models.causal import CausalModel
from limbeck.models.encode import Encoder
from limbeck.teachers.keep import Arrays, Keeper
from limbeck.teachers.parts import parts
from limbeck.teachers.remains import needs_of
from limbeck.teachers.store import Record, Shards, token_hash

SHARD_SAMPLES = 256
"""Samples of a shard: what an interruption or a damaged file costs."""

BATCH_TOKENS = 4096
"""Tokens, with padding, that one forward pass reads."""

CHUNK_BYTES = 64 * 2**20
"""Of float32 logits that are made at once."""

POLL_SECONDS = 1.0
"""How often a process that has nothing left to do looks whether the others are done."""

NOTES = "filled.jsonl"
"""One line for each shard that was made."""


@dataclass
class Done:
    """What this process has made so far."""

    samples: int = 0
    rows: int = 0
    dropped: int = 0


@dataclass(frozen=True)
class Filling:
    """All that making a cache takes.

    Attributes:
        teacher: the model, in evaluation mode.
        encoder: makes tokens of a sample; the student's, where both have one vocabulary, since
            the loop then shows the teacher the student's tokens.
        keeper: what is kept of a row.
        samples: each is read once.
        seed: of draws.
        path: the cache's folder.
    """

    teacher: CausalModel
    encoder: Encoder
    keeper: Keeper
    samples: Sequence[Sample]
    seed: int
    path: Path

    def shard(self, index: int) -> Sequence[Sample]:
        """The samples of a shard."""
        return self.samples[index * SHARD_SAMPLES : (index + 1) * SHARD_SAMPLES]

    def fill(self, shards: Shards, told: Callable[[Done], None]) -> Done:
        """Make every shard that is not there, beside other processes that do the same.

        Returns when all are there. A shard whose maker died is made by another one.
        """
        done = Done()
        while missing := shards.missing():
            made = False
            for index in missing:
                with shards.claim(index) as writer:
                    if writer is None:
                        continue
                    before = done.dropped
                    for record, dropped in self.records(index):
                        writer.add(record)
                        done.samples += 1
                        done.rows += record.rows
                        done.dropped += dropped
                        told(done)
                    made = True
                    self._note(index, done.dropped - before)
            if not made:
                time.sleep(POLL_SECONDS)
        return done

    @torch.no_grad()
    def records(self, shard: int) -> Iterator[tuple[Record, int]]:
        """The records of a shard, each with its number of dropped rows.

        A sample without learnt tokens has none.
        """
        for group in batches([self.encoder.encode(sample) for sample in self.shard(shard)]):
            view = self.encoder.collate(group)
            signals = self.teacher.read(view, needs_of(self.teacher))
            known = parts(view)
            luck = [
                self.keeper.luck(part.rows, stream(self.seed, f"cache/{part.name}"))
                for part in known
            ]
            arrays = self._look(signals, luck)
            place = 0
            for part in known:
                mine = {name: a[place : place + part.rows] for name, a in arrays.items()}
                place += part.rows
                tokens = token_hash(part.ids.tolist(), part.learn.tolist())
                cells = self.keeper.to_cells(mine)
                record = Record(id=part.name, tokens=tokens, rows=part.rows, cells=cells)
                yield record, int((~mine["valid"]).sum())

    def _note(self, shard: int, dropped: int) -> None:
        """Append what was dropped; a line is short enough that two writers do not mix theirs."""
        line = json.dumps({"shard": shard, "dropped": dropped}) + "\n"
        with (self.path / NOTES).open("ab+") as file:
            if file.tell():  # a line that was cut, as by a full disk, is left alone
                file.seek(-1, os.SEEK_END)
                line = line if file.read() == b"\n" else "\n" + line
            file.write(line.encode())

    def _look(self, signals: Signals, luck: Sequence[torch.Tensor | None]) -> Arrays:
        """What is kept of a batch; only a chunk of its logits exists at a time."""
        drawn = [one for one in luck if one is not None]
        numbers = torch.cat(drawn) if drawn else None
        chunk = max(1, CHUNK_BYTES // (4 * self.keeper.columns))
        pieces: list[Arrays] = []
        for first in range(0, len(signals.labels), chunk):
            rows = torch.arange(first, min(first + chunk, len(signals.labels)))
            mine = signals.select(rows.to(signals.labels.device))
            pieces.append(self.keeper.look(mine, None if numbers is None else numbers[rows]))
        return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}


def batches(encodings: Sequence[Encoding]) -> list[list[Encoding]]:
    """Groups of similar length that fit `BATCH_TOKENS` when padded, the longest first.

    What has nothing to learn is left out.
    """
    groups: list[list[Encoding]] = []
    useful = (encoding for encoding in encodings if encoding.rows)
    for encoding in sorted(useful, key=lambda encoding: -len(encoding.ids)):
        if groups and (len(groups[-1]) + 1) * len(groups[-1][0].ids) <= BATCH_TOKENS:
            groups[-1].append(encoding)
        else:
            groups.append([encoding])
    return groups


def dropped(path: Path) -> int:
    """How many rows of a cache are not numbers; of a shard that was made twice the last counts.

    A line that was cut says nothing.
    """
    try:
        lines = (path / NOTES).read_bytes().splitlines()
    except FileNotFoundError:
        return 0
    counts: dict[int, int] = {}
    for line in lines:
        with suppress(ValueError):
            note: dict[str, int] = json.loads(line)
            counts[note["shard"]] = note["dropped"]
    return sum(counts.values())
