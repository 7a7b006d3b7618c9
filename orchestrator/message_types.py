"""One class for each kind of message of Claude Code's stream-json output (CLI 2.1).

Only the fields somebody reads are named, and almost none is required: the CLI gains and loses fields with
every release. What is not named stays in ``model_extra``.
"""

from typing import Any, Literal

from pydantic import Field, PrivateAttr

from orchestrator.content import (
    Block,
    JsonObject,
    ModelUsage,
    Number,
    TextBlock,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
    Usage,
    Wire,
)


class _Message(Wire):
    session_id: str | None = None
    uuid: str | None = None


class SystemInit(_Message):
    """The start of a turn: what the session works with. Comes before every turn, not once per process."""

    type: Literal["system"]
    subtype: Literal["init"]
    cwd: str | None = None
    model: str | None = None
    permission_mode: str | None = Field(None, alias="permissionMode")
    tools: list[str] | None = None
    mcp_servers: list[JsonObject] | None = None
    claude_code_version: str | None = None
    api_key_source: str | None = Field(None, alias="apiKeySource")
    capabilities: list[Any] | None = None


class ApiRetry(_Message):
    """A model request failed and is tried again after ``retry_delay_ms`` milliseconds.

    ``error_status`` is the HTTP status, None where there was no answer at all.
    """

    type: Literal["system"]
    subtype: Literal["api_retry"]
    attempt: int | None = None
    max_retries: int | None = None
    retry_delay_ms: Number | None = None
    error_status: int | None = None
    error: str | None = None


class CompactBoundary(_Message):
    """The conversation before this point was summarised to make room."""

    type: Literal["system"]
    subtype: Literal["compact_boundary"]
    compact_metadata: JsonObject | None = None


class PermissionDenied(_Message):
    """A tool was not allowed to run; the model is told so and goes on."""

    type: Literal["system"]
    subtype: Literal["permission_denied"]
    tool_name: str | None = None
    tool_use_id: str | None = None
    message: str | None = None


class SessionStateChanged(_Message):
    """``state`` is ``running``, ``idle`` or ``requires_action``."""

    type: Literal["system"]
    subtype: Literal["session_state_changed"]
    state: str


class TaskStarted(_Message):
    """A sub-agent (``local_agent``) or a longer command (``local_bash``) began."""

    type: Literal["system"]
    subtype: Literal["task_started"]
    task_id: str
    tool_use_id: str | None = None
    task_type: str | None = None
    description: str | None = None
    subagent_type: str | None = None
    is_backgrounded: bool | None = None


class TaskNotification(_Message):
    """A sub-agent or command ended. ``status`` is ``completed``, ``failed`` or ``stopped``."""

    type: Literal["system"]
    subtype: Literal["task_notification"]
    task_id: str
    tool_use_id: str | None = None
    status: str | None = None
    summary: str | None = None
    output_file: str | None = None
    usage: JsonObject | None = None


class ModelFallback(_Message):
    """Another model than the one asked for goes on, because that one was overloaded or refused."""

    type: Literal["system"]
    subtype: Literal["model_fallback", "model_refusal_fallback"]
    trigger: str | None = None
    original_model: str | None = None
    fallback_model: str | None = None
    content: str | None = None


class UnknownSystemMessage(Wire):
    """A system message of a subtype this version does not name."""

    type: Literal["system"]
    subtype: Any = None


class AssistantContent(Wire):
    """The ``message`` of an assistant message: one content block of the model's answer.

    All blocks of an answer repeat its ``id``. ``usage`` is what was known when the answer began:
    its output tokens are not the total.
    """

    id: str | None = None
    model: str | None = None
    content: list[Block]
    stop_reason: str | None = None
    usage: Usage | None = None


class AssistantMessage(_Message):
    """Something the model said, thought or asks a tool to do.

    ``parent_tool_use_id`` names the tool use that started the sub-agent speaking, None on the main thread.
    ``error`` is set where the CLI speaks in the model's place to tell of a failed request. ``aborted`` marks
    text cut by an interrupt. ``supersedes`` lists uuids of messages this one takes back.
    """

    type: Literal["assistant"]
    message: AssistantContent
    parent_tool_use_id: str | None = None
    request_id: str | None = None
    error: str | None = None
    aborted: bool | None = None
    supersedes: list[str] | None = None

    @property
    def text_content(self) -> str:
        """The text blocks, joined."""
        return "".join(block.text for block in self.message.content if isinstance(block, TextBlock))

    @property
    def thinking(self) -> str:
        """The thinking blocks, joined."""
        return "".join(block.thinking for block in self.message.content if isinstance(block, ThinkingBlock))

    @property
    def tool_uses(self) -> list[ToolUseBlock]:
        """The tools the model asks for here."""
        return [block for block in self.message.content if isinstance(block, ToolUseBlock)]


class UserContent(Wire):
    """The ``message`` of a user message: text or content blocks."""

    content: str | list[Block]


class UserMessage(_Message):
    """What the model is told: tool results, a sub-agent's prompt, notes of the CLI (``is_synthetic``)."""

    type: Literal["user"]
    message: UserContent
    parent_tool_use_id: str | None = None
    is_synthetic: bool | None = Field(None, alias="isSynthetic")
    is_replay: bool | None = Field(None, alias="isReplay")
    tool_use_result: Any = None

    @property
    def tool_results(self) -> list[ToolResultBlock]:
        """The tool results in it."""
        content = self.message.content
        return [block for block in content if isinstance(block, ToolResultBlock)]


