"""The database seam: run, one, all and a single writer; here over SQLite.

All writes go through one task. It takes what has queued up, executes it in one transaction and only then tells
those who wait: a state change that was acknowledged is on disk, and a thousand small writes cost one commit.
Messages of a run are written without waiting (``write_soon``) in batches of at most 100 ms or 200 rows.
"""

import logging
import random
import sqlite3
import threading
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, Protocol

import aiosqlite
import anyio
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

from orchestrator.errors import OrchestratorError
from orchestrator.groups import unwrapped

log = logging.getLogger(__name__)

BATCH_ROWS = 200
BATCH_SECONDS = 0.1
# Rows that may wait to be written before readers of CLI output are slowed down.
QUEUE_ROWS = 2000
BUSY_SECONDS = 10
OPEN_ADVICE = (
    "Let `store.path` name a new file, or one this program made, in a directory that can be written and has room."
)

Params = Mapping[str, Any]
Row = Mapping[str, Any]
Statement = tuple[str, Params]


class StoreError(OrchestratorError):
    """The store cannot be opened or written."""

    code = "store"
    advice = "Check that the disk has room and that the file named by `store.path` is writable."


class Database(Protocol):
    """What the store needs of a database driver."""

    async def one(self, sql: str, params: Params = ...) -> Row | None:
        """The first row, or None."""
        ...

    async def all(self, sql: str, params: Params = ...) -> list[Row]:
        """Every row."""
        ...

    async def write(self, *statements: Statement) -> list[int]:
        """Execute in one transaction; returns each statement's row count once it is committed."""
        ...

    async def write_soon(self, *statements: Statement) -> None:
        """Execute within BATCH_SECONDS; waits only while too much is queued."""
        ...


@dataclass(slots=True)
class _Write:
    statements: Sequence[Statement]
    done: anyio.Event | None = None
    counts: list[int] = field(default_factory=list)
    error: Exception | None = None


class SQLite:
    """A SQLite file in WAL mode: one connection reads, one task writes."""

    def __init__(self, reader: aiosqlite.Connection, queue: MemoryObjectSendStream[_Write]) -> None:
        self._reader = reader
        self._queue = queue

    async def one(self, sql: str, params: Params | None = None) -> Row | None:
        rows = await self.all(sql, params)
        return rows[0] if rows else None

    async def all(self, sql: str, params: Params | None = None) -> list[Row]:
        try:
            return [dict(row) for row in await self._reader.execute_fetchall(sql, params or {})]
        except UnicodeEncodeError:
            return []  # half of a surrogate pair was asked for: it is not text, so no row holds it
        except (aiosqlite.Error, OverflowError, ValueError) as error:  # ValueError: closed already
            raise StoreError(f"the store could not be read: {error}") from error

    async def write(self, *statements: Statement) -> list[int]:
        item = _Write(statements, done=anyio.Event())
        assert item.done is not None
        await self._enqueue(item)
        await item.done.wait()
        if item.error is not None:
            raise StoreError(f"the store could not be written: {item.error}") from item.error
        return item.counts

    async def write_soon(self, *statements: Statement) -> None:
        await self._enqueue(_Write(statements))

    async def _enqueue(self, item: _Write) -> None:
        try:
            try:
                # ``send`` would look for a cancellation first, and drop what has been received and counted already.
                self._queue.send_nowait(item)
            except anyio.WouldBlock:
                await self._queue.send(item)
        except (anyio.ClosedResourceError, anyio.BrokenResourceError):
            raise StoreError("the store is closed", advice="Use the store inside its `async with` block.") from None


@asynccontextmanager
async def open_sqlite(path: Path) -> AsyncIterator[SQLite]:
    """Open (or make) the database file and bring it to the newest schema.

    Everything queued is written before the context is left. Raises StoreError when the file cannot be used.
    """
    async with AsyncExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            writer = await stack.enter_async_context(_writer(path))
            await anyio.to_thread.run_sync(_migrate, writer, path)
            reader = await stack.enter_async_context(_connection(path))
        except (OSError, sqlite3.Error) as error:
            raise StoreError(f"cannot open the store {path}: {error}", advice=OPEN_ADVICE) from error
        send, receive = anyio.create_memory_object_stream[_Write](QUEUE_ROWS)
        with unwrapped():
            async with anyio.create_task_group() as tg:
                tg.start_soon(_write_all, writer, receive)
                try:
                    yield SQLite(reader, send)
                finally:
                    send.close()  # the writer ends by itself once the queue is empty


@asynccontextmanager
async def _writer(path: Path) -> AsyncIterator[sqlite3.Connection]:
    """The connection that writes, used by one thread at a time."""
    connection = await anyio.to_thread.run_sync(_connect, path)
    try:
        await anyio.to_thread.run_sync(_write_ahead, connection)
        path.chmod(0o600)  # prompts and answers are private
        yield connection
    finally:
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(connection.close)


