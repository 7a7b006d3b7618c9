"""A run from its request to its record: the real CLI works, only the model's words are scripted."""

import json
import sys
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import anyio
import pytest

from orchestrator.delegation import cancel, delegate, submit, wait
from orchestrator.errors import (
    AgentError,
    AgentNotFoundError,
    BudgetExceededError,
    ConfigError,
    DepthLimitError,
    RunCancelledError,
)
from orchestrator.outcome import Outcome, Usage
from orchestrator.runtime import Runtime
from orchestrator.store import Run, open_store
from orchestrator.task import Task
from orchestrator.testing import Fault, ModelServer, Reply, Request, Rule, Text, ToolUse
from orchestrator.testing import Usage as Tokens
from tests.conftest import DUMMY_KEY, write_agent

OpenRuntime = Callable[..., AbstractAsyncContextManager[Runtime]]

SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}


def step(reply: Reply | str | ToolUse, **when: Any) -> Rule:
    """A rule for one moment of a dialogue."""
    return Rule(reply, when=when)


async def stored(rt: Runtime, run_id: str) -> Run:
    """The run as another process sees it: only what is committed."""
    async with open_store(rt.config.store_path) as other:
        return await other.run(run_id)


# --- The answer and the record


async def test_an_answer_with_its_usage_and_cost(rt: Runtime, model: ModelServer, project: Path) -> None:
    model.rules = [Rule(Reply("hello there", usage=Tokens(input=1200, output=30, cache_read=1000)))]
    outcome = await delegate(rt, Task(agent="helper", prompt="say hi"))
    assert (outcome.status, outcome.text, outcome.error) == ("succeeded", "hello there", None)
    assert outcome.model == "claude-opus-5-5"
    assert outcome.usage == Usage(input_tokens=1200, output_tokens=30, cache_read_tokens=1000)
    # 4 $ per million tokens in, 20 out; a twentieth of the input price for what the cache gave.
    assert outcome.cost_usd == pytest.approx((1200 * 4 + 30 * 20 + 1000 * 0.2) / 1e6)
    assert outcome.num_turns == 1
    assert outcome.duration_ms is not None
    assert outcome.duration_ms > 0

    run = await stored(rt, outcome.run_id)
    assert run.outcome() == outcome
    assert (run.cost_basis, run.prompt, run.cwd) == ("cli", "say hi", str(project))
    assert (run.depth, run.root_id, run.parent_id) == (1, run.id, None)
    assert (run.agent or {})["name"] == "helper"


async def test_usage_adds_up_over_all_model_requests(rt: Runtime, model: ModelServer, project: Path) -> None:
    (project / "notes.txt").write_text("forty-two\n")
    read = ToolUse("Read", {"file_path": str(project / "notes.txt")})
    model.rules = [
        step(Reply(["Let me look.", read], usage=Tokens(input=1000, output=20)), tool_result=False),
        step(Reply("It says 42.", usage=Tokens(input=1500, output=10)), tool_result="forty-two"),
    ]
    outcome = await delegate(rt, Task(agent="helper", prompt="what does it say?"))
    assert outcome.text == "It says 42."
    assert outcome.usage == Usage(input_tokens=2500, output_tokens=30)
    assert outcome.cost_usd == pytest.approx((2500 * 4 + 30 * 20) / 1e6)


async def test_the_run_is_on_record_before_the_model_is_asked(rt: Runtime, model: ModelServer) -> None:
    answer = anyio.Event()

    async def hold(request: Request) -> str:
        await answer.wait()
        return "done"

    model.rules = [Rule(hold)]
    async with anyio.create_task_group() as tg:
        tg.start_soon(delegate, rt, Task(agent="helper", prompt="hold on"))
        await model.wait_for("hold on")
        async with open_store(rt.config.store_path) as other:
            [run] = await other.runs()
            assert (run.status, run.prompt, run.text) == ("running", "hold on", "")
            assert run.session_id is not None
            assert (await other.session(run.session_id)).locked_by == run.id
        answer.set()
    assert (await stored(rt, run.id)).text == "done"


