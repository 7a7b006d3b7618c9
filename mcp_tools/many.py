"""The tools that start several runs at once: tasks side by side, and plans."""

from pathlib import Path
from typing import Annotated, Any

import anyio
from mcp.server.mcpserver import Context
from mcp.server.mcpserver.exceptions import ToolError
from pydantic import BaseModel, ConfigDict, Field

from mcp_tools.answers import Answers, enough, of_all, origin
from mcp_tools.context import Caller, caller_of, check_session
from mcp_tools.run_tasks import group_id
from mcp_tools.running import Wait
from mcp_tools.tasks import answer_with_task
from mcp_tools.told import told_to_the_model
from mcp_tools.waiting import wait_all
from orchestrator.admission import reachable
from orchestrator.delegation import Join, submit_many
from orchestrator.plan_runs import submit_plan
from orchestrator.plans import Plan, load_plan
from orchestrator.reach import check_reach, resolved
from orchestrator.runtime import Runtime
from orchestrator.task import Task

MAX_TASKS = 100


class OneTask(BaseModel):
    """One of several tasks; the fields are those of delegate."""

    model_config = ConfigDict(extra="forbid")

    agent: Annotated[str, Field(max_length=256)]
    prompt: str
    model: str | None = None
    session: str | None = None
    fork: bool = False
    cwd: str | None = None
    budget_usd: Annotated[float | None, Field(ge=0, allow_inf_nan=False)] = None
    timeout_s: Annotated[float | None, Field(gt=0, allow_inf_nan=False)] = None


class ManyTools:
    """The functions behind the tools, bound to a runtime."""

    def __init__(self, rt: Runtime) -> None:
        self._rt = rt
        self._answers = Answers(rt)

    async def delegate_many(
        self,
        tasks: Annotated[list[OneTask], Field(min_length=1, max_length=MAX_TASKS)],
        ctx: Context,
        max_parallel: Annotated[int | None, Field(ge=1, description="At work at once; default: all.")] = None,
        join: Annotated[
            Join, Field(description="all_ok: cancel the rest when one fails; first_ok: when one succeeds.")
        ] = "all_done",
        wait_s: Wait = None,
    ) -> str:
        """Hand several tasks to agents that work side by side, and wait for their answers.

        All tasks are accepted or none is. Returns what run_wait returns of all, with how many succeeded.
        """
        with told_to_the_model():
            caller = await caller_of(self._rt, ctx)
            for task in tasks:
                if task.session is not None:
                    await check_session(self._rt, caller, task.session)
            asked = [_task(caller, task) for task in tasks]
            ids = await submit_many(self._rt, asked, max_parallel=max_parallel, join=join)
            return await self._all(ctx, caller, ids, wait_s, join)

    async def _all(self, ctx: Context, caller: Caller, ids: list[str], wait_s: float | None, join: Join) -> str:
        if wait_s is None and answer_with_task(ctx, group_id(ids, join)):
            return ""
        patience = self._answers.patience(caller, wait_s)
        outcomes = await wait_all(self._rt, ids, patience, ctx.report_progress, caller=caller)
        text = of_all(await self._answers.parts(ids, outcomes, caller))
        if len(outcomes) == len(ids) and not enough(outcomes.values(), join):
            raise ToolError(text)
        return text

    async def run_plan(
        self,
        plan: Annotated[str, Field(max_length=4096, description="Path of the plan's YAML file, from the project.")],
        ctx: Context,
        inputs: dict[str, Any] | None = None,
        wait_s: Wait = None,
    ) -> str:
        """Run a plan of several steps, and wait for its end. Returns how each step ended, and the line of facts."""
        with told_to_the_model():
            caller = await caller_of(self._rt, ctx)
            base = caller.project or self._rt.config.project_dir
            loaded = await self._loaded(caller, resolved(Path(plan), base))
            run_id = await submit_plan(
                self._rt,
                loaded,
                inputs or {},
                base=base,
                parent_id=caller.run.id if caller.run else None,
                parent_span=caller.span,
                caller=caller.facts or {},
            )
            told = await self._answers.answer(ctx, caller, run_id, wait_s)
            return await self._answers.with_steps(run_id, told)

    async def _loaded(self, caller: Caller, path: Path) -> Plan:
        """The plan in a file the caller may have run. Raises ReachError, PlanError."""
        base = caller.project or self._rt.config.project_dir
        check_reach([path], reachable(self._rt, base, caller.run, by_model=True))
        known = [agent.id for agent in self._rt.catalog.agents()]
        return await anyio.to_thread.run_sync(load_plan, path, known)


def _task(caller: Caller, task: OneTask) -> Task:
    asked = task.model_dump(exclude={"cwd"})
    return Task(**asked, cwd=caller.directory(task.cwd, continues=task.session is not None), **origin(caller))
