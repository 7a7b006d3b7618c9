"""What happens, for those who watch. Bounded and lossy by design; the record is the store.

A slow watcher loses events (and is told how many), never delays a run.
"""

from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import anyio

PoolEvent = Literal["pool.waiting", "pool.started", "pool.assigned", "pool.retired", "pool.ended"]
RunEvent = Literal[
    "run.created",
    "run.started",
    "run.activity",
    "run.retried",
    "run.parked",
    "run.resumed",
    "run.asked",
    "run.answered",
    "run.ended",
]
BreakerEvent = Literal["breaker.open", "breaker.half_open", "breaker.closed"]
EventType = RunEvent | Literal["agents.changed", "plan.step"] | PoolEvent | BreakerEvent


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to ``run_id``. ``data`` is plain JSON data."""

    type: EventType
    run_id: str | None
    data: dict[str, Any] = field(default_factory=dict)


class Watcher:
    """One subscriber's view: iterate over it. ``lost`` counts events dropped because it was too slow."""

    def __init__(self, size: int) -> None:
        self.lost = 0
        self._send, self._receive = anyio.create_memory_object_stream[Event](size)

    def offer(self, event: Event) -> None:
        try:
            self._send.send_nowait(event)
        except anyio.WouldBlock:
            self.lost += 1

    def __aiter__(self) -> AsyncIterator[Event]:
        return self._receive.__aiter__()

    def rest(self) -> Iterator[Event]:
        """What is already there, without waiting."""
        while True:
            try:
                yield self._receive.receive_nowait()
            except (anyio.WouldBlock, anyio.EndOfStream):
                return

    def release(self) -> None:
        self._send.close()
        self._receive.close()


class Events:
    """Hands each event to every watcher."""

    def __init__(self) -> None:
        self._watchers: set[Watcher] = set()

    @property
    def watched(self) -> bool:
        """Whether anybody watches."""
        return bool(self._watchers)

    def emit(self, event: Event) -> None:
        for watcher in self._watchers:
            watcher.offer(event)

    @contextmanager
    def watch(self, size: int = 1000) -> Iterator[Watcher]:
        """Subscribe for the length of the context; at most ``size`` events wait."""
        watcher = Watcher(size)
        self._watchers.add(watcher)
        try:
            yield watcher
        finally:
            self._watchers.discard(watcher)
            watcher.release()
