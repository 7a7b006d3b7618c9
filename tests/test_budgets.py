"""Budgets with the real CLI: what stops a run in the middle, what refuses one before it begins, what is said."""

import json
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import anyio
import pytest

from mcp_tools import open_door
from orchestrator.delegation import cancel, delegate, submit, wait
from orchestrator.errors import (
    BudgetExceededError,
    DepthLimitError,
    LimitError,
    OrchestratorError,
    UnknownCostError,
)
from orchestrator.outcome import Outcome, Usage
from orchestrator.plan_runs import run_plan
from orchestrator.plans import load_plan
from orchestrator.pricing import calculate_cost
from orchestrator.runtime import Runtime
from orchestrator.task import Task
from orchestrator.testing import Fault, ModelServer, Reply, Request, Rule, ToolUse
from orchestrator.testing import Usage as Tokens
from orchestrator.usage import UsageStats
from tests.conftest import write_agent

OpenRuntime = Callable[..., AbstractAsyncContextManager[Runtime]]

UNPRICED = "mine-1-0"
WORK = ToolUse("Bash", {"command": "true"})


def error_of(outcome: Outcome) -> dict[str, Any]:
    assert outcome.error is not None, outcome
    return outcome.error


async def refused(rt: Runtime, task: Task, error: type[OrchestratorError], match: str) -> dict[str, Any]:
    """The task is refused, and nothing of it is recorded."""
    before = len(await rt.store.runs())
    with pytest.raises(error, match=match) as caught:
        await delegate(rt, task)
    assert len(await rt.store.runs()) == before
    return caught.value.details


@pytest.fixture
def stalled(model: ModelServer) -> None:
    """Runs told to wait are in the middle of an answer; the others are answered."""
    model.rules = [Rule(Reply("waiting", fault=Fault(stall_at=4)), when={"user_contains": "wait"}), Rule("done")]


# -- tokens and turns: stopped in the middle ----------------------------------------------------------------


async def test_a_run_out_of_tokens_is_stopped_and_keeps_its_text(rt: Runtime, model: ModelServer) -> None:
    model.rules = [Rule(Reply(["Still at it.", WORK], usage=Tokens(input=400, output=50, cache_read=50)))]
    with anyio.fail_after(60):
        outcome = await delegate(rt, Task(agent="worker", prompt="x", budget_tokens=1200))
    assert outcome.status == "failed"
    error = error_of(outcome)
    assert error["code"] == "budget_exceeded"
    assert error["details"]["dimension"] == "tokens"
    assert error["details"]["limit"] == 1200 <= error["details"]["spent"] <= 1500
    assert "tokens spent of 1,200" in error["message"]
    assert "Still at it." in outcome.text
    assert len(model.journal) == 3, "the third request is the one that goes over"
    assert outcome.cost_usd


async def test_children_take_from_the_tokens_of_their_parent(rt: Runtime, model: ModelServer) -> None:
    finish = anyio.Event()

    async def parent(request: Request) -> Reply:
        await finish.wait()
        return Reply("at last")

    model.rules = [
        Rule(parent, when={"user_contains": "the parent"}),
        Rule(Reply("too long a tale", usage=Tokens(input=600), fault=Fault(stall_at=4)), when={"user": "second"}),
        Rule(Reply("child done", usage=Tokens(input=600, output=10))),
    ]
    with anyio.fail_after(60):
        top = await submit(rt, Task(agent="helper", prompt="the parent", budget_tokens=1000))
        await model.wait_for("the parent")
        first = await delegate(rt, Task(agent="helper", prompt="child", parent_id=top))
        second = await delegate(rt, Task(agent="helper", prompt="second", parent_id=top, budget_tokens=10**6))
        assert (first.status, second.status) == ("succeeded", "failed")
        assert error_of(second)["details"]["limit"] == 1000
        details = await refused(rt, Task(agent="helper", prompt="x", parent_id=top), BudgetExceededError, "tokens")
        assert details["dimension"] == "tokens"
        finish.set()
        await wait(rt, top)


