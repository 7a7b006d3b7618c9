"""The stdio shim as clients start it: a process fed with JSON-RPC lines, against a server that is really served."""

import json
import os
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import httpx2
import psutil
import pytest
import yaml
from anyio.abc import Process

from mcp_tools import open_doors
from mcp_tools.strict import MAX_TEXT_BYTES
from orchestrator import shim
from orchestrator.backends import DIALECTS
from orchestrator.config import Config, load_config
from orchestrator.conversation import Turn
from orchestrator.delegation import delegate
from orchestrator.killing import INSTANCE_ID_ENV, PROCESS_ID_ENV
from orchestrator.process import connect_process
from orchestrator.runtime import Runtime
from orchestrator.server import ServerState, read_state, serve, write_private
from orchestrator.specs import OUR_TOOLS
from orchestrator.task import Task
from orchestrator.testing import ModelServer, Reply, Request, Rule, ToolUse
from orchestrator.tracing import new_run_id
from tests.conftest import bundled_cli
from tests.test_killing import Machine, needs_cgroups, runs, until

ROOT = Path(__file__).parents[1]
PROTOCOL = {
    "io.modelcontextprotocol/protocolVersion": "2026-07-28",
    "io.modelcontextprotocol/clientCapabilities": {},
    "io.modelcontextprotocol/clientInfo": {"name": "test", "version": "1"},
}
LISTEN, WATCH_TOOLS = "subscriptions/listen", {"notifications": {"toolsListChanged": True}}
INITIALIZE = {"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": {"name": "test", "version": "1"}}


class Gate:
    """A model that answers when the test lets it."""

    def __init__(self) -> None:
        self.opened = anyio.Event()

    async def __call__(self, request: Request) -> str:
        await self.opened.wait()
        return "at last"


class Client:
    """The client's side of a shim: lines in, lines out."""

    def __init__(self, process: Process) -> None:
        assert process.stdin
        assert process.stdout
        self.process = process
        self.stdin, self.stdout = process.stdin, process.stdout
        self._buffer = b""
        self._ids = iter(range(1, 1000))

    async def say(self, method: str, params: dict[str, Any] | None = None, *, modern: bool = False) -> int:
        """Send a request; its id."""
        id_ = next(self._ids)
        params = dict(params or {})
        if modern:
            params["_meta"] = {**PROTOCOL, **params.get("_meta", {})}
        await self.write({"jsonrpc": "2.0", "id": id_, "method": method, "params": params})
        return id_

    async def write(self, message: dict[str, Any]) -> None:
        await self.stdin.send(json.dumps(message).encode() + b"\n")

    async def hear(self, seconds: float = 20) -> dict[str, Any]:
        """The next message. Raises ValueError if a line is anything else."""
        with anyio.fail_after(seconds):
            while b"\n" not in self._buffer:
                self._buffer += await self.stdout.receive(1 << 20)
        line, _, self._buffer = self._buffer.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        assert message["jsonrpc"] == "2.0"
        return message

    async def ask(
        self, method: str, params: dict[str, Any] | None = None, *, modern: bool = True
    ) -> dict[str, Any]:
        """Send a request; its answer, whatever else comes before."""
        id_ = await self.say(method, params, modern=modern)
        while (message := await self.hear()).get("id") != id_:
            assert "id" not in message or "method" in message, message
        return message

    async def call(self, tool: str, *, modern: bool = True, **arguments: Any) -> str:
        """Call a tool; the text it gives."""
        answer = await self.ask("tools/call", {"name": tool, "arguments": arguments}, modern=modern)
        text = answer["result"]["content"][0]["text"]
        assert isinstance(text, str)
        return text


def variables(environ: dict[str, str], **more: str) -> dict[str, str]:
    return {**environ, "PYTHONPATH": str(ROOT), **more}


