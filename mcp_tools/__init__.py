"""The runtime as MCP tools: a thin layer of descriptions, shaping and error mapping. No state, no decisions.

``mcp`` costs half a second to import, so it is loaded when a door is opened or a server is built, not before.
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from importlib import import_module
from typing import TYPE_CHECKING

import anyio

from orchestrator.runtime import Door, Runtime
from orchestrator.server import Doors

if TYPE_CHECKING:
    from mcp.server import MCPServer
    from starlette.routing import BaseRoute

__all__ = ["build_server", "open_door", "open_doors"]


def build_server(rt: Runtime) -> "MCPServer":
    """An MCP server whose tools work in ``rt``; serve it with any transport of the SDK."""
    from mcp_tools.tools import build_server as build  # noqa: PLC0415  # see above

    return build(rt)


@asynccontextmanager
async def open_door(rt: Runtime) -> AsyncIterator[Door]:
    """Serve MCP on a free loopback port to the agents of ``rt`` alone: only tokens of running runs are accepted."""
    async with open_doors(rt) as door:
        yield door


@asynccontextmanager
async def open_doors(
    rt: Runtime,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    token: str | None = None,
    routes: "Sequence[BaseRoute]" = (),
) -> AsyncIterator[Doors]:
    """Serve MCP over HTTP on ``host:port`` and, where ``token`` is given, to stdio shims on a loopback port.

    ``token`` gives full rights; the tokens of running runs are accepted beside it, for MCP alone. ``routes`` are
    served beside ``/mcp``, for ``token`` alone. Raises ServerUnavailableError when the address cannot be used.
    """
    app = await anyio.to_thread.run_sync(import_module, "mcp_tools.app")
    async with app.open_doors(rt, host=host, port=port, token=token, routes=routes) as doors:
        yield doors
