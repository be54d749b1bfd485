"""Forward and backward of a distillation loss from hidden states and heads, beside our peers.

    python benchmarks/fused_loss.py                  # everything; more than two hours
    python benchmarks/fused_loss.py --quick          # the smallest case only, nothing written
    python benchmarks/fused_loss.py --case 2048x32000-float32 --implementation limbeck --update

Each (case, implementation) runs in a fresh process with one thread. A case is N rows, V
vocabulary entries, a dtype and a divergence; the student's width is 512, the teacher's 1,024.
After a warm-up at full shape the call is timed (seven times to once, by its length). Reported are

- the median and the least seconds;
- the share of the matmul rate: 2NV(dt + ds) + 4NV ds operations over the seconds of a call, divided
  by the rate of exactly those products in the same process, the mean of just before and just after
  that call; the median over the calls, the least and the most. Also by processor time, which stands
  still while another process has the core: where the two differ, the machine was busy;
- the same share of the rate that products reach in memory as torch hands it out. The rate above has
  all in huge pages, as limbeck lays it, which is faster: no loss is measured against less than the
  machine can do;
- the peak of resident memory above what stood before the call, in MB of 10^6 bytes, the gradients
  of the student's hidden state and head included.

The N rows are 64 distinct ones over and over, so that value and gradients of the whole call can be
held to a float64 computation of 64 rows; every process does that, and a row that disagrees is
marked and makes the exit code 1.

Peers that are not installed (`benchmarks/requirements.txt`) are left out, and the output says so;
so is what would need more than 18 GiB.
"""

import argparse
import json
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from environment import destination, environment, load, memory_bytes, now
from measure import (
    Rate,
    answer,
    give_back_memory,
    in_fresh_process,
    matmul_rate,
    operations,
    shares,
    status_bytes,
    times_of,
)
from table import fused_loss_table

RESULTS = Path(__file__).with_name("results") / "fused_loss.json"

STUDENT_WIDTH, TEACHER_WIDTH = 512, 1024

DISTINCT_ROWS = 64

LIMIT_BYTES = 18 << 30

TIMEOUT_SECONDS = 1800.0

QUIET_SHARE = 0.95
"""Below this share of a core, or of the earlier rate, a row is remarked on: run it again."""

TOLERANCE = {"float32": 1e-3, "bfloat16": 1e-1}
"""Relative error up to which a value or gradient counts as the right one."""


@dataclass(frozen=True)
class Case:
    """One column of the table."""

    rows: int
    vocabulary: int
    dtype: str
    divergence: str = "forward_kl"

    @property
    def name(self) -> str:
        """As `--case` takes it."""
        suffix = "" if self.divergence == "forward_kl" else f"-{self.divergence}"
        return f"{self.rows}x{self.vocabulary}-{self.dtype}{suffix}"


SIZES = [(2048, 32_000), (2048, 151_936), (8192, 32_000), (8192, 151_936)]

CASES = [
    Case(rows, vocabulary, dtype, divergence)
    for divergence in ("forward_kl", "jensen_shannon")
    for rows, vocabulary in SIZES
    for dtype in ("float32", "bfloat16")
]


def wanted(case: Case, implementation: str) -> bool:
    """Jensen-Shannon: ours everywhere, the peers' in the smallest size only, to save hours."""
    if implementation == "liger-triton":  # wants a GPU
        return False
    small = (case.rows, case.vocabulary) == SIZES[0]
    return case.divergence == "forward_kl" or small or implementation.startswith("limbeck")


def needed_bytes(case: Case, implementation: str) -> float:
    """About how much a process will need, by what was measured at a smaller size."""
    from implementations import IMPLEMENTATIONS

    what = IMPLEMENTATIONS[implementation]
    temporaries = what.tensors[case.dtype] * case.rows * case.vocabulary * 4
    if case.divergence != "forward_kl":
        temporaries *= 1.6
    size = 4 if case.dtype == "float32" else 2
    heads = case.vocabulary * (2 * STUDENT_WIDTH + TEACHER_WIDTH) * size
    return temporaries + what.constant_bytes + heads + 0.6e9


