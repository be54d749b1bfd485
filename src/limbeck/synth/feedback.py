"""What went well or wrong with the student's own answers, told to its teacher, which is itself.

Of an answer y to x the teacher also reads f(y): a right answer of the same group, and what is wrong
with y. The term is a divergence on the student's own tokens,

    sum_t D(q(. | x, y_<t) || sg p(. | f(y), x, y_<t)),

for the answers that there is something to tell about; the others stay out of it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

from pydantic import Field
from torch import Tensor

from limbeck.core.errors import DataError, RecipeError
from limbeck.core.registry import register
from limbeck.core.types import Sample
from limbeck.evals.math_pool import SECONDS
from limbeck.evals.verifiers import Match, Verdict, Verifier
from limbeck.sources.dataset import privileged_turns
from limbeck.synth.template import filled

HELPED = "helped"
"""Channel of the answers that the teacher was told something about."""


@register("scorer", "feedback")
@dataclass(frozen=True, kw_only=True)
class Feedback:
    """Lets the teacher see a right answer to the same prompt, and what is wrong with this one.

    An answer's score is 1 where it is right, and else 0. One that there is something to tell about
    gets that as its `privileged` text, and the channel `helped`, which a term names. The only right
    answer of its group is not helped, and neither is a group without one, unless `mistake` is told.

    Attributes:
        match: how an answer is compared with the row's `answer`; see `evals.verifiers.Match`.
        pattern: for `regex`, with one group that catches the answer.
        seconds: how long a comparison by `math` may take; a longer one is unclear.
        solution: how another right answer of the group is told, with {solution} in it; null tells
            none.
        mistake: how it is told that this answer is not right, with {found}, what it was read as,
            or {reason} in it; null does not tell.

    Source: Hübotter et al., "Reinforcement Learning via Self-Distillation" (arXiv 2601.20802),
    SDPO. The words are limbeck's.
    """

    match: Match = "last_number"
    pattern: str | None = None
    seconds: Annotated[float, Field(gt=0, le=600)] = SECONDS
    solution: Annotated[str, Field(pattern=r"\{solution\}")] | None = (
        "A right answer to the problem below:\n{solution}\n\n"
    )
    mistake: str | None = None

    def __post_init__(self) -> None:
        _ = self.verifier  # which finds what is wrong with it
        if self.solution is None and self.mistake is None:
            raise RecipeError("mistake", "there is nothing to tell; give `solution` or `mistake`")

    @property
    def verifier(self) -> Verifier:
        """What compares."""
        return Verifier(match=self.match, pattern=self.pattern, seconds=self.seconds)

    def open(self, student: Any, mesh: Any, seed: int) -> "Teller":
        """It needs nothing but the answers."""
        del student, mesh, seed
        return Teller(self)


class Teller:
    """Feedback at work.

    Attributes:
        name: under which the figures stand.
        figures: of the last answers: how many were right, and how many helped.
    """

    name = "feedback"

    def __init__(self, spec: Feedback) -> None:
        self.spec, self.verifier = spec, spec.verifier
        self.figures: dict[str, float] = {}

    def judge(
        self, given: Sequence[Sample | None], groups: Sequence[Sequence[Sample]]
    ) -> list[list[Sample]]:
        """The answers with their scores, and what their teacher may know.

        Raises:
            DataError: a row has no known answer.
            RecipeError: answers stand alone, so that there is never another one to tell of.
        """
        del given
        flat = [sample for group in groups for sample in group]
        if self.spec.mistake is None and all(len(group) < 2 for group in groups):
            raise RecipeError(
                "source.answers", "has to be 2 or more: feedback tells of the others of a group"
            )
        verdicts = iter(self._verdicts(flat))
        judged = [self._told(group, [next(verdicts) for _ in group]) for group in groups]
        told = [sample for group in judged for sample in group]
        if told:
            self.figures = {
                "right": sum(sample.score or 0.0 for sample in told) / len(told),
                "helped": sum(sample.channel == HELPED for sample in told) / len(told),
            }
        return judged

    def _verdicts(self, samples: Sequence[Sample]) -> list[Verdict]:
        for sample in samples:
            if sample.answer is None:
                raise DataError(f"row {sample.id} has no `answer`, with which feedback compares")
        return self.verifier.check_all(
            [sample.completion or "" for sample in samples],
            [sample.answer or "" for sample in samples],
            ["\n".join(turn.text for turn in sample.prompt) for sample in samples],
        )

    def _told(self, group: Sequence[Sample], verdicts: Sequence[Verdict]) -> list[Sample]:
        told: list[Sample] = []
        for place, (sample, verdict) in enumerate(zip(group, verdicts, strict=True)):
            text = self._solution(group, verdicts, place) + self._mistake(verdict)
            scored = replace(sample, score=float(verdict.right))
            if text:
                chat = any(turn.role for turn in sample.turns)
                known = (*privileged_turns(text, chat=chat), *sample.privileged)
                scored = replace(scored, channel=HELPED, privileged=known)
            told.append(scored)
        return told

    def _solution(self, group: Sequence[Sample], verdicts: Sequence[Verdict], place: int) -> str:
        """The next right answer of the group behind this one, as a circle; never itself."""
        if self.spec.solution is None:
            return ""
        for step in range(1, len(group)):
            other = (place + step) % len(group)
            if verdicts[other].right:
                return filled(self.spec.solution, solution=group[other].completion or "")
        return ""

    def _mistake(self, verdict: Verdict) -> str:
        if self.spec.mistake is None or verdict.right:
            return ""
        reason = verdict.reason or "it is wrong"
        return filled(self.spec.mistake, found=verdict.found or "nothing", reason=reason)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Nothing of it changes; see `core.protocols.Carried`."""
        return iter(())
