"""A packed line gives each sample the logits it has alone, or it is noticed that it does not."""

import logging
import math
import warnings

import pytest
import torch
import transformers
from packaging.version import Version

from limbeck.core.types import NO_OFFSET, Encoding
from limbeck.models import by_sample
from limbeck.models.causal import CausalModel
from limbeck.models.packing import LOGITS, keeps_apart, packing

LENGTHS = (9, 31, 1, 14, 31, 6)

LLAMA = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SMALL = {
    "vocab_size": 320,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
APART = {
    "llama": LLAMA,
    "qwen2": LLAMA,
    "qwen3": {**LLAMA, "head_dim": 8},
    "gpt2": {**SMALL, "n_positions": 128},
    "gemma2": {**LLAMA, "head_dim": 8, "sliding_window": 5, "final_logit_softcapping": 5.0},
    "gemma3_text": {**LLAMA, "head_dim": 8, "sliding_window": 5},
    "mistral": {**LLAMA, "sliding_window": 5},
    "mixtral": LLAMA,
    "gpt_neox": {**SMALL, "intermediate_size": 48, "max_position_embeddings": 128},
}
"""Families whose samples stay apart; windows here are narrower than samples."""

MIXED = {
    "mamba": {**SMALL, "state_size": 8},
    "rwkv": {**SMALL, "attention_hidden_size": 32},
    "bloom": {**SMALL, "n_layer": 3, "n_head": 4},
    "mpt": {"vocab_size": 320, "d_model": 32, "n_layers": 3, "n_heads": 4, "max_seq_len": 128},
    "lfm2": {**LLAMA, "layer_types": ["conv", "full_attention", "conv"]},
    "opt": {
        **SMALL,
        "ffn_dim": 48,
        "max_position_embeddings": 128,
        "word_embed_proj_dim": 32,
    },
}
"""Families that carry a state across, or count positions on their own."""

# Before 5.24 its biases of distance count on from one sample to the next.
_FALCON = APART if Version(transformers.__version__) >= Version("5.24") else MIXED
_FALCON["falcon"] = {**SMALL, "alibi": True}


def model_of(family, tokenizer, settings=None, max_length=64, **options):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **(settings or {**APART, **MIXED}[family]))
    module = transformers.AutoModelForCausalLM.from_config(config, **options).eval()
    return CausalModel(module, tokenizer, name=family, max_length=max_length)


def encodings(lengths=LENGTHS, vocabulary=320):
    generator = torch.Generator().manual_seed(1)
    return [
        Encoding(
            ids=torch.randint(3, vocabulary, (length,), generator=generator).tolist(),
            learn=[True] * length,
            starts=[NO_OFFSET] * length,
            ends=[NO_OFFSET] * length,
            name=f"s{place}",
        )
        for place, length in enumerate(lengths)
    ]


@torch.no_grad()
def logits(model, samples, *, packed):
    return model.read(model.encoder.collate(samples, packed=packed), LOGITS).logits


def alone(model, samples):
    """One sample at a time, with a mask, straight from the module."""
    rows = []
    for sample in samples:
        ids = torch.tensor([sample.ids])
        with torch.no_grad():
            rows.append(model.module(ids, attention_mask=torch.ones_like(ids)).logits[0, :-1])
    return torch.cat(rows)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", APART)
def test_packed_logits_are_those_of_each_sample_alone(family, attention, tokenizer):
    if (family, attention) == ("gemma2", "sdpa"):
        pytest.skip("gemma2 caps its attention, which sdpa cannot")
    model = model_of(family, tokenizer, attn_implementation=attention)
    samples = encodings()
    expected = alone(model, samples)
    assert torch.allclose(logits(model, samples, packed=True), expected, atol=1e-5)
    assert keeps_apart(model)
    with packing("always", [model]) as on:
        assert on
        fixed = attention == "eager" or family == "falcon"  # whose attention is chosen for good
        used = "limbeck_by_sample_64" if not fixed else attention
        assert model.module.config._attn_implementation == used
        view = model.collate(samples)
        assert view.ids.shape == (1, sum(LENGTHS))
        with torch.no_grad():
            found = model.read(view, LOGITS).logits
    assert torch.allclose(found, expected, atol=1e-5)
    assert model.module.config._attn_implementation == attention
    assert model.collate(samples).positions is None
    # Had it read something else in front of them, it would have said something else.
    changed = [*encodings((8,)), *samples]
    mixed = torch.tensor([[token for sample in changed for token in sample.ids]])
    with torch.no_grad():
        last = model.module(mixed).logits[0, -LENGTHS[-1] : -1]
    assert (last - expected[-(LENGTHS[-1] - 1) :]).abs().max() > 1e-2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="compiling it for a CPU takes a minute")
