"""A writer whose replies are kept, so that what it has written once is never asked for again."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from typing import Any

from limbeck.core.exchange import Question, Reply, Scored, Writer
from limbeck.core.types import Sampling
from limbeck.ledger.keys import answer_key
from limbeck.ledger.store import Ledger

WINDOW = 256
"""Questions that are looked up, and asked, together."""

LOCAL = "local"
"""Stands for the endpoint in the keys of models on this machine, and for their account."""


class Recorded:
    """Another writer, with a memory.

    Args:
        writer: what writes.
        ledger: an open ledger.
        identity: what decides its words besides questions and sampling, such as a hash of its
            weights: another one never meets old answers.
    """

    def __init__(self, writer: Writer, ledger: Ledger, identity: str) -> None:
        self.writer, self.ledger, self.identity = writer, ledger, identity
        self.name = writer.name

    def answers(
        self, questions: Iterable[Question], sampling: Sampling, n: int = 1
    ) -> Iterator[Sequence[Reply]]:
        """For each question, in their order, its n replies; see `core.exchange.Writer`."""
        waiting = iter(questions)
        while window := list(islice(waiting, max(1, WINDOW // n))):
            yield from self._window(window, sampling, n)

    def _window(
        self, questions: Sequence[Question], sampling: Sampling, n: int
    ) -> Iterator[Sequence[Reply]]:
        keys = [self._keys(question, sampling, n) for question in questions]
        known = self.ledger.known([key for own in keys for key in own])
        missing = [i for i, own in enumerate(keys) if any(key not in known for key in own)]
        heard = self.writer.answers((questions[i] for i in missing), sampling, n)
        fresh = dict(zip(missing, heard, strict=True))
        if missing:
            self._keep({k: r for i in missing for k, r in zip(keys[i], fresh[i], strict=True)})
        for place, question in enumerate(questions):
            if place in fresh:
                yield fresh[place]
            else:
                yield [reply_of(known[key], question.id) for key in keys[place]]

    def _keep(self, replies: Mapping[str, Reply]) -> None:
        """One record for a window: on this machine nothing is lost but time."""
        whole = {key: payload_of(r) for key, r in replies.items() if r.failure is None}
        number = self.ledger.begin(list(whole), {"model": self.name}, None, LOCAL, None)
        self.ledger.finish(number, whole, None, None, None)

    def _keys(self, question: Question, sampling: Sampling, n: int) -> list[str]:
        parameters = {
            "prompt": [[turn.role, turn.text] for turn in question.prompt],
            "prefix": question.prefix,
            **asdict(sampling),
        }
        return [answer_key(LOCAL, self.identity, parameters, index) for index in range(n)]


def payload_of(reply: Reply) -> dict[str, Any]:
    """A reply as JSON values, without the question's name, which is not part of what was asked."""
    return {name: value for name, value in asdict(reply).items() if name != "question"}


def reply_of(payload: Mapping[str, Any], question: str) -> Reply:
    """The reply of which `payload_of` made this."""
    values: dict[str, Any] = dict(payload)
    scores = values.pop("scores", None)
    if scores is not None:
        scores = tuple(
            Scored(text=s["text"], logp=s["logp"], top=tuple((t, v) for t, v in s["top"]))
            for s in scores
        )
    return Reply(**values, question=question, scores=scores)
