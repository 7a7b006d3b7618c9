"""The served process: one per data directory, found by its state file, ended by a signal.

Nothing here knows MCP: the doors are handed in, so that this module can be imported without it.
"""

import fcntl
import json
import logging
import os
import secrets
import signal
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import anyio
import psutil
from anyio.abc import TaskStatus

from orchestrator import __version__
from orchestrator.errors import RunInterruptedError, ServerUnavailableError
from orchestrator.runtime import Door, Runtime, close_runs, finish_runs
from orchestrator.store import now_us
from orchestrator.warming import keep_warm

log = logging.getLogger(__name__)

STATE_FILE = "server.json"
TOKEN_FILE = "server.token"  # noqa: S105  # the file's name
LOCK_FILE = "server.lock"

#: How long runs may take to end when the server does, in seconds.
WIND_DOWN_SECONDS = 2.5
#: How long to wait for a server that holds the lock and says nothing: it is starting, or nearly gone.
CLAIM_SECONDS = 5.0


class Doors(Door, Protocol):
    """What is open: the URL of MCP, and the port on which shims are served (None: there is none)."""

    line_port: int | None


class OpenDoors(Protocol):
    """Opens doors to a runtime (``mcp_tools.open_doors``). ``token`` gives full rights."""

    def __call__(self, rt: Runtime, *, host: str, port: int, token: str) -> AbstractAsyncContextManager[Doors]: ...


@dataclass(frozen=True, slots=True)
class ServerState:
    """Where a running server is reached; what its state file says. ``started_us`` is microseconds since 1970."""

    pid: int
    url: str
    line_port: int
    token: str
    version: str
    started_us: int

    def __repr__(self) -> str:
        return f"<ServerState pid={self.pid} {self.url}>"  # no token: reprs end up in logs


def read_state(data_path: Path) -> ServerState | None:
    """What the server of this data directory says of itself; None if there is none, or it is gone."""
    try:
        state = ServerState(**json.loads((data_path / STATE_FILE).read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    return state if psutil.pid_exists(state.pid) else None


async def serve(
    rt: Runtime,
    open_doors: OpenDoors,
    *,
    host: str | None = None,
    port: int | None = None,
    task_status: TaskStatus[ServerState] = anyio.TASK_STATUS_IGNORED,
) -> None:
    """Serve the runtime until SIGTERM or SIGINT, then end its runs, tell who waits for them, and close the doors.

    ``host`` and ``port`` default to the settings. Raises ServerUnavailableError when another server has the
    data directory, or the address is taken.
    """
    data = rt.config.data_path
    data.mkdir(mode=0o700, parents=True, exist_ok=True)
    async with claimed(data):
        token = server_token(data)
        host = rt.config.server.host if host is None else host
        port = rt.config.server.port if port is None else port
        async with open_doors(rt, host=host, port=port, token=token) as doors:
            assert doors.line_port is not None
            rt.door = doors
            rt.task_group.start_soon(keep_warm, rt)
            state = ServerState(os.getpid(), doors.url, doors.line_port, token, __version__, now_us())
            with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
                with published(data, state):
                    log.info("serving %s, data in %s", doors.url, data)
                    task_status.started(state)
                    await anext(signals)
                    if rt.config.server.on_stop == "finish":
                        await _finish(rt, signals)
                # The doors are still open: whoever waits for a run is told what became of it.
                interrupted = RunInterruptedError("the server was stopped while the run worked")
                with anyio.move_on_after(WIND_DOWN_SECONDS):
                    await close_runs(rt, interrupted if rt.config.server.on_stop == "interrupt" else None)


async def _finish(rt: Runtime, signals: AsyncIterator[signal.Signals]) -> None:
    """Let runs end by themselves, for as long as the settings allow and until another signal comes."""
    log.warning("stopping when %d runs have ended; another signal cancels them", len(rt.live))
    with anyio.move_on_after(rt.config.server.finish_s):
        async with anyio.create_task_group() as tg:

            async def give_up() -> None:
                await anext(signals)
                tg.cancel_scope.cancel()

            tg.start_soon(give_up)
            await finish_runs(rt)
            tg.cancel_scope.cancel()


@asynccontextmanager
async def claimed(data_path: Path) -> AsyncIterator[None]:
    """Hold the data directory as its only server. Raises ServerUnavailableError if another one does."""
    # The file stays: were it removed, two servers could hold locks on two files of the same name.
    with (data_path / LOCK_FILE).open("ab") as file:
        with anyio.move_on_after(CLAIM_SECONDS):
            # Polling: no event of ours tells what another process does.
            while not (ours := _locked(file.fileno())) and read_state(data_path) is None:  # noqa: ASYNC110
                await anyio.sleep(0.05)
        if not ours:
            raise _busy(data_path, read_state(data_path))
        yield


def _locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _busy(data_path: Path, holder: ServerState | None) -> ServerUnavailableError:
    who = f"process {holder.pid} at {holder.url}" if holder else "a process that does not say where it is"
    stop = f", or stop it first: kill {holder.pid}" if holder else ""
    return ServerUnavailableError(
        f"{data_path} is served already, by {who}",
        retryable=False,
        advice=f"Use that server{stop}; a server of its own needs another data_dir.",
    )


@contextmanager
def published(data_path: Path, state: ServerState) -> Iterator[None]:
    """Tell shims where the server is, for the length of the context."""
    write_private(data_path / STATE_FILE, json.dumps(asdict(state)))
    try:
        yield
    finally:
        (data_path / STATE_FILE).unlink(missing_ok=True)


def server_token(data_path: Path) -> str:
    """The token of this data directory's server; made once, so that registered HTTP clients stay registered."""
    path = data_path / TOKEN_FILE
    try:
        token = path.read_text("ascii").strip()
    except (FileNotFoundError, UnicodeDecodeError):
        token = ""
    if not token:
        token = secrets.token_urlsafe(32)
        write_private(path, token + "\n")
    return token


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner may read; a reader sees the old one or the new one, never a part."""
    fd, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(fd, "w", encoding="utf-8") as file:
            file.write(text)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
