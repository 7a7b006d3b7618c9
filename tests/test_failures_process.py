"""Every way a CLI's process, and the host under it, is known to fail, beside those of test_faults."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import anyio
import pytest

from orchestrator.delegation import delegate, submit, wait
from orchestrator.store import open_store
from orchestrator.task import Task
from orchestrator.testing import ModelServer, Reply, Request, Rule, Text, ToolUse
from tests.conftest import bundled_cli, settings, write_agent
from tests.failures import (
    OpenRuntime,
    Verdict,
    acting,
    error_of,
    nothing_outlives_the_test,  # noqa: F401  # an autouse fixture
    runs_well,
    verdict,
    write_cli,
)


@pytest.fixture
def act(runtime: OpenRuntime, tmp_path: Path) -> Callable[..., Any]:
    return acting(runtime, tmp_path)


ENDED: Verdict = ("failed", "cli_exit", True, "host")
NOT_STARTED: Verdict = ("failed", "cli_start", False, "host")
NOT_FOUND: Verdict = ("failed", "cli_not_found", False, "host")

# --- What it says

#: What the CLI does → the verdict, what was said until then.
ENDINGS: Mapping[str, tuple[str, Verdict, str]] = {
    "nothing": ("sys.exit(0)", ENDED, ""),
    "garbage": ("print('%PDF-1.7'); sys.stdout.buffer.write(bytes(range(256)) * 100)", ENDED, ""),
    "a line too deep to read": (
        "begin(); print('{\"type\":\"x\",\"a\":' + '[' * 200_000); answer('hm')",
        ENDED,
        "hm",
    ),
    "no more output": ("begin(); answer('so far'); os.close(1); time.sleep(300)", ENDED, "so far"),
    "a signal": ("begin(); answer('so far'); os.kill(os.getpid(), signal.SIGSEGV)", ENDED, "so far"),
    "last words of a start": ("sys.exit('Error: Invalid MCP configuration: x')", NOT_STARTED, ""),
}


@pytest.mark.parametrize("name", ENDINGS)
async def test_it_ends_without_a_result(act: Callable[..., Any], name: str) -> None:
    behaviour, expected, text = ENDINGS[name]
    outcome = await act(behaviour)
    assert (verdict(outcome), outcome.text) == (expected, text)


async def test_silence_from_the_start(act: Callable[..., Any]) -> None:
    outcome = await act("time.sleep(300)", idle_timeout_s=0.5)
    assert verdict(outcome)[:2] == ("timed_out", "timeout")


async def test_it_fails_after_its_result(act: Callable[..., Any]) -> None:
    outcome = await act("begin(); result('all there'); sys.exit(3)")
    assert (outcome.status, outcome.text, outcome.cost_usd) == ("succeeded", "all there", 0.5)


async def test_two_results_and_the_first_counts(runtime: OpenRuntime, tmp_path: Path) -> None:
    """And the second is nothing to the run that comes after."""
    behaviour = (
        "while (heard := hear('user')) is not None:\n"
        "    begin(); result(heard['message']['content'] + ' 1'); result(heard['message']['content'] + ' 2')\n"
    )
    async with runtime(claude__path=str(write_cli(tmp_path / "claude", behaviour))) as rt:
        with anyio.fail_after(60):
            outcomes = [await delegate(rt, Task(agent="helper", prompt=prompt)) for prompt in ("a", "b", "c")]
    assert [outcome.text for outcome in outcomes] == ["a 1", "b 1", "c 1"]


#: Refusals that the CLI announces to repeat, which would be refused again.
HOPELESS: Mapping[str, tuple[dict[str, Any], str]] = {
    "billing": ({"error_status": 400, "error": "billing_error"}, "billing"),
    "verification": ({"error_status": 403, "error": "verification_required"}, "permission"),
    "hold": ({"error_status": 401, "error": "account_on_hold", "attempt": 2}, "authentication"),
    "organisation": ({"error_status": None, "error": "oauth_org_not_allowed"}, "permission"),
    "model": ({"error_status": 404, "error": "model_not_found"}, "model_not_found"),
    "login": ({"error_status": 401, "error": "authentication_failed", "attempt": 2}, "authentication"),
    "revoked": ({"error_status": 403, "error": "authentication_failed"}, "authentication"),
}


@pytest.mark.parametrize("name", HOPELESS)
async def test_retries_that_cannot_help_are_not_waited_for(act: Callable[..., Any], name: str) -> None:
    retry, code = HOPELESS[name]
    fields = {"attempt": 1, "max_retries": 10, "retry_delay_ms": 60_000, **retry}
    outcome = await act(f"begin(); say(type='system', subtype='api_retry', **{fields!r}); time.sleep(300)")
    assert verdict(outcome)[:3] == ("failed", code, False)


# --- What it is


def no_cli(folder: Path) -> Path:
    return folder / "claude"


def not_executable(folder: Path) -> Path:
    path = folder / "claude"
    path.write_text("#!/bin/sh\n")
    path.chmod(0o644)
    return path


def a_directory(folder: Path) -> Path:
    (folder / "claude").mkdir()
    return folder / "claude"


def no_interpreter(folder: Path) -> Path:
    path = folder / "claude"
    path.write_text("#!/nonexistent/interpreter\n")
    path.chmod(0o755)
    return path


def for_another_machine(folder: Path) -> Path:
    path = folder / "claude"
    path.write_bytes(b"\x7fELF" + bytes(200))
    path.chmod(0o755)
    return path


BINARIES = [no_cli, not_executable, a_directory, no_interpreter, for_another_machine]


@pytest.mark.parametrize("make", BINARIES)
async def test_a_cli_that_cannot_be_run(runtime: OpenRuntime, tmp_path: Path, make: Callable[[Path], Path]) -> None:
    """And once it is there, the same runtime runs it."""
    path = make(tmp_path)
    async with runtime(claude__path=str(path)) as rt:
        with anyio.fail_after(60):
            outcome = await delegate(rt, Task(agent="helper", prompt="x"))
        assert verdict(outcome) in (NOT_FOUND, NOT_STARTED)
        assert str(path) in error_of(outcome)["message"]
        assert outcome.cost_usd == 0
        if path.is_dir():
            path.rmdir()
        write_cli(path, "begin(); result('mended')")
        with anyio.fail_after(60):
            assert (await delegate(rt, Task(agent="helper", prompt="x"))).text == "mended"


async def test_a_cli_that_is_replaced_while_it_runs(
    runtime: OpenRuntime, model: ModelServer, tmp_path: Path, held: "Held"
) -> None:
    """As an update does: the run that goes on is not touched, the next one has the new one."""
    path = tmp_path / "claude"
    path.symlink_to(bundled_cli())
    model.rules = [Rule(held)]
    async with runtime(claude__path=str(path)) as rt:
        with anyio.fail_after(60):
            run_id = await submit(rt, Task(agent="helper", prompt="x"))
            await held.reached.wait()
            write_cli(path, "hear('user'); begin(); result('the new one')")
            held.go_on.set()
            assert (await wait(rt, run_id)).text == "held"
            assert (await delegate(rt, Task(agent="helper", prompt="x"))).text == "the new one"


class Held:
    """A model that answers when told to."""

    def __init__(self) -> None:
        self.text: str | Text = "held"
        self.reached = anyio.Event()
        self.go_on = anyio.Event()

    async def __call__(self, request: Request) -> Reply:
        self.reached.set()
        await self.go_on.wait()
        return Reply(self.text)


@pytest.fixture
def held() -> Held:
    return Held()


async def test_root_may_not_do_without_permissions(runtime: OpenRuntime, model: ModelServer, project: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("the CLI refuses it to root alone")
    write_agent(project, "free", tools="Read", permissionMode="bypassPermissions")
    async with runtime(claude__allow_bypass_permissions=True) as rt:
        with anyio.fail_after(60):
            outcome = await delegate(rt, Task(agent="free", prompt="x"))
        assert verdict(outcome) == NOT_STARTED
        assert "root" in error_of(outcome)["message"]
        assert "IS_SANDBOX" in error_of(outcome)["advice"]
        await runs_well(rt, model)


async def test_a_schema_that_is_none(runtime: OpenRuntime, model: ModelServer) -> None:
    """The task is wrong, not the host."""
    async with runtime() as rt:
        with anyio.fail_after(60):
            outcome = await delegate(rt, Task(agent="helper", prompt="x", output_schema={"type": "nonsense"}))
        assert verdict(outcome) == ("failed", "cli_start", False, "request")
        assert "schema" in error_of(outcome)["advice"]
        await runs_well(rt, model)


async def test_options_of_a_task_the_cli_would_refuse(runtime: OpenRuntime, model: ModelServer) -> None:
    wrong: dict[str, dict[str, Any]] = {
        "effort": {"effort": "silly"},
        "mode": {"permission_mode": "silly"},
        "rules": {"allowed_tools": ("Bash(a) b",)},
        "long": {"append_system_prompt": "x" * 200_000},
        "NUL": {"append_system_prompt": "x\0"},
        "settings": {"settings": {"not": float("nan")}},
    }
    async with runtime() as rt:
        with anyio.fail_after(60):
            outcomes = {n: await delegate(rt, Task(agent="helper", prompt="x", **f)) for n, f in wrong.items()}
        assert {name: verdict(o) for name, o in outcomes.items()} == dict.fromkeys(
            wrong, ("failed", "config", False, "request")
        )
        assert not model.journal
        await runs_well(rt, model)


# --- Where it works


async def test_a_directory_that_is_gone(runtime: OpenRuntime, model: ModelServer, project: Path) -> None:
    """Also to a process that was there before it went."""
    (project / "sub").mkdir()
    model.rules = [Rule("in sub")]
    async with runtime() as rt:
        with anyio.fail_after(60):
            first = await delegate(rt, Task(agent="helper", prompt="x", cwd=Path("sub")))
            (project / "sub").rmdir()
            fresh = await delegate(rt, Task(agent="helper", prompt="x", cwd=Path("sub")))
            again = await delegate(rt, Task(agent="helper", prompt="x", session=first.session_id))
        assert first.text == "in sub"
        assert verdict(fresh) == verdict(again) == NOT_STARTED
        assert str(project / "sub") in error_of(fresh)["message"]
        await runs_well(rt, model)


async def test_a_directory_that_was_made_anew(runtime: OpenRuntime, model: ModelServer, project: Path) -> None:
    """A process that is still in the deleted one would work for nothing."""
    (project / "sub").mkdir()
    model.rules = [
        Rule("Made.", when={"tool_result": True}),
        Rule(lambda request: ToolUse("Bash", {"command": f"touch {request.last_user_text}"})),
    ]
    async with runtime() as rt:
        with anyio.fail_after(60):
            first = await delegate(rt, Task(agent="worker", prompt="lost", cwd=Path("sub")))
            shutil.rmtree(project / "sub")
            (project / "sub").mkdir()
            await delegate(rt, Task(agent="worker", prompt="again", session=first.session_id))
            await delegate(rt, Task(agent="worker", prompt="fresh", cwd=Path("sub")))
    assert sorted(path.name for path in (project / "sub").iterdir()) == ["again", "fresh"]


async def test_a_directory_that_goes_while_it_works(
    runtime: OpenRuntime, model: ModelServer, project: Path, held: Held
) -> None:
    (project / "sub").mkdir()
    model.rules = [Rule(held)]
    async with runtime() as rt:
        with anyio.fail_after(60):
            run_id = await submit(rt, Task(agent="helper", prompt="x", cwd=Path("sub")))
            await held.reached.wait()
            (project / "sub").rmdir()
            held.go_on.set()
            outcome = await wait(rt, run_id)
        assert (outcome.status, outcome.text) == ("succeeded", "held")
        await runs_well(rt, model)


async def test_a_home_that_is_gone(runtime: OpenRuntime, model: ModelServer, tmp_path: Path) -> None:
    """The CLI makes itself a new one; the sessions were in the old one."""
    model.rules = [Rule("ok")]
    async with runtime() as rt:
        with anyio.fail_after(60):
            first = await delegate(rt, Task(agent="helper", prompt="x"))
    assert first.text == "ok"
    (tmp_path / "home").rename(tmp_path / "old")
    async with runtime() as rt:
        with anyio.fail_after(60):
            again = await delegate(rt, Task(agent="helper", prompt="x", session=first.session_id))
        assert verdict(again) == ("failed", "session_not_found", False, "session")
        await runs_well(rt, model)


# --- The host under it

DRIVER = """\
import json, resource, sys, anyio
from pathlib import Path
from orchestrator.config import load_config
from orchestrator.delegation import delegate
from orchestrator.errors import OrchestratorError
from orchestrator.runtime import open_runtime
from orchestrator.task import Task

