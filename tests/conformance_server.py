"""Our MCP server for the conformance suite: the app and the doors that are real, on a free loopback port.

``python -m tests.conformance_server`` prints two URLs, one of the server as it is and one of the same server with
the suite's fixtures added, and serves them until its standard input ends.
"""

import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
from mcp.server import MCPServer
from starlette.types import ASGIApp, Receive, Scope, Send

from mcp_tools import app
from mcp_tools.run_tasks import RunTasks
from mcp_tools.tools import build_server
from orchestrator.config import load_config
from orchestrator.groups import unwrapped
from orchestrator.runtime import Runtime, open_runtime
from tests.conformance_fixtures import add_fixtures
from tests.conformance_jobs import Jobs, add_jobs

TOKEN = "the-token-of-the-conformance-server"


class Presents:
    """Adds the token to each request: the suite cannot."""

    def __init__(self, inner: ASGIApp, token: str) -> None:
        self._inner = inner
        self._header = (b"authorization", f"Bearer {token}".encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._inner({**scope, "headers": [*scope.get("headers", []), self._header]}, receive, send)


@asynccontextmanager
async def served(rt: Runtime, server: MCPServer) -> AsyncIterator[str]:
    """Serve it as ``mcp_tools.app.open_doors`` does; yields the URL."""
    with app._bound("127.0.0.1", 0) as listener:
        names = app._names("127.0.0.1", listener.getsockname()[1])
        asgi = Presents(app.http_app(rt, server, hosts=names, token=TOKEN), TOKEN)
        with unwrapped():
            async with server.session_manager.run(), app._serving(asgi, listener, server.session_manager.app):
                yield f"http://{names[0]}{app.MCP_PATH}"


@asynccontextmanager
async def serving(folder: Path) -> AsyncIterator[tuple[str, str]]:
    """The URLs of the server as it is, and of the one with the suite's fixtures."""
    (folder / "agents").mkdir(parents=True)
    overrides = {
        "data_dir": str(folder / "data"),
        "agents.user_path": str(folder / "none"),
        "claude.home": str(folder),
        "claude.base_url": "http://127.0.0.1:9",  # nothing runs here, and nothing could be reached
    }
    config = load_config(project_dir=folder, environ={}, overrides=overrides)
    environ = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": str(folder)}
    async with open_runtime(config, environ=environ) as rt, anyio.create_task_group() as tg:
        jobs = Jobs(RunTasks(rt), tg)
        with_fixtures = build_server(rt, jobs)
        add_fixtures(with_fixtures)
        add_jobs(with_fixtures, jobs)
        async with served(rt, build_server(rt)) as plain, served(rt, with_fixtures) as full:
            yield plain, full
        tg.cancel_scope.cancel()


async def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        async with serving(Path(folder) / "project") as urls:
            print(*urls, sep="\n", flush=True)
            await anyio.to_thread.run_sync(sys.stdin.read, abandon_on_cancel=True)


if __name__ == "__main__":
    anyio.run(main)
