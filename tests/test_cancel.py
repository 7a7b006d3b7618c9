"""Runs that are stopped: what was said is kept, what it cost is known, and every process is gone."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import psutil
import pytest

from orchestrator.config import Config
from orchestrator.delegation import cancel, delegate, submit, wait
from orchestrator.errors import RunCancelledError, RunNotFoundError
from orchestrator.killing import RUN_ID_ENV
from orchestrator.outcome import Outcome
from orchestrator.runtime import LiveRun, Runtime
from orchestrator.store import Run, now_us, open_store
from orchestrator.task import Task
from orchestrator.testing import Fault, ModelServer, Reply, Request, Rule, ToolUse
from orchestrator.testing import Usage as Tokens
from orchestrator.tracing import new_run_id, new_trace_id
from tests.conftest import settings

OpenRuntime = Callable[..., AbstractAsyncContextManager[Runtime]]

INSTANCE_COLUMNS = "(id, kind, host, pid, pid_created, started_us, alive_us, ended_us)"


def carriers(run_id: str) -> list[psutil.Process]:
    """Processes that belong to a run. Those that only wait for their parent's notice have no environment left."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(RUN_ID_ENV) == run_id:
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


async def gone(processes: list[psutil.Process], within: float) -> bool:
    """Whether all of them end in time. The kernel has no event for the end of what is not our child."""
    for _ in range(int(within / 0.05)):
        if not any(map(runs, processes)):
            return True
        await anyio.sleep(0.05)
    return False


def runs(process: psutil.Process) -> bool:
    """A zombie does not: only its parent has not looked yet."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


# --- Ways to be stopped


@dataclass
class Stop:
    """A run to be stopped, and how. ``reached`` is awaited first: the moment at which to stop it."""

    runtime: OpenRuntime
    task: Task
    reached: Callable[[], Any]

    async def caller(self) -> Outcome:
        """The task that waits for the run is cancelled."""
        async with self.runtime() as rt:
            async with anyio.create_task_group() as tg:
                tg.start_soon(delegate, rt, self.task)
                await self.reached()
                [run_id] = rt.live
                tg.cancel_scope.cancel()
            assert not rt.live  # delegate comes back when all is over, not before
            return await wait(rt, run_id)

    async def request(self) -> Outcome:
        """Somebody asks for it."""
        async with self.runtime() as rt:
            run_id = await submit(rt, self.task)
            await self.reached()
            assert (await cancel(rt, run_id)).id == run_id
            return await wait(rt, run_id)

    async def elsewhere(self) -> Outcome:
        """Somebody asks for it in another process; the store carries the word."""
        async with self.runtime() as rt, self.runtime() as other:
            run_id = await submit(rt, self.task)
            await self.reached()
            await cancel(other, run_id)
            return await wait(other, run_id)

    async def closing(self) -> Outcome:
        """The runtime is closed."""
        async with self.runtime() as rt:
            run_id = await submit(rt, self.task)
            await self.reached()
        assert not rt.live
        return await self._stored(rt.config, run_id)

    async def torn_down(self) -> Outcome:
        """The program that opened the runtime is cancelled, as by Ctrl-C."""
        with anyio.CancelScope() as scope:
            async with self.runtime() as rt:
                run_id = await submit(rt, self.task)
                await self.reached()
                scope.cancel()
                await anyio.sleep_forever()
        return await self._stored(rt.config, run_id)

    async def wall(self) -> Outcome:
        """It has taken too long."""
        async with self.runtime() as rt:
            return await delegate(rt, self.task.model_copy(update={"timeout_s": 4}))

    async def idle(self) -> Outcome:
        """Nothing has been heard of it for too long."""
        async with self.runtime() as rt:
            return await delegate(rt, self.task.model_copy(update={"idle_timeout_s": 3}))

    async def _stored(self, config: Config, run_id: str) -> Outcome:
        async with open_store(config.store_path) as store:
            return (await store.run(run_id)).outcome()


ENDS = {
    Stop.caller: ("cancelled", "cancelled", "the caller was cancelled"),
    Stop.request: ("cancelled", "cancelled", "cancelled on request"),
    Stop.elsewhere: ("cancelled", "cancelled", "cancelled on request"),
    Stop.closing: ("cancelled", "cancelled", "the orchestrator is shutting down"),
    Stop.torn_down: ("cancelled", "cancelled", "the orchestrator was stopped"),
    Stop.wall: ("timed_out", "timeout", "the run took longer than 4 s"),
    Stop.idle: ("timed_out", "timeout", "nothing was heard of the run for 3 s"),
}
every_way = pytest.mark.parametrize("way", ENDS, ids=lambda way: way.__name__)


def told(outcome: Outcome) -> tuple[str, str, str]:
    assert outcome.error is not None
    return outcome.status, outcome.error["code"], outcome.error["message"]


class Left:
    """A command that leaves two processes behind, one of them in a session of its own."""

    task = Task(agent="worker", prompt="x", allowed_tools=("Bash(./leave.sh *)",))

    def __init__(self, project: Path) -> None:
        self._fifo = project / "pids"
        self._found: list[psutil.Process] = []
        self._lock = anyio.Lock()
        os.mkfifo(self._fifo)
        script = project / "leave.sh"
        script.write_text(LEAVE)
        script.chmod(0o755)

    def command(self, then: str) -> ToolUse:
        """The model's wish for it. ``then`` is what it does at last: ``wait`` for them, or ``exit``."""
        return ToolUse("Bash", {"command": f"./leave.sh {then}"})

    async def processes(self) -> list[psutil.Process]:
        """The two, once they are what they are to be: in the middle of an exec a process has no environment."""
        async with self._lock:
            if not self._found:
                with anyio.fail_after(10):
                    pids = await anyio.to_thread.run_sync(self._fifo.read_text, abandon_on_cancel=True)
                    found = [psutil.Process(int(pid)) for pid in pids.split()]
                    while {process.name() for process in found} != {"sleep"}:  # noqa: ASYNC110  # nothing tells
                        await anyio.sleep(0.01)
                self._found = found
            return self._found


