"""Nested delegation: agents that call ``delegate`` through the runtime's own MCP door, three levels deep."""

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import anyio
import pytest

from mcp_tools import build_server, open_door
from orchestrator.delegation import delegate, submit
from orchestrator.errors import BudgetExceededError, LimitError
from orchestrator.runtime import Runtime
from orchestrator.specs import OUR_TOOLS, SERVER
from orchestrator.store import Run
from orchestrator.task import Task
from orchestrator.testing import Fault, ModelServer, Reply, Request, Rule, ToolUse
from tests.conftest import write_agent
from tests.otlp import otlp_receiver

Open = Callable[..., AbstractAsyncContextManager[Runtime]]
CALL = "mcp__orchestrator__delegate"


@pytest.fixture
def chain(project: Path, model: ModelServer) -> None:
    """Agents a → b → c → d, each delegating to the next and handing its answer up."""
    for name, below in zip("abcd", "bcd ", strict=True):
        write_agent(project, name, tools="mcp__orchestrator", body=f"You are agent {name}.")
        if below != " ":
            call = ToolUse(CALL, {"agent": below, "prompt": f"work for {name}"})
            model.rules.append(Rule(call, when={"system": f"You are agent {name}\\.", "tool_result": False}))
            heard = {"system": f"You are agent {name}\\.", "tool_result": True}
            model.rules.append(Rule(_hand_up(name), when=heard))
    model.rules.append(Rule("d is done", when={"system": "You are agent d\\."}))


def _hand_up(name: str) -> Callable[[Request], Reply]:
    return lambda request: Reply(f"{name} heard: {request.tool_results[0].text}")


async def test_three_levels_and_the_fourth_is_refused(chain: None, runtime: Open, model: ModelServer) -> None:
    with anyio.fail_after(60):
        async with runtime(open_door=open_door) as rt:
            outcome = await delegate(rt, Task(agent="a", prompt="begin"))
            runs = await rt.store.tree(outcome.run_id)
    assert outcome.ok, outcome.error
    assert [(run.name, run.depth, run.status) for run in runs] == [
        ("a", 1, "succeeded"),
        ("b", 2, "succeeded"),
        ("c", 3, "succeeded"),
    ]
    assert _parents(runs) == {"b": "a", "c": "b"}
    refused = next(r for r in model.journal if "You are agent c." in r.system and r.tool_results).tool_results[0]
    assert refused.is_error
    assert "limited to 3 levels" in refused.text
    assert "Do this work yourself" in refused.text, "the model is told what to do instead"
    assert "c heard:" in outcome.text, "what the grandchild said went all the way up"
    assert not model.requests(system="You are agent d.")


def _parents(runs: list[Run]) -> dict[str, str]:
    names = {run.id: run.name for run in runs}
    return {run.name: names[run.parent_id] for run in runs if run.parent_id}


async def test_the_exact_tool_call_is_the_parent_span(chain: None, runtime: Open) -> None:
    async with otlp_receiver() as otlp:
        with anyio.fail_after(60):
            async with runtime(open_door=open_door, env={"OTEL_EXPORTER_OTLP_ENDPOINT": otlp.endpoint}) as rt:
                outcome = await delegate(rt, Task(agent="b", prompt="begin"))
                runs = await rt.store.tree(outcome.run_id)
        spans = {span.span_id: span for span in otlp.spans}
    assert {span.trace_id for span in spans.values()} == {runs[0].trace_id}
    for run in runs[1:]:
        caller = spans[spans[run.id].parent_span_id]
        assert caller.name == "claude_code.tool.execution"
        above = caller
        while above.span_id != run.parent_id:
            above = spans[above.parent_span_id]
        assert above.name.startswith("invoke_agent")


async def test_a_child_cannot_spend_more_than_its_parent_has_left(
    project: Path, runtime: Open, model: ModelServer
) -> None:
    write_agent(project, "boss", tools="mcp__orchestrator", body="You are the boss.")
    model.rules = [
        Rule(
            ToolUse(CALL, {"agent": "helper", "prompt": "x", "budget_usd": 100}),
            when={"system": "the boss", "tool_result": False},
        ),
        Rule("thanks", when={"system": "the boss"}),
        Rule("helped", when={"system": "the helper"}),
    ]
    with anyio.fail_after(60):
        async with runtime(open_door=open_door) as rt:
            outcome = await delegate(rt, Task(agent="boss", prompt="go", budget_usd=0.0011))
            runs = await rt.store.tree(outcome.run_id)
    # Each scripted answer costs $0.0005: the boss's first, the helper's, and then nothing is left for a third.
    assert [run.name for run in runs] == ["boss", "helper"]
    assert sum(run.cost_usd or 0 for run in runs) <= 0.0016
    assert outcome.error is None or outcome.error["code"] == "budget_exceeded"


