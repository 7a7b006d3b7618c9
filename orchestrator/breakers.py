"""Circuit breakers: after failures in a row, calls are refused for a while instead of failing one by one.

A breaker is pure: it is told the time in seconds of a monotonic clock, and never waits. One breaker stands for what
fails together: one backend with one account.

    closed --failure_threshold failures in a row--> open --reset_timeout_s--> half open
    half open --success_threshold successes--> closed; one failure--> open
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, TypeVarTuple, Unpack

import anyio
from pydantic import BaseModel, ConfigDict, Field

from orchestrator.errors import CircuitOpenError, OrchestratorError
from orchestrator.treatments import Verdict, treatment

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

State = Literal["closed", "open", "half_open"]


class BreakerConfig(BaseModel):
    """When a breaker opens and closes. Times are seconds.

    Raises pydantic's ValidationError for numbers out of range.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    failure_threshold: int = Field(5, ge=1, description="Failures in a row that open it.")
    success_threshold: int = Field(2, ge=1, description="Successful probes that close it again.")
    reset_timeout_s: float = Field(
        30.0, gt=0, allow_inf_nan=False, description="How long it stays open before it lets a probe through."
    )
    half_open_max_calls: int = Field(1, ge=1, description="Probes at once.")
    probe_lease_s: float = Field(
        300.0, gt=0, allow_inf_nan=False, description="After this long, a probe nobody has heard of makes room."
    )


@dataclass(eq=False, slots=True)
class Permit:
    """Leave for one call, to be handed back once with ``success``, ``failure``, ``cancelled`` or ``report``.

    ``probe`` is true for a call that finds out whether the backend works again; whoever runs it may report success
    as soon as the provider has answered, long before the run ends.
    """

    generation: int
    probe: bool
    lease_until: float
    reported: bool = False


@dataclass(frozen=True, slots=True)
class Refusal:
    """No leave. Asking again makes sense after ``retry_after`` seconds, which are more than 0."""

    retry_after: float


@dataclass(frozen=True, slots=True)
class BreakerStats:
    """A breaker as of now.

    ``failures`` in a row were counted while closed, ``successes`` of probes while half open. ``retry_after`` are
    the seconds until a call may be let through, 0 if one would be now. ``reason`` is the error code that opened it
    last. In all it ``allowed`` and ``refused`` calls, and ``opened`` so many times.
    """

    name: str
    state: State
    failures: int
    successes: int
    probes: int
    retry_after: float
    reason: str | None
    allowed: int
    refused: int
    opened: int


