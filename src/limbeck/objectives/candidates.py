"""Match a teacher's distribution over whole answers that it was seen to give."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from limbeck.core.registry import register
from limbeck.core.types import Needs, Signals, Unit
from limbeck.losses import candidates as losses
from limbeck.losses.candidates import Kind


@register("objective", "candidates")
@dataclass(frozen=True, kw_only=True)
class Candidates:
    """Divergence over the answers of a group, whose shares are their `score`.

    The rows come from the step `distribution`. It compares answers with each other alone, so a
    term `cross_entropy` belongs beside it.

    Attributes:
        divergence: `forward`, `reverse` or `jensen_shannon`. An answer with a share of 0 would make
            `reverse` infinite, and is left out of its group there.
        beta: the teacher's part of the mixture, of `jensen_shannon`.
        normalise_length: divide log-probabilities by the number of tokens first, so that a long
            answer is not unlikely because it is long.
    """

    asks: ClassVar[Needs] = frozenset({"chosen"})
    needs: ClassVar[Needs] = frozenset()
    unit: ClassVar[Unit] = "sequence"
    shared_vocabulary: ClassVar[bool] = False

    divergence: Kind = "reverse"
    beta: Annotated[float, Field(gt=0, lt=1)] = 0.5
    normalise_length: bool = False

    def __call__(self, student: Signals, teacher: Signals) -> Tensor:
        """[s] losses; 0 for answers without a share or a group."""
        del teacher
        logp, length = student.chosen, student.length
        assert logp is not None
        assert length is not None
        if student.score is None or student.group is None:
            return logp * 0
        if self.normalise_length:
            logp = logp / length.clamp(min=1)
        known = ~student.score.isnan()
        if self.divergence == "reverse":
            known &= student.score > 0
        found = losses.candidates(
            logp[known],
            student.score[known],
            student.group[known],
            divergence=self.divergence,
            beta=self.beta,
        )
        return (logp * 0).masked_scatter(known, found)
