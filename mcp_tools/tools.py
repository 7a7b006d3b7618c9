"""The tools. Their docstrings and the descriptions of their arguments are what models read."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import anyio
from mcp.server import MCPServer
from mcp.server.mcpserver import Context
from mcp.server.mcpserver.exceptions import ToolError
from mcp_types import ToolAnnotations
from pydantic import Field

from mcp_tools import results
from mcp_tools.context import Caller, caller_of, check_session, visible
from mcp_tools.strict import StrictTool
from mcp_tools.waiting import activity, wait_all
from orchestrator import __version__
from orchestrator.agents import resolve_model
from orchestrator.delegation import cancel, submit, wait
from orchestrator.errors import ConfigError, OrchestratorError
from orchestrator.outcome import Outcome, RunStatus
from orchestrator.runtime import Runtime
from orchestrator.store import Run, now_us
from orchestrator.task import Task

INSTRUCTIONS = """\
Hands work to agents. Each agent is a process of its own with its own tools, instructions and context: it knows \
nothing of this conversation, so put everything it needs into the prompt.

delegate starts a run and waits for its answer. Calls of delegate in one message run one after another; to work \
on several things at once, start each with wait_s=0 and collect the answers with one run_wait.

A run goes on when its caller stops waiting, is interrupted or goes away. run_wait picks its answer up; \
query_traces finds its run_id. run_cancel stops it.

The last line of each answer names the session. delegate(session=…) goes on with it, fork_session tries another \
way from the same point and leaves the session as it is.

