"""Spans and metrics out of the process: best effort, never in the way of a run. The journal is the truth.

Where they go is said by the standard OTEL_* variables; without an endpoint nothing is loaded and nothing sent.
"""

import logging
import threading
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Literal

import anyio

from orchestrator.config import Config
from orchestrator.pool_state import PoolState
from orchestrator.redaction import Redactor
from orchestrator.store import Run
from orchestrator.telemetry.metrics import Metrics, build_metrics
from orchestrator.telemetry.spans import SpanData, run_span, without_secrets
from orchestrator.tracing import SpanContext

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

__all__ = ["Exporter", "cli_environment", "endpoint_of", "open_exporter"]

log = logging.getLogger(__name__)

#: As the names of the OTEL_* variables have it.
Signal = Literal["TRACES", "METRICS"]

EXPORT_TIMEOUT_SECONDS = 2.0
# The SDK's own shutdown waits up to 30 s for a collector that does not answer.
SHUTDOWN_SECONDS = 3.0


class Exporter:
    """Sends the span of each run that ends. ``delivered`` counts spans the collector took.

    ``metrics`` is None where no metrics are wanted.
    """

    def __init__(
        self,
        processor: "BatchSpanProcessor | None" = None,
        *,
        content: bool = False,
        redact: Redactor | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        self.metrics = metrics
        self._processor = processor
        self._content = content
        self._redact = redact or Redactor()
        self._queued = 0
        self._closed = False
        self.refused = 0
        self.delivered = 0

    @property
    def enabled(self) -> bool:
        return self._processor is not None

    @property
    def failed(self) -> int:
        """Spans the collector did not take; after ``shutdown`` also those that were still waiting for it."""
        return self._queued - self.delivered if self._closed else self.refused

    def export(self, run: Run) -> None:
        """Queue the run's span and count the run; returns at once and never raises."""
        if self.metrics is not None:
            self.metrics.record(run)
        if self._processor is None:
            return
        self._queued += 1
        try:
            span = without_secrets(run_span(run, content=self._content), self._redact)
            self._processor.on_end(to_otel(span))
        except Exception:  # a broken exporter must not fail the run it tells about
            log.warning("span of run %s could not be queued", run.id, exc_info=True)

    def watch_pool(self, state: PoolState) -> None:
        """Send the state of the pool with the metrics, from now on."""
        if self.metrics is not None:
            self.metrics.observe(state)

    async def shutdown(self) -> None:
        """Send what is queued, for at most SHUTDOWN_SECONDS."""
        ends = [each.shutdown for each in (self._processor, self.metrics) if each is not None]
        if not ends:
            return
        # Daemon threads: one that hangs on a dead collector must not keep the process alive.
        threads = [threading.Thread(target=end, daemon=True) for end in ends]
        for thread in threads:
            thread.start()
        await anyio.to_thread.run_sync(_join, threads, time.monotonic() + SHUTDOWN_SECONDS)
        self._closed = True
        if self.failed:
            log.warning(
                "%d spans were not taken by the collector; `orchestrator trace export` has them", self.failed
            )


def _join(threads: Sequence[threading.Thread], deadline: float) -> None:
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))


@asynccontextmanager
async def open_exporter(
    config: Config, environ: Mapping[str, str], *, redact: Redactor | None = None
) -> AsyncIterator[Exporter]:
    """The exporter the environment asks for; one that does nothing where it asks for none.

    ``redact`` takes secrets out of the spans; by default it knows only the shapes of keys.
    """
    exporter = Exporter()
    if config.telemetry.enabled and (endpoint := endpoint_of(environ)):
        try:
            exporter = await anyio.to_thread.run_sync(_build, endpoint, environ, config.telemetry.content, redact)
        except Exception as error:  # noqa: BLE001  # wrong OTEL_* variables cost the spans, not the runs
            log.warning("no spans will be sent to %s: %s", endpoint, error)
    if config.telemetry.enabled and config.telemetry.metrics and (endpoint := endpoint_of(environ, "METRICS")):
        try:
            exporter.metrics = await anyio.to_thread.run_sync(_build_metrics, endpoint, environ, redact)
        except Exception as error:  # noqa: BLE001  # as above
            log.warning("no metrics will be sent to %s: %s", endpoint, error)
    try:
        yield exporter
    finally:
        with anyio.CancelScope(shield=True):
            await exporter.shutdown()


def endpoint_of(environ: Mapping[str, str], signal: Signal = "TRACES") -> str | None:
    """The OTLP endpoint the signal goes to, or None when it is not wanted."""
    if environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or environ.get(f"OTEL_{signal}_EXPORTER") == "none":
        return None
    specific = environ.get(f"OTEL_EXPORTER_OTLP_{signal}_ENDPOINT")
    return specific or environ.get("OTEL_EXPORTER_OTLP_ENDPOINT") or None