async def test_the_result_is_stored_before_anyone_is_told(rt: Runtime, model: ModelServer) -> None:
    model.rules = [Rule("told")]
    with rt.events.watch() as watcher, anyio.fail_after(10):
        run_id = await submit(rt, Task(agent="helper", prompt="tell"))
        async for event in watcher:
            if event.type == "run.ended":
                break
    run = await stored(rt, run_id)
    assert (run.status, run.text) == ("succeeded", "told")
    assert event.run_id == run_id
    assert event.data["status"] == "succeeded"


async def test_the_text_is_on_record_while_it_streams(rt: Runtime, model: ModelServer) -> None:
    """So that a crash in a long answer does not lose what was said."""
    model.rules = [Rule(Reply("The first half. The other half.", fault=Fault(stall_at=4)))]
    run_id = await submit(rt, Task(agent="helper", prompt="x"))
    async with open_store(rt.config.store_path) as other:
        for _ in range(100):
            if (run := await other.run(run_id)).text:
                break
            await anyio.sleep(0.05)
    assert (run.status, run.text) == ("running", "The first half. ")


async def test_messages_are_kept_in_order(rt: Runtime, model: ModelServer, project: Path) -> None:
    model.rules = [
        step(Reply([Text("One moment."), ToolUse("Glob", {"pattern": "*.md"})]), tool_result=False),
        step("Done.", tool_result=True),
    ]
    write_agent(project, "finder", tools="Glob")
    rt.catalog.load()
    outcome = await delegate(rt, Task(agent="finder", prompt="find"))
    async with open_store(rt.config.store_path) as other:
        messages = await other.messages(outcome.run_id)
    kinds = [message.type for message in messages]
    assert [message.seq for message in messages] == list(range(1, len(messages) + 1))
    assert [kind for kind in kinds if kind in ("assistant", "user", "result")] == [
        *("assistant", "assistant", "user", "assistant", "result"),
    ]
    assert "stream_event" not in kinds
    assert messages[-1].body["result"] == "Done."


async def test_submit_returns_at_once_and_wait_gives_the_outcome(rt: Runtime, model: ModelServer) -> None:
    answer = anyio.Event()

    async def hold(request: Request) -> str:
        await answer.wait()
        return "later"

    model.rules = [Rule(hold)]
    run_id = await submit(rt, Task(agent="helper", prompt="work"))
    assert (await rt.store.run(run_id)).status in ("queued", "running")
    answer.set()
    with anyio.fail_after(10):
        outcome = await wait(rt, run_id)
    assert outcome.text == "later"
    assert await wait(rt, run_id) == outcome  # also when it has long ended


async def test_an_unknown_price_is_unknown_and_not_nothing(rt: Runtime, model: ModelServer) -> None:
    model.rules = [Rule("hm")]
    outcome = await delegate(rt, Task(agent="helper", prompt="x", model="house-blend-1"))
    assert outcome.status == "succeeded"
    assert outcome.cost_usd is None
    assert outcome.usage.total_tokens == 105
    assert (await stored(rt, outcome.run_id)).cost_basis is None


# --- What the agent's file and the task say reaches the CLI


async def test_first_request_of_a_small_agent(rt: Runtime, model: ModelServer) -> None:
    model.rules = [Rule("ok")]
    await delegate(rt, Task(agent="helper", prompt="go"))
    [request] = model.journal
    assert request.tools == ["Read"]
    assert request.size <= 6 * 1024
    assert "You are the helper." in request.system
    assert request.texts == ["go"]


