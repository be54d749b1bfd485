"""The API's form: requests checked as a strict server checks them, and answers written as its."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from limbeck.core.exchange import Reply
from limbeck.core.types import Sampling, Turn
from limbeck.teachers.mock.minds import Asked, Bad, Token

MOST_CHOICES, MOST_SCORES = 128, 20
LEAST_LOGP = -9999.0
"""Stands for minus infinity, which JSON cannot say; vLLM does the same."""

NAME, FINGERPRINT = "mock-1", "fp_mock"
ROLES = ("system", "user", "assistant", "developer", "tool")


def parsed(body: Any, *, chat: bool) -> Asked:
    """A request's body, checked.

    Raises:
        Bad: something is missing, of the wrong type or out of range.
    """
    if not isinstance(body, dict):
        raise Bad(400, "the body is not a JSON object")
    if not isinstance(body.get("model"), str):
        raise Bad(400, "`model` is missing")
    if _flag(body, "stream"):
        raise Bad(400, "`stream` is not supported")
    ids: tuple[int, ...] | None = None
    prefix = ""
    if chat:
        turns, prefix = _conversation(body)
    else:
        turns, ids = _text(body.get("prompt"))
    echo = not chat and _flag(body, "echo")
    sampling, seeded = _sampling(body, chat=chat, shortest=0 if echo else 1)
    reading = _optional(body, "prompt_logprobs", 0, MOST_SCORES)
    if reading is not None and chat:
        raise Bad(400, "`prompt_logprobs` goes with /completions here")
    if echo and sampling.scores is not None:
        reading = sampling.scores
    return Asked(
        prompt=turns,
        prefix=prefix,
        sampling=sampling,
        n=_optional(body, "n", 1, MOST_CHOICES) or 1,
        seeded=seeded,
        ids=ids,
        reading=reading,
        echo=echo,
        names_ids=_flag(body, "return_tokens_as_token_ids"),
    )


def _conversation(body: Mapping[str, Any]) -> tuple[tuple[Turn, ...], str]:
    """The turns to answer, and the beginning of the answer."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Bad(400, "`messages` is missing or empty")
    turns = tuple(_turn(message) for message in messages)
    if not _flag(body, "continue_final_message"):
        return turns, ""
    if _flag(body, "add_generation_prompt", default=True):
        raise Bad(400, "`continue_final_message` needs `add_generation_prompt` to be false")
    if turns[-1].role != "assistant":
        raise Bad(400, "`continue_final_message` needs an assistant's message at the end")
    return turns[:-1], turns[-1].text


def _turn(message: Any) -> Turn:
    if not isinstance(message, dict) or not isinstance(message.get("content"), str):
        raise Bad(400, "a message has no text `content`")
    role = message.get("role")
    if role not in ROLES:
        raise Bad(400, f"no role {role!r}")
    return Turn(text=message["content"], role=role)


def _text(prompt: Any) -> tuple[tuple[Turn, ...], tuple[int, ...] | None]:
    """A prompt of the plain API: text, or token ids."""
    if isinstance(prompt, str):
        return (Turn(text=prompt),), None
    whole = isinstance(prompt, list) and prompt and all(map(_is_id, prompt))
    if not whole:
        raise Bad(400, "`prompt` is neither text nor a list of token ids")
    return (Turn(text=" ".join(map(str, prompt))),), tuple(prompt)


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _sampling(body: Mapping[str, Any], *, chat: bool, shortest: int) -> tuple[Sampling, bool]:
    """How to draw, and whether a seed was given."""
    if body.get("max_tokens") is not None and body.get("max_completion_tokens") is not None:
        raise Bad(400, "`max_tokens` and `max_completion_tokens` are one; give one of them")
    longest = _optional(body, "max_completion_tokens", shortest, 2**20)
    if longest is None:
        longest = _optional(body, "max_tokens", shortest, 2**20)
    top = _optional(body, "top_logprobs", 0, MOST_SCORES) if chat else None
    if not chat:
        scores = _optional(body, "logprobs", 0, MOST_SCORES)
    elif _flag(body, "logprobs"):
        scores = top or 0
    elif top:
        raise Bad(400, "`top_logprobs` needs `logprobs` to be true")
    else:
        scores = None
    seed = _optional(body, "seed", -(2**63), 2**63 - 1)
    sampling = Sampling(
        max_tokens=16 if longest is None else longest,
        temperature=_number(body, "temperature", 1.0, 0, 2),
        top_p=_number(body, "top_p", 1.0, 0, 1),
        seed=seed or 0,
        stop=_stop(body.get("stop")),
        scores=scores,
    )
    if sampling.top_p == 0:
        raise Bad(400, "`top_p` is 0; it must be more")
    return sampling, seed is not None


