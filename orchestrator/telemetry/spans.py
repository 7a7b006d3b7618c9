"""Runs as spans: pure, from the journal's rows, so that live export and later export cannot disagree."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from orchestrator.redaction import Redactor
from orchestrator.store import Run, StoredMessage
from orchestrator.telemetry import names

# Jaeger cuts tool arguments here too: one huge value can fail the export of a whole batch.
MAX_VALUE_CHARS = 65_536


@dataclass(frozen=True, slots=True)
class SpanData:
    """A finished (or still open) span in plain data. Times are microseconds since 1970 UTC."""

    trace_id: str
    span_id: str
    parent_id: str | None
    name: str
    start_us: int
    end_us: int
    attributes: dict[str, str | int | float | bool] = field(default_factory=dict)
    error: str | None = None


def run_span(run: Run, *, content: bool = False) -> SpanData:
    """The span of a run; ``content`` puts the prompt and the answer on it."""
    workflow = run.kind == "plan"
    operation = names.INVOKE_WORKFLOW if workflow else names.INVOKE_AGENT
    start = run.started_us or run.created_us
    return SpanData(
        trace_id=run.trace_id,
        span_id=run.id,
        parent_id=run.parent_span_id or run.parent_id,
        name=f"{operation} {run.name}",
        start_us=start,
        end_us=run.ended_us or start,
        attributes=_known({**_identity(run, operation), **_figures(run), **(_content(run) if content else {})}),
        error=str((run.error or {}).get("message", run.status)) if run.status not in _FINE else None,
    )


def without_secrets(span: SpanData, redact: Redactor) -> SpanData:
    """The span with what it says of the run redacted."""
    return replace(
        span,
        name=redact.text(span.name),
        attributes=redact.data(span.attributes),
        error=redact.text(span.error) if span.error else span.error,
    )


_FINE = ("succeeded", "running", "waiting", "queued")


def _identity(run: Run, operation: str) -> dict[str, Any]:
    agent = run.agent or {}
    common = {
        names.OPERATION: operation,
        names.RUN_ID: run.id,
        names.RUN_STATUS: run.status,
        names.RUN_DEPTH: run.depth,
        names.RUN_STEP: run.step,
        names.ERROR_TYPE: (run.error or {}).get("code"),
    }
    if run.kind == "plan":
        return {**common, names.WORKFLOW_NAME: run.name}
    return {
        **common,
        names.PROVIDER: "anthropic",
        names.AGENT_NAME: run.name,
        names.AGENT_ID: agent.get("id"),
        names.AGENT_DESCRIPTION: agent.get("description"),
        names.CONVERSATION_ID: run.session_id,
        names.REQUEST_MODEL: run.model_requested,
        names.RESPONSE_MODEL: run.model_used,
        names.SESSION_MODE: run.session_mode,
    }


def _figures(run: Run) -> dict[str, Any]:
    cost = {names.RUN_COST: run.cost_usd, names.RUN_COST_BASIS: run.cost_basis}
    if run.kind == "plan":
        return cost  # its tokens are its children's: counted there, not twice
    usage = run.usage
    return {
        **cost,
        names.INPUT_TOKENS: usage.input_tokens + usage.cache_read_tokens + usage.cache_write_tokens,
        names.OUTPUT_TOKENS: usage.output_tokens,
        names.CACHE_READ_TOKENS: usage.cache_read_tokens,
        names.CACHE_CREATION_TOKENS: usage.cache_write_tokens,
        names.CACHE_WRITE_TOKENS: usage.cache_write_tokens,
    }


def _content(run: Run) -> dict[str, Any]:
    return {
        names.INPUT_MESSAGES: _spoken("user", run.prompt) if run.prompt else None,
        names.OUTPUT_MESSAGES: _spoken("assistant", run.text) if run.text else None,
    }


def _spoken(role: str, text: str) -> str:
    """A message of the conventions. The text is cut, not the JSON around it: viewers parse it."""
    while len(said := json.dumps([{"role": role, "parts": [{"type": "text", "content": text}]}])) > MAX_VALUE_CHARS:
        text = text[: len(text) * MAX_VALUE_CHARS // len(said) - 100] + "…"
    return said


def tool_spans(run: Run, messages: Sequence[StoredMessage], *, content: bool = True) -> list[SpanData]:
    """One span for each tool the run's main thread used, timed by when the CLI told of it.

    A tool without a result (the run ended first) ends with the run.
    """
    results = {
        block["tool_use_id"]: (m.at_us, block) for m in messages for block in _blocks(m, "user", "tool_result")
    }
    spans = []
    for message in messages:
        for use in _blocks(message, "assistant", "tool_use"):
            end_us, result = results.get(use["id"], (run.ended_us or message.at_us, {}))
            spans.append(_tool_span(run, use, message.at_us, end_us, result, content=content))
    return spans


def _tool_span(
    run: Run, use: dict[str, Any], start_us: int, end_us: int, result: dict[str, Any], *, content: bool
) -> SpanData:
    said = {
        names.TOOL_ARGUMENTS: _cut(json.dumps(use.get("input"))),
        names.TOOL_RESULT: _cut(json.dumps(result.get("content"))) if result else None,
    }
    return SpanData(
        trace_id=run.trace_id,
        span_id=tool_span_id(run.id, use["id"]),
        parent_id=run.id,
        name=f"{names.EXECUTE_TOOL} {use['name']}",
        start_us=start_us,
        end_us=max(start_us, end_us),
        attributes=_known(
            {
                names.OPERATION: names.EXECUTE_TOOL,
                names.TOOL_NAME: use["name"],
                names.TOOL_CALL_ID: use["id"],
                names.RUN_ID: run.id,
                **(said if content else {}),
            }
        ),
        error="the tool failed" if result.get("is_error") else None,
    )


def tool_span_id(run_id: str, tool_use_id: str) -> str:
    """The same span id whenever the same tool use is exported."""
    return hashlib.sha256(f"{run_id}/{tool_use_id}".encode()).hexdigest()[:16]


def _blocks(message: StoredMessage, kind: str, block_type: str) -> list[dict[str, Any]]:
    if message.type != kind or message.body.get("parent_tool_use_id"):
        return []
    said = message.body.get("message")
    content = said.get("content") if isinstance(said, dict) else None
    if not isinstance(content, list):
        return []
    needed = _NEEDED[block_type]
    return [
        block
        for block in content
        if isinstance(block, dict) and block.get("type") == block_type and all(block.get(key) for key in needed)
    ]


# The journal also keeps blocks of a shape nobody knows; without these there is no span to make of one.
_NEEDED = {"tool_use": ("id", "name"), "tool_result": ("tool_use_id",)}


def _known(attributes: dict[str, Any]) -> dict[str, str | int | float | bool]:
    return {name: value for name, value in attributes.items() if value is not None}


def _cut(text: str) -> str:
    return text if len(text) <= MAX_VALUE_CHARS else text[: MAX_VALUE_CHARS - 1] + "…"
