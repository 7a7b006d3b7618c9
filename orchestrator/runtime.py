"""The runtime: the opened parts, wired here and nowhere else, and the runs that live in it.

A run lives in the runtime's task group, never in the request that asked for it: a caller that goes away cancels
nothing it did not mean to cancel.
"""

import logging
import os
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import anyio
import psutil
from anyio.abc import TaskGroup, TaskStatus
from pydantic import ValidationError

from orchestrator.agents import Catalog, CatalogChange, Root
from orchestrator.backends import DIALECTS
from orchestrator.backends.claude import environment
from orchestrator.backends.claude_binary import find_binary
from orchestrator.backends.claude_files import fingerprint
from orchestrator.breakers import Breaker, Permit, State
from orchestrator.breakers import BreakerConfig as BreakerSettings
from orchestrator.cgroups import cgroup_support
from orchestrator.config import Config, load_config
from orchestrator.conversation import Conversation, Dialect, Spec
from orchestrator.errors import CLINotFoundError, ConfigError, OrchestratorError, RunCancelledError
from orchestrator.events import BreakerEvent, Event, Events, EventType, PoolEvent
from orchestrator.groups import unwrapped
from orchestrator.killing import reap, sweep
from orchestrator.limits import Budget
from orchestrator.logs import redact_logs
from orchestrator.messages import RateLimitEvent
from orchestrator.outcome import Outcome
from orchestrator.parking import ReachedLimits, Waits, account_of
from orchestrator.pool import OpenProcess, Pool
from orchestrator.pool_state import PoolLimits, PoolState
from orchestrator.process import connect_process
from orchestrator.progress import Progress
from orchestrator.questions import OpenQuestion, Policy
from orchestrator.rates import Limiter, Rate, SlidingWindow
from orchestrator.redaction import Redactor, secrets_of
from orchestrator.retries import Retry
from orchestrator.store import InstanceKind, Run, Store, open_store
from orchestrator.streams import Broadcast
from orchestrator.telemetry import Exporter, open_exporter
from orchestrator.tokens import Tokens

log = logging.getLogger(__name__)

CANCEL_POLL_SECONDS = 0.5
#: How often a long-lived runtime looks whether the owner of another run has died.
DEAD_OWNER_SECONDS = 15.0


@dataclass(slots=True)
class LiveRun:
    """A run this runtime is working on: how to stop it, what is known so far, what it may spend.

    ``session_cwd`` is the directory its session was begun in, ``fork_at`` the message a fork of it ends with.
    ``questions`` are those that wait for an answer, by their ids, ``settled`` who or what has answered the others.
    ``policy`` is what its task says of questions, ``answers`` whether its agent can answer those of runs below.
    """

    row: Run
    budget: Budget
    session_cwd: str = ""
    fork_at: str | None = None
    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)
    ended: anyio.Event = field(default_factory=anyio.Event)
    progress: Progress = field(default_factory=Progress)
    said: Broadcast = field(default_factory=Broadcast)
    touched: float = 0.0
    began: float | None = None
    messages: int = 0
    answered: bool = False
    commands: bool = False
    questions: dict[str, OpenQuestion] = field(default_factory=dict)
    settled: dict[str, str] = field(default_factory=dict)
    policy: Policy | None = None
    answers: bool = False
    priority: int = 0
    charged: tuple[float, int, int] = (0.0, 0, 0)
    verdict: OrchestratorError | None = None
    stop_error: OrchestratorError | None = None
    outcome: Outcome | None = None
    parent: "LiveRun | None" = None
    rate_limit: RateLimitEvent | None = None
    permit: Permit | None = None
    waits: Waits = field(default_factory=Waits)
    earlier: list[Progress] = field(default_factory=list)
    _paused_at: float = 0.0

    @property
    def attempts(self) -> list[Progress]:
        """Every turn of the run: those that a usage limit ended, and the one it is in."""
        return [*self.earlier, self.progress]

    def lineage(self) -> "Iterator[LiveRun]":
        """The run itself, then those above it, from the nearest to the root."""
        yield self
        if self.parent is not None:
            yield from self.parent.lineage()

    def pause(self, now: float, seconds: float) -> None:
        """The last ``seconds`` were a wait for a limit's end: no time of this run's, nor of those above it."""
        self.touched = now
        if self.budget.began is not None:
            self.budget.began += max(0.0, now - max(self._paused_at, now - seconds))
        self._paused_at = now
        if self.parent is not None:
            self.parent.pause(now, seconds)

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


_BREAKER_EVENTS: Mapping[State, BreakerEvent] = {
    "closed": "breaker.closed",
    "open": "breaker.open",
    "half_open": "breaker.half_open",
}

OpenDoor = Callable[["Runtime"], AbstractAsyncContextManager[Door]]


