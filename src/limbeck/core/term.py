"""One part of the loss."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, cast

from pydantic import ConfigDict, Field

from limbeck.core.protocols import Objective
from limbeck.core.schedule import Ramp


@dataclass(frozen=True, kw_only=True)
class Term:
    """One part of the loss: an objective, the teacher it listens to, and how much it counts.

    Attributes:
        objective: a value such as `objectives.ForwardKL(temperature=2.0)`.
        teacher: name of the teacher; may be left out where the recipe has only one.
        weight: factor in the sum of all terms.
        schedule: by name, numbers that change over the steps: `weight`, or fields of the objective.
        channel: only rows of samples with this channel; None takes all.
        skip: rows of each sample that it leaves out where the learnt text begins, such as the first
            words of an answer, which a teacher that knows more may well begin in another way.
        name: key of its curve in the metrics; by default the objective's kind.
    """

    __pydantic_config__ = ConfigDict(arbitrary_types_allowed=True)

    objective: Objective
    teacher: str | None = None
    weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    schedule: Mapping[str, Ramp] = field(default_factory=dict[str, Ramp])
    channel: str | None = None
    skip: Annotated[int, Field(ge=0)] = 0
    name: str | None = None

    @property
    def label(self) -> str:
        """The name of its curve."""
        return self.name or str(getattr(self.objective, "kind", "loss"))

    def at(self, share: float) -> "Term":
        """The term when this share of the steps is done, from 0 to 1; itself without a schedule.

        Fields of an objective can change where it is a dataclass.
        """
        if not self.schedule:
            return self
        values = {name: ramp.at(share) for name, ramp in self.schedule.items()}
        weight = values.pop("weight", self.weight)
        objective = self.objective
        if values:
            objective = replace(cast(Any, objective), **values)
        return replace(self, weight=weight, objective=objective)
