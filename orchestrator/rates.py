"""Limits of our own on how often calls begin and how many run at once.

The limits themselves are pure: they are told the time, they never wait. ``Limiter`` is the one driver that waits
for them, first come, first served:

    limiter = Limiter(TokenBucket(Rate(60, per_seconds=60), burst=5))
    async with limiter.acquire(wait_timeout=10) as waited:
        ...

All times are seconds of one monotonic clock, ``anyio.current_time()`` in the driver.
"""

import math
import re
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Literal, Protocol

import anyio

from orchestrator.errors import ConcurrencyLimitExceededError, ConfigError, RateLimitExceededError

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}
_TEXT = re.compile(r"(\d+)\s*/\s*(\d+(?:\.\d+)?)?\s*([smh])", re.ASCII)

# What a refused caller is told where nothing is known of how long calls take.
_LEAST_ESTIMATE_S = 1.0


@dataclass(frozen=True, slots=True)
class Rate:
    """``count`` calls in ``per_seconds`` seconds. Raises ConfigError unless both are above 0 and finite."""

    count: int
    per_seconds: float

    def __post_init__(self) -> None:
        if self.count < 1 or not 0 < self.per_seconds < math.inf:
            raise ConfigError(f"{self} is no rate: count is at least 1 and per_seconds more than 0")

    @classmethod
    def parse(cls, text: str) -> "Rate":
        """The rate in text like ``10/60s``, ``5/s`` or ``100/1.5h``. Raises ConfigError for anything else."""
        found = _TEXT.fullmatch(text.strip())
        if found is None:
            raise ConfigError(f"{text!r} is no rate: write the count and the time, like 10/60s, 5/s or 100/1h")
        count, time, unit = found.groups()
        return cls(int(count), float(time or 1) * _UNITS[unit])

    def __str__(self) -> str:
        return f"{self.count}/{self.per_seconds:g}s"


class Gate(Protocol):
    """One limit: pure, and told the time. ``now`` never goes back."""

    def earliest(self, now: float, ahead: int = 0) -> float:
        """The soonest the next call can begin if ``ahead`` others go first; ``now`` if nothing is known against."""
        ...

    def ready(self, now: float, ahead: int = 0) -> bool:
        """Whether a call may begin now, and ``ahead`` others too that go first."""
        ...

    def take(self, now: float) -> None:
        """A call begins. Only where ``ready``."""
        ...

    def release(self, now: float) -> None:
        """That call has ended."""
        ...


class _RateGate:
    """What both kinds of rate share. A rate asks when calls begin, not when they end."""

    rate: Rate

    def earliest(self, now: float, ahead: int = 0) -> float:
        raise NotImplementedError

    def take(self, now: float) -> None:
        raise NotImplementedError

    def ready(self, now: float, ahead: int = 0) -> bool:
        """Whether a call may begin now, and ``ahead`` others too that go first."""
        return self.earliest(now, ahead) <= now

    def release(self, now: float) -> None:
        """Nothing: what has begun counts, however it ended."""

    def reserve(self, now: float) -> float:
        """Give the next call its time and return the seconds to wait for it. Never refuses.

        For callers that do their own waiting: each gets a time of its own, so they are spread and not released
        together. A reservation cannot be given back; ``Limiter`` makes none until the call begins.
        """
        begin = self.earliest(now)
        self.take(begin)
        return begin - now


class TokenBucket(_RateGate):
    """``rate`` on average, and up to ``burst`` calls at once after a pause; without ``burst``, evenly spaced.

    In any stretch of time ``t`` at most ``burst + t * count / per_seconds`` calls begin. For no more than ``count``
    in any ``per_seconds``, use SlidingWindow. Raises ConfigError for a burst below 1.
    """

    def __init__(self, rate: Rate, burst: int | None = None) -> None:
        if burst is not None and burst < 1:
            raise ConfigError(f"a burst of {burst} would let nothing begin: it is at least 1")
        self.rate = rate
        self.burst = 1 if burst is None else burst
        self._interval = rate.per_seconds / rate.count
        # The tokens there were at a time. What came since is never written down by itself: adding it up in small
        # steps would lose the last bit of a token, and a caller that may not wait would be refused for it.
        self._tokens, self._at = float(self.burst), -math.inf

    def earliest(self, now: float, ahead: int = 0) -> float:
        """When the next call can begin, after ``ahead`` others that begin as soon as they can."""
        if self._level(now) >= self.burst:
            return now + max(0, ahead + 1 - self.burst) * self._interval
        return max(now, self._at + (ahead + 1 - self._tokens) * self._interval)

    def take(self, now: float) -> None:
        """A call begins: a token less."""
        self._tokens, self._at = max(0.0, min(self.burst, self._level(now)) - 1), now

    def _level(self, now: float) -> float:
        return self._tokens + (now - self._at) / self._interval


