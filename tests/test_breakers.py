"""Circuit breakers: when they open, that they close again whatever became of a probe, and what errors mean."""

from typing import Any

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule
from pydantic import ValidationError
from trio.testing import MockClock

from orchestrator.breakers import Breaker, BreakerConfig, Permit, Refusal
from orchestrator.errors import (
    AuthenticationError,
    CircuitOpenError,
    ConnectionFailedError,
    InvalidRequestError,
    OrchestratorError,
    OverloadedError,
    RateLimitError,
    RunCancelledError,
    RunTimeoutError,
)
from orchestrator.treatments import (
    ANSWERED,
    FAILURES,
    FALLBACK,
    NEVER_RETRIED,
    Treatment,
    error_table,
    treatment,
)


def test_every_change_of_state_is_told_once() -> None:
    told: list[str] = []
    breaker = Breaker(BreakerConfig(failure_threshold=2, reset_timeout_s=10), on_change=told.append)
    for _ in range(2):
        breaker.failure(breaker.admit(0), 0)
    breaker.open_until(20, 0)  # it is open already
    for now in (20, 21):
        breaker.success(breaker.admit(now), now)
    breaker.reset()
    assert told == ["open", "half_open", "closed"]


@pytest.fixture
def anyio_backend() -> Any:
    """Trio with a clock that jumps to the next deadline as soon as every task waits: no real time passes."""
    return "trio", {"clock": MockClock(autojump_threshold=0)}


both_backends = pytest.mark.parametrize(
    "anyio_backend", ["asyncio", ("trio", {"clock": MockClock(autojump_threshold=0)})]
)

ONE = BreakerConfig(failure_threshold=1, success_threshold=1)


def permit_of(breaker: Breaker, now: float) -> Permit:
    permit = breaker.allow(now)
    assert isinstance(permit, Permit)
    return permit


def refusal_of(breaker: Breaker, now: float) -> float:
    refusal = breaker.allow(now)
    assert isinstance(refusal, Refusal)
    assert refusal.retry_after == breaker.retry_after(now) > 0
    return refusal.retry_after


def fail(breaker: Breaker, now: float, times: int = 1) -> None:
    for _ in range(times):
        breaker.failure(permit_of(breaker, now), now, reason="overloaded")


def state(breaker: Breaker, now: float) -> str:
    return breaker.get_stats(now).state


# --- The states ---


def test_the_defaults_are_those_that_are_promised() -> None:
    assert BreakerConfig().model_dump(exclude={"probe_lease_s"}) == {
        "failure_threshold": 5,
        "success_threshold": 2,
        "reset_timeout_s": 30.0,
        "half_open_max_calls": 1,
    }


@pytest.mark.parametrize(
    "wrong",
    [
        {"failure_threshold": 0},
        {"success_threshold": 0},
        {"reset_timeout_s": 0},
        {"half_open_max_calls": 0},
        {"probe_lease_s": 0},
        {"reset_timeout_s": float("inf")},
        {"reset_timeout": 3},
    ],
)
def test_settings_that_would_never_open_or_never_close_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        BreakerConfig(**wrong)


def test_five_failures_in_a_row_open_it_for_thirty_seconds() -> None:
    breaker = Breaker()
    fail(breaker, 0.0, 4)
    breaker.success(permit_of(breaker, 0.0), 0.0)
    fail(breaker, 1.0, 4)
    assert state(breaker, 1.0) == "closed"
    fail(breaker, 2.0)
    assert refusal_of(breaker, 2.0) == 30
    assert refusal_of(breaker, 31.0) == 1
    assert permit_of(breaker, 32.0).probe


def test_two_probes_one_after_the_other_close_it() -> None:
    breaker = Breaker()
    fail(breaker, 0.0, 5)
    first = permit_of(breaker, 30.0)
    refusal_of(breaker, 30.0)
    breaker.success(first, 31.0)
    assert state(breaker, 31.0) == "half_open"
    second = permit_of(breaker, 31.0)
    refusal_of(breaker, 31.0)
    breaker.success(second, 32.0)
    assert state(breaker, 32.0) == "closed"
    assert not permit_of(breaker, 32.0).probe


