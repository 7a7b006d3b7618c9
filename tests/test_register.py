"""``orchestrator register``: the real Claude Code is told of us, and what is printed for other clients works."""

import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import pytest
from mcp import Client
from mcp.client.stdio import StdioServerParameters, stdio_client

from orchestrator.registration import CLIENTS, NAME, add_http, own_command
from orchestrator.testing import ModelServer
from tests.conftest import bundled_cli
from tests.test_claude_code import Home, serving
from tests.test_docs import README, blocks

ROOT = Path(__file__).parent.parent


class Registering(Home):
    """A user's machine on which ``orchestrator`` and ``claude`` are typed."""

    async def orchestrator(self, *args: str, code: int = 0, **env: str) -> subprocess.CompletedProcess[str]:
        return await self.run([sys.executable, "-m", "orchestrator", *args], code, env)

    async def claude_mcp(self, *args: str, code: int = 0, **env: str) -> str:
        done = await self.run([str(bundled_cli()), "mcp", *args], code, env)
        return done.stdout

    async def run(self, command: list[str], code: int, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
        with anyio.fail_after(60):
            done = await anyio.run_process(
                command, cwd=self.project, env={**self.environ, **env}, stdin=subprocess.DEVNULL, check=False
            )
        out, err = done.stdout.decode(), done.stderr.decode()
        assert done.returncode == code, f"exit {done.returncode}\n{out}\n{err}"
        return subprocess.CompletedProcess(command, code, out, err)

    def servers(self) -> dict[str, Any]:
        """What Claude Code has written down for this project."""
        try:
            written = json.loads((Path(self.environ["HOME"]) / ".claude.json").read_text())
        except FileNotFoundError:
            return {}
        servers: dict[str, Any] = written.get("projects", {}).get(str(self.project), {}).get("mcpServers", {})
        return {**written.get("mcpServers", {}), **servers}


@pytest.fixture
async def home(tmp_path: Path, project: Path, model: ModelServer) -> AsyncIterator[Registering]:
    (tmp_path / "home").mkdir(exist_ok=True)
    home = Registering(tmp_path, project, model.base_url)
    try:
        yield home
    finally:
        await anyio.to_thread.run_sync(home.stop_server)


# -- Claude Code --------------------------------------------------------------------------------------------


async def test_registered_with_claude_code(home: Registering) -> None:
    said = (await home.orchestrator("register", "claude-code")).stdout
    own = own_command(Path(sys.executable), home.environ)
    assert said.splitlines()[0] == "$ " + shlex.join(
        [str(bundled_cli()), "mcp", "add", "--scope", "local", "orchestrator", "--", *own, "mcp"]
    )
    assert "Added stdio MCP server orchestrator" in said
    listed = await home.claude_mcp("list")
    assert re.search(r"^orchestrator: .*Connected", listed, re.MULTILINE), listed


async def test_dry_run_registers_nothing(home: Registering) -> None:
    said = (
        await home.orchestrator("register", "claude-code", "--dry-run", "--scope", "user", "--name", "o")
    ).stdout
    assert re.match(r"\$ .* mcp add --scope user o -- ", said)
    assert said.endswith("not run\n")
    assert home.servers() == {}
    assert not (Path(home.environ["HOME"]) / ".claude.json").exists()


async def test_registered_already(home: Registering) -> None:
    await home.orchestrator("register", "claude-code")
    before = home.servers()
    refused = await home.orchestrator("register", "claude-code", code=1)
    assert "orchestrator is registered already, and was left as it is" in refused.stderr
    assert home.servers() == before
    # The advice works as it is printed.
    advice = re.search(r"first: (.*); or choose another --name", refused.stderr)
    assert advice, refused.stderr
    await home.run(shlex.split(advice[1]), 0, {})
    assert home.servers() == {}
    await home.orchestrator("register", "claude-code")
    await home.orchestrator("register", "claude-code", "--name", "another")
    assert sorted(home.servers()) == ["another", "orchestrator"]


async def test_for_everyone_in_the_project(home: Registering) -> None:
    said = (await home.orchestrator("register", "claude-code", "--scope", "project")).stdout
    written = json.loads((home.project / ".mcp.json").read_text())["mcpServers"]["orchestrator"]
    assert (written["command"], written["args"]) == ("orchestrator", ["mcp"]), "no path of this machine"
    assert "approve the server" in said


async def test_options_of_the_command_line_reach_the_server(home: Registering, tmp_path: Path) -> None:
    await home.orchestrator("--config", "orchestrator.yaml", "--data-dir", "d", "register", "claude-code")
    args = home.servers()["orchestrator"]["args"]
    wanted = ["mcp", "--config", str(home.project / "orchestrator.yaml"), "--data-dir", str(home.project / "d")]
    assert args[-5:] == wanted


async def test_over_http_the_token_comes_from_the_environment(home: Registering) -> None:
    with anyio.fail_after(90):
        async with serving(home):
            state = home.state()
            done = await home.orchestrator("register", "claude-code", "--http")
            assert state.token not in done.stdout + done.stderr
            assert state.token not in json.dumps(home.servers())
            assert home.servers()["orchestrator"] == {
                "type": "http",
                "url": state.url,
                "headers": {"Authorization": "Bearer ${ORCHESTRATOR_TOKEN}"},
            }
            assert "Set server.port in orchestrator.yaml" in done.stderr
            # What it says to type gives the token, and with it Claude Code connects.
            [export] = re.findall(r"export ORCHESTRATOR_TOKEN=.*\)\"", done.stdout)
            shown = await home.run(["sh", "-c", f'{export}; printf %s "$ORCHESTRATOR_TOKEN"'], 0, {})
            assert shown.stdout == state.token
            assert "Connected" in await home.claude_mcp("list", ORCHESTRATOR_TOKEN=shown.stdout)
            assert "Connected" not in await home.claude_mcp("list", ORCHESTRATOR_TOKEN="wrong")
            # The variable is not taken for a setting.
            await home.orchestrator("config", "show", ORCHESTRATOR_TOKEN=shown.stdout)


async def test_http_needs_a_running_server(home: Registering) -> None:
    refused = await home.orchestrator("register", "claude-code", "--http", code=1)
    assert "no server is running" in refused.stderr
    assert "orchestrator serve" in refused.stderr
    assert home.servers() == {}


async def test_what_claude_code_refuses_is_shown(home: Registering) -> None:
    (home.project / ".mcp.json").write_text('{"mcpServers": {')
    refused = await home.orchestrator("register", "claude-code", "--scope", "project", code=1)
    assert ".mcp.json is malformed" in refused.stderr


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], "say either claude-code or --print CLIENT"),
        (["claude-code", "--print", "codex"], "say either claude-code or --print CLIENT"),
        (["cursor"], "try: orchestrator register --print cursor"),
        (["emacs"], "there are: claude-code, vscode, cursor, claude-desktop, codex"),
        (["claude-code", "--name", "--scope"], "may only have letters"),
        (["--print", "codex", "--http"], "--print goes with none of"),
    ],
)
async def test_wrong_use(home: Registering, args: list[str], said: str) -> None:
    assert said in (await home.orchestrator("register", *args, code=2)).stderr


