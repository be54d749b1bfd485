"""An objective on what a teacher's cache keeps of its distribution."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor

from limbeck import losses
from limbeck.core.registry import register
from limbeck.core.types import Needs, Signals, Unit
from limbeck.losses import kernels
from limbeck.losses.kernels import Kernel
from limbeck.objectives.token import Temperature


@register("objective", "sparse_kl")
@dataclass(frozen=True, kw_only=True)
class SparseKL:
    """KL(teacher || student) from a cached teacher's top-k or random draws.

    Attributes:
        temperature: divides the student's logits, and must be the one the cache was made at; the
            loss is multiplied by its square.
        tail: count the probability of all tokens that were not kept; without it the loss of a
            top-k teacher is biased.
    """

    asks: ClassVar[Needs] = frozenset({"logits"})
    needs: ClassVar[Needs] = frozenset({"sparse"})
    unit: ClassVar[Unit] = "token"
    shared_vocabulary: ClassVar[bool] = True
    rowwise: ClassVar[bool] = True

    temperature: Temperature = 1.0
    tail: bool = True

    @property
    def kernel(self) -> Kernel:
        """The loss with its gradient; see `losses/kernels.py`."""
        return partial(kernels.sparse_kl, tail=self.tail)

    def __call__(self, student: Signals, teacher: Signals) -> Tensor:
        """[n] losses."""
        assert student.logits is not None
        assert teacher.sparse is not None
        return losses.sparse_kl(
            student.logits, teacher.sparse, temperature=self.temperature, tail=self.tail
        )
