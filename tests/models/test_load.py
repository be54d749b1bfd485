"""From a recipe's words to a model and back to a folder: its kernel, its weights, their dtype."""

import copy
import shutil
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from limbeck.core.errors import ModelError
from limbeck.core.specs import CausalStudent, LocalTeacher, Lora
from limbeck.core.types import Sample, Turn
from limbeck.losses import pages
from limbeck.models.load import load_student, load_teacher, save_student

# Of transformers, where it asks for flex attention.
pytestmark = pytest.mark.filterwarnings("ignore:_compile flag:DeprecationWarning")

CPU = torch.device("cpu")
LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2}
KERNELS = ["eager", "sdpa", "flex_attention"]


def used(model):
    return model.transformer.config._attn_implementation


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_teacher_attends_as_asked(kernel, tiny_teacher):
    spec = LocalTeacher(name=str(tiny_teacher), attention=kernel)
    assert used(load_teacher(spec, CPU, 64)) == kernel


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("way", ["pretrained", "cut", "new"])
def test_a_student_attends_as_asked_however_it_is_made(way, kernel, tiny_teacher, tokenizer):
    spec = {
        "pretrained": CausalStudent(name=str(tiny_teacher), attention=kernel),
        "cut": CausalStudent(from_="big", layers=(0,), attention=kernel),
        "new": CausalStudent(config=LLAMA, tokenizer=str(tiny_teacher), attention=kernel),
    }[way]
    teachers = {"big": LocalTeacher(name=str(tiny_teacher))}
    student = load_student(spec, teachers, CPU, seed=0)
    assert used(student) == kernel
    assert used(load_student(replace(spec, attention=None), teachers, CPU, seed=0)) == "sdpa"


def refused(config, kernel, tokenizer):
    spec = CausalStudent(config=config, tokenizer=tokenizer, attention=kernel)
    with pytest.raises(ModelError, match=f"^attention: {kernel} cannot be used here: ") as caught:
        load_student(spec, {}, CPU, seed=0)
    return str(caught.value)


def test_a_kernel_that_a_model_does_not_know_is_named_in_one_line(tiny_teacher):
    said = refused(GPT2, "flex_attention", str(tiny_teacher))
    assert "GPT2" in said
    assert "\n" not in said


def test_a_kernel_whose_package_is_missing_is_named_in_one_line(tiny_teacher, monkeypatch):
    def missing(self, kernel):
        raise ImportError(f"{kernel} is toggled on\n\n  but its package is not installed")

    monkeypatch.setattr(PreTrainedModel, "set_attn_implementation", missing)
    said = refused(LLAMA, "flash_attention_2", str(tiny_teacher))
    assert said.endswith("flash_attention_2 is toggled on but its package is not installed")


def test_a_folder_may_be_given_from_home(tiny_teacher, monkeypatch):
    monkeypatch.setenv("HOME", str(tiny_teacher.parent))
    home = f"~/{tiny_teacher.name}"
    assert load_teacher(LocalTeacher(name=home), CPU, 64).name == home
    assert load_student(CausalStudent(name=home), {}, CPU, seed=0).name == home


@pytest.mark.parametrize(("layers", "name"), [(None, "big[copy]"), ((0,), "big[1 layers]")])
def test_a_student_is_named_after_what_it_keeps_of_its_teacher(layers, name, tiny_teacher):
    teachers = {"big": LocalTeacher(name=str(tiny_teacher))}
    spec = CausalStudent(from_="big", layers=layers)
    assert load_student(spec, teachers, CPU, seed=0).name == name


def test_a_pad_token_that_only_the_tokenizer_was_given_is_never_looked_up(
    tiny_teacher, tokenizer, tmp_path
):
    folder = shutil.copytree(tiny_teacher, tmp_path / "padded")
    padded = copy.deepcopy(tokenizer)
    padded.add_special_tokens({"pad_token": "[beyond the embedding]"})
    padded.save_pretrained(folder)
    model = load_teacher(LocalTeacher(name=str(folder)), CPU, 64)
    beyond = model.tokenizer.pad_token_id
    assert beyond >= len(model.embeddings())
    texts = ("one", "one two three four five")
    samples = [Sample(id=text, turns=(Turn(text=text, learn=True),)) for text in texts]
    view = model.collate([model.encode(sample) for sample in samples])
    assert model.read(view, frozenset({"logits"})).logits.isfinite().all()


