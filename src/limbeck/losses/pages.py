"""Large buffers on a CPU in huge pages: a 512th as many for the kernel to hand out and look up."""

import contextlib
import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

HUGE_PAGE_BYTES = 2**21


def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of zeros; in huge pages where it is large and the system has them.

    The memory goes back to the system with the tensor.
    """
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or size < 2 * HUGE_PAGE_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # begins as zeros
    with contextlib.suppress(OSError):  # a kernel without them serves small pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(*shape)
