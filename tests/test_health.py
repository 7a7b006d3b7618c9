"""Health: what the real CLI says about itself, what runs say about the account, and that asking costs nothing."""

import json
import re
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import anyio
import psutil
import pytest
from anyio.abc import SocketAttribute, SocketStream

from orchestrator.config import Config
from orchestrator.delegation import delegate
from orchestrator.health import (
    RECENT_SECONDS,
    STREAK,
    Check,
    HealthChecker,
    HealthStatus,
    Said,
    judge_login,
    judge_runs,
    judge_version,
)
from orchestrator.runtime import Runtime
from orchestrator.store import Run, open_store
from orchestrator.task import Task
from orchestrator.testing import Fault, ModelServer, Reply, Rule
from tests.conftest import DUMMY_KEY, write_agent
from tests.test_cli import Shell

Open = Callable[..., AbstractAsyncContextManager[Runtime]]
Make = Callable[..., Config]

NOW = 1_700_000_000_000_000
CLI = Path("/opt/claude")
HOME = Path("/home/x")


def named(status: HealthStatus) -> dict[str, Check]:
    return {check.name: check for check in status.checks}


def fake_cli(path: Path, script: str) -> Path:
    """A program in place of the CLI; ``script`` is what it does when asked for its login."""
    path.write_text(f'#!/bin/sh\nif [ "$1" = --version ]; then echo "2.1.0 (Claude Code)"; exit; fi\n{script}\n')
    path.chmod(0o755)
    return path


# -- decisions ----------------------------------------------------------------------------------------------


def ended_run(at: int, error: dict[str, Any] | None = None, **more: Any) -> Run:
    """A run that ended ``at`` seconds before NOW."""
    row = {"id": f"{at:016x}", "trace_id": "0" * 32, "root_id": f"{at:016x}", "depth": 1, "kind": "agent"}
    row |= {
        "name": "helper",
        "status": "failed" if error else "succeeded",
        "error": error,
        "cwd": "/",
        "project": "/",
    }
    row |= {"created_us": NOW, "ended_us": NOW - at * 1_000_000, "instance_id": "i"}
    return Run.model_validate(row | more)


def error(code: str, scope: str, *, retryable: bool = False) -> dict[str, Any]:
    return {"code": code, "message": "words", "scope": scope, "retryable": retryable, "advice": "Do that."}


AUTH = error("authentication", "account")
BUSY = error("rate_limit", "account", retryable=True)
DOWN = error("overloaded", "provider", retryable=True)
TASK = error("max_turns", "request")


@pytest.mark.parametrize(
    ("latest", "level", "found"),
    [
        ([], "ok", "none yet"),
        ([ended_run(5)], "ok", "1 looked at"),
        ([ended_run(5, AUTH), ended_run(9)], "problem", "0 min ago: authentication: words"),
        ([ended_run(5), ended_run(9, AUTH)], "ok", "2 looked at"),
        ([ended_run(5, TASK), ended_run(130, AUTH)], "problem", "2 min ago: authentication"),
        ([ended_run(int(RECENT_SECONDS) + 1, AUTH)], "warning", "15 min ago: authentication"),
        ([ended_run(5, BUSY)], "warning", "rate_limit"),
        ([ended_run(5, DOWN)] * (STREAK - 1), "ok", "looked at"),
        ([ended_run(5, DOWN)] * STREAK, "warning", f"{STREAK} in a row failed outside of the task"),
        ([ended_run(5, DOWN), ended_run(6), *[ended_run(7, DOWN)] * STREAK], "ok", "looked at"),
        ([ended_run(5, TASK)] * 10, "ok", "10 looked at"),
        ([ended_run(5, AUTH, kind="plan")], "ok", "none yet"),
        ([ended_run(5, AUTH, ended_us=None)], "ok", "none yet"),
    ],
)
def test_the_latest_runs_tell_how_the_account_stands(latest: list[Run], level: str, found: str) -> None:
    check = judge_runs(latest, NOW)
    assert (check.level, check.name) == (level, "recent runs")
    assert found in check.found
    assert check.advice == ("" if level == "ok" else "Do that.")


@pytest.mark.parametrize(
    ("said", "level", "found"),
    [
        (Said(0, "2.1.327 (Claude Code)\n"), "ok", "2.1.327 (Claude Code) at /opt/claude (found by PATH)"),
        (Said(0, "3.0.0"), "ok", "3.0.0"),
        (Said(0, "2.0.77 (Claude Code)"), "warning", "2.0.77"),
        (Said(0, "hello"), "problem", "hello"),
        (Said(0), "problem", "exit code 0"),
        (Said(127, "", "no node"), "problem", "exit code 127: 'no node'"),
        (Said(why="no answer within 10 s"), "problem", "no answer within 10 s"),
    ],
)
def test_a_version_is_read_and_judged(said: Said, level: str, found: str) -> None:
    check = judge_version(CLI, "PATH", said)
    assert (check.level, bool(check.advice)) == (level, level != "ok")
    assert found in check.found


