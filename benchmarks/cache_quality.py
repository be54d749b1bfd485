"""What is lost by caching a teacher, and what is gained: quality, bytes and speed of each kind.

    python benchmarks/cache_quality.py            # both worlds, three seeds; about 15 minutes
    python benchmarks/cache_quality.py --quick    # a few steps of one seed, nothing written

Two worlds: the demo (word problems, teacher and student that ship with limbeck) and stories
(stories260K, of which four of five layers are the student; skipped where `shared/` is absent). The
student, the data, their order and the steps are the same in each arm of a seed; only what is known
of the teacher differs. Every run is an ordinary `limbeck.run`, and its student is measured
afterwards against the live teacher on text that nobody trained on. "plain fine-tuning" has no
teacher: its tokens/s are what a cached teacher's are compared with. One thread, wall clock.

Bytes a token are all shards of a cache, over learnt tokens. The vocabularies here have 512 entries
or fewer; `cache_size.py` measures bytes at 151,936.
"""

import argparse
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from environment import environment, load

import limbeck
from limbeck.core.specs import LocalTeacher
from limbeck.core.types import Sample
from limbeck.demo import model_path, problems, write_jsonl
from limbeck.evals import Agreement, Task
from limbeck.models.load import load_teacher
from limbeck.recipe.cache import Made, make_caches
from limbeck.recipe.document import Document
from limbeck.recipe.resolve import resolve
from limbeck.sources import Dataset

RESULTS = Path(__file__).with_name("results") / "cache_quality.json"
SHARED = Path(__file__).resolve().parents[1].parent / "shared"
CPU = torch.device("cpu")

KL = {"kind": "forward_kl"}
SPARSE = {"kind": "sparse_kl"}
CUT = {"kind": "sparse_kl", "tail": False}

ARMS: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    # title: objective, what is cached (None: the teacher runs in each step)
    "plain fine-tuning": ({"kind": "cross_entropy"}, None),
    "live teacher": (KL, None),
    "hidden states": (KL, {"keep": "hidden"}),
    "sampled, 12 draws": (SPARSE, {"keep": "sampled", "k": 12}),
    "sampled, 50 draws": (SPARSE, {"keep": "sampled", "k": 50}),
    "top 12, with tail": (SPARSE, {"keep": "topk", "k": 12}),
    "top 12, no tail": (CUT, {"keep": "topk", "k": 12}),
    "top 50, with tail": (SPARSE, {"keep": "topk", "k": 50}),
    "top 50, no tail": (CUT, {"keep": "topk", "k": 50}),
}


@dataclass(frozen=True)
class World:
    """A teacher, its student and their text. `task` is a file of problems, where there are any."""

    name: str
    student: dict[str, Any]
    teacher: str
    rows: Path
    held_out: Path
    task: Path | None
    max_length: int
    train: dict[str, Any]


def demo(folder: Path) -> World:
    """Word problems, about as many as the steps read once; the held-out ones are other problems."""
    write_jsonl(folder / "train.jsonl", problems(0, "train", 1500))
    write_jsonl(folder / "held.jsonl", problems(1, "test", 200))
    write_jsonl(folder / "task.jsonl", problems(0, "test", 150))
    return World(
        name="demo",
        student={"name": str(model_path("student")), "max_length": 256},
        teacher=str(model_path("teacher")),
        rows=folder / "train.jsonl",
        held_out=folder / "held.jsonl",
        task=folder / "task.jsonl",
        max_length=256,
        train={"steps": 60, "batch_tokens": 2048, "learning_rate": 2e-3, "schedule": "wsd"},
    )


def stories() -> World | None:
    """TinyStories; None where the shared assets are absent."""
    folder = SHARED / "data" / "stories"
    if not folder.exists():
        print(f"stories are left out: {folder} is absent")
        return None
    return World(
        name="stories",
        student={"from": "teacher", "layers": [0, 1, 2, 4], "max_length": 256},
        teacher=str(SHARED / "models" / "stories260K"),
        rows=folder / "train.jsonl",
        held_out=folder / "valid.jsonl",
        task=None,
        max_length=256,
        train={"steps": 120, "batch_tokens": 2048, "learning_rate": 2e-3},
    )


