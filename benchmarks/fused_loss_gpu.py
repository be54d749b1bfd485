"""The same as `fused_loss.py` on a GPU, at the widths of real models.

    python benchmarks/fused_loss_gpu.py
    python benchmarks/fused_loss_gpu.py --implementation limbeck --out figures.json

8,192 rows, V = 151,936, student width 2,048, teacher width 8,192, bfloat16: forward and backward of
KL and Jensen-Shannon, each implementation in a fresh process. After three calls to warm up, ten are
timed with the GPU's own events. Reported are

- the median milliseconds;
- the share of the matmul rate: of exactly the four products, 2,048 rows at a time over all rows,
  timed likewise just before and just after, and the mean of both;
- the peak of what torch has allocated above what stood before the call, gradients included.

Value and gradients are held to float64 as they are there.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from environment import commit, environment, now
from fused_loss import TOLERANCE, Case, errors_of, make_tensors
from measure import CHUNK_ROWS, answer, in_fresh_process, operations
from table import fused_loss_table

RESULTS = Path(__file__).with_name("results") / "fused_loss_h200.json"

WIDTHS = 2048, 8192

CASES = [Case(8192, 151_936, "bfloat16", name) for name in ("forward_kl", "jensen_shannon")]

WARM_UP, CALLS = 3, 10

TIMEOUT_SECONDS = 120.0


def milliseconds(call: Callable[[], Any]) -> list[float]:
    """Of each call, by the GPU's clock."""
    import torch

    for _ in range(WARM_UP):
        call()
    marks = [[torch.cuda.Event(enable_timing=True) for _ in "be"] for _ in range(CALLS)]
    for begin, end in marks:
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in marks]


def matmul_rate(tensors: tuple[Any, Any, Any, Any]) -> float:
    """Operations a second of both projections and the student's two gradients alone."""
    import torch

    student, head, teacher, teacher_head = (tensor.detach() for tensor in tensors)
    logits = torch.empty(CHUNK_ROWS, len(head), dtype=head.dtype, device=head.device)
    hidden_gradient, head_gradient = torch.empty_like(student), torch.empty_like(head)

    def products() -> None:
        for first in range(0, len(student), CHUNK_ROWS):
            part = slice(first, first + CHUNK_ROWS)
            torch.mm(teacher[part], teacher_head.T, out=logits)
            torch.mm(student[part], head.T, out=logits)
            torch.mm(logits, head, out=hidden_gradient[part])
            torch.mm(logits.T, student[part], out=head_gradient)

    taken = statistics.median(milliseconds(products)) / 1e3
    return operations(len(student), len(head), *WIDTHS) / taken


def measure_case(case: Case, implementation: str) -> dict[str, Any]:
    """All figures of one case, in this process."""
    import torch
    from implementations import IMPLEMENTATIONS

    loss = IMPLEMENTATIONS[implementation].make(case.divergence)
    tensors = make_tensors(case, WIDTHS, "cuda")
    student, head, *_ = tensors
    values: list[Any] = []

    def call() -> None:
        student.grad = head.grad = None
        value = loss(*tensors)
        value.backward()
        values[:] = [value.detach()]

    before = matmul_rate(tensors)
    call()
    student.grad = head.grad = None
    values.clear()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    stood = torch.cuda.memory_allocated()
    call()
    extra = torch.cuda.max_memory_allocated() - stood
    times = milliseconds(call)
    after = matmul_rate(tensors)
    errors = errors_of(case, tensors, float(values[0]))
    median = statistics.median(times) / 1e3
    flops = operations(case.rows, case.vocabulary, *WIDTHS)
    return {
        "seconds": [taken / 1e3 for taken in times],
        "median_seconds": median,
        "matmul_rate_before": before,
        "matmul_rate_after": after,
        "share_of_matmul_rate": flops / median / ((before + after) / 2),
        "extra_bytes": extra,
        "value": float(values[0]),
        **errors,
        "agrees": max(errors.values()) <= TOLERANCE[case.dtype],
    }


def worker(implementation: str) -> dict[str, Any]:
    """The rows of all cases: a figure that cannot be had says why."""
    import torch

    rows: list[dict[str, Any]] = []
    for case in CASES:
        row = {"case": asdict(case), "implementation": implementation, "date": now()}
        row["limbeck_commit"] = commit()
        try:
            row |= measure_case(case, implementation)
        except ImportError as error:
            row |= {"left_out": "not installed", "missing": str(error)}
        except (RuntimeError, ValueError) as error:
            row |= {"error": str(error).splitlines()[0][:300]}
        rows.append(row)
        torch.cuda.empty_cache()
    return {"rows": rows}


def main() -> int:
    """Run what is asked for, write it down after each process, and print the table."""
    from implementations import IMPLEMENTATIONS

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--implementation", action="append", choices=list(IMPLEMENTATIONS))
    parser.add_argument("--out", type=Path, default=RESULTS, help="the JSON file")
    parser.add_argument("--update", action="store_true", help="keep its other rows")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        answer(worker(json.loads(options.worker)))
        return 0
    results = {"environment": environment(), "widths": WIDTHS, "rows": []}
    if results["environment"]["gpu"] is None:
        print("there is no GPU here", file=sys.stderr)
        return 1
    if options.update and options.out.exists():
        results["rows"] = json.loads(options.out.read_text())["rows"]
    for implementation in options.implementation or IMPLEMENTATIONS:
        found = in_fresh_process(__file__, implementation, TIMEOUT_SECONDS, gpu=True)
        rows = found.get(
            "rows", [{"case": asdict(c), "implementation": implementation, **found} for c in CASES]
        )
        others = [row for row in results["rows"] if row["implementation"] != implementation]
        results["rows"] = others + rows
        for row in rows:
            print(say(row), flush=True)
        options.out.parent.mkdir(exist_ok=True)
        options.out.write_text(json.dumps(results, indent=1) + "\n")
    print("\n" + fused_loss_table(results))
    return 0 if all(row.get("agrees", True) for row in results["rows"]) else 1


def say(row: dict[str, Any]) -> str:
    """One line of progress."""
    head = f"{row['case']['divergence']:15} {row['implementation']:17}"
    if "seconds" not in row:
        return f"{head} {row.get('left_out') or row['error']}"
    rates = f"{row['matmul_rate_before'] / 1e12:.0f}, {row['matmul_rate_after'] / 1e12:.0f}"
    return (
        f"{head} {1e3 * row['median_seconds']:7.1f} ms {row['share_of_matmul_rate']:5.0%} of "
        f"{rates} TFLOP/s {row['extra_bytes'] / 1e6:8,.0f} MB"
        f"{'' if row['agrees'] else '  DISAGREES with float64'}"
    )


if __name__ == "__main__":
    sys.exit(main())
