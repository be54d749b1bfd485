"""Logits that have not been made: what an output head reads, and what it would do with it."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Projection:
    """The logits of n rows as the head would make them, in a few numbers a row instead of v.

    logits = cap * tanh(z / cap),   z = scale * (hidden W^T + low hidden' L^T + bias)

    Each part but the first may be absent.

    Attributes:
        hidden: [n, d] what the head reads.
        weight: [v, d] W, the model's own parameter and not a copy.
        bias: [v].
        low_hidden, low_weight: [n, r] and [v, r], a low-rank addition (LoRA on the head).
        scale: factor of the logits (Cohere's `logit_scale`, Granite's `logits_scaling`).
        soft_cap: c, Gemma's `final_logit_softcapping`.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    low_hidden: Tensor | None = None
    low_weight: Tensor | None = None
    scale: float = 1.0
    soft_cap: float | None = None

    @property
    def vocabulary(self) -> int:
        """v, the number of columns."""
        return self.weight.shape[0]

    @property
    def device(self) -> torch.device:
        """Where its head is."""
        return self.weight.device

    def __getitem__(self, index: Tensor | slice) -> "Projection":
        """The rows that `index` names; the head is shared."""
        if isinstance(index, Tensor):  # which may be where the student is
            index = index.to(self.hidden.device)
        low = None if self.low_hidden is None else self.low_hidden[index]
        return replace(self, hidden=self.hidden[index], low_hidden=low)

    def detached(self) -> "Projection":
        """The same without gradients, such as that of a student that teaches itself."""
        parts = ("hidden", "weight", "bias", "low_hidden", "low_weight")
        values = {name: getattr(self, name) for name in parts}
        return replace(self, **{k: v.detach() for k, v in values.items() if v is not None})

    def logits(self) -> Tensor:
        """[n, v], in the type of `hidden`; differentiable."""
        dtype = self.hidden.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        z = torch.nn.functional.linear(self.hidden, self.weight.to(dtype), bias)
        if self.low_hidden is not None and self.low_weight is not None:
            z = z + self.low_hidden.to(dtype) @ self.low_weight.to(dtype).T
        if self.scale != 1.0:
            z = z * self.scale
        return z if self.soft_cap is None else self.soft_cap * torch.tanh(z / self.soft_cap)
