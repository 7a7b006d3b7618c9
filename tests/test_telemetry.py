"""Spans: what is on them, where they go, and that a collector never gets in the way of a run."""

import gzip
import json
import os
import re
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import anyio
import pytest

from orchestrator.config import Config, load_config
from orchestrator.delegation import delegate
from orchestrator.runtime import Runtime
from orchestrator.store import Run, StoredMessage
from orchestrator.task import Task
from orchestrator.telemetry import cli_environment, endpoint_of, names, open_exporter
from orchestrator.telemetry.jaeger import jaeger_json
from orchestrator.telemetry.spans import MAX_VALUE_CHARS, SpanData, run_span, tool_span_id, tool_spans
from orchestrator.testing import ModelServer, Reply, Rule
from orchestrator.tracing import SpanContext
from tests.otlp import OtlpReceiver, otlp_receiver

ROOT = Path(__file__).parent.parent
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
RUN_ID = "a" * 16


def a_run(**fields: Any) -> Run:
    defaults: dict[str, Any] = {
        "id": RUN_ID,
        "trace_id": TRACE,
        "root_id": RUN_ID,
        "depth": 1,
        "kind": "agent",
        "name": "helper",
        "status": "succeeded",
        "prompt": "the secret question",
        "text": "the secret answer",
        "project": "/srv/project",
        "cwd": "/srv/project",
        "created_us": 1_700_000_000_000_000,
        "started_us": 1_700_000_000_500_000,
        "ended_us": 1_700_000_002_000_000,
        "instance_id": "i",
    }
    return Run(**{**defaults, **fields})


def config(tmp_path: Path, **more: Any) -> Config:
    return load_config(
        project_dir=tmp_path, environ={}, overrides={k.replace("__", "."): v for k, v in more.items()}
    )


# -- a run's span -------------------------------------------------------------------------------------------


def test_the_span_of_an_agents_run() -> None:
    run = a_run(
        parent_id="b" * 16,
        depth=2,
        step="review[1]",
        agent={"id": "helper", "description": "Helps", "body": "secret instructions"},
        session_id="session-1",
        session_mode="fork",
        model_requested="opus",
        model_used="claude-opus-5-5",
        input_tokens=10,
        output_tokens=20,
        cache_read_tokens=300,
        cache_write_tokens=4000,
        cost_usd=0.25,
        cost_basis="cli",
    )
    assert run_span(run) == SpanData(
        trace_id=TRACE,
        span_id=RUN_ID,
        parent_id="b" * 16,
        name="invoke_agent helper",
        start_us=1_700_000_000_500_000,
        end_us=1_700_000_002_000_000,
        attributes={
            "gen_ai.operation.name": "invoke_agent",
            "gen_ai.provider.name": "anthropic",
            "gen_ai.agent.name": "helper",
            "gen_ai.agent.id": "helper",
            "gen_ai.agent.description": "Helps",
            "gen_ai.conversation.id": "session-1",
            "gen_ai.request.model": "opus",
            "gen_ai.response.model": "claude-opus-5-5",
            "gen_ai.usage.input_tokens": 4310,
            "gen_ai.usage.output_tokens": 20,
            "gen_ai.usage.cache_read.input_tokens": 300,
            "gen_ai.usage.cache_creation.input_tokens": 4000,
            "gen_ai.usage.cache_write.input_tokens": 4000,
            "orchestrator.run.id": RUN_ID,
            "orchestrator.run.status": "succeeded",
            "orchestrator.run.depth": 2,
            "orchestrator.run.step": "review[1]",
            "orchestrator.run.cost_usd": 0.25,
            "orchestrator.run.cost_basis": "cli",
            "orchestrator.session.mode": "fork",
        },
        error=None,
    )


def test_the_span_of_a_plan_has_no_tokens_of_its_own() -> None:
    span = run_span(a_run(kind="plan", name="review_team", depth=0, cost_usd=1.5, cost_basis="estimate"))
    assert span.name == "invoke_workflow review_team"
    assert span.attributes == {
        "gen_ai.operation.name": "invoke_workflow",
        "gen_ai.workflow.name": "review_team",
        "orchestrator.run.id": RUN_ID,
        "orchestrator.run.status": "succeeded",
        "orchestrator.run.depth": 0,
        "orchestrator.run.cost_usd": 1.5,
        "orchestrator.run.cost_basis": "estimate",
    }


