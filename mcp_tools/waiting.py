"""Waiting for runs on behalf of a caller who wants to hear that something is going on."""

import time
from collections.abc import Awaitable, Callable, Sequence

import anyio

from orchestrator.delegate import wait
from orchestrator.groups import unwrapped
from orchestrator.outcome import Outcome
from orchestrator.runtime import Runtime

#: Clients give up on calls that are silent for minutes; a word this often keeps them, and people, waiting.
HEARTBEAT_SECONDS = 10.0
#: At most one word in this time, however busy the agents are.
THROTTLE_SECONDS = 1.0

#: Report progress: a number that grows, no total, what is going on.
Say = Callable[[float, float | None, str | None], Awaitable[None]]


async def wait_all(rt: Runtime, run_ids: Sequence[str], seconds: float, say: Say) -> dict[str, Outcome]:
    """The outcomes of these runs once all have ended, or of those that have after ``seconds``.

    Cancelling it touches no run.
    """
    outcomes: dict[str, Outcome] = {}

    async def collect(run_id: str) -> None:
        outcomes[run_id] = await wait(rt, run_id)

    with anyio.move_on_after(seconds), unwrapped():
        async with anyio.create_task_group() as narrating:
            narrating.start_soon(_narrate, rt, run_ids, say)
            async with anyio.create_task_group() as collecting:
                for run_id in run_ids:
                    collecting.start_soon(collect, run_id)
            narrating.cancel_scope.cancel()
    return outcomes


async def _narrate(rt: Runtime, run_ids: Sequence[str], say: Say) -> None:
    begun = time.monotonic()
    with rt.events.watch() as watcher:
        events = aiter(watcher)
        while True:
            said = activity(rt, run_ids)
            await say(round(time.monotonic() - begun, 1), None, said)
            await anyio.sleep(THROTTLE_SECONDS)
            with anyio.move_on_after(HEARTBEAT_SECONDS - THROTTLE_SECONDS):
                # An event says that something changed; what is true now is on the runs.
                while activity(rt, run_ids) == said:
                    await anext(events)


def activity(rt: Runtime, run_ids: Sequence[str]) -> str:
    """One line about what these runs are doing now."""
    busy = [_doing(rt, run_id) for run_id in run_ids if run_id in rt.live]
    if len(run_ids) == 1:
        return busy[0] if busy else "working in another process"
    return f"{len(run_ids) - len(busy)} of {len(run_ids)} done; {'; '.join(busy[:3])}".removesuffix("; ")


def _doing(rt: Runtime, run_id: str) -> str:
    live = rt.live[run_id]
    return f"{live.row.name}: {'queued' if live.row.status == 'queued' else live.progress.activity}"
