"""Retries: which errors are tried again, how long is waited, and what is raised in the end."""

from collections.abc import Callable
from typing import Any

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from trio.testing import MockClock

from orchestrator.errors import (
    AuthenticationError,
    BackendError,
    BillingError,
    CircuitOpenError,
    InvalidRequestError,
    MessageTooLargeError,
    OrchestratorError,
    OverloadedError,
    PermissionDeniedError,
    PlanError,
    PromptError,
    RateLimitError,
    RetryExhaustedError,
    RunCancelledError,
    RunTimeoutError,
    ServerError,
)
from orchestrator.retries import Retry, retry_with_backoff
from orchestrator.treatments import NEVER_RETRIED, error_table


@pytest.fixture
def anyio_backend() -> Any:
    """Trio with a clock that jumps to the next deadline as soon as every task waits: no real time passes."""
    return "trio", {"clock": MockClock(autojump_threshold=0)}


EXACT = Retry(jitter=0)

seconds = st.floats(0, 1000)
policies = st.builds(
    Retry,
    max_retries=st.integers(0, 2000),
    base_delay_s=seconds,
    max_delay_s=seconds,
    exponential_base=st.floats(1, 1e6),
    jitter=st.floats(0, 1),
    max_retry_after_s=seconds,
)
chance = st.floats(0, 1)
HOPELESS = [
    AuthenticationError("x"),
    PermissionDeniedError("x"),
    BillingError("x"),
    InvalidRequestError("x"),
    MessageTooLargeError("x"),
    PromptError("x"),
    PlanError("x"),
    RunCancelledError("x"),
    RetryExhaustedError("x"),
    ValueError("a defect"),
    OSError("disk"),
]


