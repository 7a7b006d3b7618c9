"""Hundreds of runs with real CLIs while everything around them goes wrong, and what must hold when it is over.

    python -m bench.soak [--runs 300] [--seed N] [--limit SECONDS]

Provider faults, cancels, time-outs and SIGKILLs of CLIs are drawn from the seed. In the end every run must have
ended once, with its record complete and consistent, and nothing may be left: no process, no file descriptor, no
file in TMPDIR, no session in use. Prints a report as JSON; exits with 1 if anything did not hold.
"""

import argparse
import json
import os
import random
import secrets
import sqlite3
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import psutil
from anyio.abc import TaskGroup

from bench.place import KEY, bundled_cli
from bench.soak_load import AGENTS, MARKER, Fate, ScriptedModel, fates, kinds
from orchestrator import Outcome, Runtime, Task, keep_warm, load_config, open_runtime
from orchestrator.backends import DIALECTS
from orchestrator.conversation import Conversation, Spec, Turn
from orchestrator.delegation import attend, cancel, submit
from orchestrator.errors import OrchestratorError, SessionBusyError, SessionNotFoundError
from orchestrator.killing import PROCESS_ID_ENV, carriers
from orchestrator.messages import Message
from orchestrator.outcome import ENDED
from orchestrator.process import ProcessConversation, connect_process
from orchestrator.store import Run, SessionRow, StoredMessage
from orchestrator.testing import running_model_server

RUNS = 300
LIMIT_S = 540.0
#: Runs asked for at the same time, processes at the same time, and how many of the former may wait in the queue.
CLIENTS, PROCESSES, QUEUE = 10, 4, 4
#: No run of the soak has a reason to take longer.
HUNG_S = 120.0
#: What every CLI keeps in its TMPDIR for those to come: a folder for each session that has used a shell, and the
#: sockets of those that were killed.
KEPT_BY_CLIS = (f"claude-{os.getuid()}", "cc-socks")


@dataclass
class Soak:
    """The state of one soak: what is to be done, what was found."""

    seed: int
    fates: list[Fate]
    model: ScriptedModel
    defects: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    run_ids: dict[str, str] = field(default_factory=dict)
    sessions: list[str] = field(default_factory=list)
    process_ids: set[str] = field(default_factory=set)
    killed: int = 0

    def defect(self, text: str) -> None:
        self.defects.append(text)
        print(f"DEFECT (seed {self.seed}): {text}", file=sys.stderr, flush=True)


class Killed:
    """A conversation whose CLI is killed when the fate of the run it was given wants that."""

    def __init__(self, inner: ProcessConversation, soak: Soak, tg: TaskGroup) -> None:
        self._inner = inner
        self._soak = soak
        self._tg = tg
        self._process = psutil.Process(inner.pid)

    @property
    def pid(self) -> int:
        return self._inner.pid

    @property
    def stderr_tail(self) -> str:
        return self._inner.stderr_tail

    async def prepare(self, turn: Turn) -> None:
        await self._inner.prepare(turn)

    async def send(self, turn: Turn) -> None:
        found = MARKER.search(turn.prompt)
        assert found is not None
        fate = self._soak.fates[int(found[0][-6:])]
        if fate.kill == "before":
            self.kill()
        elif fate.kill == "during":
            self._tg.start_soon(self.kill_later, fate.after_s / 2)
        await self._inner.send(turn)

    async def receive(self) -> Message:
        return await self._inner.receive()

    async def interrupt(self) -> None:
        await self._inner.interrupt()

    def kill(self) -> None:
        with suppress(psutil.Error):
            self._process.kill()
            self._soak.killed += 1

    async def kill_later(self, seconds: float) -> None:
        await anyio.sleep(seconds)
        self.kill()


def killing(soak: Soak, tg: TaskGroup) -> Callable[..., Any]:
    """Opens real CLIs, some of which die soon."""
    chance = random.Random(soak.seed + 1)
    share = sum(fate.kill == "start" for fate in soak.fates) / max(1, len(soak.fates))

    @asynccontextmanager
    async def open_one(spec: Spec, on_ready: Callable[[], None]) -> AsyncIterator[Conversation]:
        soak.process_ids.add(spec.env[PROCESS_ID_ENV])
        async with connect_process(
            spec,
            binary=bundled_cli(),
            dialect=DIALECTS["claude"],
            max_line_bytes=1 << 24,
            on_ready=on_ready,
        ) as conversation:
            killed = Killed(conversation, soak, tg)
            if chance.random() < share:
                # At once, or when it may be waiting for a run or for its session's next turn.
                tg.start_soon(killed.kill_later, chance.choice((0.0, 1.0, 3.0)))
            yield killed

    return open_one


