"""Waiting for runs on behalf of a caller who wants to hear that something is going on."""

import time
from collections.abc import Awaitable, Callable, Sequence

import anyio

from mcp_tools.asking import asked
from mcp_tools.context import PERSON, Caller
from mcp_tools.results import parked
from orchestrator.delegation import wait
from orchestrator.groups import unwrapped
from orchestrator.outcome import Outcome
from orchestrator.runtime import LiveRun, Runtime

#: At most one word in this time, however busy the agents are.
THROTTLE_SECONDS = 1.0

#: Report progress: a number that grows, no total, what is going on.
Say = Callable[[float, float | None, str | None], Awaitable[None]]


async def wait_all(
    rt: Runtime,
    run_ids: Sequence[str],
    seconds: float,
    say: Say,
    *,
    first: bool = False,
    caller: Caller = PERSON,
) -> dict[str, Outcome]:
    """The outcomes of these runs once all have ended, with ``first`` one of them, or of those that have after
    ``seconds``, or when one of them asks something of the ``caller``.

    Cancelling it touches no run.
    """
    outcomes: dict[str, Outcome] = {}
    waiting = list(run_ids)

    async def collect(run_id: str) -> None:
        outcomes[run_id] = await wait(rt, run_id)
        waiting.remove(run_id)
        if first:
            collecting.cancel_scope.cancel()

    with anyio.move_on_after(seconds), unwrapped():
        async with anyio.create_task_group() as narrating:
            narrating.start_soon(_narrate, rt, waiting, len(run_ids), say)
            async with anyio.create_task_group() as collecting:
                narrating.start_soon(_until_asked, rt, run_ids, caller, collecting.cancel_scope)
                for run_id in run_ids:
                    collecting.start_soon(collect, run_id)
            narrating.cancel_scope.cancel()
    return outcomes


async def _until_asked(rt: Runtime, run_ids: Sequence[str], caller: Caller, waiting: anyio.CancelScope) -> None:
    """End the wait when the caller has something to answer: nothing would go on until then."""
    with rt.events.watch() as watcher:
        events, lost = aiter(watcher), 0
        while not asked(rt, caller, run_ids):
            # Whoever loses events may have lost this one.
            while (await anext(events)).type != "run.asked" and watcher.lost == lost:
                pass
            lost = watcher.lost
    waiting.cancel()


async def _narrate(rt: Runtime, waiting: Sequence[str], total: int, say: Say) -> None:
    begun, heartbeat = time.monotonic(), rt.config.server.progress_s
    throttle = min(THROTTLE_SECONDS, heartbeat)
    with rt.events.watch() as watcher:
        events = aiter(watcher)
        while waiting:
            said = activity(rt, waiting, total)
            await say(round(time.monotonic() - begun, 3), None, said)
            await anyio.sleep(throttle)
            with anyio.move_on_after(heartbeat - throttle):
                # An event says that something changed; what is true now is on the runs.
                while waiting and activity(rt, waiting, total) == said:
                    await anext(events)


def activity(rt: Runtime, waiting: Sequence[str], total: int = 1) -> str:
    """One line about what these runs are doing now, ``total`` with those that have ended."""
    shown = "; ".join(_doing(rt, run_id) for run_id in waiting[:3])
    return shown if total == 1 else f"{total - len(waiting)} of {total} done; {shown}"


def _doing(rt: Runtime, run_id: str) -> str:
    live = rt.live.get(run_id)
    if live is None:
        return "in another process"
    return parked(live.row) or f"{live.row.name}: {_activity_of(live)}"


def _activity_of(live: LiveRun) -> str:
    if live.questions:
        return "waits for an answer"
    return "queued" if live.row.status == "queued" else live.progress.activity