async def test_an_agent_without_the_word_has_no_door(runtime: Open, model: ModelServer) -> None:
    model.rules = [Rule("hi")]
    with anyio.fail_after(30):
        async with runtime(open_door=open_door) as rt:
            await delegate(rt, Task(agent="helper", prompt="go"))
            assert rt.door is None, "nobody needed it, so it was never opened"
    assert model.journal[0].tools == ["Read"]


async def test_tokens_end_with_their_run(chain: None, runtime: Open) -> None:
    with anyio.fail_after(60):
        async with runtime(open_door=open_door, limits__max_depth=1, pool__max_sessions=0) as rt:
            await delegate(rt, Task(agent="a", prompt="begin"))
            assert not rt.tokens


async def test_only_the_tools_the_file_names_are_offered(project: Path, runtime: Open, model: ModelServer) -> None:
    write_agent(project, "looker", tools="mcp__orchestrator__query_traces", body="You are the looker.")
    write_agent(project, "plain", body="You are plain.")
    model.rules = [Rule("ok")]
    with anyio.fail_after(60):
        async with runtime(open_door=open_door) as rt:
            await delegate(rt, Task(agent="looker", prompt="go"))
            await delegate(rt, Task(agent="plain", prompt="go"))
            known = {f"mcp__orchestrator__{tool.name}" for tool in await build_server(rt).list_tools()}
    assert known == {f"{SERVER}__{tool}" for tool in OUR_TOOLS}
    assert model.journal[0].tools == ["mcp__orchestrator__query_traces"]
    assert not known & set(model.journal[1].tools), "a file without a tools list cannot spend by delegating"


async def test_a_child_of_a_run_that_has_ended_is_refused(rt: Runtime, model: ModelServer) -> None:
    model.rules = [Rule("ok")]
    with anyio.fail_after(60):
        parent = await delegate(rt, Task(agent="helper", prompt="go"))
        with pytest.raises(LimitError, match="has ended"):
            await delegate(rt, Task(agent="helper", prompt="again", parent_id=parent.run_id))


async def test_a_parent_in_another_process_still_bounds_the_budget(
    runtime: Open, model: ModelServer, project: Path
) -> None:
    """Two runtimes on one store, as `orchestrator run` and the server are."""
    model.rules = [Rule(Reply("working", fault=Fault(stall_at=4)), when={"user": "parent"}), Rule("never")]
    with anyio.fail_after(60):
        async with runtime() as first, runtime() as second:
            parent = await submit(first, Task(agent="helper", prompt="parent", budget_usd=0.02))
            await model.wait_for("parent")
            await first.store.update_run(parent, cost_usd=0.02)
            with pytest.raises(BudgetExceededError):
                await delegate(second, Task(agent="helper", prompt="child", parent_id=parent))
    assert len(model.journal) == 1


async def test_what_a_failed_run_delegated_is_ended_first(project: Path, runtime: Open, model: ModelServer) -> None:
    write_agent(project, "boss", tools="mcp__orchestrator", body="You are the boss.")
    model.rules = [
        Rule(
            ToolUse(CALL, {"agent": "helper", "prompt": "x", "wait_s": 0}),
            when={"system": "the boss", "tool_result": False},
        ),
        Rule(Reply(fault=Fault(status=403, message="no more")), when={"system": "the boss"}),
        Rule(Reply("half", fault=Fault(stall_at=4)), when={"system": "the helper"}),
    ]
    with anyio.fail_after(60):
        async with runtime(open_door=open_door) as rt:
            outcome = await delegate(rt, Task(agent="boss", prompt="go"))
            boss, helper = await rt.store.tree(outcome.run_id)
    assert (boss.status, helper.status) == ("failed", "cancelled")
    assert helper.ended_us is not None
    assert boss.ended_us is not None
    assert helper.ended_us <= boss.ended_us
