"""Divergences from a teacher of whom only a few tokens a row are known: top-k, or random draws."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Sparse:
    """What is known of n distributions: some tokens with their probability, and the rest's.

    Attributes:
        ids: [n, k] int64 token ids, different within a row. Where a row has fewer than k, the
            others have mass 0 (and any valid id).
        mass: [n, k] float32. Top-k: the probability itself. Random draws: the share of draws that
            fell on the token, which has the probability as its expectation.
        rest: [n] float32, probability of all other tokens together; 0 for random draws. Mass and
            rest sum to 1.
        negentropy: [n] float32, the teacher's part of the KL divergence, in nats. Top-k:
            sum mass log mass + rest log rest. Random draws: the mean of log p over the draws,
            whose expectation is sum p log p.
        temperature: at which the teacher's logits were softened.
    """

    ids: Tensor
    mass: Tensor
    rest: Tensor
    negentropy: Tensor
    temperature: float = 1.0

    def select(self, index: Tensor | slice) -> "Sparse":
        """The rows that `index` names."""
        return replace(
            self,
            ids=self.ids[index],
            mass=self.mass[index],
            rest=self.rest[index],
            negentropy=self.negentropy[index],
        )

    def to(self, device: torch.device) -> "Sparse":
        """The same on `device`."""
        return replace(
            self,
            ids=self.ids.to(device, non_blocking=True),
            mass=self.mass.to(device, non_blocking=True),
            rest=self.rest.to(device, non_blocking=True),
            negentropy=self.negentropy.to(device, non_blocking=True),
        )
