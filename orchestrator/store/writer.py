"""The one thread that writes to the database.

It takes what has queued up, executes it in one transaction and only then tells those who wait. What nobody waits
for is written in batches of at most 100 ms or 200 rows. A thread of its own, fed by a queue: to hand each batch to
a thread of the event loop's pool took as long as to write it.
"""

import logging
import sqlite3
import threading
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any

import anyio
from anyio.from_thread import run_sync as run_in_loop
from anyio.lowlevel import current_token

log = logging.getLogger(__name__)

BATCH_ROWS = 200
BATCH_SECONDS = 0.1
# Rows that may wait to be written before readers of CLI output are slowed down.
QUEUE_ROWS = 2000

Params = Mapping[str, Any]
Row = Mapping[str, Any]
Statement = tuple[str, Params]


@dataclass(slots=True)
class Write:
    """Statements that are executed together or not at all. ``done`` is set once they are committed or refused."""

    statements: Sequence[Statement]
    done: anyio.Event | None = None
    counts: list[int] = field(default_factory=list)
    error: Exception | None = None


class Writer:
    """The event loop's side of the thread."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._queue: SimpleQueue[Write | None] = SimpleQueue()
        self._waiting = 0
        self._room = anyio.Event()
        self._closed = False
        self._token = current_token()
        # A daemon: an interpreter that ends without having closed the store is not held up by it.
        self._thread = threading.Thread(target=self._work, name="store writer", daemon=True)
        self._thread.start()

    async def put(self, item: Write) -> None:
        """Queue the item; returns when there is room for another. Raises anyio.ClosedResourceError.

        It will be written whatever becomes of the caller: a message that was received and counted is not dropped
        because its run is being cancelled.
        """
        if self._closed:
            raise anyio.ClosedResourceError
        self._waiting += 1
        self._queue.put(item)
        while self._waiting > QUEUE_ROWS:
            await self._room.wait()

    async def close(self) -> None:
        """Write everything that was queued, and end the thread."""
        self._closed = True
        self._queue.put(None)
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(self._thread.join)

    def _work(self) -> None:
        while batch := self._batch():
            _commit(self._connection, batch)
            try:
                run_in_loop(self._tell, batch, token=self._token)
            except anyio.RunFinishedError:
                return

    def _batch(self) -> list[Write]:
        """What is to be written together; empty at the end. Whoever waits does not wait for others to come."""
        batch: list[Write] = []
        item, give_up_at = self._queue.get(), time.monotonic() + BATCH_SECONDS
        hurry = False
        while item is not None:
            batch.append(item)
            hurry = hurry or item.done is not None
            if len(batch) == BATCH_ROWS:
                return batch
            left = 0.0 if hurry else give_up_at - time.monotonic()
            try:
                item = self._queue.get(left > 0, left if left > 0 else None)
            except Empty:
                return batch
        if batch:
            self._queue.put(None)  # nothing comes after it
        return batch

    def _tell(self, batch: list[Write]) -> None:
        self._waiting -= len(batch)
        for item in batch:
            if item.done is not None:
                item.done.set()
        self._room.set()
        self._room = anyio.Event()


@asynccontextmanager
async def open_writer(connection: sqlite3.Connection) -> AsyncIterator[Writer]:
    """The writer of a connection that nobody else uses meanwhile; everything queued is written in the end."""
    writer = Writer(connection)
    try:
        yield writer
    finally:
        await writer.close()


def _commit(connection: sqlite3.Connection, batch: list[Write]) -> None:
    """Write the batch. Never raises: a writer that died would leave everyone waiting."""
    try:
        connection.execute("BEGIN IMMEDIATE")
        for item in batch:
            _execute(connection, item, alone=len(batch) == 1)
        connection.execute("COMMIT")
    except Exception as error:  # noqa: BLE001  # whatever it is, it is handed to those who wait
        roll_back(connection)
        if len(batch) > 1 and getattr(error, "sqlite_errorname", "") != "SQLITE_BUSY":
            # One by one: on a nearly full disk a huge message must not take the end of a run along.
            for item in batch:
                item.counts, item.error = [], None
                _commit(connection, [item])
            return
        log.error("store: %d writes failed: %s", len(batch), error)  # noqa: TRY400  # whoever waits gets the traceback
        for item in batch:
            item.error = error


def _execute(connection: sqlite3.Connection, item: Write, *, alone: bool) -> None:
    if alone:
        item.counts += [connection.execute(sql, params).rowcount for sql, params in item.statements]
        return
    # A savepoint each: one refused write (a key that exists) must not take its neighbours along.
    connection.execute("SAVEPOINT item")
    try:
        for sql, params in item.statements:
            item.counts.append(connection.execute(sql, params).rowcount)
    except (sqlite3.Error, ValueError, OverflowError) as error:  # ValueError: text that is not Unicode
        if not connection.in_transaction:
            raise  # SQLite gave up the whole transaction, as it may when the disk is full
        item.error = error
        log.warning("store: refused: %s", error)
        connection.execute("ROLLBACK TO item")
    connection.execute("RELEASE item")


def roll_back(connection: sqlite3.Connection) -> None:
    """End the transaction there may be."""
    if connection.in_transaction:
        with suppress(sqlite3.Error):
            connection.execute("ROLLBACK")
