"""How a run ends: what it delegated first, then the record, then everyone who waits or watches."""

import logging
import time
from collections.abc import Mapping
from typing import Any

from orchestrator.errors import OrchestratorError, RunCancelledError, RunInterruptedError, RunTimeoutError
from orchestrator.outcome import RunStatus
from orchestrator.runtime import LiveRun, Runtime
from orchestrator.store import Run, now_us

log = logging.getLogger(__name__)

_STATUS: Mapping[type[OrchestratorError], RunStatus] = {
    RunCancelledError: "cancelled",
    RunTimeoutError: "timed_out",
    RunInterruptedError: "interrupted",
}


def ended_as(error: OrchestratorError | None) -> RunStatus:
    """The status of a run that ended with the error; without one, of an answer."""
    return "succeeded" if error is None else _STATUS.get(type(error), "failed")


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
    # The clock may be set while a run works; how long it took is told by the other one.
    took = None if live.began is None else int((time.monotonic() - live.began) * 1e6)
    row.ended_us = now_us() if took is None or row.started_us is None else row.started_us + took
    redact = rt.store.redact  # what is told is what is stored
    row.text, row.error, row.structured = redact.text(row.text), redact.data(row.error), redact.data(row.structured)
    try:
        await rt.store.finish_run(row)
        if row.session_mode in ("fresh", "fork") and row.session_id and not live.progress.initialised:
            await rt.store.forget_session(row.session_id)
    except OrchestratorError:
        # The disk is full or gone. Whoever waits must still be told; the end is written when there is room again.
        log.exception("run %s: its end could not be stored", row.id)
        rt.unwritten[row.id] = row
    finally:
        live.outcome = row.outcome()
        rt.pool.leave_queue(row.id)
        rt.live.pop(row.id, None)
        live.ended.set()
    rt.exporter.export(row)
    rt.emit("run.ended", row.id, **summary(row))
    log.info("run %s %s: %s in %s ms", row.id, row.status, row.name, row.duration_ms, extra={"run_id": row.id})


def cost_of(live: LiveRun) -> tuple[float | None, Any]:
    """What the run cost and how that is known. Part of it without a known price makes the whole unknown."""
    begun = [each for each in live.attempts if each.initialised or each.cost_usd is not None]
    if not begun:
        return 0.0, None  # no request was made
    costs = [None if each.estimated and each.unpriced else each.cost_usd for each in begun]
    known = [cost for cost in costs if cost is not None]
    if len(known) < len(costs):
        return None, None
    estimated = live.row.fallback is not None or any(each.estimated for each in begun)
    return sum(known), "estimate" if estimated else "cli"


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
