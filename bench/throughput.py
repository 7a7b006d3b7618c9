"""Prompts per second, four at once: raw CLI processes, fresh sessions of warm processes, turns of live sessions."""

from collections import defaultdict
from typing import Any

import anyio

from bench.figures import Figure, median, summary
from bench.place import Place, ask, gather, open_place, quiet
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
            samples["live"].append(prompts / await _live(place, prompts))
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


async def _go_on(rt: Runtime, session: str | None, turns: int) -> None:
    for n in range(turns):
        await ask(rt, f"turn {n}", AGENT, session=session)


def _figures(samples: Samples, prompts: int) -> list[Figure]:
    raw, fresh, live = (median(samples[kind]) for kind in ("raw", "fresh", "live"))
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
    ]  # fmt: skip