@asynccontextmanager
async def started(config: Config, environ: dict[str, str], *argv: str, **more: str) -> AsyncIterator[Client]:
    """A shim on the data directory of ``config``, ended with the context."""
    argv = argv or ("--data-dir", str(config.data_path))
    more = {"CLAUDE_PROJECT_DIR": str(config.project_dir), **more}
    async with command(["mcp", *argv], variables(environ, **more)) as client:
        yield client


@asynccontextmanager
async def command(argv: list[str], environ: dict[str, str], cwd: Path | None = None) -> AsyncIterator[Client]:
    """``orchestrator`` with any arguments that end in a shim, ended with the context."""
    process = await anyio.open_process(
        [sys.executable, "-m", "orchestrator", *argv], stderr=None, env=environ, cwd=cwd
    )
    async with process:
        try:
            yield Client(process)
        finally:
            if process.returncode is None:
                process.kill()


@asynccontextmanager
async def serving(rt: Runtime) -> AsyncIterator[None]:
    """Serve ``rt`` in this process."""
    async with anyio.create_task_group() as tg:
        await tg.start(serve, rt, open_doors)
        yield
        tg.cancel_scope.cancel()


@pytest.fixture
async def served(rt: Runtime) -> AsyncIterator[Runtime]:
    """A runtime that is served in this process."""
    async with serving(rt):
        yield rt


@pytest.fixture
async def client(served: Runtime, environ: dict[str, str]) -> AsyncIterator[Client]:
    async with started(served.config, environ) as connected:
        yield connected


# -- light, and at the right place --------------------------------------------------------------------------


def test_nothing_heavy_is_imported(tmp_path: Path, environ: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "orchestrator", "mcp", "--data-dir", str(tmp_path)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env=variables(environ),
        timeout=20,
    )
    assert done.returncode == 0
    assert done.stdout == b""
    loaded = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.decode().splitlines() if "|" in line}
    ours = {name for name in loaded if name.split(".")[0] in ("orchestrator", "mcp_tools")}
    assert ours == {"orchestrator", "orchestrator.shim"}
    assert not {"pydantic", "anyio", "mcp", "click", "yaml", "asyncio", "subprocess", "psutil"} & loaded


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of this test's own, for what starts with ``~`` and for the default."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    return tmp_path / "home"


def agreed(start: Path, environ: dict[str, str] | None = None) -> Path:
    """The data directory of a project, on which shim and settings must agree."""
    found = shim.data_directory(None, environ or {}, start)
    assert found == load_config(project_dir=start, environ=environ or {}).data_path
    return found


