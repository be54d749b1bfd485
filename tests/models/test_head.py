"""The head seen from outside gives the model's own logits, or is not believed."""

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from limbeck import losses
from limbeck.core.specs import Lora
from limbeck.models.head import Head, head_of, instead_of_head
from limbeck.models.load import with_adapters

SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILIES = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {},
    "gemma2": {"final_logit_softcapping": 3.0},
    "recurrent_gemma": {"logits_soft_cap": 3.0, "lru_width": 32, "num_hidden_layers": 3},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 8.0},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "gpt_neox": {},
    "phi": {},  # its head has a bias
    "mamba": {},
}


def make(kind, **more):
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**{**SMALL, **FAMILIES.get(kind, {}), **more})
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def through(model, head, ids, rows, use):
    with instead_of_head(model, head, rows, None, use):
        return model(input_ids=ids, use_cache=False)


@pytest.mark.parametrize("kind", FAMILIES)
def test_families_with_their_scales_caps_and_biases(kind):
    model = make(kind)
    head = head_of(model)
    assert head is not None
    ids, rows = torch.arange(3, 15).reshape(2, 6), torch.tensor([0, 4, 5, 7])
    model.eval()
    expected = model(input_ids=ids).logits.flatten(0, 1)[rows]
    projection = through(model, head, ids, rows, lambda p: p)
    torch.testing.assert_close(projection.logits(), expected)
    assert projection.weight is model.get_output_embeddings().weight  # not a copy
    after = model(input_ids=ids).logits.flatten(0, 1)[rows]
    torch.testing.assert_close(after, expected)  # the hooks are gone


@pytest.mark.parametrize("kind", FAMILIES)
def test_families_in_half_precision(kind):
    assert head_of(make(kind).to(torch.bfloat16)) is not None


def test_the_gradient_reaches_all_weights():
    model, other = make("gemma2"), make("gemma2")
    ids, rows = torch.arange(3, 15).reshape(2, 6), torch.tensor([0, 4, 5, 7])
    target = torch.randn(4, 61)
    head = head_of(model)
    assert head is not None

    def use(projection):
        return losses.forward_kl(projection.logits(), target).sum()

    through(model, head, ids, rows, use).backward()
    logits = other(input_ids=ids).logits.flatten(0, 1)[rows]
    losses.forward_kl(logits, target).sum().backward()
    for (name, mine), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, msg=name)


def test_adapters_on_the_head():
    model = with_adapters(make("llama"), Lora(rank=4, targets=("lm_head",)), quantized=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    head = head_of(model)
    assert head is not None
    ids, rows = torch.arange(3, 15).reshape(2, 6), torch.tensor([1, 8])
    expected = model(input_ids=ids).logits.flatten(0, 1)[rows]
    projection = through(model, head, ids, rows, lambda p: p)
    assert projection.low_weight is not None
    torch.testing.assert_close(projection.logits(), expected)
    assert not projection.weight.requires_grad


class Odd(nn.Module):
    """Multiplies its model's logits by something that no configuration tells."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config = model, model.config

    def get_output_embeddings(self):
        return self.model.get_output_embeddings()

    def forward(self, **inputs):
        output = self.model(**inputs)
        output.logits = self.change(output.logits)
        return output

    def change(self, logits):
        return logits * 1.01


class Capped(Odd):
    """Caps them, which changes the largest by a fortieth."""

    def change(self, logits):
        cap = 3.6 * logits.abs().max()
        return cap * torch.tanh(logits / cap)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("odd", [Odd, Capped])
def test_a_model_that_does_more_to_its_logits_is_noticed(odd, dtype, caplog):
    caplog.set_level("INFO")
    assert head_of(odd(make("llama").to(dtype))) is None
    assert "made in full" in caplog.text


def test_a_head_that_is_no_plain_linear_layer_is_left_alone():
    class Own(nn.Linear):
        def forward(self, input):
            return super().forward(input).tanh()

    model = make("llama")
    own = Own(32, 61, bias=False)
    model.set_output_embeddings(own)
    assert head_of(model) is None


def test_the_probe_leaves_modes_as_they_were():
    model = make("llama").train()
    model.model.layers[0].eval()
    head_of(model)
    assert model.training
    assert not model.model.layers[0].training


def test_a_wrong_scale_gives_other_logits():
    """The probe is a real comparison: the same head with another scale would not pass it."""
    model = make("llama").eval()
    ids, rows = torch.arange(3, 9)[None], torch.arange(3)
    expected = model(input_ids=ids).logits[0, :3]
    wrong = through(model, Head(scale=1.01), ids, rows, lambda p: p).logits()
    assert not torch.allclose(wrong, expected)
