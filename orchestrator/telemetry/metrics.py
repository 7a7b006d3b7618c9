"""Figures out of the process: what runs came to, and what the pool holds. Best effort, like spans.

``of_run`` and ``of_pool`` say what is measured and are pure; ``Metrics`` hands it to OpenTelemetry. Names are those
of the GenAI semantic conventions where they have one.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from orchestrator.pool_state import PoolState, Worker
from orchestrator.redaction import Redactor
from orchestrator.store import Run
from orchestrator.telemetry import names

if TYPE_CHECKING:
    from opentelemetry.metrics import CallbackOptions, Meter, Observation
    from opentelemetry.sdk.metrics.export import MetricExporter

log = logging.getLogger(__name__)

EXPORT_TIMEOUT_SECONDS = 2.0
#: The default of the OpenTelemetry specification, in milliseconds.
INTERVAL_MS = 60_000.0
#: From a refused start to an hour's work, in seconds; the SDK's own buckets are made for milliseconds.
DURATION_BUCKETS = (0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200)
#: As the conventions have them.
TOKEN_BUCKETS = tuple(4**power for power in range(14))

#: name: unit and description.
COUNTERS = {
    names.RUNS: ("{run}", "Runs that have ended."),
    names.COST: ("{USD}", "Cost of agents' runs in US dollars, where it is known."),
    names.INPUT_TOKENS_USED: ("{token}", "Input tokens, cached ones included."),
    names.OUTPUT_TOKENS_USED: ("{token}", "Output tokens, thinking included."),
    names.CACHE_READ_TOKENS_USED: ("{token}", "Input tokens read from the provider's cache."),
    names.CACHE_WRITE_TOKENS_USED: ("{token}", "Input tokens written to the provider's cache."),
}
HISTOGRAMS = {
    names.AGENT_DURATION: ("s", "Time from start to end of agents' runs.", DURATION_BUCKETS),
    names.WORKFLOW_DURATION: ("s", "Time from start to end of plans.", DURATION_BUCKETS),
    names.TOKEN_USAGE: ("{token}", "Tokens of one run.", TOKEN_BUCKETS),
}
POOL_COUNTERS = {
    names.POOL_HITS: ("{run}", "Runs that were given a warm process."),
    names.POOL_SESSION_HITS: ("{run}", "Runs that were given the process that holds their session."),
    names.POOL_COLD_STARTS: ("{run}", "Runs a process was started for."),
    names.POOL_REFILLS: ("{process}", "Processes that were started to be kept warm."),
    names.POOL_WAITS: ("{run}", "Runs that could not begin at once."),
    names.POOL_REFUSED: ("{run}", "Runs that met a full queue."),
    names.POOL_RETIRED: ("{process}", "Processes that were ended, by reason."),
}
POOL_GAUGES = {
    names.POOL_PROCESSES: ("{process}", "Processes, by phase."),
    names.POOL_QUEUE: ("{run}", "Runs that wait for a process."),
    names.POOL_MEMORY: ("By", "Memory of the processes that have been measured, by phase."),
}
PHASES = ("busy", "idle", "held", "ending")


@dataclass(frozen=True, slots=True)
class Measurement:
    """One figure of one instrument."""

    name: str
    value: float
    attributes: dict[str, str] = field(default_factory=dict)


# -- what is measured ---------------------------------------------------------------------------------------


def of_run(run: Run) -> Iterator[Measurement]:
    """What a run that has ended adds. Unknown costs add nothing; a plan's tokens and cost are its agents'."""
    who = _who(run)
    error = _known({names.ERROR_TYPE: (run.error or {}).get("code")})
    yield Measurement(names.RUNS, 1, {**who, names.RUN_STATUS: run.status, **error})
    if run.duration_ms is not None:
        duration = names.WORKFLOW_DURATION if run.kind == "plan" else names.AGENT_DURATION
        yield Measurement(duration, run.duration_ms / 1000, {**who, **error})
    if run.kind == "agent":
        if run.cost_usd is not None:
            yield Measurement(names.COST, run.cost_usd, {**who, **_known({names.RUN_COST_BASIS: run.cost_basis})})
        yield from _tokens_of(run, who)


def _tokens_of(run: Run, who: Mapping[str, str]) -> Iterator[Measurement]:
    usage = run.usage
    if not usage.total_tokens:
        return
    read = usage.input_tokens + usage.cache_read_tokens + usage.cache_write_tokens
    for name, count in (
        (names.INPUT_TOKENS_USED, read),
        (names.OUTPUT_TOKENS_USED, usage.output_tokens),
        (names.CACHE_READ_TOKENS_USED, usage.cache_read_tokens),
        (names.CACHE_WRITE_TOKENS_USED, usage.cache_write_tokens),
    ):
        yield Measurement(name, count, {**who, names.TOKEN_MODALITY: "unknown"})
    for kind, count in (("input", read), ("output", usage.output_tokens)):
        yield Measurement(names.TOKEN_USAGE, count, {**who, names.TOKEN_TYPE: kind})


def _who(run: Run) -> dict[str, str]:
    """Attributes of few values: each combination is a series of its own for the collector to keep."""
    if run.kind == "plan":
        return {names.OPERATION: names.INVOKE_WORKFLOW, names.WORKFLOW_NAME: run.name}
    return _known(
        {
            names.OPERATION: names.INVOKE_AGENT,
            names.PROVIDER: "anthropic",
            names.AGENT_NAME: run.name,
            names.REQUEST_MODEL: run.model_requested,
            names.RESPONSE_MODEL: run.model_used,
        }
    )


def _known(attributes: Mapping[str, str | None]) -> dict[str, str]:
    return {name: value for name, value in attributes.items() if value is not None}


def of_pool(state: PoolState) -> Iterator[Measurement]:
    """How the pool is now, and its counters.

    It is called from a thread of the SDK while the event loop goes on: whatever may change is copied first, each
    in one step.
    """
    counters, workers = state.counters, list(state.workers.values())
    yield Measurement(names.POOL_HITS, counters.hits)
    yield Measurement(names.POOL_SESSION_HITS, counters.session_hits)
    yield Measurement(names.POOL_COLD_STARTS, counters.cold_starts)
    yield Measurement(names.POOL_REFILLS, counters.refills)
    yield Measurement(names.POOL_WAITS, counters.waits)
    yield Measurement(names.POOL_REFUSED, counters.refused)
    for reason, count in list(counters.retired.items()):
        yield Measurement(names.POOL_RETIRED, count, {names.POOL_REASON: reason})
    yield Measurement(names.POOL_QUEUE, state.waiting)
    for phase in PHASES:
        yield from _of_phase(phase, [worker for worker in workers if worker.phase == phase])


def _of_phase(phase: str, workers: list[Worker]) -> Iterator[Measurement]:
    attributes = {names.POOL_PHASE: phase}
    yield Measurement(names.POOL_PROCESSES, len(workers), attributes)
    measured = [worker.memory_mb for worker in workers if worker.memory_mb is not None]
    if measured or not workers:  # else it is unknown, which is not zero
        yield Measurement(names.POOL_MEMORY, round(sum(measured) * 1e6), attributes)


# -- where it goes ------------------------------------------------------------------------------------------


class Deliveries:
    """How often the collector took what it was sent, and how often not."""

    def __init__(self) -> None:
        self.delivered = 0
        self.failed = 0


class Metrics:
    """Adds up what runs came to and sends it, with the state of the pool, from a thread of its own."""

    def __init__(
        self, meter: "Meter", deliveries: Deliveries, shutdown: Callable[[], None], redact: Redactor
    ) -> None:
        self._meter = meter
        self._deliveries = deliveries
        self._redact = redact
        self.shutdown = shutdown
        self._add = {
            **{name: meter.create_counter(name, unit, text).add for name, (unit, text) in COUNTERS.items()},
            **{
                name: meter.create_histogram(name, unit, text, explicit_bucket_boundaries_advisory=buckets).record
                for name, (unit, text, buckets) in HISTOGRAMS.items()
            },
        }

    @property
    def delivered(self) -> int:
        """How often the collector took the figures."""
        return self._deliveries.delivered

    @property
    def failed(self) -> int:
        """How often it did not. What was not taken is in the next sending, except for the last."""
        return self._deliveries.failed

    def record(self, run: Run) -> None:
        """Count the run that has ended; returns at once and never raises."""
        try:
            for measured in of_run(run):
                attributes = {name: self._redact.text(value) for name, value in measured.attributes.items()}
                self._add[measured.name](measured.value, attributes)
        except Exception:  # a broken instrument must not fail the run it tells about
            log.warning("run %s could not be counted", run.id, exc_info=True)

    def observe(self, state: PoolState) -> None:
        """Send how this pool is whenever something is sent."""
        for name, (unit, text) in POOL_COUNTERS.items():
            self._meter.create_observable_counter(name, [partial(_observed, state, name)], unit, text)
        for name, (unit, text) in POOL_GAUGES.items():
            self._meter.create_observable_gauge(name, [partial(_observed, state, name)], unit, text)


def _observed(state: PoolState, name: str, _: "CallbackOptions") -> Iterable["Observation"]:
    from opentelemetry.metrics import Observation  # noqa: PLC0415  # loaded already when this is called

    return [Observation(each.value, each.attributes) for each in of_pool(state) if each.name == name]


def build_metrics(endpoint: str, protocol: str, environ: Mapping[str, str], redact: Redactor) -> Metrics:
    """Metrics that are sent to ``endpoint``, a full URL, from now on. Loads OpenTelemetry: call it in a thread.

    ``OTEL_METRIC_EXPORT_INTERVAL`` is how often, in milliseconds. Raises ValueError for what cannot be used.
    """
    from opentelemetry.sdk.metrics import MeterProvider  # noqa: PLC0415
    from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader  # noqa: PLC0415
    from opentelemetry.sdk.resources import Resource  # noqa: PLC0415

    deliveries = Deliveries()
    interval = float(environ.get("OTEL_METRIC_EXPORT_INTERVAL") or INTERVAL_MS)
    reader = PeriodicExportingMetricReader(_counting(_exporter(endpoint, protocol), deliveries), interval)
    provider = MeterProvider(
        [reader],
        # Sums of two processes under one name would be taken for one that jumps back and forth.
        resource=Resource.create({"service.name": "orchestrator", "service.instance.id": uuid4().hex}),
        shutdown_on_exit=False,
    )
    return Metrics(provider.get_meter("orchestrator"), deliveries, provider.shutdown, redact)


def _exporter(endpoint: str, protocol: str) -> "MetricExporter":
    if protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import (  # noqa: PLC0415
            OTLPMetricExporter as Grpc,
        )

        return Grpc(endpoint=endpoint, timeout=EXPORT_TIMEOUT_SECONDS)
    from opentelemetry.exporter.otlp.proto.http.metric_exporter import (  # noqa: PLC0415
        OTLPMetricExporter as Http,
    )

    return Http(endpoint=endpoint, timeout=EXPORT_TIMEOUT_SECONDS)


def _counting(inner: "MetricExporter", deliveries: Deliveries) -> "MetricExporter":
    from opentelemetry.sdk.metrics.export import MetricExporter, MetricExportResult  # noqa: PLC0415

    class Counting(MetricExporter):
        """The reader throws the result of an export away; we count what failed."""

        def __init__(self) -> None:
            super().__init__(inner._preferred_temporality, inner._preferred_aggregation)  # noqa: SLF001

        def export(self, metrics_data: Any, timeout_millis: float = 10_000, **more: Any) -> MetricExportResult:
            result = MetricExportResult.FAILURE
            try:
                result = inner.export(metrics_data, timeout_millis, **more)
            except Exception as error:  # noqa: BLE001  # an endpoint that is no URL, for one
                log.warning("metrics could not be sent: %s", error)
            if result is MetricExportResult.SUCCESS:
                deliveries.delivered += 1
            else:
                deliveries.failed += 1
            return result

        def force_flush(self, timeout_millis: float = 10_000) -> bool:
            return inner.force_flush(timeout_millis)

        def shutdown(self, timeout_millis: float = 30_000, **more: Any) -> None:
            inner.shutdown(timeout_millis, **more)

    return Counting()
