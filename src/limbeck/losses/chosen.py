"""Log-probabilities of a few outcomes from logits that are never all there together."""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from limbeck.losses.projection import Projection

CHUNK_BYTES = 2**26
"""Size of the float32 logits that are made at a time."""


def outcomes(
    projection: Projection, labels: Tensor, among: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """log p(label) of each row, and the log of the probability of a set of tokens.

    chosen_i = z_i[label_i] - logsumexp z_i,   within_i = logsumexp_{j in A} z_ij - logsumexp z_i

    A chunk of rows at a time; the backward pass makes each chunk's logits again.

    Args:
        projection: of n rows; receives gradients.
        labels: [n].
        among: [v] bool, the set A; None where it is not asked for.

    Returns:
        [n] and [n] (or None), float32 or wider, nats.
    """
    rows = max(1, CHUNK_BYTES // (4 * projection.vocabulary))
    chosen: list[Tensor] = []
    within: list[Tensor] = []
    for part in torch.arange(len(labels), device=labels.device).split(rows):
        some = projection[part]
        found = (
            checkpoint(_of_rows, some, labels[part], among, use_reentrant=False)
            if torch.is_grad_enabled()
            else _of_rows(some, labels[part], among)
        )
        chosen.append(found[0])
        within.append(found[1])
    if not chosen:
        none = projection.hidden.new_zeros(0, dtype=torch.float32)
        return none, None if among is None else none
    return torch.cat(chosen), None if among is None else torch.cat(within)


def outcomes_of(logits: Tensor, labels: Tensor, among: Tensor | None = None) -> tuple[Tensor, ...]:
    """The same from logits [n, v]; without a set, the second is zeros."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    total = wide.logsumexp(-1)
    chosen = wide.gather(-1, labels[:, None]).squeeze(-1) - total
    if among is None:
        return chosen, torch.zeros_like(chosen)
    return chosen, wide[:, among].logsumexp(-1) - total


def _of_rows(some: Projection, labels: Tensor, among: Tensor | None) -> tuple[Tensor, ...]:
    with torch.autocast(some.device.type, enabled=False):
        return outcomes_of(some.logits(), labels, among)
