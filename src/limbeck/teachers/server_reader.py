"""A teacher behind an API that reads: how likely it finds text which it did not write.

Two forms of asking are known, and the first that works is kept: `prompt_logprobs`, as vLLM has it,
and `echo` with `logprobs`. Text is sent as token ids, so that the server reads the very tokens that
the student learns. What it says is in the ledger like any answer, so a text is paid for once.
"""

import json
import math
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, ClassVar, Literal, Self, get_args

import torch
from transformers import PreTrainedTokenizerBase

from limbeck.core.errors import LimbeckError, ServerError
from limbeck.core.exchange import Reply, Scored
from limbeck.core.specs import ServerTeacher
from limbeck.core.types import Encoding, Needs, Sample, Signals, Turn, View
from limbeck.ledger.keys import answer_key
from limbeck.ledger.money import cost_usd
from limbeck.losses.sparse import Sparse
from limbeck.models.encode import Encoder
from limbeck.models.facts import vocabulary_fingerprint
from limbeck.teachers.parts import Part, parts
from limbeck.teachers.recorded import reply_of
from limbeck.teachers.server import Server
from limbeck.teachers.wire import PLAIN, Again, Choice, Heard, Refused, read_response

Form = Literal["prompt_logprobs", "echo"]
FORMS: tuple[Form, ...] = get_args(Form)

NEVER = -9999.0
"""vLLM's word for minus infinity."""

LEAST_ROUNDING, MOST_MASS = 1e-6, 1 + 1e-3
"""How far above 0 a log-probability, and above 1 a sum of probabilities, may be by rounding."""

MISUNDERSTOOD = (200, 400, 422)
"""Statuses of a server that does not know a form, or takes no notice of it."""

Line = tuple[Scored, ...]
"""What is said of a text: of each token but the first its log-probability and the likeliest ones.
They are named by their ids, written as digits; an empty name where an id is not known."""


class ServerReader:
    """Reads given text by asking a server; a `Reader` without weights.

    Use it as a context manager. It gives `chosen`, the log-probability of the text's own tokens,
    and `sparse`, the likeliest tokens at each place and the rest's mass, both at temperature 1.

    Args:
        spec: the server; it must have the API `completions`.
        tokenizer: the same as the server's model has.
        max_length: tokens kept of a sample.
        device: where signals go.
        display: whether progress is shown.
    """

    ahead: ClassVar[bool] = True
    """It may be read before it is needed, beside other work."""

    def __init__(
        self,
        spec: ServerTeacher,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int,
        device: torch.device | None = None,
        display: bool = False,
    ) -> None:
        self.spec, self.k, self.name = spec, spec.top_logprobs, spec.model
        self.device = device or torch.device("cpu")
        self.offers: Needs = frozenset({"chosen", "sparse"} if self.k else {"chosen"})
        self.vocabulary = vocabulary_fingerprint(tokenizer)
        self.encoder = Encoder(tokenizer, max_length)
        self._server = _Reading(spec, display=display)

    def __enter__(self) -> Self:
        self._server.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.__exit__(kind, error, trace)

    def check(self, needs: Needs) -> None:
        """Let it read two words, so that a server that cannot is found out before the work begins.

        Raises:
            ServerError: it cannot.
        """
        turns = (Turn(text="Good"), Turn(text=" morning", learn=True))
        self.read(self.collate([self.encode(Sample(id="check", turns=turns))]), needs)

    def encode(self, sample: Sample) -> Encoding:
        """Tokenize one sample; what a model with this tokenizer wrote is read as it wrote it."""
        if sample.written is not None and sample.written.vocabulary == self.vocabulary:
            return self.encoder.encode_written(sample, sample.written.ids)
        return self.encoder.encode(sample)

    def collate(self, encodings: Sequence[Encoding]) -> View:
        """Pad encodings into a batch."""
        return self.encoder.collate(encodings)

    def read(self, view: View, needs: Needs) -> Signals:
        """What the server says of the view's rows.

        Raises:
            ServerError: it does not read, or failed at one of the texts. What it said is kept, so
                that the same run goes on from there when it is started again.
            BudgetError: the next text could cost more than is left.
        """
        asked = [part for part in parts(view) if part.rows]
        lines = self._server.lines([part.ids.tolist() for part in asked], self.k)
        rows = [row for part, line in zip(asked, lines, strict=True) for row in _rows(part, line)]
        said = Signals(
            labels=view.labels.to(self.device),
            chosen=torch.tensor([row.logp for row in rows], device=self.device),
        )
        if "sparse" in needs and self.k:
            return replace(said, sparse=_sparse(rows, self.k).to(self.device))
        return said

    @property
    def end_token(self) -> int | None:
        """The id of the token that ends a text; None where the tokenizer has none."""
        return self.encoder.eos

    @property
    def account(self) -> str:
        """Whose money it is, in the ledger."""
        return self._server.account

    @property
    def spent_usd(self) -> float | None:
        """What the account has spent; None where a price is not known."""
        return self._server.spent_usd

    @property
    def read_usd(self) -> float | None:
        """What the texts cost that were read here, also those that an earlier run paid for; None
        where a price is not known."""
        return self._server.read_usd


