"""What a cache keeps of the model that filled it: configuration, tokenizer, sizes, output head.

So a run needs nothing but the cache when the model's own files are gone.
"""

import fcntl
import hashlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from transformers import AutoConfig

from limbeck.core.errors import CacheError, ModelError
from limbeck.core.files import new_folder
from limbeck.core.specs import CachedTeacher, LocalTeacher
from limbeck.core.text import one_line
from limbeck.core.types import Encoding, Needs
from limbeck.losses.projection import Projection
from limbeck.models.causal import CausalModel
from limbeck.models.facts import ModelFacts, parameters_of, tokenizer_of, vocabulary_fingerprint

HEAD = "head.safetensors"


def model_folder(path: str) -> Path:
    """Where a cache keeps what is left of its teacher."""
    return Path(path).expanduser() / "teacher"


def remembered_facts(spec: CachedTeacher) -> ModelFacts | None:
    """Facts of a teacher whose own files are gone; None where there is no cache yet."""
    folder = model_folder(spec.path)
    if not (folder / "config.json").exists():
        return None
    trust = spec.of.trust_remote_code
    tokenizer = tokenizer_of(LocalTeacher(name=str(folder), trust_remote_code=trust), {})
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust)
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: no configuration: {one_line(error)}") from error
    return ModelFacts(
        config=config,
        tokenizer=tokenizer,
        vocabulary=vocabulary_fingerprint(tokenizer),
        parameters=parameters_of(config, trust),
    )


def needs_of(teacher: CausalModel) -> Needs:
    """What a cache is made of: logits that are not made yet, where the teacher gives them."""
    return frozenset(teacher.offers & {"projection"}) or frozenset({"logits"})


@torch.no_grad()
def describe(teacher: CausalModel, sample: Encoding) -> tuple[dict[str, Any], Projection | None]:
    """A teacher's sizes as JSON values, and its output head; `sample` is read to find them."""
    signals = teacher.read(teacher.encoder.collate([sample]), needs_of(teacher))
    head, logits = signals.projection, signals.logits
    if head is None:
        assert logits is not None
        dtype, columns = logits.dtype, logits.shape[1]
    else:
        dtype, columns = head.hidden.dtype, head.vocabulary
    sizes = {
        "columns": columns,
        "width": None if head is None else head.hidden.shape[1],
        "dtype": str(dtype).removeprefix("torch."),
        "scale": None if head is None else head.scale,
        "soft_cap": None if head is None else head.soft_cap,
    }
    return sizes, head


def head_bytes(name: str, projection: Projection | None) -> bytes:
    """The output head as a safetensors file.

    Raises:
        ModelError: the model has none that stands alone.
    """
    if projection is None:
        raise ModelError(
            f"{name}: its output head does not make logits alone, so hidden states would not do;"
            " use `keep: sampled`"
        )
    parts = {"weight": projection.weight, "bias": projection.bias}
    return save({k: v.detach().cpu().contiguous() for k, v in parts.items() if v is not None})


def write_remains(path: Path, teacher: CausalModel, head: bytes | None) -> None:
    """Write them where they are not whole; of several processes, the first does."""
    folder = model_folder(str(path))
    with (path / ".teacher.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if whole(path, None if head is None else sha256(head)):
            return
        with new_folder(folder) as aside:
            teacher.transformer.config.save_pretrained(aside)
            teacher.tokenizer.save_pretrained(aside)
            if head is not None:
                (aside / HEAD).write_bytes(head)


def whole(path: Path, head_sha256: str | None) -> bool:
    """Whether all is there, and the head as it was written."""
    folder = model_folder(str(path))
    if not (folder / "config.json").exists():
        return False
    try:
        return head_sha256 is None or sha256((folder / HEAD).read_bytes()) == head_sha256
    except OSError:
        return False


def read_head(path: str, sizes: Any, device: torch.device) -> Projection:
    """The output head without rows.

    Raises:
        CacheError: it is not the one that was written.
    """
    file = model_folder(path) / HEAD
    content = file.read_bytes() if file.exists() else b""
    if sha256(content) != sizes["head_sha256"]:
        raise CacheError(
            f"{file} is absent or damaged: run limbeck cache RECIPE, which writes it again"
        )
    parts = {name: value.to(device) for name, value in load(content).items()}
    return Projection(
        hidden=parts["weight"].new_zeros(0, sizes["width"]),
        weight=parts["weight"],
        bias=parts.get("bias"),
        scale=sizes["scale"],
        soft_cap=sizes["soft_cap"],
    )


def sha256(content: bytes) -> str:
    """Of some bytes, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()
