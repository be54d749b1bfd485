"""How the terms of a loss are scaled against each other.

Losses differ in unit and size: a KL of 0.1 nats beside a hidden state's squared difference of 40. A
rule finds a scale for each term, by which its weight is multiplied; the weight then says what the
term is worth, and not what unit it has.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

from torch import nn

from limbeck.core.term import Term
from limbeck.core.types import Needs, sites
from limbeck.models.taps import decoder_layers, layer_of, module_at

Rule = Literal["fixed", "gradient", "uncertainty"]

EVERY_STEPS = 20
"""Between two measurements of gradients, each of which costs a pass for every term."""

KEPT = 0.5
"""Share of a scale, in its logarithm, that outlives a measurement."""

RATE = 0.05
"""Step of the log-variances of `uncertainty`."""

LARGEST_STEP = 0.5
"""Of a log-variance, so that a first loss of a thousand does not throw it away."""

TINY = 1e-12


def by_gradient(scales: Sequence[float], norms: Sequence[float]) -> list[float]:
    """Scales with which all terms pull equally at the last layer they share.

    scale_k = norm_1 / norm_k, the first term's being 1: the learning rate keeps its meaning. One
    that was measured before goes half of the way there, in its logarithm (see `KEPT`). A term
    without a gradient, or with one that is not finite, keeps its scale.

    Source: Chen et al., "GradNorm" (arXiv 1711.02257), for the norm at one shared layer; Minixhofer
    et al. (arXiv 2503.20083) balance distillation so.
    """
    if not norms or not _tells(norms[0]):
        return list(scales)
    found: list[float] = []
    for before, norm in zip(scales, norms, strict=True):
        wanted = norms[0] / norm if _tells(norm) else before
        unmeasured = before == 1.0
        found.append(wanted if unmeasured else before**KEPT * wanted ** (1 - KEPT))
    return found


def _tells(norm: float) -> bool:
    """Whether a scale can be found from it: fp16 overflows to infinity, which would never leave."""
    return norm >= TINY and math.isfinite(norm)


def by_uncertainty(scales: Sequence[float], losses: Sequence[float]) -> list[float]:
    """One step on the log-variances s of  sum_k exp(-s_k) L_k + s_k,  scale_k = exp(-s_k).

    At rest exp(-s_k) L_k = 1: every term has size 1. A loss that is not finite, as that of a term
    without rows, changes nothing.

    Source: Kendall et al., "Multi-Task Learning Using Uncertainty to Weigh Losses" (arXiv
    1705.07115), in its form without the factor 1/2.
    """
    found: list[float] = []
    for scale, loss in zip(scales, losses, strict=True):
        step = RATE * (scale * loss - 1) if math.isfinite(loss) else 0.0
        found.append(scale * math.exp(-max(-LARGEST_STEP, min(LARGEST_STEP, step))))
    return found


def shared_layer(transformer: Any, terms: Sequence[Term]) -> nn.Module:
    """The last decoder layer whose weights all terms move.

    A term of logits moves all of them; one of hidden states or attention those up to the highest
    place that it reads.
    """
    layers = decoder_layers(transformer)
    tops = [_top(transformer, term.objective.asks) for term in terms]
    return layers[min(tops, default=len(layers) - 1)]


def _top(transformer: Any, asks: Needs) -> int:
    """The highest decoder layer whose weights a term's gradient reaches."""
    layers = list(decoder_layers(transformer))
    last = len(layers) - 1
    if asks & {"logits", "projection", "chosen", "boundary"}:
        return last
    highest = 0
    for site in sites(asks, "attention"):
        highest = max(highest, layer_of(transformer, site))
    for site in sites(asks, "hidden"):
        part = module_at(transformer, site)
        homes = [i for i, layer in enumerate(layers) if any(m is part for m in layer.modules())]
        behind = "norm" in site and not homes  # such as `model.norm`, which all layers lead to
        highest = max(highest, *homes, last if behind else 0)
    return highest