class _Reading(Server):
    """A server that is asked about texts, with the same ledger, pace and patience."""

    form: Form | None = None

    def __init__(self, spec: ServerTeacher, *, display: bool) -> None:
        super().__init__(spec, display=display)
        self.read_usd: float | None = 0.0
        self._counted = set[int]()

    def lines(self, texts: Sequence[Sequence[int]], k: int) -> list[Line]:
        """What is said of each text, in order."""
        left = list(texts)
        found: list[Line] = []
        if self.form is None and left:  # the first one finds out how to ask
            found = self._together([self._first(left.pop(0), k)])
        return found + self._together([self._later(text, k) for text in left])

    def _together(self, works: Sequence[Coroutine[Any, Any, Line]]) -> list[Line]:
        futures = [self._run(work) for work in works]
        try:
            return [future.result() for future in futures]
        except (LimbeckError, KeyboardInterrupt):
            self._settle(futures)
            self._stopping.clear()
            raise
        finally:
            for future in futures:
                future.cancel()

    async def _first(self, text: Sequence[int], k: int) -> Line:
        """What is said of a text, in whichever form the server understands."""
        reasons: list[str] = []
        known: list[Form] = [
            form for form in FORMS if self._known(self._key_of(_asked(self.spec, text, k, form)))
        ]
        for form in known or FORMS:
            try:
                line = await self._line(text, k, form)
            except Refused as error:
                if error.status not in MISUNDERSTOOD:
                    raise ServerError(self._no(error)) from None
                reasons.append(f"{form}: {error.reason}")
            else:
                self.form = form
                return line
        raise ServerError(
            f"{self.spec.url} says nothing of text that it is given ({'; '.join(reasons)}); it"
            " takes a server such as vLLM, or an objective that needs no more than its answers"
        )

    async def _later(self, text: Sequence[int], k: int) -> Line:
        assert self.form is not None
        try:
            return await self._line(text, k, self.form)
        except Refused as error:
            raise ServerError(
                f"{self.spec.url} refuses a text of {len(text)} tokens: {self._no(error)}"
            ) from None

    async def _line(self, text: Sequence[int], k: int, form: Form) -> Line:
        """What is said of a text.

        Raises:
            ServerError: it failed after all attempts, or is about other tokens.
            Refused: the server does not take it.
        """
        asked = _asked(self.spec, text, k, form)
        key = self._key_of(asked)
        async with self._alone(key):
            known = self._known(key)
            if known is not None:
                line, usd = known.scores or (), known.usd
            else:
                heard = await self._persistently(asked, [key], 1, scored=False)
                if isinstance(heard, str):
                    raise ServerError(f"{self.spec.url} did not read a text: {heard}")
                if not heard.choices:
                    raise Refused(200, "its answer does not have them")
                line = heard.choices[0].scores or ()
                usd = cost_usd(self.spec.price, heard.prompt_tokens, heard.completion_tokens)
        self._count(key, usd)
        if len(line) != len(text) - 1 or any(
            score.text not in ("", str(token)) for score, token in zip(line, text[1:], strict=True)
        ):
            raise ServerError(
                f"{self.spec.url} speaks of other tokens than it was sent; `tokenizer` must be that"
                f" of {self.spec.model}"
            )
        return line

    def _key_of(self, asked: Mapping[str, Any]) -> str:
        return answer_key(self.spec.url, self.spec.model, {**asked, "api": "read"}, 0)

    def _known(self, key: str) -> Reply | None:
        found = self._ledger.known([key])
        return reply_of(found[key], "") if key in found else None

    def _count(self, key: str, usd: float | None) -> None:
        """Add what a text cost, the first time."""
        if (mark := hash(key)) in self._counted:
            return
        self._counted.add(mark)
        if self.read_usd is not None:
            self.read_usd = None if usd is None else self.read_usd + usd

    async def _sent(self, asked: dict[str, Any], n: int, *, scored: bool) -> Heard:
        del n, scored
        return read_line(await self._client.post(PLAIN, asked), asked["prompt"])


