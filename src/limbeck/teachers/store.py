"""A teacher's cache on disk: shards of records, written by several processes, read by several.

    manifest.json          format, fingerprint, number of shards, what else the maker noted
    shard-00012.arrow      records of some samples
    shard-00012.json       its size, SHA-256, and what it holds
    .shard-00012.lock      held by the process that makes it

Which samples belong to a shard is decided before, so a shard that is lost is made again alone.
"""

import fcntl
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from limbeck.core.errors import CacheError
from limbeck.core.files import write_json
from limbeck.core.text import one_line
from limbeck.teachers.shard import (
    Record,
    Seal,
    ShardWriter,
    broken,
    digest,
    id_hash,
    open_shard,
    read_seal,
    seal_path,
    shard_path,
    writing,
)

__all__ = ["Record", "ShardWriter", "Shards", "Store", "token_hash"]

FORMAT = 1
MANIFEST = "manifest.json"
REPAIR = "run limbeck cache RECIPE: it makes this shard again and leaves the others"


def token_hash(ids: Sequence[int], learn: Sequence[bool]) -> bytes:
    """16 bytes that stand for a sample's tokens and which of them are learnt."""
    state = hashlib.blake2b(np.asarray(ids, "<i8").tobytes(), digest_size=16)
    state.update(np.asarray(learn, np.uint8).tobytes())
    return state.digest()


class Store:
    """A cache, open for reading; from several threads at once, if wished.

    Args:
        path: its folder.
        verify: verify all shards now, and not each before its first use.

    Raises:
        CacheError: there is no cache, its format is unknown, or a file is damaged.
    """

    def __init__(self, path: str | Path, verify: bool = False) -> None:
        self.path = Path(path)
        manifest = _read_manifest(self.path)
        if manifest is None:
            raise CacheError(f"{path} holds no cache: make it first with limbeck cache RECIPE")
        self.fingerprint: Mapping[str, Any] = manifest["fingerprint"]
        self.extra: Mapping[str, Any] = manifest["extra"]
        self._of = digest(manifest["fingerprint"])
        self.seals = {
            index: seal
            for index in range(manifest["shards"])
            if (seal := _seal(self.path, index)) is not None
        }
        self.absent = manifest["shards"] - len(self.seals)
        self.tables: dict[int, pa.Table] = {}
        self.lock = threading.Lock()
        sizes = [len(seal.ids) for seal in self.seals.values()]
        hashes = np.concatenate([np.zeros(0, np.uint64), *[s.ids for s in self.seals.values()]])
        order = np.argsort(hashes, kind="stable")
        self._hashes = hashes[order]
        self._shards = np.repeat(np.array(list(self.seals), np.int32), sizes)[order]
        places = [np.arange(size, dtype=np.int32) for size in sizes]
        self._places = np.concatenate([np.zeros(0, np.int32), *places])[order]
        if verify:
            self.verify()

    def __len__(self) -> int:
        return len(self._hashes)

    @property
    def rows(self) -> int:
        """Of all records together."""
        return sum(seal.rows for seal in self.seals.values())

    @property
    def size_bytes(self) -> int:
        """Of the shards, their small files and the manifest."""
        return sum(file.stat().st_size for file in self.path.iterdir() if file.is_file())

    def verify(self) -> None:
        """Read every shard once.

        Raises:
            CacheError: one is damaged.
        """
        for index in self.seals:
            self._table(index)

    def get(self, id: str, tokens: bytes) -> Record:
        """The record of a sample.

        Raises:
            CacheError: the sample is not there, was other tokens, or its shard is damaged.
        """
        wanted = np.uint64(id_hash(id))
        first, last = (np.searchsorted(self._hashes, wanted, side) for side in ("left", "right"))
        found = False
        for place in range(int(first), int(last)):
            table, row = self._table(int(self._shards[place])), int(self._places[place])
            if table["id"][row].as_py() != id:
                continue
            found = True
            if table["tokens"][row].as_py() == tokens:
                cells = dict(table["cells"][row].as_py())
                return Record(id, tokens, table["rows"][row].as_py(), cells)
        if found:
            raise CacheError(
                f"{self.path}: sample {id} had other tokens when the cache was made; its text, the"
                " tokenizer, the template or the length limit changed: make the cache again in"
                " another folder"
            )
        unmade = f", of which {self.absent} shards are not made yet" if self.absent else ""
        raise CacheError(
            f"{self.path}: sample {id} is not in the cache{unmade}: run limbeck cache RECIPE with"
            " the data of this run"
        )

    def _table(self, index: int) -> pa.Table:
        with self.lock:
            if index not in self.tables:
                if reason := broken(self.path, index, self.seals[index], self._of):
                    raise _damaged(shard_path(self.path, index), reason)
                self.tables[index] = open_shard(self.path, index)
            return self.tables[index]


