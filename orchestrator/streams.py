"""What a run says, handed out live: one broadcast a run, one bounded buffer a listener. Pure but for the wake-up.

A listener that is slow never slows the run: its oldest entries give way to new ones. What is lost then is deltas
only, and they are counted. Whole messages are in the store: each entry carries how many of them were recorded by
then, so that the reader sees which it has missed and fetches them.
"""

import weakref
from collections import deque
from typing import NamedTuple

import anyio

from orchestrator.messages import AssistantMessage, KeepAlive, Message, StreamEvent

#: The kinds of deltas that are pieces of a string, and the key that holds the piece.
_PIECES = {"text_delta": "text", "thinking_delta": "thinking", "input_json_delta": "partial_json"}


class Said(NamedTuple):
    """One message as it was said. ``number`` messages of the run were recorded by then, this one included."""

    message: Message
    number: int
    recorded: bool


class OpenBlock:
    """The part of an answer that streams now: no whole message has said it yet."""

    def __init__(self) -> None:
        self._start: StreamEvent | None = None
        self._last: StreamEvent | None = None
        self._pieces: list[str] = []

    def feed(self, message: Message) -> None:
        """Take in one message."""
        if isinstance(message, AssistantMessage) and message.parent_tool_use_id is None:
            self._clear()
        elif isinstance(message, StreamEvent):
            self._stream(message)

    def rest(self) -> list[StreamEvent]:
        """Its beginning, and all its deltas so far as one."""
        events = [self._start] if self._start else []
        if self._last is not None:
            delta = self._last.event["delta"]
            joined = {**delta, _PIECES[delta["type"]]: "".join(self._pieces)}
            events.append(self._last.model_copy(update={"event": {**self._last.event, "delta": joined}}))
        return events

    def _stream(self, message: StreamEvent) -> None:
        kind, delta = message.event.get("type"), message.event.get("delta")
        if kind != "content_block_delta":
            self._clear()
            self._start = message if kind == "content_block_start" else None
        elif isinstance(delta, dict) and (key := _PIECES.get(str(delta.get("type")))) and key in delta:
            self._last = message
            self._pieces.append(str(delta[key]))

    def _clear(self) -> None:
        self._start = self._last = None
        self._pieces.clear()


class Listener:
    """One listener's buffer. ``lost`` counts the deltas that gave way to newer entries."""

    def __init__(self, size: int) -> None:
        self.lost = 0
        self._entries: deque[Said] = deque()
        self._size = size
        self._changed = anyio.Event()

    def offer(self, said: Said) -> None:
        if len(self._entries) == self._size:
            self.lost += not self._entries.popleft().recorded
        self._entries.append(said)
        self._changed.set()

    @property
    def head(self) -> Said | None:
        """The oldest entry."""
        return self._entries[0] if self._entries else None

    def take(self) -> Said:
        """Take the oldest entry out."""
        return self._entries.popleft()

    def change(self) -> anyio.Event:
        """Set with the next entry."""
        self._changed = anyio.Event()
        return self._changed


class Broadcast:
    """Hands what a run says to its listeners. One that nobody holds any more is forgotten."""

    def __init__(self) -> None:
        self.count = 0
        self._open = OpenBlock()
        self._listeners: weakref.WeakSet[Listener] = weakref.WeakSet()

    def publish(self, message: Message, count: int) -> None:
        """Tell a message; ``count`` is how many messages of the run are recorded, this one included."""
        if isinstance(message, KeepAlive):
            return
        said = Said(message, count, recorded=count > self.count)
        self.count = count
        self._open.feed(message)
        for listener in self._listeners:
            listener.offer(said)

    def listen(self, size: int) -> Listener:
        """A listener from now on; what streams at the moment is its first entry."""
        listener = Listener(size)
        for event in self._open.rest():
            listener.offer(Said(event, self.count, recorded=False))
        self._listeners.add(listener)
        return listener
