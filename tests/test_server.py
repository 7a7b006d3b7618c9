"""The served runtime: the HTTP door and its checks, the line door, one server per data directory, its end."""

import json
import logging
import os
import resource
import signal
import socket
import stat
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import httpx2
import pytest
from anyio.abc import SocketStream, TaskGroup, TaskStatus
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mcp import Client, MCPError
from mcp.client.streamable_http import streamable_http_client
from mcp_types import JSONRPCNotification, JSONRPCRequest, JSONRPCResponse, TextContent
from starlette.requests import Request as HTTPRequest
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from mcp_tools import open_door, open_doors
from mcp_tools.lines import Lines, Unanswered
from orchestrator import __version__
from orchestrator.delegation import submit, wait
from orchestrator.errors import ServerUnavailableError
from orchestrator.runtime import Runtime
from orchestrator.server import ServerState, claimed, read_state, serve, server_token, write_private
from orchestrator.specs import OUR_TOOLS
from orchestrator.task import Task
from orchestrator.testing import ModelServer, Request, Rule
from orchestrator.tracing import SpanContext, new_run_id, new_trace_id

Open = Callable[..., AbstractAsyncContextManager[Runtime]]
TOKEN = "the-token-of-the-test"


class Gate:
    """A model that answers when the test lets it."""

    def __init__(self) -> None:
        self.opened = anyio.Event()

    async def __call__(self, request: Request) -> str:
        await self.opened.wait()
        return "at last"


@asynccontextmanager
async def connected(url: str, token: str, *, mode: str = "auto", **headers: str) -> AsyncIterator[Client]:
    """An MCP client over HTTP."""
    headers = {"authorization": f"Bearer {token}", **headers}
    async with (
        httpx2.AsyncClient(headers=headers, timeout=30) as http,
        Client(streamable_http_client(url, http_client=http), mode=mode) as client,
    ):
        yield client


async def call(client: Client, tool: str, **arguments: Any) -> str:
    [block] = (await client.call_tool(tool, arguments)).content
    assert isinstance(block, TextContent)
    return block.text


@pytest.fixture
async def url(rt: Runtime) -> AsyncIterator[str]:
    """The URL of ``rt``'s HTTP door."""
    async with open_doors(rt, token=TOKEN) as doors:
        yield doors.url


# -- the HTTP door ------------------------------------------------------------------------------------------


async def test_requests_are_checked(rt: Runtime, url: str) -> None:
    base = url.removesuffix("/mcp")
    good = {"authorization": f"Bearer {TOKEN}"}
    async with httpx2.AsyncClient(base_url=base) as http:

        async def status(path: str, **headers: str) -> int:
            return (await http.get(path, headers=headers)).status_code

        assert await status("/healthz") == 200
        assert (await http.get("/healthz")).json() == {"ok": True, "version": __version__}
        assert await status("/readyz", **good) == 200
        for path in ("/mcp", "/readyz", "/", "/nothing"):
            assert await status(path) == 401
        for wrong in ("Bearer wrong", f"Basic {TOKEN}", TOKEN, "Bearer", "Bearer é"):
            response = await http.get("/readyz", headers={b"authorization": wrong.encode()})
            assert response.status_code == 401
            # Anything about OAuth here would send clients looking for an authorization server.
            assert response.headers["www-authenticate"] == "Bearer"
        for path in ("/healthz", "/mcp", "/readyz"):
            assert await status(path, **good, host="rebound.example") == 421
            assert await status(path, **good, host="127.0.0.1:1") == 421
            assert await status(path, **good, origin="http://rebound.example") == 403
            assert await status(path, **good, origin=base.replace("http", "https")) == 403
        assert await status("/readyz", **good, origin=base) == 200
        rt.closing = True
        assert await status("/readyz", **good) == 503


@pytest.mark.parametrize("mode", ["auto", "legacy"])
async def test_a_client_over_http(model: ModelServer, url: str, mode: str) -> None:
    model.rules = [Rule("over http")]
    async with connected(url, TOKEN, mode=mode) as client:
        assert len((await client.list_tools()).tools) == len(OUR_TOOLS)
        assert (await call(client, "delegate", agent="helper", prompt="x")).startswith("over http\n")


async def test_a_client_with_a_wrong_token(url: str) -> None:
    with pytest.raises((MCPError, ExceptionGroup)):
        async with connected(url, "wrong") as client:
            await client.list_tools()