async def test_turns_are_model_requests_of_a_run_and_all_it_delegates(
    project: Path, runtime: OpenRuntime, model: ModelServer
) -> None:
    write_agent(project, "boss", tools="mcp__orchestrator", body="You are the boss.")
    call = ToolUse("mcp__orchestrator__delegate", {"agent": "worker", "prompt": "work"})
    model.rules = [
        Rule(call, when={"system": "the boss", "tool_result": False}),
        Rule("thanks", when={"system": "the boss"}),
        Rule(Reply(["working", WORK])),
    ]
    with anyio.fail_after(60):
        async with runtime(open_door=open_door) as rt:
            outcome = await delegate(rt, Task(agent="boss", prompt="go", max_turns=3))
            boss, worker = await rt.store.tree(outcome.run_id)
    assert (boss.status, worker.status) == ("failed", "failed")
    assert worker.error is not None
    assert worker.error["details"] == {"dimension": "turns", "limit": 3, "spent": 4}
    assert "working" in worker.text
    assert len(model.journal) <= 5, "the boss's one, three of the worker's, and perhaps the boss's last"


@pytest.mark.parametrize("limit", [{"budget_tokens": 0}, {"max_turns": 0}, {"budget_usd": 0}])
async def test_nothing_to_spend_is_refused(rt: Runtime, model: ModelServer, limit: dict[str, Any]) -> None:
    await refused(rt, Task(agent="helper", prompt="x", **limit), BudgetExceededError, "budget used up")
    assert not model.journal


@pytest.mark.parametrize("limit", [{"budget_tokens": 0}, {"max_turns": 0}])
async def test_the_configured_limits_count_too(runtime: OpenRuntime, limit: dict[str, Any]) -> None:
    async with runtime(**{f"limits__{name}": value for name, value in limit.items()}) as rt:
        await refused(rt, Task(agent="helper", prompt="x"), BudgetExceededError, "budget used up")


# -- how many runs, how deep --------------------------------------------------------------------------------


async def test_one_more_run_than_allowed_is_refused(stalled: None, rt: Runtime) -> None:
    with anyio.fail_after(60):
        top = await submit(rt, Task(agent="helper", prompt="wait", max_runs=2))
        first = await submit(rt, Task(agent="worker", prompt="wait", parent_id=top))
        second = await delegate(rt, Task(agent="helper", prompt="x", parent_id=first))
        assert second.ok, "a grandchild takes one, too"
        for parent in (top, first):
            task = Task(agent="helper", prompt="x", parent_id=parent)
            details = await refused(rt, task, BudgetExceededError, "2 runs spent of 2")
            assert details == {"dimension": "runs", "limit": 2, "spent": 2}
        await cancel(rt, top)
        await wait(rt, top)


async def test_runs_that_start_at_once_do_not_take_the_same_place(stalled: None, rt: Runtime) -> None:
    outcomes: list[str] = []

    async def attempt(top: str) -> None:
        try:
            outcomes.append((await delegate(rt, Task(agent="helper", prompt="x", parent_id=top))).status)
        except BudgetExceededError as error:
            outcomes.append(error.code)

    with anyio.fail_after(60):
        top = await submit(rt, Task(agent="helper", prompt="wait", max_runs=2))
        async with anyio.create_task_group() as tg:
            for _ in range(5):
                tg.start_soon(attempt, top)
        assert sorted(outcomes) == ["budget_exceeded"] * 3 + ["succeeded"] * 2
        assert len(await rt.store.tree(top)) == 3
        await cancel(rt, top)
        await wait(rt, top)


async def test_a_run_that_was_refused_takes_no_place(stalled: None, rt: Runtime) -> None:
    with anyio.fail_after(60):
        top = await submit(rt, Task(agent="helper", prompt="wait", max_runs=1))
        await refused(rt, Task(agent="nobody", prompt="x", parent_id=top), OrchestratorError, "nobody")
        busy = Task(agent="helper", prompt="x", parent_id=top, session=(await rt.store.run(top)).session_id)
        if busy.session is not None:
            await refused(rt, busy, OrchestratorError, "in use")
        assert (await delegate(rt, Task(agent="helper", prompt="x", parent_id=top))).ok
        await cancel(rt, top)
        await wait(rt, top)


