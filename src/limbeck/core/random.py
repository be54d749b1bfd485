"""Named random streams: every draw comes from (seed, name, numbers), never from global state.

So a resumed run needs no saved generator: step 731 of rank 2 draws the same numbers whenever and
wherever it runs.
"""

import contextlib
import hashlib
from collections.abc import Iterator

import torch


def stream_seed(seed: int, name: str, *numbers: int) -> int:
    """A 63-bit seed, independent for each name and numbers."""
    text = f"{seed}/{name}/" + "/".join(map(str, numbers))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def stream(seed: int, name: str, *numbers: int) -> torch.Generator:
    """A CPU generator seeded from `stream_seed`."""
    return torch.Generator().manual_seed(stream_seed(seed, name, *numbers))


@contextlib.contextmanager
def seeded(seed: int, name: str, *numbers: int) -> Iterator[None]:
    """Let code that only knows the global generator (dropout, initialisation) draw from a stream.

    The caller's global generators are as before when the block ends.
    """
    chosen = stream_seed(seed, name, *numbers)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        # Not torch.manual_seed: without a GPU it spends its time noting where it was called.
        torch.default_generator.manual_seed(chosen)
        if torch.cuda.is_available():
            torch.cuda.manual_seed_all(chosen)
        yield
