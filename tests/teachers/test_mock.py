"""The mock teacher: strict about requests, the same answers to the same seeds, faults as told."""

import http.client
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from posting import HELLO, post, texts

from limbeck.core.errors import RecipeError
from limbeck.core.specs import TokenPrice
from limbeck.teachers.mock import KINDS, Faults, MockTeacher


def test_the_same_seed_says_the_same_and_without_one_it_does_not():
    with MockTeacher() as mock:
        first, again, other = (post(mock, {**HELLO, "seed": s, "n": 3})[1] for s in (1, 1, 2))
        assert texts(first) == texts(again) != texts(other)
        assert len(set(texts(first))) == 3
        free = [texts(post(mock, HELLO)[1]) for _ in range(2)]
        assert free[0] != free[1]
        greedy = [texts(post(mock, {**HELLO, "temperature": 0, "n": 2})[1]) for _ in range(2)]
        assert greedy[0] == greedy[1]
        assert greedy[0][0] == greedy[0][1]


def test_max_tokens_stop_and_counts():
    with MockTeacher() as mock:
        _, said, _ = post(mock, {**HELLO, "max_tokens": 2, "seed": 1})
        assert said["choices"][0]["finish_reason"] == "length"
        assert said["usage"]["completion_tokens"] == 2
        _, whole, _ = post(mock, {**HELLO, "seed": 1})
        stop = texts(whole)[0][3:6]
        _, cut, _ = post(mock, {**HELLO, "seed": 1, "stop": stop})
        assert texts(cut)[0] == texts(whole)[0].partition(stop)[0]
        assert cut["choices"][0]["finish_reason"] == "stop"
        longer = {k: v for k, v in HELLO.items() if k != "max_tokens"}
        _, said, _ = post(mock, {**longer, "max_completion_tokens": 1, "seed": 1})
        assert said["usage"]["completion_tokens"] == 1


def test_log_probabilities_join_to_the_text():
    with MockTeacher() as mock:
        _, said, _ = post(mock, {**HELLO, "logprobs": True, "top_logprobs": 3, "seed": 4})
        rows = said["choices"][0]["logprobs"]["content"]
        assert "".join(row["token"] for row in rows) == texts(said)[0]
        assert all(row["logprob"] <= 0 and len(row["top_logprobs"]) == 3 for row in rows)
        plain = {"model": "m", "prompt": "hello", "logprobs": 2, "max_tokens": 9}
        _, said, _ = post(mock, plain, "/v1/completions")
        told = said["choices"][0]["logprobs"]
        assert "".join(told["tokens"]) == said["choices"][0]["text"]


@pytest.mark.parametrize(
    ("body", "path", "status"),
    [
        (b"{", "/v1/chat/completions", 400),
        (b"[" * 100_000, "/v1/chat/completions", 400),
        ({}, "/v1/chat/completions", 400),
        ({"model": "m", "messages": []}, "/v1/chat/completions", 400),
        ({**HELLO, "n": 0}, "/v1/chat/completions", 400),
        ({**HELLO, "n": 10**6}, "/v1/chat/completions", 400),
        ({**HELLO, "temperature": "hot"}, "/v1/chat/completions", 400),
        ({**HELLO, "max_tokens": True}, "/v1/chat/completions", 400),
        ({**HELLO, "messages": [{"role": "king", "content": "a"}]}, "/v1/chat/completions", 400),
        ({**HELLO, "stop": [1]}, "/v1/chat/completions", 400),
        ({**HELLO, "stop": 5}, "/v1/chat/completions", 400),
        ({**HELLO, "stream": True}, "/v1/chat/completions", 400),
        ({**HELLO, "logprobs": 3}, "/v1/chat/completions", 400),
        ({**HELLO, "top_logprobs": 3}, "/v1/chat/completions", 400),
        ({**HELLO, "top_p": 0}, "/v1/chat/completions", 400),
        ({**HELLO, "seed": 1.5}, "/v1/chat/completions", 400),
        ({**HELLO, "max_completion_tokens": 3}, "/v1/chat/completions", 400),
        ({**HELLO, "prompt_logprobs": 3}, "/v1/chat/completions", 400),
        ({**HELLO, "continue_final_message": True}, "/v1/chat/completions", 400),
        (
            {**HELLO, "continue_final_message": True, "add_generation_prompt": False},
            "/v1/chat/completions",
            400,
        ),
        (
            {
                "model": "m",
                "messages": [{"role": "assistant", "content": "a"}],
                "continue_final_message": True,
            },
            "/v1/chat/completions",
            400,
        ),
        ({"model": "m"}, "/v1/completions", 400),
        ({"model": "m", "prompt": []}, "/v1/completions", 400),
        ({"model": "m", "prompt": [1, True]}, "/v1/completions", 400),
        ({"model": "m", "prompt": ["a"]}, "/v1/completions", 400),
        ({"model": "m", "prompt": "a", "max_tokens": 0}, "/v1/completions", 400),
        ({"model": "m", "prompt": "a", "prompt_logprobs": 1}, "/v1/completions", 400),
        (HELLO, "/v1/nothing", 404),
    ],
)
def test_wrong_requests_are_refused_in_the_apis_form(body, path, status):
    with MockTeacher() as mock:
        found, said, _ = post(mock, body, path)
        assert found == status
        assert said["error"]["message"]
        assert not mock.billed


