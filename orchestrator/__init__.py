"""Hand work to agents: real CLI processes in durable, budgeted, traced sessions that continue and fork.

The names below are the public ones. They load on first use, so that ``import orchestrator`` stays cheap.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from orchestrator.agents import Agent, Catalog
    from orchestrator.config import Config, load_config
    from orchestrator.delegation import delegate, submit
    from orchestrator.errors import OrchestratorError
    from orchestrator.outcome import Outcome, Usage
    from orchestrator.plan_runs import run_plan
    from orchestrator.pools import ProcessPool, StreamingPool
    from orchestrator.runtime import Runtime, open_runtime
    from orchestrator.shared_pools import Pools
    from orchestrator.task import Task
    from orchestrator.warming import keep_warm
    from orchestrator.watching import watch_run

_HOME = {
    "Agent": "orchestrator.agents",
    "Catalog": "orchestrator.agents",
    "Config": "orchestrator.config",
    "load_config": "orchestrator.config",
    "Task": "orchestrator.task",
    "delegate": "orchestrator.delegation",
    "submit": "orchestrator.delegation",
    "OrchestratorError": "orchestrator.errors",
    "Outcome": "orchestrator.outcome",
    "Usage": "orchestrator.outcome",
    "run_plan": "orchestrator.plan_runs",
    "ProcessPool": "orchestrator.pools",
    "StreamingPool": "orchestrator.pools",
    "Pools": "orchestrator.shared_pools",
    "Runtime": "orchestrator.runtime",
    "open_runtime": "orchestrator.runtime",
    "keep_warm": "orchestrator.warming",
    "watch_run": "orchestrator.watching",
}

__all__ = [
    "Agent",
    "Catalog",
    "Config",
    "OrchestratorError",
    "Outcome",
    "Pools",
    "ProcessPool",
    "Runtime",
    "StreamingPool",
    "Task",
    "Usage",
    "__version__",
    "delegate",
    "keep_warm",
    "load_config",
    "open_runtime",
    "run_plan",
    "submit",
    "watch_run",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
