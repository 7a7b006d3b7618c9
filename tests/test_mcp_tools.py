"""The MCP tools: a client in memory, a real runtime, the real CLI against the scripted model server."""

import json
import re
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from itertools import pairwise
from typing import Any

import anyio
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mcp import Client
from mcp_types import CallToolResult, TextContent

from mcp_tools import build_server, open_door, results
from mcp_tools.context import CALLER_KEY
from orchestrator.config import Config
from orchestrator.delegation import delegate, submit, wait
from orchestrator.errors import ConfigError, RateLimitError
from orchestrator.outcome import Outcome
from orchestrator.runtime import Runtime
from orchestrator.specs import OUR_TOOLS
from orchestrator.store import Run, now_us
from orchestrator.task import Task
from orchestrator.testing import Fault, ModelServer, Reply, Request, Rule, ToolUse
from orchestrator.tracing import SpanContext, new_run_id, new_trace_id
from tests.conftest import write_agent

Open = Callable[..., AbstractAsyncContextManager[Runtime]]

FACTS = re.compile(
    r"\[run_id=(?P<run>[0-9a-f]{16}) status=(?P<status>\w+) session=(?P<session>[0-9a-f-]{36})"
    r" cost=(?P<cost>\S+) tokens=(?P<tokens>\d+) \d+\.\ds\]"
)


def text_of(result: CallToolResult) -> str:
    [block] = result.content
    assert isinstance(block, TextContent)
    return block.text


def facts_of(result: CallToolResult) -> dict[str, str]:
    """The last line of an answer."""
    assert not result.is_error, text_of(result)
    match = FACTS.fullmatch(text_of(result).splitlines()[-1])
    assert match, text_of(result)
    return match.groupdict()


def error_of(result: CallToolResult) -> dict[str, Any]:
    """The JSON line of an error."""
    assert result.is_error
    told: dict[str, Any] = json.loads(text_of(result).splitlines()[-1])
    return told


class Gate:
    """A model that answers when the test lets it."""

    def __init__(self, answer: str = "at last") -> None:
        self.opened = anyio.Event()
        self.answer = answer

    async def __call__(self, request: Request) -> str:
        await self.opened.wait()
        return self.answer


@pytest.fixture
async def client(rt: Runtime) -> AsyncIterator[Client]:
    async with Client(build_server(rt)) as connected:
        yield connected


def a_run(rt: Runtime, **fields: Any) -> Run:
    """A row of the journal, as a run that has been."""
    run_id = fields.pop("id", new_run_id())
    defaults: dict[str, Any] = {
        "id": run_id,
        "trace_id": new_trace_id(),
        "root_id": run_id,
        "depth": 1,
        "kind": "agent",
        "name": "helper",
        "status": "succeeded",
        "prompt": "do it",
        "text": "done",
        "project": "/",
        "cwd": "/",
        "created_us": now_us(),
        "instance_id": rt.store.instance_id,
    }
    return Run(**{**defaults, **fields})


# -- what a client is told at first -------------------------------------------------------------------------


async def test_tools_are_small_strict_and_marked(client: Client) -> None:
    tools = {tool.name: tool for tool in (await client.list_tools()).tools}

    assert set(tools) == set(OUR_TOOLS)
    assert all(tool.input_schema["additionalProperties"] is False for tool in tools.values())
    assert all(tool.description for tool in tools.values())
    always = {name for name, tool in tools.items() if (tool.meta or {}).get("anthropic/alwaysLoad")}
    assert always == {"delegate", "delegate_many", "run_wait"}
    assert all((tools[name].meta or {})["anthropic/maxResultSizeChars"] == 500_000 for name in always)
    reading = {name for name, tool in tools.items() if tool.annotations and tool.annotations.read_only_hint}
    looks = {"query_traces", "get_trace", "usage", "list_sessions", "list_agents", "run_status"}
    assert reading == {"run_wait", *looks}
    size = len(
        json.dumps([tool.model_dump(mode="json", by_alias=True, exclude_none=True) for tool in tools.values()])
    )
    assert size / 3.5 <= 5_000  # tokens; JSON has 3.5 characters or more in one
    assert len((client.instructions or "").encode()) < 2048


