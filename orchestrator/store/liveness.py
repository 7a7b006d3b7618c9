"""Whether an instance still works on its runs: by its process on our own host, by its heartbeat on any other."""

import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

#: An instance of another host that was not heard of for so long counts as dead: eight of its heartbeats. A busy
#: machine or a locked store delays them by seconds, and clocks that are set over the network differ by less than
#: one. A machine that sleeps longer loses its runs; it stops them itself when it wakes up (``Store.beat``). Longer
#: would be safer for those, and every crash of a container would lock its sessions for as long.
SILENT_US = 120_000_000
#: Who has not looked for so long, though looks are seconds apart, was asleep itself, perhaps together with others.
ASLEEP_US = 60_000_000


class Liveness:
    """Judges instances by their rows. Remembers when it looked: who has slept must not judge by others' silence."""

    def __init__(self) -> None:
        self._looked_us: int | None = None
        self._judges_from_us = 0

    def look(self, now: int) -> None:
        """Somebody looks for the dead now (microseconds since 1970 UTC)."""
        if self._looked_us is not None and now - self._looked_us > ASLEEP_US:
            self._judges_from_us = now + SILENT_US
        self._looked_us = now

    def is_gone(self, instance: Mapping[str, Any], now: int) -> bool:
        """Whether nobody works on the runs of the instance (a row) any more."""
        if instance["ended_us"] is not None:
            return True
        if instance["host"] == socket.gethostname():
            return not _is_alive(instance["pid"], instance["pid_created"])
        return now >= self._judges_from_us and now - instance["alive_us"] >= SILENT_US


def _is_alive(pid: int, created: float) -> bool:
    try:
        # The start time tells this process from a later one with the same pid.
        return abs(started(pid) - created) < 1
    except psutil.Error:
        return False


def started(pid: int) -> float:
    """When a running process began. Raises psutil.Error if there is none."""
    process = psutil.Process(pid)
    if process.status() == psutil.STATUS_ZOMBIE:
        raise psutil.ZombieProcess(pid)  # nobody waited for it; it works on nothing any more
    try:
        # In ticks since boot: the time of day moves when the clock is set, and a live owner would look dead.
        return float(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except OSError:
        return process.create_time()
