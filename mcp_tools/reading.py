"""The tools that tell of runs, sessions and agents, and change nothing."""

import json
import re
import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from mcp.server.mcpserver import Context
from pydantic import Field

from mcp_tools import results, tables, traces
from mcp_tools.context import Caller, caller_of
from mcp_tools.lookup import as_now, check_name, own_tree, project_of, readable, sessions_below
from mcp_tools.told import told_to_the_model
from mcp_tools.waiting import activity
from orchestrator.agents import Agent, resolve_model
from orchestrator.errors import ConfigError
from orchestrator.limits import Limits
from orchestrator.messages import pair_tools, parse_message
from orchestrator.outcome import RunStatus
from orchestrator.runtime import Runtime
from orchestrator.store import Run, now_us

#: Groups of one page of usage; the total has all there are.
USAGE_GROUPS = 50
#: Agents of one page.
AGENTS = 100

_CURSOR = re.compile(r"([0-9]{1,18})-(.{1,100})")
_GROUP_CURSOR = re.compile(r"after:(.{0,5000})", re.DOTALL)

Since = Annotated[str | None, Field(description="ISO 8601 or how long ago: 30m, 2h, 3d.")]
Until = Annotated[str | None, Field(description="Like since.")]
Limit = Annotated[int, Field(ge=1, le=100)]
Cursor = Annotated[str | None, Field(description="`next` of the last page.")]
Project = Annotated[str | None, Field(description="Its directory; . is the caller's.")]
NotLess = Annotated[float | None, Field(ge=0, allow_inf_nan=False)]
View = Literal["tree", "run"]


