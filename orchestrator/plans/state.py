"""A plan while it runs, as a pure state machine: what may start now, and what each outcome changes.

No I/O and no clock. The driver hands out ``ready()`` jobs and feeds ``apply()``; everything else follows: order,
templates, fan-out, limits, and what becomes of steps whose dependencies failed. Failures are data.
"""

from collections import Counter, deque
from collections.abc import Mapping
from typing import Any, Literal, cast

from orchestrator.errors import OrchestratorError, PlanError, RunCancelledError
from orchestrator.outcome import ENDED, Outcome, RunStatus, Usage
from orchestrator.plans.jobs import (
    OPEN,
    RESUME,
    Error,
    Job,
    StepChange,
    StepJob,
    StepRun,
    StepStatus,
    ending,
    jobs_of,
    message,
    outcome_error,
    result_of,
)
from orchestrator.plans.model import Plan, Step
from orchestrator.plans.template import template


class PlanState:
    """One execution of ``plan`` with bound ``inputs`` (see ``Plan.bind``). ``run_id`` is ``run.id`` in templates.

    A step starts when all it depends on succeeded. When it fails, everything that depends on it, directly or not,
    is skipped, and the rest goes on. A for_each step fails if one of its jobs did, after all of them ended.
    """

    def __init__(self, plan: Plan, inputs: Mapping[str, Any], run_id: str) -> None:
        self.plan = plan
        self.run_id = run_id
        self._steps = {step.id: StepRun(step, set(step.depends_on)) for step in plan.steps}
        self._dependents: Mapping[str, list[StepRun]] = _dependents(self._steps)
        self._openable = deque(run for run in self._steps.values() if not run.unmet)
        self._running: dict[str, tuple[StepRun, Job]] = {}
        self._jobs: dict[str, Job] = {}
        self._unended = len(self._steps)
        self._results: dict[str, Mapping[str, Any]] = {}
        self._data: dict[str, Any] = {"inputs": dict(inputs), "steps": self._results, "run": {"id": run_id}}
        self._changes: list[StepChange] = []
        self._stopped: tuple[RunStatus, Error] | None = None

    def __repr__(self) -> str:
        counts = Counter(self.statuses.values())
        steps = ", ".join(f"{count} {status}" for status, count in counts.items())
        return f"<PlanState {self.plan.name!r} {self.status}: {steps}; {len(self._running)} jobs running>"

    @property
    def done(self) -> bool:
        """Whether no step can change any more."""
        return self._unended == 0

    @property
    def status(self) -> RunStatus:
        """``running`` until done; then ``succeeded`` only if every step and every output did."""
        if not self.done:
            return "running"
        if self._stopped:
            return self._stopped[0]
        return "failed" if self.error else "succeeded"

    @property
    def statuses(self) -> dict[str, StepStatus]:
        """The status of every step, in the order of the file."""
        return {step_id: run.status for step_id, run in self._steps.items()}

    @property
    def results(self) -> Mapping[str, Mapping[str, Any]]:
        """What templates see as ``steps``: the result of every step that ended."""
        return self._results

    @property
    def error(self) -> dict[str, Any] | None:
        """Why the plan did not succeed, as ``OrchestratorError.to_dict``; None while it may still."""
        if self._stopped:
            return dict(self._stopped[1])
        failed = {step_id: dict(run.error or {}) for step_id, run in self._steps.items() if run.is_cause}
        _, missing = self._rendered_outputs() if self.done else ({}, {})
        if not failed and not missing:
            return None
        parts = [f"step '{step_id}' failed: {message(error)}" for step_id, error in failed.items()]
        parts += [f"output '{name}' is missing: {text}" for name, text in missing.items()]
        retryable = not missing and all(error.get("retryable", False) for error in failed.values())
        details = {"steps": failed, "outputs": missing}
        return OrchestratorError("; ".join(parts), retryable=retryable, advice=RESUME, details=details).to_dict()

    @property
    def outputs(self) -> dict[str, Any]:
        """The plan's ``outputs`` as far as they can be had; complete if the plan succeeded."""
        return self._rendered_outputs()[0]

    def ready(self) -> list[StepJob]:
        """The jobs to start now, within the limits, in the order of the file. Each is handed out once."""
        if self._stopped:
            return []
        while self._openable:
            self._open(self._openable.popleft())
        found: list[StepJob] = []
        for run in self._steps.values():
            while run.has_room and self._has_room:
                found += self._start(run, run.pending.popleft())
        return found

    def apply(self, job_id: str, outcome: Outcome) -> None:
        """Take in how a job ended. Raises ValueError if it was not running, or if the outcome is not an end.

        After ``stop``, the outcome of a job that was running is kept for its usage and cost; nothing else changes.
        """
        if outcome.status not in ENDED:
            raise ValueError(f"the outcome of job {job_id!r} is {outcome.status!r}, which is not an end")
        if self._stopped and (late := self._jobs.get(job_id)) and late.started and late.outcome is None:
            late.outcome = outcome
            return
        if job_id not in self._running:
            raise ValueError(f"job {job_id!r} is not running")
        run, job = self._running.pop(job_id)
        run.running -= 1
        job.outcome = outcome
        # ENDED has been checked: what is left of RunStatus is a StepStatus.
        self._end_job(run, job, cast("StepStatus", outcome.status), outcome_error(outcome))

    def stop(self, status: Literal["cancelled", "timed_out"], error: OrchestratorError) -> None:
        """End the plan now: running jobs end as ``cancelled``, steps that had not started are skipped."""
        if self.done:
            return
        reason = error.to_dict()
        self._stopped = (status, reason)
        self._running.clear()
        for run in self._steps.values():
            if run.status == "waiting":
                self._end_step(run, "skipped", reason)
            elif run.status == "running":
                for job in run.jobs:
                    self._cancel_job(run, job, reason)
                self._end_step(run, "cancelled", reason)

    def cancel(self, reason: str = "the plan was cancelled") -> None:
        """``stop`` with the status ``cancelled``."""
        self.stop("cancelled", RunCancelledError(reason))

    def take_changes(self) -> list[StepChange]:
        """What changed since the last call, in order."""
        changes, self._changes = self._changes, []
        return changes

    def outcome(self) -> Outcome:
        """The plan's own outcome: ``structured`` holds the outputs; usage and cost are the sums of its jobs.

        The cost is unknown as soon as that of one job is.
        """
        started = [job.outcome for job in self._jobs.values() if job.started]
        known = [outcome for outcome in started if outcome is not None]
        costs = [outcome.cost_usd for outcome in known if outcome.cost_usd is not None]
        return Outcome(
            run_id=self.run_id,
            status=self.status,
            structured=self.outputs if self.plan.outputs else None,
            has_structured=bool(self.plan.outputs),
            usage=sum((outcome.usage for outcome in known), Usage()),
            cost_usd=sum(costs) if len(costs) == len(started) else None,
            num_turns=sum(outcome.num_turns for outcome in known),
            error=self.error,
        )

    @property
    def _has_room(self) -> bool:
        limit = self.plan.limits.max_parallel
        return limit is None or len(self._running) < limit

    def _open(self, run: StepRun) -> None:
        """Give the step its jobs: one, or one per item."""
        self._change(run, "running")
        try:
            run.jobs = jobs_of(run.step, self._data)
        except PlanError as error:
            self._end_step(run, "failed", error.to_dict())
            return
        self._jobs |= {job.id: job for job in run.jobs}
        run.pending.extend(run.jobs)
        if not run.jobs:
            self._end_step(run, "succeeded", None)

    def _start(self, run: StepRun, job: Job) -> list[StepJob]:
        """The job as it is handed out; none if it cannot be built, which fails it."""
        try:
            ready = self._built(run.step, job)
        except PlanError as error:
            self._end_job(run, job, "failed", error.to_dict())
            return []
        run.running += 1
        self._running[job.id] = (run, job)
        job.started, job.status = True, "running"
        if job.index is not None:
            self._changes.append(StepChange(job.id, run.step.id, job.index, "running"))
        return [ready]

    def _built(self, step: Step, job: Job) -> StepJob:
        data = self._data
        if step.for_each:
            data = {**data, step.for_each.variable: job.item, "index": job.index}
        source = step.session.source
        return StepJob(
            job_id=job.id,
            step_id=step.id,
            index=job.index,
            agent=step.agent,
            prompt=template(step.prompt or "").render(data),
            session_mode=step.session.mode,
            session_job_id=None if source is None else str(source),
            session_id=None if source is None else self._session_id(str(source)),
            output_schema=step.output_schema,
            model=None if step.model is None else template(step.model).render(data),
            cwd=None if step.cwd is None else template(step.cwd).render(data),
            timeout=step.timeout,
            idle_timeout=step.idle_timeout,
            budget_usd=step.budget_usd,
            max_turns=step.max_turns,
            effort=step.effort,
            permission_mode=step.permission_mode,
        )

    def _session_id(self, source: str) -> str:
        """The session that job left behind. A fresh one instead would lose what the step builds on, unseen."""
        job = self._jobs.get(source)
        if job is None:
            raise PlanError(f"there is no run '{source}' whose session could be used", advice=_INDEX)
        if job.outcome is None or job.outcome.session_id is None:
            raise PlanError(f"run '{source}' left no session to use", advice="Use `session: fresh`.")
        return job.outcome.session_id

    def _end_job(self, run: StepRun, job: Job, status: StepStatus, error: Error | None) -> None:
        job.status, job.error = status, error
        if job.index is not None:
            self._changes.append(StepChange(job.id, run.step.id, job.index, status, error))
        if not run.running and not run.pending:
            self._end_step(run, *ending(run.jobs))

    def _cancel_job(self, run: StepRun, job: Job, reason: Mapping[str, Any]) -> None:
        if job.status in OPEN:
            job.status, job.error = "cancelled", reason
            if job.index is not None:
                self._changes.append(StepChange(job.id, run.step.id, job.index, "cancelled", reason))

    def _end_step(self, run: StepRun, status: StepStatus, error: Error | None) -> None:
        run.error = error
        run.pending.clear()
        run.running = 0
        self._unended -= 1
        self._change(run, status, error)
        self._results[run.step.id] = result_of(run)
        if status == "succeeded":
            self._release(run)
        elif not self._stopped:
            self._skip_dependents(run)

    def _release(self, run: StepRun) -> None:
        for dependent in self._dependents[run.step.id]:
            dependent.unmet.discard(run.step.id)
            if not dependent.unmet and dependent.status == "waiting":
                self._openable.append(dependent)

    def _skip_dependents(self, failed: StepRun) -> None:
        """Skip everything below, naming the step that failed and not the skipped ones between."""
        cause = OrchestratorError(f"skipped because step '{failed.step.id}' {_ended(failed)}", advice=RESUME)
        below = deque(self._dependents[failed.step.id])
        while below:
            run = below.popleft()
            if run.status == "waiting":
                run.status = "skipped"
                below.extend(self._dependents[run.step.id])
                run.error = cause.to_dict()
                self._unended -= 1
                self._change(run, "skipped", run.error)
                self._results[run.step.id] = result_of(run)

    def _change(self, run: StepRun, status: StepStatus, error: Error | None = None) -> None:
        run.status = status
        self._changes.append(StepChange(run.step.id, run.step.id, None, status, error))

    def _rendered_outputs(self) -> tuple[dict[str, Any], dict[str, str]]:
        """The outputs that can be rendered, and why the others cannot."""
        values: dict[str, Any] = {}
        missing: dict[str, str] = {}
        for name, text in self.plan.outputs.items():
            try:
                values[name] = template(text).evaluate(self._data)
            except PlanError as error:
                missing[name] = error.message
        return values, missing


_INDEX = "Name an item the list really has, or run the step only when it has."


def _dependents(steps: Mapping[str, StepRun]) -> dict[str, list[StepRun]]:
    """The steps that wait for each step directly, in the order of the file."""
    found: dict[str, list[StepRun]] = {step_id: [] for step_id in steps}
    for run in steps.values():
        for needed in run.unmet:
            found[needed].append(run)
    return found


def _ended(run: StepRun) -> str:
    return "failed" if run.status == "failed" else f"ended as {run.status}"
