"""Losses against the text's own next token, with no teacher."""

import torch
from torch import Tensor

IGNORE = -100
"""Label of a row that has none; its loss and gradient are 0."""


def cross_entropy(student: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood of the label: plain fine-tuning.

    -log q[label],   q = softmax(student)

    Args:
        student: [n, v] logits.
        labels: [n] int64 in 0 .. v-1, or -100 for a row without label, whose loss is 0.

    Returns:
        [n] nats.

    Raises:
        ValueError: shapes do not fit.

    Source: Shannon, "A Mathematical Theory of Communication" (1948); as a loss, any text on
    maximum likelihood.

    >>> q = torch.tensor([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2]])
    >>> [round(value, 5) for value in cross_entropy(q.log(), torch.tensor([0, -100])).tolist()]
    [0.69315, 0.0]
    """
    if student.ndim != 2 or labels.shape != student.shape[:1]:
        raise ValueError(
            "logits must be [n, v] and labels [n]; they are "
            f"{list(student.shape)} (student) and {list(labels.shape)} (labels)"
        )
    dtype = torch.promote_types(student.dtype, torch.float32)
    return torch.nn.functional.cross_entropy(
        student.to(dtype), labels, ignore_index=IGNORE, reduction="none"
    )
