"""A conversation over a child process.

Each rule here was paid for: the prompt goes by stdin, never by argv; stderr is drained all the time or the child
blocks; every question of the CLI is answered; what it says of one turn is never taken for the next one's.
"""

import errno
import logging
import subprocess
import uuid
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import psutil
from anyio.abc import Process

from orchestrator.cgroups import Cgroup, make_cgroup
from orchestrator.conversation import Dialect, Spec, Turn
from orchestrator.errors import BackendError, CLIExitError, CLINotFoundError, CLIStartError
from orchestrator.framing import MessageDecoder
from orchestrator.groups import unwrapped
from orchestrator.killing import INSTANCE_ID_ENV, PROCESS_ID_ENV, StopTimes, death_signal_prefix, stop
from orchestrator.messages import (
    CommandLifecycle,
    ControlCancelRequest,
    ControlRequest,
    ControlResponse,
    Message,
    ResultMessage,
    SystemInit,
)
from orchestrator.questions import STOPPED

log = logging.getLogger(__name__)

READ_BYTES = 1 << 16
#: Requests without whose success a turn would be another than the one asked for.
_NEEDED = ("apply_flag_settings", "set_permission_mode")
STDERR_TAIL_BYTES = 16 * 1024


class ProcessConversation:
    """One CLI process that holds one session."""

    def __init__(
        self,
        process: Process,
        dialect: Dialect,
        decoder: MessageDecoder,
        on_ready: Callable[[], None] | None = None,
        cgroup: Cgroup | None = None,
    ) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._process = process
        self._stdin = process.stdin
        self._stdout = process.stdout
        self._dialect = dialect
        self._decoder = decoder
        self._on_ready = on_ready
        self._cgroup = cgroup
        self._pending: deque[Message] = deque()
        self._asked: dict[str, str] = {}
        self._prompt_uuid: str | None = None
        self._asks = False
        self._questions: set[str] = set()
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

    async def initialize(self) -> None:
        """Have the CLI load what a turn needs before there is one; ``on_ready`` is called when it has."""
        await self._write(self._request({"subtype": "initialize"}))

    async def prepare(self, turn: Turn) -> None:
        if lines := [self._request(request) for request in self._dialect.requests_of(turn)]:
            await self._write(b"".join(lines))

    async def send(self, turn: Turn) -> None:
        self._prompt_uuid, self._asks = turn.uuid, turn.asks
        await self._write(self._dialect.encode_prompt(turn.prompt, turn.uuid))

    async def answer(self, request_id: str, response: Mapping[str, Any]) -> None:
        if request_id in self._questions:
            self._questions.discard(request_id)
            await self._write(self._dialect.encode_answer(request_id, response))

    async def interrupt(self) -> None:
        interrupt = self._request({"subtype": "interrupt", "cancel_queued": True})
        await self._write(self._denials() + interrupt)

    def _denials(self) -> bytes:
        """Deny what nobody will answer any more, and from now on whatever is asked."""
        self._asks = False
        lines = [self._dialect.encode_answer(each, STOPPED) for each in self._questions]
        self._questions.clear()
        return b"".join(lines)

    async def ask_to_end(self) -> None:
        """The gentlest end: the CLI stops its turn and its shells, saves its totals and exits."""
        await self._write(self._request({"subtype": "end_session"}))

    async def end_orphans(self) -> None:
        """End what is in the process's control group and no descendant of it, between two turns.

        A command can leave behind what no mark and no parent tells of; without a group it is not found.
        """
        if self._cgroup is not None:
            await anyio.to_thread.run_sync(_end_orphans, self._cgroup.path / "cgroup.procs", self.pid)

    def _request(self, request: Mapping[str, Any]) -> bytes:
        request_id = uuid.uuid4().hex
        self._asked[request_id] = request["subtype"]
        return self._dialect.encode_control(request_id, request)

    async def receive(self) -> Message:
        while True:
            if not self._pending:
                await self._read()
                continue
            message = self._pending[0]
            if (answer := self._answer_to(message)) is not None:
                # Every question is answered, or the turn hangs for ever.
                await self._write(answer)
            self._pending.popleft()
            if not self._is_answer(message) and not self._is_of_another_turn(message):
                return message

    def _answer_to(self, message: Message) -> bytes | None:
        """What is said to it at once. Questions are left to whoever receives them, as long as the turn lasts."""
        if isinstance(message, ControlRequest) and self._asks and self._dialect.is_question(message):
            self._questions.add(message.request_id)
            return None
        if isinstance(message, ControlCancelRequest):
            self._questions.discard(message.request_id)
        if isinstance(message, ResultMessage) and not self._is_of_another_turn(message):
            return self._denials() or None
        return self._dialect.answer_control(message)

    async def _read(self) -> None:
        try:
            chunk = await self._stdout.receive(READ_BYTES)
        except (anyio.EndOfStream, anyio.ClosedResourceError, anyio.BrokenResourceError):
            self._pending.extend(self._decoder.close())
            if not self._pending:
                raise await self._exit_error() from None
        else:
            self._pending.extend(self._decoder.feed(chunk))
        self._heard = self._heard or bool(self._pending)

    def _is_answer(self, message: Message) -> bool:
        """Whether it answers a request of ours. Raises BackendError if one that a turn needs was refused."""
        if isinstance(message, SystemInit):
            self._ready()  # whatever became of the request, this CLI works
        if not isinstance(message, ControlResponse) or message.request_id not in self._asked:
            return False
        asked = self._asked.pop(message.request_id)
        if not message.ok and asked in _NEEDED:
            raise BackendError(f"the CLI refused {asked}: {message.response.error or message.response.error_code}")
        if asked == "initialize":
            self._ready()
        return True

    def _ready(self) -> None:
        if self._on_ready is not None:
            self._on_ready()
            self._on_ready = None

    def _is_of_another_turn(self, message: Message) -> bool:
        """What the CLI still says of the turn before must not be taken for this one's, above all a result."""
        if isinstance(message, CommandLifecycle):
            return message.command_uuid != self._prompt_uuid
        if isinstance(message, ResultMessage) and message.user_message_uuids:
            return self._prompt_uuid not in message.user_message_uuids
        return False

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
            message = f"the CLI refused to start (exit code {code}){said}"
            return CLIStartError(message, details=details, **self._dialect.start_refusal(tail))
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
    on_ready: Callable[[], None] | None = None,
    prefix: Sequence[str] = (),
    times: StopTimes | None = None,
) -> AsyncIterator[ProcessConversation]:
    """Start the CLI for ``spec``; leaving the context ends it and every process it started.

    ``on_ready`` is called when it has loaded what a turn needs, which takes most of a start. ``prefix`` is a
    command that runs the CLI, such as one that lowers its priority.

    Raises CLINotFoundError or CLIStartError when it cannot be started.
    """
    cgroup = await _own_cgroup(spec)
    try:
        process = await _start(spec, binary, dialect, [*(cgroup.prefix if cgroup else ()), *prefix])
    except BaseException:
        await _remove(cgroup)
        raise
    decoder = MessageDecoder(max_line_bytes=max_line_bytes)
    conversation = ProcessConversation(process, dialect, decoder, on_ready, cgroup)
    log.debug("started pid %d: %s", process.pid, binary)
    marks = {spec.env[PROCESS_ID_ENV]} if PROCESS_ID_ENV in spec.env else set()
    ended_well = False
    try:
        with unwrapped():
            async with anyio.create_task_group() as tg:
                tg.start_soon(conversation.drain_stderr)
                tg.start_soon(conversation.close_output_after_exit)
                try:
                    await conversation.initialize()
                    yield conversation
                    ended_well = True
                finally:
                    with anyio.CancelScope(shield=True):
                        ask = conversation.ask_to_end if ended_well else None
                        await stop(process, marks, times or StopTimes(), ask_to_end=ask, cgroup=cgroup)
                    tg.cancel_scope.cancel()
    finally:
        if conversation.skipped_lines:
            log.warning("pid %d printed %d lines that are not messages", process.pid, conversation.skipped_lines)
        with anyio.CancelScope(shield=True):
            await process.aclose()


