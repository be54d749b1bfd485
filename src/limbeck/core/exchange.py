"""Asking a model for text, whatever stands behind it: questions, how to draw, replies, writers."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from limbeck.core.types import Sampling, Turn


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What a writer is asked.

    Attributes:
        id: stable name, such as that of the row it is about.
        prompt: the turns to answer.
        prefix: the beginning of the answer; the writer goes on from it.
    """

    id: str
    prompt: tuple[Turn, ...]
    prefix: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """A token of a reply: its text, its log-probability, and the likeliest at its place.

    Nats; of a model here at temperature 1, whatever it was drawn at, and else as the server says.
    """

    text: str
    logp: float
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """One answer to a question, or the reason why there is none.

    Attributes:
        question: id of the question.
        index: which of its answers, from 0.
        text: what was written behind the prefix.
        finish: `stop` where the writer ended it; `length` where it was cut, which makes it half an
            answer, or none where reasoning took all of it; or a server's own word, such as
            `content_filter` or `refusal`. Empty on a failure.
        failure: why there is no answer; None where there is one.
        model: name and version that the writer says it is.
        fingerprint: of the server's set-up, where it tells one.
        prompt_tokens, completion_tokens: as the writer counts them; None where it does not say.
        usd: what this answer cost; None where no price is known.
        scores: its tokens, where they were asked for.
    """

    question: str
    index: int
    text: str = ""
    finish: str = ""
    failure: str | None = None
    model: str = ""
    fingerprint: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    usd: float | None = None
    scores: tuple[Scored, ...] | None = None

    @property
    def whole(self) -> bool:
        """Whether it is an answer that was not cut."""
        return self.failure is None and self.finish == "stop"


@runtime_checkable
class Writer(Protocol):
    """Answers questions: a model on this machine, or one behind an API."""

    name: str

    def answers(
        self, questions: Iterable[Question], sampling: Sampling, n: int = 1
    ) -> Iterator[Sequence[Reply]]:
        """For each question, in their order, its n replies in the order of their index.

        Questions are taken as they are needed, so they may be a long stream. The draws of a reply
        depend on the sampling (its seed too), the question's text and the reply's index alone.
        """
        ...
