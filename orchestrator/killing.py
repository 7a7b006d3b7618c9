"""The end of a CLI process and of everything it started.

A ladder, because each step does more than the next: asked to end, the CLI closes its session; on TERM it ends the
shells it started; KILL leaves these behind, since each shell command of the CLI is a session of its own that no
process group reaches. What survives is found by the process tree as it was before each step (afterwards the
orphans belong to somebody else) and by our ids in the environment of every process.
"""

import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterable
from collections.abc import Set as AbstractSet
from contextlib import suppress
from dataclasses import dataclass
from functools import cache

import anyio
import anyio.to_thread
import psutil
from anyio.abc import Process

from orchestrator.cgroups import Cgroup, kill_cgroups

log = logging.getLogger(__name__)

RUN_ID_ENV = "ORCHESTRATOR_RUN_ID"
PROCESS_ID_ENV = "ORCHESTRATOR_PROCESS_ID"
INSTANCE_ID_ENV = "ORCHESTRATOR_INSTANCE_ID"
#: Given by the CLI to what it starts.
SESSION_ID_ENV = "CLAUDE_CODE_SESSION_ID"
#: Variables that say to whom a process belongs; children inherit them.
MARKS = (RUN_ID_ENV, PROCESS_ID_ENV, INSTANCE_ID_ENV, SESSION_ID_ENV)

#: How long a sweep goes on while it still finds something, in seconds.
SWEEP_SECONDS = 2.0
#: And how often it looks without a find on a machine where processes come and go all the time.
QUIET_LOOKS = 10


@dataclass(frozen=True, slots=True)
class StopTimes:
    """Seconds to wait at each step of ending a process."""

    after_asking: float = 3.0
    after_term: float = 2.0
    after_kill: float = 1.0


STOP_TIMES = StopTimes()


@cache
def death_signal_prefix() -> tuple[str, ...]:
    """On Linux, have the kernel send TERM to the CLI if this process dies, even by SIGKILL.

    Empty where ``setpriv`` is missing or too old to know how (util-linux before 2.33, BusyBox).
    """
    setpriv = shutil.which("setpriv") if sys.platform == "linux" else None
    if setpriv is None:
        return ()
    prefix = (setpriv, "--pdeathsig", "TERM", "--")
    tried = subprocess.run([*prefix, "true"], capture_output=True, stdin=subprocess.DEVNULL, check=False)
    return prefix if tried.returncode == 0 else ()


async def stop(
    process: Process,
    marks: AbstractSet[str],
    times: StopTimes = STOP_TIMES,
    *,
    ask_to_end: Callable[[], Awaitable[None]] | None = None,
    cgroup: Cgroup | None = None,
) -> None:
    """End a process and all it started: ask, TERM, KILL, each only if the one before did not do.

    ``ask_to_end`` tells the process to end by itself, so that it can save what it has to; None goes straight to
    TERM. What remains of its descendants, of ``cgroup`` and of the processes that carry one of ``marks`` (values of
    ``MARKS``) is killed. Returns when nothing of it is left. To be called under a shield; it takes the sum of
    ``times`` at the most, and ``SWEEP_SECONDS`` for what will not die. ``process`` must lead its process group.
    """
    family: set[psutil.Process] = set()
    for step, seconds in (
        (ask_to_end, times.after_asking),
        (_sending(process, signal.SIGTERM), times.after_term),
        (_sending(process, signal.SIGKILL), times.after_kill),
    ):
        if process.returncode is None and step is not None:
            family |= await anyio.to_thread.run_sync(_descendants, process.pid)
            with anyio.move_on_after(seconds):
                await step()
                await process.wait()
    await anyio.to_thread.run_sync(_end_rest, family, marks, cgroup)
    if process.returncode is None:
        with anyio.move_on_after(times.after_kill):
            await process.wait()


def _sending(process: Process, number: signal.Signals) -> Callable[[], Awaitable[None]]:
    async def send() -> None:
        with suppress(OSError):
            if number == signal.SIGKILL and os.getpgid(process.pid) == process.pid:
                os.killpg(process.pid, number)  # also those of the group whose parent has gone
            # Not ``process.send_signal``: it may reap a process that has just died, and its exit code is lost then.
            elif process.returncode is None:
                os.kill(process.pid, number)

    return send