def test_one_success_closes_it_where_one_is_asked_for() -> None:
    breaker = Breaker(ONE)
    fail(breaker, 0.0)
    breaker.success(permit_of(breaker, 30.0), 30.0)
    assert state(breaker, 30.0) == "closed"


def test_a_probe_that_fails_opens_it_for_the_whole_time_again() -> None:
    breaker = Breaker()
    fail(breaker, 0.0, 5)
    breaker.success(permit_of(breaker, 30.0), 30.0)
    fail(breaker, 31.0)
    assert refusal_of(breaker, 31.0) == 30
    for now in (61.0, 62.0):  # the success before counts no more
        assert state(breaker, now) == "half_open"
        breaker.success(permit_of(breaker, now), now)
    assert state(breaker, 62.0) == "closed"


def test_a_cancelled_probe_makes_room_at_once() -> None:
    breaker = Breaker()
    fail(breaker, 0.0, 5)
    for now in (30.0, 31.0, 32.0):
        probe = permit_of(breaker, now)
        refusal_of(breaker, now)
        breaker.cancelled(probe, now)
    for now in (33.0, 34.0):
        breaker.success(permit_of(breaker, now), now)
    assert state(breaker, 34.0) == "closed"


def test_a_probe_that_never_reports_makes_room_when_its_lease_ends() -> None:
    breaker = Breaker(BreakerConfig(probe_lease_s=100))
    fail(breaker, 0.0, 5)
    permit_of(breaker, 30.0)
    assert refusal_of(breaker, 30.0) == 30  # not the 100 of the lease: the probe may end sooner
    assert refusal_of(breaker, 129.0) == 1
    for now in (130.0, 131.0):
        breaker.success(permit_of(breaker, now), now)
    assert state(breaker, 131.0) == "closed"


def test_probes_slower_than_their_lease_still_count() -> None:
    breaker = Breaker(BreakerConfig(probe_lease_s=10))
    fail(breaker, 0.0, 5)
    slow, slower = permit_of(breaker, 30.0), permit_of(breaker, 40.0)
    breaker.success(slow, 60.0)
    breaker.success(slow, 61.0)  # said twice, counted once
    assert state(breaker, 61.0) == "half_open"
    breaker.success(slower, 62.0)
    assert state(breaker, 62.0) == "closed"


def test_a_late_result_of_an_earlier_state_changes_nothing() -> None:
    breaker = Breaker()
    slow = [permit_of(breaker, 0.0) for _ in range(4)]
    fail(breaker, 1.0, 5)
    breaker.failure(slow[0], 20.0)
    assert refusal_of(breaker, 20.0) == 11
    probe = permit_of(breaker, 31.0)
    breaker.failure(slow[1], 32.0)
    breaker.success(slow[2], 32.0)
    assert breaker.get_stats(32.0).successes == 0
    refusal_of(breaker, 32.0)  # the probe keeps its lease
    breaker.success(probe, 33.0)
    breaker.success(permit_of(breaker, 33.0), 33.0)
    breaker.failure(slow[3], 34.0, open_for=1000)
    assert (state(breaker, 34.0), breaker.get_stats(34.0).failures) == ("closed", 0)


def test_calls_that_work_meanwhile_do_not_hide_the_failures_of_slow_ones() -> None:
    breaker = Breaker()
    slow = [permit_of(breaker, 0.0) for _ in range(5)]
    for _ in range(5):
        breaker.success(permit_of(breaker, 1.0), 1.0)
    assert breaker.get_stats(1.0).successes == 0
    for permit in slow:
        breaker.failure(permit, 60.0)
    assert refusal_of(breaker, 60.0) == 30