async def test_a_run_that_may_start_none_works_itself(stalled: None, runtime: OpenRuntime) -> None:
    with anyio.fail_after(60):
        async with runtime(limits__max_runs=0) as rt:
            assert (await delegate(rt, Task(agent="helper", prompt="x"))).ok
            top = await submit(rt, Task(agent="helper", prompt="wait"))
            await refused(
                rt, Task(agent="helper", prompt="x", parent_id=top), BudgetExceededError, "0 runs spent of 0"
            )


async def test_a_task_may_allow_fewer_levels_than_the_settings(stalled: None, rt: Runtime) -> None:
    with anyio.fail_after(60):
        top = await submit(rt, Task(agent="helper", prompt="wait", max_depth=2))
        child = await submit(rt, Task(agent="worker", prompt="wait", parent_id=top, max_depth=9))
        below = Task(agent="helper", prompt="x", parent_id=child)
        await refused(rt, below, DepthLimitError, "limited to 2 levels and this would be level 3")


async def test_a_plan_that_runs_out_of_runs_says_so(
    rt: Runtime, runtime: OpenRuntime, model: ModelServer, tmp_path: Path
) -> None:
    model.rules = [Rule("done")]
    path = tmp_path / "plan.yaml"
    steps = "".join(
        f"  - id: s{n}\n    agent: helper\n    prompt: x\n" + (f"    depends_on: [s{n - 1}]\n" if n else "")
        for n in range(3)
    )
    path.write_text(f"version: 1\nname: three\nsteps:\n{steps}")
    with anyio.fail_after(60):
        async with runtime(limits__max_runs=2) as limited:
            outcome = await run_plan(limited, load_plan(path), {})
            tree = await limited.store.tree(outcome.run_id)
        assert (await run_plan(rt, load_plan(path), {})).ok
    assert error_of(outcome)["code"] == "budget_exceeded"
    assert error_of(outcome)["details"]["dimension"] == "runs"
    assert [run.kind for run in tree] == ["plan", "agent", "agent"]


# -- time ---------------------------------------------------------------------------------------------------


async def test_a_childs_time_is_over_when_its_parents_is(stalled: None, rt: Runtime) -> None:
    with anyio.fail_after(30):
        top = await submit(rt, Task(agent="helper", prompt="wait", timeout_s=4))
        child = await submit(rt, Task(agent="worker", prompt="wait", parent_id=top, timeout_s=3600))
        grandchild = await submit(rt, Task(agent="helper", prompt="wait.", parent_id=child, timeout_s=3600))
        outcomes = [await wait(rt, run) for run in (top, child, grandchild)]
    # Whichever is first, their look at the clock or the end of the run above.
    assert [outcome.status for outcome in outcomes] == ["timed_out", "cancelled", "cancelled"]


async def test_a_child_that_outlives_its_parent_has_no_more_time_than_it_had(
    runtime: OpenRuntime, model: ModelServer
) -> None:
    model.rules = [
        Rule(Reply("never", fault=Fault(stall_at=4)), when={"user": "child"}),
        Rule(Reply("done", delay_s=2)),
    ]
    with anyio.fail_after(60):
        async with runtime() as rt:
            top = await submit(rt, Task(agent="helper", prompt="parent", timeout_s=8))
            child = await submit(rt, Task(agent="helper", prompt="child", parent_id=top, timeout_s=3600))
            assert (await wait(rt, top)).ok
            outcome = await wait(rt, child)
    assert outcome.status == "cancelled"
    assert "a run above, which delegated this one, took longer than 8 s" in error_of(outcome)["message"]