def _end_rest(family: set[psutil.Process], marks: AbstractSet[str], cgroup: Cgroup | None) -> None:
    if cgroup is not None and not cgroup.kill():
        log.warning("could not end everything in %s", cgroup.path)
    _end_family(family)
    if marks:
        sweep(marks)


def _end_family(family: set[psutil.Process]) -> None:
    """Kill them and what they have started since, until none runs or will not die."""
    deadline = time.monotonic() + SWEEP_SECONDS
    pause = threading.Event()
    while (alive := {process for process in family if _runs(process)}) and time.monotonic() < deadline:
        family = alive.union(*(_descendants(process.pid) for process in alive))
        kill_all(family)
        pause.wait(0.005)
    if alive:
        log.warning("processes would not die: %s", sorted(process.pid for process in alive))


def _descendants(pid: int) -> set[psutil.Process]:
    try:
        return set(psutil.Process(pid).children(recursive=True))
    except psutil.Error:
        return set()


def _runs(process: psutil.Process) -> bool:
    """A zombie does not: only its parent has not looked yet."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def kill_all(processes: Iterable[psutil.Process]) -> None:
    """SIGKILL those that are still the processes they were (a pid may have been given to another)."""
    for process in processes:
        with suppress(psutil.Error):
            process.kill()


def reap(instance_ids: AbstractSet[str]) -> int:
    """End what dead instances of the orchestrator have left behind; returns how many processes. Blocks."""
    if not instance_ids:
        return 0
    killed = sweep(instance_ids)
    kill_cgroups(instance_ids)
    return killed


def sweep(marks: AbstractSet[str]) -> int:
    """Kill every process that carries one of the ids in its environment; returns how many there were. Blocks.

    Finds what left its process group and its session. Looks again until none is found, since a process may start
    another while it dies. Spares us and our ancestors: an orchestrator inside an agent's shell carries the marks of
    the run it works for. Processes of other users cannot be read and are skipped.
    """
    wanted = _variables(marks)
    killed: set[psutil.Process] = set()
    unread_before: set[int] = set()
    deadline, quiet = time.monotonic() + SWEEP_SECONDS, 0
    pause = threading.Event()
    while quiet < QUIET_LOOKS:
        found, unread = _look(wanted)
        if found:
            found -= _ourselves()
        kill_all(found)
        killed |= found
        if not found and unread <= unread_before:
            break
        if time.monotonic() > deadline:
            log.warning("processes would not die: %s", sorted(process.pid for process in found))
            break
        # One that ended, or became another program, just when we looked at it may have been what we look for.
        unread_before, quiet = unread, 0 if found else quiet + 1
        pause.wait(0.002)
    return len(killed)


def carriers(marks: AbstractSet[str]) -> set[psutil.Process]:
    """The processes that carry one of the ids in their environment, ourselves included. Zombies have none left."""
    return _look(_variables(marks))[0]


def _variables(marks: AbstractSet[str]) -> set[bytes]:
    return {f"{name}={mark}".encode() for name in MARKS for mark in marks}


def _look(wanted: AbstractSet[bytes]) -> tuple[set[psutil.Process], set[int]]:
    """The processes that carry one of the variables, and the ids of those that have no environment to read."""
    found, unread = set(), set()
    for pid in psutil.pids():
        variables = _environment(pid)
        if variables is None:
            unread.add(pid)
        elif not wanted.isdisjoint(variables):
            with suppress(psutil.Error):
                process = psutil.Process(pid)
                # Read again: between the two the pid may have been given to another.
                if not wanted.isdisjoint(_environment(pid) or ()):
                    found.add(process)
    return found, unread


def _environment(pid: int) -> list[bytes] | None:
    """``NAME=value`` of each variable a process was started with; nothing of another user's.

    None for one that has ended, is between two programs, or is the kernel's.
    """
    try:
        if sys.platform == "linux":
            block = _read(f"/proc/{pid}/environ")
            variables = block.split(b"\0") if block or _read(f"/proc/{pid}/cmdline") else None
        else:
            variables = [f"{name}={value}".encode() for name, value in psutil.Process(pid).environ().items()]
    except (FileNotFoundError, ProcessLookupError, psutil.NoSuchProcess):
        return None
    except (psutil.Error, OSError):
        return []
    return variables


def _read(path: str) -> bytes:
    with open(path, "rb", buffering=0) as file:  # noqa: PTH123  # a third of the time of Path.read_bytes
        return file.read()


def _ourselves() -> set[psutil.Process]:
    own = psutil.Process()
    return {own, *own.parents()}
