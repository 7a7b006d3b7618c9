"""Rates and places: what a limit promises holds for any arrivals, and the driver keeps it with many callers."""

import math
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from orchestrator.errors import ConcurrencyLimitExceededError, ConfigError, RateLimitExceededError
from orchestrator.rates import (
    CombinedLimiter,
    ConcurrencyLimiter,
    Limiter,
    Rate,
    SlidingWindow,
    Slots,
    TokenBucket,
)


@pytest.fixture
def anyio_backend() -> Any:
    """Trio with a clock that jumps to the next deadline as soon as every task waits: no real time passes."""
    return "trio", {"clock": MockClock(autojump_threshold=0)}


on_asyncio = pytest.mark.parametrize("anyio_backend", ["asyncio"])

rates = st.builds(Rate, st.integers(1, 8), st.floats(0.01, 100))
#: Seconds between one arrival and the next, or between other things that happen.
gaps = st.lists(st.one_of(st.just(0.0), st.floats(0, 30)), min_size=1, max_size=40)


def run(main: Callable[[], Awaitable[Any]]) -> Any:
    """Run it on trio's mock clock; for property tests, which need a clock for each example."""
    return trio.run(main, clock=MockClock(autojump_threshold=0))


def begin_times(gate: TokenBucket | SlidingWindow, gaps: list[float]) -> list[float]:
    now, times = 1000.0, []
    for gap in gaps:
        now += gap
        times.append(now + gate.reserve(now))
    return times


# --- Rate ---


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("10/60s", Rate(10, 60)),
        ("5/s", Rate(5, 1)),
        ("100/1h", Rate(100, 3600)),
        (" 3 / 1.5 m ", Rate(3, 90)),
        ("60/m", Rate(60, 60)),
    ],
)
def test_a_rate_is_read_from_text(text: str, rate: Rate) -> None:
    assert Rate.parse(text) == rate
    assert Rate.parse(str(rate)) == rate


@pytest.mark.parametrize(
    "text", ["", "10", "10/60", "0/s", "10/0s", "-1/s", "1.5/s", "10 per minute", "٣/s", "1/s\n2/s"]
)
def test_text_that_is_no_rate_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        Rate.parse(text)


def test_a_rate_without_a_unit_cannot_be_written() -> None:
    with pytest.raises(TypeError):
        Rate(10)  # type: ignore[call-arg]


@pytest.mark.parametrize(("count", "seconds"), [(0, 1), (-1, 1), (1, 0), (1, -1), (1, math.inf), (1, math.nan)])
def test_numbers_that_are_no_rate_are_refused(count: int, seconds: float) -> None:
    with pytest.raises(ConfigError):
        Rate(count, seconds)


@pytest.mark.parametrize(
    "make",
    [
        lambda: TokenBucket(Rate(1, 1), burst=0),
        lambda: Slots(0),
        lambda: ConcurrencyLimiter(0),
        lambda: CombinedLimiter(Rate(1, 1), 1, burst=2),
    ],
)
def test_limits_that_make_no_sense_are_refused(make: Callable[[], Any]) -> None:
    with pytest.raises(ConfigError):
        make()


# --- The pure gates ---


@given(rate=rates, gaps=gaps)
@settings(max_examples=200, deadline=None)
def test_no_window_ever_has_more_than_the_count(rate: Rate, gaps: list[float]) -> None:
    times = begin_times(SlidingWindow(rate), gaps)
    assert times == sorted(times)
    for first, one_too_many in zip(times, times[rate.count :], strict=False):
        assert one_too_many >= first + rate.per_seconds


@given(rate=rates, gaps=gaps)
@settings(max_examples=200, deadline=None)
def test_a_window_with_room_makes_nobody_wait(rate: Rate, gaps: list[float]) -> None:
    window, now, begun = SlidingWindow(rate), 1000.0, list[float]()
    for gap in gaps:
        now += gap
        room = sum(time + rate.per_seconds > now for time in begun) < rate.count
        assert window.ready(now) == room
        if room:
            window.take(now)
            begun.append(now)


@given(rate=rates, gaps=gaps, burst=st.integers(1, 6))
@settings(max_examples=200, deadline=None)
def test_a_bucket_lets_through_its_burst_and_its_rate_and_no_more(
    rate: Rate, gaps: list[float], burst: int
) -> None:
    interval = rate.per_seconds / rate.count
    times = begin_times(TokenBucket(rate, burst), gaps)
    assert times == sorted(times)
    for i, first in enumerate(times):
        for n, last in enumerate(times[i:], 1):
            assert n <= burst + (last - first) / interval + 1e-6