@dataclass
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
    unwritten: dict[str, Run] = field(default_factory=dict)
    door: Door | None = None
    closing: bool = False
    draining: bool = False
    reached: ReachedLimits = field(default_factory=ReachedLimits)
    watch_agents: bool = True
    _open_door: OpenDoor | None = None
    _catalogs: dict[Path, Catalog] = field(default_factory=dict)
    _door_lock: anyio.Lock = field(default_factory=anyio.Lock)
    _pool: Pool | None = None
    _found: Path | None = None

    def __repr__(self) -> str:
        return f"<Runtime live={len(self.live)} door={self.door.url if self.door else None}>"

    @cached_property
    def home(self) -> Path:
        """HOME of the CLIs: it decides which login they use and which sessions they can continue."""
        configured = self.config.claude.home
        return self.config.resolve(configured) if configured else Path(self.environ.get("HOME") or Path.home())

    @cached_property
    def account(self) -> str:
        """Which provider account the CLIs use: a hash that tells nothing of the credential."""
        claude = self.config.claude
        env = environment(self.environ, home=self.home, pass_env=claude.pass_env, extra=claude.env)
        return account_of(env, self.home, claude.base_url)

    @cached_property
    def breaker(self) -> Breaker:
        """Lets no run begin for a while when those before failed, one after the other."""

        def tell(state: State) -> None:
            stats = self.breaker.get_stats(anyio.current_time())
            log.warning("provider %s: circuit %s (%s)", stats.name, state.replace("_", " "), stats.reason)
            self.emit(_BREAKER_EVENTS[state], None, **asdict(stats))

        return Breaker(BreakerSettings(**self.config.breaker.model_dump()), f"claude/{self.account}", tell)

    @cached_property
    def limiter(self) -> Limiter:
        """The rate at which runs begin."""
        rate = self.config.limits.rate
        return Limiter(*([SlidingWindow(Rate.parse(rate))] if rate else []))

    @cached_property
    def retry(self) -> Retry:
        """When a turn is given to another process. Raises ConfigError for codes that are never retried."""
        try:
            return Retry(**self.config.retry.model_dump())
        except ValidationError as error:
            problems = "; ".join(problem["msg"] for problem in error.errors())
            raise ConfigError(f"retry: {problems}") from None

    @property
    def pool(self) -> Pool:
        """The CLI processes."""
        assert self._pool is not None, "the pool is opened with the runtime"
        return self._pool

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

    def connect(
        self, spec: Spec, on_ready: Callable[[], None] | None = None
    ) -> AbstractAsyncContextManager[Conversation]:
        """Start a CLI process. Raises CLINotFoundError when no CLI is installed."""
        return connect_process(
            spec,
            binary=self._binary(),
            dialect=self.dialect,
            max_line_bytes=self.config.claude.max_line_bytes,
            on_ready=on_ready,
        )

    def _binary(self) -> Path:
        # Looking everywhere takes as long as all else a run needs: only again when what was found is gone, or the
        # configured path leads elsewhere.
        if self._found is None or self._moved(self._found) or not os.access(self._found, os.X_OK):
            self._found = find_binary(self.config.claude_path, self.environ, self.home).path
        assert self._found is not None
        return self._found

    def _moved(self, found: Path) -> bool:
        if self.config.claude.path is None:
            return False
        try:
            return not os.path.samefile(self.config.absolute(self.config.claude.path), found)  # noqa: PTH121  # quicker
        except OSError:
            return True

    def fingerprint(self, spec: Spec) -> str:
        """The state of the files a process of the spec reads when it starts."""
        try:
            return fingerprint(self._binary(), spec.cwd, spec.env)
        except CLINotFoundError:
            return ""  # starting one will say so

    async def endpoint(self) -> str | None:
        """The URL agents may call back on; opens the door on first need. None if this runtime has no door."""
        async with self._door_lock:
            if self.door is None and self._open_door is not None:
                self.door = await self.task_group.start(_keep_door, self, self._open_door)
        return self.door.url if self.door else None

    def emit(self, event: EventType, run_id: str | None, /, **data: Any) -> None:
        """Tell the watchers; the keywords are the event's data."""
        if self.events.watched:
            self.events.emit(Event(event, run_id, self.store.redact.data(data)))


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
    open_process: OpenProcess | None = None,
) -> AsyncIterator[Runtime]:
    """Open the store, the agents and the telemetry; close them in order, ending every run that still goes on.

    ``open_door`` serves MCP to the agents themselves (``mcp_tools.open_door``); without it they cannot delegate.
    ``environ`` is the environment agents' variables are taken from (default: ours). ``open_process`` opens
    conversations in place of real CLIs (``orchestrator.testing.FakeProcesses``). Runs of processes that died are
    marked ``interrupted`` first, and what they left running is ended.

    Raises ConfigError, StoreError.
    """
    config = config or load_config()
    environ = os.environ if environ is None else environ
    catalog = Catalog(agent_roots(config))
    catalog.load()
    events = Events()
    redact = Redactor([*secrets_of(environ), *secrets_of(config.claude.env)])
    redact_logs(redact)
    async with (
        open_store(config.store_path, kind=kind, redact=redact) as store,
        open_exporter(config, environ, redact=redact) as exporter,
    ):
        await clean_up_after_the_dead(store)
        with unwrapped():
            async with anyio.create_task_group() as tg:
                rt = Runtime(
                    config, store, catalog, events, exporter, tg, environ,
                    watch_agents=watch_agents, _open_door=open_door,
                )  # fmt: skip
                _ = rt.limiter, rt.retry  # a rate that is none, or a code, is told now
                rt._pool = _open_pool(rt, open_process or rt.connect)  # noqa: SLF001  # the one part that needs the others
                exporter.watch_pool(rt.pool.state)
                tg.start_soon(anyio.to_thread.run_sync, cgroup_support)  # tried now, not before the first start
                tg.start_soon(rt.pool.tend)
                tg.start_soon(_watch_cancels, rt)
                if watch_agents:
                    await tg.start(_watch_agents, rt, catalog)
                try:
                    yield rt
                finally:
                    with anyio.CancelScope(shield=True):
                        try:
                            await close_runs(rt)
                            with suppress(OrchestratorError):
                                await write_ends(rt)
                        finally:
                            await rt.pool.close()
                    tg.cancel_scope.cancel()