class SlidingWindow(_RateGate):
    """Never more than ``rate.count`` calls begin in any ``rate.per_seconds`` seconds, wherever these start.

    The window has its start but not its end: two calls exactly ``per_seconds`` apart are in different windows.
    """

    def __init__(self, rate: Rate) -> None:
        self.rate = rate
        self._begun: deque[float] = deque(maxlen=rate.count)

    def earliest(self, now: float, ahead: int = 0) -> float:
        """When the next call can begin, after ``ahead`` others that begin as soon as they can."""
        # Call n begins a window after call n - count, and so on back to one that has begun.
        windows = ahead // self.rate.count + 1
        soonest = now + (windows - 1) * self.rate.per_seconds
        back = windows * self.rate.count - ahead
        if back > len(self._begun):
            return soonest
        return max(soonest, self._begun[-back] + windows * self.rate.per_seconds)

    def take(self, now: float) -> None:
        """A call begins."""
        self._begun.append(now)


class Slots:
    """At most ``max_concurrent`` calls run at once. Raises ConfigError for less than 1."""

    def __init__(self, max_concurrent: int) -> None:
        if max_concurrent < 1:
            raise ConfigError(f"max_concurrent is {max_concurrent}: nothing could ever run")
        self.max_concurrent = max_concurrent
        self.running = 0
        self._begun = 0
        self._busy_s = 0.0
        self._counted_until = 0.0

    def earliest(self, now: float, ahead: int = 0) -> float:
        """``now``: nobody knows when a call ends."""
        del ahead
        return now

    def ready(self, now: float, ahead: int = 0) -> bool:
        """Whether a slot is free, and ``ahead`` more."""
        del now
        return self.running + ahead < self.max_concurrent

    def take(self, now: float) -> None:
        """A call begins in a free slot."""
        self._count(now)
        self.running += 1
        self._begun += 1

    def release(self, now: float) -> None:
        """A call has ended and its slot is free."""
        self._count(now)
        self.running -= 1

    def estimate(self, now: float, ahead: int = 0) -> float:
        """A guess at the seconds until a slot is free for a call behind ``ahead`` others: at least 1."""
        self._count(now)
        each = self._busy_s / max(1, self._begun)
        return max(_LEAST_ESTIMATE_S, each * (ahead + 1) / self.max_concurrent)

    def _count(self, now: float) -> None:
        self._busy_s += self.running * (now - self._counted_until)
        self._counted_until = now


@dataclass(frozen=True, slots=True)
class LimiterStats:
    """What a limiter has done and is doing.

    ``running`` calls are inside it and ``waiting`` ones before it, now. Since it was made, ``begun`` calls came
    through after ``waited_s`` seconds of waiting in all, ``refused`` ones were told to come back later, and
    ``cancelled`` ones went away while they waited.
    """

    running: int = 0
    waiting: int = 0
    begun: int = 0
    refused: int = 0
    cancelled: int = 0
    waited_s: float = 0.0


@dataclass(eq=False, slots=True)
class _Waiter:
    """A place in the queue. ``woken`` says: look again whether it is your turn."""

    woken: anyio.Event = field(default_factory=anyio.Event)

    async def wait(self) -> None:
        await self.woken.wait()
        self.woken = anyio.Event()


