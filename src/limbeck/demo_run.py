"""`limbeck demo`: the whole path on the embedded domain, over several seeds, in a few minutes.

Each seed is an ordinary `limbeck run` of an ordinary recipe in a process of its own; this module
writes the data and the recipe, watches the metrics files, and puts the reports together.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import mean
from typing import Any

import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from limbeck.core.errors import Interrupted, LimbeckError, RecipeError
from limbeck.core.files import write_json, write_text
from limbeck.demo import model_path, problems, write_jsonl

TRAIN_ROWS = 20_000
TEST_ROWS = 300
UNSEEN_ROWS = 150
STEPS = 200
ARMS = ("teacher", "before", "control", "after")
TITLES = {
    "teacher": "teacher",
    "before": "student before",
    "control": "labels only",
    "after": "distilled",
}
TASKS = {
    "problems": "unseen problems",
    "phrasings": "unseen phrasings",
    "chains": "6 or 7 steps (training has 1 to 5)",
}


def run_demo(out: Path, seeds: int) -> str:
    """Distil the shipped teacher into the shipped student; returns the page that is printed.

    The first seed's run lies in `out`, the others beside it in `OUT-seed-N`, and the summary of all
    in `out/demo.md` and `out/demo.json`. A run that was interrupted goes on; a finished one is
    only shown again.

    Raises:
        RecipeError: `out` holds something else.
        LimbeckError: a run failed.
        Interrupted: by Ctrl-C.
    """
    data = out / ".data"
    if out.exists() and not out.is_dir():
        raise RecipeError("--out", f"{out} is a file, not a folder")
    if out.exists() and not data.exists() and any(out.iterdir()):
        raise RecipeError("--out", f"{out} is not empty and holds no demo; give another folder")
    named = out if out.name not in ("", "..") else out.resolve()  # `.` has no name of its own
    folders = [out, *(named.with_name(f"{named.name}-seed-{seed}") for seed in range(1, seeds))]
    data.mkdir(parents=True, exist_ok=True)
    write_jsonl(data / "train.jsonl", problems(0, "train", TRAIN_ROWS))
    write_jsonl(data / "problems.jsonl", problems(0, "test", TEST_ROWS))
    for split in ("phrasings", "chains"):
        write_jsonl(data / f"{split}.jsonl", problems(0, split, UNSEEN_ROWS))
    write_text(data / "recipe.yaml", yaml.safe_dump(recipe(data), sort_keys=False))
    began = time.perf_counter()
    _run_all(data / "recipe.yaml", folders)
    reports = [json.loads((folder / "report.json").read_text()) for folder in folders]
    summary = summarize(reports)
    write_json(out / "demo.json", summary)
    text = page(summary, seeds, time.perf_counter() - began)
    write_text(out / "demo.md", text)
    return text


def recipe(data: Path) -> Mapping[str, Any]:
    """The demo's recipe: nothing in it is special to the demo."""
    tasks = [
        {
            "kind": "task",
            "name": name,
            "path": str(data / f"{name}.jsonl"),
            "match": "last_number",
            "max_tokens": 120,
        }
        for name in TASKS
    ]
    return {
        "student": {"name": str(model_path("student")), "max_length": 256},
        "teachers": {"expert": {"name": str(model_path("teacher"))}},
        "source": {"path": str(data / "train.jsonl"), "holdout": 100},
        "terms": [{"objective": {"kind": "forward_kl"}}],
        "train": {
            "steps": STEPS,
            "batch_tokens": 4096,
            "learning_rate": 3.0e-3,
            "schedule": "wsd",
            "save_every": 50,
        },
        "evals": ["agreement", *tasks],
        "compare": "labels",
    }