async def test_a_prompt_of_megabytes(rt: Runtime, url: str) -> None:
    prompt = "a line\n" * 1_000_000
    async with connected(url, TOKEN) as client:
        assert "still running" in await call(client, "delegate", agent="helper", prompt=prompt, wait_s=0)
    [row] = await rt.store.runs()
    assert row.prompt == prompt


async def test_progress_over_http(model: ModelServer, url: str) -> None:
    gate = Gate()
    model.rules = [Rule(gate)]

    async def hear(progress: float, total: float | None, message: str | None) -> None:
        assert message
        gate.opened.set()

    async with connected(url, TOKEN) as client:
        with anyio.fail_after(20):
            result = await client.call_tool("delegate", {"agent": "helper", "prompt": "x"}, progress_callback=hear)
        assert not result.is_error


@pytest.mark.parametrize(("options", "status"), [({}, "succeeded"), ({"cancel_on_disconnect": True}, "cancelled")])
async def test_a_connection_that_breaks(
    rt: Runtime, model: ModelServer, url: str, options: dict[str, Any], status: str
) -> None:
    gate = Gate()
    model.rules = [Rule(gate)]
    body = {
        "jsonrpc": "2.0",
        "id": 1,
        "method": "tools/call",
        "params": {
            "name": "delegate",
            "arguments": {"agent": "helper", "prompt": "go on", **options},
            "_meta": {
                "io.modelcontextprotocol/protocolVersion": "2026-07-28",
                "io.modelcontextprotocol/clientCapabilities": {},
                "progressToken": 7,
            },
        },
    }
    headers = {
        "authorization": f"Bearer {TOKEN}",
        "accept": "application/json, text/event-stream",
        "mcp-protocol-version": "2026-07-28",
        "mcp-method": "tools/call",
        "mcp-name": "delegate",
    }
    async with (
        httpx2.AsyncClient(timeout=30) as http,
        http.stream("POST", url, json=body, headers=headers) as answer,
    ):
        assert answer.status_code == 200
        await model.wait_for("go on")

    [row] = await rt.store.runs()
    if status == "cancelled":
        with anyio.fail_after(10):
            assert (await wait(rt, row.id)).status == status
    gate.opened.set()
    with anyio.fail_after(10):
        assert (await wait(rt, row.id)).status == status


# -- tokens of runs -----------------------------------------------------------------------------------------


async def test_a_runs_token_is_that_run(rt: Runtime, model: ModelServer) -> None:
    gate = Gate()
    model.rules = [Rule(gate, when={"user_contains": "outer"}), Rule("inner")]
    async with open_door(rt) as door:
        outer = await submit(rt, Task(agent="worker", prompt="outer"))
        trace_id = (await rt.store.run(outer)).trace_id
        token = rt.tokens.issue("a process")
        rt.tokens.assign("a process", outer)
        inside, outside = SpanContext(trace_id, new_run_id()), SpanContext(new_trace_id(), new_run_id())
        for span in (inside, outside):
            async with connected(door.url, token, traceparent=span.traceparent) as client:
                await call(client, "delegate", agent="helper", prompt="x")
        gate.opened.set()
        await wait(rt, outer)

        rt.tokens.assign("a process", None)
        async with connected(door.url, token) as client:
            assert "works for no run" in await call(client, "delegate", agent="helper", prompt="x")
        rt.tokens.revoke("a process")
        async with httpx2.AsyncClient() as http:
            late = await http.get(door.url, headers={"authorization": f"Bearer {token}"})

    first, second = [run for run in await rt.store.tree(outer) if run.depth == 2]
    assert {(run.parent_id, run.trace_id) for run in (first, second)} == {(outer, trace_id)}
    # A span of another trace is not where a child of this run can hang.
    assert (first.parent_span_id, second.parent_span_id) == (inside.span_id, None)
    assert late.status_code == 401


