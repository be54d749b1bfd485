"""One thing after another, made in a process beside this one, which is forked from it.

Threads of one interpreter wait for each other; a process does not. It inherits all that it needs,
so nothing is sent to it, and what it makes comes back through a pipe. A full pipe (64 KiB) lets it
wait, so it is never far ahead.
"""

import gc
import io
import multiprocessing
import os
import pickle
import signal
import sys
import traceback
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch import Tensor

from limbeck.losses import pages


def cores() -> int:
    """How many this process may use."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def can_work_beside() -> bool:
    """Whether a process can be forked here, and has a core to work on."""
    if sys.platform != "linux" or multiprocessing.current_process().daemon:  # it may have none
        return False
    return cores() > 1


class WorkerDied(Exception):
    """The process ended before it had made the next thing."""


class Worker:
    """A process that calls `make` again and again; it ends with this object, or with this process.

    `close` ends it at once.

    Args:
        make: must need no thread, no device and no connection of this process.
        unneeded: tensors that `make` does not read. Where this process goes on to change them, the
            other would otherwise hold on to what they were.

    Raises:
        OSError: no process can be made.
    """

    def __init__(self, make: Callable[[], Any], unneeded: Iterable[Tensor] = ()) -> None:
        context = multiprocessing.get_context("fork")
        self._pipe, writing = context.Pipe(duplex=False)
        arguments = (make, list(unneeded), self._pipe, writing)
        process = context.Process(target=_work, args=arguments, name="prepare", daemon=True)
        with warnings.catch_warnings():
            # Python (3.12) warns of threads, which the child does without.
            warnings.filterwarnings("ignore", ".*fork", DeprecationWarning)
            with _nothing_cleared_away():
                process.start()
        writing.close()  # so that the pipe ends when the process does
        self._process = process
        # Not its pipe, from which another thread may be reading.
        self.close = weakref.finalize(self, _end, process)

    def next(self) -> Any:
        """The next thing.

        Raises:
            WorkerDied: there is none.
            Exception: what `make` raised.
        """
        try:
            made, error = pickle.loads(self._pipe.recv_bytes())  # from our own child
        except (EOFError, OSError) as broken:
            self._process.join()
            raise WorkerDied(f"exit code {self._process.exitcode}") from broken
        if error is not None:
            raise error
        return made


@contextmanager
def _nothing_cleared_away() -> Iterator[None]:
    """No garbage is collected within."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def _work(
    make: Callable[[], Any], unneeded: Iterable[Tensor], reading: Connection, writing: Connection
) -> None:
    """What the process does until nobody reads its pipe."""
    # What was left over before the fork is not this process's to clear away: a tensor of a GPU,
    # which is out of reach here, would end it.
    gc.freeze()
    gc.enable()
    # Ctrl-C is for the parent, and a checkpoint on SIGTERM too.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    reading.close()  # or nobody's end would end the writing
    torch.set_num_threads(1)  # the threads of the parent are not here
    for tensor in unneeded:
        pages.forget(tensor)
    error: Exception | None = None
    while error is None:
        made: Any = None
        try:
            made = make()
        except Exception as found:
            error = _portable(found)
        try:
            writing.send_bytes(_pickled((made, error)))
        except BrokenPipeError:
            return


def _end(process: BaseProcess) -> None:
    process.kill()  # it has nothing to put in order
    process.join()


def _portable(error: Exception) -> Exception:
    """The error with its traceback as text, or one that says the same where it cannot be sent."""
    error.add_note("in the process that prepares:\n" + traceback.format_exc())
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever its class raises when it is taken apart or put together
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


class _Pickler(pickle.Pickler):
    """Sends tensors as their bytes: torch's own way opens a file for each."""

    def reducer_override(self, obj: Any) -> Any:
        if type(obj) is not Tensor:
            return NotImplemented
        data: Any = b""
        if obj.numel():  # a tensor of nothing may have a stride of 0, which forbids the view
            data = obj.detach().contiguous().flatten().view(torch.uint8).numpy()
        return _tensor, (pickle.PickleBuffer(data), obj.dtype, tuple(obj.shape))


def _tensor(data: bytearray, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    if not data:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype).view(shape)


def _pickled(value: Any) -> bytes:
    file = io.BytesIO()
    _Pickler(file, protocol=5).dump(value)
    return file.getvalue()
