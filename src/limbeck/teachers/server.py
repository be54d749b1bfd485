"""A teacher behind an OpenAI-compatible API, with every request accounted for.

Outside it is an ordinary iterator; inside, an event loop in a thread of its own has many requests
under way. A request is in the ledger before it is sent, and its answers before they are handed out.
There is one layer that tries again, and it is this one: the client's own is off.
"""

import asyncio
import gc
import json
import logging
import random
import threading
import time
from collections import deque
from collections.abc import Coroutine, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AsyncExitStack
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar
from weakref import WeakValueDictionary

from limbeck.core.errors import BudgetError, LimbeckError, ServerError
from limbeck.core.exchange import Question, Reply
from limbeck.core.random import stream_seed
from limbeck.core.specs import ServerTeacher
from limbeck.core.text import is_whole
from limbeck.core.types import Sampling
from limbeck.ledger.keys import answer_key
from limbeck.ledger.money import cost_usd, prompt_tokens_upper, worst_case_usd
from limbeck.ledger.pace import Pace
from limbeck.ledger.store import Ledger, Totals
from limbeck.teachers.client import Client
from limbeck.teachers.probe import Capabilities, account_of, probe, remembered
from limbeck.teachers.recorded import payload_of, reply_of
from limbeck.teachers.server_display import ServerDisplay
from limbeck.teachers.wire import (
    CHAT,
    PLAIN,
    Again,
    Heard,
    Refused,
    cut,
    parameters,
    read_response,
    replies_of,
    written_out,
)

log = logging.getLogger(__name__)

Found = TypeVar("Found")

AHEAD = 4
"""Questions that are worked on for each request that may be under way: a slow one at the head of
the line must not leave the others without work."""

HOPELESS = 8
"""Requests that a server refuses, with none accepted, before it is given up."""

