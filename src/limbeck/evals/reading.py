"""What the reading evaluations share: batches by length, evaluation mode, bounded memory."""

import functools
import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from limbeck.core.types import Sample, View
from limbeck.losses.projection import Projection
from limbeck.models import modes

BATCH_TOKENS = 4096
"""Tokens of a batch, with padding, that one forward pass reads."""

CHUNK_BYTES = 64 * 2**20
"""How much of the logits is converted to fp32 at once."""

logger = logging.getLogger(__name__)


@functools.cache
def tell_once(message: str) -> None:
    """Log a message the first time; an evaluation is measured several times in a run."""
    logger.warning(message)


def as_student(sample: Sample) -> Sample:
    """The sample as the student sees it: without what is privileged."""
    return replace(sample, privileged=()) if sample.privileged else sample


def batches(lengths: Sequence[int], budget_tokens: int) -> list[list[int]]:
    """Group indices so that each group, padded to its longest, fits the budget.

    The longest come first: if memory does not suffice, that shows at once. An item longer than
    the budget gets a batch of its own; items without length are left out.
    """
    order = sorted(
        (index for index, length in enumerate(lengths) if length > 0),
        key=lambda index: (-lengths[index], index),
    )
    groups: list[list[int]] = []
    for index in order:
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= budget_tokens:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def chunks(rows: int, width: int) -> Iterator[slice]:
    """Slices of rows whose fp32 logits of `width` columns take at most `CHUNK_BYTES`."""
    step = max(1, CHUNK_BYTES // (4 * max(width, 1)))
    for first in range(0, rows, step):
        yield slice(first, min(first + step, rows))


@dataclass(frozen=True)
class Logits:
    """The logits of n rows, of which any few can be had.

    Attributes:
        source: [n, v] logits, or what makes them.
    """

    source: Tensor | Projection

    @property
    def shape(self) -> tuple[int, int]:
        """n and v."""
        if isinstance(self.source, Projection):
            return len(self.source.hidden), self.source.vocabulary
        return self.source.shape[0], self.source.shape[1]

    def rows(self, part: slice, index: Tensor | None = None) -> Tensor:
        """[r, v] of a part of the rows, or of a part of those that `index` names."""
        device = self.source.device
        chosen = part if index is None else index[part].to(device)
        found = self.source[chosen]
        return found.logits() if isinstance(found, Projection) else found


def read_logits(model: Any, view: View) -> Logits:
    """A model's logits of the view's rows, made few at a time where the model can."""
    if "projection" in model.offers:
        return Logits(model.read(view, frozenset({"projection"})).projection)
    return Logits(model.read(view, frozenset({"logits"})).logits)


def evaluating(*models: Any) -> AbstractContextManager[None]:
    """No dropout in the block; each module's own mode is as before when it ends.

    A participant without a `module` (a server, a cache) has no such mode.
    """
    found = (getattr(model, "module", None) for model in models)
    return modes.evaluating(*(module for module in found if isinstance(module, nn.Module)))
