"""Metrics: what is counted, where it goes, and that a collector never gets in the way of a run."""

import logging
import os
import socket
import sys
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import psutil
import pytest

from orchestrator.breakers import Breaker, BreakerConfig
from orchestrator.config import Config, load_config
from orchestrator.delegation import delegate
from orchestrator.memory import measure
from orchestrator.parking import UsageLimit
from orchestrator.pool_report import pool_report, provider_report
from orchestrator.pool_state import PoolLimits, PoolState, Request
from orchestrator.redaction import Redactor
from orchestrator.runtime import Runtime
from orchestrator.store import Run
from orchestrator.task import Task
from orchestrator.telemetry import endpoint_of, open_exporter
from orchestrator.telemetry.metrics import (
    COUNTERS,
    HISTOGRAMS,
    POOL_COUNTERS,
    POOL_GAUGES,
    Measurement,
    of_pool,
    of_run,
)
from orchestrator.testing import ModelServer, Rule
from tests.otlp import otlp_receiver

ENDPOINT, METRICS = "OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT"


def a_run(**fields: Any) -> Run:
    defaults: dict[str, Any] = {
        "id": "a" * 16,
        "trace_id": "b" * 32,
        "root_id": "a" * 16,
        "depth": 1,
        "kind": "agent",
        "name": "helper",
        "status": "succeeded",
        "project": "/srv/project",
        "cwd": "/srv/project",
        "model_requested": "opus",
        "model_used": "claude-opus-5-5",
        "input_tokens": 10,
        "output_tokens": 20,
        "cache_read_tokens": 300,
        "cache_write_tokens": 4000,
        "cost_usd": 0.25,
        "cost_basis": "cli",
        "created_us": 1_700_000_000_000_000,
        "started_us": 1_700_000_000_500_000,
        "ended_us": 1_700_000_002_000_000,
        "instance_id": "i",
    }
    return Run(**{**defaults, **fields})


def config(tmp_path: Path, **more: Any) -> Config:
    overrides = {key.replace("__", "."): value for key, value in more.items()}
    return load_config(project_dir=tmp_path, environ={}, overrides=overrides)


# -- what is counted ----------------------------------------------------------------------------------------

WHO = {
    "gen_ai.operation.name": "invoke_agent",
    "gen_ai.provider.name": "anthropic",
    "gen_ai.agent.name": "helper",
    "gen_ai.request.model": "opus",
    "gen_ai.response.model": "claude-opus-5-5",
}


def test_what_an_agents_run_adds() -> None:
    tokens = {**WHO, "gen_ai.token.modality": "unknown"}
    assert list(of_run(a_run())) == [
        Measurement("orchestrator.runs", 1, {**WHO, "orchestrator.run.status": "succeeded"}),
        Measurement("gen_ai.invoke_agent.duration", 1.5, WHO),
        Measurement("orchestrator.cost", 0.25, {**WHO, "orchestrator.run.cost_basis": "cli"}),
        Measurement("gen_ai.client.inference.usage.input_tokens", 4310, tokens),
        Measurement("gen_ai.client.inference.usage.output_tokens", 20, tokens),
        Measurement("gen_ai.client.inference.usage.cache_read.input_tokens", 300, tokens),
        Measurement("gen_ai.client.inference.usage.cache_write.input_tokens", 4000, tokens),
        Measurement("gen_ai.client.token.usage", 4310, {**WHO, "gen_ai.token.type": "input"}),
        Measurement("gen_ai.client.token.usage", 20, {**WHO, "gen_ai.token.type": "output"}),
    ]


def test_a_plan_adds_no_tokens_and_no_cost_of_its_own() -> None:
    who = {"gen_ai.operation.name": "invoke_workflow", "gen_ai.workflow.name": "review"}
    assert list(of_run(a_run(kind="plan", name="review", depth=0))) == [
        Measurement("orchestrator.runs", 1, {**who, "orchestrator.run.status": "succeeded"}),
        Measurement("gen_ai.invoke_workflow.duration", 1.5, who),
    ]


def test_a_run_that_never_started_is_counted_with_its_error_alone() -> None:
    run = a_run(
        status="failed", error={"code": "queue_full", "message": "secret"}, started_us=None, model_used=None,
        cost_usd=None, input_tokens=0, output_tokens=0, cache_read_tokens=0, cache_write_tokens=0,
    )  # fmt: skip
    [only] = of_run(run)
    assert (only.name, only.value) == ("orchestrator.runs", 1)
    assert only.attributes["error.type"] == "queue_full"
    assert only.attributes["orchestrator.run.status"] == "failed"
    assert "gen_ai.response.model" not in only.attributes
    assert "secret" not in repr(only)