HALF = "the question holds half a character, which cannot be sent"

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
        stopping: set when one of several servers stops, so that none of them sends more.
    """

    def __init__(
        self, spec: ServerTeacher, *, display: bool = True, stopping: threading.Event | None = None
    ) -> None:
        self.spec, self.name = spec, spec.model
        self.account = account_of(spec)
        self.shown = ServerDisplay(spec, enabled=display)
        self.capabilities: Capabilities | None = None
        self._accepted = self._refused = 0
        self._asking = WeakValueDictionary[str, asyncio.Lock]()
        self._sending = set[asyncio.Task[Heard]]()
        self._max_name = "max_tokens"
        self._stopping = stopping or threading.Event()
        self._jitter = random.Random(self.account)  # when, not what: no answer depends on it

    def __enter__(self) -> Self:
        self._client = Client(self.spec)
        self._ledger = Ledger(Path(self.spec.ledger).expanduser()).__enter__()
        if stale := self._ledger.close_stale():
            log.info(
                "%s: %d requests of an earlier run ended without an answer that anybody knows;"
                " their worst case counts as spent",
                self.spec.ledger,
                stale,
            )
        self._loop = asyncio.new_event_loop()
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
        # Ctrl-C while others were waited for: these are not to be waited for either.
        again = isinstance(error, KeyboardInterrupt) and isinstance(
            error.__context__, KeyboardInterrupt | LimbeckError
        )
        self._stop()
        try:
            self._run(self._emptied(patient=not again)).result()
        except KeyboardInterrupt:
            self._run(self._emptied(patient=False)).result(10)
            raise
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(10)
            self._loop.close()
            self._ledger.close()
            self.shown.close()

    async def _emptied(self, *, patient: bool) -> None:
        """Wait for what has been sent, end what has not, and close the client."""
        if patient:
            await self._settled()
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
                    under_way.append(self._run(self._question(question, sampling, n)))
                    self.shown.asked(n)
                if not under_way:
                    return
                replies = under_way[0].result()
                under_way.popleft()
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

    def _run(self, work: Coroutine[Any, Any, Found]) -> Future[Found]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _stop(self) -> None:
        """Send nothing more."""
        self._stopping.set()
        if self._sending:
            log.info(
                "waiting for %d requests that are under way; Ctrl-C gives them up",
                len(self._sending),
            )

    def _settle(self, under_way: Iterable[Future[Any]]) -> None:
        """Wait for what has been sent, which is paid for; what has not been is not."""
        self._stop()
        self._run(self._settled()).result()
        for future in under_way:
            future.cancel()
        self._run(self._settled()).result()  # what was being recorded, to be sent, meanwhile

    async def _settled(self) -> None:
        while self._sending:
            await asyncio.wait(self._sending)

    def _probed(self) -> Capabilities:
        known = remembered(self.spec)
        if known is not None:
            return known
        try:
            return self._run(probe(self.spec, self._ask_plainly)).result()
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
        """The n replies to a question."""
        assert self.capabilities is not None
        if not all(map(is_whole, (question.prefix, *(turn.text for turn in question.prompt)))):
            return [Reply(question=question.id, index=k, failure=HALF) for k in range(n)]
        self._max_name = self.capabilities.max_name
        asked = parameters(self.spec, question, sampling, max_name=self._max_name)
        hashed = {**asked, "seed": sampling.seed, "api": self.spec.api}
        hashed["max_tokens"] = hashed.pop(self._max_name)
        keys = [answer_key(self.spec.url, self.spec.model, hashed, index) for index in range(n)]
        async with self._alone(keys[0]):
            replies = await self._completed(question, asked, sampling, keys)
        return [cut(replies[index], sampling.stop) for index in range(n)]

    def _alone(self, key: str) -> asyncio.Lock:
        """Held while an answer is asked for: whoever wants the same one then finds it known."""
        return self._asking.setdefault(key, asyncio.Lock())

    async def _completed(
        self,
        question: Question,
        asked: Mapping[str, Any],
        sampling: Sampling,
        keys: Sequence[str],
    ) -> dict[int, Reply]:
        """Replies for all keys: those that are known, and the rest asked for."""
        assert self.capabilities is not None
        known = self._ledger.known(keys)
        replies = {
            k: reply_of({**known[key], "index": k}, question.id)
            for k, key in enumerate(keys)
            if key in known
        }
        self._accepted += len(replies)  # the server took them, if in an earlier run
        missing = [index for index in range(len(keys)) if index not in replies]
        self.shown.known(len(replies))
        together = [missing] if self.capabilities.n else [[index] for index in missing]
        for found in await asyncio.gather(
            *(self._indices(question, asked, sampling, keys, part) for part in together if part)
        ):
            replies |= found
        return replies

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
            found = replies_of(heard, self.spec, question.id, left)
            replies |= found
            left = [index for index in left if index not in found]
        return replies

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
            sleep=asyncio.sleep,
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
        """One request: recorded, sent, recorded; all that is sent is, whoever stops to wait for it.

        Raises:
            Again: it may be tried again; what it may have cost is recorded.
        """
        text = json.dumps(asked.get("messages", asked.get("prompt")), ensure_ascii=False)
        prompt = prompt_tokens_upper([text, *written_out(self.spec.extra)])
        longest = int(asked.get(self._max_name) or asked.get("max_tokens") or 0)
        reserve = worst_case_usd(self.spec.price, prompt, longest, n)
        if n > 1 or (self.capabilities is not None and self.capabilities.n):
            asked = {**asked, "n": n}
        async with AsyncExitStack() as slot:
            await slot.enter_async_context(self._pace.slot(prompt + longest * n))
            number = await self._begun(keys, asked, reserve)
            sending = self._send(number, keys, asked, n, slot.pop_all(), scored=scored)
            task = asyncio.create_task(sending)
            self._sending.add(task)
            task.add_done_callback(self._ended)
        return await asyncio.shield(task)

    def _ended(self, task: asyncio.Task[Heard]) -> None:
        self._sending.discard(task)
        if not task.cancelled():
            task.exception()  # nobody may be left to look at it, which asyncio would complain of

    async def _send(
        self,
        number: int,
        keys: Sequence[str],
        asked: dict[str, Any],
        n: int,
        slot: AsyncExitStack,
        *,
        scored: bool,
    ) -> Heard:
        """Send a request that has its number and its slot, and record how it ended.

        Raises:
            Again, Refused: as recorded.
        """
        async with slot:
            try:
                heard = await self._sent(asked, n, scored=scored)
                await self._kept(number, keys, heard)
                return heard
            except Again as error:
                self._client.hide_key(error)
                if error.crowded:
                    self._pace.too_much(error.wait_seconds)
                self.shown.failed(error.reason)
                if error.heard is not None and error.heard.choices:
                    # What came is kept, and the rest asked for.
                    await self._kept(number, keys, error.heard)
                    raise _Part(error.heard) from error
                await self._ledger.afail(number, error.reason, None if error.billed else 0.0)
                raise
            except Refused as error:
                self._client.hide_key(error)
                await self._ledger.afail(number, error.reason, 0.0)
                raise
            except asyncio.CancelledError:
                await self._ledger.afail(number, "it was cancelled", None)
                raise

    async def _kept(self, number: int, keys: Sequence[str], heard: Heard) -> None:
        """Record what was heard, and what it cost."""
        usd = cost_usd(self.spec.price, heard.prompt_tokens, heard.completion_tokens)
        replies = replies_of(heard, self.spec, "", range(len(keys))).values()
        payloads = dict(zip(keys, map(payload_of, replies), strict=False))
        tokens = (heard.prompt_tokens, heard.completion_tokens)
        await self._ledger.afinish(number, payloads, usd, *tokens)
        self._pace.fine()
        self._accepted += 1

    async def _begun(
        self, keys: Sequence[str], asked: Mapping[str, Any], reserve: float | None
    ) -> int:
        """The ledger's number; where the budget seems used up, wait for what is under way.

        What is reserved for the others is their worst case: it mostly comes back.
        """
        while True:
            if self._stopping.is_set():
                raise Refused(0, "the run is stopping")
            try:
                return await self._ledger.abegin(
                    keys, asked, reserve, self.account, self.spec.budget_usd
                )
            except BudgetError:
                if not self._sending:
                    raise
                await asyncio.sleep(0.02)

    async def _sent(self, asked: dict[str, Any], n: int, *, scored: bool) -> Heard:
        path = CHAT if self.spec.api == "chat" else PLAIN
        body = await self._client.post(path, asked)
        return read_response(body, self.spec.api, n, scored=scored)

    def _no(self, error: Refused) -> str:
        """Why one request was refused; or that all are.

        Raises:
            ServerError: no request has a chance.
        """
        variable = self.spec.key_variable
        # Some servers answer so where they do not like one prompt.
        flagged = error.status == 403 and self._accepted
        if error.status in (401, 403) and not flagged:
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


class _Part(Exception):
    """A response with too few answers, of which those that came are recorded."""

    def __init__(self, heard: Heard) -> None:
        super().__init__("too few answers")
        self.heard = heard
