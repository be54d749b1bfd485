"""The mock's HTTP: a small server on this machine alone, which can break what it sends."""

import asyncio
import json
import math
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from limbeck.core.errors import RecipeError
from limbeck.core.exchange import Reply, Writer
from limbeck.core.specs import TokenPrice
from limbeck.core.types import Sampling, Turn
from limbeck.ledger.money import cost_usd
from limbeck.teachers.mock.faults import NOT_PROCESSED, Faults, Kind
from limbeck.teachers.mock.minds import Asked, Canned, Mind, OfWriter

LARGEST_BODY = 16 * 2**20
MOST_CHOICES = 128
NAME, FINGERPRINT = "mock-1", "fp_mock"


class Bad(Exception):
    """A request that is refused."""

    def __init__(self, status: int, message: str, code: str = "invalid_request_error") -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


class MockTeacher:
    """An OpenAI-compatible server on 127.0.0.1, in a thread of its own.

    Args:
        mind: what answers: None for canned words, a writer, or another mind.
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
        mind: Mind | Writer | None = None,
        *,
        faults: Faults | None = None,
        port: int = 0,
        latency_seconds: float = 0.0,
        key: str | None = None,
        requests_per_minute: int | None = None,
        log_path: Path | None = None,
    ) -> None:
        is_writer = mind is not None and hasattr(mind, "answers")
        self.mind: Any = Canned() if mind is None else OfWriter(mind) if is_writer else mind  # pyright: ignore
        self.faults = faults or Faults()
        self.port, self.latency, self.key = port, latency_seconds, key
        self.limit = requests_per_minute
        self.requests: list[dict[str, Any]] = []
        self._log = log_path.open("a", encoding="utf-8") if log_path else None
        self._started: list[float] = []
        self._server: Any = None
        # A model's mind makes its callers wait; canned words need no thread.
        self._threads = ThreadPoolExecutor(64) if isinstance(self.mind, OfWriter) else None

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
            raise RecipeError("--port", f"port {self.port} cannot be used: {failed[0].strerror}")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        async def stop() -> None:
            self._server.close()
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()

        asyncio.run_coroutine_threadsafe(stop(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()
        if self._log:
            self._log.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, for as many requests as it brings."""
        import h11

        connection = h11.Connection(h11.SERVER)
        try:
            while True:
                request, body = await _next_request(connection, reader)
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
        number = len(self.requests)
        asks = request.method == b"POST"
        fault = self.faults.draw(number) if asks else None
        entry: dict[str, Any] = {
            "number": number,
            "path": path,
            "body": _parsed(body),
            "headers": {k: v for k, v in headers.items() if k != "authorization"},
            "fault": fault,
            "status": 200,
            "billed_choices": 0,
            "prompt_tokens": 0,
            "completion_tokens": 0,
        }
        if asks:
            self.requests.append(entry)
        try:
            said, more = await self._said(path, headers, entry)
        except Bad as error:
            entry["status"] = error.status
            said = {"error": {"message": error.message, "type": error.code, "code": error.code}}
            more = {"retry-after": "1"} if error.status == 429 else {}
        if asks and self._log:
            self._log.write(json.dumps(entry) + "\n")
            self._log.flush()
        return await self._send(connection, writer, entry, said, more)

    async def _said(
        self, path: str, headers: Mapping[str, str], entry: dict[str, Any]
    ) -> tuple[Any, dict[str, str]]:
        """The body of the answer, and more headers."""
        if path == "/health":
            return {"status": "ok"}, {}
        if self.key is not None and headers.get("authorization") != f"Bearer {self.key}":
            raise Bad(401, "Incorrect API key provided", "invalid_api_key")
        if path == "/v1/models":
            return {"object": "list", "data": [{"id": NAME, "object": "model"}]}, {}
        if path not in ("/v1/chat/completions", "/v1/completions"):
            raise Bad(404, f"no such path: {path}", "not_found")
        fault: Kind | None = entry["fault"]
        if fault in ("429", "500", "502", "503"):
            return self._broken(fault, entry)
        if fault in NOT_PROCESSED:
            return None, {}
        self._within_limit()
        chat = path.endswith("/chat/completions")
        asked, scores = parsed(entry["body"], chat=chat)
        if self.latency:
            await asyncio.sleep(self.latency)
        if self._threads is not None:
            loop = asyncio.get_running_loop()
            replies = await loop.run_in_executor(self._threads, self.mind.answer, asked)
        else:
            replies = self.mind.answer(asked)
        written = sum(reply.completion_tokens or 0 for reply in replies)
        entry["billed_choices"] = len(replies)
        entry["prompt_tokens"] = replies[0].prompt_tokens or 0
        entry["completion_tokens"] = math.ceil(written * self.faults.overcharge)
        if fault == "timeout":
            await asyncio.sleep(self.faults.hold_seconds)
        return _spoilt(response(replies, entry, chat=chat, scores=scores), fault, chat), {}

    def _broken(self, fault: str, entry: dict[str, Any]) -> tuple[Any, dict[str, str]]:
        entry["status"] = int(fault)
        forms = (
            {"retry-after": "0"},
            {"retry-after": formatdate(time.time(), usegmt=True)},
            {"retry-after-ms": "20"},
            {},
        )
        more = forms[entry["number"] % len(forms)] if fault in ("429", "503") else {}
        return {"error": {"message": "try again", "type": "server_error", "code": None}}, more

    def _within_limit(self) -> None:
        if self.limit is None:
            return
        now = time.monotonic()
        self._started = [start for start in self._started if now - start < 60]
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
        import h11

        fault = entry["fault"] if entry["status"] == 200 or entry["status"] >= 429 else None
        if fault in ("reset_before", "reset_after", "timeout"):
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
            writer.transport.abort()
            return False
        writer.write(head + connection.send(h11.Data(data=body)))
        writer.write(connection.send(h11.EndOfMessage()) or b"")
        await writer.drain()
        return connection.our_state is h11.DONE and connection.their_state is h11.DONE


