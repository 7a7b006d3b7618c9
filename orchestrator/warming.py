"""The warm processes that settings ask for: ``pool.warm`` names agents, and how many of each."""

import logging

from orchestrator.admission import admit
from orchestrator.conversation import Spec
from orchestrator.errors import OrchestratorError
from orchestrator.runtime import Runtime
from orchestrator.specs import build_spec
from orchestrator.task import Task

log = logging.getLogger(__name__)


async def keep_warm(rt: Runtime) -> None:
    """Keep the configured warm processes, for ever; anew when agent files change. Returns if none are asked for.

    An agent that cannot be started is logged and left out: its runs will say why.
    """
    if not rt.config.pool.warm:
        return
    with rt.events.watch() as events:
        rt.pool.keep_warm(await _wanted(rt))
        async for event in events:
            if event.type == "agents.changed":
                rt.pool.keep_warm(await _wanted(rt))


async def _wanted(rt: Runtime) -> list[tuple[Spec, str, int]]:
    wanted: list[tuple[Spec, str, int]] = []
    for name, count in rt.config.pool.warm.items():
        task = Task(agent=name, prompt="to be kept warm")
        try:
            live, agent = await admit(rt, task)
            wanted.append((await build_spec(rt, live, agent, task), agent.id, count))
        except OrchestratorError as error:
            log.warning("pool.warm: cannot keep %s warm: %s", name, error)
    return wanted