@pytest.mark.parametrize(
    ("argument", "preference", "frontmatter", "expected"),
    [
        ("claude-haiku-5-5", "claude-sonnet-5-5", "claude-opus-5-1", "claude-haiku-5-5"),
        (None, "claude-sonnet-5-5", "claude-opus-5-1", "claude-sonnet-5-5"),
        (None, None, "claude-opus-5-1", "claude-opus-5-1"),
        (None, None, None, "claude-opus-5-5"),
    ],
)
async def test_who_chooses_the_model(
    rt: Runtime,
    model: ModelServer,
    project: Path,
    argument: str | None,
    preference: str | None,
    frontmatter: str | None,
    expected: str,
) -> None:
    model.rules = [Rule("ok")]
    write_agent(project, "chooser", tools="Read", **({"model": frontmatter} if frontmatter else {}))
    rt.catalog.load()
    await rt.store.prefer("chooser", preference)
    outcome = await delegate(rt, Task(agent="chooser", prompt="x", model=argument))
    assert [request.model for request in model.journal] == [expected]
    assert outcome.model == expected


async def test_effort_of_the_task_before_that_of_the_file(rt: Runtime, model: ModelServer, project: Path) -> None:
    model.rules = [Rule("ok")]
    write_agent(project, "thinker", tools="Read", effort="low")
    rt.catalog.load()
    await delegate(rt, Task(agent="thinker", prompt="x"))
    await delegate(rt, Task(agent="thinker", prompt="x", effort="high"))
    assert [request.body["output_config"]["effort"] for request in model.journal] == ["low", "high"]


async def test_tools_without_the_ones_that_start_agents(rt: Runtime, model: ModelServer, project: Path) -> None:
    model.rules = [Rule("ok")]
    write_agent(project, "open", disallowedTools="WebFetch, WebSearch")
    rt.catalog.load()
    await delegate(rt, Task(agent="open", prompt="x"))
    tools = set(model.journal[0].tools)
    assert {"Bash", "Edit", "Read", "Write"} <= tools
    assert not tools & {"Agent", "Task", "Workflow", "WebFetch", "WebSearch"}


async def test_a_file_may_name_the_tool_that_starts_agents(rt: Runtime, model: ModelServer, project: Path) -> None:
    model.rules = [Rule("ok")]
    write_agent(project, "lead", tools="Read, Agent")
    rt.catalog.load()
    await delegate(rt, Task(agent="lead", prompt="x"))
    assert set(model.journal[0].tools) == {"Agent", "Read"}


async def test_initial_prompt_comes_first_and_only_once(rt: Runtime, model: ModelServer, project: Path) -> None:
    model.rules = [Rule("ok")]
    write_agent(project, "starter", tools="Read", initialPrompt="Read the manual.")
    rt.catalog.load()
    first = await delegate(rt, Task(agent="starter", prompt="begin"))
    await delegate(rt, Task(agent="starter", prompt="go on", session=first.session_id))
    assert [request.last_user_text for request in model.journal] == ["Read the manual.\n\nbegin", "go on"]


async def test_a_worker_writes_files_and_runs_commands(rt: Runtime, model: ModelServer, project: Path) -> None:
    target = project / "out.txt"
    model.rules = [
        step(ToolUse("Write", {"file_path": str(target), "content": "made\n"}), tool_result=False),
        step(ToolUse("Bash", {"command": "mkdir made-by-bash && ls"}), tool_result="created"),
        step("Both done.", tool_result="made-by-bash"),
    ]
    outcome = await delegate(rt, Task(agent="worker", prompt="work"))
    assert outcome.text == "Both done."
    assert target.read_text() == "made\n"
    assert (project / "made-by-bash").is_dir()


async def test_rules_of_file_and_task_grant_what_the_mode_does_not(
    rt: Runtime, model: ModelServer, project: Path
) -> None:
    write_agent(project, "runner", tools="Bash(touch *)")
    rt.catalog.load()
    commands = ["touch one", "python3 -c 'print(6*7)'"]
    uses = [ToolUse("Bash", {"command": command}) for command in commands]
    model.rules = [step(Reply(uses), tool_result=False), step("ok", tool_result=True)]
    await delegate(rt, Task(agent="runner", prompt="x"))
    assert [result.is_error for result in model.journal[1].tool_results] == [False, True]
    await delegate(rt, Task(agent="runner", prompt="x", allowed_tools=("Bash(python3 *)",)))
    assert [result.is_error for result in model.journal[3].tool_results] == [False, False]


