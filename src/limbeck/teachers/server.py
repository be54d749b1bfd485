"""A teacher behind an OpenAI-compatible API, with every request accounted for.

Outside it is an ordinary iterator; inside, an event loop in a thread of its own has many requests
under way. A request is in the ledger before it is sent, and its answers before they are handed out.
There is one layer that tries again, and it is this one: the client's own is off.
"""

import asyncio
import contextlib
import gc
import json
import logging
import random
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from limbeck.core.errors import BudgetError, LimbeckError, ServerError
from limbeck.core.exchange import Question, Reply
from limbeck.core.random import stream_seed
from limbeck.core.specs import ServerTeacher
from limbeck.core.types import Sampling
from limbeck.ledger.keys import answer_key
from limbeck.ledger.money import cost_usd, prompt_tokens_upper, worst_case_usd
from limbeck.ledger.pace import Pace
from limbeck.ledger.store import Ledger, Totals
from limbeck.teachers.client import key_of, make_client, transport
from limbeck.teachers.probe import Capabilities, probe, remembered
from limbeck.teachers.recorded import payload_of, reply_of
from limbeck.teachers.server_display import ServerDisplay
from limbeck.teachers.wire import (
    CHAT,
    PLAIN,
    Again,
    Choice,
    Heard,
    Refused,
    cut,
    parameters,
    read_response,
    refusal,
    shares,
)

log = logging.getLogger(__name__)

AHEAD = 4
"""Questions that are worked on for each request that may be under way: a slow one at the head of
the line must not leave the others without work."""

HOPELESS = 8
"""Requests that a server refuses, with none accepted, before it is given up."""

FIRST_WAIT_SECONDS = 0.5
LONGEST_BACKOFF_SECONDS = 20.0
"""Where the server does not say how long to wait."""

TELL_SECONDS = 0.2
"""Between two looks at what is spent, to show it."""


