"""From the light values of a recipe to models with weights."""

import copy
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from limbeck.core.errors import ModelError
from limbeck.core.files import new_folder
from limbeck.core.random import seeded
from limbeck.core.specs import CausalStudent, LocalTeacher, Lora
from limbeck.core.text import one_line
from limbeck.losses import pages
from limbeck.models.causal import CausalModel
from limbeck.models.cut import origins
from limbeck.models.facts import Spec, config_of, kept_layers, origin_of, tokenizer_of
from limbeck.models.head import head_of
from limbeck.models.taps import decoder_layers

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

transformers_logging.disable_progress_bar()  # a run has its own display


def load_teacher(spec: LocalTeacher, device: torch.device, max_length: int) -> CausalModel:
    """A frozen model in evaluation mode, on its own device where it names one."""
    module = _pretrained(spec, spec.name, "auto" if spec.dtype == "auto" else DTYPES[spec.dtype])
    module.requires_grad_(False).eval()
    _attend(module, spec)
    if spec.quantize is None:  # bitsandbytes has already placed a quantized one
        module.to(torch.device(spec.device) if spec.device else device)
    _gather(module)
    return CausalModel(
        module,
        tokenizer_of(spec, {}),
        name=spec.name,
        max_length=spec.max_length or max_length,
        head=head_of(module),
    )


def load_student(
    spec: CausalStudent, teachers: Mapping[str, Any], device: torch.device, seed: int
) -> CausalModel:
    """A model to train: pretrained, cut from a teacher, or new; with adapters where asked for.

    Weights are float32 whatever the dtype of the forward pass, because a step of AdamW is smaller
    than bfloat16 can see. New weights depend on `seed` alone.
    """
    with seeded(seed, "init"):
        if spec.name is not None:
            module = _pretrained(spec, spec.name, torch.float32)
        elif spec.from_ is not None:
            module = _cut_from_teacher(spec, teachers)
        else:
            config = config_of(spec, teachers)
            module = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    name = spec.name or _name_of_copy(spec)
    return as_student(module, spec, tokenizer_of(spec, teachers), name, device, seed)


def _name_of_copy(spec: CausalStudent) -> str:
    if spec.from_ is None:
        return "new"
    return f"{spec.from_}[{'copy' if spec.layers is None else f'{len(spec.layers)} layers'}]"


def as_student(
    module: Any,
    spec: CausalStudent,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    device: torch.device,
    seed: int,
) -> CausalModel:
    """A model made ready to train as `spec` says: kernels, adapters, device, compilation."""
    _attend(module, spec)
    if spec.lora is not None:
        with seeded(seed, "adapters"):
            module = with_adapters(module, spec.lora, quantized=spec.quantize is not None)
    if spec.gradient_checkpointing:
        module.gradient_checkpointing_enable({"use_reentrant": False})
        if spec.lora is not None:
            module.enable_input_require_grads()
    if spec.quantize is None:
        module.to(device)
    _gather(module)
    head = head_of(module)
    if spec.compile:
        for layer in decoder_layers(module):
            layer.compile(dynamic=True)
    autocast = None if spec.dtype == "float32" else DTYPES[spec.dtype]
    return CausalModel(
        module, tokenizer, name=name, max_length=spec.max_length, autocast=autocast, head=head
    )


def save_student(
    student: CausalModel, weights: Mapping[str, torch.Tensor], folder: Path, dtype: torch.dtype
) -> None:
    """Write a Hugging Face folder: `AutoModelForCausalLM.from_pretrained` loads it.

    Adapters are merged into their base. Where one of them is on the output head or the embedding,
    and these share a weight, each is saved with a weight of its own. Over a quantized base they are
    saved as a PEFT adapter, which `from_pretrained` puts on its base again.

    Args:
        student: the model; its tokenizer is saved with it.
        weights: whole tensors by name, as of `module.state_dict()`.
        folder: replaced as a whole.
        dtype: of the stored weights.
    """
    module: Any = student.transformer
    with new_folder(folder) as aside:
        if not hasattr(module, "peft_config"):
            _write(module, weights, aside, dtype)
        elif getattr(module.get_base_model(), "is_quantized", False):
            module.save_pretrained(aside, state_dict=dict(weights))
        else:
            module = _together(module, weights) if _sharded(module) else module
            base = module.get_base_model()
            with _untied(base), _merged(module):
                _write(base, _merged_weights(base), aside, dtype)
        student.tokenizer.save_pretrained(aside)


def with_adapters(module: Any, lora: Lora, *, quantized: bool) -> Any:
    """A model with low-rank adapters, which alone are trained.

    Raises:
        ModelError: a target is not there.
    """
    from peft import LoraConfig, prepare_model_for_kbit_training

    if quantized:
        module = prepare_model_for_kbit_training(module, use_gradient_checkpointing=False)
    targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType]  # PEFT divides; floats work
        lora_dropout=lora.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    try:
        return _adapted(module, config)
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise ModelError(f"student.lora.targets: {one_line(error, 200)}") from error


