"""The scripted model server, driven by a plain HTTP client, by raw sockets, and by the real CLI."""

import importlib.util
import json
import logging
import math
import re
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import httpx2
import pytest

from orchestrator.testing import (
    Fault,
    ModelServer,
    Reply,
    Request,
    Rule,
    Text,
    Thinking,
    ToolUse,
    Usage,
    running_model_server,
)
from orchestrator.testing.scenario import Handler
from orchestrator.testing.scenario_file import parse_scenario

DOCS = Path(__file__).parents[1] / "docs" / "testing.md"
HELLO = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    """One backend for the file; the tests marked with ``both_backends`` run on trio too."""
    return "asyncio"


both_backends = pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])


def body(text: str = "hi", **more: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": text}], **more}


@asynccontextmanager
async def serving(scenario: Any) -> AsyncIterator[tuple[ModelServer, httpx2.AsyncClient]]:
    """A server, and a client to it that gives up soon."""
    async with (
        running_model_server(scenario) as server,
        httpx2.AsyncClient(base_url=server.base_url, timeout=5, trust_env=False) as client,
    ):
        yield server, client


async def post(client: httpx2.AsyncClient, text: str = "hi", **more: Any) -> httpx2.Response:
    headers = more.pop("headers", None)
    return await client.post("/v1/messages?beta=true", json=body(text, **more), headers=headers)


def sse(text: str) -> list[dict[str, Any]]:
    """The data of each event; the event's name must say the same as its type."""
    pairs = [frame.split("\n", 1) for frame in text.split("\n\n") if frame]
    data = [json.loads(line.removeprefix("data: ")) for _, line in pairs]
    assert [name for name, _ in pairs] == [f"event: {item['type']}" for item in data]
    return data


# --- the API ----------------------------------------------------------------------------------------------


@both_backends
async def test_a_streamed_answer_has_the_events_of_the_api() -> None:
    usage = Usage(input=12, output=34, cache_read=5, cache_write_5m=6, cache_write_1h=7)
    reply = Reply([Thinking("hm"), Text("hello"), ToolUse("Read", {"file_path": "a"})], usage=usage)
    async with serving([Rule(reply)]) as (_, client):
        answer = await post(client, stream=True)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["request-id"] == "req_offline_0001"
    stream = sse(answer.text)
    assert [event["type"].removeprefix("content_block_") for event in stream] == [
        *("message_start", "ping"),
        *("start", "delta", "delta", "delta", "stop"),
        *("start", "delta", "delta", "stop"),
        *("start", "delta", "delta", "stop"),
        *("message_delta", "message_stop"),
    ]
    start, end = stream[0]["message"], stream[-2]
    assert (start["id"], start["model"], start["content"]) == ("msg_offline_0001", "m", [])
    assert start["usage"]["output_tokens"] == 1
    assert end["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    expected = {
        "input_tokens": 12,
        "cache_read_input_tokens": 5,
        "cache_creation_input_tokens": 13,
        "cache_creation": {"ephemeral_5m_input_tokens": 6, "ephemeral_1h_input_tokens": 7},
        "output_tokens": 34,
    }
    assert expected.items() <= end["usage"].items()


async def test_without_streaming_the_answer_is_one_message() -> None:
    async with serving([Rule("hello")]) as (_, client):
        answer = await post(client)
    assert answer.headers["content-type"] == "application/json"
    message = answer.json()
    assert message["content"] == [{"type": "text", "text": "hello"}]
    assert (message["stop_reason"], message["usage"]["input_tokens"]) == ("end_turn", 100)


async def test_the_other_routes() -> None:
    async with serving([Rule("hello")]) as (server, client):
        counted = await client.post("/v1/messages/count_tokens", json=HELLO)
        hello = await client.get("/api/hello")
        head = await client.head("/")
        unknown = await client.get("/v1/models")
    assert counted.json()["input_tokens"] > 0
    assert (hello.status_code, head.status_code, head.content) == (200, 200, b"")
    assert unknown.status_code == 404
    assert unknown.json()["error"]["type"] == "not_found_error"
    assert [answer.headers["request-id"][-1] for answer in (counted, hello, head, unknown)] == list("1234")
    assert server.journal == []


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{", "Expecting"),
        (b"[]", "model"),
        (b'{"model": "m", "messages": []}', "messages"),
        (b'{"model": "\xff"}', "utf-8"),
    ],
)
async def test_a_body_the_api_would_refuse_is_refused(content: bytes, reason: str) -> None:
    async with serving([Rule("hello")]) as (server, client):
        answer = await client.post("/v1/messages", content=content)
    assert answer.status_code == 400
    assert reason in answer.json()["error"]["message"]
    assert server.journal == []


