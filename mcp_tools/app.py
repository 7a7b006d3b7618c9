"""The HTTP door: MCP behind a bearer token, Host and Origin checks, served inside the current event loop."""

import logging
import secrets
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import anyio
import uvicorn
from mcp.server import MCPServer
from mcp.server.lowlevel import Server
from mcp.server.subscriptions import ListenHandler
from mcp.server.transport_security import TransportSecurityMiddleware, TransportSecuritySettings
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from mcp_tools.context import bearer
from mcp_tools.lines import open_line_door
from mcp_tools.tools import build_server
from orchestrator import __version__
from orchestrator.errors import ServerUnavailableError
from orchestrator.groups import unwrapped
from orchestrator.pool_report import pool_report, provider_report
from orchestrator.runtime import Runtime

log = logging.getLogger(__name__)

MCP_PATH = "/mcp"
#: How long open requests may take to end when the door closes, in seconds.
GRACE_SECONDS = 1


@dataclass(slots=True)
class OpenDoors:
    """Where the runtime is served: the URL of MCP, and the port for shims if there is one."""

    url: str
    line_port: int | None


@asynccontextmanager
async def open_doors(
    rt: Runtime, *, host: str, port: int, token: str | None, routes: Sequence[BaseRoute]
) -> AsyncIterator[OpenDoors]:
    """See ``mcp_tools.open_doors``."""
    server = build_server(rt)
    with _bound(host, port) as listener:
        port = listener.getsockname()[1]
        app = http_app(rt, server, hosts=_names(host, port), token=token, routes=routes)
        inner = server.session_manager.app
        line_door = open_line_door(inner, token) if token is not None else nullcontext()
        with unwrapped():
            async with server.session_manager.run(), _serving(app, listener, inner), line_door as line_port:
                yield OpenDoors(f"http://{_names(host, port)[0]}{MCP_PATH}", line_port)


def http_app(
    rt: Runtime,
    server: MCPServer,
    *,
    hosts: Sequence[str],
    token: str | None,
    routes: Sequence[BaseRoute] = (),
) -> Starlette:
    """MCP at ``/mcp``, ``routes``, and two probes: ``/healthz`` (the process answers; open to all) and ``/readyz``.

    ``/pool`` is the state of the pool (``pool_report``).

    ``hosts`` are the values of Host (and of Origin, after ``http://``) that are let in: a web page somewhere
    must not reach us through a name that it lets point at loopback.
    """
    security = TransportSecuritySettings(
        allowed_hosts=list(hosts), allowed_origins=[f"http://{name}" for name in hosts]
    )
    mcp = server.streamable_http_app(
        streamable_http_path=MCP_PATH,
        transport_security=security,
        # In JSON a character of a prompt may take two bytes where it had one.
        max_request_body_size=2 * rt.config.limits.max_prompt_bytes + 1024 * 1024,
    )

    async def healthz(_: Request) -> Response:
        return JSONResponse({"ok": True, "version": __version__})

    async def readyz(_: Request) -> Response:
        ready = not (rt.closing or rt.draining)
        return JSONResponse({"ok": ready, "runs": len(rt.live)}, status_code=200 if ready else 503)

    async def pool(_: Request) -> Response:
        return JSONResponse(_pool_report(rt))

    def accepts(presented: str, path: str) -> bool:
        if token is not None and secrets.compare_digest(presented.encode(), token.encode()):
            return True
        # An agent's tools tell it of its own runs; the other routes tell of everybody's.
        return path == MCP_PATH and rt.tokens.knows(presented)

    return Starlette(
        routes=[Route("/healthz", healthz), Route("/readyz", readyz), Route("/pool", pool), *routes, *mcp.routes],
        middleware=[Middleware(Guard, accepts=accepts, security=security, open_paths=frozenset({"/healthz"}))],
    )


def _pool_report(rt: Runtime) -> dict[str, Any]:
    now = anyio.current_time()
    provider = provider_report(
        rt.breaker.get_stats(now),
        rt.reached.of(rt.account, time.time()),
        parked=sum(live.row.status == "waiting" for live in rt.live.values()),
    )
    return pool_report(rt.pool.state, rt.pool.pids, now, max_queue=rt.config.limits.max_queue, provider=provider)


class Guard:
    """Lets in requests that name this server and carry a token that is accepted for their path."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        accepts: Callable[[str, str], bool],
        security: TransportSecuritySettings,
        open_paths: frozenset[str],
    ) -> None:
        self._app = app
        self._accepts = accepts
        self._security = TransportSecurityMiddleware(security)
        self._open_paths = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (refusal := await self._refusal(scope)) is not None:
            _tell(scope, refusal.status_code)
            await refusal(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _refusal(self, scope: Scope) -> Response | None:
        if (refusal := await self._security.validate_request(Request(scope))) is not None:
            return refusal
        if scope["path"] in self._open_paths:
            return None
        presented = bearer(Headers(scope=scope))
        if presented is not None and self._accepts(presented, scope["path"]):
            return None
        # No resource metadata: with it, clients would try OAuth against a server that has none.
        return Response("a bearer token of this server is needed", 401, {"WWW-Authenticate": "Bearer"})


def _tell(scope: Scope, status: int) -> None:
    """Log a refusal: by the routes we have, since in a path, a query or a header may be someone's token."""
    route = scope["path"] if scope["path"] in (MCP_PATH, "/healthz", "/readyz", "/pool") else "another path"
    client = scope.get("client")
    host = client[0] if client else "nowhere"
    log.warning("refused with %d: %s %s from %s", status, scope["method"], route, host)


def _names(host: str, port: int) -> list[str]:
    """What a client may call us, the preferred name first."""
    shown = f"[{host}]" if ":" in host else host
    if host in ("0.0.0.0", "::"):  # noqa: S104  # not bound here: only such an address has no name of its own
        shown = "127.0.0.1"
    return [f"{name}:{port}" for name in dict.fromkeys((shown, "127.0.0.1", "localhost", "[::1]"))]


@contextmanager
def _bound(host: str, port: int) -> Iterator[socket.socket]:
    """A listening socket. Raises ServerUnavailableError."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise ServerUnavailableError(
            f"cannot listen on {host}:{port}: {error.strerror or error}",
            advice="Choose another server.port, or 0 for any free one.",
        ) from error
    with listener:
        yield listener


class _Uvicorn(uvicorn.Server):
    """Signals belong to whoever runs the event loop, not to a server that is one task among others."""

    def capture_signals(self) -> AbstractContextManager[None]:  # type: ignore[override]  # a generator there
        return nullcontext()


@asynccontextmanager
async def _serving(app: ASGIApp, listener: socket.socket, inner: "Server[object]") -> AsyncIterator[None]:
    """Serve ``app`` until the context ends; then open requests get GRACE_SECONDS."""
    config = uvicorn.Config(
        app,
        lifespan="off",
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )
    server = _Uvicorn(config)

    async def run() -> None:
        # It stops when told so; cancelling it in the middle would leave its connections behind.
        with anyio.CancelScope(shield=True):
            await server.serve(sockets=[listener])

    async with anyio.create_task_group() as tg:
        tg.start_soon(run)
        try:
            yield
        finally:
            close_listeners(inner)
            server.should_exit = True


def close_listeners(server: "Server[object]") -> None:
    """End the streams on which clients wait for changes: they would hold a shutdown up, one per open window."""
    entry = server.get_request_handler("subscriptions/listen")
    if entry is not None and isinstance(entry.handler, ListenHandler):
        entry.handler.close()
