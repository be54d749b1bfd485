"""Small models with random weights for objectives that are shown the models they train with."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from limbeck.core.protocols import Scene
from limbeck.core.types import Sample, Turn
from limbeck.models.causal import CausalModel
from limbeck.models.head import head_of


@pytest.fixture
def small_network(tokenizer):
    """Makes a Llama of a width; `of` may be a subclass that watches what is asked of it."""

    def make(width, name="some", layers=2, seed=0, of=CausalModel):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=24,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=1,
            initializer_range=0.3,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
        module = LlamaForCausalLM(config).eval()
        return of(module, tokenizer, name=name, max_length=64, head=head_of(module))

    return make


@pytest.fixture
def make_scene(tmp_path):
    """Makes a scene of two models and completions of the prompt `see`."""

    def make(student, teacher, texts):
        samples = [
            Sample(id=str(i), turns=(Turn(text="see"), Turn(text=text, learn=True)))
            for i, text in enumerate(texts)
        ]
        folder = tmp_path / "own"
        return Scene(student=student, teacher=teacher, samples=samples, seed=3, folder=folder)

    return make


@pytest.fixture
def narrow_student(tokenizer):
    """A recipe's student that is half as wide as the tiny teacher."""
    return {
        "config": {
            "model_type": "llama",
            "hidden_size": 8,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "vocab_size": len(tokenizer),
        }
    }
