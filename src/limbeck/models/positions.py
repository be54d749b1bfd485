"""How long a text a model can read at most: some look each position up in a table that ends."""

from collections.abc import Iterator
from typing import Any

from torch import nn

TABLES = ("wpe", "embed_positions", "position_embeddings", "pos_encoding", "positions_embed")
"""What transformers' architectures call such a table: GPT-2's, OPT's, BERT's, CTRL's, GPT's."""

SPARE = 2
"""Rows of a table that no position uses, at most: OPT and BART begin at the third."""


def known_positions(model: nn.Module, config: Any) -> int | None:
    """Tokens of the longest text; None where positions are computed and may go on.

    Args:
        model: of transformers, perhaps wrapped; it may be on the device `meta`.
        config: its configuration.
    """
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(most, int):
        return None
    # A table of another size is of something else: a picture's parts, say.
    found = any(most <= rows <= most + SPARE for rows in _tables(model))
    return most if found else None


def _tables(model: nn.Module) -> Iterator[int]:
    """Rows of each table of positions."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in TABLES:
            yield module.num_embeddings
    for name, buffer in model.named_buffers():
        if name.rpartition(".")[2] in TABLES and buffer.ndim:
            yield buffer.shape[0]