@pytest.mark.parametrize(
    ("said", "level"),
    [
        (Said(0, '{"loggedIn": true, "authMethod": "api_key"}'), "ok"),
        (Said(1, '{"loggedIn": false, "authMethod": "none"}'), "problem"),
        (Said(1, "", "unknown command auth"), "warning"),
        (Said(0, "[]"), "warning"),
        (Said(why="no answer within 20 s"), "warning"),
    ],
)
def test_a_login_is_what_the_cli_says_and_nothing_is_concluded_from_silence(said: Said, level: str) -> None:
    assert judge_login(said, HOME, CLI).level == level


def test_a_warning_is_no_illness() -> None:
    assert HealthStatus.of([Check("a", "ok", ""), Check("b", "warning", "")]).healthy
    assert not HealthStatus.of([Check("a", "ok", ""), Check("b", "problem", "")]).healthy


# -- the real CLI -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("env", "method"),
    [
        ({}, None),
        ({"ANTHROPIC_API_KEY": DUMMY_KEY}, "api_key"),
        ({"CLAUDE_CODE_OAUTH_TOKEN": "sk-ant-oat-test-loopback"}, "oauth_token"),
        ({"ANTHROPIC_AUTH_TOKEN": "test-loopback"}, "oauth_token"),
    ],
)
async def test_a_check_sends_nothing_anywhere(
    make_config: Make, environ: dict[str, str], env: dict[str, str], method: str | None
) -> None:
    """The provider's address and the proxy are a listener of ours: whatever the CLI sends would arrive there."""
    arrived: list[SocketStream] = []

    async def arrive(stream: SocketStream) -> None:
        arrived.append(stream)
        await stream.aclose()

    async with await anyio.create_tcp_listener(local_host="127.0.0.1") as listener, anyio.create_task_group() as tg:
        tg.start_soon(listener.serve, arrive)
        url = f"http://127.0.0.1:{listener.extra(SocketAttribute.local_port)}"
        config = make_config(claude__base_url=url)
        config = config.model_copy(update={"claude": config.claude.model_copy(update={"env": env})})
        with anyio.fail_after(60):
            status = await HealthChecker(config, {**environ, "HTTPS_PROXY": url, "HTTP_PROXY": url}).check()
            async with await anyio.connect_tcp("127.0.0.1", listener.extra(SocketAttribute.local_port)) as probe:
                with pytest.raises(anyio.EndOfStream):
                    await probe.receive()
        tg.cancel_scope.cancel()
    assert len(arrived) == 1, "the probe alone: it would have come after anything of the CLI"
    checks = named(status)
    assert status.healthy == (method is not None)
    assert re.match(r"2\.1\.\d+ \(Claude Code\) at ", checks["Claude Code CLI"].found)
    assert checks["login"].found.partition(" ")[0] == (method or "the")
    assert ("auth login" in checks["login"].advice) == (method is None)
    assert checks["recent runs"].found == "none yet"


async def test_a_refused_login_shows_until_a_run_succeeds(
    runtime: Open, make_config: Make, environ: dict[str, str], model: ModelServer
) -> None:
    """The CLI says it has a login; only a run finds out what it is worth."""
    model.rules = [Rule(Reply(fault=Fault(status=401, error_type="authentication_error")))]
    with anyio.fail_after(90):
        async with runtime() as rt:
            checker = HealthChecker(make_config(), environ, store=rt.store)
            assert (await checker.check()).healthy
            refused = await delegate(rt, Task(agent="helper", prompt="go"))
            sick = await checker.check()
            asked = len(model.journal)
            model.rules = [Rule("ok")]
            assert (await delegate(rt, Task(agent="helper", prompt="again"))).ok
            well = await checker.check()
    assert len(model.journal) == asked + 1, "checks ask no model"
    assert named(sick)["login"].level == "ok"
    assert named(sick)["recent runs"].level == "problem"
    assert f"run {refused.run_id} failed 0 min ago: authentication" in named(sick)["recent runs"].found
    assert not sick.healthy
    assert well.healthy
    assert named(well)["recent runs"].found == "2 looked at"


# -- the store ----------------------------------------------------------------------------------------------


async def test_a_store_that_cannot_be_used_is_a_problem(make_config: Make, environ: dict[str, str]) -> None:
    config = make_config()
    config.data_path.write_text("not a folder")
    with anyio.fail_after(60):
        status = await HealthChecker(config, environ).check()
    assert named(status)["store"].level == "problem"
    assert named(status)["store"].advice
    assert named(status)["login"].level == "ok", "one problem hides no other"
    assert not status.healthy