@pytest.mark.parametrize("start", [".", "deep/inside"])
@pytest.mark.parametrize(
    ("yaml_text", "env_text", "variables"),
    [
        (None, None, {}),
        (None, None, {"XDG_DATA_HOME": "/var/xdg"}),
        (None, None, {"XDG_DATA_HOME": "relative"}),
        (None, None, {"ORCHESTRATOR_DATA_DIR": "/var/orc"}),
        (None, None, {"ORCHESTRATOR_DATA_DIR": "~/orc"}),
        (None, "ORCHESTRATOR_DATA_DIR=from-env\n", {}),
        ("", None, {}),
        ("", None, {"XDG_DATA_HOME": "/var/xdg"}),
        ("limits:\n  max_depth: 2\n", None, {}),
        ("limits:\n  max_depth: 2\n", None, {"ORCHESTRATOR_DATA_DIR": "nearest"}),
        ("limits:\n  max_depth: 2\n", "ORCHESTRATOR_DATA_DIR=from-env\n", {}),
        ("data_dir: state", None, {}),
        ("data_dir: /var/orc", None, {}),
        ("data_dir: ~/orc", None, {}),
        ("# data_dir: no\ndata_dir:   ../state/x#1   # here", None, {}),
        ("limits:\n  max_depth: 2\ndata_dir: 'a place'\n", None, {}),
        ('data_dir: "~/a place" # there', None, {}),
        ("data_dir: one\ndata_dir: two", None, {}),
        ("data_dir: null", None, {}),
        ("data_dir: ~  # your home is not meant", None, {}),
        ("project_dir: sub\ndata_dir: state", None, {}),
        ("project_dir: /srv\ndata_dir: state", None, {"ORCHESTRATOR_PROJECT_DIR": "sub"}),
        ("project_dir: sub", None, {}),
        ("data_dir: state", "ORCHESTRATOR_DATA_DIR=from-env\n", {}),
        ("data_dir: state", "ORCHESTRATOR_DATA_DIR=one\nORCHESTRATOR_DATA_DIR=two\n", {}),
        ("data_dir: state", 'export ORCHESTRATOR_DATA_DIR="from env"\n', {}),
        ("data_dir: state", "ORCHESTRATOR_DATA_DIR=\n", {}),
        ("data_dir: state", "ORCHESTRATOR_DATA_DIR=from-env\n", {"ORCHESTRATOR_DATA_DIR": "nearest"}),
        ("data_dir: state", None, {"ORCHESTRATOR_DATA_DIR": " "}),
        ("data_dir: state", None, {"ORCHESTRATOR_DATA_DIR": "null"}),
    ],
)
@pytest.mark.usefixtures("home")
def test_the_data_directory_is_the_one_of_the_settings(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    yaml_text: str | None,
    env_text: str | None,
    variables: dict[str, str],
    start: str,
) -> None:
    project = tmp_path / "project"
    (project / "deep" / "inside").mkdir(parents=True)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if yaml_text is not None:
        (project / "orchestrator.yaml").write_text(yaml_text)
    if env_text is not None:
        (project / ".env").write_text(env_text)

    agreed(project / start, variables)


def test_projects_without_settings_share_a_directory_and_others_do_not(tmp_path: Path, home: Path) -> None:
    plain, deep = tmp_path / "plain", tmp_path / "one" / "app" / "src"
    for folder in (plain, deep, tmp_path / "two" / "app"):
        folder.mkdir(parents=True)
    for parent in ("one", "two"):
        (tmp_path / parent / "app" / "orchestrator.yaml").write_text("limits: {max_depth: 2}")
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "one" / "app")

    shared = home / ".local" / "share" / "orchestrator"
    assert agreed(plain) == agreed(tmp_path) == shared
    one, two = agreed(tmp_path / "one" / "app"), agreed(tmp_path / "two" / "app")
    assert one.parent == two.parent == shared / "projects"
    assert one != two
    assert agreed(deep) == agreed(link) == agreed(link / "src") == one


@pytest.mark.usefixtures("home")
def test_two_projects_that_link_to_one_file_have_two_directories(tmp_path: Path) -> None:
    """Its relative paths, and the ``.env`` beside it, are those of the project it is found in."""
    (tmp_path / "settings.yaml").write_text("limits: {max_depth: 2}")
    for parent in ("one", "two"):
        (tmp_path / parent / "app").mkdir(parents=True)
        (tmp_path / parent / "app" / "orchestrator.yaml").symlink_to(tmp_path / "settings.yaml")
    assert agreed(tmp_path / "one" / "app") != agreed(tmp_path / "two" / "app")


def test_the_argument_wins(tmp_path: Path) -> None:
    assert shim.data_directory("/a/b", {"ORCHESTRATOR_DATA_DIR": "/c"}, tmp_path) == Path("/a/b")


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("text", ["", "data_dir: state", "data_dir: ~/state", "data_dir: /var/state"])
def test_a_configuration_file_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere" / "settings.yaml"
    project.mkdir()
    elsewhere.parent.mkdir()
    elsewhere.write_text(text)
    (tmp_path / "link.yaml").symlink_to(elsewhere)
    monkeypatch.chdir(tmp_path)
    own = agreed(project)
    names = (str(elsewhere), "elsewhere/settings.yaml", "link.yaml")
    [found] = {agreed(project, {"ORCHESTRATOR_CONFIG": name}) for name in names}
    assert found != own
    (project / "orchestrator.yaml").write_text("data_dir: not-this-one")
    assert agreed(project, {"ORCHESTRATOR_CONFIG": str(elsewhere)}) == found


