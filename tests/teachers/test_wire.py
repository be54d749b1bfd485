"""What is sent, and what comes back in every form that servers have been seen to send."""

import json
import time
from email.utils import formatdate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from limbeck.core.errors import RecipeError
from limbeck.core.exchange import Question
from limbeck.core.specs import ServerTeacher
from limbeck.core.types import Sampling, Turn
from limbeck.teachers.wire import (
    Again,
    Refused,
    parameters,
    read_response,
    refusal,
    retry_after,
    shares,
)

CHAT = ServerTeacher(url="http://127.0.0.1:1/v1", model="m")
PLAIN = ServerTeacher(url="http://127.0.0.1:1/v1", model="m", api="completions")
SAMPLING = Sampling(max_tokens=7, temperature=0.5, top_p=0.9, stop=("x",), scores=3)


def question(*turns, prefix=""):
    return Question(id="q", prompt=turns, prefix=prefix)


def test_nothing_is_left_to_the_servers_defaults():
    asked = parameters(CHAT, question(Turn(text="a", role="system"), Turn(text="b")), SAMPLING)
    assert asked == {
        "model": "m",
        "messages": [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}],
        "temperature": 0.5,
        "top_p": 0.9,
        "max_tokens": 7,
        "stream": False,
        "stop": ["x"],
        "logprobs": True,
        "top_logprobs": 3,
    }
    asked = parameters(PLAIN, question(Turn(text="a"), Turn(text="b"), prefix="c"), SAMPLING)
    assert (asked["prompt"], asked["logprobs"]) == ("abc", 3)


def test_a_prefix_is_the_beginning_of_the_assistants_words():
    asked = parameters(CHAT, question(Turn(text="b"), prefix="So"), Sampling())
    assert asked["messages"][-1] == {"role": "assistant", "content": "So"}
    assert asked["continue_final_message"] is True
    assert asked["add_generation_prompt"] is False


def test_extra_adds_and_does_not_replace():
    spec = ServerTeacher(url="http://127.0.0.1:1", model="m", extra={"top_k": -1})
    assert parameters(spec, question(Turn(text="b")), Sampling())["top_k"] == -1
    for name in ("temperature", "n", "seed"):
        bad = ServerTeacher(url="http://127.0.0.1:1", model="m", extra={name: 1})
        with pytest.raises(RecipeError, match=name):
            parameters(bad, question(Turn(text="b")), Sampling())


def test_a_conversation_is_no_plain_text():
    with pytest.raises(RecipeError, match="conversation"):
        parameters(PLAIN, question(Turn(text="b", role="user")), Sampling())


def choice(text="yes", finish="stop", index=0, **more):
    message = {"role": "assistant", "content": text}
    return {"index": index, "message": message, "finish_reason": finish, **more}


def body(*choices, **more):
    return json.dumps({"choices": list(choices), "model": "m-2", **more}).encode()


def test_a_good_response():
    usage = {"prompt_tokens": 5, "completion_tokens": 9}
    said = body(choice("b", "length", 1), choice("a"), usage=usage, system_fingerprint="f")
    heard = read_response(said, "chat", 2, scored=False)
    assert [(c.text, c.finish) for c in heard.choices] == [("a", "stop"), ("b", "length")]
    assert (heard.model, heard.fingerprint) == ("m-2", "f")
    assert (heard.prompt_tokens, heard.completion_tokens) == (5, 9)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"<html>",
        b"[]",
        b"[" * 100_000,
        b'{"choices": []}',
        b'{"choices": null}',
        b'{"error": {"message": "gone"}}',
        body(choice(finish=None)),
        body(choice(finish="")),
        body(choice(text=None)),
        body("yes"),
        body({"index": 0, "finish_reason": "stop"}),
    ],
)
def test_what_is_no_answer_may_be_tried_again(raw):
    with pytest.raises(Again) as caught:
        read_response(raw, "chat", 1, scored=False)
    assert caught.value.billed
    assert len(caught.value.reason) < 400


def test_what_came_of_too_few_answers_is_kept():
    with pytest.raises(Again, match="1 answers instead of 3") as caught:
        read_response(body(choice("a")), "chat", 3, scored=False)
    assert caught.value.heard.choices[0].text == "a"
    with pytest.raises(Again) as caught:
        read_response(body(choice("a"), choice("b", finish=None, index=1)), "chat", 2, scored=False)
    assert len(caught.value.heard.choices) == 1


def test_more_answers_than_asked_for_are_left_alone():
    assert len(read_response(body(choice(), choice(index=1)), "chat", 1, scored=False).choices) == 1


def test_a_filtered_answer_is_an_answer():
    heard = read_response(body(choice(None, "content_filter")), "chat", 1, scored=False)
    assert (heard.choices[0].text, heard.choices[0].finish) == ("", "content_filter")


@pytest.mark.parametrize("scored", [True, False])
def test_an_answer_whose_tokens_went_into_reasoning_is_one_that_was_cut(scored):
    usage = {"prompt_tokens": 10, "completion_tokens": 1000}
    said = choice(None, "length")
    said["message"]["reasoning_content"] = "hmm"
    heard = read_response(body(said, usage=usage), "chat", 1, scored=scored)
    assert (heard.choices[0].text, heard.choices[0].finish) == ("", "length")
    assert heard.choices[0].scores == (() if scored else None)
    assert heard.completion_tokens == 1000


