"""Claude Code as our client: the real CLI calls our tools, through the stdio shim and through HTTP."""

import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import httpx2
import psutil
import pytest
import yaml
from anyio.abc import Process
from mcp import Client
from mcp.client.streamable_http import streamable_http_client

from orchestrator.killing import RUN_ID_ENV
from orchestrator.messages import AssistantMessage, ResultMessage, UserMessage, parse_message
from orchestrator.server import ServerState, read_state
from orchestrator.store import Run, open_store
from orchestrator.testing import ModelServer, Reply, Request, Rule, ToolUse
from tests.conftest import DUMMY_KEY, bundled_cli, settings, write_agent

ROOT = Path(__file__).parent.parent
DELEGATE, QUERY = "mcp__orchestrator__delegate", "mcp__orchestrator__query_traces"


class Home:
    """A user's machine in small: a project with settings and agents, a HOME, an environment."""

    def __init__(self, tmp_path: Path, project: Path, base_url: str) -> None:
        self.project, self.data = project, tmp_path / "data"
        nested: dict[str, Any] = {}
        for name, value in settings(tmp_path, base_url).items():
            *sections, leaf = name.split(".")
            node = nested
            for section in sections:
                node = node.setdefault(section, {})
            node[leaf] = value
        (project / "orchestrator.yaml").write_text(yaml.safe_dump(nested))
        self.environ = {
            "PATH": "/usr/local/bin:/usr/bin:/bin",
            "HOME": str(tmp_path / "home"),
            "LANG": "C.UTF-8",
            "PYTHONPATH": str(ROOT),
            "ANTHROPIC_BASE_URL": base_url,
            "ANTHROPIC_API_KEY": DUMMY_KEY,
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
            "CLAUDE_CODE_MAX_RETRIES": "0",
            "DISABLE_AUTOUPDATER": "1",
        }

    def stdio(self) -> dict[str, Any]:
        return {"command": sys.executable, "args": ["-m", "orchestrator", "mcp"]}

    async def claude(self, server: dict[str, Any], prompt: str, *, cwd: Path | None = None) -> "Session":
        """What a user's own `claude -p` does with our server registered."""
        process = await anyio.run_process(
            [
                str(bundled_cli()), "-p", "--output-format=stream-json", "--verbose", "--strict-mcp-config",
                "--mcp-config", json.dumps({"mcpServers": {"orchestrator": server}}),
                "--allowedTools", "mcp__orchestrator", "--system-prompt", "You are the user's Claude Code.",
            ],
            input=prompt.encode(), cwd=cwd or self.project, env=self.environ, check=False,
        )  # fmt: skip
        return Session(process)

    async def runs(self) -> list[Run]:
        async with open_store(self.data / "runs.db") as store:
            return await store.runs()

    async def said_something(self) -> Run:
        """The newest run once its record holds text; what is said gets there within a third of a second."""
        with anyio.fail_after(10):
            async with open_store(self.data / "runs.db") as store:
                while not (runs := await store.runs(limit=1)) or not runs[0].text:  # noqa: ASYNC110
                    await anyio.sleep(0.02)
                return runs[0]

    def state(self) -> ServerState:
        state = read_state(self.data)
        assert state is not None, (self.data / "server.log").read_text()
        return state

    def stop_server(self) -> None:
        if state := read_state(self.data):
            psutil.Process(state.pid).terminate()
            psutil.wait_procs([psutil.Process(state.pid)], timeout=10)


class Session:
    """The messages a `claude -p` printed."""

    def __init__(self, done: subprocess.CompletedProcess[bytes]) -> None:
        self.messages = [parse_message(line) for line in done.stdout.splitlines()]
        self.stderr = done.stderr.decode()
        assert self.messages, self.stderr

    @property
    def answer(self) -> str:
        result = self.messages[-1]
        assert isinstance(result, ResultMessage)
        assert not result.is_error, result.result
        return result.result or ""

    @property
    def tools_used(self) -> list[str]:
        said = [m for m in self.messages if isinstance(m, AssistantMessage)]
        return [use.name for message in said for use in message.tool_uses]

    @property
    def tool_results(self) -> list[str]:
        told = [m for m in self.messages if isinstance(m, UserMessage)]
        return [result.text for message in told for result in message.tool_results]


@pytest.fixture
async def home(tmp_path: Path, project: Path, model: ModelServer) -> AsyncIterator[Home]:
    (tmp_path / "home").mkdir(exist_ok=True)
    home = Home(tmp_path, project, model.base_url)
    try:
        yield home
    finally:
        await anyio.to_thread.run_sync(home.stop_server)


