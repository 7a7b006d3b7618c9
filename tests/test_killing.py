"""The end of processes: whatever a CLI leaves, and whoever dies, nothing goes on running.

The runs themselves are stopped in ``test_cancel``; here it is the processes alone, and what only happens to them.
"""

import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import psutil
import pytest
from anyio.abc import Process

from orchestrator.backends import DIALECTS
from orchestrator.backends.claude import argv, encode_control, encode_prompt, environment
from orchestrator.cgroups import Cgroup, cgroup_support, kill_cgroups, make_cgroup, outside_ours
from orchestrator.conversation import Spec, Turn
from orchestrator.delegation import delegate
from orchestrator.errors import CLIStartError, ConfigError
from orchestrator.killing import (
    INSTANCE_ID_ENV,
    PROCESS_ID_ENV,
    RUN_ID_ENV,
    SESSION_ID_ENV,
    StopTimes,
    carriers,
    death_signal_prefix,
    reap,
    stop,
    sweep,
)
from orchestrator.messages import ResultMessage
from orchestrator.process import ProcessConversation, connect_process
from orchestrator.runtime import Runtime
from orchestrator.task import Task
from orchestrator.testing import ModelServer, Reply, Rule, ToolUse
from tests.conftest import DUMMY_KEY, bundled_cli

ROOT = Path(__file__).parent.parent

COMMANDS = ("Bash(./leave.sh *)",)

#: For one that will not answer anyway.
BRIEF = StopTimes(after_asking=0.1, after_term=0.1, after_kill=5)
#: Enough for a machine that is busy with other tests.
PATIENT = StopTimes(after_asking=20, after_term=20, after_kill=5)

needs_cgroups = pytest.mark.skipif(
    cgroup_support() is None, reason="no control group (cgroup v2) may be made on this machine"
)


