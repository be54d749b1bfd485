"""Writing files so that a reader never sees half of one, whatever happens to the writer."""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

DPI = 100
"""Of all pictures."""


def sync(path: Path) -> None:
    """Wait until a file's or a folder's content is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_bytes(path: Path, content: bytes) -> None:
    """Write aside, sync, rename: `path` holds the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        aside.write_bytes(content)
        sync(aside)
        os.replace(aside, path)
        sync(path.parent)
    finally:
        aside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of text in UTF-8."""
    write_bytes(path, text.encode())


def write_picture(path: Path, figure: Any) -> None:
    """`write_bytes` of a matplotlib figure as PNG; equal figures give equal files."""
    image = BytesIO()
    figure.savefig(image, format="png", dpi=DPI, metadata={"Software": None})
    write_bytes(path, image.getvalue())


def write_json(path: Path, value: Any) -> None:
    """`write_text` of JSON; NaN and infinity are refused, since JSON has none."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Fill a folder aside, sync all of it, then give it its name; on an error nothing is left.

    An older folder of that name is replaced.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        yield aside
        for inner in sorted(aside.rglob("*")):
            sync(inner)
        sync(aside)
        if path.exists():
            discard(path)
        os.rename(aside, path)
        sync(path.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


_held: set[Path] = set()
"""Lock files of this process: their locks keep only others out."""


@contextmanager
def held(folder: Path) -> Iterator[bool]:
    """Hold a folder for this process until it ends, however it ends; False where another one does.

    Such a lock is not inherited, unlike that of `flock`: what a killed process leaves running for a
    moment, as it prepares data, does not keep out the one that goes on.
    """
    path = (folder / ".lock").resolve()
    if path in _held:
        yield False
        return
    with path.open("w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = True
        except (BlockingIOError, PermissionError):
            mine = False
        if mine:
            _held.add(path)
        try:
            yield mine
        finally:
            if mine:
                _held.discard(path)


def discard(folder: Path) -> None:
    """Remove a folder; it loses its name first, so a half-removed one is never found under it."""
    doomed = folder.with_name(f".{folder.name}.{os.getpid()}.old.tmp")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Remove what a killed writer left aside in `folder`."""
    for stale in folder.glob(".*.tmp"):
        if stale.is_dir():
            shutil.rmtree(stale, ignore_errors=True)
        else:
            stale.unlink(missing_ok=True)
