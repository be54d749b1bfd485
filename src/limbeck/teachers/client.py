"""The official client, as we use it: the key from the environment, no retries, many small pools."""

import itertools
import os
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from limbeck.core.errors import RecipeError
from limbeck.core.specs import ServerTeacher

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
    raise RecipeError(
        "key_variable", f"the environment variable {spec.key_variable} is not set; it holds the key"
    )


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