def cli_environment(config: Config, environ: Mapping[str, str], span: SpanContext, service: str) -> dict[str, str]:
    """Variables that hang a CLI's work under ``span`` and, where spans are exported, have it send its own."""
    variables = {"TRACEPARENT": span.traceparent, "CLAUDE_CODE_PROPAGATE_TRACEPARENT": "1"}
    if not (config.telemetry.enabled and config.telemetry.cli_spans and endpoint_of(environ)):
        return variables
    ours = {name: value for name, value in environ.items() if name.startswith("OTEL_EXPORTER_OTLP_")}
    return {
        **variables,
        **ours,
        "CLAUDE_CODE_ENABLE_TELEMETRY": "1",
        "CLAUDE_CODE_ENHANCED_TELEMETRY_BETA": "1",
        "OTEL_TRACES_EXPORTER": "otlp",
        "OTEL_METRICS_EXPORTER": "none",
        "OTEL_LOGS_EXPORTER": "none",
        "OTEL_EXPORTER_OTLP_PROTOCOL": _protocol(environ),
        "OTEL_SERVICE_NAME": service,
        # The CLI's default of 5 s would lose the last spans of a run that is cut short.
        "OTEL_TRACES_EXPORT_INTERVAL": "1000",
    }


def _build_metrics(endpoint: str, environ: Mapping[str, str], redact: Redactor | None) -> Metrics:
    protocol = _protocol(environ, "METRICS")
    url = endpoint if protocol == "grpc" else _url(endpoint, environ, "METRICS")
    return build_metrics(url, protocol, environ, redact or Redactor())


def _protocol(environ: Mapping[str, str], signal: Signal = "TRACES") -> str:
    specific = environ.get(f"OTEL_EXPORTER_OTLP_{signal}_PROTOCOL")
    return specific or environ.get("OTEL_EXPORTER_OTLP_PROTOCOL") or "http/protobuf"


def _build(endpoint: str, environ: Mapping[str, str], content: bool, redact: Redactor | None) -> Exporter:
    # OpenTelemetry costs 0.3 s to import: only those who export pay it, and in a thread.
    from opentelemetry.sdk.trace.export import (  # noqa: PLC0415
        BatchSpanProcessor,
        SpanExporter,
        SpanExportResult,
    )

    if _protocol(environ) == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as Grpc  # noqa: PLC0415

        inner: SpanExporter = Grpc(endpoint=endpoint, timeout=EXPORT_TIMEOUT_SECONDS)
    else:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as Http  # noqa: PLC0415

        inner = Http(endpoint=_url(endpoint, environ, "TRACES"), timeout=EXPORT_TIMEOUT_SECONDS)

    class Counting(SpanExporter):
        """The batch processor throws the result of an export away; we count what was lost."""

        def export(self, spans: Any) -> SpanExportResult:
            try:
                result = inner.export(spans)
            except Exception as error:  # noqa: BLE001  # an endpoint that is no URL, for one
                log.warning("spans could not be sent: %s", error)
                result = SpanExportResult.FAILURE
            if result is SpanExportResult.SUCCESS:
                exporter.delivered += len(spans)
            else:
                exporter.refused += len(spans)
            return result

        def shutdown(self) -> None:
            inner.shutdown()

    exporter = Exporter(
        # Small batches: 64 spans with the longest values still fit a collector's 20 MiB limit.
        BatchSpanProcessor(Counting(), schedule_delay_millis=1000, max_export_batch_size=64),
        content=content,
        redact=redact,
    )
    return exporter


def _url(endpoint: str, environ: Mapping[str, str], signal: Signal) -> str:
    if environ.get(f"OTEL_EXPORTER_OTLP_{signal}_ENDPOINT") == endpoint:
        return endpoint
    return f"{endpoint.rstrip('/')}/v1/{signal.lower()}"


def to_otel(span: SpanData) -> Any:
    """Our span as the SDK's finished span."""
    from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
    from opentelemetry.sdk.trace import ReadableSpan  # noqa: PLC0415
    from opentelemetry.sdk.util.instrumentation import InstrumentationScope  # noqa: PLC0415
    from opentelemetry.trace import SpanContext as OtelContext  # noqa: PLC0415
    from opentelemetry.trace import SpanKind, Status, StatusCode, TraceFlags  # noqa: PLC0415

    def context(span_id: str) -> OtelContext:
        flags = TraceFlags(TraceFlags.SAMPLED)
        return OtelContext(int(span.trace_id, 16), int(span_id, 16), is_remote=False, trace_flags=flags)

    return ReadableSpan(
        name=span.name,
        context=context(span.span_id),
        parent=context(span.parent_id) if span.parent_id else None,
        resource=Resource.create({"service.name": "orchestrator"}),
        attributes=span.attributes,
        kind=SpanKind.INTERNAL,
        status=Status(StatusCode.ERROR, span.error) if span.error else Status(StatusCode.UNSET),
        start_time=span.start_us * 1000,
        end_time=span.end_us * 1000,
        instrumentation_scope=InstrumentationScope("orchestrator"),
    )