def test_what_is_unknown_is_left_out() -> None:
    attributes = run_span(a_run(cost_usd=None)).attributes
    assert names.RUN_COST not in attributes
    assert names.CONVERSATION_ID not in attributes
    assert None not in attributes.values()


def test_a_run_hangs_under_its_exact_caller() -> None:
    assert run_span(a_run()).parent_id is None
    assert run_span(a_run(parent_id="b" * 16)).parent_id == "b" * 16
    assert run_span(a_run(parent_id="b" * 16, parent_span_id=PARENT)).parent_id == PARENT


@pytest.mark.parametrize("status", ["failed", "cancelled", "timed_out", "interrupted"])
def test_a_run_that_did_not_succeed_is_an_error(status: str) -> None:
    span = run_span(a_run(status=status, error={"code": "overloaded", "message": "try later"}))
    assert span.error == "try later"
    assert span.attributes["error.type"] == "overloaded"
    assert span.attributes["orchestrator.run.status"] == status
    assert run_span(a_run(status=status)).error == status


def test_a_run_that_goes_on_is_no_error_and_has_no_length() -> None:
    queued = run_span(a_run(status="queued", started_us=None, ended_us=None))
    assert (queued.error, queued.start_us, queued.end_us) == (None, queued.start_us, queued.start_us)
    assert run_span(a_run(status="running", ended_us=None)).error is None


# -- content ------------------------------------------------------------------------------------------------


def test_nothing_that_was_said_is_on_a_span_unless_asked_for() -> None:
    run = a_run(agent={"id": "helper", "description": "Helps", "body": "secret instructions"})
    assert "secret" not in json.dumps(run_span(run).attributes)


def test_content_is_in_the_form_of_the_conventions() -> None:
    attributes = run_span(a_run(), content=True).attributes
    assert json.loads(str(attributes["gen_ai.input.messages"])) == [
        {"role": "user", "parts": [{"type": "text", "content": "the secret question"}]}
    ]
    assert json.loads(str(attributes["gen_ai.output.messages"])) == [
        {"role": "assistant", "parts": [{"type": "text", "content": "the secret answer"}]}
    ]
    assert names.INPUT_MESSAGES not in run_span(a_run(prompt=None, text=""), content=True).attributes


@pytest.mark.parametrize(
    "text", ["x" * 200_000, "ü" * 70_000, "\U0001f600" * 50_000, '"\\' * 60_000, "a" * 60_000 + "ü" * 9_000]
)
def test_long_content_is_cut_and_still_json(text: str) -> None:
    said = str(run_span(a_run(text=text), content=True).attributes["gen_ai.output.messages"])
    assert MAX_VALUE_CHARS / 2 < len(said) <= MAX_VALUE_CHARS
    [message] = json.loads(said)
    kept = message["parts"][0]["content"]
    assert kept.endswith("…")
    assert text.startswith(kept.rstrip("…"))


def test_content_that_just_fits_is_whole() -> None:
    overhead = len(str(run_span(a_run(text="x"), content=True).attributes["gen_ai.output.messages"])) - 1
    text = "x" * (MAX_VALUE_CHARS - overhead)
    said = str(run_span(a_run(text=text), content=True).attributes["gen_ai.output.messages"])
    assert json.loads(said)[0]["parts"][0]["content"] == text


# -- tools --------------------------------------------------------------------------------------------------


def recorded(name: str) -> list[StoredMessage]:
    """A recording as the journal would hold it, a message each millisecond."""
    [path] = (ROOT / "tests" / "transcripts").glob(f"{name}-*.ndjson")
    bodies = [json.loads(line) for line in path.read_text("utf-8").split("\n")[:-1]]
    return [
        StoredMessage(seq=n, at_us=n * 1000, type=body["type"], subtype=body.get("subtype"), body=body)
        for n, body in enumerate(bodies)
    ]