async def test_the_host_decides_about_logging(rt: Runtime) -> None:
    import logging

    before = list(logging.getLogger().handlers)
    build_server(rt)
    assert logging.getLogger().handlers == before


async def test_list_agents_says_which_model_each_runs_with(rt: Runtime, client: Client) -> None:
    await rt.store.prefer("worker", "sonnet")
    (rt.config.project_dir / "agents" / "broken.md").write_bytes(b"\xff\xfe no text")
    rt.catalog.load()

    listed = (await client.call_tool("list_agents", {})).structured_content

    assert listed
    assert [(a["name"], a["model"], a["tools"]) for a in listed["agents"]] == [
        ("helper", "claude-opus-5-5", ["Read"]),
        ("worker", "sonnet", ["Read", "Write", "Bash"]),
    ]
    assert listed["agents"][0]["description"] == "The helper of the tests"
    [problem] = listed["problems"]
    assert "broken.md:" in problem


# -- arguments and errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"agent": "helper", "prompt": "x", "promt": 1}, "there is no argument 'promt' (did you mean 'prompt'?)"),
        ({"agent": "helper"}, "prompt is missing"),
        ({"agent": "helper", "prompt": "x", "timeout_s": -1}, "timeout_s: Input should be greater than 0"),
        ({"agent": "helper", "prompt": "secret words", "fork": "perhaps"}, "fork: Input should be a valid boolean"),
    ],
)
async def test_arguments_are_checked(rt: Runtime, client: Client, arguments: dict[str, Any], words: str) -> None:
    result = await client.call_tool("delegate", arguments)

    assert result.is_error
    assert words in text_of(result)
    assert "pydantic" not in text_of(result)
    assert "secret words" not in text_of(result)
    assert await rt.store.runs() == []


async def test_an_unknown_agent_is_answered_with_the_known_ones(client: Client) -> None:
    result = await client.call_tool("delegate", {"agent": "helpr", "prompt": "x"})

    error = error_of(result)
    assert "no agent is called 'helpr'; did you mean 'helper'?" in text_of(result)
    assert (error["code"], error["retryable"]) == ("agent_not_found", False)
    assert error["known"] == ["helper", "worker"]
    assert "list_agents" in error["advice"]


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("run_wait", {"run_ids": ["0123456789abcdef"]}, "run_not_found"),
    ("run_cancel", {"run_id": "0123456789abcdef"}, "run_not_found"),
    ("fork_session", {"session_id": "none", "prompt": "x"}, "session_not_found"),
    ("delegate", {"agent": "helper", "prompt": " "}, "prompt"),
    ("delegate", {"agent": "helper", "prompt": "x", "fork": True}, "config"),
    ("delegate", {"agent": "helper", "prompt": "x", "cwd": "a\0b"}, "config"),
    ("query_traces", {"since": "yesterday"}, "config"),
    ("query_traces", {"cursor": "page 2"}, "config"),
]


async def test_refusals_have_a_code_and_advice(client: Client) -> None:
    for tool, arguments, code in REFUSED:
        result = await client.call_tool(tool, arguments)
        error = error_of(result)
        assert error["code"] == code
        assert error["advice"]
        assert text_of(result).startswith(f"Error executing tool {tool}: ")


async def test_a_failed_run_says_whether_to_try_again(client: Client, model: ModelServer) -> None:
    model.rules = [Rule(Reply(fault=Fault(status=401, message="bad key")))]

    result = await client.call_tool("delegate", {"agent": "helper", "prompt": "x"})

    error = error_of(result)
    assert text_of(result).startswith("Error executing tool delegate: helper failed: ")
    assert (error["code"], error["retryable"]) == ("authentication", False)
    assert re.fullmatch("[0-9a-f]{16}", error["run_id"])
    assert "run_wait" not in text_of(result)


