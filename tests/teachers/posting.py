"""Requests to a mock, written by hand: no client that could be kind to it."""

import http.client
import json

HELLO = {"model": "m", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 30}


def post(mock, body, path="/v1/chat/completions", headers=None):
    connection = http.client.HTTPConnection("127.0.0.1", mock.port, timeout=10)
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        connection.request(
            "POST", path, raw, {"content-type": "application/json", **(headers or {})}
        )
        response = connection.getresponse()
        return response.status, json.loads(response.read() or b"null"), dict(response.headers)
    finally:
        connection.close()


def texts(said):
    return [choice["message"]["content"] for choice in said["choices"]]