def test_a_span_for_each_tool() -> None:
    failed, fine = tool_spans(a_run(), recorded("s03"))
    assert failed == SpanData(
        trace_id=TRACE,
        span_id=tool_span_id(RUN_ID, "toolu_0001_1"),
        parent_id=RUN_ID,
        name="execute_tool Bash",
        start_us=2000,
        end_us=4000,
        attributes={
            "gen_ai.operation.name": "execute_tool",
            "gen_ai.tool.name": "Bash",
            "gen_ai.tool.call.id": "toolu_0001_1",
            "gen_ai.tool.call.arguments": '{"command": "echo out; echo err >&2; exit 3", "description": "x"}',
            "gen_ai.tool.call.result": '"Exit code 3\\nout\\nerr"',
            "orchestrator.run.id": RUN_ID,
        },
        error="the tool failed",
    )
    assert (fine.error, fine.start_us, fine.end_us) == (None, 3000, 5000)


def test_tools_without_content_have_names_only() -> None:
    spans = tool_spans(a_run(), recorded("s03"), content=False)
    assert len(spans) == 2
    assert "echo" not in json.dumps([span.attributes for span in spans])


def test_a_tool_cut_off_ends_with_the_run() -> None:
    cut = [message for message in recorded("s03") if message.type != "user"]
    ended = a_run(ended_us=50_000)
    assert [span.end_us for span in tool_spans(ended, cut)] == [50_000, 50_000]
    assert names.TOOL_RESULT not in tool_spans(ended, cut)[0].attributes
    going_on = tool_spans(a_run(ended_us=None), cut)
    assert all(span.end_us == span.start_us for span in going_on)


def test_tools_of_sub_agents_are_their_own() -> None:
    messages = recorded("s15")
    inner = [m for m in messages if m.body.get("parent_tool_use_id") and "tool_use" in json.dumps(m.body)]
    assert inner, "the recording has tools of a sub-agent"
    assert [span.attributes["gen_ai.tool.name"] for span in tool_spans(a_run(), messages)] == ["Agent"]


def test_span_ids_of_tools_are_stable_and_fit() -> None:
    one, again = tool_span_id(RUN_ID, "toolu_1"), tool_span_id(RUN_ID, "toolu_1")
    assert one == again
    assert re.fullmatch("[0-9a-f]{16}", one)
    assert len({one, tool_span_id(RUN_ID, "toolu_2"), tool_span_id("b" * 16, "toolu_1")}) == 3


def test_huge_tool_values_are_cut() -> None:
    use = {"type": "tool_use", "id": "t", "name": "Write", "input": {"content": "x" * 200_000}}
    body = {"type": "assistant", "message": {"content": [use]}}
    [span] = tool_spans(a_run(), [StoredMessage(seq=1, at_us=1, type="assistant", subtype=None, body=body)])
    assert len(str(span.attributes["gen_ai.tool.call.arguments"])) == MAX_VALUE_CHARS


@pytest.mark.parametrize(
    "message",
    [
        None,
        "text",
        {},
        {"content": None},
        {"content": "text"},
        {"content": [None, "text", 3]},
        {"content": [{"type": "tool_use"}, {"type": "tool_result"}]},
        {"content": [{"type": "tool_use", "id": "t"}, {"type": "tool_use", "name": "Bash"}]},
    ],
)
@pytest.mark.parametrize("kind", ["assistant", "user"])
def test_messages_of_a_new_shape_have_no_tools(kind: str, message: Any) -> None:
    stored = StoredMessage(seq=1, at_us=1, type=kind, subtype=None, body={"type": kind, "message": message})
    assert tool_spans(a_run(), [stored]) == []


# -- Jaeger's file ------------------------------------------------------------------------------------------