MCP_SERVER = """\
import json, sys
TOOL = {"name": "ping", "description": "Ping.", "inputSchema": {"type": "object"}}
ANSWERS = {
    "initialize": {
        "protocolVersion": "2025-11-25", "capabilities": {"tools": {}}, "serverInfo": {"name": "x", "version": "1"},
    },
    "tools/list": {"tools": [TOOL]},
    "tools/call": {"content": [{"type": "text", "text": "pong"}]},
}
for line in sys.stdin:
    asked = json.loads(line)
    if "id" in asked:
        error = {"code": -32601, "message": "unknown"}
        result = ANSWERS.get(asked["method"])
        answer = {"error": error} if result is None else {"result": result}
        print(json.dumps({"jsonrpc": "2.0", "id": asked["id"], **answer}), flush=True)
"""


async def test_tools_of_the_files_own_mcp_server(rt: Runtime, model: ModelServer, project: Path) -> None:
    """They are on offer at once, not behind a search of their own."""
    server = project / "server.py"
    server.write_text(MCP_SERVER)
    servers = json.dumps({"x": {"command": sys.executable, "args": [str(server)]}})
    write_agent(project, "pinger", tools="Read, mcp__x__ping", mcpServers=servers)
    rt.catalog.load()
    model.rules = [step(ToolUse("mcp__x__ping", {}), tool_result=False), step("It answers.", tool_result="pong")]
    outcome = await delegate(rt, Task(agent="pinger", prompt="x"))
    assert outcome.text == "It answers."
    assert model.journal[0].tools == ["Read", "mcp__x__ping"]


async def test_where_the_agent_works(rt: Runtime, model: ModelServer, project: Path) -> None:
    (project / "sub").mkdir()
    model.rules = [step(ToolUse("Bash", {"command": "pwd"}), tool_result=False), step("ok", tool_result=True)]
    outcome = await delegate(rt, Task(agent="worker", prompt="x", cwd=Path("sub")))
    assert model.journal[1].tool_results[0].text == str(project / "sub")
    assert (await stored(rt, outcome.run_id)).cwd == str(project / "sub")


async def test_turns_are_limited(rt: Runtime, model: ModelServer, project: Path) -> None:
    model.rules = [Rule(Reply(["Again.", ToolUse("Bash", {"command": "true"})]))]
    outcome = await delegate(rt, Task(agent="worker", prompt="x", max_turns=2))
    assert error_code(outcome) == "max_turns"
    assert outcome.status == "failed"
    assert outcome.text.startswith("Again.")
    assert len(model.journal) == 2


def error_code(outcome: Outcome) -> str | None:
    return (outcome.error or {}).get("code")


# --- Structured output


async def test_structured_output(rt: Runtime, model: ModelServer) -> None:
    model.rules = [Rule(ToolUse("StructuredOutput", {"n": 7}))]
    outcome = await delegate(rt, Task(agent="helper", prompt="how many?", output_schema=SCHEMA))
    assert outcome.status == "succeeded"
    assert (outcome.has_structured, outcome.structured) == (True, {"n": 7})
    assert json.loads(outcome.text) == {"n": 7}


async def test_text_where_structured_output_was_asked_for(rt: Runtime, model: ModelServer) -> None:
    model.rules = [Rule("Seven, I think.")]
    outcome = await delegate(rt, Task(agent="helper", prompt="how many?", output_schema=SCHEMA))
    assert (outcome.status, error_code(outcome)) == ("failed", "structured_output")
    assert outcome.has_structured is False
    assert "Seven, I think." in outcome.text


# --- The environment of the agent's process


