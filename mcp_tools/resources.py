"""What clients may read by address: agents, runs, traces and sessions. Callers see what they see with the tools."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote

from mcp.server import MCPServer
from mcp.server.mcpserver import Context
from mcp.server.mcpserver.exceptions import ResourceError, ResourceNotFoundError
from mcp.server.mcpserver.resources import ResourceSecurity
from mcp_types import Resource

from mcp_tools import results, tables
from mcp_tools.context import caller_of
from mcp_tools.lookup import readable, readable_session
from mcp_tools.reading import ReadingTools
from orchestrator.agents import Agent, Catalog, resolve_model
from orchestrator.errors import (
    AgentNotFoundError,
    OrchestratorError,
    RunNotFoundError,
    SessionNotFoundError,
)
from orchestrator.runtime import Runtime
from orchestrator.store import Run

AGENTS = "agents://"
JSON = "application/json"
#: Of a text inside a resource, and of a whole trace, in characters; more is to be had with get_trace.
TEXT_CHARS = 50_000
#: Runs listed with a session, newest first.
SESSION_RUNS = 50
_NOT_FOUND = (AgentNotFoundError, RunNotFoundError, SessionNotFoundError)


def list_resources(catalog: Catalog) -> list[Resource]:
    """The list of agents, and each of them. Runs and sessions are too many; they have templates."""
    listed = Resource(uri=AGENTS, name="agents", description="The agents there are.", mime_type=JSON)
    return [listed, *(_resource(agent) for agent in catalog.agents())]


def agent_uri(agent_id: str) -> str:
    """The address of an agent, whatever characters its name has."""
    return AGENTS + quote(agent_id, safe=":")


def _resource(agent: Agent) -> Resource:
    description = results.cut(agent.description, results.DESCRIPTION_CHARS)
    return Resource(uri=agent_uri(agent.id), name=agent.id, description=description, mime_type=JSON)


class Resources:
    """The functions behind the templates, bound to a runtime."""

    def __init__(self, rt: Runtime) -> None:
        self._rt = rt
        self._reading = ReadingTools(rt)

    def add_to(self, server: MCPServer[Any]) -> None:
        """Give the server its templates."""
        # A name is looked up among names, it leads to no file: it may look like a path.
        names = ResourceSecurity(exempt_params=frozenset({"name"}))
        server.resource("agents://{name}", name="agent", mime_type=JSON, security=names)(self.agent)
        server.resource("run://{run_id}", name="run", mime_type=JSON)(self.run)
        server.resource("trace://{run_id}", name="trace", mime_type="text/plain")(self.trace)
        server.resource("session://{session_id}", name="session", mime_type=JSON)(self.session)

    async def agent(self, name: str, ctx: Context) -> str:
        """An agent: what it is for, its model, tools and instructions. Without a name: all of them, in short."""
        with _told():
            caller = await caller_of(self._rt, ctx)
            if not name:
                return results.compact(await self._reading.agents(caller))
            catalog = await self._rt.agents_of(caller.project or self._rt.config.project_dir)
            agent = catalog.get(name)
            preferred = (await self._rt.store.preferences()).get(agent.id)
            model, origin = resolve_model(None, preferred, agent, self._rt.config.agents.default_model)
            return results.compact(_agent(agent, model, origin))

    async def run(self, run_id: str, ctx: Context) -> str:
        """A run: its state, prompt and answer."""
        with _told():
            run = await readable(self._rt, await caller_of(self._rt, ctx), run_id)
            return results.compact(_run(run))

    async def trace(self, run_id: str, ctx: Context) -> str:
        """A run and all below it, one line each: status, model, tokens, cost, time."""
        with _told():
            run = await readable(self._rt, await caller_of(self._rt, ctx), run_id)
            return await self._reading.tree(run, TEXT_CHARS)

    async def session(self, session_id: str, ctx: Context) -> str:
        """A session: its agent, where it stands, and its latest runs."""
        with _told():
            caller = await caller_of(self._rt, ctx)
            session = await readable_session(self._rt, caller, session_id)
            runs = await self._rt.store.runs(session_id=session.id, limit=SESSION_RUNS + 1)
            page = tables.run_page(runs[:SESSION_RUNS], None)
            more = {"more": f"query_traces(session_id={session.id!r})"} if len(runs) > SESSION_RUNS else {}
            return results.compact({**tables.session_row(session), "runs": page.get("runs"), **more})


def _agent(agent: Agent, model: str | None, origin: str) -> dict[str, Any]:
    # Not the whole file: the settings of MCP servers and hooks may hold credentials.
    return {
        "name": agent.id,
        "description": agent.description,
        "model": model,
        "model_from": origin,
        "tools": agent.tools,
        "disallowed_tools": agent.disallowed_tools,
        "permission_mode": agent.permission_mode,
        "max_turns": agent.max_turns,
        "source": agent.source,
        "path": str(agent.path),
        "warnings": agent.warnings,
        **_text("instructions", agent.system_prompt, "read the file at path"),
    }


def _run(run: Run) -> dict[str, Any]:
    whole = f"get_trace({results.compact({'run_id': run.id, 'view': 'run'})})"
    answer = results.compact(run.structured) if run.has_structured else run.text
    return {
        **results.trace_row(run),
        "cwd": run.cwd,
        "project": run.project,
        **_text("prompt", run.prompt or "", whole),
        **_text("text", answer, whole),
        "error": run.error,
    }


def _text(name: str, text: str, whole: str) -> dict[str, Any]:
    """A text; if it is too long its beginning, its length and how to have all of it."""
    if len(text) <= TEXT_CHARS:
        return {name: text}
    return {name: text[:TEXT_CHARS], f"{name}_chars": len(text), f"{name}_whole": whole}


@contextmanager
def _told() -> Iterator[None]:
    """Only ResourceError reaches the client with its words; what is not found is told as the protocol has it."""
    try:
        yield
    except _NOT_FOUND as error:
        raise ResourceNotFoundError(error.message) from error
    except OrchestratorError as error:
        raise ResourceError(results.refusal(error)) from error
