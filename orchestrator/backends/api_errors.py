"""What a failed request to the Messages API means, in the terms of our errors.

The provider names an error by its type; the HTTP status counts where there is none, as from a proxy. An error
within a stream has the status 200 and only the type. Nothing here loads the SDK before something has failed in it.
"""

import math
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any

from orchestrator.errors import (
    AuthenticationError,
    BackendError,
    BillingError,
    ConnectionFailedError,
    InvalidRequestError,
    ModelNotFoundError,
    OverloadedError,
    PermissionDeniedError,
    RateLimitError,
    RefusalError,
    ServerError,
    StalledError,
)

Kind = type[BackendError]

#: https://platform.claude.com/docs/en/api/errors
_BY_TYPE: Mapping[str, Kind] = {
    "invalid_request_error": InvalidRequestError,
    "request_too_large": InvalidRequestError,
    "authentication_error": AuthenticationError,
    "billing_error": BillingError,
    "permission_error": PermissionDeniedError,
    "not_found_error": ModelNotFoundError,
    "rate_limit_error": RateLimitError,
    "api_error": ServerError,
    "timeout_error": ServerError,
    "overloaded_error": OverloadedError,
}

#: Other statuses below 500 are InvalidRequestError, from there ServerError. 409 is the provider's own conflict.
_BY_STATUS: Mapping[int, Kind] = {
    401: AuthenticationError,
    402: BillingError,
    403: PermissionDeniedError,
    408: ConnectionFailedError,
    409: ServerError,
    429: RateLimitError,
    529: OverloadedError,
}

#: What our classes advise about the CLI does not help here.
_ADVICE: Mapping[Kind, str] = {
    AuthenticationError: "Correct ANTHROPIC_API_KEY in claude.env, or where claude.pass_env takes it from.",
    ModelNotFoundError: "Correct fallback.models in orchestrator.yaml, or choose another model.",
    StalledError: "Try again; fallback.timeout_s bounds the wait.",
}


def error_of_request(problem: Exception, *, now: float) -> BackendError:
    """Our error for what the SDK or its HTTP client raised. ``now`` is in seconds since 1970."""
    import anthropic  # noqa: PLC0415
    import httpx2  # noqa: PLC0415

    if isinstance(problem, anthropic.APIStatusError):
        return error_of_answer(
            problem.status_code, problem.type, _words(problem), problem.response.headers, now=now
        )
    # Before the answer begins the SDK wraps what its HTTP client raises, afterwards it does not.
    cause = problem.__cause__ if isinstance(problem, anthropic.APIConnectionError) else problem
    if isinstance(cause, httpx2.TimeoutException) and not isinstance(cause, httpx2.ConnectTimeout):
        return _error(StalledError, "the provider was silent for too long")
    if isinstance(cause, httpx2.HTTPError) or isinstance(problem, anthropic.APIConnectionError):
        return _error(ConnectionFailedError, f"the connection to the provider failed: {_named(cause)}")
    return _error(ServerError, f"the provider's answer could not be read: {_named(problem)}")


def error_of_answer(
    status: int, error_type: str | None, words: str, headers: Mapping[str, str], *, now: float
) -> BackendError:
    """Our error for an answer that is one: its HTTP status, its type as the API names it, its words and headers."""
    kind = _BY_TYPE.get(error_type or "") or _BY_STATUS.get(status)
    if kind is None:
        kind = InvalidRequestError if 300 <= status < 500 else ServerError
    if kind is InvalidRequestError and "credit balance is too low" in words:
        kind = BillingError
    details = {"status": status, "reason": error_type, "request_id": headers.get("request-id")}
    return _error(
        kind,
        f"the provider answers {error_type or status}: {words}",
        retry_after=retry_after(headers.get("retry-after"), now) if kind.retryable else None,
        details={name: value for name, value in details.items() if value is not None},
    )


def error_of_ending(stop_reason: str | None, text: str) -> BackendError | None:
    """What is wrong with an answer that ended for this reason; None if nothing is."""
    match stop_reason:
        case None:
            return _error(ConnectionFailedError, "the provider's answer broke off before its end")
        case "max_tokens":
            advice = "Ask for less in one answer, or raise fallback.max_tokens; the text so far is kept."
            return InvalidRequestError("the answer was cut at fallback.max_tokens", advice=advice)
        case "model_context_window_exceeded":
            return InvalidRequestError("the prompt and its answer are longer than the model's context window")
        case "refusal":
            return RefusalError(text or "the model declined to answer")
        case _:
            return None


def may_have_cost(problem: Exception) -> bool:
    """Whether the model may have worked on a request that failed so: it was sent, and not refused."""
    import anthropic  # noqa: PLC0415
    import httpx2  # noqa: PLC0415

    unsent = (
        httpx2.ConnectError
        | httpx2.ConnectTimeout
        | httpx2.PoolTimeout
        | httpx2.ProxyError
        | httpx2.UnsupportedProtocol
    )
    return not isinstance(problem, anthropic.APIStatusError) and not isinstance(problem.__cause__, unsent)


def retry_after(value: str | None, now: float) -> float | None:
    """Seconds to wait by a ``retry-after`` header: a number of them, or a date. None for anything else."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - now
        except ValueError:
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


def _error(kind: Kind, words: str, **more: Any) -> BackendError:
    return kind(words, advice=_ADVICE.get(kind), **more)


def _words(problem: Any) -> str:
    return str(problem.api_message or problem.message)[:2000]


def _named(problem: BaseException | None) -> str:
    return f"{type(problem).__name__}: {problem}" if str(problem) else type(problem).__name__
