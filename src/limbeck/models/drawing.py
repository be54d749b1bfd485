"""Which token comes next: of each line's distribution by each line's own numbers."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from limbeck.core.types import Sampling

CACHED = 1 << 18
"""Logits that a processor looks at together: what is made of them on the way stays in its cache."""


Scores = tuple[list[float] | None, list[list[tuple[int, float]]]]
"""Of some tokens: log-probabilities, if asked for, and the likeliest tokens at each place."""


class Draw:
    """Draws a token of each line's distribution, and notes what it was worth.

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
        self.uniform = torch.stack(draws, 1).double() if draws else None
        self.step = 0
        self._logp: list[Tensor] = []
        self._top: list[tuple[Tensor, Tensor]] = []

    def __call__(self, logits: Tensor) -> Tensor:
        """[b, 1] the token that is drawn of each line's logits [b, v]."""
        logits = logits.float()
        if self.uniform is None:
            drawn = logits.argmax(-1, keepdim=True)
        else:
            self.uniform = self.uniform.to(logits.device)  # which is one copy for all tokens
            uniform = self.uniform[self.step][:, None]
            heat, top_p = self.sampling.temperature, self.sampling.top_p
            drawn = torch.cat([pick(x, u, top_p, heat) for x, u in _pieces(logits, uniform)])
        self.step += 1
        if self.sampling.scores is not None:
            self._note(logits, drawn, self.sampling.scores)
        return drawn

    def _note(self, logits: Tensor, drawn: Tensor, k: int) -> None:
        chosen: list[Tensor] = []
        top: list[tuple[Tensor, Tensor]] = []
        for part, token in _pieces(logits, drawn):
            total = part.logsumexp(-1, keepdim=True)
            chosen.append((part.gather(-1, token) - total).squeeze(-1))
            if k:
                values, indices = part.topk(min(k, part.shape[-1]))
                top.append((indices, values - total))
        self._logp.append(torch.cat(chosen))
        if top:
            indices, values = zip(*top, strict=True)
            self._top.append((torch.cat(indices), torch.cat(values)))

    def scores(self, row: int, length: int) -> Scores:
        """The log-probabilities of a line's first tokens, and the likeliest at each place."""
        if self.sampling.scores is None:
            return None, []
        logp, top = self._noted
        return logp[row][:length], [
            list(zip(*each, strict=True)) for each in (top[row][:length] if top else ())
        ]

    @cached_property
    def _noted(self) -> tuple[list[list[float]], list[Any]]:
        """What was noted of each line, brought from the device in one go."""
        logp = torch.stack(self._logp, 1).tolist()
        if not self._top:
            return logp, []
        ids, values = (torch.stack(part, 1).tolist() for part in zip(*self._top, strict=True))
        return logp, [list(zip(*line, strict=True)) for line in zip(ids, values, strict=True)]


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