LEAVE = """\
#!/bin/sh
setsid nohup sleep 300 >/dev/null 2>&1 &
away=$!
nohup sleep 300 >/dev/null 2>&1 &
echo $! $away > pids
$1
"""


@pytest.fixture
def left(project: Path) -> Left:
    return Left(project)


@every_way
async def test_stopped_in_the_middle_of_an_answer(
    runtime: OpenRuntime, model: ModelServer, left: Left, way: Callable[[Stop], Any]
) -> None:
    usage = Tokens(input=1000, output=50)
    half = Reply("The first half. The other half.", usage=usage, fault=Fault(stall_at=4))
    model.rules = [
        Rule(Reply(["One moment.", left.command("exit")], usage=usage), when={"tool_result": False}),
        Rule(half),
    ]
    streaming = anyio.Event()

    @asynccontextmanager
    async def watched() -> AsyncIterator[Runtime]:
        async with runtime() as rt, anyio.create_task_group() as tg:
            tg.start_soon(notice, rt, streaming)
            tg.start_soon(left.processes)
            yield rt
            tg.cancel_scope.cancel()

    with anyio.fail_after(15):
        outcome = await way(Stop(watched, left.task, streaming.wait))
    assert told(outcome) == ENDS[way]  # type: ignore[index]  # the keys are those of the parameters
    assert outcome.text == "One moment.\n\nThe first half. "
    assert outcome.usage.input_tokens == 2000
    assert outcome.cost_usd is not None
    assert 0.009 <= outcome.cost_usd < 0.01  # 5 for the first request, 4 and some output for the second
    assert await gone([*await left.processes(), *carriers(outcome.run_id)], within=3)


async def notice(rt: Runtime, streaming: anyio.Event) -> None:
    """Say when the answer that stalls has begun to stream: the one after the command."""
    seen = []
    with rt.events.watch() as watcher:
        async for event in watcher:
            seen.append(event.data.get("activity"))
            if seen[-1] == "answering" and any(str(activity).startswith("Bash") for activity in seen):
                streaming.set()


@pytest.mark.parametrize("way", [Stop.request, Stop.closing, Stop.wall], ids=lambda way: way.__name__)
async def test_stopped_while_a_command_runs(
    runtime: OpenRuntime, model: ModelServer, left: Left, way: Callable[[Stop], Any]
) -> None:
    model.rules = [Rule(Reply(["Let me start.", left.command("wait")]))]
    with anyio.fail_after(20):
        async with anyio.create_task_group() as tg:
            tg.start_soon(left.processes)
            outcome = await way(Stop(runtime, left.task, left.processes))
    assert told(outcome) == ENDS[way]  # type: ignore[index]  # the keys are those of the parameters
    assert outcome.text == "Let me start."
    assert outcome.cost_usd == pytest.approx(0.0005)
    assert await gone([*await left.processes(), *carriers(outcome.run_id)], within=3)


# --- Runs and their children


