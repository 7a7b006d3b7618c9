"""Admission: everything that can refuse a task, before anything is spent, and what is known of the run by then."""

import time
from pathlib import Path

from orchestrator.agents import Agent, resolve_model
from orchestrator.conversation import SessionMode
from orchestrator.errors import (
    ConfigError,
    DelegationCycleError,
    LimitError,
    OrchestratorError,
    PromptError,
    SessionBusyError,
    SessionNotFoundError,
    SessionTurnError,
)
from orchestrator.limits import Budget, budget_of, refuse_unknown_cost
from orchestrator.pricing import has_price
from orchestrator.reach import allowed_dirs, asked_by_model, check_reach, resolved
from orchestrator.redaction import secrets_of, secrets_of_servers
from orchestrator.runtime import LiveRun, Runtime
from orchestrator.sandbox import check_settings
from orchestrator.specs import can_answer, hide_values, permission_mode
from orchestrator.store import Run, SessionRow, now_us
from orchestrator.task import Task
from orchestrator.tracing import SpanContext, new_run_id, new_trace_id

#: Turns of a session that are looked through for the one to fork after.
MAX_TURNS = 10_000


async def admit(rt: Runtime, task: Task) -> tuple[LiveRun, Agent]:
    """Check everything about a task and return the run it may become; nothing is written yet.

    Raises what refuses it: see ``orchestrator.delegate``.
    """
    check_prompt(task.prompt, rt.config.limits.max_prompt_bytes)
    parent = await rt.store.run(task.parent_id) if task.parent_id else None
    project = _project(rt, task, parent)
    agent = (await rt.agents_of(project)).get(task.agent)
    permission_mode(rt, agent, task)
    check_settings(
        task.settings,
        sandboxed=agent.sandbox is not None,
        allow_bypass=rt.config.claude.allow_bypass_permissions,
    )
    secrets = secrets_of_servers(agent.mcp_servers)
    rt.store.redact.add_secrets([*secrets, *secrets_of((task.settings or {}).get("env") or {})])
    return await _prepare(rt, agent, task, parent, project), agent


def check_prompt(prompt: str, max_bytes: int) -> None:
    """Raises PromptError for what no CLI can be given verbatim."""
    if not prompt.strip():
        raise PromptError("the prompt is empty")
    if "\0" in prompt:
        raise PromptError(f"the prompt has a NUL character at position {prompt.index(chr(0))}")
    try:
        size = len(prompt.encode())
    except UnicodeEncodeError as error:
        raise PromptError(
            f"the prompt has half a surrogate pair at position {error.start}: it is not text"
        ) from None
    if size > max_bytes:
        raise PromptError(f"the prompt has {size:,} bytes; limits.max_prompt_bytes allows {max_bytes:,}")


async def _prepare(rt: Runtime, agent: Agent, task: Task, parent: Run | None, project: Path) -> LiveRun:
    live_parent = rt.live.get(parent.id) if parent else None
    depth = parent.depth + 1 if parent else 1
    budget = await _task_budget(rt, task, parent, depth)
    budget.check_start(depth, time.monotonic())
    if parent is not None:
        await _check_cycle(rt, parent, agent, task.prompt)
    source = await _source(rt, task.session) if task.session else None
    mode = session_mode(task)
    if mode == "fork" and source is not None:
        check_free(source)
    model, _ = resolve_model(
        task.model, (await rt.store.preferences()).get(agent.id), agent, rt.config.agents.default_model
    )
    if model is not None and has_price(model) is False:
        refuse_unknown_cost(budget, model, rt.config.limits.on_unknown_cost)
    run_id = new_run_id()
    row = Run(
        id=run_id,
        trace_id=trace_of(parent, task.parent_span),
        parent_id=parent.id if parent else None,
        parent_span_id=task.parent_span.span_id if task.parent_span else None,
        root_id=parent.root_id if parent else run_id,
        depth=depth,
        kind="agent",
        name=agent.id,
        step=task.step,
        prompt=task.prompt,
        agent=agent.model_dump(mode="json") | {"mcp_servers": hide_values(agent.mcp_servers)[0]},
        options=task.model_dump(
            mode="json", exclude={"agent", "prompt", "parent_span", "caller", "parent_id"}, exclude_defaults=True
        )
        | {"limits": budget.to_dict()},
        model_requested=model,
        project=str(project),
        cwd=str(_cwd(rt, project, task, parent, source)),
        session_id=task.session if mode == "continue" else None,  # a new one is known when there is a process
        session_mode=mode,
        source_session_id=task.session if mode == "fork" else None,
        caller=task.caller,
        budget_usd=budget.usd,
        created_us=now_us(),
        instance_id=rt.store.instance_id,
    )
    return LiveRun(
        row,
        budget,
        source.cwd if source is not None and mode == "continue" else row.cwd,
        None if source is None or task.fork_turn is None else await _end_of_turn(rt, source.id, task.fork_turn),
        touched=time.monotonic(),
        parent=live_parent,
        policy=task.questions,
        answers=can_answer(agent),
        # Whoever waits for it is at least as urgent.
        priority=max(task.priority, live_parent.priority if live_parent else task.priority),
    )


