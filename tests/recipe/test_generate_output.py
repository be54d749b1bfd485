"""The files of generated rows: whole under their names, in one order, and a table where it fits."""

import json
import logging
import os
import tracemalloc

import pyarrow.parquet
import pytest

from limbeck.core.types import Turn
from limbeck.recipe import output
from limbeck.recipe.card import Tally
from limbeck.recipe.output import write_rows
from limbeck.synth.rows import Row

PROMPT = (Turn(text="when?"),)


def rows_of(*completions, **notes):
    return [
        Row(id=f"r{k}", prompt=PROMPT, completion=text).noted(**notes)
        for k, text in enumerate(completions)
    ]


def write(folder, rows):
    write_rows(folder, rows, Tally())


def table(folder):
    return pyarrow.parquet.read_table(folder / "rows.parquet")


def test_text_stays_text_in_the_table(tmp_path):
    """Also where it looks like a date, in a column and inside of one."""
    dates = [f"2024-0{k}-01" for k in range(1, 4)]
    write(tmp_path, rows_of(*dates, seen={"on": "2024-05-05"}))
    found = table(tmp_path)
    assert found["completion"].to_pylist() == dates
    assert found["seen"].to_pylist()[0] == {"on": "2024-05-05"}


def test_columns_that_come_late_or_differ_as_numbers_have_their_place(tmp_path, monkeypatch):
    monkeypatch.setattr(output, "BATCH", 2)
    rows = [*rows_of("a", "b", "c", share=1), *rows_of("d", share=0.5, late="x")]
    write(tmp_path, rows)
    found = table(tmp_path).to_pydict()
    assert found["share"] == [1.0, 1.0, 1.0, 0.5]
    assert found["late"] == [None, None, None, "x"]


def test_without_a_table_it_is_said_why_and_none_of_older_rows_stays(tmp_path, caplog):
    """Pairs of a token and its log-probability have no one type."""
    caplog.set_level(logging.INFO)
    write(tmp_path, rows_of("a"))
    assert table(tmp_path).num_rows == 1
    write(tmp_path, rows_of("a", scores=[["a", -0.5]]))
    assert not (tmp_path / "rows.parquet").exists()
    assert "no rows.parquet: not every column has values of one type" in caplog.text
    assert {path.name for path in tmp_path.iterdir()} == {"rows.jsonl", "failed.jsonl"}
    write(tmp_path, rows_of("a"))
    write(tmp_path, [])
    assert not (tmp_path / "rows.parquet").exists()


def test_failures_have_one_order_whenever_they_come(tmp_path):
    failed = [row.failed("no") for row in rows_of("a", "b", "c")]
    for k, rows in enumerate((failed, failed[::-1])):
        folder = tmp_path / str(k)
        folder.mkdir()
        write(folder, rows)
    texts = [(tmp_path / name / "failed.jsonl").read_text() for name in "01"]
    assert texts[0] == texts[1]
    assert [json.loads(line)["id"] for line in texts[0].splitlines()] == ["r0", "r1", "r2"]


def test_rows_that_fail_are_not_held_in_memory(tmp_path):
    """Two thousand of ten thousand characters: no more than their ids and places."""
    rows = (
        Row(id=f"r{k}", prompt=PROMPT, completion="x" * 10_000, failure="no") for k in range(2000)
    )
    tracemalloc.start()
    try:
        write(tmp_path, rows)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (tmp_path / "failed.jsonl").stat().st_size > 20_000_000
    assert most < 3_000_000


@pytest.mark.parametrize("name", ["rows.jsonl", "failed.jsonl", "rows.parquet"])
def test_a_file_has_its_name_when_all_of_it_is_on_the_disk(tmp_path, monkeypatch, name):
    """Else a power cut behind the card would leave a whole folder with cut rows."""
    events = []
    real_sync, real_replace = os.fsync, os.replace

    def fsync(descriptor):
        events.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}")))
        real_sync(descriptor)

    def replace(source, target):
        events.append(("name", str(source), str(target)))
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    write(tmp_path, [*rows_of("a"), Row(id="z", prompt=PROMPT, failure="no")])
    named = next(e for e in events if e[0] == "name" and e[2] == str(tmp_path / name))
    before, behind = events[: events.index(named)], events[events.index(named) :]
    assert ("sync", named[1]) in before
    assert ("sync", str(tmp_path)) in behind
