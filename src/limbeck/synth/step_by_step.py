"""Step `two_tasks`: rationale and answer as two tasks of one student, told apart by a prefix."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from limbeck.core.errors import RecipeError
from limbeck.core.registry import register
from limbeck.sources.dataset import ANSWER, RATIONALE
from limbeck.synth.rows import Row
from limbeck.synth.step import Desk


@register("step", "two_tasks")
@dataclass(frozen=True, kw_only=True)
class TwoTasks:
    """Each row twice: once to explain, once to answer; a term takes one kind by its channel.

    L = alpha L_rationale + beta L_answer, with the weights of two terms

    The answer does not depend on the rationale then: it may be right for another reason. Both rows
    are of one group, so that they are held out together.

    Attributes:
        explain: put before the prompt where the rationale is learnt.
        predict: put before it where the answer is learnt, and where the student is used.

    Source: Hsieh et al., "Distilling Step-by-Step!" (arXiv 2305.02301).
    """

    explain: str = "explain: "
    predict: str = "predict: "

    def __post_init__(self) -> None:
        if self.explain == self.predict:
            raise RecipeError("explain", "is the same as `predict`; how is one to tell the tasks?")

    def run(self, rows: Iterable[Row], desk: Desk) -> Iterator[Row]:
        """Two rows of each; one without a rationale only learns to answer, and is counted."""
        for row in rows:
            if not row.prompt or row.completion is None:
                yield row.failed("two tasks need a prompt and a completion")
                continue
            rationale = (row.rationale or "").rstrip()
            if rationale:
                yield self._task(row, "explain", self.explain, RATIONALE, rationale)
            else:
                desk.counts["rows without a rationale"] += 1
            yield self._task(row, "predict", self.predict, ANSWER, row.completion)

    def _task(self, row: Row, name: str, prefix: str, channel: str, completion: str) -> Row:
        *before, last = row.prompt
        return replace(
            row,
            id=f"{row.id}#{name}",
            prompt=(*before, replace(last, text=prefix + last.text)),
            completion=completion,
            rationale=None,
            channel=channel,
            group=row.group or row.id,
        )
