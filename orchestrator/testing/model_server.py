"""A server for the Anthropic Messages API that says what a scenario tells it to.

It speaks HTTP/1.1 through h11 on sockets of its own, because what it is for, a body cut short, a TCP reset, a
stream that goes silent, is what a web framework keeps from happening.
"""

import inspect
import json
import logging
import math
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import anyio
import h11
from anyio.abc import SocketAttribute, SocketStream

from orchestrator.groups import unwrapped
from orchestrator.testing import template
from orchestrator.testing.connection import ClientLeft, Connection
from orchestrator.testing.request import Request
from orchestrator.testing.scenario import (
    Choice,
    Fault,
    Handler,
    Reply,
    Rule,
    Scenario,
    Tally,
    as_reply,
    as_scenario,
    choices,
)
from orchestrator.testing.sse import (
    STATUS_OF,
    Ending,
    body_frames,
    error_envelope,
    fault_envelope,
    stream_frames,
    to_json,
)

logger = logging.getLogger(__name__)

_JSON = {"content-type": "application/json"}


class ModelServer:
    """A running server; ``running_model_server`` makes one.

    ``journal`` has every request to ``/v1/messages`` in order of arrival, ``unmatched`` a line for each that got
    no reply. ``rules`` may be changed while the server runs; counts (``nth``, ``times``, sequences) belong to
    the rule object and start anew with a new one.
    """

    def __init__(self, scenario: Scenario, base_url: str) -> None:
        self.base_url = base_url
        self.name = scenario.name
        self.rules: list[Rule] = list(scenario.rules)
        self.journal: list[Request] = []
        self.unmatched: list[str] = []
        self._tallies: dict[Rule, Tally] = {}
        self._arrived = anyio.Event()
        self._answered = 0

    def __repr__(self) -> str:
        seen = f"{len(self.journal)} requests, {len(self.unmatched)} unmatched"
        return f"<ModelServer {self.base_url} {self.name}: {len(self.rules)} rules, {seen}>"

    def requests(
        self, *, system: str | None = None, model: str | None = None, text: str | None = None
    ) -> list[Request]:
        """Journal entries that contain each given text: in the system text, in the model's name, in the last
        user message (its words or its tool results)."""
        return [
            request
            for request in self.journal
            if (system is None or system in request.system)
            and (model is None or model in request.model)
            and (text is None or request.says(text))
        ]

    async def wait_for(self, wanted: str | Callable[[Request], bool], timeout: float = 10) -> Request:
        """The first request that fits, already there or still to come.

        ``wanted`` is a function of the request, or a text its last user message contains.

        Raises:
            TimeoutError: none came within ``timeout`` seconds; the message lists those that did.
        """
        fits = (lambda request: request.says(wanted)) if isinstance(wanted, str) else wanted
        checked = 0
        with anyio.move_on_after(timeout):
            while True:
                for request in self.journal[checked:]:
                    if fits(request):
                        return request
                checked = len(self.journal)
                await self._arrived.wait()
        seen = "".join(f"\n  #{request.index + 1}: {request.describe()}" for request in self.journal)
        raise TimeoutError(f"no request fits {wanted!r} after {timeout} s; seen:{seen or ' none'}")

    async def serve(self, stream: SocketStream) -> None:
        """Serve one client connection until either side ends it."""
        connection = Connection(stream)
        try:
            while (received := await connection.receive()) is not None:
                await self._handle(connection, *received)
                if not connection.reusable():
                    break
        except (ClientLeft, h11.RemoteProtocolError) as reason:
            logger.debug("connection ended: %s", reason)
        finally:
            await anyio.aclose_forcefully(stream)

    async def _handle(self, connection: Connection, head: h11.Request, raw: bytes) -> None:
        route = (head.method.decode(), head.target.decode().partition("?")[0])
        if route == ("POST", "/v1/messages"):
            await self._message(connection, head, raw)
        elif route == ("POST", "/v1/messages/count_tokens"):
            await self._respond(connection, 200, {"input_tokens": len(raw) // 4 + 1})
        elif route[0] in ("GET", "HEAD") and route[1] in ("/", "/api/hello"):
            await self._respond(connection, 200, {"server": "orchestrator.testing"})
        else:
            unknown = error_envelope("not_found_error", f"the scripted server has no {' '.join(route)}")
            await self._respond(connection, 404, unknown)

    async def _message(self, connection: Connection, head: h11.Request, raw: bytes) -> None:
        try:
            request = self._parse(head, raw)
        except ValueError as error:
            await self._respond(connection, 400, error_envelope("invalid_request_error", str(error)))
            return
        self._record(request)
        try:
            reply = await self._choose(request)
        except Exception as error:  # whatever a rule's own function raises must reach its author
            logger.exception("answering request #%d failed", request.index + 1)
            reply = self._refuse(f"{self.name} failed on request #{request.index + 1}: {error!r}")
        await self._send(connection, request, reply)

    def _parse(self, head: h11.Request, raw: bytes) -> Request:
        body = json.loads(raw)
        if not isinstance(body, dict) or not isinstance(body.get("model"), str):
            raise ValueError("model: Field required")  # noqa: TRY004  it is the client's value, not our caller's type
        if not isinstance(body.get("messages"), list) or not body["messages"]:
            raise ValueError("messages: at least one message is required")
        headers = {name.decode().lower(): value.decode("latin-1") for name, value in head.headers}
        return Request(len(self.journal), body, headers, len(raw))

    def _record(self, request: Request) -> None:
        self.journal.append(request)
        arrived, self._arrived = self._arrived, anyio.Event()
        arrived.set()

    async def _choose(self, request: Request) -> Reply:
        for choice in choices(self.rules, request, self._tallies):
            reply = await _take(choice, request)
            if reply is not None:
                return reply
        described = request.describe()
        # The CLI sends a refused request again in several forms: one warning for all of them.
        known = any(described in why for why in self.unmatched)
        unmatched = f"no rule of {self.name} matches request #{request.index + 1}: {described}; add a rule"
        return self._refuse(unmatched, logging.DEBUG if known else logging.WARNING)

    def _refuse(self, why: str, level: int = logging.WARNING) -> Reply:
        self.unmatched.append(why)
        logger.log(level, "%s", why)
        # 400 because the CLI repeats most other errors for minutes before it shows them.
        return Reply(fault=Fault(status=400, message=why))

    async def _send(self, connection: Connection, request: Request, reply: Reply) -> None:
        await connection.pause(reply.delay_s)
        fault = reply.fault
        if fault is not None and fault.is_http:
            await self._respond_fault(connection, fault, reply.headers)
        elif request.stream:
            frames, ending = stream_frames(reply, request)
            headers = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"}
            await self._transmit(connection, reply, headers, frames, ending)
        elif fault is not None and fault.error_at is not None:
            status = STATUS_OF.get(fault.error_type or "", 500)
            await self._respond(connection, status, fault_envelope(fault), {**reply.headers, **fault.headers})
        else:
            frames, length, ending = body_frames(reply, request)
            await self._transmit(connection, reply, _JSON | {"content-length": str(length)}, frames, ending)

    async def _transmit(
        self,
        connection: Connection,
        reply: Reply,
        headers: Mapping[str, object],
        frames: Sequence[bytes],
        ending: Ending,
    ) -> None:
        if frames or ending != "reset":
            await connection.start(200, {**headers, **self._request_id(), **reply.headers})
        for position, frame in enumerate(frames):
            if position:
                await connection.pause(reply.event_delay_s)
            await connection.send(frame)
        if ending == "complete":
            await connection.finish()
        elif ending == "stall":
            await connection.pause(math.inf)
        elif ending == "reset":
            connection.reset_on_close()
        # Cut short or reset: the response is not finished, so `serve` closes the connection.

    async def _respond_fault(self, connection: Connection, fault: Fault, extra: Mapping[str, object]) -> None:
        headers = {**extra, **fault.headers}
        if fault.body is None:
            await self._respond(connection, fault.status or 500, fault_envelope(fault), headers)
        else:
            headers = {"content-type": fault.content_type, **headers}
            await self._respond(connection, fault.status or 200, fault.body.encode(), headers)

    async def _respond(
        self,
        connection: Connection,
        status: int,
        body: Mapping[str, Any] | bytes,
        headers: Mapping[str, object] | None = None,
    ) -> None:
        data = body if isinstance(body, bytes) else to_json(body)
        length = {"content-length": len(data)}
        await connection.start(status, {**_JSON, **self._request_id(), **(headers or {}), **length})
        await connection.send(data)
        await connection.finish()

    def _request_id(self) -> dict[str, str]:
        self._answered += 1
        return {"request-id": f"req_offline_{self._answered:04d}"}


async def _take(choice: Choice, request: Request) -> Reply | None:
    """The reply of a chosen rule: its data with templates filled in, or what its function returns."""
    if isinstance(choice.reply, Reply):
        return template.render(choice, choice.reply, request)
    answer = choice.reply(request)
    if inspect.isawaitable(answer):
        answer = await answer
    return None if answer is None else as_reply(answer)


@asynccontextmanager
async def running_model_server(
    scenario: Scenario | Sequence[Rule] | Handler, *, port: int = 0
) -> AsyncIterator[ModelServer]:
    """A server for ``scenario`` on a loopback port, chosen by the system unless given.

    Leaving the context closes every connection at once, also those in the middle of an answer.
    """
    async with await anyio.create_tcp_listener(local_host="127.0.0.1", local_port=port) as listener:
        chosen = listener.extra(SocketAttribute.local_port)  # noqa: S610  anyio's, not Django's
        server = ModelServer(as_scenario(scenario), f"http://127.0.0.1:{chosen}")
        with unwrapped():  # a test that fails inside shall fail with its own error
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(listener.serve, server.serve)
                yield server
                tasks.cancel_scope.cancel()