def test_flex_attention_keeps_samples_apart(tokenizer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is not compiled here
        model = model_of("llama", tokenizer, attn_implementation="flex_attention")
        samples = encodings((9, 31, 14))
        assert torch.allclose(logits(model, samples, packed=True), alone(model, samples), atol=1e-5)


@pytest.mark.parametrize("family", [*APART, *MIXED])
def test_padding_on_the_right_needs_no_mask(family, tokenizer):
    model = model_of(family, tokenizer)
    samples = encodings()
    found = logits(model, samples, packed=False)
    assert torch.allclose(found, alone(model, samples), atol=1e-5)


@pytest.mark.parametrize("spread", [0.02, 0.3])
@pytest.mark.parametrize("family", MIXED)
def test_a_family_that_mixes_samples_is_noticed_and_padded(family, spread, tokenizer, caplog):
    key = {"opt": "init_std"}.get(family, "initializer_range")
    model = model_of(family, tokenizer, {**MIXED[family], key: spread}, attn_implementation="eager")
    before = model.module.config._attn_implementation
    assert not keeps_apart(model)
    with caplog.at_level(logging.WARNING), packing("always", [model]) as on:
        assert not on
        assert model.collate(encodings((3, 5))).positions is None
        assert model.module.config._attn_implementation == before
    assert [record.message for record in caplog.records if "packed" in record.message] == [
        f"{family} would mix packed samples, so they are padded"
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spread", [0.02, 0.3])
def test_the_answer_depends_neither_on_scale_nor_on_dtype(spread, dtype, tokenizer):
    for family, expected in (("llama", True), ("gpt2", True), ("bloom", False), ("mamba", False)):
        settings = {**{**APART, **MIXED}[family], "initializer_range": spread}
        model = model_of(family, tokenizer, settings, dtype=dtype)
        assert keeps_apart(model) is expected, family
        autocast = model_of(family, tokenizer, settings)
        autocast.autocast = torch.bfloat16
        assert keeps_apart(autocast) is expected, family
        assert autocast.autocast == torch.bfloat16


def test_attention_by_sample_also_serves_a_family_that_mixes_with_a_mask(tokenizer):
    model = model_of("opt", tokenizer)
    assert not keeps_apart(model)
    samples = encodings()
    with packing("auto", [model]) as on:
        assert on
        found = logits(model, samples, packed=True)
    assert torch.allclose(found, alone(model, samples), atol=1e-5)


def test_a_new_model_that_hardly_hears_its_context_is_asked_in_float32(tokenizer):
    for family, expected in (("gpt2", True), ("bloom", False)):
        settings = {**{**APART, **MIXED}[family], "initializer_range": 0.004}
        model = model_of(family, tokenizer, settings)
        model.autocast = torch.bfloat16
        assert keeps_apart(model) is expected, family


def test_one_model_that_mixes_pads_for_all(tokenizer):
    models = [model_of("llama", tokenizer), model_of("bloom", tokenizer)]
    with packing("always", models) as on:
        assert not on
        assert all(model.packs_from == math.inf for model in models)
    assert models[0].module.config._attn_implementation == "sdpa"


def test_the_question_leaves_the_model_as_it_was(tokenizer):
    model = model_of("llama", tokenizer)
    model.module.train()
    model.module.model.layers[0].eval()
    state = torch.random.get_rng_state()
    assert keeps_apart(model)
    assert torch.equal(state, torch.random.get_rng_state())
    assert model.module.training
    assert not model.module.model.layers[0].training
    assert model.module.model.layers[1].training


def test_auto_packs_only_where_that_is_known_to_be_faster(tokenizer):
    def packs(wish, **options):
        with packing(wish, [model_of("llama", tokenizer, **options)]) as on:
            return on

    assert packs("auto")
    assert not packs("auto", attn_implementation="eager")
    with packing("auto", [model_of("falcon", tokenizer)]) as on:
        assert not on  # its attention is over the whole line
    assert packs("always", attn_implementation="eager")
    assert not packs("never")


@pytest.mark.parametrize("fault", ["late", "first", "none"])
def test_a_border_in_the_wrong_place_is_noticed(fault, tokenizer, monkeypatch):
    plain = by_sample.attend

    def wrong(module, query, key, value, mask, position_ids=None, **options):
        positions = position_ids.clone()
        if (positions == 0).sum() > 1:
            second = int((positions[0] == 0).nonzero()[1])
            if fault == "late":
                positions[0, second : second + 2] = torch.tensor([second, 0])
            elif fault == "first":
                positions[0, second] = second
            else:
                positions = torch.arange(positions.shape[1])[None]
        return plain(module, query, key, value, mask, positions, **options)

    monkeypatch.setattr(by_sample, "attend", wrong)
    with packing("always", [model_of("llama", tokenizer)]) as on:
        assert not on


def test_a_model_that_does_not_hand_positions_on_is_padded(tokenizer, monkeypatch):
    def deaf(*states, position_ids=None, **options):
        return by_sample.attend(*states, **options)

    monkeypatch.setattr("limbeck.models.by_sample.AttentionInterface.register", _always(deaf))
    with packing("always", [model_of("llama", tokenizer, max_length=65)]) as on:
        assert not on


def _always(function):
    from transformers import AttentionInterface

    register = AttentionInterface.register
    return lambda name, _: register(name, function)


@pytest.mark.parametrize("window", [5, 20, 64, 100])
def test_a_window_narrower_or_wider_than_samples_is_kept(window, tokenizer):
    model = model_of("mistral", tokenizer, {**APART["mistral"], "sliding_window": window})
    samples = encodings((40, 12, 33))
    expected = alone(model, samples)
    with packing("always", [model]), torch.no_grad():
        found = model.read(model.collate(samples), LOGITS).logits
    assert torch.allclose(found, expected, atol=1e-5)


def test_a_window_is_kept_in_samples_longer_than_the_models_own(tokenizer):
    """A teacher with the student's tokenizer reads the student's samples."""
    student, teacher = model_of("llama", tokenizer), model_of("mistral", tokenizer, max_length=4)
    samples = encodings((40, 12, 33))
    expected = alone(teacher, samples)
    with packing("always", [student, teacher]) as on:
        assert on
        found = logits(teacher, samples, packed=True)
    assert torch.allclose(found, expected, atol=1e-5)


def gradients(model, view):
    model.module.zero_grad()
    rows = model.read(view, LOGITS)
    torch.nn.functional.cross_entropy(rows.logits, rows.labels).backward()
    return [parameter.grad.clone() for parameter in model.module.parameters()]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
def test_gradients_are_those_of_padded_samples(family, checkpointing, tokenizer):
    model = model_of(family, tokenizer)
    model.module.train()
    for part in model.module.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    expected = gradients(model, model.collate(encodings()))
    if checkpointing:
        model.module.gradient_checkpointing_enable({"use_reentrant": False})
    with packing("always", [model]) as on:
        assert on
        found = gradients(model, model.collate(encodings()))
    assert all(
        torch.allclose(one, two, atol=1e-6) for one, two in zip(found, expected, strict=True)
    )
    assert max(float(gradient.abs().max()) for gradient in expected) > 1e-3


def test_text_can_be_written_while_packing_is_on(tokenizer):
    from limbeck.core.types import Sample, Sampling, Turn

    model = model_of("llama", tokenizer)
    prompts = [Sample(id="a", turns=(Turn(text=text),)) for text in ("the cat", "two old dogs run")]
    before = model.speak(prompts, Sampling(max_tokens=8))
    with packing("always", [model]):
        assert model.speak(prompts, Sampling(max_tokens=8)) == before
        assert model.speak(prompts[:1], Sampling(max_tokens=8)) == before[:1]
