"""How the mock misbehaves: each fault as it looks from outside, and the same if replayed."""

import http.client
import json
import math
import random
import socket
import sys
import threading
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from posting import HELLO, post, texts

from limbeck.teachers.mock import KINDS, Faults, MockTeacher

SCORED = {**HELLO, "seed": 1, "n": 2, "logprobs": True, "top_logprobs": 2}


def outcome(mock, body):
    """What a client sees, as a word."""
    try:
        status, said, _ = post(mock, body)
    except http.client.IncompleteRead as error:
        return "half", error.partial
    except (http.client.RemoteDisconnected, ConnectionResetError):
        return "ended", None
    except ValueError:
        return "not JSON", None
    return status, said


def one_fault(kind, **more):
    return MockTeacher(faults=Faults(rate=1.0, kinds=(kind,), hold_seconds=0.05, **more))


@pytest.mark.parametrize("kind", KINDS)
def test_each_fault_as_a_client_sees_it(kind):
    with MockTeacher() as mock:
        whole = post(mock, SCORED)[1]
    with one_fault(kind) as mock:
        what, said = outcome(mock, SCORED)
        (entry,) = mock.requests
    assert entry["fault"] == kind
    expected = {
        "timeout": "ended",
        "reset_before": "ended",
        "reset_after": "ended",
        "cut": "half",
        "bad_json": "not JSON",
        "429": 429,
        "500": 500,
        "502": 502,
        "503": 503,
    }
    assert what == expected.get(kind, 200)
    untouched = {"429", "500", "502", "503", "reset_before"}
    assert entry["billed_choices"] == (0 if kind in untouched else 2)
    if kind == "cut":
        assert 0 < len(said) < len(json.dumps(whole))
        assert json.dumps(whole).encode().startswith(said)
    elif kind == "empty":
        assert said is None
    elif kind == "no_choices":
        assert said["choices"] == []
    elif kind == "error_200":
        assert "choices" not in said
        assert said["error"]["message"]
    elif kind == "wrong_count":
        assert len(said["choices"]) == 1
    elif kind == "no_finish":
        assert [c["finish_reason"] for c in said["choices"]] == [None, None]
        assert texts(said) == texts(whole)
    elif kind == "length":
        assert [c["finish_reason"] for c in said["choices"]] == ["length"] * 2
    elif kind == "bang":
        assert [set(text) for text in texts(said)] == [{"!"}] * 2
    elif kind == "nan_logprobs":
        assert texts(said) == texts(whole)


def test_one_answer_becomes_two_where_the_count_is_wrong():
    with one_fault("wrong_count") as mock:
        assert len(outcome(mock, HELLO)[1]["choices"]) == 2


def test_what_is_no_log_probability_comes_in_all_its_forms():
    found = set()
    with one_fault("nan_logprobs") as mock:
        for seed in range(24):
            said = outcome(mock, {**SCORED, "seed": seed})[1]
            values = {row["logprob"] for c in said["choices"] for row in c["logprobs"]["content"]}
            found |= {"nan" if v is not None and math.isnan(v) else v for v in values}
    assert found == {"nan", -math.inf, 0.5, None}


def test_retry_after_comes_in_all_its_forms():
    found = set()
    with one_fault("429") as mock:
        for seed in range(24):
            _, _, headers = post(mock, {**HELLO, "seed": seed})
            after = headers.get("retry-after")
            milliseconds = headers.get("retry-after-ms")
            found.add(
                "ms"
                if milliseconds
                else "none"
                if after is None
                else "GMT"
                if "GMT" in after
                else "seconds"
            )
    assert found == {"ms", "none", "GMT", "seconds"}


def faults_of(bodies, order_seed=None, workers=1):
    """What happened to each body, in the order of its attempts."""
    faults = Faults(rate=0.5, seed=4, kinds=("500", "cut", "bad_json"))
    order = list(bodies)
    if order_seed is not None:
        random.Random(order_seed).shuffle(order)
    with MockTeacher(faults=faults) as mock:
        queues = [order[k::workers] for k in range(workers)]
        threads = [
            threading.Thread(target=lambda q=q: [outcome(mock, json.loads(b)) for b in q])
            for q in queues
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        told = {}
        for request in mock.requests:
            told.setdefault(json.dumps(request["body"]), []).append(request["fault"])
        return told


def test_what_happens_to_a_request_does_not_depend_on_the_others():
    bodies = [json.dumps({**HELLO, "seed": seed}) for seed in range(12)] * 3
    alone = faults_of(bodies)
    assert faults_of(bodies, order_seed=1) == alone
    assert faults_of(bodies, order_seed=2, workers=6) == alone
    assert len({tuple(faults) for faults in alone.values()}) > 4  # each attempt has its own draw


def test_what_is_refused_anyway_is_not_spoilt():
    with one_fault("cut") as mock:
        assert outcome(mock, {**HELLO, "n": 0})[0] == 400
        assert mock.requests[0]["fault"] is None
        assert not mock.billed


@pytest.mark.parametrize(
    "raw",
    [
        b"\x16\x03\x01\x02\x00\x01\x00",  # somebody speaks TLS
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 50\r\n\r\n{",
        b"POST /v1/chat/completions HTTP/1.1\r\ncontent-length: x\r\n\r\n",
        b"",
    ],
)
def test_what_is_no_request_does_no_harm(raw):
    with MockTeacher() as mock:
        with socket.create_connection(("127.0.0.1", mock.port), timeout=5) as one:
            one.sendall(raw)
        assert post(mock, HELLO)[0] == 200
        assert len(mock.requests) == 1


def test_bodies_in_pieces_and_those_that_ask_first():
    body = json.dumps(HELLO).encode()
    with MockTeacher() as mock:
        head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\n"
        with socket.create_connection(("127.0.0.1", mock.port), timeout=5) as one:
            one.sendall(head + b"transfer-encoding: chunked\r\n\r\n")
            for start in range(0, len(body), 30):
                piece = body[start : start + 30]
                one.sendall(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
            one.sendall(b"0\r\n\r\n")
            assert one.recv(2**16).startswith(b"HTTP/1.1 200")
        with socket.create_connection(("127.0.0.1", mock.port), timeout=5) as one:
            one.sendall(
                head + f"content-length: {len(body)}\r\nexpect: 100-continue\r\n\r\n".encode()
            )
            assert one.recv(100).startswith(b"HTTP/1.1 100")
            one.sendall(body)
            assert one.recv(2**16).startswith(b"HTTP/1.1 200")
