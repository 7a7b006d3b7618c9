"""The driver: starts what a PlanState says is ready, feeds back what came of it, until nothing is left."""

import math
from collections.abc import Awaitable, Callable

import anyio
import anyio.lowlevel

from orchestrator.errors import (
    OrchestratorError,
    RunCancelledError,
    RunInterruptedError,
    RunTimeoutError,
)
from orchestrator.outcome import Outcome, RunStatus
from orchestrator.plans.jobs import StepChange, StepJob
from orchestrator.plans.state import PlanState

#: Where a step runs is this function's business alone. Called again with the id of a run it knows, it attaches
#: to that run; cancelling the call cancels the run.
RunStep = Callable[[str, StepJob], Awaitable[Outcome]]


async def drive(
    state: PlanState,
    run_step: RunStep,
    *,
    on_change: Callable[[StepChange], None] | None = None,
    left: Callable[[], float] | None = None,
) -> PlanState:
    """Run ``state`` to its end and return it. ``on_change`` hears of every step and job, in order.

    An OrchestratorError of ``run_step`` is that job's outcome; any other error is a bug and propagates in an
    ExceptionGroup. Cancelling the call cancels every running job and leaves the state cancelled. When
    ``limits.timeout`` is over, the plan ends as ``timed_out``. ``left`` tells how many seconds of it are left,
    where time passes that does not count; by default it is counted from now.
    """
    limit = state.plan.limits.timeout
    if left is None:
        ends = math.inf if limit is None else anyio.current_time() + limit
        left = lambda: ends - anyio.current_time()  # noqa: E731

    def report() -> None:
        for change in state.take_changes():
            if on_change is not None:
                on_change(change)

    def start_ready() -> None:
        for job in state.ready():
            tasks.start_soon(work, job, name=job.job_id)
        report()

    async def work(job: StepJob) -> None:
        state.apply(job.job_id, await _outcome(run_step, job))
        # An executor may answer a cancellation with an outcome; nothing new may start after one.
        await anyio.lowlevel.checkpoint_if_cancelled()
        start_ready()

    try:
        async with anyio.create_task_group() as timing:
            timing.start_soon(_watch_time, left, timing.cancel_scope)
            async with anyio.create_task_group() as tasks:
                start_ready()
            timing.cancel_scope.cancel()
        if not state.done:
            error = RunTimeoutError(f"the plan took longer than {limit} s", details={"kind": "wall"})
            state.stop("timed_out", error)
    finally:
        state.cancel()
        report()
    return state


async def _watch_time(left: Callable[[], float], scope: anyio.CancelScope) -> None:
    while (seconds := left()) > 0:  # noqa: ASYNC110  # what is left may have grown meanwhile
        await anyio.sleep(seconds)
    scope.cancel()


async def _outcome(run_step: RunStep, job: StepJob) -> Outcome:
    try:
        return await run_step(job.job_id, job)
    except OrchestratorError as error:
        return Outcome(run_id="", status=_status(error), error=error.to_dict())


def _status(error: OrchestratorError) -> RunStatus:
    if isinstance(error, RunCancelledError):
        return "cancelled"
    if isinstance(error, RunTimeoutError):
        return "timed_out"
    return "interrupted" if isinstance(error, RunInterruptedError) else "failed"