@pytest.fixture
def silent(model: ModelServer) -> None:
    """A model that is asked and never answers."""

    async def never(request: Request) -> str:
        await anyio.sleep_forever()
        raise AssertionError

    model.rules = [Rule(never)]


async def family(rt: Runtime, model: ModelServer) -> list[LiveRun]:
    """A run, its child and its grandchild, each waiting for the model."""
    ids: list[str] = []
    for name in ("parent", "child", "grandchild"):
        ids.append(await submit(rt, Task(agent="helper", prompt=name, parent_id=ids[-1] if ids else None)))
        await model.wait_for(lambda request, name=name: request.last_user_text == name)  # type: ignore[misc]
    return [rt.live[run_id] for run_id in ids]


async def ended(lives: list[LiveRun]) -> list[str]:
    with anyio.fail_after(10):
        for live in lives:
            await live.ended.wait()
    return [live.row.status for live in lives]


@pytest.mark.usefixtures("silent")
async def test_cancelling_a_run_cancels_all_below_it_and_nothing_else(rt: Runtime, model: ModelServer) -> None:
    parent, child, grandchild = await family(rt, model)
    await cancel(rt, child.row.id)
    assert await ended([child, grandchild]) == ["cancelled", "cancelled"]
    assert (await rt.store.run(parent.row.id)).status == "running"


# A CLI of our own that is quick to start, for tests of time. What it does is its prompt.
QUICK_CLI = f"""\
#!{sys.executable} -IS
import json, sys, time

def say(**message):
    print(json.dumps(message), flush=True)

say(type="system", subtype="init")
while (line := json.loads(sys.stdin.readline()))["type"] != "user":
    pass
exec(line["message"]["content"])
"""


@pytest.fixture
def quick_cli(tmp_path: Path) -> str:
    script = tmp_path / "claude"
    script.write_text(QUICK_CLI)
    script.chmod(0o755)
    return str(script)


async def test_a_run_that_times_out_takes_its_children_along(runtime: OpenRuntime, quick_cli: str) -> None:
    async with runtime(claude__path=quick_cli) as rt:
        task = Task(agent="helper", prompt="time.sleep(300)", timeout_s=1.5)
        lives: list[LiveRun] = []
        for n in range(3):
            lives.append(rt.live[await submit(rt, task)])
            task = Task(agent="helper", prompt=f"time.sleep({301 + n})", parent_id=lives[-1].row.id)
        assert await ended(lives) == ["timed_out", "cancelled", "cancelled"]
        assert "which delegated this one" in (lives[1].row.error or {})["message"]


async def test_a_busy_child_keeps_its_parent_from_being_idle(runtime: OpenRuntime, quick_cli: str) -> None:
    """The parent says nothing for longer than its idle time-out, but its child does."""
    busy = "for _ in range(25): say(type='tool_progress'); time.sleep(0.1)"
    done = "say(type='result', subtype='success', is_error=False, result='done')"
    async with runtime(claude__path=quick_cli) as rt:
        parent = await submit(rt, Task(agent="helper", prompt="time.sleep(300)", idle_timeout_s=1.5))
        child = await delegate(rt, Task(agent="helper", prompt=f"{busy}\n{done}", parent_id=parent))
        assert (child.text, (await rt.store.run(parent)).status) == ("done", "running")
        assert (child.duration_ms or 0) > 2000
        with anyio.fail_after(5):
            silent = "nothing was heard of the run for 1.5 s"
            assert told(await wait(rt, parent)) == ("timed_out", "timeout", silent)


@pytest.mark.usefixtures("silent")
async def test_a_run_that_is_being_stopped_delegates_nothing_more(rt: Runtime, model: ModelServer) -> None:
    parent = await submit(rt, Task(agent="helper", prompt="parent"))
    await model.wait_for("parent")
    await cancel(rt, parent)
    with pytest.raises(RunCancelledError, match="is being stopped"):
        await delegate(rt, Task(agent="helper", prompt="child", parent_id=parent))
    with anyio.fail_after(5):
        await wait(rt, parent)
    assert [run.name for run in await rt.store.runs()] == ["helper"]


# --- Nothing to stop


@pytest.mark.usefixtures("silent")
async def test_a_run_that_waits_for_its_place_never_starts(runtime: OpenRuntime, model: ModelServer) -> None:
    async with runtime(limits__max_processes=1) as rt:
        await submit(rt, Task(agent="helper", prompt="first"))
        await model.wait_for("first")
        waiting = await submit(rt, Task(agent="helper", prompt="second"))
        await cancel(rt, waiting)
        with anyio.fail_after(5):
            outcome = await wait(rt, waiting)
        assert (outcome.status, outcome.duration_ms, outcome.cost_usd) == ("cancelled", None, 0)
        assert len(await rt.store.sessions()) == 1


