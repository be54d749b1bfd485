"""What the mock answers: seeded words of its own, or those of a model on this machine."""

import hashlib
import json
import math
import random
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

from limbeck.core.exchange import Question, Reply, Scored, Writer
from limbeck.core.types import Sampling, Turn

WORDS = (
    "the sea is wide and old and full of fish a boat goes out at dawn some birds follow it far from"
    " land we hear waves wind rain then quiet water under a low red sun"
).split()
"""Words of the canned answers."""

GATHER_SECONDS = 0.005
"""How long a model's mind waits for others to ask the same kind of question."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A request as a mind sees it: turns (or plain text), what to go on from, how to draw."""

    prompt: tuple[Turn, ...]
    prefix: str
    sampling: Sampling
    n: int
    seeded: bool


class Mind(Protocol):
    """Answers requests; called from several threads."""

    def answer(self, asked: Asked) -> Sequence[Reply]:
        """n replies, with scores where the sampling asks for them."""
        ...


class Canned:
    """Words drawn by a hash of everything that was asked: cheap, and always the same.

    Without a seed, draws differ from request to request, as a server's do.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed, self._number = seed, 0
        self._lock = threading.Lock()

    def answer(self, asked: Asked) -> Sequence[Reply]:
        """n answers of up to `max_tokens` words."""
        sampling = asked.sampling
        parts: list[Any] = [self.seed, sampling.temperature, sampling.top_p, asked.prefix]
        parts.append([[turn.role, turn.text] for turn in asked.prompt])
        if sampling.temperature > 0:
            parts.append(sampling.seed if asked.seeded else self._next())
        mark = json.dumps(parts)
        greedy = sampling.temperature == 0
        return [self._one(f"{mark}/{0 if greedy else k}", asked, k) for k in range(asked.n)]

    def _next(self) -> int:
        with self._lock:
            self._number += 1
            return -self._number

    def _one(self, mark: str, asked: Asked, index: int) -> Reply:
        draw = random.Random(hashlib.sha256(mark.encode()).digest())
        sampling = asked.sampling
        wanted = draw.randint(3, 24)
        count = min(wanted, sampling.max_tokens)
        words = [" " * bool(k or asked.prefix) + draw.choice(WORDS) for k in range(count)]
        text = "".join(words)
        finish = "stop" if wanted <= sampling.max_tokens else "length"
        cuts = [text.index(stop) for stop in sampling.stop if stop in text]
        if cuts:
            text, finish = text[: min(cuts)], "stop"
        scores = None
        if sampling.scores is not None:
            scores = _scored(words, draw, sampling.scores, len(text))
        return Reply(
            question="",
            index=index,
            text=text,
            finish=finish,
            prompt_tokens=sum(len(turn.text.split()) + 4 for turn in asked.prompt),
            completion_tokens=count,
            scores=scores,
        )


def _scored(words: Sequence[str], draw: random.Random, top: int, length: int) -> tuple[Scored, ...]:
    """Log-probabilities that add up, for the words within a text of so many characters."""
    found: list[Scored] = []
    place = 0
    for word in words:
        if place >= length:
            break
        kept = word[: length - place]
        place += len(word)
        others = draw.sample([other for other in WORDS if other != word.strip()], max(top, 1) - 1)
        weights = sorted((draw.random() for _ in range(len(others) + 2)), reverse=True)
        total = sum(weights)
        shares = [math.log(weight / total) for weight in weights]
        names = [kept, *(f" {other}" for other in others)]
        tops = tuple(zip(names, shares, strict=False))[:top]
        found.append(Scored(text=kept, logp=shares[0], top=tops))
    return tuple(found)


@dataclass
class _Waiting:
    asked: Asked
    answer: Future[Sequence[Reply]] = field(default_factory=Future[Sequence[Reply]])


class OfWriter:
    """A writer's own words; requests that draw alike are answered together.

    Args:
        writer: such as a local model.
    """

    def __init__(self, writer: Writer) -> None:
        self.writer = writer
        self._queue: list[_Waiting] = []
        self._changed = threading.Condition()
        self._number = 0
        threading.Thread(target=self._work, name="mind", daemon=True).start()

    def answer(self, asked: Asked) -> Sequence[Reply]:
        """n replies of the writer."""
        waiting = _Waiting(asked)
        with self._changed:
            self._queue.append(waiting)
            self._changed.notify()
        return waiting.answer.result()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._queue:
                    self._changed.wait()
                self._changed.wait(GATHER_SECONDS)
                first = self._queue[0]
                kind = self._kind(first)
                batch = [one for one in self._queue if self._kind(one) == kind]
                self._queue = [one for one in self._queue if one not in batch]
            self._batch(batch)

    def _kind(self, waiting: _Waiting) -> tuple[Any, ...]:
        asked = waiting.asked
        alone = id(waiting) if not asked.seeded and asked.sampling.temperature > 0 else None
        return asked.sampling, asked.n, alone

    def _batch(self, batch: Sequence[_Waiting]) -> None:
        first = batch[0].asked
        sampling = first.sampling
        if not first.seeded:  # as a server draws where it is told no seed
            self._number += 1
            sampling = Sampling(**{**_fields(sampling), "seed": self._number})
        questions = [
            Question(id=str(k), prompt=one.asked.prompt, prefix=one.asked.prefix)
            for k, one in enumerate(batch)
        ]
        try:
            replies = self.writer.answers(questions, sampling, first.n)
            for one, found in zip(batch, replies, strict=True):
                one.answer.set_result(found)
        except Exception as error:
            for one in batch:
                if not one.answer.done():
                    one.answer.set_exception(error)


def _fields(sampling: Sampling) -> Mapping[str, Any]:
    return {name: getattr(sampling, name) for name in sampling.__dataclass_fields__}
