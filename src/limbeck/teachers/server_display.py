"""What is shown while a server is asked: answers, money, rate, time left."""

import sys
import time
from collections import Counter
from collections.abc import Sequence

from rich.console import Console

from limbeck.core.exchange import Reply
from limbeck.core.progress import progress_bar
from limbeck.core.specs import ServerTeacher
from limbeck.ledger.money import dollars
from limbeck.ledger.pace import Pace
from limbeck.ledger.store import Totals

LINE_SECONDS = 10.0
"""Between two lines where there is no terminal."""


class ServerDisplay:
    """A bar on a terminal, a line now and then elsewhere; both on stderr."""

    def __init__(self, spec: ServerTeacher, *, enabled: bool) -> None:
        self.spec, self.enabled = spec, enabled
        self.console = Console(stderr=True)
        self.bar = progress_bar(self.console)
        self.task = None
        self.done = self.before = self.total = self.tokens = 0
        self.troubles: Counter[str] = Counter()
        self.began = self.told = time.monotonic()

    def asked(self, count: int) -> None:
        """So many more answers are wanted."""
        self.total += count

    def known(self, count: int) -> None:
        """So many of them were known."""
        self.before += count

    def failed(self, reason: str) -> None:
        """A request has to be tried again."""
        self.troubles[" ".join(reason.split()[:3]).rstrip(":")] += 1

    def answered(self, replies: Sequence[Reply], pace: Pace, totals: Totals) -> None:
        """A question is done."""
        self.done += len(replies)
        self.tokens += sum(reply.completion_tokens or 0 for reply in replies)
        if not self.enabled:
            return
        if self.console.is_terminal:
            if self.task is None:
                self.bar.start()
                self.task = self.bar.add_task(self.spec.model, total=None, note="")
            note = self.note(pace, totals)
            self.bar.update(self.task, completed=self.done, total=self.total, note=note)
        elif time.monotonic() - self.told > LINE_SECONDS:
            self.told = time.monotonic()
            line = f"{self.spec.model}: {self.done:,} answers  {self.note(pace, totals)}"
            print(line, file=sys.stderr, flush=True)

    def note(self, pace: Pace, totals: Totals) -> str:
        """Money, rate, how many are under way, what goes wrong."""
        seconds = max(time.monotonic() - self.began, 1e-9)
        spent = "price unknown" if self.spec.price.output is None else dollars(totals.spent_usd)
        if self.spec.budget_usd is not None:
            spent += f" of {dollars(self.spec.budget_usd)}"
        parts = [spent, f"{(self.done - self.before) / seconds:.1f} answers/s"]
        parts += [f"{self.tokens / seconds:,.0f} tokens/s", f"{pace.current} at a time"]
        if self.before:
            parts.append(f"{self.before:,} known")
        if self.troubles:
            reason, count = self.troubles.most_common(1)[0]
            parts.append(f"{sum(self.troubles.values()):,} tried again ({reason}: {count:,})")
        return "  ".join(parts)

    def close(self) -> None:
        """Leave the last state on the screen."""
        if self.task is not None:
            self.bar.stop()
