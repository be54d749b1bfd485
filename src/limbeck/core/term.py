"""One part of the loss."""

from dataclasses import dataclass
from typing import Annotated

from pydantic import ConfigDict, Field

from limbeck.core.protocols import Objective


@dataclass(frozen=True, kw_only=True)
class Term:
    """One part of the loss: an objective, the teacher it listens to, and how much it counts.

    Attributes:
        objective: a value such as `objectives.ForwardKL(temperature=2.0)`.
        teacher: name of the teacher; may be left out where the recipe has only one.
        weight: factor in the sum of all terms.
        channel: only rows of samples with this channel; None takes all.
        name: key of its curve in the metrics; by default the objective's kind.
    """

    __pydantic_config__ = ConfigDict(arbitrary_types_allowed=True)

    objective: Objective
    teacher: str | None = None
    weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    channel: str | None = None
    name: str | None = None

    @property
    def label(self) -> str:
        """The name of its curve."""
        return self.name or str(getattr(self.objective, "kind", "loss"))