class Flaky:
    """Fails with each of the errors in turn, then answers; knows when it was called."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.called_at: list[float] = []

    async def __call__(self) -> str:
        self.called_at.append(anyio.current_time())
        if self.errors:
            raise self.errors.pop(0)
        return "answer"

    @property
    def waits(self) -> list[float]:
        return [b - a for a, b in zip(self.called_at, self.called_at[1:], strict=False)]


# --- The policy ---


def test_the_defaults_are_those_that_are_promised() -> None:
    promised = {"max_retries": 3, "base_delay_s": 1.0, "max_delay_s": 30.0, "exponential_base": 2.0}
    assert Retry().model_dump(include=set(promised)) == promised


def test_waits_double_up_to_the_longest_and_then_end() -> None:
    retry = Retry(jitter=0, max_retries=7)
    waits = [retry.delay(attempt, ServerError("x"), 0.5) for attempt in range(1, 9)]
    assert waits == [1, 2, 4, 8, 16, 30, 30, None]


def test_a_policy_is_data() -> None:
    retry = Retry(codes=frozenset({"overloaded", "timeout"}), max_retries=1)
    assert Retry.model_validate_json(retry.model_dump_json()) == retry
    with pytest.raises(ValidationError):
        retry.max_retries = 5  # type: ignore[misc]


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_retries": -1},
        {"base_delay_s": -1},
        {"exponential_base": 0.5},
        {"jitter": 1.5},
        {"max_delay_s": float("inf")},
        {"retries": 3},
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Retry(**wrong)


@pytest.mark.parametrize("code", sorted(NEVER_RETRIED))
def test_a_code_that_is_never_retried_cannot_be_asked_for(code: str) -> None:
    with pytest.raises(ValidationError, match=code):
        Retry(codes=frozenset({"overloaded", code}))


@given(retry=policies, attempt=st.integers(1, 3000), rnd=chance, asked=st.none() | st.floats(0, 2000))
@settings(max_examples=300, deadline=None)
def test_every_wait_is_within_its_bounds(retry: Retry, attempt: int, rnd: float, asked: float | None) -> None:
    delay = retry.delay(attempt, OverloadedError("x", retry_after=asked), rnd)
    if attempt > retry.max_retries or (asked or 0) > retry.max_retry_after_s:
        assert delay is None
        return
    assert delay is not None
    assert (asked or 0) <= delay <= max(retry.max_delay_s, (asked or 0) * (1 + retry.jitter))
    if attempt == 1:
        assert delay >= min(retry.base_delay_s, retry.max_delay_s) * (1 - retry.jitter)


@given(retry=policies, rnd=chance)
@settings(deadline=None)
def test_waits_never_get_shorter(retry: Retry, rnd: float) -> None:
    delays = [retry.delay(attempt, OverloadedError("x"), rnd) for attempt in range(1, 40)]
    known = [delay for delay in delays if delay is not None]
    assert known == sorted(known)
    assert len(known) == min(39, retry.max_retries)


@given(retry=policies, error=st.sampled_from(HOPELESS), attempt=st.integers(1, 10), rnd=chance)
@settings(deadline=None)
def test_what_cannot_get_better_is_never_tried_again(
    retry: Retry, error: Exception, attempt: int, rnd: float
) -> None:
    assert retry.delay(attempt, error, rnd) is None


@pytest.mark.parametrize("code", sorted(error_table()))
def test_by_default_exactly_the_retryable_errors_are_tried_again(code: str) -> None:
    for retryable in (False, True):
        covered = EXACT.covers({"code": code, "retryable": retryable})
        assert covered == (retryable and code not in NEVER_RETRIED)


def test_codes_narrow_what_is_tried_again() -> None:
    retry = Retry(codes=frozenset({"timeout"}), jitter=0)
    assert retry.delay(1, RunTimeoutError("x"), 0) == 1
    assert retry.delay(1, OverloadedError("x"), 0) is None


def test_the_error_of_an_outcome_is_treated_like_the_error() -> None:
    for error in (OverloadedError("x", retry_after=7), AuthenticationError("x"), ServerError("x", retryable=False)):
        assert EXACT.delay(1, error.to_dict(), 0) == EXACT.delay(1, error, 0)


def test_jitter_spreads_waits_that_would_end_together() -> None:
    retry = Retry(jitter=0.5)
    assert [retry.delay(2, ServerError("x"), rnd) for rnd in (0, 0.5, 1)] == [2, 1.5, 1]
    asked = RateLimitError("x", retry_after=10)
    assert [retry.delay(1, asked, rnd) for rnd in (0, 0.5, 1)] == [10, 12.5, 15]


# --- The driver ---


async def test_it_waits_one_two_and_four_seconds() -> None:
    flaky = Flaky(*[OverloadedError("busy")] * 3)
    assert await retry_with_backoff(flaky, EXACT) == "answer"
    assert flaky.waits == [1, 2, 4]


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_it_works_on_asyncio() -> None:
    flaky = Flaky(OverloadedError("busy"), OverloadedError("busy"))
    with anyio.fail_after(10):
        assert await retry_with_backoff(flaky, Retry(base_delay_s=0.001)) == "answer"
    assert len(flaky.called_at) == 3


async def test_after_the_last_retry_the_last_error_is_told() -> None:
    errors = [ServerError(f"number {n}", retry_after=float(n)) for n in range(1, 5)]
    flaky = Flaky(*errors)
    with pytest.raises(RetryExhaustedError, match=r"failed 4 times.*number 4") as caught:
        await retry_with_backoff(flaky, EXACT)
    error = caught.value
    assert error.__cause__ is errors[-1]
    assert error.details == {"attempts": 4, "last_error": errors[-1].to_dict()}
    assert (error.retryable, error.scope, error.retry_after) == (False, "provider", 4)
    assert flaky.waits == [1, 2, 4]


@pytest.mark.parametrize("hopeless", HOPELESS, ids=lambda error: type(error).__name__)
async def test_what_cannot_get_better_is_raised_at_once(hopeless: Exception) -> None:
    for before in ([], [OverloadedError("busy")], [OverloadedError("busy")] * 3):
        flaky = Flaky(*before, hopeless)
        with pytest.raises(type(hopeless)) as caught:
            await retry_with_backoff(flaky, EXACT)
        assert caught.value is hopeless
        assert len(flaky.called_at) == len(before) + 1


async def test_it_waits_as_long_as_the_error_asks() -> None:
    flaky = Flaky(RateLimitError("slow down", retry_after=45), CircuitOpenError("open", retry_after=12))
    assert await retry_with_backoff(flaky, EXACT) == "answer"
    assert flaky.waits == [45, 12]


async def test_a_wait_that_is_too_long_is_not_waited_for() -> None:
    limit = RateLimitError("5-hour limit", retry_after=7200)
    flaky = Flaky(OverloadedError("busy"), limit)
    start = anyio.current_time()
    with pytest.raises(RateLimitError) as caught:
        await retry_with_backoff(flaky, EXACT)
    assert caught.value is limit
    assert anyio.current_time() - start == 1


async def test_without_retries_the_error_is_raised_as_it_is() -> None:
    with pytest.raises(OverloadedError):
        await retry_with_backoff(Flaky(OverloadedError("busy")), Retry(max_retries=0))


async def test_each_wait_is_told_beforehand() -> None:
    told: list[tuple[int, float, str]] = []

    def tell(attempt: int, delay: float, error: OrchestratorError) -> None:
        told.append((attempt, delay, error.code))

    flaky = Flaky(OverloadedError("busy"), RateLimitError("slow down", retry_after=10))
    await retry_with_backoff(flaky, Retry(jitter=0.5), rnd=lambda: 1.0, on_retry=tell)
    assert told == [(1, 0.5, "overloaded"), (2, 15, "rate_limit")]
    assert flaky.waits == [0.5, 15]


async def test_cancelling_ends_it_while_it_waits() -> None:
    flaky = Flaky(*[OverloadedError("busy")] * 9)
    with anyio.move_on_after(2.5) as scope:
        await retry_with_backoff(flaky, EXACT)
    assert scope.cancelled_caught
    assert len(flaky.called_at) == 2


@pytest.mark.parametrize("kind", [OverloadedError, BackendError])
async def test_an_error_may_say_of_itself_whether_to_try_again(kind: Callable[..., OrchestratorError]) -> None:
    assert await retry_with_backoff(Flaky(kind("x", retryable=True)), EXACT) == "answer"
    with pytest.raises(BackendError):
        await retry_with_backoff(Flaky(kind("x", retryable=False)), EXACT)
