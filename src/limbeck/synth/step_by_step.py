"""Rationale and answer as two tasks of one student, told apart by a prefix."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from limbeck.core.registry import register
from limbeck.sources.dataset import ANSWER, RATIONALE
from limbeck.synth.rows import Row
from limbeck.synth.step import Desk


@register("step", "two_tasks")
@dataclass(frozen=True, kw_only=True)
class TwoTasks:
    """Each row twice: once to explain, once to answer; a term takes one kind by its channel.

    L = alpha L_rationale + beta L_answer, with the weights of two terms

    The answer does not depend on the rationale then: it may be right for another reason.

    Attributes:
        explain: put before the prompt where the rationale is learnt.
        predict: put before it where the answer is learnt, and where the student is used.

    Source: Hsieh et al., "Distilling Step-by-Step!" (arXiv 2305.02301).
    """

    explain: str = "explain: "
    predict: str = "predict: "

    @property
    def asks(self) -> Sequence[str]:
        """Nobody."""
        return ()

    @property
    def reads(self) -> Sequence[str]:
        """Nobody."""
        return ()

    def run(self, rows: Iterable[Row], desk: Desk) -> Iterator[Row]:
        """Two rows of each; one without a rationale only learns to answer."""
        for row in rows:
            if row.rationale:
                yield replace(
                    self._asked(row, self.explain),
                    id=f"{row.id}#explain",
                    completion=row.rationale.rstrip(),
                    rationale=None,
                    channel=RATIONALE,
                )
            else:
                desk.counts["rows without a rationale"] += 1
            yield replace(
                self._asked(row, self.predict),
                id=f"{row.id}#predict",
                rationale=None,
                channel=ANSWER,
            )

    def _asked(self, row: Row, prefix: str) -> Row:
        if not row.prompt:
            return row
        *before, last = row.prompt
        return replace(row, prompt=(*before, replace(last, text=prefix + last.text)))
