"""What the mock answers: seeded words of its own, or those of a model on this machine."""

import hashlib
import json
import math
import random
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from limbeck.core.exchange import Question, Reply, Scored, Writer
from limbeck.core.text import until
from limbeck.core.types import Encoding, Sample, Sampling, Turn

WORDS = (
    "the sea is wide and old and full of fish a boat goes out at dawn some birds follow it far from"
    " land we hear waves wind rain then quiet water under a low red sun"
).split()
"""Words of the canned answers; those that stand there twice come twice as often."""

DIFFERENT = sorted(set(WORDS))

GATHER_SECONDS = 0.005
"""How long a model's mind waits for others to ask the same kind of question."""

MOST_TOGETHER = 32
"""Requests that a model answers in one batch."""


class Bad(Exception):
    """A request that is refused."""

    def __init__(self, status: int, message: str, code: str = "invalid_request_error") -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code

    @property
    def body(self) -> dict[str, Any]:
        """As the API says it."""
        return {"error": {"message": self.message, "type": self.code, "code": self.code}}


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A request as a mind sees it.

    Attributes:
        prompt: the turns to answer; one without a role where it is plain text.
        prefix: the beginning of the answer.
        sampling: how to draw.
        n: how many answers.
        seeded: whether a seed was given.
        ids: the prompt as tokens, where it was given as such.
        reading: how many likeliest tokens are asked for at each place of the prompt; None for none.
        echo: whether the prompt stands before the answer.
        names_ids: whether tokens are called by their ids.
    """

    prompt: tuple[Turn, ...]
    prefix: str
    sampling: Sampling
    n: int
    seeded: bool
    ids: tuple[int, ...] | None = None
    reading: int | None = None
    echo: bool = False
    names_ids: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """A token of a prompt as a model reads it.

    Attributes:
        id, text: which it is.
        logp: its log-probability, nats; None of the first, before which there is nothing.
        rank: 1 where it was the likeliest.
        top: the likeliest tokens at its place: id, text, log-probability.
    """

    id: int
    text: str
    logp: float | None = None
    rank: int = 0
    top: tuple[tuple[int, str, float], ...] = ()


class Mind(Protocol):
    """Answers requests; called from several threads.

    One that can also tell how likely a given text is has `reads`, which is True, and
    `read(asked)`, which gives the prompt's `Token`s.
    """

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
        if (cut := until(text, sampling.stop)) != text:
            text, finish = cut, "stop"
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
    """Log-probabilities that add up, for the words within a text of so many characters.

    The word that was drawn is among the likeliest, or just behind them.
    """
    found: list[Scored] = []
    place = 0
    for word in words:
        if place >= length:
            break
        kept = word[: length - place]
        place += len(word)
        others = [f" {other}" for other in DIFFERENT if other != word.strip()]
        names = draw.sample(others, top)
        rank = draw.randrange(top + 1)
        names.insert(rank, kept)
        weights = sorted((draw.random() for _ in range(top + 2)), reverse=True)
        total = sum(weights)
        shares = [math.log(max(weight, 1e-9) / total) for weight in weights]
        tops = tuple(zip(names, shares, strict=False))[:top]
        found.append(Scored(text=kept, logp=shares[rank], top=tops))
    return tuple(found)


class OfFunction:
    """Answers that a function gives: a text for each request, or whole replies.

    Args:
        function: called with what was asked, from one thread at a time.
    """

    def __init__(self, function: Callable[[Asked], str | Sequence[Reply]]) -> None:
        self.function = function

    def answer(self, asked: Asked) -> Sequence[Reply]:
        """n replies; a text is the same n times, and has a token for each word."""
        said = self.function(asked)
        if not isinstance(said, str):
            return said
        count = len(said.split())
        prompt = sum(len(turn.text.split()) for turn in asked.prompt)
        one = Reply(
            question="",
            index=0,
            text=said,
            finish="stop",
            prompt_tokens=prompt,
            completion_tokens=count,
        )
        return [replace(one, index=index) for index in range(asked.n)]


@dataclass(eq=False)
class _Waiting:
    asked: Asked
    reads: bool
    answer: Future[Any] = field(default_factory=Future[Any])

    @property
    def kind(self) -> tuple[Any, ...]:
        """Requests with the same one can share a batch."""
        if self.reads:
            return ("read", self.asked.reading)
        alone = not self.asked.seeded and self.asked.sampling.temperature > 0
        return ("answer", self.asked.sampling, self.asked.n, id(self) if alone else None)


class OfWriter:
    """A writer's own words; requests that draw alike are answered together.

    Args:
        writer: such as a local model. One with a `model` that gives logits can also read.
    """

    def __init__(self, writer: Writer) -> None:
        self.writer = writer
        self._queue: list[_Waiting] = []
        self._changed = threading.Condition()
        self._number = 0
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="mind", daemon=True)
        self._thread.start()

    @property
    def reads(self) -> bool:
        """Whether its model can tell how likely a text is."""
        return hasattr(getattr(self.writer, "model", None), "read")

    @property
    def chats(self) -> bool:
        """Whether it takes conversations: a model without a chat template does not."""
        tokenizer = getattr(getattr(self.writer, "model", None), "tokenizer", None)
        return tokenizer is None or bool(getattr(tokenizer, "chat_template", None))

    def answer(self, asked: Asked) -> Sequence[Reply]:
        """n replies of the writer.

        Raises:
            Bad: it is a conversation, and the model knows no form for one.
        """
        if not self.chats and any(turn.role for turn in asked.prompt):
            raise Bad(400, "this model has no chat template; ask /completions")
        return self._ask(_Waiting(asked, reads=False))

    def read(self, asked: Asked) -> Sequence[Token]:
        """The prompt's tokens as its model reads them."""
        return self._ask(_Waiting(asked, reads=True))

    def close(self) -> None:
        """End its thread; what waits fails."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(60)

    def _ask(self, waiting: _Waiting) -> Any:
        with self._changed:
            self._queue.append(waiting)
            self._changed.notify()
        return waiting.answer.result()

    def _work(self) -> None:
        while batch := self._next():
            try:
                found = self._read(batch) if batch[0].reads else self._answer(batch)
                for one, answer in zip(batch, found, strict=True):
                    one.answer.set_result(answer)
            except Exception as error:
                for one in batch:
                    if not one.answer.done():
                        one.answer.set_exception(error)
        for one in self._queue:
            one.answer.cancel()

    def _next(self) -> list[_Waiting]:
        """Requests of one kind, the oldest's; none where it was closed."""
        with self._changed:
            while not self._queue and not self._closed:
                self._changed.wait()
            if self._closed:
                return []
            self._changed.wait(GATHER_SECONDS)
            kind = self._queue[0].kind
            batch = [one for one in self._queue if one.kind == kind][:MOST_TOGETHER]
            taken = set(map(id, batch))
            self._queue = [one for one in self._queue if id(one) not in taken]
            return batch

    def _answer(self, batch: Sequence[_Waiting]) -> list[Sequence[Reply]]:
        first = batch[0].asked
        sampling = first.sampling
        if not first.seeded:  # as a server draws where it is told no seed
            self._number += 1
            sampling = replace(sampling, seed=self._number)
        questions = [
            Question(id=str(k), prompt=self._turns(one.asked), prefix=one.asked.prefix)
            for k, one in enumerate(batch)
        ]
        return list(self.writer.answers(questions, sampling, first.n))

    def _turns(self, asked: Asked) -> tuple[Turn, ...]:
        if asked.ids is None:
            return asked.prompt
        tokenizer = self._model().tokenizer
        return (Turn(text=str(tokenizer.decode(list(asked.ids), skip_special_tokens=True))),)

    def _read(self, batch: Sequence[_Waiting]) -> list[Sequence[Token]]:
        import torch

        model = self._model()
        lines = [self._ids(model, one.asked) for one in batch]
        encodings = [
            Encoding.without_text(line, [True] * len(line), name=str(place))
            for place, line in enumerate(lines)
        ]
        with torch.no_grad():
            said = model.read(model.collate(encodings), frozenset({"logits"}))
        logp = said.logits.double().log_softmax(-1).cpu()
        rows = logp.split([max(len(line) - 1, 0) for line in lines])
        k = min(batch[0].asked.reading or 0, logp.shape[-1])
        return [self._tokens(line, own, k) for line, own in zip(lines, rows, strict=True)]

    def _tokens(self, line: Sequence[int], rows: Any, k: int) -> list[Token]:
        text = self._model().token_text
        found = [Token(id=line[0], text=text(line[0]))] if line else []
        for token, row in zip(line[1:], rows, strict=True):
            best = row.topk(k)
            top = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            found.append(
                Token(
                    id=token,
                    text=text(token),
                    logp=float(row[token]),
                    rank=int((row > row[token]).sum()) + 1,
                    top=tuple((other, text(other), value) for other, value in top),
                )
            )
        return found

    def _ids(self, model: Any, asked: Asked) -> list[int]:
        if asked.ids is not None:
            return list(asked.ids)
        return list(model.encode(Sample(id="", turns=asked.prompt)).ids)

    def _model(self) -> Any:
        return self.writer.model  # pyright: ignore[reportAttributeAccessIssue]