class Server:
    """Answers questions over HTTP; see `core.exchange.Writer`.

    Args:
        spec: which server, and within which limits.
        display: whether progress is shown.
    """

    def __init__(self, spec: ServerTeacher, *, display: bool = True) -> None:
        self.spec, self.name = spec, spec.model
        self.account = f"{spec.url.rstrip('/')} {spec.model}"
        self.shown = ServerDisplay(spec, enabled=display)
        self.capabilities: Capabilities | None = None
        self._accepted = self._refused = 0
        self._open_requests = 0
        self._max_name = "max_tokens"
        self._stopping = False
        self._jitter = random.Random(self.account)  # when, not what: no answer depends on it

    def __enter__(self) -> Self:
        self._key = key_of(self.spec)
        self._client = make_client(self.spec, self._key)
        self._ledger = Ledger(Path(self.spec.ledger).expanduser()).__enter__()
        if stale := self._ledger.close_stale():
            log.info(
                "%s: %d requests of an earlier run ended without an answer that anybody knows;"
                " their worst case counts as spent",
                self.spec.ledger,
                stale,
            )
        self._loop = asyncio.new_event_loop()
        self._ended = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_forever, name="server", daemon=True)
        self._thread.start()
        self._pace = Pace(
            self.spec.requests_per_minute, self.spec.tokens_per_minute, self.spec.in_flight
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._emptied(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()
        self._ledger.close()
        self.shown.close()

    async def _emptied(self) -> None:
        """End what a consumer that left has not waited for, and close the client."""
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        await self._client.close()

    @property
    def totals(self) -> Totals:
        """What the account has asked for, and what it cost."""
        return self._ledger.totals(self.account)

    @property
    def spent_usd(self) -> float | None:
        """What the account has spent; None where a price is not known."""
        totals = self.totals
        return None if totals.unknown_usd_count and not totals.spent_usd else totals.spent_usd

    def answers(
        self, questions: Iterable[Question], sampling: Sampling, n: int = 1
    ) -> Iterator[Sequence[Reply]]:
        """For each question, in their order, its n replies.

        A question that could not be answered has replies that say why. It is asked again when the
        same is asked in another run.

        Raises:
            BudgetError: the next request could cost more than is left; those under way are waited
                for and recorded first.
            ServerError: the server does not work with us at all.
        """
        waiting = iter(questions)
        under_way: deque[Future[Sequence[Reply]]] = deque()
        told, totals = time.monotonic(), self.totals
        if self.capabilities is None:
            self.capabilities = self._probed()
        # What is there by now, such as a framework, is not searched for garbage meanwhile: each
        # search stops all requests for a fifth of a second.
        gc.freeze()
        try:
            while True:
                for question in islice(waiting, AHEAD * self.spec.in_flight - len(under_way)):
                    asked = self._question(question, sampling, n)
                    under_way.append(asyncio.run_coroutine_threadsafe(asked, self._loop))
                    self.shown.asked(n)
                if not under_way:
                    return
                replies = under_way.popleft().result()
                if not under_way or time.monotonic() > told + TELL_SECONDS:
                    told, totals = time.monotonic(), self.totals
                self.shown.answered(replies, self._pace, totals)
                yield replies
        except (LimbeckError, KeyboardInterrupt):
            self._settle(under_way)
            raise
        finally:
            gc.unfreeze()
            for future in under_way:
                future.cancel()

    def _settle(self, under_way: deque[Future[Any]]) -> None:
        """Wait for what has been sent, which is paid for; what has not been is not."""
        if self._open_requests:
            log.info("waiting for %d requests that are under way", self._open_requests)
        self._stopping = True
        self._loop.call_soon_threadsafe(self._ended.set)
        for future in under_way:
            try:
                future.result()
            except Exception as error:
                log.debug("ended while stopping: %s", error)
        under_way.clear()

    def _probed(self) -> Capabilities:
        path = Path(self.spec.ledger).expanduser().with_suffix(".capabilities.json")
        known = remembered(path, self.account)
        if known is not None:
            return known
        asking = probe(self.spec, self._ask_plainly, path, self.account)
        try:
            return asyncio.run_coroutine_threadsafe(asking, self._loop).result()
        except Refused as error:
            raise ServerError(self._no(error)) from None

    async def _ask_plainly(self, asked: Mapping[str, Any], n: int) -> Heard:
        """A request of the probe: through the ledger and the retries, but not kept as an answer.

        Raises:
            Refused: the server does not want it.
            Again: it failed after all attempts.
        """
        heard = await self._persistently(dict(asked), [], n, scored="logprobs" in asked)
        if isinstance(heard, str):
            raise Again(heard)
        return heard

    async def _question(self, question: Question, sampling: Sampling, n: int) -> Sequence[Reply]:
        """The n replies to a question: those that are known, and the rest asked for."""
        assert self.capabilities is not None
        self._max_name = self.capabilities.max_name
        asked = parameters(self.spec, question, sampling, max_name=self._max_name)
        hashed = {**asked, "seed": sampling.seed, "api": self.spec.api}
        hashed["max_tokens"] = hashed.pop(self._max_name)
        keys = [answer_key(self.spec.url, self.spec.model, hashed, index) for index in range(n)]
        known = self._ledger.known(keys)
        replies = {
            k: reply_of({**known[key], "index": k}, question.id)
            for k, key in enumerate(keys)
            if key in known
        }
        missing = [index for index in range(n) if index not in replies]
        self.shown.known(n - len(missing))
        together = [missing] if self.capabilities.n else [[index] for index in missing]
        for found in await asyncio.gather(
            *(self._indices(question, asked, sampling, keys, part) for part in together if part)
        ):
            replies |= found
        return [cut(replies[index], sampling.stop) for index in range(n)]

    async def _indices(
        self,
        question: Question,
        asked: Mapping[str, Any],
        sampling: Sampling,
        keys: Sequence[str],
        indices: Sequence[int],
    ) -> dict[int, Reply]:
        """Replies for some indices; a response with too few answers is completed by another."""
        assert self.capabilities is not None
        left, replies = list(indices), dict[int, Reply]()
        while left:
            sent = dict(asked)
            if self.capabilities.seed is not False:
                # By the first index, so that a second request does not draw the same again.
                sent["seed"] = stream_seed(sampling.seed, "request", left[0]) % 2**31
            wanted = [keys[index] for index in left]
            try:
                heard = await self._persistently(
                    sent, wanted, len(left), scored=sampling.scores is not None
                )
            except Refused as error:
                heard = self._no(error)
            if isinstance(heard, str):
                failed = {k: Reply(question=question.id, index=k, failure=heard) for k in left}
                return replies | failed
            found = self._replies(question.id, left, heard)
            replies |= found
            left = [index for index in left if index not in found]
        return replies

    def _replies(self, question: str, indices: Iterable[int], heard: Heard) -> dict[int, Reply]:
        """What was heard, as the replies of these indices."""
        count = len(heard.choices)
        tokens = shares(heard.completion_tokens, count)
        usd = cost_usd(self.spec.price, heard.prompt_tokens, heard.completion_tokens)

        def one(place: int, index: int, choice: Choice) -> Reply:
            return Reply(
                question=question,
                index=index,
                text=choice.text,
                finish=choice.finish,
                model=heard.model or self.spec.model,
                fingerprint=heard.fingerprint,
                prompt_tokens=heard.prompt_tokens,
                completion_tokens=tokens[place],
                usd=None if usd is None else usd / count,
                scores=choice.scores,
            )

        pairs = enumerate(zip(indices, heard.choices, strict=False))
        return {index: one(place, index, choice) for place, (index, choice) in pairs}

    async def _persistently(
        self, asked: dict[str, Any], keys: Sequence[str], n: int, *, scored: bool
    ) -> Heard | str:
        """Try until there is a good response; the last reason, if there is none.

        Raises:
            Refused, BudgetError, ServerError: see there.
        """
        from tenacity import AsyncRetrying, RetryError, retry_if_exception_type, stop_after_attempt

        patience = AsyncRetrying(
            retry=retry_if_exception_type(Again),
            stop=stop_after_attempt(self.spec.attempts),
            wait=self._wait,
            sleep=self._doze,
        )
        try:
            async for attempt in patience:
                with attempt:
                    try:
                        return await self._once(asked, keys, n, scored=scored)
                    except _Part as part:
                        return part.heard
        except RetryError as error:
            last: Any = error.last_attempt.exception()
            return f"{last.reason} ({self.spec.attempts} attempts)"
        raise AssertionError("unreachable")

    async def _doze(self, seconds: float) -> None:
        """Sleep, but not on when the run is stopping."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._ended.wait(), seconds)

    def _wait(self, state: Any) -> float:
        """As long as the server asks for; else longer each time, and never two in step."""
        error: Any = state.outcome.exception()
        number = state.attempt_number
        draw = self._jitter.random()
        asked = getattr(error, "wait_seconds", None)
        if asked is not None:
            return asked + draw * FIRST_WAIT_SECONDS
        return min(LONGEST_BACKOFF_SECONDS, FIRST_WAIT_SECONDS * 2 ** (number - 1)) * draw

    async def _once(
        self, asked: dict[str, Any], keys: Sequence[str], n: int, *, scored: bool
    ) -> Heard:
        """One request: recorded, sent, recorded.

        Raises:
            Again: it may be tried again; what it may have cost is recorded.
        """
        text = json.dumps(asked.get("messages", asked.get("prompt")), ensure_ascii=False)
        prompt = prompt_tokens_upper([text])
        longest = int(asked.get(self._max_name) or asked.get("max_tokens") or 0)
        reserve = worst_case_usd(self.spec.price, prompt, longest, n)
        if n > 1 or (self.capabilities is not None and self.capabilities.n):
            asked = {**asked, "n": n}
        async with (
            self._pace.slot(prompt + longest * n),
            self._recorded(keys, asked, reserve) as end,
        ):
            heard = await self._sent(asked, n, scored=scored)
            await end(heard)
            return heard

    @asynccontextmanager
    async def _recorded(
        self, keys: Sequence[str], asked: Mapping[str, Any], reserve: float | None
    ) -> AsyncIterator[Any]:
        """The request's place in the ledger, from before it is sent to its end."""
        number = await self._begun(keys, asked, reserve)
        self._open_requests += 1

        async def end(heard: Heard) -> None:
            usd = cost_usd(self.spec.price, heard.prompt_tokens, heard.completion_tokens)
            replies = self._replies("", range(len(keys)), heard).values()
            payloads = dict(zip(keys, map(payload_of, replies), strict=False))
            tokens = (heard.prompt_tokens, heard.completion_tokens)
            await self._ledger.afinish(number, payloads, usd, *tokens)
            self._pace.fine()
            self._accepted += 1

        try:
            yield end
        except Again as error:
            if error.crowded:
                self._pace.too_much(error.wait_seconds)
            self.shown.failed(error.reason)
            if error.heard is not None and error.heard.choices:
                await end(error.heard)  # what came is kept, and the rest asked for
                raise _Part(error.heard) from error
            await self._ledger.afail(number, error.reason, None if error.billed else 0.0)
            raise
        except Refused as error:
            await self._ledger.afail(number, error.reason, 0.0)
            raise
        except asyncio.CancelledError:
            await self._ledger.afail(number, "it was cancelled", None)
            raise
        finally:
            self._open_requests -= 1

    async def _begun(
        self, keys: Sequence[str], asked: Mapping[str, Any], reserve: float | None
    ) -> int:
        """The ledger's number; where the budget seems used up, wait for what is under way.

        What is reserved for the others is their worst case: it mostly comes back.
        """
        while True:
            if self._stopping:
                raise Refused(0, "the run is stopping")
            try:
                return await self._ledger.abegin(
                    keys, asked, reserve, self.account, self.spec.budget_usd
                )
            except BudgetError:
                if not self._open_requests:
                    raise
                await asyncio.sleep(0.02)

    async def _sent(self, asked: dict[str, Any], n: int, *, scored: bool) -> Heard:
        path = CHAT if self.spec.api == "chat" else PLAIN
        return read_response(await self._posted(path, asked), self.spec.api, n, scored=scored)

    async def _posted(self, path: str, asked: Mapping[str, Any]) -> bytes:
        """The body of an answer with status 200.

        Raises:
            Again, Refused: there is none.
        """
        import openai

        httpx = transport()
        try:
            response: Any = await self._client.post(
                path, body=asked, cast_to=httpx.Response, options={"max_retries": 0}
            )
        except openai.APITimeoutError:
            raise Again(f"no answer in {self.spec.timeout_seconds:g} s") from None
        except openai.APIConnectionError as error:
            unsent = isinstance(error.__cause__, httpx.ConnectError)
            raise Again(f"the connection failed: {self._plain(error)}", billed=not unsent) from None
        except openai.APIStatusError as error:
            body, headers = error.response.content, dict(error.response.headers)
            raise self._without_key(refusal(error.status_code, body, headers)) from None
        return response.content

    def _no(self, error: Refused) -> str:
        """Why one request was refused; or that all are.

        Raises:
            ServerError: no request has a chance.
        """
        variable = self.spec.key_variable
        if error.status in (401, 403):
            raise ServerError(
                f"{self.spec.url} refuses the key ({error.reason}): set the environment variable"
                f" {variable} to a key that may use {self.spec.model}"
            )
        if error.status == 404:
            raise ServerError(
                f"{self.spec.url} has no model {self.spec.model!r}, or no such API"
                f" ({error.reason}); check `url`, `model` and `api`"
            )
        if "insufficient_quota" in error.code or error.status == 402:
            raise ServerError(
                f"{self.spec.url}: the account has no money left ({error.reason}); what was"
                " answered is kept, so start again when it has"
            )
        self._refused += 1
        if not self._accepted and self._refused >= HOPELESS:
            raise ServerError(
                f"{self.spec.url} refused the first {HOPELESS} requests, the last with"
                f" {error.reason}"
            )
        return error.reason

    def _plain(self, error: BaseException) -> str:
        cause = error.__cause__ or error
        return self._hidden(" ".join(f"{type(cause).__name__} {cause}".split())[:200])

    def _without_key(self, error: Again | Refused) -> Again | Refused:
        error.reason = self._hidden(error.reason)
        error.args = (error.reason,)
        return error

    def _hidden(self, text: str) -> str:
        """A server may repeat the key in what it says."""
        return text.replace(self._key, "***") if len(self._key) > 4 else text


class _Part(Exception):
    """A response with too few answers, of which those that came are recorded."""

    def __init__(self, heard: Heard) -> None:
        super().__init__("too few answers")
        self.heard = heard
