"""Processor time for what nobody waits for: a process that is only being prepared runs behind those at work.

Two means, because each is without effect where the other works. Where the kernel groups processes by session
(autogroup), the niceness of a process counts only inside its session, and the session's own niceness counts against
the others; anyone may set that back to 0. Elsewhere the niceness of the process counts, which only few may set
back, so it is left alone by all others. SCHED_BATCH is not used: it changed nothing that could be measured.
"""

import os
import subprocess
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path

import anyio

#: How much nicer than we are: a third of the processor time of each process at work, all of it if there is none.
#: With 10 it would be a tenth, and on a machine with many at work a CLI would not even start within a minute.
NICER = 5
#: The kernel lets an unprivileged user change one session in a tenth of a second. How long to try, in seconds.
RESTORE_SECONDS = 5.0


def lower(pid: int) -> bool:
    """Let a process, all its threads and what it starts in its session run behind others.

    ``pid`` must lead a session of its own, else nothing is done. Nothing is done either where the system gives no
    means that could be taken back. Returns whether one was used.
    """
    if not _leads_a_session(pid):
        return False
    lowered = _renice(pid, min(19, _own_niceness() + NICER)) if _niceness_can_be_restored() else False
    return _renice_session(pid, NICER) or lowered


async def restore(pid: int) -> bool:
    """Take back what ``lower`` did. At once, unless an unprivileged user does so often; then within seconds.

    Returns False if it could not be taken back in time. A process that has ended needs nothing.
    """
    if not _leads_a_session(pid):
        return True
    if _niceness_can_be_restored():
        _renice(pid, _own_niceness())
    with anyio.move_on_after(RESTORE_SECONDS):
        while _session_niceness(pid) not in (None, 0):
            if _renice_session(pid, 0):
                return True
            await anyio.sleep(0.02)
        return True
    return False


def _leads_a_session(pid: int) -> bool:
    """Otherwise a whole terminal would be made slow with it."""
    try:
        return os.getsid(pid) == pid
    except OSError:
        return False


def _own_niceness() -> int:
    return os.getpriority(os.PRIO_PROCESS, 0)


def _renice(group: int, niceness: int) -> bool:
    """Of all threads of a process group; that of a process id would be its first thread's alone."""
    try:
        os.setpriority(os.PRIO_PGRP, group, niceness)
    except OSError:
        return False
    return True


@cache
def _niceness_can_be_restored() -> bool:
    """Tried on a process made for it: privileges, resource limits and sandboxes all have their say."""
    tried = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        own = _own_niceness()
        return own < 19 and _renice(tried.pid, own + 1) and _renice(tried.pid, own)
    finally:
        tried.communicate()


def _session_niceness(pid: int) -> int | None:
    """None where it counts for nothing, or the process has ended."""
    try:
        if sys.platform != "linux" or Path("/proc/sys/kernel/sched_autogroup_enabled").read_text().strip() != "1":
            return None
        # "/autogroup-25 nice 0"
        return int(Path(f"/proc/{pid}/autogroup").read_text().split()[-1])
    except (OSError, IndexError, ValueError):
        return None


def _renice_session(pid: int, niceness: int) -> bool:
    if _session_niceness(pid) is None:
        return False
    with suppress(OSError):
        Path(f"/proc/{pid}/autogroup").write_text(str(niceness))
        return True
    return False
