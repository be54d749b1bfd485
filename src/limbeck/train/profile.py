"""Where the time of a step goes: a trace to look at, and a table of phases and operators.

The loop names its phases; see `phases.py`.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from limbeck.core.files import new_folder
from limbeck.train.loop import Step

STEP = "limbeck.step"
"""The range of a whole step. What listeners do between steps is in the trace, not in the table."""

PHASES = {
    "limbeck.prepare": "waiting for data",
    "limbeck.teacher": "teacher",
    "limbeck.student": "student forward",
    "limbeck.loss": "head and loss",
    "limbeck.backward": "backward",
    "limbeck.update": "optimizer",
}
"""Ranges inside of a step, and what the table calls them."""

SKIPPED_STEPS, WARMUP_STEPS, TRACED_STEPS = 1, 1, 3
"""Before the profiler, while it finds its pace, and those that are written down."""

OPERATORS = 20
"""Lines of the table's second part."""


class Profile:
    """Traces a few early steps and writes `trace.json` and `table.md`.

    Of a short run it traces what there is from the second step on.

    Args:
        folder: where both go; what an earlier run left there is replaced.
        steps: how many will be run.
    """

    def __init__(self, folder: Path, steps: int) -> None:
        self.folder = folder
        skipped = SKIPPED_STEPS if steps >= SKIPPED_STEPS + WARMUP_STEPS + TRACED_STEPS else 0
        traced = max(1, min(TRACED_STEPS, steps - skipped - WARMUP_STEPS))
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self.profiler = profile(
            activities=activities,
            schedule=schedule(wait=skipped, warmup=WARMUP_STEPS, active=traced, repeat=1),
            on_trace_ready=self._write,
            acc_events=True,
        )

    def on_step(self, step: Step) -> None:
        """Count the step; the last one that is traced writes the files."""
        self.profiler.step()

    def _write(self, profiler: Any) -> None:
        events: Sequence[Any] = profiler.events()
        if not any(event.name == STEP for event in events):
            return  # interrupted before the first was over
        with new_folder(self.folder) as aside:
            profiler.export_chrome_trace(str(aside / "raw"))
            with (aside / "raw").open() as raw, (aside / "trace.json").open("w") as trace:
                trace.writelines(map(_nameless, raw))
            (aside / "raw").unlink()
            (aside / "table.md").write_text(time_table(events))

    def __enter__(self) -> Self:
        self.profiler.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.profiler.stop()


def _nameless(line: str) -> str:
    """A line of the trace without the machine's name and the file's own path."""
    for key in ("host_name", "traceName"):
        if f'"{key}":' in line:
            return line[: line.index(f'"{key}"')] + f'"{key}": ""' + line.rpartition('"')[2]
    return line


def time_table(events: Sequence[Any]) -> str:
    """A page in Markdown: milliseconds a step, and shares, by phase and by operator.

    Args:
        events: the profiler's; at least one is a `STEP`.
    """
    # A GPU's time line has ranges of the same names, for what its kernels took.
    steps = [e for e in events if e.name == STEP and e.device_type.name == "CPU"]
    spans = [step.time_range for step in steps]
    seconds = sum(span.elapsed_us() for span in spans) / 1e6
    inside = [event for event in events if any(_within(event.time_range, span) for span in spans)]
    own, on_device, calls = (defaultdict[str, float](float) for _ in range(3))
    for event in inside:
        ours = event.name.startswith(("limbeck.", "ProfilerStep"))
        if not ours and event.device_type.name == "CPU":  # a kernel's time is its operator's
            own[f"`{event.name}`"] += event.self_cpu_time_total / 1e6
            on_device[f"`{event.name}`"] += event.self_device_time_total / 1e6
            calls[f"`{event.name}`"] += 1
    rows = _phases([event for event in inside if event.thread == steps[0].thread])
    rows["rest"] = max(0.0, seconds - sum(rows.values()))
    device = sum(on_device.values()) > 0
    operators = on_device if device else own
    top = dict(sorted(operators.items(), key=lambda item: -item[1])[:OPERATORS])
    count = len(steps)
    return (
        f"# Where the time goes\n\n{count} steps, {1e3 * seconds / count:,.1f} ms each, with the"
        " profiler's own cost in them. `trace.json` opens in Perfetto or chrome://tracing.\n\n"
        f"## Phases\n\nTime of the host{_WAITING if device else ''}.\n\n"
        + _rows("phase", rows, seconds, count)
        + f"\n## Operators\n\nThe {len(top)} that take most; time inside them alone, on the"
        f" {'device' if device else 'host'}.\n\n"
        + _rows("operator", top, sum(operators.values()), count, calls)
    )


def _phases(events: Sequence[Any]) -> dict[str, float]:
    """Seconds in each phase, without what another phase inside of it takes."""
    found = [e for e in events if e.name in PHASES and e.device_type.name == "CPU"]
    seconds = {event.name: 0.0 for event in found}
    for event in found:
        elapsed = event.time_range.elapsed_us() / 1e6
        seconds[event.name] += elapsed
        around = [e for e in found if e is not event and _within(event.time_range, e.time_range)]
        if around:
            seconds[max(around, key=lambda e: e.time_range.start).name] -= elapsed
    return {title: seconds[name] for name, title in PHASES.items() if name in seconds}


def _within(inner: Any, outer: Any) -> bool:
    return bool(outer.start <= inner.start and inner.end <= outer.end)


_WAITING = ", which waits for the device where it reads a result, and runs ahead of it elsewhere"


def _rows(
    title: str,
    seconds: Mapping[str, float],
    whole: float,
    steps: int,
    calls: Mapping[str, float] | None = None,
) -> str:
    head = [title, "ms a step", "share"] + (["calls a step"] if calls else [])
    lines = [head, ["---"] + ["---:"] * (len(head) - 1)]
    for name, value in seconds.items():
        share = value / whole if whole else 0.0
        cells = [name, f"{1e3 * value / steps:,.3f}", f"{share:.1%}"]
        lines.append(cells + ([f"{calls[name] / steps:,.1f}"] if calls else []))
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)
