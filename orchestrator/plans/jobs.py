"""The parts a running plan is made of: jobs, the state of a step, and the result templates see. Pure."""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from orchestrator.errors import OrchestratorError, PlanError
from orchestrator.outcome import Outcome
from orchestrator.plans.model import SessionMode, Step, job_id
from orchestrator.plans.template import template

Error = Mapping[str, Any]

RESUME = "Correct what failed, then run the plan again."

StepStatus = Literal[
    "waiting", "running", "succeeded", "failed", "skipped", "cancelled", "timed_out", "interrupted"
]
OPEN: frozenset[StepStatus] = frozenset({"waiting", "running"})


@dataclass(frozen=True, slots=True)
class StepJob:
    """One run a plan asks for, with every value resolved: the seam to whatever executes runs.

    ``job_id`` is ``STEP`` or ``STEP[index]`` and the same in every execution of the plan, so that an executor
    can attach to a run it already knows. ``session_id`` is the session to continue or fork, which the job
    ``session_job_id`` left behind; both None for a fresh one. ``timeout`` and ``idle_timeout`` are seconds. A
    relative ``cwd`` is relative to where the plan is run. None leaves the choice to agent and configuration.
    """

    job_id: str
    step_id: str
    index: int | None
    agent: str
    prompt: str
    session_mode: SessionMode = "fresh"
    session_job_id: str | None = None
    session_id: str | None = None
    output_schema: Mapping[str, Any] | None = None
    model: str | None = None
    cwd: str | None = None
    timeout: float | None = None
    idle_timeout: float | None = None
    budget_usd: float | None = None
    max_turns: int | None = None
    effort: str | None = None
    permission_mode: str | None = None


@dataclass(frozen=True, slots=True)
class StepChange:
    """A step or one job of a for_each step is now ``status``. ``id`` is ``STEP`` or ``STEP[index]``."""

    id: str
    step_id: str
    index: int | None
    status: StepStatus
    error: Mapping[str, Any] | None = None


@dataclass
class Job:
    """One run of a step, in whatever state."""

    id: str
    index: int | None
    item: Any = None
    status: StepStatus = "waiting"
    outcome: Outcome | None = None
    error: Mapping[str, Any] | None = None
    started: bool = False


@dataclass
class StepRun:
    """One step, in whatever state; ``unmet`` names the dependencies that have not succeeded yet."""

    step: Step
    unmet: set[str]
    status: StepStatus = "waiting"
    jobs: list[Job] = field(default_factory=list)
    pending: deque[Job] = field(default_factory=deque)
    running: int = 0
    error: Mapping[str, Any] | None = None

    @property
    def has_room(self) -> bool:
        limit = self.step.for_each.max_parallel if self.step.for_each else None
        return bool(self.pending) and (limit is None or self.running < limit)

    @property
    def is_cause(self) -> bool:
        """Whether the plan failed because of this step, and not this step because of another."""
        return self.status not in OPEN and self.status not in ("succeeded", "skipped")


def jobs_of(step: Step, data: Mapping[str, Any]) -> list[Job]:
    """The one job of a step, or one per item. Raises PlanError if there is no list of items to be had."""
    if step.for_each is None:
        return [Job(step.id, None)]
    items = step.for_each.items
    if isinstance(items, str):
        items = template(items).evaluate(data)
    if not isinstance(items, list):
        text = f"for_each needs a list, and {step.for_each.items} gave {_kind(items)}"
        raise PlanError(text, advice="Give a list: have output_schema ask for an array.")
    return [Job(job_id(step.id, index), index, item) for index, item in enumerate(items)]


def ending(jobs: list[Job]) -> tuple[StepStatus, Error | None]:
    """How a step ended whose jobs all ended: as its one job did, or failed if any item's did."""
    if len(jobs) == 1 and jobs[0].index is None:
        return jobs[0].status, jobs[0].error
    failed = [job for job in jobs if job.status != "succeeded"]
    if not failed:
        return "succeeded", None
    first = "; ".join(f"{job.id}: {message(job.error)}" for job in failed[:3])
    error = OrchestratorError(
        f"{len(failed)} of {len(jobs)} runs did not succeed: {first}{'; …' if len(failed) > 3 else ''}",
        retryable=all((job.error or {}).get("retryable", False) for job in failed),
        advice=RESUME,
        details={"failed": [job.id for job in failed]},
    )
    return "failed", error.to_dict()


def result_of(run: StepRun) -> dict[str, Any]:
    """What templates see as ``steps.ID``. What a step that failed or never ran does not have is left out."""
    result: dict[str, Any] = {"status": run.status, "error": run.error}
    if run.step.for_each is None:
        outcome = run.jobs[0].outcome if run.jobs else None
        if outcome is not None:
            result["text"] = outcome.text
            if outcome.ok or outcome.has_structured:
                result["output"] = _output(outcome)
    elif run.jobs or run.status == "succeeded":
        result["results"] = [_item_result(job) for job in run.jobs]
        result["outputs"] = [_answer(job.outcome) for job in run.jobs if job.outcome and job.outcome.ok]
    return result


def outcome_error(outcome: Outcome) -> Error | None:
    """Why the run failed; every outcome but a success has a reason."""
    if outcome.ok:
        return None
    return outcome.error or OrchestratorError(f"the run ended as {outcome.status}").to_dict()


def message(error: Error | None) -> str:
    return str((error or {}).get("message", "no reason was given"))


def _item_result(job: Job) -> dict[str, Any]:
    return {
        "status": job.status,
        "text": job.outcome.text if job.outcome else "",
        "output": _output(job.outcome) if job.outcome else None,
        "item": job.item,
        "index": job.index,
        "error": job.error,
    }


def _output(outcome: Outcome) -> Any:
    return outcome.structured if outcome.has_structured else None


def _answer(outcome: Outcome) -> Any:
    return outcome.structured if outcome.has_structured else outcome.text


def _kind(value: Any) -> str:
    names = {str: "a string", dict: "an object", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")
