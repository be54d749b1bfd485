"""The objective of answers that were ranked."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from limbeck.core.registry import register
from limbeck.core.types import Needs, Signals, Unit
from limbeck.losses.sequence_ranking import sequence_ranking


@register("objective", "sequence_ranking")
@dataclass(frozen=True, kw_only=True)
class SequenceRanking:
    """The better of two answers to a prompt should be the likelier one, token for token (RRHF).

    Rows bring their `group` and `score`, as the step `rank` writes them. It says nothing of how
    likely the best answer is: a cross-entropy term with `channel: best` stands beside it.

    Attributes:
        margin: by how much a better answer should be likelier, nats a token.
        mean: average over a group's pairs; the sum over them, as in the paper, grows with the
            square of its size.
    """

    asks: ClassVar[Needs] = frozenset({"chosen"})
    needs: ClassVar[Needs] = frozenset()
    unit: ClassVar[Unit] = "sequence"
    shared_vocabulary: ClassVar[bool] = False

    margin: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    mean: bool = False

    def __call__(self, student: Signals, teacher: Signals) -> Tensor:
        """[s] the loss of each answer's group; 0 for answers without score or group."""
        del teacher
        assert student.chosen is not None
        assert student.length is not None
        if student.score is None or student.group is None:
            return student.chosen * 0
        return sequence_ranking(
            student.chosen,
            student.length,
            student.score,
            student.group,
            margin=self.margin,
            mean=self.mean,
        )
