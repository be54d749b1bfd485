"""All evaluations of a recipe on one model."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

from limbeck.core.errors import RecipeError
from limbeck.core.types import Sample
from limbeck.evals.score import Score

AGREEMENT = frozenset({"kl_nats", "top1"})
"""Scores that reports read as the student's agreement with its teacher."""


class Evaluation(Protocol):
    """What a class registered in the slot `eval` looks like.

    `needs_teacher` says that it cannot be measured without one.
    """

    kind: ClassVar[str]
    needs_teacher: ClassVar[bool]

    @property
    def name(self) -> str:
        """What messages call it."""
        ...

    @property
    def gives(self) -> tuple[str, ...]:
        """Names of the scores that it may find."""
        ...

    def check(self) -> None:
        """Look at what it reads, before anything costly; raises DataError."""
        ...

    def measure(self, model: Any, teacher: Any, holdout: Sequence[Sample]) -> dict[str, Score]:
        """Scores of `model`; those that cannot be measured are absent."""
        ...


def check_names(evals: Sequence[Evaluation]) -> None:
    """Refuse evaluations whose scores would overwrite each other's, or be taken for agreement.

    Raises:
        RecipeError: naming the score.
    """
    for evaluation in evals:
        if evaluation.kind != "agreement" and (taken := AGREEMENT & set(evaluation.gives)):
            raise RecipeError(
                "evals", f"{min(taken)!r} is what `agreement` finds; give the task another name"
            )
    counted = Counter(name for evaluation in evals for name in evaluation.gives)
    for name, times in counted.items():
        if times > 1:
            raise RecipeError("evals", f"{name!r} is measured {times} times; give tasks own names")


def run_suite(
    evals: Sequence[Evaluation], model: Any, teacher: Any, holdout: Sequence[Sample]
) -> dict[str, Score]:
    """Scores by name: `kl_nats`, `top1`, `perplexity`, `bits_per_byte` and each task's own.

    Evaluations that need a teacher are left out where there is none, or where it is the model
    that is measured.
    """
    check_names(evals)
    scores: dict[str, Score] = {}
    for evaluation in evals:
        alone = teacher is None or teacher is model
        if not (alone and evaluation.needs_teacher):
            scores |= evaluation.measure(model, teacher, holdout)
    return scores
