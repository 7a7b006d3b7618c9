"""Plans as runs: binds the plan engine to ``delegate`` and to the journal.

A plan is a run of its own, at depth 0; each step is a run below it, recorded under the plan's id and the step's
job id, so that asking for the same step again attaches to the run that exists instead of buying it twice.
"""

import logging
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import anyio

from orchestrator.admission import budget_above, reachable, trace_of, withdraw
from orchestrator.delegation import attend, delegate
from orchestrator.endings import conclude, ended_as, stop_children, summary
from orchestrator.errors import (
    BudgetExceededError,
    OrchestratorError,
    RunCancelledError,
    RunTimeoutError,
)
from orchestrator.limits import Budget, budget_of
from orchestrator.outcome import Outcome, Usage
from orchestrator.plans import Plan, PlanState, StepChange, StepJob, drive
from orchestrator.reach import asked_by_model, check_reach
from orchestrator.runtime import LiveRun, Runtime, check_open
from orchestrator.store import Run, now_us
from orchestrator.task import Task
from orchestrator.tracing import SpanContext, new_run_id
from orchestrator.workspaces import WorkspaceCopy, make_copy, workspace_copy

log = logging.getLogger(__name__)


async def run_plan(
    rt: Runtime,
    plan: Plan,
    inputs: Mapping[str, Any],
    *,
    base: Path | None = None,
    parent_id: str | None = None,
    parent_span: SpanContext | None = None,
    caller: dict[str, Any] | None = None,
) -> Outcome:
    """Run the plan to its end. Cancelling the caller cancels it and its steps. Raises what ``submit_plan`` does."""
    run_id = await submit_plan(
        rt, plan, inputs, base=base, parent_id=parent_id, parent_span=parent_span, caller=caller
    )
    return await attend(rt, run_id)


async def submit_plan(
    rt: Runtime,
    plan: Plan,
    inputs: Mapping[str, Any],
    *,
    base: Path | None = None,
    parent_id: str | None = None,
    parent_span: SpanContext | None = None,
    caller: dict[str, Any] | None = None,
) -> str:
    """Record the plan, start it in the runtime, and return its run id.

    ``base`` is the directory that relative paths in inputs and in steps' ``cwd`` start from (default: the
    project directory). A plan that the run ``parent_id`` starts is below it, and its steps are as deep as what
    that run delegates. Raises PlanError for wrong inputs and for a workspace of no directory, LimitError,
    StoreError.
    """
    check_open(rt, parent_id)
    base = (base or rt.config.project_dir).resolve()
    bound = plan.bind(inputs, base=base)
    run_id = new_run_id()
    copy = workspace_copy(plan, bound, run_id, rt.config.data_path)
    parent = await rt.store.run(parent_id) if parent_id else None
    by_model = asked_by_model(caller=caller is not None, parent_kind=parent.kind if parent else None)
    dirs = [base, copy.source] if copy else [base]
    check_reach(dirs, reachable(rt, rt.config.project_dir, parent, by_model=by_model))
    budget = budget_of(
        rt.config.limits,
        await budget_above(rt, parent),
        depth=parent.depth if parent else 0,
        usd=plan.limits.budget_usd,
        timeout_s=plan.limits.timeout,
    )
    depth = parent.depth + 1 if parent else 1
    budget.check_start(depth, time.monotonic())
    row = _new_row(rt, plan, run_id, bound, parent, parent_span)
    row.cwd = str(copy.target if copy else base)
    row.caller, row.budget_usd = caller, budget.usd
    row.options = {**row.options, "limits": budget.to_dict()}
    live = LiveRun(row, budget, touched=time.monotonic(), parent=rt.live.get(parent.id) if parent else None)
    rt.live[run_id] = live
    try:
        budget.start(depth, time.monotonic())
        await rt.store.create_run(row)
        check_open(rt, parent_id)
    except BaseException:
        with anyio.CancelScope(shield=True):
            await withdraw(rt, live)
        raise
    rt.task_group.start_soon(_execute, rt, live, PlanState(plan, bound, run_id), copy)
    rt.emit("run.created", run_id, **summary(row))
    return run_id


def _new_row(
    rt: Runtime, plan: Plan, run_id: str, inputs: dict[str, Any], parent: Run | None, span: SpanContext | None
) -> Run:
    """What is known of a plan's run before it begins; it works in the project directory unless told otherwise."""
    return Run(
        id=run_id,
        trace_id=trace_of(parent, span),
        parent_id=parent.id if parent else None,
        parent_span_id=span.span_id if span else None,
        root_id=parent.root_id if parent else run_id,
        depth=parent.depth if parent else 0,
        kind="plan",
        name=plan.name,
        options={"inputs": inputs, "plan": str(plan.path), "digest": plan.digest},
        source=plan.source,
        project=str(rt.config.project_dir),
        cwd=str(rt.config.project_dir),
        created_us=now_us(),
        instance_id=rt.store.instance_id,
    )