def test_a_known_time_opens_it_at_once_and_is_never_cut_short() -> None:
    breaker = Breaker()
    breaker.open_until(500.0, 100.0, "rate_limit")
    assert refusal_of(breaker, 100.0) == 400
    breaker.open_until(300.0, 101.0)
    breaker.open_until(50.0, 101.0)
    assert refusal_of(breaker, 101.0) == 399
    breaker.open_until(600.0, 102.0)
    assert refusal_of(breaker, 102.0) == 498
    assert permit_of(breaker, 600.0).probe
    assert breaker.get_stats(600.0).opened == 1


def test_a_time_that_is_past_does_not_open_it() -> None:
    breaker = Breaker()
    breaker.open_until(100.0, 100.0)
    assert not permit_of(breaker, 100.0).probe


def test_reset_closes_it_and_forgets() -> None:
    breaker = Breaker(name="claude")
    slow = permit_of(breaker, 0.0)
    fail(breaker, 0.0, 5)
    breaker.reset()
    breaker.failure(slow, 1.0)
    stats = breaker.get_stats(1.0)
    assert (stats.state, stats.failures, stats.retry_after) == ("closed", 0, 0)
    assert (stats.name, stats.allowed, stats.refused, stats.opened) == ("claude", 6, 0, 1)


def test_asking_whether_a_call_would_be_let_through_takes_nothing() -> None:
    breaker = Breaker(ONE, "claude/work")
    breaker.check(0.0)
    fail(breaker, 0.0)
    with pytest.raises(CircuitOpenError) as caught:
        breaker.check(10.0)
    assert caught.value.retry_after == 20
    assert caught.value.details == {"circuit": "claude/work", "state": "open", "reason": "overloaded"}
    for _ in range(3):
        breaker.check(30.0)
    assert permit_of(breaker, 30.0).probe


