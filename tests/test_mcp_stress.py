"""The server and the shim under load: long calls, long answers, many callers, and callers that do not listen.

Nothing here is timed. A fake stands in for the CLI where the CLI does not matter.
"""

import gc
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Any, Protocol

import anyio
import httpx2
import psutil
import pytest
from anyio.abc import SocketStream
from mcp import Client
from mcp.client.streamable_http import streamable_http_client
from mcp_types import TextContent

from mcp_tools.strict import MAX_TEXT_BYTES, shortened
from orchestrator.config import Config
from orchestrator.conversation import Turn
from orchestrator.delegation import submit, wait
from orchestrator.runtime import Runtime, open_runtime
from orchestrator.server import read_state
from orchestrator.task import Task
from orchestrator.testing import FakeConversation, FakeProcesses, ModelServer, Request, Rule
from orchestrator.testing.fake_conversation import answer_messages
from tests.test_server import Wire
from tests.test_shim import Client as Lines
from tests.test_shim import serving, started

Open = Callable[..., AbstractAsyncContextManager[Runtime]]
MB = 1_000_000


class Scripted:
    """Fake agents that answer when the test says so."""

    def __init__(self) -> None:
        self.processes = FakeProcesses(self._take)
        self._open: list[tuple[FakeConversation, Turn]] = []
        self._more = anyio.Event()

    def _take(self, conversation: FakeConversation, turn: Turn) -> None:
        self._open.append((conversation, turn))
        self._more.set()
        self._more = anyio.Event()

    async def working(self, count: int) -> None:
        """Wait until so many are at work."""
        with anyio.fail_after(30):
            while len(self._open) < count:
                await self._more.wait()

    def answer(self, text: str | None = None, *, whole: bool = False) -> None:
        """Have all who are at work answer, by default with what they were asked; ``whole``: not word by word."""
        for conversation, turn in self._open:
            said = answer_messages(conversation.spec, turn, text or f"heard: {turn.prompt}")
            conversation.say(*(message for message in said if not whole or message["type"] != "stream_event"))
        self._open.clear()


@pytest.fixture
def scripted() -> Scripted:
    return Scripted()


@pytest.fixture
async def rt(
    make_config: Callable[..., Config], environ: dict[str, str], scripted: Scripted
) -> AsyncIterator[Runtime]:
    """A served runtime on fakes, which says often that it is there."""
    config = make_config(server__progress_s=0.01, limits__max_processes=100, limits__max_queue=200)
    async with open_runtime(config, environ=environ, open_process=scripted.processes) as opened, serving(opened):
        yield opened


# -- two ways in --------------------------------------------------------------------------------------------

Heard = Callable[[float], None]


class Caller(Protocol):
    async def call(self, tool: str, heard: Heard | None = None, /, **arguments: Any) -> str:
        """The text of the result; ``heard`` is told of progress."""


class OverHTTP:
    def __init__(self, client: Client) -> None:
        self.client = client

    async def call(self, tool: str, heard: Heard | None = None, /, **arguments: Any) -> str:
        async def progress(value: float, total: float | None, message: str | None) -> None:
            assert message
            if heard is not None:
                heard(value)

        result = await self.client.call_tool(tool, arguments, progress_callback=progress)
        [block] = result.content
        assert isinstance(block, TextContent)
        return block.text


class OverShim:
    """One call at a time."""

    def __init__(self, lines: Lines) -> None:
        self.lines = lines

    async def call(self, tool: str, heard: Heard | None = None, /, **arguments: Any) -> str:
        params = {"name": tool, "arguments": arguments, "_meta": {"progressToken": "p"}}
        id_ = await self.lines.say("tools/call", params, modern=True)
        while (message := await self.lines.hear(60)).get("id") != id_:
            assert message["method"] == "notifications/progress", message
            if heard is not None:
                heard(message["params"]["progress"])
        text = message["result"]["content"][0]["text"]
        assert isinstance(text, str)
        return text


@asynccontextmanager
async def over_http(rt: Runtime, environ: dict[str, str]) -> AsyncIterator[Caller]:
    state = read_state(rt.config.data_path)
    assert state
    async with (
        httpx2.AsyncClient(headers={"authorization": f"Bearer {state.token}"}, timeout=60) as http,
        Client(streamable_http_client(state.url, http_client=http)) as client,
    ):
        yield OverHTTP(client)


