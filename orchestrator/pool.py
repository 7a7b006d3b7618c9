"""The pool of CLI processes: carries out what ``PoolState`` decides.

Each process lives in a task of its own in the pool's task group, from its start to the end of everything it
started; its errors stop there. A run borrows the conversation and gives it back. While nobody has borrowed it, its
task reads what it says, so that its death is noticed at once and nothing it says late is taken for an answer.
"""

import hashlib
import logging
import math
import uuid
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol

import anyio
from anyio.abc import TaskGroup

from orchestrator.conversation import Conversation, Spec, Turn
from orchestrator.errors import BackendError, CLIStartError, OrchestratorError, QueueFullError
from orchestrator.events import PoolEvent
from orchestrator.killing import INSTANCE_ID_ENV, PROCESS_ID_ENV
from orchestrator.memory import measure
from orchestrator.pool_state import Assign, End, PoolState, Request, Start, Worker
from orchestrator.scheduling import lower, restore
from orchestrator.tokens import TOKEN_ENV, Tokens

log = logging.getLogger(__name__)

#: How often spare processes are looked after: expiry, files that have changed, memory.
TEND_SECONDS = 2.0
#: How often the memory of processes is measured; it takes some milliseconds each, in a thread.
MEASURE_SECONDS = 10.0
#: How long a process that is to be kept warm may take to answer for the first time.
START_SECONDS = 60.0
#: Fields of a Spec that a process can be given, or told, after it has started.
_PER_RUN = ("session_id", "session_mode", "source_session_id", "model", "permission_mode")


class OpenProcess(Protocol):
    """Opens the conversation of one process; see ``orchestrator.process.connect_process``."""

    def __call__(self, spec: Spec, on_ready: Callable[[], None]) -> AbstractAsyncContextManager[Conversation]: ...


@dataclass(slots=True, eq=False)
class _Kept:
    """A process, the task that keeps it, and whoever has borrowed it."""

    worker: Worker
    spec: Spec
    process_id: str
    cold: bool
    model: str | None
    mode: str | None
    conversation: Conversation | None = None
    error: OrchestratorError | None = None
    borrowed: bool = False
    hangs: bool = False
    lowered: bool = False
    reading: bool = False
    idling: anyio.CancelScope = field(default_factory=anyio.CancelScope)
    handed: anyio.Event = field(default_factory=anyio.Event)
    returned: anyio.Event = field(default_factory=anyio.Event)
    gone: anyio.Event = field(default_factory=anyio.Event)

    @property
    def pid(self) -> int | None:
        return getattr(self.conversation, "pid", None)

    def wake(self) -> None:
        """Have the keeping task look at what has changed, if it reads meanwhile."""
        if self.reading:
            self.idling.cancel()


@dataclass(slots=True, eq=False)
class _Waiter:
    spec: Spec
    served: anyio.Event = field(default_factory=anyio.Event)
    kept: _Kept | None = None


class Lease:
    """A borrowed process. ``keep`` says that the turn ended well: the process then waits for the next one."""

    def __init__(self, kept: _Kept, request: Request) -> None:
        assert kept.conversation is not None
        self._kept = kept
        self._request = request
        self.conversation = kept.conversation
        self.used = False
        self.ended_well = False
        self.transcript = ""

    @property
    def session_id(self) -> str:
        """The session the process holds, or begins with its first turn."""
        return self._kept.spec.session_id

    def take(self) -> str:
        """Use the process: its session is this run's from now on, whatever becomes of the run."""
        self.used = True
        return self.session_id

    async def prepare(self, turn: Turn, *, permission_mode: str | None) -> None:
        """Tell the process what the turn brings along, and the model and the mode where it has others.

        It takes the CLI some milliseconds, in which the run's beginning can be stored.
        """
        model = self._request.model
        turn = replace(
            turn,
            model=model if model != self._kept.model else None,
            permission_mode=permission_mode if permission_mode != self._kept.mode else None,
        )
        self._kept.model, self._kept.mode = model, permission_mode
        await self.conversation.prepare(turn)

    def hangs(self) -> None:
        """The process has not answered even when asked to stop: it is not asked to end, but ended."""
        self._kept.hangs = True

    async def end_orphans(self) -> None:
        """End what the turn's commands left without a parent or a mark."""
        if (end := getattr(self.conversation, "end_orphans", None)) is not None:
            await end()

    def keep(self, transcript: str) -> None:
        """The turn ended well and left the session's file in this state."""
        self.ended_well, self.transcript = True, transcript


