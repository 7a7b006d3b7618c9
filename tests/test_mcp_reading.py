"""The tools that read: real runs of the real CLI, rows where only their figures matter, pages of any size."""

import json
import re
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mcp import Client

from mcp_tools import build_server, open_door, traces
from mcp_tools.context import CALLER_KEY
from mcp_tools.lookup import near_runs
from mcp_tools.slim import slim_input
from orchestrator.delegation import delegate, submit, wait
from orchestrator.errors import ConfigError, RateLimitError
from orchestrator.messages import ToolCall
from orchestrator.runtime import Runtime
from orchestrator.store import Run, RunLabel, SessionRow, now_us
from orchestrator.task import Task
from orchestrator.testing import Fault, ModelServer, Reply, Request, Rule, ToolUse
from orchestrator.tracing import new_run_id
from tests.conftest import write_agent
from tests.test_mcp_tools import Gate, a_run, error_of, manages, text_of, with_manager

Open = Callable[..., AbstractAsyncContextManager[Runtime]]
Ask = Callable[..., Any]

READING = {"query_traces", "get_trace", "list_sessions", "usage", "run_status", "list_agents"}
#: Characters of JSON to a token, at worst.
CHARS_PER_TOKEN = 3.5


@pytest.fixture
async def client(rt: Runtime) -> AsyncIterator[Client]:
    async with Client(build_server(rt)) as connected:
        yield connected


@pytest.fixture
def ask(client: Client) -> Ask:
    """Calls a tool: the structured result, else the text. ``of`` is the run that calls."""

    async def call(tool: str, of: str | None = None, **arguments: Any) -> Any:
        meta: Any = {CALLER_KEY: {"run_id": of}} if of else None
        with anyio.fail_after(30):
            result = await client.call_tool(tool, arguments, meta=meta)
        assert not result.is_error, text_of(result)
        return result.structured_content if result.structured_content is not None else text_of(result)

    return call


@pytest.fixture
def refused(client: Client) -> Ask:
    """Calls a tool that must refuse: its sentence, and its JSON."""

    async def call(tool: str, of: str | None = None, **arguments: Any) -> tuple[str, dict[str, Any]]:
        meta: Any = {CALLER_KEY: {"run_id": of}} if of else None
        with anyio.fail_after(30):
            result = await client.call_tool(tool, arguments, meta=meta)
        return text_of(result).splitlines()[0], error_of(result)

    return call


async def kept(rt: Runtime, **fields: Any) -> Run:
    run = a_run(rt, **fields)
    await rt.store.create_run(run)
    return run


async def below(rt: Runtime, parent: Run, **fields: Any) -> Run:
    tree = {"parent_id": parent.id, "root_id": parent.root_id, "trace_id": parent.trace_id}
    return await kept(rt, **tree, depth=parent.depth + 1, **fields)


# -- schemas ------------------------------------------------------------------------------------------------


async def test_all_schemas_together_are_small(client: Client) -> None:
    tools = (await client.list_tools()).tools
    sizes = {
        tool.name: len(json.dumps(tool.model_dump(mode="json", by_alias=True, exclude_none=True))) / CHARS_PER_TOKEN
        for tool in tools
    }
    assert sum(sizes.values()) <= 5000, sizes
    assert sum(sizes[name] for name in READING) <= 2400, sizes


async def test_what_reads_says_so(client: Client) -> None:
    tools = {tool.name: tool for tool in (await client.list_tools()).tools}
    for name in READING:
        annotations = tools[name].annotations
        assert annotations
        assert annotations.read_only_hint
        assert tools[name].input_schema["additionalProperties"] is False
        assert (tools[name].output_schema is None) == (name == "get_trace")