async def test_nothing_of_our_environment_leaks(runtime: OpenRuntime, model: ModelServer, tmp_path: Path) -> None:
    model.rules = [step(ToolUse("Bash", {"command": "env"}), tool_result=False), step("ok", tool_result=True)]
    hostile = {
        "CLAUDECODE": "1",
        "CLAUDE_CODE_SESSION_ID": "outer",
        "CLAUDE_CODE_EXTRA_BODY": "{}",
        "ANTHROPIC_MODEL": "other-model",
        "ANTHROPIC_AUTH_TOKEN": "secret-1",
        "OTEL_RESOURCE_ATTRIBUTES": "secret-2",
        "MCP_TIMEOUT": "1",
        "GITHUB_TOKEN": "secret-3",
        "AWS_SECRET_ACCESS_KEY": "secret-4",
        "ORCHESTRATOR_RUN_ID": "outer",
        "ORCHESTRATOR_RUN_TOKEN": "secret-5",
        "TRACEPARENT": "00-" + "1" * 32 + "-" + "2" * 16 + "-01",
        "WANTED": "yes",
    }
    async with runtime(env=hostile, claude__pass_env=["WANTED"], claude__env__EXTRA="set") as rt:
        outcome = await delegate(rt, Task(agent="worker", prompt="x", allowed_tools=("Bash(env)",)))
    printed = model.journal[1].tool_results[0].text
    variables = dict(line.split("=", 1) for line in printed.splitlines() if "=" in line)
    assert "secret" not in printed
    assert "outer" not in variables.values()
    assert not variables.keys() & {"ANTHROPIC_MODEL", "CLAUDE_CODE_EXTRA_BODY", "MCP_TIMEOUT", "GITHUB_TOKEN"}
    assert variables["HOME"] == str(tmp_path / "home")
    assert variables["ORCHESTRATOR_RUN_ID"] == outcome.run_id
    assert (variables["WANTED"], variables["EXTRA"]) == ("yes", "set")
    assert variables["CLAUDE_CODE_SESSION_ID"] == outcome.session_id
    assert "1" * 32 not in variables.get("TRACEPARENT", "")
    assert model.journal[0].model == "claude-opus-5-5"
    assert model.journal[0].headers["x-api-key"] == DUMMY_KEY


# --- Refused before anything is spent


async def refused(rt: Runtime, task: Task, kind: type[Exception], match: str) -> None:
    with pytest.raises(kind, match=match):
        await delegate(rt, task)
    assert await rt.store.runs() == []
    assert await rt.store.sessions() == []
    assert not rt.live


async def test_unknown_agents_are_refused_with_near_names(rt: Runtime, model: ModelServer) -> None:
    await refused(rt, Task(agent="helpr", prompt="x"), AgentNotFoundError, "did you mean 'helper'")
    assert not model.journal


async def test_a_budget_of_nothing_is_refused(rt: Runtime, model: ModelServer) -> None:
    await refused(rt, Task(agent="helper", prompt="x", budget_usd=0), BudgetExceededError, "budget used up")
    assert not model.journal


async def test_the_configured_budget_counts_too(runtime: OpenRuntime, model: ModelServer) -> None:
    async with runtime(limits__budget_usd=0) as rt:
        await refused(rt, Task(agent="helper", prompt="x"), BudgetExceededError, "budget used up")
    assert not model.journal


async def test_fork_of_nothing_is_refused(rt: Runtime) -> None:
    await refused(rt, Task(agent="helper", prompt="x", fork=True), ConfigError, "fork needs")


async def test_bypass_of_permissions_is_the_operators_to_allow(
    runtime: OpenRuntime, model: ModelServer, project: Path
) -> None:
    write_agent(project, "reckless", tools="Bash", permissionMode="bypassPermissions")
    model.rules = [
        step(ToolUse("Bash", {"command": "python3 -c 'print(6*7)'"}), tool_result=False),
        step("ok", tool_result=True),
    ]
    async with runtime() as rt:
        await refused(rt, Task(agent="reckless", prompt="x"), AgentError, "bypassPermissions")
        task = Task(agent="helper", prompt="x", permission_mode="bypassPermissions")
        await refused(rt, task, AgentError, "bypassPermissions")
    # The CLI itself refuses it to root outside a sandbox.
    allowed = {"claude__allow_bypass_permissions": True, "claude__env__IS_SANDBOX": "1"}
    async with runtime(**allowed) as rt:
        outcome = await delegate(rt, Task(agent="reckless", prompt="x"))
    assert outcome.status == "succeeded"
    assert model.journal[1].tool_results[0].text == "42"


