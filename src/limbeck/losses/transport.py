"""Transport distances between distributions over two different vocabularies."""

import torch
from torch import Tensor


def sorted_l1(
    student: Tensor, teacher: Tensor, *, temperature: float = 1.0, scale_by_t2: bool = True
) -> Tensor:
    """Universal Logit Distillation's closed form: L1 distance of the sorted probabilities.

    T^2 * sum_i |p_(i) - q_(i)|,   p_(1) >= p_(2) >= ..., the shorter one padded with zeros

    It is v times the Wasserstein-1 distance between the two histograms of probability *values*:
    it does not see which token a probability belongs to, so two different certain predictions
    have distance 0. Its gradient vanishes where the student's probability does, and is undefined
    at ties.

    Args:
        student: [n, v] logits.
        teacher: [n, w] logits; v and w may differ, and all columns count.
        temperature: T.
        scale_by_t2: multiply by T^2.

    Returns:
        [n], between 0 and 2 T^2.

    Raises:
        ValueError: shapes do not fit, or the temperature is not positive.

    Source: Boizard et al., "Towards Cross-Tokenizer Distillation: the Universal Logit Distillation
    Loss for LLMs" (2024), eq. 6.

    >>> p, q = torch.tensor([[0.6, 0.4]]), torch.tensor([[0.5, 0.3, 0.2]])
    >>> round(sorted_l1(q.log(), p.log()).item(), 4)
    0.4
    """
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be positive and finite; it is {temperature}")
    if student.ndim != 2 or teacher.ndim != 2 or len(student) != len(teacher):
        raise ValueError(
            "logits must be [n, v] and [n, w] of the same n rows; they are "
            f"{list(student.shape)} (student) and {list(teacher.shape)} (teacher)"
        )
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    q = (student.to(dtype) / temperature).softmax(-1).sort(-1, descending=True).values
    p = (teacher.to(dtype) / temperature).softmax(-1).sort(-1, descending=True).values
    width = min(p.shape[1], q.shape[1])
    both = (p[:, :width] - q[:, :width]).abs().sum(-1)
    value = both + p[:, width:].sum(-1) + q[:, width:].sum(-1)
    return value * temperature**2 if scale_by_t2 else value
