"""What a cache was made of, in a few fields: a run compares them before it reads a row."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from limbeck.core.files import file_sha256
from limbeck.core.specs import CachedTeacher, LocalTeacher
from limbeck.core.types import Sample
from limbeck.models.facts import vocabulary_fingerprint

FIELDS = {
    "tokenizer": "the tokenizer",
    "template": "the chat template or the special tokens",
    "teacher": "the teacher's weights",
    "revision": "the teacher's revision",
    "teacher_dtype": "the dtype the teacher computes in",
    "quantize": "the teacher's quantization",
    "max_length": "student.max_length",
    "data": "the training rows",
    "keep": "keep",
    "k": "k",
    "temperature": "temperature",
    "seed": "seed",
    "dtype": "dtype",
}
"""What each field of a fingerprint is called; earlier ones explain more."""


def fingerprint(
    spec: CachedTeacher,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    samples: Iterable[Sample] | None,
    weights: str | None,
) -> dict[str, Any]:
    """All that decides a cache's content.

    A setting that has no influence on what is kept is None, and so are rows and weights that are
    not known.

    Args:
        spec: the cached teacher.
        tokenizer: what makes tokens of the samples.
        max_length: tokens kept of a sample.
        samples: all that are to be in the cache.
        weights: `weights_sha256` of the teacher.
    """
    sparse = spec.keep in ("sampled", "topk")
    return {
        "teacher": weights,
        "tokenizer": vocabulary_fingerprint(tokenizer),
        "template": template_sha256(tokenizer),
        "revision": spec.of.revision or "main",
        "teacher_dtype": spec.of.dtype,
        "quantize": spec.of.quantize,
        "max_length": max_length,
        "data": None if samples is None else data_sha256(samples),
        "keep": spec.keep,
        "k": spec.k if sparse else None,
        "temperature": spec.temperature if sparse else None,
        "seed": spec.seed if spec.keep == "sampled" else None,
        "dtype": None if sparse else spec.dtype,
    }


def difference(theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> str | None:
    """The first field in which two fingerprints differ, in words; None where they agree.

    What is None in `mine` is not known, unless it is a setting that has no influence.
    """
    for key, name in FIELDS.items():
        unknown = key in ("teacher", "data") and mine.get(key) is None
        if unknown or theirs.get(key) == mine.get(key):
            continue
        old, new = theirs.get(key), mine.get(key)
        if key in ("teacher", "tokenizer", "template", "data"):
            return f"{name} changed: SHA-256 {str(old)[:12]} then, {str(new)[:12]} now"
        return f"{name} was {old} when it was made and is {new} now"
    return None


def template_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of what a tokenizer adds to a text: its chat template and its special tokens."""
    state: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())  # pyright: ignore
    adds = [tokenizer.chat_template, state.get("post_processor"), tokenizer.eos_token_id]
    return hashlib.sha256(json.dumps(adds, sort_keys=True).encode()).hexdigest()


def data_sha256(samples: Iterable[Sample]) -> str:
    """Hash of all samples' ids and turns, in order.

    With tokenizer, template and length it decides all tokens, and it takes no tokenization.
    """
    whole = hashlib.sha256()
    for sample in samples:
        turns = [
            [(turn.text, turn.role, turn.learn) for turn in part]
            for part in (sample.privileged, sample.turns)
        ]
        whole.update(hashlib.sha256(json.dumps([sample.id, *turns]).encode()).digest())
    return whole.hexdigest()


def weight_files(spec: LocalTeacher) -> list[Path]:
    """The safetensors files of a model that is on this machine; empty where it is not."""
    folder = Path(spec.name).expanduser()
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        try:
            found = snapshot_download(
                spec.name,
                revision=spec.revision,
                allow_patterns=["*.safetensors"],
                local_files_only=True,
            )
        except (OSError, ValueError):  # not in the hub's local cache, or no name of a repository
            return []
        folder = Path(found)
    return sorted(folder.glob("*.safetensors"))


def weights_sha256(files: Iterable[Path], known: Mapping[str, Any] | None = None) -> str | None:
    """Hash of the hashes of weight files; None where there is no file.

    Args:
        files: the files.
        known: `stamps` of an earlier time. Files whose sizes and times are all as they were then
            are not read again.
    """
    files = list(files)
    if not files:
        return None
    if known is not None and known.get("files") == _stamps(files):
        return str(known.get("sha256"))
    whole = hashlib.sha256()
    for path in files:
        whole.update(bytes.fromhex(file_sha256(path)))
    return whole.hexdigest()


def stamps(files: Iterable[Path], sha256: str | None) -> dict[str, Any]:
    """What `weights_sha256` needs to know the same files again without reading them."""
    return {"files": _stamps(files), "sha256": sha256}


def _stamps(files: Iterable[Path]) -> list[list[Any]]:
    stats = [(path.name, path.stat()) for path in files]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
