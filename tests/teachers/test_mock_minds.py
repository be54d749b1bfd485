"""What the mock answers: canned words with probabilities that hold, or a model's own."""

import json
import math
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
from posting import HELLO, post, texts

from limbeck.core.exchange import Reply
from limbeck.core.specs import LocalTeacher
from limbeck.core.types import Sampling, Turn
from limbeck.demo import model_path, problems
from limbeck.models.load import load_teacher
from limbeck.teachers.local import LocalWriter
from limbeck.teachers.mock import MockTeacher
from limbeck.teachers.mock.api import parsed, response
from limbeck.teachers.mock.minds import Asked, Bad, Canned, Token

PLAIN = "/v1/completions"


@pytest.fixture(scope="module")
def writer():
    spec = LocalTeacher(name=str(model_path("teacher")))
    return LocalWriter(load_teacher(spec, torch.device("cpu"), 256), "mock-1")


class Counting:
    """A writer that counts how often it is called."""

    def __init__(self, writer):
        self.writer, self.name, self.calls = writer, writer.name, []

    def answers(self, questions, sampling, n=1):
        listed = list(questions)
        self.calls.append(len(listed))
        return self.writer.answers(listed, sampling, n)


def asked_of(text, sampling, n=1, seeded=True):
    return Asked(
        prompt=(Turn(text=text, role="user"),), prefix="", sampling=sampling, n=n, seeded=seeded
    )


@settings(max_examples=60)
@given(
    text=st.text(max_size=20),
    temperature=st.sampled_from([0.0, 0.5, 1.0]),
    longest=st.integers(1, 40),
    top=st.integers(0, 20),
    seed=st.integers(0, 2**40),
    n=st.integers(1, 4),
)
def test_canned_words_and_their_probabilities_hold_together(
    text, temperature, longest, top, seed, n
):
    sampling = Sampling(max_tokens=longest, temperature=temperature, seed=seed, scores=top)
    found = Canned(1).answer(asked_of(text, sampling, n))
    assert found == Canned(1).answer(asked_of(text, sampling, n))
    assert len(found) == n
    for reply in found:
        scores = reply.scores
        assert "".join(score.text for score in scores) == reply.text
        assert len(scores) == reply.completion_tokens <= longest
        assert reply.finish == "stop" or reply.completion_tokens == longest
        for score in scores:
            assert score.logp <= 0
            values = [value for _, value in score.top]
            assert values == sorted(values, reverse=True)
            assert len(dict(score.top)) == len(values) == top
            assert sum(map(math.exp, values)) <= 1 + 1e-9
            own = dict(score.top).get(score.text)
            assert score.logp == own if own is not None else score.logp <= min(values, default=0)


@settings(max_examples=150)
@given(
    body=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    [
                        "model",
                        "messages",
                        "prompt",
                        "role",
                        "content",
                        "n",
                        "stop",
                        "seed",
                        "logprobs",
                    ]
                ),
                inner,
                max_size=6,
            )
        ),
        max_leaves=12,
    ),
    chat=st.booleans(),
)
def test_any_json_is_a_request_or_is_refused(body, chat):
    for one in (body, {**HELLO, **body} if isinstance(body, dict) else body):
        try:
            asked = parsed(one, chat=chat)
        except Bad as error:
            refused = error.status, bool(error.message)
        else:
            refused = None
            assert asked.n >= 1
            assert asked.sampling.max_tokens >= 0
        assert refused in (None, (400, True))


def test_other_sampling_says_other_things():
    base = Sampling(max_tokens=20, temperature=1.0, seed=1)
    others = [
        Sampling(max_tokens=20, temperature=0.5, seed=1),
        Sampling(max_tokens=20, temperature=1.0, seed=2),
        Sampling(max_tokens=20, temperature=1.0, seed=1, top_p=0.5),
    ]
    words = [Canned().answer(asked_of("a", s))[0].text for s in (base, *others)]
    words += [
        Canned().answer(asked_of("b", base))[0].text,
        Canned(1).answer(asked_of("a", base))[0].text,
    ]
    assert len(set(words)) == len(words)
    # A shorter limit cuts the same words.
    short = Canned().answer(asked_of("a", Sampling(max_tokens=2, temperature=1.0, seed=1)))[0]
    assert words[0].startswith(short.text)


def test_requests_that_wait_are_answered_together_and_as_if_alone(writer):
    prompts = [one.prompt for one in problems(0, "test", 12)]
    bodies = [
        {"model": "m", "prompt": p, "max_tokens": 24, "temperature": 1.0, "seed": 5, "n": 2}
        for p in prompts
    ]

    def said(mock, body):
        return [choice["text"] for choice in post(mock, body, PLAIN)[1]["choices"]]

    counting = Counting(writer)
    with MockTeacher(counting) as mock:
        alone = [said(mock, body) for body in bodies]
        assert counting.calls == [1] * 12
        counting.calls.clear()
        with ThreadPoolExecutor(12) as pool:
            together = list(pool.map(lambda body: said(mock, body), bodies))
    assert together == alone
    assert sum(counting.calls) == 12
    assert len(counting.calls) < 12
    assert all(len(set(pair)) == 2 for pair in alone if len(set(pair)) > 1)