async def test_a_child_begins_with_the_deadline_of_its_parent(
    stalled: None, rt: Runtime, model: ModelServer
) -> None:
    with anyio.fail_after(60):
        top = await submit(rt, Task(agent="helper", prompt="wait", timeout_s=50))
        await model.wait_for("wait")
        child = await submit(rt, Task(agent="helper", prompt="wait below", parent_id=top, timeout_s=3600))
        sooner = await submit(rt, Task(agent="helper", prompt="wait, briefly", parent_id=top, timeout_s=40))
        await model.wait_for("wait below")
        await model.wait_for("wait, briefly")
        ends = [rt.live[run].budget.left.deadline for run in (top, child, sooner)]
        assert None not in ends
        assert ends[0] == ends[1] > ends[2]  # type: ignore[operator]
        await cancel(rt, top)


# -- a parent in another process ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "dimension"),
    [({"budget_tokens": 100}, "tokens"), ({"max_turns": 1}, "turns"), ({"max_runs": 1}, "runs")],
)
async def test_a_parent_in_another_process_bounds_every_dimension(
    runtime: OpenRuntime, model: ModelServer, limit: dict[str, Any], dimension: str
) -> None:
    finish = anyio.Event()

    async def parent(request: Request) -> Reply:
        await finish.wait()
        return Reply("at last")

    model.rules = [Rule(parent, when={"user_contains": "wait"}), Rule("done")]
    with anyio.fail_after(60):
        async with runtime() as first, runtime() as second:
            top = await submit(first, Task(agent="helper", prompt="wait", **limit))
            await model.wait_for("wait")
            await delegate(second, Task(agent="helper", prompt="x", parent_id=top))
            late = Task(agent="helper", prompt="x", parent_id=top)
            details = await refused(second, late, BudgetExceededError, f"0 {dimension} spent of 0")
            assert details["dimension"] == dimension
            finish.set()
            await wait(first, top)


# -- prices that are not known ------------------------------------------------------------------------------


async def test_an_unknown_price_is_refused_before_the_start(runtime: OpenRuntime, model: ModelServer) -> None:
    model.rules = [Rule("hi")]
    task = Task(agent="helper", prompt="x", model=UNPRICED, budget_usd=1)
    with anyio.fail_after(60):
        async with runtime(limits__on_unknown_cost="refuse") as rt:
            details = await refused(rt, task, UnknownCostError, f"{UNPRICED!r} has no known price")
            assert details == {"model": UNPRICED, "left_usd": 1}
            assert not model.journal
            free = await delegate(rt, task.model_copy(update={"budget_usd": None}))
            assert (free.status, free.cost_usd) == ("succeeded", None), "nothing to protect, and still unknown"
            known = await delegate(rt, task.model_copy(update={"model": "claude-opus-5-5"}))
            assert known.ok


async def test_a_budget_above_refuses_an_unknown_price_too(
    stalled: None, runtime: OpenRuntime, model: ModelServer
) -> None:
    with anyio.fail_after(60):
        async with runtime(limits__on_unknown_cost="refuse") as rt:
            top = await submit(rt, Task(agent="helper", prompt="wait", budget_usd=1))
            await refused(rt, Task(agent="helper", prompt="x", parent_id=top, model=UNPRICED), LimitError, UNPRICED)


async def test_an_unknown_price_stops_a_run_when_it_is_seen(
    project: Path, runtime: OpenRuntime, model: ModelServer
) -> None:
    """The alias is fine; which model answers shows when it does."""
    model.rules = [Rule(Reply("some words", fault=Fault(stall_at=4)))]
    named = {"claude.env.ANTHROPIC_DEFAULT_OPUS_MODEL": UNPRICED}
    with anyio.fail_after(60):
        async with runtime(**named, limits__on_unknown_cost="refuse") as rt:
            outcome = await delegate(rt, Task(agent="helper", prompt="x", model="opus", budget_usd=1))
            run = await rt.store.run(outcome.run_id)
    assert outcome.status == "failed"
    assert error_of(outcome)["code"] == "unknown_cost"
    assert error_of(outcome)["details"]["model"] == UNPRICED
    assert (run.cost_usd, run.cost_basis) == (None, None)
    assert outcome.usage.input_tokens == 100