@asynccontextmanager
async def over_shim(rt: Runtime, environ: dict[str, str]) -> AsyncIterator[Caller]:
    async with started(rt.config, environ) as lines:
        yield OverShim(lines)


WAYS = {"http": over_http, "shim": over_shim}


async def gather(*jobs: Callable[[], Awaitable[str]]) -> list[str]:
    """What they return, done at the same time."""
    results: dict[int, str] = {}

    async def one(n: int, job: Callable[[], Awaitable[str]]) -> None:
        results[n] = await job()

    async with anyio.create_task_group() as tg:
        for n, job in enumerate(jobs):
            tg.start_soon(one, n, job)
    return [results[n] for n in range(len(jobs))]


# -- long -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
async def test_a_call_may_take_long(rt: Runtime, environ: dict[str, str], scripted: Scripted, way: str) -> None:
    """As many words as half an hour of waiting brings; each says that time goes on, and none ends the call."""
    told: list[float] = []
    enough = anyio.Event()

    def heard(progress: float) -> None:
        told.append(progress)
        if len(told) == 200:
            enough.set()

    async with WAYS[way](rt, environ) as caller, anyio.create_task_group() as tg:

        async def person() -> None:
            text = await caller.call("delegate", heard, agent="helper", prompt="a long task", wait_s=3600)
            assert text.startswith("heard: a long task\n[run_id=")

        tg.start_soon(person)
        await scripted.working(1)
        with anyio.fail_after(60):
            await enough.wait()
        scripted.answer()
    assert told == sorted(set(told)), "progress grows"


async def test_an_answer_of_a_hundred_megabytes(rt: Runtime, environ: dict[str, str], scripted: Scripted) -> None:
    async with over_http(rt, environ) as one, over_shim(rt, environ) as two:
        before = memory()
        with anyio.fail_after(60):
            run_id = await submit(rt, Task(agent="helper", prompt="talk"))
            await scripted.working(1)
            scripted.answer("begin " + "y" * (100 * MB) + " end", whole=True)
            for caller in (one, two):
                check_cut(await caller.call("run_wait", run_ids=[run_id]), run_id)
            assert len((await rt.store.run(run_id)).text) == 100 * MB + len("begin  end")
            # SQLite keeps what was stored last until the next is.
            for caller in (one, two):
                small = await submit(rt, Task(agent="helper", prompt="and now?"))
                await scripted.working(1)
                scripted.answer("short")
                assert (await caller.call("run_wait", run_ids=[small])).startswith("short\n")
        grown = memory() - before
    assert grown < 60 * MB, "what was said is kept in the record alone"


def check_cut(text: str, run_id: str) -> None:
    """The beginning, how to have the whole, the end, and the facts."""
    assert len(text) <= MAX_TEXT_BYTES
    assert text.startswith("begin yyy")
    assert "100,000,1" in text
    assert "`orchestrator runs show RUN_ID`" in text
    assert f"yyy end\n[run_id={run_id} status=succeeded" in text


async def test_a_refusal_is_short_whatever_is_refused(rt: Runtime, environ: dict[str, str]) -> None:
    """It repeats what was asked for; the client must be able to read it all the same."""
    long = "x" * (3 * MB)
    async with over_http(rt, environ) as caller:
        for tool, arguments in (
            ("run_wait", {"run_ids": [long]}),
            ("fork_session", {"session_id": long, "prompt": "x"}),
            ("list_agents", {long: 1}),
        ):
            text = await caller.call(tool, **arguments)
            assert len(text) <= MAX_TEXT_BYTES
            assert tool in text[:100]


@pytest.mark.parametrize("letter", ["a", "é", "\u4e2d", "\U0001f600", "\n", "\0", '"', "\ud800"])
def test_a_cut_text_fits_whatever_is_in_it(letter: str) -> None:
    """As JSON: one character may take up to six bytes there."""
    for length in (10, 150_000, 1_000_000, 3_000_000):
        cut = shortened(letter * length + "the end")
        size = len(json.dumps(cut, ensure_ascii=False).encode("utf-8", "surrogatepass"))
        assert size <= MAX_TEXT_BYTES + 10
        assert cut.endswith("the end")
        assert (cut == letter * length + "the end") or size > 0.9 * MAX_TEXT_BYTES