async def test_settings_of_the_command_line_are_refused(home: Registering) -> None:
    refused = await home.orchestrator("--set", "limits.max_depth=2", "register", "claude-code", code=2)
    assert "put the setting into orchestrator.yaml" in refused.stderr


# -- other clients ------------------------------------------------------------------------------------------


def server_in(client: str, text: str) -> dict[str, Any]:
    """Our server in what is printed for a client, read as that client reads it."""
    if client == "codex":
        found: dict[str, Any] = tomllib.loads(text)["mcp_servers"]["orchestrator"]
    else:
        found = json.loads(text)["servers" if client == "vscode" else "mcpServers"]["orchestrator"]
    return found


@pytest.mark.parametrize("client", CLIENTS)
async def test_what_is_printed_starts_a_server_of_the_project(
    home: Registering, client: str, tmp_path: Path
) -> None:
    """Started as the client would, which has another PATH, and as a rule is somewhere else."""
    done = await home.orchestrator("register", "--print", client)
    assert CLIENTS[client].where in done.stderr
    server = server_in(client, done.stdout)
    assert Path(server["command"]).is_absolute()
    # VS Code and Codex start servers in the project; Cursor puts it in for the variable.
    cwd = home.project if client in ("vscode", "codex") else tmp_path
    env = {
        name: value.replace("${workspaceFolder}", str(home.project))
        for name, value in server.get("env", {}).items()
    }
    started = StdioServerParameters(
        command=server["command"],
        args=server["args"],
        cwd=cwd,
        env={"HOME": home.environ["HOME"], "PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), **env},
    )
    with anyio.fail_after(60):
        async with Client(stdio_client(started)) as mcp:
            answer = await mcp.call_tool("list_agents", {})
    assert answer.structured_content is not None
    assert {agent["name"] for agent in answer.structured_content["agents"]} == {"helper", "worker"}


@pytest.mark.parametrize("client", CLIENTS)
def test_the_readme_shows_what_is_printed(client: str) -> None:
    printed = CLIENTS[client].render(["/path/to/orchestrator", "mcp"], Path("/path/to/project"))
    assert server_in(client, printed)
    assert printed in blocks(README, "toml" if client == "codex" else "json")


@pytest.mark.parametrize("client", CLIENTS)
def test_any_path_is_written_so_that_it_is_read(client: str) -> None:
    odd = '/a "b"/\\c/é\t\'$x'
    server = server_in(client, CLIENTS[client].render([odd, "mcp", "--config", odd], Path(odd)))
    assert (server["command"], server["args"]) == (odd, ["mcp", "--config", odd])


# -- the parts ----------------------------------------------------------------------------------------------


def test_how_we_are_started_from_anywhere(tmp_path: Path) -> None:
    python, elsewhere = tmp_path / "venv" / "python", tmp_path / "bin"
    python.parent.mkdir()
    elsewhere.mkdir()
    environ = {"PATH": str(elsewhere)}
    assert own_command(python, environ) == [str(python), "-m", "orchestrator"]
    script(elsewhere / "orchestrator")
    assert own_command(python, environ) == [str(elsewhere / "orchestrator")]
    script(python.parent / "orchestrator")
    assert own_command(python, environ) == [str(python.parent / "orchestrator")]
    (python.parent / "orchestrator").chmod(0o600)
    assert own_command(python, environ) == [str(elsewhere / "orchestrator")]


def script(path: Path) -> None:
    path.write_text("#!/bin/sh\n")
    path.chmod(0o700)


def test_the_header_takes_no_word_that_is_not_its_own() -> None:
    assert add_http("o", "user", "http://127.0.0.1:1/mcp")[-2:] == [
        "--header",
        "Authorization: Bearer ${ORCHESTRATOR_TOKEN}",
    ]


@pytest.mark.parametrize("name", ["", "a b", "--scope", "-s", "a.b", "ä"])
async def test_names_that_claude_code_refuses_are_refused_before(home: Registering, name: str) -> None:
    assert NAME.fullmatch(name) is None
    await home.claude_mcp("add", "--scope", "user", name, "--", "x", code=1)


@pytest.mark.parametrize("name", ["o", "A_b-2", "_"])
async def test_names_that_claude_code_takes(home: Registering, name: str) -> None:
    assert NAME.fullmatch(name)
    await home.claude_mcp("add", "--scope", "user", name, "--", "x")