async def _next_request(connection: Any, reader: asyncio.StreamReader) -> tuple[Any, bytes]:
    """A request and its body; None at the connection's end."""
    import h11

    request, body = None, bytearray()
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
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


def _parsed(body: bytes) -> Any:
    try:
        return json.loads(body) if body else None
    except (ValueError, RecursionError):
        return None


def parsed(body: Any, *, chat: bool) -> tuple[Asked, int | None]:
    """A request's body, checked, and how many likeliest tokens it asks for.

    Raises:
        Bad: something is missing, of the wrong type or out of range.
    """
    if not isinstance(body, dict):
        raise Bad(400, "the body is not a JSON object")
    if not isinstance(body.get("model"), str):
        raise Bad(400, "`model` is missing")
    prefix = ""
    if chat:
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages:
            raise Bad(400, "`messages` is missing or empty")
        turns = tuple(_turn(message) for message in messages)
        if body.get("continue_final_message") and turns[-1].role == "assistant":
            prefix, turns = turns[-1].text, turns[:-1]
    else:
        if not isinstance(body.get("prompt"), str):
            raise Bad(400, "`prompt` is not text")
        turns = (Turn(text=body["prompt"]),)
    n = _number(body, "n", 1, 1, MOST_CHOICES, whole=True)
    longest = body.get("max_completion_tokens", body.get("max_tokens", 16))
    most = _number({"max_tokens": longest}, "max_tokens", 16, 1, 2**20, whole=True)
    scores: int | None = None
    if chat and body.get("logprobs"):
        scores = int(_number(body, "top_logprobs", 0, 0, 20, whole=True))
    elif not chat and body.get("logprobs") is not None:
        scores = int(_number(body, "logprobs", 0, 0, 20, whole=True))
    stop = body.get("stop") or ()
    seed = body.get("seed")
    sampling = Sampling(
        max_tokens=int(most),
        temperature=_number(body, "temperature", 1.0, 0, 2),
        top_p=_number(body, "top_p", 1.0, 0, 1),
        seed=seed if isinstance(seed, int) else 0,
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        scores=scores,
    )
    seeded = isinstance(seed, int)
    return Asked(prompt=turns, prefix=prefix, sampling=sampling, n=int(n), seeded=seeded), scores


