"""Objectives that compare next-token distributions, one row per token.

Each is a frozen value that names a loss of `limbeck.losses` and holds its settings; the value is
its own configuration, and its fields are the loss's keyword arguments. The teacher's signals never
receive a gradient: teachers are read without.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from limbeck import losses
from limbeck.core.registry import register
from limbeck.core.types import Needs, Signals, Unit
from limbeck.losses import kernels
from limbeck.losses.kernels import KERNELS, Kernel

Temperature = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
InnerShare = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]


@dataclass(frozen=True, kw_only=True)
class LogitObjective:
    """Common to all that read the logits of both models; a subclass names its `loss`.

    Attributes:
        loss: function of `limbeck.losses`, ([n, v], [n, v], **fields) -> [n], where each row's
            value depends on that row alone.
        temperature: divides both models' logits; the loss is multiplied by its square.
    """

    asks: ClassVar[Needs] = frozenset({"logits"})
    needs: ClassVar[Needs] = frozenset({"logits"})
    unit: ClassVar[Unit] = "token"
    shared_vocabulary: ClassVar[bool] = True
    rowwise: ClassVar[bool] = True
    loss: ClassVar[Callable[..., Tensor]]

    temperature: Temperature = 1.0

    def __call__(self, student: Signals, teacher: Signals) -> Tensor:
        """[n] losses."""
        return type(self).loss(
            student.logits, teacher.logits, temperature=self.temperature, **self._settings
        )

    @property
    def kernel(self) -> Kernel | None:
        """The loss with its gradient, where it has one; see `losses/kernels.py`."""
        found = KERNELS.get(type(self).loss)
        if found is None or type(self).__call__ is not LogitObjective.__call__:
            return None  # a subclass that computes something else
        return partial(found, **self._settings)

    @property
    def _settings(self) -> dict[str, Any]:
        names = [field.name for field in fields(self) if field.name != "temperature"]
        return {name: getattr(self, name) for name in names}


@register("objective", "forward_kl")
@dataclass(frozen=True, kw_only=True)
class ForwardKL(LogitObjective):
    """KL(teacher || student): the student covers all that the teacher finds likely."""

    loss = staticmethod(losses.forward_kl)


@register("objective", "reverse_kl")
@dataclass(frozen=True, kw_only=True)
class ReverseKL(LogitObjective):
    """KL(student || teacher): the student settles on what the teacher finds most likely."""

    loss = staticmethod(losses.reverse_kl)


@register("objective", "jensen_shannon")
@dataclass(frozen=True, kw_only=True)
class JensenShannon(LogitObjective):
    """Generalised Jensen-Shannon divergence; `beta` is the teacher's share of the mixture."""

    loss = staticmethod(losses.jensen_shannon)
    beta: Share = 0.5


@register("objective", "skew_forward_kl")
@dataclass(frozen=True, kw_only=True)
class SkewForwardKL(LogitObjective):
    """KL(teacher || alpha teacher + (1 - alpha) student): a forward KL with bounded gradients."""

    loss = staticmethod(losses.skew_forward_kl)
    alpha: Share = 0.1


@register("objective", "skew_reverse_kl")
@dataclass(frozen=True, kw_only=True)
class SkewReverseKL(LogitObjective):
    """KL(student || alpha student + (1 - alpha) teacher): a reverse KL that stays bounded."""

    loss = staticmethod(losses.skew_reverse_kl)
    alpha: Share = 0.1


@register("objective", "total_variation")
@dataclass(frozen=True, kw_only=True)
class TotalVariation(LogitObjective):
    """Half the L1 distance between the two distributions."""

    loss = staticmethod(losses.total_variation)


@register("objective", "adaptive_kl")
@dataclass(frozen=True, kw_only=True)
class AdaptiveKL(LogitObjective):
    """Forward KL where the head of the distribution is off, reverse KL where its tail is."""

    loss = staticmethod(losses.adaptive_kl)
    mu: InnerShare = 0.5


@register("objective", "alpha_beta")
@dataclass(frozen=True, kw_only=True)
class AlphaBeta(LogitObjective):
    """Alpha-beta divergence: forward KL at 1 and 0, reverse KL at 0 and 1, and what lies around.

    A small `alpha` evens out gaps of different sizes; a small `beta` also teaches what the student
    finds impossible.
    """

    loss = staticmethod(losses.alpha_beta)
    alpha: Finite = 0.2
    beta: Finite = 0.7


@register("objective", "taid")
@dataclass(frozen=True, kw_only=True)
class TAID(LogitObjective):
    """Forward KL from a target between student and teacher; `t` is meant to rise by a schedule."""

    loss = staticmethod(losses.taid)
    t: Share = 0.5


@register("objective", "ranking")
@dataclass(frozen=True, kw_only=True)
class Ranking(LogitObjective):
    """Hinge on pairs of the teacher's `k` likeliest tokens, which the student must keep in order.

    `margin` is the share of the teacher's own distance that must be kept.
    """

    loss = staticmethod(losses.ranking)
    k: Annotated[int, Field(ge=2)] = 10
    margin: Share = 1.0


@register("objective", "decoupled_kd")
@dataclass(frozen=True, kw_only=True)
class DecoupledKD(LogitObjective):
    """KL divergence in two parts, the text's own token (`alpha`) and all others (`beta`)."""

    loss = staticmethod(losses.decoupled_kd)
    alpha: Weight = 1.0
    beta: Weight = 1.0

    def __call__(self, student: Signals, teacher: Signals) -> Tensor:
        """[n] losses; the target is the token that the text goes on with."""
        assert student.logits is not None
        assert teacher.logits is not None
        return losses.decoupled_kd(
            student.logits,
            teacher.logits,
            student.labels,
            temperature=self.temperature,
            **self._settings,
        )


@register("objective", "logit_mse")
@dataclass(frozen=True, kw_only=True)
class LogitMSE(LogitObjective):
    """Mean squared difference of the logits themselves."""

    loss = staticmethod(losses.logit_mse)


@register("objective", "sorted_l1")
@dataclass(frozen=True, kw_only=True)
class SortedL1(LogitObjective):
    """Universal Logit Distillation's closed form: distance of the sorted probabilities.

    It does not ask which token a probability belongs to, so the tokenizers may differ.

    Attributes:
        pairing: which rows stand beside each other: `bytes`, those at which both models have read
            the same text; `order`, the i-th learnt token with the i-th, as in the paper.
    """

    loss = staticmethod(losses.sorted_l1)
    shared_vocabulary: ClassVar[bool] = False

    pairing: Literal["bytes", "order"] = "bytes"

    def __post_init__(self) -> None:
        if self.pairing == "order":
            object.__setattr__(self, "unit", "order")

    @property
    def _settings(self) -> dict[str, Any]:
        return {}  # the pairing is not the loss's affair


@register("objective", "cross_entropy")
@dataclass(frozen=True, kw_only=True)
class CrossEntropy:
    """Negative log-likelihood of the text's own next token: plain fine-tuning, no teacher."""

    asks: ClassVar[Needs] = frozenset({"logits"})
    needs: ClassVar[Needs] = frozenset()
    unit: ClassVar[Unit] = "token"
    shared_vocabulary: ClassVar[bool] = False
    rowwise: ClassVar[bool] = True
    kernel: ClassVar[Kernel] = staticmethod(kernels.cross_entropy)

    def __call__(self, student: Signals, teacher: Signals) -> Tensor:
        """[n] losses; the teacher's signals are not looked at."""
        del teacher
        assert student.logits is not None
        return losses.cross_entropy(student.logits, student.labels)
