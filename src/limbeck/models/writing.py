"""A model writes: many prompts together, each with draws of its own.

What is drawn for a prompt depends on its own seed alone, not on what stands beside it in a batch.
So an answer that is asked for again comes out the same, whatever else is asked for.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from limbeck.core.types import Sampling
from limbeck.models.taps import inside

Shift = Callable[[Tensor, Tensor], Tensor]
"""Another distribution in place of the model's: (token ids so far, logits) -> logits."""

BATCH = 64
"""Prompts that are continued together."""

CACHED = 1 << 18
"""Logits that a processor looks at together: what is made of them on the way stays in its cache."""


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
        ended: whether the model ended it; False where `max_tokens` did.
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
    order = sorted(range(len(drafts)), key=lambda index: len(drafts[index].ids))
    found: dict[int, Continuation] = {}
    for first in range(0, len(order), BATCH):
        chosen = order[first : first + BATCH]
        batch = [drafts[index] for index in chosen]
        found |= zip(
            chosen, _batch(transformer, tokenizer, batch, sampling, pad, shift), strict=True
        )
    return [found[index] for index in range(len(drafts))]


def _batch(
    transformer: Any,
    tokenizer: PreTrainedTokenizerBase,
    drafts: Sequence[Draft],
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
    ends = end_tokens(transformer, tokenizer)
    draw = Draw([draft.seed for draft in drafts], sampling)
    options: dict[str, Any] = {}
    if sampling.stop:
        options = {"stop_strings": list(sampling.stop), "tokenizer": tokenizer}
    with _no_habits(transformer):
        output: Tensor = transformer.generate(
            input_ids=ids.to(device),
            attention_mask=attend.to(device),
            max_new_tokens=sampling.max_tokens,
            do_sample=False,  # `draw` leaves one token to choose
            pad_token_id=pad,
            eos_token_id=ends or None,
            logits_processor=[*([shift(attend.to(device))] if shift else []), draw],
            **options,
        )
    lines = output[:, width:].tolist()
    return [
        _written(tokenizer, draft.ids, line, draw, row, set(ends), sampling)
        for row, (draft, line) in enumerate(zip(drafts, lines, strict=True))
    ]


def _written(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[int],
    line: list[int],
    draw: "Draw",
    row: int,
    ends: set[int],
    sampling: Sampling,
) -> Continuation:
    last = next((place for place, token in enumerate(line) if token in ends), None)
    ids = line if last is None else line[: last + 1]
    text = text_behind(tokenizer, prompt, ids)
    stops = [place for stop in sampling.stop if (place := text.find(stop)) >= 0]
    if stops:
        text = text[: min(stops)]
    if last is None and len(line) < sampling.max_tokens:
        stops = stops or [0]  # the library saw a stop string that the text does not show
    logp, top = draw.scores(row, len(ids))
    return Continuation(
        text=text, ended=last is not None or bool(stops), ids=ids, logp=logp, top=top
    )


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


class Draw:
    """Leaves of each line's distribution the one token that is drawn; notes what it was worth.

    One uniform number a line and token chooses by the cumulated probabilities, so that a line's
    draws do not depend on the others'. Temperature 0 takes the likeliest.

    Args:
        seeds: one for each line.
        sampling: temperature, `top_p`, `max_tokens` and `scores`.
    """

    def __init__(self, seeds: Sequence[int], sampling: Sampling) -> None:
        self.sampling = sampling
        draws = [
            torch.rand(sampling.max_tokens, generator=torch.Generator().manual_seed(seed))
            for seed in (seeds if sampling.temperature > 0 else ())
        ]
        self.uniform = torch.stack(draws, 1) if draws else None
        self.step = 0
        self._logp: list[Tensor] = []
        self._top: list[tuple[Tensor, Tensor]] = []

    def __call__(self, input_ids: Tensor, logits: Tensor) -> Tensor:
        """[b, v] the logits, overwritten: minus infinity but for the token that was drawn."""
        del input_ids
        logits = logits.float()
        if self.uniform is None:
            drawn = logits.argmax(-1, keepdim=True)
        else:
            uniform = self.uniform[self.step].to(logits.device)[:, None]
            heat, top_p = self.sampling.temperature, self.sampling.top_p
            drawn = torch.cat([pick(x, u, top_p, heat) for x, u in _pieces(logits, uniform)])
        self.step += 1
        if self.sampling.scores is not None:
            self._note(logits, drawn, self.sampling.scores)
        return logits.fill_(-torch.inf).scatter_(-1, drawn, 0.0)

    def _note(self, logits: Tensor, drawn: Tensor, k: int) -> None:
        chosen: list[Tensor] = []
        top: list[tuple[Tensor, Tensor]] = []
        for part, token in _pieces(logits, drawn):
            logp = part.log_softmax(-1)
            chosen.append(logp.gather(-1, token).squeeze(-1))
            if k:
                values, indices = logp.topk(min(k, logp.shape[-1]))
                top.append((indices, values))
        self._logp.append(torch.cat(chosen))
        if top:
            indices, values = zip(*top, strict=True)
            self._top.append((torch.cat(indices), torch.cat(values)))

    def scores(
        self, row: int, length: int
    ) -> tuple[list[float] | None, list[list[tuple[int, float]]]]:
        """The log-probabilities of a line's first tokens, and the likeliest at each place."""
        if self.sampling.scores is None:
            return None, []
        logp = [float(values[row]) for values in self._logp[:length]]
        top = [
            list(zip(ids[row].tolist(), values[row].tolist(), strict=True))
            for ids, values in self._top[:length]
        ]
        return logp, top


def _pieces(logits: Tensor, beside: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """A few lines at a time of both; all of them where no processor's cache is at stake."""
    lines = max(1, CACHED // logits.shape[-1]) if logits.device.type == "cpu" else len(logits)
    if lines >= len(logits):
        return iter([(logits, beside)])
    return zip(logits.split(lines), beside.split(lines), strict=True)


def pick(logits: Tensor, uniform: Tensor, top_p: float, heat: float = 1.0) -> Tensor:
    """[b, 1] the token in whose stretch of the cumulated probabilities the number falls.

    Args:
        logits: [b, v].
        uniform: [b, 1] in [0, 1).
        top_p: only the likeliest tokens that have this probability together.
        heat: temperature, above 0.
    """
    order = None
    probability = (logits if heat == 1 else logits / heat).softmax(-1)
    if top_p < 1:
        probability, order = probability.sort(dim=-1, descending=True, stable=True)
        before = probability.cumsum(-1) - probability
        probability = probability.masked_fill(before >= top_p, 0.0)  # the first always stays
    total = probability.double().cumsum_(-1)
    place = torch.searchsorted(total, uniform.double() * total[:, -1:], right=True)
    # Rounding must not choose a token behind the last one that has a probability.
    place = place.clamp_(max=probability.shape[-1] - 1)
    if not bool((probability.gather(-1, place) > 0).all()):
        final = (probability > 0).int().cumsum(-1).argmax(-1, keepdim=True)
        place = torch.minimum(place, final)
    return place if order is None else order.gather(-1, place)


@contextmanager
def _no_habits(transformer: Any) -> Iterator[None]:
    """Without the defaults that come with a model, such as a repetition penalty."""
    base = inside(transformer)
    own = base.generation_config
    base.generation_config = GenerationConfig()
    try:
        yield
    finally:
        base.generation_config = own
