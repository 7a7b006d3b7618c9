"""The tools that tell of runs, sessions and agents, and change nothing."""

import re
from typing import Annotated, Any

from mcp.server.mcpserver import Context
from pydantic import Field

from mcp_tools import results
from mcp_tools.context import caller_of
from mcp_tools.told import told_to_the_model
from orchestrator.agents import resolve_model
from orchestrator.errors import ConfigError
from orchestrator.outcome import RunStatus
from orchestrator.runtime import Runtime
from orchestrator.store import Run, now_us

#: Rows that may share a microsecond with the last row of a page.
_TIES = 16

_CURSOR = re.compile(r"([0-9]{1,18})-([0-9a-f]{16})")


class ReadingTools:
    """The functions behind the tools, bound to a runtime."""

    def __init__(self, rt: Runtime) -> None:
        self._rt = rt

    async def query_traces(
        self,
        ctx: Context,
        agent: Annotated[str | None, Field(description="Name of the agent or plan.")] = None,
        session_id: str | None = None,
        status: RunStatus | None = None,
        run_id: Annotated[str | None, Field(description="This run and all below it.")] = None,
        parent_id: Annotated[str | None, Field(description="Runs that this run has started.")] = None,
        text: Annotated[str | None, Field(description="Words in the prompt or the answer.")] = None,
        since: Annotated[str | None, Field(description="ISO 8601 (UTC), or how long ago: 30m, 2h, 3d.")] = None,
        until: Annotated[str | None, Field(description="Like since.")] = None,
        limit: Annotated[int, Field(ge=1, le=100)] = 20,
        cursor: Annotated[str | None, Field(description="`next` of the page before.")] = None,
    ) -> results.Traces:
        """Find runs, past and present, newest first. All filters given must hold.

        Prompts and answers are cut; run_wait has the whole answer of a run. An agent sees the runs of its own
        tree.
        """
        with told_to_the_model():
            caller = await caller_of(self._rt, ctx)
            now = now_us()
            within = (await self._rt.store.run(run_id)).id if run_id else None
            rows, following = await self._page(
                cursor,
                limit,
                results.instant(until, now) if until else None,
                agent=agent,
                session_id=session_id,
                status=status,
                within=within,
                parent_id=parent_id,
                text=text,
                after_us=results.instant(since, now) if since else None,
                root_id=caller.run.root_id if caller.run else None,
            )
            return {"runs": [results.trace_row(row) for row in rows], "next": following}

    async def list_agents(self, ctx: Context) -> results.Agents:
        """The agents one can delegate to: what each is for, its model and its tools."""
        with told_to_the_model():
            caller = await caller_of(self._rt, ctx)
            catalog = await self._rt.agents_of(caller.project or self._rt.config.project_dir)
            preferences = await self._rt.store.preferences()
        default = self._rt.config.agents.default_model
        agents: list[results.AgentRow] = []
        for agent in catalog.agents():
            row: results.AgentRow = {"name": agent.id, "description": results.cut(agent.description, 300)}
            model, _ = resolve_model(None, preferences.get(agent.id), agent, default)
            if model:
                row["model"] = model
            if agent.tools is not None:
                row["tools"] = list(agent.tools)
            agents.append(row)
        problems = [f"{p.path}:{p.line or 1}: {p.reason}" for p in catalog.problems()]
        return {"agents": agents, "problems": problems}

    async def _page(
        self, cursor: str | None, limit: int, until_us: int | None, **filters: Any
    ) -> tuple[list[Run], str | None]:
        """One page of runs and the cursor of the next: where the last row stands in the order of the store."""
        at, last = _position(cursor)
        before = min((us for us in (until_us, None if at is None else at + 1) if us is not None), default=None)
        rows = await self._rt.store.runs(before_us=before, limit=limit + 1 + _TIES, **filters)
        rows = [row for row in rows if at is None or row.created_us < at or row.id > last]
        page = rows[:limit]
        return page, f"{page[-1].created_us}-{page[-1].id}" if len(rows) > limit else None


def _position(cursor: str | None) -> tuple[int | None, str]:
    if cursor is None:
        return None, ""
    match = _CURSOR.fullmatch(cursor)
    if match is None:
        raise ConfigError(f"{cursor!r} is no cursor", advice="Use `next` of the page before, unchanged.")
    return int(match[1]), match[2]
