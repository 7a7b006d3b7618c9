"""A conversation over a child process, and the end of everything it started.

Each rule here was paid for: the prompt goes by stdin, never by argv; stderr is drained all the time or the child
blocks; TERM comes before KILL because only TERM lets the CLI end the shells it started; what survives is found by
the process tree as it was and by the run's id in the environment of every process, because each shell command of
the CLI is a session of its own that no process group reaches.
"""

import errno
import logging
import subprocess
import uuid
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import anyio
from anyio.abc import Process

from orchestrator.conversation import Dialect, Spec
from orchestrator.errors import CLIExitError, CLINotFoundError, CLIStartError
from orchestrator.framing import MessageDecoder
from orchestrator.groups import unwrapped
from orchestrator.killing import RUN_ID_ENV, StopTimes, death_signal_prefix, stop
from orchestrator.messages import Message

log = logging.getLogger(__name__)

READ_BYTES = 1 << 16
STDERR_TAIL_BYTES = 16 * 1024


class ProcessConversation:
    """One CLI process that holds one session."""

    def __init__(self, process: Process, dialect: Dialect, decoder: MessageDecoder) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._process = process
        self._stdin = process.stdin
        self._stdout = process.stdout
        self._dialect = dialect
        self._decoder = decoder
        self._pending: deque[Message] = deque()
        self._stderr = bytearray()
        self._stderr_ended = anyio.Event()
        self._writing = anyio.Lock()
        self._heard = False

    def __repr__(self) -> str:
        return f"<ProcessConversation pid={self._process.pid} exit={self._process.returncode}>"

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def stderr_tail(self) -> str:
        return bytes(self._stderr).decode("utf-8", "replace").strip()

    @property
    def skipped_lines(self) -> int:
        """Lines of output that were not JSON and were passed over."""
        return self._decoder.skipped_lines

    async def send(self, prompt: str) -> None:
        await self._write(self._dialect.encode_prompt(prompt, str(uuid.uuid4())))

    async def interrupt(self) -> None:
        await self._write(self._dialect.encode_control(uuid.uuid4().hex, {"subtype": "interrupt"}))

    async def receive(self) -> Message:
        while not self._pending:
            try:
                chunk = await self._stdout.receive(READ_BYTES)
            except (anyio.EndOfStream, anyio.ClosedResourceError, anyio.BrokenResourceError):
                self._pending.extend(self._decoder.close())
                if not self._pending:
                    raise await self._exit_error() from None
            else:
                self._pending.extend(self._decoder.feed(chunk))
        self._heard = True
        message = self._pending[0]
        answer = self._dialect.answer_control(message)
        if answer is not None:
            # Every question is answered, or the turn hangs for ever.
            await self._write(answer)
        return self._pending.popleft()

    async def _write(self, line: bytes) -> None:
        async with self._writing:
            # A CLI that has ended is noticed where its output is read, with its exit code and stderr.
            with suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):
                await self._stdin.send(line)

    async def _exit_error(self) -> CLIExitError | CLIStartError:
        with anyio.move_on_after(2):
            await self._process.wait()
        with anyio.move_on_after(0.5):
            # The reason is in its last words; not waited for longer, what outlives it may hold the pipe open.
            await self._stderr_ended.wait()
        code = self._process.returncode
        tail = self.stderr_tail
        said = f": {tail[-500:]}" if tail else ""
        details = {"exit_code": code, "stderr": tail[-2000:], "skipped_lines": self.skipped_lines}
        if not self._heard and code is not None and code > 0:
            return CLIStartError(f"the CLI refused to start (exit code {code}){said}", details=details)
        return CLIExitError(f"the CLI ended (exit code {code}) before it gave a result{said}", details=details)

    async def drain_stderr(self) -> None:
        assert self._process.stderr is not None
        with suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):
            async for chunk in self._process.stderr:
                self._stderr += chunk
                del self._stderr[:-STDERR_TAIL_BYTES]
        self._stderr_ended.set()

    async def close_output_after_exit(self) -> None:
        """What outlives the CLI may hold its stdout open: read what is left, then close the pipe."""
        await self._process.wait()
        await anyio.sleep(1)
        await self._stdout.aclose()


@asynccontextmanager
async def connect_process(
    spec: Spec,
    *,
    binary: Path,
    dialect: Dialect,
    max_line_bytes: int,
    times: StopTimes | None = None,
) -> AsyncIterator[ProcessConversation]:
    """Start the CLI for ``spec``; leaving the context ends it and every process it started.

    Raises CLINotFoundError or CLIStartError when it cannot be started.
    """
    process = await _start(spec, binary, dialect)
    conversation = ProcessConversation(process, dialect, MessageDecoder(max_line_bytes=max_line_bytes))
    log.debug("started pid %d: %s", process.pid, binary)
    marks = {spec.env[RUN_ID_ENV]} if RUN_ID_ENV in spec.env else set()
    ended_well = False
    try:
        with unwrapped():
            async with anyio.create_task_group() as tg:
                tg.start_soon(conversation.drain_stderr)
                tg.start_soon(conversation.close_output_after_exit)
                try:
                    yield conversation
                    ended_well = True
                finally:
                    with anyio.CancelScope(shield=True):
                        await stop(process, marks, times or StopTimes(), gently=ended_well)
                    tg.cancel_scope.cancel()
    finally:
        if conversation.skipped_lines:
            log.warning("pid %d printed %d lines that are not messages", process.pid, conversation.skipped_lines)
        with anyio.CancelScope(shield=True):
            await process.aclose()


async def _start(spec: Spec, binary: Path, dialect: Dialect) -> Process:
    if not _is_directory(spec.cwd):
        raise CLIStartError(
            f"the working directory {spec.cwd} does not exist", advice="Name a directory that exists."
        )
    try:
        return await anyio.open_process(
            [*death_signal_prefix(), str(binary), *dialect.argv(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=spec.cwd,
            env=dict(spec.env),
            start_new_session=True,
        )
    except (FileNotFoundError, PermissionError) as error:
        raise CLINotFoundError(f"cannot run {binary}: {error.strerror}") from error
    except OSError as error:
        if error.errno == errno.E2BIG:
            raise CLIStartError(
                "the agent's system prompt or settings are too large for a command line (128 KiB each)",
                scope="agent",
                advice="Shorten the agent file; long material belongs in files the agent can read.",
            ) from error
        raise CLIStartError(f"cannot start {binary}: {error}") from error


def _is_directory(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # a name longer than the system allows, a folder nobody may search
        return False
