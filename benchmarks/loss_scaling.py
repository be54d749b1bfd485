"""How time and memory of our fused loss grow with the rows and with the vocabulary.

    python benchmarks/loss_scaling.py            # everything; about a quarter of an hour
    python benchmarks/loss_scaling.py --quick    # three small points, nothing written

Forward KL, forward and backward, float32, one thread, a fresh process for each point, measured as
in `fused_loss.py`: N = 512 to 16,384 rows at V = 32,000, and V = 8,000 to 262,144 at N = 1,024.
Writes `results/loss_scaling.json` and draws `results/loss_scaling.png`: seconds should lie on a
line of slope 1 (dashed, through the middle point), and memory, less what the gradients of head and
hidden state take, should not grow.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

from environment import environment
from fused_loss import STUDENT_WIDTH, Case, run_one, say

RESULTS = Path(__file__).with_name("results") / "loss_scaling.json"

ROWS = [Case(rows, 32_000, "float32") for rows in (512, 1024, 2048, 4096, 8192, 16_384)]

VOCABULARIES = [
    Case(1024, vocabulary, "float32")
    for vocabulary in (8000, 16_000, 32_000, 65_536, 131_072, 262_144)
]

QUICK = [Case(512, 8000, "float32"), Case(1024, 8000, "float32"), Case(512, 16_000, "float32")]


def gradients_bytes(case: dict[str, Any]) -> int:
    """What the gradients of the head and of the hidden state take, whoever makes them."""
    return (case["vocabulary"] + case["rows"]) * STUDENT_WIDTH * 4


def exponent(rows: list[dict[str, Any]], along: str) -> float:
    """The slope of log seconds over log size, by least squares: 1 is linear."""
    xs = [math.log(row["case"][along]) for row in rows]
    ys = [math.log(row["median_seconds"]) for row in rows]
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    above = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True))
    return above / sum((x - mean_x) ** 2 for x in xs)


def curves(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The measured points of either curve, by what grows along it."""
    measured = [row for row in rows if "seconds" in row]
    points = {"rows": ROWS, "vocabulary": VOCABULARIES}
    return {
        along: sorted(
            (row for row in measured if Case(**row["case"]) in cases),
            key=lambda row: row["case"][along],
        )
        for along, cases in points.items()
    }


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Time above, memory below; rows on the left, vocabulary on the right."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(9, 6), sharey="row", layout="constrained")
    labels = {
        "rows": "rows N (V = 32,000)",
        "vocabulary": "vocabulary V (N = 1,024)",
    }
    for column, (along, points) in enumerate(curves(rows).items()):
        if len(points) < 2:
            continue
        xs = [row["case"][along] for row in points]
        seconds = [row["median_seconds"] for row in points]
        middle = len(xs) // 2
        line = [seconds[middle] * x / xs[middle] for x in xs]
        time, memory = axes[0, column], axes[1, column]
        time.loglog(xs, seconds, "o-", label=f"measured, slope {exponent(points, along):.2f}")
        time.loglog(xs, line, "k--", linewidth=1, label="linear")
        extra = [row["extra_bytes"] / 1e6 for row in points]
        own = [(row["extra_bytes"] - gradients_bytes(row["case"])) / 1e6 for row in points]
        memory.semilogx(xs, extra, "o-", label="all that was needed")
        memory.semilogx(xs, own, "s-", label="without the gradients of head and hidden state")
        memory.set_xlabel(labels[along])
        for axis in (time, memory):
            axis.set_xticks(xs, [f"{x:,}" for x in xs], fontsize=8)
            axis.minorticks_off()
            axis.legend(fontsize=8)
            axis.grid(alpha=0.3)
    axes[1, 0].set_ylim(bottom=0)  # once all is drawn, or it would also fix the top
    axes[0, 0].set_ylabel("seconds")
    axes[1, 0].set_ylabel("extra peak memory, MB")
    figure.suptitle("Fused forward KL, forward and backward, float32, one CPU thread")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> int:
    """Measure each point, write it down, and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="three small points, not written")
    parser.add_argument("--implementation", default="limbeck", help="as in fused_loss.py")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the JSON file")
    parser.add_argument("--draw", action="store_true", help="draw what is there, measure nothing")
    options = parser.parse_args()
    picture = options.out.with_suffix(".png")
    if options.draw:
        draw(json.loads(options.out.read_text())["rows"], picture)
        return 0
    rows: list[dict[str, Any]] = []
    results = {"environment": environment(), "rows": rows}
    for case in QUICK if options.quick else [*ROWS, *(c for c in VOCABULARIES if c not in ROWS)]:
        row = run_one(case, options.implementation)
        rows.append(row)
        say(case, row)
        if not options.quick:
            options.out.parent.mkdir(exist_ok=True)
            options.out.write_text(json.dumps(results, indent=1) + "\n")
    if options.quick:
        return 0 if all("seconds" in row for row in rows) else 1
    for along, points in curves(rows).items():
        if len(points) > 1:
            print(f"seconds grow with {along} to the power {exponent(points, along):.2f}")
    draw(rows, picture)
    return 0 if all("seconds" in row for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
