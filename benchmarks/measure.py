"""How the scripts here measure: fresh processes, peak memory, and the machine's matmul rate.

Linux only: peak memory is the kernel's own count (VmHWM), reset through /proc/self/clear_refs.
"""

import ctypes
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any

MARK = "RESULT "
"""Starts the line on which a worker prints its figures."""

LONG_SECONDS = 60.0
"""A call that takes longer is timed once, others at least three times."""

BUFFER_BYTES = 2 << 30
"""Products whose logits need more than this are measured in chunks of rows."""

CHUNK_ROWS = 2048

WARM_UP_ROWS = 256


def in_fresh_process(
    script: str, job: Any, timeout_seconds: float, cores: int | None = None, *, gpu: bool = False
) -> dict[str, Any]:
    """Run `script --worker JOB` with one thread; its figures, or `{"error": why}`.

    The peers' own downloads, progress bars and compile workers are switched off. With `cores` the
    process and all it starts share so many cores; by default they may use any. It sees no GPU
    unless it is about one.
    """
    settings = {
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "TRL_EXPERIMENTAL_SILENCE": "1",
        **({} if gpu else {"CUDA_VISIBLE_DEVICES": ""}),
    }
    command = [sys.executable, script, "--worker", json.dumps(job)]
    try:
        done = subprocess.run(
            command,
            env={**os.environ, **settings},
            capture_output=True,
            text=True,
            timeout=timeout_seconds,
            preexec_fn=None if cores is None else partial(keep_to, cores),
        )
    except subprocess.TimeoutExpired:
        return {"error": f"stopped after {timeout_seconds:.0f} s"}
    for line in done.stdout.splitlines():
        if line.startswith(MARK):
            return json.loads(line.removeprefix(MARK))
    said = done.stderr.strip().splitlines() or ["no message"]
    return {"error": f"exit {done.returncode}: {said[-1][:300]}"}


def keep_to(cores: int) -> None:
    """Let this process and its children run on the last `cores` cores only."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-cores:])


def answer(figures: dict[str, Any]) -> None:
    """Print a worker's figures where `in_fresh_process` finds them."""
    print(MARK + json.dumps(figures), flush=True)


def status_bytes(field: str) -> int:
    """A field of /proc/self/status, such as `VmRSS` (resident now) or `VmHWM` (its peak)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def private_bytes(process: int | None) -> int:
    """Memory that a process shares with no other."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    fields = [line.split() for line in lines if line.startswith("Private_")]
    return sum(int(kilobytes) * 1024 for _, kilobytes, *_ in fields)


def give_back_memory() -> None:
    """Return what is free to the system, or it would hide the next call's need of it."""
    from limbeck.losses import pages

    gc.collect()
    pages.release()
    ctypes.CDLL(None).malloc_trim(0)


class PeakMemory:
    """`with PeakMemory() as memory:` then `memory.extra_bytes` above what stood before."""

    def __enter__(self) -> "PeakMemory":
        give_back_memory()
        self.before_bytes = status_bytes("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        self.extra_bytes = 0
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.extra_bytes = status_bytes("VmHWM") - self.before_bytes


@dataclass
class Times:
    """What calls took, by the wall clock and by the processor's own count, seconds.

    With one thread the two are the same, unless the process waited for a core that someone else
    had: what the wall clock says then is too much. (Less would mean more than one thread.)
    """

    wall: list[float] = field(default_factory=list[float])
    processor: list[float] = field(default_factory=list[float])

    def add(self, call: Callable[[], Any]) -> None:
        """Time one call."""
        began, worked = time.perf_counter(), time.process_time()
        result = call()
        self.wall.append(time.perf_counter() - began)
        self.processor.append(time.process_time() - worked)
        del result

    @property
    def processor_share(self) -> float:
        """1 on a quiet machine."""
        return sum(self.processor) / sum(self.wall)


def times_of(
    call: Callable[[], Any], clear: Callable[[], None], beside: Callable[[], None]
) -> tuple[Times, PeakMemory]:
    """Times of repeated calls, and the memory of the first of them; `clear` drops gradients.

    Those of the last call stay. `beside` is called before the first and after each. Call it once
    before, to warm up. Seven calls where they are quick, three where they are not, one where it
    takes longer than `LONG_SECONDS`.
    """
    times, memory = Times(), PeakMemory()
    beside()
    clear()
    with memory:
        times.add(call)
    beside()
    first = times.wall[0]
    repeats = 7 if first < 2 else 5 if first < 5 else 3 if first < LONG_SECONDS else 1
    while len(times.wall) < repeats:
        clear()
        times.add(call)
        beside()
    return times, memory


def shares(flops: int, seconds: Sequence[float], rates: Sequence[float]) -> list[float]:
    """Of each call, what it reached of the mean of the rates just before and just after it."""
    around = [(before + after) / 2 for before, after in pairwise(rates)]
    return [flops / took / rate for took, rate in zip(seconds, around, strict=True)]


def operations(rows: int, vocabulary: int, student_width: int, teacher_width: int) -> int:
    """Floating-point operations of both projections and the student's two gradients."""
    return rows * vocabulary * (2 * (teacher_width + student_width) + 4 * student_width)


@dataclass(frozen=True)
class Rate:
    """Operations a second, by the wall clock and by the processor's own count."""

    wall: float
    processor: float


def matmul_rate(
    student: Any, head: Any, teacher: Any, teacher_head: Any, *, huge_pages: bool = True
) -> Rate:
    """The rate of exactly the four products, and nothing else, after a few rows of warm-up.

    At full shape, or in chunks of rows where a buffer of logits would not fit. The buffer is
    there beforehand: what a product costs, not what its memory costs. It lies in huge pages, or
    where torch puts it.
    """
    import torch

    from limbeck.losses import pages

    rows, vocabulary = student.shape[0], head.shape[0]
    chunk = rows
    if rows * vocabulary * student.element_size() > BUFFER_BYTES:
        chunk = min(rows, CHUNK_ROWS)
    logits = torch.zeros(chunk, vocabulary, dtype=head.dtype)
    hidden_gradient = torch.zeros_like(student[:chunk])
    head_gradient = torch.zeros_like(head)
    for buffer in (logits, head_gradient) if huge_pages else ():
        pages.gather(buffer)

    def products(first: int, last: int) -> None:
        x, y = student[first:last], teacher[first:last]
        out = logits[: len(x)]
        torch.mm(y, teacher_head.T, out=out)
        torch.mm(x, head.T, out=out)
        torch.mm(out, head, out=hidden_gradient[: len(x)])
        torch.mm(out.T, x, out=head_gradient)

    times = Times()
    with torch.no_grad():
        products(0, min(chunk, WARM_UP_ROWS))
        for first in range(0, rows, chunk):
            times.add(partial(products, first, first + chunk))
    flops = operations(rows, vocabulary, student.shape[1], teacher.shape[1])
    return Rate(flops / sum(times.wall), flops / sum(times.processor))
