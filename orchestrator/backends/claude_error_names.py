"""The names under which Claude Code reports failures, and what each means in the terms of our errors. Tables only.

``claude_errors`` says in which order they are asked.
"""

import re
from collections.abc import Mapping
from typing import Any

from orchestrator.errors import (
    AuthenticationError,
    BackendError,
    BillingError,
    BudgetExceededError,
    CLINotFoundError,
    ConnectionFailedError,
    InvalidRequestError,
    MaxTurnsError,
    ModelNotFoundError,
    OrchestratorError,
    OverloadedError,
    PermissionDeniedError,
    RateLimitError,
    RunCancelledError,
    SandboxUnavailableError,
    ServerError,
    SessionNotFoundError,
    StalledError,
    StructuredOutputError,
)

Kind = type[OrchestratorError]

#: How a turn ended.
BY_SUBTYPE: Mapping[str, Kind] = {
    "error_max_turns": MaxTurnsError,
    "error_max_budget_usd": BudgetExceededError,
    "error_max_structured_output_retries": StructuredOutputError,
}

BY_TERMINAL_REASON: Mapping[str, Kind] = {
    "max_turns": MaxTurnsError,
    "budget_exhausted": BudgetExceededError,
    "structured_output_retry_exhausted": StructuredOutputError,
    "aborted_streaming": RunCancelledError,
    "aborted_tools": RunCancelledError,
    "prompt_too_long": InvalidRequestError,
    "image_error": InvalidRequestError,
    "blocking_limit": InvalidRequestError,
}

#: The CLI's own names; it adds to them, and says that an unknown one means nothing.
BY_API_ERROR: Mapping[str, Kind] = {
    "connection_failed": ConnectionFailedError,
    "computer_slept": ConnectionFailedError,
    "gateway_content_type": ConnectionFailedError,
    "network_edge_blocked": ConnectionFailedError,
    "no_response": ConnectionFailedError,
    "tls_untrusted_ca": ConnectionFailedError,
    "tls_cert_signature_failure": ConnectionFailedError,
    "stream_idle_timeout": StalledError,
    "empty_completion": ServerError,
    "usage_limit_reached": RateLimitError,
    "long_context_credits_required": BillingError,
    "model_requires_usage_credits": BillingError,
    "api_key_auth_disabled": AuthenticationError,
    "gateway_session_expired": AuthenticationError,
    "gateway_signin_required": AuthenticationError,
    "invalid_credential_header": AuthenticationError,
    "org_disabled_credential": AuthenticationError,
    "provider_credentials": AuthenticationError,
    "stored_login_refused": AuthenticationError,
    "model_substitution_disabled": ModelNotFoundError,
    "no_allowed_fallback": ModelNotFoundError,
    "claude_code_version_too_old": CLINotFoundError,
    "autocompact_thrashing": InvalidRequestError,
    "dlp_request_denied": InvalidRequestError,
    "max_output_tokens": InvalidRequestError,
    "message_over_context_limit": InvalidRequestError,
    "pdf_password_protected": InvalidRequestError,
    "pdf_too_large": InvalidRequestError,
    "malformed_tool_use_exhausted": BackendError,
}

#: https://platform.claude.com/docs/en/api/errors: what the provider calls an error it names in a stream, too.
BY_API_ERROR_TYPE: Mapping[str, Kind] = {
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
BY_STATUS: Mapping[int, Kind] = {
    401: AuthenticationError,
    402: BillingError,
    403: PermissionDeniedError,
    408: ConnectionFailedError,
    409: ServerError,
    429: RateLimitError,
    529: OverloadedError,
}

#: The names used on assistant messages and retries. ``unknown`` says nothing and is not here.
BY_NAME: Mapping[str, Kind] = {
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
BEFORE_STATUS = frozenset({"billing_error", "model_not_found"})

#: Failures of a request that are the same however often it is sent.
FATAL: frozenset[Kind] = frozenset(
    {AuthenticationError, PermissionDeniedError, BillingError, ModelNotFoundError, InvalidRequestError}
)

#: Where nothing else tells: the CLI's words.
BY_WORDS: tuple[tuple[re.Pattern[str], Kind], ...] = tuple(
    (re.compile(pattern, re.IGNORECASE), kind)
    for pattern, kind in (
        (r"\bno conversation found\b|\bno message found with message\.uuid\b", SessionNotFoundError),
        (r"\bnot logged in\b|\binvalid api key\b|\bfailed to authenticate\b", AuthenticationError),
        (r"\bsandbox required but unavailable\b", SandboxUnavailableError),
        (r"\bcredit balance is too low\b", BillingError),
        (r"\b(?:rate|usage) limit\b|\bhit your .{0,20}\blimit\b", RateLimitError),
        (r"\boverloaded\b", OverloadedError),
        (r"\bprompt is too long\b|\bcontext window limit\b|\brequest too large\b", InvalidRequestError),
        (r"\bissue with the selected model\b", ModelNotFoundError),
        (r"\bstream idle timeout\b", StalledError),
        (
            r"\btimed out\b|\bconnection (?:refused|to the API was lost|error)\b|\bunable to connect\b"
            r"|\bempty or malformed response\b|\bJSON Parse error\b",
            ConnectionFailedError,
        ),
    )
)

_UNTRUSTED: Mapping[str, Any] = {
    "retryable": False,
    "scope": "host",
    "advice": "Name the certificate of your proxy or gateway in NODE_EXTRA_CA_CERTS.",
}

#: Where an error of a general class needs other attributes than its class has.
PARTICULARS: Mapping[str, Mapping[str, Any]] = {
    "tls_untrusted_ca": _UNTRUSTED,
    "tls_cert_signature_failure": _UNTRUSTED,
    "network_edge_blocked": {
        "retryable": False,
        "scope": "host",
        "advice": "Something between here and the provider refuses the connection: check VPN, proxy and region.",
    },
    "claude_code_version_too_old": {"advice": "Update Claude Code: `claude update`, or a newer package."},
    "malformed_tool_use_exhausted": {
        "retryable": True,
        "scope": "request",
        "advice": "Try again, or choose another model: this one kept calling tools in a form nobody can read.",
    },
    "max_output_tokens": {
        "advice": "Ask for less in one answer, or raise CLAUDE_CODE_MAX_OUTPUT_TOKENS in claude.env.",
    },
}

#: Last words of a CLI that would not start → what the error is told beside its class's own.
START_REFUSALS: tuple[tuple[re.Pattern[str], Mapping[str, Any]], ...] = (
    (
        re.compile(r"--json-schema is not a valid JSON Schema"),
        {"scope": "request", "advice": "Correct output_schema: it must be a JSON Schema."},
    ),
    (
        re.compile(r"cannot be used with root/sudo privileges"),
        {"advice": "Run as another user; in a throw-away container IS_SANDBOX=1 in claude.env allows it."},
    ),
    (
        re.compile(r"\bunknown option\b"),
        {"advice": "Update Claude Code: this version does not know all options it is given."},
    ),
)
