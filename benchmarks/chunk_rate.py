"""What it costs to hold few logits: limbeck's chunks of rows with losses that cost nothing.

    python benchmarks/chunk_rate.py                      # float32 and bfloat16; about ten minutes
    python benchmarks/chunk_rate.py --dtype float32

The products of `fused_loss.py` at 2,048 rows and V = 151,936, one thread, made chunk by chunk as
our loss makes them, with nothing between the logits and their gradient. The share is of the same
products on all rows at once, measured as there: beside each call, and the median counts. So it
tells what of a loss's time is not the loss: a loss that takes any time at all, with chunks of so
many rows and torch's products, stays below it.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from environment import destination, environment, now
from fused_loss import STUDENT_WIDTH, TEACHER_WIDTH, Case, make_tensors
from measure import Times, matmul_rate, operations, shares
from table import SHORT, markdown
from torch import Tensor

from limbeck.losses import pages
from limbeck.losses.chunks import Chunked, RowTerm, Run, Work
from limbeck.losses.projection import Projection

RESULTS = Path(__file__).with_name("results") / "chunk_rate.json"

ROWS, VOCABULARY = 2048, 151_936

CHUNKS = (128, 256, 512, 1024, 2048)

ROUNDS = 5


def free(_: Any, __: Work, ___: Tensor, ____: Any, pulls: Tensor, _____: Tensor) -> Tensor:
    """In the place of `chunks.in_place`: the logits stay, as if they were their gradient."""
    return torch.zeros_like(pulls)


def products(tensors: tuple[Tensor, Tensor, Tensor, Tensor], chunk: int) -> None:
    """A forward and backward pass of our loss without the loss."""
    student, head, teacher, teacher_head = tensors
    ours = Projection(hidden=student, weight=head)
    term = RowTerm(
        loss=lambda *_: student, weight=torch.ones(ROWS), teacher="t", kernel=lambda *_: _
    )
    theirs = {"t": Projection(hidden=teacher, weight=teacher_head)}
    work = Work(ours, theirs, [term], chunk, Run(free, by_blocks=False))
    total, _ = Chunked.apply(work, student, head, None, None, None)
    total.backward()
    student.grad = head.grad = None


def measure(dtype: str) -> list[dict[str, Any]]:
    """A row for each size of chunks."""
    tensors = make_tensors(Case(ROWS, VOCABULARY, dtype))
    flops = operations(ROWS, VOCABULARY, STUDENT_WIDTH, TEACHER_WIDTH)
    size = torch.finfo(getattr(torch, dtype)).bits // 8
    rows: list[dict[str, Any]] = []
    for chunk in CHUNKS:
        call = partial(products, tensors, chunk)
        rates: list[float] = []
        pages.release()
        call()
        times = Times()
        rates.append(matmul_rate(*tensors).wall)
        for _ in range(ROUNDS):
            times.add(call)
            rates.append(matmul_rate(*tensors).wall)
        reached = shares(flops, times.wall, rates)
        rows.append(
            {
                "dtype": dtype,
                "chunk_rows": chunk,
                "logits_bytes": 2 * chunk * VOCABULARY * size,
                "seconds": times.wall,
                "matmul_rates": rates,
                "shares": reached,
                "share_of_matmul_rate": median(reached),
                "date": now(),
            }
        )
        print(rows[-1], flush=True)
    return rows


def table(results: dict[str, Any]) -> str:
    """Types down, sizes of chunks across."""
    rows = results["rows"]
    header = ["rows at a time", *(f"{chunk:,}" for chunk in CHUNKS)]
    lines = [
        [
            SHORT[dtype],
            *(
                f"{row['share_of_matmul_rate']:.0%}, {row['logits_bytes'] / 1e6:,.0f} MB"
                for row in rows
                if row["dtype"] == dtype
            ),
        ]
        for dtype in dict.fromkeys(row["dtype"] for row in rows)
    ]
    return markdown(header, lines)


def main() -> int:
    """Measure, write, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", action="append", choices=["float32", "bfloat16"])
    parser.add_argument("--out", type=Path, help="the JSON file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for dtype in options.dtype or ("float32", "bfloat16") for row in measure(dtype)]
    results = {"environment": environment(), "rows": rows}
    if out := destination(options.out, RESULTS):
        out.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