async def test_a_runs_token_opens_mcp_and_nothing_else(rt: Runtime) -> None:
    """An agent must not read of other people's runs what its tools do not tell it."""

    async def page(_: HTTPRequest) -> Response:
        return PlainTextResponse("a page")

    token = rt.tokens.issue("a process")
    routes = [Route("/page", page), Route("/mcp-page", page)]
    async with open_doors(rt, token=TOKEN, routes=routes) as doors, httpx2.AsyncClient() as http:

        async def status(path: str, token: str) -> int:
            address = doors.url.removesuffix("/mcp") + path
            return (await http.get(address, headers={"authorization": f"Bearer {token}"})).status_code

        for path in ("/pool", "/readyz", "/page", "/mcp-page", "/mcp/", "/mcp/../pool", "//pool", "/nothing"):
            assert await status(path, token) == 401
        for path in ("/pool", "/readyz", "/page", "/mcp-page"):
            assert await status(path, TOKEN) == 200
        assert await status("/mcp", token) == await status("/mcp", TOKEN) != 401
        async with connected(doors.url, token) as agent:
            assert (await agent.list_tools()).tools


async def test_an_agent_waits_longer_than_a_person(runtime: Open, model: ModelServer) -> None:
    """An agent that asks again and again pays for a turn each time; a person's call goes to the background."""
    gate, last = Gate(), Gate()
    model.rules = [Rule(last, when={"user_contains": "outer"}), Rule(gate)]
    answers: list[str] = []
    async with runtime(server__mcp_wait_s=0.1) as rt, open_doors(rt, token=TOKEN) as doors:
        outer = await submit(rt, Task(agent="worker", prompt="outer"))

        async def delegates() -> None:
            token = rt.tokens.issue("a process")
            rt.tokens.assign("a process", outer)
            async with connected(doors.url, token) as agent:
                answers.append(await call(agent, "delegate", agent="helper", prompt="inner"))

        async with connected(doors.url, TOKEN) as person:
            async with anyio.create_task_group() as tg:
                tg.start_soon(delegates)
                await model.wait_for("inner")
                assert "still running" in await call(person, "run_wait", run_ids=[outer])
                gate.opened.set()
            last.opened.set()

    assert answers[0].startswith("at last\n[run_id=")


async def test_a_door_for_agents_has_no_other_key(rt: Runtime) -> None:
    async with open_doors(rt) as doors, httpx2.AsyncClient() as http:
        assert doors.line_port is None
        for token in ("None", TOKEN):
            assert (await http.get(doors.url, headers={"authorization": f"Bearer {token}"})).status_code == 401


# -- the line door ------------------------------------------------------------------------------------------


class Wire:
    """A raw connection to the line door."""

    def __init__(self, stream: anyio.abc.SocketStream) -> None:
        self.stream = stream
        self._buffer = b""

    async def say(self, value: Any) -> None:
        line = value if isinstance(value, bytes) else json.dumps(value).encode()
        await self.stream.send(line + b"\n")

    async def hear(self) -> Any:
        with anyio.fail_after(10):
            while b"\n" not in self._buffer:
                self._buffer += await self.stream.receive()
        line, _, self._buffer = self._buffer.partition(b"\n")
        return json.loads(line)

    async def last_words(self) -> bytes:
        """Say no more, and hear the other end out."""
        said = self._buffer
        with anyio.fail_after(10), suppress(anyio.EndOfStream, anyio.BrokenResourceError):
            await self.stream.send_eof()
            while True:
                said += await self.stream.receive()
        return said

    async def ended(self) -> bool:
        with anyio.fail_after(10), pytest.raises((anyio.EndOfStream, anyio.BrokenResourceError)):
            await self.stream.receive()
        return True


@pytest.fixture
async def dial(rt: Runtime) -> AsyncIterator[Callable[[], Any]]:
    """Connects to ``rt``'s line door."""
    async with open_doors(rt, token=TOKEN) as doors:
        assert doors.line_port

        @asynccontextmanager
        async def one() -> AsyncIterator[Wire]:
            async with await anyio.connect_tcp("127.0.0.1", doors.line_port or 0) as stream:
                yield Wire(stream)

        yield one


@pytest.mark.parametrize("hello", [{"token": "wrong"}, {"token": None}, {}, [TOKEN], b"GET / HTTP/1.1", b"\xff"])
async def test_the_line_door_wants_the_token(dial: Any, hello: Any) -> None:
    async with dial() as wire:
        await wire.say(hello)
        assert await wire.hear() == {"ok": False, "error": "the token is wrong"}
        assert await wire.ended()


