"""Run by test_plan.py in a process of its own: how far memory grows in a run, beside the plan."""

import gc
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from limbeck.recipe.document import Document
from limbeck.recipe.plan import plan
from limbeck.recipe.resolve import resolve
from limbeck.recipe.run import run

ROW_TOKENS = 120
WARM_UP = {"vocabulary": 64, "layers": 2, "width": 16, "inner": 32}


def make(folder: Path, vocabulary: int, layers: int, width: int, inner: int, **train: Any) -> Any:
    """A teacher with random weights, texts, and a recipe for a student of half the layers."""
    words = {f"w{index}": index for index in range(vocabulary)}
    raw = Tokenizer(models.WordLevel(words, unk_token="w0"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "teacher")
    PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="w1", pad_token="w2").save_pretrained(
        folder / "teacher"
    )
    with (folder / "rows.jsonl").open("w") as file:
        for row in range(200):
            text = " ".join(f"w{(row * 31 + k * 7) % vocabulary}" for k in range(ROW_TOKENS))
            file.write(json.dumps({"text": text}) + "\n")
    student = train.pop("student", {})
    terms = train.pop("terms", [{"objective": "forward_kl"}])
    values = {
        "student": {"from": "teacher", "layers": list(range(0, layers, 2)), **student},
        "teachers": {"big": {"name": str(folder / "teacher")}},
        "source": {"path": str(folder / "rows.jsonl"), "holdout": 0},
        "terms": terms,
        "train": {"device": "cpu", **train},
    }
    return resolve(Document(values, {}))


def status(key: str) -> int:
    """Bytes that the kernel counts for this process: VmRSS now, VmHWM at most."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def main() -> None:
    """Measure the shapes given as JSON; print one JSON line for each."""
    torch.set_num_threads(1)
    for shape in [WARM_UP, *json.loads(sys.argv[1])]:
        with tempfile.TemporaryDirectory() as name:
            recipe = make(Path(name), **{"steps": 2, "batch_tokens": 256, **shape})
            made = plan(recipe)
            gc.collect()
            Path("/proc/self/clear_refs").write_text("5")
            before = status("VmRSS")
            run(recipe, Path(name) / "out")
            print(
                json.dumps(
                    {
                        "shape": shape,
                        "measured": status("VmHWM") - before,
                        "planned": made.memory.peak_bytes,
                        "parts": vars(made.memory),
                    }
                ),
                flush=True,
            )


if __name__ == "__main__":
    main()