async def test_connections_are_kept_alive() -> None:
    async with serving([Rule("hello")]) as (server, _), await anyio.connect_tcp("127.0.0.1", port(server)) as tcp:
        for _ in range(3):
            await tcp.send(raw_request())
            assert b'"text":"hello"' in await receive_until(tcp, b"}]", b'"service_tier":"standard"}}')
        assert len(server.journal) == 3


async def test_something_other_than_http_only_ends_its_own_connection() -> None:
    async with serving([Rule("hello")]) as (server, client):
        async with await anyio.connect_tcp("127.0.0.1", port(server)) as tcp:
            await tcp.send(b"\x16\x03\x01 this is TLS\r\n\r\n")
            assert await drain(tcp) == "closed"
        assert (await post(client)).status_code == 200


async def test_a_client_may_wait_for_permission_to_send() -> None:
    async with serving([Rule("hello")]) as (server, _), await anyio.connect_tcp("127.0.0.1", port(server)) as tcp:
        head, _, content = raw_request(b"Expect: 100-continue\r\n").partition(b"\r\n\r\n")
        await tcp.send(head + b"\r\n\r\n")
        await receive_until(tcp, b"HTTP/1.1 100 ")
        await tcp.send(content)
        await receive_until(tcp, b"HTTP/1.1 200 ")


async def test_a_large_answer_arrives_whole() -> None:
    async with serving([Rule(Reply(Text("abcdefghij", repeat=1_000_000), chunks=100))]) as (_, client):
        stream = sse((await post(client, stream=True)).text)
    texts = [event["delta"]["text"] for event in stream if "text" in event.get("delta", {})]
    assert (len(texts), len("".join(texts))) == (100, 10_000_000)


# --- the scenario -----------------------------------------------------------------------------------------


async def test_a_function_may_be_the_whole_scenario() -> None:
    def answer(request: Request) -> Reply | str | None:
        return None if request.last_user_text == "skip" else f"you said {request.last_user_text}, {{{{ n }}}}"

    async with serving(answer) as (server, client):
        assert (await post(client, "x")).json()["content"][0]["text"] == "you said x, {{ n }}"
        assert (await post(client, "skip")).status_code == 400
    assert len(server.unmatched) == 1


