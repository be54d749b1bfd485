"""Whole training steps, TRL's trainers and limbeck's: steps a second and peak memory.

    python benchmarks/train_step.py                 # everything; about twenty-five minutes
    python benchmarks/train_step.py --quick         # a few steps of V = 1,000, nothing written
    python benchmarks/train_step.py --vocabulary 1000 --trainer trl-gkd --trainer limbeck --update

Random Llama models of two layers, teacher of width 64 and student of width 32, and the same rows
for all, 4 a step, none of them padded: with heads of V = 1,000, 24 tokens of prompt and 40 of
completion; with V = 151,936, 92 and 112, so that 448 are learnt.
Each trainer runs in a fresh process with one thread on one core, which loaders and whatever else
works in the background have to share (`--cores 2` gives them another). Time is wall clock from the
end of one step to the end of the next, with data, logging and optimizer, after a warm-up; reported
are steps over seconds, and the median step, which a disturbed second does not move; also the
processor time of a step, which is the same on a quiet machine. Memory is the peak resident size of
the whole process, imports included. Both are of the process that trains; where it has others to
prepare its data, what they have for themselves at the end of the warm-up is added behind a plus.
`trainers.py` says what is set.

Small steps are measured in three turns, each trainer once in each, and the quickest turn of a
trainer counts: a shared machine is slower at one minute than at the next, for one trainer only.

Trainers that are not installed (`benchmarks/requirements.txt`) are left out, and it says so.
"""

import argparse
import json
import resource
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from clock import Clock
from environment import destination, environment, load, now
from measure import answer, in_fresh_process
from table import train_step_table
from train_material import Size, write_material
from trainers import TRAINERS, Maker

RESULTS = Path(__file__).with_name("results") / "train_step.json"

SIZES = [
    Size(vocabulary=1000, prompt=24, completion=40, warm_up=50, steps=1000),
    Size(vocabulary=151_936, prompt=92, completion=112, warm_up=2, steps=6),
]

TURNS = {1000: 3}
"""How often each trainer is measured, by vocabulary; else once."""

QUICK = replace(SIZES[0], warm_up=5, steps=20)

TIMEOUT_SECONDS = 900.0


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Trainers beside each other, as a script of its own.

    Attributes:
        script: that starts itself again for each trainer.
        about: what its `--help` says.
        trainers: title and maker, by name.
        sizes: what they run on.
        quick: what they run on for a look.
        results: where the figures go.
        table: makes Markdown of them.
        writes: the student writes what is learnt.
        cores: that each may use; None for all.
    """

    script: str
    about: str | None
    trainers: Mapping[str, tuple[str, Maker]]
    sizes: Sequence[Size]
    quick: Sequence[Size]
    results: Path
    table: Callable[[dict[str, Any]], str]
    writes: bool = False
    cores: int | None = 1


def measure_trainer(title: str, make: Maker, folder: Path, size: Size) -> dict[str, Any]:
    """Train in this process; `folder` holds models and rows."""
    import torch

    torch.set_num_threads(1)
    clock, warm_up, steps = Clock(size.warm_up), size.warm_up, size.steps
    try:
        made = make(folder, size, clock)
    except ImportError as error:
        return {"left_out": "not installed", "missing": str(error)}
    made.train()
    times = clock.times[warm_up - 1 : warm_up + steps]
    each = [end - begin for begin, end in zip(times, times[1:], strict=False)]
    if len(each) != steps:
        return {"error": f"{title}: {len(clock.times)} steps seen, {warm_up + steps} asked for"}
    worked = clock.processor_times[warm_up - 1 : warm_up + steps]
    timed = slice(warm_up, warm_up + steps)
    positions = clock.positions[timed]
    return {
        "steps": steps,
        "seconds": sum(each),
        "steps_per_second": steps / sum(each),
        "median_step_seconds": statistics.median(each),
        "processor_seconds_per_step": (worked[-1] - worked[0]) / steps,
        "processor_share": (worked[-1] - worked[0]) / sum(each),
        "peak_bytes": peak_bytes(),
        "beside_bytes": clock.beside_bytes,
        "positions_per_step": [min(positions), max(positions)],
        "written_per_step": sum(clock.written[timed]) / steps,
        "writing_share": sum(clock.writing[timed]) / sum(each),
    }


def peak_bytes() -> int:
    """Of the process's memory, or where it has a GPU of what torch has taken of that."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run_one(
    comparison: Comparison, trainer: str, size: Size, material: Path, cores: int | None
) -> dict[str, Any]:
    """One row of the results, in a fresh process and folder."""
    row = {"trainer": trainer, "size": asdict(size), "cores": cores, "date": now(), "load": load()}
    with tempfile.TemporaryDirectory() as folder:
        for part in material.iterdir():
            (Path(folder) / part.name).symlink_to(part)
        job = {"trainer": trainer, "folder": folder, "size": asdict(size)}
        figures = in_fresh_process(comparison.script, job, TIMEOUT_SECONDS, cores, gpu=size.gpu)
    found = {**row, **figures}
    expected = size.sequences * (size.prompt + size.completion)
    if found.get("positions_per_step", [expected] * 2) != [expected] * 2:
        found["error"] = f"saw {found['positions_per_step']} positions a step, not {expected}"
    expected = size.sequences * size.completion if comparison.writes else 0
    if found.get("written_per_step", expected) != expected:
        found["error"] = f"wrote {found['written_per_step']} tokens a step, not {expected}"
    return found


