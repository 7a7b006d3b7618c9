"""Runs that meet a usage limit of the provider: parked without a process, and gone on with when it has ended."""

import time

import anyio

from orchestrator.agents import Agent
from orchestrator.attempts import converse
from orchestrator.errors import RateLimitError
from orchestrator.notes import note
from orchestrator.parking import Park, Refuse, UsageLimit, park, parked, refused, resumed, usage_limit
from orchestrator.progress import Progress
from orchestrator.runtime import LiveRun, Runtime
from orchestrator.task import Task

#: The clock may be set while a run waits, so it is looked at this often, in seconds. As often those above the run
#: are told that their time stands still: one with less left than this may run out of it.
NAP_SECONDS = 1.0


async def converse_or_wait(rt: Runtime, live: LiveRun, agent: Agent, task: Task) -> None:
    """Converse; where the account has reached a usage limit, wait for its end and go on, as often as allowed."""
    while True:
        if (limit := rt.reached.of(rt.account, time.time())) is None:
            await converse(rt, live, agent, task)
            limit = usage_limit(live.verdict, live.rate_limit, account=rt.account, now=time.time())
            if limit is None:
                return
            rt.reached.reach(limit)
        if not await _wait_out(rt, live, limit):
            return


async def _wait_out(rt: Runtime, live: LiveRun, limit: UsageLimit) -> bool:
    """Park the run until the limit ends. False: it may not wait, and its verdict is the provider's error."""
    row, now = live.row, time.time()
    decision = park(limit, now, rt.config.limits, live.waits, row.id)
    if isinstance(decision, Refuse):
        left = None if limit.resets_at is None else limit.resets_at - now
        error = live.verdict or RateLimitError(f"the account has reached its {limit.kind} limit", retry_after=left)
        live.verdict, live.answered = refused(error, decision), True
        return False
    _set_aside(live)
    attempt = live.waits.parks + 1
    rt.pool.leave_queue(row.id)  # nobody has to be refused because this one waits
    row.status, row.resume_at_us = "waiting", int(decision.until * 1_000_000)
    await rt.store.update_run(row.id, status=row.status, resume_at_us=row.resume_at_us)
    await note(rt, live, "run.parked", parked(limit, decision, attempt))
    try:
        await _sleep(live, decision)
    finally:
        live.waits.add(time.time() - now)
        live.waits.over = time.monotonic()
        row.resume_at_us = None
    row.status = "queued"
    await rt.store.update_run(row.id, status=row.status, resume_at_us=None)
    await note(rt, live, "run.resumed", resumed(limit, decision, attempt, live.waits))
    return True


def _set_aside(live: LiveRun) -> None:
    """Keep what the refused turn has said and spent; the next one begins with nothing."""
    if live.verdict is not None:  # refused in a turn of its own, and not before it had a process
        live.earlier.append(live.progress)
        live.progress = Progress()
    live.verdict, live.rate_limit, live.answered = None, None, False


async def _sleep(live: LiveRun, decision: Park) -> None:
    while (left := decision.until - time.time()) > 0:
        before = time.monotonic()
        await anyio.sleep(min(left, NAP_SECONDS))
        after = time.monotonic()
        live.pause(after, after - before)
