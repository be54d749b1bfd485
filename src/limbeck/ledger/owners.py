"""Which ledgers are in use: a locked file for each, whose lock ends with its process.

A process number would not do: it may be given again, and means nothing to another container that
shares the folder. The kernel releases a lock however a process ends.
"""

import fcntl
import glob
import os
import secrets
from pathlib import Path

_here: set[Path] = set()
"""Files locked by this process: such locks do not keep out the process that holds them."""


class Owner:
    """One open ledger. Its lock file stands beside the ledger until `release`.

    Attributes:
        name: what its requests are recorded under.
    """

    def __init__(self, ledger: Path) -> None:
        while True:
            self.name = secrets.token_hex(8)
            self._path = _file(ledger, self.name)
            _here.add(self._path)
            try:
                self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            except BaseException:
                _here.discard(self._path)
                raise
            # Between the two calls another process may take it for left over: then there is a lock
            # on it, or it is gone, and another name is taken.
            if _lock(self._descriptor) and _same(self._path, self._descriptor):
                return
            self.release()

    def release(self) -> None:
        """Say that no request is under way any more."""
        self._path.unlink(missing_ok=True)
        os.close(self._descriptor)
        _here.discard(self._path)


def alive(ledger: Path, name: str) -> bool:
    """Whether the process that has this name still has the ledger open."""
    path = _file(ledger, name)
    if path in _here:
        return True
    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        return not _lock(descriptor)
    finally:
        os.close(descriptor)


def sweep(ledger: Path) -> None:
    """Remove the lock files of processes that died."""
    for path in ledger.parent.glob(f"{glob.escape(ledger.name)}-*.owner"):
        if path in _here:
            continue
        try:
            descriptor = os.open(path, os.O_RDWR)
        except FileNotFoundError:
            continue
        try:
            if _lock(descriptor):
                path.unlink(missing_ok=True)
        finally:
            os.close(descriptor)


def _file(ledger: Path, name: str) -> Path:
    return ledger.with_name(f"{ledger.name}-{name}.owner")


def _lock(descriptor: int) -> bool:
    """Lock the file if nobody has. Such a lock is not inherited, unlike that of `flock`: a child
    process that outlives its parent does not make it look alive."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def _same(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False
