"""Replies in the shapes of the Anthropic Messages API: one JSON message, or server-sent events. No I/O.

Event order and fields follow https://platform.claude.com/docs/en/build-with-claude/streaming.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from orchestrator.testing.request import Request
from orchestrator.testing.scenario import Block, Fault, Reply, Text, Thinking, ToolUse, Usage

Event = dict[str, Any]
Ending = Literal["complete", "stall", "truncate", "reset"]

# https://platform.claude.com/docs/en/api/errors
ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    504: "timeout_error",
    529: "overloaded_error",
}
STATUS_OF = {error_type: status for status, error_type in ERROR_TYPES.items()}
DEFAULT_PIECES = 2
BROKEN_JSON = '{"type": "content_block_delta", "index": 0, "delta": {"type": "text_'


def error_envelope(error_type: str, message: str) -> Event:
    """The API's error body."""
    return {"type": "error", "error": {"type": error_type, "message": message}}


def fault_envelope(fault: Fault) -> Event:
    """The error body of a fault; type and message default to what fits its status."""
    status = fault.status or 500
    fallback = "api_error" if status >= 500 else "invalid_request_error"
    error_type = fault.error_type or ERROR_TYPES.get(status, fallback)
    return error_envelope(error_type, fault.message or f"scripted fault: {error_type}")


def to_json(data: Mapping[str, Any]) -> bytes:
    """Compact UTF-8 JSON. A lone surrogate, which UTF-8 cannot hold, becomes a JSON escape."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode(errors="backslashreplace")


def message_body(reply: Reply, request: Request) -> Event:
    """The reply as one message: the answer to a request without streaming."""
    number = request.index + 1
    content = [_whole_block(block, number, k) for k, block in enumerate(reply.blocks)]
    message = _message(request) | {"content": content, "stop_reason": _stop_reason(reply)}
    return message | {"usage": _usage(reply.usage, reply.usage.output)}


def events(reply: Reply, request: Request) -> Iterator[Event]:
    """The reply as stream events: message_start, ping, the blocks, message_delta, message_stop."""
    # As the API does: the count at the start is a placeholder, message_delta has the final one.
    usage = _usage(reply.usage, min(1, reply.usage.output))
    yield {"type": "message_start", "message": _message(request) | {"usage": usage}}
    yield {"type": "ping"}
    for index, block in enumerate(reply.blocks):
        start = _empty_block(_whole_block(block, request.index + 1, index))
        yield {"type": "content_block_start", "index": index, "content_block": start}
        for delta in _deltas(block, reply):
            yield {"type": "content_block_delta", "index": index, "delta": delta}
        yield {"type": "content_block_stop", "index": index}
    yield {
        "type": "message_delta",
        "delta": {"stop_reason": _stop_reason(reply), "stop_sequence": None},
        "usage": _usage(reply.usage, reply.usage.output),
    }
    yield {"type": "message_stop"}


def stream_frames(reply: Reply, request: Request) -> tuple[list[bytes], Ending]:
    """What goes over the wire for a streamed reply, and how it ends, with its fault worked in."""
    frames = [_frame(event["type"], to_json(event)) for event in events(reply, request)]
    fault = reply.fault
    if fault is None:
        return frames, "complete"
    if fault.malformed_at is not None:
        at = min(fault.malformed_at, len(frames) - 1)
        return [*frames[:at], _frame("content_block_delta", BROKEN_JSON.encode()), *frames[at + 1 :]], "complete"
    if fault.error_at is not None:
        return [*frames[: fault.error_at], _frame("error", to_json(fault_envelope(fault)))], "complete"
    good, ending = _broken_off(fault)
    return frames[:good], ending


def body_frames(reply: Reply, request: Request) -> tuple[list[bytes], int, Ending]:
    """The same without streaming: the body in two halves, its full length, and how it ends."""
    body = to_json(message_body(reply, request))
    fault = reply.fault
    if fault is not None and fault.malformed_at is not None:
        body = body[:-1]
    halves = [body[: len(body) // 2], body[len(body) // 2 :]]
    if fault is None or fault.malformed_at is not None:
        return halves, len(body), "complete"
    good, ending = _broken_off(fault)
    # At most one half, or a break late in the stream would be no break here.
    return halves[: min(good, 1)], len(body), ending


def _broken_off(fault: Fault) -> tuple[int, Ending]:
    if fault.stall_at is not None:
        return fault.stall_at, "stall"
    if fault.truncate_at is not None:
        return fault.truncate_at, "truncate"
    assert fault.reset_at is not None
    return fault.reset_at, "reset"


def _frame(name: str, data: bytes) -> bytes:
    return b"event: " + name.encode() + b"\ndata: " + data + b"\n\n"


def _message(request: Request) -> Event:
    return {
        "id": f"msg_offline_{request.index + 1:04d}",
        "type": "message",
        "role": "assistant",
        "model": request.model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
    }


def _usage(usage: Usage, output: int) -> Event:
    return {
        "input_tokens": usage.input,
        "cache_creation_input_tokens": usage.cache_write_5m + usage.cache_write_1h,
        "cache_read_input_tokens": usage.cache_read,
        "cache_creation": {
            "ephemeral_5m_input_tokens": usage.cache_write_5m,
            "ephemeral_1h_input_tokens": usage.cache_write_1h,
        },
        "output_tokens": output,
        "service_tier": "standard",
    }


def _stop_reason(reply: Reply) -> str:
    if reply.stop_reason is not None:
        return reply.stop_reason
    return "tool_use" if any(isinstance(block, ToolUse) for block in reply.blocks) else "end_turn"


def _whole_block(block: Block, number: int, k: int) -> Event:
    if isinstance(block, Text):
        return {"type": "text", "text": block.text * block.repeat}
    if isinstance(block, Thinking):
        return {"type": "thinking", "thinking": block.text, "signature": block.signature}
    tool_id = block.id or f"toolu_offline_{number:04d}_{k}"
    return {"type": "tool_use", "id": tool_id, "name": block.name, "input": block.input}


def _empty_block(whole: Event) -> Event:
    """A block as ``content_block_start`` shows it: what the deltas will bring is empty."""
    blank = {"text": "", "thinking": "", "signature": "", "input": {}}
    return {key: blank.get(key, value) if key != "type" else value for key, value in whole.items()}


def _deltas(block: Block, reply: Reply) -> Iterator[Event]:
    if isinstance(block, Text):
        for piece in _pieces(block.text * block.repeat, reply):
            yield {"type": "text_delta", "text": piece}
    elif isinstance(block, Thinking):
        for piece in _pieces(block.text, reply):
            yield {"type": "thinking_delta", "thinking": piece}
        yield {"type": "signature_delta", "signature": block.signature}
    else:
        raw = block.input if isinstance(block.input, str) else json.dumps(block.input)
        for piece in _pieces(raw, Reply(chunks=DEFAULT_PIECES)):
            yield {"type": "input_json_delta", "partial_json": piece}


def _pieces(text: str, reply: Reply) -> Iterator[str]:
    """``text`` cut as the reply asks; never an empty piece, so an empty text has none."""
    size = reply.chunk_size or -(-len(text) // (reply.chunks or DEFAULT_PIECES)) or 1
    for start in range(0, len(text), size):
        yield text[start : start + size]