def test_a_failure_keeps_how_what_was_said_ends_and_when_to_come_back() -> None:
    error = RateLimitError("the account is limited", retry_after=12.5, details={"stderr": "x" * 5000}).to_dict()
    said = "the beginning" + "y" * 5000 + "the end"
    outcome = Outcome(run_id="a" * 16, status="failed", text=said, error=error)

    sentence, line = results.failure("helper", outcome).split("\n")

    told = json.loads(line)
    assert sentence == "helper failed: the account is limited"
    assert (told["code"], told["retryable"], told["retry_after"]) == ("rate_limit", True, 12.5)
    assert told["partial_text"] == said[-2000:]
    assert told["partial_text_chars"] == len(said)
    assert told["whole_text"] == f'call run_wait(["{"a" * 16}"])'
    assert len(told["stderr"]) == 2000


@pytest.mark.parametrize("said", ["", "y" * 2000])
def test_a_failure_that_has_it_all_does_not_send_for_more(said: str) -> None:
    outcome = Outcome(run_id="a" * 16, status="failed", text=said, error=RateLimitError("no").to_dict())
    told = json.loads(results.failure("helper", outcome).splitlines()[-1])
    assert told.get("partial_text", "") == said
    assert not {"partial_text_chars", "whole_text"} & told.keys()


# -- delegate and run_wait ----------------------------------------------------------------------------------


async def test_delegate_answers_verbatim_and_then_with_the_facts(
    rt: Runtime, client: Client, model: ModelServer
) -> None:
    model.rules = [Rule("two lines,\n[both] the agent's")]

    result = await client.call_tool("delegate", {"agent": "helper", "prompt": "Say something."})

    facts = facts_of(result)
    assert text_of(result).startswith("two lines,\n[both] the agent's\n[run_id=")
    assert result.structured_content is None
    assert facts["status"] == "succeeded"
    assert facts["cost"] == "$0.0005"
    assert int(facts["tokens"]) == 105
    row = await rt.store.run(facts["run"])
    assert (row.session_id, row.prompt, row.parent_id) == (facts["session"], "Say something.", None)
    assert row.caller
    assert row.caller["client"].startswith("mcp/")


def test_structured_output_is_the_answer() -> None:
    outcome = Outcome(run_id="a" * 16, status="succeeded", text="words", structured=None, has_structured=True)
    assert results.answer(outcome).startswith("null\n[run_id=")
    assert "cost=unknown" in results.answer(outcome)


async def test_the_options_of_delegate_reach_the_run(rt: Runtime, client: Client, model: ModelServer) -> None:
    model.rules = [Rule("ok")]
    options = {"model": "claude-haiku-4-5", "cwd": "agents", "budget_usd": 1.5, "timeout_s": 33}

    facts = facts_of(await client.call_tool("delegate", {"agent": "helper", "prompt": "x", **options}))

    row = await rt.store.run(facts["run"])
    assert row.model_requested == "claude-haiku-4-5"
    assert row.cwd == str(rt.config.project_dir / "agents")
    assert (row.budget_usd, row.options["timeout_s"]) == (1.5, 33)


async def test_when_the_wait_is_over_the_run_goes_on(client: Client, model: ModelServer) -> None:
    gate = Gate()
    model.rules = [Rule(gate)]

    early = await client.call_tool("delegate", {"agent": "helper", "prompt": "slow work", "wait_s": 0.2})

    assert not early.is_error
    match = re.match(
        r"run_id=(\w{16}) still running \(helper: .+, \d+ s\); call run_wait\(\[\"(\w{16})\"\]\)$", text_of(early)
    )
    assert match
    assert match[1] == match[2]
    await model.wait_for("slow work")
    again = await client.call_tool("run_wait", {"run_ids": [match[1]], "timeout_s": 0})
    assert "still running" in text_of(again)
    gate.opened.set()
    late = await client.call_tool("run_wait", {"run_ids": [match[1]]})
    assert text_of(late).startswith("at last\n")
    assert facts_of(late)["run"] == match[1]