def _adapted(module: Any, config: Any) -> Any:
    from peft import get_peft_model

    with warnings.catch_warnings():
        # It warns that merging changes both layers that share a weight; see `save_student`.
        warnings.filterwarnings("ignore", "Model (has|with) `tie_word_embeddings")
        return get_peft_model(module, config)


def _pretrained(spec: Spec, name: str, dtype: torch.dtype | str) -> Any:
    config = config_of(spec, {})
    settings: dict[str, Any] = {}
    if spec.quantize is not None:
        settings["quantization_config"] = _quantization(spec.quantize)
    try:
        return AutoModelForCausalLM.from_pretrained(
            os.path.expanduser(name),
            config=config,
            revision=spec.revision or "main",
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=spec.trust_remote_code,
            **settings,
        )
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise ModelError(f"{name}: cannot be loaded: {one_line(error)}") from error


def _attend(module: Any, spec: Spec) -> None:
    """Let the model use the kernel for attention that is asked for."""
    if spec.attention is None:
        return
    try:
        module.set_attn_implementation(spec.attention)
    except (ImportError, ValueError) as error:
        raise ModelError(
            f"attention: {spec.attention} cannot be used here: {one_line(error, 300)}"
        ) from error


def _gather(module: nn.Module) -> None:
    """Put the weights into huge pages: forward passes of few tokens are faster by about a tenth.

    Weights that are mapped from a file stay there, since other processes may share them. But those
    to be trained would be copied at the first step anyway, page by page: they leave it together,
    small ones too, so that nothing holds on to the file.
    """
    weights = list(module.parameters())
    stay = [weight for weight in weights if not pages.gather(weight)]
    for weight in weights if stay else ():
        if weight.requires_grad:
            weight.data = weight.data.clone()
            pages.gather(weight)


def _quantization(kind: str) -> Any:
    from importlib.util import find_spec

    from transformers import BitsAndBytesConfig

    if find_spec("bitsandbytes") is None:
        raise ModelError(f"quantize: {kind} needs bitsandbytes: pip install 'limbeck[quantize]'")
    if kind == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )


def _cut_from_teacher(spec: CausalStudent, teachers: Mapping[str, Any]) -> Any:
    """A copy of the teacher with only the chosen layers."""
    config = config_of(spec, teachers)
    origin = origin_of(spec, teachers)
    teacher = _pretrained(origin, origin.name, torch.float32)
    student = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, trust_remote_code=spec.trust_remote_code
    )
    weights = teacher.state_dict()
    found = origins(student, teacher, kept_layers(spec, config))
    student.load_state_dict({mine: weights[theirs] for mine, theirs in found.items()})
    if teacher.generation_config is not None:
        student.generation_config = teacher.generation_config
    return student


def _sharded(module: nn.Module) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def _together(module: Any, weights: Mapping[str, torch.Tensor]) -> Any:
    """A model with adapters that is split over processes, in one piece on the CPU."""
    base, (adapters,) = module.get_base_model(), module.peft_config.values()
    plain = type(base)(base.config)
    plain.generation_config = base.generation_config
    whole = _adapted(plain, copy.deepcopy(adapters))
    _, unknown = whole.load_state_dict(weights, strict=False)  # a tied weight comes once
    assert not unknown, unknown
    return whole


def _write(
    module: Any, weights: Mapping[str, torch.Tensor], folder: Path, dtype: torch.dtype
) -> None:
    """Save weights as `dtype`, which the configuration names: as that they are loaded.

    Transformers would name the dtype that the model has in memory.
    """
    module.save_pretrained(folder, state_dict={k: v.to(dtype) for k, v in weights.items()})
    path = folder / "config.json"
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    for part in (values, *values.values()):  # a model of text and pictures has a part for each
        if isinstance(part, dict) and "dtype" in part:
            part["dtype"] = str(dtype).removeprefix("torch.")
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@contextmanager
def _merged(module: Any) -> Iterator[None]:
    module.merge_adapter()
    try:
        yield
    finally:
        module.unmerge_adapter()


@contextmanager
def _untied(base: Any) -> Iterator[None]:
    """Give an output head a weight of its own where one adapter would change the embedding too."""
    layers = base.get_output_embeddings(), base.get_input_embeddings()
    head, embedding = (getattr(layer, "base_layer", layer) for layer in layers)
    tied = getattr(head, "weight", None) is embedding.weight
    if not tied or layers == (head, embedding):
        yield
        return
    shared, config = head.weight, base.config
    before = config.tie_word_embeddings
    head.weight = nn.Parameter(shared.detach().clone(), requires_grad=False)
    config.tie_word_embeddings = False
    try:
        yield
    finally:
        head.weight, config.tie_word_embeddings = shared, before


def _merged_weights(base: nn.Module) -> dict[str, torch.Tensor]:
    """Weights of a base model with adapters merged in, under the base model's own names.

    Tied weights come once. Experts have adapters over adapters.
    """
    named = {id(v): (k, v) for k, v in reversed(base.state_dict(keep_vars=True).items())}
    return {
        ".".join(p for p in name.split(".") if p != "base_layer"): value.detach().cpu()
        for name, value in named.values()
        if ".lora_" not in name
    }
