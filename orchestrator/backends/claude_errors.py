"""What a failed turn of Claude Code means, in the terms of our errors.

The CLI says it in several places, of different worth. They are asked in this order: what ended the turn
(``subtype``, ``terminal_reason``, ``stop_reason``), the CLI's own name for the failure (``api_error``), the HTTP
status and the error name on the synthetic assistant message, the same of the last retry, and only then the words.
A failed model request has ``subtype`` ``success``; only ``is_error`` tells.
"""

import re
from collections.abc import Mapping
from typing import Any

from orchestrator.errors import (
    AuthenticationError,
    BackendError,
    BillingError,
    BudgetExceededError,
    ConnectionFailedError,
    InvalidRequestError,
    MaxTurnsError,
    ModelNotFoundError,
    OrchestratorError,
    OverloadedError,
    PermissionDeniedError,
    RateLimitError,
    RefusalError,
    RunCancelledError,
    ServerError,
    SessionNotFoundError,
    StalledError,
    StructuredOutputError,
)
from orchestrator.messages import ApiRetry, RateLimitEvent, ResultMessage

Kind = type[OrchestratorError]

_BY_SUBTYPE: Mapping[str, Kind] = {
    "error_max_turns": MaxTurnsError,
    "error_max_budget_usd": BudgetExceededError,
    "error_max_structured_output_retries": StructuredOutputError,
}

_BY_TERMINAL_REASON: Mapping[str, Kind] = {
    "max_turns": MaxTurnsError,
    "budget_exhausted": BudgetExceededError,
    "structured_output_retry_exhausted": StructuredOutputError,
    "aborted_streaming": RunCancelledError,
    "aborted_tools": RunCancelledError,
    "prompt_too_long": InvalidRequestError,
    "image_error": InvalidRequestError,
    "blocking_limit": InvalidRequestError,
}

_BY_API_ERROR: Mapping[str, Kind] = {
    "connection_failed": ConnectionFailedError,
    "tls_untrusted_ca": ConnectionFailedError,
    "stream_idle_timeout": StalledError,
    "usage_limit_reached": RateLimitError,
    "max_output_tokens": InvalidRequestError,
}

