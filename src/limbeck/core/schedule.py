"""A number that changes while a model trains."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import ConfigDict, Field

Number = Annotated[float, Field(allow_inf_nan=False)]


@dataclass(frozen=True, kw_only=True)
class Ramp:
    """From one value to another over the first part of the steps; then it stays.

    linear: from + (to - from) x,   cosine: from + (to - from) (1 - cos(pi x)) / 2

    with x = share of the steps that are done / `until`, at most 1.

    Attributes:
        from_: value at the first step, written `from` in a recipe.
        to: value once `until` is reached.
        until: share of the steps after which the value stays, in (0, 1].
        shape: `linear`, or `cosine`, which begins and ends slowly.

    >>> ramp = Ramp(from_=4.0, to=1.0, until=0.5)
    >>> [ramp.at(share) for share in (0.0, 0.25, 0.5, 1.0)]
    [4.0, 2.5, 1.0, 1.0]
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    from_: Annotated[Number, Field(alias="from")]
    to: Number
    until: Annotated[float, Field(gt=0, le=1)] = 1.0
    shape: Literal["linear", "cosine"] = "linear"

    def at(self, share: float) -> float:
        """The value when this share of the steps is done, 0 to 1."""
        x = min(1.0, share / self.until)
        if self.shape == "cosine":
            x = (1 - math.cos(math.pi * x)) / 2
        # Both ends exactly, and nothing outside them, so that who checked them need not look again.
        low, high = sorted((self.from_, self.to))
        return min(high, max(low, (1 - x) * self.from_ + x * self.to))
