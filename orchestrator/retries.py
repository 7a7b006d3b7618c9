"""Trying again: which errors, how often, and how long to wait between. The policy is data; one driver waits."""

import random
from collections.abc import Awaitable, Callable, Mapping
from typing import Annotated, Any, TypeVar

import anyio
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from orchestrator.errors import OrchestratorError, RetryExhaustedError
from orchestrator.treatments import NEVER_RETRIED, treatment

T = TypeVar("T")

#: Called before each wait with the failed attempt (1 is the first), the seconds to wait and the error.
OnRetry = Callable[[int, float, OrchestratorError], None]


def _may_be_retried(codes: frozenset[str]) -> frozenset[str]:
    if hopeless := sorted(codes & NEVER_RETRIED):
        raise ValueError(f"never retried, because trying again cannot help: {', '.join(hopeless)}")
    return codes


class Retry(BaseModel):
    """When to try a failed call again, as data. Times are seconds.

    Only errors that say ``retryable`` are retried, never a refused login, permission or request, nor one that is no
    OrchestratorError. ``codes`` narrows that down. Without jitter the waits are 1, 2, 4 ... s, up to
    ``max_delay_s``. A wait the error itself asks for (``retry_after``) is the least; if it is longer than
    ``max_retry_after_s``, there is no retry.

    Raises pydantic's ValidationError for numbers out of range and codes that are never retried.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    codes: Annotated[frozenset[str], AfterValidator(_may_be_retried)] | None = Field(
        None, description="Error codes to retry; not set: every retryable error."
    )
    max_retries: int = Field(3, ge=0, description="Attempts after the first.")
    base_delay_s: float = Field(1.0, ge=0, description="Wait before the first retry.")
    max_delay_s: float = Field(30.0, ge=0, description="Longest wait of our own choice.")
    exponential_base: float = Field(2.0, ge=1, description="Each wait is this many times the one before.")
    jitter: float = Field(
        0.1, ge=0, le=1, description="Share of a wait that is left to chance, so that many do not return together."
    )
    max_retry_after_s: float = Field(60.0, ge=0, description="Longest retry_after worth waiting for.")

    def covers(self, error: BaseException | Mapping[str, Any]) -> bool:
        """Whether the error is one to try again after, on whichever attempt."""
        data = _data(error)
        return data is not None and treatment(data).retryable and (self.codes is None or data["code"] in self.codes)

    def delay(self, attempt: int, error: BaseException | Mapping[str, Any], rnd: float) -> float | None:
        """Seconds to wait after failed attempt number ``attempt`` (1 is the first); None: do not try again.

        ``error`` may be an error or its plain data (``OrchestratorError.to_dict()``, as on outcomes). ``rnd`` is
        the chance in the wait, from 0 to 1: jitter shortens our own waits and lengthens those the error asks for.
        """
        data = _data(error)
        if data is None or attempt > self.max_retries or not self.covers(data):
            return None
        asked = data.get("retry_after") or 0.0
        if asked > self.max_retry_after_s:
            return None
        return float(max(self._backoff(attempt) * (1 - self.jitter * rnd), asked * (1 + self.jitter * rnd)))

    def _backoff(self, attempt: int) -> float:
        try:
            return min(self.max_delay_s, self.base_delay_s * self.exponential_base ** (attempt - 1))
        except OverflowError:
            return self.max_delay_s if self.base_delay_s else 0.0


def _data(error: BaseException | Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The error as plain data; None for one that is not ours."""
    if isinstance(error, OrchestratorError):
        return error.to_dict()
    return None if isinstance(error, BaseException) else error


async def retry_with_backoff(
    func: Callable[[], Awaitable[T]],
    retry: Retry | None = None,
    *,
    rnd: Callable[[], float] = random.random,
    on_retry: OnRetry | None = None,
) -> T:
    """Await ``func()``, again after errors that ``retry`` covers, and return its first result.

    Raises RetryExhaustedError when the last retry has failed too, and the error itself where it is not retried: it
    is not covered, it asks for too long a wait, or ``max_retries`` is 0. Cancelling ends it at once.
    """
    policy = retry or Retry()
    attempt = 1
    while True:
        try:
            return await func()
        except OrchestratorError as error:
            delay = policy.delay(attempt, error, rnd())
            if delay is None:
                if attempt <= policy.max_retries or attempt == 1 or not policy.covers(error):
                    raise
                raise _exhausted(attempt, error) from error
            if on_retry is not None:
                on_retry(attempt, delay, error)
        attempt += 1
        await anyio.sleep(delay)


def _exhausted(attempts: int, error: OrchestratorError) -> RetryExhaustedError:
    return RetryExhaustedError(
        f"failed {attempts} times, the last time with: {error.message}",
        scope=error.scope,
        retry_after=error.retry_after,
        details={"attempts": attempts, "last_error": error.to_dict()},
    )
