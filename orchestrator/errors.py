"""One tree of errors. Each says whether trying again can help, how far the trouble reaches, and what to do.

The four facts are attributes, so that retry, breakers, the CLI and the MCP tools decide from the same data:

* ``retryable``: the same task, unchanged, may succeed later.
* ``scope``: what is broken: this ``request``, the ``agent`` file, the ``session``, the ``account``, the
  ``provider``, or this ``host``.
* ``retry_after``: seconds to wait before trying again, where the provider said so.
* ``advice``: one sentence a person can act on.

``exit_code`` is what ``orchestrator`` exits with when this error ends the command (README, "Exit codes").
"""

from typing import Any, ClassVar, Literal

Scope = Literal["request", "agent", "session", "account", "provider", "host"]


class OrchestratorError(Exception):
    """Base of every error this package raises on purpose."""

    code: ClassVar[str] = "error"
    exit_code: ClassVar[int] = 1
    retryable: bool = False
    scope: Scope = "request"
    advice: str = "Look at the run with `orchestrator trace show RUN_ID`."

    def __init__(
        self,
        message: str,
        *,
        retryable: bool | None = None,
        scope: Scope | None = None,
        retry_after: float | None = None,
        advice: str | None = None,
        details: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after = retry_after
        self.details = details or {}
        if retryable is not None:
            self.retryable = retryable
        if scope is not None:
            self.scope = scope
        if advice is not None:
            self.advice = advice

    def to_dict(self) -> dict[str, Any]:
        """The error as plain data: what a run row, an event and an MCP error carry."""
        data: dict[str, Any] = {
            "code": self.code,
            "message": self.message,
            "retryable": self.retryable,
            "scope": self.scope,
            "advice": self.advice,
        }
        if self.retry_after is not None:
            data["retry_after"] = self.retry_after
        if self.details:
            data["details"] = self.details
        return data


class ConfigError(OrchestratorError):
    """A setting, a file of settings or a command argument is wrong."""

    code = "config"
    exit_code = 2
    advice = "Correct the named setting; `orchestrator config show --origin` tells where values come from."


class PlanError(OrchestratorError):
    """A plan cannot be loaded. ``details["problems"]`` lists every problem as ``file:line: text``."""

    code = "plan"
    exit_code = 2
    advice = "Correct the plan file at the named lines."


class ScenarioError(OrchestratorError):
    """A scenario for the scripted model server cannot be loaded."""

    code = "scenario"
    exit_code = 2
    advice = "Correct the scenario file at the named line."


class AgentError(OrchestratorError):
    """An agent file cannot be used."""

    code = "agent"
    exit_code = 2
    scope: Scope = "agent"
    advice = "Run `orchestrator agents validate` and correct the file."


class AgentNotFoundError(AgentError):
    """No agent of that name is loaded. ``details["known"]`` names the loaded ones."""

    code = "agent_not_found"
    advice = "Choose one of the known agents, or add a markdown file to agents/."


class RunNotFoundError(OrchestratorError):
    """No run has that id."""

    code = "run_not_found"
    exit_code = 2
    advice = "List runs with `orchestrator runs list`."


class SessionNotFoundError(OrchestratorError):
    """No session has that id, or its transcript is gone."""

    code = "session_not_found"
    scope: Scope = "session"
    advice = "Start a fresh session; sessions can only be continued where their transcript is kept."


class SessionBusyError(OrchestratorError):
    """Another run holds the session. Two runs on one session would silently fork its history."""

    code = "session_busy"
    retryable = True
    scope: Scope = "session"
    advice = "Wait for the run that holds the session, or fork the session after it ends."


class SessionTurnError(OrchestratorError):
    """A session has no such turn on record. ``details`` has ``session_id`` and ``turns``, how many it has."""

    code = "session_turn"
    exit_code = 2
    advice = "Name one of its turns, the first being 1, or fork the whole session."


class PromptError(OrchestratorError):
    """The prompt cannot be delivered as it is (a NUL character, or more than the configured size)."""

    code = "prompt"
    exit_code = 2
    advice = "Correct the prompt; large material belongs in a file the agent can read."


class LimitError(OrchestratorError):
    """A limit refused the run before anything was spent."""

    code = "limit"
    advice = "Raise the limit in orchestrator.yaml or in the task, or delegate less deeply."


class DepthLimitError(LimitError):
    """Delegation would nest deeper than ``limits.max_depth``."""

    code = "depth_limit"
    advice = "Do this work yourself instead of delegating it further."


class DelegationCycleError(LimitError):
    """A run delegates its own task, or that of a run above it, back to the agent that has it. ``details.run_id``
    is the run that does."""

    code = "delegation_cycle"
    advice = "Do the work yourself, or delegate another part of it."


class QueueFullError(LimitError):
    """So many runs wait for a process that another would not begin soon. ``retry_after`` is an estimate."""

    code = "queue_full"
    retryable = True
    scope: Scope = "host"
    advice = "Try again after retry_after seconds, ask to wait (on_full: wait), or raise limits.max_queue."


class BudgetExceededError(LimitError):
    """The run's own budget or that of a run above it is used up."""

    code = "budget_exceeded"
    exit_code = 4
    advice = "Raise the budget if the work is worth it; what was done so far is kept on the run."


class RateLimitExceededError(LimitError):
    """A rate limit of our own asks for a longer wait than the caller allows. ``retry_after`` is that wait."""

    code = "rate_limit_exceeded"
    retryable = True
    scope: Scope = "host"
    advice = "Try again after retry_after seconds, wait longer, or raise the rate."


class ConcurrencyLimitExceededError(LimitError):
    """No place came free among the calls that may run at once. ``retry_after`` is an estimate."""

    code = "concurrency_limit_exceeded"
    retryable = True
    scope: Scope = "host"
    advice = "Try again after retry_after seconds, wait longer, or allow more at once."


class CircuitOpenError(OrchestratorError):
    """A circuit breaker lets no call through for now: too many failed, or a usage limit is known to be reached."""

    code = "circuit_open"
    retryable = True
    scope: Scope = "provider"
    advice = "Wait retry_after seconds; details name the circuit and what opened it."


class RetryExhaustedError(OrchestratorError):
    """Every retry failed too. The last error is the cause, and ``details["last_error"]`` as plain data."""

    code = "retry_exhausted"
    advice = "See details.last_error; trying again at once is unlikely to help."


class UnknownCostError(LimitError):
    """The model has no known price, money is limited, and ``limits.on_unknown_cost`` is ``refuse``."""

    code = "unknown_cost"
    advice = "Choose a model with a known price, or set limits.on_unknown_cost: allow; such costs stay unknown."


class ReachError(OrchestratorError):
    """A directory is none that the task may work in. ``details`` has ``path`` and ``allowed``."""

    code = "reach"
    exit_code = 2
    advice = "Name a directory inside one of those, or add it to limits.allowed_dirs in orchestrator.yaml."


class BackendError(OrchestratorError):
    """Something went wrong in the agent's CLI or behind it."""

    code = "backend"
    scope: Scope = "provider"


class CLINotFoundError(BackendError):
    """The CLI binary is missing, not executable or too old."""

    code = "cli_not_found"
    exit_code = 2
    scope: Scope = "host"
    advice = (
        "Install Claude Code, or `pip install 'orchestrator-mcp[claude]'`, or set claude.path in "
        "orchestrator.yaml; `orchestrator doctor` shows where it was looked for."
    )


class CLIStartError(BackendError):
    """The CLI did not start: it refused its arguments, its directory is missing, or it died at once."""

    code = "cli_start"
    scope: Scope = "host"
    advice = "Run `orchestrator doctor`; the end of the CLI's stderr is in the error."


class SandboxUnavailableError(BackendError):
    """The agent's file says ``sandbox: required`` and the CLI cannot run commands in a sandbox here."""

    code = "sandbox_unavailable"
    scope: Scope = "host"
    advice = (
        "Install bubblewrap and socat (macOS has what is needed), or run the agent where they are; "
        "`orchestrator doctor` says what is missing."
    )


class CLIExitError(BackendError):
    """The CLI ended before it gave a result. ``details`` has ``exit_code`` and ``stderr``."""

    code = "cli_exit"
    retryable = True
    scope: Scope = "host"
    advice = "Try again; if it repeats, the end of the CLI's stderr in the error says why."


class MessageTooLargeError(BackendError):
    """One line of the CLI's output was longer than ``claude.max_line_bytes``."""

    code = "message_too_large"
    scope: Scope = "request"
    advice = "Raise claude.max_line_bytes, or have the agent print less."


class AuthenticationError(BackendError):
    """The provider refused the credential. A person has to act."""

    code = "authentication"
    scope: Scope = "account"
    advice = "Log the CLI in (`claude auth login`) or correct the API key; `orchestrator doctor` checks it."


class PermissionDeniedError(BackendError):
    """The provider refused this account the request (403)."""

    code = "permission"
    scope: Scope = "account"
    advice = "Check what the account may use; another model or account may be needed."


class BillingError(BackendError):
    """The account has no credit left."""

    code = "billing"
    scope: Scope = "account"
    advice = "Add credit to the account."


class RateLimitError(BackendError):
    """The provider limits the rate, or a usage window is used up (429)."""

    code = "rate_limit"
    retryable = True
    scope: Scope = "account"
    advice = "Wait and try again; retry_after says how long where the provider told."


class OverloadedError(BackendError):
    """The provider is overloaded (529)."""

    code = "overloaded"
    retryable = True
    advice = "Try again in a minute, or set a fallback model."


class ServerError(BackendError):
    """The provider failed (5xx)."""

    code = "server_error"
    retryable = True
    advice = "Try again later."


class ConnectionFailedError(BackendError):
    """The provider could not be reached, or the connection broke and retries did not help."""

    code = "connection"
    retryable = True
    advice = "Check the network, the proxy and the base URL, then try again."


class StalledError(BackendError):
    """The provider took the request and did not answer in time, or stopped in the middle and did not go on."""

    code = "stalled"
    retryable = True
    advice = "Try again; claude.stream_idle_timeout_s and claude.request_timeout_s bound the wait."


class ModelNotFoundError(BackendError):
    """The provider does not know the model, or the account may not use it (404)."""

    code = "model_not_found"
    scope: Scope = "agent"
    advice = "Choose another model: `orchestrator agents prefer NAME MODEL`."


class InvalidRequestError(BackendError):
    """The provider refused the request as malformed or too long (400, 413)."""

    code = "invalid_request"
    scope: Scope = "request"
    advice = "Shorten or correct the task; the provider's words are in the message."


class RefusalError(BackendError):
    """The model declined to answer."""

    code = "refusal"
    scope: Scope = "request"
    advice = "Rephrase the task."


class MaxTurnsError(BackendError):
    """The run used all the turns it was allowed."""

    code = "max_turns"
    scope: Scope = "request"
    advice = "Raise max_turns, or split the task; the text so far is kept."


class StructuredOutputError(BackendError):
    """A schema was asked for and no valid structured output came."""

    code = "structured_output"
    retryable = True
    scope: Scope = "request"
    advice = "Simplify the schema or ask for it more plainly in the prompt."


class RunTimeoutError(OrchestratorError):
    """The run took longer than its wall or idle time-out. ``details["kind"]`` is ``wall`` or ``idle``."""

    code = "timeout"
    retryable = True
    advice = "Raise the time-out, or split the task; the text so far is kept."


class RunCancelledError(OrchestratorError):
    """The run was cancelled."""

    code = "cancelled"
    exit_code = 3
    advice = "Start it again, or continue its session."


class RunInterruptedError(OrchestratorError):
    """The process that worked on the run ended without finishing it."""

    code = "interrupted"
    exit_code = 3
    retryable = True
    scope: Scope = "host"
    advice = "Start it again, or continue its session: what was said before the crash is kept."


class QuestionError(OrchestratorError):
    """An answer that does not decide the question it is for."""

    code = "question"
    exit_code = 2
    advice = "Say whether the call is allowed, or answer each question."


class QuestionNotFoundError(OrchestratorError):
    """Nobody waits for this answer: it was never asked, settled before, or is asked in another process."""

    code = "question_not_found"
    exit_code = 2
    advice = "Wait for the run: it tells its open questions."


class RegistrationError(OrchestratorError):
    """An MCP client could not be told of us."""

    code = "registration"
    scope: Scope = "host"
    advice = "Run the command that is shown yourself, or see `orchestrator register --help`."


class ServerUnavailableError(OrchestratorError):
    """The orchestrator server cannot be reached or started."""

    code = "server_unavailable"
    retryable = True
    scope: Scope = "host"
    advice = "Start it with `orchestrator serve` and look at the end of its log."
