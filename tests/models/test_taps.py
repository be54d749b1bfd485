"""Taps against what transformers itself gives: hidden states, attention maps, gradients."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from limbeck.core.errors import RecipeError
from limbeck.core.types import Encoding
from limbeck.models.causal import CausalModel
from limbeck.models.head import head_of

SIZES = {
    "llama": {"num_key_value_heads": 1, "intermediate_size": 32},
    "qwen3": {"num_key_value_heads": 1, "intermediate_size": 32, "head_dim": 8},
    "gemma2": {
        "num_key_value_heads": 1,
        "intermediate_size": 32,
        "head_dim": 8,
        "sliding_window": 3,
    },
    "gpt_neox": {"intermediate_size": 32},
    "gpt2": {},
    "opt": {"ffn_dim": 32, "word_embed_proj_dim": 16},
}


def model_of(kind, tokenizer, **changes):
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        **SIZES[kind],
        **changes,
    }
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **sizes)
    config.initializer_range = 0.3
    module = AutoModelForCausalLM.from_config(config).eval()
    return CausalModel(module, tokenizer, name=kind, max_length=64, head=head_of(module))


def encodings(lengths=(9, 5, 7)):
    generator = torch.Generator().manual_seed(1)
    return [
        Encoding(
            ids=torch.randint(3, 300, (size,), generator=generator).tolist(),
            learn=[False, False] + [True] * (size - 2),
            starts=list(range(size)),
            ends=list(range(1, size + 1)),
        )
        for size in lengths
    ]


@pytest.mark.parametrize("kind", SIZES)
def test_hidden_states_are_those_of_transformers(kind, tokenizer):
    model = model_of(kind, tokenizer)
    view = model.collate(encodings())
    expected = model.module(
        input_ids=view.ids, attention_mask=view.attend, output_hidden_states=True
    ).hidden_states
    said = model.read(view, frozenset({"hidden:0", "hidden:1", "hidden:" + model.embedding_name()}))
    for site in ("0", "1"):  # the last one of transformers has passed the final norm
        rows = expected[int(site) + 1].flatten(0, 1)[view.rows]
        torch.testing.assert_close(said.hidden[site], rows, rtol=1e-4, atol=1e-4)
    assert said.sample.tolist() == [0] * 7 + [1] * 3 + [2] * 5
    assert said.logits is None


@pytest.mark.parametrize("kind", SIZES)
def test_attention_scores_are_those_of_the_eager_kernel(kind, tokenizer):
    model = model_of(kind, tokenizer)
    view = model.collate(encodings())
    before = model.module.config._attn_implementation
    model.module.set_attn_implementation("eager")
    expected = model.module(
        input_ids=view.ids, attention_mask=view.attend, output_attentions=True
    ).attentions
    model.module.set_attn_implementation(before)
    said = model.read(view, frozenset({"attention:1", "attention:-1", "logits"}))
    for site, layer in (("1", 1), ("-1", 2)):
        maps = expected[layer].transpose(1, 2).flatten(0, 1)[view.rows]
        torch.testing.assert_close(said.attention[site].softmax(-1), maps, rtol=1e-4, atol=1e-5)
    plain = model.read(view, frozenset({"logits"}))
    torch.testing.assert_close(said.logits, plain.logits, rtol=1e-4, atol=1e-4)


def test_packed_samples_do_not_look_at_each_other(tokenizer):
    model = model_of("llama", tokenizer)
    samples = encodings()
    needs = frozenset({"attention:0", "hidden:0"})
    apart = model.read(model.encoder.collate(samples), needs)
    packed_view = model.encoder.collate(samples, packed=True)
    packed = model.read(packed_view, needs)
    torch.testing.assert_close(packed.hidden["0"], apart.hidden["0"], rtol=1e-4, atol=1e-5)
    for ours, line in zip(packed.attention["0"], apart.attention["0"], strict=True):
        mine = ours[:, ours[0].isfinite()]
        torch.testing.assert_close(mine, line[:, line[0].isfinite()], rtol=1e-4, atol=1e-5)


def test_gradients_flow_from_every_tap(tokenizer):
    model = model_of("llama", tokenizer)
    view = model.collate(encodings())
    for need in ("hidden:0", "attention:1", "hidden:model.layers.1.self_attn.q_proj"):
        said = model.read(view, frozenset({need}))
        (value,) = (*said.hidden.values(), *said.attention.values())
        torch.where(value.isfinite(), value, 0.0).square().sum().backward()
        assert model.module.model.embed_tokens.weight.grad.abs().sum() > 0
        model.module.zero_grad()


@pytest.mark.parametrize("need", ["hidden:1", "attention:1"])
def test_activation_checkpointing_changes_nothing(need, tokenizer):
    gradients = []
    for checkpointing in (False, True):
        model = model_of("llama", tokenizer)
        if checkpointing:
            model.module.gradient_checkpointing_enable({"use_reentrant": False})
        model.module.train()
        view = model.collate(encodings())
        said = model.read(view, frozenset({need, "chosen"}))
        (value,) = (*said.hidden.values(), *said.attention.values())
        loss = torch.where(value.isfinite(), value, 0.0).square().sum() - said.chosen.sum()
        loss.backward()
        gradients.append(model.module.model.embed_tokens.weight.grad)
    torch.testing.assert_close(*gradients)


def test_no_hook_stays(tokenizer):
    model = model_of("llama", tokenizer)
    view = model.collate(encodings())
    model.read(view, frozenset({"hidden:0", "attention:0"}))
    assert not any(part._forward_hooks for part in model.module.modules())
    assert not any(part._forward_pre_hooks for part in model.module.modules())
    from limbeck.models import taps

    assert taps._listeners == []


@pytest.mark.parametrize(
    ("site", "said"),
    [
        ("3", "no layer 3; the model has 0 to 2"),
        ("-4", "no layer -4; the model has 0 to 2"),
        ("model.layers.1.self_attn.q_prj", "model.layers.1.self_attn.q_proj"),
        ("transformer.h.0", "no part 'transformer.h.0'"),
    ],
)
def test_a_site_that_does_not_exist_is_named_with_near_ones(site, said, tokenizer):
    model = model_of("llama", tokenizer)
    with pytest.raises(RecipeError, match=said.replace(".", r"\.")):
        model.width(site)


def test_a_site_without_hidden_states_is_refused(tokenizer):
    model = model_of("llama", tokenizer)
    with pytest.raises(RecipeError, match="gives no hidden state"):
        model.width("model.rotary_emb")


def test_widths_and_names(tokenizer):
    model = model_of("qwen3", tokenizer)
    assert (model.depth, model.heads()) == (3, 2)
    assert model.layer_name(2) == "model.layers.2"
    assert model.width("1") == 16
    assert model.width("model.layers.1.self_attn.k_proj") == 8
    assert model.width(model.embedding_name()) == 16


def test_chosen_and_boundary_are_log_probabilities(tokenizer):
    model = model_of("llama", tokenizer)
    view = model.collate(encodings())
    needs = frozenset({"chosen", "boundary"})
    said = model.read(view, needs)
    logp = model.read(view, frozenset({"logits"})).logits.double().log_softmax(-1)
    rows = torch.arange(len(logp))
    torch.testing.assert_close(said.chosen.double(), logp[rows, view.labels], rtol=1e-5, atol=1e-5)
    words = torch.tensor(
        [
            index == tokenizer.eos_token_id
            or (index > 2 and tokenizer.decode([index])[:1] in tuple(" \n\t\r"))
            for index in range(len(tokenizer))
        ]
    )
    expected = logp[:, words].logsumexp(-1)
    torch.testing.assert_close(said.boundary.double(), expected, rtol=1e-5, atol=1e-5)
    model.head = None
    whole = model.read(view, needs)
    torch.testing.assert_close(whole.chosen, said.chosen)
    torch.testing.assert_close(whole.boundary, said.boundary)


def test_attribution_is_the_gradient_by_finite_differences(tokenizer):
    model = model_of("llama", tokenizer)
    model.module.double().requires_grad_(False)
    model.head = head_of(model.module)
    view = model.collate(encodings((6,)))
    found = model.attribution(view, "1")
    layer = model.module.model.layers[1]
    unit, step = 5, 2e-3  # norms compute in float32, so it cannot be smaller

    def total(shift, place):
        def moved(_, __, output):
            output = output.clone()
            output[0, place, unit] += shift
            return output

        handle = layer.register_forward_hook(moved)
        with torch.no_grad():
            logits = model.read(view, frozenset({"logits"})).logits
        handle.remove()
        logp = logits.log_softmax(-1)
        return logp[torch.arange(len(logp)), view.labels].sum()

    for row, place in enumerate(view.rows.tolist()):
        slope = (total(step, place) - total(-step, place)) / (2 * step)
        assert found[row, unit].item() == pytest.approx(abs(slope.item()), rel=1e-2, abs=1e-4)


def test_adapters_do_not_hide_the_network(tokenizer):
    from peft import LoraConfig, get_peft_model

    model = model_of("llama", tokenizer)
    model.module = get_peft_model(model.module, LoraConfig(target_modules=["q_proj"], r=2))
    model.head = head_of(model.module)
    view = model.collate(encodings())
    said = model.read(view, frozenset({"hidden:1", "hidden:model.layers.0.self_attn.q_proj"}))
    assert said.hidden["1"].shape == (15, 16)
    said.hidden["1"].sum().backward()
    assert model.layer_name(1) == "model.layers.1"