def test_slim_schemas_keep_what_says_something() -> None:
    schema = {
        "title": "Arguments",
        "properties": {
            "title": {"title": "Title", "type": "string"},
            "maybe": {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None, "description": "d"},
            "either": {"anyOf": [{"type": "string"}, {"type": "integer"}, {"type": "null"}], "default": None},
            "null": {"anyOf": [{"type": "string"}, {"type": "null"}]},
            "number": {"type": "integer", "default": 20},
        },
        "required": ["title"],
    }
    assert slim_input(schema) == {
        "properties": {
            "title": {"type": "string"},
            "maybe": {"type": "string", "description": "d"},
            "either": {"anyOf": [{"type": "string"}, {"type": "integer"}]},
            "null": {"anyOf": [{"type": "string"}, {"type": "null"}]},
            "number": {"type": "integer", "default": 20},
        },
        "required": ["title"],
    }


async def test_null_is_as_good_as_nothing(ask: Ask) -> None:
    assert await ask("query_traces", agent=None, cursor=None, group_by=None) == {"runs": [], "next": None}


# -- query_traces -------------------------------------------------------------------------------------------


async def test_filters_of_cost_time_and_project(rt: Runtime, ask: Ask) -> None:
    now, second = now_us(), 1_000_000
    dear = await kept(rt, cost_usd=2.0, started_us=now - second, ended_us=now, created_us=now)
    slow = await kept(
        rt, cost_usd=0.1, started_us=now - 60 * second, ended_us=now, created_us=now - 1, project="/x"
    )

    async def found(**filters: Any) -> list[str]:
        return [run["run_id"] for run in (await ask("query_traces", **filters))["runs"]]

    assert await found(min_cost_usd=1) == [dear.id]
    assert await found(max_cost_usd=1) == [slow.id]
    assert await found(min_duration_s=30) == [slow.id]
    assert await found(max_duration_s=30.5) == [dear.id]
    assert await found(project="/x") == [slow.id]
    assert await found(project="/nowhere") == []
    assert await found(min_cost_usd=0.05, max_duration_s=90) == [dear.id, slow.id]


async def test_a_project_is_seen_from_the_callers(
    rt: Runtime, client: Client, ask: Ask, model: ModelServer
) -> None:
    model.rules = [Rule("ok")]
    outcome = await delegate(rt, Task(agent="helper", prompt="x"))
    folder = rt.config.project_dir
    (folder.parent / "link").symlink_to(folder)

    for named in (".", str(folder), "../link"):
        [run] = (await ask("query_traces", project=named))["runs"]
        assert run["run_id"] == outcome.run_id
    meta: Any = {CALLER_KEY: {"project_dir": str(folder.parent)}}
    result = await client.call_tool("query_traces", {"project": "project"}, meta=meta)
    assert result.structured_content
    assert len(result.structured_content["runs"]) == 1


