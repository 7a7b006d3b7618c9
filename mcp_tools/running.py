"""The tools that start, wait for and stop runs. Docstrings and descriptions of arguments are what models read."""

from typing import Annotated, Any

import anyio
from mcp.server.mcpserver import Context
from mcp.server.mcpserver.exceptions import ToolError
from pydantic import Field

from mcp_tools import results
from mcp_tools.context import Caller, caller_of, check_session, visible
from mcp_tools.told import told_to_the_model
from mcp_tools.waiting import activity, wait_all
from orchestrator.delegation import cancel, submit, wait
from orchestrator.outcome import Outcome
from orchestrator.runtime import Runtime
from orchestrator.store import Run, now_us
from orchestrator.task import Task

#: How long a call of an agent waits unless told otherwise, in seconds; ``server.mcp_wait_s`` is for people, whose
#: client puts a long call aside. Progress keeps an agent's call alive, while asking again would cost it a turn with
#: all its context. Half an hour of silence ends a call in Claude Code: this stays below even if progress is lost.
AGENT_WAIT_SECONDS = 25 * 60.0
#: How long run_cancel waits for the run to be over, in seconds: the agent gets a moment to say what it cost.
CANCEL_SECONDS = 5.0
LONGEST_WAIT_SECONDS = 24 * 3600

Wait = Annotated[float | None, Field(ge=0, le=LONGEST_WAIT_SECONDS)]


class RunningTools:
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
        with told_to_the_model():
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
        with told_to_the_model():
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
        with told_to_the_model():
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
        with told_to_the_model():
            caller = await caller_of(self._rt, ctx)
            await check_session(self._rt, caller, session_id)
            session = await self._rt.store.session(session_id)
            task = Task(agent=session.agent, prompt=prompt, session=session_id, fork=True, **_origin(caller))
            return await self._answer(ctx, await submit(self._rt, task), self._patience(caller, None))

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


def _origin(caller: Caller) -> dict[str, Any]:
    """Where a task comes from: the parent run, or what is known of the client."""
    parent = caller.run.id if caller.run else None
    return {
        "parent_id": parent,
        "parent_span": caller.span,
        "caller": caller.facts,
        "project_dir": None if parent else caller.project,
    }
