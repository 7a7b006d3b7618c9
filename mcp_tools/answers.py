"""What the tools that run something have in common: how long they wait, and what they say then."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import anyio
from mcp.server.mcpserver import Context
from mcp.server.mcpserver.exceptions import ToolError

from mcp_tools import results
from mcp_tools.asking import asked, asking
from mcp_tools.context import PERSON, Caller
from mcp_tools.tasks import answer_with_task
from mcp_tools.waiting import activity, wait_all
from orchestrator.delegation import Join, cancel
from orchestrator.outcome import Outcome
from orchestrator.runtime import Runtime
from orchestrator.store import Run, now_us

#: How long a call of an agent waits unless told otherwise, in seconds; ``server.mcp_wait_s`` is for people, whose
#: client puts a long call aside. Progress keeps an agent's call alive, while asking again would cost it a turn with
#: all its context. Half an hour of silence ends a call in Claude Code: this stays below even if progress is lost.
AGENT_WAIT_SECONDS = 25 * 60.0


class Answers:
    """Waits for runs of ``rt`` and words what came of them."""

    def __init__(self, rt: Runtime) -> None:
        self._rt = rt

    def patience(self, caller: Caller, seconds: float | None) -> float:
        """How long to wait, in seconds."""
        if seconds is not None:
            return seconds
        return AGENT_WAIT_SECONDS if caller.run is not None else self._rt.config.server.mcp_wait_s

    async def answer(
        self,
        ctx: Context,
        caller: Caller,
        run_id: str,
        wait_s: float | None = None,
        *,
        cancel_on_disconnect: bool = False,
    ) -> str:
        """Wait for a run just started, and say what there is to say. Raises ToolError if it failed.

        A client that knows tasks is not kept waiting, unless the call says how to wait.
        """
        if wait_s is None and not cancel_on_disconnect and answer_with_task(ctx, run_id):
            return ""
        try:
            patience = self.patience(caller, wait_s)
            outcomes = await wait_all(self._rt, [run_id], patience, ctx.report_progress, caller=caller)
            run, outcome = await self._rt.store.run(run_id), outcomes.get(run_id)
            if outcome is not None and not outcome.ok:
                raise ToolError(results.failure(run.name, outcome))
            return await self.told(run, outcome, caller)
        except anyio.get_cancelled_exc_class():
            # Esc, a time-out of the client, a closed connection: they cannot be told apart here.
            if cancel_on_disconnect:
                with anyio.CancelScope(shield=True):
                    await cancel(self._rt, run_id)
            raise

    async def told(self, run: Run, outcome: Outcome | None, caller: Caller = PERSON) -> str:
        if outcome is None:
            seconds = (now_us() - (run.started_us or run.created_us)) / 1e6
            pending = results.pending(run, activity(self._rt, [run.id]), seconds)
            questions = asked(self._rt, caller, [run.id])
            return f"{pending}\n{asking(self._rt, questions)}" if questions else pending
        return results.report(outcome, await self._rt.store.tree(run.id))

    async def parts(
        self, run_ids: Sequence[str], outcomes: Mapping[str, Outcome], caller: Caller = PERSON
    ) -> list[tuple[Run, str]]:
        """What there is to say of each of several runs."""
        runs = [await self._rt.store.run(run_id) for run_id in run_ids]
        return [(run, await self.told(run, outcomes.get(run.id), caller)) for run in runs]

    async def with_steps(self, run_id: str, told: str) -> str:
        """How each step of a plan ended, and then what is told of the plan."""
        steps = await self._rt.store.runs(parent_id=run_id, limit=1000)
        return "\n".join([*(_step(run) for run in reversed(steps)), told])

    async def said(self, outcome: Outcome) -> str:
        return results.answer(outcome, await self._rt.store.tree(outcome.run_id))


def of_all(parts: Sequence[tuple[Run, str]]) -> str:
    """``2 succeeded, 1 failed``, and then what is told of each run."""
    counts = Counter(run.status.replace("_", " ") for run, _ in parts)
    counted = ", ".join(f"{count} {status}" for status, count in counts.most_common())
    return f"{counted}\n\n{results.several(parts)}"


def enough(outcomes: Iterable[Outcome], join: Join) -> bool:
    """Whether several runs that have all ended have done what they were to do together."""
    succeeded = [outcome.ok for outcome in outcomes]
    return all(succeeded) if join == "all_ok" else any(succeeded)


def _step(run: Run) -> str:
    error = f": {(run.error or {}).get('message', '')}" if run.error else ""
    return f"{run.step or run.name} ({run.name}) {run.status} run_id={run.id}{results.cut(error, 300)}"


def origin(caller: Caller) -> dict[str, Any]:
    """Where a task comes from: the parent run, or what is known of the client."""
    parent = caller.run.id if caller.run else None
    return {
        "parent_id": parent,
        "parent_span": caller.span,
        "caller": caller.facts,
        "project_dir": None if parent else caller.project,
    }