def measure_case(case: Case, implementation: str) -> dict[str, Any]:
    """All figures of one case, in this process."""
    import torch
    from implementations import IMPLEMENTATIONS

    torch.set_num_threads(1)
    try:
        loss = IMPLEMENTATIONS[implementation].make(case.divergence)
    except ImportError as error:
        return {"left_out": "not installed", "missing": str(error)}
    tensors = make_tensors(case)
    student, head, teacher, teacher_head = tensors

    values: list[float] = []

    def call() -> None:
        value = loss(*tensors)
        value.backward()
        values.append(float(value))

    def clear() -> None:
        student.grad = head.grad = None

    give_back_memory()
    plain = [tensor.detach().clone() for tensor in tensors]
    resident = status_bytes("VmRSS")
    call()
    clear()
    give_back_memory()
    retained = status_bytes("VmRSS") - resident
    rates: list[Rate] = []  # not sooner: the call may move its inputs to better pages
    plain_rates: list[Rate] = []

    def measure_rates() -> None:
        rates.append(matmul_rate(*tensors))
        plain_rates.append(matmul_rate(*plain, huge_pages=False))

    times, memory = times_of(call, clear, measure_rates)
    errors = errors_of(case, tensors, values[-1])
    flops = operations(case.rows, case.vocabulary, STUDENT_WIDTH, TEACHER_WIDTH)
    reached = shares(flops, times.wall, [rate.wall for rate in rates])
    of_plain = shares(flops, times.wall, [rate.wall for rate in plain_rates])
    worked = shares(flops, times.processor, [rate.processor for rate in rates])
    return {
        "seconds": times.wall,
        "median_seconds": statistics.median(times.wall),
        "least_seconds": min(times.wall),
        "processor_share": times.processor_share,
        "matmul_rates": [rate.wall for rate in rates],
        "shares": reached,
        "share_of_matmul_rate": statistics.median(reached),
        "plain_matmul_rates": [rate.wall for rate in plain_rates],
        "share_of_plain_matmul_rate": statistics.median(of_plain),
        "share_by_processor_time": statistics.median(worked),
        "extra_bytes": memory.extra_bytes,
        "retained_bytes": retained,
        "value": values[-1],
        **errors,
        "agrees": max(errors.values()) <= TOLERANCE[case.dtype],
    }


