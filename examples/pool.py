"""Several questions to one agent, two at a time, and one answer shown while it is written.

.venv/bin/python examples/pool.py            asks the model your Claude Code is logged in to
.venv/bin/python examples/pool.py --offline  a scripted model answers; nothing leaves the machine
"""

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio

from orchestrator import Config, ProcessPool, StreamingPool, load_config, open_runtime
from orchestrator.messages import StreamEvent
from orchestrator.offline import offline_model, offline_settings, scenario_beside

HERE = Path(__file__).parent
MODULES = ("tiny_repo/shelf/store.py", "tiny_repo/shelf/report.py", "tiny_repo/tests/test_store.py")


async def main(offline: bool) -> None:
    async with settings(offline) as config, open_runtime(config) as rt:
        async with ProcessPool(rt, agent="worker", max_workers=2, task_timeout_s=120) as pool:
            prompts = [f"What is in examples/{module}? One sentence." for module in MODULES]
            async for task in pool.map(prompts, order="completion"):
                assert task.outcome is not None
                print(f"{task.status}: {task.task.prompt}\n    {task.outcome.text}")
            print(pool.get_stats())

        async with StreamingPool(rt, agent="worker") as pool:
            task = await pool.submit("What would you change first in examples/tiny_repo? Three sentences.")
            async for message in task:
                if isinstance(message, StreamEvent) and message.text_delta:
                    print(message.text_delta, end="", flush=True)
            outcome = await task.result()
            print(f"\n{outcome.status}, {outcome.usage.total_tokens} tokens, {outcome.cost_usd} USD")


@asynccontextmanager
async def settings(offline: bool) -> AsyncIterator[Config]:
    config = load_config(project_dir=HERE.parent)
    if not offline:
        yield config
        return
    async with offline_model(scenario_beside(Path(__file__).with_suffix(".yaml"))) as model:
        yield load_config(project_dir=HERE.parent, overrides=offline_settings(config, model.base_url))


if __name__ == "__main__":
    anyio.run(main, "--offline" in sys.argv)
