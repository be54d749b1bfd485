"""AdamW, learning-rate schedules as pure functions of the step, gradients' norm, fp16 scaling."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

WSD_DECAY = 0.2
"""Share of the steps in which the warmup-stable-decay schedule comes down."""


def adamw(
    named: Iterable[tuple[str, nn.Parameter]], *, rate: float, decay: float
) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only; norms and biases have nothing to shrink to.

    The fused kernel is used where every parameter's device has one.
    """
    trained = [parameter for _, parameter in named]
    fused = bool(trained) and all(p.device.type in ("cpu", "cuda") for p in trained)
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for parameter in trained:
        # One kernel cannot update split and whole tensors (an objective's projectors) together.
        key = parameter.ndim >= 2, isinstance(parameter, DTensor)
        groups.setdefault(key, []).append(parameter)
    settings = [
        {"params": parameters, "weight_decay": decay if matrices else 0.0}
        for (matrices, _), parameters in groups.items()
    ]
    return torch.optim.AdamW(settings, lr=rate, fused=fused)


def rate_factor(kind: str, step: int, steps: int, warmup: float) -> float:
    """Share of the top learning rate at `step` (0 .. steps-1).

    Rises linearly over the first `warmup * steps` steps, then `cosine` or `linear` falls towards
    0, `wsd` stays and falls linearly over the last fifth, `constant` stays.

    >>> [round(rate_factor("linear", step, 4, 0.0), 2) for step in range(4)]
    [1.0, 0.75, 0.5, 0.25]
    """
    rising = round(warmup * steps)
    if step < rising:
        return (step + 1) / (rising + 1)
    done = (step - rising) / max(1, steps - rising)
    if kind == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    if kind == "linear":
        return 1 - done
    if kind == "wsd":
        return min(1.0, (1 - step / steps) / WSD_DECAY)
    return 1.0


def gradient_norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    """The 2-norm of all gradients together, over all processes."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    # Split and whole gradients are of different classes, which one foreach call cannot mix.
    split = [gradient for gradient in gradients if isinstance(gradient, DTensor)]
    plain = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
    norms: list[Tensor] = []
    if split:
        norm = torch.nn.utils.get_total_norm(split)
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    if plain:
        norms.append(torch.nn.utils.get_total_norm(plain))
    if len(norms) == 1:
        return norms[0].float()
    return torch.linalg.vector_norm(torch.stack([norm.float() for norm in norms]))


@dataclass
class LossScale:
    """Keeps fp16 gradients above underflow: halved after an overflow, doubled after a quiet spell.

    At 1.0 with `active` False it does nothing, which is right for fp32 and bf16.
    """

    value: float = 1.0
    active: bool = False
    quiet: int = 0
    every: int = 1000

    def update(self, finite: bool) -> bool:
        """Learn from a step; True when its overflow was only a scale that is still too high."""
        if not self.active:
            return False
        self.quiet = self.quiet + 1 if finite else 0
        if not finite:
            self.value = max(1.0, self.value / 2)
            return self.value > 1.0
        if self.quiet == self.every:
            self.value, self.quiet = self.value * 2, 0
        return False
