"""Rows laid out sample by sample, so that those of one sample can be compared with each other."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Blocks:
    """Where each of n rows stands in [samples, longest].

    Attributes:
        sample: [n] which line.
        place: [n] which place in it; a sample's rows keep their order.
        lengths: [samples] rows of each.
        longest: the largest of them.

    >>> blocks = Blocks.of(torch.tensor([7, 7, 9]))
    >>> blocks.scatter(torch.tensor([1.0, 2.0, 3.0]))
    tensor([[1., 2.],
            [3., 0.]])
    >>> blocks.gather(torch.tensor([[1.0, 2.0], [3.0, 0.0]]))
    tensor([1., 2., 3.])
    """

    sample: Tensor
    place: Tensor
    lengths: Tensor
    longest: int

    @classmethod
    def of(cls, sample: Tensor) -> "Blocks":
        """From [n], which sample each row is of; they need not be sorted."""
        _, line, lengths = torch.unique(sample, return_inverse=True, return_counts=True)
        order = line.argsort(stable=True)
        first = lengths.cumsum(0) - lengths
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device) - first[line[order]]
        return cls(line, place, lengths, int(lengths.max()) if len(lengths) else 0)

    @property
    def there(self) -> Tensor:
        """[samples, longest] where there is a row."""
        places = torch.arange(self.longest, device=self.lengths.device)
        return places < self.lengths[:, None]

    def scatter(self, values: Tensor) -> Tensor:
        """[n, ...] -> [samples, longest, ...] with zeros where a sample has no more rows."""
        shape = (len(self.lengths), self.longest, *values.shape[1:])
        return values.new_zeros(shape).index_put((self.sample, self.place), values)

    def gather(self, values: Tensor) -> Tensor:
        """[samples, longest, ...] -> [n, ...]."""
        return values[self.sample, self.place]