@given(rate=rates, burst=st.integers(1, 6), pause=st.floats(1, 100))
@settings(deadline=None)
def test_a_bucket_is_full_again_after_a_pause_and_not_fuller(rate: Rate, burst: int, pause: float) -> None:
    bucket = TokenBucket(rate, burst)
    begin_times(bucket, [0.0] * 10)
    now = 1000.0 + 10 * rate.per_seconds + burst * rate.per_seconds + pause
    waits = [bucket.reserve(now) for _ in range(burst + 1)]
    assert waits[:burst] == [0.0] * burst
    assert waits[burst] == pytest.approx(rate.per_seconds / rate.count)


@given(
    make=st.one_of(
        st.builds(lambda rate: lambda: SlidingWindow(rate), rates),
        st.builds(lambda rate, burst: lambda: TokenBucket(rate, burst), rates, st.integers(1, 6)),
    ),
    gaps=gaps,
    ahead=st.integers(0, 25),
)
@settings(max_examples=200, deadline=None)
def test_the_wait_foretold_is_the_wait_that_comes(
    make: Callable[[], TokenBucket | SlidingWindow], gaps: list[float], ahead: int
) -> None:
    gate = make()
    times = begin_times(gate, gaps)
    now = max(1000.0 + sum(gaps), times[-1] - 10)
    foretold = gate.earliest(now, ahead)
    for _ in range(ahead):
        gate.reserve(now)
    assert now + gate.reserve(now) == pytest.approx(foretold)


def test_reservations_are_spread_over_time() -> None:
    bucket = TokenBucket(Rate(60, per_seconds=60))
    assert [bucket.reserve(5.0) for _ in range(10)] == [float(n) for n in range(10)]


def test_an_estimate_for_places_follows_how_long_calls_take() -> None:
    slots = Slots(2)
    assert slots.estimate(0.0) == 1.0
    for begin in (0.0, 20.0):
        slots.take(begin)
        slots.take(begin)
        slots.release(begin + 20.0)
        slots.release(begin + 20.0)
    assert slots.estimate(40.0) == 10.0
    assert slots.estimate(50.0, ahead=2) == 30.0


# --- The driver ---


async def all_begin_times(limiter: Limiter, callers: int, *, hold: float = 0.0) -> list[float]:
    """When each of so many callers of one instant began, from the start, in the order they came."""
    start, times = anyio.current_time(), [math.nan] * callers
    before = waiting_or_begun(limiter)

    async def caller(index: int) -> None:
        async with limiter.acquire() as waited:
            times[index] = anyio.current_time() - start
            assert 0 <= waited <= times[index]
            await anyio.sleep(hold)

    async with anyio.create_task_group() as tg:
        for index in range(callers):
            tg.start_soon(caller, index)
            await until(lambda: waiting_or_begun(limiter) > before + index)  # noqa: B023 - awaited at once
    return times


def waiting_or_begun(limiter: Limiter) -> int:
    stats = limiter.get_stats()
    return stats.waiting + stats.begun


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await anyio.lowlevel.checkpoint()


async def test_ten_waiters_at_sixty_a_minute_begin_a_second_apart() -> None:
    bucket = TokenBucket(Rate(60, per_seconds=60))
    assert await all_begin_times(Limiter(bucket), 10) == [float(n) for n in range(10)]


async def test_waiters_on_a_drained_bucket_are_spread_too() -> None:
    limiter = Limiter(TokenBucket(Rate(60, per_seconds=60), burst=20))
    assert await all_begin_times(limiter, 20) == [0.0] * 20
    assert await all_begin_times(limiter, 10) == [float(n) for n in range(1, 11)]


async def test_the_sliding_window_lets_two_a_second_through_and_not_eight() -> None:
    limiter = Limiter(SlidingWindow(Rate(2, per_seconds=1)))
    assert await all_begin_times(limiter, 8) == [0, 0, 1, 1, 2, 2, 3, 3]


