"""A collector for tests: a real OTLP/HTTP server on loopback that keeps every span and every figure it is sent.

It takes both encodings (``application/x-protobuf`` and ``application/json``), plain or compressed, on
``/v1/traces`` and ``/v1/metrics``; logs are accepted and dropped. ``status`` makes it refuse instead.
"""

import base64
import gzip
import json
import zlib
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import anyio
import h11
from anyio.abc import SocketAttribute, SocketStream
from google.protobuf import json_format  # type: ignore[import-untyped]  # it ships no types
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from orchestrator.groups import unwrapped
from orchestrator.testing.connection import ClientLeft, Connection

STATUS_NAMES = ("unset", "ok", "error")


@dataclass(frozen=True, slots=True)
class ReceivedSpan:
    """One span as it arrived. Times are microseconds since 1970; ids are hex, ``""`` for no parent."""

    trace_id: str
    span_id: str
    parent_span_id: str
    name: str
    attributes: dict[str, Any]
    resource: dict[str, Any]
    scope: str
    kind: int
    start: int
    end: int
    status: str
    status_message: str

    @property
    def service(self) -> str:
        """``service.name`` of the resource."""
        return str(self.resource.get("service.name", ""))


@dataclass(frozen=True, slots=True)
class ReceivedPoint:
    """One figure as it arrived; of a histogram the sum. ``count`` is how many values a histogram has, else None."""

    name: str
    kind: str
    unit: str
    value: float
    count: int | None
    bounds: tuple[float, ...]
    attributes: dict[str, Any]
    resource: dict[str, Any]


