"""The one place where a run begins, is recorded and ends.

The order is the promise: limits are checked, then the run's row is committed, then the process starts; the result
is committed before anyone is told. The end is written under a shield, so a run that is cancelled keeps what the
agent had said.
"""

import logging
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import anyio

from orchestrator.agents import Agent, resolve_model
from orchestrator.conversation import Conversation, SessionMode
from orchestrator.errors import (
    BackendError,
    ConfigError,
    LimitError,
    OrchestratorError,
    PromptError,
    RunCancelledError,
    RunTimeoutError,
    SessionBusyError,
    SessionNotFoundError,
    StructuredOutputError,
)
from orchestrator.groups import unwrapped
from orchestrator.limits import Budget, check_depth
from orchestrator.messages import KeepAlive, Message, StreamEvent
from orchestrator.outcome import Outcome, RunStatus
from orchestrator.runtime import LiveRun, Runtime
from orchestrator.specs import build_spec, hide_values, permission_mode
from orchestrator.store import Run, SessionRow, now_us
from orchestrator.task import Task
from orchestrator.tracing import new_run_id, new_trace_id

log = logging.getLogger(__name__)

# How long a stopped CLI may take to say what the turn had cost.
WIND_DOWN_SECONDS = 0.7
# How often the text of a running turn is put on its row: what a crash leaves behind is at most this old.
TEXT_SECONDS = 0.25
TEXT_CHARS_PER_SECOND = 1_000_000
FOREIGN_POLL_SECONDS = 0.3