# --- The runs


async def one_run(rt: Runtime, soak: Soak, fate: Fate) -> None:
    """Submit the run, do to it what its fate says, wait for its end."""
    task = _task(soak, fate)
    try:
        run_id = await submit(rt, task)
    except (SessionBusyError, SessionNotFoundError) as refused:
        soak.refused.append(f"{fate.marker}: {refused.code}")
        return
    except OrchestratorError as refused:
        soak.defect(f"{fate.marker} was refused: {refused.code}: {refused}")
        return
    soak.run_ids[fate.marker] = run_id
    with anyio.move_on_after(HUNG_S) as hung:
        async with anyio.create_task_group() as tg:
            scope = anyio.CancelScope()
            if fate.cancel is not None:
                tg.start_soon(_cancel_later, rt, fate, run_id, scope)
            with scope:
                await _attend(rt, soak, fate, run_id)
            tg.cancel_scope.cancel()
    if task.session is not None and not task.fork:
        soak.sessions.append(task.session)
    if hung.cancelled_caught:
        soak.defect(f"{fate.marker}: run {run_id} had not ended after {HUNG_S:g} s")


def _task(soak: Soak, fate: Fate) -> Task:
    # Which session there is to go on with depends on what has ended by now: that alone is not the seed's.
    chance = random.Random(f"{soak.seed} {fate.marker}")
    # Half of them the newest: its process may still hold it.
    known = soak.sessions[-1:] if chance.random() < 0.5 else soak.sessions
    session = chance.choice(known) if known and fate.mode != "fresh" else None
    if session is not None and fate.mode == "continue":
        soak.sessions.remove(session)  # most go on alone; a fork may still find it in use
    return Task(
        agent=fate.agent,
        prompt=f"Do {fate.marker}.",
        session=session,
        fork=session is not None and fate.mode == "fork",
        timeout_s=fate.timeout_s,
        idle_timeout_s=fate.idle_timeout_s,
        on_full="wait",
    )


async def _attend(rt: Runtime, soak: Soak, fate: Fate, run_id: str) -> None:
    outcome = await attend(rt, run_id)
    soak.outcomes[fate.marker] = outcome
    if outcome.ok and outcome.session_id is not None and fate.mode != "continue":
        soak.sessions.append(outcome.session_id)


async def _cancel_later(rt: Runtime, fate: Fate, run_id: str, caller: anyio.CancelScope) -> None:
    await anyio.sleep(fate.after_s)
    if fate.cancel == "verb":
        await cancel(rt, run_id)
    else:
        caller.cancel()


async def all_runs(rt: Runtime, soak: Soak) -> None:
    clients = anyio.CapacityLimiter(CLIENTS)

    async def client(fate: Fate) -> None:
        async with clients:
            await one_run(rt, soak, fate)
            await anyio.sleep(fate.pause_s)

    async with anyio.create_task_group() as tg:
        for fate in soak.fates:
            tg.start_soon(client, fate)


# --- What must hold


async def check_runs(rt: Runtime, soak: Soak) -> Counter[str]:
    """Every run has ended, its record says how, and what was returned is what is recorded."""
    rows = {run.id: run for run in await rt.store.runs(limit=10 * len(soak.fates) + 10)}
    asked = set(soak.run_ids.values())
    for stray in rows.keys() - asked:
        soak.defect(f"run {stray} is in the store and nobody asked for it")
    for marker, run_id in soak.run_ids.items():
        if (run := rows.get(run_id)) is None:
            soak.defect(f"{marker}: run {run_id} has no row")
            continue
        for problem in problems_of(run, await rt.store.messages(run_id), soak.outcomes.get(marker)):
            soak.defect(f"{marker}: run {run_id} ({run.status}): {problem}")
    for session in await rt.store.sessions(limit=100_000):
        for problem in problems_of_session(session, rows):
            soak.defect(f"session {session.id}: {problem}")
    check_model(soak, rows)
    return Counter(run.status for run in rows.values())