@on_asyncio
async def test_the_driver_works_on_asyncio() -> None:
    limiter = CombinedLimiter(Rate(2, per_seconds=0.02), 1)
    with anyio.fail_after(10):
        times = await all_begin_times(limiter, 6)
    assert times == sorted(times)
    assert all(later >= earlier + 0.0199 for earlier, later in zip(times, times[2:], strict=False))
    with pytest.raises(ConcurrencyLimitExceededError):
        async with limiter.acquire(), limiter.acquire(wait_timeout=0.05):
            pytest.fail("two at once")
    assert limiter.get_stats().running == 0


async def test_calls_at_once_never_exceed_the_places() -> None:
    assert await all_begin_times(ConcurrencyLimiter(2), 6, hold=3) == [0, 0, 3, 3, 6, 6]


async def test_a_combined_limiter_keeps_both_limits() -> None:
    slow_calls = CombinedLimiter(Rate(4, per_seconds=1), 2)
    assert await all_begin_times(slow_calls, 6, hold=5) == [0, 0, 5, 5, 10, 10]
    quick_calls = CombinedLimiter(Rate(1, per_seconds=10), 2, rate_type="token_bucket", burst=3)
    assert await all_begin_times(quick_calls, 5) == [0, 0, 0, 10, 20]


async def test_waiting_for_a_place_uses_up_no_rate() -> None:
    limiter = CombinedLimiter(Rate(1, per_seconds=10), 1)
    start = anyio.current_time()
    async with limiter.acquire():
        await anyio.sleep(50)
        with anyio.move_on_after(5):
            async with limiter.acquire():
                pytest.fail("two at once")
    async with limiter.acquire() as waited:
        assert waited == 0
        assert anyio.current_time() - start == 55


async def test_a_wait_known_to_be_too_long_is_refused_at_once_and_takes_nothing() -> None:
    limiter = Limiter(TokenBucket(Rate(1, per_seconds=10)))
    async with limiter.acquire():
        pass
    start = anyio.current_time()
    for _ in range(5):
        with pytest.raises(RateLimitExceededError) as caught:
            async with limiter.acquire(wait_timeout=9.9):
                pytest.fail("too early")
        assert caught.value.retry_after == 10
        assert caught.value.retryable
    assert anyio.current_time() == start
    async with limiter.acquire(wait_timeout=10) as waited:
        assert waited == 10
    assert limiter.get_stats().refused == 5


async def test_those_ahead_count_for_the_wait_that_is_known() -> None:
    limiter = Limiter(SlidingWindow(Rate(2, per_seconds=10)))
    async with anyio.create_task_group() as tg:
        for _ in range(5):
            tg.start_soon(pass_through, limiter)
        await until(lambda: waiting_or_begun(limiter) == 5)
        with pytest.raises(RateLimitExceededError) as caught:
            async with limiter.acquire(wait_timeout=19):
                pytest.fail("too early")
        assert caught.value.retry_after == 20
        async with limiter.acquire(wait_timeout=20) as waited:
            assert waited == 20
        assert limiter.get_stats().begun == 6


async def pass_through(limiter: Limiter) -> None:
    async with limiter.acquire():
        pass


async def test_no_free_place_in_time_is_an_error_that_says_when_to_come_back() -> None:
    limiter = ConcurrencyLimiter(1)
    async with limiter.acquire():
        start = anyio.current_time()
        with pytest.raises(ConcurrencyLimitExceededError) as caught:
            async with limiter.acquire(wait_timeout=4):
                pytest.fail("two at once")
        assert anyio.current_time() - start == 4
    assert caught.value.retryable
    assert caught.value.retry_after == 4  # calls have run for 4 seconds so far
    assert caught.value.details == {"max_concurrent": 1, "ahead": 0, "wait_timeout_s": 4}
    async with limiter.acquire(wait_timeout=0) as waited:
        assert waited == 0


async def test_who_waits_behind_full_places_is_told_of_the_places_and_not_of_the_rate() -> None:
    limiter = CombinedLimiter(Rate(1, per_seconds=10), 1)
    async with limiter.acquire(), anyio.create_task_group() as tg:
        tg.start_soon(pass_through, limiter)
        await until(lambda: limiter.get_stats().waiting == 1)
        with pytest.raises(ConcurrencyLimitExceededError) as caught:
            async with limiter.acquire(wait_timeout=30):
                pytest.fail("two at once")
        assert caught.value.details["ahead"] == 1
        tg.cancel_scope.cancel()


