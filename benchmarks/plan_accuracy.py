"""What `limbeck plan --time` says of a step's seconds, beside what the run then takes.

    python benchmarks/plan_accuracy.py

Random Llama models of three shapes, one thread; the student has half of the teacher's layers. The
memory that `limbeck plan` says is held to a run's by `tests/recipe/test_plan.py`.
"""

import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from environment import environment
from table import markdown

from limbeck.recipe.calibrate import step_time
from limbeck.recipe.check import check
from limbeck.recipe.run import run

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "recipe"))
from measure_memory import make

RESULTS = Path(__file__).with_name("results") / "plan_accuracy.json"
STEPS = 9
TERMS = [{"objective": "forward_kl"}, {"objective": "cross_entropy"}]
SHAPES = [
    {"vocabulary": 8_000, "layers": 8, "width": 256, "inner": 768},
    {"vocabulary": 1_000, "layers": 16, "width": 64, "inner": 128},
    {"vocabulary": 100_000, "layers": 6, "width": 128, "inner": 256},
]


def main() -> None:
    """Print planned and measured seconds of each shape."""
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for shape in SHAPES:
        with tempfile.TemporaryDirectory() as name:
            train = {"steps": STEPS, "batch_tokens": 1200, "terms": TERMS}
            recipe = make(Path(name), **shape, **train)
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