@pytest.mark.parametrize("text", [None, ""])
def test_a_refusal_is_an_answer(text):
    said = choice(text)
    said["message"]["refusal"] = "I cannot help with that."
    heard = read_response(body(said), "chat", 1, scored=False)
    assert (heard.choices[0].text, heard.choices[0].finish) == ("", "refusal")
    said = choice("yes")
    said["message"]["refusal"] = None
    assert read_response(body(said), "chat", 1, scored=False).choices[0].finish == "stop"


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        ({"prompt_tokens": 10, "completion_tokens": 9, "total_tokens": 919}, 909),
        ({"prompt_tokens": 10, "completion_tokens": 909, "total_tokens": 919}, 909),
        ({"prompt_tokens": 10, "completion_tokens": 9, "total_tokens": 10}, 9),
        ({"prompt_tokens": 10, "completion_tokens": 9}, 9),
        ({"prompt_tokens": 10, "total_tokens": 19}, None),
        ({"completion_tokens": 9, "total_tokens": 19}, 9),
    ],
)
def test_reasoning_that_is_in_the_total_alone_is_paid_for(usage, expected):
    said = body(choice(), usage=usage)
    assert read_response(said, "chat", 1, scored=False).completion_tokens == expected


def scored(*values):
    rows = [{"token": f"t{k}", "logprob": v, "top_logprobs": []} for k, v in enumerate(values)]
    return choice(logprobs={"content": rows})


def test_log_probabilities_of_both_apis():
    heard = read_response(body(scored(-0.1, -2.0)), "chat", 1, scored=True)
    assert [(s.text, s.logp) for s in heard.choices[0].scores] == [("t0", -0.1), ("t1", -2.0)]
    told = {"tokens": ["a"], "token_logprobs": [-1.0], "top_logprobs": [{"a": -1.0, "b": -2.0}]}
    plain = {"index": 0, "text": "a", "finish_reason": "stop", "logprobs": told}
    heard = read_response(body(plain), "completions", 1, scored=True)
    assert heard.choices[0].scores[0].top == (("a", -1.0), ("b", -2.0))


@pytest.mark.parametrize(
    ("token", "raw", "text"),
    [
        ("\ufffd", [0xF0, 0x9F], r"bytes:\xf0\x9f"),
        (r"bytes:\xf0", [0xF0], r"bytes:\xf0"),
        ("a", [97], "a"),
        ("a", None, "a"),
        ("a", [300], "a"),
        ("a", "x", "a"),
    ],
)
def test_a_part_of_a_character_is_named_by_its_bytes(token, raw, text):
    entry = {"token": token, "logprob": -0.5, "bytes": raw}
    told = choice(logprobs={"content": [{**entry, "top_logprobs": [entry]}]})
    (score,) = read_response(body(told), "chat", 1, scored=True).choices[0].scores
    assert (score.text, score.top) == (text, ((text, -0.5),))


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), 0.5, None, "x", True])
def test_what_is_no_log_probability_is_not_believed(value):
    with pytest.raises(Again, match="log-probability"):
        read_response(body(scored(-0.1, value)), "chat", 1, scored=True)
    with pytest.raises(Again, match="without logprobs"):
        read_response(body(choice()), "chat", 1, scored=True)


@given(
    st.binary(max_size=300)
    | st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    [
                        "choices",
                        "message",
                        "content",
                        "finish_reason",
                        "usage",
                        "index",
                        "logprobs",
                        "error",
                        "text",
                    ]
                ),
                inner,
                max_size=5,
            )
        ),
        max_leaves=20,
    ).map(lambda value: json.dumps(value).encode())
)
def test_whatever_comes_is_an_answer_or_tried_again(raw):
    for api in ("chat", "completions"):
        for wanted in (True, False):
            try:
                heard = read_response(raw, api, 2, scored=wanted)
            except Again:
                continue
            assert len(heard.choices) == 2


@pytest.mark.parametrize(
    ("status", "kind", "billed", "crowded"),
    [
        (408, Again, True, False),
        (409, Again, False, False),
        (429, Again, False, True),
        (500, Again, True, False),
        (503, Again, False, True),
        (400, Refused, None, None),
        (401, Refused, None, None),
        (404, Refused, None, None),
        (422, Refused, None, None),
    ],
)
def test_each_status_is_tried_again_or_not(status, kind, billed, crowded):
    found = refusal(status, b'{"error": {"message": "no\\nway"}}', {})
    assert isinstance(found, kind)
    assert "no way" in found.reason
    if kind is Again:
        assert (found.billed, found.crowded) == (billed, crowded)


def test_an_empty_account_is_not_tried_again():
    said = b'{"error": {"message": "pay", "code": "insufficient_quota"}}'
    assert isinstance(refusal(429, said, {}), Refused)


def test_how_long_to_wait():
    assert retry_after({}) is None
    assert retry_after({"Retry-After": "7"}) == 7
    assert retry_after({"retry-after-ms": "250", "retry-after": "9"}) == 0.25
    date = formatdate(time.time() + 30, usegmt=True)
    assert 25 < retry_after({"retry-after": date}) <= 31
    assert retry_after({"retry-after": "-5"}) == 0
    assert retry_after({"retry-after": "99999"}) == 300
    for nonsense in ("soon", "nan", "", "Wed, 99 Foo"):
        assert retry_after({"retry-after": nonsense}) is None


@given(st.integers(0, 10**6), st.integers(1, 50))
def test_tokens_are_divided_exactly(total, parts):
    found = shares(total, parts)
    assert sum(found) == total
    assert max(found) - min(found) <= 1
    assert shares(None, parts) == [None] * parts
