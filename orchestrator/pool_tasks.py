"""Tasks of pools: what is known of one, and its life from the queue to the outcome."""

import logging
import uuid
from typing import Literal

import anyio

from orchestrator.delegation import attend, cancel, submit, wait
from orchestrator.endings import ended_as
from orchestrator.errors import OrchestratorError, RunCancelledError
from orchestrator.outcome import Outcome, RunStatus
from orchestrator.runtime import Runtime
from orchestrator.task import Task
from orchestrator.watching import RunMessages

log = logging.getLogger(__name__)

TaskStatus = Literal["pending", "running", "done", "failed", "cancelled"]

_STATUS: dict[RunStatus, TaskStatus] = {"succeeded": "done", "cancelled": "cancelled"}


class PoolTask:
    """A task in a pool. ``run_id`` is None until the pool has handed it to the runtime.

    ``place`` is 0, then its place among all the tasks of the pool in the order they ended.
    """

    def __init__(self, rt: Runtime, task: Task) -> None:
        self.id = str(uuid.uuid4())
        self.task = task
        self.run_id: str | None = None
        self.outcome: Outcome | None = None
        self.place = 0
        self._rt = rt
        self._begun, self._ended = anyio.Event(), anyio.Event()
        self._scope = anyio.CancelScope()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id} {self.status} run={self.run_id}>"

    @property
    def status(self) -> TaskStatus:
        """``pending`` in the pool's queue, ``running`` once handed over; a run that timed out has ``failed``."""
        if self.outcome is not None:
            return _STATUS.get(self.outcome.status, "failed")
        return "running" if self.run_id else "pending"

    async def result(self) -> Outcome:
        """Wait for the outcome; cancelling the wait does not cancel the task.

        It never raises for what became of the task. ``run_id`` is empty in the outcome of a task that was refused,
        or cancelled before it began: there is no run then.
        """
        await self._ended.wait()
        assert self.outcome is not None
        return self.outcome

    async def cancel(self) -> bool:
        """Ask for its end, and that of all it has delegated; False if it has ended already. Raises StoreError."""
        if self.outcome is not None:
            return False
        if self.run_id is None:
            self._scope.cancel()
        else:
            await cancel(self._rt, self.run_id)
        return True

    async def live(self, slots: anyio.Semaphore) -> Outcome:
        """The whole life of the task, for its pool: wait for a slot, run, and be told as ended."""
        error: OrchestratorError = RunCancelledError("the orchestrator was stopped", retryable=True)
        try:
            self.outcome = await self._run(slots)
        except OrchestratorError as problem:
            error = problem
        except Exception as problem:
            log.exception("pool task %s: a defect of the orchestrator", self.id)
            error = OrchestratorError(f"internal error: {type(problem).__name__}: {problem}")
        finally:
            self.outcome = self.outcome or Outcome(
                run_id=self.run_id or "", status=ended_as(error), error=error.to_dict()
            )
            self._begun.set()
            self._ended.set()
        return self.outcome

    async def _run(self, slots: anyio.Semaphore) -> Outcome:
        with self._scope:
            async with slots:
                self.run_id = await submit(self._rt, self.task)
                self._begun.set()
                return await attend(self._rt, self.run_id)
        if self.run_id is None:
            raise RunCancelledError("cancelled before it began")
        return await wait(self._rt, self.run_id)  # the cancel came just when the run began


class StreamingTask(PoolTask):
    """A task that tells what its agent says while it says it: ``async for message in task``.

    Iterate as often as wanted and whenever, also after the end: each iterator gets everything, has a buffer of its
    own, and slows nobody (``watch_run``).
    """

    def messages(self, *, size: int = 1000) -> RunMessages:
        """An iterator with a buffer of ``size`` messages; ``lost`` on it counts the deltas that did not fit."""
        return RunMessages(self._rt, self._run_begun, size)

    def __aiter__(self) -> RunMessages:
        return self.messages()

    async def _run_begun(self) -> str | None:
        await self._begun.wait()
        return self.run_id
