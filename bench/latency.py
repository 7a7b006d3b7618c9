"""From the call to the model's first request, and our own share of it: raw CLI, warm processes, live sessions.

Interleaved: every round has one of each kind. Raw is `claude -p` with stream-json on both sides, from its start to
the moment the model has its first request in full. The model is the same process for all of them.
"""

import time
from collections import defaultdict
from typing import Any

import anyio

from bench.figures import Figure, median, p95, summary
from bench.place import Place, ask, open_place, quiet
from orchestrator import Runtime

COUNT = 30
WARM = {"full": 1, "lean": 1}
#: The first rounds fill caches: of the disk, of the CLI in its new HOME, of our own first use of everything.
UNCOUNTED = 2

Samples = dict[str, list[float]]


def run(count: int = COUNT) -> dict[str, Any]:
    """Measure ``count`` rounds."""
    samples = anyio.run(_measure, count)
    return {
        "figures": [figure.as_dict() for figure in _figures(samples)],
        "samples_ms": {name: summary([1000 * value for value in values]) for name, values in samples.items()},
    }


async def _measure(count: int) -> Samples:
    samples: Samples = defaultdict(list)
    async with open_place() as place, place.runtime(pool__warm=WARM) as rt:
        for n in range(-UNCOUNTED, count):
            if n == 0:
                samples.clear()
            await quiet(rt, WARM)
            samples["raw: start to request"].append(await _raw(place, f"raw {n}"))
            for agent in WARM:
                await quiet(rt, WARM)
                session = await _turn(place, rt, samples, f"fresh {agent}", f"fresh {agent} {n}", agent)
                await quiet(rt, WARM)
                await _turn(place, rt, samples, f"next {agent}", f"next {agent} {n}", agent, session=session)
    return samples


async def _raw(place: Place, prompt: str) -> float:
    began = time.monotonic()
    await place.raw(prompt)
    return (await place.model.arrivals())[prompt] - began


async def _turn(
    place: Place, rt: Runtime, samples: Samples, kind: str, prompt: str, agent: str, **more: Any
) -> str | None:
    began = time.monotonic()
    outcome = await ask(rt, prompt, agent, **more)
    ended = time.monotonic()
    samples[f"{kind}: call to request"].append((await place.model.arrivals())[prompt] - began)
    samples[f"{kind}: call to prompt written"].append(place.stamps.sent - began)
    samples[f"{kind}: result read to return"].append(ended - place.stamps.result)
    return outcome.session_id


def _figures(samples: Samples) -> list[Figure]:
    raw = median(samples["raw: start to request"])
    n = len(samples["raw: start to request"])
    base = f"medians of {n}; raw {1000 * raw:.0f} ms"
    own = [
        1000 * value
        for kind in ("fresh full", "fresh lean")
        for value in samples[f"{kind}: call to prompt written"]
    ]
    told = [1000 * v for name, values in samples.items() if name.endswith("result read to return") for v in values]

    def of_raw(kind: str) -> float:
        return median(samples[f"{kind}: call to request"]) / raw

    return [
        Figure("fresh run, warm: call → first model request", of_raw("fresh full"), "× raw cold", 0.32, note=base),
        Figure("the same, lean agent", of_raw("fresh lean"), "× raw cold", 0.25, note=base),
        Figure("next turn of a live session", of_raw("next full"), "× raw cold", 0.10, note=base),
        Figure("next turn of a live session, lean agent", of_raw("next lean"), "× raw cold", note=base),
        Figure("our share: call → prompt written, p50", median(own), "ms", 3, note=f"{len(own)} runs, row stored"),
        Figure("our share: call → prompt written, p95", p95(own), "ms", 10, note=f"{len(own)} runs"),
        Figure("result read → stored and returned, p50", median(told), "ms", 3, note=f"{len(told)} turns"),
        Figure("result read → stored and returned, p95", p95(told), "ms", note=f"{len(told)} turns"),
    ]  # fmt: skip
