"""One request to the Messages API told in the messages of the CLI, so that whoever takes those in takes these in.

Pure: the SDK's events in, messages as plain JSON objects out.
"""

import json
import time
import uuid
from collections.abc import Mapping
from typing import Any

from orchestrator.conversation import Spec, Turn
from orchestrator.pricing import estimate_usd

# The provider's own events; the SDK adds others for convenience, and fields to two of these.
_EVENTS: Mapping[str, str | None] = {
    "message_start": None,
    "content_block_start": None,
    "content_block_delta": None,
    "content_block_stop": "content_block",
    "message_delta": None,
    "message_stop": "message",
}


class Telling:
    """One request as the CLI's messages. ``answer`` is the message of the SDK, filled as it streams."""

    def __init__(self, spec: Spec, turn: Turn, model: str) -> None:
        self._spec = spec
        self._turn = turn
        self.model = model
        self._started = time.monotonic()
        self._begun = False
        self._open: int | None = None
        self.answer: Any = None

    @property
    def blocks(self) -> list[dict[str, Any]]:
        return [plain(block) for block in self.answer.content] if self.answer else []

    @property
    def text(self) -> str:
        return "".join(block["text"] for block in self.blocks if block.get("type") == "text")

    @property
    def stop_reason(self) -> str | None:
        return self.answer.stop_reason if self.answer else None

    def begin(self) -> list[dict[str, Any]]:
        """The init message, once: nothing is told of a request that was refused or never sent, it cost nothing."""
        if self._begun:
            return []
        self._begun = True
        facts = {"cwd": str(self._spec.cwd), "model": self.model, "tools": [], "mcp_servers": []}
        return [self._message("system", subtype="init", apiKeySource="ANTHROPIC_API_KEY", **facts)]

    def messages_of(self, event: Any) -> list[dict[str, Any]]:
        """What the CLI would say of one event."""
        if event.type not in _EVENTS:
            return []
        told = plain(event)
        told.pop(_EVENTS[event.type] or "", None)
        said = [*self.begin(), self._message("stream_event", event=told, parent_tool_use_id=None)]
        if event.type == "content_block_start":
            self._open = event.index
        elif event.type == "content_block_stop":
            self._open = None
            said.append(self._assistant(event.index))
        return said

    def cut(self) -> list[dict[str, Any]]:
        """The block that was still streaming, if one was."""
        if self._open is None:
            return []
        index, self._open = self._open, None
        return [self._assistant(index, aborted=True)]

    def result(self, index: int, *, interrupted: bool) -> dict[str, Any]:
        """The end of the turn. Of one that was interrupted only what had been counted by then is known."""
        elapsed = int((time.monotonic() - self._started) * 1000)
        ending: dict[str, Any] = {"subtype": "success", "terminal_reason": "completed", "result": self.text}
        if interrupted:
            ending = {"subtype": "error_during_execution", "terminal_reason": "aborted_streaming"}
        elif self._spec.output_schema is not None:
            ending |= structured(self.text, self._spec.output_schema)
        return self._message(
            "result",
            **ending,
            is_error=interrupted,
            num_turns=1,
            duration_ms=elapsed,
            duration_api_ms=elapsed,
            stop_reason=self.stop_reason,
            result_index=index,
            user_message_uuid=self._turn.uuid,
            **self._spent(),
        )

    def _spent(self) -> dict[str, Any]:
        if self.answer is None:
            return {}
        usage, model = plain(self.answer.usage), self.answer.model or self.model
        price = estimate_usd(model, usage)
        spent = {
            "inputTokens": usage.get("input_tokens"),
            "outputTokens": usage.get("output_tokens"),
            "cacheReadInputTokens": usage.get("cache_read_input_tokens"),
            "cacheCreationInputTokens": usage.get("cache_creation_input_tokens"),
            **({"costBasis": "unknown"} if price is None else {"costUSD": price, "costBasis": "list"}),
        }
        return {"usage": usage, "model_usage_since_last_result": {model: spent}}

    def _assistant(self, index: int, **more: Any) -> dict[str, Any]:
        answer, block = self.answer, self.blocks[index]
        content = {"id": answer.id, "model": answer.model, "content": [block], "usage": plain(answer.usage)}
        return self._message("assistant", message=content, parent_tool_use_id=None, **more)

    def _message(self, kind: str, **fields: Any) -> dict[str, Any]:
        return {"type": kind, "session_id": self._spec.session_id, "uuid": str(uuid.uuid4()), **fields}


def structured(text: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    """The ``structured_output`` of an answer that satisfies the schema; empty for one that does not."""
    from jsonschema import Draft202012Validator  # noqa: PLC0415
    from referencing import Registry  # noqa: PLC0415

    try:
        value = json.loads(text)
    except ValueError:
        return {}
    # With a registry of its own it follows no address of a schema to the network.
    valid = Draft202012Validator(schema, registry=Registry()).is_valid(value)
    return {"structured_output": value} if valid else {}


def plain(model: Any) -> dict[str, Any]:
    """A model of the SDK as JSON. What is in a shape of its own the SDK keeps as it came, or as None."""
    if model is None or isinstance(model, Mapping):
        return dict(model or {})
    return dict(model.to_dict(mode="json", warnings=False))
