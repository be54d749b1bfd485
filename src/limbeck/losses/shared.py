"""What all losses do before their own formula: check, cut to shared columns, soften, normalise."""

import torch
from torch import Tensor


def factor(temperature: float, scale_by_t2: bool) -> float:
    """What the loss is multiplied by: T^2 or 1.

    Raises:
        ValueError: the temperature is not positive and finite.
    """
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be positive and finite; it is {temperature}")
    return temperature**2 if scale_by_t2 else 1.0


def check_share(name: str, value: float) -> None:
    """Raise ValueError unless `value` is in [0, 1]."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be between 0 and 1; it is {value}")


def same_precision(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """`widened` logits.

    Raises:
        ValueError: they are not [n, v] and [n, w] of the same n rows, or a width is 0.
    """
    fits = student.ndim == teacher.ndim == 2 and len(student) == len(teacher)
    if not fits or 0 in (student.shape[1], teacher.shape[1]):
        raise ValueError(
            "logits must be [n, v] and [n, w] of the same n rows; they are "
            f"{list(student.shape)} (student) and {list(teacher.shape)} (teacher)"
        )
    return widened(student, teacher)


def widened(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the wider of their types, and never in less than float32."""
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    return student.to(dtype), teacher.to(dtype)


def shared_columns(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """The columns that both have, of two models with one tokenizer.

    Models pad their output to a round width, each to its own (151,936 beside 152,064 columns);
    what one has beyond the other is padding and belongs to no token.

    Raises:
        ValueError: as `same_precision`.
    """
    student, teacher = same_precision(student, teacher)
    width = min(student.shape[1], teacher.shape[1])
    return student[:, :width], teacher[:, :width]


def log_probabilities(
    student: Tensor, teacher: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """log softmax(logits / T) of both, each normalised over the shared columns.

    Raises:
        ValueError: as `same_precision`.
    """
    student, teacher = shared_columns(student, teacher)
    if temperature != 1.0:
        student, teacher = student / temperature, teacher / temperature
    return student.log_softmax(-1), teacher.log_softmax(-1)


def at_most_certain(logp: Tensor) -> Tensor:
    """Log-probabilities; those that rounding put above 0 become 0, and keep their gradient."""
    return logp - logp.detach().clamp(min=0)


def log_sum(logits: Tensor) -> Tensor:
    """[n, 1] log of the sum of exp; -inf with zero gradient where there is nothing to sum."""
    if not logits.shape[1]:
        return logits.new_full((len(logits), 1), -torch.inf)
    nothing = (logits == -torch.inf).all(-1, keepdim=True)
    if not bool(nothing.any()):
        return logits.logsumexp(-1, keepdim=True)
    summed = logits.masked_fill(nothing, 0.0).logsumexp(-1, keepdim=True)
    return summed.masked_fill(nothing, -torch.inf)


def all_finite(values: Tensor) -> bool:
    """Whether no element is inf or NaN; False also where only their sum overflows.

    Losses ask this so that the usual case pays for one reduction and not for masks of full size.
    """
    return bool(values.detach().sum().isfinite())
