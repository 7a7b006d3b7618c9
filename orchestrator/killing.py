"""The end of a CLI process and of everything it started.

TERM comes before KILL because only TERM lets the CLI end the shells it started. What survives is found by the
process tree as it was and by our ids in the environment of every process, because each shell command of the CLI
is a session of its own that no process group reaches.
"""

import shutil
import signal
import subprocess
import sys
from collections.abc import Set as AbstractSet
from contextlib import suppress
from dataclasses import dataclass
from functools import cache

import anyio
import psutil
from anyio.abc import Process

RUN_ID_ENV = "ORCHESTRATOR_RUN_ID"
PROCESS_ID_ENV = "ORCHESTRATOR_PROCESS_ID"
INSTANCE_ID_ENV = "ORCHESTRATOR_INSTANCE_ID"
#: Variables that say to whom a process belongs; children inherit them.
MARKS = (RUN_ID_ENV, PROCESS_ID_ENV, INSTANCE_ID_ENV)


@dataclass(frozen=True, slots=True)
class StopTimes:
    """Seconds to wait at each step of ending a process."""

    after_eof: float = 3.0
    after_term: float = 1.5
    after_kill: float = 1.0


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


async def stop(process: Process, marks: AbstractSet[str], times: StopTimes, *, gently: bool) -> None:
    """End a process and all it started: end of input, TERM, KILL; each only if the one before did not do.

    ``gently`` leaves out nothing but starts with the end of input, after which an idle CLI saves its totals and
    exits by itself. Returns when nothing of it is left.
    """
    family = _descendants(process.pid)
    if gently and process.stdin is not None:
        with suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):
            await process.stdin.aclose()
        with anyio.move_on_after(times.after_eof):
            await process.wait()
    if process.returncode is None:
        family |= _descendants(process.pid)
        with suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        with anyio.move_on_after(times.after_term):
            await process.wait()
    if process.returncode is None:
        family |= _descendants(process.pid)
        with suppress(ProcessLookupError):
            process.kill()
    await anyio.to_thread.run_sync(kill_all, family)
    if marks:
        await anyio.to_thread.run_sync(sweep, marks)
    with anyio.move_on_after(times.after_kill):
        await process.wait()


def _descendants(pid: int) -> set[psutil.Process]:
    try:
        return set(psutil.Process(pid).children(recursive=True))
    except psutil.Error:
        return set()


def kill_all(processes: set[psutil.Process]) -> None:
    """SIGKILL those that are still the processes they were (a pid may have been given to another)."""
    for process in processes:
        with suppress(psutil.Error):
            process.kill()


def sweep(marks: AbstractSet[str]) -> int:
    """Kill every process that carries one of the ids in its environment; returns how many there were.

    Finds what left its process group and its session. Processes of other users cannot be read and are skipped.
    """
    found: set[psutil.Process] = set()
    for process in psutil.process_iter():
        try:
            environ = process.environ()
            if any(environ.get(name) in marks for name in MARKS):
                found.add(process)
        except (psutil.Error, OSError):
            continue
    kill_all(found)
    return len(found)