async def test_a_runtime_that_closes_takes_nothing_on(runtime: OpenRuntime) -> None:
    async with runtime() as rt:
        pass
    with pytest.raises(RunCancelledError, match="shutting down"):
        await delegate(rt, Task(agent="helper", prompt="x"))


# --- Limits that act while the agent works


async def test_a_run_over_its_budget_is_stopped(rt: Runtime, model: ModelServer) -> None:
    # What is told at an answer's end is what exceeds the budget: nothing of its cost is unknown at the stop.
    expensive = Tokens(input=100, output=20_000)
    model.rules = [Rule(Reply(["Thinking about it.", ToolUse("Bash", {"command": "true"})], usage=expensive))]
    outcome = await delegate(rt, Task(agent="worker", prompt="x", budget_usd=0.5))
    assert (outcome.status, error_code(outcome)) == ("failed", "budget_exceeded")
    assert len(model.journal) == 2  # 0.4004 $ each
    assert "Thinking about it." in outcome.text
    assert outcome.cost_usd == pytest.approx(0.8008)


async def test_children_share_what_their_parent_has_left(rt: Runtime, model: ModelServer) -> None:
    """The parent's model request is held while two children spend from its budget."""
    answer = anyio.Event()

    async def parent(request: Request) -> Reply:
        await answer.wait()
        return Reply("parent done", usage=Tokens(input=0, output=0))

    model.rules = [
        step(parent, user_contains="the parent"),  # type: ignore[arg-type]  # a function is a reply, too
        Rule(Reply("child done", usage=Tokens(input=50_000, output=0))),  # 0.20 $
    ]
    parent_id = await submit(rt, Task(agent="helper", prompt="the parent", budget_usd=0.3))
    await model.wait_for("the parent")
    first = await delegate(rt, Task(agent="helper", prompt="child", parent_id=parent_id))
    second = await delegate(rt, Task(agent="helper", prompt="child", parent_id=parent_id, budget_usd=5))
    assert (first.status, second.status) == ("succeeded", "failed")
    assert error_code(second) == "budget_exceeded"
    with pytest.raises(BudgetExceededError):
        await delegate(rt, Task(agent="helper", prompt="child", parent_id=parent_id))
    answer.set()
    with anyio.fail_after(10):
        await wait(rt, parent_id)
    child = await rt.store.run(first.run_id)
    assert (child.parent_id, child.root_id, child.depth) == (parent_id, parent_id, 2)
    assert child.trace_id == (await rt.store.run(parent_id)).trace_id


async def test_a_budget_used_up_while_a_run_waits(runtime: OpenRuntime, model: ModelServer) -> None:
    spent, answer = anyio.Event(), anyio.Event()

    async def parent(request: Request) -> Reply:
        await answer.wait()
        return Reply("parent done")

    async def spender(request: Request) -> Reply:
        await spent.wait()
        return Reply("all of it", usage=Tokens(input=100_000))

    model.rules = [
        Rule(parent, when={"user_contains": "parent"}),
        Rule(spender, when={"user_contains": "spend"}),
    ]
    async with runtime(limits__max_processes=1) as rt:
        parent_id = await submit(rt, Task(agent="helper", prompt="parent", budget_usd=0.3))
        await model.wait_for("parent")  # nothing more is heard of it: it is not what finds the budget used up
        first = await submit(rt, Task(agent="helper", prompt="spend", parent_id=parent_id))
        await model.wait_for("spend")
        second = await submit(rt, Task(agent="helper", prompt="too late", parent_id=parent_id))
        spent.set()
        with anyio.fail_after(10):
            assert error_code(await wait(rt, first)) == "budget_exceeded"
            outcome = await wait(rt, second)
        assert (error_code(outcome), outcome.cost_usd) == ("budget_exceeded", 0)
        assert not model.requests(text="too late")