def _stop(stop: Any) -> tuple[str, ...]:
    if stop is None:
        return ()
    listed = [stop] if isinstance(stop, str) else stop
    if not isinstance(listed, list) or not all(isinstance(s, str) and s for s in listed):
        raise Bad(400, f"`stop` is {stop!r}; it must be text, or a list of texts")
    return tuple(listed)


def _flag(body: Mapping[str, Any], name: str, *, default: bool = False) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise Bad(400, f"`{name}` is {value!r}; it must be true or false")
    return default if value is None else value


def _optional(body: Mapping[str, Any], name: str, low: int, high: int) -> int | None:
    value = body.get(name)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise Bad(400, f"`{name}` is {value!r}; it must be a whole number from {low} to {high}")
    return value


def _number(body: Mapping[str, Any], name: str, default: float, low: float, high: float) -> float:
    value = body.get(name)
    if value is None:
        return default
    known = isinstance(value, int | float) and not isinstance(value, bool)
    if not known or not low <= value <= high:
        raise Bad(400, f"`{name}` is {value!r}; it must be from {low} to {high}")
    return value


def response(
    asked: Asked,
    replies: Sequence[Reply],
    tokens: Sequence[Token] | None,
    entry: Mapping[str, Any],
    *,
    chat: bool,
) -> dict[str, Any]:
    """The answer in the API's form.

    Args:
        asked: what was asked.
        replies: to it.
        tokens: of the prompt, where they were asked for.
        entry: the request's line in the log, which has its number and its bill.
        chat: of which of the two APIs.
    """
    used = {name: entry[name] for name in ("prompt_tokens", "completion_tokens")}
    return {
        "id": f"mock-{entry['number']}",
        "object": "chat.completion" if chat else "text_completion",
        "created": 0,
        "model": NAME,
        "system_fingerprint": FINGERPRINT,
        "choices": [
            {"index": place, **(_message(asked, reply) if chat else _plain(asked, reply, tokens))}
            for place, reply in enumerate(replies)
        ],
        "usage": {**used, "total_tokens": sum(used.values())},
    }


def _message(asked: Asked, reply: Reply) -> dict[str, Any]:
    rows = [
        {
            "token": score.text,
            "logprob": score.logp,
            "top_logprobs": [{"token": text, "logprob": logp} for text, logp in score.top],
        }
        for score in reply.scores or ()
    ]
    return {
        "message": {"role": "assistant", "content": reply.text},
        "finish_reason": reply.finish,
        "logprobs": None if asked.sampling.scores is None else {"content": rows},
    }


def _plain(asked: Asked, reply: Reply, tokens: Sequence[Token] | None) -> dict[str, Any]:
    before = list(tokens or ()) if asked.echo else []
    prompt = "".join(turn.text for turn in asked.prompt)
    said: dict[str, Any] = {
        "text": prompt + reply.text if asked.echo else reply.text,
        "finish_reason": reply.finish,
        "logprobs": None,
    }
    if asked.sampling.scores is not None:
        scores = reply.scores or ()

        def name(token: int, text: str) -> str:
            return f"token_id:{token}" if asked.names_ids else text

        said["logprobs"] = {
            "tokens": [name(token.id, token.text) for token in before] + [s.text for s in scores],
            "token_logprobs": [_clamped(token.logp) for token in before] + [s.logp for s in scores],
            "top_logprobs": [
                {name(i, text): _clamped(logp) for i, text, logp in token.top} or None
                for token in before
            ]
            + [dict(score.top) for score in scores],
        }
    if tokens is not None and not asked.echo:
        said["prompt_logprobs"] = [_place(token) for token in tokens]
    return said


def _place(token: Token) -> dict[str, Any] | None:
    """A token of the prompt with its alternatives, as vLLM gives them; the first has none."""
    if token.logp is None:
        return None
    places = {
        str(i): {"logprob": _clamped(logp), "rank": rank, "decoded_token": text}
        for rank, (i, text, logp) in enumerate(token.top, start=1)
    }
    own = {"logprob": _clamped(token.logp), "rank": token.rank, "decoded_token": token.text}
    return {str(token.id): own, **places}


def _clamped(logp: float | None) -> float | None:
    return LEAST_LOGP if logp == -math.inf else logp