async def test_a_hello_is_short(dial: Any) -> None:
    async with dial() as wire:
        await wire.say({"token": TOKEN, "version": "x" * 5000})
        assert await wire.ended()


async def test_the_line_door_answers_what_is_not_a_message(dial: Any) -> None:
    async with dial() as wire:
        await wire.say({"token": TOKEN})
        assert await wire.hear() == {"ok": True, "version": __version__}
        await wire.say(b"{broken")
        assert (await wire.hear())["error"]["code"] == -32700
        await wire.say({"jsonrpc": "2.0", "id": 5, "method": 7})
        answer = await wire.hear()
        assert (answer["id"], answer["error"]["code"]) == (5, -32600)
        await wire.say({"jsonrpc": "2.0", "id": 6, "method": "ping"})
        assert (await wire.hear())["id"] == 6


CANCELLED = '{"jsonrpc":"2.0","method":"notifications/cancelled","params":%s}'
REQUEST = '{"jsonrpc":"2.0","id":1,"method":"tools/call","params":%s}'
MODERN = (
    '"_meta":{"io.modelcontextprotocol/protocolVersion":"2026-07-28",'
    '"io.modelcontextprotocol/clientCapabilities":{}%s}'
)

HELLOS = [
    rb'{"token":"\ud800"}',
    rb'{"token":"\udcff\ud800"}',
    rb'{"token":"\u0000"}',
    '{"token":"é\u2028"}'.encode(),
    b'{"token":"\xed\xa0\x80"}',
    b'{"token":[]}',
    b'{"token":{"token":1}}',
    b'{"token":1e999}',
    b'{"token":true}',
    b'{"token":' + b"9" * 4000 + b"}",
    b"[" * 4000,
    b'{"a":' * 700,
    b'"' + b"x" * 4000,
    b"NaN",
    b"null",
    b"\x00",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"PRI * HTTP/2.0",
    b"\xfe\xff\x00{",
    b"",
]

SAID = [
    b"",
    b"\x00",
    b"\xff\xfe",
    b"null",
    b"NaN",
    b"[]",
    b'[{"jsonrpc":"2.0","id":1,"method":"ping"}]',
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b'{"jsonrpc":"2.0"}',
    rb'{"jsonrpc":"2.0","id":"\ud800","method":"ping"}',
    rb'{"jsonrpc":"2.0","id":"\ud800","method":7}',
    rb'{"jsonrpc":"2.0","id":1,"method":"\udfff"}',
    rb'{"jsonrpc":"2.0","id":1,"method":"\u0000"}',
    rb'{"jsonrpc":"2.0","id":1,"method":"ping","\ud800":1}',
    b'{"jsonrpc":"2.0","id":1e999,"method":7}',
    b'{"jsonrpc":"2.0","id":NaN,"method":7}',
    b'{"jsonrpc":"2.0","id":true,"method":"ping"}',
    b'{"jsonrpc":"2.0","id":true,"method":7}',
    b'{"jsonrpc":"2.0","id":null,"method":"ping"}',
    b'{"jsonrpc":"2.0","id":[1],"method":"ping"}',
    b'{"jsonrpc":"2.0","id":{},"method":7}',
    b'{"jsonrpc":"2.0","id":1.5,"method":"ping"}',
    b'{"jsonrpc":"2.0","id":' + b"9" * 4000 + b',"method":"ping"}',
    b'{"jsonrpc":"2.0","id":' + b"9" * 5000 + b',"method":"ping"}',
    b'{"jsonrpc":"2.0","id":"' + b"9" * 5000 + b'","method":"ping"}',
    b'{"jsonrpc":"2.0","id":1,"method":"ping","params":[1]}',
    b'{"jsonrpc":"2.0","id":1,"method":"ping","params":{"_meta":7}}',
    b'{"jsonrpc":"2.0","id":1,"method":"ping","params":{"_meta":{"progressToken":[1]}}}',
    b'{"jsonrpc":"2.0","id":1,"result":{}}',
    b'{"jsonrpc":"2.0","id":1,"result":[]}',
    b'{"jsonrpc":"2.0","id":1,"error":{"code":1,"message":"m"}}',
    b'{"jsonrpc":"2.0","id":null,"error":{"code":1,"message":"m"}}',
    b'{"jsonrpc":"2.0","id":1,"error":7}',
    *(
        (CANCELLED % params).encode()
        for params in (
            "{}", "null", "[]", '{"requestId":[1]}', '{"requestId":{"a":1}}', '{"requestId":[[]]}',
            '{"requestId":null}', '{"requestId":true}', '{"requestId":1.5}', '{"requestId":"1"}', '{"requestId":1}',
            '{"requestId":"%s"}' % ("9" * 5000), '{"requestId":1,"reason":[{}]}', '{"requestId":"\\u0000"}',
        )
    ),
    b'{"jsonrpc":"2.0","method":"notifications/progress","params":{"progressToken":[],"progress":{}}}',
    b'{"jsonrpc":"2.0","method":"notifications/initialized","params":{"_meta":[]}}',
    b'{"jsonrpc":"2.0","method":"notifications/\xed\xa0\x80"}',
    b'{"jsonrpc":"2.0","id":1,"method":"initialize"}',
    b'{"jsonrpc":"2.0","id":1,"method":"initialize","params":{"protocolVersion":[],"capabilities":7}}',
    b'{"jsonrpc":"2.0","id":1,"method":"subscriptions/listen","params":{"a":[]}}',
    *(
        (REQUEST % params).encode()
        for params in (
            "{}", '{"name":[]}', '{"name":"delegate","arguments":[]}',
            "{%s}" % (MODERN % ""),
            '{"name":"nothing",%s}' % (MODERN % ""),
            '{"name":"list_agents","arguments":{},%s}' % (MODERN % ',"traceparent":[7]'),
            '{"name":"list_agents","arguments":{},%s}' % (MODERN % ',"traceparent":"00-x","progressToken":{}'),
            '{"name":"list_agents","arguments":{},%s}' % (MODERN % ',"orchestrator/caller":[[]]'),
            '{"name":"list_agents","arguments":{},%s}'
            % (MODERN % ',"orchestrator/caller":{"project_dir":"/\\u0000","run_id":{}}'),
            '{"_meta":{"io.modelcontextprotocol/protocolVersion":[]}}',
            '{"_meta":{"io.modelcontextprotocol/protocolVersion":"2026-07-28",'
            '"io.modelcontextprotocol/clientCapabilities":7}}',
        )
    ),
]  # fmt: skip