class ReadingTools:
    """The functions behind the tools, bound to a runtime."""

    def __init__(self, rt: Runtime) -> None:
        self._rt = rt

    async def query_traces(
        self,
        ctx: Context,
        agent: Annotated[str | None, Field(description="Name of the agent or plan.")] = None,
        project: Project = None,
        session_id: str | None = None,
        status: RunStatus | None = None,
        run_id: Annotated[str | None, Field(description="This run and all below it.")] = None,
        parent_id: Annotated[str | None, Field(description="What this run has started.")] = None,
        text: Annotated[str | None, Field(description="Words in the prompt or the answer.")] = None,
        since: Since = None,
        until: Until = None,
        min_cost_usd: NotLess = None,
        max_cost_usd: NotLess = None,
        min_duration_s: NotLess = None,
        max_duration_s: NotLess = None,
        group_by: Annotated[
            Literal["agent", "model", "status", "day"] | None, Field(description="Sums, not rows.")
        ] = None,
        limit: Limit = 20,
        cursor: Cursor = None,
    ) -> tables.Traces:
        """Find runs, past and present, newest first. All filters given must hold.

        Prompts and answers are cut; get_trace has them whole. An agent sees its own run and those below it.
        """
        with told_to_the_model():
            caller = await caller_of(self._rt, ctx)
            now = now_us()
            filters = {
                "agent": agent,
                "project": None if project is None else project_of(self._rt, caller, project),
                "session_id": session_id,
                "status": status,
                "within": await self._below(caller, run_id),
                "parent_id": None if parent_id is None else (await readable(self._rt, caller, parent_id)).id,
                "text": text,
                "after_us": results.instant(since, now) if since else None,
                "before_us": results.instant(until, now) if until else None,
                "min_cost_usd": min_cost_usd,
                "max_cost_usd": max_cost_usd,
                "min_duration_us": None if min_duration_s is None else min_duration_s * 1e6,
                "max_duration_us": None if max_duration_s is None else max_duration_s * 1e6,
            }
            found = await self._grouped(group_by, cursor, limit, now, filters) if group_by else None
            found = found or await self._page(cursor, limit, filters)
            if agent is not None and not (found.get("runs") or found.get("groups")):
                await check_name(self._rt, caller, agent)
            return found

    async def get_trace(
        self,
        run_id: Annotated[str, Field(description="The run, or the start of its id.")],
        ctx: Context,
        view: Annotated[View, Field(description="It and all below it, or this one in full.")] = "tree",
        max_chars: Annotated[int, Field(ge=traces.MIN_CHARS, le=traces.MAX_CHARS)] = traces.DEFAULT_CHARS,
        cursor: Annotated[str | None, Field(description="As named where something was left out.")] = None,
    ) -> str:
        """Show what a run did.

        tree: a line for each run with status, model, tokens, cost, time, error. run: prompt, answer, error and
        every tool call with its result.
        """
        with told_to_the_model():
            run = await readable(self._rt, await caller_of(self._rt, ctx), run_id)
            if view == "run":
                return await self.run_in_full(run, max_chars, cursor)
            return await self.tree(run, max_chars, cursor)

    async def list_sessions(
        self,
        ctx: Context,
        agent: str | None = None,
        project: Project = None,
        limit: Limit = 20,
        cursor: Cursor = None,
    ) -> tables.Sessions:
        """The conversations one can go on with or fork, last used first."""
        with told_to_the_model():
            caller = await caller_of(self._rt, ctx)
            rows = await self._rt.store.session_views(
                agent=agent,
                project=None if project is None else project_of(self._rt, caller, project),
                below=await sessions_below(self._rt, caller),
                past=_position(cursor),
                prompt_chars=2 * results.PROMPT_CHARS,
                limit=limit + 1,
            )
            if agent is not None and not rows:
                await check_name(self._rt, caller, agent)
            page, more = rows[:limit], len(rows) > limit
            return {
                "sessions": [tables.session_row(row) for row in page],
                "next": f"{page[-1].updated_us}-{page[-1].id}" if more else None,
            }

    async def usage(
        self,
        ctx: Context,
        by: Literal["agent", "model", "project", "day"] = "agent",
        run_id: Annotated[str | None, Field(description="It and all below it, and what it has left.")] = None,
        since: Since = None,
        until: Until = None,
        cursor: Cursor = None,
    ) -> tables.UsageReport:
        """What agents have used: runs, tokens, cost. Runs without a known cost are counted apart."""
        with told_to_the_model():
            caller = await caller_of(self._rt, ctx)
            now = now_us()
            filters: Any = {
                "kind": "agent",
                "within": await self._below(caller, run_id),
                "after_us": results.instant(since, now) if since else None,
                "before_us": results.instant(until, now) if until else None,
            }
            [total] = await self._rt.store.sums(None, now, **filters)
            groups = await self._rt.store.sums(
                by, now, limit=USAGE_GROUPS + 1, past_key=_past_key(cursor), **filters
            )
            report: tables.UsageReport = {
                "total": tables.use_row(total),
                "groups": [tables.use_row(each) for each in groups[:USAGE_GROUPS]],
                "next": f"after:{groups[USAGE_GROUPS - 1].key}" if len(groups) > USAGE_GROUPS else None,
            }
            if run_id is not None:
                rest = await self._rest(await readable(self._rt, caller, run_id))
                report["left"] = tables.left_of(rest, time.monotonic())
            return report

    async def run_status(
        self, run_ids: Annotated[list[str], Field(min_length=1, max_length=100)], ctx: Context
    ) -> tables.States:
        """What runs are doing at this moment, without waiting for them."""
        with told_to_the_model():
            caller = await caller_of(self._rt, ctx)
            runs = [await readable(self._rt, caller, run_id) for run_id in dict.fromkeys(run_ids)]
            now = now_us()
            return {"runs": [tables.state_row(run, activity(self._rt, [run.id]), now) for run in runs]}

    async def list_agents(self, ctx: Context, cursor: str | None = None) -> results.Agents:
        """The agents one can delegate to: what each is for, its model and its tools."""
        with told_to_the_model():
            return await self.agents(await caller_of(self._rt, ctx), cursor)

    # -- what resources show too --------------------------------------------------------------------------

    async def agents(self, caller: Caller, cursor: str | None = None) -> results.Agents:
        """A page of the agents of the caller's project, from ``cursor`` on. Raises StoreError, ConfigError."""
        catalog = await self._rt.agents_of(caller.project or self._rt.config.project_dir)
        preferences = await self._rt.store.preferences()
        default = self._rt.config.agents.default_model
        agents = catalog.agents()
        begin = _begin(cursor, agents)
        page = agents[begin : begin + AGENTS]
        models = [resolve_model(None, preferences.get(agent.id), agent, default)[0] for agent in page]
        told: results.Agents = {
            "agents": [results.agent_row(agent, model) for agent, model in zip(page, models, strict=True)],
            "problems": results.problem_lines(catalog.problems()),
        }
        return told | {"next": agents[begin + AGENTS].id} if len(agents) > begin + AGENTS else told

    async def tree(self, run: Run, max_chars: int, cursor: str | None = None) -> str:
        """The run and all below it as text."""
        runs = [as_now(self._rt, each) for each in await self._rt.store.tree(run.id)]
        return traces.tree_text(runs, run.id, max_chars, cursor)

    async def run_in_full(self, run: Run, max_chars: int, cursor: str | None = None) -> str:
        """The run with its prompt, its answer and its tool calls as text."""
        stored = await self._rt.store.messages(run.id)
        said = [parse_message(json.dumps(each.body)) for each in stored if each.type in ("assistant", "user")]
        return traces.run_text(run, pair_tools(said), max_chars, cursor)

    # -- what they share ----------------------------------------------------------------------------------

    async def _below(self, caller: Caller, run_id: str | None) -> str | None:
        """The run below which to look: the one asked for, else the caller's own."""
        return own_tree(caller) if run_id is None else (await readable(self._rt, caller, run_id)).id

    async def _page(self, cursor: str | None, limit: int, filters: dict[str, Any]) -> tables.Traces:
        rows = await self._rt.store.runs(limit=limit + 1, past=_position(cursor), **filters)
        page, more = rows[:limit], len(rows) > limit
        following = f"{page[-1].created_us}-{page[-1].id}" if more else None
        return tables.run_page([as_now(self._rt, run) for run in page], following)

    async def _grouped(
        self, by: Any, cursor: str | None, limit: int, now: int, filters: dict[str, Any]
    ) -> tables.Traces:
        sums = await self._rt.store.sums(by, now, limit=limit + 1, past_key=_past_key(cursor), **filters)
        page, more = sums[:limit], len(sums) > limit
        return {
            "groups": [tables.group_row(each) for each in page],
            "next": f"after:{page[-1].key}" if more else None,
        }

    async def _rest(self, run: Run) -> Limits:
        """What the run may still use. What is charged while it goes on is known here alone."""
        live = self._rt.live.get(run.id)
        rest = live.budget.left if live is not None else await self._rt.store.rest_of_budget(run.id)
        return rest._replace(deadline=None) if run.ended else rest


def _position(cursor: str | None) -> tuple[int, str] | None:
    """Where the last row of the page before stands in the order of the store."""
    if cursor is None:
        return None
    match = _CURSOR.fullmatch(cursor)
    if match is None:
        raise _no_cursor(cursor)
    return int(match[1]), match[2]


def _begin(cursor: str | None, agents: Sequence[Agent]) -> int:
    """Where the page begins whose first agent the cursor names."""
    if cursor is None:
        return 0
    found = [at for at, agent in enumerate(agents) if agent.id == cursor]
    if not found:
        raise _no_cursor(cursor)
    return found[0]


def _past_key(cursor: str | None) -> str | None:
    if cursor is None:
        return None
    match = _GROUP_CURSOR.fullmatch(cursor)
    if match is None:
        raise _no_cursor(cursor)
    return match[1]


def _no_cursor(cursor: str) -> ConfigError:
    return ConfigError(
        f"{results.cut(cursor, 100)!r} is no cursor", advice="Use `next` of the page before, unchanged."
    )
