"""What `limbeck plan --time` says of a step's seconds, beside what the run then takes.

    python benchmarks/plan_accuracy.py

Random Llama models of three shapes, one thread; the student has half of the teacher's layers. The
memory that `limbeck plan` says is held to a run's by `tests/recipe/test_plan.py`.
"""

import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from environment import environment
from table import markdown
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from limbeck.recipe.calibrate import step_time
from limbeck.recipe.check import check
from limbeck.recipe.document import Document
from limbeck.recipe.resolve import resolve
from limbeck.recipe.run import run

RESULTS = Path(__file__).with_name("results") / "plan_accuracy.json"
STEPS = 9
ROW_TOKENS = 120
SHAPES = [
    {"vocabulary": 8_000, "layers": 8, "width": 256, "inner": 768},
    {"vocabulary": 1_000, "layers": 16, "width": 64, "inner": 128},
    {"vocabulary": 100_000, "layers": 6, "width": 128, "inner": 256},
]


def recipe_of(folder: Path, vocabulary: int, layers: int, width: int, inner: int) -> Any:
    """A teacher, rows and a recipe in `folder`."""
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
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "teacher")
    PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="w1", pad_token="w2").save_pretrained(
        folder / "teacher"
    )
    with (folder / "rows.jsonl").open("w") as file:
        for row in range(200):
            text = " ".join(f"w{(row * 31 + k * 7) % vocabulary}" for k in range(ROW_TOKENS))
            file.write(json.dumps({"text": text}) + "\n")
    values = {
        "student": {"from": "teacher", "layers": list(range(0, layers, 2))},
        "teachers": {"big": {"name": str(folder / "teacher")}},
        "source": {"path": str(folder / "rows.jsonl"), "holdout": 0},
        "terms": [{"objective": "forward_kl"}, {"objective": "cross_entropy"}],
        "train": {"device": "cpu", "steps": STEPS, "batch_tokens": 1200},
    }
    return resolve(Document(values, {}))


def main() -> None:
    """Print planned and measured seconds of each shape."""
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for shape in SHAPES:
        with tempfile.TemporaryDirectory() as name:
            recipe = recipe_of(Path(name), **shape)
            planned = step_time(recipe, check(recipe)).seconds
            run(recipe, Path(name) / "out")
            lines = (Path(name) / "out" / "metrics.jsonl").read_text().splitlines()
            total = [json.loads(line)["seconds"] for line in lines]
            measured = statistics.median(b - a for a, b in zip(total, total[1:], strict=False))
            rows.append({**shape, "planned_seconds": planned, "measured_seconds": measured})
    body = [
        [
            f"V = {r['vocabulary']:,}, {r['layers']} layers of {r['width']}",
            f"{r['planned_seconds']:.3f}",
            f"{r['measured_seconds']:.3f}",
            f"{r['planned_seconds'] / r['measured_seconds']:.2f}",
        ]
        for r in rows
    ]
    print(markdown(["teacher", "planned, s", "measured, s", "ratio"], body))
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
