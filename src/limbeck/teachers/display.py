"""How far the filling of a cache is: a bar with rate and time left, or plain lines when piped."""

import sys
import time
from typing import Self

from rich.console import Console

from limbeck.core.progress import progress_bar
from limbeck.teachers.fill import Done

LINE_SECONDS = 10.0
"""Between two lines of a piped command; the last one always comes."""


class FillDisplay:
    """Shows samples, tokens a second and the time left.

    Args:
        title: what is being filled.
        samples: how many are still to be read.
    """

    def __init__(self, title: str, samples: int) -> None:
        self.title, self.samples = title, samples
        console = Console(stderr=True)
        self.live = console.is_terminal
        self.began = time.perf_counter()
        self.said = self.began
        self.progress = progress_bar(console)
        self.task = self.progress.add_task(title, total=samples, note="")

    def told(self, done: Done) -> None:
        """Show how much is done."""
        now = time.perf_counter()
        seconds = max(now - self.began, 1e-9)
        note = f"{done.rows / seconds:,.0f} tokens/s"
        if done.dropped:
            note += f"  {done.dropped:,} dropped"
        self.progress.update(self.task, completed=done.samples, note=note)
        due = now - self.said >= LINE_SECONDS or done.samples == self.samples
        if not self.live and due:
            self.said = now
            left = (self.samples - done.samples) * seconds / done.samples
            line = f"{self.title}: {done.samples:,}/{self.samples:,} samples  {note}"
            print(f"{line}  {max(left, 0):.0f} s left", file=sys.stderr, flush=True)

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()
