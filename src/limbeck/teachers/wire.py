"""What is sent to an OpenAI-compatible server, and what its answers and refusals mean."""

import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from typing import Any

from limbeck.core.errors import RecipeError
from limbeck.core.exchange import Question, Reply, Scored
from limbeck.core.specs import ServerTeacher
from limbeck.core.text import one_line, until
from limbeck.core.types import Sampling
from limbeck.ledger.money import cost_usd

LONGEST_WAIT_SECONDS = 300.0
"""No server is waited for longer than this at a time, whatever it says."""

CHAT, PLAIN = "/chat/completions", "/completions"

WITHOUT_TEXT = ("length", "content_filter", "refusal")
"""Ends of a whole answer that has no text: reasoning used up its tokens, or it was not given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One answer as it came."""

    text: str
    finish: str
    scores: tuple[Scored, ...] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Heard:
    """A good response: its answers, and what it says of itself and of the bill."""

    choices: tuple[Choice, ...]
    model: str
    fingerprint: str | None
    prompt_tokens: int | None
    completion_tokens: int | None


class Again(Exception):
    """It may be tried again.

    Args:
        reason: what went wrong, without any secret.
        wait_seconds: as the server asked for; None where it did not say.
        billed: whether it may cost something; False where surely not.
        crowded: the server says that it is too much.
        heard: what of the answer was good.
    """

    def __init__(
        self,
        reason: str,
        *,
        wait_seconds: float | None = None,
        billed: bool = True,
        crowded: bool = False,
        heard: Heard | None = None,
    ) -> None:
        super().__init__(reason)
        self.reason, self.wait_seconds, self.billed = reason, wait_seconds, billed
        self.crowded, self.heard = crowded, heard


class Refused(Exception):
    """The server does not want this request: it would not want it again."""

    def __init__(self, status: int, reason: str, code: str = "") -> None:
        super().__init__(reason)
        self.status, self.reason, self.code = status, reason, code


def parameters(
    spec: ServerTeacher, question: Question, sampling: Sampling, *, max_name: str = "max_tokens"
) -> dict[str, Any]:
    """All that is sent, but for `n` and the seed: nothing is left to a server's own defaults.

    Raises:
        RecipeError: a conversation on the API `completions`, or `extra` names one of ours.
    """
    asked: dict[str, Any] = {"model": spec.model}
    if spec.api == "chat":
        asked["messages"] = [
            {"role": turn.role or "user", "content": turn.text} for turn in question.prompt
        ]
        if question.prefix:  # as vLLM has it
            asked["messages"].append({"role": "assistant", "content": question.prefix})
            asked |= {"continue_final_message": True, "add_generation_prompt": False}
    else:
        if any(turn.role for turn in question.prompt):
            raise RecipeError("api", "`completions` takes plain text, and this is a conversation")
        asked["prompt"] = "".join(turn.text for turn in question.prompt) + question.prefix
    asked |= {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        max_name: sampling.max_tokens,
        "stream": False,
    }
    if sampling.stop:
        asked["stop"] = list(sampling.stop)
    if sampling.scores is not None:
        if spec.api == "chat":
            asked |= {"logprobs": True, "top_logprobs": sampling.scores}
        else:
            asked["logprobs"] = sampling.scores
    if both := sorted(set(spec.extra) & {*asked, "n", "seed"}):
        raise RecipeError("extra", f"may not set {', '.join(both)}; steps and the recipe do")
    return asked | dict(spec.extra)


def written_out(extra: Mapping[str, Any]) -> Sequence[str]:
    """What `extra` may add to the prompt: a server writes tools and schemas into it."""
    return [json.dumps(dict(extra), ensure_ascii=False)] if extra else []