def memory() -> int:
    """What this process has in memory, in bytes."""
    gc.collect()
    return int(psutil.Process().memory_info().rss)


# -- many -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("runs", [1, 50])
async def test_fifty_wait(rt: Runtime, environ: dict[str, str], scripted: Scripted, runs: int) -> None:
    """On one run, and each on a run of its own; over HTTP, and as many more over one shim."""
    ids = [await submit(rt, Task(agent="helper", prompt=f"task {n}")) for n in range(runs)]
    waiting = [ids[n % runs] for n in range(50)]
    async with (
        over_http(rt, environ) as caller,
        started(rt.config, environ) as lines,
        anyio.create_task_group() as tg,
    ):
        asked = {
            await lines.say(
                "tools/call", {"name": "run_wait", "arguments": {"run_ids": [run_id]}}, modern=True
            ): run_id
            for run_id in waiting
        }

        async def all_over_http() -> None:
            answers = await gather(*(lambda i=i: caller.call("run_wait", run_ids=[i]) for i in waiting))
            for run_id, text in zip(waiting, answers, strict=True):
                assert text.startswith(f"heard: task {ids.index(run_id)}\n[run_id={run_id} ")

        tg.start_soon(all_over_http)
        await scripted.working(runs)
        scripted.answer()
        while asked:
            message = await lines.hear()
            run_id = asked.pop(message["id"])
            text = message["result"]["content"][0]["text"]
            assert text.startswith(f"heard: task {ids.index(run_id)}\n[run_id={run_id} ")


async def test_twenty_clients_at_once(rt: Runtime, environ: dict[str, str], scripted: Scripted) -> None:
    """Ten over HTTP and ten shims: all are at work before the first is answered, and each gets its own answer."""
    async with AsyncExitStack() as stack:
        callers = [await stack.enter_async_context(way(rt, environ)) for way in WAYS.values() for _ in range(10)]
        async with anyio.create_task_group() as tg:

            async def talk(n: int) -> None:
                text = await callers[n].call("delegate", agent="helper", prompt=f"from {n}")
                assert text.startswith(f"heard: from {n}\n")
                assert f"from {n}" in await callers[n].call("query_traces", text=f"from {n}", limit=1)

            for n in range(20):
                tg.start_soon(talk, n)
            await scripted.working(20)
            scripted.answer()
    assert len(await rt.store.runs(status="succeeded", limit=50)) == 20


class Gate:
    """A model that answers when as many have asked as are expected."""

    def __init__(self, expected: int) -> None:
        self.expected = expected
        self.opened = anyio.Event()

    async def __call__(self, request: Request) -> str:
        self.expected -= 1
        if self.expected == 0:
            self.opened.set()
        await self.opened.wait()
        return f"heard: {request.last_user_text}"


async def test_several_clients_with_real_processes(
    runtime: Open, environ: dict[str, str], model: ModelServer
) -> None:
    model.rules = [Rule(Gate(4))]
    with anyio.fail_after(90):
        async with (
            runtime(limits__max_processes=4, server__progress_s=0.05) as rt,
            serving(rt),
            over_http(rt, environ) as one,
            over_http(rt, environ) as two,
            over_shim(rt, environ) as three,
            over_shim(rt, environ) as four,
        ):
            told: list[float] = []
            callers: list[Caller] = [one, two, three, four]
            answers = await gather(
                *(
                    lambda n=n, caller=caller: caller.call(
                        "delegate", told.append, agent="helper", prompt=f"from {n}"
                    )
                    for n, caller in enumerate(callers)
                )
            )
    for n, text in enumerate(answers):
        assert text.startswith("heard: ")
        assert f"from {n}" in text.splitlines()[0]
    assert told


# -- callers that do not listen -------------------------------------------------------------------------------

MODERN = {
    "io.modelcontextprotocol/protocolVersion": "2026-07-28",
    "io.modelcontextprotocol/clientCapabilities": {},
    "progressToken": 1,
}


def wait_for(id_: int, run_id: str) -> dict[str, Any]:
    params = {"name": "run_wait", "arguments": {"run_ids": [run_id]}, "_meta": MODERN}
    return {"jsonrpc": "2.0", "id": id_, "method": "tools/call", "params": params}


