"""A server whose prompts and resources are the agents there are, and which tells its clients when these change.

They are derived from the catalog with each request, so they cannot fall behind it. Tools take an agent's name as
free text, so the list of tools stays as it is when agents come and go.
"""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import anyio
from mcp.server import MCPServer
from mcp.server.mcpserver import Context
from mcp.server.subscriptions import (
    InMemorySubscriptionBus,
    PromptsListChanged,
    ResourcesListChanged,
    ResourceUpdated,
    ServerEvent,
)
from mcp_types import GetPromptResult, Prompt, Resource

from mcp_tools.prompts import get_prompt, list_prompts
from mcp_tools.resources import AGENTS, Resources, agent_uri, list_resources
from orchestrator.events import Event, Watcher
from orchestrator.runtime import Runtime


class CatalogServer(MCPServer[Any]):
    """An MCPServer with a prompt and a resource for each agent of the runtime's own project.

    Lists are the same for everybody, as the protocol wants it; agents of other projects can be read by name.
    """

    def __init__(self, rt: Runtime, name: str, **options: Any) -> None:
        super().__init__(name, subscriptions=CatalogBus(rt), **options)
        self._rt = rt
        Resources(rt).add_to(self)

    async def list_prompts(self) -> list[Prompt]:
        return list_prompts(self._rt.catalog)

    async def get_prompt(
        self,
        name: str,
        arguments: dict[str, Any] | None = None,  # noqa: ARG002  # there are none; what is given changes nothing
        context: Context[Any, Any] | None = None,  # noqa: ARG002
    ) -> GetPromptResult:
        """Raises MCPError."""
        return get_prompt(self._rt.catalog, name)

    async def list_resources(self) -> list[Resource]:
        return list_resources(self._rt.catalog)


class CatalogBus(InMemorySubscriptionBus):
    """Publishes what changes in the catalog. Watches the runtime's events only while somebody listens."""

    def __init__(self, rt: Runtime) -> None:
        super().__init__()
        self._rt = rt
        self._listening: set[object] = set()
        self._watch = anyio.CancelScope()

    def subscribe(self, listener: Callable[[ServerEvent], None]) -> Callable[[], None]:
        """Register ``listener``; call what is returned when it is gone, once or more."""
        unsubscribe, token = super().subscribe(listener), object()
        if not self._listening:
            self._begin()
        self._listening.add(token)

        def leave() -> None:
            unsubscribe()
            self._listening.discard(token)
            if not self._listening:
                self._watch.cancel()

        return leave

    def _begin(self) -> None:
        self._watch = anyio.CancelScope()
        # From this moment on, not from when the task gets its turn: a change in between would be missed.
        stack = ExitStack()
        watcher = stack.enter_context(self._rt.events.watch())
        self._rt.task_group.start_soon(self._tell, watcher, self._lists(), stack, self._watch)

    async def _tell(self, watcher: Watcher, known: object, stack: ExitStack, scope: anyio.CancelScope) -> None:
        lost = 0
        with stack, scope:
            async for event in watcher:
                if event.type != "agents.changed" and watcher.lost == lost:
                    continue
                lost = watcher.lost
                if (now := self._lists()) != known:
                    known = now
                    await self.publish(PromptsListChanged())
                    await self.publish(ResourcesListChanged())
                for uri in _updated(event):
                    await self.publish(ResourceUpdated(uri=uri))

    def _lists(self) -> object:
        """What the lists of prompts and resources show. Agents of other projects change neither."""
        return [(agent.id, agent.description) for agent in self._rt.catalog.agents()]


def _updated(event: Event) -> list[str]:
    """The resources that read differently after the event."""
    if event.type != "agents.changed":
        return []
    names = [name for kind in ("added", "changed", "removed") for name in event.data.get(kind, ())]
    return [AGENTS, *map(agent_uri, names)]
