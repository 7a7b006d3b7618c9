"""The Claude Code plugin, its marketplace and the entry for the MCP registry: the real CLI takes them."""

import json
import re
import subprocess
import sys
import tomllib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import pytest

from orchestrator import __version__
from orchestrator.messages import SystemInit
from orchestrator.testing import ModelServer, Reply, Request, Rule, ToolUse
from tests.conftest import bundled_cli
from tests.test_claude_code import Home, Session

ROOT = Path(__file__).parent.parent
PLUGIN = ROOT / "plugin"
TOOLS = "mcp__plugin_orchestrator_orchestrator"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def read(path: str) -> Any:
    return json.loads((ROOT / path).read_text())


class Installed(Home):
    """A user's machine with ``orchestrator`` on the PATH, where Claude Code looks for the plugin's command."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.environ["PATH"] = f"{Path(sys.executable).parent}:{self.environ['PATH']}"

    async def cli(self, *args: str, prompt: str | None = None) -> subprocess.CompletedProcess[bytes]:
        with anyio.fail_after(90):
            return await anyio.run_process(
                [str(bundled_cli()), *args],
                cwd=self.project, env=self.environ, check=False, input=(prompt or "").encode(),
            )  # fmt: skip

    async def ask(self, prompt: str, *args: str) -> Session:
        return Session(await self.cli("-p", "--output-format=stream-json", "--verbose", *args, prompt=prompt))


@pytest.fixture
async def home(tmp_path: Path, project: Path, model: ModelServer) -> AsyncIterator[Installed]:
    (tmp_path / "home").mkdir(exist_ok=True)
    home = Installed(tmp_path, project, model.base_url)
    try:
        yield home
    finally:
        await anyio.to_thread.run_sync(home.stop_server)


@pytest.mark.parametrize("path", [PLUGIN, ROOT], ids=["plugin", "marketplace"])
async def test_claude_code_finds_nothing_wrong(home: Installed, path: Path) -> None:
    done = await home.cli("plugin", "validate", "--strict", str(path))
    assert done.returncode == 0, done.stdout.decode()
    assert "Validation passed" in done.stdout.decode()


def first(session: Session) -> dict[str, Any]:
    """What Claude Code says it has, at the begin of a turn."""
    [init] = [m for m in session.messages if isinstance(m, SystemInit)]
    return init.raw()


def statuses(has: dict[str, Any]) -> dict[str, str]:
    return {server["name"]: server["status"] for server in has["mcp_servers"]}


async def test_claude_code_with_the_plugin_has_tools_command_and_agent(home: Installed, model: ModelServer) -> None:
    model.rules = [Rule("hello")]
    has = first(await home.ask("hi", "--plugin-dir", str(PLUGIN)))
    assert statuses(has) == {"plugin:orchestrator:orchestrator": "connected"}, "before the first turn"
    wanted = {"delegate", "run_wait", "run_cancel", "fork_session", "query_traces", "list_agents"}
    assert {f"{TOOLS}__{name}" for name in wanted} <= set(has["tools"])
    assert "orchestrator:delegate" in has["slash_commands"]
    assert "orchestrator:dispatcher" in has["agents"]


async def test_the_command_delegates_without_asking_for_permission(home: Installed, model: ModelServer) -> None:
    asked = "Hand this to an agent of the orchestrator: helper help me"
    model.rules = [
        Rule("I helped", when={"system": "You are the helper"}),
        Rule(lambda request: Reply(f"it says: {request.all_tool_results[0].text}"), when={"tool_result": True}),
        Rule(ToolUse(f"{TOOLS}__delegate", {"agent": "helper", "prompt": "help me"}), when={"user": asked}),
    ]
    session = await home.ask("/orchestrator:delegate helper help me", "--plugin-dir", str(PLUGIN))
    assert session.tools_used == [f"{TOOLS}__delegate"]
    assert session.answer.startswith("it says: I helped")
    [run] = await home.runs()
    assert (run.name, run.status) == ("helper", "succeeded")


async def test_the_agent_is_offered_our_tools(home: Installed, model: ModelServer) -> None:
    seen: list[Request] = []

    def dispatcher(request: Request) -> Reply:
        seen.append(request)
        return Reply("done")

    model.rules = [
        Rule(dispatcher, when={"system": "handing parts of it to agents of the orchestrator"}),
        Rule("end", when={"tool_result": True}),
        Rule(
            ToolUse(
                "Agent",
                {
                    "subagent_type": "orchestrator:dispatcher",
                    "description": "x",
                    "prompt": "go",
                    "run_in_background": False,
                },
            )
        ),
    ]
    await home.ask("go", "--plugin-dir", str(PLUGIN), "--allowedTools", "Agent")
    assert seen
    assert {f"{TOOLS}__delegate", f"{TOOLS}__run_wait"} <= set(seen[0].tools)


async def test_the_marketplace_installs_it(home: Installed, model: ModelServer) -> None:
    model.rules = [Rule("hello")]
    done = await home.cli("plugin", "install", "orchestrator", "--marketplace", str(ROOT))
    assert done.returncode == 0, done.stdout + done.stderr
    has = first(await home.ask("hi"))
    assert "orchestrator:delegate" in has["slash_commands"]
    assert statuses(has) == {"plugin:orchestrator:orchestrator": "connected"}


# -- names and versions -------------------------------------------------------------------------------------


def test_versions_are_the_packages() -> None:
    server = read("server.json")
    versions = [server["version"], *(package["version"] for package in server["packages"])]
    versions.append(read("plugin/.claude-plugin/plugin.json")["version"])
    assert set(versions) == {__version__, PROJECT["version"]}


def test_the_registry_entry_is_what_the_registry_asks_for() -> None:
    server = read("server.json")
    assert server["$schema"] == "https://static.modelcontextprotocol.io/schemas/2025-12-11/server.schema.json"
    assert re.fullmatch(r"io\.github\.[A-Za-z0-9-]+/[a-zA-Z0-9._-]+", server["name"])
    assert 1 <= len(server["description"]) <= 100
    owner = server["name"].removeprefix("io.github.").partition("/")[0]
    assert server["repository"]["url"].startswith(f"https://github.com/{owner}/")
    assert server["repository"]["source"] == "github"


def test_the_registry_entry_starts_what_the_package_has() -> None:
    [package] = read("server.json")["packages"]
    assert (package["registryType"], package["transport"]) == ("pypi", {"type": "stdio"})
    assert package["identifier"] == PROJECT["name"]
    # `uvx NAME` runs the script that has the package's name.
    assert (package["runtimeHint"], package["identifier"] in PROJECT["scripts"]) == ("uvx", True)
    assert [(each["type"], each["value"]) for each in package["packageArguments"]] == [("positional", "mcp")]


def test_the_readme_proves_whose_package_it_is() -> None:
    [name] = re.findall(r"<!-- mcp-name: (\S+) -->", (ROOT / "README.md").read_text())
    assert name == read("server.json")["name"]
    assert PROJECT["readme"] == "README.md"


def test_the_plugins_server_is_the_installed_script() -> None:
    [server] = read("plugin/.claude-plugin/plugin.json")["mcpServers"].values()
    assert server["command"] in PROJECT["scripts"]
    assert server["args"] == ["mcp"]