def check_model(soak: Soak, rows: dict[str, Run]) -> None:
    """The model was asked once for every run, in its name, and for nothing else."""
    for marker, seen in soak.model.seen.items():
        if seen.run_ids != {soak.run_ids.get(marker)}:
            soak.defect(f"{marker}: asked in the name of {seen.run_ids}, not of {soak.run_ids.get(marker)}")
    for marker, run_id in soak.run_ids.items():
        if run_id in rows and rows[run_id].status == "succeeded" and not soak.model.seen[marker].good_answers:
            soak.defect(f"{marker}: succeeded although the model never answered")
    for twice in soak.model.twice():
        soak.defect(f"carried out twice: {twice}")
    for stranger in soak.model.strangers:
        soak.defect(f"a request nobody asked for: {stranger}")


def problems_of(run: Run, messages: list[StoredMessage], outcome: Outcome | None) -> list[str]:
    """What is wrong with the record of a run that should have ended."""
    found: list[str] = []
    if run.status not in ENDED or run.ended_us is None:
        return ["has not ended"]
    if run.ended_us < (run.started_us or run.created_us):
        found.append("ended before it began")
    if (run.status == "succeeded") != (run.error is None):
        found.append(f"has error {run.error}")
    if run.error is not None and not (
        run.error.get("code") and run.error.get("message") and run.error.get("advice")
    ):
        found.append(f"its error says too little: {run.error}")
    if run.status == "succeeded" and not run.cost_usd:
        found.append(f"cost {run.cost_usd}")
    if run.status == "interrupted" or (run.error or {}).get("message", "").startswith("internal error"):
        found.append(f"a defect of ours: {run.error}")
    if [message.seq for message in messages] != list(range(1, len(messages) + 1)):
        found.append("messages are missing or out of order")
    if run.status == "succeeded" and [m.type for m in messages].count("result") != 1:
        found.append("not exactly one result among its messages")
    if outcome is not None and outcome != run.outcome():
        found.append(f"returned {outcome}, recorded {run.outcome()}")
    return found


def problems_of_session(session: SessionRow, rows: dict[str, Run]) -> list[str]:
    found: list[str] = []
    if session.locked_by is not None:
        found.append(f"is still held by run {session.locked_by}")
    if session.last_run_id is not None and session.last_run_id not in rows:
        found.append(f"its last run {session.last_run_id} is unknown")
    if session.turns < 1:
        found.append("never had a turn")
    return found


def check_runtime(rt: Runtime, soak: Soak) -> None:
    """Nothing is at work or waits any more."""
    if rt.live:
        soak.defect(f"still live: {sorted(rt.live)}")
    if rt.pool.state.waiting or rt.pool.state.working:
        soak.defect(f"the pool is not at rest: {rt.pool!r}")


def check_file(soak: Soak, path: Path) -> None:
    with sqlite3.connect(path) as connection:
        for pragma in ("integrity_check", "foreign_key_check"):
            found = [row for row in connection.execute(f"PRAGMA {pragma}") if row != ("ok",)]
            if found:
                soak.defect(f"PRAGMA {pragma}: {found[:5]}")
    connection.close()


async def check_nothing_left(soak: Soak, instance_id: str, before: "Before", tmp: Path) -> None:
    """No process, no file descriptor, no file."""
    with anyio.move_on_after(5):  # the kernel may take a moment with what was killed
        while carriers({instance_id, *soak.process_ids}) or before.more_fds():  # noqa: ASYNC110  # nothing tells
            await anyio.sleep(0.05)
    for process in carriers({instance_id, *soak.process_ids, *soak.run_ids.values()}):
        with suppress(psutil.Error):
            soak.defect(f"left running: {process.pid} {process.cmdline()[:3]}")
    for child in psutil.Process().children(recursive=True):
        if child.pid not in before.children:
            soak.defect(f"a child is left: {child}")
    if more := before.more_fds():
        soak.defect(f"{more} file descriptors more than before: {before.new_fds()}")
    left = sorted(path.name for path in tmp.iterdir() if path.name not in KEPT_BY_CLIS)
    if left:
        soak.defect(f"{len(left)} left in TMPDIR: {left[:10]}")


