"""The way to the server: straight, or through a proxy that the environment names."""

import asyncio

import pytest

from limbeck.core.errors import RecipeError
from limbeck.core.specs import ServerTeacher
from limbeck.teachers import client as module
from limbeck.teachers.client import Client, key_of, make_client, proxied, transport
from limbeck.teachers.wire import Again

BODY = b'{"id": "1", "object": "list", "data": []}'


@pytest.fixture
def clean(monkeypatch):
    """An environment without proxies, to which a test adds its own."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        for each in (name, name.upper()):
            monkeypatch.delenv(each, raising=False)
    return monkeypatch


def test_whether_there_is_a_proxy(clean):
    assert not proxied("https://api.example/v1")
    clean.setenv("https_proxy", "http://127.0.0.1:1")
    assert proxied("https://api.example/v1")
    assert not proxied("http://api.example/v1")
    assert not proxied("https://localhost:8000/v1")
    clean.setenv("no_proxy", "api.example")
    assert not proxied("https://api.example/v1")
    clean.setenv("all_proxy", "http://127.0.0.1:1")
    assert proxied("http://other.example/v1")


def test_a_proxy_of_the_environment_is_asked(clean):
    seen = []

    async def proxy(reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        seen.append(head.split(b"\r\n")[0])
        length = str(len(BODY)).encode()
        writer.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: "
            + length
            + b"\r\n\r\n"
            + BODY
        )
        writer.close()

    async def main():
        server = await asyncio.start_server(proxy, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        clean.setenv("http_proxy", f"http://127.0.0.1:{port}")
        client = make_client(ServerTeacher(url="http://api.invalid/v1", model="m"), "key")
        async with server:
            await client.models.list()
            await client.close()

    asyncio.run(main())
    assert seen == [b"GET http://api.invalid/v1/models HTTP/1.1"]


@pytest.mark.parametrize(
    ("kind", "billed"),
    [
        ("ConnectTimeout", False),
        ("PoolTimeout", False),
        ("ConnectError", False),
        ("ReadTimeout", True),
        ("WriteTimeout", True),
        ("ReadError", True),
    ],
)
def test_what_was_never_sent_is_not_billed(clean, kind, billed):
    httpx = transport()

    def fails(request):
        raise getattr(httpx, kind)("no")

    async def main():
        client = Client(ServerTeacher(url="http://127.0.0.1:1/v1", model="m"))
        try:
            await client.post("/chat/completions", {})
        finally:
            await client.close()

    clean.setattr(module, "spread", lambda httpx, in_flight: httpx.MockTransport(fails))
    with pytest.raises(Again) as caught:
        asyncio.run(main())
    assert caught.value.billed is billed


@pytest.mark.parametrize(
    ("variable", "said"),
    [("NO_SUCH_KEY", "variable NO_SUCH_KEY is not set"), ("gsk_SECRET", "is this the key itself?")],
)
def test_an_unset_variable_that_may_be_the_key_is_not_repeated(clean, variable, said):
    spec = ServerTeacher(url="http://api.invalid/v1", model="m", key_variable=variable)
    with pytest.raises(RecipeError) as error:
        key_of(spec)
    assert said in str(error.value)
    assert "SECRET" not in str(error.value)