async def is_well(dial: Any) -> bool:
    """Whether a client that behaves is served."""
    async with dial() as wire:
        await wire.say({"token": TOKEN})
        welcome = await wire.hear()
        await wire.say({"jsonrpc": "2.0", "id": 6, "method": "ping"})
        return welcome["ok"] is True and (await wire.hear())["id"] == 6


async def test_no_hello_ends_the_line_door(dial: Any, caplog: pytest.LogCaptureFixture) -> None:
    for line in HELLOS:
        async with dial() as wire:
            await wire.say(line)
            await wire.last_words()
        assert await is_well(dial), line
        assert "a defect" not in caplog.text, line


async def test_no_line_ends_the_line_door(dial: Any, caplog: pytest.LogCaptureFixture) -> None:
    for line in SAID:
        async with dial() as wire:
            await wire.say({"token": TOKEN})
            await wire.say(line)
            await wire.last_words()
        assert await is_well(dial), line
        assert "a defect" not in caplog.text, line


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
METHODS = ["notifications/cancelled", "notifications/progress", "initialize", "ping", "tools/call", "tools/list"]
MESSAGES = st.fixed_dictionaries(
    {"jsonrpc": st.just("2.0")},
    optional={
        "id": JSON,
        "method": st.sampled_from(METHODS) | JSON,
        "params": st.fixed_dictionaries({}, optional=dict.fromkeys(["requestId", "_meta", "name"], JSON)) | JSON,
        "result": JSON,
        "error": JSON,
    },
)


@given(st.lists(MESSAGES, min_size=1, max_size=4), st.binary(max_size=20))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_no_messages_end_the_line_door(
    dial: Any, caplog: pytest.LogCaptureFixture, messages: list[Any], rest: bytes
) -> None:
    caplog.clear()
    async with dial() as wire:
        await wire.say({"token": TOKEN})
        for message in messages:
            await wire.say(message)
        await wire.say(rest)
        await wire.last_words()
    assert await is_well(dial)
    assert "a defect" not in caplog.text


