"""A row on its way: a prompt, perhaps with an answer, and where everything in it came from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from limbeck.core.exchange import Reply
from limbeck.core.text import is_whole
from limbeck.core.types import Sample, Turn
from limbeck.sources.dataset import ANSWER, RATIONALE

UNREADABLE = "it holds half a character, which no tokenizer can read"
"""The failure of a row that is not `readable`."""

NO_PROMPT = "there is no prompt to answer; rows of {text} go to grounded or backtranslate"
"""The failure of a row whose prompt a step cannot answer, because there is none."""


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
        privileged: what only a teacher reads, before the prompt.
        conversation: all turns as they came, where earlier ones than the completion are learnt
            too. In `prompt` they are not: a step looks at one answer, and one that a step has
            changed is learnt alone.
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
    privileged: tuple[Turn, ...] = ()
    conversation: tuple[Turn, ...] = ()
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

    @property
    def unchanged(self) -> bool:
        """Whether it is a `conversation`, as it came."""
        said = [turn.text for turn in self.prompt]
        if self.completion is not None:
            said.append(self.completion)
        came = [turn.text for turn in self.conversation]
        return bool(came) and self.rationale is None and said == came

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
        prompt=tuple(replace(turn, learn=False) for turn in sample.prompt),
        completion=completion,
        rationale=rationale,
        answer=sample.answer,
        weight=sample.weight,
        channel=sample.channel,
        group=sample.group,
        score=sample.score,
        privileged=sample.privileged,
        conversation=sample.turns if any(turn.learn for turn in sample.prompt) else (),
    )


def to_json(row: Row) -> dict[str, Any]:
    """The row as a line of a data file, which `sources.dataset` reads; what is None is left out."""
    values = {
        "id": row.id,
        **_learnt(row),
        "privileged": _written(row.privileged) or None,
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


def _learnt(row: Row) -> dict[str, Any]:
    """The columns of what is learnt; a conversation that no step has changed is as it came."""
    if not row.unchanged:
        return {
            "prompt": _written(row.prompt),
            "rationale": row.rationale,
            "completion": row.completion,
        }
    came = row.conversation
    if all(turn.learn == (turn.role == "assistant") for turn in came):
        return {"messages": _written(came)}
    first = next(place for place, turn in enumerate(came) if turn.learn)
    return {"prompt": _written(came[:first]), "completion": _written(came[first:])}


def _written(turns: Sequence[Turn]) -> str | list[dict[str, str]]:
    """Turns as a column: messages, or one text where nobody speaks."""
    if not any(turn.role for turn in turns):
        return "".join(turn.text for turn in turns)
    return [{"role": turn.role or "user", "content": turn.text} for turn in turns]