async def test_run_wait_tells_of_each_run(client: Client, model: ModelServer) -> None:
    gate = Gate()
    model.rules = [
        Rule("first answer", when={"user_contains": "one"}),
        Rule(Reply(fault=Fault(status=400, message="no")), when={"user_contains": "two"}),
        Rule(gate, when={"user_contains": "three"}),
    ]
    ids = []
    for prompt in ("one", "two", "three"):
        started = await client.call_tool("delegate", {"agent": "helper", "prompt": prompt, "wait_s": 0})
        ids.append(text_of(started)[len("run_id=") :][:16])
    for run_id in ids[:2]:
        await client.call_tool("run_wait", {"run_ids": [run_id]})

    result = await client.call_tool("run_wait", {"run_ids": ids, "timeout_s": 0.1})

    assert not result.is_error
    one, two, three = (part.split(" ---\n", 1)[1] for part in text_of(result).split("\n\n--- "))
    assert one.startswith("first answer\n[run_id=")
    *_, known, error = two.splitlines()
    assert f"[run_id={ids[1]} status=failed " in known
    assert json.loads(error)["code"] == "invalid_request"
    assert "still running" in three
    gate.opened.set()
    only_failed = await client.call_tool("run_wait", {"run_ids": [ids[1], ids[1]]})
    assert text_of(only_failed) == two


@pytest.mark.parametrize("said", ["first\n" + "y" * 600_000 + "\nlast", ""])
async def test_run_wait_has_all_that_a_failed_run_had_said(rt: Runtime, client: Client, said: str) -> None:
    error = RateLimitError("too fast", retry_after=3).to_dict()
    run = a_run(rt, status="failed", text=said, error=error, cost_usd=0.5)
    await rt.store.create_run(run)

    result = await client.call_tool("run_wait", {"run_ids": [run.id]})

    # The waiting went well, and an error's text is cut by clients.
    assert not result.is_error
    *text, known, told = text_of(result).split("\n")
    assert "\n".join(text) == said
    assert known == f"[run_id={run.id} status=failed cost=$0.5000 tokens=0]"
    assert json.loads(told) == {
        "code": "rate_limit",
        "message": "too fast",
        "retryable": True,
        "retry_after": 3,
        "advice": error["advice"],
    }


async def test_the_facts_tell_what_a_run_cost_with_all_below_it(rt: Runtime, client: Client) -> None:
    async def facts(run: Run) -> str:
        return text_of(await client.call_tool("run_wait", {"run_ids": [run.id]})).splitlines()[-1]

    def child(of: Run, cost: float | None, **fields: Any) -> Run:
        return a_run(rt, parent_id=of.id, root_id=of.root_id, depth=of.depth + 1, cost_usd=cost, **fields)

    root = a_run(rt, cost_usd=0.01)
    below = child(root, 0.02)
    furthest = child(below, 0.03)
    plan = a_run(rt, kind="plan", depth=0, cost_usd=0.07)
    for run in (root, below, furthest, plan, child(plan, 0.07)):
        await rt.store.create_run(run)

    assert "cost=$0.0100 (with what it started: $0.0600) tokens=" in await facts(root)
    assert "cost=$0.0200 (with what it started: $0.0500) tokens=" in await facts(below)
    assert "cost=$0.0300 tokens=" in await facts(furthest)
    # What a plan cost is what its steps cost.
    assert "cost=$0.0700 tokens=" in await facts(plan)

    await rt.store.create_run(child(furthest, None, status="running"))
    assert "cost=$0.0100 (with what it started: unknown) tokens=" in await facts(root)


async def test_progress_is_reported_while_waiting(client: Client, model: ModelServer) -> None:
    gate = Gate()
    model.rules = [Rule(ToolUse("Read", {"file_path": "/etc/hostname"}), when={"tool_result": False}), Rule(gate)]
    seen: list[tuple[float, str | None]] = []

    async def hear(progress: float, total: float | None, message: str | None) -> None:
        seen.append((progress, message))
        if message == "helper: Read: /etc/hostname":
            gate.opened.set()

    with anyio.fail_after(20):
        result = await client.call_tool("delegate", {"agent": "helper", "prompt": "x"}, progress_callback=hear)

    assert facts_of(result)
    numbers = [number for number, _ in seen]
    assert numbers == sorted(set(numbers))
    assert all(later - earlier >= 0.9 for earlier, later in pairwise(numbers))