def summarize(reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Each figure's values over the seeds, by arm; arms that do not depend on a seed have one."""
    figures: dict[str, dict[str, list[float]]] = {}
    for report in reports:
        for name, by_arm in report["evals"].items():
            for arm in ARMS:
                if by_arm[arm] is not None:
                    figures.setdefault(name, {}).setdefault(arm, []).append(by_arm[arm])
        for name in ("kl_nats", "top1"):
            for arm in ("before", "control", "after"):
                value = (report["agreement"][arm] or {}).get(name)
                if value is not None:
                    figures.setdefault(name, {}).setdefault(arm, []).append(value)
    return {
        "figures": figures,
        "parameters": {who: reports[0][who]["parameters"] for who in ("teacher", "student")},
        "tokens_per_second": {
            who: [report["speed"][f"{who}_tokens_per_second"] for report in reports]
            for who in ("teacher", "student")
        },
        "n": {name: figure["n"] for name, figure in reports[0]["evals"].items()},
        "intervals": {
            name: figure["intervals"].get("teacher") for name, figure in reports[0]["evals"].items()
        },
    }


def page(summary: Mapping[str, Any], seeds: int, seconds: float) -> str:
    """The summary as a page: every arm side by side, mean and range over the seeds."""
    teacher, student = summary["parameters"]["teacher"], summary["parameters"]["student"]
    figures = summary["figures"]
    lines = [
        f"# Distilled: {teacher:,} parameters into {student:,}, "
        f"{teacher / student:.1f} times fewer",
        "",
        "Grade-school word problems. Each arm trains the same student on the same "
        f"{STEPS} steps; means and [lowest, highest] of {seeds} seeds.",
        "",
        "| | " + " | ".join(TITLES[arm] for arm in ARMS) + " | kept |",
        "| --- " + "| ---: " * 5 + "|",
    ]
    for name, title in TASKS.items():
        row = figures[name]
        cells = [_cell(row.get(arm), "share") for arm in ARMS]
        # A share of what the teacher cannot do better than the untouched student means nothing.
        able = summary["intervals"][name][0] > mean(row["before"])
        share = f"{mean(row['after']) / mean(row['teacher']):.0%}" if able else "–"
        lines.append(f"| {title} (n = {summary['n'][name]}) | {' | '.join(cells)} | {share} |")
    for name, title in (("top1", "same next token as the teacher"), ("kl_nats", "KL, nats/token")):
        cells = [_cell(figures[name].get(arm), "share" if name == "top1" else "") for arm in ARMS]
        lines.append(f"| {title} | {' | '.join(cells)} | |")
    lines += ["", *verdict(figures), "", f"It took {seconds / 60:.1f} minutes."]
    return "\n".join(lines) + "\n"


def verdict(figures: Mapping[str, Mapping[str, Sequence[float]]]) -> list[str]:
    """Whether the teacher helped. Seeds are pairs: both arms share student, data and order."""
    said: list[str] = []
    for name, title, higher in (
        ("problems", "Unseen problems", True),
        ("kl_nats", "KL from the teacher", False),
    ):
        pairs = list(zip(figures[name]["after"], figures[name]["control"], strict=True))
        wins = sum((after > control) == higher and after != control for after, control in pairs)
        said.append(
            f"{title}: distillation beats the labels alone in {wins} of {len(pairs)} seeds."
        )
    return said


def _cell(values: Sequence[float] | None, unit: str) -> str:
    if not values:
        return "–"

    def one(value: float) -> str:
        return f"{value:.1%}" if unit == "share" else f"{value:.3f}"

    low, high = min(values), max(values)
    return one(mean(values)) + (f" [{one(low)}, {one(high)}]" if low != high else "")


def _run_all(recipe: Path, folders: Sequence[Path]) -> None:
    """One run for each folder, until all are done; if one fails, the others are stopped."""
    children = [_start(recipe, folder, seed) for seed, folder in enumerate(folders)]
    try:
        with _stopped_as_by_ctrl_c():
            _watch(children, folders)
        fallen = [child for child in children if child.poll()]
    except KeyboardInterrupt:
        raise Interrupted("the demo was stopped; the same command goes on") from None
    finally:
        for child in children:
            if child.poll() is None:
                child.terminate()  # it writes a checkpoint, from which the next demo goes on
        for child in children:
            child.wait()
    for child, folder in zip(children, folders, strict=True):
        if child in fallen:
            raise LimbeckError(f"the demo's run in {folder} {_fate(child.returncode, folder)}")


def _fate(code: int, folder: Path) -> str:
    """How a run ended that should not have."""
    if code < 0:
        return f"was ended by a signal ({signal.strsignal(-code)}); the same command goes on"
    said = (folder / ".log").read_text().strip().splitlines() or ["no message"]
    return f"failed: {said[-1]}"


@contextmanager
def _stopped_as_by_ctrl_c() -> Iterator[None]:
    """The runs have a session of their own, so all that stops the demo has to stop them."""
    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, signal.default_int_handler) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _start(recipe: Path, folder: Path, seed: int) -> subprocess.Popen[bytes]:
    """A run of its own: one thread each, since models this small gain nothing from more.

    In a session of its own, too: a terminal's Ctrl-C would reach it besides the demo's signal, and
    the second one ends a run at once.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shown = [sys.executable, "-m", "limbeck", "run", str(recipe), "--out", str(folder)]
    shown += [f"seed={seed}"]
    if (folder / "recipe.yaml").exists():
        shown += ["--resume"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with (folder / ".log").open("wb") as log:
        return subprocess.Popen(
            shown, stdout=log, stderr=log, env=environment, start_new_session=True
        )


def _watch(children: Sequence[subprocess.Popen[bytes]], folders: Sequence[Path]) -> None:
    """Show how far each run is, from its metrics files."""
    console = Console(stderr=True)
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    said: tuple[str, ...] = ()
    with progress:
        tasks = [
            progress.add_task(f"seed {seed}", total=2 * STEPS, note="starting")
            for seed in range(len(folders))
        ]
        while any(child.poll() is None for child in children):
            steps, notes = zip(*map(_progress, folders), strict=True)
            for task, done, note in zip(tasks, steps, notes, strict=True):
                progress.update(task, completed=done, note=note)
            line = f"demo: {sum(steps) * 100 // (2 * STEPS * len(folders)):3d}%  " + ", ".join(
                f"seed {seed} {note}" for seed, note in enumerate(notes)
            )
            if not console.is_terminal and notes != said:
                print(line, file=sys.stderr, flush=True)
                said = notes
            if any(child.poll() for child in children):
                return  # one failed: no need to wait for the others
            time.sleep(1)


def _progress(folder: Path) -> tuple[int, str]:
    """Steps done in both arms, and what the run is doing."""
    if (folder / "report.json").exists():
        return 2 * STEPS, "done"
    counts: list[int] = []
    for arm in (folder, folder / "control"):
        path = arm / "metrics.jsonl"
        counts.append(path.read_bytes().count(b"\n") if path.exists() else 0)
    if not counts[0]:
        note = "measuring teacher and student"
    elif counts[0] < STEPS:
        note = "distilling"
    elif not counts[1]:
        note = "measuring the student"
    else:
        note = "labels only"
    return sum(counts), note
