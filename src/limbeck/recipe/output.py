"""The files of generated rows: written as the rows come, whole under their names, or absent."""

import json
import logging
import os
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from limbeck.core.files import sync
from limbeck.core.text import one_line
from limbeck.recipe.card import Tally
from limbeck.sources.generated import FAILED, ROWS
from limbeck.synth.rows import UNREADABLE, Row, to_json

log = logging.getLogger(__name__)

TABLE = "rows.parquet"
BATCH = 1000
"""Rows that are held in memory for the table."""


def write_rows(folder: Path, rows: Iterable[Row], tally: Tally) -> None:
    """Rows and failures as they come, aside; they get their names when all are there."""
    aside, aside_failed = folder / f".{ROWS}.tmp", folder / f".{FAILED}.tmp"
    places: list[tuple[str, int, int]] = []  # of each failure: its id, where it begins, its size
    with aside.open("wb") as good, aside_failed.open("wb") as bad:
        for row in rows:
            if row.failure is None and not row.readable:
                row = row.failed(UNREADABLE)
            values = to_json(row)
            tally.add(row, values)
            # In ASCII: UTF-8 cannot write half a character.
            line = (json.dumps(values, allow_nan=False) + "\n").encode("ascii")
            if row.failure is None:
                good.write(line)
            else:
                places.append((row.id, bad.tell(), len(line)))
                bad.write(line)
    _sort(aside_failed, places)
    (folder / TABLE).unlink(missing_ok=True)  # of older rows
    _named(aside_failed, folder / FAILED)
    _named(aside, folder / ROWS)
    _write_table(folder)


def _sort(path: Path, places: list[tuple[str, int, int]]) -> None:
    """Order lines by id: when a failure comes out depends on how far a writer has read ahead."""
    ordered = path.with_name(f"{path.name}.sorted.tmp")
    with path.open("rb") as lines, ordered.open("wb") as file:
        for _, start, size in sorted(places):
            lines.seek(start)
            file.write(lines.read(size))
    os.replace(ordered, path)


def _named(aside: Path, path: Path) -> None:
    """Give a file its name once all of it is on the disk, where a power cut leaves it whole."""
    sync(aside)
    os.replace(aside, path)
    sync(path.parent)


def _write_table(folder: Path) -> None:
    """The same rows for those who like columns; nothing where there is no row."""
    import pyarrow

    if not (folder / ROWS).stat().st_size:
        return
    aside = folder / f".{TABLE}.tmp"
    try:
        _write_parquet(folder / ROWS, aside)
    except (pyarrow.ArrowException, UnicodeEncodeError, OverflowError) as error:
        # Such as pairs of a token and its log-probability.
        aside.unlink(missing_ok=True)
        log.info(
            "%s: no %s: not every column has values of one type (%s)",
            folder,
            TABLE,
            one_line(error, 200),
        )
    else:
        _named(aside, folder / TABLE)


def _write_parquet(rows: Path, path: Path) -> None:
    """Rows as a table whose types are those of the JSON: text that looks like a date is text.

    Raises:
        ArrowException: a column of several types has no place in a table.
    """
    import pyarrow
    import pyarrow.parquet

    schema = pyarrow.schema([])
    for batch in _batches(rows):
        found = pyarrow.schema(list(pyarrow.array(batch).type))
        schema = pyarrow.unify_schemas([schema, found], promote_options="permissive")
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        for batch in _batches(rows):
            array: Any = pyarrow.array(batch, type=pyarrow.struct(list(schema)))
            writer.write_batch(pyarrow.RecordBatch.from_struct_array(array))


def _batches(rows: Path) -> Iterator[list[Any]]:
    with rows.open(encoding="ascii") as lines:
        while batch := [json.loads(line) for line in islice(lines, BATCH)]:
            yield batch
