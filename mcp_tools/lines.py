"""The line door: MCP as newline-delimited JSON on a loopback socket, for the stdio shim.

A connection opens with one line each way: ``{"token": …, "version": …}`` is answered by
``{"ok": true, "version": …}``, or by ``{"ok": false, "error": …}`` and the end. What follows is what MCP's stdio
transport would say.
"""

import json
import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import anyio
from anyio.abc import ByteStream, Listener, SocketAttribute, SocketStream, TaskGroup
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream
from mcp.server.lowlevel import Server
from mcp.server.runner import serve_dual_era_loop
from mcp.shared.dispatcher import as_request_id, coerce_request_id
from mcp.shared.jsonrpc_dispatcher import cancelled_request_id_from_params
from mcp.shared.message import SessionMessage
from mcp_types import (
    INVALID_REQUEST,
    PARSE_ERROR,
    JSONRPCError,
    JSONRPCMessage,
    JSONRPCNotification,
    JSONRPCRequest,
    JSONRPCResponse,
    RequestId,
    jsonrpc_message_adapter,
)
from pydantic import ValidationError

from orchestrator import __version__
from orchestrator.errors import MessageTooLargeError
from orchestrator.framing import LineFramer
from orchestrator.groups import unwrapped

log = logging.getLogger(__name__)

HELLO_SECONDS = 5
MAX_HELLO_BYTES = 4096
MAX_LINE_BYTES = 64 * 1024 * 1024
READ_BYTES = 1 << 16
#: How long open requests may take to be answered when the door closes, in seconds.
GRACE_SECONDS = 1
#: How long to wait before taking in connections again when that failed, in seconds.
PAUSE_SECONDS = 0.5

_GONE = (anyio.BrokenResourceError, anyio.ClosedResourceError, anyio.EndOfStream)


@asynccontextmanager
async def open_line_door(server: Server[Any], token: str) -> AsyncIterator[int]:
    """Listen on a free loopback port, which is yielded. Leaving the context ends every connection.

    Requests that can be answered within GRACE_SECONDS then are.
    """
    listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
    unanswered = Unanswered()
    async with listener, server.lifespan(server) as state:
        door = _Door(server, state, token, unanswered)
        async with anyio.create_task_group() as tg:
            tg.start_soon(_take_in, listener, door.connection, tg)
            yield listener.extra(SocketAttribute.local_port)  # noqa: S610  # anyio's extra, not Django's
            with anyio.move_on_after(GRACE_SECONDS):
                await unanswered.none()
            tg.cancel_scope.cancel()


async def _take_in(
    listener: Listener[SocketStream], connection: Callable[[ByteStream], Awaitable[None]], tg: TaskGroup
) -> None:
    """Serve whoever connects, until cancelled."""
    while True:
        try:
            with unwrapped():
                await listener.serve(connection, tg)
        except OSError as error:  # no descriptors are left, say: that passes, and the connections there are go on
            log.warning("nobody can connect for now: %s", error)
            await anyio.sleep(PAUSE_SECONDS)


class Unanswered:
    """The requests of all connections that have no answer yet. A stream that waits for changes is not meant."""

    def __init__(self) -> None:
        self._requests: set[tuple[Lines, RequestId]] = set()
        self._fewer = anyio.Event()

    def came(self, lines: "Lines", message: JSONRPCMessage) -> None:
        if isinstance(message, JSONRPCRequest) and message.method != "subscriptions/listen":
            self._requests.add((lines, coerce_request_id(message.id)))
        elif isinstance(message, JSONRPCNotification) and message.method == "notifications/cancelled":
            # What was cancelled is not answered any more.
            self._went(lines, cancelled_request_id_from_params(message.params))

    def went(self, lines: "Lines", message: JSONRPCMessage) -> None:
        if isinstance(message, JSONRPCResponse | JSONRPCError):
            self._went(lines, message.id)

    def left(self, lines: "Lines") -> None:
        self._end({request for request in self._requests if request[0] is lines})

    async def none(self) -> None:
        """Wait until every request has its answer."""
        while self._requests:
            await self._fewer.wait()

    def _went(self, lines: "Lines", request_id: RequestId | None) -> None:
        if request_id is not None:
            self._end({(lines, coerce_request_id(request_id))})

    def _end(self, requests: set[tuple["Lines", RequestId]]) -> None:
        self._requests -= requests
        self._fewer.set()
        self._fewer = anyio.Event()


