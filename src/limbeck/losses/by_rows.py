"""Working on a few rows at a time, where what is made on the way is much larger than the answer."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK_BYTES = 2**26
"""Size of one [rows, v] array in float32, of which a loss makes several."""


def chunk_rows(vocabulary: int) -> int:
    """How many rows of logits `CHUNK_BYTES` hold, at least one."""
    return max(1, CHUNK_BYTES // (4 * vocabulary))


def in_chunks(function: Callable[..., Tensor], *tensors: Tensor, rows: int) -> Tensor:
    """`function(*tensors)`, computed on so many rows at a time.

    With gradients, nothing that the function makes is kept: the backward pass makes it again, a
    chunk at a time. Gradients also reach what the function holds without being given it.

    Args:
        function: from [c, ...] tensors to [c, ...]; each row's answer depends on that row alone.
        tensors: [n, ...] each.
        rows: most rows of a chunk.

    Returns:
        [n, ...].

    >>> in_chunks(lambda x: 2 * x, torch.arange(5), rows=2)
    tensor([0, 2, 4, 6, 8])
    """
    pieces = [
        checkpoint(function, *parts, use_reentrant=False, preserve_rng_state=False)
        if torch.is_grad_enabled()
        else function(*parts)
        for parts in zip(*(tensor.split(rows) for tensor in tensors), strict=True)
    ]
    return torch.cat(pieces)  # of no rows there is one chunk, empty
