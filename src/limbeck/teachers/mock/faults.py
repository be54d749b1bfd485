"""How the mock misbehaves, drawn from a seed so that a failure can be replayed."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

Kind = Literal[
    "429",
    "500",
    "502",
    "503",
    "timeout",
    "reset_before",
    "reset_after",
    "cut",
    "bad_json",
    "empty",
    "no_choices",
    "error_200",
    "nan_logprobs",
    "wrong_count",
    "no_finish",
    "bang",
    "length",
]

KINDS: tuple[Kind, ...] = get_args(Kind)

NOT_PROCESSED: frozenset[Kind] = frozenset({"429", "503", "reset_before"})
"""What happens before the request is looked at, so that nothing is billed."""

ANSWERED: frozenset[Kind] = frozenset({"bang", "length"})
"""Odd answers that are answers all the same."""


@dataclass(frozen=True, kw_only=True)
class Faults:
    """How often the mock misbehaves, and how.

    Attributes:
        rate: share of requests, in [0, 1].
        kinds: which; all of them by default but `timeout`, which takes time.
        seed: of the draws, one for each request in its order.
        hold_seconds: how long `timeout` keeps a connection without an answer.
        overcharge: factor by which more tokens are billed than were written.
    """

    rate: float = 0.0
    kinds: Sequence[Kind] = tuple(kind for kind in KINDS if kind != "timeout")
    seed: int = 0
    hold_seconds: float = 5.0
    overcharge: float = 1.0

    def __post_init__(self) -> None:
        unknown = [kind for kind in self.kinds if kind not in KINDS]
        if unknown:
            raise ValueError(f"no fault {unknown[0]!r}; one of: {', '.join(KINDS)}")
        if not 0 <= self.rate <= 1:
            raise ValueError(f"a fault rate of {self.rate} is no share; give one from 0 to 1")

    def draw(self, number: int) -> Kind | None:
        """What happens to request `number`."""
        generator = random.Random(f"{self.seed}/{number}")
        if not self.kinds or generator.random() >= self.rate:
            return None
        return generator.choice(list(self.kinds))
