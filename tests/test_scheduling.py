"""Priorities that are lowered and come back, on real processes: all their threads, with and without privileges."""

import os
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import psutil
import pytest
from anyio.abc import Process

from orchestrator.backends.claude import argv, encode_control, environment
from orchestrator.conversation import Spec
from orchestrator.scheduling import NICER, lower, restore
from orchestrator.testing import ModelServer
from tests.conftest import DUMMY_KEY, bundled_cli

ROOT = Path(__file__).parent.parent
AUTOGROUP = Path("/proc/sys/kernel/sched_autogroup_enabled")

linux = pytest.mark.skipif(sys.platform != "linux", reason="read from /proc")
by_session = pytest.mark.skipif(
    not AUTOGROUP.exists() or AUTOGROUP.read_text().strip() != "1",
    reason="this kernel does not schedule by session (autogroup)",
)
privileged = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be sure to set its niceness back")


def niceness(pid: int) -> set[int]:
    """Of each thread."""
    stats = [stat.read_text() for stat in Path(f"/proc/{pid}/task").glob("*/stat")]
    return {int(stat.rpartition(")")[2].split()[16]) for stat in stats}


def of_session(pid: int) -> int:
    return int(Path(f"/proc/{pid}/autogroup").read_text().split()[-1])


@asynccontextmanager
async def sleeper(*, own_session: bool = True) -> AsyncIterator[Process]:
    process = await anyio.open_process(
        ["sleep", "300"], stdin=subprocess.DEVNULL, stdout=None, stderr=None, start_new_session=own_session
    )
    async with process:
        try:
            yield process
        finally:
            if process.returncode is None:
                process.kill()


@pytest.fixture
async def cli(project: Path, environ: dict[str, str], model: ModelServer) -> AsyncIterator[Process]:
    """A real CLI, lowered from its start on, as soon as it has started threads."""
    extra = {"ANTHROPIC_BASE_URL": model.base_url, "ANTHROPIC_API_KEY": DUMMY_KEY}
    env = environment(environ, home=Path(environ["HOME"]), pass_env=(), extra=extra)
    spec = Spec(cwd=project, env=env, session_id=str(uuid.uuid4()), model="claude-opus-5-5")
    process = await anyio.open_process(
        [str(bundled_cli()), *argv(spec)], stderr=None, cwd=spec.cwd, env=env, start_new_session=True
    )
    async with process:
        try:
            assert lower(process.pid)
            with anyio.fail_after(30):
                while psutil.Process(process.pid).num_threads() < 2:  # noqa: ASYNC110  # nothing tells us of them
                    await anyio.sleep(0.02)
            yield process
        finally:
            process.kill()


async def answered(process: Process) -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    await process.stdin.send(encode_control("ready", {"subtype": "initialize"}))
    said = b""
    with anyio.fail_after(30):
        while b"control_response" not in said:
            said += await process.stdout.receive()


@linux
@privileged
async def test_every_thread_of_a_cli_is_lowered_and_comes_back(cli: Process) -> None:
    own = os.getpriority(os.PRIO_PROCESS, 0)
    assert niceness(cli.pid) == {own + NICER}
    assert await restore(cli.pid)
    await answered(cli)
    assert niceness(cli.pid) == {own}


@linux
@by_session
async def test_the_session_of_a_cli_is_lowered_and_comes_back(cli: Process) -> None:
    assert of_session(cli.pid) == NICER
    assert await restore(cli.pid)
    assert of_session(cli.pid) == 0


@linux
@by_session
async def test_a_lowered_process_gives_way(tmp_path: Path) -> None:
    """What it is for: of two that want the same processor, the lowered one gets less of it."""
    core = min(os.sched_getaffinity(0))
    spin = f"import os\nos.sched_setaffinity(0, {{{core}}})\nprint(flush=True)\nwhile True: pass"
    async with spinning(spin) as busy, spinning(spin) as lowered:
        assert lower(lowered.pid)
        before = [used(process) for process in (busy, lowered)]
        with anyio.fail_after(60):
            while used(busy) - before[0] < 1:  # noqa: ASYNC110  # seconds of the processor; nothing tells us of them
                await anyio.sleep(0.05)
        assert used(lowered) - before[1] < 0.75


@asynccontextmanager
async def spinning(code: str) -> AsyncIterator[Process]:
    process = await anyio.open_process(
        [sys.executable, "-c", code], stdin=subprocess.DEVNULL, stderr=None, start_new_session=True
    )
    async with process:
        try:
            assert process.stdout is not None
            await process.stdout.receive()
            yield process
        finally:
            process.kill()


def used(process: Process) -> float:
    return sum(psutil.Process(process.pid).cpu_times()[:2])


async def test_a_process_in_somebodys_session_is_left_alone() -> None:
    async with sleeper(own_session=False) as process:
        before = os.getpriority(os.PRIO_PROCESS, process.pid)
        assert not lower(process.pid)
        assert await restore(process.pid)
        assert os.getpriority(os.PRIO_PROCESS, process.pid) == before


async def test_a_process_that_has_ended_is_no_trouble() -> None:
    async with sleeper() as process:
        lower(process.pid)
        process.kill()
        await process.wait()
    assert not lower(process.pid)
    assert await restore(process.pid)


# --- Without privileges


UNPRIVILEGED = """\
import subprocess, sys
import anyio
from orchestrator.scheduling import lower, restore

def seen(pid):
    nice = open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[16]
    return nice, open(f"/proc/{pid}/autogroup").read().split()[-1]

async def main():
    processes = [subprocess.Popen(["sleep", "300"], start_new_session=True) for _ in range(3)]
    try:
        for process in processes:
            while not lower(process.pid):  # one in a tenth of a second
                await anyio.sleep(0.02)
        print(*{seen(process.pid) for process in processes})
        print(*{[await restore(process.pid) for process in processes] == [True] * 3})
        print(*{seen(process.pid) for process in processes})
    finally:
        for process in processes:
            process.kill()

anyio.run(main)
"""


@linux
@by_session
async def test_an_unprivileged_user_lowers_only_what_comes_back(as_nobody: Callable[[str], list[str]]) -> None:
    with anyio.fail_after(60):
        done = await anyio.run_process(as_nobody(UNPRIVILEGED), check=False)
    lines = done.stdout.decode().splitlines()
    assert lines == [str(("0", str(NICER))), "True", str(("0", "0"))], done.stderr.decode()


@pytest.fixture
def as_nobody() -> Callable[[str], list[str]]:
    """The command that runs a script without privileges: as we are, or as another user if we are root."""
    if os.geteuid() != 0:
        return lambda script: [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{script}"]
    # Modules are loaded before the rights are given up: others may not be able to read where they are.
    drop = "import os, ctypes; os.setgroups([]); os.setgid(65534); os.setuid(65534); "
    dumpable = "ctypes.CDLL(None).prctl(4, 1)  # else its own files in /proc belong to root\n"
    imports = "import anyio, anyio._backends._asyncio, orchestrator.scheduling\n"
    return lambda script: [
        sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{imports}{drop}{dumpable}{script}",
    ]  # fmt: skip
