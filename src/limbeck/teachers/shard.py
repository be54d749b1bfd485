"""One file of a cache: some samples' records in Arrow's file format, and beside it a small file
that says what it must hold.

`shard-00012.arrow` is found whole or not at all. `shard-00012.json` holds its size, its SHA-256 and
a hash of each record's id, so that a record is found without a look into the shards. No byte of a
shard is interpreted before all of it was verified.
"""

import base64
import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from limbeck.core.errors import CacheError
from limbeck.core.files import file_sha256, sync, write_text
from limbeck.core.text import one_line

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("tokens", pa.binary(16)),
        ("rows", pa.int32()),
        ("cells", pa.map_(pa.string(), pa.large_binary())),
    ]
)

FLUSH_BYTES = 8 * 2**20
"""Of cells that a writer holds before it writes them."""


@dataclass(frozen=True, slots=True)
class Record:
    """What a cache keeps of one sample.

    Attributes:
        id: the sample's.
        tokens: `token_hash` of what the teacher read.
        rows: n, how many tokens are learnt.
        cells: named byte strings, from `limbeck.teachers.codec`.
    """

    id: str
    tokens: bytes
    rows: int
    cells: Mapping[str, bytes]


@dataclass(frozen=True, slots=True)
class Seal:
    """What a shard's small file says.

    Attributes:
        of: `digest` of the fingerprint of the cache that it was made for.
        size_bytes: of the shard.
        sha256: of the shard.
        rows: of all its records together.
        ids: [records] uint64, `id_hash` of each record's id, in order.
    """

    of: str
    size_bytes: int
    sha256: str
    rows: int
    ids: NDArray[np.uint64]


def shard_path(folder: Path, index: int) -> Path:
    """Where a shard lies."""
    return folder / f"shard-{index:05d}.arrow"


def seal_path(folder: Path, index: int) -> Path:
    """Where a shard's small file lies."""
    return folder / f"shard-{index:05d}.json"


def id_hash(name: str) -> int:
    """64 bits of a sample's id. Two ids may share them, so the id itself is compared too."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def digest(value: Any) -> str:
    """SHA-256 of a JSON value, by which a small file proves itself."""
    text = json.dumps(value, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


@contextmanager
def writing(path: Path, needed_bytes: int = 0) -> Iterator[None]:
    """Say what the disk refused, and how much room there is, in one line."""
    try:
        yield
    except CacheError:
        raise
    except OSError as error:
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        needed = f"{needed_bytes:,} bytes needed, " if needed_bytes else ""
        raise CacheError(
            f"cannot write {path}: {needed}{shutil.disk_usage(folder).free:,} free"
            f" ({one_line(error, 120)}); finished shards are whole: make room and run limbeck cache"
            " RECIPE again"
        ) from error


class ShardWriter:
    """Collects the records of one shard in a file aside.

    Args:
        folder: of the cache.
        index: of the shard.
        of: `digest` of the cache's fingerprint.
    """

    def __init__(self, folder: Path, index: int, of: str) -> None:
        self.folder, self.index, self.of = folder, index, of
        self.path = shard_path(folder, index)
        self.aside = self.path.with_name(f".{self.path.name}.tmp")  # its lock is held, so one only
        self.waiting: list[Record] = []
        self.waiting_bytes = self.taken_bytes = self.rows = 0
        self.ids: list[int] = []
        with writing(self.path):
            self.file = pa.OSFile(str(self.aside), "wb")
            self.stream = pa.ipc.new_file(self.file, SCHEMA)

    def add(self, record: Record) -> None:
        """Keep a sample.

        Raises:
            CacheError: the disk is full or refuses.
        """
        size_bytes = sum(map(len, record.cells.values()))
        self.waiting.append(record)
        self.waiting_bytes += size_bytes
        self.taken_bytes += size_bytes
        self.ids.append(id_hash(record.id))
        self.rows += record.rows
        if self.waiting_bytes >= FLUSH_BYTES:
            self._flush()

    def finish(self) -> None:
        """Give the shard its name, then write its seal: a shard without one does not count.

        Raises:
            CacheError: the disk is full or refuses.
        """
        self._flush()
        with writing(self.path, self.taken_bytes):
            self.stream.close()
            self.file.close()
            sync(self.aside)
            body = {
                "shard": self.index,
                "of": self.of,
                "bytes": self.aside.stat().st_size,
                "sha256": file_sha256(self.aside),
                "rows": self.rows,
                "ids": base64.b64encode(np.array(self.ids, "<u8").tobytes()).decode(),
            }
            os.replace(self.aside, self.path)  # an older seal does not fit it
            sync(self.folder)
            body["digest"] = digest(body)
            text = json.dumps(body, separators=(",", ":"))
            write_text(seal_path(self.folder, self.index), text + "\n")

    def discard(self) -> None:
        """Leave nothing aside."""
        with contextlib.suppress(OSError):  # a full disk may refuse what was still buffered
            self.file.close()
        self.aside.unlink(missing_ok=True)

    def _flush(self) -> None:
        """Write what waits as one record batch."""
        if not self.waiting:
            return
        columns = {
            "id": [record.id for record in self.waiting],
            "tokens": [record.tokens for record in self.waiting],
            "rows": [record.rows for record in self.waiting],
            "cells": [list(record.cells.items()) for record in self.waiting],
        }
        with writing(self.path, self.taken_bytes):
            self.stream.write_batch(pa.RecordBatch.from_pydict(columns, SCHEMA))
        self.waiting, self.waiting_bytes = [], 0


def read_seal(folder: Path, index: int) -> Seal:
    """A shard's small file.

    Raises:
        FileNotFoundError: the shard was not made yet.
        ValueError: the small file is damaged.
    """
    try:
        body = json.loads(seal_path(folder, index).read_bytes())
        if body.pop("digest") != digest(body) or body["shard"] != index:
            raise ValueError("it is not what was written")
        ids = np.frombuffer(base64.b64decode(body["ids"], validate=True), "<u8")
        ids = ids.astype(np.uint64)
        return Seal(body["of"], body["bytes"], body["sha256"], body["rows"], ids)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{seal_path(folder, index).name}: {one_line(error)}") from error


def broken(folder: Path, index: int, seal: Seal, of: str) -> str | None:
    """Why a shard is not as its seal says, or not of this cache; None where it is. Reads it all."""
    if seal.of != of:
        return "it was made for a cache of another fingerprint"
    path = shard_path(folder, index)
    try:
        size_bytes = path.stat().st_size
        if size_bytes != seal.size_bytes:
            return f"{size_bytes:,} bytes, and {seal.size_bytes:,} were written"
        if file_sha256(path) != seal.sha256:
            return "its SHA-256 is not that of what was written"
    except OSError as error:
        return one_line(error)
    return None


def open_shard(folder: Path, index: int) -> pa.Table:
    """A verified shard, mapped into memory: what is not looked at is not read."""
    with pa.memory_map(str(shard_path(folder, index))) as file:  # the map outlives the file
        return pa.ipc.open_file(file).read_all()