def test_weights_that_cannot_be_gathered_are_copied_only_to_be_trained(tiny_teacher, monkeypatch):
    expected = AutoModelForCausalLM.from_pretrained(tiny_teacher, dtype=torch.float32)
    asked = []

    def refusing(weight):
        asked.append(weight.data_ptr())
        return False

    monkeypatch.setattr(pages, "gather", refusing)
    student = load_student(CausalStudent(name=str(tiny_teacher)), {}, CPU, seed=0).transformer
    moved = [weight.data_ptr() for weight in student.parameters()]
    assert asked[len(moved) :] == moved
    assert all(old != new for old, new in zip(asked, moved, strict=False))
    tied = student.get_input_embeddings().weight is student.get_output_embeddings().weight
    assert tied == student.config.tie_word_embeddings
    for weight, same in zip(student.parameters(), expected.parameters(), strict=True):
        assert torch.equal(weight, same)
        assert weight.requires_grad
    asked.clear()
    teacher = load_teacher(LocalTeacher(name=str(tiny_teacher)), CPU, 64).transformer
    assert [weight.data_ptr() for weight in teacher.parameters()] == asked


ADAPTED = {
    "llama": (LLAMA, "embed_tokens"),
    "gpt2": (GPT2, "wte"),
    "gemma2": ({**LLAMA, "model_type": "gemma2", "num_key_value_heads": 1}, "embed_tokens"),
}


def said_by(module, ids):
    with torch.no_grad():
        return module.eval()(input_ids=ids).logits


def saved_as_trained(spec, folder):
    """The student, once it is known that its export says what it says itself."""
    student = load_student(spec, {}, CPU, seed=0)
    for name, weight in student.transformer.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.3, generator=torch.Generator().manual_seed(0))
    ids = torch.arange(3, 15).reshape(2, 6)
    expected = said_by(student.module, ids)
    save_student(student, student.module.state_dict(), folder, torch.float32)
    saved = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(said_by(saved, ids), expected, rtol=1e-4, atol=1e-4)
    # And goes on training as it was.
    torch.testing.assert_close(said_by(student.module, ids), expected, rtol=1e-4, atol=1e-4)
    return student


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("where", ["head", "embedding", "both"])
@pytest.mark.parametrize("family", ADAPTED)
def test_the_saved_model_is_the_trained_one(family, where, tied, tiny_teacher, tmp_path):
    """An adapter on a head or an embedding changes that one, though both share a weight."""
    config, embedding = ADAPTED[family]
    targets = {"head": ("lm_head",), "embedding": (embedding,), "both": ("lm_head", embedding)}
    spec = CausalStudent(
        config={**config, "tie_word_embeddings": tied},
        tokenizer=str(tiny_teacher),
        lora=Lora(rank=4, targets=targets[where]),
    )
    student = saved_as_trained(spec, tmp_path / "student")
    base = student.transformer.get_base_model()
    layers = base.get_input_embeddings(), base.get_output_embeddings()
    first, second = (getattr(layer, "base_layer", layer).weight for layer in layers)
    assert (first is second) == base.config.tie_word_embeddings == tied


EXPERTS = {
    **LLAMA,
    "model_type": "mixtral",
    "num_key_value_heads": 1,
    "num_local_experts": 4,
    "initializer_range": 0.2,
}


# PEFT's own: it gives the experts a rank, and looks for them among the modules.
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")
@pytest.mark.parametrize("split", [False, True])
def test_adapters_on_experts_are_merged_too(split, tiny_teacher, tmp_path, monkeypatch):
    """PEFT lays one adapter over the other where a module has two weights of its own."""
    monkeypatch.setattr("limbeck.models.load._sharded", lambda module: split)
    spec = CausalStudent(config=EXPERTS, tokenizer=str(tiny_teacher), lora=Lora(rank=2))
    student = saved_as_trained(spec, tmp_path / "student")
    adapted = [name for name, _ in student.transformer.named_parameters() if "lora_" in name]
    assert any("experts" in name for name in adapted)


@pytest.mark.parametrize("lora", [None, Lora(rank=2)])
def test_a_saved_model_is_loaded_in_the_dtype_that_it_is_stored_in(lora, tiny_teacher, tmp_path):
    student = load_student(CausalStudent(name=str(tiny_teacher), lora=lora), {}, CPU, seed=0)
    save_student(student, student.module.state_dict(), tmp_path / "student", torch.bfloat16)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "student").dtype == torch.bfloat16
    assert student.transformer.dtype == torch.float32
