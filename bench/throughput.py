"""Prompts per second, four at once: raw CLI processes, fresh sessions of warm processes, turns of live sessions."""

from collections import defaultdict
from contextlib import AsyncExitStack
from typing import Any

import anyio

from bench.figures import Figure, median, summary
from bench.place import Bare, Place, ask, gather, open_place, quiet
from orchestrator import Runtime

COUNT = 5
PROMPTS = 32
AT_ONCE = 4
AGENT = "full"

Samples = dict[str, list[float]]


def run(count: int = COUNT, prompts: int = PROMPTS) -> dict[str, Any]:
    """Measure ``count`` rounds of ``prompts`` prompts each way."""
    samples = anyio.run(_measure, count, prompts)
    return {
        "figures": [figure.as_dict() for figure in _figures(samples, prompts)],
        "samples_per_s": {name: summary(values) for name, values in samples.items()},
    }


async def _measure(count: int, prompts: int) -> Samples:
    samples: Samples = defaultdict(list)
    async with open_place() as place:
        for _ in range(count):
            samples["raw"].append(prompts / await gather(prompts, AT_ONCE, lambda n: place.raw(f"raw {n}")))
            samples["fresh"].append(prompts / await _fresh(place, prompts))
            samples["bare fresh"].append(prompts / await _bare(place, prompts, turns=1))
            samples["live"].append(prompts / await _live(place, prompts))
            samples["bare live"].append(prompts / await _bare(place, AT_ONCE, turns=prompts // AT_ONCE))
            await place.model.arrivals()
    return samples


async def _fresh(place: Place, prompts: int) -> float:
    """Each prompt in a session of its own; as many processes are warm as there are prompts."""
    warm = {AGENT: prompts}
    async with place.runtime(pool__warm=warm, pool__max_idle=prompts, limits__max_processes=AT_ONCE) as rt:
        await quiet(rt, warm)
        return await gather(prompts, AT_ONCE, lambda n: ask(rt, f"fresh {n}", AGENT))


async def _live(place: Place, prompts: int) -> float:
    """The prompts are turns of as many sessions as work at once."""
    async with place.runtime(pool__max_sessions=AT_ONCE, limits__max_processes=AT_ONCE) as rt:
        sessions = [(await ask(rt, f"begin {n}", AGENT)).session_id for n in range(AT_ONCE)]
        await quiet(rt, {})
        turns = prompts // AT_ONCE
        return await gather(AT_ONCE, AT_ONCE, lambda n: _go_on(rt, sessions[n], turns))


async def _bare(place: Place, processes: int, *, turns: int) -> float:
    """What the CLI itself can do: processes that are ready, each asked one prompt after the other, without us."""
    async with AsyncExitStack() as stack:
        ready: list[Bare] = []

        async def open_one(_: int) -> None:
            ready.append(await stack.enter_async_context(place.bare()))

        await gather(processes, AT_ONCE, open_one)
        if turns > 1:  # as with ours, the first turn of each session is not counted
            for bare in ready:
                await bare.ask("begin")

        async def ask_one(n: int) -> None:
            for turn in range(turns):
                await ready[n].ask(f"bare {n} {turn}")

        return await gather(processes, AT_ONCE, ask_one)


async def _go_on(rt: Runtime, session: str | None, turns: int) -> None:
    for n in range(turns):
        await ask(rt, f"turn {n}", AGENT, session=session)


def _figures(samples: Samples, prompts: int) -> list[Figure]:
    kinds = ("raw", "fresh", "live", "bare fresh", "bare live")
    raw, fresh, live, bare_fresh, bare_live = (median(samples[kind]) for kind in kinds)
    n = f"medians of {len(samples['raw'])} rounds of {prompts}"
    return [
        Figure(
            f"{prompts} prompts, {AT_ONCE} at once: fresh sessions",
            fresh / raw, "× raw cold", at_least=2.5, note=f"{fresh:.1f}/s, raw {raw:.1f}/s; {n}",
        ),
        Figure(
            f"{prompts} prompts, {AT_ONCE} at once: turns of live sessions",
            live / raw, "× raw cold", at_least=10, note=f"{live:.1f}/s, raw {raw:.1f}/s; {n}",
        ),
        Figure(
            "of what bare processes do that are ready: fresh sessions", fresh / bare_fresh, "×",
            note=f"bare {bare_fresh:.1f}/s, {bare_fresh / raw:.2g} × raw cold",
        ),
        Figure(
            "of what bare processes do that are ready: turns of live sessions", live / bare_live, "×",
            note=f"bare {bare_live:.1f}/s, {bare_live / raw:.2g} × raw cold",
        ),
    ]  # fmt: skip
