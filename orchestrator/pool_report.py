"""The pool as plain data, for whoever asks: the command line, HTTP, a dashboard. Pure."""

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from orchestrator.breakers import BreakerStats
from orchestrator.parking import UsageLimit
from orchestrator.pool_state import PoolCounters, PoolState, Worker


def pool_report(
    state: PoolState,
    pids: Mapping[int, int],
    now: float,
    *,
    max_queue: int,
    provider: Mapping[str, Any],
) -> dict[str, Any]:
    """What the pool holds and did, as JSON data; nothing of what was said in its processes.

    ``pids`` are the process ids of the workers that have one, ``now`` is by the clock of the pool
    (``anyio.current_time``). Times are seconds; memory is MB, of a worker null until it has been measured, in all
    with estimates for those. ``queue.length`` counts runs that wait for a process, ``working`` runs that have one
    and do not merely wait for runs they delegated. ``provider`` is ``provider_report``.
    """
    return {
        "working": state.working,
        "queue": {"length": state.waiting, "max": max_queue},
        "provider": dict(provider),
        "memory_mb": round(state.memory_mb, 1),
        "limits": asdict(state.limits),
        "counters": counters(state.counters),
        "workers": [_worker(worker, pids.get(worker.id), now) for worker in state.workers.values()],
    }


def provider_report(circuit: BreakerStats, limit: UsageLimit | None, *, parked: int) -> dict[str, Any]:
    """Whether the provider lets runs begin, as JSON data.

    ``circuit`` is the breaker of the account, with ``retry_after`` in seconds. ``usage_limit`` is the limit that is
    known to be reached, null if none is, ``resets_at`` in seconds since 1970. ``parked`` runs wait for its end.
    """
    reached = None if limit is None else {"kind": limit.kind, "resets_at": limit.resets_at}
    return {"circuit": asdict(circuit), "usage_limit": reached, "parked": parked}


def counters(of: PoolCounters) -> dict[str, Any]:
    """What happened since the pool was opened; ``retired`` by reason, the others are numbers."""
    # Not asdict: it takes a Counter for a list of pairs.
    figures = {field.name: getattr(of, field.name) for field in fields(of)}
    return {**figures, "retired": dict(sorted(of.retired.items()))}


def _worker(worker: Worker, pid: int | None, now: float) -> dict[str, Any]:
    return {
        "id": worker.id,
        "pid": pid,
        "agent": worker.agent,
        "model": worker.model,
        "phase": worker.phase,
        "starting": worker.starting,
        "run_id": worker.run_id,
        "parent_id": worker.parent_id,
        "session_id": worker.session_id,
        "turns": worker.turns,
        "age_s": round(now - worker.born, 1),
        "phase_s": round(now - worker.since, 1),
        "memory_mb": None if worker.memory_mb is None else round(worker.memory_mb, 1),
    }
