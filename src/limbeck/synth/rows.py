"""A row on its way: a prompt, perhaps with an answer, and where everything in it came from."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from limbeck.core.exchange import Reply
from limbeck.core.text import is_whole
from limbeck.core.types import Sample, Turn
from limbeck.sources.dataset import ANSWER, RATIONALE

UNREADABLE = "it holds half a character, which no tokenizer can read"
"""The failure of a row that is not `readable`."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """What steps take and give.

    Attributes:
        id: stable and unique; a row that is made of another one begins with that one's id.
        prompt: what the student will be asked.
        completion: what it should write; None while there is none.
        rationale: the reasoning before the completion, with the white space between both.
        answer: the known right answer. Steps check with it; a teacher sees it only where a step
            says so.
        weight, channel, group, score: as of `core.types.Sample`.
        source: what it was made from and by: one entry for each reply that has a part in it.
        notes: what else steps found out, such as a verdict; they become columns of the file.
        failure: why it must not be trained on; later steps leave such a row alone.
    """

    id: str
    prompt: tuple[Turn, ...]
    completion: str | None = None
    rationale: str | None = None
    answer: str | None = None
    weight: float = 1.0
    channel: str = "main"
    group: str | None = None
    score: float | None = None
    source: tuple[Mapping[str, Any], ...] = ()
    notes: Mapping[str, Any] = field(default_factory=dict[str, Any])
    failure: str | None = None

    @property
    def question(self) -> str:
        """What is asked, a line for each turn."""
        return "\n".join(turn.text for turn in self.prompt)

    @property
    def text(self) -> str:
        """Rationale and completion, as the student would write them."""
        return (self.rationale or "") + (self.completion or "")

    @property
    def readable(self) -> bool:
        """Whether a tokenizer can read prompt and text."""
        return is_whole(self.question + self.text)

    def failed(self, reason: str) -> "Row":
        """The row as one that is not trained on."""
        return replace(self, failure=reason)

    def noted(self, **notes: Any) -> "Row":
        """The row with more notes."""
        return replace(self, notes={**self.notes, **notes})

    def made_by(self, step: str, teacher: str, reply: Reply, **more: Any) -> "Row":
        """The row with one more entry of where it came from: a reply, and what step asked for it.

        Args:
            step: kind of the step.
            teacher: name of the teacher in the recipe.
            reply: the answer that has a part in the row.
            more: what else the entry says, such as the temperature.
        """
        entry = {
            "step": step,
            "teacher": teacher,
            "model": reply.model,
            "fingerprint": reply.fingerprint,
            "question": reply.question,
            "index": reply.index,
            "finish": reply.finish,
            "prompt_tokens": reply.prompt_tokens,
            "completion_tokens": reply.completion_tokens,
            "usd": reply.usd,
            **more,
        }
        return replace(self, source=(*self.source, entry))


def row_of(sample: Sample) -> Row:
    """The row that a source's sample is."""
    completion, rationale = sample.completion, None
    if completion is not None and [name for _, name in sample.parts] == [RATIONALE, ANSWER]:
        first, second = (start for start, _ in sample.parts)
        written = completion.encode()
        rationale = written[: second - first].decode()
        completion = written[second - first :].decode()
    return Row(
        id=sample.id,
        prompt=sample.prompt,
        completion=completion,
        rationale=rationale,
        answer=sample.answer,
        weight=sample.weight,
        channel=sample.channel,
        group=sample.group,
        score=sample.score,
    )


def to_json(row: Row) -> dict[str, Any]:
    """The row as a line of a data file, which `sources.dataset` reads; what is None is left out."""
    prompt: Any = "".join(turn.text for turn in row.prompt)
    if any(turn.role for turn in row.prompt):
        prompt = [{"role": turn.role or "user", "content": turn.text} for turn in row.prompt]
    values = {
        "id": row.id,
        "prompt": prompt,
        "rationale": row.rationale,
        "completion": row.completion,
        "answer": row.answer,
        "weight": None if row.weight == 1.0 else row.weight,
        "channel": None if row.channel == "main" else row.channel,
        "group": row.group,
        "score": row.score,
        "failure": row.failure,
        "source": [dict(entry) for entry in row.source] or None,
        **row.notes,
    }
    return {name: value for name, value in values.items() if value is not None}