def runs(process: psutil.Process) -> bool:
    """A zombie does not: only its parent has not looked yet."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


async def until(true: Callable[[], Any]) -> None:
    """Wait for the end of what is not our child; the kernel tells us nothing of it."""
    with anyio.fail_after(15):
        while not true():  # noqa: ASYNC110
            await anyio.sleep(0.02)


# --- A CLI that leaves something behind


LEAVE = """\
#!/bin/sh
sleep 300 > /dev/null 2>&1 &
child=$!
nohup sleep 300 > /dev/null 2>&1 &
nohup=$!
setsid sleep 300 > /dev/null 2>&1 &
session=$!
daemon=$(setsid sh -c 'sleep 300 > /dev/null 2>&1 & echo $!')
stranger=$(env -i "PATH=$PATH" setsid sh -c 'sleep 300 > /dev/null 2>&1 & echo $!')
echo child $child nohup $nohup session $session daemon $daemon stranger $stranger > pids
$1
"""


@dataclass
class Cli:
    """A real CLI in a session of its own, with what its commands left behind."""

    process: Process
    process_id: str
    session_id: str
    answered: anyio.Event = field(default_factory=anyio.Event)
    left: dict[str, psutil.Process] = field(default_factory=dict)

    async def prompt(self, text: str) -> None:
        assert self.process.stdin is not None
        await self.process.stdin.send(encode_prompt(text, str(uuid.uuid4())))

    async def ask_to_end(self) -> None:
        assert self.process.stdin is not None
        await self.process.stdin.send(encode_control(uuid.uuid4().hex, {"subtype": "end_session"}))

    async def listen(self) -> None:
        assert self.process.stdout is not None
        said = b""
        async for chunk in self.process.stdout:
            said = said[-20:] + chunk
            if b'"type":"result"' in said:
                self.answered.set()

    def still_there(self, *but: str) -> list[str]:
        return [kind for kind, process in self.left.items() if runs(process) and kind not in but]


@dataclass
class Machine:
    """How a CLI is started in a test."""

    project: Path
    environ: dict[str, str]
    model: ModelServer

    def spec(self, **marks: str) -> Spec:
        extra = {"ANTHROPIC_BASE_URL": self.model.base_url, "ANTHROPIC_API_KEY": DUMMY_KEY, **marks}
        return Spec(
            cwd=self.project,
            env=environment(self.environ, home=Path(self.environ["HOME"]), pass_env=(), extra=extra),
            session_id=str(uuid.uuid4()),
            model="claude-opus-5-5",
            system_prompt="You are the worker.",
            tools=("Bash",),
            allowed_tools=("Bash(./leave.sh *)",),
        )

    def will(self, then: str) -> None:
        """What the command does when it has left its processes: ``exit``, or ``wait`` for them."""
        command = ToolUse("Bash", {"command": f"./leave.sh {then}"})
        self.model.rules = [Rule(Reply(command), when={"tool_result": False}), Rule("Done.")]

    async def left(self) -> dict[str, psutil.Process]:
        """What the command has left, once it is there."""
        with anyio.fail_after(20):
            told = await anyio.to_thread.run_sync((self.project / "pids").read_text, abandon_on_cancel=True)
        words = told.split()
        return {kind: psutil.Process(int(pid)) for kind, pid in zip(words[::2], words[1::2], strict=True)}

    @asynccontextmanager
    async def cli(self, then: str, cgroup: Cgroup | None = None, **marks: str) -> AsyncIterator[Cli]:
        """A CLI whose command has left its processes: it waits for them, or has answered (``then`` is exit)."""
        self.will(then)
        process_id = uuid.uuid4().hex
        spec = self.spec(**{PROCESS_ID_ENV: process_id}, **marks)
        process = await anyio.open_process(
            [*(cgroup.prefix if cgroup else ()), str(bundled_cli()), *argv(spec)],
            stderr=subprocess.DEVNULL, cwd=spec.cwd, env=dict(spec.env), start_new_session=True,
        )  # fmt: skip
        cli = Cli(process, process_id, spec.session_id)
        try:
            async with anyio.create_task_group() as tg:
                tg.start_soon(cli.listen)
                await cli.prompt("Leave something behind.")
                cli.left = await self.left()
                if then == "exit":
                    with anyio.fail_after(20):
                        await cli.answered.wait()
                yield cli
                tg.cancel_scope.cancel()
        finally:
            for left in (*cli.left.values(), *carriers({process_id})):
                if runs(left):
                    left.kill()
            with anyio.CancelScope(shield=True):
                await process.aclose()

    @asynccontextmanager
    async def conversation(self, instance: str = "instance", **fields: Any) -> AsyncIterator[ProcessConversation]:
        """A CLI as a runtime starts it."""
        spec = self.spec(**{INSTANCE_ID_ENV: instance, PROCESS_ID_ENV: uuid.uuid4().hex})
        async with connect_process(
            replace(spec, **fields), binary=bundled_cli(), dialect=DIALECTS["claude"], max_line_bytes=1 << 20
        ) as conversation:
            yield conversation


@pytest.fixture
def machine(project: Path, environ: dict[str, str], model: ModelServer) -> Machine:
    os.mkfifo(project / "pids")
    script = project / "leave.sh"
    script.write_text(LEAVE)
    script.chmod(0o755)
    return Machine(project, environ, model)


# --- Every way to end one


async def asked(cli: Cli, **more: Any) -> None:
    await stop(cli.process, {cli.process_id}, PATIENT, ask_to_end=cli.ask_to_end, **more)


async def terminated(cli: Cli, **more: Any) -> None:
    await stop(cli.process, {cli.process_id}, PATIENT, **more)


async def hung(cli: Cli, **more: Any) -> None:
    """It does nothing any more, also not about the TERM."""
    cli.process.send_signal(signal.SIGSTOP)
    await stop(cli.process, {cli.process_id}, BRIEF, ask_to_end=cli.ask_to_end, **more)


async def found_dead(cli: Cli, **more: Any) -> None:
    """Somebody else killed it: its tree is no more to be seen."""
    cli.process.kill()
    await cli.process.wait()
    await stop(cli.process, {cli.process_id}, PATIENT, **more)


# How, when, and how the CLI itself ends by it.
WAYS = [
    (asked, "exit", 0),
    (asked, "wait", 1),
    (terminated, "exit", 143),
    (terminated, "wait", 143),
    (hung, "exit", -signal.SIGKILL),
    (hung, "wait", -signal.SIGKILL),
    (found_dead, "wait", -signal.SIGKILL),
]


@pytest.mark.parametrize(("way", "then", "code"), WAYS)
async def test_nothing_is_left(machine: Machine, way: Any, then: str, code: int) -> None:
    async with machine.cli(then) as cli:
        assert set(cli.left) == {"child", "nohup", "session", "daemon", "stranger"}
        assert set(cli.still_there()) >= {"nohup", "session", "daemon", "stranger"}
        with anyio.fail_after(45):
            await way(cli)
        # What has forgotten its parents and its environment is for control groups.
        assert cli.still_there("stranger") == []
        assert cli.process.returncode == code


async def test_a_run_that_answered_leaves_nothing(machine: Machine, rt: Runtime) -> None:
    machine.will("exit")
    left: dict[str, psutil.Process] = {}

    async def look() -> None:
        left.update(await machine.left())

    with anyio.fail_after(60):
        async with anyio.create_task_group() as tg:
            tg.start_soon(look)
            outcome = await delegate(rt, Task(agent="worker", prompt="x", allowed_tools=("Bash(./leave.sh *)",)))
    try:
        assert outcome.text.endswith("Done.")
        await until(lambda: not any(runs(left[kind]) for kind in left if kind != "stranger"))
    finally:
        for process in left.values():
            if runs(process):
                process.kill()


@needs_cgroups
async def test_a_closed_runtime_leaves_not_even_what_hides(
    machine: Machine, runtime: Callable[..., AbstractAsyncContextManager[Runtime]]
) -> None:
    """One has cleared its environment, begun a session and lost its parents: its control group holds it."""
    machine.will("exit")
    left: dict[str, psutil.Process] = {}
    try:
        with anyio.fail_after(90):
            async with runtime() as rt, anyio.create_task_group() as tg:

                async def look() -> None:
                    left.update(await machine.left())
                    assert len(groups_of(rt.store.instance_id)) == 1

                tg.start_soon(look)
                outcome = await delegate(rt, Task(agent="worker", prompt="x", allowed_tools=COMMANDS))
        assert outcome.text.endswith("Done.")
        assert set(left) == {"child", "nohup", "session", "daemon", "stranger"}
        assert not any(map(runs, left.values()))
        assert not groups_of(rt.store.instance_id)
    finally:
        for process in left.values():
            if runs(process):
                process.kill()


@needs_cgroups
async def test_between_two_turns_orphans_are_ended_and_the_process_goes_on(machine: Machine) -> None:
    machine.will("exit")
    left: dict[str, psutil.Process] = {}

    async def look() -> None:
        left.update(await machine.left())

    async def turn(conversation: ProcessConversation, prompt: str) -> str | None:
        await conversation.send(Turn(prompt, str(uuid.uuid4())))
        while not isinstance(message := await conversation.receive(), ResultMessage):
            pass
        return message.result

    try:
        with anyio.fail_after(90):
            async with machine.conversation() as conversation:
                async with anyio.create_task_group() as tg:
                    tg.start_soon(look)
                    assert await turn(conversation, "Leave something behind.") == "Done."
                assert runs(left["stranger"])
                await conversation.end_orphans()
                await until(lambda: not runs(left["stranger"]))
                machine.model.rules = [Rule("Still here.")]
                assert await turn(conversation, "And now?") == "Still here."
    finally:
        for process in left.values():
            if runs(process):
                process.kill()


def groups_of(instance_id: str) -> list[Path]:
    return list(Path(cgroup_support() or "/nonexistent").glob(f"*-{instance_id}-*"))


@needs_cgroups
async def test_a_start_that_fails_leaves_no_group(machine: Machine) -> None:
    instance = uuid.uuid4().hex

    async def start(**fields: Any) -> list[Path]:
        async with machine.conversation(instance, **fields):
            return groups_of(instance)

    with anyio.fail_after(60):
        assert len(await start()) == 1
        assert groups_of(instance) == []
        with pytest.raises(CLIStartError):
            await start(cwd=machine.project / "missing")
        with pytest.raises(ConfigError):
            await start(system_prompt="x" * 200_000)
    assert groups_of(instance) == []


@needs_cgroups
@pytest.mark.parametrize("way", [asked, hung])
async def test_a_control_group_holds_what_hides(machine: Machine, way: Any) -> None:
    cgroup = make_cgroup("instance", uuid.uuid4().hex)
    assert cgroup is not None
    try:
        async with machine.cli("wait", cgroup) as cli:
            assert "stranger" in cli.still_there()
            with anyio.fail_after(45):
                await way(cli, cgroup=cgroup)
            assert cli.still_there() == []
            assert not cgroup.path.exists()
    finally:
        await anyio.to_thread.run_sync(cgroup.kill)


async def test_the_tree_is_known_without_any_mark(machine: Machine) -> None:
    """The snapshot taken before each step is enough for all that has a parent."""
    async with machine.cli("wait") as cli:
        cli.process.send_signal(signal.SIGSTOP)
        await stop(cli.process, set(), BRIEF)
        assert cli.still_there("daemon", "stranger") == []


async def test_a_session_is_a_mark_too(machine: Machine) -> None:
    async with machine.cli("wait") as cli:
        cli.process.kill()
        await cli.process.wait()
        assert "daemon" in cli.still_there()
        await anyio.to_thread.run_sync(sweep, {cli.session_id})
        assert cli.still_there("stranger") == []


# --- Processes that do not want to


@asynccontextmanager
async def started(script: str, **env: str) -> AsyncIterator[Process]:
    """A shell script in a session of its own; with what it started it is gone afterwards."""
    mark = uuid.uuid4().hex
    process = await anyio.open_process(
        ["/bin/sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env={"PATH": "/usr/bin:/bin", SESSION_ID_ENV: mark, **env}, start_new_session=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(sweep, {mark})
            await process.aclose()


async def line(process: Process) -> str:
    assert process.stdout is not None
    said = b""
    with anyio.fail_after(10):
        while not said.endswith(b"\n"):
            said += await process.stdout.receive()
    return said.decode().strip()


IGNORES = "trap '' TERM; sleep 300 & a=$!; setsid sleep 300 & echo $a $!; while :; do wait; done"


async def test_who_ignores_everything_is_killed() -> None:
    async with started(IGNORES) as cli:
        children = [psutil.Process(int(pid)) for pid in (await line(cli)).split()]

        async def ask() -> None:
            assert cli.stdin is not None
            await cli.stdin.send(b"Would you mind?\n")

        with anyio.fail_after(15):
            await stop(cli, set(), StopTimes(after_asking=0.1, after_term=0.1), ask_to_end=ask)
        assert cli.returncode == -signal.SIGKILL
        assert not any(map(runs, children))


async def test_who_does_not_even_listen_is_not_waited_for() -> None:
    """The pipe is full: the question itself would wait for ever."""
    async with started("echo; exec sleep 300") as cli:
        await line(cli)

        async def ask() -> None:
            assert cli.stdin is not None
            await cli.stdin.send(b"x" * 10_000_000)

        with anyio.fail_after(15):
            await stop(cli, set(), StopTimes(after_asking=0.1), ask_to_end=ask)
        assert cli.returncode == -signal.SIGTERM


async def test_who_has_ended_already_is_no_trouble() -> None:
    async with started("exit 3") as cli:
        await cli.wait()
        await stop(cli, set())
        assert cli.returncode == 3


async def test_one_that_flees_from_process_to_process_is_caught(tmp_path: Path) -> None:
    """Each starts the next in another session and ends; there is a parent only for a moment."""
    flee = tmp_path / "flee.sh"
    flee.write_text('#!/bin/sh\necho $$\nsleep 0.03\nsetsid "$0" &\n')
    flee.chmod(0o755)
    run_id = uuid.uuid4().hex
    async with started(str(flee), **{RUN_ID_ENV: run_id}) as first:
        await first.wait()
        assert await anyio.to_thread.run_sync(sweep, {run_id}) > 0
        assert not carriers({run_id})
        with anyio.fail_after(10):  # the pipe ends with the last of them
            assert first.stdout is not None
            async for _ in first.stdout:
                pass


# --- Whom it must not kill


NESTED = f"""\
import os, subprocess, sys
from orchestrator.killing import carriers, sweep
sibling = subprocess.Popen(["sleep", "300"])
mark = os.environ[{RUN_ID_ENV!r}]
assert {{os.getpid(), os.getppid(), sibling.pid}} <= {{p.pid for p in carriers({{mark}})}}
print(sweep({{mark}}), sibling.wait(), flush=True)
"""


async def test_an_orchestrator_inside_an_agents_shell_spares_itself_and_the_shell(tmp_path: Path) -> None:
    script = tmp_path / "nested.py"
    script.write_text(NESTED)
    env = {RUN_ID_ENV: uuid.uuid4().hex, "PYTHONPATH": str(ROOT)}
    async with started(f"{sys.executable} {script}; echo shell $?", **env) as shell:
        with anyio.fail_after(20):
            assert await line(shell) == f"1 {-signal.SIGKILL}"
            assert await line(shell) == "shell 0"


async def test_only_the_instances_named_are_reaped() -> None:
    ours, other = uuid.uuid4().hex, uuid.uuid4().hex
    async with (
        started("setsid sleep 300 & echo $!; exec sleep 300", **{INSTANCE_ID_ENV: ours}) as dead,
        started("echo; exec sleep 300", **{INSTANCE_ID_ENV: other}) as alive,
    ):
        away = psutil.Process(int(await line(dead)))
        await line(alive)
        assert await anyio.to_thread.run_sync(reap, {ours}) == 2
        assert not runs(away)
        assert runs(psutil.Process(alive.pid))
        assert await anyio.to_thread.run_sync(reap, set[str]()) == 0
        assert runs(psutil.Process(alive.pid))


@needs_cgroups
async def test_groups_of_dead_instances_are_removed_with_what_is_in_them() -> None:
    ours, other = uuid.uuid4().hex, uuid.uuid4().hex
    left, kept = make_cgroup(ours, "p"), make_cgroup(other, "p")
    assert left is not None
    assert kept is not None
    try:
        hidden = await anyio.open_process([*left.prefix, "env", "-i", "sleep", "300"], stdin=subprocess.DEVNULL)
        await until(lambda: (left.path / "cgroup.procs").read_text())
        (left.path / "of-an-inner-orchestrator").mkdir()
        await anyio.to_thread.run_sync(reap, {ours})
        with anyio.fail_after(10):
            assert await hidden.wait() == -signal.SIGKILL
        await hidden.aclose()
        assert (left.path.exists(), kept.path.exists()) == (False, True)
    finally:
        kill_cgroups({ours, other})


@pytest.mark.parametrize(
    ("group", "outside"),
    [
        ("", ""),
        ("user.slice/app", "user.slice/app"),
        ("app/orchestrator-0a1b-2c3d", "app"),
        ("app/orchestrator-0a1b-2c3d/inner", "app"),
        ("app/orchestrator-0a1b-2c3d/orchestrator-4e5f-6789", "app"),
        ("orchestrator-main.service", "orchestrator-main.service"),
        ("orchestrator-my-service/x", "orchestrator-my-service/x"),
    ],
)
def test_where_nothing_ends_with_an_agent(group: str, outside: str) -> None:
    assert outside_ours(Path("/sys/fs/cgroup", group)) == Path("/sys/fs/cgroup", outside)


@needs_cgroups
def test_a_command_runs_also_when_its_group_has_gone() -> None:
    cgroup = make_cgroup(uuid.uuid4().hex, "p")
    assert cgroup is not None
    assert cgroup.kill()
    done = subprocess.run([*cgroup.prefix, "echo", "a b"], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr, done.returncode) == ("a b\n", "", 0)


# --- An orchestrator that is killed


ORCHESTRATOR = """\
import json, subprocess, sys, anyio

