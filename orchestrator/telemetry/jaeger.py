"""Spans as the JSON file Jaeger's user interface opens by itself ("Upload")."""

from collections.abc import Iterable, Sequence
from typing import Any

from orchestrator.telemetry.spans import SpanData


def jaeger_json(spans: Sequence[SpanData], *, service: str = "orchestrator") -> dict[str, Any]:
    """One Jaeger trace document. Spans whose parent is not among them become roots: Jaeger would warn of them."""
    ids = {span.span_id for span in spans}
    traces = {span.trace_id for span in spans}
    return {
        "data": [
            {
                "traceID": trace_id,
                "spans": [_span(span, ids) for span in spans if span.trace_id == trace_id],
                "processes": {"p1": {"serviceName": service, "tags": []}},
            }
            for trace_id in sorted(traces)
        ]
    }


def _span(span: SpanData, ids: set[str]) -> dict[str, Any]:
    parent = span.parent_id if span.parent_id in ids else None
    reference = {"refType": "CHILD_OF", "traceID": span.trace_id, "spanID": parent}
    error = (
        {"error": True, "otel.status_code": "ERROR", "otel.status_description": span.error} if span.error else {}
    )
    return {
        "traceID": span.trace_id,
        "spanID": span.span_id,
        "operationName": span.name,
        "references": [reference] if parent else [],
        "startTime": span.start_us,
        "duration": max(0, span.end_us - span.start_us),
        "tags": [*_tags({**span.attributes, **error, "span.kind": "internal"}.items())],
        "logs": [],
        "processID": "p1",
        "warnings": None,
    }


def _tags(attributes: Iterable[tuple[str, Any]]) -> Iterable[dict[str, Any]]:
    kinds = {bool: "bool", int: "int64", float: "float64"}
    for key, value in attributes:
        yield {"key": key, "type": kinds.get(type(value), "string"), "value": value}
