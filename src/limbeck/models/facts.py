"""What can be known of a model without loading its weights, and what must be refused before.

Only safetensors are read, and no code that a model brings runs unless the recipe says so.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from limbeck.core.errors import ModelError, RecipeError
from limbeck.core.registry import did_you_mean
from limbeck.core.specs import CausalStudent, LocalTeacher
from limbeck.core.text import one_line
from limbeck.models.cut import origins

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
LARGEST_HEADER = 100 * 2**20
"""Bytes that the header of a safetensors file may have."""

MOST_LAYERS = 1000
"""Far beyond any model; one layer too many is a slip of the pen that would take hours to build."""

Spec = CausalStudent | LocalTeacher


@dataclass(frozen=True)
class ModelFacts:
    """A model's configuration, tokenizer and number of parameters (0 where it is elsewhere)."""

    config: Any
    tokenizer: PreTrainedTokenizerBase
    vocabulary: str
    parameters: int


def facts_of(spec: Spec, teachers: Mapping[str, Any]) -> ModelFacts:
    """All facts of one model.

    Raises:
        ModelError: the model is missing, unsafe, or of a kind that is not known.
        RecipeError: a field of the student does not fit its teacher.
    """
    config = config_of(spec, teachers)
    if isinstance(spec, CausalStudent) and spec.from_ is not None:
        _check_cut(spec, config, teachers)
    tokenizer = tokenizer_of(spec, teachers)
    return ModelFacts(
        config=config,
        tokenizer=tokenizer,
        vocabulary=vocabulary_fingerprint(tokenizer),
        parameters=_counted(spec, config),
    )


def facts_of_tokenizer(name: str) -> ModelFacts:
    """Of a model elsewhere, of which the tokenizer alone is here; how large it is nobody says.

    Raises:
        ModelError: there is no such tokenizer.
    """
    tokenizer = tokenizer_of(LocalTeacher(name=name), {})
    config: Any = PretrainedConfig()
    config.vocab_size = len(tokenizer)
    return ModelFacts(
        config=config,
        tokenizer=tokenizer,
        vocabulary=vocabulary_fingerprint(tokenizer),
        parameters=0,
    )


def config_of(spec: Spec, teachers: Mapping[str, Any]) -> Any:
    """The transformers configuration of a model that exists, is cut from a teacher, or is new."""
    if isinstance(spec, CausalStudent) and spec.config is not None:
        return _new_config(spec, teachers)
    if isinstance(spec, CausalStudent) and spec.from_ is not None:
        origin = origin_of(spec, teachers)
        return cut_config(config_of(origin, teachers), spec.layers)
    assert spec.name is not None
    _check_folder(spec.name, spec.trust_remote_code)
    try:
        return AutoConfig.from_pretrained(
            os.path.expanduser(spec.name),
            revision=spec.revision or "main",
            trust_remote_code=spec.trust_remote_code,
        )
    except Exception as error:  # damaged files make transformers raise almost anything
        raise ModelError(f"{spec.name}: no model can be found: {one_line(error, 300)}") from error


def origin_of(spec: CausalStudent, teachers: Mapping[str, Any]) -> Any:
    """The teacher that `student.from` names; `teacher` stands for the only one."""
    name = spec.from_ or ""
    if name in teachers:
        return teachers[name]
    if name == "teacher" and len(teachers) == 1:
        return next(iter(teachers.values()))
    options = list(teachers) or ["(the recipe has no teacher)"]
    raise RecipeError("student.from", f"no teacher {name!r}; {did_you_mean(name, options)}")


