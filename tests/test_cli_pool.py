"""``orchestrator pool``: the state of a real server's pool, for people, for programs, and where there is none."""

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from pathlib import Path
from typing import Any

import anyio
import httpx2
import psutil
import pytest
from rich.console import Console

from mcp_tools import open_doors
from orchestrator.cli.pool import pool_view
from orchestrator.delegation import delegate
from orchestrator.runtime import Runtime
from orchestrator.task import Task
from orchestrator.testing import ModelServer, Rule
from tests.conftest import DUMMY_KEY, write_agent
from tests.test_cli import Shell

TOKEN = "the-token-of-the-test"


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    shell = Shell(tmp_path)
    (shell.project / "agents").mkdir()
    write_agent(shell.project, "helper", tools="Read", body="You are the helper.")
    return shell


@contextmanager
def serving(shell: Shell) -> Iterator["subprocess.Popen[str]"]:
    """A server with one warm process, which never gets a prompt."""
    path = shell.project / "orchestrator.yaml"
    own = f"claude:\n  base_url: http://127.0.0.1:9\n  env: {{ANTHROPIC_API_KEY: {DUMMY_KEY}}}\n"
    path.write_text(path.read_text().replace("claude:\n", own) + "pool:\n  warm: {helper: 1}\n")
    server = shell.start("serve")
    try:
        assert server.stderr is not None
        assert server.stderr.readline().startswith("serving http://127.0.0.1:")
        yield server
    finally:
        server.send_signal(signal.SIGTERM)
        server.communicate(timeout=60)


def said(report: dict[str, Any], width: int = 200) -> str:
    out = Console(width=width, color_system=None, force_terminal=False)
    with out.capture() as capture:
        out.print(pool_view(report))
    return capture.get()


# -- the report over HTTP -----------------------------------------------------------------------------------


async def test_the_report_needs_the_token_and_tells_of_real_processes(rt: Runtime, model: ModelServer) -> None:
    model.rules = [Rule("hello")]
    outcome = await delegate(rt, Task(agent="helper", prompt="the secret question"))
    async with open_doors(rt, token=TOKEN) as doors, httpx2.AsyncClient() as http:
        url = doors.url.removesuffix("/mcp") + "/pool"
        assert (await http.get(url)).status_code == 401
        assert (await http.get(url, headers={"authorization": "Bearer wrong"})).status_code == 401
        good = {"authorization": f"Bearer {TOKEN}"}
        assert (await http.get(url, headers={**good, "host": "rebound.example"})).status_code == 421
        report = (await http.get(url, headers=good)).json()
    [held] = [worker for worker in report["workers"] if worker["phase"] == "held"]
    assert (held["agent"], held["session_id"], held["turns"]) == ("helper", outcome.session_id, 1)
    assert held["pid"] in {child.pid for child in psutil.Process().children()}
    assert held["run_id"] is None
    assert report["counters"]["cold_starts"] == 1
    assert report["queue"] == {"length": 0, "max": rt.config.limits.max_queue}
    assert report["limits"]["max_processes"] == rt.config.limits.max_processes
    assert report["provider"]["circuit"]["state"] == "closed"
    assert (report["provider"]["usage_limit"], report["provider"]["parked"]) == (None, 0)
    assert "secret" not in json.dumps(report)


async def test_who_works_and_who_waits(
    runtime: Callable[..., AbstractAsyncContextManager[Runtime]], model: ModelServer
) -> None:
    opened = anyio.Event()

    async def answer(_: Any) -> str:
        await opened.wait()
        return "at last"

    model.rules = [Rule(answer)]
    async with (
        runtime(limits__max_processes=1) as rt,
        open_doors(rt, token=TOKEN) as doors,
        httpx2.AsyncClient(headers={"authorization": f"Bearer {TOKEN}"}) as http,
        anyio.create_task_group() as tg,
    ):
        tg.start_soon(delegate, rt, Task(agent="helper", prompt="first"))
        await model.wait_for("first")
        with rt.events.watch() as events:
            tg.start_soon(delegate, rt, Task(agent="helper", prompt="second"))
            with anyio.fail_after(30):
                async for event in events:
                    if event.type == "pool.waiting":
                        break
        report = (await http.get(doors.url.removesuffix("/mcp") + "/pool")).json()
        opened.set()
    assert (report["working"], report["queue"]["length"], report["counters"]["waits"]) == (1, 1, 1)
    [busy] = [worker for worker in report["workers"] if worker["phase"] == "busy"]
    assert busy["run_id"] != event.run_id
    assert len(busy["run_id"]) == 16


# -- the command --------------------------------------------------------------------------------------------


def test_a_server_is_shown_and_watched(shell: Shell) -> None:
    with serving(shell) as server:
        watch = shell.start("pool", "--watch", "--json")
        assert watch.stdout is not None
        for line in watch.stdout:
            report = json.loads(line)
            if report["workers"] and not report["workers"][0]["starting"]:
                break
        assert report["server"]["pid"] == server.pid
        [warm] = report["workers"]
        assert (warm["agent"], warm["phase"], report["counters"]["refills"]) == ("helper", "idle", 1)
        assert psutil.Process(warm["pid"]).ppid() == server.pid

        table = shell.run("pool").stdout
        assert "0 of 8 at work · 0 waiting" in table
        assert f"server {server.pid}, up " in table
        assert "○ warm" in table
        assert str(warm["pid"]) in table
        assert "started ahead  1" in table
        assert shell.json("pool")["workers"][0]["pid"] == warm["pid"]

        watch.send_signal(signal.SIGINT)
        _, err = watch.communicate(timeout=30)
        assert (watch.returncode, err) == (0, "")

        watch = shell.start("pool", "--watch")
        assert watch.stdout is not None
        assert watch.stdout.readline().startswith("pool  ")
    # The server has ended: that is told, not waited out.
    _, err = watch.communicate(timeout=30)
    assert watch.returncode == 1
    assert err.startswith("error: ")
    assert "orchestrator serve" in err


