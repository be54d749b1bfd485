"""What is known of a model before its weights are loaded."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from limbeck.core.errors import ModelError, RecipeError
from limbeck.core.specs import CausalStudent, LocalTeacher
from limbeck.models.facts import config_of, facts_of, tokenizer_of, vocabulary_fingerprint


@pytest.fixture
def teachers(tiny_teacher):
    return {"big": LocalTeacher(name=str(tiny_teacher))}


@pytest.fixture
def folder(tmp_path, tiny_teacher):
    return shutil.copytree(tiny_teacher, tmp_path / "model")


def new(**settings):
    return CausalStudent(config={"model_type": "llama", "hidden_size": 16, **settings})


def test_a_model_in_a_folder(tiny_teacher, tokenizer):
    found = facts_of(LocalTeacher(name=str(tiny_teacher)), {})
    model = AutoModelForCausalLM.from_pretrained(tiny_teacher)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.config.num_hidden_layers == 4
    assert found.vocabulary == vocabulary_fingerprint(tokenizer)


def test_nothing_is_allocated(teachers):
    huge = new(hidden_size=16384, intermediate_size=65536, num_hidden_layers=200, head_dim=128)
    state = torch.random.get_rng_state()
    assert facts_of(huge, teachers).parameters > 5 * 10**11
    assert torch.equal(state, torch.random.get_rng_state())


def test_a_cut_keeps_what_belongs_to_its_layers(folder):
    values = json.loads((folder / "config.json").read_text())
    values.update(
        model_type="qwen3",
        architectures=["Qwen3ForCausalLM"],
        layer_types=["full_attention", "sliding_attention", "full_attention", "sliding_attention"],
        sliding_window=8,
        use_sliding_window=True,
    )
    (folder / "config.json").write_text(json.dumps(values))
    big = {"big": LocalTeacher(name=str(folder))}
    config = config_of(CausalStudent(from_="big", layers=(1, 2, 3)), big)
    assert config.num_hidden_layers == 3
    assert config.layer_types == ["sliding_attention", "full_attention", "sliding_attention"]
    assert config_of(CausalStudent(from_="teacher"), big).num_hidden_layers == 4


def test_layers_must_be_there(teachers):
    for layers, reason in (((4,), "layer 4 does not exist"), ((), "no layer is kept")):
        with pytest.raises(RecipeError, match=reason) as caught:
            facts_of(CausalStudent(from_="big", layers=layers), teachers)
        assert caught.value.field == "student.layers"


def test_a_new_model_takes_its_vocabulary_from_the_tokenizer(teachers, tokenizer):
    config = config_of(new(num_attention_heads=2), teachers)
    assert config.vocab_size == len(tokenizer)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 0)
    assert config_of(new(vocab_size=999, num_attention_heads=2), teachers).vocab_size == 999


BAD_CONFIGS = {
    "no type": ({}, "student.config.model_type: is missing"),
    "number as type": ({"model_type": 3}, "student.config.model_type: is missing"),
    "unknown type": (
        {"model_type": "lama"},
        "student.config.model_type: no architecture 'lama'; did you mean 'llama'?",
    ),
    "far from any": ({"model_type": "zz"}, "for example: llama"),
    "unknown setting": (
        {"model_type": "llama", "hiden_size": 3},
        "student.config.hiden_size: llama has no such setting; did you mean 'hidden_size'?",
    ),
    "wrong type": ({"model_type": "llama", "hidden_size": "many"}, "student.config: "),
}


@pytest.mark.parametrize("what", BAD_CONFIGS)
def test_a_bad_new_configuration(what, teachers):
    values, message = BAD_CONFIGS[what]
    with pytest.raises(RecipeError) as caught:
        facts_of(CausalStudent(config=values), teachers)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_configuration_that_makes_no_language_model(teachers):
    with pytest.raises((ModelError, RecipeError)):
        facts_of(CausalStudent(config={"model_type": "vit"}), teachers)


def test_a_new_model_without_teacher_needs_a_tokenizer(tiny_teacher):
    with pytest.raises(RecipeError, match=r"student\.tokenizer: a new model"):
        facts_of(new(), {})
    named = CausalStudent(config={"model_type": "llama"}, tokenizer=str(tiny_teacher))
    assert tokenizer_of(named, {}).is_fast


def test_fingerprints_tell_what_ids_mean(folder, tiny_teacher):
    def fingerprint(**spec):
        return facts_of(LocalTeacher(**spec), {}).vocabulary

    same = fingerprint(name=str(tiny_teacher))
    config = folder / "tokenizer_config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps({**values, "padding_side": "left"}))
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert fingerprint(name=str(folder)) == same  # a template does not change what an id means
    state = json.loads((folder / "tokenizer.json").read_text())
    state["model"]["merges"] = state["model"]["merges"][:-1]
    (folder / "tokenizer.json").write_text(json.dumps(state))
    assert fingerprint(name=str(folder)) != same
    assert fingerprint(name=str(folder), tokenizer=str(tiny_teacher)) == same


def test_a_pickle_beside_safetensors_is_left_alone(folder):
    (folder / "optimizer.pt").write_bytes(b"\x80\x04.")
    assert facts_of(LocalTeacher(name=str(folder)), {}).parameters


def test_a_file_is_no_folder(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"")
    with pytest.raises(ModelError, match="a file, not a folder"):
        facts_of(LocalTeacher(name=str(path)), {})


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"version": 9}', '{"model": {}}'])
def test_a_damaged_tokenizer(folder, text):
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(ModelError) as caught:
        facts_of(LocalTeacher(name=str(folder)), {})
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