def tokenizer_of(spec: Spec, teachers: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """A model's fast tokenizer: the one it names, its own, or that of the first teacher."""
    where = spec.tokenizer or spec.name
    owner = spec
    if where is None:
        assert isinstance(spec, CausalStudent)
        if spec.from_ is not None:
            owner = origin_of(spec, teachers)
        elif teachers:
            owner = next(iter(teachers.values()))
        else:
            raise RecipeError("student.tokenizer", "a new model without teacher needs a tokenizer")
        where = owner.tokenizer or owner.name
    _check_folder(where, spec.trust_remote_code, needs="tokenizer.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            os.path.expanduser(where),
            # A revision is of the model; a tokenizer from elsewhere has its own history.
            revision=(owner.revision or "main") if where == owner.name else "main",
            trust_remote_code=spec.trust_remote_code,
        )
    except Exception as error:  # damaged files make transformers and tokenizers raise anything
        raise ModelError(f"{where}: no tokenizer can be found: {one_line(error, 300)}") from error
    if not tokenizer.is_fast:
        raise ModelError(f"{where}: its tokenizer is not a fast one, so it gives no offsets")
    return tokenizer


def parameters_of(config: Any, trust_remote_code: bool = False) -> int:
    """Number of parameters, tied ones counted once; nothing is allocated."""
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    if isinstance(layers, int) and not 1 <= layers <= MOST_LAYERS:
        raise ModelError(f"a model has 1 to {MOST_LAYERS:,} layers; this one would have {layers}")
    model = _without_weights(config, trust_remote_code)
    return sum(parameter.numel() for parameter in model.parameters())


def _without_weights(config: Any, trust_remote_code: bool) -> Any:
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # each architecture fails in its own way on odd sizes
        raise ModelError(
            f"no causal language model fits this config: {one_line(error, 300)}"
        ) from error


def _check_cut(spec: CausalStudent, config: Any, teachers: Mapping[str, Any]) -> None:
    """All weights of a student with this configuration are its teacher's."""
    origin = origin_of(spec, teachers)
    teacher = _without_weights(config_of(origin, {}), origin.trust_remote_code)
    student = _without_weights(config, spec.trust_remote_code)
    origins(student, teacher, kept_layers(spec, config))


def kept_layers(spec: CausalStudent, config: Any) -> Sequence[int]:
    """The numbers of the teacher's layers that a student with this configuration has."""
    return range(config.num_hidden_layers) if spec.layers is None else spec.layers


def _counted(spec: Spec, config: Any) -> int:
    """`parameters_of`, whose error names the field or the model that the configuration is of."""
    try:
        return parameters_of(config, spec.trust_remote_code)
    except ModelError as error:
        if isinstance(spec, CausalStudent) and spec.name is None:
            field = "student.config" if spec.config is not None else "student.layers"
            raise RecipeError(field, str(error)) from error
        raise ModelError(f"{spec.name}: {error}") from error


def vocabulary_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of what decides how text becomes ids: two equal ones are the same tokenizer.

    Templates, truncation and padding are left out: they do not change what an id means.
    """
    state: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())  # pyright: ignore
    keys = ("model", "normalizer", "pre_tokenizer", "added_tokens")
    text = json.dumps({key: state.get(key) for key in keys}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _check_folder(name: str, trust_remote_code: bool, needs: str = "config.json") -> None:
    """Refuse a local folder that is missing, holds pickles, or wants to run its own code."""
    try:
        folder = Path(name).expanduser()
        there = folder.exists()
    except (OSError, RuntimeError, ValueError) as error:  # too long, no such user
        raise ModelError(f"{name:.80}: no such folder: {one_line(error, 80)}") from None
    if not there:
        if name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise ModelError(f"{name}: no such folder")
        return  # a hub id: transformers looks it up
    if not folder.is_dir():
        raise ModelError(f"{name}: a file, not a folder with {needs}")
    if not (folder / needs).exists():
        raise ModelError(f"{name}: the folder has no {needs}")
    if needs == "config.json":
        weights = list(folder.glob("*.safetensors"))
        if pickles := sorted(p.name for pattern in PICKLES for p in folder.glob(pattern)):
            if not weights:
                raise ModelError(
                    f"{name}: weights are a pickle ({pickles[0]}), which can run code; save the "
                    "model again with safetensors (model.save_pretrained)"
                )
        elif not weights:
            raise ModelError(f"{name}: the folder has no .safetensors weights")
        for path in weights:
            _check_safetensors(path)
    for file in ("config.json", "tokenizer_config.json"):
        if not trust_remote_code and "auto_map" in _json(folder / file):
            raise ModelError(
                f"{name}: {file} asks to run code of the model's author (auto_map); read that code"
                " and set trust_remote_code: true, or use a model without"
            )


def _check_safetensors(path: Path) -> None:
    """Its header is JSON, and names as many bytes of tensors as follow it."""
    whole = path.stat().st_size
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        start = file.read(min(size, LARGEST_HEADER))
    if start[:1] != b"{" or not 2 <= size <= min(LARGEST_HEADER, whole - 8):
        raise ModelError(f"{path}: not a safetensors file (a pickle under another name?)")
    try:
        header: Any = json.loads(start)
        ends = [int(t["data_offsets"][1]) for k, t in header.items() if k != "__metadata__"]
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        raise ModelError(f"{path}: not a safetensors file (its header is damaged)") from None
    if max(ends, default=0) != whole - 8 - size:
        raise ModelError(f"{path}: cut off or damaged; download or save it again")


def _json(path: Path) -> Mapping[str, Any]:
    if not path.exists():
        return {}
    try:
        value: Any = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ModelError(f"{path}: not JSON: {one_line(error, 300)}") from None
    return value if isinstance(value, dict) else {}


def cut_config(config: Any, layers: tuple[int, ...] | None) -> Any:
    """The teacher's configuration with only the chosen layers; of its text, where it has more."""
    config = config.get_text_config()
    count: int = config.num_hidden_layers
    kept = tuple(range(count)) if layers is None else layers
    for index in kept:
        if index >= count:
            raise RecipeError(
                "student.layers", f"layer {index} does not exist; the teacher has 0 to {count - 1}"
            )
    if not kept:
        raise RecipeError("student.layers", "no layer is kept")
    values = config.to_dict()
    for key, value in values.items():  # such as layer_types: one entry a layer
        if isinstance(value, list) and len(value) == count and "layer" in key:
            values[key] = [value[index] for index in kept]
    values["num_hidden_layers"] = len(kept)
    try:
        return type(config).from_dict(values)
    except Exception as error:  # a configuration may have a check of its own
        raise RecipeError("student.layers", one_line(error, 300)) from error


def _new_config(spec: CausalStudent, teachers: Mapping[str, Any]) -> Any:
    """A configuration from the recipe; sizes and special tokens of the vocabulary are filled in."""
    values = dict(spec.config or {})
    kind = values.pop("model_type", None)
    if not isinstance(kind, str):
        raise RecipeError("student.config.model_type", "is missing; for example: llama")
    if kind not in CONFIG_MAPPING:
        options = list(CONFIG_MAPPING) if len(kind) > 2 else []  # two letters are near to anything
        hint = did_you_mean(kind, options, "for example: llama, qwen3, gpt2")
        raise RecipeError("student.config.model_type", f"no architecture {kind!r}; {hint}")
    tokenizer = tokenizer_of(spec, teachers)
    known = AutoConfig.for_model(kind).to_dict()
    for key in values:
        if key not in known:
            hint = did_you_mean(key, list(known), "see its configuration class in transformers")
            raise RecipeError(f"student.config.{key}", f"{kind} has no such setting; {hint}")
    size = values.setdefault("vocab_size", len(tokenizer))
    if isinstance(size, int) and size < len(tokenizer):
        raise RecipeError(
            "student.config.vocab_size",
            f"{size} is too few for the tokenizer's {len(tokenizer)} tokens; leave it out",
        )
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        values.setdefault(key, getattr(tokenizer, key))
    try:
        return AutoConfig.for_model(kind, **values)
    except Exception as error:  # transformers' strict dataclasses have errors of their own
        raise RecipeError("student.config", one_line(error, 300)) from error
