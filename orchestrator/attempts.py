"""How a run comes to its answer: a place, a process, a turn; another process if one dies; the API if none starts.

Before each attempt come the limits that stand for the account: the rate of beginnings and the circuit breaker.
"""

import logging
import random
import time
import uuid
from dataclasses import replace
from pathlib import Path

import anyio

from orchestrator.admission import check_free, new_session
from orchestrator.agents import Agent
from orchestrator.backends.api import installed, open_fallback
from orchestrator.backends.api_fallback import why_not_fall_back
from orchestrator.backends.claude_files import state_of, transcript
from orchestrator.conversation import Spec, Turn
from orchestrator.endings import summary
from orchestrator.errors import CircuitOpenError, OrchestratorError, RateLimitError
from orchestrator.killing import sweep
from orchestrator.parking import prompt_uuid
from orchestrator.pool import Lease
from orchestrator.pool_state import Request
from orchestrator.reach import check_unmoved
from orchestrator.runtime import LiveRun, Runtime
from orchestrator.specs import build_spec, turn_environ
from orchestrator.store import Run, now_us
from orchestrator.task import Task
from orchestrator.treatments import Verdict
from orchestrator.turn import hold_turn

log = logging.getLogger(__name__)


async def converse(rt: Runtime, live: LiveRun, agent: Agent, task: Task) -> None:
    """One turn with the CLI, or with what may stand in for it; sets the verdict on ``live``."""
    spec = await build_spec(rt, live, agent, task)
    if live.earlier:  # it was parked: its own session goes on, whatever it began from
        spec = replace(spec, session_mode="continue", source_session_id=None, source_message_id=None)
    environ = turn_environ(live.row, spec.env)
    turn = Turn(_first_words(agent, live.row, task), prompt_uuid(live.row.id), environ, asks=spec.asks)
    try:
        await _over_cli(rt, live, task, spec, turn)
    except OrchestratorError as error:
        # Of the settings only those the task brings matter: ours restrict what only the CLI can do.
        plain, settings = replace(spec, settings=task.settings), rt.config.fallback
        may_not = why_not_fall_back(error, plain, settings, heard=live.progress.heard, installed=installed())
        if live.stop_error is not None or may_not is not None:
            raise
        await _begin_over_api(rt, live, error)
        async with open_fallback(plain, settings) as conversation:
            await hold_turn(rt, live, task, conversation, turn)


def _first_words(agent: Agent, row: Run, task: Task) -> str:
    if row.session_mode == "fresh" and agent.initial_prompt:
        return f"{agent.initial_prompt}\n\n{task.prompt}"
    return task.prompt


async def _over_cli(rt: Runtime, live: LiveRun, task: Task, spec: Spec, turn: Turn) -> None:
    """Attempts until one has begun. A process that ends before it has said anything has done nothing."""
    attempt = 1
    while True:
        try:
            return await _attempt(rt, live, task, spec, turn)
        except OrchestratorError as error:
            delay = _delay(rt, live, attempt, error)
            if delay is None or live.progress.heard or live.stop_error is not None:
                raise
            log.warning("run %s: %s; trying again in %.1f s", live.row.id, error, delay)
            rt.emit("run.retried", live.row.id, attempt=attempt, delay_s=delay, error=error.to_dict())
        attempt += 1
        if spec.session_mode != "continue":  # which a run that was parked does, too
            await _forget_session(rt, live)
            spec = replace(spec, session_id=str(uuid.uuid4()))
        await anyio.sleep(delay)


def _delay(rt: Runtime, live: LiveRun, attempt: int, error: OrchestratorError) -> float | None:
    """Seconds until the next attempt; None if there is to be none."""
    if live.waits.parks and isinstance(error, CircuitOpenError):
        # It has waited for hours perhaps, and nothing of its turn was refused: it waits for this, too.
        return error.retry_after
    return rt.retry.delay(attempt, error, random.random())  # noqa: S311  # to spread retries, no secret


async def _forget_session(rt: Runtime, live: LiveRun) -> None:
    """The session the run was to begin never came to be."""
    if live.row.session_mode != "continue" and live.row.session_id is not None:
        await rt.store.forget_session(live.row.session_id)
        live.row.session_id = None


