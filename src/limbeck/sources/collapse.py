"""When what the student writes falls apart, the run stops instead of training on it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from pydantic import ConfigDict, Field

from limbeck.core.errors import DivergedError


@dataclass(frozen=True, kw_only=True)
class Collapse:
    """What counts as collapse, if it stays so for a while.

    Attributes:
        repetition: share of repeated 4-grams in its answers.
        length: share of the length that its answers had at first.
        entropy_nats: mean surprise at its own tokens; below this it writes one and the same.
        patience: times in a row that text was written.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    repetition: Annotated[float, Field(gt=0, le=1)] = 0.7
    length: Annotated[float, Field(ge=0, lt=1)] = 0.05
    entropy_nats: Annotated[float, Field(ge=0)] = 1e-4
    patience: Annotated[int, Field(gt=0)] = 20


class Watch:
    """Looks at each report of what was written."""

    def __init__(self, rule: Collapse) -> None:
        self.rule = rule
        self.first_length: float | None = None
        self.bad = 0

    def look(self, step: int, figures: Mapping[str, float]) -> None:
        """Count a bad report.

        Raises:
            DivergedError: it was the last one that is borne.
        """
        if "length_tokens" not in figures:
            return
        if self.first_length is None:
            self.first_length = figures["length_tokens"]
        rule, wrong = self.rule, ""
        if figures["repetition"] > rule.repetition:
            wrong = f"{figures['repetition']:.0%} of its 4-grams are repeats"
        elif figures["length_tokens"] < rule.length * self.first_length:
            wrong = (
                f"answers have {figures['length_tokens']:.1f} tokens, at first"
                f" {self.first_length:.1f}"
            )
        elif figures.get("entropy_nats", 1.0) < rule.entropy_nats:
            wrong = f"its tokens have {figures['entropy_nats']:.2g} nats of surprise"
        self.bad = self.bad + 1 if wrong else 0
        if self.bad >= rule.patience:
            raise DivergedError(
                f"step {step}: what the student writes has collapsed ({wrong}, {self.bad} times in"
                " a row). Checkpoints before it are whole: lower train.learning_rate, give the KL"
                " more weight or source.share less, and run again"
            )

    def state_dict(self) -> list[float | None]:
        """What it remembers."""
        return [self.first_length, self.bad]

    def load_state_dict(self, state: list[float | None]) -> None:
        """Continue from a `state_dict`."""
        self.first_length, self.bad = state[0], int(state[1] or 0)
