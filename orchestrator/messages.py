"""Lines of Claude Code's stream-json output read as typed messages; what is unknown is kept, never an error.

A CLI update must not end a run, so each level has a fall-back: a new type, or a known type that no longer
fits, becomes ``UnknownMessage``, a new system subtype ``UnknownSystemMessage``, a new content block
``UnknownBlock``. Every message gives the JSON object it was built from back with ``raw()``.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Annotated, Any, TypeAlias

from pydantic import (
    Discriminator,
    Tag,
    TypeAdapter,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)
from pydantic_core import from_json

from orchestrator.content import (
    Block,
    ImageBlock,
    JsonObject,
    ModelUsage,
    TextBlock,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
    UnknownBlock,
    Usage,
    tags_of,
)
from orchestrator.message_types import (
    ApiRetry,
    AssistantContent,
    AssistantMessage,
    CommandLifecycle,
    CompactBoundary,
    ControlCancelRequest,
    ControlRequest,
    ControlResponse,
    ControlResponseBody,
    ConversationReset,
    KeepAlive,
    ModelFallback,
    PermissionDenied,
    RateLimitEvent,
    ResultMessage,
    SessionStateChanged,
    StreamEvent,
    SystemInit,
    TaskNotification,
    TaskStarted,
    ToolProgress,
    UnknownMessage,
    UnknownSystemMessage,
    UserContent,
    UserMessage,
)

__all__ = [
    "ApiRetry",
    "AssistantContent",
    "AssistantMessage",
    "Block",
    "CommandLifecycle",
    "CompactBoundary",
    "ControlCancelRequest",
    "ControlRequest",
    "ControlResponse",
    "ControlResponseBody",
    "ConversationReset",
    "ImageBlock",
    "JsonObject",
    "KeepAlive",
    "Message",
    "ModelFallback",
    "ModelUsage",
    "PermissionDenied",
    "RateLimitEvent",
    "ResultMessage",
    "SessionStateChanged",
    "StreamEvent",
    "SystemInit",
    "TaskNotification",
    "TaskStarted",
    "TextBlock",
    "ThinkingBlock",
    "ToolCall",
    "ToolProgress",
    "ToolResultBlock",
    "ToolUseBlock",
    "UnknownBlock",
    "UnknownMessage",
    "UnknownSystemMessage",
    "Usage",
    "UserContent",
    "UserMessage",
    "collect_text",
    "collect_thinking",
    "extract_thinking_tokens",
    "pair_tools",
    "parse_message",
]


def _tag_of_message(value: Any) -> str:
    if isinstance(value, dict):
        kind, subtype = value.get("type"), value.get("subtype")
    elif isinstance(value, UnknownMessage):
        return "*"  # as with blocks: a message already read may be unknown although its type is known
    else:
        kind, subtype = getattr(value, "type", None), getattr(value, "subtype", None)
    if kind == "system":
        tag = f"system/{_SYSTEM_SYNONYMS.get(subtype, subtype)}" if isinstance(subtype, str) else "system/*"
        return tag if tag in _MESSAGE_TAGS else "system/*"
    return kind if isinstance(kind, str) and kind in _MESSAGE_TAGS else "*"


def _unknown_message_if_misshapen(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
    try:
        return validate(value)
    except ValidationError as error:
        return UnknownMessage.model_validate(value, context={"problem": _summary(error)})


def _summary(error: ValidationError) -> str:
    problems = error.errors(include_url=False, include_context=False, include_input=False)
    return "; ".join(f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in problems[:3])


_SYSTEM_SYNONYMS = {"model_refusal_fallback": "model_fallback"}

Message: TypeAlias = Annotated[
    Annotated[SystemInit, Tag("system/init")]
    | Annotated[ApiRetry, Tag("system/api_retry")]
    | Annotated[CompactBoundary, Tag("system/compact_boundary")]
    | Annotated[PermissionDenied, Tag("system/permission_denied")]
    | Annotated[SessionStateChanged, Tag("system/session_state_changed")]
    | Annotated[TaskStarted, Tag("system/task_started")]
    | Annotated[TaskNotification, Tag("system/task_notification")]
    | Annotated[ModelFallback, Tag("system/model_fallback")]
    | Annotated[UnknownSystemMessage, Tag("system/*")]
    | Annotated[AssistantMessage, Tag("assistant")]
    | Annotated[UserMessage, Tag("user")]
    | Annotated[StreamEvent, Tag("stream_event")]
    | Annotated[ResultMessage, Tag("result")]
    | Annotated[RateLimitEvent, Tag("rate_limit_event")]
    | Annotated[ControlRequest, Tag("control_request")]
    | Annotated[ControlResponse, Tag("control_response")]
    | Annotated[ControlCancelRequest, Tag("control_cancel_request")]
    | Annotated[CommandLifecycle, Tag("command_lifecycle")]
    | Annotated[ConversationReset, Tag("conversation_reset")]
    | Annotated[KeepAlive, Tag("keep_alive")]
    | Annotated[ToolProgress, Tag("tool_progress")]
    | Annotated[UnknownMessage, Tag("*")],
    Discriminator(_tag_of_message),
    WrapValidator(_unknown_message_if_misshapen),
]


_MESSAGE_TAGS = tags_of(Message)
_ADAPTER: TypeAdapter[Message] = TypeAdapter(Message)


def parse_message(line: bytes | str) -> Message:
    """The message in one line of output.

    Bytes that are no UTF-8 and halves of surrogate pairs become U+FFFD, so that whatever is kept of the
    message can be encoded again. Raises ValueError if the line is not one JSON object.
    """
    try:
        value = from_json(line, allow_inf_nan=False, cache_strings="keys")
    except (ValueError, TypeError):  # TypeError: text with half of a surrogate pair
        value = _load(line)
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, got {type(value).__name__}")  # noqa: TRY004 - bad data, no bug
    return _ADAPTER.validate_python(value)


#: Any escape in JSON text; the group is set where it is half of a surrogate pair without its other half.
_ESCAPE = re.compile(
    r"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|(u[dD][89a-fA-F][0-9a-fA-F]{2})|.)",
    re.DOTALL,
)
_SURROGATE = re.compile("[\ud800-\udfff]")


def _load(line: bytes | str) -> Any:
    """What the fast parser refuses and can be read: bad UTF-8, halves of surrogate pairs, deep nesting.

    Raises ValueError for what is no JSON.
    """
    text = line.decode("utf-8", "replace") if isinstance(line, bytes) else _SURROGATE.sub("\ufffd", line)
    if "\\ud" in text or "\\uD" in text:
        text = _ESCAPE.sub(lambda escape: "\\ufffd" if escape[1] else escape[0], text)
    try:
        return _DECODER.decode(text)
    except RecursionError:
        raise ValueError("the JSON is nested too deeply to be read") from None


def _reject_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


# Made once: json.loads makes a new one for each call with an option, which takes as long as to read a short line.
_DECODER = json.JSONDecoder(parse_constant=_reject_constant)


# --- What follows from several messages


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A tool use with what came of it: ``result`` and ``is_error`` are None while there is no result."""

    id: str
    name: str
    input: JsonObject
    result: str | None = None
    is_error: bool | None = None