def make_tensors(
    case: Case, widths: tuple[int, int] = (STUDENT_WIDTH, TEACHER_WIDTH), device: str = "cpu"
) -> tuple[Any, Any, Any, Any]:
    """Student hidden state and head with gradients, the teacher's without; logits of spread 2.

    Heads are parameters, as a model's are.
    """
    import torch
    from torch import nn

    generator = torch.Generator(device).manual_seed(0)
    dtype = getattr(torch, case.dtype)

    def normal(count: int, width: int, scale: float) -> Any:
        return torch.randn(count, width, generator=generator, device=device).mul_(scale).to(dtype)

    def hidden(width: int) -> Any:
        return normal(DISTINCT_ROWS, width, 1.0).repeat(case.rows // DISTINCT_ROWS, 1)

    student, teacher = (hidden(width) for width in widths)
    head, teacher_head = (normal(case.vocabulary, width, 2 / width**0.5) for width in widths)
    heads = nn.Parameter(head), nn.Parameter(teacher_head, requires_grad=False)
    return student.requires_grad_(), heads[0], teacher, heads[1]


def errors_of(case: Case, tensors: tuple[Any, Any, Any, Any], value: float) -> dict[str, float]:
    """Relative errors of the value and of both gradients, against float64 on the distinct rows."""
    import torch
    from implementations import divergence_sum

    student, head, teacher, teacher_head = tensors
    x = student.detach()[:DISTINCT_ROWS].double().requires_grad_()
    w = head.detach().double().requires_grad_()
    with torch.no_grad():
        logits = teacher[:DISTINCT_ROWS].double() @ teacher_head.double().T
    truth = divergence_sum(case.divergence, x @ w.T, logits) / DISTINCT_ROWS
    truth.backward()
    share = DISTINCT_ROWS / case.rows  # of the mean that a row has
    expected = (x.grad * share).repeat(case.rows // DISTINCT_ROWS, 1)
    return {
        "value_error": abs(value / float(truth) - 1),
        "hidden_gradient_error": _relative(student.grad, expected),
        "head_gradient_error": _relative(head.grad, w.grad),
    }


def _relative(found: Any, expected: Any) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def arguments() -> argparse.Namespace:
    """The command line."""
    from implementations import IMPLEMENTATIONS

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [case.name for case in CASES]
    parser.add_argument("--case", action="append", choices=names, metavar="CASE", help=str(names))
    parser.add_argument("--implementation", action="append", choices=list(IMPLEMENTATIONS))
    parser.add_argument("--quick", action="store_true", help="2048x32000-float32, not written")
    parser.add_argument("--out", type=Path, help="the JSON file")
    parser.add_argument("--update", action="store_true", help="keep its other rows")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def run_one(case: Case, implementation: str) -> dict[str, Any]:
    """One row of the results: in a fresh process, or why not."""
    row = {"case": asdict(case), "implementation": implementation, "date": now(), "load": load()}
    needed = needed_bytes(case, implementation)
    if needed > LIMIT_BYTES:
        return {**row, "left_out": f"needs about {needed / 1e9:.0f} GB"}
    if needed > memory_bytes("MemAvailable"):
        return {**row, "left_out": f"needs about {needed / 1e9:.0f} GB, more than is free now"}
    job = {"case": asdict(case), "implementation": implementation}
    return {**row, **in_fresh_process(__file__, job, TIMEOUT_SECONDS)}


def say(case: Case, row: dict[str, Any]) -> None:
    """One line of progress."""
    head = f"{case.name:38} {row['implementation']:10}"
    if "seconds" not in row:
        print(f"{head} {row.get('left_out') or row['error']}", flush=True)
        return
    share, extra = row["share_of_matmul_rate"], row["extra_bytes"] / 1e6
    least, most = min(row["shares"]), max(row["shares"])
    print(
        f"{head} {row['median_seconds']:8.2f} s (least {row['least_seconds']:.2f}) "
        f"{share:5.0%} ({least:.0%} to {most:.0%}; {row['share_by_processor_time']:.0%} by "
        f"processor time; {row['share_of_plain_matmul_rate']:.0%} of the rate in small pages) "
        f"{extra:7,.0f} MB  {remarks(row)}",
        flush=True,
    )


def remarks(row: dict[str, Any]) -> str:
    """What makes a row doubtful."""
    found: list[str] = []
    if not row["agrees"]:
        found.append("DISAGREES with float64")
    if row["processor_share"] < QUIET_SHARE:
        found.append(f"had a core for {row['processor_share']:.0%} of the time only")
    least, most = min(row["matmul_rates"]), max(row["matmul_rates"])
    if least < QUIET_SHARE * most:
        found.append(f"matmul rate {least / 1e9:.0f} to {most / 1e9:.0f} GFLOP/s")
    return "; ".join(found)


def main() -> int:
    """Run what is asked for, write it down after each row, and print the table."""
    from implementations import IMPLEMENTATIONS

    options = arguments()
    if options.worker:
        job = json.loads(options.worker)
        answer(measure_case(Case(**job["case"]), job["implementation"]))
        return 0
    cases = [c for c in CASES if options.case is None or c.name in options.case]
    cases = CASES[:1] if options.quick else cases
    chosen = options.implementation or list(IMPLEMENTATIONS)
    out = None if options.quick else destination(options.out, RESULTS)
    rows: list[dict[str, Any]] = []
    if options.update and out and out.exists():
        rows = json.loads(out.read_text())["rows"]
    results = {"environment": environment(), "rows": rows}
    asked = bool(options.case)
    for case in cases:
        for implementation in chosen:
            if not asked and not wanted(case, implementation):
                continue
            row = run_one(case, implementation)
            say(case, row)
            key = (row["case"], row["implementation"])
            rows[:] = [r for r in rows if (r["case"], r["implementation"]) != key] + [row]
            if out:
                out.parent.mkdir(exist_ok=True)
                out.write_text(json.dumps(results, indent=1) + "\n")
    print("\n" + fused_loss_table(results))
    return 0 if all(row.get("agrees", True) for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