async def test_a_rules_function_may_wait_and_pass_a_request_on() -> None:
    gate = anyio.Event()

    async def gated(request: Request) -> str | None:
        await gate.wait()
        return "gated" if request.last_user_text == "mine" else None

    answers: list[str] = []

    async def ask(client: httpx2.AsyncClient, text: str) -> None:
        answers.append((await post(client, text)).json()["content"][0]["text"])

    async with serving([Rule(gated), Rule("other")]) as (server, client), anyio.create_task_group() as tasks:
        tasks.start_soon(ask, client, "mine")
        tasks.start_soon(ask, client, "yours")
        await server.wait_for("mine")
        await server.wait_for("yours")
        assert answers == []
        gate.set()
    assert sorted(answers) == ["gated", "other"]


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        (Rule(lambda request: f"{request.nope}"), "AttributeError"),  # type: ignore[attr-defined]  the mistake under test
        (Rule("{{ match.nope }}"), "cannot be filled in"),
        (Rule("x", when=lambda request: bool(1 / 0)), "ZeroDivisionError"),
    ],
)
async def test_a_mistake_in_a_rule_reaches_its_author(
    rule: Rule, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving([rule]) as (server, client):
        answer = await post(client)
    assert answer.status_code == 400
    assert reason in answer.json()["error"]["message"]
    assert [why for why in server.unmatched if reason in why]
    assert [record for record in caplog.records if record.exc_info]


async def test_rules_may_change_while_the_server_runs() -> None:
    async with serving([Rule("one", times=1)]) as (server, client):
        assert (await post(client)).json()["content"][0]["text"] == "one"
        server.rules.append(Rule("two"))
        assert (await post(client)).json()["content"][0]["text"] == "two"
        server.rules = [Rule("three")]
        assert (await post(client)).json()["content"][0]["text"] == "three"


async def test_an_unmatched_request_is_answered_with_what_was_seen(caplog: pytest.LogCaptureFixture) -> None:
    scenario = parse_scenario("version: 1\nrules: [{when: {user: never}, reply: x}]", "plan.scenario.yaml")
    with caplog.at_level(logging.WARNING, "orchestrator.testing"):
        async with serving(scenario) as (server, client):
            answer = await post(client, "x" * 300, system="You are a planner.")
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["message"] == (
        f"no rule of plan.scenario.yaml matches request #1: model m, last user text '{'x' * 200}', "
        "tool results none, system starts 'You are a planner.'; add a rule"
    )
    assert server.unmatched == [error["message"]]
    assert [record.message for record in caplog.records if record.levelno == logging.WARNING] == server.unmatched


# --- the journal ------------------------------------------------------------------------------------------


async def test_the_journal_keeps_requests_and_filters_them() -> None:
    async with serving([Rule("ok")]) as (server, client):
        await post(client, "first", system="You plan", headers={"X-Run": "7"})
        await post(client, "second", system="You review", model="haiku")
    assert [request.index for request in server.journal] == [0, 1]
    assert server.journal[0].headers["x-run"] == "7"
    assert server.journal[0].size == int(server.journal[0].headers["content-length"])
    assert server.requests(text="sec") == server.requests(system="review") == server.requests(model="haiku")
    assert server.requests(text="first", system="You") == [server.journal[0]]
    assert server.requests(text="first", system="review") == []
    assert len(server.requests()) == 2


@both_backends
async def test_waiting_for_a_request_that_is_there_or_still_to_come() -> None:
    found: list[int] = []

    async with serving([Rule("ok")]) as (server, client), anyio.create_task_group() as tasks:

        async def wait() -> None:
            found.append((await server.wait_for(lambda request: request.index == 2)).index)

        tasks.start_soon(wait)
        for text in ("a", "b", "c"):
            assert found == []
            await post(client, text)
        found.append((await server.wait_for("b")).index)
    assert sorted(found) == [1, 2]


async def test_waiting_in_vain_says_what_came() -> None:
    async with serving([Rule("ok")]) as (server, client):
        await post(client, "other")
        with pytest.raises(TimeoutError, match=r"no request fits 'this' .*\n  #1: model m, last user text 'other'"):
            await server.wait_for("this", timeout=0)


# --- faults -----------------------------------------------------------------------------------------------


def port(server: ModelServer) -> int:
    return int(server.base_url.rpartition(":")[2])


def raw_request(headers: bytes = b"", **more: Any) -> bytes:
    content = json.dumps(body(**more)).encode()
    length = b"Content-Length: %d\r\n" % len(content)
    return b"POST /v1/messages HTTP/1.1\r\nHost: x\r\n" + headers + length + b"\r\n" + content


async def receive_until(tcp: anyio.abc.SocketStream, *wanted: bytes) -> bytes:
    data = b""
    with anyio.fail_after(5):
        while not all(part in data for part in wanted):
            data += await tcp.receive()
    return data


async def drain(tcp: anyio.abc.SocketStream) -> str:
    """How the server ends the connection."""
    with anyio.fail_after(5):
        while True:
            try:
                await tcp.receive()
            except anyio.EndOfStream:
                return "closed"
            except anyio.BrokenResourceError:
                return "reset"


async def raw_answer(server: ModelServer, enough: Callable[[bytes], bool], *, stream: bool) -> tuple[bytes, str]:
    """What comes over the wire for one request, and how the connection ends: closed, reset, or open still.

    ``enough`` says of the data so far that nothing more is expected; then any more, or the end, has a moment
    left to come.
    """
    data = b""
    with anyio.fail_after(5):
        async with await anyio.connect_tcp("127.0.0.1", port(server)) as tcp:
            await tcp.send(raw_request(stream=stream))
            try:
                while not enough(data):
                    data += await tcp.receive()
                with anyio.move_on_after(0.2):
                    while True:
                        data += await tcp.receive()
            except anyio.EndOfStream:
                return data, "closed"
            except anyio.BrokenResourceError:
                return data, "reset"
    return data, "open"


@both_backends
@pytest.mark.parametrize(
    ("fault", "events", "end"),
    [
        (Fault(truncate_at=3), 3, "closed"),
        (Fault(truncate_at=0), 0, "closed"),
        (Fault(reset_at=3), 3, "reset"),
        (Fault(reset_at=0), 0, "reset"),
        (Fault(stall_at=3), 3, "open"),
        (Fault(stall_at=0), 0, "open"),
        (Fault(malformed_at=3), 8, "open"),
        (Fault(error_at=3), 4, "open"),
    ],
)
async def test_breaks_in_a_stream(fault: Fault, events: int, end: str) -> None:
    async with running_model_server([Rule(Reply("abc", fault=fault))]) as server:
        data, seen = await raw_answer(
            server,
            lambda data: end == "open" and b"\r\n\r\n" in data and data.count(b"event: ") >= events,
            stream=True,
        )
    assert (data.count(b"event: "), seen) == (events, end)
    assert data.startswith(b"HTTP/1.1 200 ") == (fault.reset_at != 0)
    # Only an answer that is complete, faulty as its events may be, has the last chunk.
    assert data.endswith(b"0\r\n\r\n") == (fault.malformed_at is not None or fault.error_at is not None)


@pytest.mark.parametrize(
    ("fault", "end"),
    [
        (Fault(truncate_at=9), "closed"),
        (Fault(reset_at=9), "reset"),
        (Fault(reset_at=0), "reset"),
        (Fault(stall_at=9), "open"),
    ],
)
async def test_breaks_without_streaming(fault: Fault, end: str) -> None:
    async with running_model_server([Rule(Reply("abc", fault=fault))]) as server:
        data, seen = await raw_answer(server, lambda data: end == "open" and b'{"id"' in data, stream=False)
    content = data.partition(b"\r\n\r\n")[2]
    assert seen == end
    assert (content.startswith(b'{"id"'), content.endswith(b"}}")) == (fault.reset_at != 0, False)


async def test_faulty_bodies_without_streaming() -> None:
    overload = Fault(error_at=0, error_type="overloaded_error")
    faults = [Fault(malformed_at=0), Fault(error_at=0, message="broken"), overload]
    async with serving([Rule([Reply(fault=fault) for fault in faults])]) as (_, client):
        malformed, error, overloaded = [await post(client) for _ in faults]
    assert malformed.status_code == 200
    with pytest.raises(json.JSONDecodeError):
        malformed.json()
    assert (error.status_code, error.json()["error"]) == (500, {"type": "api_error", "message": "broken"})
    assert (overloaded.status_code, overloaded.json()["error"]["type"]) == (529, "overloaded_error")


@pytest.mark.parametrize(
    ("fault", "status", "error_type"),
    [
        (Fault(status=401), 401, "authentication_error"),
        (Fault(status=429, headers={"Retry-After": 30}), 429, "rate_limit_error"),
        (Fault(status=529), 529, "overloaded_error"),
        (Fault(status=503), 503, "api_error"),
        (Fault(status=418), 418, "invalid_request_error"),
        (Fault(status=400, error_type="mine", message="words"), 400, "mine"),
    ],
)
async def test_http_errors(fault: Fault, status: int, error_type: str) -> None:
    async with serving([Rule(Reply(fault=fault))]) as (_, client):
        answer = await post(client, stream=True)
    assert (answer.status_code, answer.json()["error"]["type"]) == (status, error_type)
    assert answer.headers.get("retry-after") == ("30" if status == 429 else None)
    assert fault.message is None or answer.json()["error"]["message"] == fault.message


async def test_a_body_of_another_kind() -> None:
    html = Reply(fault=Fault(body="<html>", headers={"Content-Type": "text/x"}), headers={"x-a": "1"})
    async with serving([Rule([Reply(fault=Fault(body="<p>", status=502)), html])]) as (_, client):
        first, second = await post(client), await post(client)
    assert (first.status_code, first.headers["content-type"], first.text) == (502, "text/html", "<p>")
    assert (second.status_code, second.headers["content-type"]) == (200, "text/x")
    assert second.headers["x-a"] == "1"


async def test_headers_of_a_good_answer() -> None:
    async with serving([Rule(Reply(headers={"anthropic-ratelimit-requests-remaining": 3}))]) as (_, client):
        streamed, whole = await post(client, stream=True), await post(client)
    assert [a.headers["anthropic-ratelimit-requests-remaining"] for a in (streamed, whole)] == ["3", "3"]


async def test_delays() -> None:
    reply = Reply("abcd", delay_s=0.2, event_delay_s=0.05, chunks=4)
    async with serving([Rule(reply)]) as (_, client):
        begun = anyio.current_time()
        async with client.stream("POST", "/v1/messages", json=body(stream=True)) as answer:
            head = anyio.current_time() - begun
            await answer.aread()
        total = anyio.current_time() - begun
    events = len(sse(answer.text))
    assert head >= 0.2
    assert total >= 0.2 + (events - 1) * 0.05


class Signal(logging.Handler):
    """Sets an event at the first record."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = anyio.Event()

    def emit(self, record: logging.LogRecord) -> None:
        self.seen.set()


@pytest.mark.parametrize("reply", [Reply(delay_s=3600), Reply(fault=Fault(stall_at=1))])
async def test_the_server_notices_that_a_waiting_client_leaves(
    reply: Reply, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "orchestrator.testing")
    signal = Signal()
    logging.getLogger("orchestrator.testing.model_server").addHandler(signal)
    try:
        async with running_model_server([Rule(reply)]) as server:
            async with await anyio.connect_tcp("127.0.0.1", port(server)) as tcp:
                await tcp.send(raw_request(stream=True))
                await server.wait_for("hi")
                assert not signal.seen.is_set()
            with anyio.fail_after(5):
                await signal.seen.wait()
    finally:
        logging.getLogger("orchestrator.testing.model_server").removeHandler(signal)
    assert "connection ended" in caplog.text


@both_backends
async def test_an_error_inside_the_context_comes_out_as_it_is() -> None:
    with pytest.raises(KeyError, match="mine"):
        async with running_model_server([Rule("x")]):
            raise KeyError("mine")


@both_backends
async def test_leaving_the_context_closes_stalled_connections_at_once() -> None:
    never = anyio.Event()

    async def wait_for_ever(_: Request) -> None:
        await never.wait()

    endless = Reply(Text("x", repeat=20_000_000))  # more than the client's window: the server is stuck in sending
    replies: list[Reply | Handler] = [
        Reply(fault=Fault(stall_at=2)),
        Reply(delay_s=math.inf),
        endless,
        wait_for_ever,
    ]
    rules = [Rule(reply, times=1) for reply in replies]
    streams = []
    with anyio.fail_after(10):
        async with running_model_server(rules) as server:
            for count in range(1, len(replies) + 1):
                streams.append(await anyio.connect_tcp("127.0.0.1", port(server)))
                await streams[-1].send(raw_request(stream=True))
                await server.wait_for(lambda request, count=count: request.index == count - 1)
            begun = anyio.current_time()
        assert anyio.current_time() - begun < 1
        for tcp in streams:
            assert await drain(tcp) in ("closed", "reset")
            await tcp.aclose()


# --- the real CLI -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CLIRun:
    """What one run of the CLI printed."""

    messages: list[dict[str, Any]]
    exit_code: int

    @property
    def result(self) -> dict[str, Any]:
        return next(message for message in reversed(self.messages) if message["type"] == "result")

    @property
    def retries(self) -> list[dict[str, Any]]:
        return [message for message in self.messages if message.get("subtype") == "api_retry"]

    @property
    def blocks(self) -> list[dict[str, Any]]:
        """The content of the assistant's messages, a block each."""
        return [block for m in self.messages if m["type"] == "assistant" for block in m["message"]["content"]]


def cli_binary() -> str:
    spec = importlib.util.find_spec("claude_agent_sdk")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the CLI is not installed: pip install 'orchestrator-mcp[claude]'")
    return str(Path(spec.submodule_search_locations[0]) / "_bundled" / "claude")


def cli_env(home: Path, base_url: str, **more: str) -> dict[str, str]:
    return {
        "HOME": str(home),
        "PATH": "/usr/bin:/bin",
        "TERM": "dumb",
        "LANG": "C.UTF-8",
        "ANTHROPIC_BASE_URL": base_url,
        "ANTHROPIC_API_KEY": "sk-ant-test-loopback",
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "DISABLE_AUTOUPDATER": "1",
        "IS_SANDBOX": "1",
        "CLAUDE_CODE_MAX_RETRIES": "1",
        **more,
    }


async def run_cli(server: ModelServer, home: Path, prompt: str = "hi", *args: str, **env: str) -> CLIRun:
    """One prompt through the CLI."""
    argv = [cli_binary(), "-p", "--input-format", "stream-json", "--output-format", "stream-json", "--verbose"]
    argv += ["--setting-sources", "", "--strict-mcp-config", *args]
    line = {"type": "user", "message": {"role": "user", "content": prompt}, "parent_tool_use_id": None}
    with anyio.fail_after(30):
        done = await anyio.run_process(
            argv,
            input=json.dumps(line).encode() + b"\n",
            env=cli_env(home, server.base_url, **env),
            cwd=home,
            check=False,
        )
    return CLIRun([json.loads(line) for line in done.stdout.splitlines()], done.returncode)


async def test_cli_text_thinking_and_cost(tmp_path: Path) -> None:
    reply = Reply([Thinking("let me think"), Text("four")], usage=Usage(input=12_010, output=5))
    async with running_model_server([Rule(reply, when={"user": r"^two and two$", "model": "opus"})]) as server:
        run = await run_cli(server, tmp_path, "two and two", "--model", "claude-opus-5-5")
    assert (run.result["result"], run.result["is_error"], run.exit_code) == ("four", False, 0)
    assert {"type": "thinking", "thinking": "let me think"}.items() <= run.blocks[0].items()
    # 12,010 tokens at 4 $ per million and 5 at 20 $ per million.
    assert run.result["modelUsage"]["claude-opus-5-5"]["costUSD"] == pytest.approx(0.04814)
    assert (len(server.journal), server.unmatched) == (1, [])


async def test_cli_cache_tokens(tmp_path: Path) -> None:
    usage = Usage(input=10, output=20, cache_read=300, cache_write_5m=40, cache_write_1h=50)
    async with running_model_server([Rule(Reply("ok", usage=usage))]) as server:
        run = await run_cli(server, tmp_path)
    seen = run.result["usage"]
    assert (seen["input_tokens"], seen["output_tokens"]) == (10, 20)
    assert (seen["cache_read_input_tokens"], seen["cache_creation_input_tokens"]) == (300, 90)
    assert seen["cache_creation"] == {"ephemeral_5m_input_tokens": 40, "ephemeral_1h_input_tokens": 50}


async def test_cli_runs_tools_called_in_parallel(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("content of a\n")
    calls = [
        ToolUse("Read", {"file_path": str(tmp_path / "a.txt")}),
        ToolUse("Bash", {"command": "echo from bash"}),
    ]
    done = Rule("done: {{ tool_results }}", when={"tool_result": "from bash"})
    async with running_model_server(
        [Rule(Reply(calls), when={"tools": ["Read", "Bash"], "nth": 1}), done]
    ) as server:
        run = await run_cli(server, tmp_path, "read both")
        second = await server.wait_for("content of a", timeout=0)
    assert second.index == 1
    assert [result.tool_use_id for result in second.tool_results] == [
        "toolu_offline_0001_0",
        "toolu_offline_0001_1",
    ]
    assert [result.is_error for result in second.tool_results] == [False, False]
    assert "read both" in second.texts
    assert run.result["result"].startswith("done: ")
    assert "content of a" in run.result["result"]


async def test_cli_tells_partial_messages(tmp_path: Path) -> None:
    async with running_model_server([Rule(Reply("abcdef", chunk_size=2))]) as server:
        run = await run_cli(server, tmp_path, "hi", "--include-partial-messages")
    events = [m["event"] for m in run.messages if m["type"] == "stream_event"]
    deltas = [event["delta"]["text"] for event in events if event["type"] == "content_block_delta"]
    assert deltas == ["ab", "cd", "ef"]


async def test_cli_shows_what_no_rule_matched(tmp_path: Path) -> None:
    async with running_model_server([Rule("x", when={"user": "something else"})]) as server:
        run = await run_cli(server, tmp_path, "what is this?")
    assert run.result["is_error"]
    assert "no rule of the scenario matches request #" in run.result["result"]
    assert "last user text 'what is this?'" in run.result["result"]


async def test_cli_with_tool_input_that_is_no_json(tmp_path: Path) -> None:
    async with running_model_server([Rule([ToolUse("Bash", '{"command": "ec'), "recovered"])]) as server:
        run = await run_cli(server, tmp_path)
    assert run.result["result"] == "recovered"
    assert server.journal[1].tool_results[0].is_error


@pytest.mark.parametrize(
    ("fault", "requests", "error", "error_type"),
    [
        (Fault(status=401, message="invalid x-api-key"), 1, "authentication_failed", "authentication_error"),
        (Fault(status=403), 1, "authentication_failed", "permission_error"),
        (Fault(status=404, message="model: no-such-model"), 2, "model_not_found", "not_found_error"),
        (Fault(status=429, headers={"x-should-retry": "false"}), 1, "rate_limit", "rate_limit_error"),
        (Fault(status=500), 1, "server_error", "api_error"),
        (Fault(status=529), 1, "server_error", "overloaded_error"),
    ],
)
async def test_cli_gives_up(tmp_path: Path, fault: Fault, requests: int, error: str, error_type: str) -> None:
    async with running_model_server([Rule(Reply(fault=fault))]) as server:
        run = await run_cli(server, tmp_path, CLAUDE_CODE_MAX_RETRIES="0")
    assert (run.result["is_error"], run.exit_code, len(server.journal)) == (True, 1, requests)
    assert (run.result["api_error_status"], run.result["api_error_type"]) == (fault.status, error_type)
    assert [message["error"] for message in run.messages if "error" in message] == [error]


async def test_cli_gives_up_on_a_login_page(tmp_path: Path) -> None:
    async with running_model_server([Rule(Reply(fault=Fault(body="<html>log in</html>")))]) as server:
        run = await run_cli(server, tmp_path, CLAUDE_CODE_MAX_RETRIES="0")
    assert run.result["is_error"]
    assert "empty or malformed response (HTTP 200)" in run.result["result"]


@pytest.mark.parametrize(
    ("fault", "retried", "streamed"),
    [
        (Fault(status=529), True, True),
        (Fault(status=429, headers={"retry-after": 1}), True, True),
        (Fault(truncate_at=4), True, True),
        (Fault(reset_at=4), True, True),
        (Fault(reset_at=0), True, True),
        # Asked again at once and without streaming, which is not announced as a retry.
        (Fault(malformed_at=3), False, False),
        (Fault(error_at=4, error_type="overloaded_error"), False, False),
    ],
)
async def test_cli_recovers(tmp_path: Path, fault: Fault, retried: bool, streamed: bool) -> None:
    async with running_model_server([Rule([Reply("abc", fault=fault), "recovered"])]) as server:
        run = await run_cli(server, tmp_path)
    assert (run.result["result"], run.result["is_error"], run.exit_code) == ("recovered", False, 0)
    assert [request.stream for request in server.journal] == [True, streamed]
    assert bool(run.retries) == retried


# --- the guide --------------------------------------------------------------------------------------------


def test_the_scenarios_in_the_guide_load() -> None:
    blocks = re.findall(r"```yaml\n(version: 1.*?)```", DOCS.read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        parse_scenario(block, "docs/testing.md")


async def test_the_program_in_the_guide_runs(tmp_path: Path) -> None:
    (program,) = re.findall(r"```python\n(import .*?)```", DOCS.read_text(), re.DOTALL)
    (tmp_path / "example.py").write_text(program)
    (tmp_path / "claude").symlink_to(cli_binary())
    root = str(DOCS.parents[1])
    env = {"HOME": str(tmp_path), "PATH": f"{tmp_path}:/usr/bin:/bin", "PYTHONPATH": root}
    with anyio.fail_after(30):
        done = await anyio.run_process([sys.executable, "example.py"], cwd=tmp_path, env=env, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode().strip() == "The README is about boats."