def limit_files(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

async def ask(rt, **task):
    try:
        outcome = await delegate(rt, Task(**{"agent": "helper", "prompt": "x", **task}))
    except OrchestratorError as error:
        print(json.dumps({"refused": error.to_dict()}), flush=True)
    else:
        print(outcome.model_dump_json(), flush=True)

async def main(project, overrides, environ):
    config = load_config(project_dir=Path(project), environ={}, overrides=overrides)
    async with open_runtime(config, environ=environ) as rt:
        for line in STEPS:
            await line(rt)

"""


class Driven:
    """A program with a runtime of its own, in a process of its own: it can be stopped, and its world changed."""

    def __init__(self, project: Path, overrides: dict[str, Any], environ: dict[str, str]) -> None:
        self._arguments = json.dumps([str(project), overrides, environ])
        self._environ = environ

    def start(self, steps: str, **variables: str) -> Any:
        """``steps`` are functions of the runtime, called one after the other; ``ask`` prints what came of a run."""
        program = f"{DRIVER}\nSTEPS = [{steps}]\nanyio.run(main, *json.loads(sys.argv[1]))\n"
        return anyio.open_process(
            [sys.executable, "-c", program, self._arguments],
            cwd=Path(__file__).parent.parent,
            env={**self._environ, **variables},
            stdin=subprocess.DEVNULL,
            stderr=None,
        )


@pytest.fixture
def driven(project: Path, tmp_path: Path, model: ModelServer, environ: dict[str, str]) -> Driven:
    return Driven(project, settings(tmp_path, model.base_url), environ)


async def lines_of(process: anyio.abc.Process) -> list[dict[str, Any]]:
    """All it prints, until it ends."""
    assert process.stdout is not None
    printed = b"".join([chunk async for chunk in process.stdout])
    assert await process.wait() == 0
    return [json.loads(line) for line in printed.splitlines()]


async def test_a_full_disk(driven: Driven, model: ModelServer, tmp_path: Path) -> None:
    """No file may grow: a task is refused before anything is spent. With room again, all is as before."""
    model.rules = [Rule("there is room")]
    steps = """
        lambda rt: ask(rt),
        lambda rt: (limit_files(1024), ask(rt))[1],
        lambda rt: (limit_files(resource.RLIM_INFINITY), ask(rt))[1],
    """
    with anyio.fail_after(60):
        async with await driven.start(steps) as process:
            before, full, after = await lines_of(process)
    assert before["text"] == after["text"] == "there is room"
    assert full["refused"]["code"] == "store"
    assert "disk" in full["refused"]["advice"]
    assert len(model.journal) == 2
    async with open_store(tmp_path / "data" / "runs.db") as store:
        assert {run.id for run in await store.runs()} == {before["run_id"], after["run_id"]}


async def test_a_disk_that_fills_up_while_a_run_works(
    driven: Driven, model: ModelServer, tmp_path: Path, held: Held
) -> None:
    """Whoever waits is told the answer, and the record of it is made up for when there is room again."""
    model.rules = [Rule(held)]
    steps = """
        lambda rt: ask(rt),
        lambda rt: (limit_files(resource.RLIM_INFINITY), ask(rt))[1],
    """
    with anyio.fail_after(60):
        async with await driven.start(steps) as process:
            await held.reached.wait()
            # Of the process itself: what it has started keeps its room.
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1024, resource.RLIM_INFINITY))
            held.go_on.set()
            full, after = await lines_of(process)
    assert (full["status"], full["text"]) == ("succeeded", "held")
    assert after["text"] == "held"
    async with open_store(tmp_path / "data" / "runs.db") as store:
        stored = [await store.run(outcome["run_id"]) for outcome in (full, after)]
    assert [(run.status, run.text) for run in stored] == [("succeeded", "held")] * 2


async def test_output_that_is_not_read_for_a_while(driven: Driven, model: ModelServer, held: Held) -> None:
    """The CLI waits at a full pipe, and nothing of what it says is lost."""
    model.rules = [Rule(held)]
    held.text = Text("0123456789", repeat=300_000)
    with anyio.fail_after(60):
        async with await driven.start("lambda rt: ask(rt)") as process:
            await held.reached.wait()
            process.send_signal(signal.SIGSTOP)
            held.go_on.set()
            await anyio.sleep(2)  # not for anything to happen: the while in which nobody reads
            process.send_signal(signal.SIGCONT)
            [outcome] = await lines_of(process)
    assert outcome["status"] == "succeeded"
    assert outcome["text"] == "0123456789" * 300_000


#: Adds what the file named by JUMP says, in seconds, to the time of day, and leaves the other clocks as they are.
JUMPING_CLOCK = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>

static long jump(void) {
    long seconds = 0;
    FILE *file = fopen(getenv("JUMP"), "r");
    if (file) { if (fscanf(file, "%ld", &seconds) != 1) seconds = 0; fclose(file); }
    return seconds;
}
int clock_gettime(clockid_t which, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int result = real(which, now);
    if (which == CLOCK_REALTIME) now->tv_sec += jump();
    return result;
}
time_t time(time_t *out) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (out) *out = now.tv_sec;
    return now.tv_sec;
}
"""


@pytest.mark.skipif(shutil.which("cc") is None or sys.platform != "linux", reason="needs a C compiler on Linux")
@pytest.mark.parametrize("seconds", [86_400, -86_400])
async def test_the_clock_is_set_while_a_run_works(
    driven: Driven, model: ModelServer, tmp_path: Path, held: Held, seconds: int
) -> None:
    """A day later, or earlier: the run is as long as it is, and is neither cut off nor let go on for ever."""
    (tmp_path / "clock.c").write_text(JUMPING_CLOCK)
    library, jump = tmp_path / "clock.so", tmp_path / "jump"
    command = ["cc", "-shared", "-fPIC", "-o", str(library), str(tmp_path / "clock.c"), "-ldl"]
    await anyio.run_process(command)
    jump.write_text("0")
    model.rules = [Rule(held, times=1), Rule(Reply("never", delay_s=60))]
    steps = "lambda rt: ask(rt), lambda rt: ask(rt, idle_timeout_s=1)"
    with anyio.fail_after(60):
        async with await driven.start(steps, LD_PRELOAD=str(library), JUMP=str(jump)) as process:
            await held.reached.wait()
            jump.write_text(str(seconds))
            held.go_on.set()
            answered, silent = await lines_of(process)
    assert (answered["status"], answered["text"]) == ("succeeded", "held")
    assert silent["error"]["details"] == {"kind": "idle"}
    assert 0 <= silent["duration_ms"] < 40_000
    assert 0 <= answered["duration_ms"] < 40_000
