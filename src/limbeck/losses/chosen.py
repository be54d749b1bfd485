"""Log-probabilities of a few outcomes from logits that are never all there together."""

import torch
from torch import Tensor

from limbeck.losses.by_rows import chunk_rows, in_chunks
from limbeck.losses.projection import Projection
from limbeck.losses.shared import at_most_certain


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
    every = torch.arange(len(labels), device=labels.device)

    def of_rows(part: Tensor) -> Tensor:
        with torch.autocast(projection.device.type, enabled=False):
            return torch.stack(outcomes_of(projection[part].logits(), labels[part], among), -1)

    found = in_chunks(of_rows, every, rows=chunk_rows(projection.vocabulary))
    return found[:, 0], None if among is None else found[:, 1]


def outcomes_of(logits: Tensor, labels: Tensor, among: Tensor | None = None) -> tuple[Tensor, ...]:
    """The same from logits [n, v]; without a set, the second is zeros."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    total = wide.logsumexp(-1)
    chosen = wide.gather(-1, labels[:, None]).squeeze(-1) - total
    if among is None:
        return chosen, torch.zeros_like(chosen)
    return chosen, at_most_certain(wide[:, among].logsumexp(-1) - total)
