"""The runtime: the opened parts, wired here and nowhere else, and the runs that live in it.

A run lives in the runtime's task group, never in the request that asked for it: a caller that goes away cancels
nothing it did not mean to cancel.
"""

import hashlib
import logging
import os
import secrets
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import anyio
from anyio.abc import TaskGroup, TaskStatus

from orchestrator.agents import Catalog, CatalogChange, Root
from orchestrator.backends import DIALECTS
from orchestrator.backends.claude_binary import find_binary
from orchestrator.config import Config, load_config
from orchestrator.conversation import Conversation, Dialect, Spec
from orchestrator.errors import OrchestratorError, RunCancelledError
from orchestrator.events import Event, Events, EventType
from orchestrator.groups import unwrapped
from orchestrator.killing import sweep
from orchestrator.limits import Budget
from orchestrator.outcome import Outcome
from orchestrator.process import connect_process
from orchestrator.progress import Progress
from orchestrator.store import InstanceKind, Run, Store, open_store
from orchestrator.telemetry import Exporter, open_exporter

log = logging.getLogger(__name__)

CANCEL_POLL_SECONDS = 0.5
#: How often a long-lived runtime looks whether the owner of another run has died.
DEAD_OWNER_SECONDS = 15.0


@dataclass(slots=True)
class LiveRun:
    """A run this runtime is working on: how to stop it, what is known so far, what it may spend."""

    row: Run
    budget: Budget
    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)
    ended: anyio.Event = field(default_factory=anyio.Event)
    progress: Progress = field(default_factory=Progress)
    touched: float = 0.0
    messages: int = 0
    answered: bool = False
    verdict: OrchestratorError | None = None
    stop_error: OrchestratorError | None = None
    outcome: Outcome | None = None
    parent: "LiveRun | None" = None

    def touch(self, now: float) -> None:
        """Something happened in this run. A parent waiting for a busy child is not idle either."""
        self.touched = now
        if self.parent is not None:
            self.parent.touch(now)

    def stop(self, error: OrchestratorError) -> None:
        """End the run for the reason given; the first reason counts."""
        if self.stop_error is None:
            self.stop_error = error
        self.scope.cancel()


class Door(Protocol):
    """Where the agents' CLIs reach this runtime: an MCP server on loopback."""

    url: str


OpenDoor = Callable[["Runtime"], AbstractAsyncContextManager[Door]]


class Tokens:
    """Bearer tokens of running agents: which run calls? Only hashes are kept, and only while the run lasts."""

    def __init__(self) -> None:
        self._runs: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self._runs)

    def issue(self, run_id: str) -> str:
        token = secrets.token_urlsafe(32)
        self._runs[_digest(token)] = run_id
        return token

    def run_of(self, token: str) -> str | None:
        return self._runs.get(_digest(token))

    def revoke(self, run_id: str) -> None:
        self._runs = {digest: run for digest, run in self._runs.items() if run != run_id}


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


@dataclass(slots=True)
class Runtime:
    """The opened parts. Verbs (``delegate``, ``run_plan``) and doors take it as their first argument."""

    config: Config
    store: Store
    catalog: Catalog
    events: Events
    exporter: Exporter
    task_group: TaskGroup
    environ: Mapping[str, str]
    tokens: Tokens = field(default_factory=Tokens)
    live: dict[str, LiveRun] = field(default_factory=dict)
    door: Door | None = None
    closing: bool = False
    watch_agents: bool = True
    _open_door: OpenDoor | None = None
    _catalogs: dict[Path, Catalog] = field(default_factory=dict)
    _door_lock: anyio.Lock = field(default_factory=anyio.Lock)
    _slots: dict[int, anyio.CapacityLimiter] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"<Runtime live={len(self.live)} door={self.door.url if self.door else None}>"

    @property
    def home(self) -> Path:
        """HOME of the CLIs: it decides which login they use and which sessions they can continue."""
        configured = self.config.claude.home
        return self.config.resolve(configured) if configured else Path(self.environ.get("HOME") or Path.home())

    def slot(self, depth: int) -> anyio.CapacityLimiter:
        """Bounds CLI processes. One limiter per depth: a parent waiting for its child must not take its place."""
        return self._slots.setdefault(depth, anyio.CapacityLimiter(self.config.limits.max_processes))

    async def agents_of(self, project: Path) -> Catalog:
        """The agents of a project: its folders, the user's, the workspaces'. Read on first need, then watched."""
        if project == self.config.project_dir:
            return self.catalog
        if project not in self._catalogs:
            catalog = Catalog(agent_roots(self.config, project))
            await anyio.to_thread.run_sync(catalog.load)
            if project not in self._catalogs:  # another task may have been quicker
                self._catalogs[project] = catalog
                if self.watch_agents:
                    self.task_group.start_soon(_watch_agents, self, catalog)
        return self._catalogs[project]

    @property
    def dialect(self) -> Dialect:
        return DIALECTS["claude"]

    def connect(self, spec: Spec) -> AbstractAsyncContextManager[Conversation]:
        """Open a conversation. Raises CLINotFoundError when no CLI is installed."""
        found = find_binary(self.config.claude_path, self.environ, self.home)
        assert found.path is not None
        return connect_process(
            spec,
            binary=found.path,
            dialect=self.dialect,
            max_line_bytes=self.config.claude.max_line_bytes,
        )

    async def endpoint(self) -> str | None:
        """The URL agents may call back on; opens the door on first need. None if this runtime has no door."""
        async with self._door_lock:
            if self.door is None and self._open_door is not None:
                self.door = await self.task_group.start(_keep_door, self, self._open_door)
        return self.door.url if self.door else None

    def emit(self, event: EventType, run_id: str | None, /, **data: Any) -> None:
        """Tell the watchers; the keywords are the event's data."""
        self.events.emit(Event(event, run_id, data))


