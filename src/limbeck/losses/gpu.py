"""A chunk's losses and their gradient on a GPU, each row read two or three times and written once.

What it can do is said in `row_forms.py`, and how in `row_kernel.py`. Triton comes with torch where
torch knows GPUs; nothing imports this file elsewhere.
"""

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from limbeck.losses import row_forms, row_kernel
from limbeck.losses.chunks import RowTerm, Run, Work
from limbeck.losses.projection import Projection
from limbeck.losses.sparse import Sparse

log = logging.getLogger(__name__)

TILE = 4096
"""Tokens of a row at a time."""

WARPS = 8

MOST_PLACES = 1024
"""Known tokens of a row, which are all held at once."""

LEAST_SHARE = 1e-4
"""Of either model in a mixture that float32 can surely tell from nothing."""


class _Logits(NamedTuple):
    """Rows of logits as the kernel takes them.

    The stride is how far a row's memory goes; the cap is None where there is none.
    """

    first: Tensor
    stride: int
    scale: float
    cap: float | None

    @classmethod
    def of(cls, logits: Tensor, made_by: Projection | Tensor) -> "_Logits":
        if isinstance(made_by, Tensor):
            return cls(logits, logits.stride(0), 1.0, None)
        return cls(logits, logits.stride(0), made_by.scale, made_by.soft_cap)


class _Known(NamedTuple):
    """`row_forms.Known` as the kernel takes it."""

    ids: Tensor
    mass: Tensor
    places: int


@functools.cache
def works(device: torch.device) -> bool:
    """Whether kernels can be made for this device, tried once.

    Triton wants a C compiler and Python's header files, which slim images lack.
    """
    place = torch.zeros(1, device=device)
    try:
        with torch.cuda.device_of(place):
            row_kernel.one[(1,)](place)
        return bool(place.item() == 1)
    except Exception as error:  # of Triton, of a compiler that it calls, or of none
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        log.warning("no kernel can be made for %s, so losses are `chunked`: %s", device, reason)
        return False


def kernel(
    student: Projection,
    teachers: Mapping[str, Projection | Tensor],
    terms: Sequence[RowTerm],
) -> Run | None:
    """Who takes these terms; None where they do not fit, or it cannot be made."""
    asked, hidden = row_forms.asked(terms), student.hidden
    places = [term.beside.ids.shape[1] for term in terms if isinstance(term.beside, Sparse)]
    if asked is None or max(places, default=0) > MOST_PLACES or hidden.dtype == torch.float64:
        return None
    if not works(hidden.device):
        return None
    # An id that is known may not be there, and of a mixture nearly nothing may be of one model.
    sure = not asked.knows and LEAST_SHARE <= asked.share <= 1 - LEAST_SHARE
    sure = sure and all(map(_finite, (student, *teachers.values())))
    return Run(partial(_in_place, asked), by_blocks=False, sure=sure)


def _finite(of: Projection | Tensor) -> bool:
    """Whether logits are finite if hidden states are: no token can be ruled out."""
    if isinstance(of, Tensor):
        return False
    return of.bias is None and of.hidden.dtype != torch.float16  # where products may be too large


def _in_place(
    asked: row_forms.Asked,
    _: Callable[..., tuple[Tensor, Tensor]],
    work: Work,
    logits: Tensor,
    theirs: Mapping[str, Tensor],
    pulls: Tensor,
    rows: Tensor,
) -> Tensor:
    values = torch.empty_like(pulls)
    student = teacher = _Logits.of(logits, work.student)
    if asked.teacher is not None:
        teacher = _Logits.of(theirs[asked.teacher], work.teachers[asked.teacher])
    labels, known, vocabulary = asked.labels(rows), asked.known(rows), logits.shape[1]
    width, (_scale, slope) = asked.width(vocabulary, theirs), asked.scales
    with torch.cuda.device_of(logits):
        row_kernel.row_of[(len(logits),)](
            student,
            teacher,
            None if known is None else _Known(known.ids, known.mass, known.places),
            labels,
            _row(pulls, asked.of_teacher),
            _row(values, asked.of_teacher),
            _row(pulls, asked.of_labels),
            _row(values, asked.of_labels),
            vocabulary,
            width,
            1 / asked.temperature,
            slope,
            asked.share,
            FORM=None if asked.form is None else getattr(row_kernel, asked.form.name),
            CENTRED=asked.centred,
            ALIKE=labels is not None and asked.temperature == 1 and width == vocabulary,
            TILE=TILE,
            PLACES=1 if known is None else triton.next_power_of_2(known.places),
            num_warps=WARPS,  # pyright: ignore[reportCallIssue]  # of any kernel
        )
    return asked.finish(values, known)


def _row(of: Tensor, index: int | None) -> Tensor | None:
    return None if index is None else of[index]