@pytest.mark.parametrize(("options", "status"), [({}, "succeeded"), ({"cancel_on_disconnect": True}, "cancelled")])
async def test_a_caller_that_goes_away(
    rt: Runtime, client: Client, model: ModelServer, options: dict[str, Any], status: str
) -> None:
    gate = Gate()
    model.rules = [Rule(gate)]
    async with anyio.create_task_group() as tg:
        tg.start_soon(client.call_tool, "delegate", {"agent": "helper", "prompt": "go on", **options})
        await model.wait_for("go on")
        tg.cancel_scope.cancel()

    if status == "succeeded":
        gate.opened.set()  # an answer that comes while a run is being stopped would stand

    [row] = await rt.store.runs()
    with anyio.fail_after(10):
        assert (await wait(rt, row.id)).status == status


async def test_run_cancel_ends_a_run_and_keeps_what_was_said(
    rt: Runtime, client: Client, model: ModelServer
) -> None:
    model.rules = [Rule(Reply("word " * 400, chunks=400, event_delay_s=0.05))]
    started = await client.call_tool("delegate", {"agent": "helper", "prompt": "talk", "wait_s": 0})
    run_id = text_of(started)[len("run_id=") :][:16]
    with rt.events.watch() as watcher, anyio.fail_after(10):
        async for event in watcher:
            if event.data.get("activity") == "answering":
                break

    with anyio.fail_after(10):
        ended = await client.call_tool("run_cancel", {"run_id": run_id})
        again = await client.call_tool("run_cancel", {"run_id": run_id})

    assert facts_of(ended)["status"] == "cancelled"
    assert text_of(ended).startswith("word ")
    first, rest = text_of(again).split("\n", 1)
    assert first == "the run had ended before: cancelled"
    assert rest == text_of(ended)


async def test_sessions_go_on_and_are_forked(rt: Runtime, client: Client, model: ModelServer) -> None:
    model.rules = [Rule("noted", when={"user_contains": "remember"}), Rule("I know")]
    first = facts_of(await client.call_tool("delegate", {"agent": "helper", "prompt": "remember 42"}))

    second = facts_of(
        await client.call_tool("delegate", {"agent": "helper", "prompt": "and now?", "session": first["session"]})
    )
    fork = facts_of(
        await client.call_tool("fork_session", {"session_id": first["session"], "prompt": "another way?"})
    )

    assert second["session"] == first["session"]
    assert fork["session"] != first["session"]
    asked = await model.wait_for("another way?")
    assert any("remember 42" in text for text in asked.earlier_texts)
    assert any("and now?" in text for text in asked.earlier_texts)
    assert (await rt.store.run(fork["run"])).name == "helper"


# -- query_traces -------------------------------------------------------------------------------------------


async def test_query_traces_filters(rt: Runtime, client: Client) -> None:
    now = now_us()
    root = a_run(rt, prompt="Plan the Garden", created_us=now - 7_200_000_000, cost_usd=0.25, session_id="s1")
    child = a_run(
        rt, parent_id=root.id, root_id=root.id, trace_id=root.trace_id, depth=2, name="worker", created_us=now - 5
    )
    failed = a_run(rt, status="failed", text="", error=RateLimitError("too fast").to_dict(), created_us=now)
    for run in (root, child, failed):
        await rt.store.create_run(run)

    async def ask(**filters: Any) -> list[str]:
        found = (await client.call_tool("query_traces", filters)).structured_content
        assert found
        assert found["next"] is None
        return [run["run_id"] for run in found["runs"]]

    assert await ask() == [failed.id, child.id, root.id]
    assert await ask(agent="worker") == [child.id]
    assert await ask(session_id="s1") == [root.id]
    assert await ask(status="failed") == [failed.id]
    assert await ask(run_id=root.id[:12]) == [child.id, root.id]
    assert await ask(parent_id=root.id) == [child.id]
    assert await ask(text="garden") == [root.id]
    assert await ask(since="1h") == [failed.id, child.id]
    assert await ask(until="1h", agent="helper") == [root.id]
    assert await ask(since=results.iso(root.created_us - 1000), until=results.iso(now - 60_000_000)) == [root.id]


