"""Which losses a kernel for whole rows knows, and what a block's terms ask of it.

The same losses as in `kernels.py`, those that a sum over tokens gives: a first pass over a row
finds the normalizers, a last one writes the gradient in the place of the student's logits. Where
<q, a> is not known beforehand a pass between finds it, with the function that has the form's name.
There is one such kernel for CPUs (`row_kernel.c`, run by `cpu.py`) and one for GPUs
(`row_kernel.py`, run by `gpu.py`).
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
    """What is known of a teacher's tokens, [rows, places]; none is twice in a row with a mass.

    Kernels read them where they lie: int64 and float32, row by row.
    """

    ids: Tensor
    mass: Tensor
    constant: Tensor

    @property
    def places(self) -> int:
        """Of each row."""
        return self.ids.shape[1]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What terms ask for: a form or known tokens of a teacher, labels, or both.

    Attributes:
        terms: all of them.
        of_teacher, of_labels: which is which; None where there is none.
        form, share: the loss of a teacher's logits and its setting; None where tokens are known.
    """

    terms: Sequence["RowTerm"]
    of_teacher: int | None
    of_labels: int | None
    form: Form | None
    share: float

    @property
    def teacher(self) -> str | None:
        """Whose logits are read."""
        return None if self.of_teacher is None else self.terms[self.of_teacher].teacher

    @property
    def knows(self) -> bool:
        """Whether tokens of a teacher are known."""
        return self.of_teacher is not None and self.form is None

    @property
    def centred(self) -> bool:
        """Whether a pass for <q, a> is needed."""
        return self.form is not None and self.form.centred

    @property
    def temperature(self) -> float:
        """T of the teacher's term."""
        return 1.0 if self.of_teacher is None else self.terms[self.of_teacher].temperature

    @property
    def scales(self) -> tuple[float, float]:
        """Of its value and gradient; see `kernels.scales`."""
        by_t2 = self.of_teacher is not None and self.terms[self.of_teacher].scale_by_t2
        return kernels.scales(self.temperature, by_t2)

    def width(self, vocabulary: int, theirs: Mapping[str, Tensor]) -> int:
        """How many tokens are compared."""
        if self.teacher is None:
            return vocabulary
        return min(vocabulary, theirs[self.teacher].shape[1])

    def labels(self, rows: Tensor) -> Tensor | None:
        """[rows] int64 ids, -100 for none."""
        if self.of_labels is None:
            return None
        beside = self.terms[self.of_labels].beside
        assert isinstance(beside, Tensor)
        return beside[rows].long()

    def known(self, rows: Tensor) -> Known | None:
        """What is known of these rows."""
        if self.of_teacher is None or self.form is not None:
            return None
        term = self.terms[self.of_teacher]
        assert isinstance(term.beside, Sparse)
        assert isinstance(term.kernel, partial)
        sparse = term.beside[rows]
        mass, _rest, constant = kernels.known(sparse, torch.float32, **term.kernel.keywords)
        return Known(
            sparse.ids.long().contiguous(),
            mass.contiguous(),
            constant.masked_fill(mass.sum(-1) == 0, 0.0),
        )

    def finish(self, values: Tensor, known: Known | None) -> Tensor:
        """The values [terms, rows] with what kernels leave out."""
        if self.of_teacher is not None:
            if known is not None:
                values[self.of_teacher] += known.constant
            values[self.of_teacher] *= self.scales[0]
        return values


def asked(terms: Sequence["RowTerm"]) -> Asked | None:
    """What these ask for: one of a teacher, one of labels, or both; None where it is more.

    Asks the device where a term knows a few tokens of a teacher: their rest must be nothing.
    """
    of_labels = [i for i, term in enumerate(terms) if term.kernel is kernels.cross_entropy]
    of_teacher = [i for i in range(len(terms)) if i not in of_labels]
    if len(of_labels) > 1 or len(of_teacher) > 1:
        return None
    form, share = None, 0.5
    for term in (terms[i] for i in of_teacher):
        form, share = _form_of(term)
        if form is None and not _without_rest(term):
            return None
    return Asked(
        terms=terms,
        of_teacher=of_teacher[0] if of_teacher else None,
        of_labels=of_labels[0] if of_labels else None,
        form=form,
        share=share,
    )


def _form_of(term: "RowTerm") -> tuple[Form | None, float]:
    """The term's form and share; None where it has none, or is another loss at that share."""
    form = FORMS.get(term.kernel.func) if isinstance(term.kernel, partial) else None
    if term.teacher is None or form is None or not isinstance(term.kernel, partial):
        return None, 0.5
    share = float(term.kernel.keywords.get(form.share, form.usual))
    return (form, share) if 0 < share < 1 else (None, 0.5)


def _without_rest(term: "RowTerm") -> bool:
    if not isinstance(term.beside, Sparse) or not isinstance(term.kernel, partial):
        return False
    tail = term.kernel.keywords["tail"]
    return term.kernel.func is kernels.sparse_kl and not (tail and bool(term.beside.rest.any()))