async def _check_cycle(rt: Runtime, parent: Run, agent: Agent, prompt: str) -> None:
    """Raises DelegationCycleError where a run above is of the same agent and has the same task."""
    path, above = [agent.id], parent
    while above.kind == "agent":
        path.append(above.name)
        if above.name == agent.id and (above.prompt or "").split() == prompt.split():
            way = " → ".join(reversed(path))
            raise DelegationCycleError(
                f"the same task comes back to {agent.id}: {way}", details={"run_id": above.id}
            )
        if above.parent_id is None:
            return
        above = await rt.store.run(above.parent_id)


def _project(rt: Runtime, task: Task, parent: Run | None) -> Path:
    if task.project_dir is not None:
        return rt.config.resolve(task.project_dir)
    return Path(parent.project) if parent else rt.config.project_dir


async def _source(rt: Runtime, session_id: str) -> SessionRow:
    """The session to go on with. Raises SessionNotFoundError where the CLI would not find its transcript."""
    try:
        session = await rt.store.session(session_id)
    except SessionNotFoundError:
        for run in await rt.store.runs(session_id=session_id, limit=1):
            raise SessionNotFoundError(
                f"session {session_id} never came to be: run {run.id} ended ({run.status}) before the CLI began"
            ) from None
        raise
    if Path(session.home) != rt.home:
        raise SessionNotFoundError(
            f"session {session_id} is kept under another HOME: {session.home}; this runtime's is {rt.home}",
            advice="Set claude.home to the HOME that keeps the session, or start a fresh one.",
        )
    return session


async def _end_of_turn(rt: Runtime, session_id: str, turn: int) -> str:
    """The id of the last message of a turn of the session. Raises SessionTurnError."""
    runs = [run for run in reversed(await rt.store.runs(session_id=session_id, limit=MAX_TURNS)) if run.num_turns]
    if turn <= len(runs):
        for message in reversed(await rt.store.messages(runs[turn - 1].id)):
            if message.type == "assistant" and message.body.get("parent_tool_use_id") is None:
                return str(message.body["uuid"])
    raise SessionTurnError(
        f"session {session_id} has {len(runs)} turns on record; no turn {turn}",
        details={"session_id": session_id, "turns": len(runs)},
    )


def check_free(session: SessionRow) -> None:
    """Raises SessionBusyError: a fork of a session in use would begin in the middle of a turn."""
    if session.locked_by:
        raise SessionBusyError(
            f"session {session.id} is in use by run {session.locked_by}; it can be forked when that run has ended"
        )


def session_mode(task: Task) -> SessionMode:
    """Raises ConfigError for a fork of nothing."""
    if task.session is None:
        if task.fork:
            raise ConfigError("fork needs the id of the session to fork", advice="Name the session in `session`.")
        return "fresh"
    if task.fork_turn is not None and not task.fork:
        raise ConfigError("fork_turn is for forks", advice="Ask for a fork too, or leave fork_turn out.")
    return "fork" if task.fork else "continue"


