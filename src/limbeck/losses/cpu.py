"""A chunk's losses and their gradient on a CPU, in one go for each row.

What it can do is said in `row_forms.py`, and how in `row_kernel.c`; `native.py` compiles that.
"""

import ctypes
from collections.abc import Callable, Mapping, Sequence
from ctypes import c_float, c_int64, c_void_p
from functools import partial

import torch
from torch import Tensor

from limbeck.losses import kernels, native, row_forms
from limbeck.losses.chunks import RowTerm, Run, Work
from limbeck.losses.native import address
from limbeck.losses.projection import Projection

TILE_BYTES = 1024
"""Of a student's logits that are summed in float32; their sums are summed in float64. And of what
is asked for from memory at a time."""

LANES = 32
"""As many numbers as a few vectors hold."""


class _Logits(ctypes.Structure):
    """Rows of logits as the kernel takes them."""

    _fields_ = [("first", c_void_p), ("stride", c_int64), ("scale", c_float), ("cap", c_float)]


class _Known(ctypes.Structure):
    """`row_forms.Known` as the kernel takes it."""

    _fields_ = [("ids", c_void_p), ("mass", c_void_p), ("places", c_int64)]


def kernel(
    student: Projection,
    teachers: Mapping[str, Projection | Tensor],
    terms: Sequence[RowTerm],
) -> Run | None:
    """Who takes these terms; None where they do not fit, or it cannot be compiled."""
    asked = row_forms.asked(terms)
    if asked is None:
        return None
    # Without a teacher's logits its parts are there and not used.
    other = student if asked.teacher is None else teachers[asked.teacher]
    if any(_dtype(made_by) not in native.TYPES for made_by in (student, other)):
        return None
    macros: dict[str, str | int] = {
        **_kind("STUDENT", student),
        **_kind("TEACHER", other),
        "HAS_LOGITS": int(asked.form is not None),
        "HAS_KNOWN": int(asked.knows),
        "HAS_LABELS": int(asked.of_labels is not None),
        "CENTRED": int(asked.centred),
        "TILE": TILE_BYTES // _dtype(student).itemsize,
        "LANES": LANES,
        "FAR": f"{kernels.FAR}f",
    }
    if asked.form is not None:
        macros["FORM"] = asked.form.name
    library = native.library("row_kernel.c", **macros)
    return None if library is None else Run(partial(_in_place, library, asked), by_blocks=False)


def _in_place(
    library: ctypes.CDLL,
    asked: row_forms.Asked,
    _: Callable[..., tuple[Tensor, Tensor]],
    work: Work,
    logits: Tensor,
    theirs: Mapping[str, Tensor],
    pulls: Tensor,
    rows: Tensor,
) -> Tensor:
    values, vocabulary = torch.empty_like(pulls), logits.shape[1]
    width, (_scale, slope) = asked.width(vocabulary, theirs), asked.scales
    student = teacher = _logits(logits, work.student)
    if asked.teacher is not None:
        teacher = _logits(theirs[asked.teacher], work.teachers[asked.teacher])
    labels, known = asked.labels(rows), asked.known(rows)
    tokens = _Known()
    if known is not None:
        tokens = _Known(address(known.ids), address(known.mass), known.places)

    def share(first: int, last: int) -> None:
        tile = TILE_BYTES // logits.element_size()
        tiles = -(-vocabulary // tile)
        scratch = torch.empty(3 * (tiles * tile + tiles + LANES) + tokens.places)
        library.losses_of_rows(
            *(student, teacher, tokens, address(labels)),
            *(address(of, asked.of_teacher) for of in (pulls, values)),
            *(address(of, asked.of_labels) for of in (pulls, values)),
            address(scratch),
            *(c_int64(number) for number in (first, last, vocabulary, width)),
            *(c_float(number) for number in (1 / asked.temperature, slope, asked.share)),
        )

    native.in_threads(share, len(logits), logits.numel())
    return asked.finish(values, known)


def _logits(logits: Tensor, made_by: Projection | Tensor) -> _Logits:
    ready = isinstance(made_by, Tensor)
    scale, cap = (1.0, 0.0) if ready else (made_by.scale, made_by.soft_cap or 0.0)
    return _Logits(logits.data_ptr(), logits.stride(0), scale, cap)


def _kind(name: str, made_by: Projection | Tensor) -> dict[str, str | int]:
    """The macros that say what these logits are."""
    ready = isinstance(made_by, Tensor)
    return {
        f"{name}_SCALED": int(not ready and made_by.scale != 1.0),
        f"{name}_CAPPED": int(not ready and made_by.soft_cap is not None),
        **native.type_of(name, _dtype(made_by)),
    }


def _dtype(made_by: Projection | Tensor) -> torch.dtype:
    return made_by.dtype if isinstance(made_by, Tensor) else made_by.hidden.dtype