async def test_query_traces_rows_are_compact(rt: Runtime, client: Client) -> None:
    error = RateLimitError("too fast").to_dict()
    run = a_run(
        rt, status="failed", prompt="p" * 999, text="t" * 999, error=error, created_us=1_000_000_000_000_000
    )
    await rt.store.create_run(run)

    found = (await client.call_tool("query_traces", {})).structured_content

    assert found
    [row] = found["runs"]
    assert row == {
        "run_id": run.id,
        "agent": "helper",
        "status": "failed",
        "prompt": "p" * 199 + "…",
        "text": "t" * 499 + "…",
        "tokens": 0,
        "started": "2001-09-09T01:46:40.000Z",
        "trace_id": run.trace_id,
        "error": "rate_limit: too fast",
    }


async def test_query_traces_pages_lose_nothing(rt: Runtime, client: Client) -> None:
    now = now_us()
    # Several in one microsecond: a cursor of times alone would skip some.
    for number in range(9):
        await rt.store.create_run(a_run(rt, created_us=now + number // 4))

    pages: list[list[str]] = []
    arguments: dict[str, Any] = {"limit": 3}
    for _ in range(4):
        found = (await client.call_tool("query_traces", arguments)).structured_content
        assert found
        pages.append([run["run_id"] for run in found["runs"]])
        if found["next"] is None:
            break
        arguments["cursor"] = found["next"]

    assert [len(page) for page in pages] == [3, 3, 3]
    assert [run_id for page in pages for run_id in page] == [run.id for run in await rt.store.runs()]


@given(st.integers(min_value=0, max_value=7 * 10**15))
def test_times_we_give_are_times_we_take(us: int) -> None:
    assert abs(results.instant(results.iso(us), 0) - us) <= 1000


TIMES = st.text(max_size=20) | st.from_regex(r"[0-9]{1,30}(\.[0-9])?[smhdw]") | st.datetimes().map(str)


@given(TIMES)
def test_any_text_is_a_time_or_refused(text: str) -> None:
    with suppress(ConfigError):
        assert 0 <= results.instant(text, now_us()) < 2**63


@pytest.mark.parametrize(
    ("text", "ago"), [("90s", 90), ("30m", 1800), ("1.5h", 5400), ("3d", 259_200), (" 1W", 604_800)]
)
def test_time_spans(text: str, ago: int) -> None:
    assert results.instant(text, 10**15) == 10**15 - ago * 1_000_000


WORDS = st.text(max_size=12)
ARGUMENTS = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(["agent", "session_id", "run_id", "parent_id", "text", "since", "until", "cursor"], WORDS),
        "limit": st.integers(),
        "run_ids": st.lists(WORDS, max_size=3),
        "prompt": WORDS,
        "cwd": WORDS,
        "timeout_s": st.floats(),
        "budget_usd": st.floats(),
        "wait_s": st.just(0),
    },
)


@given(st.sampled_from(["query_traces", "run_wait", "run_cancel", "fork_session", "delegate"]), ARGUMENTS)
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_no_arguments_break_a_tool(client: Client, tool: str, arguments: dict[str, Any]) -> None:
    known = (await client.list_tools()).tools
    [properties] = [each.input_schema["properties"] for each in known if each.name == tool]
    result = await client.call_tool(tool, {name: value for name, value in arguments.items() if name in properties})
    # The SDK's words for an exception that nobody foresaw.
    assert text_of(result) != f"Error executing tool {tool}"


# -- who calls ----------------------------------------------------------------------------------------------


async def test_what_the_shim_says_of_the_caller(rt: Runtime, client: Client, model: ModelServer) -> None:
    model.rules = [Rule("ok")]
    span = SpanContext(new_trace_id(), new_run_id())
    project = rt.config.project_dir.parent / "another"
    (project / "agents").mkdir(parents=True)
    write_agent(project, "helper", tools="Read")
    meta: Any = {
        "traceparent": span.traceparent,
        CALLER_KEY: {"session_id": "window-7", "project_dir": str(project), "unknown": {}},
        "claudecode/toolUseId": "toolu_1",
    }

    result = await client.call_tool("delegate", {"agent": "helper", "prompt": "x"}, meta=meta)

    row = await rt.store.run(facts_of(result)["run"])
    assert (row.trace_id, row.parent_span_id, row.parent_id) == (span.trace_id, span.span_id, None)
    assert row.cwd == str(project)
    assert row.caller
    assert (row.caller["session_id"], row.caller["tool_use_id"]) == ("window-7", "toolu_1")


