"""The MCP tools that start several runs, go on with sessions, and repeat runs: through the real CLI."""

import re
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import anyio
import pytest
from mcp import Client
from mcp_types import CallToolResult

from mcp_tools import build_server
from orchestrator.runtime import Runtime
from orchestrator.testing import Fault, ModelServer, Reply, Rule
from tests.test_many import Gate
from tests.test_mcp_tools import error_of, facts_of, text_of

Open = Callable[..., AbstractAsyncContextManager[Runtime]]
FAILS = Rule(Reply(fault=Fault(status=400, message="no")), when={"user_contains": "fails"})
HEAD = re.compile(r"--- helper ([0-9a-f]{16}) ---")


@pytest.fixture
async def client(rt: Runtime) -> AsyncIterator[Client]:
    async with Client(build_server(rt)) as connected:
        yield connected


async def call(client: Client, tool: str, **arguments: Any) -> CallToolResult:
    with anyio.fail_after(60):
        result = await client.call_tool(tool, arguments)
    assert isinstance(result, CallToolResult)
    return result


def tasks(*prompts: str) -> list[dict[str, Any]]:
    return [{"agent": "helper", "prompt": prompt} for prompt in prompts]


async def test_answers_come_in_the_order_of_the_tasks(client: Client, model: ModelServer) -> None:
    model.rules = [Rule(lambda request: f"to {request.last_user_text}")]
    text = text_of(await call(client, "delegate_many", tasks=tasks("a", "b", "c"), max_parallel=2))
    assert text.splitlines()[0] == "3 succeeded"
    said = HEAD.split(text)[2::2]
    assert [part.strip().splitlines()[0] for part in said] == ["to a", "to b", "to c"]


async def test_a_failure_among_them_is_told_beside_the_answers(client: Client, model: ModelServer) -> None:
    model.rules = [FAILS, Rule("fine")]
    result = await call(client, "delegate_many", tasks=tasks("a", "fails"))
    assert not result.is_error
    text = text_of(result)
    assert text.splitlines()[0] == "1 succeeded, 1 failed"
    assert "fine" in text
    assert '"code":"invalid_request"' in text


@pytest.mark.parametrize(("join", "prompts"), [("all_ok", ("a", "fails")), ("first_ok", ("fails",))])
async def test_too_few_answers_are_an_error(
    client: Client, model: ModelServer, join: str, prompts: tuple[str, ...]
) -> None:
    model.rules = [FAILS, Rule("fine")]
    result = await call(client, "delegate_many", tasks=tasks(*prompts), join=join)
    assert result.is_error
    assert "1 failed" in text_of(result)


async def test_one_wrong_task_refuses_all(client: Client, rt: Runtime, model: ModelServer) -> None:
    model.rules = [Rule("fine")]
    wrong = [*tasks("a"), {"agent": "helpr", "prompt": "b"}]
    refused = error_of(await call(client, "delegate_many", tasks=wrong))
    assert refused["code"] == "agent_not_found"
    unknown = await call(client, "delegate_many", tasks=[{"agent": "helper", "prompt": "a", "promt": "b"}])
    assert unknown.is_error
    assert "promt" in text_of(unknown)
    assert await rt.store.runs() == []


async def test_the_runs_go_on_when_the_wait_is_over(client: Client, model: ModelServer) -> None:
    slow = Gate("slow")
    model.rules = [slow.rule, Rule("quick")]
    text = text_of(await call(client, "delegate_many", tasks=tasks("slow", "quick"), wait_s=0))
    ids = HEAD.findall(text)
    assert len(ids) == 2
    first = text_of(await call(client, "run_wait", run_ids=ids, until="first"))
    assert "quick" in first
    assert f"run_id={ids[0]} still running" in first
    slow.opened.set()
    both = text_of(await call(client, "run_wait", run_ids=ids))
    assert "let through" in both


async def test_a_session_is_gone_on_with_and_forked_at_a_turn(client: Client, model: ModelServer) -> None:
    model.rules = [Rule(lambda request: f"to {request.last_user_text}")]
    session = facts_of(await call(client, "delegate", agent="helper", prompt="one"))["session"]
    second = facts_of(await call(client, "continue_session", session_id=session, prompt="two"))
    assert second["session"] == session
    await call(client, "fork_session", session_id=session, prompt="else", turn=1)
    assert model.journal[-1].texts == ["one", "to one", "else"]
    refused = error_of(await call(client, "fork_session", session_id=session, prompt="else", turn=7))
    assert (refused["code"], refused["turns"]) == ("session_turn", 2)


async def test_a_run_is_repeated_with_another_model(client: Client, rt: Runtime, model: ModelServer) -> None:
    model.rules = [Rule("ok")]
    first = facts_of(await call(client, "delegate", agent="helper", prompt="one"))
    again = facts_of(await call(client, "replay", run_id=first["run"], model="opus"))
    assert again["run"] != first["run"]
    assert "opus" in model.journal[-1].model
    await call(client, "replay", run_id=first["run"], onwards=True, prompt="and then?")
    assert model.journal[-1].texts == ["one", "ok", "and then?"]
    assert error_of(await call(client, "replay", run_id=first["run"], onwards=True))["code"] == "config"


async def test_a_plan_is_run(client: Client, rt: Runtime, model: ModelServer, project: Path) -> None:
    (project / "two.yaml").write_text(
        "version: 1\nname: two\ninputs: {word: {type: string}}\nsteps:\n"
        "  - {id: first, agent: helper, prompt: 'say {{ inputs.word }}'}\n"
        "  - {id: second, agent: helper, prompt: 'then {{ steps.first.text }}', depends_on: [first]}\n"
    )
    model.rules = [Rule(lambda request: f"to {request.last_user_text}")]
    result = await call(client, "run_plan", plan="two.yaml", inputs={"word": "it"})
    assert not result.is_error, text_of(result)
    first, second, *_ = text_of(result).splitlines()
    assert first.startswith("first (helper) succeeded run_id=")
    assert second.startswith("second (helper) succeeded run_id=")
    assert [request.last_user_text for request in model.journal] == ["say it", "then to say it"]
    [plan] = [run for run in await rt.store.runs() if run.kind == "plan"]
    assert plan.caller is not None


@pytest.mark.parametrize("path", ["../outside.yaml", "/etc/hosts", "missing.yaml", "bad.yaml"])
async def test_a_plan_that_may_not_be_run(
    client: Client, rt: Runtime, model: ModelServer, project: Path, path: str
) -> None:
    (project.parent / "outside.yaml").write_text("version: 1\nname: x\nsteps: []\n")
    (project / "bad.yaml").write_text("version: 1\nname: x\nstep: []\n")
    refused = error_of(await call(client, "run_plan", plan=path))
    assert refused["code"] == ("plan" if path in ("missing.yaml", "bad.yaml") else "reach")
    assert await rt.store.runs() == []
