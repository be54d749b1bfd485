"""The student as its own teacher: as it was at the start, as it is, or as it was a while ago.

With `privileged` text, which only a teacher reads, the same network knows more than the student;
without, it says what must not be forgotten.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from limbeck.core.specs import SelfTeacher
from limbeck.core.types import Encoding, Needs, Sample, Signals, View
from limbeck.models.causal import CausalModel
from limbeck.models.modes import evaluating


class Itself:
    """Reads with the student's own weights of some time.

    frozen: the weights before training;   live: those of this step;
    ema:    phi <- decay * phi + (1 - decay) * theta after each step, with theta the student's.

    A student that trains adapters alone needs no second copy to be frozen: its base without them is
    what it was, as long as they began as nothing, which they do.

    Args:
        spec: which of them.
        student: the one that trains.
        copy: a second one with the weights that the student starts from; None where none is needed.
    """

    def __init__(self, spec: SelfTeacher, student: CausalModel, copy: CausalModel | None) -> None:
        self.spec, self.student, self.copy = spec, student, copy
        self.name = f"the student itself, {spec.update}"
        self.vocabulary = student.vocabulary
        if copy is not None:
            copy.module.requires_grad_(False).eval()

    @property
    def reader(self) -> CausalModel:
        """The model that reads."""
        return self.copy or self.student

    @property
    def offers(self) -> Needs:
        """All signals it can give."""
        return self.reader.offers

    def encode(self, sample: Sample) -> Encoding:
        """Tokenize one sample."""
        return self.reader.encode(sample)

    def collate(self, encodings: Any) -> View:
        """Pad encodings into a batch."""
        return self.reader.collate(encodings)

    def read(self, view: View, needs: Needs) -> Signals:
        """What is asked of the view's rows, as a teacher: without dropout, and without gradient."""
        if self.copy is not None:
            return self.copy.read(view, needs)
        with torch.no_grad(), evaluating(self.student.module), self._as_it_was():
            said = self.student.read(view, needs)
            head = said.projection
            return replace(said, projection=head and head.detached())

    def _as_it_was(self) -> AbstractContextManager[Any]:
        if self.spec.update == "live":
            return nullcontext()
        return self.student.transformer.disable_adapter()

    def __getattr__(self, name: str) -> Any:
        # What objectives look at before training: depth, widths, embeddings.
        return getattr(self.reader, name)

    def on_step(self, step: Any) -> None:
        """Follow the student, where that is asked for."""
        del step
        if self.spec.update != "ema" or self.copy is None:
            return
        with torch.no_grad():
            student = self.student.module.parameters()
            for (_, parameter), theirs in zip(self._copied(self.copy.module), student, strict=True):
                mine = _local(parameter)
                mine.lerp_(_local(theirs).to(mine.dtype), 1 - self.spec.decay)

    def _copied(self, copy: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
        """The copy's parameters, split as the student's are where these are.

        FSDP leaves the outermost part of a teacher whole after a forward pass; then its parameters
        are for that pass only, and what is done to them is lost.
        """
        if isinstance(copy, FSDPModule):
            copy.reshard()
        return copy.named_parameters()

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """What a resumed run needs: a copy that has moved."""
        if self.spec.update == "ema" and self.copy is not None:
            yield from self._copied(self.copy.module)


def needs_copy(spec: SelfTeacher, *, adapters: bool) -> bool:
    """Whether a second set of weights is needed."""
    return spec.update == "ema" or (spec.update == "frozen" and not adapters)


def _local(parameter: Tensor) -> Tensor:
    """This process's part of a split parameter; the copy is split alike."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter
