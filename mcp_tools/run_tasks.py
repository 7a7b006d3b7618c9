"""Runs as tasks of MCP: the id of the task is the run's, so a task lives as long as the record of its run.

Several runs started together are one task; its id names them all, if they are few enough for an id to hold.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from mcp.server.mcpserver import Context
from mcp_types import CallToolResult, TextContent

from mcp_tools import results
from mcp_tools.answers import Answers, enough, of_all
from mcp_tools.asking import asked, forms, take_form
from mcp_tools.context import Caller, caller_of, visible
from mcp_tools.tasks import RequestContext, TaskState, TaskStatus, unknown_task
from mcp_tools.waiting import activity
from orchestrator.delegation import Join, cancel
from orchestrator.endings import cost_of
from orchestrator.errors import RunNotFoundError
from orchestrator.outcome import Usage
from orchestrator.questions import Question
from orchestrator.runtime import LiveRun, Runtime
from orchestrator.store import Run, now_us

#: What Claude Code shows its model of a task's result; the rest would go to a file.
RESULT_CHARS = 100_000


def group_id(run_ids: Sequence[str], join: Join) -> str:
    """The id of the task that several runs are together: all one must know to tell of it later."""
    return ".".join([join, *run_ids])


def runs_of(task_id: str) -> tuple[list[str], Join | None]:
    """The runs a task is, and what they were to do together if they are several."""
    first, *rest = task_id.split(".")
    join = next((known for known in get_args(Join) if known == first), None)
    return (rest, join) if join is not None and rest else ([task_id], None)


@dataclass(frozen=True, slots=True)
class Seen:
    """A run as it is now; ``live`` while this runtime works on it."""

    run: Run
    live: LiveRun | None

    @property
    def over(self) -> bool:
        # The end of a live run may be on its row already, but nobody is told before it is stored.
        return self.live is None and self.run.ended

    @property
    def tokens(self) -> int:
        if self.live is None:
            return self.run.usage.total_tokens
        return sum((each.usage for each in self.live.attempts), Usage()).total_tokens

    @property
    def cost_usd(self) -> float | None:
        return self.run.cost_usd if self.live is None else cost_of(self.live)[0]

    def updated_us(self, now: int, clock: float) -> int:
        """When something was last heard of the run. ``now`` and ``clock`` (monotonic) are the same moment."""
        if self.live is not None:
            return now - int((clock - self.live.touched) * 1e6)
        return self.run.ended_us or self.run.started_us or self.run.created_us


class RunTasks:
    """A ``TaskSource``. Who may see a run may see its task."""

    def __init__(self, rt: Runtime) -> None:
        self._rt = rt
        self._answers = Answers(rt)

    async def get(self, ctx: RequestContext, task_id: str) -> TaskState:
        _, join = runs_of(task_id)
        seen = [await self._seen(run) for run in await self._runs(ctx, task_id)]
        over = all(each.over for each in seen)
        questions = await self._asked(ctx, [each.run for each in seen]) if _has_forms(ctx) else []
        now, clock = now_us(), time.monotonic()
        created = min(each.run.created_us for each in seen)
        return TaskState(
            id=task_id,
            status=status_of([each.run for each in seen]) if over else "input_required" if questions else "working",
            created_us=created,
            updated_us=max(each.updated_us(now, clock) for each in seen),
            poll_ms=poll_ms((now - created) / 1e6),
            message=message(self._doing(seen), [each.tokens for each in seen], [each.cost_usd for each in seen]),
            result=await self._result([each.run for each in seen], join) if over else None,
            inputs=forms(self._rt, questions) if questions else None,
        )

    async def update(self, ctx: RequestContext, task_id: str, responses: Mapping[str, Any]) -> None:
        """Take in what was filled into the forms."""
        caller = await self._caller(ctx)
        for question in await self._asked(ctx, await self._runs(ctx, task_id)):
            if question.id in responses:
                await take_form(self._rt, caller, question, responses[question.id])

    async def _asked(self, ctx: RequestContext, runs: Sequence[Run]) -> list[Question]:
        return asked(self._rt, await self._caller(ctx), [run.id for run in runs])

    async def _caller(self, ctx: RequestContext) -> Caller:
        return await caller_of(self._rt, Context(request_context=ctx))

    async def cancel(self, ctx: RequestContext, task_id: str) -> None:
        for run in await self._runs(ctx, task_id):
            await cancel(self._rt, run.id)

    async def _runs(self, ctx: RequestContext, task_id: str) -> list[Run]:
        """The runs of exactly these ids, if the caller may see them all."""
        ids, _ = runs_of(task_id)
        try:
            caller = await self._caller(ctx)
            runs = [await visible(self._rt, caller, run_id) for run_id in ids]
        except RunNotFoundError as error:
            raise unknown_task(task_id, "query_traces lists the runs there are.") from error
        if [run.id for run in runs] != ids:  # the start of an id will do for people
            raise unknown_task(task_id, "query_traces lists the runs there are.")
        return runs

    async def _seen(self, run: Run) -> Seen:
        live = self._rt.live.get(run.id)
        if live is not None:
            return Seen(live.row, live)
        if not run.ended:  # it may have since its row was read, or its end could not be stored
            run = self._rt.unwritten.get(run.id) or await self._rt.store.run(run.id)
        return Seen(run, None)

    def _doing(self, seen: Sequence[Seen]) -> str:
        """One line about what the runs do, or how they have ended."""
        waiting = [each.run for each in seen if not each.over]
        if waiting and (waiting[0].id in self._rt.live or len(seen) > 1):
            return activity(self._rt, [run.id for run in waiting], len(seen))
        if waiting:
            return results.parked(waiting[0]) or f"{waiting[0].name}: in another process"
        return "; ".join(_ended(each.run) for each in seen[:3])

    async def _result(self, runs: Sequence[Run], join: Join | None) -> dict[str, Any]:
        """What the tool would have answered had it waited."""
        ok = enough([run.outcome() for run in runs], join or "all_ok")
        if join is not None:
            limit = RESULT_CHARS // len(runs) - 200  # what stands around each
            text = of_all([(run, await self._told(run, limit)) for run in runs])
        elif ok:
            told = await self._told(runs[0], RESULT_CHARS)
            text = told if runs[0].kind == "agent" else await self._answers.with_steps(runs[0].id, told)
        else:
            text = results.failure(runs[0].name, runs[0].outcome())
        tool = "delegate_many" if join is not None else _tool_of(runs[0])
        return _as_result(text if ok else f"Error executing tool {tool}: {text}", is_error=not ok)

    async def _told(self, run: Run, limit: int) -> str:
        outcome = run.outcome()
        # Its last lines are the facts, and the error if there is one.
        return shortened(await self._answers.told(run, outcome), run.id, limit, lines=1 if outcome.ok else 2)


def _has_forms(ctx: RequestContext) -> bool:
    """Whether the client can put a form to somebody; others are told in words, and answer with run_answer."""
    capabilities = ctx.session.client_capabilities
    return capabilities is not None and capabilities.elicitation is not None


def status_of(runs: Sequence[Run]) -> TaskStatus:
    """Of runs that have all ended. If they failed there still is an answer, an error of the tool: ``completed``."""
    return "cancelled" if all(run.status == "cancelled" for run in runs) else "completed"


def poll_ms(age: float) -> int:
    """When to ask next for a run begun ``age`` seconds ago: the longer it takes, the less a few seconds matter."""
    if age < 60:
        return 1000
    return 5000 if age < 600 else 10_000


def message(doing: str, tokens: Sequence[int], costs_usd: Sequence[float | None]) -> str:
    """One line for people who watch the task; what is not known (yet) is left out."""
    cost = sum(each or 0 for each in costs_usd)
    figures = [f"{sum(tokens):,} tokens" if any(tokens) else "", f"${cost:.4f}" if cost else ""]
    return " · ".join(filter(None, [doing, *figures]))


def shortened(text: str, run_id: str, limit: int, *, lines: int) -> str:
    """An answer within ``limit`` characters: its beginning, how to have the rest, and its last ``lines``."""
    if len(text) <= limit:
        return text
    said, *rest = text.rsplit("\n", lines)
    note = f"[… {len(said):,} characters in all: run_wait({results.compact([run_id])}) has the whole answer]"
    room = limit - sum(len(line) + 1 for line in (note, *rest))
    return "\n".join([said[: max(0, room)], note, *rest])


def _ended(run: Run) -> str:
    more = f"; run_wait({results.compact([run.id])}) has what it had said" if run.status == "cancelled" else ""
    return f"{run.name}: {run.status.replace('_', ' ')}{more}"


def _as_result(text: str, *, is_error: bool) -> dict[str, Any]:
    result = CallToolResult(content=[TextContent(type="text", text=text)], is_error=is_error)
    return result.model_dump(by_alias=True, mode="json", exclude_none=True)


def _tool_of(run: Run) -> str:
    return str((run.caller or {}).get("tool", "delegate"))
