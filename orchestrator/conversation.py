"""The seam between the executor and a backend: conversations, how one is opened, what a CLI's dialect says.

Three Protocols, because more than one implementation of each is known: a child process, an API call, a fake;
one dialect module per CLI. ``Spec`` is what is fixed when a process starts, ``Turn`` what each run brings along.
"""

from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from orchestrator.errors import OrchestratorError
from orchestrator.messages import ApiRetry, Message, RateLimitEvent, ResultMessage

SessionMode = Literal["fresh", "continue", "fork"]


@dataclass(frozen=True, slots=True)
class McpEndpoint:
    """An HTTP MCP server the conversation may use. ``token_env`` names the variable holding its bearer token."""

    name: str
    url: str
    token_env: str


@dataclass(frozen=True, slots=True)
class Spec:
    """Everything about a conversation that is fixed when its process starts.

    ``tools``: None is the backend's default set, an empty tuple none at all. ``session_id`` is a UUID: of the
    new session (``fresh``, ``fork``) or of the one to go on with (``continue``). ``source_session_id`` is what a
    ``fork`` starts from, up to and with the message ``source_message_id`` (None: all of it). ``budget_usd`` and
    ``max_turns`` are second lines of defence: the executor enforces its own. ``env`` is the whole environment of
    the process, not an addition to ours. With ``asks`` the backend asks us what it would deny by itself, and its
    agent may ask questions.
    """

    cwd: Path
    env: Mapping[str, str]
    session_id: str
    session_mode: SessionMode = "fresh"
    source_session_id: str | None = None
    source_message_id: str | None = None
    model: str | None = None
    fallback_model: str | None = None
    system_prompt: str | None = None
    append_system_prompt: str | None = None
    tools: tuple[str, ...] | None = None
    allowed_tools: tuple[str, ...] = ()
    disallowed_tools: tuple[str, ...] = ()
    permission_mode: str | None = None
    effort: str | None = None
    max_turns: int | None = None
    budget_usd: float | None = None
    add_dirs: tuple[Path, ...] = ()
    output_schema: Mapping[str, Any] | None = None
    mcp: tuple[McpEndpoint, ...] = ()
    mcp_servers: Mapping[str, Any] = field(default_factory=dict)
    setting_sources: tuple[str, ...] | None = None
    settings: Mapping[str, Any] | None = None
    asks: bool = False


@dataclass(frozen=True, slots=True)
class Turn:
    """One prompt, and what holds from it on: ``env`` is added to the environment of the CLI and what it starts.

    ``uuid`` must be new for every prompt that is meant to be answered; the backend swallows one it has seen.
    ``model`` and ``permission_mode`` None leave what is in force. With ``asks`` questions are left to whoever
    receives the messages (``Conversation.answer``); otherwise they are denied at once.
    """

    prompt: str
    uuid: str
    env: Mapping[str, str] = field(default_factory=dict)
    model: str | None = None
    permission_mode: str | None = None
    asks: bool = False


class Conversation(Protocol):
    """A live connection to a backend that holds one session."""

    @property
    def stderr_tail(self) -> str:
        """The last part of what the backend wrote to stderr, for error messages."""
        ...

    async def prepare(self, turn: Turn) -> None:
        """Have what the turn brings along hold, before its prompt is sent; nothing is asked of a model yet."""
        ...

    async def send(self, turn: Turn) -> None:
        """Hand over one prompt. Send the next only after the result of this one was received."""
        ...

    async def receive(self) -> Message:
        """The next message. Cancelling loses nothing: the same message comes with the next call.

        Raises CLIExitError when the backend has ended, MessageTooLargeError for a line above the cap.
        """
        ...

    async def answer(self, request_id: str, response: Mapping[str, Any]) -> None:
        """Answer a question of the backend (``Turn.asks``); one it has withdrawn needs no answer any more."""
        ...

    async def interrupt(self) -> None:
        """Ask the backend to stop the turn; it may still give a result with its cost. What it asks is denied."""
        ...


class Connect(Protocol):
    """Opens conversations. Leaving the context ends everything the conversation started."""

    def __call__(self, spec: Spec) -> AbstractAsyncContextManager[Conversation]: ...


class Dialect(Protocol):
    """What a backend module says about its CLI; all of it pure."""

    def argv(self, spec: Spec) -> list[str]:
        """Arguments after the binary, values verbatim."""
        ...

    def encode_prompt(self, prompt: str, uuid: str) -> bytes:
        """One line for stdin that delivers the prompt as data: no commands or file references in it act."""
        ...

    def requests_of(self, turn: Turn) -> list[dict[str, Any]]:
        """What has to be asked of the CLI, in this order, before the prompt of the turn."""
        ...

    def encode_control(self, request_id: str, request: Mapping[str, Any]) -> bytes:
        """One line for stdin that asks something of the CLI itself."""
        ...

    def answer_control(self, message: Message) -> bytes | None:
        """The answer to a request the CLI made of us, or None if the message is not one."""
        ...

    def is_question(self, message: Message) -> bool:
        """Whether it asks something that somebody can decide, beside what ``answer_control`` can say."""
        ...

    def encode_answer(self, request_id: str, response: Mapping[str, Any]) -> bytes:
        """One line for stdin that answers a request of the CLI."""
        ...

    def error_of(
        self,
        result: ResultMessage,
        last_retry: ApiRetry | None,
        assistant_error: str | None,
        *,
        rate_limit: RateLimitEvent | None = None,
        now: float | None = None,
    ) -> OrchestratorError | None:
        """What a result says went wrong; None for an answer.

        ``rate_limit`` is the turn's last word on usage limits; ``now`` is in seconds since 1970, as its times are.
        """
        ...

    def start_refusal(self, stderr: str) -> dict[str, Any]:
        """What the end of stderr says about why the CLI did not start: ``scope`` and ``advice`` of the error."""
        ...

    def fatal(self, retry: ApiRetry | None) -> OrchestratorError | None:
        """The error behind a retry that cannot help (a refused key), so that nobody waits for the others."""
        ...