async def _attempt(rt: Runtime, live: LiveRun, task: Task, spec: Spec, turn: Turn) -> None:
    rt.breaker.check(anyio.current_time())  # before a process is started in vain
    check_unmoved(spec.cwd)  # and again when there is a process: a link may be put there while the run waits
    async with rt.pool.lease(_request(rt, live, spec), spec) as lease:
        async with rt.limiter.acquire():
            pass  # taken when there is a process: what waited long together must not begin together
        live.permit = rt.breaker.admit(anyio.current_time())
        error: BaseException | None = None
        try:
            await lease.prepare(turn, permission_mode=spec.permission_mode)
            await _begin(rt, live, lease)
            await _answer(rt, live, task, spec, lease, turn)
            error = live.verdict
        except BaseException as problem:
            error = problem
            raise
        finally:
            _report(rt, live, error)


def _report(rt: Runtime, live: LiveRun, error: BaseException | None) -> None:
    """What the attempt says about the backend. A limit whose end is known is no failure: runs wait for it."""
    assert live.permit is not None
    limit = isinstance(error, RateLimitError) and error.retry_after is not None
    cancelled = error is not None and not isinstance(error, Exception)
    verdict: Verdict | None = "neutral" if limit or cancelled or live.stop_error is not None else None
    rt.breaker.report(live.permit, error, anyio.current_time(), verdict)
    live.permit = None


async def _answer(rt: Runtime, live: LiveRun, task: Task, spec: Spec, lease: Lease, turn: Turn) -> None:
    try:
        await hold_turn(rt, live, task, lease.conversation, turn)
    finally:
        if live.progress.result is None:
            lease.hangs()
    if live.verdict is None:
        if live.commands:
            # The process stays for the next turn; what this turn left running in the background does not.
            await anyio.to_thread.run_sync(sweep, {live.row.id})
            await lease.end_orphans()
        if spec.budget_usd is None:  # the CLI counts its own budget on over all turns of a process
            lease.keep(_transcript(live, spec, lease.session_id))


def _transcript(live: LiveRun, spec: Spec, session_id: str) -> str:
    """The state of the session's file: it tells whether anybody else has gone on with the session."""
    return state_of(transcript(session_id, Path(live.session_cwd), spec.env))


def _request(rt: Runtime, live: LiveRun, spec: Spec) -> Request:
    row = live.row
    return Request(
        run_id=row.id,
        key=rt.pool.key_of(spec),
        agent=row.name,
        model=spec.model,
        session_id=row.session_id,
        transcript=_transcript(live, spec, row.session_id) if row.session_id else "",
        fresh=spec.session_mode == "fresh",
        parent_id=row.parent_id,
        priority=live.priority,
    )


async def _begin(rt: Runtime, live: LiveRun, lease: Lease) -> None:
    """The run has its process: store that before anything is asked of it."""
    row = live.row
    check_unmoved(Path(row.cwd))
    if live.earlier:
        _resume_clock(live)
    live.budget.check_start(now=time.monotonic())  # others may have spent it while this run waited for its place
    if live.earlier:
        row.status = "running"
        await rt.store.update_run(row.id, status="running")
        return
    if row.source_session_id is not None:
        check_free(await rt.store.session(row.source_session_id))  # it may have waited long
    row.session_id = lease.take()
    _start_clock(live)
    await rt.store.begin_run(row, new_session(rt, row))
    rt.emit("run.started", row.id, **summary(row))


def _start_clock(live: LiveRun) -> None:
    """The run's time begins with its first attempt; it does not begin anew with another."""
    now = time.monotonic()
    live.row.status = "running"
    if live.began is None:
        live.row.started_us = now_us()
        live.began = live.budget.began = now
    live.touch(now)


def _resume_clock(live: LiveRun) -> None:
    """To wait for a place is no time of the run's, the second time neither."""
    assert live.budget.began is not None
    now = time.monotonic()
    live.budget.began += now - live.waits.over
    live.touch(now)


async def _begin_over_api(rt: Runtime, live: LiveRun, error: OrchestratorError) -> None:
    """No CLI began the run. That the API answers it, and why, is on its row before it is asked."""
    live.budget.check_start(now=time.monotonic())
    rt.pool.leave_queue(live.row.id)
    await _forget_session(rt, live)  # the API keeps none
    live.row.fallback = error.to_dict()
    _start_clock(live)
    await rt.store.begin_run(live.row, None)
    log.warning("run %s: %s; answered over the API", live.row.id, error)
    rt.emit("run.started", live.row.id, **summary(live.row))