def _end_orphans(members: Path, pid: int) -> None:
    with suppress(OSError, psutil.Error):
        # Read before the family is: a child that is born in between must not be taken for an orphan.
        inside = {int(line) for line in members.read_text().split()}
        family = {pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))}
        for orphan in inside - family:
            with suppress(psutil.Error):
                psutil.Process(orphan).kill()


async def _own_cgroup(spec: Spec) -> Cgroup | None:
    """A control group for the process and all it starts, where the system lets us make one."""
    instance_id, process_id = spec.env.get(INSTANCE_ID_ENV), spec.env.get(PROCESS_ID_ENV)
    if not instance_id or not process_id:
        return None
    # In a thread: the first time, it is tried whether the system does.
    return await anyio.to_thread.run_sync(make_cgroup, instance_id, process_id)


async def _remove(cgroup: Cgroup | None) -> None:
    """Remove the group of a process that could not be started."""
    if cgroup is not None:
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(cgroup.kill)


async def _start(spec: Spec, binary: Path, dialect: Dialect, prefix: Sequence[str]) -> Process:
    if not _is_directory(spec.cwd):
        raise CLIStartError(
            f"the working directory {spec.cwd} does not exist", advice="Name a directory that exists."
        )
    try:
        return await anyio.open_process(
            [*death_signal_prefix(), *prefix, str(binary), *dialect.argv(spec)],
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