class Told(logging.Handler):
    """Sets an event when a certain thing is logged."""

    def __init__(self, words: str) -> None:
        super().__init__()
        self.words = words
        self.event = anyio.Event()

    def emit(self, record: logging.LogRecord) -> None:
        if self.words in record.getMessage():
            self.event.set()


@contextmanager
def no_more_descriptors() -> Iterator[None]:
    """While it lasts, nothing can be opened or accepted."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_running_out_of_descriptors_ends_no_connection(rt: Runtime) -> None:
    told = Told("nobody can connect")
    door = logging.getLogger("mcp_tools.lines")
    door.addHandler(told)
    try:
        async with open_doors(rt, token=TOKEN) as doors:
            address = ("127.0.0.1", doors.line_port or 0)
            first, late = await anyio.connect_tcp(*address), socket.socket()
            with no_more_descriptors():
                late.connect(address)
                with anyio.fail_after(10):
                    await told.event.wait()
            for stream in (first, await SocketStream.from_socket(late)):
                async with stream:
                    wire = Wire(stream)
                    await wire.say({"token": TOKEN})
                    assert (await wire.hear())["ok"]
    finally:
        door.removeHandler(told)


async def test_a_request_cancelled_by_another_spelling_of_its_id_is_not_waited_for(dial: Any) -> None:
    async with dial() as one, dial() as other:
        unanswered, lines, others = Unanswered(), Lines(one.stream), Lines(other.stream)
    asked = JSONRPCRequest(jsonrpc="2.0", id=1, method="tools/call")
    for each in (lines, others):
        unanswered.came(each, asked)

    def cancel(request_id: Any) -> JSONRPCNotification:
        return JSONRPCNotification(
            jsonrpc="2.0", method="notifications/cancelled", params={"requestId": request_id}
        )

    # True is 1 to Python, not to JSON.
    for nothing in (True, [1], {}, None, 1.5, "one"):
        unanswered.came(lines, cancel(nothing))
    with anyio.move_on_after(0) as waiting:
        await unanswered.none()
    assert waiting.cancelled_caught

    # The SDK takes "1" for 1, and does not answer what was cancelled.
    unanswered.came(lines, cancel("1"))
    unanswered.went(others, JSONRPCResponse(jsonrpc="2.0", id="1", result={}))
    with anyio.fail_after(1):
        await unanswered.none()


# -- hostile HTTP -------------------------------------------------------------------------------------------

HEADERS: list[tuple[int, dict[str, bytes]]] = [
    (401, {"authorization": b"Bearer \xff\xfe"}),
    (401, {"authorization": b"Bearer \xed\xa0\x80"}),
    (401, {"authorization": b"Bearer " + b"x" * 50_000}),
    (401, {"authorization": b""}),
    (400, {"authorization": b"Bearer a\0b"}),
    (421, {"host": b"\xff"}),
    (403, {"origin": b"\xff\xfe"}),
    (400, {"mcp-protocol-version": b"\xff"}),
    (400, {"mcp-method": b"\xff"}),
    (404, {"mcp-session-id": b"\xff\xfe", "mcp-protocol-version": b"2025-06-18"}),
    (400, {"content-type": b"\xff"}),
    (406, {"accept": b"\xff;q=\xff"}),
    (400, {"content-length": b"-5"}),
    (400, {"content-length": b"9" * 30}),
    (413, {"content-length": b"99999999999"}),
    (200, {"traceparent": b"\xff-\xfe"}),
    (200, {"traceparent": b"00-" + b"1" * 32 + b"-" + b"2" * 16 + b"-01-" + b"x" * 30_000}),
    (200, {"traceparent": b"00-" + b"1" * 32 + b"-" + b"2" * 16 + b"-01", "tracestate": b"\xff=\xff,,=" * 99}),
    (200, {"baggage": b"%%%=\xff"}),
]


async def status_of(url: str, headers: dict[str, bytes], body: bytes) -> int:
    """The status of the answer to a POST with exactly these headers."""
    host, _, path = url.removeprefix("http://").partition("/")
    lines = [b"POST /%s HTTP/1.1" % path.encode()]
    everything = {"host": host.encode(), "connection": b"close", "content-length": b"%d" % len(body), **headers}
    lines += [name.encode() + b": " + value for name, value in everything.items()]
    name, _, port = host.partition(":")
    async with await anyio.connect_tcp(name, int(port)) as stream:
        with anyio.fail_after(10):
            await stream.send(b"\r\n".join(lines) + b"\r\n\r\n" + body)
            return int((await stream.receive()).split()[1])


async def test_no_headers_end_the_http_door(url: str) -> None:
    body = (REQUEST % ('{"name":"list_agents","arguments":{},%s}' % (MODERN % ""))).encode()
    good = {
        "authorization": f"Bearer {TOKEN}".encode(),
        "accept": b"application/json, text/event-stream",
        "content-type": b"application/json",
        "mcp-protocol-version": b"2026-07-28",
        "mcp-method": b"tools/call",
        "mcp-name": b"list_agents",
    }
    assert await status_of(url, good, body) == 200
    for status, headers in HEADERS:
        assert await status_of(url, {**good, **headers}, body) == status, headers


async def test_no_body_ends_the_http_door(url: str) -> None:
    headers = {"authorization": f"Bearer {TOKEN}", "accept": "application/json, text/event-stream"}
    hello = {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "n", "version": "1"}}
    async with httpx2.AsyncClient(headers=headers, timeout=10) as http:

        async def say(body: bytes, **more: str) -> httpx2.Response:
            return await http.post(url, content=body, headers={"content-type": "application/json", **more})

        begun = await say(json.dumps({"jsonrpc": "2.0", "id": 0, "method": "initialize", "params": hello}).encode())
        session = {"mcp-session-id": begun.headers["mcp-session-id"]}
        for body in SAID:
            assert (await say(body, **session)).status_code < 500, body
    async with connected(url, TOKEN) as client:
        assert len((await client.list_tools()).tools) == len(OUR_TOOLS)


# -- serve --------------------------------------------------------------------------------------------------


async def start(tg: TaskGroup, rt: Runtime, ended: anyio.Event | None = None) -> ServerState:
    """Serve ``rt`` in a task of its own."""

    async def run(*, task_status: TaskStatus[ServerState]) -> None:
        await serve(rt, open_doors, task_status=task_status)
        if ended is not None:
            ended.set()

    state = await tg.start(run)
    assert isinstance(state, ServerState)
    return state


async def test_serve_from_start_to_signal(rt: Runtime, model: ModelServer) -> None:
    model.rules = [Rule(Gate())]
    data = rt.config.data_path
    answers: list[str] = []
    ended = anyio.Event()
    async with anyio.create_task_group() as tg:
        state = await start(tg, rt, ended)
        assert read_state(data) == state
        assert (state.pid, state.version, state.token) == (os.getpid(), __version__, server_token(data))
        assert state.token not in repr(state)
        for name in ("server.json", "server.token"):
            assert stat.S_IMODE((data / name).stat().st_mode) == 0o600
        assert await rt.endpoint() == state.url

        async with connected(state.url, state.token) as client:

            async def delegates() -> None:
                answers.append(await call(client, "delegate", agent="helper", prompt="long work"))

            async with anyio.create_task_group() as calls:
                calls.start_soon(delegates)
                await model.wait_for("long work")
                os.kill(os.getpid(), signal.SIGTERM)
            with anyio.fail_after(3):
                await ended.wait()

    # Who waited has been told what became of the run, and that it may be tried again.
    assert '"code":"cancelled","retryable":true' in answers[0]
    assert "shutting down" in answers[0]
    assert read_state(data) is None
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", state.line_port), 1).close()


async def test_a_server_may_finish_what_it_has_begun(runtime: Open, model: ModelServer) -> None:
    gate = Gate()
    model.rules = [Rule(gate)]
    ended = anyio.Event()
    async with runtime(server__on_stop="finish") as rt, anyio.create_task_group() as tg:
        state = await start(tg, rt, ended)
        async with connected(state.url, state.token) as client:
            first = await submit(rt, Task(agent="helper", prompt="long work"))
            await model.wait_for("long work")
            os.kill(os.getpid(), signal.SIGTERM)
            with anyio.fail_after(10):
                while not rt.draining:
                    await anyio.lowlevel.checkpoint()
            assert "shutting down" in await call(client, "delegate", agent="helper", prompt="more")
            assert not ended.is_set()
            gate.opened.set()
            with anyio.fail_after(10):
                await ended.wait()
        assert (await rt.store.run(first)).text == "at last"


async def test_a_second_signal_ends_what_is_being_finished(runtime: Open, model: ModelServer) -> None:
    model.rules = [Rule(Gate())]
    ended = anyio.Event()
    async with runtime(server__on_stop="finish") as rt, anyio.create_task_group() as tg:
        await start(tg, rt, ended)
        run_id = await submit(rt, Task(agent="helper", prompt="long work"))
        await model.wait_for("long work")
        os.kill(os.getpid(), signal.SIGTERM)
        with anyio.fail_after(10):
            while not rt.draining:
                await anyio.lowlevel.checkpoint()
            os.kill(os.getpid(), signal.SIGTERM)
            await ended.wait()
        assert (await rt.store.run(run_id)).status == "cancelled"


async def test_runs_may_be_left_for_later(runtime: Open, model: ModelServer) -> None:
    model.rules = [Rule(Gate(), times=1), Rule("gone on")]
    ended = anyio.Event()
    async with runtime(server__on_stop="interrupt") as rt, anyio.create_task_group() as tg:
        await start(tg, rt, ended)
        run_id = await submit(rt, Task(agent="helper", prompt="long work"))
        await model.wait_for("long work")
        os.kill(os.getpid(), signal.SIGTERM)
        with anyio.fail_after(10):
            await ended.wait()
        run = await rt.store.run(run_id)
        assert run.error is not None
        assert (run.status, run.error["retryable"]) == ("interrupted", True)
    async with runtime() as rt:
        outcome = await wait(rt, await submit(rt, Task(agent="helper", prompt="go on", session=run.session_id)))
        assert (outcome.text, outcome.session_id) == ("gone on", run.session_id)


@pytest.mark.parametrize("mode", ["auto", "legacy"])
async def test_open_streams_do_not_hold_the_end_up(rt: Runtime, mode: str) -> None:
    ended = anyio.Event()
    async with anyio.create_task_group() as tg, AsyncExitStack() as stack:
        state = await start(tg, rt, ended)
        client = await stack.enter_async_context(connected(state.url, state.token, mode=mode))
        if mode == "auto":
            await stack.enter_async_context(client.listen(tools_list_changed=True))
        else:
            await client.list_tools()  # the client has opened its stream for notifications by now
        with anyio.fail_after(3):
            os.kill(os.getpid(), signal.SIGINT)
            await ended.wait()


async def test_one_server_per_data_directory(rt: Runtime, runtime: Open) -> None:
    async with anyio.create_task_group() as tg:
        state = await start(tg, rt)
        async with runtime() as second:
            with pytest.raises(ServerUnavailableError) as refused:
                await serve(second, open_doors)
        tg.cancel_scope.cancel()

    assert f"process {os.getpid()} at {state.url}" in refused.value.message
    assert f"kill {os.getpid()}" in refused.value.advice
    assert not refused.value.retryable


async def test_a_data_directory_is_free_again(tmp_path: Path) -> None:
    order = []

    async def other() -> None:
        async with claimed(tmp_path):
            order.append("other")

    async with anyio.create_task_group() as tg, claimed(tmp_path):
        tg.start_soon(other)
        await anyio.wait_all_tasks_blocked()
        order.append("first")
    assert order == ["first", "other"]


async def test_an_address_that_is_taken(rt: Runtime) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(ServerUnavailableError, match=r"cannot listen on 127\.0\.0\.1:\d+: "),
    ):
        await serve(rt, open_doors, port=taken.getsockname()[1])
    async with claimed(rt.config.data_path):
        pass


async def test_the_token_stays(tmp_path: Path) -> None:
    token = server_token(tmp_path)
    assert len(token) >= 40
    assert server_token(tmp_path) == token


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": 1}', '{"pid": "x", "url": 1}', "null"])
async def test_a_state_file_that_says_nothing(tmp_path: Path, text: str) -> None:
    write_private(tmp_path / "server.json", text)
    assert read_state(tmp_path) is None


async def test_the_state_of_a_server_that_is_gone(tmp_path: Path) -> None:
    state = {"pid": 2**22 + 1, "url": "u", "line_port": 1, "token": "t", "version": "v", "started_us": 1}
    write_private(tmp_path / "server.json", json.dumps(state))
    assert read_state(tmp_path) is None
    write_private(tmp_path / "server.json", json.dumps({**state, "pid": os.getpid()}))
    assert read_state(tmp_path) is not None