async def test_depth_is_limited(runtime: OpenRuntime, model: ModelServer) -> None:
    model.rules = [Rule(Reply("still at it", fault=Fault(stall_at=2)))]
    async with runtime(limits__max_depth=2) as rt:
        top = await submit(rt, Task(agent="helper", prompt="x"))
        below = await submit(rt, Task(agent="helper", prompt="y", parent_id=top))
        with pytest.raises(DepthLimitError, match="limited to 2 levels"):
            await delegate(rt, Task(agent="helper", prompt="z", parent_id=below))
        assert len(await rt.store.runs()) == 2


async def test_one_process_at_a_time(runtime: OpenRuntime, model: ModelServer) -> None:
    answers = {"first": anyio.Event(), "second": anyio.Event()}

    async def hold(request: Request) -> str:
        await answers[request.last_user_text].wait()
        return request.last_user_text

    model.rules = [Rule(hold)]
    async with runtime(limits__max_processes=1) as rt:
        first = await submit(rt, Task(agent="helper", prompt="first"))
        second = await submit(rt, Task(agent="helper", prompt="second"))
        answers["second"].set()
        await model.wait_for("first")
        waiting = await stored(rt, second)
        assert (waiting.status, waiting.started_us) == ("queued", None)
        answers["first"].set()
        with anyio.fail_after(20):
            outcomes = [await wait(rt, first), await wait(rt, second)]
        assert [outcome.text for outcome in outcomes] == ["first", "second"]
        runs = [await rt.store.run(first), await rt.store.run(second)]
    assert (runs[1].started_us or 0) >= (runs[0].ended_us or 0)


async def test_a_child_does_not_wait_for_its_parents_place(runtime: OpenRuntime, model: ModelServer) -> None:
    answer = anyio.Event()

    async def parent(request: Request) -> str:
        await answer.wait()
        return "parent done"

    model.rules = [Rule(parent, when={"user_contains": "parent"}), Rule("child done")]
    async with runtime(limits__max_processes=1) as rt:
        parent_id = await submit(rt, Task(agent="helper", prompt="parent"))
        await model.wait_for("parent")
        with anyio.fail_after(10):
            child = await delegate(rt, Task(agent="helper", prompt="child", parent_id=parent_id))
        assert child.text == "child done"
        answer.set()
        assert (await wait(rt, parent_id)).text == "parent done"


async def test_many_at_once(rt: Runtime, model: ModelServer) -> None:
    model.rules = [Rule("echo {{ last_user_text }}")]
    outcomes: dict[int, Outcome] = {}

    async def one(number: int) -> None:
        outcomes[number] = await delegate(rt, Task(agent="helper", prompt=f"number {number}"))

    async with anyio.create_task_group() as tg:
        for number in range(8):
            tg.start_soon(one, number)
    assert {n: outcome.text for n, outcome in outcomes.items()} == {n: f"echo number {n}" for n in range(8)}
    assert len({outcome.session_id for outcome in outcomes.values()}) == 8
    assert all(outcome.cost_usd == pytest.approx(0.0005) for outcome in outcomes.values())


# --- Where it cannot start


async def test_a_missing_directory(rt: Runtime, model: ModelServer) -> None:
    outcome = await delegate(rt, Task(agent="helper", prompt="x", cwd=Path("nowhere")))
    assert (outcome.status, error_code(outcome)) == ("failed", "cli_start")
    assert "nowhere does not exist" in (outcome.error or {})["message"]
    assert outcome.cost_usd == 0
    assert not model.journal


async def test_a_missing_binary(runtime: OpenRuntime, tmp_path: Path, model: ModelServer) -> None:
    async with runtime(claude__path=str(tmp_path / "no-such-cli")) as rt:
        outcome = await delegate(rt, Task(agent="helper", prompt="x"))
        assert (outcome.status, error_code(outcome)) == ("failed", "cli_not_found")
        assert "no-such-cli" in (outcome.error or {})["message"]
        # No transcript was ever written: there is no session to go on with.
        assert await rt.store.sessions() == []
        ended = await cancel(rt, outcome.run_id)
        assert ended.status == "failed"
