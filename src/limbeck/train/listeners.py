"""What is told of each step: the metrics file, the progress display, evaluations, interruption."""

import json
import math
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, Self

from rich.console import Console

from limbeck.core.errors import Interrupted
from limbeck.core.files import write_text
from limbeck.core.progress import progress_bar
from limbeck.train.loop import Step
from limbeck.train.mesh import Mesh


class Metrics:
    """Appends one JSON object a step to `metrics.jsonl`.

    Args:
        path: the file.
        done: steps that a resumed run keeps; later lines are of steps that will run again.
    """

    def __init__(self, path: Path, done: int) -> None:
        lines = path.read_text().splitlines() if path.exists() and done else []
        kept = [line for line in lines if (number := _step_of(line)) and number <= done]
        write_text(path, "".join(line + "\n" for line in kept))
        self.file = path.open("a", encoding="utf-8")

    def on_step(self, step: Step) -> None:
        """Write the step's figures; what is not finite becomes null."""
        figures = {k: v if math.isfinite(v) else None for k, v in step.metrics.items()}
        self.file.write(json.dumps({"step": step.number, **figures}) + "\n")
        self.file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


def _step_of(line: str) -> int | None:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None  # the line that a kill cut short


class Display:
    """A bar with step, loss, tokens per second and time left; plain lines when piped."""

    LINES = 20
    """Lines of a piped run."""

    def __init__(self, title: str, steps: int, done: int) -> None:
        self.title, self.steps = title, steps
        console = Console(stderr=True)
        self.live = console.is_terminal
        self.progress = progress_bar(console)
        self.task = self.progress.add_task(title, total=steps, completed=done, note="")

    def on_step(self, step: Step) -> None:
        """Show the step."""
        rate = step.metrics["tokens"] / max(step.metrics["seconds"], 1e-9)
        note = f"loss {step.metrics['loss']:.4f}  {rate:,.0f} tokens/s"
        if step.metrics["skipped"]:
            note += f"  {step.metrics['skipped']:.0f} skipped"
        self.progress.update(self.task, completed=step.number, note=note)
        every = max(1, self.steps // self.LINES)
        if not self.live and (step.number % every == 0 or step.number == step.last):
            left = (step.last - step.number) * step.metrics["seconds"] / step.number
            line = f"{self.title}: step {step.number}/{step.last}  {note}  {left:.0f} s left"
            print(line, file=sys.stderr, flush=True)

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()


class Evaluate:
    """Adds an evaluation's figures to the metrics every so many steps and at the last one."""

    def __init__(self, measure: Callable[[], dict[str, float]], every: int) -> None:
        self.measure, self.every = measure, every

    def on_step(self, step: Step) -> None:
        """Measure where it is due."""
        if step.number % self.every == 0 or step.number == step.last:
            step.metrics |= {f"eval/{name}": value for name, value in self.measure().items()}


class Interruption:
    """Turns Ctrl-C and SIGTERM into a checkpoint and a message; a second Ctrl-C stops at once.

    Args:
        mesh: all processes stop at the same step.
        save: writes the checkpoint.
        advice: how to go on.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, mesh: Mesh, save: Callable[[], Any], advice: str) -> None:
        self.mesh, self.save, self.advice = mesh, save, advice
        self.asked = False
        self.before: dict[int, Any] = {}

    def on_step(self, step: Step) -> None:
        """Stop here if that was asked for on any process."""
        if self.mesh.any(self.asked):
            self.save()
            raise Interrupted(
                f"stopped at step {step.number}, a checkpoint was written; {self.advice}"
            )

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __enter__(self) -> Self:
        try:
            self.before = {number: signal.signal(number, self._ask) for number in self.SIGNALS}
        except ValueError:
            self.before = {}  # not the main thread: signals are somebody else's business
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if self.asked and kind is None:  # too late for `on_step`
            raise Interrupted(f"stopped behind the last step, which is kept; {self.advice}")
