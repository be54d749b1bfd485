"""A chunk's losses and their gradient on a GPU, each row read two or three times and written once.

The same losses as in `kernels.py`, those that a sum over tokens gives: a first pass over a row
finds the normalizers, a last one writes the gradient in the place of the student's logits. Where
<q, a> is not known beforehand a pass between finds it; see `row_kernel.py`.

Triton comes with torch where torch knows GPUs; nothing imports this file elsewhere.
"""

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
from torch import Tensor

from limbeck.losses import kernels, row_kernel
from limbeck.losses.projection import Projection
from limbeck.losses.sparse import Sparse

if TYPE_CHECKING:
    from limbeck.losses.chunks import RowTerm, Work

log = logging.getLogger(__name__)

TILE = 4096
"""Tokens of a row at a time."""

WARPS = 8

MOST_PLACES = 1024
"""Known tokens of a row, which are all held at once."""


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
    """What is known of a teacher's tokens, [rows, places]; none is twice in a row with a mass."""

    ids: Tensor
    mass: Tensor
    places: int


@dataclass(frozen=True)
class Form:
    """A kernel of `kernels.py` here.

    Attributes:
        function: (log p, log q, share) -> (phi, q a) of a tile.
        share: the keyword of the kernel's one setting, which lies between 0 and 1.
        usual: its default.
        centred: whether <q, a> has to be found; it is 0 for the forward KL.
    """

    function: Any
    share: str = ""
    usual: float = 0.5
    centred: bool = True


FORMS: Mapping[Callable[..., Any], Form] = {
    kernels.forward_kl: Form(row_kernel.forward_kl, centred=False),
    kernels.reverse_kl: Form(row_kernel.reverse_kl),
    kernels.jensen_shannon: Form(row_kernel.jensen_shannon, "beta"),
    kernels.skew_forward_kl: Form(row_kernel.skew_forward_kl, "alpha", 0.1),
    kernels.skew_reverse_kl: Form(row_kernel.skew_reverse_kl, "alpha", 0.1),
    kernels.total_variation: Form(row_kernel.total_variation),
}


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


def fits(terms: Sequence["RowTerm"]) -> bool:
    """Whether these have a form: one of a teacher, one of labels, or both.

    Asks the device where a term knows a few tokens of a teacher: their rest must be nothing.
    """
    with_labels = [term.kernel is kernels.cross_entropy for term in terms]
    alone = len(set(with_labels)) == len(with_labels)
    return alone and all(
        labels or _form_of(term) is not None or _without_rest(term)
        for term, labels in zip(terms, with_labels, strict=True)
    )


def _form_of(term: "RowTerm") -> tuple[Form, float] | None:
    """The term's form and share; None where it has none, or is another loss at that share."""
    if term.teacher is None or not isinstance(term.kernel, partial):
        return None
    form = FORMS.get(term.kernel.func)
    if form is None:
        return None
    share = float(term.kernel.keywords.get(form.share, form.usual))
    return (form, share) if 0 < share < 1 else None


def _without_rest(term: "RowTerm") -> bool:
    if not isinstance(term.beside, Sparse) or not isinstance(term.kernel, partial):
        return False
    if term.beside.ids.shape[1] > MOST_PLACES:
        return False
    tail = term.kernel.keywords["tail"]
    return term.kernel.func is kernels.sparse_kl and not (tail and bool(term.beside.rest.any()))


def in_place(
    _: Callable[..., tuple[Tensor, Tensor]],
    work: "Work",
    logits: Tensor,
    theirs: Mapping[str, Tensor],
    pulls: Tensor,
    rows: Tensor,
) -> Tensor:
    """As `chunks.in_place` by kernels, for terms that fit."""
    values = torch.empty_like(pulls)
    student = teacher = _Logits.of(logits, work.student)
    width, form, share, temperature, scale, slope = logits.shape[1], Form(None), 0.5, 1.0, 1.0, 1.0
    labels: Tensor | None = None
    known: _Known | None = None
    constant: Tensor | float = 0.0
    of_teacher: tuple[Tensor | None, ...] = (None, None)
    of_labels: tuple[Tensor | None, ...] = (None, None)
    for term, pull, value in zip(work.terms, pulls, values, strict=True):
        if term.kernel is kernels.cross_entropy:
            assert isinstance(term.beside, Tensor)
            labels, of_labels = term.beside[rows], (pull, value)
            continue
        temperature, of_teacher = term.temperature, (pull, value)
        scale, slope = kernels.scales(temperature, term.scale_by_t2)
        found = _form_of(term)
        if found is None:
            assert isinstance(term.beside, Sparse)
            assert isinstance(term.kernel, partial)
            sparse = term.beside[rows]
            mass, _rest, constant = kernels.known(sparse, torch.float32, **term.kernel.keywords)
            unknown = mass.sum(-1) == 0
            constant = constant.masked_fill(unknown, 0.0)
            known = _Known(sparse.ids, mass, sparse.ids.shape[1])
        else:
            assert term.teacher is not None
            form, share = found
            teacher = _Logits.of(theirs[term.teacher], work.teachers[term.teacher])
            width = min(width, teacher.first.shape[1])
    with torch.cuda.device_of(logits):
        row_kernel.row_of[(len(logits),)](
            student,
            teacher,
            known,
            labels,
            *of_teacher,
            *of_labels,
            logits.shape[1],
            width,
            1 / temperature,
            slope,
            share,
            FORM=form.function,
            CENTRED=form.centred,
            ALIKE=labels is not None and temperature == 1 and width == logits.shape[1],
            TILE=TILE,
            PLACES=1 if known is None else triton.next_power_of_2(known.places),
            num_warps=WARPS,  # pyright: ignore[reportCallIssue]  # of any kernel
        )
    if of_teacher[1] is not None:
        of_teacher[1].add_(constant).mul_(scale)
    return values