def _connect(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(path, isolation_level=None, timeout=BUSY_SECONDS, check_same_thread=False)


@asynccontextmanager
async def _connection(path: Path) -> AsyncIterator[aiosqlite.Connection]:
    with anyio.CancelScope(shield=True):  # one that is cancelled would leave its thread behind
        connection = await aiosqlite.connect(path, isolation_level=None, timeout=BUSY_SECONDS)
    try:
        connection.row_factory = aiosqlite.Row
        yield connection
    finally:
        with anyio.CancelScope(shield=True):
            await connection.close()


def _write_ahead(connection: sqlite3.Connection) -> None:
    # Of connections that switch a new file at the same moment SQLite refuses all but one at once, without the
    # time-out that holds everywhere else: each has read the file and would wait for the other to let go.
    give_up_at = time.monotonic() + BUSY_SECONDS
    pause = threading.Event()
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            break
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > give_up_at:
                raise
        pause.wait(random.uniform(0.001, 0.02))  # noqa: S311  # to spread them out, no secret
    connection.execute("PRAGMA synchronous=NORMAL")
    connection.execute("PRAGMA foreign_keys=ON")


def migrations() -> list[tuple[int, str]]:
    """(number, SQL) of every migration, in order."""
    folder = files("orchestrator.store") / "migrations"
    found = [(int(f.name.split("_")[0]), f.read_text("utf-8")) for f in folder.iterdir() if f.name.endswith(".sql")]
    return sorted(found)


def _migrate(connection: sqlite3.Connection, path: Path) -> None:
    steps = migrations()
    newest = steps[-1][0]
    # IMMEDIATE: of two processes that open a new file at once, the second waits and then finds it migrated.
    connection.execute("BEGIN IMMEDIATE")
    try:
        row = connection.execute("PRAGMA user_version").fetchone()
        version = int(row[0]) if row else 0
        if version > newest:
            raise StoreError(
                f"the store {path} is of a newer version ({version}) than this program knows ({newest})",
                advice="Upgrade orchestrator-mcp, or name another file in `store.path`.",
            )
        for number, sql in steps:
            if number > version:
                for statement in sql_statements(sql):
                    connection.execute(statement)
        connection.execute(f"PRAGMA user_version={newest}")
    except BaseException:
        _roll_back(connection)
        raise
    connection.execute("COMMIT")


def sql_statements(script: str) -> list[str]:
    """The statements of a migration, without comments. (executescript would commit our transaction.)"""
    lines = [line.split("--")[0] for line in script.splitlines()]
    return [s.strip() for s in "\n".join(lines).split(";") if s.strip()]


async def _write_all(connection: sqlite3.Connection, queue: MemoryObjectReceiveStream[_Write]) -> None:
    # Shielded: what was queued is written even when everything around is being cancelled.
    with anyio.CancelScope(shield=True):
        async with queue:
            async for first in queue:
                batch = await _batch(first, queue)
                # A batch goes to the thread at once: a hop for each statement cost more than the statements.
                await anyio.to_thread.run_sync(_commit, connection, batch)
                for item in batch:
                    if item.done is not None:
                        item.done.set()


async def _batch(first: _Write, queue: MemoryObjectReceiveStream[_Write]) -> list[_Write]:
    batch = [first]
    with anyio.move_on_after(BATCH_SECONDS):
        while len(batch) < BATCH_ROWS:
            try:
                batch.append(queue.receive_nowait())
            except (anyio.WouldBlock, anyio.EndOfStream):
                if any(item.done for item in batch):
                    break
                try:
                    batch.append(await queue.receive())
                except anyio.EndOfStream:
                    break
    return batch


def _commit(connection: sqlite3.Connection, batch: list[_Write]) -> None:
    """Write the batch. Never raises: a writer that died would leave everyone waiting."""
    try:
        connection.execute("BEGIN IMMEDIATE")
        for item in batch:
            _execute(connection, item)
        connection.execute("COMMIT")
    except Exception as error:  # noqa: BLE001  # whatever it is, it is handed to those who wait
        _roll_back(connection)
        if len(batch) > 1 and getattr(error, "sqlite_errorname", "") != "SQLITE_BUSY":
            # One by one: on a nearly full disk a huge message must not take the end of a run along.
            for item in batch:
                item.counts, item.error = [], None
                _commit(connection, [item])
            return
        log.error("store: %d writes failed: %s", len(batch), error)  # noqa: TRY400  # whoever waits gets the traceback
        for item in batch:
            item.error = error


def _execute(connection: sqlite3.Connection, item: _Write) -> None:
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


def _roll_back(connection: sqlite3.Connection) -> None:
    if connection.in_transaction:
        with suppress(sqlite3.Error):
            connection.execute("ROLLBACK")