def script(model: ModelServer) -> None:
    """The user's Claude delegates to the helper, then looks at the traces, then answers with both."""

    def after(request: Request) -> Reply:
        results = request.all_tool_results
        if len(results) == 1:
            return Reply(ToolUse(QUERY, {"agent": "helper"}))
        return Reply(f"helper said: {results[0].text}\ntraces: {results[1].text}")

    model.rules = [
        Rule("I helped", when={"system": "You are the helper"}),
        Rule(after, when={"system": "the user's Claude Code", "tool_result": True}),
        Rule(
            ToolUse(DELEGATE, {"agent": "helper", "prompt": "help me"}), when={"system": "the user's Claude Code"}
        ),
    ]


async def check_session(home: Home, model: ModelServer, session: Session) -> None:
    assert session.tools_used == [DELEGATE, QUERY]
    assert "helper said: I helped" in session.answer
    # The answer is in the parent's next model request, not only in our record.
    told = [r for r in model.requests(system="the user's Claude Code") if r.all_tool_results]
    assert "I helped" in told[0].all_tool_results[0].text
    [run] = await home.runs()
    assert (run.name, run.status, run.text) == ("helper", "succeeded", "I helped")
    traces = json.loads(session.tool_results[1])
    assert [each["run_id"] for each in traces["runs"]] == [run.id]
    assert model.requests(text="help me"), "the child's prompt reached a model"


async def test_delegate_through_the_shim(home: Home, model: ModelServer) -> None:
    script(model)
    with anyio.fail_after(60):
        session = await home.claude(home.stdio(), "go")
        await check_session(home, model, session)
    [run] = await home.runs()
    # The shim says which session of which project asked; the record keeps it.
    assert run.caller is not None
    assert run.caller["project_dir"] == str(home.project)
    assert run.caller["session_id"] == session.messages[0].raw()["session_id"]
    assert json.loads(session.tool_results[1])["runs"][0]["caller"]["session_id"] == run.caller["session_id"]


async def test_one_server_knows_the_agents_of_each_project(home: Home, model: ModelServer, tmp_path: Path) -> None:
    """A server started from one project serves windows of others, each with its own agents."""
    script(model)
    home.environ["ORCHESTRATOR_DATA_DIR"] = str(home.data)
    other = tmp_path / "other"
    (other / "agents").mkdir(parents=True)
    write_agent(other, "helper", tools="Read", body="You are the helper of the other project.")
    with anyio.fail_after(60):
        await home.claude(home.stdio(), "go")
        pid = home.state().pid
        session = await home.claude(home.stdio(), "go", cwd=other)
    assert home.state().pid == pid
    assert session.tools_used == [DELEGATE, QUERY]
    assert model.requests(system="the helper of the other project")
    newest, _ = await home.runs()
    assert (newest.project, newest.cwd) == (str(other), str(other))