#: https://platform.claude.com/docs/en/api/errors: what the provider calls an error it names in a stream, too.
_BY_API_ERROR_TYPE: Mapping[str, Kind] = {
    "authentication_error": AuthenticationError,
    "billing_error": BillingError,
    "permission_error": PermissionDeniedError,
    "invalid_request_error": InvalidRequestError,
    "request_too_large": InvalidRequestError,
    "rate_limit_error": RateLimitError,
    "overloaded_error": OverloadedError,
    "timeout_error": ServerError,
    "api_error": ServerError,
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

#: The names used on assistant messages and retries. ``unknown`` says nothing and is not here.
_BY_NAME: Mapping[str, Kind] = {
    "authentication_failed": AuthenticationError,
    "cloud_credential_error": AuthenticationError,
    "oauth_org_not_allowed": PermissionDeniedError,
    "account_on_hold": PermissionDeniedError,
    "verification_required": PermissionDeniedError,
    "billing_error": BillingError,
    "rate_limit": RateLimitError,
    "overloaded": OverloadedError,
    "model_not_found": ModelNotFoundError,
    "invalid_request": InvalidRequestError,
    "max_output_tokens": InvalidRequestError,
    # Without a status there was no answer: the CLI gives this name to refused and broken connections.
    "server_error": ConnectionFailedError,
}

#: Names more telling than the status they come with: 400 for missing credit, 404 for a wrong address.
_BEFORE_STATUS = frozenset({"billing_error", "model_not_found"})

#: Failures of a request that are the same however often it is sent.
_FATAL: frozenset[Kind] = frozenset(
    {AuthenticationError, PermissionDeniedError, BillingError, ModelNotFoundError, InvalidRequestError}
)

_BY_WORDS: tuple[tuple[re.Pattern[str], Kind], ...] = tuple(
    (re.compile(pattern, re.IGNORECASE), kind)
    for pattern, kind in (
        (r"\bno conversation found\b|\bno message found with message\.uuid\b", SessionNotFoundError),
        (r"\bnot logged in\b|\binvalid api key\b|\bfailed to authenticate\b", AuthenticationError),
        (r"\bcredit balance is too low\b", BillingError),
        (r"\b(?:rate|usage) limit\b|\bhit your .{0,20}\blimit\b", RateLimitError),
        (r"\boverloaded\b", OverloadedError),
        (r"\bprompt is too long\b|\bcontext window limit\b|\brequest too large\b", InvalidRequestError),
        (r"\bissue with the selected model\b", ModelNotFoundError),
        (r"\bstream idle timeout\b", StalledError),
        (
            r"\btimed out\b|\bconnection (?:refused|to the API was lost|error)\b|\bunable to connect\b"
            r"|\bempty or malformed response\b",
            ConnectionFailedError,
        ),
    )
)

#: All the CLI says of a provider that took a request and then said nothing more; its fields call it unreachable.
_SILENCE = re.compile(r"request timed out\b", re.IGNORECASE)
_STATUS_IN_WORDS = re.compile(r"\bAPI Error: (\d{3})\b")
_WAIT_IN_WORDS = re.compile(
    r"\b(?:retry|try again) (?:after|in) (\d+) ?(s|seconds?|m|minutes?|h|hours?)\b", re.IGNORECASE
)
_SECONDS = {"s": 1, "m": 60, "h": 3600}

#: Where an error of a general class needs other attributes than its class has.
_PARTICULARS: Mapping[str, Mapping[str, Any]] = {
    "tls_untrusted_ca": {
        "retryable": False,
        "scope": "host",
        "advice": "Name the certificate of your proxy or gateway in NODE_EXTRA_CA_CERTS.",
    },
    "max_output_tokens": {
        "advice": "Ask for less in one answer, or raise CLAUDE_CODE_MAX_OUTPUT_TOKENS in claude.env.",
    },
}


def error_of(
    result: ResultMessage,
    last_retry: ApiRetry | None = None,
    assistant_error: str | None = None,
    *,
    rate_limit: RateLimitEvent | None = None,
    now: float | None = None,
) -> OrchestratorError | None:
    """What went wrong in a turn, or None if nothing did.

    ``last_retry`` and ``assistant_error`` are the last of this turn. ``rate_limit`` and ``now`` (seconds since
    1970) give RateLimitError its ``retry_after`` where a usage window is used up. The message is the CLI's own
    text; ``details`` holds the fields the decision was made from.
    """
    if not result.is_error and not result.subtype.startswith("error_"):
        return None
    words = _words(result)
    kind = _kind(result, words, last_retry, assistant_error)
    details = {
        "subtype": result.subtype,
        "terminal_reason": result.terminal_reason,
        "status": result.api_error_status,
        "reason": result.api_error or assistant_error,
    }
    return (kind or BackendError)(
        words,
        details={name: value for name, value in details.items() if value is not None},
        retry_after=_retry_after(words, rate_limit, now) if kind is RateLimitError else None,
        **_particulars(result, kind),
    )


def fatal(retry: ApiRetry | None) -> OrchestratorError | None:
    """The error behind a retry that cannot help, None if waiting may: the CLI itself would go on for minutes.

    A refused login is fatal from its second refusal on, because after the first the CLI may renew its token.
    """
    if retry is None:
        return None
    kind = _of_request(retry.error_status, retry.error)
    if kind not in _FATAL or (kind is AuthenticationError and retry.attempt == 1):
        return None
    return kind(
        f"the provider refuses the request, trying again cannot help: {retry.error} (HTTP {retry.error_status})",
        details={"status": retry.error_status, "reason": retry.error},
    )


def _kind(result: ResultMessage, words: str, retry: ApiRetry | None, assistant_error: str | None) -> Kind | None:
    return (
        _of_ending(result)
        or _BY_API_ERROR.get(result.api_error or "")
        or (StalledError if result.api_error_status is None and _SILENCE.match(words) else None)
        or _of_request(result.api_error_status, assistant_error, result.api_error_type)
        or _of_retry(retry, result.terminal_reason)
        or _of_words(words)
    )


def _of_ending(result: ResultMessage) -> Kind | None:
    if result.stop_reason == "refusal":
        return RefusalError
    return _BY_SUBTYPE.get(result.subtype) or _BY_TERMINAL_REASON.get(result.terminal_reason or "")


def _of_request(status: int | None, name: str | None, api_error_type: str | None = None) -> Kind | None:
    if name in _BEFORE_STATUS:
        return _BY_NAME[name]
    if status is None:
        return _BY_API_ERROR_TYPE.get(api_error_type or "") or _BY_NAME.get(name or "")
    if status < 400:
        return None
    return _BY_STATUS.get(status) or (InvalidRequestError if status < 500 else ServerError)


def _of_retry(retry: ApiRetry | None, terminal_reason: str | None) -> Kind | None:
    # A turn that ended for another reason had got over its retries.
    if retry is None or terminal_reason not in (None, "api_error", "model_error"):
        return None
    unreachable = ConnectionFailedError if retry.error_status is None else None
    return _of_request(retry.error_status, retry.error) or unreachable


def _of_words(words: str) -> Kind | None:
    if status := _STATUS_IN_WORDS.search(words):
        return _of_request(int(status[1]), None)
    return next((kind for pattern, kind in _BY_WORDS if pattern.search(words)), None)


def _words(result: ResultMessage) -> str:
    if result.terminal_reason in ("aborted_streaming", "aborted_tools"):
        return "the turn was interrupted"  # what the CLI says here is a diagnosis of itself
    errors = "; ".join(str(error) for error in result.errors or ())
    return result.result or errors or f"the turn failed and the CLI does not say why ({result.terminal_reason})"


def _particulars(result: ResultMessage, kind: Kind | None) -> Mapping[str, Any]:
    # What nobody can name is kept from telling against the provider.
    return _PARTICULARS.get(result.api_error or "", {}) if kind else {"scope": "request"}


def _retry_after(words: str, rate_limit: RateLimitEvent | None, now: float | None) -> float | None:
    info = rate_limit.rate_limit_info if rate_limit else {}
    resets_at = info.get("resetsAt")
    if info.get("status") == "rejected" and isinstance(resets_at, int | float) and now is not None:
        return max(0.0, resets_at - now)
    if wait := _WAIT_IN_WORDS.search(words):
        return float(int(wait[1]) * _SECONDS[wait[2][0].lower()])
    return None