async def _keep_door(rt: Runtime, open_door: OpenDoor, *, task_status: TaskStatus[Door]) -> None:
    async with open_door(rt) as door:
        task_status.started(door)
        await anyio.sleep_forever()


@asynccontextmanager
async def open_runtime(
    config: Config | None = None,
    *,
    kind: InstanceKind = "library",
    open_door: OpenDoor | None = None,
    environ: Mapping[str, str] | None = None,
    watch_agents: bool = True,
) -> AsyncIterator[Runtime]:
    """Open the store, the agents and the telemetry; close them in order, ending every run that still goes on.

    ``open_door`` serves MCP to the agents themselves (``mcp_tools.open_door``); without it they cannot delegate.
    ``environ`` is the environment agents' variables are taken from (default: ours). Runs of processes that died
    are marked ``interrupted`` first, and what they left running is ended.

    Raises ConfigError, StoreError.
    """
    config = config or load_config()
    environ = os.environ if environ is None else environ
    catalog = Catalog(agent_roots(config))
    catalog.load()
    events = Events()
    async with open_store(config.store_path, kind=kind) as store, open_exporter(config, environ) as exporter:
        await clean_up_after_the_dead(store)
        with unwrapped():
            async with anyio.create_task_group() as tg:
                rt = Runtime(
                    config, store, catalog, events, exporter, tg, environ,
                    watch_agents=watch_agents, _open_door=open_door,
                )  # fmt: skip
                tg.start_soon(_watch_cancels, rt)
                if watch_agents:
                    await tg.start(_watch_agents, rt, catalog)
                try:
                    yield rt
                finally:
                    with anyio.CancelScope(shield=True):
                        await close_runs(rt)
                    tg.cancel_scope.cancel()


def agent_roots(config: Config, project: Path | None = None) -> list[Root]:
    """Where agents come from, the first winning: the project's folders, the user's, then workspaces."""
    project = project or config.project_dir
    return [
        *(Root((project / path.expanduser()).resolve(), "project") for path in config.agents.paths),
        Root(config.resolve(config.agents.user_path), "user"),
        *(
            Root(config.resolve(path) / ".claude" / "agents", "workspace", config.resolve(path).name)
            for path in config.agents.workspaces
        ),
    ]


async def close_runs(rt: Runtime) -> None:
    """Cancel what still runs and wait until each run's end is written."""
    rt.closing = True
    live = list(rt.live.values())
    for run in live:
        run.stop(RunCancelledError("the orchestrator is shutting down", retryable=True))
    for run in live:
        await run.ended.wait()


async def clean_up_after_the_dead(store: Store) -> None:
    """Mark the runs of processes that are gone as ``interrupted``, and end what they left running."""
    abandoned = await store.interrupt_abandoned()
    if abandoned:
        killed = await anyio.to_thread.run_sync(sweep, {run.id for run in abandoned})
        log.warning("marked %d abandoned runs as interrupted, ended %d processes of theirs", len(abandoned), killed)


async def _watch_cancels(rt: Runtime) -> None:
    """Act on cancels that other processes asked for through the store, and on processes that died meanwhile."""
    looked = anyio.current_time()
    while True:
        await anyio.sleep(CANCEL_POLL_SECONDS)
        try:
            for run_id in await rt.store.cancels_requested() if rt.live else ():
                if run := rt.live.get(run_id):
                    run.stop(RunCancelledError("cancelled on request"))
            if anyio.current_time() - looked > DEAD_OWNER_SECONDS:
                looked = anyio.current_time()
                await clean_up_after_the_dead(rt.store)
        except OrchestratorError:
            # A store that is busy or full for a moment must not end the runs that work.
            log.warning("could not look for cancels", exc_info=True)


async def _watch_agents(
    rt: Runtime, catalog: Catalog, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED
) -> None:
    def changed(change: CatalogChange) -> None:
        rt.emit("agents.changed", None, **change.model_dump(mode="json"))

    await catalog.watch(on_change=changed, task_status=task_status)
