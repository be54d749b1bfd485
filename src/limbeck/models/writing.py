"""A model writes: many prompts together, each with draws of its own.

What is drawn for a prompt depends on its own seed alone, not on what stands beside it in a batch.
So an answer that is asked for again comes out the same, whatever else is asked for.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StopStringCriteria

from limbeck.core.text import until
from limbeck.core.types import Sampling
from limbeck.models.drawing import Draw, Scores
from limbeck.models.following import Follower
from limbeck.models.positions import known_positions
from limbeck.models.taps import inside

log = logging.getLogger(__name__)

Shift = Callable[[Tensor, Tensor], Tensor]
"""Another distribution in place of the model's: (token ids so far, logits) -> logits."""

BATCH = 64
"""Prompts that are continued together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """What a model is to continue: token ids, and the seed of its draws."""

    ids: Sequence[int]
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Continuation:
    """What came.

    Attributes:
        text: behind the prompt; without the end-of-sequence token, and cut before a stop string.
        ended: whether the model ended it; False where `max_tokens` or its last position did.
        ids: the tokens, an end-of-sequence token too.
        logp: of each token, nats, at temperature 1 and over all tokens; None where not asked for.
        top: for each token, the likeliest ids at its place with theirs.
    """

    text: str
    ended: bool
    ids: Sequence[int]
    logp: Sequence[float] | None = None
    top: Sequence[Sequence[tuple[int, float]]] = ()


def write(
    transformer: Any,
    tokenizer: PreTrainedTokenizerBase,
    drafts: Sequence[Draft],
    sampling: Sampling,
    *,
    pad: int,
    shift: Callable[[Tensor], Shift] | None = None,
) -> list[Continuation]:
    """Continue each draft until an end-of-sequence token, a stop string or `max_tokens`.

    A model that knows no more than so many positions writes no further than to the last of them:
    nothing where the draft alone is that long.

    Drafts are sorted by length and run in batches, padded on the left. `sampling.seed` plays no
    part: drafts bring their own.

    Args:
        transformer: in evaluation mode.
        tokenizer: its tokenizer.
        drafts: what to continue.
        sampling: how to draw.
        pad: id that fills the lines.
        shift: makes, of a batch's attention mask [b, t], what changes its logits before a token is
            drawn.
    """
    room = _room(transformer, drafts, sampling.max_tokens)
    writing = [index for index, tokens in enumerate(room) if tokens]
    order = sorted(writing, key=lambda index: len(drafts[index].ids))
    nothing = Continuation(
        text="", ended=False, ids=[], logp=None if sampling.scores is None else []
    )
    found = dict.fromkeys(range(len(drafts)), nothing)
    for first in range(0, len(order), BATCH):
        chosen = order[first : first + BATCH]
        batch, most = [drafts[index] for index in chosen], [room[index] for index in chosen]
        said = _batch(transformer, tokenizer, batch, most, sampling, pad, shift)
        found |= zip(chosen, said, strict=True)
    return [found[index] for index in range(len(drafts))]


def _batch(
    transformer: Any,
    tokenizer: PreTrainedTokenizerBase,
    drafts: Sequence[Draft],
    most: Sequence[int],
    sampling: Sampling,
    pad: int,
    shift: Callable[[Tensor], Shift] | None,
) -> list[Continuation]:
    device = next(transformer.parameters()).device
    width = max(len(draft.ids) for draft in drafts)
    ids = torch.full((len(drafts), width), pad)
    attend = torch.zeros_like(ids)
    for row, draft in enumerate(drafts):
        ids[row, width - len(draft.ids) :] = torch.tensor(draft.ids)
        attend[row, width - len(draft.ids) :] = 1
    ids, attend = ids.to(device), attend.to(device)
    follow = Follower(transformer, attend)
    change = None if shift is None else shift(attend)
    draw = Draw([draft.seed for draft in drafts], sampling)
    ends = end_tokens(transformer, tokenizer)
    last = torch.tensor(ends, device=device, dtype=torch.int64)
    stop: Any = StopStringCriteria(tokenizer, list(sampling.stop)) if sampling.stop else None
    going = torch.ones(len(drafts), 1, dtype=torch.bool, device=device)
    ended, length = ~going, torch.zeros_like(going, dtype=torch.int64)
    room = torch.tensor(most, device=device)[:, None]
    for _ in range(max(most)):
        logits = follow(ids)
        if change is not None:
            logits = change(ids, logits)
        drawn = draw(logits).masked_fill_(~going, pad)
        ids = torch.cat([ids, drawn], 1)
        length += going
        over = torch.isin(drawn, last)
        if stop is not None:
            # Of what is written: a stop string must not begin in the prompt.
            over |= stop(ids[:, width:], None)[:, None]
        ended |= going & over
        going &= ~over & (length < room)
        if not bool(going.any()):
            break
    lines = torch.cat([length, ended, ids[:, width:]], 1).tolist()
    return [
        _written(tokenizer, draft.ids, line[:kept], draw.scores(row, kept), bool(over), sampling)
        for row, (draft, (kept, over, *line)) in enumerate(zip(drafts, lines, strict=True))
    ]


def _room(transformer: Any, drafts: Sequence[Draft], max_tokens: int) -> list[int]:
    """How many tokens fit behind each draft."""
    most = known_positions(transformer, inside(transformer).config)
    if most is None:
        return [max_tokens] * len(drafts)
    left = [most - len(draft.ids) for draft in drafts]
    if min(left) <= 0:
        _say_full(most)
    return [max(0, min(max_tokens, tokens)) for tokens in left]


@cache  # once
def _say_full(most: int) -> None:
    log.warning("behind prompts of %d tokens or more the model has no position to write at", most)


def _written(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[int],
    ids: list[int],
    scores: Scores,
    ended: bool,
    sampling: Sampling,
) -> Continuation:
    whole = text_behind(tokenizer, prompt, ids)
    text = until(whole, sampling.stop)
    logp, top = scores
    # A stop string may be seen in tokens and not in their text, and the other way about.
    return Continuation(text=text, ended=ended or text != whole, ids=ids, logp=logp, top=top)


def text_behind(
    tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], written: Sequence[int]
) -> str:
    """What was written, as it continues the prompt: some tokenizers drop a first space."""
    before = tokenizer.decode(list(prompt), skip_special_tokens=True)
    whole = tokenizer.decode([*prompt, *written], skip_special_tokens=True)
    assert isinstance(before, str)
    assert isinstance(whole, str)
    if whole.startswith(before):
        return whole[len(before) :]
    alone = tokenizer.decode(list(written), skip_special_tokens=True)  # it cuts a character
    assert isinstance(alone, str)
    return alone


def end_tokens(transformer: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a text: the tokenizer's, and those of the model, such as a turn's end."""
    own: Any = getattr(inside(transformer).generation_config, "eos_token_id", None)
    listed = own if isinstance(own, list) else [own]
    eos: Any = tokenizer.eos_token_id
    return sorted({token for token in (*listed, eos) if isinstance(token, int)})