@dataclass
class Before:
    """What this process had before the soak."""

    fds: dict[str, str]
    children: set[int]

    @classmethod
    def now(cls) -> "Before":
        return cls(open_fds(), {child.pid for child in psutil.Process().children(recursive=True)})

    def more_fds(self) -> int:
        return max(0, len(open_fds()) - len(self.fds))

    def new_fds(self) -> dict[str, str]:
        return dict(open_fds().items() - self.fds.items())


def open_fds() -> dict[str, str]:
    """Number → what it is open on. Linux only."""
    found: dict[str, str] = {}
    for link in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # the one used to look
            found[link.name] = os.readlink(link)  # noqa: PTH115  # sockets are no paths
    return found


# --- All of it


async def soak(seed: int, runs: int, limit_s: float, root: Path) -> dict[str, Any]:
    """Do it all below ``root``; returns the report."""
    drawn = fates(seed, runs)
    state = Soak(seed, drawn, ScriptedModel(drawn))
    for name in ("agents", "home", "tmp", "data"):
        (root / name).mkdir()
    for name, text in AGENTS.items():
        (root / "agents" / f"{name}.md").write_text(text)
    await anyio.to_thread.run_sync(carriers, {"a first look, so that what is opened once is open"})
    before, began = Before.now(), time.monotonic()
    async with running_model_server(state.model.answer) as server, anyio.create_task_group() as tg:
        config = load_config(project_dir=root, environ={}, overrides=_settings(root, server.base_url))
        environ = {
            "HOME": str(root / "home"),
            "PATH": "/usr/local/bin:/usr/bin:/bin",
            "TMPDIR": str(root / "tmp"),
        }
        async with open_runtime(config, environ=environ, open_process=killing(state, tg)) as rt:
            tg.start_soon(keep_warm, rt)
            with anyio.move_on_after(limit_s) as limit:
                await all_runs(rt, state)
            if limit.cancelled_caught:
                state.defect(f"not done after {limit_s:g} s: {len(state.outcomes)} of {runs} runs")
            check_runtime(rt, state)
            statuses = await check_runs(rt, state)
            counters, instance_id, path = rt.pool.state.counters, rt.store.instance_id, config.store_path
        if rt.pool.state.workers:
            state.defect(f"the pool kept processes: {rt.pool!r}")
        tg.cancel_scope.cancel()
    check_file(state, path)
    await check_nothing_left(state, instance_id, before, root / "tmp")
    return {
        "seed": seed,
        "seconds": round(time.monotonic() - began, 1),
        "runs": dict(statuses),
        "refused": state.refused,
        "drawn": kinds(drawn),
        "clis_started": len(state.process_ids),
        "clis_killed": state.killed,
        "pool": {name: getattr(counters, name) for name in ("hits", "session_hits", "cold_starts", "refills")},
        "requests": len(server.journal),
        "kept_by_clis": {name: len(list((root / "tmp" / name).rglob("*"))) for name in KEPT_BY_CLIS},
        "defects": state.defects,
    }


def _settings(root: Path, base_url: str) -> dict[str, Any]:
    return {
        "data_dir": str(root / "data"),
        "agents.user_path": str(root / "none"),
        "agents.default_model": "claude-opus-5-5",
        "claude.path": str(bundled_cli()),
        "claude.base_url": base_url,
        "claude.env.ANTHROPIC_API_KEY": KEY,
        "claude.max_retries": 1,
        "claude.stream_idle_timeout_s": 10,
        "limits.max_processes": PROCESSES,
        "limits.max_queue": QUEUE,
        "limits.timeout_s": 60,
        "limits.idle_timeout_s": 45,
        "limits.park": False,
        "pool.warm": {"reader": 1, "sheller": 1},
        "breaker.failure_threshold": 1_000_000,
        "telemetry.enabled": False,
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.soak")
    parser.add_argument("--runs", type=int, default=RUNS)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--limit", type=float, default=LIMIT_S)
    options = parser.parse_args()
    seed = options.seed if options.seed is not None else secrets.randbelow(1_000_000)
    print(f"seed {seed}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(prefix="soak-", ignore_cleanup_errors=True) as folder:
        root = Path(folder).resolve()
        os.environ["TMPDIR"] = str(root / "tmp")
        tempfile.tempdir = None
        report = anyio.run(soak, seed, options.runs, options.limit, root)
    print(json.dumps(report, indent=1))
    return 1 if report["defects"] else 0


if __name__ == "__main__":
    sys.exit(main())
