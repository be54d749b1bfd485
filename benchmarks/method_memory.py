"""What each method takes beside plain distillation at a real vocabulary: the process's peak.

    python benchmarks/method_memory.py           # all methods
    python benchmarks/method_memory.py --quick   # two, nothing written

A student with GPT-2's tokenizer (50,257 tokens) and a teacher with the same, or with that of Llama
2 (32,000), both of random weights: 2 layers, widths 64 and 96. Two steps of 2,048 tokens of real
text in a fresh process on one core; the peak is the most memory that the process ever held. All of
a step's logits of the student would be 412 MB in float32. Needs the folder of shared assets.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from comparison_run import peak_bytes
from environment import environment
from table import markdown

SHARED = Path(__file__).resolve().parents[2] / "shared"
RESULTS = Path(__file__).with_name("results") / "method_memory.json"
STEP_TOKENS = 2048
PLAIN = "forward_kl"
NAIVE = "forward_kl, all logits"

SAME: dict[str, dict[str, Any]] = {
    PLAIN: {"kind": "forward_kl"},
    NAIVE: {"kind": "forward_kl"},
    "alpha_beta": {"kind": "alpha_beta"},
    "taid": {"kind": "taid"},
    "decoupled_kd": {"kind": "decoupled_kd"},
    "ranking": {"kind": "ranking"},
    "features": {"kind": "features", "projector": "linear"},
    "flex_kd": {"kind": "flex_kd", "examples": 8},
    "attention_maps": {"kind": "attention_maps"},
    "attention_relations": {"kind": "attention_relations"},
}
OTHER: dict[str, dict[str, Any]] = {
    "sorted_l1": {"kind": "sorted_l1"},
    "semantic_transport": {"kind": "semantic_transport"},
    "likelihood_matching": {"kind": "likelihood_matching"},
    "mapped_kl": {"kind": "mapped_kl"},
    "prefix_kl": {"kind": "prefix_kl"},
    "hybrid_kl": {"kind": "hybrid_kl"},
    "dual_space": {"kind": "dual_space"},
    "features, another tokenizer": {"kind": "features", "projector": "linear"},
}


def make_models(folder: Path) -> None:
    """Random models with real tokenizers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    for name, tokenizer, width in (
        ("student", "gpt2", 64),
        ("same", "gpt2", 96),
        ("other", "llama2", 96),
    ):
        torch.manual_seed(0)
        loaded = AutoTokenizer.from_pretrained(SHARED / "tokenizers" / tokenizer)
        config = LlamaConfig(
            vocab_size=len(loaded),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=loaded.bos_token_id,
            eos_token_id=loaded.eos_token_id,
        )
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
        loaded.save_pretrained(folder / name)


def work(folder: Path, method: str) -> None:
    """Two steps of one method in this process; prints its peak."""
    import torch

    import limbeck

    torch.set_num_threads(1)
    objective = SAME.get(method) or OTHER[method]
    beside = [] if objective["kind"] == "forward_kl" else [{"objective": "cross_entropy"}]
    recipe = {
        "student": {"name": str(folder / "student"), "max_length": 256},
        "teachers": {"big": {"name": str(folder / ("same" if method in SAME else "other"))}},
        "source": {"path": str(SHARED / "data" / "stories" / "train.jsonl"), "holdout": 0},
        "terms": [{"objective": objective}, *beside],
        "train": {
            "steps": 2,
            "batch_tokens": STEP_TOKENS,
            "save_every": 100,
            "logits": "naive" if method == NAIVE else "auto",
        },
    }
    with tempfile.TemporaryDirectory() as out:
        limbeck.run(recipe, Path(out) / "run")
    print(json.dumps(peak_bytes()))


def table(results: dict[str, Any]) -> str:
    """Peaks, and how much more than plain distillation."""
    rows = {row["method"]: row["peak_bytes"] for row in results["rows"]}
    lines = [
        [method, f"{peak / 1e6:,.0f}", f"{(peak - rows[PLAIN]) / 1e6:+,.0f}"]
        for method, peak in rows.items()
    ]
    return markdown(["method", "peak, MB", f"beside {PLAIN}, MB"], lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(Path(options.worker[0]), options.worker[1])
        return 0
    if not SHARED.exists():
        print(f"left out: {SHARED} is absent")
        return 0
    rows: list[dict[str, Any]] = []
    results: dict[str, Any] = {"environment": environment(), "step_tokens": STEP_TOKENS}
    methods = [PLAIN, "likelihood_matching"] if options.quick else [*SAME, *OTHER]
    with tempfile.TemporaryDirectory() as folder:
        make_models(Path(folder))
        for method in methods:
            command = [sys.executable, __file__, "--worker", folder, method]
            ended = subprocess.run(command, capture_output=True, text=True)
            if ended.returncode:
                print(f"{method}: FAILED: {ended.stderr.strip().splitlines()[-1]}", flush=True)
                continue
            rows.append({"method": method, "peak_bytes": json.loads(ended.stdout.splitlines()[-1])})
            print(f"{method}: {rows[-1]['peak_bytes'] / 1e6:,.0f} MB", flush=True)
            if not options.quick:
                RESULTS.write_text(json.dumps({**results, "rows": rows}, indent=1) + "\n")
    results["rows"] = rows
    print("\n" + table(results))
    return 0 if len(rows) == len(methods) else 1


if __name__ == "__main__":
    sys.exit(main())