async def test_a_zero_time_out_takes_what_is_free_and_never_waits() -> None:
    limiter = CombinedLimiter(Rate(5, per_seconds=1), 1)
    async with limiter.acquire(wait_timeout=0):
        start = anyio.current_time()
        with pytest.raises(ConcurrencyLimitExceededError):
            async with limiter.acquire(wait_timeout=0):
                pytest.fail("two at once")
        assert anyio.current_time() == start


async def test_those_behind_a_cancelled_waiter_move_up() -> None:
    limiter = Limiter(TokenBucket(Rate(1, per_seconds=10)))
    start, began = anyio.current_time(), dict[str, float]()
    leave = anyio.CancelScope()

    async def caller(name: str, scope: anyio.CancelScope) -> None:
        with scope:
            async with limiter.acquire():
                began[name] = anyio.current_time() - start

    async with anyio.create_task_group() as tg:
        for index, name in enumerate(["first", "leaves", "next", "last"]):
            tg.start_soon(caller, name, leave if name == "leaves" else anyio.CancelScope())
            await until(lambda: waiting_or_begun(limiter) > index)  # noqa: B023 - awaited at once
        await anyio.sleep(3)
        leave.cancel()
    assert began == {"first": 0, "next": 10, "last": 20}
    stats = limiter.get_stats()
    assert (stats.begun, stats.cancelled, stats.waiting, stats.running) == (3, 1, 0, 0)
    assert stats.waited_s == 30


async def test_a_body_that_fails_or_is_cancelled_frees_its_place() -> None:
    limiter = ConcurrencyLimiter(1)
    with pytest.raises(ZeroDivisionError):
        async with limiter.acquire():
            raise ZeroDivisionError
    with anyio.move_on_after(1):
        async with limiter.acquire():
            await anyio.sleep_forever()
    async with limiter.acquire(wait_timeout=0):
        assert limiter.get_stats().running == 1


async def test_a_late_comer_does_not_overtake_the_queue() -> None:
    limiter = ConcurrencyLimiter(1)
    order = list[str]()

    async def caller(name: str) -> None:
        async with limiter.acquire():
            order.append(name)

    async with anyio.create_task_group() as tg:
        async with limiter.acquire():
            tg.start_soon(caller, "waits")
            await until(lambda: limiter.get_stats().waiting == 1)
        await caller("comes late")  # the place is free this very moment, and the first waiter has not run yet
    assert order == ["waits", "comes late"]


Caller = tuple[float, float, float | None, float | None]
callers = st.lists(
    st.tuples(
        st.floats(0, 5),  # seconds after the one before
        st.floats(0, 4),  # how long it runs
        st.none() | st.floats(0, 6),  # its wait_timeout
        st.none() | st.floats(0, 8),  # when it is cancelled
    ),
    min_size=1,
    max_size=12,
)


@given(callers=callers, rate=st.builds(Rate, st.integers(1, 3), st.floats(0.5, 10)), places=st.integers(1, 3))
@settings(max_examples=150, deadline=None)
def test_whoever_comes_and_goes_the_limits_hold_and_nothing_is_lost(
    callers: list[Caller], rate: Rate, places: int
) -> None:
    limiter = CombinedLimiter(rate, places)
    began: list[tuple[int, float]] = []
    come_back: list[float | None] = []
    running = ended = 0

    async def caller(index: int, hold: float, timeout: float | None, leave: float | None) -> None:
        nonlocal running, ended
        with anyio.move_on_after(leave):
            try:
                async with limiter.acquire(timeout):
                    began.append((index, anyio.current_time()))
                    running += 1
                    try:
                        assert running <= places
                        await anyio.sleep(hold)
                    finally:
                        running -= 1
            except (RateLimitExceededError, ConcurrencyLimitExceededError) as error:
                come_back.append(error.retry_after)
        ended += 1

    async def main() -> None:
        async with anyio.create_task_group() as tg:
            for index, (gap, hold, timeout, leave) in enumerate(callers):
                await anyio.sleep(gap)
                tg.start_soon(caller, index, hold, timeout, leave)
                await trio.testing.wait_all_tasks_blocked()
        stats = limiter.get_stats()
        assert (stats.running, stats.waiting, ended) == (0, 0, len(callers))
        assert (stats.begun, stats.refused) == (len(began), len(come_back))
        assert all(seconds is not None and seconds >= 0 for seconds in come_back)

    run(main)
    times = [time for _, time in began]
    assert all(later >= first + rate.per_seconds for first, later in zip(times, times[rate.count :], strict=False))
    assert [index for index, _ in began] == sorted(index for index, _ in began)