async def _execute(rt: Runtime, live: LiveRun, state: PlanState, copy: WorkspaceCopy | None) -> None:
    error: OrchestratorError | None = RunCancelledError("the orchestrator was stopped", retryable=True)
    row = live.row
    try:
        with live.scope:
            row.status, row.started_us = "running", now_us()
            live.budget.began = time.monotonic()
            await rt.store.update_run(row.id, status="running", started_us=row.started_us)
            rt.emit("run.started", row.id, **summary(row))
            if copy is not None:
                await _open_workspace(rt, live, state, copy)
            await drive(
                state,
                _step_runner(rt, live),
                on_change=lambda change: _tell(rt, row.id, change),
                left=lambda: _left(live.budget),
            )
        error = live.stop_error if live.scope.cancelled_caught else None
    except OrchestratorError as problem:
        error = live.stop_error or problem
    except Exception as problem:
        log.exception("plan %s: a defect of the orchestrator", row.id)
        error = OrchestratorError(f"internal error: {type(problem).__name__}: {problem}")
    finally:
        with anyio.CancelScope(shield=True):
            await _end(rt, live, state, error)


async def _open_workspace(rt: Runtime, live: LiveRun, state: PlanState, copy: WorkspaceCopy) -> None:
    """Make the copy the steps work in. If that fails, is cancelled or takes too long, no step starts."""
    limit = state.plan.limits.timeout
    try:
        with anyio.move_on_after(math.inf if limit is None else limit) as wall:
            await make_copy(copy, rt.environ)
        if wall.cancelled_caught:
            raise RunTimeoutError(
                f"copying {copy.source} took longer than the plan's {limit:g} s", details={"kind": "wall"}
            )
    except BaseException:
        state.cancel("the plan has no workspace")
        for change in state.take_changes():
            _tell(rt, live.row.id, change)
        raise


def _left(budget: Budget) -> float:
    """Seconds left of the plan's time, which stands still while a run below it waits for a usage limit's end."""
    return math.inf if budget.deadline is None else budget.deadline - time.monotonic()


def _step_runner(rt: Runtime, live: LiveRun) -> Any:
    async def run_step(job_id: str, job: StepJob) -> Outcome:
        known = await rt.store.runs(parent_id=live.row.id, step=job_id, limit=1)
        if known:
            return await attend(rt, known[0].id)
        return await delegate(rt, step_task(job, live.row))

    return run_step


def step_task(job: StepJob, plan: Run) -> Task:
    """The task of a plan's step."""
    return Task(
        agent=job.agent,
        prompt=job.prompt,
        session=job.session_id,
        fork=job.session_mode == "fork",
        model=job.model,
        cwd=Path(job.cwd) if job.cwd else None,
        effort=job.effort,
        permission_mode=job.permission_mode,
        output_schema=dict(job.output_schema) if job.output_schema is not None else None,
        timeout_s=job.timeout,
        idle_timeout_s=job.idle_timeout,
        budget_usd=job.budget_usd,
        max_turns=job.max_turns,
        parent_id=plan.id,
        step=job.job_id,
        on_full="wait",  # the plan bounds its own fan-out; a step that has to wait is no failure
    )


def _tell(rt: Runtime, run_id: str, change: StepChange) -> None:
    rt.emit(
        "plan.step", run_id, id=change.id, step=change.step_id, status=change.status,
        error=dict(change.error) if change.error else None,
    )  # fmt: skip


async def _end(rt: Runtime, live: LiveRun, state: PlanState, error: OrchestratorError | None) -> None:
    row, outcome = live.row, state.outcome()
    await stop_children(rt, live)  # none is left but where the plan itself was torn down
    if error is None and outcome.status == "failed":
        error = _used_up(live.budget, outcome)
    row.status = outcome.status if error is None else ended_as(error)
    row.error = error.to_dict() if error else outcome.error
    row.text, row.structured, row.has_structured = outcome.text, outcome.structured, outcome.has_structured
    row.options = {**row.options, "steps": dict(state.statuses)}
    try:
        sum_up(row, [run for run in await rt.store.tree(row.id) if run.kind == "agent"])
    except OrchestratorError:
        log.exception("plan %s: its figures could not be read", row.id)
    await conclude(rt, live)


def _used_up(budget: Budget, outcome: Outcome) -> BudgetExceededError | None:
    """Steps fail one by one when something is used up; the plan has one reason then, and only then."""
    failed = (outcome.error or {}).get("details", {}).get("steps", {})
    if BudgetExceededError.code not in {error.get("code") for error in failed.values()}:
        return None
    try:
        Budget(parent=budget).check_start()
    except BudgetExceededError as error:
        error.message = f"{outcome.error['message']}: {error.message}" if outcome.error else error.message
        return error
    return None


def sum_up(row: Run, below: Sequence[Run]) -> None:
    """Put the sums over all runs below on the plan's row; the cost is unknown if that of one run is."""
    usage = sum((run.usage for run in below), Usage())
    row.input_tokens, row.output_tokens = usage.input_tokens, usage.output_tokens
    row.cache_read_tokens, row.cache_write_tokens = usage.cache_read_tokens, usage.cache_write_tokens
    row.num_turns = sum(run.num_turns for run in below)
    known = [run.cost_usd for run in below if run.cost_usd is not None]
    if len(known) == len(below):
        row.cost_usd = sum(known)
        row.cost_basis = "estimate" if any(run.cost_basis == "estimate" for run in below) else "cli"