async def test_claims_that_mean_nothing_are_ignored(rt: Runtime, client: Client, model: ModelServer) -> None:
    gate = Gate()
    model.rules = [Rule(gate)]
    for claims in (
        "text",
        {"run_id": 7},
        {"run_id": "0" * 16},
        {"project_dir": ["x"]},
        {"project_dir": "/a\0b"},
        None,
    ):
        meta: Any = {CALLER_KEY: claims, "traceparent": "00-nonsense"}
        arguments = {"agent": "helper", "prompt": "x", "wait_s": 0}
        assert "still running" in text_of(await client.call_tool("delegate", arguments, meta=meta))

    rows = await rt.store.runs()
    assert {(row.parent_id, row.cwd) for row in rows} == {(None, str(rt.config.project_dir))}
    assert len({row.trace_id for row in rows}) == 6


async def test_a_call_from_somewhere_below_a_run_is_its_child(
    rt: Runtime, client: Client, model: ModelServer
) -> None:
    gate = Gate()
    model.rules = [Rule(gate, when={"user_contains": "outer"}), Rule("inner answer")]
    outer = await submit(rt, Task(agent="worker", prompt="outer"))
    stranger = (await delegate(rt, Task(agent="helper", prompt="a stranger"))).run_id
    meta: Any = {CALLER_KEY: {"run_id": outer}}

    inner = facts_of(await client.call_tool("delegate", {"agent": "helper", "prompt": "x"}, meta=meta))["run"]
    seen = await client.call_tool("query_traces", {}, meta=meta)
    refused = [
        await client.call_tool("run_wait", {"run_ids": [stranger]}, meta=meta),
        await client.call_tool("run_cancel", {"run_id": outer}, meta=meta),
    ]
    allowed = await client.call_tool("run_wait", {"run_ids": [inner]}, meta=meta)
    gate.opened.set()

    row = await rt.store.run(inner)
    assert (row.parent_id, row.depth) == (outer, 2)
    assert seen.structured_content
    assert [run["run_id"] for run in seen.structured_content["runs"]] == [inner, outer]
    assert [error_of(result)["code"] for result in refused] == ["run_not_found"] * 2
    assert facts_of(allowed)["run"] == inner
    assert (await wait(rt, outer)).ok


async def test_an_agent_goes_on_only_with_sessions_of_its_own_tree(
    rt: Runtime, client: Client, model: ModelServer
) -> None:
    """What another conversation has said is none of its business; a person may go on with any."""
    gate = Gate()
    model.rules = [Rule(gate, when={"user_contains": "outer"}), Rule("noted")]
    stranger = await delegate(rt, Task(agent="helper", prompt="a secret"))
    outer = await submit(rt, Task(agent="worker", prompt="outer"))
    await model.wait_for("outer")
    meta: Any = {CALLER_KEY: {"run_id": outer}}

    async def delegated(meta: Any = meta, **options: Any) -> CallToolResult:
        arguments = {"agent": "helper", "prompt": "x", **options}
        return await client.call_tool("delegate", arguments, meta=meta)

    async def forked(session: str | None, meta: Any = meta) -> CallToolResult:
        return await client.call_tool("fork_session", {"session_id": session, "prompt": "x"}, meta=meta)

    def refusal(result: CallToolResult, session: str | None) -> str:
        assert error_of(result)["code"] == "session_not_found"
        return text_of(result).replace(str(session), "…")

    inner = facts_of(await delegated())["session"]
    for foreign, unknown in (
        (await delegated(session=stranger.session_id), await delegated(session="none")),
        (await delegated(session=stranger.session_id, fork=True), await delegated(session="none", fork=True)),
        (await forked(stranger.session_id), await forked("none")),
    ):
        assert refusal(foreign, stranger.session_id) == refusal(unknown, "none")
    assert facts_of(await delegated(session=inner))["session"] == inner
    assert facts_of(await delegated(session=inner, fork=True))["session"] != inner
    assert facts_of(await forked(inner))["session"] != inner
    # Its own is no secret: it is told what is the matter.
    own = (await rt.store.run(outer)).session_id
    assert error_of(await delegated(session=own))["code"] == "session_busy"
    assert facts_of(await delegated(None, session=stranger.session_id))["session"] == stranger.session_id
    assert facts_of(await forked(stranger.session_id, None))["session"]
    gate.opened.set()
    assert (await wait(rt, outer)).ok