def quickest(turns: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The turn with the most steps a second, with those of all; one that went wrong, if any did."""
    wrong = [row for row in turns if "error" in row or "left_out" in row]
    if wrong:
        return wrong[0]
    best = max(turns, key=lambda row: row["steps_per_second"])
    return {**best, "turns": [row["steps_per_second"] for row in turns]}


def arguments(comparison: Comparison) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=comparison.about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trainer", action="append", choices=list(comparison.trainers))
    vocabularies = [size.vocabulary for size in comparison.sizes]
    parser.add_argument("--vocabulary", action="append", type=int, choices=vocabularies)
    parser.add_argument(
        "--cores",
        type=int,
        default=comparison.cores,
        help=f"that the process may use ({comparison.cores or 'all'})",
    )
    parser.add_argument("--quick", action="store_true", help="few steps, not written")
    parser.add_argument("--out", type=Path, help="the JSON file")
    parser.add_argument("--update", action="store_true", help="keep its other rows")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def say(row: dict[str, Any]) -> None:
    """One line of progress."""
    head = f"V={row['size']['vocabulary']:>7,} {row['trainer']:18}"
    if "steps_per_second" not in row or "error" in row:
        print(f"{head} {row.get('left_out') or row.get('error')}", flush=True)
        return
    print(
        f"{head} {row['steps_per_second']:8.2f} steps/s "
        f"(median step {row['median_step_seconds'] * 1e3:,.1f} ms) "
        f"peak {row['peak_bytes'] / 1e6:,.0f} + {row['beside_bytes'] / 1e6:,.0f} MB, "
        f"processor {row['processor_seconds_per_step'] * 1e3:,.1f} ms a step",
        flush=True,
    )


def compare(comparison: Comparison) -> int:
    """Run what is asked for, write it down after each row, and print the table."""
    options = arguments(comparison)
    if options.worker:
        job = json.loads(options.worker)
        title, make = comparison.trainers[job["trainer"]]
        answer(measure_trainer(title, make, Path(job["folder"]), Size(**job["size"])))
        return 0
    out = None if options.quick else destination(options.out, comparison.results)
    rows: list[dict[str, Any]] = []
    if options.update and out and out.exists():
        rows = json.loads(out.read_text())["rows"]
    results = {"environment": environment(), "rows": rows}
    sizes = comparison.quick if options.quick else comparison.sizes
    for size in [s for s in sizes if s.vocabulary in (options.vocabulary or [s.vocabulary])]:
        with tempfile.TemporaryDirectory() as material:
            count = size.sequences * (size.warm_up + size.steps + 32)
            write_material(Path(material), size, count, endless=comparison.writes)
            turns = 1 if options.quick else TURNS.get(size.vocabulary, 1)
            found: dict[str, list[dict[str, Any]]] = {}
            chosen = options.trainer or list(comparison.trainers)
            for trainer in chosen * turns:
                row = run_one(comparison, trainer, size, Path(material), options.cores)
                say(row)
                found.setdefault(trainer, []).append(row)
                row = quickest(found[trainer])
                key = (trainer, row["size"])
                rows[:] = [r for r in rows if (r["trainer"], r["size"]) != key] + [row]
                if out:
                    out.parent.mkdir(exist_ok=True)
                    out.write_text(json.dumps(results, indent=1) + "\n")
    print("\n" + comparison.table(results))
    return 1 if any("error" in row for row in rows) else 0


TRAIN_STEP = Comparison(
    script=__file__,
    about=__doc__,
    trainers=TRAINERS,
    sizes=SIZES,
    quick=[QUICK],
    results=RESULTS,
    table=train_step_table,
)


if __name__ == "__main__":
    sys.exit(compare(TRAIN_STEP))
