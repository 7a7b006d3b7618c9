"""Watching a run: everything it has said and says, in order, from the store and live."""

import json
from collections import deque
from collections.abc import Awaitable, Callable

import anyio

from orchestrator.messages import Message, parse_message
from orchestrator.runtime import LiveRun, Runtime
from orchestrator.store import StoredMessage
from orchestrator.streams import Listener

#: How long a message that was recorded may take to be readable, in seconds; then it counts as lost.
COMMIT_SECONDS = 5.0
COMMIT_POLL_SECONDS = 0.05
FOREIGN_POLL_SECONDS = 0.3
#: How many messages of the store are held at a time.
PAGE = 200


def watch_run(rt: Runtime, run_id: str, *, size: int = 1000) -> "RunMessages":
    """Iterate over what a run says, from its first message to its last, at whatever time one begins.

    Messages said before come from the store, without the deltas they were streamed in; then all that comes, live.
    Of a run of another process there are no deltas. The iteration ends when the run has ended: its outcome is
    ``delegation.wait``'s. Each iterator has a buffer of its own of ``size`` messages: one that is slow loses deltas
    (``lost`` says how many), never a whole message, and never slows the run. Leaving it at any time is fine.

    Raises, while iterating, RunNotFoundError, StoreError.
    """

    async def find() -> str:
        return run_id

    return RunMessages(rt, find, size)


class RunMessages:
    """An iterator over the messages of a run; see ``watch_run``. ``find`` gives its id, None if it never began."""

    def __init__(self, rt: Runtime, find: Callable[[], Awaitable[str | None]], size: int) -> None:
        if size < 1:
            raise ValueError(f"a buffer of {size} holds nothing")
        self._rt, self._find, self._size = rt, find, size
        self._run_id: str | None = None
        self._live: LiveRun | None = None
        self._listener: Listener | None = None
        self._ready: deque[Message] = deque()
        self._had = 0  # recorded messages handed out, or ready to be
        self._missing = 0
        self._over = False

    @property
    def lost(self) -> int:
        """How many deltas went by unseen because the buffer was full."""
        return self._missing + (self._listener.lost if self._listener else 0)

    def __aiter__(self) -> "RunMessages":
        return self

    async def __anext__(self) -> Message:
        # Whatever is awaited here may be cancelled: entries are taken out only where nothing can come between.
        if self._run_id is None and not self._over:
            await self._begin()
        while not self._ready:
            if self._over or not await self._advance():
                self._over = True
                raise StopAsyncIteration
        return self._ready.popleft()

    async def _begin(self) -> None:
        run_id = await self._find()
        if run_id is None:
            self._over = True
            return
        self._run_id = (await self._rt.store.run(run_id)).id
        if live := self._rt.live.get(self._run_id):
            self._live, self._listener = live, live.said.listen(self._size)

    async def _advance(self) -> bool:
        """Make something ready, or wait for a change. False: there is nothing any more."""
        if self._live is None or self._listener is None:
            return await self._advance_stored()
        head = self._listener.head
        behind = self._live.said.count if head is None else head.number - head.recorded
        if self._had < behind:
            await self._catch_up(self._live, behind)
        elif head is not None:
            self._listener.take()
            self._had = head.number
            self._ready.append(head.message)
        elif self._live.ended.is_set():
            return False
        else:
            await _either(self._listener.change(), self._live.ended)
        return True

    async def _catch_up(self, live: LiveRun, upto: int) -> None:
        """Make ready what is recorded up to that number, a page at most."""
        rows = await self._rows(upto)
        with anyio.move_on_after(COMMIT_SECONDS):
            # Messages are written in batches: the last ones may still be on their way.
            while len(rows) < min(PAGE, upto - self._had) and not live.ended.is_set():
                await anyio.sleep(COMMIT_POLL_SECONDS)
                rows = await self._rows(upto)
        if len(rows) == PAGE:
            upto = rows[-1].seq
        self._missing += upto - self._had - len(rows)
        self._hand_out(rows, upto)

    async def _advance_stored(self) -> bool:
        assert self._run_id is not None
        run = await self._rt.store.run(self._run_id)  # read first: once it has ended, all messages are there
        if rows := await self._rows(None):
            self._hand_out(rows, rows[-1].seq)
        elif run.ended:
            return False
        else:
            await anyio.sleep(FOREIGN_POLL_SECONDS)
        return True

    async def _rows(self, upto: int | None) -> list[StoredMessage]:
        assert self._run_id is not None
        rows = await self._rt.store.messages(self._run_id)
        return [row for row in rows if self._had < row.seq and (upto is None or row.seq <= upto)][:PAGE]

    def _hand_out(self, rows: list[StoredMessage], upto: int) -> None:
        self._ready.extend(parse_message(json.dumps(row.body)) for row in rows)
        self._had = upto


async def _either(*events: anyio.Event) -> None:
    """Wait for the first of them."""

    async def wait_for(event: anyio.Event) -> None:
        await event.wait()
        tg.cancel_scope.cancel()

    async with anyio.create_task_group() as tg:
        for event in events:
            tg.start_soon(wait_for, event)