class StreamEvent(_Message):
    """One event of the model's answer as it streams: ``event`` is the provider's own. Main thread only."""

    type: Literal["stream_event"]
    event: JsonObject
    parent_tool_use_id: str | None = None

    def _delta(self, kind: str, key: str) -> str | None:
        delta = self.event.get("delta")
        if not isinstance(delta, dict) or delta.get("type") != kind:
            return None
        value = delta.get(key)
        return value if isinstance(value, str) else None

    @property
    def text_delta(self) -> str | None:
        """The text this event adds, None if it adds none."""
        return self._delta("text_delta", "text")

    @property
    def thinking_delta(self) -> str | None:
        """The thinking this event adds, None if it adds none."""
        return self._delta("thinking_delta", "thinking")

    @property
    def usage(self) -> JsonObject | None:
        """Token counts so far: at the start of an answer its input, at the end its whole output."""
        message = self.event.get("message")
        holder = message if isinstance(message, dict) else self.event
        usage = holder.get("usage")
        return usage if isinstance(usage, dict) else None


class ResultMessage(_Message):
    """The end of a turn.

    ``is_error`` decides; a failed model request has subtype ``success`` all the same. ``terminal_reason`` says
    why the turn ended. ``usage`` is this turn's main thread; ``model_usage`` and ``total_cost_usd`` run on
    over all turns of the session, resumed and forked ones included, so they are never added up;
    ``model_usage_since_last_result`` is what this process spent since its last result. Times are in
    milliseconds. ``result_index`` counts a process's results from 0.
    """

    type: Literal["result"]
    subtype: str
    is_error: bool = False
    result: str | None = None
    errors: list[Any] | None = None
    num_turns: int | None = None
    duration_ms: Number | None = None
    duration_api_ms: Number | None = None
    ttft_ms: Number | None = None
    stop_reason: str | None = None
    terminal_reason: str | None = None
    api_error_status: int | None = None
    api_error: str | None = None
    api_error_type: str | None = None
    total_cost_usd: Number | None = None
    usage: Usage | None = None
    model_usage: dict[str, ModelUsage] | None = Field(None, alias="modelUsage")
    model_usage_since_last_result: dict[str, ModelUsage] | None = None
    permission_denials: list[JsonObject] | None = None
    subagent_stats: JsonObject | None = None
    structured_output: Any = None
    deferred_tool_use: JsonObject | None = None
    origin: JsonObject | None = None
    user_message_uuid: str | None = None
    user_message_uuids: list[str] | None = None
    queued_turn_count: int | None = None
    result_index: int | None = None
    safety_stops: int | None = None

    @property
    def has_structured_output(self) -> bool:
        """Whether the answer satisfied the schema asked for; ``null`` may be that answer."""
        return "structured_output" in self.model_fields_set

    @property
    def turn_cost_usd(self) -> float | None:
        """What this process spent since its last result, sub-agents included; None where that is not known."""
        if self.model_usage_since_last_result is None:
            return None
        costs = [usage.known_cost_usd for usage in self.model_usage_since_last_result.values()]
        known = [cost for cost in costs if cost is not None]
        return sum(known, start=0.0) if len(known) == len(costs) else None


class RateLimitEvent(_Message):
    """Where a subscription stands in its usage windows. ``resetsAt`` in it is in seconds since 1970."""

    type: Literal["rate_limit_event"]
    rate_limit_info: JsonObject


class ControlRequest(Wire):
    """The CLI asks something of us; the turn hangs until it is answered."""

    type: Literal["control_request"]
    request_id: str
    request: JsonObject

    @property
    def subtype(self) -> str | None:
        """What is asked, such as ``can_use_tool``."""
        subtype = self.request.get("subtype")
        return subtype if isinstance(subtype, str) else None


class ControlResponseBody(Wire):
    """The ``response`` of a control response; its own ``response`` may be missing on success."""

    subtype: str
    request_id: str
    response: Any = None
    error: str | None = None
    error_code: str | None = None


class ControlResponse(Wire):
    """The CLI's answer to a request of ours."""

    type: Literal["control_response"]
    response: ControlResponseBody

    @property
    def request_id(self) -> str:
        """The id of the request answered."""
        return self.response.request_id

    @property
    def ok(self) -> bool:
        """Whether the request was carried out."""
        return self.response.subtype == "success"


class ControlCancelRequest(Wire):
    """The CLI takes back a request it made."""

    type: Literal["control_cancel_request"]
    request_id: str


class CommandLifecycle(_Message):
    """A prompt sent with a uuid is ``queued``, ``started``, ``completed`` or ``cancelled``."""

    type: Literal["command_lifecycle"]
    command_uuid: str
    state: str


class ConversationReset(_Message):
    """The history was dropped; what follows belongs to another session id."""

    type: Literal["conversation_reset"]
    new_conversation_id: str | None = None
    trigger: str | None = None


class KeepAlive(Wire):
    """A sign of life."""

    type: Literal["keep_alive"]


class ToolProgress(_Message):
    """A tool is still running."""

    type: Literal["tool_progress"]
    tool_use_id: str | None = None
    tool_name: str | None = None
    parent_tool_use_id: str | None = None
    elapsed_time_seconds: Number | None = None


class UnknownMessage(Wire):
    """A message of a type, or in a shape, this version does not know.

    ``problem`` says what did not fit if the type is a known one, else it is None.
    """

    type: Any = None
    subtype: Any = None
    _problem: str | None = PrivateAttr(default=None)

    def model_post_init(self, context: Any, /) -> None:
        """Take the problem from the context of validation: it is about the message, not of it."""
        self._problem = context["problem"] if context else None

    @property
    def problem(self) -> str | None:
        """Why a message of a known type is here all the same."""
        return self._problem
