"""Large memory on a CPU in huge pages: a 512th as many for the kernel to hand out and look up.

A product of few rows with a large weight reads each of its pages for little work, and spends much
of its time on finding them.
"""

import contextlib
import ctypes
import math
import mmap
import weakref
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

HUGE_PAGE_BYTES = 2**21

COLLAPSE = 25
"""MADV_COLLAPSE, of Linux from 6.1 on, which Python does not name."""

SWITCH = Path("/sys/kernel/mm/transparent_hugepage/enabled")


_spare: dict[int, list[mmap.mmap]] = {}
"""Memory by its size that no tensor has any more."""


def empty(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device, *, at_most_bytes: int = 0
) -> Tensor:
    """A tensor that says anything; in huge pages where it is large and the system has them.

    A large one's memory stays here when the tensor is gone, for the next of the same size: the
    system clears what it hands out, which takes longer than to use it once. Whoever asks for
    another size has gone on to something else, and what waits then goes back to the system.

    Args:
        shape, dtype, device: of the tensor.
        at_most_bytes: what tensors of this kind may come to, where they are not all of one size:
            they share their memory. What is not written of it takes none.
    """
    size = math.prod(shape) * dtype.itemsize
    if not _worth(size, device):
        return torch.empty(shape, dtype=dtype, device=device)
    size = max(size, at_most_bytes)
    try:
        memory = _spare[size].pop()
    except (KeyError, IndexError):
        memory = _mapped(size)
    view = memoryview(memory)
    weakref.finalize(view, _keep, memory).atexit = False
    return torch.frombuffer(view, dtype=dtype, count=math.prod(shape)).view(*shape)


def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The same, of zeros."""
    return empty(shape, dtype, device).zero_()


def release() -> None:
    """Give the memory that waits for another tensor back to the system."""
    _spare.clear()


def _mapped(size: int) -> mmap.mmap:
    release()
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them serves small pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def _keep(memory: mmap.mmap) -> None:
    _spare.setdefault(len(memory), []).append(memory)


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor.to(dtype)`, detached; a new tensor lies as one of `empty` does."""
    if tensor.dtype == dtype or not _worth(tensor.numel() * dtype.itemsize, tensor.device):
        return tensor.detach().to(dtype)
    return empty(tensor.shape, dtype, tensor.device).copy_(tensor.detach())


def gather(tensor: Tensor) -> bool:
    """Move a tensor's memory into huge pages, in its place; whether it is there, or need not be.

    What is there already is left as it is, which takes no time. Pages of a file, such as weights
    that were mapped instead of read, cannot be moved.
    """
    if not _worth(tensor.nbytes, tensor.device):
        return True
    try:
        if "[never]" in SWITCH.read_text():
            return True
    except OSError:
        return True
    return _advise(tensor, COLLAPSE, HUGE_PAGE_BYTES)


def forget(tensor: Tensor) -> None:
    """Give this process's share of a tensor's memory back; what it says is undefined from now."""
    if tensor.device.type == "cpu" and hasattr(mmap, "MADV_DONTNEED"):
        _advise(tensor, mmap.MADV_DONTNEED, mmap.PAGESIZE)


def _advise(tensor: Tensor, advice: int, page: int) -> bool:
    """Tell the kernel what is to be with the pages that lie within a tensor's memory; its answer.

    Args:
        tensor: without gaps, or with what lies in them.
        advice: one of madvise(2).
        page: bytes.
    """
    here: Tensor = getattr(tensor, "_local_tensor", tensor)
    first = -(-here.data_ptr() // page) * page
    size = (here.data_ptr() + here.nbytes - first) // page * page
    where = ctypes.c_void_p(first), ctypes.c_size_t(size)
    return size <= 0 or ctypes.CDLL(None).madvise(*where, ctypes.c_int(advice)) == 0


def _worth(size: int, device: torch.device) -> bool:
    """Whether so many bytes gain anything by huge pages, which this system may have."""
    return device.type == "cpu" and size >= 2 * HUGE_PAGE_BYTES and hasattr(mmap, "MADV_HUGEPAGE")