def test_a_jaeger_document() -> None:
    run = a_run(
        parent_span_id=PARENT, status="failed", error={"code": "overloaded", "message": "later"}, cost_usd=0.5
    )
    spans = [run_span(run), *tool_spans(run, recorded("s03"))]
    document = json.loads(json.dumps(jaeger_json(spans, service="team")))
    [trace] = document["data"]
    assert trace["traceID"] == TRACE
    assert trace["processes"] == {"p1": {"serviceName": "team", "tags": []}}
    first, *tools = trace["spans"]
    assert first["references"] == [], "its caller is not in the file"
    assert (first["startTime"], first["duration"]) == (1_700_000_000_500_000, 1_500_000)
    assert first["operationName"] == "invoke_agent helper"
    tags = {tag["key"]: (tag["type"], tag["value"]) for tag in first["tags"]}
    assert tags["error"] == ("bool", True)
    assert tags["otel.status_code"] == ("string", "ERROR")
    assert tags["otel.status_description"] == ("string", "later")
    assert tags["span.kind"] == ("string", "internal")
    assert tags["gen_ai.usage.output_tokens"] == ("int64", 0)
    assert tags["orchestrator.run.cost_usd"] == ("float64", 0.5)
    assert len(tools) == 2
    for span in trace["spans"]:
        assert span["processID"] in trace["processes"]
        assert span["traceID"] == TRACE
        assert re.fullmatch("[0-9a-f]{16}", span["spanID"])
        assert isinstance(span["duration"], int)
        assert span["duration"] >= 0
        assert span["logs"] == []
        assert len({tag["key"] for tag in span["tags"]}) == len(span["tags"])
    for span in tools:
        assert span["references"] == [{"refType": "CHILD_OF", "traceID": TRACE, "spanID": RUN_ID}]
    assert [any(tag["key"] == "error" for tag in span["tags"]) for span in tools] == [True, False]


def test_a_jaeger_document_of_several_traces_and_of_none() -> None:
    other = a_run(id="c" * 16, trace_id="e" * 32)
    document = jaeger_json([run_span(a_run()), run_span(other)])
    assert [(trace["traceID"], len(trace["spans"])) for trace in document["data"]] == [(TRACE, 1), ("e" * 32, 1)]
    assert jaeger_json([]) == {"data": []}


# -- where spans go -----------------------------------------------------------------------------------------

ENDPOINT, TRACES = "OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"


@pytest.mark.parametrize(
    ("environ", "endpoint"),
    [
        ({}, None),
        ({ENDPOINT: ""}, None),
        ({ENDPOINT: "http://a"}, "http://a"),
        ({TRACES: "http://b/x"}, "http://b/x"),
        ({ENDPOINT: "http://a", TRACES: "http://b/x"}, "http://b/x"),
        ({ENDPOINT: "http://a", "OTEL_SDK_DISABLED": "TRUE"}, None),
        ({ENDPOINT: "http://a", "OTEL_SDK_DISABLED": "false"}, "http://a"),
        ({ENDPOINT: "http://a", "OTEL_TRACES_EXPORTER": "none"}, None),
        ({ENDPOINT: "http://a", "OTEL_TRACES_EXPORTER": "otlp"}, "http://a"),
    ],
)
def test_the_endpoint_is_that_of_the_standard_variables(environ: dict[str, str], endpoint: str | None) -> None:
    assert endpoint_of(environ) == endpoint


SPAN = SpanContext(TRACE, RUN_ID)
JOIN = {"TRACEPARENT": f"00-{TRACE}-{RUN_ID}-01", "CLAUDE_CODE_PROPAGATE_TRACEPARENT": "1"}


def test_a_cli_always_joins_the_trace(tmp_path: Path) -> None:
    assert cli_environment(config(tmp_path), {}, SPAN, "helper") == JOIN
    environ = {ENDPOINT: "http://a", "OTEL_EXPORTER_OTLP_HEADERS": "k=v"}
    for off in ({"telemetry__enabled": False}, {"telemetry__cli_spans": False}):
        assert cli_environment(config(tmp_path, **off), environ, SPAN, "helper") == JOIN
    disabled = {**environ, "OTEL_SDK_DISABLED": "true"}
    assert cli_environment(config(tmp_path), disabled, SPAN, "helper") == JOIN


