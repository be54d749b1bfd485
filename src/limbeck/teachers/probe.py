"""What a server really does, found by asking it a few tiny questions, and remembered."""

import json
import logging
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from limbeck.core.errors import ServerError
from limbeck.core.exchange import Question, Scored
from limbeck.core.files import write_json
from limbeck.core.specs import ServerTeacher
from limbeck.core.types import Sampling, Turn
from limbeck.teachers.wire import Again, Heard, Refused, parameters

log = logging.getLogger(__name__)

Ask = Callable[[Mapping[str, Any], int], Awaitable[Heard]]
"""Sends parameters, with how many answers are wanted."""

SAID = "Say a few words about the sea."
TOKENS = 12


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """What a server does.

    Attributes:
        n: several answers to one request.
        seed: the same seed draws the same words, another one others; None where all draws were the
            same, so that nothing could be seen of it.
        logprobs: log-probabilities of the answer's tokens that can be believed.
        prefix: it goes on from the beginning of an answer.
        max_name: what it calls the longest answer: `max_tokens`, or `max_completion_tokens`.
        model: the version that it said it was.
    """

    n: bool = False
    seed: bool | None = False
    logprobs: bool = False
    prefix: bool = False
    max_name: str = "max_tokens"
    model: str = ""


def account_of(spec: ServerTeacher) -> str:
    """The account under which a ledger counts this endpoint and model."""
    return f"{spec.url.rstrip('/')} {spec.model}"


def _path(spec: ServerTeacher) -> Path:
    return Path(spec.ledger).expanduser().with_suffix(".capabilities.json")


def remembered(spec: ServerTeacher) -> Capabilities | None:
    """What was found out earlier about this endpoint and model."""
    try:
        known = json.loads(_path(spec).read_text(encoding="utf-8"))[account_of(spec)]
        return Capabilities(**known)
    except (OSError, ValueError, KeyError, TypeError):
        return None


async def probe(spec: ServerTeacher, ask: Ask) -> Capabilities:
    """Ask; what is found is kept beside the ledger.

    Raises:
        ServerError: not even a plain question is answered.
    """
    found = await _found(spec, ask)
    log.info(
        "%s: %s",
        spec.model,
        ", ".join(
            f"{name} {'unknown' if value is None else 'yes' if value else 'no'}"
            for name, value in asdict(found).items()
            if not isinstance(value, str)
        ),
    )
    known: dict[str, Any] = {}
    path = _path(spec)
    if path.exists():
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            known = {}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {**known, account_of(spec): asdict(found)})
    return found


async def _found(spec: ServerTeacher, ask: Ask) -> Capabilities:
    sampling = Sampling(max_tokens=TOKENS, temperature=1.0)
    question = Question(id="probe", prompt=(Turn(text=SAID),))
    max_name = "max_tokens"
    try:
        plain = await ask(parameters(spec, question, sampling), 1)
    except Refused as error:
        if "max_completion_tokens" not in error.reason:
            raise _hopeless(spec, error) from None
        max_name = "max_completion_tokens"
        try:
            plain = await ask(parameters(spec, question, sampling, max_name=max_name), 1)
        except (Refused, Again) as again:
            raise _hopeless(spec, again) from None
    except Again as error:
        raise _hopeless(spec, error) from None

    async def tried(
        question: Question = question,
        sampling: Sampling = sampling,
        n: int = 1,
        seed: int | None = None,
    ) -> Heard | None:
        """A variation; None where the server refuses it or fails at it."""
        asked = parameters(spec, question, sampling, max_name=max_name)
        try:
            return await ask(asked if seed is None else {**asked, "seed": seed}, n)
        except (Refused, Again):
            return None

    two = await tried(n=2)
    texts = [await tried(seed=seed) for seed in (1, 1, 2)]
    words = [heard.choices[0].text for heard in texts if heard is not None and heard.choices]
    scored = await tried(sampling=replace(sampling, scores=2))
    begun = await tried(question=replace(question, prefix="The sea is"))
    return Capabilities(
        n=two is not None and len(two.choices) == 2,
        seed=seeded(words),
        logprobs=scored is not None and bool(scored.choices) and believable(scored),
        prefix=begun is not None
        and bool(begun.choices)
        and not begun.choices[0].text.lstrip().startswith("The sea is"),
        max_name=max_name,
        model=plain.model,
    )


def seeded(words: Sequence[str]) -> bool | None:
    """What the answers to one question with the seeds 1, 1 and 2 say; fewer, where it refused."""
    if len(words) < 3 or words[0] != words[1]:
        return False
    return True if words[1] != words[2] else None


def believable(heard: Heard) -> bool:
    """Whether an answer's log-probabilities can be the model's: some servers send placeholders.

    They may go on behind the text, with the token that ended it.
    """
    scores = heard.choices[0].scores or ()
    if not scores or len({score.logp for score in scores}) == 1 < len(scores):
        return False
    spelt, text = (
        "".join(words.split())
        for words in ("".join(score.text for score in scores), heard.choices[0].text)
    )
    return spelt.startswith(text) and all(map(_plausible, scores))


def _plausible(score: Scored) -> bool:
    total = sum(math.exp(value) for _, value in score.top)
    others = [value for text, value in score.top if text != score.text]  # vLLM begins with its own
    return others == sorted(others, reverse=True) and total <= 1 + 1e-3


def _hopeless(spec: ServerTeacher, error: Exception) -> Exception:
    if isinstance(error, Refused) and error.status in (401, 402, 403, 404, 429):
        return error  # whoever asked knows what to say of these
    return ServerError(f"{spec.url} does not answer a plain question: {error}")