def a_pool() -> PoolState:
    """One process at work, one warm, one that was ended; a second run waits."""
    state = PoolState(PoolLimits(max_processes=1))
    state.want("k", "helper", "opus", 1)
    state.ask(Request("run-1", "k", "helper", "opus"))
    state.decide(now=0)
    [first] = state.workers.values()
    state.started(first)
    state.decide(now=1)
    state.ask(Request("run-2", "k", "helper", "opus"))
    state.decide(now=2)
    state.end(max(state.workers.values(), key=lambda worker: worker.id), "stale")
    state.decide(now=3)
    first.memory_mb = 120.0
    return state


def test_what_the_pool_is_and_did() -> None:
    figures = {(each.name.removeprefix("orchestrator.pool."), *each.attributes.values()): each.value
               for each in of_pool(a_pool())}  # fmt: skip
    assert figures == {
        ("hits",): 0,
        ("session_hits",): 0,
        ("cold_starts",): 1,
        ("refills",): 1,
        ("waits",): 0,
        ("refused",): 0,
        ("retired", "stale"): 1,
        ("queue.length",): 1,
        ("processes", "busy"): 1,
        ("processes", "idle"): 0,
        ("processes", "held"): 0,
        ("processes", "ending"): 1,
        ("memory", "busy"): 120_000_000,
        ("memory", "idle"): 0,
        ("memory", "held"): 0,
        # That of the one which is ending was never measured: unknown, not zero.
    }


def test_the_report_of_the_pool() -> None:
    state = a_pool()
    provider = provider_report(Breaker(name="claude/a").get_stats(10.0), None, parked=0)
    report = pool_report(state, {1: 4711}, now=10.0, max_queue=100, provider=provider)
    assert (report["working"], report["queue"]) == (1, {"length": 1, "max": 100})
    assert report["counters"]["retired"] == {"stale": 1}
    assert report["counters"]["cold_starts"] == 1
    assert report["limits"]["max_processes"] == 1
    assert report["memory_mb"] == 120.0
    busy, ending = report["workers"]
    assert busy == {
        "id": 1,
        "pid": 4711,
        "agent": "helper",
        "model": "opus",
        "phase": "busy",
        "starting": False,
        "run_id": "run-1",
        "parent_id": None,
        "session_id": None,
        "turns": 0,
        "age_s": 10.0,
        "phase_s": 10.0,
        "memory_mb": 120.0,
    }
    assert (ending["phase"], ending["pid"], ending["memory_mb"]) == ("ending", None, None)
    assert report["provider"]["usage_limit"] is None
    assert report["provider"]["circuit"]["state"] == "closed"


def test_the_report_of_a_provider_that_lets_nobody_in() -> None:
    breaker = Breaker(BreakerConfig(failure_threshold=1), "claude/a")
    breaker.failure(breaker.admit(1.0), 1.0, reason="overloaded")
    limit = UsageLimit("a", 1_800_000_000.0, "five_hour", "rate_limit_event")
    report = provider_report(breaker.get_stats(2.0), limit, parked=3)
    assert (report["usage_limit"], report["parked"]) == ({"kind": "five_hour", "resets_at": 1_800_000_000.0}, 3)
    circuit = report["circuit"]
    assert (circuit["state"], circuit["reason"], circuit["retry_after"]) == ("open", "overloaded", 29.0)


@pytest.mark.parametrize("name", [*COUNTERS, *HISTOGRAMS, *POOL_COUNTERS, *POOL_GAUGES])
def test_every_metric_is_documented(name: str) -> None:
    assert f"`{name}`" in (Path(__file__).parent.parent / "docs" / "configuration.md").read_text("utf-8")


def test_all_that_is_measured_has_an_instrument() -> None:
    assert {each.name for each in of_run(a_run())} < {*COUNTERS, *HISTOGRAMS}
    assert {each.name for each in of_pool(a_pool())} == {*POOL_COUNTERS, *POOL_GAUGES}


# -- where it goes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environ", "endpoint"),
    [
        ({}, None),
        ({ENDPOINT: "http://a"}, "http://a"),
        ({ENDPOINT: "http://a", METRICS: "http://b/x"}, "http://b/x"),
        ({METRICS: "http://b/x"}, "http://b/x"),
        ({ENDPOINT: "http://a", "OTEL_METRICS_EXPORTER": "none"}, None),
        ({ENDPOINT: "http://a", "OTEL_TRACES_EXPORTER": "none"}, "http://a"),
        ({ENDPOINT: "http://a", "OTEL_SDK_DISABLED": "true"}, None),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://a"}, None),
    ],
)
def test_the_endpoint_is_that_of_the_standard_variables(environ: dict[str, str], endpoint: str | None) -> None:
    assert endpoint_of(environ, "METRICS") == endpoint