def test_a_key_may_be_wanted_and_is_not_noted():
    with MockTeacher(key="k-1234") as mock:
        assert post(mock, HELLO)[0] == 401
        assert post(mock, HELLO, headers={"authorization": "Bearer k-1234"})[0] == 200
        assert "k-1234" not in json.dumps(mock.requests)


def test_more_requests_than_a_minute_allows():
    with MockTeacher(requests_per_minute=2) as mock:
        found = [post(mock, HELLO) for _ in range(3)]
        assert [status for status, _, _ in found] == [200, 200, 429]
        assert "retry-after" in found[2][2]


def test_faults_are_drawn_from_their_seed():
    first, again, other = (Faults(rate=0.4, seed=s) for s in (1, 1, 2))
    draws = [[f.draw(str(k)) for k in range(500)] for f in (first, again, other)]
    assert draws[0] == draws[1] != draws[2]
    share = sum(kind is not None for kind in draws[0]) / 500
    assert 0.33 < share < 0.47
    assert {kind for kind in draws[0] if kind} == set(KINDS) - {"timeout"}
    with pytest.raises(ValueError, match="no fault 'typo'"):
        Faults(kinds=("typo",))


@pytest.mark.parametrize("kind", ["reset_before", "reset_after", "cut", "500", "bad_json", "429"])
def test_what_was_processed_is_billed_whatever_arrives(kind):
    with MockTeacher(faults=Faults(rate=1.0, kinds=(kind,))) as mock:
        try:
            status, _, _ = post(mock, HELLO)
            assert status == int(kind)
        except (http.client.HTTPException, OSError, ValueError):
            assert kind not in ("500", "429")
        processed = kind in ("reset_after", "cut", "bad_json")
        assert bool(mock.billed) == processed
        assert (mock.billed_usd(TokenPrice(input=1, output=1)) > 0) == processed


def test_a_server_may_charge_too_much():
    with MockTeacher() as fair, MockTeacher(faults=Faults(overcharge=2.0)) as greedy:
        tokens = [
            post(m, {**HELLO, "seed": 1})[1]["usage"]["completion_tokens"] for m in (fair, greedy)
        ]
        assert tokens[1] == 2 * tokens[0]


def test_a_port_that_is_taken_is_one_clear_error():
    with (
        MockTeacher() as mock,
        pytest.raises(RecipeError, match=f"port {mock.port} cannot be used"),
        MockTeacher(port=mock.port),
    ):
        pass


def test_a_connection_serves_many_requests():
    with MockTeacher() as mock:
        connection = http.client.HTTPConnection("127.0.0.1", mock.port, timeout=10)
        for _ in range(3):
            connection.request("POST", "/v1/chat/completions", json.dumps(HELLO))
            assert connection.getresponse().read()
        connection.request("GET", "/v1/models")
        assert json.loads(connection.getresponse().read())["data"][0]["id"] == "mock-1"
        connection.request("GET", "/health")
        assert connection.getresponse().status == 200
        connection.close()


def test_the_command_serves_until_it_is_interrupted(tmp_path):
    command = [sys.executable, "-m", "limbeck", "mock-teacher", "--port", "0", "--demo"]
    log = tmp_path / "log.jsonl"
    with subprocess.Popen(
        [*command, "--log", str(log)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as child:
        line = child.stdout.readline()
        assert "serving at http://127.0.0.1:" in line
        port = int(line.split("127.0.0.1:")[1].split("/")[0])
        mock = type("Mock", (), {"port": port})
        prompt = "Tom has 3 apples. He finds 4 more. How many apples does Tom have now?\n"
        asked = {"model": "m", "prompt": prompt, "max_tokens": 60, "temperature": 0}
        _, said, _ = post(mock, asked, "/v1/completions")
        assert "The answer is 7." in said["choices"][0]["text"]
        child.send_signal(signal.SIGINT)
        try:
            out, err = child.communicate(timeout=20)
        finally:
            child.kill()  # or a test that fails would wait for it
        assert child.returncode == 0
        assert "Traceback" not in err
        assert json.loads(log.read_text())["path"] == "/v1/completions"
        assert "1 requests" in out