async def test_an_ended_run_stays_as_it_is(rt: Runtime, model: ModelServer) -> None:
    model.rules = [Rule("done")]
    outcome = await delegate(rt, Task(agent="helper", prompt="x"))
    assert (await cancel(rt, outcome.run_id)).status == "succeeded"
    assert await wait(rt, outcome.run_id) == outcome


async def test_an_unknown_run(rt: Runtime) -> None:
    with pytest.raises(RunNotFoundError):
        await cancel(rt, "0123456789abcdef")


# --- An orchestrator that is killed


ORCHESTRATOR = """\
import json, sys, anyio
from pathlib import Path
from orchestrator.config import load_config
from orchestrator.delegation import delegate
from orchestrator.runtime import open_runtime
from orchestrator.task import Task

async def main(project, overrides, environ, task):
    config = load_config(project_dir=Path(project), environ={}, overrides=overrides)
    async with open_runtime(config, environ=environ) as rt:
        await delegate(rt, Task(**task))

anyio.run(main, *json.loads(sys.argv[1]))
"""


async def test_an_orchestrator_that_is_killed_leaves_nothing_running(
    runtime: OpenRuntime,
    model: ModelServer,
    project: Path,
    tmp_path: Path,
    environ: dict[str, str],
    left: Left,
) -> None:
    model.rules = [Rule(Reply(["Let me start.", left.command("wait")]))]
    task = left.task.model_dump(mode="json", exclude_defaults=True)
    arguments = json.dumps([str(project), settings(tmp_path, model.base_url), environ, task])
    async with await anyio.open_process(
        [sys.executable, "-c", ORCHESTRATOR, arguments],
        cwd=Path(__file__).parent.parent,
        env=environ,
        stdout=subprocess.DEVNULL,
        stderr=None,
    ) as orchestrator:
        commands = await left.processes()
        run = await first_run_with_text(tmp_path / "data" / "runs.db")
        assert (run.status, run.text) == ("running", "Let me start.")
        family = carriers(run.id)
        assert {process.pid for process in commands} < {process.pid for process in family}
        orchestrator.send_signal(signal.SIGKILL)
        await orchestrator.wait()
        # Nobody is left to stop them but the kernel and the CLI itself.
        assert await gone(family, within=5)

    model.rules = [Rule("Here I am again.")]
    async with runtime() as rt:
        interrupted = await wait(rt, run.id)
        assert told(interrupted)[:2] == ("interrupted", "interrupted")
        assert interrupted.text == "Let me start."
        after = await delegate(rt, Task(agent="worker", prompt="Go on.", session=interrupted.session_id))
        assert after.text == "Here I am again."
    assert "x" in model.journal[-1].texts


async def first_run_with_text(path: Path) -> Run:
    """The text of a run is written a moment after it was said."""
    async with open_store(path) as store:
        for _ in range(100):
            for run in await store.runs():
                if run.text:
                    return run
            await anyio.sleep(0.05)
    raise AssertionError("no text was written in five seconds")


# --- Owners that died


async def test_a_run_whose_owner_fell_silent_on_another_host_ends_while_it_is_waited_for(rt: Runtime) -> None:
    """Nobody is left to act on the request; whoever looks next ends the run. We give signs of life meanwhile."""
    run_id = new_run_id()
    far = Run(
        id=run_id, trace_id=new_trace_id(), root_id=run_id, depth=1, kind="agent", name="helper", status="running",
        project="/srv", cwd="/srv", created_us=1, started_us=1, instance_id="far",
    )  # fmt: skip
    await rt.store.create_run(far)
    params = {"alive": now_us() - 180_000_000}
    await rt.store._db.write(
        (
            f"INSERT INTO instances {INSTANCE_COLUMNS}"
            " VALUES ('far', 'serve', 'another-host', 1, 0, 1, :alive, NULL)",
            params,
        ),
        ("UPDATE instances SET alive_us = 1 WHERE id != 'far'", {}),
    )
    with anyio.fail_after(40):
        await cancel(rt, run_id)
        outcome = await wait(rt, run_id)
    assert (outcome.status, (outcome.error or {})["code"]) == ("interrupted", "interrupted")
    [mine] = await rt.store._db.all("SELECT * FROM instances WHERE ended_us IS NULL")
    assert mine["id"] == rt.store.instance_id
    assert mine["alive_us"] > params["alive"]