def _turn(message: Any) -> Turn:
    if not isinstance(message, dict) or not isinstance(message.get("content"), str):
        raise Bad(400, "a message has no text `content`")
    role = message.get("role")
    if role not in ("system", "user", "assistant", "developer", "tool"):
        raise Bad(400, f"no role {role!r}")
    return Turn(text=message["content"], role=role)


def _number(
    body: Mapping[str, Any],
    name: str,
    default: float,
    low: float,
    high: float,
    *,
    whole: bool = False,
) -> float:
    value = body.get(name)
    if value is None:
        return default
    known = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    if not known or not low <= value <= high:
        raise Bad(400, f"`{name}` is {value!r}; it must be from {low} to {high}")
    return value


def response(
    replies: list[Reply], entry: Mapping[str, Any], *, chat: bool, scores: int | None
) -> dict[str, Any]:
    """The answer in the API's form."""
    choices: list[dict[str, Any]] = []
    for place, reply in enumerate(replies):
        logprobs = None if scores is None else _logprobs(reply, chat)
        text = {"role": "assistant", "content": reply.text} if chat else reply.text
        choices.append(
            {
                "index": place,
                "message" if chat else "text": text,
                "finish_reason": reply.finish,
                "logprobs": logprobs,
            }
        )
    used = {
        "prompt_tokens": entry["prompt_tokens"],
        "completion_tokens": entry["completion_tokens"],
    }
    return {
        "id": f"mock-{entry['number']}",
        "object": "chat.completion" if chat else "text_completion",
        "created": 0,
        "model": NAME,
        "system_fingerprint": FINGERPRINT,
        "choices": choices,
        "usage": {**used, "total_tokens": sum(used.values())},
    }


def _logprobs(reply: Reply, chat: bool) -> dict[str, Any]:
    scores = reply.scores or ()
    if chat:
        rows = [
            {
                "token": score.text,
                "logprob": score.logp,
                "top_logprobs": [{"token": t, "logprob": v} for t, v in score.top],
            }
            for score in scores
        ]
        return {"content": rows}
    return {
        "tokens": [score.text for score in scores],
        "token_logprobs": [score.logp for score in scores],
        "top_logprobs": [dict(score.top) for score in scores],
    }


def _spoilt(said: dict[str, Any], fault: Kind | None, chat: bool) -> Any:
    """The answer as a fault leaves it."""
    if fault == "no_choices":
        return {**said, "choices": []}
    if fault == "error_200":
        return {"error": {"message": "the engine is gone", "code": 500}}
    choices = said["choices"]
    if fault == "wrong_count":
        more = len(choices) == 1
        return {**said, "choices": choices * 2 if more else choices[:-1]}
    for choice in choices:
        if fault == "no_finish":
            choice["finish_reason"] = None
        elif fault == "length":
            choice["finish_reason"] = "length"
        elif fault == "bang":
            text = "!" * 40
            if chat:
                choice["message"]["content"] = text
            else:
                choice["text"] = text
        elif fault == "nan_logprobs" and choice["logprobs"]:
            bad = math.nan
            if chat:
                choice["logprobs"]["content"] = [
                    {**row, "logprob": bad} for row in choice["logprobs"]["content"]
                ]
            else:
                tokens = choice["logprobs"]["token_logprobs"]
                choice["logprobs"]["token_logprobs"] = [bad for _ in tokens]
    return said