def _asked(spec: ServerTeacher, text: Sequence[int], k: int, form: Form) -> dict[str, Any]:
    """What is sent: the text's tokens, and that it should say how likely they are."""
    asked: dict[str, Any] = {
        "model": spec.model,
        "prompt": list(text),
        "temperature": 1.0,
        "top_p": 1.0,
        "stream": False,
    }
    if form == "prompt_logprobs":
        asked |= {"prompt_logprobs": k, "max_tokens": 1}  # vLLM writes at least one token
    else:
        asked |= {"echo": True, "logprobs": k, "max_tokens": 0, "return_tokens_as_token_ids": True}
    return asked | dict(spec.extra)


def read_line(body: bytes, text: Sequence[int]) -> Heard:
    """A response about a text; its one choice has the line as its scores.

    There is no choice where the server has answered, but says nothing of the text.

    Raises:
        Again: it is damaged, or its numbers are no log-probabilities.
    """
    heard = read_response(body, "completions", 1, scored=False)
    said: Any = json.loads(body)
    entry: Any = said["choices"][0]
    try:
        places = entry.get("prompt_logprobs") or said.get("prompt_logprobs")
        line = _of_places(places, text) if places else _of_echo(entry.get("logprobs"), len(text))
        for score in line or ():
            _check(score)
    except ValueError as error:
        raise Again(str(error)) from None
    except (KeyError, TypeError, AttributeError, IndexError):
        raise Again("a response of another shape") from None
    choices = () if line is None else (Choice(text="", finish="stop", scores=line),)
    return replace(heard, choices=choices)


def _of_places(places: Sequence[Any], text: Sequence[int]) -> Line:
    """vLLM's form: at each place a table from ids to what is said of them."""
    line: list[Scored] = []
    for place, told in enumerate(places[1:], start=1):
        said = {name: entry["logprob"] for name, entry in told.items()}
        own = str(text[place]) if place < len(text) else ""
        name = own if own in said else "another"
        top = sorted(said.items(), key=lambda pair: _number(pair[1]), reverse=True)
        line.append(Scored(text=name, logp=said.get(own, NEVER), top=tuple(top)))
    return tuple(line)


def _of_echo(told: Any, count: int) -> Line | None:
    """The older form: lists with the text's own tokens first; None where they are not there."""
    if not told or len(told["tokens"]) < count or told["token_logprobs"][0] is not None:
        return None
    tops = told.get("top_logprobs") or [None] * len(told["tokens"])
    line = [
        Scored(
            text=_id(token),
            logp=logp,
            top=tuple((_id(name), value) for name, value in (top or {}).items() if _id(name)),
        )
        for token, logp, top in zip(told["tokens"], told["token_logprobs"], tops, strict=True)
    ]
    return tuple(line[1:count])


def _id(name: str) -> str:
    """`token_id:7` is 7; the text of a token does not say which token it is."""
    before, _, digits = name.partition(":")
    return digits if before == "token_id" and digits.isdecimal() else ""


def _number(value: Any) -> float:
    """A log-probability.

    Raises:
        ValueError: it is none.
    """
    known = isinstance(value, int | float) and not isinstance(value, bool)
    if not known or not NEVER <= value <= LEAST_ROUNDING:
        raise ValueError(f"a token of the text has the log-probability {value!r}")
    return value


def _check(score: Scored) -> None:
    """Refuse what cannot be log-probabilities of one distribution.

    Raises:
        ValueError: with what is wrong.
    """
    _number(score.logp)
    total = sum(math.exp(_number(logp)) for _, logp in score.top)
    if total > MOST_MASS:
        raise ValueError(f"the likeliest tokens have the probability {total:.4g} together")


def _rows(part: Part, line: Line) -> list[Scored]:
    """Those that are about learnt tokens."""
    return [line[place - 1] for place in part.learn.nonzero()[0].tolist() if place > 0]


def _sparse(rows: Sequence[Scored], k: int) -> Sparse:
    """The k likeliest tokens of each row, and the rest's mass."""
    ids = torch.zeros(len(rows), k, dtype=torch.int64)
    logp = torch.full((len(rows), k), -torch.inf, dtype=torch.float64)
    for place, row in enumerate(rows):
        best = sorted(row.top, key=lambda pair: pair[1], reverse=True)[:k]
        if not best:
            raise ServerError(
                "the server does not say which tokens the likeliest are, so there is no `sparse`;"
                " use an objective that needs `chosen` alone"
            )
        ids[place, : len(best)] = torch.tensor([int(name) for name, _ in best])
        logp[place, : len(best)] = torch.tensor([value for _, value in best], dtype=torch.float64)
    mass = logp.exp()
    mass = mass / mass.sum(-1, keepdim=True).clamp(min=1.0)  # rounding may have made it more
    rest = (1 - mass.sum(-1)).clamp(min=0.0)
    return Sparse(
        ids=ids,
        mass=mass.float(),
        rest=rest.float(),
        negentropy=(torch.xlogy(mass, mass).sum(-1) + torch.xlogy(rest, rest)).float(),
    )
