"""Pools of tasks: hand over many, a few of them run at once, take the outcomes as they come.

A pool is only a queue before the runtime: it submits, waits and cancels as anybody may. Processes, budgets and the
record are the runtime's.
"""

from collections.abc import AsyncIterator, Collection, Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, Literal, Self, TypeVar

import anyio

from orchestrator.errors import ConfigError, OrchestratorError, QueueFullError, RunCancelledError
from orchestrator.outcome import Outcome
from orchestrator.pool_tasks import PoolTask, StreamingTask
from orchestrator.runtime import Runtime
from orchestrator.task import Task

OnFull = Literal["wait", "refuse"]
Order = Literal["input", "completion"]

#: How much the newest duration counts in the estimate of the next one.
_SMOOTHING = 0.3


@dataclass(frozen=True, slots=True)
class PoolStats:
    """A pool at a moment. ``done``, ``failed`` and ``cancelled`` count from its beginning, as does ``refused``:
    tasks not taken in because the queue was full. ``kept`` ended tasks can still be had with ``get_task``.
    """

    max_workers: int
    queue_size: int
    pending: int
    running: int
    done: int
    failed: int
    cancelled: int
    refused: int
    kept: int


TaskT = TypeVar("TaskT", bound=PoolTask)


class _Pool(Generic[TaskT]):
    """What both pools are. All its tasks live in the runtime's task group."""

    _kind: type[TaskT]

    def __init__(
        self,
        rt: Runtime,
        *,
        agent: str | None = None,
        max_workers: int = 4,
        queue_size: int = 100,
        task_timeout_s: float | None = 300.0,
        on_full: OnFull = "wait",
        keep: int = 100,
    ) -> None:
        """Nothing is started yet. Use it as ``async with``: leaving waits for the tasks, an error cancels them.

        ``agent`` is whom prompts without another are for. ``max_workers`` tasks run at once, within what the
        runtime allows, and ``queue_size`` wait; ``on_full`` says what becomes of one more. ``task_timeout_s``
        bounds each task from its run's start, unless it brings a ``timeout_s``; None leaves it to the settings.
        The last ``keep`` ended tasks are remembered; all runs are in the store.

        Raises ConfigError.
        """
        if max_workers < 1 or queue_size < 0 or keep < 0:
            raise ConfigError("a pool needs max_workers of at least 1, and queue_size and keep of at least 0")
        self._rt, self._agent, self._timeout_s = rt, agent, task_timeout_s
        self._max_workers, self._queue_size, self._on_full, self._keep = max_workers, queue_size, on_full, keep
        self._room = anyio.Semaphore(max_workers + queue_size)
        self._slots = anyio.Semaphore(max_workers)
        self._open: dict[str, TaskT] = {}
        self._ended: dict[str, TaskT] = {}
        self._counts: dict[str, int] = {"done": 0, "failed": 0, "cancelled": 0, "refused": 0}
        self._places = 0
        self._settled = anyio.Event()
        self._busy_s = 5.0
        self._closed = False

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.get_stats()}>"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await self.shutdown(wait=error is None)
        except BaseException:
            with anyio.CancelScope(shield=True):
                await self.shutdown(wait=False)
            raise

    # -- handing over -------------------------------------------------------------------------------------

    async def submit(self, what: str | Task, /, *, on_full: OnFull | None = None, **more: Any) -> TaskT:
        """Take a prompt or a task in and return at once, or as soon as there is room in the queue.

        ``more`` are fields of the ``Task``. Raises QueueFullError (``on_full="refuse"``) with ``retry_after``,
        ConfigError for a prompt without an agent, RunCancelledError once the pool is shut down, ValueError for
        fields that do not fit. What the runtime refuses is an outcome: ``failed``, with the error in it.
        """
        task = self._task_of(what, more)
        await self._enter(on_full or self._on_full)
        return self._start(task)

    async def map(
        self, prompts: Iterable[str | Task], /, *, order: Order = "input", **more: Any
    ) -> AsyncIterator[TaskT]:
        """Yield the ended task of each prompt, in the order of the prompts or of completion.

        Prompts are taken from the iterable only as far ahead as the pool has room. Leaving the iteration cancels
        what was begun for it. Raises as ``submit`` does, but never QueueFullError.
        """
        tasks = (self._task_of(prompt, more) for prompt in prompts)
        upcoming = next(tasks, None)
        begun: dict[str, TaskT] = {}
        try:
            while upcoming is not None or begun:
                while upcoming is not None and await self._has_room(wait=not begun):
                    entry = self._start(upcoming)
                    begun[entry.id] = entry
                    upcoming = next(tasks, None)
                entry = await self._next_of(begun, order)
                yield begun.pop(entry.id)
        finally:
            with anyio.CancelScope(shield=True):
                await self._cancel_all(begun.values())

    async def gather(self, *items: str | Task | PoolTask, **more: Any) -> list[Outcome]:
        """The outcomes of all, in the order given; tasks of the pool may be among them.

        Cancelling it cancels what it submitted. Raises as ``submit`` does, but never QueueFullError.
        """
        mine: list[TaskT] = []
        every: list[PoolTask] = []
        try:
            for item in items:
                if isinstance(item, PoolTask):
                    every.append(item)
                    continue
                mine.append(await self.submit(item, **{**more, "on_full": "wait"}))
                every.append(mine[-1])
            return [await entry.result() for entry in every]
        except BaseException:
            with anyio.CancelScope(shield=True):
                await self._cancel_all(mine)
            raise

    def _task_of(self, what: str | Task, more: Mapping[str, Any]) -> Task:
        fields = dict(more)  # of this task only: the caller's are for others too
        if isinstance(what, str):
            if (agent := fields.pop("agent", self._agent)) is None:
                raise ConfigError("a prompt needs an agent", advice="Give the pool or the call one: agent=NAME.")
            what = Task(agent=agent, prompt=what)
        fields = {"timeout_s": what.timeout_s or self._timeout_s, **fields}
        # It has waited its turn here: the runtime's own queue shall not send it away.
        return Task(**{**dict(what), **fields, "on_full": "wait"})

    async def _enter(self, on_full: OnFull) -> None:
        if self._try_enter():
            return
        if on_full == "refuse":
            raise self._refusal()
        await self._room.acquire()
        try:
            self._check_open()  # it may have been shut down meanwhile
        except OrchestratorError:
            self._room.release()
            raise

    async def _has_room(self, *, wait: bool) -> bool:
        if wait:
            await self._enter("wait")
        return wait or self._try_enter()

    def _try_enter(self) -> bool:
        self._check_open()
        try:
            self._room.acquire_nowait()
        except anyio.WouldBlock:
            return False
        return True

    def _check_open(self) -> None:
        if self._closed or self._rt.closing:
            raise RunCancelledError("the pool is shut down", advice="Open another pool.")

    def _refusal(self) -> QueueFullError:
        self._counts["refused"] += 1
        return QueueFullError(
            f"{self._queue_size} tasks are waiting in the pool; queue_size allows no more",
            retry_after=round(self._busy_s * (self._queue_size + 1) / self._max_workers, 1),
            advice="Try again after retry_after seconds, ask to wait (on_full='wait'), or raise queue_size.",
        )

    def _start(self, task: Task) -> TaskT:
        """Start a task that has entered."""
        entry = self._kind(self._rt, task)
        self._open[entry.id] = entry
        self._rt.task_group.start_soon(self._work, entry)
        return entry

    async def _work(self, entry: TaskT) -> None:
        try:
            await entry.live(self._slots)
        finally:
            self._settle(entry)

    def _settle(self, entry: TaskT) -> None:
        self._room.release()
        del self._open[entry.id]
        self._counts[entry.status] += 1
        if entry.outcome is not None and entry.outcome.duration_ms is not None:
            self._busy_s += _SMOOTHING * (entry.outcome.duration_ms / 1000 - self._busy_s)
        self._ended[entry.id] = entry
        while len(self._ended) > self._keep:
            del self._ended[next(iter(self._ended))]
        self._places += 1
        entry.place = self._places
        self._settled.set()
        self._settled = anyio.Event()

    async def _next_of(self, begun: Mapping[str, TaskT], order: Order) -> TaskT:
        if order == "input":
            first = next(iter(begun.values()))
            await first.result()
            return first
        while not (ended := [entry for entry in begun.values() if entry.place]):
            await self._settled.wait()
        return min(ended, key=lambda entry: entry.place)

    # -- what there is ------------------------------------------------------------------------------------

    def get_task(self, task_id: str) -> TaskT | None:
        """The task of that id; None if there is none, or it ended so long ago that it is forgotten."""
        return self._open.get(task_id) or self._ended.get(task_id)

    def get_stats(self) -> PoolStats:
        """How many tasks are where, now."""
        running = sum(entry.status == "running" for entry in self._open.values())
        return PoolStats(
            max_workers=self._max_workers,
            queue_size=self._queue_size,
            pending=len(self._open) - running,
            running=running,
            kept=len(self._ended),
            **self._counts,
        )

    # -- ending -------------------------------------------------------------------------------------------

    async def cancel(self, task_id: str) -> bool:
        """Ask for the end of a task, pending or running; False if it has ended or is not known. Raises StoreError.

        ``result`` gives the outcome when it is over, with what the agent had said by then.
        """
        entry = self._open.get(task_id)
        return entry is not None and await entry.cancel()

    async def shutdown(self, wait: bool = True) -> None:
        """Take nothing more in, and come back when all tasks have ended; without ``wait`` they are cancelled."""
        self._closed = True
        entries = list(self._open.values())
        if not wait:
            await self._cancel_all(entries)
        for entry in entries:
            await entry.result()

    async def _cancel_all(self, entries: Collection[TaskT]) -> None:
        # Those that wait go first, lest they begin where others end.
        for entry in sorted(entries, key=lambda entry: entry.status != "pending"):
            await entry.cancel()
        for entry in entries:
            await entry.result()


class ProcessPool(_Pool[PoolTask]):
    """Runs many tasks, a few at once: ``async with ProcessPool(rt, agent="helper") as pool``."""

    _kind = PoolTask


class StreamingPool(_Pool[StreamingTask]):
    """A pool whose tasks can be watched while they run: ``async for message in await pool.submit(prompt)``."""

    _kind = StreamingTask
