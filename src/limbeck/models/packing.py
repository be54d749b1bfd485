"""Whether a model keeps samples apart that lie end to end in one line.

Models of transformers find the borders where position ids start again, most of them: a state-space
model carries its state across, and a model without position ids sees one long text. None of that is
an error there, so each model is asked, with a question whose answer is known.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from limbeck.core.random import stream
from limbeck.core.types import Encoding, Needs
from limbeck.models.by_sample import NAME, register
from limbeck.models.causal import CausalModel
from limbeck.models.modes import evaluating
from limbeck.models.taps import decoder_layers

log = logging.getLogger(__name__)

Packing = Literal["auto", "always", "never"]

BY_SAMPLE = ("flash", "flex_attention")
"""Attention whose cost grows with the square of each sample's length, not of the whole line's."""

LENGTHS = (9, 14, 6)
"""Tokens of the samples in the question."""

TOLERANCE = {torch.float32: 1e-3}
"""Of what one token of context changes: rounding is below, another sample's words are above."""

ROUGH_TOLERANCE = 0.1
"""The same in half precision. Where rounding alone is more, samples are padded, to be safe."""

WORTH_PACKING = 0.05
"""Padding, as a share of all positions, below which a batch is quicker padded than packed."""

LOGITS: Needs = frozenset({"logits"})


@contextmanager
def packing(wish: Packing, models: Sequence[CausalModel]) -> Iterator[bool]:
    """Let all models pack in the block, or none: what they share of a batch has one layout.

    `always` packs wherever that is right, and `auto` where it is known to be faster too: batches
    with more than a little padding, with flash or flex attention, and with torch's own on a CPU. On
    a GPU, a kernel for each sample may cost more than the padding that it saves.
    """
    with ExitStack() as stack:
        if wish != "never":
            # One that keeps few tokens of its own samples also reads those of others.
            longest = max(model.encoder.max_length for model in models)
            for model in models:
                stack.enter_context(_by_sample(model, longest))
        on = wish == "always" or (wish == "auto" and all(map(_pays, models)))
        mixing = [model.name for model in models if not keeps_apart(model)] if on else []
        if mixing:
            log.warning("%s would mix packed samples, so they are padded", ", ".join(mixing))
        on = on and not mixing
        if not on:
            stack.close()
        for model in models:
            stack.callback(setattr, model, "packs_from", math.inf)
            if on:
                model.packs_from = WORTH_PACKING if wish == "auto" else 0.0
        yield on


@contextmanager
def _by_sample(model: CausalModel, longest: int) -> Iterator[None]:
    """Attention sample by sample in the block, where it would be torch's over the whole line."""
    before, transformer = _attention(model), model.transformer
    if before != "sdpa" or not transformer._can_set_attn_implementation():
        yield
        return
    transformer.set_attn_implementation(register(longest))
    try:
        yield
    finally:
        transformer.set_attn_implementation(before)


def _pays(model: CausalModel) -> bool:
    used = _attention(model)
    on_cpu = used.startswith(NAME) and model.device.type == "cpu"
    return on_cpu or any(name in used for name in BY_SAMPLE)


@torch.no_grad()
def keeps_apart(model: CausalModel) -> bool:
    """Whether packed samples get the logits that each would get alone.

    A difference is measured against what another first token changes in the rows behind it, so the
    scale of the weights does not matter: a new model, nearly deaf to its context, is not trusted
    for that. A convolution is never trusted: gates make what it carries across so little while the
    weights are small that the rest of the context hides it.
    """
    if _convolves(model):
        return False
    autocast, dtype = model.autocast, next(model.module.parameters()).dtype
    if "flash" not in _attention(model):  # which has no fp32
        model.autocast = None
    samples = _samples(len(model.tokenizer))
    changed = [[(first + 1) % len(model.tokenizer), *rest] for first, *rest in samples]
    try:
        with evaluating(model.module):
            alone = [_logits(model, [sample], packed=False) for sample in samples]
            other = [_logits(model, [sample], packed=False) for sample in changed]
            together = _logits(model, samples, packed=True)
    except (TypeError, ValueError, RuntimeError) as error:  # no position ids, or no such kernel
        log.info("%s: cannot read packed samples: %s", model.name, error)
        return False
    finally:
        tolerance = TOLERANCE.get(model.autocast or dtype, ROUGH_TOLERANCE)
        model.autocast = autocast
    context = max(
        float((mine - theirs)[1:].abs().max()) for mine, theirs in zip(alone, other, strict=True)
    )
    return float((together - torch.cat(alone)).abs().max()) <= tolerance * context


def _convolves(model: CausalModel) -> bool:
    layers = decoder_layers(model.transformer)
    return any(isinstance(part, nn.Conv1d) for layer in layers for part in layer.modules())


def _attention(model: CausalModel) -> str:
    config = getattr(model.transformer, "config", None)
    return str(getattr(config, "_attn_implementation", ""))


def _samples(vocabulary: int) -> list[list[int]]:
    """Samples of tokens from all over the vocabulary."""
    generator = stream(0, "packing")
    return [torch.randint(vocabulary, (size,), generator=generator).tolist() for size in LENGTHS]


def _logits(model: CausalModel, samples: Sequence[Sequence[int]], *, packed: bool) -> Tensor:
    """Of every token but the last of each sample."""
    encodings = [Encoding.without_text(ids, [True] * len(ids)) for ids in samples]
    logits = model.read(model.encoder.collate(encodings, packed=packed), LOGITS).logits
    assert logits is not None
    return logits.float()
