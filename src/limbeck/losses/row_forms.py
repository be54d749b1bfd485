"""Which losses a kernel for whole rows knows, and what a block's terms ask of it.

The same losses as in `kernels.py`, those that a sum over tokens gives: a first pass over a row
finds the normalizers, a last one writes the gradient in the place of the student's logits. Where
<q, a> is not known beforehand a pass between finds it. There is one such kernel for CPUs
(`row_kernel.c`, run by `cpu.py`) and one for GPUs (`row_kernel.py`, run by `gpu.py`); both have a
function by the name of each form.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from limbeck.losses import kernels
from limbeck.losses.sparse import Sparse

if TYPE_CHECKING:
    from limbeck.losses.chunks import RowTerm


@dataclass(frozen=True)
class Form:
    """A kernel of `kernels.py` in one for whole rows.

    Attributes:
        name: of its function there.
        share: the keyword of the kernel's one setting, which lies between 0 and 1.
        usual: its default.
        centred: whether <q, a> has to be found; it is 0 for the forward KL.
    """

    name: str
    share: str = ""
    usual: float = 0.5
    centred: bool = True


FORMS: Mapping[Callable[..., Any], Form] = {
    kernels.forward_kl: Form("forward_kl", centred=False),
    kernels.reverse_kl: Form("reverse_kl"),
    kernels.jensen_shannon: Form("jensen_shannon", "beta"),
    kernels.skew_forward_kl: Form("skew_forward_kl", "alpha", 0.1),
    kernels.skew_reverse_kl: Form("skew_reverse_kl", "alpha", 0.1),
    kernels.total_variation: Form("total_variation"),
}


class Known(NamedTuple):
    """What is known of a teacher's tokens, [rows, places]; none is twice in a row with a mass."""

    ids: Tensor
    mass: Tensor
    constant: Tensor

    @property
    def places(self) -> int:
        """Of each row."""
        return self.ids.shape[1]


@dataclass(kw_only=True)
class Asked:
    """What the terms of a block of rows ask for: a form or known tokens, labels, or both.

    Attributes:
        form, teacher: which loss of whose logits; None where it has none.
        known: tokens of a teacher, where that has no logits.
        labels: [rows] ids, -100 for none.
        of_teacher, of_labels: the index of the term among all.
        share: of the form.
        temperature, scale, slope: of the form or the known tokens; see `kernels.scales`.
    """

    form: Form | None = None
    teacher: str | None = None
    known: Known | None = None
    labels: Tensor | None = None
    of_teacher: int | None = None
    of_labels: int | None = None
    share: float = 0.5
    temperature: float = 1.0
    scale: float = 1.0
    slope: float = 1.0

    @property
    def centred(self) -> bool:
        """Whether a pass for <q, a> is asked for."""
        return self.form is not None and self.form.centred

    def width(self, vocabulary: int, theirs: Mapping[str, Tensor]) -> int:
        """How many tokens are compared."""
        if self.teacher is None:
            return vocabulary
        return min(vocabulary, theirs[self.teacher].shape[1])

    def finish(self, values: Tensor) -> Tensor:
        """The values [terms, rows] with what the kernel leaves out."""
        if self.of_teacher is not None:
            if self.known is not None:
                values[self.of_teacher] += self.known.constant
            values[self.of_teacher] *= self.scale
        return values


def asked(terms: Sequence["RowTerm"], rows: Tensor) -> Asked:
    """What terms that fit ask for of these rows."""
    found = Asked()
    for index, term in enumerate(terms):
        if term.kernel is kernels.cross_entropy:
            assert isinstance(term.beside, Tensor)
            found.labels, found.of_labels = term.beside[rows], index
            continue
        found.of_teacher, found.temperature = index, term.temperature
        found.scale, found.slope = kernels.scales(term.temperature, term.scale_by_t2)
        if form := _form_of(term):
            found.form, found.share = form
            found.teacher = term.teacher
        else:
            found.known = _known(term, rows)
    return found


def fits(terms: Sequence["RowTerm"]) -> bool:
    """Whether these can be asked for: one of a teacher, one of labels, or both.

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
    tail = term.kernel.keywords["tail"]
    return term.kernel.func is kernels.sparse_kl and not (tail and bool(term.beside.rest.any()))


def _known(term: "RowTerm", rows: Tensor) -> Known:
    assert isinstance(term.beside, Sparse)
    assert isinstance(term.kernel, partial)
    sparse = term.beside[rows]
    mass, _rest, constant = kernels.known(sparse, torch.float32, **term.kernel.keywords)
    return Known(sparse.ids, mass, constant.masked_fill(mass.sum(-1) == 0, 0.0))