def collect_text(messages: Iterable[Message]) -> str:
    """What the main thread's model said, a blank line between separate texts.

    Leaves out sub-agents, messages taken back later, and errors the CLI words as if the model spoke.
    """
    blocks = [(said.message.id, block) for said in _spoken(messages) for block in said.message.content]
    runs = groupby(blocks, key=lambda entry: (entry[0], isinstance(entry[1], TextBlock)))
    texts = ["".join(block.text for _, block in run if isinstance(block, TextBlock)) for _, run in runs]
    return "\n\n".join(text for text in texts if text)


def collect_thinking(messages: Iterable[Message]) -> str:
    """What the main thread's model thought, a blank line between separate thoughts."""
    return "\n\n".join(said.thinking for said in _spoken(messages) if said.thinking)


def extract_thinking_tokens(messages: Iterable[Message]) -> int | None:
    """Thinking tokens of the main thread over all results, None if no result tells.

    They are already counted in the output tokens: never add the two.
    """
    usages = [message.usage for message in messages if isinstance(message, ResultMessage)]
    details = [usage.output_tokens_details for usage in usages if usage]
    known = [part.thinking_tokens for part in details if part and part.thinking_tokens is not None]
    return sum(known) if known else None


def pair_tools(messages: Iterable[Message]) -> list[ToolCall]:
    """Every tool use in the order asked for, sub-agents' included, with its result found by its id.

    Results come in order of completion and in messages of their own, so position says nothing.
    """
    calls: dict[str, ToolCall] = {}
    for message in messages:
        if isinstance(message, AssistantMessage):
            calls.update((use.id, ToolCall(use.id, use.name, use.input)) for use in message.tool_uses)
        elif isinstance(message, UserMessage):
            _settle(calls, message.tool_results)
    return list(calls.values())


def _settle(calls: dict[str, ToolCall], results: list[ToolResultBlock]) -> None:
    for result in results:
        if call := calls.get(result.tool_use_id):
            calls[call.id] = replace(call, result=result.text, is_error=bool(result.is_error))


def _spoken(messages: Iterable[Message]) -> list[AssistantMessage]:
    said = [message for message in messages if isinstance(message, AssistantMessage)]
    taken_back = {uuid for message in said for uuid in message.supersedes or ()}
    main = [message for message in said if message.parent_tool_use_id is None and message.error is None]
    return [message for message in main if message.uuid is None or message.uuid not in taken_back]
