"""The tools that start, wait for and stop runs. Docstrings and descriptions of arguments are what models read."""

from typing import Annotated, Literal

import anyio
from mcp.server.mcpserver import Context
from pydantic import Field

from mcp_tools import results
from mcp_tools.answers import Answers, origin
from mcp_tools.context import caller_of, check_session, visible
from mcp_tools.told import told_to_the_model
from mcp_tools.waiting import wait_all
from orchestrator.delegation import cancel, submit, wait
from orchestrator.replaying import replay_task
from orchestrator.runtime import Runtime
from orchestrator.task import Task

#: How long run_cancel waits for the run to be over, in seconds: the agent gets a moment to say what it cost.
CANCEL_SECONDS = 5.0
LONGEST_WAIT_SECONDS = 24 * 3600

Wait = Annotated[float | None, Field(ge=0, le=LONGEST_WAIT_SECONDS)]


class RunningTools:
    """The functions behind the tools, bound to a runtime."""

    def __init__(self, rt: Runtime) -> None:
        self._rt = rt
        self._answers = Answers(rt)

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
                **origin(caller),
            )
            run_id = await submit(self._rt, task)
            return await self._answers.answer(
                ctx, caller, run_id, wait_s, cancel_on_disconnect=cancel_on_disconnect
            )

    async def run_wait(
        self,
        run_ids: Annotated[list[str], Field(min_length=1, max_length=100, description="Runs to wait for.")],
        ctx: Context,
        timeout_s: Annotated[Wait, Field(description="Seconds to wait at most; the runs go on afterwards.")] = None,
        until: Annotated[Literal["all", "first"], Field(description="Wait for all of them, or for one.")] = "all",
    ) -> str:
        """Wait until runs have ended, and return what each has answered, or that it is still running.

        Of a failed run: all its agent had said, the facts, and the error. Waiting changes nothing: it may be
        repeated, and interrupted.
        """
        with told_to_the_model():
            caller = await caller_of(self._rt, ctx)
            ids = [(await visible(self._rt, caller, run_id)).id for run_id in dict.fromkeys(run_ids)]
            outcomes = await wait_all(
                self._rt,
                ids,
                self._answers.patience(caller, timeout_s),
                ctx.report_progress,
                first=until == "first",
                caller=caller,
            )
            told = await self._answers.parts(ids, outcomes, caller)
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
                return f"the run had ended before: {run.status}\n{await self._answers.said(run.outcome())}"
            await cancel(self._rt, run.id)
            with anyio.move_on_after(CANCEL_SECONDS):
                return await self._answers.said(await wait(self._rt, run.id))
            return f"run_id={run.id} was asked to stop and is still winding down"

    async def fork_session(
        self,
        session_id: Annotated[str, Field(description="The session to copy; it stays as it is.")],
        prompt: Annotated[str, Field(description="What the copy is told next.")],
        ctx: Context,
        turn: Annotated[
            int | None, Field(ge=1, description="Copy up to the end of this turn, the first being 1; default: all.")
        ] = None,
        wait_s: Wait = None,
    ) -> str:
        """Ask the agent of a session something more in a copy of the session, with all it knew by then.

        Returns what delegate returns; the session in the last line is the copy.
        """
        with told_to_the_model():
            caller = await caller_of(self._rt, ctx)
            await check_session(self._rt, caller, session_id)
            session = await self._rt.store.session(session_id)
            task = Task(
                agent=session.agent, prompt=prompt, session=session_id, fork=True, fork_turn=turn, **origin(caller)
            )
            return await self._answers.answer(ctx, caller, await submit(self._rt, task), wait_s)

    async def continue_session(
        self,
        session_id: Annotated[str, Field(description="The session; the last line of each answer names it.")],
        prompt: Annotated[str, Field(description="What its agent is told next.")],
        ctx: Context,
        wait_s: Wait = None,
    ) -> str:
        """Go on with a session: its agent knows all that was said in it. Returns what delegate returns."""
        with told_to_the_model():
            caller = await caller_of(self._rt, ctx)
            await check_session(self._rt, caller, session_id)
            session = await self._rt.store.session(session_id)
            task = Task(agent=session.agent, prompt=prompt, session=session_id, **origin(caller))
            return await self._answers.answer(ctx, caller, await submit(self._rt, task), wait_s)

    async def replay(
        self,
        run_id: Annotated[str, Field(description="The run to repeat; it stays as it is.")],
        ctx: Context,
        onwards: Annotated[bool, Field(description="Go on from its end instead, with a prompt.")] = False,
        prompt: Annotated[str | None, Field(description="Instead of the prompt it had.")] = None,
        agent: Annotated[str | None, Field(max_length=256, description="Instead of its agent.")] = None,
        model: Annotated[str | None, Field(description="Instead of its model.")] = None,
        wait_s: Wait = None,
    ) -> str:
        """Repeat a run from where it began, say with another model. Returns what delegate returns."""
        with told_to_the_model():
            caller = await caller_of(self._rt, ctx)
            run = await visible(self._rt, caller, run_id)
            task = await replay_task(
                self._rt, run, onwards=onwards, prompt=prompt, agent=agent, model=model, **origin(caller)
            )
            return await self._answers.answer(ctx, caller, await submit(self._rt, task), wait_s)