def recipe(world: World, arm: str, seed: int, caches: Path) -> dict[str, Any]:
    """An ordinary recipe. No evaluations: students are measured afterwards, all in the same way."""
    objective, cache = ARMS[arm]
    teacher: dict[str, Any] = {"name": world.teacher}
    if cache is not None:
        name = "-".join(str(value) for value in cache.values())
        teacher = {"kind": "cache", "path": str(caches / name), "of": teacher, **cache}
    return {
        "student": world.student,
        "teachers": {"big": teacher},
        "source": {"path": str(world.rows), "holdout": 0},
        "terms": [{"objective": objective}],
        "train": {**world.train, "save_every": 10_000, "device": "cpu"},
        "seed": seed,
    }


def measured(world: World, student: Path, held_out: list[Sample]) -> dict[str, float | None]:
    """The student beside the live teacher."""
    teacher = load_teacher(LocalTeacher(name=world.teacher), CPU, world.max_length)
    model = load_teacher(LocalTeacher(name=str(student)), CPU, world.max_length)
    scores = Agreement().measure(model, teacher, held_out)
    found: dict[str, float | None] = {name: score.value for name, score in scores.items()}
    found["accuracy"] = None
    if world.task is not None:
        task = Task(name="task", path=str(world.task), match="last_number", max_tokens=120)
        found["accuracy"] = task.measure(model, None, [])["task"].value
    return found


def run_arm(
    world: World, arm: str, seed: int, folder: Path, held_out: list[Sample], made: dict[str, Made]
) -> dict[str, Any]:
    """Fill the cache if this is its first run, train, measure."""
    values = recipe(world, arm, seed, folder / "caches")
    path = values["teachers"]["big"].get("path")
    if path is not None and path not in made:
        made[path] = make_caches(resolve(Document(values, {})))[0]
    out = folder / f"{arm}-{seed}".replace(" ", "-").replace(",", "")
    report = limbeck.run(values, out)
    row = {
        "world": world.name,
        "arm": arm,
        "seed": seed,
        **measured(world, out / "student", held_out),
        "tokens_per_second": report.train.tokens_per_second,
        "bytes_per_token": None if path is None else made[path].bytes / made[path].rows,
        "fill_seconds": None if path is None else made[path].seconds,
        "load": load(),
    }
    print(json.dumps(row), flush=True)
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """Means over the seeds and [lowest, highest]; speed beside that of plain fine-tuning."""
    lines: list[str] = []
    for world in dict.fromkeys(row["world"] for row in rows):
        lines += [
            f"\n**{world}**\n",
            "| teacher | KL, nats/token | same top token | accuracy | bytes/token | tokens/s |"
            " of plain |",
            "|---|---:|---:|---:|---:|---:|---:|",
        ]
        mine = [row for row in rows if row["world"] == world]
        plain = mean(r["tokens_per_second"] for r in mine if r["arm"] == "plain fine-tuning")
        for arm in dict.fromkeys(row["arm"] for row in mine):
            of = [row for row in mine if row["arm"] == arm]
            speed = mean(row["tokens_per_second"] for row in of)
            size = of[0]["bytes_per_token"]
            cells = [
                arm,
                spread([row["kl_nats"] for row in of], "{:.4f}"),
                spread([row["top1"] for row in of], "{:.1%}"),
                spread([row["accuracy"] for row in of], "{:.1%}"),
                "–" if size is None else f"{size:.1f}",
                f"{speed:,.0f}",
                f"{speed / plain:.0%}",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def spread(values: list[float | None], form: str) -> str:
    """Mean and range."""
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    shown = form.format(mean(known))
    if len(known) == 1:
        return shown
    return f"{shown} [{form.format(min(known))}, {form.format(max(known))}]"


def main() -> None:
    """Run all arms of all seeds, write raw figures, print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a few steps; writes nothing")
    parser.add_argument("--world", choices=("demo", "stories"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    began = time.perf_counter()
    rows: list[dict[str, Any]] = []
    steps: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        worlds = [demo(Path(name)), stories()]
        for world in worlds:
            if world is None or arguments.world not in (None, world.name):
                continue
            if arguments.quick:
                world.train["steps"] = 3
            steps[world.name] = world.train
            folder, made = Path(name) / world.name, {}
            held_out = list(Dataset(path=str(world.held_out), holdout=0).open(0).training)
            for seed in range(1 if arguments.quick else arguments.seeds):
                # Seed by seed, so that a busy minute of the machine does not fall on one arm.
                rows += [run_arm(world, arm, seed, folder, held_out, made) for arm in ARMS]
    print(table(rows))
    seconds = time.perf_counter() - began
    print(f"\nIt took {seconds / 60:.1f} minutes.")
    if not arguments.quick:
        found = {"environment": environment(), "train": steps, "seconds": seconds, "rows": rows}
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