async def test_figures_arrive(tmp_path: Path) -> None:
    async with otlp_receiver() as receiver:
        async with open_exporter(config(tmp_path), {ENDPOINT: f"{receiver.endpoint}/"}) as exporter:
            exporter.watch_pool(a_pool())
            exporter.export(a_run())
            exporter.export(a_run())
            exporter.export(a_run(status="failed", error={"code": "overloaded", "message": "x"}, cost_usd=None))
        assert ("/v1/metrics", "application/x-protobuf") in receiver.requests
        good = receiver.latest("orchestrator.runs", orchestrator__run__status="succeeded")
        assert (good.kind, good.unit, good.value) == ("sum", "{run}", 2)
        assert good.attributes["gen_ai.agent.name"] == "helper"
        assert receiver.latest("orchestrator.runs", error__type="overloaded").value == 1
        assert receiver.latest("orchestrator.cost").value == 0.5
        assert receiver.latest("gen_ai.client.inference.usage.input_tokens").value == 3 * 4310
        took = receiver.latest("gen_ai.invoke_agent.duration", error__type="overloaded")
        assert (took.unit, took.value, took.count, took.bounds[0], took.bounds[-1]) == ("s", 1.5, 1, 0.5, 7200)
        read = receiver.latest("gen_ai.client.token.usage", gen_ai__token__type="input")
        assert (read.value, read.count, read.bounds[:3]) == (3 * 4310, 3, (1, 4, 16))
        assert receiver.latest("orchestrator.pool.cold_starts").value == 1
        retired = receiver.latest("orchestrator.pool.retired", orchestrator__pool__reason="stale")
        assert (retired.kind, retired.value) == ("sum", 1)
        memory = receiver.latest("orchestrator.pool.memory", orchestrator__pool__phase="busy")
        assert (memory.kind, memory.unit, memory.value) == ("gauge", "By", 120_000_000)
        assert good.resource["service.name"] == "orchestrator"
        assert good.resource["service.instance.id"]
    assert exporter.metrics is not None
    assert (exporter.metrics.delivered, exporter.metrics.failed) == (1, 0)


async def test_figures_are_sent_from_time_to_time_and_add_up(tmp_path: Path) -> None:
    async with otlp_receiver() as receiver:
        environ = {METRICS: f"{receiver.endpoint}/v1/metrics", "OTEL_METRIC_EXPORT_INTERVAL": "50"}
        async with open_exporter(config(tmp_path), environ) as exporter:
            assert not exporter.enabled, "no spans were asked for"
            state = a_pool()
            exporter.watch_pool(state)
            for runs in (1, 2):
                exporter.export(a_run())
                await receiver.wait_for_points(
                    lambda _, runs=runs: _counted(receiver.points, "orchestrator.runs") == runs
                )
            state.counters.hits = 7
            await receiver.wait_for_points(lambda points: _counted(points, "orchestrator.pool.hits") == 7)
    assert {path for path, _ in receiver.requests} == {"/v1/metrics"}


def _counted(points: list[Any], name: str) -> float | None:
    return next((point.value for point in reversed(points) if point.name == name), None)


async def test_secrets_are_taken_out_of_names(tmp_path: Path) -> None:
    async with otlp_receiver() as receiver:
        redact = Redactor(["hunter2hunter2"])
        async with open_exporter(config(tmp_path), {ENDPOINT: receiver.endpoint}, redact=redact) as exporter:
            exporter.export(a_run(name="agent-hunter2hunter2"))
        assert receiver.latest("orchestrator.runs")
    assert "hunter2" not in repr(receiver.points)


# -- where it does not --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environ", "more"),
    [
        ({}, {}),
        ({ENDPOINT: "http://127.0.0.1:9"}, {"telemetry__enabled": False}),
        ({METRICS: "http://127.0.0.1:9"}, {"telemetry__metrics": False}),
        ({METRICS: "http://127.0.0.1:9", "OTEL_METRICS_EXPORTER": "none"}, {}),
    ],
)
async def test_metrics_that_are_off_do_nothing(
    tmp_path: Path, environ: dict[str, str], more: dict[str, Any]
) -> None:
    async with open_exporter(config(tmp_path, **more), environ) as exporter:
        assert exporter.metrics is None
        exporter.watch_pool(a_pool())
        exporter.export(a_run())


async def test_a_wrong_setting_costs_the_metrics_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with otlp_receiver() as receiver:
        environ = {ENDPOINT: receiver.endpoint, "OTEL_METRIC_EXPORT_INTERVAL": "often"}
        async with open_exporter(config(tmp_path), environ) as exporter:
            exporter.export(a_run())
        assert [path for path, _ in receiver.requests] == ["/v1/traces"]
    assert f"no metrics will be sent to {receiver.endpoint}" in caplog.text