class Pool:
    """Lends CLI processes to runs. Open it in a task group that outlives every run.

    ``open_process`` starts one; ``fingerprint`` says in what state the files are that a process of the spec reads
    when it starts; ``emit`` is told what happens, for watchers.
    """

    def __init__(
        self,
        task_group: TaskGroup,
        state: PoolState,
        *,
        open_process: OpenProcess,
        fingerprint: Callable[[Spec], str],
        tokens: Tokens,
        instance_id: str,
        max_queue: int,
        emit: Callable[[PoolEvent, Mapping[str, Any]], None],
    ) -> None:
        self.state = state
        self._tg = task_group
        self._open = open_process
        self._fingerprint = fingerprint
        self._tokens = tokens
        self._instance_id = instance_id
        self._max_queue = max_queue
        self._emit = emit
        self._kept: dict[int, _Kept] = {}
        self._waiters: dict[str, _Waiter] = {}
        self._specs: dict[str, Spec] = {}
        self._queued: set[str] = set()
        self._room = anyio.Event()
        self._changed = anyio.Event()
        self._minimum: dict[str, tuple[Spec, str, int]] = {}
        self._busy_s = 5.0
        self._later = False

    def __repr__(self) -> str:
        return f"<Pool {self.state!r}>"

    @property
    def pids(self) -> dict[int, int]:
        """The process of each worker that has one."""
        return {number: kept.pid for number, kept in self._kept.items() if kept.pid is not None}

    # -- the queue ----------------------------------------------------------------------------------------

    def enter_queue(self, run_id: str) -> None:
        """Count the run as waiting until it has a process. Raises QueueFullError with ``retry_after``."""
        free = max(0, self.state.limits.max_processes - self.state.working)
        if len(self._queued) >= self._max_queue + free:
            self.state.counters.refused += 1
            raise QueueFullError(
                f"{len(self._queued)} runs are waiting; limits.max_queue allows no more",
                retry_after=round(self._busy_s * (len(self._queued) + 1) / self.state.limits.max_processes, 1),
            )
        self._queued.add(run_id)

    def leave_queue(self, run_id: str) -> None:
        """The run has a process, or wants none any more."""
        if run_id in self._queued:
            self._queued.discard(run_id)
            self._tell_of_room()

    def _tell_of_room(self) -> None:
        self._room.set()
        self._room = anyio.Event()

    async def wait_for_room(self) -> None:
        """Wait until there may be room: a run has left the queue, or given back its process."""
        await self._room.wait()

    # -- borrowing ----------------------------------------------------------------------------------------

    @asynccontextmanager
    async def lease(self, request: Request, spec: Spec) -> AsyncIterator[Lease]:
        """Borrow a process for one turn: a warm one, the one that holds the session, or a new one.

        ``request.key`` is ``key_of(spec)``. Leaving the context gives it back: kept for the session's next turn
        if ``Lease.keep`` was called, else ended, with all it started, before the context is left.

        Raises CLINotFoundError or CLIStartError when no process can be started.
        """
        kept = await self._borrow(request, spec)
        while kept.error is not None and not kept.cold:
            # It died while it waited; nothing was sent, so nothing can be done twice.
            kept = await self._borrow(request, spec)
        if kept.error is not None:
            raise kept.error
        lease = Lease(kept, request)
        try:
            yield lease
        finally:
            with anyio.CancelScope(shield=True):
                await self._give_back(kept, lease)

    async def _borrow(self, request: Request, spec: Spec) -> _Kept:
        waiter = self._waiters[request.run_id] = _Waiter(spec)
        self._specs[request.key] = spec
        self.state.ask(replace(request, since=anyio.current_time()))
        try:
            self._act()
            if waiter.kept is None:
                self.state.counters.waits += 1
                self._emit("pool.waiting", {"run_id": request.run_id, "waiting": self.state.waiting})
            await waiter.served.wait()
            assert waiter.kept is not None
            await waiter.kept.handed.wait()
        except BaseException:
            self.state.drop(request.run_id)
            if waiter.kept is not None:
                with anyio.CancelScope(shield=True):
                    await self._give_back(waiter.kept)
            raise
        finally:
            del self._waiters[request.run_id]
        self.leave_queue(request.run_id)
        return waiter.kept

    async def _give_back(self, kept: _Kept, lease: Lease | None = None) -> None:
        """The process is kept if the turn ended well, or if it was warm and has not been used."""
        self._return(kept, lease)
        if kept.worker.phase == "ending":
            await kept.gone.wait()

    def _return(self, kept: _Kept, lease: Lease | None) -> None:
        now = anyio.current_time()
        self._busy_s += (now - kept.worker.since - self._busy_s) / 8
        self._tokens.assign(kept.process_id, None)
        if lease is not None and lease.used:
            ends = self.state.release(
                kept.worker, now, session_id=lease.session_id, transcript=lease.transcript, keep=lease.ended_well
            )
        else:
            ends = self.state.release(kept.worker, now, session_id=None, keep=not kept.cold)
        self._carry_out(ends)
        kept.borrowed = False
        kept.cold = False  # whoever has it next was not the reason it was started
        kept.returned.set()
        self._act()
        self._tell_of_room()

    # -- carrying out -------------------------------------------------------------------------------------

    def _act(self) -> None:
        """Decide and carry out, without waiting for anything."""
        now = anyio.current_time()
        self._carry_out(self.state.decide(now))
        self._changed.set()
        if not self._later and not self.state.closing and now < self.state.refill_at:
            self._later = True
            self._tg.start_soon(self._act_later)

    async def _act_later(self) -> None:
        """Once the runs that have just begun are under way, see to warm processes."""
        while (left := self.state.refill_at - anyio.current_time()) > 0:  # noqa: ASYNC110  # every hand-out moves it
            await anyio.sleep(left)
        self._later = False
        self._act_safely()

    def _act_safely(self) -> None:
        try:
            self._act()
        except Exception:
            # A defect in looking after processes is no reason to end every run.
            log.exception("%r: a defect of the orchestrator", self)

    def _carry_out(self, actions: Iterable[Assign | Start | End]) -> None:
        for action in actions:
            match action:
                case Start(request, worker):
                    self._start(worker, request)
                case Assign(request, worker):
                    self._hand_over(request, self._kept[worker.id])
                    self._emit("pool.assigned", {"run_id": request.run_id, **_facts(worker)})
                case End(worker, reason):
                    self._emit("pool.retired", {"reason": reason, **_facts(worker)})
                    if (kept := self._kept.get(worker.id)) is not None:
                        kept.wake()

    def _start(self, worker: Worker, request: Request | None) -> None:
        process_id = uuid.uuid4().hex
        if request is not None:
            spec = self._specs[request.key] = self._waiters[request.run_id].spec
        else:
            spec = replace(self._specs[worker.key], session_id=str(uuid.uuid4()), model=worker.model)
        env = {**spec.env, PROCESS_ID_ENV: process_id, INSTANCE_ID_ENV: self._instance_id}
        if spec.mcp:
            env[TOKEN_ENV] = self._tokens.issue(process_id)
        spec = replace(spec, env=env)
        cold = request is not None
        kept = _Kept(worker, spec, process_id, cold, spec.model, spec.permission_mode)
        self._kept[worker.id] = kept
        if request is not None:
            self._hand_over(request, kept)
        self._emit("pool.started", {"run_id": request and request.run_id, **_facts(worker)})
        self._tg.start_soon(self._keep, kept)

    def _hand_over(self, request: Request, kept: _Kept) -> None:
        waiter = self._waiters[request.run_id]
        kept.borrowed = True
        kept.handed, kept.returned = anyio.Event(), anyio.Event()
        self._tokens.assign(kept.process_id, request.run_id)
        waiter.kept = kept
        waiter.served.set()
        kept.wake()

    # -- the life of a process ----------------------------------------------------------------------------

    async def _keep(self, kept: _Kept) -> None:
        """Open the process, lend it, end it. Nothing that goes wrong with it leaves this task."""
        worker = kept.worker

        def ready() -> None:
            self.state.started(worker)
            kept.wake()
            self._act()

        try:
            async with self._open(kept.spec, ready) as kept.conversation:
                self._prioritise(kept)
                while worker.phase != "ending":
                    if kept.borrowed:
                        kept.handed.set()  # first: the run has the time of a commit to itself, before it asks
                        worker.refill = False
                        self._prioritise(kept)
                        await kept.returned.wait()
                    else:
                        await self._idle(kept)
                if kept.hangs:
                    raise BackendError("the CLI does not answer")
        except OrchestratorError as error:
            kept.error = error
            log.info("process %r ended: %s", worker, error)
        except Exception as error:
            log.exception("process %r: a defect of the orchestrator", worker)
            kept.error = BackendError(f"internal error: {type(error).__name__}: {error}")
        finally:
            self._forget(kept)

    def _prioritise(self, kept: _Kept) -> None:
        """Preparing what nobody waits for must not slow down what works; whoever borrows it has the full speed."""
        if kept.pid is None or kept.worker.refill == kept.lowered:
            return
        if kept.worker.refill:
            kept.lowered = lower(kept.pid)
        else:
            kept.lowered = False
            self._tg.start_soon(restore, kept.pid)

    def _forget(self, kept: _Kept) -> None:
        del self._kept[kept.worker.id]
        self._tokens.revoke(kept.process_id)
        self.state.gone(kept.worker, anyio.current_time())
        if kept.error is None:
            kept.error = BackendError("the process was ended before it could be used", retryable=True)
        kept.handed.set()
        kept.gone.set()
        self._emit("pool.ended", _facts(kept.worker))
        if not self.state.closing:
            self._act_safely()

    async def _idle(self, kept: _Kept) -> None:
        """Read what the process says while nobody wants it. Raises CLIExitError when it has ended."""
        assert kept.conversation is not None
        limit = START_SECONDS if kept.worker.starting else math.inf
        with anyio.move_on_after(limit) as kept.idling:
            kept.reading = True
            try:
                while kept.worker.phase != "ending" and not kept.borrowed:
                    await kept.conversation.receive()
            finally:
                kept.reading = False
        if anyio.current_time() >= kept.idling.deadline and kept.worker.starting:
            raise CLIStartError(f"the CLI has not answered for {START_SECONDS:g} s")

    # -- looking after ------------------------------------------------------------------------------------

    def key_of(self, spec: Spec) -> str:
        """What two specs share exactly if a process started for one serves the other's run.

        Everything that is fixed at the start counts, and the state of the files that are read then.
        """
        fixed = [(f.name, _plain(getattr(spec, f.name))) for f in fields(spec) if f.name not in _PER_RUN]
        # A model can be changed, not taken away; and this mode cannot be switched on later.
        kind = (spec.model is None, spec.permission_mode == "bypassPermissions")
        text = repr((fixed, kind, self._fingerprint(spec)))
        return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()

    def keep_warm(self, specs: Iterable[tuple[Spec, str, int]]) -> None:
        """Keep so many warm processes of each (spec, agent, count), whatever demand says; none of those before."""
        wanted = {self.key_of(spec): (spec, agent, count) for spec, agent, count in specs}
        for key in self._minimum.keys() - wanted.keys():
            self._forget_key(key)
        self._minimum = wanted
        for key, (spec, agent, count) in wanted.items():
            self._specs[key] = spec
            self.state.want(key, agent, spec.model, count)
        self._act()

    def forget_agents(self, agents: Collection[str]) -> None:
        """End the spare processes of agents whose files have changed."""
        for key in {worker.key for worker in self.state.spare if worker.agent in agents}:
            self._forget_key(key)
        self._act()

    def forget_stale(self) -> None:
        """End the spare processes that were started before a file they have read was changed."""
        stale = [key for key, spec in self._specs.items() if self.key_of(spec) != key]
        for key in stale:
            self._forget_key(key)
        if any(key in self._minimum for key in stale):
            self.keep_warm(self._minimum.values())
        in_use = self.state.keys
        self._specs = {key: spec for key, spec in self._specs.items() if key in in_use}

    def _forget_key(self, key: str) -> None:
        self._carry_out(self.state.forget(key))
        if key not in self.state.keys:
            self._specs.pop(key, None)

    async def tend(self) -> None:
        """Look after spare processes, for ever; idle while there is none."""
        measured = -math.inf
        while True:
            if not self.state.workers and not self._minimum:
                self._changed = anyio.Event()
                await self._changed.wait()
            await anyio.sleep(TEND_SECONDS)
            try:
                if anyio.current_time() - measured >= MEASURE_SECONDS:
                    measured = anyio.current_time()
                    await self._measure()
                self.forget_stale()
                self._act()
            except Exception:
                # Spare processes that nobody looks after are no reason to end every run.
                log.exception("%r: a defect of the orchestrator", self)

    async def _measure(self) -> None:
        pids = self.pids
        figures = await anyio.to_thread.run_sync(measure, list(pids.values()), abandon_on_cancel=True)
        for number, pid in pids.items():
            if (worker := self.state.workers.get(number)) is not None and pid in figures:
                worker.memory_mb = figures[pid]

    async def close(self) -> None:
        """End every process; returns when all have ended. Runs have to be stopped before."""
        self.state.closing = True
        kept = list(self._kept.values())
        for each in kept:
            self._carry_out(self.state.end(each.worker, "shutdown"))
            each.wake()
        for each in kept:
            await each.gone.wait()


def _facts(worker: Worker) -> dict[str, Any]:
    """What an event says of a process."""
    return {"worker": worker.id, "agent": worker.agent, "key": worker.key[:8], "session_id": worker.session_id}


def _plain(value: Any) -> Any:
    """Of one representation for equal values, whatever the order of mappings."""
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        return sorted((repr(key), _plain(each)) for key, each in value.items())
    if isinstance(value, tuple | list):
        return [_plain(each) for each in value]
    return (repr(value),)  # a tuple: the text "1" is not the number
