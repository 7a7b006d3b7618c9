"""Many prompts submitted at once to a pool of four, beside the raw CLI at every concurrency: nothing is gained by
starting more processes than the machine has cores, and nothing may be lost by submitting more."""

import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import anyio

from bench.figures import Figure, median
from bench.place import Place, ask, gather, open_place

COUNT = 3
PROMPTS = 64
POOL = 4
SWEEP = (1, 2, 3, 4, 6, 8)
AGENT = "full"


def run(count: int = COUNT, prompts: int = PROMPTS, sweep: Sequence[int] = SWEEP) -> dict[str, Any]:
    """Measure ``count`` rounds of the burst and of the raw CLI: the first at every concurrency of ``sweep``, the
    others at the two that were best."""
    burst, raw = anyio.run(_measure, count, prompts, sweep)
    best = min(raw, key=lambda concurrency: median(raw[concurrency]))
    least = median(raw[best])
    note = f"{median(burst):.1f} s; raw CLI at its best concurrency ({best}) {least:.1f} s; median of {count}"
    figure = Figure(f"{prompts} prompts at once, pool of {POOL}", median(burst) / least, "× best", 1.1, note=note)
    return {
        "figures": [figure.as_dict()],
        "burst_s": burst,
        "sweep_s": {str(concurrency): values for concurrency, values in raw.items()},
    }


async def _measure(
    count: int, prompts: int, concurrencies: Sequence[int]
) -> tuple[list[float], dict[int, list[float]]]:
    burst: list[float] = []
    sweep: dict[int, list[float]] = defaultdict(list)
    async with open_place() as place:
        await place.raw("the first fills caches")
        for _ in range(count):
            for concurrency in concurrencies:
                sweep[concurrency].append(await gather(prompts, concurrency, lambda n: place.raw(f"raw {n}")))
            burst.append(await _burst(place, prompts))
            concurrencies = sorted(sweep, key=lambda each: median(sweep[each]))[:2]
    return burst, sweep


async def _burst(place: Place, prompts: int) -> float:
    async with place.runtime(limits__max_processes=POOL, limits__max_queue=prompts) as rt:
        began = time.monotonic()
        async with anyio.create_task_group() as tg:
            for n in range(prompts):
                tg.start_soon(ask, rt, f"burst {n}", AGENT)
        return time.monotonic() - began