class OtlpReceiver:
    """What ``otlp_receiver`` opens. ``requests`` has (path, content type) of all that came, refused ones too."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.status = 200
        self.spans: list[ReceivedSpan] = []
        self.points: list[ReceivedPoint] = []
        self.requests: list[tuple[str, str]] = []
        self.headers: list[dict[str, str]] = []
        self._arrived = anyio.Event()

    def named(self, name: str) -> list[ReceivedSpan]:
        """The spans of that name."""
        return [span for span in self.spans if span.name == name]

    def latest(self, name: str, **attributes: str) -> ReceivedPoint:
        """The last figure of that name with these attributes (``__`` for dots); raises IndexError if none came."""
        wanted = {key.replace("__", "."): value for key, value in attributes.items()}.items()
        return [each for each in self.points if each.name == name and wanted <= each.attributes.items()][-1]

    async def wait_for_points(self, wanted: Callable[[list[ReceivedPoint]], Any], timeout: float = 10) -> None:
        """Wait until ``wanted`` holds for the figures that came. Raises TimeoutError naming them."""
        with anyio.move_on_after(timeout):
            while not wanted(self.points):
                await self._arrived.wait()
            return
        raise TimeoutError(f"not the figures waited for after {timeout} s; seen: {self.points}")

    async def wait_for(
        self, wanted: Callable[[list[ReceivedSpan]], Any], timeout: float = 10
    ) -> list[ReceivedSpan]:
        """All spans, as soon as ``wanted`` holds for them. Raises TimeoutError naming those that came."""
        with anyio.move_on_after(timeout):
            while not wanted(self.spans):
                await self._arrived.wait()
            return self.spans
        seen = ", ".join(f"{span.service}: {span.name}" for span in self.spans) or "none"
        raise TimeoutError(f"not the spans waited for after {timeout} s; seen: {seen}")

    async def serve(self, stream: SocketStream) -> None:
        """Serve one client connection until either side ends it."""
        connection = Connection(stream)
        try:
            while (received := await connection.receive()) is not None:
                await self._answer(connection, *received)
                if not connection.reusable():
                    break
        except (ClientLeft, h11.RemoteProtocolError):
            pass
        finally:
            await anyio.aclose_forcefully(stream)

    async def _answer(self, connection: Connection, head: h11.Request, body: bytes) -> None:
        headers = {name.decode(): value.decode("latin-1") for name, value in head.headers}
        kind = headers.get("content-type", "")
        path = head.target.decode()
        self.requests.append((path, kind))
        self.headers.append(headers)
        if self.status == 200 and path == "/v1/traces":
            self.spans += spans_of(decoded(body, kind, headers.get("content-encoding", "")))
        if self.status == 200 and path == "/v1/metrics":
            request = ExportMetricsServiceRequest()
            self.points += points_of(decoded(body, kind, headers.get("content-encoding", ""), request))
        # Whoever waits looks again after each request, refused ones included.
        self._arrived.set()
        self._arrived = anyio.Event()
        answer = b"{}" if "json" in kind else b""
        await connection.start(self.status, {"content-type": kind or "text/plain", "content-length": len(answer)})
        await connection.send(answer)
        await connection.finish()


@asynccontextmanager
async def otlp_receiver(*, port: int = 0) -> AsyncIterator[OtlpReceiver]:
    """A collector on loopback: ``OTEL_EXPORTER_OTLP_ENDPOINT=r.endpoint`` sends traces to it."""
    async with await anyio.create_tcp_listener(local_host="127.0.0.1", local_port=port) as listener:
        receiver = OtlpReceiver(f"http://127.0.0.1:{listener.extra(SocketAttribute.local_port)}")
        with unwrapped():
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(listener.serve, receiver.serve)
                yield receiver
                tasks.cancel_scope.cancel()


def decoded(body: bytes, kind: str, encoding: str, into: Any = None) -> Any:
    """The request in a body, of traces if nothing else is given, however it was encoded and compressed."""
    if encoding == "gzip":
        body = gzip.decompress(body)
    elif encoding == "deflate":
        body = zlib.decompress(body)
    request = ExportTraceServiceRequest() if into is None else into
    if "json" in kind:
        json_format.ParseDict(_with_base64_ids(json.loads(body)), request, ignore_unknown_fields=True)
    else:
        request.ParseFromString(body)
    return request


def spans_of(request: ExportTraceServiceRequest) -> Iterable[ReceivedSpan]:
    """The spans of a request, in order."""
    for group in request.resource_spans:
        resource = _attributes(group.resource.attributes)
        for scoped in group.scope_spans:
            for span in scoped.spans:
                yield ReceivedSpan(
                    trace_id=span.trace_id.hex(),
                    span_id=span.span_id.hex(),
                    parent_span_id=span.parent_span_id.hex(),
                    name=span.name,
                    attributes=_attributes(span.attributes),
                    resource=resource,
                    scope=scoped.scope.name,
                    kind=span.kind,
                    start=span.start_time_unix_nano // 1000,
                    end=span.end_time_unix_nano // 1000,
                    status=STATUS_NAMES[span.status.code],
                    status_message=span.status.message,
                )


def points_of(request: ExportMetricsServiceRequest) -> Iterable[ReceivedPoint]:
    """The figures of a request, in order."""
    for group in request.resource_metrics:
        for metric in (metric for scoped in group.scope_metrics for metric in scoped.metrics):
            kind = metric.WhichOneof("data")
            for point in getattr(metric, kind).data_points:
                histogram = kind == "histogram"
                yield ReceivedPoint(
                    name=metric.name,
                    kind=kind,
                    unit=metric.unit,
                    value=point.sum if histogram else getattr(point, point.WhichOneof("value")),
                    count=point.count if histogram else None,
                    bounds=tuple(point.explicit_bounds) if histogram else (),
                    attributes=_attributes(point.attributes),
                    resource=_attributes(group.resource.attributes),
                )


def _with_base64_ids(value: Any, name: str = "") -> Any:
    # OTLP's JSON writes ids in hex; protobuf's own JSON mapping expects bytes in base64.
    if isinstance(value, dict):
        return {key: _with_base64_ids(item, key) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_base64_ids(item) for item in value]
    if name in ("traceId", "spanId", "parentSpanId"):
        return base64.b64encode(bytes.fromhex(value)).decode()
    return value


def _attributes(pairs: Iterable[Any]) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(item) for item in value.array_value.values]
    if kind == "kvlist_value":
        return _attributes(value.kvlist_value.values)
    return getattr(value, kind) if kind else None
