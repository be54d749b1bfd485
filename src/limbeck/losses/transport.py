"""Transport distances between distributions over two different vocabularies."""

from torch import Tensor

from limbeck.losses.shared import factor, same_precision


def sorted_l1(
    student: Tensor, teacher: Tensor, *, temperature: float = 1.0, scale_by_t2: bool = True
) -> Tensor:
    """Universal Logit Distillation's closed form: L1 distance of the sorted probabilities.

    T^2 * sum_i |p_(i) - q_(i)|,   p_(1) >= p_(2) >= ..., the shorter one padded with zeros

    It compares how probable the most likely token, the second, ... is to each model, and does not
    see which token that is: two different certain predictions have distance 0. In terms of
    transport it is twice the least total variation over all ways to match the two vocabularies one
    to one. Its gradient vanishes where the student's probability does and is 0 at p_(i) = q_(i).
    The factor T^2 is there for the common interface; nothing in this loss asks for it.

    Args:
        student: [n, v] logits.
        teacher: [n, w] logits; v and w may differ, and all columns count.
        temperature: T, divides both models' logits.
        scale_by_t2: multiply by T^2.

    Returns:
        [n], between 0 and 2 T^2: probability, not nats.

    Raises:
        ValueError: shapes do not fit, or the temperature is not positive.

    Source: Boizard et al., "Towards Cross-Tokenizer Distillation: the Universal Logit Distillation
    Loss for LLMs" (arXiv 2402.12030), the closed form of its Wasserstein distance.

    >>> import torch
    >>> p, q = torch.tensor([[0.6, 0.4]]), torch.tensor([[0.5, 0.3, 0.2]])
    >>> round(sorted_l1(q.log(), p.log()).item(), 4)
    0.4
    """
    scale = factor(temperature, scale_by_t2)
    student, teacher = same_precision(student, teacher)
    q = (student / temperature).softmax(-1).sort(-1, descending=True).values
    p = (teacher / temperature).softmax(-1).sort(-1, descending=True).values
    both = min(p.shape[1], q.shape[1])
    overlap = (p[:, :both] - q[:, :both]).abs().sum(-1)
    return scale * (overlap + p[:, both:].sum(-1) + q[:, both:].sum(-1))