def test_a_cli_sends_its_spans_where_ours_go(tmp_path: Path) -> None:
    environ = {
        ENDPOINT: "http://a",
        "OTEL_EXPORTER_OTLP_HEADERS": "k=v",
        "OTEL_SERVICE_NAME": "somebody",
        "OTEL_RESOURCE_ATTRIBUTES": "service.name=somebody",
        "ANTHROPIC_API_KEY": "not for telemetry",
    }
    assert cli_environment(config(tmp_path), environ, SPAN, "helper") == {
        **JOIN,
        ENDPOINT: "http://a",
        "OTEL_EXPORTER_OTLP_HEADERS": "k=v",
        "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
        "CLAUDE_CODE_ENABLE_TELEMETRY": "1",
        "CLAUDE_CODE_ENHANCED_TELEMETRY_BETA": "1",
        "OTEL_TRACES_EXPORTER": "otlp",
        "OTEL_METRICS_EXPORTER": "none",
        "OTEL_LOGS_EXPORTER": "none",
        "OTEL_SERVICE_NAME": "helper",
        "OTEL_TRACES_EXPORT_INTERVAL": "1000",
    }
    grpc = cli_environment(config(tmp_path), {**environ, "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "grpc"}, SPAN, "x")
    assert grpc["OTEL_EXPORTER_OTLP_PROTOCOL"] == "grpc"


async def test_spans_arrive(tmp_path: Path) -> None:
    run = a_run(parent_span_id=PARENT, cost_usd=0.25)
    async with otlp_receiver() as receiver:
        async with open_exporter(config(tmp_path), {ENDPOINT: f"{receiver.endpoint}/"}) as exporter:
            exporter.export(run)
            exporter.export(a_run(id="b" * 16, status="failed", error={"code": "x", "message": "why"}))
        assert ("/v1/traces", "application/x-protobuf") in receiver.requests
        fine, failed = sorted(receiver.spans, key=lambda span: span.span_id)
    expected = run_span(run)
    assert (fine.trace_id, fine.span_id, fine.parent_span_id) == (TRACE, RUN_ID, PARENT)
    assert (fine.name, fine.start, fine.end) == (expected.name, expected.start_us, expected.end_us)
    assert fine.attributes == expected.attributes
    assert (fine.service, fine.scope, fine.status) == ("orchestrator", "orchestrator", "unset")
    assert (failed.status, failed.status_message, failed.parent_span_id) == ("error", "why", "")
    assert (exporter.delivered, exporter.failed) == (2, 0)


async def test_content_goes_only_where_the_settings_say(tmp_path: Path) -> None:
    async with otlp_receiver() as receiver:
        environ = {ENDPOINT: receiver.endpoint}
        async with open_exporter(config(tmp_path), environ) as exporter:
            exporter.export(a_run())
        async with open_exporter(config(tmp_path, telemetry__content=True), environ) as exporter:
            exporter.export(a_run())
        silent, telling = receiver.spans
        assert "secret" not in repr(silent)
        assert "the secret answer" in telling.attributes[names.OUTPUT_MESSAGES]


async def test_spans_arrive_while_the_runtime_goes_on(tmp_path: Path) -> None:
    async with otlp_receiver() as receiver:
        environ = {TRACES: f"{receiver.endpoint}/v1/traces"}
        async with open_exporter(config(tmp_path), environ) as exporter:
            exporter.export(a_run())
            assert [span.span_id for span in await receiver.wait_for(lambda spans: spans)] == [RUN_ID]
        assert exporter.failed == 0


async def test_many_large_spans_go_in_small_batches(tmp_path: Path) -> None:
    run = a_run(text="\u4e2d" * 100_000)
    async with otlp_receiver() as receiver:
        settings = config(tmp_path, telemetry__content=True)
        async with open_exporter(settings, {ENDPOINT: receiver.endpoint}) as exporter:
            for number in range(150):
                exporter.export(run.model_copy(update={"id": f"{number + 1:016x}"}))
        assert len({span.span_id for span in receiver.spans}) == 150
        assert max(int(each["content-length"]) for each in receiver.headers) < 20 * 2**20
    assert exporter.failed == 0


# -- where they do not --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environ", "more"),
    [
        ({}, {}),
        ({ENDPOINT: "http://127.0.0.1:9"}, {"telemetry__enabled": False}),
        ({ENDPOINT: "http://127.0.0.1:9", "OTEL_SDK_DISABLED": "true"}, {}),
        ({ENDPOINT: "http://127.0.0.1:9", "OTEL_TRACES_EXPORTER": "none", "OTEL_METRICS_EXPORTER": "none"}, {}),
    ],
)
async def test_an_exporter_that_is_off_does_nothing(
    tmp_path: Path, environ: dict[str, str], more: dict[str, Any]
) -> None:
    with anyio.fail_after(1):
        async with open_exporter(config(tmp_path, **more), environ) as exporter:
            assert not exporter.enabled
            exporter.export(a_run())
    assert exporter.failed == 0


def test_without_an_endpoint_nothing_is_loaded(tmp_path: Path) -> None:
    code = """
import sys, anyio
from pathlib import Path
from orchestrator.config import load_config
from orchestrator.runtime import open_runtime

async def main():
    config = load_config(project_dir=Path(sys.argv[1]), environ={}, overrides={"data_dir": sys.argv[1]})
    async with open_runtime(config, environ={"HOME": sys.argv[1]}) as rt:
        assert not rt.exporter.enabled
    print(sorted(name for name in sys.modules if name.split(".")[0] in ("opentelemetry", "grpc", "requests")))

anyio.run(main)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env={"PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "PATH": os.defpath},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "[]\n", done.stderr


async def test_grpc_can_be_asked_for(tmp_path: Path) -> None:
    environ = {ENDPOINT: "http://127.0.0.1:9", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}
    with anyio.fail_after(5):
        async with open_exporter(config(tmp_path), environ) as exporter:
            assert exporter.enabled


async def test_settings_an_exporter_cannot_be_built_with_cost_the_spans_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "10")  # smaller than a batch of ours
    async with open_exporter(config(tmp_path), {ENDPOINT: "http://127.0.0.1:9"}) as exporter:
        assert not exporter.enabled
        exporter.export(a_run())
    assert "no spans will be sent to http://127.0.0.1:9" in caplog.text


async def test_a_run_that_makes_no_span_fails_nothing(tmp_path: Path) -> None:
    async with otlp_receiver() as receiver:
        async with open_exporter(config(tmp_path), {ENDPOINT: receiver.endpoint}) as exporter:
            exporter.export(a_run(trace_id="not hex"))
            exporter.export(a_run())
        assert [span.span_id for span in receiver.spans] == [RUN_ID]
    assert exporter.failed == 1


async def shut_down_with(tmp_path: Path, endpoint: str, spans: int) -> int:
    """Spans lost, with ``spans`` queued for a collector that does not take them."""
    run = a_run()
    async with open_exporter(config(tmp_path), {ENDPOINT: endpoint}) as exporter:
        for number in range(spans):
            exporter.export(run.model_copy(update={"id": f"{number + 1:016x}"}))
    return exporter.failed


async def test_a_collector_that_is_gone_or_hangs_costs_seconds_and_its_spans_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    results: dict[str, int] = {}

    async def measure(name: str, endpoint: str, spans: int) -> None:
        results[name] = await shut_down_with(tmp_path, endpoint, spans)

    with socket.create_server(("127.0.0.1", 0)) as hanging, socket.create_server(("127.0.0.1", 0)) as gone:
        urls = [f"http://127.0.0.1:{each.getsockname()[1]}" for each in (hanging, gone)]
        gone.close()
        # The SDK's own shutdown would wait 30 s.
        with anyio.fail_after(10):
            async with anyio.create_task_group() as tg:
                tg.start_soon(measure, "hanging", urls[0], 300)
                tg.start_soon(measure, "gone", urls[1], 300)
                tg.start_soon(measure, "no address", "nonsense", 3)
    assert results == {"hanging": 300, "gone": 300, "no address": 3}
    assert "300 spans were not taken" in caplog.text


async def test_spans_a_collector_refuses_are_counted_as_lost(tmp_path: Path) -> None:
    async with otlp_receiver() as receiver:
        receiver.status = 400
        assert await shut_down_with(tmp_path, receiver.endpoint, 40) == 40
        assert receiver.spans == []
        assert receiver.requests


async def test_a_collector_that_comes_back_gets_what_comes_then(tmp_path: Path) -> None:
    async with otlp_receiver() as receiver:
        receiver.status = 400
        async with open_exporter(config(tmp_path), {ENDPOINT: receiver.endpoint}) as exporter:
            exporter.export(a_run())
            with anyio.fail_after(10):
                while not exporter.failed:  # noqa: ASYNC110  # it is counted in the exporter's own thread
                    await anyio.sleep(0.01)
            receiver.status = 200
            exporter.export(a_run(id="b" * 16))
        assert [span.span_id for span in receiver.spans] == ["b" * 16]
    assert (exporter.delivered, exporter.failed) == (1, 1)


# -- all of it, with the real CLI ---------------------------------------------------------------------------


async def test_a_run_and_its_cli_send_one_trace(
    runtime: Callable[..., AbstractAsyncContextManager[Runtime]], model: ModelServer
) -> None:
    model.rules = [Rule(reply=Reply("hello"))]
    async with otlp_receiver() as receiver:
        async with runtime(env={ENDPOINT: receiver.endpoint}) as rt:
            outcome = await delegate(rt, Task(agent="helper", prompt="hi", parent_span=SpanContext(TRACE, PARENT)))
            run = await rt.store.run(outcome.run_id)
        [ours] = receiver.named("invoke_agent helper")
        assert (ours.trace_id, ours.span_id, ours.parent_span_id) == (TRACE, outcome.run_id, PARENT)
        assert ours.attributes == run_span(run).attributes
        theirs = [span for span in receiver.spans if span.service == "helper"]
        assert {span.trace_id for span in theirs} == {TRACE}
        [interaction] = [span for span in theirs if span.name == "claude_code.interaction"]
        assert interaction.parent_span_id == outcome.run_id
        assert receiver.named("claude_code.llm_request")


# -- the collector of the tests itself ----------------------------------------------------------------------


async def test_the_collector_reads_json_and_compressed_bodies() -> None:
    span = {
        "traceId": TRACE,
        "spanId": RUN_ID,
        "parentSpanId": PARENT,
        "name": "claude_code.interaction",
        "kind": 1,
        "startTimeUnixNano": "1700000000000001000",
        "endTimeUnixNano": "1700000000000002000",
        "attributes": [
            {"key": "n", "value": {"intValue": "7"}},
            {"key": "list", "value": {"arrayValue": {"values": [{"stringValue": "a"}, {"boolValue": True}]}}},
        ],
        "status": {"code": 2, "message": "no"},
    }
    resource = {"attributes": [{"key": "service.name", "value": {"stringValue": "helper"}}]}
    document = {
        "resourceSpans": [{"resource": resource, "scopeSpans": [{"scope": {"name": "s"}, "spans": [span]}]}]
    }
    async with otlp_receiver() as receiver:
        for encoding, body in (
            ("", json.dumps(document).encode()),
            ("gzip", gzip.compress(json.dumps(document).encode())),
        ):
            await post(receiver, body, {"Content-Type": "application/json", "Content-Encoding": encoding})
        first, second = await receiver.wait_for(lambda spans: len(spans) == 2)
    assert first == second
    assert (first.trace_id, first.span_id, first.parent_span_id) == (TRACE, RUN_ID, PARENT)
    assert (first.attributes, first.service) == ({"n": 7, "list": ["a", True]}, "helper")
    assert (first.start, first.end) == (1_700_000_000_000_001, 1_700_000_000_000_002)
    assert (first.status, first.status_message) == ("error", "no")


async def test_waiting_for_spans_that_never_come_names_those_that_did() -> None:
    async with otlp_receiver() as receiver:
        with pytest.raises(TimeoutError, match="seen: none"):
            await receiver.wait_for(lambda spans: spans, timeout=0.05)


async def post(receiver: OtlpReceiver, body: bytes, headers: dict[str, str]) -> None:
    request = urllib.request.Request(f"{receiver.endpoint}/v1/traces", data=body, headers=headers)
    with await anyio.to_thread.run_sync(urllib.request.urlopen, request) as answer:
        assert answer.status == 200
