"""The official client, as we use it: the key from the environment, no retries, many small pools."""

import itertools
import os
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from limbeck.core.errors import RecipeError
from limbeck.core.specs import ServerTeacher
from limbeck.core.text import one_line
from limbeck.teachers.wire import Again, Refused, refusal

POOL = 4
"""Connections that are kept together."""


def key_of(spec: ServerTeacher) -> str:
    """The API key from the environment; a server on this machine may need none.

    Raises:
        RecipeError: it is not set.
    """
    key = os.environ.get(spec.key_variable, "").strip()
    if key:
        return key
    if on_this_machine(spec.url):
        return "none"
    reason = f"the environment variable {spec.key_variable} is not set; it holds the key"
    if spec.key_variable != spec.key_variable.upper():  # hardly a variable, so it is not repeated
        reason = "is this the key itself? Give the name of the environment variable that holds it"
    raise RecipeError("key_variable", reason)


def transport() -> Any:
    """The HTTP library that the client is built on, which has changed its name."""
    from importlib import import_module
    from importlib.util import find_spec

    return import_module("httpx2" if find_spec("httpx2") else "httpx")


def on_this_machine(url: str) -> bool:
    """Whether an address is a loopback one."""
    host = urlsplit(url).hostname or ""
    return host in ("localhost", "::1") or host.startswith("127.")


def proxied(url: str) -> bool:
    """Whether the environment sends requests to this address through a proxy."""
    parts = urlsplit(url)
    named = bool(getproxies().keys() & {parts.scheme, "all"})
    return named and not on_this_machine(url) and not proxy_bypass(parts.hostname or "")


def spread(httpx: Any, in_flight: int) -> Any:
    """A transport of many small pools of connections, taken in turn.

    A pool looks at all of its idle connections for each request, so one pool of hundreds spends its
    time with that.
    """
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=2 * POOL)
    pools = [
        httpx.AsyncHTTPTransport(limits=limits, retries=0) for _ in range(-(-in_flight // POOL))
    ]
    turn = itertools.cycle(pools)

    class Spread(httpx.AsyncBaseTransport):
        async def handle_async_request(self, request: Any) -> Any:
            return await next(turn).handle_async_request(request)

        async def aclose(self) -> None:
            for pool in pools:
                await pool.aclose()

    return Spread()


def make_client(spec: ServerTeacher, key: str) -> Any:
    """The official client, without its own retries.

    Raises:
        RecipeError: it is not installed.
    """
    try:
        import openai
        import tenacity  # noqa: F401
    except ImportError:
        raise RecipeError(
            "kind", "a server needs more packages: pip install 'limbeck[api]'"
        ) from None
    httpx = transport()
    return openai.AsyncOpenAI(
        api_key=key,
        base_url=spec.url,
        max_retries=0,
        timeout=spec.timeout_seconds,
        http_client=httpx.AsyncClient(
            # With a transport of its own it would take no notice of proxies.
            transport=None if proxied(spec.url) else spread(httpx, spec.in_flight),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=spec.in_flight),
            timeout=spec.timeout_seconds,
        ),
    )


class Client:
    """Posts requests, and says why one has failed.

    Args:
        spec: of the server.

    Raises:
        RecipeError: the key is not set, or a package is not installed.
    """

    def __init__(self, spec: ServerTeacher) -> None:
        self.spec, self._key = spec, key_of(spec)
        self._client = make_client(spec, self._key)

    async def post(self, path: str, asked: Mapping[str, Any]) -> bytes:
        """The body of an answer with status 200.

        Raises:
            Again, Refused: there is none; why may repeat the key.
        """
        import openai

        httpx = transport()
        try:
            response: Any = await self._client.post(
                path, body=asked, cast_to=httpx.Response, options={"max_retries": 0}
            )
        except openai.APITimeoutError as error:
            unsent = isinstance(error.__cause__, httpx.ConnectTimeout | httpx.PoolTimeout)
            what = "connection" if unsent else "answer"
            reason = f"no {what} in {self.spec.timeout_seconds:g} s"
            raise Again(reason, billed=not unsent) from None
        except openai.APIConnectionError as error:
            unsent = isinstance(error.__cause__, httpx.ConnectError)
            raise Again(f"the connection failed: {_plain(error)}", billed=not unsent) from None
        except openai.APIStatusError as error:
            body, headers = error.response.content, dict(error.response.headers)
            raise refusal(error.status_code, body, headers) from None
        return response.content

    def hide_key(self, error: Again | Refused) -> None:
        """Take the key out of an error: a server may repeat it in what it says."""
        if len(self._key) > 4:
            error.reason = error.reason.replace(self._key, "***")
            error.args = (error.reason,)

    async def close(self) -> None:
        """Close its connections."""
        await self._client.close()


def _plain(error: BaseException) -> str:
    cause = error.__cause__ or error
    return one_line(f"{type(cause).__name__} {cause}", 200)