class Limiter:
    """Waits until every gate lets a call begin: first come, first served. For one event loop.

    Only the first of the queue looks at the gates, and nothing is taken from any until all are ready. So a waiter
    that is cancelled or gives up has nothing to give back, those behind it move up, and a call that waits for a
    free slot uses up no rate.
    """

    def __init__(self, *gates: Gate) -> None:
        self.gates = gates
        self._queue: deque[_Waiter] = deque()
        self._running = self._begun = self._refused = self._cancelled = 0
        self._waited_s = 0.0

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.get_stats()}>"

    def get_stats(self) -> LimiterStats:
        """Counts as of now."""
        return LimiterStats(
            self._running, len(self._queue), self._begun, self._refused, self._cancelled, self._waited_s
        )

    @asynccontextmanager
    async def acquire(self, wait_timeout: float | None = None) -> AsyncIterator[float]:
        """Run the body as one call; yields the seconds waited for it.

        Waits at most ``wait_timeout`` seconds (None: as long as it takes). Raises RateLimitExceededError at once if
        the rates alone are known to need longer, and ConcurrencyLimitExceededError when no slot came free in time;
        nothing is taken then.
        """
        waited = await self._enter(wait_timeout)
        try:
            yield waited
        finally:
            self._leave()

    async def _enter(self, timeout: float | None) -> float:
        start, ahead = anyio.current_time(), len(self._queue)
        if timeout is not None and self._earliest(start, ahead) > start + timeout:
            raise self._too_soon(start, ahead, timeout)
        me = _Waiter()
        self._queue.append(me)
        try:
            with anyio.move_on_after(timeout) as waiting:
                await self._turn(me)
            if waiting.cancelled_caught and timeout is not None:
                self._refuse_unless_ready(self._queue.index(me), timeout)
                await self._turn(me)  # any that are ahead begin at this very moment
            return self._begin(start)
        except anyio.get_cancelled_exc_class():
            self._cancelled += 1
            raise
        finally:
            self._queue.remove(me)
            self._wake_first()

    async def _turn(self, me: _Waiter) -> None:
        """Return when it is the waiter's turn and every gate is ready."""
        while self._queue[0] is not me:
            await me.wait()
        while not self._ready(now := anyio.current_time()):
            if (begin := self._earliest(now)) > now:
                await anyio.sleep_until(begin)
            else:
                await me.wait()

    def _refuse_unless_ready(self, ahead: int, timeout: float) -> None:
        """Time is up. Whose turn comes at the same moment is in time."""
        now = anyio.current_time()
        late = [gate for gate in self.gates if not gate.ready(now, ahead)]
        for gate in late:
            if isinstance(gate, Slots):
                raise self._too_many(gate, now, ahead, timeout)
        if late:
            raise self._too_soon(now, ahead, timeout)

    def _begin(self, start: float) -> float:
        now = anyio.current_time()
        for gate in self.gates:
            gate.take(now)
        self._running += 1
        self._begun += 1
        self._waited_s += now - start
        return now - start

    def _leave(self) -> None:
        now = anyio.current_time()
        for gate in self.gates:
            gate.release(now)
        self._running -= 1
        self._wake_first()

    def _wake_first(self) -> None:
        if self._queue:
            self._queue[0].woken.set()

    def _ready(self, now: float) -> bool:
        return all(gate.ready(now) for gate in self.gates)

    def _earliest(self, now: float, ahead: int = 0) -> float:
        return max((gate.earliest(now, ahead) for gate in self.gates), default=now)

    def _too_soon(self, now: float, ahead: int, timeout: float) -> RateLimitExceededError:
        self._refused += 1
        needed = self._earliest(now, ahead) - now
        rates = ", ".join(str(gate.rate) for gate in self.gates if isinstance(gate, _RateGate))
        return RateLimitExceededError(
            f"the rate limit ({rates}) allows the call in {needed:.3g} s; it waits at most {timeout:g} s",
            retry_after=needed,
            details={"rate": rates, "ahead": ahead, "wait_timeout_s": timeout},
        )

    def _too_many(self, slots: Slots, now: float, ahead: int, timeout: float) -> ConcurrencyLimitExceededError:
        self._refused += 1
        return ConcurrencyLimitExceededError(
            f"at most {slots.max_concurrent} calls run at once, and no place came free within {timeout:g} s",
            retry_after=max(slots.estimate(now, ahead), self._earliest(now, ahead) - now),
            details={"max_concurrent": slots.max_concurrent, "ahead": ahead, "wait_timeout_s": timeout},
        )


class ConcurrencyLimiter(Limiter):
    """A Limiter of ``max_concurrent`` calls at once. Raises ConfigError for less than 1."""

    def __init__(self, max_concurrent: int) -> None:
        super().__init__(Slots(max_concurrent))


class CombinedLimiter(Limiter):
    """A Limiter of both a rate and ``max_concurrent`` calls at once; a call needs both, and takes them together.

    ``rate_type`` chooses SlidingWindow (never more than ``rate.count`` in a window) or TokenBucket (on average).
    ``burst`` is the token bucket's. Raises ConfigError for a number out of range, or a burst of a sliding window.
    """

    def __init__(
        self,
        rate: Rate,
        max_concurrent: int,
        *,
        rate_type: Literal["sliding_window", "token_bucket"] = "sliding_window",
        burst: int | None = None,
    ) -> None:
        if rate_type == "sliding_window" and burst is not None:
            raise ConfigError("a sliding window has no burst", advice='Leave it out, or use "token_bucket".')
        gate = SlidingWindow(rate) if rate_type == "sliding_window" else TokenBucket(rate, burst)
        super().__init__(gate, Slots(max_concurrent))