class AnyCalls(RuleBasedStateMachine):
    """Calls that begin, end, are cancelled and get lost in any order, while time passes."""

    permits = Bundle("permits")

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.breaker = Breaker(
            BreakerConfig(
                failure_threshold=3,
                success_threshold=2,
                reset_timeout_s=30,
                half_open_max_calls=2,
                probe_lease_s=50,
            )
        )

    @rule(seconds=st.sampled_from([0.0, 1.0, 29.0, 30.0, 50.0, 100.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(target=permits)
    def a_call_begins(self) -> Any:
        wait = self.breaker.retry_after(self.now)
        answer = self.breaker.allow(self.now)
        assert isinstance(answer, Refusal) == (wait > 0)
        return answer if isinstance(answer, Permit) else Permit(-1, probe=False, lease_until=0.0)

    @rule(permit=permits)  # some report twice
    def it_works(self, permit: Permit) -> None:
        self.breaker.success(permit, self.now)

    @rule(permit=permits, open_for=st.none() | st.floats(1, 100))
    def it_fails(self, permit: Permit, open_for: float | None) -> None:
        self.breaker.failure(permit, self.now, open_for=open_for)

    @rule(permit=consumes(permits))
    def it_is_cancelled(self, permit: Permit) -> None:
        before = self.breaker.get_stats(self.now)
        self.breaker.cancelled(permit, self.now)
        after = self.breaker.get_stats(self.now)
        assert (before.state, before.failures, before.successes) == (after.state, after.failures, after.successes)

    @rule(permit=consumes(permits))
    def it_is_lost(self, permit: Permit) -> None:
        pass

    @invariant()
    def there_are_never_more_probes_than_allowed(self) -> None:
        assert self.breaker.get_stats(self.now).probes <= 2

    @invariant()
    def whoever_waits_as_told_gets_nearer(self) -> None:
        """Nothing can hold it open for longer than it was told, or half open for longer than the leases."""
        assert self.breaker.retry_after(self.now) <= 100
        later = self.now + 150  # the longest opening, then the longest lease
        assert self.breaker.retry_after(later) == 0


TestAnyCalls = AnyCalls.TestCase
TestAnyCalls.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_from_any_state_working_calls_close_it(data: st.DataObject) -> None:
    breaker, now, out = Breaker(), 0.0, list[Permit]()
    for _ in range(data.draw(st.integers(0, 30))):
        now += data.draw(st.sampled_from([0.0, 5.0, 30.0, 300.0]))
        if isinstance(answer := breaker.allow(now), Permit):
            out.append(answer)
        fails: bool = data.draw(st.booleans())
        if out and fails:
            breaker.failure(out.pop(data.draw(st.integers(0, len(out) - 1))), now)
    for _ in range(3 + 300 // 30):  # as told, but at most until the longest lease has ended
        now += breaker.retry_after(now)
        if isinstance(answer := breaker.allow(now), Permit):
            breaker.success(answer, now)
    assert state(breaker, now) == "closed"


# --- What errors mean ---

TABLE = {
    # code: (breaker, retryable, fallback to the API)
    "timeout": ("neutral", True, False),
    "rate_limit": ("failure", True, False),
    "connection": ("failure", True, False),
    "overloaded": ("failure", True, False),
    "server_error": ("failure", True, False),
    "stalled": ("failure", True, False),
    "cli_exit": ("failure", True, False),
    "cli_start": ("failure", False, True),
    "cli_not_found": ("neutral", False, True),
    "circuit_open": ("neutral", True, True),
    "authentication": ("neutral", False, False),
    "permission": ("neutral", False, False),
    "billing": ("neutral", False, False),
    "message_too_large": ("neutral", False, False),
    "invalid_request": ("success", False, False),
    "model_not_found": ("success", False, False),
    "refusal": ("success", False, False),
    "max_turns": ("success", False, False),
    "structured_output": ("success", True, False),
    "rate_limit_exceeded": ("neutral", True, False),
    "concurrency_limit_exceeded": ("neutral", True, False),
    "session_busy": ("neutral", True, False),
    "interrupted": ("neutral", True, False),
    "server_unavailable": ("neutral", True, False),
    **dict.fromkeys(
        ["cancelled", "budget_exceeded", "depth_limit", "limit", "retry_exhausted", "error", "backend"],
        ("neutral", False, False),
    ),
    **dict.fromkeys(
        ["prompt", "config", "plan", "scenario", "agent", "agent_not_found", "run_not_found", "session_not_found"],
        ("neutral", False, False),
    ),
}


@pytest.mark.parametrize("code", TABLE)
def test_every_error_means_what_the_table_says(code: str) -> None:
    breaker, retryable, fallback = TABLE[code]
    assert error_table()[code] == Treatment(breaker, retryable, fallback)  # type: ignore[arg-type]


def test_the_table_names_no_code_that_does_not_exist() -> None:
    assert error_table().keys() >= FAILURES | ANSWERED | NEVER_RETRIED | FALLBACK


def test_what_is_never_retried_is_so_even_where_the_error_says_otherwise() -> None:
    error = AuthenticationError("no", retryable=True)
    assert not treatment(error).retryable
    assert treatment(RunTimeoutError("slow")).retryable
    assert not treatment(RunTimeoutError("slow", retryable=False)).retryable


def test_an_error_means_the_same_as_its_data() -> None:
    for error in (OverloadedError("x"), InvalidRequestError("x"), RunCancelledError("x", retryable=True)):
        assert treatment(error) == treatment(error.to_dict())


def test_an_exception_of_another_kind_says_nothing() -> None:
    assert treatment(ValueError("a defect")) == Treatment("neutral", retryable=False, fallback=False)


@pytest.mark.parametrize(
    "error",
    [
        RunCancelledError("by the user"),
        RunTimeoutError("slow"),
        AuthenticationError("no"),
        ValueError("a defect"),
        OrchestratorError("unknown"),
    ],
)
def test_what_is_no_failure_never_opens_it(error: Exception) -> None:
    breaker = Breaker(ONE)
    for _ in range(10):
        breaker.report(permit_of(breaker, 0.0), error, 0.0)
    assert state(breaker, 0.0) == "closed"


@pytest.mark.parametrize("as_data", [False, True])
def test_a_rate_limit_that_tells_its_end_opens_it_until_then(as_data: bool) -> None:
    breaker, error = Breaker(), RateLimitError("5-hour limit", retry_after=7200)
    breaker.report(permit_of(breaker, 0.0), error.to_dict() if as_data else error, 10.0)
    assert refusal_of(breaker, 10.0) == 7200
    assert breaker.get_stats(10.0).reason == "rate_limit"


def test_other_waits_that_are_asked_for_count_as_one_failure() -> None:
    breaker = Breaker()
    for error in (RateLimitError("no time told"), OverloadedError("busy", retry_after=90)):
        breaker.report(permit_of(breaker, 0.0), error, 0.0)
    assert (state(breaker, 0.0), breaker.get_stats(0.0).failures) == ("closed", 2)


def test_a_probe_that_the_provider_answered_counts_as_working() -> None:
    breaker = Breaker(ONE)
    fail(breaker, 0.0)
    breaker.report(permit_of(breaker, 30.0), InvalidRequestError("too long"), 30.0)
    assert state(breaker, 30.0) == "closed"


# --- The async helper ---


async def unreachable() -> None:
    raise ConnectionFailedError("nobody there")


async def answers(text: str) -> str:
    return text


@both_backends
async def test_calls_go_through_the_breaker() -> None:
    breaker = Breaker(BreakerConfig(failure_threshold=2), "claude")
    assert await breaker.call(answers, "hello") == "hello"
    for _ in range(2):
        with pytest.raises(ConnectionFailedError):
            await breaker.call(unreachable)
    with pytest.raises(CircuitOpenError) as caught:
        await breaker.call(answers, "not asked")
    assert isinstance(caught.value, OrchestratorError)
    assert caught.value.retry_after is not None
    assert 0 < caught.value.retry_after <= 30
    assert breaker.get_stats(anyio.current_time()).refused == 1


async def test_it_recovers_while_time_passes() -> None:
    breaker = Breaker(BreakerConfig(failure_threshold=1))
    with pytest.raises(ConnectionFailedError):
        await breaker.call(unreachable)
    await anyio.sleep(30)
    async with breaker.guard() as permit:
        assert permit.probe
        with pytest.raises(CircuitOpenError):
            await breaker.call(answers, "a second probe")
    assert await breaker.call(answers, "second") == "second"
    assert state(breaker, anyio.current_time()) == "closed"


async def test_a_cancelled_probe_does_not_leave_it_half_open() -> None:
    breaker = Breaker(BreakerConfig(failure_threshold=1))
    with pytest.raises(ConnectionFailedError):
        await breaker.call(unreachable)
    await anyio.sleep(30)
    for _ in range(3):
        with anyio.move_on_after(1):
            await breaker.call(anyio.sleep_forever)
    assert breaker.get_stats(anyio.current_time()).probes == 0
    for _ in range(2):
        await breaker.call(answers, "works")
    assert state(breaker, anyio.current_time()) == "closed"


async def test_a_table_of_ones_own_decides_what_counts() -> None:
    breaker = Breaker(ONE)
    with pytest.raises(ConnectionFailedError):
        async with breaker.guard(lambda _: "neutral"):
            await unreachable()
    assert state(breaker, anyio.current_time()) == "closed"
    with pytest.raises(ZeroDivisionError):
        async with breaker.guard(lambda error: "failure" if isinstance(error, ArithmeticError) else "neutral"):
            raise ZeroDivisionError
    stats = breaker.get_stats(anyio.current_time())
    assert (stats.state, stats.reason) == ("open", "ZeroDivisionError")


async def test_success_may_be_reported_before_the_call_ends() -> None:
    breaker = Breaker(ONE)
    with pytest.raises(ConnectionFailedError):
        await breaker.call(unreachable)
    await anyio.sleep(30)
    async with breaker.guard() as permit:
        breaker.success(permit, anyio.current_time())  # the provider has answered; the run goes on
        assert await breaker.call(answers, "meanwhile") == "meanwhile"
        await anyio.sleep(600)
    assert state(breaker, anyio.current_time()) == "closed"