async def test_an_agent_goes_on_with_what_it_began_in_an_earlier_turn(
    rt: Runtime, client: Client, model: ModelServer
) -> None:
    """The turns of one conversation are runs, and need not be of one tree."""
    gates = [Gate(), Gate()]
    model.rules = [
        Rule(gates[1], when={"user_contains": "outer again"}),
        Rule(gates[0], when={"user_contains": "outer"}),
        Rule("noted"),
    ]
    first = await submit(rt, Task(agent="worker", prompt="outer"))
    call = {"agent": "helper", "prompt": "x"}
    inner = facts_of(await client.call_tool("delegate", call, meta={CALLER_KEY: {"run_id": first}}))["session"]
    gates[0].opened.set()
    session = (await wait(rt, first)).session_id
    second = await submit(rt, Task(agent="worker", prompt="outer again", session=session))
    await model.wait_for("outer again")

    meta: Any = {CALLER_KEY: {"run_id": second}}
    on = await client.call_tool("delegate", {**call, "session": inner}, meta=meta)

    assert facts_of(on)["session"] == inner
    gates[1].opened.set()
    assert (await wait(rt, second)).ok


# -- agents that delegate -----------------------------------------------------------------------------------


@asynccontextmanager
async def with_manager(runtime: Open, project: Any, **settings: Any) -> AsyncIterator[Runtime]:
    """A runtime with a door, and an agent that may use it."""
    agent = project / "agents" / "manager.md"
    agent.write_text("---\nname: manager\ndescription: d\ntools: mcp__orchestrator__delegate\n---\nYou manage.\n")
    async with runtime(open_door=open_door, **settings) as rt:
        yield rt


def manages(agent: str, prompt: str, **options: Any) -> list[Rule]:
    """A model that delegates once and then repeats what came back."""
    call = ToolUse("mcp__orchestrator__delegate", {"agent": agent, "prompt": prompt, **options})
    return [
        Rule(call, when={"system": "You manage", "tool_result": False}),
        Rule(lambda request: f"heard: {request.tool_results[0].text}", when={"system": "You manage"}),
    ]


async def test_an_agent_delegates_in_the_same_runtime(runtime: Open, project: Any, model: ModelServer) -> None:
    model.rules = [*manages("helper", "a part of it"), Rule("the part")]
    async with with_manager(runtime, project) as rt:
        outcome = await delegate(rt, Task(agent="manager", prompt="do it"))
        parent, child = await rt.store.tree(outcome.run_id)
        trace = {run.trace_id for run in (parent, child)}

    assert outcome.text.startswith("heard: the part\n[run_id=")
    assert (child.parent_id, child.name, child.depth) == (parent.id, "helper", 2)
    assert trace == {parent.trace_id}
    assert child.caller is None
    assert child.cwd == parent.cwd


async def test_depth_is_limited_by_the_runtime(runtime: Open, project: Any, model: ModelServer) -> None:
    model.rules = manages("manager", "deeper")
    async with with_manager(runtime, project, limits__max_depth=2) as rt:
        outcome = await delegate(rt, Task(agent="manager", prompt="go down"))
        depths = [run.depth for run in await rt.store.tree(outcome.run_id)]

    assert depths == [1, 2]
    assert "depth_limit" in outcome.text
    assert "Do this work yourself" in outcome.text


async def test_config_of_waits(make_config: Callable[..., Config], runtime: Open, model: ModelServer) -> None:
    gate = Gate()
    model.rules = [Rule(gate)]
    async with runtime(server__mcp_wait_s=0.1) as rt, Client(build_server(rt)) as client:
        with anyio.fail_after(10):
            result = await client.call_tool("delegate", {"agent": "helper", "prompt": "x"})
        assert "still running" in text_of(result)
        gate.opened.set()
