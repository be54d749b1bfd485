"""Step `weights`: how much each of a prompt's valid answers counts."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

from pydantic import Field

from limbeck.core.errors import RecipeError
from limbeck.core.registry import register
from limbeck.synth.grouped import grouped
from limbeck.synth.rows import Row
from limbeck.synth.scoring import Token, read_tokens, written_tokens
from limbeck.synth.step import Desk


@register("step", "weights")
@dataclass(frozen=True, kw_only=True)
class Weights:
    """Gives a prompt's answers weights that sum to 1, so that every prompt counts the same.

    Of the answers that are left, after verification say, a text y gets the part

        probability   p(y)^(1 / temperature) / sum over the texts of the same
        counts        how many of the answers are y / how many there are
        uniform       1 / how many texts there are

    with p(y) the teacher's probability of the whole text. Equal texts share their part.

    `probability` is the teacher's own distribution over the valid answers that were seen, and suits
    answers of which each stands once. Where equal answers stand as often as they were drawn,
    `counts` already is an estimate of it. Long texts have probabilities that lie far apart: then
    one answer takes nearly all. The note `effective_paths` = 1 / sum of the squares of the parts
    says how many are left; a `temperature` above 1 evens them out.

    Attributes:
        by: see above.
        temperature: of `probability`.
        teacher: name of the teacher, for `probability`.
        scores: `read` lets the teacher read each answer; `written` takes the log-probabilities that
            it wrote the answer with, which `answers` keeps where `scores` is set there.

    Source: Yan et al., "DASD" (arXiv 2601.09088), for the aim; the weights are limbeck's.
    """

    by: Literal["probability", "counts", "uniform"] = "probability"
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    teacher: str | None = None
    scores: Literal["read", "written"] = "read"

    def __post_init__(self) -> None:
        if self.by == "probability" and self.scores == "read" and self.teacher is None:
            raise RecipeError("teacher", "is missing: whose probabilities are wanted?")
        if self.by != "probability" and self.temperature != 1.0:
            raise RecipeError("temperature", "goes with `by: probability`")

    @property
    def reads(self) -> Sequence[str]:
        """Who reads the rows."""
        reads = self.by == "probability" and self.scores == "read"
        return (self.teacher,) if reads and self.teacher is not None else ()

    def run(self, rows: Iterable[Row], desk: Desk) -> Iterator[Row]:
        """The rows with their weights."""
        logps: dict[str, float] = {}
        if self.by == "probability":
            rows = self._read(rows, desk, logps)
        groups, effective = 0, 0.0
        for group in grouped(rows):
            good = [row for row in group if row.failure is None]
            if self.by == "probability":
                parts = parts_by_probability({r.text: logps[r.id] for r in good}, self.temperature)
            else:
                parts = parts_by_count([row.text for row in good], uniform=self.by == "uniform")
            times = Counter(row.text for row in good)
            left = 1 / sum(part * part for part in parts.values()) if parts else 0.0
            groups, effective = groups + bool(parts), effective + left
            for row in group:
                logps.pop(row.id, None)
                if row.failure is None:
                    row = replace(row, weight=parts[row.text] / times[row.text])
                    row = row.noted(effective_paths=left)
                yield row
            desk.counts["weighted prompts"] += bool(parts)
            desk.counts["weighted paths"] += len(parts)
        if groups:
            desk.figures["effective paths of a prompt"] = effective / groups

    def _read(self, rows: Iterable[Row], desk: Desk, logps: dict[str, float]) -> Iterator[Row]:
        """Each row, whose log-probability is then in `logps`; or failed."""
        scored: Iterable[tuple[Row, list[Token] | str]]
        if self.scores == "written":
            scored = ((row, written_tokens(row)) for row in rows)
        else:
            assert self.teacher is not None
            scored = read_tokens(rows, desk.reader(self.teacher))
        for row, tokens in scored:
            if isinstance(tokens, str):
                yield row.failed(tokens)
                continue
            logps[row.id] = math.fsum(token.logp for token in tokens)
            if not math.isfinite(logps[row.id]):
                yield row.failed("the teacher gives the answer no probability")
                continue
            yield row


def parts_by_probability(logps: Mapping[str, float], temperature: float) -> dict[str, float]:
    """Each text's part: softmax of log p / temperature; one text's is 1.

    >>> {text: round(part, 2) for text, part in parts_by_probability(
    ...     {"a": math.log(0.3), "b": math.log(0.1)}, 1.0).items()}
    {'a': 0.75, 'b': 0.25}
    """
    highest = max(logps.values(), default=0.0)
    raised = {text: math.exp((logp - highest) / temperature) for text, logp in logps.items()}
    total = math.fsum(raised.values())
    return {text: value / total for text, value in raised.items()}


def parts_by_count(texts: Sequence[str], *, uniform: bool) -> dict[str, float]:
    """Each text's part: how often it stands there, or the same for all."""
    times = Counter(texts)
    if uniform:
        return dict.fromkeys(times, 1 / len(times)) if times else {}
    return {text: count / len(texts) for text, count in times.items()}
