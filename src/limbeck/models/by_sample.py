"""Attention over packed samples, one sample at a time.

Over a whole line, attention with a mask costs the square of the line's length. Sample by sample it
costs less than padded samples do, and needs no other kernels than torch has.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "limbeck_by_sample"


def register(max_length: int) -> str:
    """Make the attention known to transformers; returns its name there.

    Args:
        max_length: no sample has more tokens, so a window that is wider plays no part.
    """
    name = f"{NAME}_{max_length}"
    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, partial(mask, max_length=max_length))
    return name


def mask(*, max_length: int, **asked: Any) -> Tensor | None:
    """None where causality within each sample is all that counts; else the mask of the whole line.

    Transformers gives a size for windows and chunks, and asks for `vmap` where a model has masks of
    its own.
    """
    local_size: int = asked.get("local_size") or max_length
    plain = asked["attention_mask"] is None and not asked.get("use_vmap")
    whole = asked["batch_size"] == 1 and asked["q_length"] == asked["kv_length"]
    return None if plain and whole and local_size >= max_length else sdpa_mask(**asked)


@torch.compiler.disable  # lengths differ in every batch, and each would be compiled
def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each sample; a sample begins where its position is 0.

    Args:
        module: the model's attention.
        query: [1, h, t, d]; key and value may have fewer heads. With another shape, or a mask,
            this is transformers' `sdpa`.
        key: of all samples.
        value: of all samples.
        attention_mask: None, see `mask`.
        position_ids: [1, t].
        options: of `sdpa`.

    Returns:
        [1, t, h, d], and no attention weights.

    Raises:
        ValueError: the model does not say the positions.
    """
    if attention_mask is not None or len(query) > 1 or query.shape[2] != key.shape[2]:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    if position_ids is None or options.get("position_bias") is not None:
        raise ValueError("attention is not told where samples begin")
    starts: list[int] = (position_ids[0] == 0).nonzero().flatten().tolist()
    ends = [*starts[1:], query.shape[2]]
    lengths = [end - start for start, end in zip(starts, ends, strict=True)]
    queries, keys, values = (states.split(lengths, 2) for states in (query, key, value))
    parts = zip(queries, keys, values, strict=True)
    heard = [sdpa_attention_forward(module, q, k, v, None, **options)[0] for q, k, v in parts]
    return torch.cat(heard, 1), None