def read_response(body: bytes, api: str, n: int, *, scored: bool) -> Heard:
    """The answers in a response with status 200.

    Raises:
        Again: it is not JSON, has no answer, too few of them, or none that can be believed.
    """
    try:
        said: Any = json.loads(body)
    except (ValueError, RecursionError):
        raise Again(f"not JSON: {_short(body)}") from None
    if not isinstance(said, dict):
        raise Again(f"not a JSON object: {_short(body)}")
    if said.get("error"):
        raise Again(f"an error with status 200: {_message(said)}")
    listed = said.get("choices")
    if not isinstance(listed, list) or not listed:
        raise Again("a response without choices")
    told: Any = said.get("usage")
    usage: Mapping[str, Any] = told if isinstance(told, dict) else {}
    choices: list[Choice] = []
    wrong: str | None = None
    for entry in sorted(listed, key=lambda one: _index(one))[:n]:
        try:
            choices.append(_choice(entry, api, scored=scored))
        except (ValueError, KeyError, TypeError, AttributeError) as error:  # any shape may come
            wrong = str(error) if isinstance(error, ValueError) else "an answer of another shape"
    heard = Heard(
        choices=tuple(choices),
        model=str(said.get("model") or ""),
        fingerprint=_text(said.get("system_fingerprint")),
        prompt_tokens=_count(usage.get("prompt_tokens")),
        completion_tokens=_written(usage),
    )
    if wrong is not None or len(choices) < n:
        reason = wrong or f"{len(choices)} answers instead of {n}"
        raise Again(reason, heard=heard)
    return heard


def replies_of(
    heard: Heard, spec: ServerTeacher, question: str, indices: Iterable[int]
) -> dict[int, Reply]:
    """What was heard, as the replies of these indices to a question."""
    count = len(heard.choices)
    tokens = shares(heard.completion_tokens, count)
    usd = cost_usd(spec.price, heard.prompt_tokens, heard.completion_tokens)

    def one(place: int, index: int, choice: Choice) -> Reply:
        return Reply(
            question=question,
            index=index,
            text=choice.text,
            finish=choice.finish,
            model=heard.model or spec.model,
            fingerprint=heard.fingerprint,
            prompt_tokens=heard.prompt_tokens,
            completion_tokens=tokens[place],
            usd=None if usd is None else usd / count,
            scores=choice.scores,
        )

    pairs = enumerate(zip(indices, heard.choices, strict=False))
    return {index: one(place, index, choice) for place, (index, choice) in pairs}


def cut(reply: Reply, stop: Sequence[str]) -> Reply:
    """The reply without its stop string, which some servers leave at the end, and what is behind.

    Its scores stay: servers do not agree on whether they show those of the stop string.
    """
    text = until(reply.text, stop)
    return reply if text == reply.text else replace(reply, text=text, finish="stop")


def _choice(entry: Any, api: str, *, scored: bool) -> Choice:
    """One entry of `choices`.

    Raises:
        ValueError: it is no whole answer.
    """
    if not isinstance(entry, dict):
        raise ValueError("an answer that is no object")
    finish = entry.get("finish_reason")
    if not isinstance(finish, str) or not finish:
        raise ValueError("an answer without finish_reason, so nobody knows whether it is whole")
    message = entry.get("message") if api == "chat" else entry
    said: Mapping[str, Any] = message if isinstance(message, dict) else {}
    text = said.get("content" if api == "chat" else "text")
    if not text and said.get("refusal"):
        finish = "refusal"
    if text is None and said and finish in WITHOUT_TEXT:
        return Choice(text="", finish=finish, scores=() if scored else None)
    if not isinstance(text, str):
        raise ValueError("an answer without text")
    finish = "stop" if finish == "eos" else finish
    return Choice(text=text, finish=finish, scores=_scores(entry, api) if scored else None)