async def main(command, env, cwd, prompt):
    cli = await anyio.open_process(
        command, stdout=subprocess.DEVNULL, stderr=None, env=env, cwd=cwd, start_new_session=True
    )
    await cli.stdin.send(prompt.encode())
    await anyio.sleep_forever()

anyio.run(main, *json.loads(sys.argv[1]))
"""


@pytest.mark.skipif(not death_signal_prefix(), reason="setpriv of util-linux is not installed")
@pytest.mark.parametrize("grouped", [False, pytest.param(True, marks=needs_cgroups)])
async def test_a_killed_orchestrator_takes_its_clis_along_and_the_next_one_sweeps_up(
    machine: Machine, grouped: bool
) -> None:
    """The kernel tells the CLI, which ends what it can still see; what is left is known by the instance's id."""
    machine.will("wait")
    instance = uuid.uuid4().hex
    spec = machine.spec(**{INSTANCE_ID_ENV: instance})
    cgroup = make_cgroup(instance, "p") if grouped else None
    command = [*death_signal_prefix(), *(cgroup.prefix if cgroup else ()), str(bundled_cli()), *argv(spec)]
    prompt = encode_prompt("Leave something behind.", str(uuid.uuid4())).decode()
    arguments = json.dumps([command, dict(spec.env), str(spec.cwd), prompt])
    left: dict[str, psutil.Process] = {}
    try:
        async with await anyio.open_process(
            [sys.executable, "-c", ORCHESTRATOR, arguments],
            env=machine.environ,
            stdout=subprocess.DEVNULL,
            stderr=None,
        ) as orchestrator:
            left = await machine.left()
            [cli] = psutil.Process(orchestrator.pid).children()
            orchestrator.kill()
            await orchestrator.wait()
        await until(lambda: not runs(cli))
        await until(lambda: not any(runs(left[kind]) for kind in ("child", "nohup", "session")))
        await anyio.to_thread.run_sync(reap, {instance})
        assert not runs(left["daemon"])
        assert not carriers({instance})
        assert runs(left["stranger"]) is not grouped
    finally:
        kill_cgroups({instance})
        for process in (*left.values(), *carriers({instance})):
            if runs(process):
                process.kill()