def test_without_a_server_one_is_told_how_to_start_it(shell: Shell) -> None:
    for options in ([], ["--json"], ["--watch"]):
        done = shell.run("pool", *options, code=1)
        assert f"error: no server runs for {shell.project / '.data'}" in done.stderr
        assert "orchestrator serve" in done.stderr
        assert "Traceback" not in done.stderr
        assert done.stdout == ""


def test_a_server_that_does_not_answer_is_named(shell: Shell) -> None:
    data = shell.project / ".data"
    data.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/mcp"
    state = {"pid": os.getpid(), "url": url, "line_port": 1, "token": "t", "version": "0", "started_us": 0}
    (data / "server.json").write_text(json.dumps(state))
    done = shell.run("pool", code=1)
    assert f"process {os.getpid()} at {url}" in done.stderr
    assert "does not answer: " in done.stderr
    assert f"kill {os.getpid()}" in done.stderr


def test_a_server_that_refuses_is_named_and_no_proxy_is_asked(shell: Shell) -> None:
    shell.env["http_proxy"] = "http://127.0.0.1:9"
    with serving(shell):
        assert shell.json("pool")["queue"]["length"] == 0
        file = shell.project / ".data" / "server.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "token": "another"}))
        assert "answered with HTTP status 401" in shell.run("pool", code=1).stderr


# -- what people see ----------------------------------------------------------------------------------------


def a_worker(number: int, phase: str, **more: Any) -> dict[str, Any]:
    return {
        "id": number, "pid": 4000 + number, "agent": f"agent{number}", "model": "claude-sonnet-5-5", "phase": phase,
        "starting": False, "run_id": None, "parent_id": None, "session_id": None, "turns": 0, "age_s": 75.0,
        "phase_s": 2.5, "memory_mb": 100.4, **more,
    }  # fmt: skip


def a_report(*workers: dict[str, Any], **counters: Any) -> dict[str, Any]:
    none = dict.fromkeys(("hits", "session_hits", "cold_starts", "refills", "waits", "refused"), 0)
    return {
        "server": {"pid": 7, "url": "http://x/mcp", "version": "0", "up_s": 3.0},
        "working": 1,
        "queue": {"length": 2, "max": 100},
        "provider": {"circuit": {"state": "closed"}, "usage_limit": None, "parked": 0},
        "memory_mb": 201.0,
        "limits": {"max_processes": 8, "memory_mb": 1000.0},
        "counters": {**none, "retired": {}, **counters},
        "workers": list(workers),
    }


def test_processes_are_in_the_order_of_interest_and_fit_a_terminal() -> None:
    report = a_report(
        a_worker(1, "idle"),
        a_worker(2, "idle", starting=True, pid=None, memory_mb=None),
        a_worker(3, "held", session_id="0f3c2b1a-1111-2222"),
        a_worker(4, "busy", run_id="ab12cd34ef56ab12"),
        a_worker(5, "ending", memory_mb=None),
    )
    lines = said(report, width=80).splitlines()
    assert "~201 of 1000 MB" in lines[0]
    assert [line.split()[:2] for line in lines[3:8]] == [
        ["●", "works"], ["○", "warm"], ["○", "starting"], ["◐", "session"], ["■", "ending"],
    ]  # fmt: skip
    assert lines[3].split()[2:] == ["2.5s", "agent4", "sonnet-5-5", "ab12cd34ef56ab12", "1m15s", "100", "4004"]
    assert "session 0f3c2b1a" in lines[6]
    assert "…" not in "".join(lines)


def test_a_sum_that_is_measured_throughout_is_no_estimate() -> None:
    assert "· 201 of 1000 MB" in said(a_report(a_worker(1, "busy"), a_worker(2, "ending", memory_mb=None)))


def test_it_is_said_why_no_run_begins() -> None:
    report = a_report()
    assert "circuit" not in said(report)
    report["provider"] = {
        "circuit": {"state": "open", "reason": "overloaded", "retry_after": 12.0},
        "usage_limit": {"kind": "five_hour", "resets_at": time.time() + 60},
        "parked": 1,
    }
    text = said(report)
    assert "circuit open after overloaded errors of the provider; the next run may try in 12.0s" in text
    assert "usage limit five_hour reached, until " in text
    assert "1 run waits for it" in text
    report["provider"]["circuit"] = {"state": "half_open", "reason": "overloaded", "retry_after": 0.0}
    assert "circuit half open after overloaded errors of the provider; the next run tries it" in said(report)


def test_every_counter_is_told() -> None:
    retired = {"expired": 31, "memory": 32, "of_another_version": 33}
    text = said(
        a_report(hits=11, session_hits=12, cold_starts=13, refills=14, waits=15, refused=16, retired=retired)
    )
    assert "No processes now" in text
    for line in (
        "runs served    36: 11 by a warm process, 12 by their session's, 13 by a new one",
        "had to wait    15",
        "refused        16",
        "started ahead  14",
        "ended          96: 31 unused for too long, 32 to free memory, 33 of_another_version",
    ):
        assert line in text, text
