"""Attention objectives: their layers, and where queries, keys and values are in real networks."""

import re
from types import SimpleNamespace

import pytest
import torch
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from limbeck import objectives
from limbeck.core.errors import RecipeError
from limbeck.core.protocols import Objective, Scene
from limbeck.core.registry import kinds
from limbeck.core.types import Sample, Signals, Turn
from limbeck.losses import attention
from limbeck.models.causal import CausalModel
from limbeck.models.taps import module_at
from limbeck.objectives.projections import find_slice

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
ROTARY = {**SIZES, "intermediate_size": 32, "num_key_value_heads": 2}
GPT = {"n_embd": 16, "n_layer": 2, "n_head": 4}
NETWORKS = {
    "llama": ROTARY,
    "mistral": ROTARY,
    "qwen2": ROTARY,
    "qwen3": {**ROTARY, "head_dim": 8},  # its heads are together wider than the model
    "qwen3_next": {  # which puts a gate behind each head's query
        **ROTARY,
        "head_dim": 8,
        "layer_types": ["full_attention"] * 2,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
    "gemma": {**ROTARY, "head_dim": 8},
    "phi3": ROTARY,
    "gpt_neox": {**SIZES, "intermediate_size": 32},
    "opt": {**SIZES, "ffn_dim": 32, "word_embed_proj_dim": 16},
    "gpt2": GPT,
    "gpt_bigcode": GPT,
    "gpt_bigcode, wide": {**GPT, "n_embd": 48, "n_head": 16},  # its parts' width divides by 3
    "gpt_bigcode, a key a head": {**GPT, "multi_query": False},
    "gptj": {**GPT, "rotary_dim": 4},
    "gpt_neo": {
        "hidden_size": 16,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
    },
}
SHOWN = [name for name in NETWORKS if name not in ("gptj", "gpt_neo")]
"""Those whose attention goes through transformers' table, where it can be listened to."""

UNKNOWN = {"bloom": {"hidden_size": 16, "n_layer": 2, "n_head": 4}}


def network(name, tokenizer, **changes):
    sizes = {**NETWORKS, **UNKNOWN}[name]
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    kind = name.split(",")[0]
    config = AutoConfig.for_model(kind, vocab_size=len(tokenizer), **{**ids, **sizes, **changes})
    torch.manual_seed(0)
    module = AutoModelForCausalLM.from_config(config).eval()
    return CausalModel(module, tokenizer, name=name, max_length=64)


def sample(index, text=" the cat sat on a mat", **more):
    turns = (Turn(text="two dogs"), Turn(text=text, learn=True))
    return Sample(id=str(index), turns=turns, **more)


def scene(student, teacher, tmp_path, samples=None):
    samples = samples or (sample(0),)
    return Scene(student=student, teacher=teacher, samples=samples, seed=0, folder=tmp_path)


def view_of(model, count=2):
    return model.collate([model.encode(sample(k, " the cat sat" * (k + 1))) for k in range(count)])


# --- where the projections are ------------------------------------------------------------------


@pytest.fixture
def heard():
    """What attention functions were called with, of the models that `listen` has been given."""
    calls = []

    def attend(module, query, key, value, mask, **extra):
        calls.append(SimpleNamespace(query=query, key=key, value=value))
        return sdpa_attention_forward(module, query, key, value, mask, **extra)

    AttentionInterface.register("test_listening", attend)
    return calls


@pytest.mark.parametrize("name", SHOWN)
@pytest.mark.parametrize("layer", [0, 1])
def test_slices_are_what_attention_works_with(name, layer, tokenizer, heard):
    """Values reach attention as they are; queries and keys are turned, which keeps lengths."""
    model = network(name, tokenizer)
    view = view_of(model)
    found = {kind: find_slice(model, layer, kind) for kind in ("query", "key", "value")}
    heard.clear()
    model.module.set_attn_implementation("test_listening")
    needs = frozenset(f"hidden:{part.site}" for part in found.values())
    with torch.no_grad():
        said = model.read(view, needs | {"logits"})
    assert len(heard) == 2
    for kind, part in found.items():
        states = getattr(heard[layer], kind)  # [b, heads, t, d]
        expected = states.transpose(1, 2).flatten(0, 1)[view.rows]
        ours = part.of(said)
        assert ours.shape == (len(view.rows), part.width)
        ours = ours.unflatten(-1, expected.shape[1:])
        if kind == "value":
            assert torch.allclose(ours, expected, atol=1e-6)
        else:
            if name.startswith("qwen3"):  # which also normalises them
                ours = getattr(module_at(model.module, str(layer)).self_attn, f"{kind[0]}_norm")(
                    ours
                )
            lengths, wanted = ours.norm(dim=-1), expected.norm(dim=-1)
            assert torch.allclose(lengths / lengths.mean(), wanted / wanted.mean(), atol=1e-5)
            assert name.startswith("qwen3") or lengths.std() > 1e-3 * lengths.mean()


@pytest.mark.parametrize("name", NETWORKS)
def test_every_known_network_is_found(name, tokenizer):
    model = network(name, tokenizer)
    parts = [find_slice(model, 1, kind) for kind in ("query", "key", "value")]
    with torch.no_grad():
        said = model.read(view_of(model), frozenset(f"hidden:{part.site}" for part in parts))
    vectors = [part.of(said) for part in parts]
    assert [x.shape[1] for x in vectors] == [part.width for part in parts]
    assert len({tuple(x[0].tolist()[:2]) for x in vectors}) == 3  # three different places
    assert all(re.search(r"\b1\b", part.site) for part in parts)


def test_an_unknown_network_is_refused(tokenizer, tmp_path):
    model = network("bloom", tokenizer)
    with pytest.raises(RecipeError, match=r"'bloom' \(transformer.h.1\).*not known here.*features"):
        objectives.AttentionRelations().finish(scene(model, model, tmp_path))


def test_a_fused_projection_of_odd_sizes_is_refused():
    widths = {"1": 16, "model.layers.1.self_attn.qkv_proj": 16 + 2 * 6}

    def width(site):
        if site not in widths:
            raise RecipeError("layers", "no such part")
        return widths[site]

    fake = SimpleNamespace(
        name="odd", width=width, heads=lambda: 4, layer_name=lambda n: f"model.layers.{n}"
    )
    with pytest.raises(RecipeError, match="not known here"):
        find_slice(fake, 1, "query")  # 6 is not a number of heads of 4
    widths["model.layers.1.self_attn.qkv_proj"] = 16 + 2 * 8
    assert find_slice(fake, 1, "value").start == 24


# --- relations ----------------------------------------------------------------------------------


def test_relations_between_networks_of_different_makes(tokenizer, tmp_path):
    student, teacher = network("gpt2", tokenizer), network("phi3", tokenizer, hidden_size=24)
    finished = objectives.AttentionRelations(
        layers=((-1, 0),), relations=("value", "query")
    ).finish(scene(student, teacher, tmp_path))
    assert isinstance(finished, Objective)
    assert finished.asks == {"hidden:transformer.h.1.attn.c_attn"}
    assert finished.needs == {"hidden:model.layers.0.self_attn.qkv_proj"}
    assert [part.heads for part in finished.parts] == [4, 4]
    view = view_of(student)
    said, heard = student.read(view, finished.asks), teacher.read(view, finished.needs)
    value = finished(said, heard)
    fused = said.hidden["transformer.h.1.attn.c_attn"], heard.hidden[next(iter(finished.needs))[7:]]
    expected = [
        attention.relation_kl(fused[0][:, 32:], fused[1][:, -12:], said.sample, 4),
        attention.relation_kl(fused[0][:, :16], fused[1][:, :24], said.sample, 4),
    ]
    assert torch.allclose(value, sum(expected) / 2, atol=1e-6)
    value.sum().backward()
    weight = student.module.transformer.h[1].attn.c_attn.weight
    assert weight.grad[:, :16].abs().sum() > 0
    assert weight.grad[:, 16:32].abs().sum() == 0  # keys were not asked for
    assert weight.grad[:, 32:].abs().sum() > 0


def test_auto_takes_the_most_heads_that_divide_each_relation(tokenizer, tmp_path):
    student, teacher = network("llama", tokenizer), network("gpt2", tokenizer, n_embd=12)
    finished = objectives.AttentionRelations().finish(scene(student, teacher, tmp_path))
    widths = [(part.student.width, part.teacher.width, part.heads) for part in finished.parts]
    assert widths == [(16, 12, 4), (8, 12, 4), (8, 12, 4)]
    named = objectives.AttentionRelations(heads=2).finish(scene(student, teacher, tmp_path))
    assert [part.heads for part in named.parts] == [2, 2, 2]


def test_heads_that_do_not_divide_are_refused(tokenizer, tmp_path):
    student, teacher = network("llama", tokenizer), network("gpt2", tokenizer, n_embd=12)
    with pytest.raises(RecipeError, match=r"^heads: 8 .*querys?, 16 .*12 .*these do: 1, 2, 4$"):
        objectives.AttentionRelations(heads=8).finish(scene(student, teacher, tmp_path))


@pytest.mark.parametrize("relations", [(), ("key", "key")])
def test_relations_must_be_named_once(relations):
    with pytest.raises(RecipeError, match="each at most once"):
        objectives.AttentionRelations(relations=relations)


# --- maps ---------------------------------------------------------------------------------------


def test_maps_of_two_networks(tokenizer, tmp_path):
    student, teacher = network("llama", tokenizer), network("gpt2", tokenizer, n_head=2)
    finished = objectives.AttentionMaps(layers="last-2").finish(scene(student, teacher, tmp_path))
    assert isinstance(finished, Objective)
    assert finished.asks == finished.needs == {"attention:0", "attention:1"}
    view = view_of(student)
    said, heard = student.read(view, finished.asks), teacher.read(view, finished.needs)
    value = finished(said, heard)
    expected = [attention.attention_kl(said.attention[k], heard.attention[k]) for k in "01"]
    assert torch.allclose(value, sum(expected) / 2)
    assert value.min() > 0
    value.sum().backward()
    layers = student.module.model.layers
    assert all(layer.self_attn.q_proj.weight.grad.abs().sum() > 0 for layer in layers)
    scores = objectives.AttentionMaps(layers="last-2", loss="mse")
    scores = scores.finish(scene(student, teacher, tmp_path))
    expected = [attention.attention_mse(said.attention[k], heard.attention[k]) for k in "01"]
    assert torch.allclose(scores(said, heard), sum(expected) / 2)


def test_a_network_beside_itself_has_nothing_to_learn(tokenizer, tmp_path):
    model = network("llama", tokenizer)
    for objective in (
        objectives.AttentionMaps(layers="uniform"),
        objectives.AttentionMaps(layers="uniform", loss="mse"),
        objectives.AttentionRelations(layers="uniform"),
    ):
        finished = objective.finish(scene(model, model, tmp_path))
        said = model.read(view_of(model), finished.asks | finished.needs)
        assert finished(said, said).abs().max() < 1e-6


def test_privileged_turns_are_refused(tokenizer, tmp_path):
    model = network("llama", tokenizer)
    private = sample(1, privileged=(Turn(text="the answer is"),))
    with pytest.raises(RecipeError, match="privileged"):
        objectives.AttentionMaps().finish(scene(model, model, tmp_path, (sample(0), private)))


# --- both ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [objectives.AttentionMaps, objectives.AttentionRelations])
def test_it_is_a_frozen_value_of_the_protocol(cls, tokenizer, tmp_path):
    assert kinds("objective")[cls().kind] is cls
    assert isinstance(cls(), Objective)
    assert cls() == cls()
    assert hash(cls()) == hash(cls())
    model = network("llama", tokenizer)
    finished = cls().finish(scene(model, model, tmp_path))
    for name in ("kind", "unit", "shared_vocabulary"):
        assert getattr(finished, name) == getattr(cls, name)
    assert not getattr(finished, "rowwise", False)
    with pytest.raises(RecipeError, match="finished"):
        cls()(Signals(labels=torch.zeros(1)), Signals(labels=torch.zeros(1)))


@pytest.mark.parametrize("cls", [objectives.AttentionMaps, objectives.AttentionRelations])
def test_attention_is_of_a_layer_and_not_of_a_module(cls, tokenizer, tmp_path):
    model = network("llama", tokenizer)
    with pytest.raises(RecipeError, match="give its number for 'model.norm'"):
        cls(layers=(("model.norm", 0),)).finish(scene(model, model, tmp_path))
    with pytest.raises(RecipeError, match="the student has no layer 5; it has 0 to 1"):
        cls(layers=((5, 0),)).finish(scene(model, model, tmp_path))
