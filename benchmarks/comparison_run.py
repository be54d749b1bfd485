"""One run of a comparison: train, then measure; `comparison.py` starts it with a job's file.

    python benchmarks/comparison_run.py runs/.../job.json

It is an ordinary `limbeck.run` of an ordinary recipe, pinned to one core, with one thread.
"""

import json
import os
import sys
import time
from pathlib import Path
from statistics import mean, median
from typing import Any

import yaml

FIRST_STEPS = 3
"""Steps whose time does not count: PyTorch finds its memory in them."""


def run_job(path: Path) -> None:
    """Train and measure; the figures are written beside the job."""
    job = json.loads(path.read_text())
    os.sched_setaffinity(0, {job["core"]})
    import torch

    import limbeck

    torch.set_num_threads(1)
    material = job["material"]
    found: dict[str, Any] = {}
    if job["measured"] is None:
        recipe = path.with_name("recipe.yaml")
        recipe.write_text(yaml.safe_dump(job["recipe"], sort_keys=False))
        wall, processor = time.perf_counter(), time.process_time()
        steps = watch_steps()
        report = limbeck.run(recipe, path.with_name("run"))
        found["processor_share"] = (time.process_time() - processor) / (time.perf_counter() - wall)
        found["peak_bytes"] = peak_bytes()
        found["train_seconds"] = report.train.seconds
        found["step_processor_seconds"] = median(steps[FIRST_STEPS:] or steps)
        found |= curves(path.with_name("run") / "metrics.jsonl")
    found |= measure(path.with_name("run") / "student", material, job["measured"])
    path.with_name("found.json").write_text(json.dumps(found))


def watch_steps() -> list[float]:
    """Will hold the processor time of each step, whatever else the machine is doing meanwhile."""
    from limbeck.train.loop import Trainer

    times: list[float] = []
    step = Trainer.step

    def timed(self: Any) -> Any:
        began = time.process_time()
        metrics = step(self)
        times.append(time.process_time() - began)
        return metrics

    Trainer.step = timed
    return times


def peak_bytes() -> int:
    """The most memory that this process ever held.

    Not `getrusage`: a process inherits its figure from the one that started it.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise LookupError("VmHWM")


def curves(metrics: Path) -> dict[str, Any]:
    """The median step, and what each term's loss was in the first and the last tenth of steps."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    written = [line["rollouts/tokens"] for line in lines if "rollouts/tokens" in line]
    total = [line["seconds"] for line in lines]
    steps = [b - a for a, b in zip(total, total[1:], strict=False)]
    tenth = max(1, len(lines) // 10)
    losses = {
        name: [_mean([line[name] for line in part]) for part in (lines[:tenth], lines[-tenth:])]
        for name in lines[-1]
        if name.startswith(("loss/", "scaled/"))
    }
    return {
        "steps": len(lines),
        "step_seconds": median(steps[FIRST_STEPS:] or steps),
        "skipped_steps": lines[-1]["skipped"],
        "losses": losses,
        **({"written_tokens": written[-1]} if written else {}),
    }


def _mean(values: list[float | None]) -> float | None:
    """Of the steps in which the term had rows."""
    known = [value for value in values if value is not None]
    return mean(known) if known else None


def measure(trained: Path, material: dict[str, Any], which: str | None) -> dict[str, Any]:
    """A model beside the teacher, on text that nobody trained on."""
    import torch

    from limbeck.core.specs import LocalTeacher
    from limbeck.core.types import Sampling
    from limbeck.evals import Agreement, Perplexity, Task
    from limbeck.models.load import load_teacher
    from limbeck.sources import Dataset

    cpu = torch.device("cpu")
    began = time.perf_counter()
    names = {"teacher": material["teacher"], "student": material["student"], None: str(trained)}
    teacher, model = (
        load_teacher(LocalTeacher(name=name), cpu, material["max_length"])
        for name in (material["teacher"], names[which])
    )
    stream = Dataset(path=material["held_out"], holdout=0).open(0)
    held_out = list(stream.training)[: material["held_out_rows"]]
    scores = Perplexity().measure(model, None, held_out)
    if model.vocabulary == teacher.vocabulary:
        scores |= Agreement().measure(model, teacher, held_out)
    found: dict[str, Any] = {name: score.value for name, score in scores.items()}
    found["parameters"] = sum(p.numel() for p in model.module.parameters())
    files = {"right": material["task"], **material.get("others", {})}
    for name, path in files.items():
        if path is None:
            continue
        task = Task(name=name, path=path, match="last_number")
        problems = task.problems()
        prompts = [sample for sample, _ in problems]
        spoken = model.speak(prompts, Sampling(max_tokens=160))
        right = task.judge(spoken, [answer for _, answer in problems])
        found[name] = "".join("01"[one] for one in right)
        if name == "right" and len(files) > 1:
            found |= of_own_text(model, teacher, prompts, spoken)
    found["measure_seconds"] = time.perf_counter() - began
    return found


def of_own_text(model: Any, teacher: Any, prompts: Any, spoken: Any) -> dict[str, Any]:
    """Agreement on what the student itself writes, where its mistakes lead it, and its length."""
    from dataclasses import replace

    from limbeck.core.types import Turn
    from limbeck.evals import Agreement

    own = [
        replace(prompt, turns=(*prompt.prompt, Turn(text=text, learn=True)))
        for prompt, text in zip(prompts, spoken, strict=True)
    ]
    scores = Agreement().measure(model, teacher, own)
    lengths = [model.encode(sample).rows for sample in own]
    return {
        **{f"own_{name}": score.value for name, score in scores.items()},
        "answer_tokens": mean(lengths),
    }


if __name__ == "__main__":
    run_job(Path(sys.argv[1]))