class _Door:
    """What all connections share."""

    def __init__(self, server: Server[Any], state: Any, token: str, unanswered: Unanswered) -> None:
        self._server = server
        self._state = state
        self._token = token
        self._unanswered = unanswered

    async def connection(self, stream: ByteStream) -> None:
        """One shim, from its hello to its end. Its requests end with it; the runs they started do not."""
        lines = Lines(stream)
        try:
            async with stream:
                with anyio.fail_after(HELLO_SECONDS):
                    await self._greet(lines)
                await self._converse(lines)
        except PermissionError as reason:
            log.warning("a connection was refused: %s", reason)
        except (TimeoutError, MessageTooLargeError, *_GONE) as reason:
            log.info("a connection was ended: %s", reason or type(reason).__name__)
        except Exception:
            # Above us are the other connections and every run: whatever went wrong here, they go on.
            log.exception("a connection was ended by a defect")
        finally:
            self._unanswered.left(lines)

    async def _greet(self, lines: "Lines") -> None:
        """Raises PermissionError for whoever does not know the token."""
        hello = _parsed(await lines.receive(MAX_HELLO_BYTES))
        presented = hello.get("token") if isinstance(hello, dict) else None
        if not isinstance(presented, str) or not self._knows(presented):
            await lines.send(_compact({"ok": False, "error": "the token is wrong"}))
            raise PermissionError("wrong token")
        await lines.send(_compact({"ok": True, "version": __version__}))

    def _knows(self, token: str) -> bool:
        # JSON can name half of a surrogate pair, which strict UTF-8 cannot carry.
        return secrets.compare_digest(token.encode("utf-8", "surrogatepass"), self._token.encode())

    async def _converse(self, lines: "Lines") -> None:
        to_server, incoming = anyio.create_memory_object_stream[SessionMessage | Exception]()
        outgoing, from_server = anyio.create_memory_object_stream[SessionMessage]()
        with unwrapped():
            async with anyio.create_task_group() as tg:
                tg.start_soon(self._read, lines, to_server)
                tg.start_soon(self._write, lines, from_server)
                await serve_dual_era_loop(self._server, incoming, outgoing, lifespan_state=self._state)
                tg.cancel_scope.cancel()

    async def _read(self, lines: "Lines", to_server: MemoryObjectSendStream[SessionMessage | Exception]) -> None:
        async with to_server:
            with suppress(*_GONE):
                while True:
                    line = await lines.receive(MAX_LINE_BYTES)
                    try:
                        message = jsonrpc_message_adapter.validate_json(line, by_name=False)
                    except ValidationError:
                        await lines.send(_compact(_not_a_message(line)))
                        continue
                    self._unanswered.came(lines, message)
                    await to_server.send(SessionMessage(message))

    async def _write(self, lines: "Lines", from_server: MemoryObjectReceiveStream[SessionMessage]) -> None:
        async with from_server:
            with suppress(*_GONE):
                async for item in from_server:
                    await lines.send(item.message.model_dump_json(by_alias=True, exclude_unset=True).encode())
                    self._unanswered.went(lines, item.message)


class Lines:
    """Lines of bytes over a stream of bytes."""

    def __init__(self, stream: ByteStream) -> None:
        self._stream = stream
        self._framer = LineFramer(MAX_LINE_BYTES)
        self._ready: list[bytes] = []
        self._sending = anyio.Lock()

    async def receive(self, max_bytes: int) -> bytes:
        """The next line. Raises EndOfStream, and MessageTooLargeError for a line of more than ``max_bytes``."""
        while not self._ready:
            self._ready = self._framer.feed(await self._stream.receive(READ_BYTES))[::-1]
        line = self._ready.pop()
        if len(line) > max_bytes:
            raise MessageTooLargeError(f"a line of {len(line):,} bytes, where {max_bytes:,} are allowed")
        return line

    async def send(self, line: bytes) -> None:
        async with self._sending:
            await self._stream.send(line + b"\n")


def _not_a_message(line: bytes) -> dict[str, Any]:
    """JSON-RPC's answer to a line that is no message; without one its sender would wait for ever."""
    sent = _parsed(line)
    code, words = (PARSE_ERROR, "not JSON") if sent is None else (INVALID_REQUEST, "not a JSON-RPC message")
    message_id = sent.get("id") if isinstance(sent, dict) else None
    return {"jsonrpc": "2.0", "id": as_request_id(message_id), "error": {"code": code, "message": words}}


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _compact(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
