"""The MCP Inspector, a client that is not ours, against the server that a shim starts: over stdio and over HTTP.

``scripts/inspector.sh`` installs it; without it these tests are skipped.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import psutil
import pytest

from orchestrator.server import ServerState, read_state

ROOT = Path(__file__).parents[1]
BIN = ROOT / ".inspector" / "node_modules" / ".bin"
NODE = (22, 19)


def why_not() -> str | None:
    """Why the Inspector cannot be run; None if it can."""
    if not (BIN / "mcp-inspector").exists():
        return "the MCP Inspector is not installed: run scripts/inspector.sh"
    node = shutil.which("node", path=f"{BIN}:{os.defpath}:/usr/local/bin")
    if node is None:
        return "the MCP Inspector needs Node: run scripts/inspector.sh"
    said = subprocess.run([node, "--version"], capture_output=True, text=True, check=True, env={}).stdout
    if tuple(map(int, said.strip().lstrip("v").split(".")[:2])) < NODE:
        return f"the MCP Inspector needs Node {'.'.join(map(str, NODE))} or newer, not {said.strip()}"
    return None


pytestmark = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")


@dataclass
class Place:
    """A project with a server, and how the Inspector reaches it."""

    project: Path
    data: Path
    environ: dict[str, str]
    state: ServerState

    async def inspect(self, way: str, *words: str) -> dict[str, Any]:
        """What the Inspector prints. It must end with status 0."""
        target = self.over_stdio() if way == "stdio" else self.over_http()
        with anyio.fail_after(60):
            done = await anyio.run_process(
                [str(BIN / "mcp-inspector"), "--cli", *target, *words],
                env={**self.environ, "PATH": f"{BIN}:{os.defpath}:/usr/local/bin"},
                cwd=self.project,
                check=False,
            )
        assert done.returncode == 0, done.stderr.decode()
        said: dict[str, Any] = json.loads(done.stdout)
        return said

    def over_stdio(self) -> list[str]:
        variables = [f"{name}={value}" for name, value in self.environ.items() if name != "PATH"]
        return [*shim(self.data), *(word for variable in variables for word in ("-e", variable))]

    def over_http(self) -> list[str]:
        return [self.state.url, "--transport", "http", "--header", f"Authorization: Bearer {self.state.token}"]


def shim(data: Path) -> list[str]:
    return [sys.executable, "-m", "orchestrator", "mcp", "--data-dir", str(data)]


@pytest.fixture
async def place(project: Path, environ: dict[str, str], tmp_path: Path) -> AsyncIterator[Place]:
    """The server is one that a shim has started, as it is for a client that begins with nothing."""
    data = tmp_path / "data"
    environ = {**environ, "PYTHONPATH": str(ROOT), "CLAUDE_PROJECT_DIR": str(project)}
    hello = {"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": {"name": "test", "version": "1"}}
    first = {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": hello}
    with anyio.fail_after(60):
        async with await anyio.open_process(shim(data), env=environ, cwd=project) as process:
            assert process.stdin
            assert process.stdout
            await process.stdin.send(json.dumps(first).encode() + b"\n")
            assert b"serverInfo" in await process.stdout.receive()
            await process.stdin.aclose()
            await process.wait()
    state = read_state(data)
    assert state
    try:
        yield Place(project, data, environ, state)
    finally:
        server = psutil.Process(state.pid)
        server.terminate()
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(server.wait, 20)


ERAS = ("modern", "legacy")


@pytest.mark.parametrize("way", ["stdio", "http"])
async def test_schemas_are_portable_and_every_call_is_answered(place: Place, way: str) -> None:
    for era in ERAS:
        listed = await place.inspect(way, "--protocol-era", era, "--method", "tools/list", "--strict")
        assert {tool["name"] for tool in listed["tools"]} >= {"delegate", "run_wait", "list_agents"}
    call = ("--method", "tools/call", "--tool-name", "list_agents")
    told = await place.inspect(way, *call)
    assert {agent["name"] for agent in told["structuredContent"]["agents"]} == {"helper", "worker"}
    load = await place.inspect(way, "--protocol-era", "modern", *call, "--load", "--load-requests", "500")
    assert (load["requests"], load["ok"], load["errors"], load["toolErrors"]) == (500, 500, 0, 0)
