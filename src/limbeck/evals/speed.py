"""How fast a model writes."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from limbeck.core.types import Sample, Sampling, Turn

REPEATS = 3


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
