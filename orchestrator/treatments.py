"""The table of what each error means: to breakers, to retries and to falling back to the API."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from orchestrator.errors import OrchestratorError

Verdict = Literal["failure", "success", "neutral"]

#: Codes that speak against the backend or the account, and that time may heal. A person has to act on a refused
#: login or an empty account, and when that is done the next call should go out at once: these open nothing. A run
#: that took too long may only have had much to do.
FAILURES = frozenset({"cli_start", "cli_exit", "rate_limit", "overloaded", "server_error", "connection", "stalled"})
#: Codes of runs that failed although the provider answered: it works.
ANSWERED = frozenset({"model_not_found", "invalid_request", "refusal", "max_turns", "structured_output"})
#: Codes no policy retries, even where one error says it could be: the same task meets the same end, or a person has
#: asked for it to end.
NEVER_RETRIED = frozenset(
    {
        *("authentication", "permission", "billing", "model_not_found", "cli_not_found"),
        *("invalid_request", "message_too_large", "prompt", "config", "plan", "scenario", "agent"),
        *("agent_not_found", "run_not_found", "session_not_found", "depth_limit", "budget_exceeded"),
        *("cancelled", "retry_exhausted"),
    }
)
#: Codes after which the same task may be sent to the API instead: the CLI did nothing yet. Not after a CLI that
#: died midway, which may have changed files, and not after our own limits, which hold for the API too.
FALLBACK = frozenset({"cli_not_found", "cli_start", "circuit_open"})


@dataclass(frozen=True, slots=True)
class Treatment:
    """What an error means to a ``breaker``, whether it is ``retryable``, and whether the API may be a ``fallback``.

    ``failure`` counts against the backend and ``success`` for it; ``neutral`` says nothing about it.
    """

    breaker: Verdict
    retryable: bool
    fallback: bool


def treatment(error: BaseException | Mapping[str, Any]) -> Treatment:
    """What the error means. Takes errors and their plain data (``OrchestratorError.to_dict()``, as on outcomes).

    An exception that is not ours says nothing about the backend and is never retried.
    """
    if isinstance(error, OrchestratorError):
        error = error.to_dict()
    elif isinstance(error, BaseException):
        return Treatment("neutral", retryable=False, fallback=False)
    code = error.get("code", "")
    if code == "cli_start" and error.get("scope") in ("request", "agent"):
        code = ""  # what the task or the agent's file asked for made it impossible, and no other will suffer
    return Treatment(
        "failure" if code in FAILURES else "success" if code in ANSWERED else "neutral",
        retryable=bool(error.get("retryable", False)) and code not in NEVER_RETRIED,
        fallback=code in FALLBACK,
    )


def error_table() -> dict[str, Treatment]:
    """The treatment of every error code there is, by code."""
    return {
        each.code: treatment({"code": each.code, "retryable": each.retryable})
        for each in sorted(_tree(OrchestratorError), key=lambda kind: kind.code)
    }


def _tree(kind: type[OrchestratorError]) -> Iterator[type[OrchestratorError]]:
    yield kind
    for below in kind.__subclasses__():
        yield from _tree(below)
