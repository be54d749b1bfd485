"""A model that follows texts as they grow, a token at a time."""

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from limbeck.models.positions import known_positions
from limbeck.models.taps import inside

KEPT = ("cache", "past_key_values")
"""What transformers calls that which a model keeps of what it has read; it changed its name."""


class Follower:
    """Says what comes next in some texts, again and again, and reads each token only once.

    A model that cannot keep what it has read, or keeps it in a way of its own, reads all anew. What
    lies behind the last position that it knows is read as if it stood there: only texts that are
    over, and go on as padding, may be that long.

    Args:
        transformer: a causal language model in evaluation mode. Its forward pass need not know
            more than `input_ids` and `attention_mask`.
        attend: [b, t] which of the first tokens count; padding is on the left.
    """

    def __init__(self, transformer: Any, attend: Tensor) -> None:
        self.transformer = transformer
        self.device = next(transformer.parameters()).device
        self.attend = attend.to(self.device)
        self.padded = not bool(attend.all())
        most = known_positions(transformer, inside(transformer).config)
        self.last = None if most is None else most - 1
        self.positions = (self.attend.cumsum(1) - 1).clamp_(min=0, max=self.last)
        self.seen = 0
        self.kept: Any = None
        base = getattr(transformer, "get_base_model", lambda: transformer)()
        self.known = inspect.signature(base.forward).parameters
        self.keeps = next((name for name in KEPT if name in self.known), None)

    def __call__(self, ids: Tensor) -> Tensor:
        """[b, v] logits behind texts that begin as those of the last call; needs `no_grad`."""
        ids = ids.to(self.device)
        while self.positions.shape[1] < ids.shape[1]:
            behind = (self.positions[:, -1:] + 1).clamp_(min=0, max=self.last)
            self.positions = torch.cat([self.positions, behind], 1)
            if self.padded:
                self.attend = torch.nn.functional.pad(self.attend, (0, 1), value=1)
        if self.kept is not None:
            return self._read(ids, self.attend, self.positions)
        # Several answers to one prompt begin alike, which is read once for all of them.
        lines = torch.cat([ids, self.attend], 1)
        alike, of = torch.unique(lines, dim=0, return_inverse=True)
        if len(alike) == len(ids):
            return self._read(ids, self.attend, self.positions)
        one = of.new_zeros(len(alike)).scatter_(0, of, torch.arange(len(of), device=of.device))
        logits = self._read(ids[one], self.attend[one], self.positions[one])
        self.kept = _repeated(self.kept, of)
        return logits[of]

    def _read(self, ids: Tensor, attend: Tensor, positions: Tensor) -> Tensor:
        new = slice(self.seen if self.kept is not None else 0, None)
        given: dict[str, Any] = {
            # Without padding every model attends to all that came before; and a state, such as a
            # Mamba's, has left the padding out by the time that it is kept.
            "attention_mask": attend if self.padded and _attends(self.kept) else None,
            "position_ids": positions[:, new],
            "use_cache": self.keeps is not None,
            "logits_to_keep": 1,
        }
        given = {name: value for name, value in given.items() if name in self.known}
        if self.keeps is not None:
            given[self.keeps] = self.kept
        said = self.transformer(input_ids=ids[:, new], **given)
        if self.keeps is not None:
            self.kept, self.seen = getattr(said, self.keeps, None), ids.shape[1]
        return said.logits[:, -1].float()


def _attends(kept: Any) -> bool:
    """Whether what is kept has a place for each token, so that some must be masked."""
    layers = kept.layers if isinstance(kept, Cache) else ()
    return not layers or any(hasattr(layer, "keys") for layer in layers)


def _repeated(kept: Any, of: Tensor) -> Any:
    """What is kept of some lines, for the lines [b] that are like them; None where it cannot be."""
    if not isinstance(kept, Cache):
        return None  # and all is read anew
    kept.reorder_cache(of)  # pyright: ignore[reportArgumentType]
    return kept