def test_without_a_seed_a_model_draws_anew(writer):
    body = {"model": "m", "prompt": "Tom has", "max_tokens": 12, "temperature": 2.0}
    with MockTeacher(writer) as mock:
        free = {post(mock, body, PLAIN)[1]["choices"][0]["text"] for _ in range(4)}
        told = {post(mock, {**body, "seed": 1}, PLAIN)[1]["choices"][0]["text"] for _ in range(4)}
    assert len(free) > 1
    assert len(told) == 1


def test_minus_infinity_is_told_as_vllm_tells_it():
    token = Token(id=7, text="x", logp=-math.inf, rank=9, top=((3, "y", 0.0),))
    asked = asked_of("a", Sampling())
    reply = Reply(question="", index=0, text="b", finish="stop")
    entry = {"number": 0, "prompt_tokens": 2, "completion_tokens": 1}
    first = Token(id=1, text="<bos>")
    said = response(asked, [reply], [first, token], entry, chat=False)
    places = said["choices"][0]["prompt_logprobs"]
    assert places[0] is None
    assert {k: v["logprob"] for k, v in places[1].items()} == {"7": -9999.0, "3": 0.0}


def test_a_prompt_is_read_as_the_model_reads_it(writer):
    model = writer.model
    ids = model.encoder.tokenizer("<bos>Tom has 3 apples.", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = model.module(input_ids=torch.tensor([ids])).logits[0, :-1].double()
    logp = logits.log_softmax(-1)
    asked = {"model": "m", "prompt": ids, "prompt_logprobs": 3, "max_tokens": 1, "temperature": 0}
    with MockTeacher(writer) as mock:
        _, said, _ = post(mock, asked, PLAIN)
        first, *places = said["choices"][0]["prompt_logprobs"]
        assert first is None
        assert said["usage"]["prompt_tokens"] == len(ids)
        for row, token, place in zip(logp, ids[1:], places, strict=True):
            best = row.topk(3).indices.tolist()
            assert set(map(int, place)) == {token, *best}
            for name, entry in place.items():
                assert entry["logprob"] == pytest.approx(row[int(name)].item(), abs=1e-4)
                assert entry["rank"] == int((row > row[int(name)]).sum()) + 1
        text = "Tom has 3 apples."
        echo = {"model": "m", "prompt": text, "echo": True, "logprobs": 2, "max_tokens": 2}
        _, said, _ = post(mock, {**echo, "temperature": 0}, PLAIN)
        told = said["choices"][0]["logprobs"]
        assert said["choices"][0]["text"].startswith(text)
        assert "".join(told["tokens"]) == "<bos>" + said["choices"][0]["text"]
        assert told["token_logprobs"][1 : len(ids)] == pytest.approx(
            logp.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0].tolist(), abs=1e-4
        )
        _, said, _ = post(
            mock, {**echo, "max_tokens": 0, "return_tokens_as_token_ids": True}, PLAIN
        )
        assert said["choices"][0]["logprobs"]["tokens"] == [f"token_id:{token}" for token in ids]
        assert said["choices"][0]["text"] == text


def test_a_model_without_a_template_takes_no_conversation(writer):
    with MockTeacher(writer) as mock:
        status, said, _ = post(mock, HELLO)
        assert status == 400
        assert "chat template" in said["error"]["message"]


def test_a_function_may_answer():
    with MockTeacher(lambda asked: asked.prompt[-1].text.upper()) as mock:
        assert texts(post(mock, {**HELLO, "n": 2})[1]) == ["HELLO"] * 2
    told = [Reply(question="", index=0, text="no", finish="content_filter", completion_tokens=1)]
    with MockTeacher(lambda asked: told) as mock:
        assert post(mock, HELLO)[1]["choices"][0]["finish_reason"] == "content_filter"


def test_a_mind_that_fails_is_a_server_error_and_the_next_request_is_answered():
    calls = []

    def sometimes(asked):
        calls.append(asked)
        if len(calls) == 1:
            raise RuntimeError("out of memory")
        return "fine"

    with MockTeacher(sometimes) as mock:
        status, said, _ = post(mock, HELLO)
        assert status == 500
        assert "out of memory" in said["error"]["message"]
        assert post(mock, HELLO)[0] == 200
        assert len(mock.billed) == 1


def test_the_log_on_the_disk_is_what_is_remembered(tmp_path, writer):
    path = tmp_path / "log.jsonl"
    with MockTeacher(log_path=path) as mock:
        post(mock, HELLO)
        post(mock, {**HELLO, "n": 0})
        lines = [json.loads(line) for line in path.read_text().splitlines()]  # while it runs
        assert lines == mock.requests
    assert [line["status"] for line in lines] == [200, 400]


def test_nothing_is_left_running(writer):
    before = set(threading.enumerate())
    with MockTeacher(writer) as mock:
        post(mock, {"model": "m", "prompt": "a", "max_tokens": 1}, PLAIN)
    left = {t.name for t in set(threading.enumerate()) - before if t.is_alive()}
    assert not {name for name in left if name in ("mock", "mind")}