async def test_a_collector_that_is_gone_or_hangs_costs_seconds_and_is_counted(tmp_path: Path) -> None:
    failed: dict[str, int] = {}

    async def end(name: str, url: str) -> None:
        async with open_exporter(config(tmp_path), {METRICS: url}) as exporter:
            exporter.export(a_run())
        assert exporter.metrics is not None
        failed[name] = exporter.metrics.failed

    with socket.create_server(("127.0.0.1", 0)) as hanging, socket.create_server(("127.0.0.1", 0)) as gone:
        urls = [f"http://127.0.0.1:{each.getsockname()[1]}" for each in (hanging, gone)]
        gone.close()
        # The SDK's own shutdown would wait 30 s.
        with anyio.fail_after(15):
            async with anyio.create_task_group() as tg:
                tg.start_soon(end, "hanging", urls[0])
                tg.start_soon(end, "gone", urls[1])
                tg.start_soon(end, "no address", "nonsense")
    assert failed == {"hanging": 1, "gone": 1, "no address": 1}


async def test_what_a_collector_refuses_is_in_the_next_sending(tmp_path: Path) -> None:
    async with otlp_receiver() as receiver:
        receiver.status = 400
        environ = {METRICS: f"{receiver.endpoint}/v1/metrics", "OTEL_METRIC_EXPORT_INTERVAL": "50"}
        async with open_exporter(config(tmp_path), environ) as exporter:
            exporter.export(a_run())
            await receiver.wait_for_points(lambda _: receiver.requests)
            receiver.status = 200
            await receiver.wait_for_points(lambda points: _counted(points, "orchestrator.runs") == 1)
        assert exporter.metrics is not None
        assert exporter.metrics.failed >= 1
        assert exporter.metrics.delivered >= 1


async def test_grpc_can_be_asked_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    environ = {METRICS: "http://127.0.0.1:9", "OTEL_EXPORTER_OTLP_METRICS_PROTOCOL": "grpc"}
    with anyio.fail_after(15):
        async with open_exporter(config(tmp_path), environ) as exporter:
            assert exporter.metrics is not None
    assert "no metrics will be sent" not in caplog.text


# -- all of it, with the real CLI ---------------------------------------------------------------------------


async def test_real_runs_are_counted_with_the_pool_they_used(
    runtime: Callable[..., AbstractAsyncContextManager[Runtime]], model: ModelServer
) -> None:
    model.rules = [Rule("hello")]
    async with otlp_receiver() as receiver:
        env = {ENDPOINT: receiver.endpoint, "OTEL_TRACES_EXPORTER": "none"}
        async with runtime(env=env) as rt:
            first = await delegate(rt, Task(agent="helper", prompt="hi"))
            again = await delegate(rt, Task(agent="helper", prompt="and again", session=first.session_id))
            runs = [await rt.store.run(outcome.run_id) for outcome in (first, again)]
        counted = receiver.latest("orchestrator.runs", orchestrator__run__status="succeeded")
        assert (counted.value, counted.attributes["gen_ai.agent.name"]) == (2, "helper")
        assert counted.attributes["gen_ai.response.model"] == runs[0].model_used
        told = receiver.latest("gen_ai.client.inference.usage.output_tokens").value
        assert told == sum(run.usage.output_tokens for run in runs)
        assert told > 0
        durations = receiver.latest("gen_ai.invoke_agent.duration")
        assert durations.count == 2
        assert durations.value == pytest.approx(sum((run.duration_ms or 0) / 1000 for run in runs))
        assert receiver.latest("orchestrator.pool.cold_starts").value == 1
        assert receiver.latest("orchestrator.pool.session_hits").value == 1
        assert {path for path, _ in receiver.requests} == {"/v1/metrics"}


# -- memory -------------------------------------------------------------------------------------------------


def test_memory_is_that_of_the_process_itself() -> None:
    """Proportional: more than nothing, and no more than what it has mapped."""
    own = os.getpid()
    figures = measure([own])
    assert set(figures) == {own}
    assert 0 < figures[own] * 1e6 <= psutil.Process(own).memory_info().rss * 1.5


async def test_a_large_process_is_measured_as_one_and_the_dead_are_left_out() -> None:
    hold = "x = bytearray(80_000_000); x[::4096] = b'1' * len(x[::4096]); print('held', flush=True); input()"
    command = [sys.executable, "-c", hold]
    async with await anyio.open_process(command) as large:
        assert large.stdout is not None
        with anyio.fail_after(30):
            assert (await large.stdout.receive()).startswith(b"held")
        figures = await anyio.to_thread.run_sync(measure, [large.pid])
        assert 80 < figures[large.pid] < 160
        large.kill()
        await large.wait()
        assert measure([large.pid]) == {}
