"""The one place where a run begins, is recorded and ends.

The order is the promise: limits are checked, then the run's row is committed, then the process starts; the result
is committed before anyone is told. The end is written under a shield, so a run that is cancelled keeps what the
agent had said.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Literal

import anyio

from orchestrator.admission import admit, withdraw
from orchestrator.agents import Agent
from orchestrator.endings import conclude, cost_of, ended_as, stop_children, summary
from orchestrator.errors import OrchestratorError, QueueFullError, RunCancelledError
from orchestrator.outcome import Outcome, Usage
from orchestrator.parked_runs import converse_or_wait
from orchestrator.runtime import LiveRun, Runtime, check_open
from orchestrator.store import Run
from orchestrator.task import Task

log = logging.getLogger(__name__)

FOREIGN_POLL_SECONDS = 0.3

#: When some of several runs are of no use any more; see ``submit_many``.
Join = Literal["all_done", "all_ok", "first_ok"]
_DECIDED: Mapping[Join, str] = {"all_ok": "did not succeed", "first_ok": "has succeeded"}


async def delegate(rt: Runtime, task: Task) -> Outcome:
    """Run the task to its end. Cancelling the caller cancels the run.

    A run that fails is an outcome, not an exception. Raises only what refuses the task before anything is
    spent: AgentNotFoundError, AgentError, ConfigError, PromptError, DepthLimitError, BudgetExceededError,
    QueueFullError, SessionNotFoundError, SessionBusyError, StoreError.
    """
    return await attend(rt, await submit(rt, task))


async def attend(rt: Runtime, run_id: str) -> Outcome:
    """Wait for a run as one who owns it: cancelling the caller cancels the run. Raises RunNotFoundError."""
    live = rt.live.get(run_id)
    try:
        return await wait(rt, run_id)
    except anyio.get_cancelled_exc_class():
        with anyio.CancelScope(shield=True):
            if live is None:
                await rt.store.request_cancel(run_id)
            else:
                live.stop(RunCancelledError("the caller was cancelled"))
                await live.ended.wait()
        raise


async def submit(rt: Runtime, task: Task) -> str:
    """Check and record the task, start it in the runtime, and return its run id at once.

    Raises what ``delegate`` raises; nothing is recorded then.
    """
    [run_id] = await submit_many(rt, [task])
    return run_id


async def submit_many(
    rt: Runtime, tasks: Sequence[Task], *, max_parallel: int | None = None, join: Join = "all_done"
) -> list[str]:
    """Start several runs and return their ids, in order: all of them are accepted, or none is.

    At most ``max_parallel`` are at work at once, and as many as the runtime allows. ``join`` is when the others
    are of no use any more and are cancelled, whoever waits for them: ``all_ok``: when one has failed; ``first_ok``:
    when one has succeeded; ``all_done``: never.

    Raises what ``delegate`` raises, for the first task that is refused.
    """
    for task in tasks:
        check_open(rt, task.parent_id)
    admitted = [(*await admit(rt, task), task) for task in tasks]
    accepted: list[LiveRun] = []
    try:
        for live, _, task in admitted:
            await _accept(rt, live, task)
            accepted.append(live)
    except BaseException:
        with anyio.CancelScope(shield=True):
            for live in accepted:
                await withdraw(rt, live)
        raise
    gate = None if max_parallel is None else anyio.CapacityLimiter(max_parallel)
    for live, agent, task in admitted:
        rt.task_group.start_soon(_execute, rt, live, agent, task, gate)
        rt.emit("run.created", live.row.id, **summary(live.row))
    if join != "all_done":
        rt.task_group.start_soon(_cancel_the_rest, accepted, join)
    return [live.row.id for live in accepted]


async def _accept(rt: Runtime, live: LiveRun, task: Task) -> None:
    """Give the run its place in the queue and its row, or leave nothing of it."""
    await _enter_queue(rt, live.row.id, task)
    rt.live[live.row.id] = live
    try:
        live.budget.start(live.row.depth, time.monotonic())
        await rt.store.create_run(live.row)
        if live.parent is not None and live.parent.stop_error is not None:
            raise RunCancelledError(f"run {live.parent.row.id}, which delegates this one, is being stopped")
        check_open(rt, task.parent_id)
    except BaseException:
        with anyio.CancelScope(shield=True):
            await withdraw(rt, live)
        raise


async def _cancel_the_rest(runs: Sequence[LiveRun], join: Join) -> None:
    """Once one run has decided what comes of all, end the others."""

    async def watch(run: LiveRun) -> None:
        await run.ended.wait()
        assert run.outcome is not None
        if run.outcome.ok == (join == "first_ok"):
            for other in runs:
                if other is not run:
                    other.stop(RunCancelledError(f"run {run.row.id} of the same tasks {_DECIDED[join]}"))

    async with anyio.create_task_group() as tg:
        for run in runs:
            tg.start_soon(watch, run)


async def _enter_queue(rt: Runtime, run_id: str, task: Task) -> None:
    while True:
        try:
            return rt.pool.enter_queue(run_id)
        except QueueFullError:
            if task.on_full == "refuse":
                raise
            await rt.pool.wait_for_room()


async def wait(rt: Runtime, run_id: str) -> Outcome:
    """The outcome of a run once it has ended, wherever it is being worked on. Raises RunNotFoundError."""
    if live := rt.live.get(run_id):
        await live.ended.wait()
        assert live.outcome is not None
        return live.outcome
    while True:
        run = await rt.store.run(run_id)
        if run.ended:
            return run.outcome()
        # The runtime itself looks from time to time whether the process that works on it is still there.
        await anyio.sleep(FOREIGN_POLL_SECONDS)


async def cancel(rt: Runtime, run_id: str) -> Run:
    """Ask for the run and everything below it to be cancelled; returns the run as it is now.

    Works for runs of other processes too: their owner sees the request in the store. Raises RunNotFoundError.
    """
    run = await rt.store.run(run_id)
    for each in reversed(await rt.store.tree(run.id)):
        if each.ended:
            continue
        if live := rt.live.get(each.id):
            live.stop(RunCancelledError("cancelled on request"))
        else:
            await rt.store.request_cancel(each.id)
    return run


async def _execute(
    rt: Runtime, live: LiveRun, agent: Agent, task: Task, gate: anyio.CapacityLimiter | None
) -> None:
    """The whole life of a run in a task of its own. Whatever happens, its end is written."""
    error: OrchestratorError | None = RunCancelledError("the orchestrator was stopped", retryable=True)
    try:
        with live.scope:
            async with gate or nullcontext():
                await converse_or_wait(rt, live, agent, task)
        # An answer that was in before the stop took effect stands.
        error = live.verdict if live.answered else live.stop_error
    except OrchestratorError as problem:
        error = None if live.answered else live.stop_error or problem
    except Exception as problem:
        log.exception("run %s: a defect of the orchestrator", live.row.id)
        error = OrchestratorError(f"internal error: {type(problem).__name__}: {problem}")
    finally:
        with anyio.CancelScope(shield=True):
            await _end(rt, live, error)


async def _end(rt: Runtime, live: LiveRun, error: OrchestratorError | None) -> None:
    """Write the end, then tell."""
    if error is not None:
        await stop_children(rt, live)
    row, progress, result = live.row, live.progress, live.progress.result
    row.status = ended_as(error)
    row.error = error.to_dict() if error else None
    row.text = "\n\n".join(filter(None, (each.text for each in live.attempts)))
    if error is None and result is not None:
        row.text = progress.answer or row.text
        row.structured, row.has_structured = result.structured_output, result.has_structured_output
    row.model_used = next((each.model for each in reversed(live.attempts) if each.model), None)
    usage = sum((each.usage for each in live.attempts), Usage())
    row.input_tokens, row.output_tokens = usage.input_tokens, usage.output_tokens
    row.cache_read_tokens, row.cache_write_tokens = usage.cache_read_tokens, usage.cache_write_tokens
    row.cost_usd, row.cost_basis = cost_of(live)
    row.num_turns = sum(each.num_turns for each in live.attempts)
    await conclude(rt, live)
