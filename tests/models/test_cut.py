"""A student cut from a teacher has the teacher's weights, or is refused before any are loaded."""

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from limbeck.core.errors import RecipeError
from limbeck.core.specs import CausalStudent, LocalTeacher
from limbeck.models import load
from limbeck.models.facts import facts_of
from limbeck.models.load import load_student

CPU = torch.device("cpu")
TEXT = {
    "vocab_size": 320,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
MIXTURE = {
    "moe_intermediate_size": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "first_k_dense_replace": 1,
}
PICTURES = {
    "vision_config": {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    },
    "mm_tokens_per_image": 4,
}


@pytest.fixture
def teacher(tokenizer, tmp_path):
    """Saves a small model of some kind, and names it `big`."""

    def make(kind, **settings):
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, **settings)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
        config.save_pretrained(tmp_path)  # of all parts, whatever of them is a language model
        tokenizer.save_pretrained(tmp_path)
        return {"big": LocalTeacher(name=str(tmp_path))}

    return make


def assert_cut(layers, teachers):
    spec = CausalStudent(from_="big", layers=layers)
    student = load_student(spec, teachers, CPU, 0).transformer
    assert facts_of(spec, teachers).parameters == sum(p.numel() for p in student.parameters())
    whole = AutoModelForCausalLM.from_pretrained(teachers["big"].name).state_dict()
    for name, weight in student.state_dict().items():
        for place, layer in enumerate(layers):
            if name.startswith(f"model.layers.{place}."):
                name = name.replace(f".{place}.", f".{layer}.", 1)
                break
        assert torch.equal(weight, whole[name]), name


def refused(layers, teachers, monkeypatch):
    monkeypatch.setattr(load.AutoModelForCausalLM, "from_pretrained", None)
    with pytest.raises(RecipeError) as caught:
        facts_of(CausalStudent(from_="big", layers=layers), teachers)
    assert caught.value.field == "student.layers"
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_all_weights_are_the_teachers(teacher):
    assert_cut((2, 0), teacher("llama", **TEXT))


def test_layers_that_would_be_of_another_kind_are_refused(teacher, monkeypatch):
    """Its first layer is dense and the others are mixtures, wherever they come from."""
    teachers = teacher("deepseek_v3", **{**TEXT, **MIXTURE})
    assert_cut((0, 2), teachers)
    assert "keep layers that stay where their kind is" in refused((1, 2), teachers, monkeypatch)


@pytest.mark.skipif("qwen3_5" not in CONFIG_MAPPING, reason="not known to this transformers")
def test_a_configuration_of_text_and_pictures_whose_language_model_stands_alone(teacher):
    linear = {f"linear_{what}": 2 for what in ("num_value_heads", "num_key_heads")}
    linear |= {f"linear_{what}_head_dim": 8 for what in ("key", "value")}
    pictures = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2}
    text = {**TEXT, **linear, "num_hidden_layers": 4}
    assert_cut((0, 3), teacher("qwen3_5", text_config=text, vision_config=pictures))


def test_a_model_of_text_and_pictures_is_refused(teacher, monkeypatch):
    teachers = teacher("gemma3", text_config=TEXT, **PICTURES)
    said = refused((0, 2), teachers, monkeypatch)
    assert "cannot be cut from it; give the student a `name` or a `config`" in said


def test_a_configuration_that_the_layers_do_not_fit_is_refused(teacher, monkeypatch):
    teachers = teacher("llama", **TEXT)

    plain = CONFIG_MAPPING["llama"].from_dict

    def strict(values, **options):
        if values["num_hidden_layers"] == 2:
            raise ValueError("3 values\nare needed")
        return plain(values, **options)

    monkeypatch.setattr(CONFIG_MAPPING["llama"], "from_dict", strict)
    assert "3 values are needed" in refused((0, 2), teachers, monkeypatch)