async def test_groups_of_real_runs(rt: Runtime, ask: Ask, model: ModelServer) -> None:
    model.rules = [
        Rule(Reply(fault=Fault(status=400, message="no")), when={"user_contains": "wrong"}),
        Rule("right"),
    ]
    for agent, prompt in (("helper", "a"), ("helper", "wrong"), ("worker", "b")):
        await delegate(rt, Task(agent=agent, prompt=prompt))

    found = await ask("query_traces", group_by="agent")
    helper, worker = found["groups"]

    assert "runs" not in found
    assert found["next"] is None
    rows = await rt.store.runs(agent="helper")
    assert (helper["key"], helper["runs"], helper["ok"], helper["failed"]) == ("helper", 2, 1, 1)
    assert helper["cost_usd"] == round(sum(run.cost_usd or 0 for run in rows), 6)
    assert helper["tokens"] == sum(run.usage.total_tokens for run in rows) > 0
    assert helper["seconds"] == pytest.approx(sum(run.duration_ms or 0 for run in rows) / 1000, abs=0.1)
    assert (worker["runs"], worker["ok"]) == (1, 1)
    assert not {"failed", "cancelled", "unfinished", "unknown_cost"} & worker.keys()
    by_status = (await ask("query_traces", group_by="status", agent="helper"))["groups"]
    assert {group["key"]: group["runs"] for group in by_status} == {"succeeded": 1, "failed": 1}
    [model_] = (await ask("query_traces", group_by="model", status="succeeded"))["groups"]
    assert (model_["key"], model_["runs"]) == ("claude-opus-5-5", 2)
    [day] = (await ask("query_traces", group_by="day"))["groups"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", day["key"])


async def test_groups_are_paged(rt: Runtime, ask: Ask) -> None:
    for name in "abcde":
        await kept(rt, name=name)

    seen: list[str] = []
    arguments: dict[str, Any] = {"group_by": "agent", "limit": 2}
    while True:
        page = await ask("query_traces", **arguments)
        seen += [group["key"] for group in page["groups"]]
        if page["next"] is None:
            break
        arguments["cursor"] = page["next"]

    assert seen == list("abcde")


async def test_a_wrong_name_is_answered_with_near_ones(rt: Runtime, ask: Ask, refused: Ask) -> None:
    await kept(rt, name="nightly-plan", kind="plan")

    for tool in ("query_traces", "list_sessions"):
        sentence, error = await refused(tool, agent="helpr")
        assert sentence.endswith("no agent or plan is called 'helpr'; did you mean 'helper'?")
        assert error["code"] == "agent_not_found"
        assert error["known"] == ["helper", "nightly-plan", "worker"]
    # Who has run nothing yet is no mistake.
    assert (await ask("query_traces", agent="worker"))["runs"] == []
    assert (await ask("list_sessions", agent="worker"))["sessions"] == []
    assert len((await ask("query_traces", agent="nightly-plan"))["runs"]) == 1


async def test_a_wrong_run_is_answered_with_near_ones(rt: Runtime, refused: Ask) -> None:
    run = await kept(rt, id="0123456789abcdef", name="nightly")
    await kept(rt, id="0123456789ffffff")

    asked = [
        ("get_trace", {"run_id": "0123456789abcdee"}),
        ("get_trace", {"run_id": "nightly"}),
        ("usage", {"run_id": "0123456788abcdef"}),
        ("query_traces", {"parent_id": "01234567 89abcdef"}),
        ("run_status", {"run_ids": [run.id, "1123456789abcdef"]}),
    ]
    for tool, arguments in asked:
        sentence, error = await refused(tool, **arguments)
        assert f"did you mean {run.id} (nightly, succeeded)" in sentence
        assert (error["code"], error["near"][0]) == ("run_not_found", run.id)
    sentence, error = await refused("get_trace", run_id="0123456789")
    assert "'0123456789' is the start of several run ids" in sentence
    assert sorted(error["near"]) == ["0123456789abcdef", "0123456789ffffff"]
    sentence, error = await refused("get_trace", run_id="")
    assert "near" not in error


def test_near_runs_are_few_and_near() -> None:
    known = [RunLabel(id=f"{number:016x}", name="same", status="failed") for number in range(9)]
    assert len(near_runs("same", known)) == 3
    assert near_runs("fedcba9876543210", known) == []


# -- get_trace ----------------------------------------------------------------------------------------------


async def test_the_tree_of_real_runs(runtime: Open, project: Path, model: ModelServer) -> None:
    model.rules = [*manages("helper", "a part of it"), Rule("the part")]
    async with with_manager(runtime, project) as rt, Client(build_server(rt)) as client:
        outcome = await delegate(rt, Task(agent="manager", prompt="do it"))
        result = await client.call_tool("get_trace", {"run_id": outcome.run_id[:10]})
        manager, helper = await rt.store.tree(outcome.run_id)

    head, first, second = text_of(result).splitlines()
    assert head == f"trace {manager.trace_id}, 2 runs"
    assert manager.duration_ms
    assert first == (
        f"{manager.id} manager succeeded model=claude-opus-5-5 tokens={manager.usage.total_tokens}"
        f" cost=${manager.cost_usd:.4f} took={manager.duration_ms / 1000:.1f}s"
    )
    assert second.startswith(f"  {helper.id} helper succeeded ")


async def test_a_real_run_in_full(rt: Runtime, ask: Ask, model: ModelServer) -> None:
    page = rt.config.project_dir / "page.txt"
    page.write_text("What the page says.\n")
    model.rules = [
        Rule(ToolUse("Read", {"file_path": str(page)}), when={"tool_result": False}),
        Rule("I have read it."),
    ]
    outcome = await delegate(rt, Task(agent="helper", prompt="Read the page."))

    text = await ask("get_trace", run_id=outcome.run_id, view="run")

    sections = re.split(r"^--- (.+) ---$\n?", text, flags=re.MULTILINE)
    told = {title: body.strip("\n") for title, body in zip(sections[1::2], sections[2::2], strict=True)}
    assert list(told) == ["run", "prompt", "answer", "tool 1: Read (ok)"]
    assert told["run"].startswith(f"[run_id={outcome.run_id} status=succeeded session={outcome.session_id} ")
    assert f"cwd={rt.config.project_dir}" in told["run"]
    assert (told["prompt"], told["answer"]) == ("Read the page.", "I have read it.")
    arguments, result = told["tool 1: Read (ok)"].split("\n", 1)
    assert json.loads(arguments) == {"file_path": str(page)}
    assert "What the page says." in result


async def test_a_real_run_that_failed_has_its_error(rt: Runtime, ask: Ask, model: ModelServer) -> None:
    model.rules = [Rule(Reply(fault=Fault(status=401, message="bad key")))]
    outcome = await delegate(rt, Task(agent="helper", prompt="x"))

    in_full = await ask("get_trace", run_id=outcome.run_id, view="run")
    tree = await ask("get_trace", run_id=outcome.run_id)

    error = json.loads(in_full.split("--- error ---\n")[1].splitlines()[0])
    assert error["code"] == "authentication"
    assert tree.endswith(" error=authentication")


async def test_a_run_at_work_shows_what_it_has_said(rt: Runtime, ask: Ask, model: ModelServer) -> None:
    model.rules = [Rule(Reply("word " * 400, chunks=400, event_delay_s=0.05))]
    run_id = await submit(rt, Task(agent="helper", prompt="talk"))
    with rt.events.watch() as watcher, anyio.fail_after(20):
        async for event in watcher:
            if event.data.get("activity") == "answering":
                break

    text = await ask("get_trace", run_id=run_id, view="run")

    assert "\n--- said so far ---\nword" in text
    assert " status=running " in text


def tool_call(number: int, length: int) -> ToolCall:
    return ToolCall(f"t{number}", "Bash", {"command": f"make {number}"}, "z" * length, False)


LENGTHS = st.integers(0, 30_000)
SIZES = st.integers(traces.MIN_CHARS, 20_000)
CUT = re.compile(r'\n\[(\d+) more characters: cursor="(\d+)\.(\d+)"\]')
MORE = re.compile(r"\n\[\d+ more (?:parts|characters|runs): call get_trace\((\{.*\})\)\]\Z")


def given_run(prompt: str, text: str) -> Run:
    return Run(
        id="a" * 16,
        trace_id="b" * 32,
        root_id="a" * 16,
        depth=1,
        kind="agent",
        name="helper",
        status="succeeded",
        prompt=prompt,
        text=text,
        project="/",
        cwd="/" + "d" * 3000,
        created_us=1,
        instance_id="i",
    )


@given(LENGTHS, LENGTHS, st.lists(LENGTHS, max_size=30), SIZES)
@settings(deadline=None, max_examples=60)
def test_nothing_of_a_run_is_lost_and_no_page_is_too_long(
    prompt: int, answer: int, results: list[int], size: int
) -> None:
    run = given_run("p" * prompt, "t" * answer)
    calls = [tool_call(number, length) for number, length in enumerate(results)]

    pages: list[str] = []
    cursor: str | None = None
    while True:
        page = traces.run_text(run, calls, size, cursor)
        assert len(page) <= size
        pages.append(page)
        if (more := MORE.search(page)) is None:
            break
        cursor = json.loads(more[1])["cursor"]
    # What each page says it has left out, read to its end.
    said = "\n".join(MORE.sub("", page) for page in pages)
    for left, part, begin in CUT.findall(said):
        alone, cursor, length = "", f"{part}.{begin}", 0
        while cursor:
            page = traces.run_text(run, calls, size, cursor)
            assert len(page) <= size
            more = MORE.search(page)
            cursor = json.loads(more[1])["cursor"] if more else ""
            body = MORE.sub("", page).split("\n", 1)[1]
            alone, length = alone + body, length + len(body)
        assert length == int(left)
        said = said.replace(f'\n[{left} more characters: cursor="{part}.{begin}"]', alone, 1)

    assert ("p" * prompt if prompt else "none") in said
    assert ("t" * answer if answer else "nothing") in said
    for number, length in enumerate(results):
        assert f'{{"command":"make {number}"}}\n{"z" * length}' in said


@given(st.lists(st.integers(0, 40), max_size=60), SIZES)
@settings(deadline=None, max_examples=60)
def test_no_run_of_a_tree_is_lost(parents: list[int], size: int) -> None:
    root = given_run("p", "t")
    runs = [root]
    for number, parent in enumerate(parents):
        above = runs[parent % len(runs)]
        more = {"id": f"{number:016x}", "parent_id": above.id, "name": "n" * 256, "created_us": number + 2}
        runs.append(root.model_copy(update={**more, "depth": above.depth + 1}))

    shown: list[str] = []
    cursor: str | None = None
    while True:
        page = traces.tree_text(runs, root.id, size, cursor)
        assert len(page) <= size
        shown += MORE.sub("", page).splitlines()[1:]
        if (more_ := MORE.search(page)) is None:
            break
        cursor = json.loads(more_[1])["cursor"]

    at = {line.split()[0]: number for number, line in enumerate(shown)}
    assert len(shown) == len(at) == len(runs)
    depth = {line.split()[0]: (len(line) - len(line.lstrip())) // 2 for line in shown}
    for run in runs[1:]:
        assert at[run.parent_id or ""] < at[run.id]
        assert depth[run.id] == min(50, depth[run.parent_id or ""] + 1)


@pytest.mark.parametrize("cursor", ["", "x", "99", "-1", "1.", "1.5.5", "٣"])
def test_a_cursor_nobody_gave_is_refused(cursor: str) -> None:
    with pytest.raises(ConfigError, match="is no cursor"):
        traces.run_text(given_run("p", "t"), [], 1000, cursor)
    with pytest.raises(ConfigError, match="is no cursor"):
        traces.tree_text([given_run("p", "t")], "a" * 16, 1000, cursor)


async def test_cursors_through_the_tool(rt: Runtime, ask: Ask) -> None:
    run = await kept(rt, text="t" * 5000)

    first = await ask("get_trace", run_id=run.id, view="run", max_chars=1000)
    cut = CUT.search(first)
    assert cut
    rest = await ask("get_trace", run_id=run.id, view="run", max_chars=10_000, cursor=f"{cut[2]}.{cut[3]}")

    assert rest.split("\n", 1)[1] == "t" * int(cut[1])


# -- list_sessions ------------------------------------------------------------------------------------------


async def test_sessions_of_real_runs(rt: Runtime, ask: Ask, model: ModelServer) -> None:
    gate = Gate()
    model.rules = [Rule(gate, when={"user_contains": "again"}), Rule("ok")]
    first = await delegate(rt, Task(agent="helper", prompt="one\n  two"))
    fork = await delegate(rt, Task(agent="helper", prompt="forked", session=first.session_id, fork=True))
    other = await delegate(rt, Task(agent="worker", prompt="x"))
    going = await submit(rt, Task(agent="helper", prompt="again", session=first.session_id))
    await model.wait_for("again")

    rows = {row["session_id"]: row for row in (await ask("list_sessions"))["sessions"]}

    assert set(rows) == {first.session_id, fork.session_id, other.session_id}
    mine = rows[first.session_id]
    assert (mine["agent"], mine["turns"], mine["last_run"], mine["in_use_by"]) == ("helper", 1, going, going)
    assert (mine["prompt"], mine["project"]) == ("again", str(rt.config.project_dir))
    assert rows[fork.session_id]["forked_from"] == first.session_id
    assert rows[fork.session_id]["prompt"] == "forked"
    gate.opened.set()
    assert (await wait(rt, going)).ok
    after = (await ask("list_sessions", agent="helper", project="."))["sessions"]
    assert [row["session_id"] for row in after] == [first.session_id, fork.session_id]
    assert "in_use_by" not in after[0]
    assert (after[0]["turns"], after[0]["last_run"]) == (2, going)


async def test_sessions_are_paged(rt: Runtime, ask: Ask) -> None:
    for number in range(7):
        session = SessionRow(
            id=f"s{number}",
            backend="claude",
            agent="helper",
            cwd="/",
            home="/",
            created_us=1,
            updated_us=number // 3,
        )
        await rt.store.begin_session(session)

    seen: list[str] = []
    cursor: str | None = None
    while True:
        page = await ask("list_sessions", limit=3, cursor=cursor)
        seen += [row["session_id"] for row in page["sessions"]]
        if (cursor := page["next"]) is None:
            break

    assert seen == ["s6", "s3", "s4", "s5", "s0", "s1", "s2"]


# -- usage --------------------------------------------------------------------------------------------------


async def test_usage_of_real_runs(rt: Runtime, ask: Ask, model: ModelServer) -> None:
    model.rules = [Rule("ok")]
    for agent in ("helper", "worker", "helper"):
        await delegate(rt, Task(agent=agent, prompt="x"))
    rows = await rt.store.runs()

    used = await ask("usage")

    assert used["total"]["runs"] == 3
    assert used["total"]["input_tokens"] == sum(run.input_tokens for run in rows) > 0
    assert used["total"]["cost_usd"] == round(sum(run.cost_usd or 0 for run in rows), 6) > 0
    assert [(group["key"], group["runs"]) for group in used["groups"]] == [("helper", 2), ("worker", 1)]
    assert "left" not in used
    assert "unknown_cost" not in used["total"]
    [project] = (await ask("usage", by="project"))["groups"]
    assert project["key"] == str(rt.config.project_dir)
    assert (await ask("usage", until="1h"))["total"]["runs"] == 0
    assert (await ask("usage", since="1h", by="day"))["total"]["runs"] == 3


async def test_unknown_costs_are_counted_apart(rt: Runtime, ask: Ask) -> None:
    await kept(rt, cost_usd=None, started_us=1)
    await kept(rt, cost_usd=0.5, started_us=1)
    # A plan only passes on what its steps cost.
    await kept(rt, kind="plan", cost_usd=7.0, started_us=1)

    total = (await ask("usage"))["total"]

    assert (total["runs"], total["cost_usd"], total["unknown_cost"]) == (2, 0.5, 1)


async def test_what_a_run_has_left(rt: Runtime, ask: Ask, model: ModelServer) -> None:
    gate = Gate()
    model.rules = [Rule(gate)]
    limited = Task(agent="helper", prompt="x", budget_usd=1.0, timeout_s=50)
    going = await submit(rt, limited)
    await model.wait_for("x")

    before = (await ask("usage", run_id=going))["left"]
    gate.opened.set()
    outcome = await wait(rt, going)
    after = await ask("usage", run_id=going)

    assert before["usd"] <= 1
    assert 0 < before["seconds"] <= 50
    assert outcome.cost_usd
    assert after["left"]["usd"] == round(1 - outcome.cost_usd, 6)
    assert "seconds" not in after["left"]
    assert after["total"]["runs"] == 1


async def test_groups_of_usage_are_paged(rt: Runtime, ask: Ask) -> None:
    for number in range(53):
        await kept(rt, name=f"agent-{number:02}")

    first = await ask("usage")
    rest = await ask("usage", cursor=first["next"])

    assert first["total"]["runs"] == rest["total"]["runs"] == 53
    names = [group["key"] for group in (*first["groups"], *rest["groups"])]
    assert names == [f"agent-{number:02}" for number in range(53)]
    assert rest["next"] is None


# -- run_status ---------------------------------------------------------------------------------------------


class AskedGate(Gate):
    """A gate that says when somebody stands before it."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = anyio.Event()

    async def __call__(self, request: Request) -> str:
        self.asked.set()
        return await super().__call__(request)


async def test_the_state_of_real_runs(rt: Runtime, ask: Ask, model: ModelServer) -> None:
    gate = AskedGate()
    reads = ToolUse("Read", {"file_path": "/etc/hostname"})
    model.rules = [
        Rule(reads, when={"user_contains": "slow", "tool_result": False}),
        Rule(gate, when={"tool_result": True}),
        Rule(Reply(fault=Fault(status=400, message="no")), when={"user_contains": "wrong"}),
        Rule("ok"),
    ]
    done = await delegate(rt, Task(agent="helper", prompt="quick"))
    wrong = await delegate(rt, Task(agent="helper", prompt="wrong"))
    slow = await submit(rt, Task(agent="helper", prompt="slow"))
    with anyio.fail_after(20):
        await gate.asked.wait()

    one, two, three = (await ask("run_status", run_ids=[done.run_id, wrong.run_id, slow[:12], slow[:12]]))["runs"]

    assert (one["status"], one["tokens"], one["cost_usd"]) == ("succeeded", 105, done.cost_usd)
    assert "activity" not in one
    assert two["status"] == "failed"
    assert two["error"].startswith("invalid_request: ")
    assert (three["run_id"], three["status"], three["activity"]) == (slow, "running", "helper: Read: /etc/hostname")
    assert three["tokens"] > 0
    assert three["seconds"] >= 0
    gate.opened.set()
    assert (await wait(rt, slow)).ok


async def test_the_state_of_a_run_of_another_process(runtime: Open, model: ModelServer) -> None:
    gate = Gate()
    model.rules = [Rule(gate)]
    async with runtime() as first, runtime() as second, Client(build_server(second)) as client:
        going = await submit(first, Task(agent="helper", prompt="elsewhere"))
        await model.wait_for("elsewhere")

        [state] = (await client.call_tool("run_status", {"run_ids": [going]})).structured_content["runs"]  # type: ignore[index]

        assert (state["status"], state["activity"]) == ("running", "in another process")
        gate.opened.set()
        assert (await wait(first, going)).ok


async def test_a_waiting_run_says_when_it_goes_on(rt: Runtime, ask: Ask) -> None:
    run = await kept(rt, status="waiting", started_us=now_us(), resume_at_us=1_000_000_000_000_000)

    [state] = (await ask("run_status", run_ids=[run.id]))["runs"]

    assert (state["status"], state["resumes"]) == ("waiting", "2001-09-09T01:46:40.000Z")


# -- who may see what ---------------------------------------------------------------------------------------


async def test_an_agent_sees_its_own_run_and_those_below(
    rt: Runtime, ask: Ask, refused: Ask, model: ModelServer
) -> None:
    gate = Gate()
    model.rules = [Rule(gate, when={"user_contains": "outer"}), Rule("noted")]
    stranger = await delegate(rt, Task(agent="helper", prompt="a secret"))
    me = await submit(rt, Task(agent="worker", prompt="outer", budget_usd=1.0))
    await model.wait_for("outer")
    inner = await delegate(rt, Task(agent="helper", prompt="inner", parent_id=me))
    mine = (await rt.store.run(me)).session_id

    assert [run["run_id"] for run in (await ask("query_traces", me))["runs"]] == [inner.run_id, me]
    assert [group["runs"] for group in (await ask("query_traces", me, group_by="agent"))["groups"]] == [1, 1]
    assert {row["session_id"] for row in (await ask("list_sessions", me))["sessions"]} == {inner.session_id, mine}
    assert (await ask("usage", me))["total"]["runs"] == 2
    assert (await ask("usage", me, run_id=me))["left"]["usd"] <= 1
    assert "a secret" not in await ask("get_trace", me, run_id=me, view="run")
    assert [run["run_id"] for run in (await ask("run_status", me, run_ids=[inner.run_id]))["runs"]] == [
        inner.run_id
    ]
    calls: list[tuple[str, str]] = [("query_traces", "run_id"), ("query_traces", "parent_id"), ("usage", "run_id")]
    for tool, name in [*calls, ("get_trace", "run_id")]:
        foreign = await refused(tool, me, **{name: stranger.run_id})
        nobody = await refused(tool, me, **{name: "f" * 16})
        assert foreign[0].replace(stranger.run_id, "…") == nobody[0].replace("f" * 16, "…")
        assert foreign[1] == nobody[1]
    _, error = await refused("run_status", me, run_ids=[stranger.run_id])
    assert error["code"] == "run_not_found"
    gate.opened.set()
    assert (await wait(rt, me)).ok


async def test_the_start_of_an_id_is_looked_for_among_ones_own(rt: Runtime, ask: Ask, refused: Ask) -> None:
    me = await kept(rt, status="running", started_us=now_us())
    await kept(rt, id="abcd000000000000")
    mine = await below(rt, me, id="abcd111111111111")

    assert f"{mine.id} helper" in await ask("get_trace", me.id, run_id="abcd")
    _, error = await refused("get_trace", None, run_id="abcd")
    assert len(error["near"]) == 2


async def test_names_of_others_are_not_told_to_an_agent(rt: Runtime, refused: Ask) -> None:
    await kept(rt, name="secret-plan", kind="plan")
    project = str(rt.config.project_dir)
    me = await kept(rt, name="boss", status="running", started_us=now_us(), project=project)

    _, error = await refused("query_traces", me.id, agent="secret-plam")

    assert error["known"] == ["boss", "helper", "worker"]


async def test_an_agent_calls_them_through_its_door(runtime: Open, project: Path, model: ModelServer) -> None:
    """The real CLI, the run's own token: what it is shown of a stranger is nothing."""
    write_agent(project, "looker", tools="mcp__orchestrator", body="You look.")
    model.rules = [
        Rule(ToolUse("mcp__orchestrator__query_traces", {}), when={"system": "You look", "tool_result": False}),
        Rule(lambda request: request.tool_results[0].text, when={"system": "You look"}),
        Rule("a stranger's answer"),
    ]
    async with runtime(open_door=open_door) as rt:
        await delegate(rt, Task(agent="helper", prompt="a stranger"))
        outcome = await delegate(rt, Task(agent="looker", prompt="look"))

    assert [run["run_id"] for run in json.loads(outcome.text)["runs"]] == [outcome.run_id]


# -- what is stored in rows ---------------------------------------------------------------------------------


async def test_errors_of_rows_are_cut_and_ids_made_up_are_refused(rt: Runtime, ask: Ask, refused: Ask) -> None:
    error = RateLimitError("m" * 5000).to_dict()
    run = await kept(rt, status="failed", error=error)

    [state] = (await ask("run_status", run_ids=[run.id]))["runs"]
    assert len(state["error"]) < 600
    _, told = await refused("run_status", run_ids=[new_run_id()])
    assert told["code"] == "run_not_found"


# -- list_agents --------------------------------------------------------------------------------------------


async def test_agents_are_paged_and_problems_are_few(rt: Runtime, ask: Ask, refused: Ask) -> None:
    folder = rt.config.project_dir
    for number in range(105):
        write_agent(folder, f"many-{number:03}")
    for number in range(25):
        (folder / "agents" / f"broken-{number}.md").write_bytes(b"\xff\xfe no text")
    rt.catalog.load()

    first = await ask("list_agents")
    rest = await ask("list_agents", cursor=first["next"])

    names = [agent["name"] for agent in (*first["agents"], *rest["agents"])]
    assert names == [agent.id for agent in rt.catalog.agents()]
    assert {*names} == {"helper", "worker", *(f"many-{number:03}" for number in range(105))}
    assert (len(first["agents"]), "next" in rest) == (100, False)
    assert len(first["problems"]) == 21
    assert first["problems"][-1] == "5 more: `orchestrator agents list` has all"
    _, error = await refused("list_agents", cursor="nobody")
    assert error["code"] == "config"


# -- ends that could not be stored --------------------------------------------------------------------------


async def test_the_end_of_a_run_is_told_though_it_is_not_stored_yet(rt: Runtime, ask: Ask) -> None:
    run = await kept(rt, status="running", started_us=now_us(), text="")
    rt.unwritten[run.id] = run.model_copy(update={"status": "succeeded", "text": "done", "ended_us": now_us()})

    [state] = (await ask("run_status", run_ids=[run.id]))["runs"]

    assert state["status"] == "succeeded"
