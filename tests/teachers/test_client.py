"""The way to the server: connections that are kept, left and lost, and what is said of it."""

import asyncio
import gzip
import shutil
import subprocess

import pytest

from limbeck.teachers import client as module
from limbeck.teachers.client import direct, transport

httpx = transport()
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


def asked(answers, work, seconds=5.0, context=None, leaves=False):
    """Runs `work(ask)` against a server; gives its result, and how many connections were opened.

    Args:
        answers: given a request's number, what is sent: None hangs up; empty bytes are silence.
        work: a coroutine function; `ask` sends a request.
        seconds: of patience.
        context: of the server's TLS.
        leaves: whether the server closes after each answer, without a word.
    """
    opened = number = 0

    async def serve(reader, writer):
        nonlocal opened, number
        opened += 1
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                await reader.readexactly(int(head.lower().split(b"content-length: ")[1].split()[0]))
                number += 1
                answer = answers(number - 1)
                if answer is None:
                    return
                writer.write(answer)
                if leaves or b"connection: close" in answer:
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def main():
        server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
        port = server.sockets[0].getsockname()[1]
        url = f"{'https' if context else 'http'}://localhost:{port}/v1"
        out = direct(httpx, url)

        async def ask(to=url):
            patience = {"timeout": dict.fromkeys(("connect", "read"), seconds)}
            request = httpx.Request("POST", to + "/x", content=b"body", extensions=patience)
            return await out.handle_async_request(request)

        try:
            return await work(ask), opened
        finally:
            await out.aclose()
            server.close()

    return asyncio.run(main())


async def twice(ask):
    first = await ask()
    await asyncio.sleep(0.05)
    return [first.content, (await ask()).content]


def test_a_connection_is_kept_and_only_as_many_are_opened_as_there_are_requests():
    assert asked(lambda _: OK, twice) == ([b"ok", b"ok"], 1)

    async def three(ask):
        return [r.content for _ in range(4) for r in await asyncio.gather(ask(), ask(), ask())]

    assert asked(lambda _: OK, three) == ([b"ok"] * 12, 3)


def test_a_connection_that_the_server_has_left_or_may_leave_is_not_used(monkeypatch):
    closing = OK.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n")
    assert asked(lambda _: closing, twice) == ([b"ok", b"ok"], 2)
    assert asked(lambda _: OK, twice, leaves=True) == ([b"ok", b"ok"], 2)
    monkeypatch.setattr(module, "IDLE_SECONDS", 0.01)
    assert asked(lambda _: OK, twice) == ([b"ok", b"ok"], 2)


def test_chunks_and_compressed_bodies_are_read():
    body = gzip.compress(b"a long answer")
    parts = [body[:9], body[9:], b""]
    answer = b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ntransfer-encoding: chunked\r\n\r\n"
    answer += b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts)
    assert asked(lambda _: answer, twice) == ([b"a long answer"] * 2, 1)


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (None, "RemoteProtocolError"),
        (b"no HTTP at all\r\n\r\n", "RemoteProtocolError"),
        (OK.replace(b": 2", b": 9").replace(b"\r\n\r", b"\r\nconnection: close\r\n\r"), "Remote"),
        (b"", "ReadTimeout"),
    ],
)
def test_what_is_no_answer_says_so_and_its_connection_is_left(answer, error):
    async def then(ask):
        with pytest.raises(httpx.TransportError) as caught:
            await ask()
        return type(caught.value).__name__, str(caught.value) != "", (await ask()).content

    found, opened = asked(lambda k: OK if k else answer, then, seconds=0.5)
    assert found[0].startswith(error)
    assert (found[1:], opened) == ((True, b"ok"), 2)


def test_where_nobody_listens_nothing_was_sent():
    async def nowhere(ask):
        with pytest.raises(httpx.ConnectError):
            await ask("http://127.0.0.1:9")

    asked(lambda _: OK, nowhere)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate")
def test_a_certificate_is_asked_for(tmp_path, monkeypatch):
    import ssl

    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    make += ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    make += ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run(make, check=True, capture_output=True)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)

    async def refused(ask):
        with pytest.raises(httpx.ConnectError, match="certificate"):
            await ask()

    asked(lambda _: OK, refused, context=context)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    assert asked(lambda _: OK, twice, context=context) == ([b"ok", b"ok"], 1)