def _scores(entry: Mapping[str, Any], api: str) -> tuple[Scored, ...]:
    """The log-probabilities of an answer's tokens.

    Raises:
        ValueError: there are none, or one is no log-probability.
    """
    told = entry.get("logprobs")
    if not isinstance(told, dict):
        raise ValueError("an answer without logprobs")
    if api == "chat":
        rows = told.get("content")
        if not isinstance(rows, list):
            raise ValueError("an answer without logprobs")
        found = [(_token(row), row["logprob"], _tops(row.get("top_logprobs"))) for row in rows]
    else:
        tops = told.get("top_logprobs") or [None] * len(told.get("tokens", ()))
        found = [
            (token, logp, tuple((top or {}).items()))
            for token, logp, top in zip(told["tokens"], told["token_logprobs"], tops, strict=True)
        ]
    for token, logp, top in found:
        for value in (logp, *(v for _, v in top)):
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or math.isnan(value) or value > 1e-6 or value == -math.inf:
                raise ValueError(f"token {token!r} has the log-probability {value!r}")
    return tuple(
        Scored(text=str(token), logp=float(logp), top=tuple((str(t), float(v)) for t, v in top))
        for token, logp, top in found
    )


def _tops(rows: Any) -> tuple[tuple[Any, Any], ...]:
    return tuple((_token(row), row["logprob"]) for row in rows or ())


def _token(row: Mapping[str, Any]) -> Any:
    """A token's text; of a part of a character `bytes:\\xf0\\x9f`, as OpenAI writes it.

    Other servers only write a mark in its place, and have what it is in `bytes`.
    """
    raw = row.get("bytes")
    if not isinstance(raw, list) or not all(type(b) is int and 0 <= b < 256 for b in raw):
        return row["token"]
    try:
        bytes(raw).decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
    return row["token"]


def refusal(status: int, body: bytes, headers: Mapping[str, str]) -> Again | Refused:
    """What a status other than 200 means."""
    try:
        said: Any = json.loads(body)
    except (ValueError, RecursionError):
        said = None
    message = _message(said) if said is not None else _short(body)
    error = said.get("error") if isinstance(said, dict) else None
    code = str(error.get("code") or error.get("type") or "") if isinstance(error, dict) else ""
    reason = f"status {status}: {message}"
    if status == 429 and "insufficient_quota" in code:
        return Refused(status, reason, code)
    if status in (408, 409, 425, 429) or status >= 500:
        return Again(
            reason,
            wait_seconds=retry_after(headers),
            billed=status not in (409, 425, 429, 503),
            crowded=status in (429, 503),
        )
    return Refused(status, reason, code)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that a response asks to wait: `retry-after-ms`, or Retry-After in either form."""
    low = {name.lower(): value for name, value in headers.items()}
    try:
        if "retry-after-ms" in low:
            wait = float(low["retry-after-ms"]) / 1000
        elif "retry-after" in low:
            wait = float(low["retry-after"])
        else:
            return None
    except ValueError:
        try:
            wait = parsedate_to_datetime(low["retry-after"]).timestamp() - time.time()
        except (ValueError, TypeError, KeyError):
            return None
    return min(max(wait, 0.0), LONGEST_WAIT_SECONDS) if math.isfinite(wait) else None


def _message(said: Any) -> str:
    error = said.get("error", said) if isinstance(said, dict) else said
    text = error.get("message", error) if isinstance(error, dict) else error
    return one_line(text, 300)


def _short(body: bytes) -> str:
    return one_line(body[:120].decode(errors="replace")) or "nothing"


def _index(entry: Any) -> int:
    index = entry.get("index") if isinstance(entry, dict) else None
    return index if isinstance(index, int) else 0


def _count(value: Any) -> int | None:
    whole = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    return value if whole else None


def _written(usage: Mapping[str, Any]) -> int | None:
    """Tokens of the answers; some servers count the reasoning in the total alone."""
    said, prompt, total = (
        _count(usage.get(f"{what}_tokens")) for what in ("completion", "prompt", "total")
    )
    if said is None or prompt is None or total is None:
        return said
    return max(said, total - prompt)


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def shares(total: int | None, parts: int) -> Sequence[int | None]:
    """A request's tokens divided evenly among its answers; the sum is exact."""
    if total is None or not parts:
        return [None] * parts
    each, more = divmod(total, parts)
    return [each + (place < more) for place in range(parts)]