def _open_pool(rt: Runtime, open_process: OpenProcess) -> Pool:
    limits, pool = rt.config.limits, rt.config.pool
    state = PoolState(
        PoolLimits(
            max_processes=limits.max_processes,
            max_idle=pool.max_idle,
            max_sessions=pool.max_sessions,
            max_starts=pool.max_starts or os.cpu_count() or 1,
            memory_mb=pool.memory_mb or psutil.virtual_memory().total / 2e6,
            idle_s=pool.idle_s,
            session_idle_s=pool.session_idle_s,
            transcripts=open_process == rt.connect,
        )
    )

    def emit(event: PoolEvent, data: Mapping[str, Any]) -> None:
        run_id = data.get("run_id")
        rt.emit(event, run_id, **{name: value for name, value in data.items() if name != "run_id"})

    return Pool(
        rt.task_group,
        state,
        open_process=open_process,
        fingerprint=rt.fingerprint,
        tokens=rt.tokens,
        instance_id=rt.store.instance_id,
        max_queue=limits.max_queue,
        emit=emit,
    )


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


async def finish_runs(rt: Runtime) -> None:
    """Wait until every run has ended. Meanwhile no others begin but what these delegate."""
    rt.draining = True
    while rt.live:
        await next(iter(rt.live.values())).ended.wait()


def check_open(rt: Runtime, parent_id: str | None) -> None:
    """Raises RunCancelledError where a run below ``parent_id`` (None: below no other) may not begin any more."""
    if rt.closing or (rt.draining and parent_id is None):
        raise RunCancelledError("the orchestrator is shutting down", retryable=True)


async def close_runs(rt: Runtime, error: OrchestratorError | None = None) -> None:
    """End what still runs, as cancelled or with the error, and wait until each run's end is written."""
    rt.closing = True
    live = list(rt.live.values())
    for run in live:
        run.stop(error or RunCancelledError("the orchestrator is shutting down", retryable=True))
    for run in live:
        await run.ended.wait()


async def clean_up_after_the_dead(store: Store) -> None:
    """Mark the runs of processes that are gone as ``interrupted``, and end what they left running."""
    dead = await store.bury_dead_instances()
    abandoned = await store.interrupt_abandoned()
    if not dead and not abandoned:
        return
    # By id, never by name: what carries the id of an instance that is gone was started by it.
    killed = await anyio.to_thread.run_sync(reap, {*dead, *(run.instance_id for run in abandoned)})
    killed += await anyio.to_thread.run_sync(sweep, {run.id for run in abandoned})
    if abandoned or killed:
        log.warning("marked %d abandoned runs as interrupted, ended %d processes of theirs", len(abandoned), killed)


async def write_ends(rt: Runtime) -> None:
    """Store the ends of runs that could not be stored when they came. Raises StoreError if they still cannot."""
    for row in list(rt.unwritten.values()):
        await rt.store.finish_run(row)
        rt.unwritten.pop(row.id, None)


async def _watch_cancels(rt: Runtime) -> None:
    """Act on cancels that other processes asked for through the store, and on processes that died meanwhile."""
    looked = anyio.current_time()
    while True:
        await anyio.sleep(CANCEL_POLL_SECONDS)
        with suppress(OrchestratorError):
            await write_ends(rt)
        try:
            for run_id in await rt.store.cancels_requested() if rt.live else ():
                if run := rt.live.get(run_id):
                    run.stop(RunCancelledError("cancelled on request"))
            if anyio.current_time() - looked > DEAD_OWNER_SECONDS:
                looked = anyio.current_time()
                await rt.store.beat()
                await clean_up_after_the_dead(rt.store)
        except OrchestratorError:
            # A store that is busy or full for a moment must not end the runs that work.
            log.warning("could not look for cancels", exc_info=True)


async def _watch_agents(
    rt: Runtime, catalog: Catalog, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED
) -> None:
    def changed(change: CatalogChange) -> None:
        rt.pool.forget_agents({*change.changed, *change.removed})
        rt.emit("agents.changed", None, **change.model_dump(mode="json"))

    await catalog.watch(on_change=changed, task_status=task_status)