async def test_by_default_an_unknown_price_is_allowed_and_stays_unknown(rt: Runtime, model: ModelServer) -> None:
    model.rules = [Rule("hi")]
    with anyio.fail_after(60):
        outcome = await delegate(rt, Task(agent="helper", prompt="x", model=UNPRICED, budget_usd=1))
    assert (outcome.status, outcome.cost_usd) == ("succeeded", None)
    assert outcome.usage.total_tokens == 105


# -- sub-agents of the CLI ----------------------------------------------------------------------------------


async def test_what_sub_agents_use_counts_while_they_work(
    project: Path, runtime: OpenRuntime, model: ModelServer
) -> None:
    write_agent(
        project, "splitter", tools="Agent, Bash", permissionMode="acceptEdits", body="You are the splitter."
    )
    start = ToolUse("Agent", {"description": "d", "prompt": "dig", "subagent_type": "general-purpose"})
    model.rules = [
        Rule(start, when={"system": "You are the splitter", "tool_result": False}),
        Rule(Reply(["digging", WORK], usage=Tokens(input=1000, output=20))),
    ]
    with anyio.fail_after(60):
        async with runtime() as rt:
            outcome = await delegate(rt, Task(agent="splitter", prompt="go", budget_tokens=3000))
    assert error_of(outcome)["details"]["dimension"] == "tokens"
    assert error_of(outcome)["details"]["spent"] <= 5000, "not only when the sub-agent has ended"
    assert len(model.journal) < 8


# -- sums over runs -----------------------------------------------------------------------------------------


async def test_sums_over_runs_by_model(rt: Runtime, model: ModelServer) -> None:
    model.rules = [
        Rule(Reply("small", usage=Tokens(input=1000, output=10, cache_read=500)), when={"model": "haiku"}),
        Rule(Reply(["one", WORK]), when={"model": "opus", "tool_result": False}),
        Rule("two"),
    ]
    stats, others = UsageStats(), UsageStats()
    with anyio.fail_after(60):
        for _ in range(2):
            stats.add(await delegate(rt, Task(agent="worker", prompt="x", model="claude-haiku-5-5")))
        others.add(await delegate(rt, Task(agent="worker", prompt="x")))
    stats.merge(others)
    opus, haiku = stats.model_usage["claude-opus-5-5"], stats.model_usage["claude-haiku-5-5"]
    assert haiku.usage == Usage(input_tokens=2000, output_tokens=20, cache_read_tokens=1000)
    assert (haiku.requests, opus.requests, stats.request_count, stats.runs) == (2, 2, 4, 3)
    assert opus.usage == Usage(input_tokens=200, output_tokens=10)
    assert opus.cost_usd == pytest.approx(2 * (calculate_cost("claude-opus-5-5", 100, 5) or 0))
    assert haiku.cost_usd == pytest.approx(
        2 * (calculate_cost("claude-haiku-5-5", 1000, 10, cache_read_tokens=500) or 0)
    )
    assert stats.total_cost_usd == pytest.approx((opus.cost_usd or 0) + (haiku.cost_usd or 0))
    assert stats.total_tokens == 3020 + 210
    data = json.loads(json.dumps(stats.to_dict()))
    assert data["total_tokens"] == sum(each["total_tokens"] for each in data["models"].values())
    assert data["models"]["claude-haiku-5-5"]["cache_read_tokens"] == 1000
    assert others.runs == 1, "what is merged stays as it was"
    stats.reset()
    assert (stats.total_tokens, stats.total_cost_usd, stats.request_count, stats.to_dict()["models"]) == (
        0,
        0,
        0,
        {},
    )


def test_one_unknown_cost_makes_the_sum_unknown_and_no_token_less() -> None:
    stats = UsageStats()
    some = Usage(input_tokens=10)
    stats.add(Outcome(run_id="1", status="succeeded", model="a", cost_usd=1.0, usage=some))
    stats.add(Outcome(run_id="2", status="succeeded", model="b", cost_usd=None, usage=some))
    stats.add(Outcome(run_id="3", status="failed", model="b", cost_usd=2.0, usage=some))
    assert stats.total_cost_usd is None
    assert stats.model_usage["a"].cost_usd == 1.0
    assert stats.model_usage["b"].cost_usd is None
    assert stats.total_tokens == 30
