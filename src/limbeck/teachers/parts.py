"""A view cut into its samples, which is how a cache knows them."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from limbeck.core.types import View


@dataclass(frozen=True, slots=True)
class Part:
    """One sample of a view: its name, its tokens without padding, and which are learnt.

    Attributes:
        rows: how many rows of the view are this sample's; they follow those of the part before.
    """

    name: str
    ids: NDArray[np.int64]
    learn: NDArray[np.bool_]
    rows: int


def parts(view: View) -> list[Part]:
    """The samples of a view in order, however they are laid out."""
    ids = view.ids.flatten().cpu()
    learn = torch.zeros(len(ids), dtype=torch.bool)
    learn[view.rows.cpu() + 1] = True
    places = view.attend.flatten().cpu().nonzero().flatten()
    count = view.sample_count
    owner = view.sample_of(torch.arange(len(ids)))[places]
    bounds = torch.searchsorted(owner, torch.arange(count + 1)).tolist()
    tokens, flags = ids[places].numpy(), learn[places].numpy()
    found: list[Part] = []
    for name, (first, last) in zip(view.names, pairwise(bounds), strict=True):
        mine = flags[first:last]
        found.append(Part(name, tokens[first:last], mine, int(mine.sum())))
    return found
