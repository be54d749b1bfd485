"""Any recipe on the models and data that ship with limbeck: a method tried without a network."""

import json
from pathlib import Path
from typing import Any

from limbeck.core.errors import RecipeError
from limbeck.demo import model_path, problems, write_jsonl
from limbeck.recipe.document import Document

ROWS = 4000
PROMPTS = 200
"""Where a teacher is asked for each row first."""

TRAIN = {"steps": 100, "batch_tokens": 2048, "accumulate": 1, "learning_rate": 3.0e-3}
"""What suits the embedded models; a minute or so on one core."""

BODY = ("name", "from", "layers", "config", "tokenizer", "revision", "dtype", "quantize")
"""Fields of a student that say which model it is; the others stay as the recipe has them."""


def on_embedded(document: Document, folder: Path) -> Document:
    """The document with the embedded student, teacher and word problems in place of its own.

    Terms, evaluations and all settings of the method stay. Every teacher becomes the embedded one.

    Args:
        document: of any recipe.
        folder: where the problems are written, as `train.jsonl`.
    """
    values: dict[str, Any] = dict(document.values)
    student = values.get("student")
    kept = {k: v for k, v in student.items() if k not in BODY} if isinstance(student, dict) else {}
    values["student"] = {**kept, "name": str(model_path("student")), "max_length": 256}
    teachers = values.get("teachers")
    if isinstance(teachers, dict):
        sparse = '"sparse_kl"' in json.dumps(values.get("terms"), default=str)
        values["teachers"] = {
            name: _teacher(spec, cache=folder / name, sparse=sparse)
            for name, spec in teachers.items()
        }
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise RecipeError("--out", f"{folder.parent} is a file, not a folder") from None
    source = values.get("source")
    made = '"steps":' in json.dumps(source, default=str)  # wherever it stands
    path = folder / ("prompts.jsonl" if made else "train.jsonl")
    if not path.exists():
        aside = folder / f".{path.name}"
        write_jsonl(aside, problems(0, "train", PROMPTS if made else ROWS))
        aside.replace(path)
    data = {"path": str(path), "holdout": 0 if made else 64}
    values["source"] = _source(source, data, folder)
    train = values.get("train")
    values["train"] = {**(train if isinstance(train, dict) else {}), **TRAIN}
    return Document(values, document.lines, document.file)


def _source(spec: Any, data: dict[str, Any], folder: Path) -> Any:
    """The problems in place of the data that everything else of a source is made from."""
    if not isinstance(spec, dict) or not isinstance(spec.get("of"), dict | list):
        return data
    of = spec["of"]
    inner = [_source(one, data, folder) for one in of] if isinstance(of, list) else None
    made = {**spec, "of": inner or _source(of, data, folder)}
    if spec.get("kind") == "generated":
        made |= {"path": str(folder / Path(str(spec.get("path"))).name), "holdout": 4}
    return made


def _teacher(spec: Any, *, cache: Path, sparse: bool) -> Any:
    """The same teacher with the embedded model in it; an ensemble has none of its own.

    A server becomes that model; where a few tokens of what it reads are wanted (`sparse`), which a
    model does not offer, a cache of as many as it would tell.
    """
    if not isinstance(spec, dict):
        return spec
    ours = {"name": str(model_path("teacher"))}
    if spec.get("kind") == "server":
        if spec.get("tokenizer") is None or not sparse:
            return ours
        k = spec.get("top_logprobs") or 20
        return {"kind": "cache", "path": str(cache), "of": ours, "keep": "topk", "k": k}
    kept = {k: v for k, v in spec.items() if k not in ("tokenizer", "revision", "quantize")}
    if isinstance(spec.get("of"), dict) and "name" in spec["of"]:
        own = {"path": str(cache)} if spec.get("kind") == "cache" else {}
        return {**kept, **own, "of": ours}
    return {**kept, **ours} if "name" in spec else spec
