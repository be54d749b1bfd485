"""The mock's HTTP: a small server on this machine alone, which can break what it sends."""

import asyncio
import hashlib
import json
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

from limbeck.core.errors import RecipeError
from limbeck.core.exchange import Reply
from limbeck.core.specs import TokenPrice
from limbeck.ledger.money import cost_usd
from limbeck.teachers.mock.api import NAME, parsed, response
from limbeck.teachers.mock.faults import SILENT, STATUSES, Faults, patience, spoilt
from limbeck.teachers.mock.minds import Asked, Bad, Canned, OfFunction, OfWriter, Token

LARGEST_BODY = 16 * 2**20
PATHS = ("/v1/chat/completions", "/v1/completions")
THREADS = 64
"""Requests that wait for a model at the same time."""


class MockTeacher:
    """An OpenAI-compatible server on 127.0.0.1, in a thread of its own.

    Args:
        mind: what answers: None for canned words, a writer, a mind, or a function of what is asked.
        faults: how it misbehaves.
        port: 0 takes a free one.
        latency_seconds: before each answer.
        key: a request without it gets 401.
        requests_per_minute: more get 429.
        log_path: every request is also written there, as a line of JSON.

    Attributes:
        requests: what came and what was done with it, in order.
    """

    def __init__(
        self,
        mind: Any = None,
        *,
        faults: Faults | None = None,
        port: int = 0,
        latency_seconds: float = 0.0,
        key: str | None = None,
        requests_per_minute: int | None = None,
        log_path: Path | None = None,
    ) -> None:
        self.mind, self._own_mind = as_mind(mind)
        self.faults = faults or Faults()
        self.port, self.latency, self.key = port, latency_seconds, key
        self.limit = requests_per_minute
        self.requests: list[dict[str, Any]] = []
        self._log = log_path.open("a", encoding="utf-8") if log_path else None
        self._started: deque[float] = deque()
        self._attempts: Counter[str] = Counter()
        self._server: Any = None
        # A model's mind makes its callers wait; canned words need no thread.
        slow = not isinstance(self.mind, Canned)
        self._threads = ThreadPoolExecutor(THREADS, "mock-mind") if slow else None

    @property
    def url(self) -> str:
        """The base of the API."""
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def billed(self) -> list[dict[str, Any]]:
        """What a provider would bill: all that was processed, received or not."""
        return [request for request in self.requests if request["billed_choices"]]

    def billed_usd(self, price: TokenPrice) -> float:
        """The bill."""
        costs = [cost_usd(price, r["prompt_tokens"], r["completion_tokens"]) for r in self.billed]
        return sum(cost or 0.0 for cost in costs)

    def __enter__(self) -> Self:
        if find_spec("h11") is None:
            raise RecipeError("mock-teacher", "needs one more package: pip install 'limbeck[api]'")
        ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        failed: list[OSError] = []

        async def start() -> None:
            try:
                self._server = await asyncio.start_server(
                    self._serve, "127.0.0.1", self.port, backlog=1024
                )
                self.port = self._server.sockets[0].getsockname()[1]
            except OSError as error:
                failed.append(error)
            ready.set()

        def work() -> None:
            asyncio.set_event_loop(self._loop)
            self._loop.create_task(start())
            self._loop.run_forever()

        self._thread = threading.Thread(target=work, name="mock", daemon=True)
        self._thread.start()
        ready.wait()
        if failed:
            self._end()
            raise RecipeError("--port", f"port {self.port} cannot be used: {failed[0].strerror}")
        return self

    def __exit__(self, *_: object) -> None:
        async def stop() -> None:
            self._server.close()
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(stop(), self._loop).result(10)
        self._end()

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)
        if self._own_mind:
            self.mind.close()
        if self._log:
            self._log.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, for as many requests as it brings."""
        import h11

        connection = h11.Connection(h11.SERVER)
        try:
            while True:
                request, body = await _next_request(connection, reader, writer)
                if request is None:
                    return
                if not await self._respond(connection, writer, request, body):
                    return
                connection.start_next_cycle()
        except (h11.RemoteProtocolError, ConnectionError, asyncio.CancelledError):
            return
        finally:
            writer.close()

    async def _respond(
        self, connection: Any, writer: asyncio.StreamWriter, request: Any, body: bytes
    ) -> bool:
        """Answer one request; whether the connection can go on."""
        path = request.target.decode().partition("?")[0]
        headers = {name.decode().lower(): value.decode() for name, value in request.headers}
        asks = request.method == b"POST"
        entry: dict[str, Any] = {
            "number": len(self.requests),
            "path": path,
            "body": _json(body),
            "headers": {k: v for k, v in headers.items() if k != "authorization"},
            "fault": None,
            "form": 0,
            "status": 200,
            "billed_choices": 0,
            "prompt_tokens": 0,
            "completion_tokens": 0,
        }
        if asks:
            self._draw(entry, body)
            self.requests.append(entry)
        more: dict[str, str] = {}
        try:
            said = await self._said(path, headers, entry)
        except Bad as error:
            entry["status"], said = error.status, error.body
            if error.status == 429:
                more = {"retry-after": "1"}
        except Exception as error:  # a mind may fail as a real engine may
            bad = Bad(500, f"the mind failed: {type(error).__name__}: {error}", "server_error")
            entry["status"], said = bad.status, bad.body
        if entry["status"] != 200 and entry["fault"] != str(entry["status"]):
            entry["fault"] = None  # what is refused anyway has no answer to spoil
        if entry["fault"] in ("429", "503"):
            more = patience(entry["form"])
        if asks and self._log:
            self._log.write(json.dumps(entry) + "\n")
            self._log.flush()
        return await self._send(connection, writer, entry, said, more)

    def _draw(self, entry: dict[str, Any], body: bytes) -> None:
        """What will go wrong with this request: by what it says, and how often it came."""
        mark = hashlib.sha256(body).hexdigest()
        attempt = self._attempts[mark]
        self._attempts[mark] += 1
        entry["fault"] = self.faults.draw(mark, attempt)
        entry["form"] = self.faults.form(mark, attempt, 4)

    async def _said(self, path: str, headers: Mapping[str, str], entry: dict[str, Any]) -> Any:
        """The body of the answer.

        Raises:
            Bad: the request is refused.
        """
        if path == "/health":
            return {"status": "ok"}
        if self.key is not None and headers.get("authorization") != f"Bearer {self.key}":
            raise Bad(401, "Incorrect API key provided", "invalid_api_key")
        if path == "/v1/models":
            return {"object": "list", "data": [{"id": NAME, "object": "model"}]}
        if path not in PATHS:
            raise Bad(404, f"no such path: {path}", "not_found")
        fault = entry["fault"]
        if fault in STATUSES:
            raise Bad(int(fault), "try again", "server_error")
        if fault == "reset_before":
            return None
        chat = path == PATHS[0]
        self._within_limit()
        asked = parsed(entry["body"], chat=chat)
        if self.latency:
            await asyncio.sleep(self.latency)
        replies, tokens = await self._thought(asked)
        self._bill(entry, replies, tokens)
        if fault == "timeout":
            await asyncio.sleep(self.faults.hold_seconds)
        said = response(asked, replies, tokens, entry, chat=chat)
        return spoilt(said, fault, entry["form"])

    async def _thought(self, asked: Asked) -> tuple[Sequence[Reply], Sequence[Token] | None]:
        """The mind's replies, and the prompt's tokens where they are asked for."""
        tokens = None
        if asked.reading is not None:
            if not getattr(self.mind, "reads", False):
                raise Bad(400, "this mock has no model that reads a prompt; give it one")
            tokens = await self._in_thread(self.mind.read, asked)
        if asked.sampling.max_tokens == 0:  # only the prompt
            return [Reply(question="", index=k, finish="length") for k in range(asked.n)], tokens
        if self._threads is None:
            return self.mind.answer(asked), tokens
        return await self._in_thread(self.mind.answer, asked), tokens

    async def _in_thread(self, work: Any, asked: Asked) -> Any:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, work, asked)

    def _bill(
        self, entry: dict[str, Any], replies: Sequence[Reply], tokens: Sequence[Token] | None
    ) -> None:
        written = sum(reply.completion_tokens or 0 for reply in replies)
        read = (replies[0].prompt_tokens or 0) if replies else 0
        entry["billed_choices"] = len(replies)
        entry["prompt_tokens"] = read if tokens is None else len(tokens)
        entry["completion_tokens"] = math.ceil(written * self.faults.overcharge)

    def _within_limit(self) -> None:
        if self.limit is None:
            return
        now = time.monotonic()
        while self._started and now - self._started[0] >= 60:
            self._started.popleft()
        if len(self._started) >= self.limit:
            raise Bad(429, f"more than {self.limit} requests a minute", "rate_limit_exceeded")
        self._started.append(now)

    async def _send(
        self,
        connection: Any,
        writer: asyncio.StreamWriter,
        entry: Mapping[str, Any],
        said: Any,
        more: Mapping[str, str],
    ) -> bool:
        """Send it, whole or not; whether the connection can go on."""
        import h11

        fault = entry["fault"]
        if fault in SILENT:
            writer.transport.abort()
            return False
        body = b"" if fault == "empty" else json.dumps(said).encode()
        if fault == "bad_json":
            body = body[:-2] + b"]"
        length = len(body) + (100 if fault == "cut" else 0)
        named = {"content-type": "application/json", "content-length": str(length), **more}
        headers = [(name.encode(), value.encode()) for name, value in named.items()]
        head = connection.send(h11.Response(status_code=entry["status"], headers=headers))
        if fault == "cut":
            writer.write(head + body[: len(body) // 2])
            await writer.drain()
            writer.close()  # orderly: the client sees half a body, and its end
            return False
        writer.write(head + connection.send(h11.Data(data=body)))
        writer.write(connection.send(h11.EndOfMessage()) or b"")
        await writer.drain()
        return connection.our_state is h11.DONE and connection.their_state is h11.DONE


def as_mind(mind: Any) -> tuple[Any, bool]:
    """Something that answers, made of what was given; and whether it was made here."""
    if mind is None:
        return Canned(), False
    if hasattr(mind, "answers"):
        return OfWriter(mind), True
    return (mind, False) if hasattr(mind, "answer") else (OfFunction(mind), False)


async def _next_request(
    connection: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> tuple[Any, bytes]:
    """A request and its body; None at the connection's end."""
    import h11

    request, body = None, bytearray()
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            if connection.they_are_waiting_for_100_continue:
                go_on = h11.InformationalResponse(status_code=100, headers=[])
                writer.write(connection.send(go_on))
            connection.receive_data(await reader.read(2**16))
        elif isinstance(event, h11.Request):
            request = event
        elif isinstance(event, h11.Data):
            body += event.data
            if len(body) > LARGEST_BODY:
                raise h11.RemoteProtocolError("the body is too large")
        elif isinstance(event, h11.EndOfMessage):
            return request, bytes(body)
        else:
            return None, b""


def _json(body: bytes) -> Any:
    try:
        return json.loads(body) if body else None
    except (ValueError, RecursionError):
        return None
