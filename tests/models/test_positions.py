"""Which architectures look positions up in a table, and how many it has."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from limbeck.models.positions import known_positions

SMALL = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2}


@pytest.mark.parametrize(
    ("kind", "sizes", "expected"),
    [
        ("gpt2", {"n_positions": 32}, 32),
        ("opt", {"max_position_embeddings": 32, "word_embed_proj_dim": 16, "ffn_dim": 16}, 32),
        ("openai-gpt", {"n_positions": 32}, 32),
        ("gptj", {"n_positions": 32, "rotary_dim": 4}, 32),
        ("llama", {"max_position_embeddings": 32, "intermediate_size": 16}, None),
        ("bloom", {}, None),
    ],
)
def test_a_table_of_positions_is_found(kind, sizes, expected):
    config = AutoConfig.for_model(kind, vocab_size=50, **SMALL, **sizes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert known_positions(model, config) == expected