@asynccontextmanager
async def serving(home: Home) -> AsyncIterator[Process]:
    """`orchestrator serve` as a user starts it."""
    process = await anyio.open_process(
        [sys.executable, "-m", "orchestrator", "serve"],
        cwd=home.project, env=home.environ, stdout=None, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stderr is not None
    said = b""
    async with process:
        while b"token in" not in said:
            said += await process.stderr.receive()
        try:
            yield process
        finally:
            if process.returncode is None:
                process.terminate()


async def test_delegate_through_http(home: Home, model: ModelServer) -> None:
    script(model)
    with anyio.fail_after(60):
        async with serving(home):
            state = home.state()
            http = {"type": "http", "url": state.url, "headers": {"Authorization": f"Bearer {state.token}"}}
            await check_session(home, model, await home.claude(http, "go"))


async def test_the_registered_server_is_connected(home: Home) -> None:
    with anyio.fail_after(60):
        command = [
            str(bundled_cli()),
            "mcp",
            "add",
            "orchestrator",
            "--",
            sys.executable,
            "-m",
            "orchestrator",
            "mcp",
        ]
        await anyio.run_process(command, cwd=home.project, env=home.environ)
        listed = await anyio.run_process([str(bundled_cli()), "mcp", "list"], cwd=home.project, env=home.environ)
    assert "orchestrator" in listed.stdout.decode()
    assert "Connected" in listed.stdout.decode(), listed.stdout.decode()


async def test_kill_9_of_the_server_loses_no_word_and_leaves_no_process(home: Home, model: ModelServer) -> None:
    write_agent(home.project, "worker", tools="Bash(sh *)", body="You are the worker.")
    (home.project / "long.sh").write_text("touch started\nsetsid sleep 300 &\nsleep 300\n")
    model.rules = [
        Rule(
            Reply(["I have begun", ToolUse("Bash", {"command": "sh long.sh", "description": "x"})]),
            when={"system": "the worker"},
        ),
        Rule("fine again", when={"system": "You are the helper"}),
        Rule("gone", when={"system": "the user's Claude Code", "tool_result": True}),
        Rule(ToolUse(DELEGATE, {"agent": "worker", "prompt": "long work"}), when={"user": "go"}),
        Rule(ToolUse(DELEGATE, {"agent": "helper", "prompt": "short"}), when={"user": "again"}),
    ]
    with anyio.fail_after(90):
        async with anyio.create_task_group() as tg:
            tg.start_soon(home.claude, home.stdio(), "go")
            await until(lambda: (home.project / "started").exists())
            pid = home.state().pid
            run = await home.said_something()
            psutil.Process(pid).send_signal(signal.SIGKILL)
        await until(lambda: not carrying(run.id))
        session = await home.claude(home.stdio(), "again")
        runs = {each.name: each for each in await home.runs()}
    assert session.answer == "gone"
    assert runs["helper"].status == "succeeded", "the next delegate works"
    assert runs["worker"].status == "interrupted"
    assert runs["worker"].text == "I have begun"
    assert home.state().pid != pid


async def until(true: Callable[[], Any]) -> None:
    """Wait for what another process does; nothing tells us of it."""
    with anyio.fail_after(10):
        while not true():  # noqa: ASYNC110
            await anyio.sleep(0.05)


def carrying(run_id: str) -> list[psutil.Process]:
    """Processes that belong to a run: it is in the environment of each of them."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(RUN_ID_ENV) == run_id:
                found.append(process)
        except psutil.Error:
            continue
    return found


async def test_agents_are_reloaded_while_the_server_runs(home: Home, model: ModelServer) -> None:
    held, release = anyio.Event(), anyio.Event()

    async def hold(request: Request) -> Reply:
        held.set()
        await release.wait()
        return Reply(f"served with: {request.system_prompt_start[:200]}")

    model.rules = [
        Rule(hold, when={"user": "slow"}),
        Rule(lambda r: Reply(r.system_prompt_start[:200]), when={"user": "quick"}),
    ]
    with anyio.fail_after(90):
        async with serving(home), connected(home) as client:
            slow: list[str] = []

            async def ask_slowly() -> None:
                slow.append(await client.delegate("helper", "slow"))

            async with anyio.create_task_group() as tg:
                tg.start_soon(ask_slowly)
                await held.wait()
                write_agent(home.project, "helper", body="You are the second helper.")
                await client.until("helper", lambda prompt: "second helper" in prompt)
                (home.project / "agents" / "helper.md").write_text("broken")
                write_agent(home.project, "marker", body="the break was seen")
                await client.until("marker", lambda prompt: "was seen" in prompt)
                assert "second helper" in await client.delegate("helper", "quick"), "the last good version stays"
                write_agent(home.project, "helper", body="You are the mended helper.")
                await client.until("helper", lambda prompt: "mended helper" in prompt)
                (home.project / "agents" / "helper.md").unlink()
                await client.until(
                    "helper", lambda prompt: "no agent" in prompt.lower() or "unknown" in prompt.lower()
                )
                release.set()
    assert "You are the helper." in slow[0], "a run keeps the agent it began with"


@asynccontextmanager
async def connected(home: Home) -> AsyncIterator["McpClient"]:
    """A plain MCP client of the served HTTP door."""
    state = home.state()
    async with (
        httpx2.AsyncClient(headers={"authorization": f"Bearer {state.token}"}, timeout=30) as http,
        Client(streamable_http_client(state.url, http_client=http)) as client,
    ):
        yield McpClient(client)


class McpClient:
    def __init__(self, client: Client) -> None:
        self._client = client

    async def delegate(self, agent: str, prompt: str) -> str:
        result = await self._client.call_tool("delegate", {"agent": agent, "prompt": prompt})
        return "\n".join(block.text for block in result.content if block.type == "text")

    async def until(self, agent: str, wanted: Any) -> None:
        """Ask until the answer is as wanted; file events take a moment, and nothing else tells of them here."""
        with anyio.fail_after(10):
            while not wanted(await self.delegate(agent, "quick")):
                pass  # each question takes a moment of its own
