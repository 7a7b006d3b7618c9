"""How much memory processes really take. Blocks: call it in a thread, the kernel walks their page tables for it."""

import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import psutil


def measure(pids: Iterable[int]) -> dict[int, float]:
    """MB (10^6 bytes) of each process; those that have ended, or that we may not look at, are left out.

    On Linux a page that several processes share is divided among them: CLIs of one version share most of their
    program, and counted in full it would make each of them look far larger than what ending it would free.
    """
    found = ((pid, _memory_of(pid)) for pid in pids)
    return {pid: size / 1e6 for pid, size in found if size}


def _memory_of(pid: int) -> int | None:
    """In bytes."""
    size = _proportional(pid) if sys.platform == "linux" else None
    if size is not None:
        return size
    with suppress(psutil.Error):
        return int(psutil.Process(pid).memory_info().rss)
    return None


def _proportional(pid: int) -> int | None:
    """None where the kernel does not tell: it is older than 4.14, or the process is somebody else's."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text("ascii").splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return None