@asynccontextmanager
async def deaf_over_http(rt: Runtime, run_id: str) -> AsyncIterator[None]:
    """A client that asks for a long answer and reads nothing of it."""
    state = read_state(rt.config.data_path)
    assert state
    host, _, port = state.url.removeprefix("http://").removesuffix("/mcp").partition(":")
    body = json.dumps(wait_for(1, run_id)).encode()
    head = (
        f"POST /mcp HTTP/1.1\r\nhost: {host}:{port}\r\nauthorization: Bearer {state.token}\r\n"
        "accept: application/json, text/event-stream\r\ncontent-type: application/json\r\n"
        "mcp-protocol-version: 2026-07-28\r\nmcp-method: tools/call\r\nmcp-name: run_wait\r\n"
        f"content-length: {len(body)}\r\n\r\n"
    )
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # or the system would listen in the client's place
    await anyio.to_thread.run_sync(raw.connect, (host, int(port)))
    async with await SocketStream.from_socket(raw) as stream:
        await stream.send(head.encode() + body)
        assert await stream.receive(15) == b"HTTP/1.1 200 OK", "it was understood"
        yield


@asynccontextmanager
async def deaf_over_lines(rt: Runtime, run_id: str) -> AsyncIterator[None]:
    state = read_state(rt.config.data_path)
    assert state
    async with await anyio.connect_tcp("127.0.0.1", state.line_port) as stream:
        wire = Wire(stream)
        await wire.say({"token": state.token})
        assert (await wire.hear())["ok"]
        for id_ in range(1, 9):
            await wire.say(wait_for(id_, run_id))
        assert await wire.hear(), "it was understood"
        yield


@asynccontextmanager
async def deaf_behind_a_shim(rt: Runtime, run_id: str, environ: dict[str, str]) -> AsyncIterator[None]:
    async with started(rt.config, environ) as lines:
        for id_ in range(1, 9):
            await lines.write(wait_for(id_, run_id))
        await lines.hear()
        yield


async def test_who_does_not_listen_disturbs_nobody(
    rt: Runtime, environ: dict[str, str], scripted: Scripted
) -> None:
    """Neither the others, nor the runs, nor the end of the server, which the fixture waits for."""
    long = await submit(rt, Task(agent="helper", prompt="a long answer"))
    async with (
        deaf_over_http(rt, long),
        deaf_over_lines(rt, long),
        deaf_behind_a_shim(rt, long, environ),
        over_http(rt, environ) as one,
        over_shim(rt, environ) as two,
    ):
        await scripted.working(1)
        scripted.answer("z" * (8 * MB))
        with anyio.fail_after(60):
            assert (await wait(rt, long)).ok
            for caller in (one, two):
                async with anyio.create_task_group() as tg:

                    async def talk(caller: Caller = caller) -> None:
                        text = await caller.call("delegate", agent="helper", prompt="still there?")
                        assert text.startswith("heard: still there?\n")

                    tg.start_soon(talk)
                    await scripted.working(1)
                    scripted.answer()
                assert len(await caller.call("run_wait", run_ids=[long])) > 900_000


async def test_who_listens_slowly_gets_everything(rt: Runtime, environ: dict[str, str], scripted: Scripted) -> None:
    """A window that is drawn while an answer comes in: it reads a little at a time, and others go on between."""
    async with started(rt.config, environ) as lines, over_http(rt, environ) as other:
        long = await submit(rt, Task(agent="helper", prompt="a long answer"))
        await scripted.working(1)
        scripted.answer("".join(f"{n:07d} " for n in range(120_000)))
        with anyio.fail_after(60):
            await wait(rt, long)
            await lines.write(wait_for(1, long))
            said = b""
            while b'"id":1' not in said[:200] or not said.endswith(b"\n"):
                said += await lines.stdout.receive(50_000)
                assert (await other.call("list_agents"))[0] == "{"
                said = said.rpartition(b'"notifications/progress"')[2] if b'"id":1' not in said else said
    answer = json.loads(said.splitlines()[-1])["result"]["content"][0]["text"]
    assert answer.startswith("0000000 0000001 ")
    assert "0119999 " in answer
