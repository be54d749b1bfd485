"""How the mock misbehaves, drawn from a seed so that a failure can be replayed."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from email.utils import formatdate
from time import time
from typing import Any, Literal, get_args

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

STATUSES: frozenset[Kind] = frozenset({"429", "500", "502", "503"})
"""Faults that are nothing but an HTTP status, before the request is looked at."""

SILENT: frozenset[Kind] = frozenset({"timeout", "reset_before", "reset_after"})
"""The connection ends without an answer."""

WRONG_LOGPROBS = (math.nan, -math.inf, 0.5, None)
"""What is no log-probability of a token that was drawn."""


@dataclass(frozen=True, kw_only=True)
class Faults:
    """How often the mock misbehaves, and how.

    Attributes:
        rate: share of requests, in [0, 1].
        kinds: which; all of them by default but `timeout`, which takes time.
        seed: of the draws. What happens to a request depends on the seed, its body and how often
            the same body came before; so it is the same however many are under way.
        hold_seconds: how long `timeout` keeps a connection without an answer.
        overcharge: factor by which more tokens are billed than were written.

    Example:
        >>> faults = Faults(rate=0.5, seed=1)
        >>> [faults.draw("a request", attempt) for attempt in range(4)]
        ['length', 'empty', '503', '500']
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

    def draw(self, body: str, attempt: int = 0) -> Kind | None:
        """What happens to a request, of which `attempt` equal ones came before."""
        generator = self._luck(body, attempt)
        if not self.kinds or generator.random() >= self.rate:
            return None
        return generator.choice(list(self.kinds))

    def form(self, body: str, attempt: int, count: int) -> int:
        """Which of `count` forms a fault takes."""
        generator = self._luck(body, attempt)
        return int(generator.getrandbits(30)) % count

    def _luck(self, body: str, attempt: int) -> random.Random:
        return random.Random(f"{self.seed}/{attempt}/{body}")


def patience(form: int) -> dict[str, str]:
    """How a server says when to come back: in seconds, as a date, in milliseconds, or not."""
    forms = (
        {"retry-after": "0"},
        {"retry-after": formatdate(time(), usegmt=True)},
        {"retry-after-ms": "20"},
        {},
    )
    return forms[form % len(forms)]


def spoilt(said: dict[str, Any], fault: Kind | None, form: int) -> Any:
    """An answer in the API's form, as a fault leaves it."""
    if fault == "no_choices":
        return {**said, "choices": []}
    if fault == "error_200":
        return {"error": {"message": "the engine is gone", "code": 500}}
    choices = said["choices"]
    if fault == "wrong_count":
        return {**said, "choices": choices * 2 if len(choices) == 1 else choices[:-1]}
    for choice in choices:
        if fault == "no_finish":
            choice["finish_reason"] = None
        elif fault == "length":
            choice["finish_reason"] = "length"
        elif fault == "bang" and "message" in choice:
            choice["message"]["content"] = "!" * 40
        elif fault == "bang":
            choice["text"] = "!" * 40
        elif fault == "nan_logprobs":
            _spoil_scores(choice, WRONG_LOGPROBS[form % len(WRONG_LOGPROBS)])
    return said


def _spoil_scores(choice: dict[str, Any], wrong: float | None) -> None:
    scores = choice["logprobs"] or {}
    for row in scores.get("content", ()):
        row["logprob"] = wrong
    if "token_logprobs" in scores:
        scores["token_logprobs"] = [wrong for _ in scores["token_logprobs"]]
    for place in choice.get("prompt_logprobs") or ():
        for entry in (place or {}).values():
            entry["logprob"] = wrong
