"""What a failed turn of Claude Code means, in the terms of our errors.

The CLI says it in several places, of different worth. They are asked in this order: what ended the turn
(``subtype``, ``terminal_reason``, ``stop_reason``), the CLI's own name for the failure (``api_error``), the HTTP
status and the error name on the synthetic assistant message, the same of the last retry, and only then the words.
A failed model request has ``subtype`` ``success``; only ``is_error`` tells.
"""

import re
from collections.abc import Mapping
from typing import Any

from orchestrator.backends.claude_error_names import (
    BEFORE_STATUS,
    BY_API_ERROR,
    BY_API_ERROR_TYPE,
    BY_NAME,
    BY_STATUS,
    BY_SUBTYPE,
    BY_TERMINAL_REASON,
    BY_WORDS,
    FATAL,
    PARTICULARS,
    START_REFUSALS,
    Kind,
)
from orchestrator.errors import (
    AuthenticationError,
    BackendError,
    BillingError,
    ConnectionFailedError,
    InvalidRequestError,
    OrchestratorError,
    RateLimitError,
    RefusalError,
    ServerError,
    StalledError,
)
from orchestrator.messages import ApiRetry, RateLimitEvent, ResultMessage

#: All the CLI says of a provider that took a request and then said nothing more; its fields call it unreachable.
_SILENCE = re.compile(r"request timed out\b", re.IGNORECASE)
_STATUS_IN_WORDS = re.compile(r"\bAPI Error: (\d{3})\b")
_WAIT_IN_WORDS = re.compile(
    r"\b(?:retry|try again) (?:after|in) (\d+) ?(s|seconds?|m|minutes?|h|hours?)\b", re.IGNORECASE
)
_SECONDS = {"s": 1, "m": 60, "h": 3600}


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
        retry_after=_retry_after(words, rate_limit, now, last_retry) if kind is RateLimitError else None,
        **_particulars(result, kind),
    )


def fatal(retry: ApiRetry | None) -> OrchestratorError | None:
    """The error behind a retry that cannot help, None if waiting may: the CLI itself would go on for minutes.

    A refused login is fatal from its second refusal on, because after the first the CLI may renew its token.
    """
    if retry is None:
        return None
    kind = _of_request(retry.error_status, retry.error)
    if retry.error_status == 403 and retry.error == "authentication_failed":
        kind = AuthenticationError  # of all that is answered with 403 only a revoked login is tried again
    if kind not in FATAL or (retry.error_status == 401 and retry.attempt == 1):
        return None
    return kind(
        f"the provider refuses the request, trying again cannot help: {retry.error} (HTTP {retry.error_status})",
        details={"status": retry.error_status, "reason": retry.error},
    )


def start_refusal(stderr: str) -> dict[str, Any]:
    """What CLIStartError is told beside its class's own, where the CLI's last words say whose fault it is.

    ``scope`` and ``advice``, as keyword arguments of an error; empty where nothing is known.
    """
    found = (particulars for pattern, particulars in START_REFUSALS if pattern.search(stderr))
    return dict(next(found, {}))


def _kind(result: ResultMessage, words: str, retry: ApiRetry | None, assistant_error: str | None) -> Kind | None:
    return (
        _of_ending(result)
        or BY_API_ERROR.get(result.api_error or "")
        or (StalledError if result.api_error_status is None and _SILENCE.match(words) else None)
        or _of_request(result.api_error_status, assistant_error, result.api_error_type)
        or _of_retry(retry, result.terminal_reason)
        or _of_words(words)
    )


def _of_ending(result: ResultMessage) -> Kind | None:
    if result.stop_reason == "refusal":
        return RefusalError
    return BY_SUBTYPE.get(result.subtype) or BY_TERMINAL_REASON.get(result.terminal_reason or "")


def _of_request(status: int | None, name: str | None, api_error_type: str | None = None) -> Kind | None:
    if name in BEFORE_STATUS:
        return BY_NAME[name]
    if api_error_type == "billing_error":
        return BillingError  # gateways answer 429 when a cap on spending is reached; waiting does not help
    if status is None:
        return BY_API_ERROR_TYPE.get(api_error_type or "") or BY_NAME.get(name or "")
    if status < 400:
        return None
    return BY_STATUS.get(status) or (InvalidRequestError if status < 500 else ServerError)


def _of_retry(retry: ApiRetry | None, terminal_reason: str | None) -> Kind | None:
    # A turn that ended for another reason had got over its retries.
    if retry is None or terminal_reason not in (None, "api_error", "model_error"):
        return None
    unreachable = ConnectionFailedError if retry.error_status is None else None
    return _of_request(retry.error_status, retry.error) or unreachable


def _of_words(words: str) -> Kind | None:
    if status := _STATUS_IN_WORDS.search(words):
        return _of_request(int(status[1]), None)
    return next((kind for pattern, kind in BY_WORDS if pattern.search(words)), None)


def _words(result: ResultMessage) -> str:
    if result.terminal_reason in ("aborted_streaming", "aborted_tools"):
        return "the turn was interrupted"  # what the CLI says here is a diagnosis of itself
    errors = "; ".join(str(error) for error in result.errors or ())
    return result.result or errors or f"the turn failed and the CLI does not say why ({result.terminal_reason})"


def _particulars(result: ResultMessage, kind: Kind | None) -> Mapping[str, Any]:
    # What nobody can name is kept from telling against the provider.
    return PARTICULARS.get(result.api_error or "", {}) if kind else {"scope": "request"}


def _retry_after(
    words: str, rate_limit: RateLimitEvent | None, now: float | None, retry: ApiRetry | None
) -> float | None:
    info = rate_limit.rate_limit_info if rate_limit else {}
    resets_at = info.get("resetsAt")
    if info.get("status") == "rejected" and isinstance(resets_at, int | float) and now is not None:
        return max(0.0, resets_at - now)
    if wait := _WAIT_IN_WORDS.search(words):
        return float(int(wait[1]) * _SECONDS[wait[2][0].lower()])
    return _pause_asked_for(retry)


def _pause_asked_for(retry: ApiRetry | None) -> float | None:
    """Seconds before the last attempt, if the provider asked for them: they are more than the CLI's own pause.

    Its own doubles from half a second up to 32, and a quarter is added at random. A long wait the provider asks
    for is not among the retries: the CLI gives up at once, and does not say for how long.
    """
    if retry is None or retry.error_status != 429 or retry.retry_delay_ms is None or retry.attempt is None:
        return None
    if retry.attempt < (retry.max_retries or 0):
        return None  # that request was answered in the end; another one was refused
    own = 1.25 * min(32.0, 0.5 * 2.0 ** min(retry.attempt - 1, 6))
    seconds = float(retry.retry_delay_ms) / 1000
    return seconds if seconds > own else None
