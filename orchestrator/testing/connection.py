"""One client's HTTP/1.1 connection: h11 for the grammar, the socket for what a good server never does."""

import socket
import struct
from collections.abc import Mapping

import anyio
import h11
from anyio.abc import SocketAttribute, SocketStream

# Requests carry many long headers (custom headers, trace baggage); h11's own limit is 16 KiB.
MAX_HEAD_BYTES = 256 * 1024

_LINGER_ZERO = struct.pack("ii", 1, 0)


class ClientLeft(Exception):  # noqa: N818  it is news, not an error
    """The client closed the connection."""


class Connection:
    """Requests in, response parts out. Every method that does I/O raises ``ClientLeft`` once the client is gone."""

    def __init__(self, stream: SocketStream) -> None:
        self._stream = stream
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD_BYTES)
        self._method = b""

    async def receive(self) -> tuple[h11.Request, bytes] | None:
        """The next request's head and whole body; None when the client has no more.

        Raises:
            h11.RemoteProtocolError: what came is not HTTP.
        """
        head: h11.Request | None = None
        body = bytearray()
        while True:
            event = self._http.next_event()
            if event is h11.NEED_DATA:
                await self._read()
            elif isinstance(event, h11.Request):
                head = event
                self._method = event.method
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.EndOfMessage):
                assert head is not None
                return head, bytes(body)
            else:
                return None

    async def start(self, status: int, headers: Mapping[str, object]) -> None:
        """Send the response head. Without a content-length the body goes out chunked."""
        # A dictionary, so that a header given later replaces the same one spelt differently.
        encoded = {name.lower(): str(value) for name, value in headers.items()}
        await self._send(h11.Response(status_code=status, headers=list(encoded.items())))

    async def send(self, data: bytes) -> None:
        """Send a part of the body, and return when the kernel has it. The answer to a HEAD has none."""
        if self._method != b"HEAD":
            await self._send(h11.Data(data=data))

    async def finish(self) -> None:
        """End the response."""
        await self._send(h11.EndOfMessage())

    async def pause(self, seconds: float) -> None:
        """Wait, and notice if the client leaves meanwhile. ``math.inf`` waits for just that."""
        if seconds <= 0:
            return
        with anyio.move_on_after(seconds):
            while True:
                await self._read(eof_is_leaving=True)

    def reusable(self) -> bool:
        """True, and ready for the next request, if the last response was complete and both sides keep alive."""
        if self._http.our_state is not h11.DONE or self._http.their_state is not h11.DONE:
            return False
        self._http.start_next_cycle()
        return True

    def reset_on_close(self) -> None:
        """Make closing the socket send a TCP reset."""
        raw = self._stream.extra(SocketAttribute.raw_socket)  # noqa: S610  anyio's, not Django's
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_ZERO)

    async def _read(self, *, eof_is_leaving: bool = False) -> None:
        if self._http.they_are_waiting_for_100_continue:
            await self._send(h11.InformationalResponse(status_code=100, headers=[]))
        try:
            self._http.receive_data(await self._stream.receive())
        except anyio.EndOfStream:
            if eof_is_leaving:
                raise ClientLeft("closed while it was kept waiting") from None
            self._http.receive_data(b"")
        except (anyio.BrokenResourceError, anyio.ClosedResourceError) as error:
            raise ClientLeft("connection broken") from error

    async def _send(self, event: h11.Event) -> None:
        try:
            await self._stream.send(self._http.send(event) or b"")
        except (anyio.BrokenResourceError, anyio.ClosedResourceError) as error:
            raise ClientLeft("connection broken") from error