async def test_a_store_that_takes_no_writes_is_a_problem(make_config: Make, environ: dict[str, str]) -> None:
    config = make_config()
    async with open_store(config.store_path) as store:
        with anyio.fail_after(60):
            assert (await HealthChecker(config, environ, store=store).check()).healthy
            assert await store.runs() == []
    with anyio.fail_after(60):
        status = await HealthChecker(config, environ, store=store).check()
    assert "closed" in named(status)["store"].found
    assert not status.healthy


# -- waiting and watching -----------------------------------------------------------------------------------


async def test_waiting_ends_when_all_is_well(make_config: Make, environ: dict[str, str], tmp_path: Path) -> None:
    asked, no, yes = tmp_path / "asked", '{"loggedIn": false}', '{"loggedIn": true}'
    script = f"if [ -e {asked} ]; then echo '{yes}'; else touch {asked}; echo '{no}'; fi"
    cli = fake_cli(tmp_path / "claude", script)
    checker = HealthChecker(make_config(claude__path=str(cli)), environ)
    with anyio.fail_after(60):
        status = await checker.wait_healthy(timeout=50, every=0.01)
    assert asked.exists(), "it was not well at first"
    assert status.healthy
    assert checker.latest == status


async def test_waiting_ends_when_the_time_is_over(
    make_config: Make, environ: dict[str, str], tmp_path: Path
) -> None:
    cli = fake_cli(tmp_path / "claude", "echo '{\"loggedIn\": false}'; exit 1")
    with anyio.fail_after(60):
        status = await HealthChecker(make_config(claude__path=str(cli)), environ).wait_healthy(2.0, every=0.01)
    assert not status.healthy
    assert status.checks


async def test_a_cli_that_hangs_is_given_up_and_ended(
    make_config: Make, environ: dict[str, str], tmp_path: Path
) -> None:
    pid = tmp_path / "pid"
    cli = fake_cli(tmp_path / "claude", f"echo $$ > {pid}; exec sleep 600")
    with anyio.fail_after(60):
        status = await HealthChecker(make_config(claude__path=str(cli)), environ).wait_healthy(timeout=6)
    assert [check.found for check in status.checks] == ["gave no answer within 6 s"]
    assert not status.healthy
    assert not psutil.pid_exists(int(pid.read_text()))


async def test_watching_tells_what_changed(make_config: Make, environ: dict[str, str], tmp_path: Path) -> None:
    login = tmp_path / "login"
    login.write_text('{"loggedIn": true}')
    cli = fake_cli(tmp_path / "claude", f"cat {login}")
    checker = HealthChecker(make_config(claude__path=str(cli)), environ)
    told: list[HealthStatus] = []
    heard = anyio.Event()

    def tell(status: HealthStatus) -> None:
        told.append(status)
        heard.set()

    with anyio.fail_after(60):
        async with anyio.create_task_group() as tg:
            await tg.start(lambda *, task_status: checker.watch(0.01, on_change=tell, task_status=task_status))
            assert checker.latest is not None
            assert checker.latest.healthy
            (tmp_path / "next").write_text('{"loggedIn": false}')
            (tmp_path / "next").rename(login)
            await heard.wait()
            tg.cancel_scope.cancel()
    assert [status.healthy for status in told] == [False]


# -- orchestrator doctor ------------------------------------------------------------------------------------


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    shell = Shell(tmp_path)
    (shell.project / "agents").mkdir()
    write_agent(shell.project, "helper", tools="Read")
    shell.env["ORCHESTRATOR_CLAUDE__ENV"] = json.dumps({"ANTHROPIC_API_KEY": DUMMY_KEY})
    return shell


def test_doctor_shows_the_health_and_more(shell: Shell) -> None:
    checks = {check["name"]: check for check in shell.json("doctor")}
    assert {"orchestrator", "Claude Code CLI", "login", "store", "recent runs", "agents", "server"} <= checks.keys()
    assert checks["store"]["found"].endswith("runs.db, 0 runs")
    assert checks["recent runs"] == {"name": "recent runs", "level": "ok", "found": "none yet", "advice": ""}
    said = shell.run("doctor").stdout
    assert "✓ recent runs: none yet" in said


def test_doctor_exits_with_1_when_the_store_is_none(shell: Shell) -> None:
    (shell.project / ".data").write_text("not a folder")
    said = shell.run("doctor", code=1).stdout
    assert "✗ store: " in said
    assert "✓ login: api_key" in said


def test_doctor_names_what_a_required_sandbox_lacks(shell: Shell) -> None:
    write_agent(shell.project, "caged", tools="Bash", sandbox="required")
    shell.env["PATH"] = str(shell.project)
    fake_cli(shell.project / "bwrap", "")
    checks = {check["name"]: check for check in shell.json("doctor")}
    assert checks["sandbox"]["level"] == "warning"
    assert checks["sandbox"]["found"] == "socat not found: caged cannot run"
    fake_cli(shell.project / "socat", "")
    checks = {check["name"]: check for check in shell.json("doctor")}
    assert checks["sandbox"] == {"name": "sandbox", "level": "ok", "found": "required by caged", "advice": ""}