An error ends with a line of JSON: code, retryable, retry_after (seconds), advice. Do not repeat a call whose \
error is not retryable without changing it."""

#: How long a call of an agent waits unless told otherwise, in seconds; ``server.mcp_wait_s`` is for people, whose
#: client puts a long call aside. Progress keeps an agent's call alive, while asking again would cost it a turn with
#: all its context. Half an hour of silence ends a call in Claude Code: this stays below even if progress is lost.
AGENT_WAIT_SECONDS = 25 * 60.0
#: How long run_cancel waits for the run to be over, in seconds: the agent gets a moment to say what it cost.
CANCEL_SECONDS = 5.0
LONGEST_WAIT_SECONDS = 24 * 3600
#: Rows that may share a microsecond with the last row of a page.
_TIES = 16

_CURSOR = re.compile(r"([0-9]{1,18})-([0-9a-f]{16})")

# Claude Code hides tools behind a search unless told otherwise, and moves long results to a file.
_ALWAYS = {"anthropic/alwaysLoad": True, "anthropic/maxResultSizeChars": 500_000}

Wait = Annotated[float | None, Field(ge=0, le=LONGEST_WAIT_SECONDS)]


def build_server(rt: Runtime) -> MCPServer:
    """An MCP server whose tools work in ``rt``."""
    with _logging_left_alone():
        return MCPServer(
            "orchestrator",
            title="Orchestrator",
            instructions=INSTRUCTIONS,
            version=__version__,
            tools=list(_tools(Tools(rt))),
        )


def _tools(tools: "Tools") -> Iterator[StrictTool]:
    reads = ToolAnnotations(read_only_hint=True)
    # Not read-only: Claude Code then runs these one by one. The agents it starts may well change files.
    acts = ToolAnnotations(read_only_hint=False, destructive_hint=True)
    stops = ToolAnnotations(read_only_hint=False, destructive_hint=True, idempotent_hint=True)
    yield StrictTool.of(tools.delegate, annotations=acts, meta=_ALWAYS)
    yield StrictTool.of(tools.run_wait, annotations=reads, meta=_ALWAYS)
    yield StrictTool.of(tools.run_cancel, annotations=stops)
    yield StrictTool.of(tools.fork_session, annotations=acts)
    yield StrictTool.of(tools.query_traces, annotations=reads, structured=True)
    yield StrictTool.of(tools.list_agents, annotations=reads, structured=True)


class Tools:
    """The functions behind the tools, bound to a runtime."""

    def __init__(self, rt: Runtime) -> None:
        self._rt = rt

    async def delegate(
        self,
        agent: Annotated[str, Field(max_length=256, description="Name of the agent; list_agents has them.")],
        prompt: Annotated[str, Field(description="The whole task. The agent sees nothing else.")],
        ctx: Context,
        model: Annotated[str | None, Field(description="Model alias or id, over the agent's own.")] = None,
        session: Annotated[str | None, Field(description="Session id of an earlier run to go on with.")] = None,
        fork: Annotated[bool, Field(description="Go on with a copy of the session instead.")] = False,
        cwd: Annotated[str | None, Field(description="Working directory; default: the project's.")] = None,
        budget_usd: Annotated[
            float | None, Field(ge=0, allow_inf_nan=False, description="Most the run and all it starts may cost.")
        ] = None,
        timeout_s: Annotated[
            float | None, Field(gt=0, allow_inf_nan=False, description="Seconds after which the run is ended.")
        ] = None,
        wait_s: Annotated[
            Wait,
            Field(description="Seconds to wait for the answer, then the run goes on; 0 returns at once."),
        ] = None,
        cancel_on_disconnect: Annotated[
            bool, Field(description="End the run if this call is interrupted; by default it goes on.")
        ] = False,
    ) -> str:
        """Hand a task to an agent and wait for its answer.

        Returns the answer and a line with run_id, status, session and cost; or, when the wait is over first,
        the run_id of the run, which goes on: call run_wait. A failed run is an error that says whether trying
        again can help and how what the agent had said ends.
        """
        with _told_to_the_model():
            caller = await caller_of(self._rt, ctx)
            if session is not None:
                await check_session(self._rt, caller, session)
            task = Task(
                agent=agent,
                prompt=prompt,
                session=session,
                fork=fork,
                model=model,
                cwd=caller.directory(cwd, continues=session is not None),
                timeout_s=timeout_s,
                budget_usd=budget_usd,
                **_origin(caller),
            )
            run_id = await submit(self._rt, task)
            return await self._answer(
                ctx, run_id, self._patience(caller, wait_s), cancel_on_disconnect=cancel_on_disconnect
            )

    async def run_wait(
        self,
        run_ids: Annotated[list[str], Field(min_length=1, max_length=100, description="Runs to wait for.")],
        ctx: Context,
        timeout_s: Annotated[Wait, Field(description="Seconds to wait at most; the runs go on afterwards.")] = None,
    ) -> str:
        """Wait until runs have ended, and return what each has answered, or that it is still running.

        Of a failed run: all its agent had said, the facts, and the error. Waiting changes nothing: it may be
        repeated, and interrupted.
        """
        with _told_to_the_model():
            caller = await caller_of(self._rt, ctx)
            ids = [(await visible(self._rt, caller, run_id)).id for run_id in dict.fromkeys(run_ids)]
            outcomes = await wait_all(self._rt, ids, self._patience(caller, timeout_s), ctx.report_progress)
            runs = [await self._rt.store.run(run_id) for run_id in ids]
            told = [(run, await self._told(run, outcomes.get(run.id))) for run in runs]
            return told[0][1] if len(told) == 1 else results.several(told)

    async def run_cancel(
        self,
        run_id: Annotated[str, Field(description="The run to end, with all it has started.")],
        ctx: Context,
    ) -> str:
        """End a run and every run it has started. What its agent had said so far is kept and returned."""
        with _told_to_the_model():
            run = await visible(self._rt, await caller_of(self._rt, ctx), run_id)
            if run.ended:
                return f"the run had ended before: {run.status}\n{await self._said(run.outcome())}"
            await cancel(self._rt, run.id)
            with anyio.move_on_after(CANCEL_SECONDS):
                return await self._said(await wait(self._rt, run.id))
            return f"run_id={run.id} was asked to stop and is still winding down"

    async def fork_session(
        self,
        session_id: Annotated[str, Field(description="The session to copy; it stays as it is.")],
        prompt: Annotated[str, Field(description="What the copy is told next.")],
        ctx: Context,
    ) -> str:
        """Ask the agent of a session something more in a copy of the session, with all it knew by then.

        Returns what delegate returns; the session in the last line is the copy.
        """
        with _told_to_the_model():
            caller = await caller_of(self._rt, ctx)
            await check_session(self._rt, caller, session_id)
            session = await self._rt.store.session(session_id)
            task = Task(agent=session.agent, prompt=prompt, session=session_id, fork=True, **_origin(caller))
            return await self._answer(ctx, await submit(self._rt, task), self._patience(caller, None))

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
        with _told_to_the_model():
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
        with _told_to_the_model():
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

    # -- what they share ----------------------------------------------------------------------------------

    def _patience(self, caller: Caller, seconds: float | None) -> float:
        """How long to wait, in seconds."""
        if seconds is not None:
            return seconds
        return AGENT_WAIT_SECONDS if caller.run is not None else self._rt.config.server.mcp_wait_s

    async def _answer(
        self, ctx: Context, run_id: str, seconds: float, *, cancel_on_disconnect: bool = False
    ) -> str:
        """Wait for a run just started, and say what there is to say. Raises ToolError if it failed."""
        try:
            outcomes = await wait_all(self._rt, [run_id], seconds, ctx.report_progress)
            run, outcome = await self._rt.store.run(run_id), outcomes.get(run_id)
            if outcome is not None and not outcome.ok:
                raise ToolError(results.failure(run.name, outcome))
            return await self._told(run, outcome)
        except anyio.get_cancelled_exc_class():
            # Esc, a time-out of the client, a closed connection: they cannot be told apart here.
            if cancel_on_disconnect:
                with anyio.CancelScope(shield=True):
                    await cancel(self._rt, run_id)
            raise

    async def _told(self, run: Run, outcome: Outcome | None) -> str:
        if outcome is None:
            seconds = (now_us() - (run.started_us or run.created_us)) / 1e6
            return results.pending(run, activity(self._rt, [run.id]), seconds)
        return results.report(outcome, await self._rt.store.tree(run.id))

    async def _said(self, outcome: Outcome) -> str:
        return results.answer(outcome, await self._rt.store.tree(outcome.run_id))

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


def _origin(caller: Caller) -> dict[str, Any]:
    """Where a task comes from: the parent run, or what is known of the client."""
    parent = caller.run.id if caller.run else None
    return {
        "parent_id": parent,
        "parent_span": caller.span,
        "caller": caller.facts,
        "project_dir": None if parent else caller.project,
    }


@contextmanager
def _told_to_the_model() -> Iterator[None]:
    """Only ToolError reaches the model with its words; of any other exception it would read the tool's name."""
    try:
        yield
    except OrchestratorError as error:
        raise ToolError(results.refusal(error)) from error


@contextmanager
def _logging_left_alone() -> Iterator[None]:
    """MCPServer configures the root logger where nobody has; whether and how to log is not for us to say."""
    placeholder = logging.NullHandler()
    logging.getLogger().addHandler(placeholder)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(placeholder)