class Breaker:
    """One circuit breaker. ``name`` is for people: it is in errors and statistics.

    Every change of state begins a new generation. A permit belongs to the generation it was given in, and what is
    reported on it later is ignored: a slow call from before the trouble says nothing about now.

    A probe holds a lease. It ends when anything is reported on its permit, or by itself after ``probe_lease_s``, so
    a probe that was cancelled or lost cannot keep the breaker half open for ever.

    ``on_change`` is called with every new state, after it has been entered; it must not raise.
    """

    def __init__(
        self, config: BreakerConfig | None = None, name: str = "", on_change: Callable[[State], None] | None = None
    ) -> None:
        self.config = config or BreakerConfig()
        self.name = name
        self._on_change = on_change
        self._state: State = "closed"
        self._generation = 0
        self._allowed = self._refused = self._opened = 0
        self._reason: str | None = None
        self._until = 0.0
        self._probes: list[Permit] = []
        self._enter("closed")

    def __repr__(self) -> str:
        return f"<Breaker {self.name} {self._state} failures={self._failures} probes={len(self._probes)}>"

    def allow(self, now: float) -> Permit | Refusal:
        """Leave for one call, or how long to wait before asking again. A permit must be handed back."""
        if self._state == "open" and now >= self._until:
            self._enter("half_open")
        if (wait := self.retry_after(now)) > 0:
            self._refused += 1
            return Refusal(wait)
        self._allowed += 1
        permit = Permit(self._generation, self._state == "half_open", now + self.config.probe_lease_s)
        if permit.probe:
            self._probes = [*self._leased(now), permit]
        return permit

    def admit(self, now: float) -> Permit:
        """Leave for one call. Raises CircuitOpenError, with ``retry_after``, if there is none."""
        answer = self.allow(now)
        if isinstance(answer, Refusal):
            raise self._error(answer.retry_after)
        return answer

    def check(self, now: float) -> None:
        """Raises CircuitOpenError if a call would be refused now. For before a call waits its turn."""
        if (wait := self.retry_after(now)) > 0:
            self._refused += 1
            raise self._error(wait)

    def retry_after(self, now: float) -> float:
        """Seconds to wait before a call may be let through; 0 if one would be now.

        While probes are out this is only when to ask again: a probe may end at any moment.
        """
        if self._state == "open":
            return max(0.0, self._until - now)
        leases = self._leased(now)
        if self._state == "closed" or len(leases) < self.config.half_open_max_calls:
            return 0.0
        return min(self.config.reset_timeout_s, min(probe.lease_until for probe in leases) - now)

    def success(self, permit: Permit, now: float) -> None:
        """The call worked."""
        if not self._hand_back(permit, now):
            return
        self._failures = 0
        self._successes += permit.probe
        if self._successes >= self.config.success_threshold:
            self._enter("closed")

    def failure(
        self, permit: Permit, now: float, *, reason: str | None = None, open_for: float | None = None
    ) -> None:
        """The call failed in a way that speaks against the backend.

        Where it is known for how many seconds every call will fail, ``open_for`` opens the breaker at once for that
        long.
        """
        if not self._hand_back(permit, now):
            return
        self._failures += 1
        if open_for is not None:
            self._open(now + open_for, reason)
        elif permit.probe or self._failures >= self.config.failure_threshold:
            self._open(now + self.config.reset_timeout_s, reason)

    def cancelled(self, permit: Permit, now: float) -> None:
        """The call ended without saying anything about the backend: cancelled, denied by the user, never made."""
        self._hand_back(permit, now)

    def report(
        self,
        permit: Permit,
        error: BaseException | Mapping[str, Any] | None,
        now: float,
        verdict: Verdict | None = None,
    ) -> None:
        """Hand the permit back after a call that ended with the error (None: it worked).

        What it means is the ``verdict``, by default that of the table in ``orchestrator.treatments``. A failure by
        a rate limit whose end the provider told opens the breaker until then.
        """
        if verdict is None:
            verdict = "success" if error is None else treatment(error).breaker
        if verdict == "success":
            self.success(permit, now)
        elif verdict == "neutral":
            self.cancelled(permit, now)
        else:
            reason, open_for = _reading(error)
            self.failure(permit, now, reason=reason, open_for=open_for)

    def open_until(self, until: float, now: float, reason: str | None = None) -> None:
        """Open it for a known time, such as until a usage limit ends. Never shortens; not for a time past."""
        if until > now:
            self._open(max(until, self._until if self._state == "open" else until), reason)

    def reset(self) -> None:
        """Close it. What is reported on permits given until now is ignored."""
        self._enter("closed")

    def get_stats(self, now: float) -> BreakerStats:
        """Its state and counts. An open breaker whose time is over is shown as half open."""
        wait = self.retry_after(now)
        over = self._state == "open" and wait == 0
        return BreakerStats(
            name=self.name,
            state="half_open" if over else self._state,
            failures=self._failures,
            successes=self._successes,
            probes=len(self._leased(now)),
            retry_after=wait,
            reason=self._reason,
            allowed=self._allowed,
            refused=self._refused,
            opened=self._opened,
        )

    @asynccontextmanager
    async def guard(self, table: Callable[[BaseException], Verdict] | None = None) -> AsyncIterator[Permit]:
        """Run the body as one call. Raises CircuitOpenError without running it if there is no leave.

        What the body raises is reported and raised on. ``table`` decides what it means to the breaker; by default
        that is ``report``'s reading, which takes a group of errors for none of ours: raise them one by one
        (``groups.unwrapped``). Cancelling the body is never a failure.
        """
        permit = self.admit(anyio.current_time())
        try:
            yield permit
        except Exception as error:
            self.report(permit, error, anyio.current_time(), table(error) if table else None)
            raise
        except BaseException:
            self.cancelled(permit, anyio.current_time())
            raise
        self.success(permit, anyio.current_time())

    async def call(self, func: Callable[[Unpack[Ts]], Awaitable[T]], *args: *Ts) -> T:
        """``await func(*args)`` under ``guard``. Raises CircuitOpenError and whatever ``func`` raises."""
        async with self.guard():
            return await func(*args)

    def _hand_back(self, permit: Permit, now: float) -> bool:
        """End the permit and its lease; whether what is reported on it counts."""
        counts = not permit.reported and permit.generation == self._generation
        permit.reported = True
        self._probes = [probe for probe in self._leased(now) if probe is not permit]
        return counts

    def _leased(self, now: float) -> list[Permit]:
        return [probe for probe in self._probes if probe.lease_until > now]

    def _open(self, until: float, reason: str | None) -> None:
        if self._state != "open":
            self._opened += 1
        self._until = until
        self._reason = reason
        self._enter("open")

    def _enter(self, state: State) -> None:
        changed, self._state = state != self._state, state
        self._generation += 1
        self._failures = self._successes = 0
        self._probes = []
        if changed and self._on_change is not None:
            self._on_change(state)

    def _error(self, wait: float) -> CircuitOpenError:
        why = f": {self._reason}" if self._reason else ""
        return CircuitOpenError(
            f"circuit {self.name or 'breaker'} is {self._state.replace('_', ' ')}{why}; ask again in {wait:.3g} s",
            retry_after=wait,
            details={"circuit": self.name, "state": self._state, "reason": self._reason},
        )


def _reading(error: BaseException | Mapping[str, Any] | None) -> tuple[str | None, float | None]:
    """The code of a failure, and for how many seconds every call is known to fail."""
    if isinstance(error, OrchestratorError):
        error = error.to_dict()
    if not isinstance(error, Mapping):
        return (type(error).__name__ if error else None), None
    code = error.get("code")
    return code, (error.get("retry_after") or None) if code == "rate_limit" else None