class Shards:
    """A cache, open for writing beside other processes that do the same.

    Args:
        path: its folder; made where there is none.
        fingerprint: all that decides the content, as JSON. A cache of another one is refused.
        count: of shards.
        extra: what else readers need to know, as JSON; the first process's stays.

    Raises:
        CacheError: the folder holds a cache of something else, or cannot be written.
    """

    def __init__(
        self,
        path: str | Path,
        fingerprint: Mapping[str, Any],
        count: int,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        self.path, self.count = Path(path), count
        mine = json.loads(json.dumps(dict(fingerprint)))  # as it reads back
        self._of = digest(mine)
        self._known: dict[int, object] = {}
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        with _locked(self.path / ".manifest.lock"):
            for stale in self.path.glob(f".{MANIFEST}.*.tmp"):
                stale.unlink(missing_ok=True)
            manifest = _read_manifest(self.path)
            if manifest is None:
                manifest = {
                    "format": FORMAT,
                    "fingerprint": mine,
                    "shards": count,
                    "extra": dict(extra or {}),
                }
                with writing(self.path / MANIFEST):
                    write_json(self.path / MANIFEST, {**manifest, "digest": digest(manifest)})
        _compare(self.path, manifest["fingerprint"], mine)
        _compare(self.path, {"shards": manifest["shards"]}, {"shards": count})
        self.extra: Mapping[str, Any] = manifest["extra"]

    def missing(self) -> list[int]:
        """Shards that are not there, or not whole."""
        return [index for index in range(self.count) if not self._whole(index)]

    @contextmanager
    def claim(self, index: int) -> Iterator[ShardWriter | None]:
        """Make a shard, or get None: another process makes it now, or it is whole.

        It appears when the block is left; on an exception nothing is left of it.

        Raises:
            CacheError: the disk is full or refuses. Other shards are untouched.
        """
        name = shard_path(self.path, index).stem
        lock = self.path / f".{name}.lock"
        with _locked(lock, wait=False) as mine:
            if not mine or self._whole(index):
                yield None
                return
            for stale in self.path.glob(f".{name}.*.tmp"):  # a killed process's
                stale.unlink(missing_ok=True)
            writer = ShardWriter(self.path, index, self._of)
            try:
                yield writer
                writer.finish()
            finally:
                writer.discard()
            lock.unlink(missing_ok=True)  # who waits with it open finds the shard whole

    def _whole(self, index: int) -> bool:
        """Whether a shard verifies. One that did is not read again while its files stay as is."""
        try:
            stamp = [
                (stat.st_ino, stat.st_size, stat.st_mtime_ns)
                for find in (shard_path, seal_path)
                if (stat := find(self.path, index).stat())
            ]
            if self._known.get(index) != stamp:
                if broken(self.path, index, read_seal(self.path, index), self._of):
                    return False
                self._known[index] = stamp
        except (OSError, ValueError):
            return False
        return True


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest, None where there is none."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
        if manifest["format"] != FORMAT:
            raise CacheError(
                f"{path}: format {manifest['format']!r} is not {FORMAT}, which this version of"
                " limbeck reads: make the cache again in another folder"
            )
        if manifest.pop("digest") != digest(manifest):
            raise ValueError("it is not what was written")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise CacheError(
            f"{path} is damaged ({one_line(error)}): remove it and run limbeck cache RECIPE; whole"
            " shards are kept"
        ) from error
    return manifest


def _compare(folder: Path, theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    for field in [*mine, *theirs]:
        if theirs.get(field) != mine.get(field):
            raise CacheError(
                f"{folder} is a cache of something else: {field} was {theirs.get(field)!r} when it"
                f" was made and is {mine.get(field)!r} now: give another folder, or remove this one"
            )


def _seal(folder: Path, index: int) -> Seal | None:
    try:
        return read_seal(folder, index)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise _damaged(seal_path(folder, index), str(error)) from error


def _damaged(path: Path, reason: str) -> CacheError:
    return CacheError(f"{path} is damaged ({reason}): {REPAIR}")


@contextmanager
def _locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold a lock that ends with the process; False where another holds it."""
    with writing(path):
        file = path.open("w")
    with file:  # a caller's own errors are none of writing
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = True
        except BlockingIOError:
            mine = False
        yield mine
