"""Pace in virtual time: a loop whose clock jumps to the next thing that happens."""

import asyncio
import selectors

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.ledger.pace import Minute, Pace


class Jumping(selectors.SelectSelector):
    """Waits by moving the clock; waiting for nothing is an error, and not a test that hangs."""

    now = 0.0

    def select(self, timeout=None):
        if timeout is None:
            raise RuntimeError("everything waits and nothing will happen")
        self.now += max(0.0, timeout)
        return super().select(0)


def in_virtual_time(main):
    """Runs `main(clock)`; gives what it returns."""
    selector = Jumping()
    loop = asyncio.SelectorEventLoop(selector)
    loop.time = lambda: selector.now
    loop._clock_resolution = 1e-9
    try:
        return loop.run_until_complete(main(loop.time))
    finally:
        loop.close()


async def start_all(pace, clock, jobs):
    """Runs jobs (tokens, seconds) at once; gives (start, tokens) in the order of their starts, and
    the most that were under way."""
    starts, most = [], 0

    async def one(number, tokens, seconds):
        nonlocal most
        async with pace.slot(tokens):
            most = max(most, pace.active)
            starts.append((number, clock(), tokens))
            await asyncio.sleep(seconds)

    await asyncio.gather(*(one(number, *job) for number, job in enumerate(jobs)))
    assert [number for number, _, _ in starts] == list(range(len(jobs)))
    return [(start, tokens) for _, start, tokens in starts], most


LIMITS = st.none() | st.integers(1, 12)
JOBS = st.lists(st.tuples(st.integers(0, 15), st.sampled_from([0.0, 0.5, 7.0, 61.0])), max_size=25)


@settings(max_examples=150)
@given(LIMITS, LIMITS, st.integers(1, 6), JOBS)
def test_no_minute_has_more_than_its_limits(requests, tokens, in_flight, jobs):
    async def main(clock):
        pace = Pace(requests, tokens, in_flight, clock=clock)
        return await start_all(pace, clock, jobs)

    starts, most = in_virtual_time(main)
    assert len(starts) == len(jobs)
    assert most <= in_flight
    for first, _ in starts:
        # A hair inside the minute: starts exactly 60 s apart are in two minutes.
        window = [size for start, size in starts if first <= start < first + 60 - 1e-6]
        assert requests is None or len(window) <= requests
        assert tokens is None or sum(min(size, tokens) for size in window) <= tokens


def test_what_the_limits_allow_starts_at_once():
    async def main(clock):
        return await start_all(Pace(3, None, 100, clock=clock), clock, [(0, 0.0)] * 8)

    starts, _ = in_virtual_time(main)
    assert [start for start, _ in starts] == pytest.approx([0, 0, 0, 60, 60, 60, 120, 120])


def test_tokens_are_counted():
    async def main(clock):
        jobs = [(60, 0.0), (30, 0.0), (20, 0.0), (500, 0.0), (1, 0.0)]
        return await start_all(Pace(None, 100, 100, clock=clock), clock, jobs)

    starts, _ = in_virtual_time(main)
    assert [start for start, _ in starts] == pytest.approx([0, 0, 60, 120, 180])


def test_a_burst_of_refusals_is_one_cut():
    async def main(clock):
        pace = Pace(None, None, 64, clock=clock)

        async def refused():
            async with pace.slot():
                await asyncio.sleep(1)
                pace.too_much(None)

        await asyncio.gather(*(refused() for _ in range(64)))
        first = pace.current
        await asyncio.gather(*(refused() for _ in range(32)))
        return first, pace.current

    assert in_virtual_time(main) == (32, 16)


def test_the_window_never_closes_and_grows_by_one_for_each_window_of_successes():
    async def main(clock):
        pace = Pace(None, None, 5, clock=clock)
        for _ in range(9):
            pace.too_much(None)
        seen = [pace.current]
        for successes in (1, 2, 3, 4, 5, 5):
            for _ in range(successes):
                pace.fine()
            seen.append(pace.current)
        return seen

    assert in_virtual_time(main) == [1, 2, 3, 4, 5, 5, 5]


def test_retry_after_holds_everybody_and_the_longest_counts():
    async def main(clock):
        pace = Pace(None, None, 8, clock=clock)
        async with pace.slot():
            pace.too_much(30.0)
            pace.too_much(10.0)
            pace.too_much(float("nan"))
            pace.too_much(-5.0)
        return await start_all(pace, clock, [(0, 1.0)] * 6)

    starts, most = in_virtual_time(main)
    assert [start for start, _ in starts] == pytest.approx([30, 30, 30, 30, 31, 31])
    assert most == 4


def test_a_pause_that_comes_while_one_waits_holds_it():
    async def main(clock):
        pace = Pace(1, None, 8, clock=clock)

        async def later():
            await asyncio.sleep(50)
            pace.too_much(30.0)

        refusal = asyncio.create_task(later())
        starts, _ = await start_all(pace, clock, [(0, 0.0)] * 2)
        await refusal
        return starts

    starts = in_virtual_time(main)
    assert [start for start, _ in starts] == pytest.approx([0, 80])


def test_errors_and_cancelled_waiters_leave_nothing_behind():
    async def main(clock):
        pace = Pace(None, None, 1, clock=clock)

        async def wait():
            async with pace.slot():
                pass

        async def fault():
            async with pace.slot():
                waiters.extend(asyncio.create_task(wait()) for _ in range(3))
                await asyncio.sleep(1)
                waiters[0].cancel()
                raise KeyError

        waiters = []
        with pytest.raises(KeyError):
            await fault()
        done = await asyncio.gather(*waiters, return_exceptions=True)
        return [type(result) for result in done], pace.active

    kinds, active = in_virtual_time(main)
    assert kinds == [asyncio.CancelledError, type(None), type(None)]
    assert active == 0


def test_limits_that_let_nothing_start_are_refused():
    with pytest.raises(ValueError, match="in_flight"):
        Pace(None, None, 0)
    with pytest.raises(ValueError, match="lets nothing start"):
        Pace(0, None, 1)


def test_a_minute_remembers_one_minute_only():
    minute = Minute(5)
    for now in range(1000):
        start = minute.free_at(now, 1)
        minute.take(max(now, start), 1)
    assert len(minute._taken) <= 5
