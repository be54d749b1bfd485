"""The C files of this folder: compiled for this processor when first asked for, called on tensors.

That takes a C compiler and a fraction of a second for each. What is compiled lives as long as the
process.
"""

import ctypes
import functools
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from ctypes import c_void_p
from pathlib import Path

import torch
from torch import Tensor

log = logging.getLogger(__name__)

TYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
"""What numbers.h calls them."""

COMPILE_SECONDS = 60

SHARE_ELEMENTS = 2**16
"""Numbers that are worth a thread of their own."""


class CannotCompile(Exception):
    """Why there is no library."""


@functools.cache
def library(source: str, **macros: str | int) -> ctypes.CDLL | None:
    """A C file with these macros; None, and a line in the log, where it cannot be made."""
    try:
        return _compiled(source, macros)
    except CannotCompile as error:
        _say(str(error))
        return None


def _compiled(source: str, macros: dict[str, str | int]) -> ctypes.CDLL:
    """The library.

    Raises:
        CannotCompile: there is no compiler, it does not know this processor, or there is no place
            from which a program may be run.
    """
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if not compiler:
        raise CannotCompile("there is no C compiler (cc)")
    wide = ["-mprefer-vector-width=512"] if platform.machine() in ("x86_64", "AMD64") else []
    options = ["-O3", "-march=native", *wide, "-fopenmp-simd", "-fno-math-errno"]
    options += ["-fno-trapping-math", "-ffp-contract=off", "-shared", "-fPIC"]
    options += [f"-D{name}={value}" for name, value in macros.items()]
    try:
        with tempfile.TemporaryDirectory(prefix="limbeck-") as folder:
            made = str(Path(folder) / "library.so")
            file = str(Path(__file__).with_name(source))
            command = [*compiler.split(), *options, file, "-o", made, "-lm"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_SECONDS)
            if done.returncode:
                said = done.stderr.splitlines() or ["it failed and did not say why"]
                raise CannotCompile(f"{compiler}: {said[0]}")
            return ctypes.CDLL(made)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CannotCompile(str(error)) from error


@functools.cache
def _say(reason: str) -> None:
    """Once, however many libraries are asked for."""
    log.info("no kernel can be made for cpu, so losses are `chunked`: %s", reason)


def type_of(name: str, dtype: torch.dtype) -> dict[str, str | int]:
    """The macros that say that `name` is a type of numbers."""
    half: dict[str, str | int] = {"HALF": 1} if dtype == torch.float16 else {}
    return {name: TYPES[dtype], **half}


def address(of: Tensor | None, row: int | None = 0) -> c_void_p:
    """Where a tensor's data begins, or those of one of its rows; nowhere for None."""
    if of is None or row is None:
        return c_void_p(None)
    return c_void_p(of.data_ptr() + row * of.stride(0) * of.element_size())


def in_threads(share: Callable[[int, int], None], rows: int, elements: int) -> None:
    """Call `share(first, last)` for parts of the rows, as many as torch has threads."""
    most = torch.get_num_threads()
    parts = max(1, min(most, rows, elements // SHARE_ELEMENTS))
    if parts == 1:
        share(0, rows)
        return
    bounds = [rows * part // parts for part in range(parts + 1)]
    list(_threads(most).map(share, bounds, bounds[1:]))


@functools.lru_cache(maxsize=1)
def _threads(count: int) -> ThreadPoolExecutor:
    """One pool; its threads end when another number is asked for."""
    return ThreadPoolExecutor(count, thread_name_prefix="limbeck-losses")


if hasattr(os, "register_at_fork"):  # a child has none of its parent's threads
    os.register_at_fork(after_in_child=_threads.cache_clear)
