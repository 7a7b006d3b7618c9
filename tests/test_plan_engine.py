"""The driver: concurrency, failures, cancellation. A step runs wherever an async function says."""

from collections.abc import Awaitable, Callable
from pathlib import Path

import anyio
import anyio.lowlevel
import pytest

from orchestrator.errors import (
    DepthLimitError,
    RunCancelledError,
    RunInterruptedError,
    RunTimeoutError,
)
from orchestrator.outcome import Outcome
from orchestrator.plans import PlanState, StepChange, StepJob, drive, parse_plan

CHAIN = """\
steps:
  - {id: a, agent: w, prompt: one}
  - {id: b, agent: w, prompt: "{{ steps.a.text }} two", depends_on: a}
  - {id: c, agent: w, prompt: "{{ steps.b.text }} three", depends_on: b}
"""
PARALLEL = "steps: [{id: a, agent: w, prompt: x, for_each: {in: [0, 1, 2]}}]\n"


def state(text: str) -> PlanState:
    plan = parse_plan(f"version: 1\nname: x\n{text}", Path("x.yaml"))
    return PlanState(plan, {}, "run-1")


async def echo(job_id: str, job: StepJob) -> Outcome:
    await anyio.lowlevel.checkpoint()
    return Outcome(run_id=job_id, status="succeeded", text=job.prompt)


async def test_runs_in_order_and_passes_results_on() -> None:
    seen: list[StepChange] = []
    with anyio.fail_after(5):
        ended = await drive(state(CHAIN), echo, on_change=seen.append)
    assert ended.status == "succeeded"
    assert ended.results["c"]["text"] == "one two three"
    assert [(change.id, change.status) for change in seen] == [
        ("a", "running"),
        ("a", "succeeded"),
        ("b", "running"),
        ("b", "succeeded"),
        ("c", "running"),
        ("c", "succeeded"),
    ]


async def test_ready_jobs_run_at_the_same_time() -> None:
    arrived: set[str] = set()
    all_there = anyio.Event()

    async def meet(job_id: str, job: StepJob) -> Outcome:
        arrived.add(job_id)
        if len(arrived) == 3:
            all_there.set()
        await all_there.wait()
        return Outcome(run_id=job_id, status="succeeded")

    with anyio.fail_after(5):
        ended = await drive(state(PARALLEL), meet)
    assert ended.status == "succeeded"
    assert arrived == {"a[0]", "a[1]", "a[2]"}


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (DepthLimitError("too deep"), "failed"),
        (RunCancelledError("stopped"), "cancelled"),
        (RunTimeoutError("late"), "timed_out"),
        (RunInterruptedError("gone"), "interrupted"),
    ],
)
async def test_an_error_of_ours_is_an_outcome(error: Exception, status: str) -> None:
    async def refuse(job_id: str, job: StepJob) -> Outcome:
        raise error

    with anyio.fail_after(5):
        ended = await drive(state(CHAIN), refuse)
    assert ended.statuses == {"a": status, "b": "skipped", "c": "skipped"}
    assert ended.status == "failed"
    assert ended.results["a"]["error"]["message"] == str(error)


async def test_any_other_error_is_a_bug_and_ends_everything() -> None:
    stopped: list[str] = []

    async def broken(job_id: str, job: StepJob) -> Outcome:
        if job.index == 1:
            raise ZeroDivisionError
        try:
            await anyio.sleep_forever()
        finally:
            stopped.append(job_id)
        raise AssertionError("unreachable")

    running = state(PARALLEL)
    with anyio.fail_after(5), pytest.raises(ExceptionGroup) as caught:
        await drive(running, broken)
    assert caught.group_contains(ZeroDivisionError)
    assert sorted(stopped) == ["a[0]", "a[2]"]
    assert running.done


async def cancelled_midway(
    running: PlanState, run_step: Callable[[str, StepJob], Awaitable[Outcome]], started: anyio.Event
) -> list[StepChange]:
    seen: list[StepChange] = []
    with anyio.fail_after(5):
        async with anyio.create_task_group() as tasks:

            async def run() -> None:
                await drive(running, run_step, on_change=seen.append)

            tasks.start_soon(run)
            await started.wait()
            tasks.cancel_scope.cancel()
    return seen


async def test_cancelling_cancels_every_job() -> None:
    started, stopped = anyio.Event(), []

    async def forever(job_id: str, job: StepJob) -> Outcome:
        if job.index == 2:
            started.set()
        try:
            await anyio.sleep_forever()
        finally:
            stopped.append(job_id)
        raise AssertionError("unreachable")

    running = state(PARALLEL)
    seen = await cancelled_midway(running, forever, started)
    assert sorted(stopped) == ["a[0]", "a[1]", "a[2]"]
    assert running.status == "cancelled"
    assert ("a", "cancelled") in [(change.id, change.status) for change in seen]


async def test_nothing_starts_after_a_cancellation_that_was_answered_with_an_outcome() -> None:
    started, called = anyio.Event(), []

    async def graceful(job_id: str, job: StepJob) -> Outcome:
        called.append(job_id)
        started.set()
        try:
            await anyio.sleep_forever()
        except anyio.get_cancelled_exc_class():
            return Outcome(run_id=job_id, status="succeeded", text="just in time")
        raise AssertionError("unreachable")

    running = state(CHAIN)
    await cancelled_midway(running, graceful, started)
    assert called == ["a"]
    assert running.statuses == {"a": "succeeded", "b": "skipped", "c": "skipped"}
    assert running.status == "cancelled"


async def test_the_plan_ends_when_its_time_is_over() -> None:
    stopped: list[str] = []

    async def forever(job_id: str, job: StepJob) -> Outcome:
        try:
            await anyio.sleep_forever()
        finally:
            stopped.append(job_id)
        raise AssertionError("unreachable")

    with anyio.fail_after(5):
        ended = await drive(state(f"limits: {{timeout: 0.05}}\n{CHAIN}"), forever)
    assert stopped == ["a"]
    assert ended.status == "timed_out"
    assert ended.statuses == {"a": "cancelled", "b": "skipped", "c": "skipped"}
    assert ended.error is not None
    assert ended.error["details"] == {"kind": "wall"}


async def test_a_plan_without_jobs_ends() -> None:
    text = "steps: [{id: a, agent: w, prompt: x, for_each: {in: []}}]\noutputs: {n: '{{ steps.a.outputs }}'}"
    with anyio.fail_after(5):
        ended = await drive(state(text), echo)
    assert (ended.status, ended.outputs) == ("succeeded", {"n": []})


async def test_a_thousand_items_are_quick_and_bounded() -> None:
    running_now, most = 0, 0

    async def count(job_id: str, job: StepJob) -> Outcome:
        nonlocal running_now, most
        running_now += 1
        most = max(most, running_now)
        await anyio.lowlevel.checkpoint()
        running_now -= 1
        return Outcome(run_id=job_id, status="succeeded", text=job.prompt)

    running = state("""\
steps:
  - {id: a, agent: w, prompt: "{{ item }}", for_each: {in: "{{ range(1000) }}", max_parallel: 50}}
  - {id: b, agent: w, prompt: "{{ item.text }}", depends_on: a, for_each: {in: "{{ steps.a.results }}"}}
""")
    with anyio.fail_after(30):
        ended = await drive(running, count)
    assert ended.status == "succeeded"
    assert ended.results["b"]["outputs"] == [str(i) for i in range(1000)]
    assert most == 1000, "only `a` was bounded"
