"""Control groups (cgroup v2) of our own, where the system lets us make them: an end that nothing escapes.

A process leaves neither by a new session, nor by two forks, nor by clearing its environment; ``cgroup.kill`` ends
all of them at once. Most machines do not hand us a part of the tree; there everything works without. No limits are
set: a limit needs a controller handed down to the group we are in, and the kernel allows that only to groups that
hold no process themselves.
"""

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Set as AbstractSet
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

NAME = "orchestrator"
#: How long the kernel may take to end what was in a group, in seconds.
REMOVE_SECONDS = 2.0
# What ``make_cgroup`` names them, and nobody else: a service may well be called orchestrator-something.
_OURS = re.compile(rf"{NAME}-[0-9a-f]+-[0-9a-f]+")
# Enters the group by itself before it becomes the command: no child can be born outside.
ENTER = '{ echo $$ > "$0"; } 2>/dev/null; exec "$@"'


@dataclass(frozen=True, slots=True)
class Cgroup:
    """The group of one CLI process and of all it starts."""

    path: Path

    @property
    def prefix(self) -> tuple[str, ...]:
        """What to put before a command so that it runs in the group."""
        return ("/bin/sh", "-c", ENTER, str(self.path / "cgroup.procs"))

    def kill(self) -> bool:
        """End everything in the group and remove it; False if something would not die in time. Blocks."""
        with suppress(OSError):  # it may be gone, or its kernel is too old to know the file
            (self.path / "cgroup.kill").write_text("1")
        deadline = time.monotonic() + REMOVE_SECONDS
        pause = threading.Event()
        while not _removed(self.path):
            if time.monotonic() > deadline:
                return False
            pause.wait(0.005)
        return True


def make_cgroup(instance_id: str, process_id: str) -> Cgroup | None:
    """A group for one process of an instance of the orchestrator; None where we may not make any."""
    base = _base()
    if base is None:
        return None
    path = base / f"{NAME}-{instance_id}-{process_id}"
    try:
        path.mkdir()
    except OSError:  # a limit on their number, or the part of the tree was taken back
        return None
    return Cgroup(path)


def kill_cgroups(instance_ids: AbstractSet[str]) -> None:
    """End what instances left behind in groups beside ours, and remove these. Blocks."""
    base = _base()
    for path in base.glob(f"{NAME}-*") if base else ():
        if path.name.startswith(tuple(f"{NAME}-{instance_id}-" for instance_id in instance_ids)):
            Cgroup(path).kill()


def leave_our_groups() -> None:
    """Move this process out of every group that ends with an agent, where the system lets us."""
    own = _own_group() if sys.platform == "linux" else None
    if own is not None and (outside := outside_ours(own)) != own:
        with suppress(OSError):
            (outside / "cgroup.procs").write_text(str(os.getpid()))


def outside_ours(path: Path) -> Path:
    """The innermost group at or above ``path`` that neither is one of ours nor lies in one."""
    outermost = next((each for each in (*reversed(path.parents), path) if _OURS.fullmatch(each.name)), None)
    return path if outermost is None else outermost.parent


def cgroup_support() -> str | None:
    """The directory our groups are made in; None where the system has none for us."""
    base = _base()
    return str(base) if base else None


@cache
def _base() -> Path | None:
    """The group we are in, if it is ours to divide. Tried, not guessed: a group is made, entered and removed."""
    path = _own_group() if sys.platform == "linux" else None
    if path is None or not _may_divide(path):
        return None
    probe = Cgroup(path / f"{NAME}-probe-{os.getpid()}-{threading.get_ident()}")
    try:
        probe.path.mkdir()
    except OSError:
        return None
    works = (probe.path / "cgroup.kill").exists() and _enters(probe)
    return path if probe.kill() and works else None


def _own_group() -> Path | None:
    """The directory of the group we are in; None without cgroup v2."""
    try:
        own = next(line for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
        mounts = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    except (OSError, StopIteration):
        return None
    for mount in mounts:
        root, point, kind = mount[3], mount[4], mount[mount.index("-") + 1]
        if kind == "cgroup2" and Path(own[3:]).is_relative_to(root):
            return Path(point) / Path(own[3:]).relative_to(root)
    return None


def _may_divide(path: Path) -> bool:
    """Whether nobody else governs it: root may write everywhere, but what systemd made is its own."""
    if os.getuid() != 0 or not Path("/run/systemd/system").exists():
        return os.access(path, os.W_OK)
    for mark in ("user.delegate", "trusted.delegate"):  # how systemd says that it has handed a group over
        with suppress(OSError):
            if os.getxattr(path, mark) == b"1":
                return True
    return False


def _enters(probe: Cgroup) -> bool:
    told = subprocess.run(
        [*probe.prefix, "cat", "/proc/self/cgroup"],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return any(line.startswith("0::") and line.endswith(probe.path.name) for line in told.stdout.splitlines())


def _removed(path: Path) -> bool:
    """Remove a group with those inside it (an orchestrator among its processes may have made some)."""
    try:
        for inner in path.iterdir():
            if inner.is_dir() and not _removed(inner):
                return False
        path.rmdir()
    except FileNotFoundError:
        return True
    except OSError:  # what was killed has not all gone
        return False
    return True
