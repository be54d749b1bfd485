"""Rows of JSONL and Parquet files and of hub datasets, read lazily and named by their place."""

import hashlib
import json
import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from limbeck.core.errors import DataError
from limbeck.core.files import file_sha256
from limbeck.core.text import one_line

Row = Mapping[str, Any]

ROWS, FAILED, CARD = "rows.jsonl", "failed.jsonl", "card.json"
"""Files of a folder of generated rows: what to train on, what failed and why, figures."""


class Rows(Protocol):
    """A sequence of rows, each of which knows where it stands."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Row: ...

    def place(self, index: int) -> str:
        """`FILE:LINE` or `NAME[ROW]`, for messages."""
        ...

    def name(self, index: int) -> str:
        """The same without the file's folder: a row keeps its name where its file is moved."""
        ...


class JsonLines:
    """A .jsonl file; only where each line begins, and how long it is, is kept in memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("rb")
        weakref.finalize(self, self._file.close)
        starts: list[int] = []
        sizes: list[int] = []
        numbers: list[int] = []
        offset = 0
        for number, line in enumerate(self._file, start=1):
            if line.strip():
                starts.append(offset)
                sizes.append(len(line))
                numbers.append(number)
            offset += len(line)
        self._starts = np.array(starts, dtype=np.int64)
        self._sizes = np.array(sizes, dtype=np.int64)
        self._numbers = np.array(numbers, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < len(self):
            raise IndexError(index)
        line = self._read(int(self._starts[index]), int(self._sizes[index]))
        try:
            row: Any = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = "not UTF-8" if isinstance(error, UnicodeDecodeError) else one_line(error, 200)
            reason = getattr(error, "msg", reason)
            raise DataError(f"{self.place(index)}: not JSON: {reason}") from None
        if not isinstance(row, dict):
            raise DataError(f"{self.place(index)}: not a JSON object: {str(row)[:60]!r}")
        return row

    def _read(self, start: int, size: int) -> bytes:
        """A part of the file, wherever a process forked from this one reads at the same time."""
        if hasattr(os, "pread"):
            return os.pread(self._file.fileno(), size, start)
        self._file.seek(start)  # a place that forks would share: where there are no forks
        return self._file.read(size)

    def place(self, index: int) -> str:
        """File and line, from 1."""
        return f"{self.path}:{self._numbers[index]}"

    def name(self, index: int) -> str:
        """The file's own name, and the line."""
        return f"{self.path.name}:{self._numbers[index]}"


class Table:
    """Rows of a table of `datasets`, from the hub."""

    def __init__(self, table: Any, source: Path | str) -> None:
        self.table, self.source = table, source

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.table[index]

    def place(self, index: int) -> str:
        """File or dataset, and row, from 0."""
        return f"{self.source}[{index}]"

    def name(self, index: int) -> str:
        """The file's own name, or the dataset's, and the row."""
        own = self.source.name if isinstance(self.source, Path) else self.source
        return f"{own}[{index}]"


class Parquet(Table):
    """Rows of a Parquet file, which is kept in memory as an Arrow table."""

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return _Cells(self.table, index)


class _Cells(Mapping[str, Any]):
    """A row of an Arrow table. A cell becomes a Python value when it is asked for: one that cannot
    (a date in the year 36812, say) harms nobody in a column that is not read."""

    def __init__(self, table: Any, index: int) -> None:
        self.table, self.index = table, index

    def __len__(self) -> int:
        return self.table.num_columns

    def __iter__(self) -> Iterator[str]:
        return iter(self.table.column_names)

    def __contains__(self, name: object) -> bool:
        return name in self.table.column_names

    def __getitem__(self, name: str) -> Any:
        return self.table[name][self.index].as_py()


class Chain:
    """Several files, one after the other."""

    def __init__(self, parts: Sequence[Rows]) -> None:
        self.parts = parts
        self._ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _find(self, index: int) -> tuple[Rows, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = int(np.searchsorted(self._ends, index, side="right"))
        return self.parts[part], index - int(self._ends[part - 1] if part else 0)

    def __getitem__(self, index: int) -> Row:
        part, inner = self._find(index)
        return part[inner]

    def place(self, index: int) -> str:
        """Where the part says the row stands."""
        part, inner = self._find(index)
        return part.place(inner)

    def name(self, index: int) -> str:
        """What the part calls the row."""
        part, inner = self._find(index)
        return part.name(inner)


def open_rows(path: str, split: str) -> Rows:
    """Rows of a .jsonl or .parquet file, a folder of such files (by name), or a hub dataset.

    Raises:
        DataError: nothing is there, the kind of file is unknown, or it has no rows; or the folder
            is one of generated rows, which holds failed ones too.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        if (place / ROWS).exists() and any((place / name).exists() for name in (CARD, FAILED)):
            raise DataError(
                f"{path}: the folder holds generated rows beside a table of the same and those that"
                f" failed; name {ROWS} in it, or use a source of `kind: generated`"
            )
        files = _files(place)
        if not files:
            raise DataError(f"{path}: the folder holds no .jsonl or .parquet file")
        rows: Rows = Chain([_open_file(file) for file in files])
    elif place.exists():
        rows = _open_file(place)
    elif place.suffix in (".jsonl", ".parquet", ".json", ".csv") or path.startswith(
        (".", "/", "~")
    ):
        raise DataError(f"{path}: no such file or folder")
    else:
        rows = _open_hub(path, split)
    if not len(rows):
        raise DataError(f"{path}: there are no rows")
    return rows


def content_sha256(path: str) -> str | None:
    """Hash of the file, or of the folder's files, with their names; None where there is none."""
    whole = hashlib.sha256()
    files = _files_of(path)
    for file in files:
        whole.update(json.dumps([file.name, file_sha256(file)]).encode())
    return whole.hexdigest() if files else None


def file_names(path: str) -> frozenset[str]:
    """Names of the file or of the folder's files; of a hub dataset its own. See `Rows.name`."""
    return frozenset(file.name for file in _files_of(path)) or frozenset({path})


def _files_of(path: str) -> list[Path]:
    place = Path(path).expanduser()
    return _files(place) if place.is_dir() else [place] if place.is_file() else []


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix in (".jsonl", ".parquet"))


def _open_file(path: Path) -> Rows:
    if path.suffix == ".jsonl":
        return JsonLines(path)
    if path.suffix == ".parquet":
        return Parquet(_read_parquet(path), path)
    raise DataError(f"{path}: unknown kind of file {path.suffix!r}; give .jsonl or .parquet")


def _read_parquet(path: Path) -> Any:
    """The file itself: `datasets` would write a copy and find that again by path and time."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            # In batches: nested text of more than 2 GiB does not fit into one.
            table: Any = pyarrow.Table.from_batches(file.iter_batches(), schema=file.schema_arrow)
    except Exception as error:  # pyarrow raises many kinds for a bad file
        raise DataError(f"{path}: not a readable Parquet file: {one_line(error, 200)}") from None
    names = table.column_names
    if twice := {name for name in names if names.count(name) > 1}:
        raise DataError(f"{path}: two columns have the name {min(twice)!r}; rename one")
    return table


def _open_hub(name: str, split: str) -> Rows:
    import datasets

    try:
        table: Any = datasets.load_dataset(name, split=split)
    except Exception as error:  # network, name, split: all are told the same way
        raise DataError(
            f"{name}: no such file, and the hub gave no dataset ({one_line(error, 200)})"
        ) from None
    return Table(table, name)
