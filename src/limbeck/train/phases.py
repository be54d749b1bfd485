"""Names for what a step does, which a profiler shows."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.profiler import record_function


@contextmanager
def phase(name: str) -> Iterator[None]:
    """A part of a step, such as `limbeck.teacher`: for `with`, or before a function.

    torch's own range takes some microseconds also while nobody listens, and lets other threads of
    the interpreter in. So there is none then.
    """
    # Without torch's flag there is always a range.
    if getattr(torch.autograd.profiler, "_is_profiler_enabled", True):
        with record_function(name):
            yield
    else:
        yield