async def delegate(rt: Runtime, task: Task) -> Outcome:
    """Run the task to its end. Cancelling the caller cancels the run.

    A run that fails is an outcome, not an exception. Raises only what refuses the task before anything is
    spent: AgentNotFoundError, AgentError, ConfigError, PromptError, DepthLimitError, BudgetExceededError,
    SessionNotFoundError, SessionBusyError, StoreError.
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
    if rt.closing:
        raise RunCancelledError("the orchestrator is shutting down", retryable=True)
    check_prompt(task.prompt, rt.config.limits.max_prompt_bytes)
    parent = await rt.store.run(task.parent_id) if task.parent_id else None
    project = _project(rt, task, parent)
    agent = (await rt.agents_of(project)).get(task.agent)
    permission_mode(rt, agent, task)
    live = await _prepare(rt, agent, task, parent, project)
    rt.live[live.row.id] = live
    try:
        await rt.store.create_run(live.row)
        await _take_session(rt, agent, live.row)
        if live.parent is not None and live.parent.stop_error is not None:
            raise RunCancelledError(f"run {live.parent.row.id}, which delegates this one, is being stopped")
        if rt.closing:
            raise RunCancelledError("the orchestrator is shutting down", retryable=True)
    except BaseException:
        with anyio.CancelScope(shield=True):
            await _withdraw(rt, live)
        raise
    rt.task_group.start_soon(_execute, rt, live, agent, task)
    rt.emit("run.created", live.row.id, **summary(live.row))
    return live.row.id


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


# -- beginning ----------------------------------------------------------------------------------------------


async def _prepare(rt: Runtime, agent: Agent, task: Task, parent: Run | None, project: Path) -> LiveRun:
    live_parent = rt.live.get(parent.id) if parent else None
    depth = parent.depth + 1 if parent else 1
    check_depth(depth, rt.config.limits.max_depth)
    budget = await _budget(rt, task, parent, live_parent)
    budget.check()
    source = await _source(rt, task.session) if task.session else None
    mode = session_mode(task)
    if mode == "fork" and source is not None:
        check_free(source)
    model, _ = resolve_model(
        task.model, (await rt.store.preferences()).get(agent.id), agent, rt.config.agents.default_model
    )
    run_id = new_run_id()
    row = Run(
        id=run_id,
        trace_id=_trace_id(task, parent),
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
        ),
        model_requested=model,
        project=str(project),
        cwd=str(_cwd(project, task, parent, source)),
        session_id=task.session if mode == "continue" else str(uuid.uuid4()),
        session_mode=mode,
        source_session_id=task.session if mode == "fork" else None,
        caller=task.caller,
        budget_usd=budget.limit,
        created_us=now_us(),
        instance_id=rt.store.instance_id,
    )
    return LiveRun(row, budget, touched=time.monotonic(), parent=live_parent)


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
    return "fork" if task.fork else "continue"


async def _budget(rt: Runtime, task: Task, parent: Run | None, live_parent: LiveRun | None) -> Budget:
    """What the run may spend. Raises LimitError if its parent has ended: nobody is left to take the answer."""
    if parent is None:
        return Budget(rt.config.limits.budget_usd if task.budget_usd is None else task.budget_usd)
    if live_parent is not None:
        return Budget(task.budget_usd, parent=live_parent.budget)
    if parent.ended:
        raise LimitError(f"run {parent.id} has ended ({parent.status}) and delegates no more")
    # The parent works in another process. Its budget cannot be shared, but what is left of it now is known.
    above = Budget(await rt.store.rest_of_budget(parent.id))
    return Budget(rt.config.limits.budget_usd if task.budget_usd is None else task.budget_usd, parent=above)


def _trace_id(task: Task, parent: Run | None) -> str:
    if parent is not None:
        return parent.trace_id
    return task.parent_span.trace_id if task.parent_span else new_trace_id()


def _cwd(project: Path, task: Task, parent: Run | None, source: SessionRow | None) -> Path:
    base = Path(parent.cwd) if parent else project
    if task.cwd is not None:
        return (base / task.cwd).resolve()
    return Path(source.cwd) if source is not None else base


async def _take_session(rt: Runtime, agent: Agent, row: Run) -> None:
    assert row.session_id is not None
    if row.session_mode == "continue":
        await rt.store.hold_session(row.session_id, row.id)
        return
    now = now_us()
    await rt.store.begin_session(
        SessionRow(
            id=row.session_id,
            backend="claude",
            agent=agent.id,
            cwd=row.cwd,
            home=str(rt.home),
            parent_id=row.source_session_id,
            locked_by=row.id,
            created_us=now,
            updated_us=now,
        )
    )


async def _withdraw(rt: Runtime, live: LiveRun) -> None:
    """A run that was refused after its row was written never began: it leaves no row, and holds no session."""
    row = live.row
    try:
        await rt.store.finish_run(row)
        await rt.store.delete_run(row.id)
        if row.session_mode != "continue" and row.session_id is not None:
            await rt.store.forget_session(row.session_id)
    finally:
        rt.live.pop(row.id, None)
        live.outcome = row.outcome()
        live.ended.set()


# -- working ------------------------------------------------------------------------------------------------


async def _execute(rt: Runtime, live: LiveRun, agent: Agent, task: Task) -> None:
    """The whole life of a run in a task of its own. Whatever happens, its end is written."""
    error: OrchestratorError | None = RunCancelledError("the orchestrator was stopped", retryable=True)
    try:
        with live.scope:
            async with rt.slot(live.row.depth):
                await _begin(rt, live)
                await _converse(rt, live, agent, task)
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


async def _begin(rt: Runtime, live: LiveRun) -> None:
    live.row.status = "running"
    live.row.started_us = now_us()
    live.touch(time.monotonic())
    if live.row.source_session_id is not None:
        check_free(await rt.store.session(live.row.source_session_id))  # it may have waited long for its place
    await rt.store.update_run(live.row.id, status="running", started_us=live.row.started_us)
    rt.emit("run.started", live.row.id, **summary(live.row))


async def _converse(rt: Runtime, live: LiveRun, agent: Agent, task: Task) -> None:
    """One turn with the CLI; sets the verdict on ``live``."""
    limits = rt.config.limits
    wall, idle = task.timeout_s or limits.timeout_s, task.idle_timeout_s or limits.idle_timeout_s
    live.budget.check()  # others may have spent it while this run waited for its place
    spec = await build_spec(rt, live, agent, task)
    async with rt.connect(spec) as conversation:
        try:
            with unwrapped():
                async with anyio.create_task_group() as tg:
                    tg.start_soon(_watch_time, live, wall, idle)
                    tg.start_soon(_note_text, rt, live)
                    tg.start_soon(conversation.send, _first_words(agent, live.row, task))
                    await _listen(rt, live, conversation)
                    tg.cancel_scope.cancel()
        except BaseException:
            with anyio.CancelScope(shield=True), anyio.move_on_after(WIND_DOWN_SECONDS):
                await _wind_down(rt, live, conversation)
            if live.progress.result is not None and verdict(rt, live, task.output_schema is not None) is None:
                live.answered = True  # the answer was on its way when the run was stopped
            raise
        live.verdict = verdict(rt, live, task.output_schema is not None)
        live.answered = True


def _first_words(agent: Agent, row: Run, task: Task) -> str:
    if row.session_mode == "fresh" and agent.initial_prompt:
        return f"{agent.initial_prompt}\n\n{task.prompt}"
    return task.prompt


async def _listen(rt: Runtime, live: LiveRun, conversation: Conversation) -> None:
    """Take in messages up to the result, each recorded before it is acted upon."""
    while live.progress.result is None:
        await take(rt, live, await conversation.receive())
        if live.progress.unreadable is not None:
            raise BackendError(f"the CLI's result could not be read: {live.progress.unreadable}")
        if live.progress.result is None:
            if (fatal := rt.dialect.fatal(live.progress.last_retry)) is not None:
                raise fatal
            live.budget.check()


async def _note_text(rt: Runtime, live: LiveRun) -> None:
    noted, row_chars = "", len(live.row.prompt or "")
    while True:
        # SQLite writes the whole row anew, prompt included: large ones less often.
        await anyio.sleep(max(TEXT_SECONDS, (row_chars + len(noted)) / TEXT_CHARS_PER_SECOND))
        if (text := live.progress.text) != noted:
            noted = text
            await rt.store.note_progress(live.row.id, text=text)


async def take(rt: Runtime, live: LiveRun, message: Message) -> None:
    """Record one message and update what is known of the run: its figures, its budget, its watchers."""
    live.touch(time.monotonic())
    before, activity, known = live.progress.charge_usd, live.progress.activity, live.progress.initialised
    live.progress.feed(message)
    live.budget.charge(live.progress.charge_usd - before)
    if not isinstance(message, StreamEvent | KeepAlive):
        # Deltas are not kept one by one: the assistant message that follows says the same in one row.
        raw = message.raw()
        live.messages += 1
        await rt.store.add_message(live.row.id, live.messages, raw.get("type", "?"), raw.get("subtype"), raw)
    if live.progress.initialised and not known:
        assert live.row.session_id is not None
        await rt.store.count_turn(live.row.session_id, live.row.id)
    if live.progress.activity != activity:
        rt.emit("run.activity", live.row.id, **figures(live))


async def _wind_down(rt: Runtime, live: LiveRun, conversation: Conversation) -> None:
    """Interrupt the turn and keep what the CLI still says: the cut text and what the turn cost."""
    await conversation.interrupt()
    while live.progress.result is None:
        try:
            await take(rt, live, await conversation.receive())
        except OrchestratorError:
            return


async def _watch_time(live: LiveRun, wall: float, idle: float) -> None:
    """Stop the run when it takes too long, or when nothing has been heard of it and its children for too long."""
    deadline = time.monotonic() + wall
    while True:
        now = time.monotonic()
        if now >= deadline:
            live.stop(RunTimeoutError(f"the run took longer than {wall:g} s", details={"kind": "wall"}))
        elif now >= live.touched + idle:
            live.stop(RunTimeoutError(f"nothing was heard of the run for {idle:g} s", details={"kind": "idle"}))
        await anyio.sleep(max(0.01, min(deadline, live.touched + idle) - now))


def verdict(rt: Runtime, live: LiveRun, schema_asked: bool) -> OrchestratorError | None:
    """Whether the turn is an answer. A schema asked for and no structured output is an error, whatever was said."""
    progress = live.progress
    assert progress.result is not None
    error = rt.dialect.error_of(progress.result, progress.last_retry, progress.assistant_error)
    if error is None and schema_asked and not progress.result.has_structured_output:
        return StructuredOutputError("the agent answered in text where structured output was asked for")
    return error


# -- ending -------------------------------------------------------------------------------------------------

_STATUS: Mapping[type[OrchestratorError], RunStatus] = {
    RunCancelledError: "cancelled",
    RunTimeoutError: "timed_out",
}


def ended_as(error: OrchestratorError | None) -> RunStatus:
    """The status of a run that ended with the error; without one, of an answer."""
    return "succeeded" if error is None else _STATUS.get(type(error), "failed")


async def _end(rt: Runtime, live: LiveRun, error: OrchestratorError | None) -> None:
    """Write the end, then tell."""
    if error is not None:
        await stop_children(rt, live)
    row, progress, result = live.row, live.progress, live.progress.result
    before = progress.charge_usd
    progress.cut_short()
    live.budget.charge(progress.charge_usd - before)
    row.status = ended_as(error)
    row.error = error.to_dict() if error else None
    row.text = progress.text
    if error is None and result is not None:
        row.text = result.result or progress.text
        row.structured, row.has_structured = result.structured_output, result.has_structured_output
    row.model_used = progress.model
    usage = progress.usage
    row.input_tokens, row.output_tokens = usage.input_tokens, usage.output_tokens
    row.cache_read_tokens, row.cache_write_tokens = usage.cache_read_tokens, usage.cache_write_tokens
    row.cost_usd, row.cost_basis = cost_of(live)
    row.num_turns = progress.num_turns
    await conclude(rt, live)


async def stop_children(rt: Runtime, live: LiveRun) -> None:
    """End what a run that did not succeed has delegated, and wait for it.

    Nobody is left to take the answers, and nobody said it may go on spending.
    """
    children = [run for run in rt.live.values() if run.parent is live]
    for child in children:
        child.stop(RunCancelledError(f"run {live.row.id}, which delegated this one, has ended"))
    for child in children:
        await child.ended.wait()


async def conclude(rt: Runtime, live: LiveRun) -> None:
    """Commit the end that is on the row, then tell everyone who waits or watches. Call it under a shield."""
    row = live.row
    row.ended_us = now_us()
    rt.tokens.revoke(row.id)
    try:
        await rt.store.finish_run(row)
        if row.session_mode in ("fresh", "fork") and not live.progress.initialised:
            assert row.session_id is not None
            await rt.store.forget_session(row.session_id)
    except OrchestratorError:
        # The disk is full or gone. Whoever waits must still be told; the next start marks the run interrupted.
        log.exception("run %s: its end could not be stored", row.id)
    finally:
        live.outcome = row.outcome()
        rt.live.pop(row.id, None)
        live.ended.set()
    rt.exporter.export(row)
    rt.emit("run.ended", row.id, **summary(row))
    log.info("run %s %s: %s in %s ms", row.id, row.status, row.name, row.duration_ms, extra={"run_id": row.id})


def cost_of(live: LiveRun) -> tuple[float | None, Any]:
    """What the run cost and how that is known. Part of it without a known price makes the whole unknown."""
    progress = live.progress
    if progress.cost_usd is None or (progress.estimated and progress.unpriced):
        if not live.progress.initialised:
            return 0.0, None  # no request was made
        return None, None
    return progress.cost_usd, "estimate" if progress.estimated else "cli"


def summary(row: Run) -> dict[str, Any]:
    """The facts of a run an event carries."""
    return {
        "status": row.status,
        "kind": row.kind,
        "name": row.name,
        "step": row.step,
        "parent_id": row.parent_id,
        "root_id": row.root_id,
        "model": row.model_used or row.model_requested,
        "depth": row.depth,
        "tokens": row.usage.total_tokens,
        "cost_usd": row.cost_usd,
        "duration_ms": row.duration_ms,
        "error": row.error,
    }


def figures(live: LiveRun) -> dict[str, Any]:
    """The state of a running turn an event carries."""
    progress = live.progress
    return {
        "activity": progress.activity,
        "model": progress.model or live.row.model_requested,
        "tokens": progress.usage.total_tokens,
        "cost_usd": progress.cost_usd,
        "text_chars": len(progress.text),
    }
