"""One process, DDP or FSDP2: the few verbs that differ between them."""

import ctypes
import json
import os
import platform
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from limbeck.core.errors import RecipeError
from limbeck.models.taps import decoder_layers

KEPT_BYTES = 2**28
"""Freed memory that a process on a CPU keeps for its next tensors."""

LARGEST_KEPT_BYTES = 2**25
"""A single tensor's, at most; glibc allows no more."""

TIMEOUT = timedelta(minutes=10)
"""After this long without an answer from another process the run stops instead of hanging."""


class Mesh:
    """The processes that train together, as torchrun started them; one where it did not.

    Args:
        parallel: `ddp` keeps the whole model on each process, `fsdp` splits it.
        device: `auto` takes the local GPU where there is one.
    """

    def __init__(self, parallel: Literal["ddp", "fsdp"] = "ddp", device: str = "auto") -> None:
        self.parallel = parallel
        self.rank = int(os.environ.get("RANK", "0"))
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        if kind == "cuda":
            kind = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        try:
            self.device = torch.device(kind)
            _fits(self.device)
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise RecipeError("train.device", f"{device!r} cannot be used: {reason}") from None
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        else:
            keep_freed_memory()
        self._started = self.size > 1 and not dist.is_initialized()
        if self._started:
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            own = self.device if backend == "nccl" else None
            dist.init_process_group(backend, timeout=TIMEOUT, device_id=own)

    def close(self) -> None:
        """Leave the process group, if this mesh joined it."""
        if self._started:
            dist.destroy_process_group()

    @property
    def main(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return self.rank == 0

    def wrap(self, module: nn.Module, *, trains: bool, compute: torch.dtype | None = None) -> Any:
        """The module ready to run on this mesh; a frozen one is only split, never copied."""
        if self.size == 1:
            return module
        if self.parallel == "ddp":
            return DistributedDataParallel(module) if trains else module
        policy = MixedPrecisionPolicy(
            param_dtype=compute, reduce_dtype=torch.float32 if compute else None
        )
        for layer in decoder_layers(module):
            fully_shard(layer, mp_policy=policy)
        # If the outermost part of a student stayed whole after an evaluation's forward pass, the
        # optimizer and checkpoints would take hold of the wrong parameters. That of a teacher does
        # stay, because it has the output head, which the loss reads after the forward pass.
        return fully_shard(module, mp_policy=policy, reshard_after_forward=trains)

    @contextmanager
    def accumulating(self, module: nn.Module, *, last: bool) -> Iterator[None]:
        """Exchange gradients only in the last micro-batch of a step."""
        if isinstance(module, DistributedDataParallel) and not last:
            with module.no_sync():
                yield
            return
        if isinstance(module, FSDPModule):
            module.set_requires_gradient_sync(last)
        yield

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Whether it is so on any process."""
        if self.size == 1:
            return flag
        return bool(self.sum(torch.tensor(float(flag), device=self.device)))

    def gather(self, texts: Sequence[str]) -> list[list[str]]:
        """Every process's texts, by its rank."""
        if self.size == 1:
            return [list(texts)]
        raw = torch.frombuffer(bytearray(json.dumps(list(texts)).encode()), dtype=torch.uint8)
        mine = raw.to(self.device)
        lengths = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(mine)], device=self.device))
        longest = max(int(length) for length in lengths)
        padded = torch.nn.functional.pad(mine, (0, longest - len(mine)))
        heard = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(heard, padded)
        return [
            json.loads(bytes(text[: int(length)].cpu().tolist()))
            for text, length in zip(heard, lengths, strict=True)
        ]

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """For parameters outside the wrapped module, such as an objective's projector."""
        if self.size > 1:
            for parameter in parameters:
                if parameter.grad is not None:
                    self.sum(parameter.grad).div_(self.size)

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            dist.barrier()


def _fits(device: torch.device) -> None:
    """Raise RuntimeError where a process would have no GPU."""
    there = torch.cuda.device_count() if device.type == "cuda" else 0
    if (device.index or 0) >= there > 0:
        raise RuntimeError(
            f"no GPU has number {device.index}, there are {there}; name one from 0, or let torchrun"
            f" start at most {there} processes (--nproc-per-node), or set it to cpu"
        )


def whole(value: Tensor) -> Tensor:
    """A CPU copy of all of a tensor, gathered where it is split (all processes must call)."""
    full = value.full_tensor() if isinstance(value, DTensor) else value
    return full.detach().to("cpu", copy=True).contiguous()


def whole_state(module: nn.Module) -> dict[str, Tensor]:
    """A module's state dict as whole CPU tensors; a tied weight comes once, under its first name.

    All processes must call.
    """
    state: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in module.state_dict(keep_vars=True).items():
        if id(value) not in seen:
            seen.add(id(value))
            state[name] = whole(value)
    return state


def place(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor put on the device of `like`, and split as `like` is."""
    value = value.to(device=like.device, dtype=like.dtype)
    if isinstance(like, DTensor):
        return distribute_tensor(value, like.device_mesh, like.placements)
    return value


def keep_freed_memory() -> None:
    """Let glibc keep what tensors leave behind, instead of giving it back and asking anew.

    The kernel hands memory out page by page, each filled with zeros, which costs a small model more
    than its arithmetic. Where the environment says how (`MALLOC_TRIM_THRESHOLD_`), that holds.
    """
    if platform.libc_ver()[0] != "glibc" or "MALLOC_TRIM_THRESHOLD_" in os.environ:
        return
    trim_threshold, mmap_threshold = -1, -3  # mallopt's numbers for them
    libc = ctypes.CDLL(None)
    libc.mallopt(trim_threshold, KEPT_BYTES)
    libc.mallopt(mmap_threshold, LARGEST_KEPT_BYTES)