async def _task_budget(rt: Runtime, task: Task, parent: Run | None, depth: int) -> Budget:
    return budget_of(
        rt.config.limits,
        await budget_above(rt, parent),
        depth=depth,
        usd=task.budget_usd,
        tokens=task.budget_tokens,
        turns=task.max_turns,
        runs=task.max_runs,
        levels=task.max_depth,
        timeout_s=task.timeout_s or rt.config.limits.timeout_s,
    )


async def budget_above(rt: Runtime, parent: Run | None) -> Budget | None:
    """The budget a run is opened within: its parent's, or what is left of it if that works in another process.

    Raises LimitError if its parent has ended: nobody is left to take the answer.
    """
    if parent is None:
        return None
    if (live_parent := rt.live.get(parent.id)) is not None:
        return live_parent.budget
    if parent.ended:
        raise LimitError(f"run {parent.id} has ended ({parent.status}) and delegates no more")
    # The parent works in another process. Its budget cannot be shared, but what is left of it now is known.
    return Budget.of_rest(await rt.store.rest_of_budget(parent.id), time.monotonic())


def trace_of(parent: Run | None, span: SpanContext | None) -> str:
    """The trace a run belongs to: its parent's, else that of the span that called, else a new one."""
    if parent is not None:
        return parent.trace_id
    return span.trace_id if span else new_trace_id()


def _cwd(rt: Runtime, project: Path, task: Task, parent: Run | None, source: SessionRow | None) -> Path:
    """The working directory, links followed. Raises ReachError for one the task may not have."""
    base = Path(parent.cwd) if parent else project
    named = task.cwd or (Path(source.cwd) if source is not None else base)
    cwd = resolved(named, base)
    by_model = asked_by_model(
        caller=task.caller is not None,
        parent_kind=parent.kind if parent else None,
        plan_by_model=parent is not None and (parent.caller is not None or parent.parent_id is not None),
    )
    if not by_model and rt.config.limits.allowed_dirs is None:
        return cwd  # a person may name any directory
    allowed = reachable(rt, project, parent, by_model=by_model)
    check_reach([cwd, *(resolved(directory, cwd) for directory in task.add_dirs)], allowed)
    return cwd


def reachable(rt: Runtime, project: Path, parent: Run | None, *, by_model: bool) -> tuple[Path, ...] | None:
    """Directories that may be worked in, with all below them; None: any."""
    configured = rt.config.limits.allowed_dirs
    return allowed_dirs(
        configured=None if configured is None else map(rt.config.resolve, configured),
        project_dir=rt.config.project_dir.resolve(),
        project=project.resolve(),
        parent_cwd=Path(parent.cwd) if parent else None,
        workspaces=rt.config.data_path / "workspaces",
        by_model=by_model,
    )


def new_session(rt: Runtime, row: Run) -> SessionRow | None:
    """The session the run begins, held by it; None if it goes on with one."""
    if row.session_mode == "continue":
        return None
    assert row.session_id is not None
    now = now_us()
    return SessionRow(
        id=row.session_id,
        backend="claude",
        agent=row.name,
        cwd=row.cwd,
        home=str(rt.home),
        parent_id=row.source_session_id,
        locked_by=row.id,
        created_us=now,
        updated_us=now,
    )


async def withdraw(rt: Runtime, live: LiveRun) -> None:
    """A run that was refused after its row was written never began: it leaves no row, and holds no session."""
    row = live.row
    row.status, row.ended_us = "cancelled", now_us()
    try:
        await rt.store.finish_run(row)
        await rt.store.delete_run(row.id)
    except OrchestratorError:
        rt.unwritten[row.id] = row  # it would hold its session for ever
        raise
    finally:
        live.budget.give_back()
        rt.pool.leave_queue(row.id)
        rt.live.pop(row.id, None)
        live.outcome = row.outcome()
        live.ended.set()
