"""A chunk's losses and their gradient on a CPU, each row read two or three times and written once.

What it can do is said in `row_forms.py`, and how in `row_kernel.c`, which is compiled when it is
first asked for, once for each form and type of logits. That takes a C compiler and a fraction of a
second.
"""

import ctypes
import functools
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from ctypes import c_float, c_int64, c_void_p
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from limbeck.losses import kernels, row_forms
from limbeck.losses.projection import Projection

if TYPE_CHECKING:
    from limbeck.losses.chunks import RowTerm, Work

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("row_kernel.c")

TYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
"""Of logits, as the kernel calls them."""

TILE = 4096
"""Tokens that are summed in float32; their sums are summed in float64."""

COMPILE_SECONDS = 60

SHARE_ELEMENTS = 2**16
"""Logits that are worth a thread of their own."""


class CannotMake(Exception):
    """Why there is no kernel here."""


class _Logits(ctypes.Structure):
    """Rows of logits as the kernel takes them."""

    _fields_ = [("first", c_void_p), ("stride", c_int64), ("scale", c_float), ("cap", c_float)]

    @classmethod
    def of(cls, logits: Tensor, made_by: Projection | Tensor) -> "_Logits":
        scale, cap = (
            (1.0, None) if isinstance(made_by, Tensor) else (made_by.scale, made_by.soft_cap)
        )
        return cls(logits.data_ptr(), logits.stride(0), scale, cap or 0.0)


class _Known(ctypes.Structure):
    """`row_forms.Known` as the kernel takes it."""

    _fields_ = [("ids", c_void_p), ("mass", c_void_p), ("places", c_int64)]


@functools.cache
def works() -> bool:
    """Whether kernels can be made here, tried once."""
    try:
        kernel("STUDENT=float32", f"TILE={TILE}")
        return True
    except CannotMake as error:
        log.info("no kernel can be made for cpu, so losses are `chunked`: %s", error)
        return False


@functools.cache
def kernel(*parts: str) -> Callable[..., None]:
    """`losses_of_rows` of the source with these macros.

    Raises:
        CannotMake: no compiler, one that does not know this processor, or no place from which a
            program may be run.
    """
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if not compiler:
        raise CannotMake("there is no C compiler (cc)")
    wide = ["-mprefer-vector-width=512"] if platform.machine() in ("x86_64", "AMD64") else []
    options = ["-O3", "-march=native", *wide, "-fopenmp-simd", "-fno-math-errno"]
    options += ["-fno-trapping-math", "-shared", "-fPIC"]
    options += [f"-D{part}" for part in (*parts, f"FAR={kernels.FAR}f")]
    with tempfile.TemporaryDirectory(prefix="limbeck-") as folder:
        library = Path(folder) / "row_kernel.so"
        command = [*compiler.split(), *options, str(SOURCE), "-o", str(library), "-lm"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_SECONDS)
            if done.returncode:
                raise CannotMake(f"{compiler}: {(done.stderr.splitlines() or ['it failed'])[0]}")
            function = ctypes.CDLL(str(library)).losses_of_rows
        except (OSError, subprocess.TimeoutExpired) as error:
            raise CannotMake(str(error)) from error
    function.restype = None
    function.argtypes = [
        *(_Logits, _Logits, _Known, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p),
        *(c_int64, c_int64, c_int64, c_int64, c_float, c_float, c_float),
    ]
    return function


def in_place(
    _: Callable[..., tuple[Tensor, Tensor]],
    work: "Work",
    logits: Tensor,
    theirs: Mapping[str, Tensor],
    pulls: Tensor,
    rows: Tensor,
) -> Tensor:
    """As `chunks.in_place` by kernels, for terms that fit."""
    asked = row_forms.asked(work.terms, rows)
    values = torch.empty_like(pulls)
    parts = [f"TILE={TILE}", *_parts_of("STUDENT", logits, work.student)]
    student = teacher = _Logits.of(logits, work.student)
    if asked.form is not None and asked.teacher is not None:
        other, made_by = theirs[asked.teacher], work.teachers[asked.teacher]
        teacher = _Logits.of(other, made_by)
        parts += _parts_of("TEACHER", other, made_by)
        parts += [f"FORM={asked.form.name}", f"CENTRED={int(asked.form.centred)}"]
    known, places = _Known(), 0
    if asked.known is not None:
        ids, mass = asked.known.ids.contiguous(), asked.known.mass.contiguous()
        known, places = _Known(ids.data_ptr(), mass.data_ptr(), ids.shape[1]), ids.shape[1]
        parts += ["KNOWN"]
    if asked.labels is not None:
        parts += ["LABELS"]
    run, vocabulary = kernel(*parts), logits.shape[1]
    width = asked.width(vocabulary, theirs)

    def share(first: int, last: int) -> None:
        scratch = torch.empty(max(width if asked.centred else 0, places))
        run(
            *(student, teacher, known, _address(asked.labels)),
            *(_address(of, asked.of_teacher) for of in (pulls, values)),
            *(_address(of, asked.of_labels) for of in (pulls, values)),
            *(scratch.data_ptr(), first, last, vocabulary, width),
            *(1 / asked.temperature, asked.slope, asked.share),
        )

    _in_threads(share, len(logits), logits.numel())
    return asked.finish(values)


def fits(terms: Sequence["RowTerm"], *logits: torch.dtype) -> bool:
    """As `row_forms.fits`, and logits are of these types."""
    return all(dtype in TYPES for dtype in logits) and row_forms.fits(terms)


def _parts_of(name: str, logits: Tensor, made_by: Projection | Tensor) -> list[str]:
    """The macros that say what these logits are."""
    capped = isinstance(made_by, Projection) and made_by.soft_cap is not None
    half = ["HALF"] if logits.dtype == torch.float16 else []
    return [f"{name}={TYPES[logits.dtype]}", f"{name}_CAPPED={int(capped)}", *half]


def _address(of: Tensor | None, row: int | None = 0) -> int | None:
    """Where the data, or its row, begins."""
    if of is None or row is None:
        return None
    return of.data_ptr() if of.dim() == 1 else of[row].data_ptr()


def _in_threads(share: Callable[[int, int], None], rows: int, elements: int) -> None:
    """Call `share(first, last)` for parts of the rows, as many as torch has threads."""
    parts = max(1, min(torch.get_num_threads(), rows, elements // SHARE_ELEMENTS))
    if parts == 1:
        share(0, rows)
        return
    bounds = [rows * part // parts for part in range(parts + 1)]
    list(_threads(parts).map(share, bounds, bounds[1:]))


@functools.cache
def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="limbeck-losses")


if hasattr(os, "register_at_fork"):  # a child has none of its parent's threads
    os.register_at_fork(after_in_child=_threads.cache_clear)
