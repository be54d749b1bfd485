"""How fast a model writes."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from limbeck.core.types import Sample, Sampling, Turn
from limbeck.models.positions import known_positions
from limbeck.models.taps import inside

REPEATS = 3

OPENING_WORDS = 10
"""Words of a text without prompt that a model is asked to continue."""


def openings(models: Sequence[Any], samples: Sequence[Sample], max_tokens: int) -> list[Sample]:
    """What all of the models can continue by so many tokens: prompts, and beginnings of texts.

    Left out is what is empty to a model, and what would lead it beyond its last position.
    """
    found = [opening(sample) for sample in samples if sample.turns]
    for model in models:
        most = known_positions(model.transformer, inside(model.transformer).config)
        longest = math.inf if most is None else most - max_tokens
        found = [sample for sample in found if 0 < len(model.prompt_ids(sample)) <= longest]
    return found


def opening(sample: Sample) -> Sample:
    """The prompt, or the first words of a plain text."""
    if sample.prompt:
        return replace(sample, turns=sample.prompt)
    words = sample.turns[0].text.split(" ")[:OPENING_WORDS]
    return replace(sample, turns=(Turn(text=" ".join(words)),))


def tokens_per_second(
    speaker: Any,
    prompts: Sequence[Sample],
    max_tokens: int,
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> float | None:
    """Tokens written a second, greedily: the median of three runs after one to warm up.

    Tokens are counted by encoding the completions again with the model's own tokenizer, less what
    it adds to an empty text. That leaves out end-of-sequence tokens and may merge tokens
    otherwise than the model wrote them, so the figure is a little low; it is found in the same way
    for every model. The time includes reading the prompts. None where nothing was written.
    """
    if not prompts:
        return None
    sampling = Sampling(max_tokens=max_tokens, temperature=0.0)
    speaker.speak(prompts, sampling)
    empty = _length(speaker, "")
    rates: list[float] = []
    for _ in range(REPEATS):
        start = clock()
        completions: list[str] = speaker.speak(prompts, sampling)
        seconds = clock() - start
        tokens = sum(max(0, _length(speaker, text) - empty) for text in completions if text)
        if tokens and seconds > 0:
            rates.append(tokens / seconds)
    return statistics.median(rates) if rates else None


def _length(speaker: Any, text: str) -> int:
    encoding = speaker.encode(Sample(id="speed", turns=(Turn(text=text),)))
    return len(encoding.ids) + encoding.truncated