@pytest.mark.parametrize(
    "argv", [["--data-dir"], ["--data-dir="], ["--config", ""], ["--port", "1"], ["x"], ["--data-dir", "/x", "y"]]
)
def test_wrong_arguments(argv: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert shim.main(argv) == 2
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "usage: orchestrator mcp" in captured.err


# -- pumping ------------------------------------------------------------------------------------------------


async def test_a_modern_client(client: Client, model: ModelServer) -> None:
    model.rules = [Rule("hello")]
    discovered = await client.ask("server/discover")
    assert "2026-07-28" in discovered["result"]["supportedVersions"]
    assert len((await client.ask("tools/list"))["result"]["tools"]) == len(OUR_TOOLS)
    assert (await client.call("delegate", agent="helper", prompt="x")).startswith("hello\n[run_id=")


async def test_a_client_of_last_year(client: Client, model: ModelServer) -> None:
    model.rules = [Rule("hello")]
    begun = await client.ask("initialize", INITIALIZE, modern=False)
    assert begun["result"]["protocolVersion"] == "2025-11-25"
    await client.write({"jsonrpc": "2.0", "method": "notifications/initialized"})
    assert (await client.call("delegate", agent="helper", prompt="x", modern=False)).startswith("hello\n[run_id=")


async def test_calls_are_stamped(served: Runtime, environ: dict[str, str], model: ModelServer) -> None:
    model.rules = [Rule("ok")]
    trace = "0af7651916cd43dd8448eb211c80319c"
    project = served.config.project_dir.parent / "another"
    shutil.copytree(served.config.project_dir, project)  # whose agents are the ones the call can name
    more = {
        "TRACEPARENT": f"00-{trace}-b7ad6b7169203331-01",
        "CLAUDE_CODE_SESSION_ID": "window-3",
        "CLAUDE_PROJECT_DIR": str(project),
    }
    async with started(served.config, environ, **more) as client:
        await client.call("delegate", agent="helper", prompt="x")

    [row] = await served.store.runs()
    assert (row.trace_id, row.parent_span_id, row.cwd) == (trace, "b7ad6b7169203331", str(project))
    known = {"session_id": "window-3", "project_dir": str(project), "client": "test/1", "tool": "delegate"}
    assert row.caller == known


def test_what_the_client_has_stamped_itself_stays(tmp_path: Path) -> None:
    ours = shim.Shim(tmp_path, tmp_path, {"TRACEPARENT": "ours"})
    message = {"method": "tools/call", "id": 1, "params": {"_meta": {"traceparent": "theirs", "x": "\ud800"}}}
    meta = json.loads(ours._stamped(message))["params"]["_meta"]
    assert meta == {"traceparent": "theirs", "x": "\ud800", shim.CALLER: {"project_dir": str(tmp_path)}}
    assert json.loads(ours._stamped({"method": "tools/call", "params": [1]})) == {
        "method": "tools/call",
        "params": [1],
    }


async def test_lines_of_ten_megabytes(served: Runtime, client: Client) -> None:
    prompt = "ünïcode line\n" * 600_000
    text = await client.call("delegate", agent="helper", prompt=prompt, wait_s=0)
    assert "still running" in text
    [row] = await served.store.runs()
    assert row.prompt == prompt
    row.id = row.root_id = "f" * 16
    row.status, row.text = "succeeded", "y" * 10_000_000
    await served.store.create_run(row)
    # No client takes so much: it gets the beginning and the end.
    assert 900_000 < len(await client.call("run_wait", run_ids=[row.id])) <= MAX_TEXT_BYTES


async def test_lines_that_are_no_messages(client: Client) -> None:
    for line in (
        b"",
        b"{broken",
        b"[]",
        b'"x"',
        b'{"jsonrpc":"2.0","method":"notifications/cancelled","params":[1]}',
    ):
        await client.stdin.send(line + b"\n")
    answers = [await client.hear() for _ in range(4)]
    assert [answer["error"]["code"] for answer in answers] == [-32700, -32600, -32600, -32600]
    assert (await client.ask("server/discover"))["result"]


async def test_the_end_of_stdin_ends_the_shim_and_no_run(
    served: Runtime, client: Client, model: ModelServer
) -> None:
    gate = Gate()
    model.rules = [Rule(gate)]
    await client.say(
        "tools/call", {"name": "delegate", "arguments": {"agent": "helper", "prompt": "go on"}}, modern=True
    )
    await model.wait_for("go on")

    await client.stdin.aclose()
    with anyio.fail_after(5):
        assert await client.process.wait() == 0

    [row] = await served.store.runs()
    assert row.id in served.live
    gate.opened.set()
    with anyio.fail_after(10):
        await served.live[row.id].ended.wait()
    assert (await served.store.run(row.id)).status == "succeeded"


async def test_a_closed_stdout_ends_the_shim(served: Runtime, environ: dict[str, str]) -> None:
    def use_without_listening() -> int:
        process = subprocess.Popen(
            [sys.executable, "-m", "orchestrator", "mcp", "--data-dir", str(served.config.data_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=variables(environ),
        )
        assert process.stdin
        assert process.stdout
        process.stdout.close()
        with process.stdin:
            process.stdin.write(b"{broken\n")
            process.stdin.flush()
            return process.wait(10)

    assert await anyio.to_thread.run_sync(use_without_listening) == 0


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
async def test_signals_end_the_shim_quietly(client: Client, sent: signal.Signals) -> None:
    await client.ask("server/discover")
    client.process.send_signal(sent)
    with anyio.fail_after(5):
        assert await client.process.wait() == 0


# -- finding and starting the server ------------------------------------------------------------------------


@pytest.fixture
def installed(make_config: Callable[..., Config]) -> Config:
    """Settings in the project's file, where a server that a shim starts finds them."""
    config = make_config()
    (config.project_dir / "orchestrator.yaml").write_text(settings_for(config, data_dir=str(config.data_dir)))
    return config


@pytest.fixture
async def sweeping(installed: Config, environ: dict[str, str]) -> AsyncIterator[None]:
    """Ends the servers that shims have started."""
    yield
    default = Path(environ["HOME"]) / ".local" / "share" / "orchestrator"
    for file in [installed.data_path / "server.json", *default.rglob("server.json")]:
        if state := read_state(file.parent):
            server = psutil.Process(state.pid)
            server.terminate()
            await anyio.to_thread.run_sync(server.wait, 10)


def server_of(config: Config) -> ServerState:
    return state_in(config.data_path)


def state_in(data: Path) -> ServerState:
    state = read_state(data)
    assert state
    return state


def settings_for(config: Config, **more: Any) -> str:
    """A configuration file with what the tests' CLI needs, and no ``data_dir``."""
    claude = config.claude.model_dump(mode="json")
    user_agents = {"user_path": str(config.agents.user_path), "default_model": "claude-opus-5-5"}
    return yaml.safe_dump({"claude": claude, "agents": user_agents, **more})


@pytest.mark.usefixtures("sweeping")
async def test_two_shims_start_one_server(installed: Config, environ: dict[str, str], model: ModelServer) -> None:
    model.rules = [Rule("hello")]
    pids: list[int] = []
    more = {"ORCHESTRATOR_RUN_TOKEN": "t", "TRACEPARENT": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}

    async def one() -> None:
        # No --data-dir: it is found in the project's file.
        async with started(installed, environ, **more, CLAUDE_PROJECT_DIR=str(installed.project_dir)) as client:
            await client.ask("server/discover")
            pids.append(server_of(installed).pid)

    async with anyio.create_task_group() as tg:
        for _ in range(2):
            tg.start_soon(one)

    assert len(pids) == 2
    assert len(set(pids)) == 1
    server = psutil.Process(pids[0])
    assert os.getsid(server.pid) == server.pid
    assert server.cwd() == str(installed.project_dir)
    assert not {"ORCHESTRATOR_RUN_TOKEN", "TRACEPARENT"} & server.environ().keys()
    log = installed.data_path / "server.log"
    assert log.stat().st_mode & 0o777 == 0o600
    # The server outlives the shims that started it.
    assert server.is_running()


START = """\
#!/bin/sh
{{ echo '{initialize}'; {then}; }} | PYTHONPATH={root} {python} -m orchestrator mcp --data-dir {data} > said
"""


def will_start_a_server(config: Config, model: ModelServer, then: str) -> tuple[str, ...]:
    """Have an agent start a shim, which lives as long as ``then`` takes; the tools that it must be allowed."""
    message = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": INITIALIZE})
    script = config.project_dir / "start.sh"
    words = {"root": ROOT, "python": sys.executable, "data": config.data_path, "then": then}
    script.write_text(START.format(initialize=message, **words))
    script.chmod(0o755)
    command = ToolUse("Bash", {"command": "./start.sh"})
    model.rules = [Rule(Reply(command), when={"tool_result": False}), Rule("Done.")]
    return ("Bash(./start.sh)",)


async def answers(config: Config) -> bool:
    """Whether the server that the state file named before still answers."""
    async with httpx2.AsyncClient(timeout=20) as http:
        response = await http.get(server_of(config).url.removesuffix("/mcp") + "/healthz")
    return bool(response.json()["ok"])


@pytest.mark.usefixtures("sweeping")
async def test_a_server_that_an_agent_has_started_is_no_part_of_its_run(
    installed: Config, runtime: Callable[..., AbstractAsyncContextManager[Runtime]], model: ModelServer
) -> None:
    """It is everybody's: it stays when the run has ended, and when the run's process is ended."""
    allowed = will_start_a_server(installed, model, "true")
    with anyio.fail_after(120):
        async with runtime() as rt:
            outcome = await delegate(rt, Task(agent="worker", prompt="x", allowed_tools=allowed))
            assert outcome.text == "Done."
            assert "error" not in (installed.project_dir / "said").read_text()
            assert await answers(installed)
        assert await answers(installed)


@pytest.mark.usefixtures("sweeping")
@pytest.mark.parametrize("grouped", [False, pytest.param(True, marks=needs_cgroups)])
async def test_a_server_outlives_the_agent_that_is_ended_while_its_shim_lives(
    installed: Config, environ: dict[str, str], model: ModelServer, grouped: bool
) -> None:
    said = installed.project_dir / "said"
    os.mkfifo(said)

    def first_line() -> str:
        with said.open() as lines:
            return lines.readline()

    allowed = will_start_a_server(installed, model, "sleep 300")
    marks = {PROCESS_ID_ENV: uuid.uuid4().hex, **({INSTANCE_ID_ENV: new_run_id()} if grouped else {})}
    spec = replace(Machine(installed.project_dir, environ, model).spec(**marks), allowed_tools=allowed)
    with anyio.fail_after(120):
        async with connect_process(
            spec, binary=bundled_cli(), dialect=DIALECTS["claude"], max_line_bytes=1 << 20
        ) as conversation:
            await conversation.send(Turn("Start it.", str(uuid.uuid4())))
            assert "serverInfo" in await anyio.to_thread.run_sync(first_line, abandon_on_cancel=True)
            await conversation.end_orphans()
            assert await answers(installed)
            family = psutil.Process(conversation.pid).children(recursive=True)
            assert server_of(installed).pid not in {child.pid for child in family}
            [shim_] = [child for child in family if "mcp" in child.cmdline()]
        await until(lambda: not runs(shim_))
        assert await answers(installed)


@pytest.mark.usefixtures("sweeping")
async def test_the_server_dies_in_the_middle_of_a_call(
    installed: Config, environ: dict[str, str], model: ModelServer
) -> None:
    model.rules = [Rule(Gate(), when={"user_contains": "first"}), Rule("back again")]
    call = {"name": "delegate", "arguments": {"agent": "helper", "prompt": "first"}}
    async with started(installed, environ) as client:
        listening = await client.say(LISTEN, WATCH_TOOLS, modern=True)
        assert (await client.hear())["method"] == "notifications/subscriptions/acknowledged"
        first = server_of(installed)
        lost = await client.say("tools/call", call, modern=True)
        await model.wait_for("first")
        os.kill(first.pid, signal.SIGKILL)

        answer = await client.hear()
        assert (answer["id"], answer["error"]["code"]) == (lost, shim.SERVER_LOST)
        assert "query_traces" in answer["error"]["message"]

        call["arguments"] = {"agent": "helper", "prompt": "second"}
        id_ = await client.say("tools/call", call, modern=True)
        again = await client.hear()  # not another acknowledgement, though the new server has been asked to listen
        assert again["id"] == id_
        assert again["result"]["content"][0]["text"].startswith("back again\n")
        assert server_of(installed).pid != first.pid
        # The dead server's run is not taken for running: the server is gone for good, and not a zombie.
        found = json.loads(await client.call("query_traces", text="first"))
        assert [run["status"] for run in found["runs"]] == ["interrupted"]
        cancelled = {"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": listening}}
        await client.write(cancelled)
        assert (await client.ask("tools/list"))["result"]


async def test_a_new_server_is_told_of_the_handshake(
    rt: Runtime, environ: dict[str, str], model: ModelServer
) -> None:
    model.rules = [Rule("hello")]
    async with started(rt.config, environ) as client:
        async with serving(rt):
            await client.ask("initialize", INITIALIZE, modern=False)
            await client.write({"jsonrpc": "2.0", "method": "notifications/initialized"})
            assert (await client.ask("tools/list", modern=False))["result"]
        async with serving(rt):
            id_ = await client.say("tools/list")
            answer = await client.hear()  # not a second answer to initialize
            assert answer["id"] == id_
            assert answer["result"]["tools"]


@pytest.mark.usefixtures("sweeping")
async def test_the_server_is_stopped_in_the_middle_of_a_call(
    installed: Config, environ: dict[str, str], model: ModelServer
) -> None:
    model.rules = [Rule(Gate())]
    async with started(installed, environ) as client:
        await client.say(LISTEN, WATCH_TOOLS, modern=True)
        await client.hear()
        first = server_of(installed)
        call = {"name": "delegate", "arguments": {"agent": "helper", "prompt": "first"}}
        id_ = await client.say("tools/call", call, modern=True)
        await model.wait_for("first")
        server = psutil.Process(first.pid)
        server.terminate()

        answer = await client.hear()

        # The run's own end, and no end of the subscription: the client would ask for it again, and we with it
        # for a server that somebody has just stopped.
        assert answer["id"] == id_
        assert "shutting down" in answer["result"]["content"][0]["text"]
        with anyio.fail_after(10):
            await anyio.to_thread.run_sync(server.wait)
        assert read_state(installed.data_path) is None
        assert (await client.ask("tools/list"))["result"]
        assert server_of(installed).pid != first.pid


@pytest.mark.usefixtures("sweeping", "home")
async def test_each_settings_file_has_a_server_of_its_own(
    installed: Config, environ: dict[str, str], model: ModelServer, tmp_path: Path
) -> None:
    """A project that may spend nothing does not get the server of one that may."""
    model.rules = [Rule("hello")]
    rich, poor = tmp_path / "rich", tmp_path / "poor"
    for folder, limits in ((rich, {}), (poor, {"budget_usd": 0})):
        shutil.copytree(installed.project_dir, folder)
        (folder / "orchestrator.yaml").write_text(settings_for(installed, limits=limits))

    answers = []
    for folder in (rich, poor):
        async with command(["mcp"], variables(environ), cwd=folder) as client:
            answers.append(await client.call("delegate", agent="helper", prompt="x"))

    assert answers[0].startswith("hello\n")
    assert "budget" in answers[1]
    assert state_in(agreed(rich)).pid != state_in(agreed(poor)).pid


@pytest.mark.usefixtures("sweeping", "home")
async def test_a_server_has_the_settings_that_were_named(
    installed: Config, environ: dict[str, str], model: ModelServer, tmp_path: Path
) -> None:
    """However the file is named, and although the server starts in the project: relative names are ours."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "mine.yaml").write_text(settings_for(installed, limits={"budget_usd": 0}))
    environ = variables(environ, CLAUDE_PROJECT_DIR=str(installed.project_dir))
    named = {**environ, "ORCHESTRATOR_CONFIG": "mine.yaml"}
    ways: list[tuple[list[str], dict[str, str]]] = [
        (["mcp"], named),
        (["mcp", "--config", "mine.yaml"], environ),
        (["mcp", "--config=mine.yaml"], {**environ, "ORCHESTRATOR_CONFIG": "no-such-file.yaml"}),
        (["--config", "mine.yaml", "mcp"], environ),
    ]
    data = agreed(installed.project_dir, {"ORCHESTRATOR_CONFIG": str(elsewhere / "mine.yaml")})
    pids = set()
    for argv, variables_ in ways:
        async with command(argv, variables_, cwd=elsewhere) as client:
            assert "budget" in await client.call("delegate", agent="helper", prompt="x")
            pids.add(state_in(data).pid)
    assert len(pids) == 1
    assert read_state(installed.data_path) is None


def test_settings_of_a_call_are_refused_for_a_server_that_may_run_already(
    tmp_path: Path, environ: dict[str, str]
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator", "--set", "limits.budget_usd=0", "mcp"],
        cwd=tmp_path,
        env=variables(environ),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert "orchestrator.yaml" in done.stderr


async def test_a_server_that_cannot_start(tmp_path: Path, environ: dict[str, str]) -> None:
    project = tmp_path / "broken"
    project.mkdir()
    (project / "orchestrator.yaml").write_text("data_dir: state\nno_such_setting: 1\n")
    config = load_config(project_dir=tmp_path, environ={}, overrides={"data_dir": str(project / "state")})
    async with started(config, environ, CLAUDE_PROJECT_DIR=str(project)) as client:
        answer = await client.ask("server/discover")
        assert answer["error"]["code"] == shim.NO_SERVER
        assert "no_such_setting" in answer["error"]["message"]
        assert client.process.returncode is None


def a_child() -> "subprocess.Popen[bytes]":
    """It ends at once, and is a zombie until it is waited for."""
    return subprocess.Popen(["true"])


async def test_a_port_that_belongs_to_someone_else_now(tmp_path: Path) -> None:
    zombie = a_child()
    await until(lambda: not runs(psutil.Process(zombie.pid)))
    listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
    port = listener.extra(anyio.abc.SocketAttribute.local_port)
    heard = []

    async def stranger(stream: anyio.abc.SocketStream) -> None:
        async with stream:
            heard.append(await stream.receive())
            await stream.send(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    gone = {"pid": 2**22 + 1, "line_port": port, "token": "secret"}
    async with listener, anyio.create_task_group() as tg:
        tg.start_soon(listener.serve, stranger)
        for dead in (gone, {**gone, "pid": zombie.pid}):
            write_private(tmp_path / "server.json", json.dumps(dead))
            assert await anyio.to_thread.run_sync(shim.dial, tmp_path) is None
        zombie.wait()
        assert heard == []  # a dead server's token is told to nobody
        write_private(tmp_path / "server.json", json.dumps({**gone, "pid": os.getpid()}))
        assert await anyio.to_thread.run_sync(shim.dial, tmp_path) is None
        tg.cancel_scope.cancel()
