"""How fast and how many at a time: an account's limits a minute, and what the server bears."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

MINUTE_SECONDS = 60.0


class Pace:
    """Lets requests start when limits allow, in the order in which they came.

    In no 60 seconds do more than `requests_per_minute` requests start, nor requests of more than
    `tokens_per_minute` tokens together; one request of more tokens than that starts alone. The
    window of requests at the same time starts at `in_flight`. It is halved when the server says
    that it is too much, and grows by one for each window of successes (additive increase,
    multiplicative decrease). It is used from one event loop.

    Args:
        requests_per_minute, tokens_per_minute: the account's limits; None where there is none.
        in_flight: most requests at the same time.
        clock: of the time; tests have their own.
    """

    def __init__(
        self,
        requests_per_minute: int | None,
        tokens_per_minute: int | None,
        in_flight: int,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if in_flight < 1:
            raise ValueError(f"in_flight is {in_flight}; at least one request must be allowed")
        self._limits = [
            Minute(limit) if limit is not None else None
            for limit in (requests_per_minute, tokens_per_minute)
        ]
        self._most, self._window, self._active = in_flight, in_flight, 0
        self._clock = clock
        self._line = deque[tuple[int, asyncio.Future[None]]]()  # so a large request cannot starve
        self._timer: asyncio.TimerHandle | None = None
        self._paused_until = -float("inf")
        self._successes, self._echoes = 0, 0

    @property
    def current(self) -> int:
        """Requests that may be under way at the same time now."""
        return self._window

    @property
    def active(self) -> int:
        """Requests under way."""
        return self._active

    @asynccontextmanager
    async def slot(self, tokens: int = 0) -> AsyncIterator[None]:
        """Wait until a request of so many tokens may start; it is under way inside the block.

        Args:
            tokens: of the prompt and the longest answer, which is how providers count.
        """
        turn = asyncio.get_running_loop().create_future()
        self._line.append((tokens, turn))
        self._admit()
        try:
            await turn
            yield
        finally:
            if not turn.cancelled():  # it had been let in
                self._active -= 1
                self._echoes = max(0, self._echoes - 1)
            self._admit()

    def too_much(self, retry_after_seconds: float | None) -> None:
        """The server refused (429, 503): halve the window, and let nothing start for a while.

        To be called inside the slot. A server refuses many of those in flight at once. That is one
        event, so those that were under way at a cut do not cut again.

        Args:
            retry_after_seconds: as the server said it; None where it did not.
        """
        pause = max(0.0, retry_after_seconds or 0.0)
        self._paused_until = max(self._paused_until, self._clock() + pause)
        self._successes = 0
        if self._echoes == 0:
            self._window = max(1, self._window // 2)
            self._echoes = self._active

    def fine(self) -> None:
        """A request succeeded."""
        self._successes += 1
        if self._successes >= self._window:
            self._successes = 0
            self._window = min(self._most, self._window + 1)
            self._admit()

    def _admit(self) -> None:
        """Let in all at the head of the line that may start now; for the next one set a clock."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._line and self._active < self._window:
            tokens, turn = self._line[0]
            if turn.cancelled():
                self._line.popleft()
                continue
            now, start = self._clock(), self._paused_until
            limits = [
                (limit, size)
                for limit, size in zip(self._limits, (1, tokens), strict=True)
                if limit is not None
            ]
            for limit, size in limits:
                start = max(start, limit.free_at(now, size))
            if start > now:
                self._timer = turn.get_loop().call_later(start - now, self._admit)
                return
            for limit, size in limits:
                limit.take(now, size)
            self._line.popleft()
            self._active += 1
            turn.set_result(None)


class Minute:
    """A limit on what starts within any 60 seconds: what started in the last 60, and when.

    Args:
        limit: the most within 60 seconds.

    Example:
        >>> calls = Minute(2)
        >>> for now in (0.0, 10.0):
        ...     calls.take(now, 1)
        >>> calls.free_at(10.0, 1)
        60.0
    """

    def __init__(self, limit: int) -> None:
        if limit < 1:
            raise ValueError(f"a limit of {limit} a minute lets nothing start")
        self.limit, self._taken, self._sum = limit, deque[tuple[float, int]](), 0

    def free_at(self, now: float, size: int) -> float:
        """When something of this size may start; not after `now` where it may at once."""
        self._forget(now)
        left, start = self._sum + min(size, self.limit) - self.limit, now
        for began, taken in self._taken:
            if left <= 0:
                break
            left -= taken
            start = began + MINUTE_SECONDS
        return start

    def take(self, now: float, size: int) -> None:
        """Something of this size starts; more than the limit counts as all of it."""
        self._forget(now)
        size = min(size, self.limit)
        self._taken.append((now, size))
        self._sum += size

    def _forget(self, now: float) -> None:
        while self._taken and self._taken[0][0] + MINUTE_SECONDS <= now:
            self._sum -= self._taken.popleft()[1]
