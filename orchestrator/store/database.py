"""The database seam: run, one, all and a single writer; here over SQLite.

All writes go through one thread (``store.writer``): a state change that was acknowledged is on disk, and a thousand
small writes cost one commit.
"""

import random
import sqlite3
import threading
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from importlib.resources import files
from pathlib import Path
from typing import Protocol

import aiosqlite
import anyio

from orchestrator.errors import OrchestratorError
from orchestrator.store.writer import Params, Row, Statement, Write, Writer, open_writer, roll_back

BUSY_SECONDS = 10
OPEN_ADVICE = (
    "Let `store.path` name a new file, or one this program made, in a directory that can be written and has room."
)


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


class SQLite:
    """A SQLite file in WAL mode: one connection reads, one thread writes."""

    def __init__(self, reader: aiosqlite.Connection, writer: Writer) -> None:
        self._reader = reader
        self._writer = writer

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
        item = Write(statements, done=anyio.Event())
        assert item.done is not None
        await self._put(item)
        await item.done.wait()
        if item.error is not None:
            raise StoreError(f"the store could not be written: {item.error}") from item.error
        return item.counts

    async def write_soon(self, *statements: Statement) -> None:
        await self._put(Write(statements))

    async def _put(self, item: Write) -> None:
        try:
            await self._writer.put(item)
        except anyio.ClosedResourceError:
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
            reader = await stack.enter_async_context(_connection(path))
        except (OSError, sqlite3.Error) as error:
            raise StoreError(f"cannot open the store {path}: {error}", advice=OPEN_ADVICE) from error
        yield SQLite(reader, writer)


@asynccontextmanager
async def _writer(path: Path) -> AsyncIterator[Writer]:
    """The thread that writes, and its connection, brought to the newest schema."""
    connection = await anyio.to_thread.run_sync(_connect, path)
    try:
        await anyio.to_thread.run_sync(_write_ahead, connection)
        path.chmod(0o600)  # prompts and answers are private
        await anyio.to_thread.run_sync(_migrate, connection, path)
        async with open_writer(connection) as writer:
            yield writer
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
        roll_back(connection)
        raise
    connection.execute("COMMIT")


def sql_statements(script: str) -> list[str]:
    """The statements of a migration, without comments. (executescript would commit our transaction.)"""
    lines = [line.split("--")[0] for line in script.splitlines()]
    return [s.strip() for s in "\n".join(lines).split(";") if s.strip()]
