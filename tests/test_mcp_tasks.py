"""Runs as tasks: a client that declares the extension, over HTTP, and the real CLI behind it."""

import json
import re
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, ClassVar, Literal

import anyio
import httpx2
import pytest
from mcp import Client, MCPError
from mcp.client.extension import ClaimContext, ClientExtension, ResultClaim, advertise
from mcp.client.streamable_http import streamable_http_client
from mcp.server import MCPServer
from mcp.server.mcpserver import Context
from mcp_types import CallToolResult, RequestParams, Result
from mcp_types import Request as MCPRequest
from pydantic import ConfigDict, Field

from mcp_tools import build_server, open_doors, results, run_tasks
from mcp_tools.context import CALLER_KEY
from mcp_tools.run_tasks import RunTasks, group_id
from mcp_tools.tasks import EXTENSION_ID, Tasks, TaskState, answer_with_task
from orchestrator.delegation import submit, wait
from orchestrator.runtime import Runtime
from orchestrator.task import Task
from orchestrator.testing import Fault, ModelServer, Reply, Rule, ToolUse
from orchestrator.tracing import new_run_id
from tests.test_mcp_tools import Gate, a_run, error_of, facts_of, text_of

Open = Callable[..., AbstractAsyncContextManager[Runtime]]

TOKEN = "the-token-of-the-test"
CALL = {"agent": "helper", "prompt": "slow work"}


# -- a client that knows tasks ------------------------------------------------------------------------------


class TaskHandle(Result):
    """The answer to a call that became a task."""

    model_config = ConfigDict(extra="allow")

    result_type: Literal["task"] = Field(alias="resultType")
    task_id: str = Field(alias="taskId")
    poll_ms: int = Field(alias="pollIntervalMs")


class Answer(Result):
    model_config = ConfigDict(extra="allow")

    @property
    def wire(self) -> dict[str, Any]:
        return {key: value for key, value in (self.model_extra or {}).items() if key != "resultType"}


class TaskParams(RequestParams):
    model_config = ConfigDict(extra="allow")

    task_id: str = Field(alias="taskId")


class TaskRequest(MCPRequest[TaskParams, str]):
    name_param: ClassVar[str | None] = "taskId"


class Unnamed(TaskRequest):
    name_param: ClassVar[str | None] = None


class Misnamed(TaskRequest):
    name_param: ClassVar[str | None] = "another"


async def ask(
    client: Client, method: str, task_id: str, kind: type[TaskRequest] = TaskRequest, **params: Any
) -> dict[str, Any]:
    request = kind(method=method, params=TaskParams(taskId=task_id, **params))
    return (await client.session.send_request(request, Answer)).wire


async def get(client: Client, task_id: str) -> dict[str, Any]:
    return await ask(client, "tasks/get", task_id)


async def start(client: Client, tool: str = "delegate", **arguments: Any) -> TaskHandle:
    """A call that is answered with a task."""
    handle = await client.session.call_tool(tool, {**CALL, **arguments}, allow_claimed=True)
    assert isinstance(handle, TaskHandle)
    return handle


class KnowsTasks(ClientExtension):
    """Polls as a client should, until there is a result."""

    identifier = EXTENSION_ID

    def claims(self) -> list[ResultClaim[Any]]:
        return [ResultClaim(result_type="task", model=TaskHandle, resolve=self.resolve)]

    async def resolve(self, handle: TaskHandle, ctx: ClaimContext) -> CallToolResult:
        while True:
            request = TaskRequest(method="tasks/get", params=TaskParams(taskId=handle.task_id))
            task = (await ctx.session.send_request(request, Answer)).wire
            if task["status"] != "working":
                return CallToolResult.model_validate(task["result"])
            await anyio.sleep(task["pollIntervalMs"] / 1000)


@asynccontextmanager
async def connected(url: str, token: str = TOKEN, *extensions: ClientExtension) -> AsyncIterator[Client]:
    async with (
        httpx2.AsyncClient(headers={"authorization": f"Bearer {token}"}, timeout=30) as http,
        Client(streamable_http_client(url, http_client=http), extensions=extensions) as client,
    ):
        yield client


@pytest.fixture
async def url(rt: Runtime) -> AsyncIterator[str]:
    async with open_doors(rt, token=TOKEN) as doors:
        yield doors.url


@pytest.fixture
async def client(url: str) -> AsyncIterator[Client]:
    async with connected(url, TOKEN, KnowsTasks()) as knowing:
        yield knowing


@pytest.fixture
async def plain(url: str) -> AsyncIterator[Client]:
    """A client that knows nothing of tasks."""
    async with connected(url) as unknowing:
        yield unknowing


def without_ids(result: CallToolResult) -> tuple[bool, str]:
    """What two runs of the same task have in common."""
    ids = r'[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}|[0-9a-f]{16}|"request_id":"[^"]*"'
    text = re.sub(ids, "…", text_of(result))
    return bool(result.is_error), re.sub(r"\d+\.\ds\]", "…]", text)


# -- from its start to its end ------------------------------------------------------------------------------


async def test_the_server_says_that_it_knows_tasks(plain: Client) -> None:
    assert plain.server_capabilities.extensions == {EXTENSION_ID: {}}


async def test_a_task_from_start_to_answer(rt: Runtime, client: Client, model: ModelServer) -> None:
    gate = Gate()
    model.rules = [Rule(ToolUse("Read", {"file_path": "/etc/hostname"}), when={"tool_result": False}), Rule(gate)]

    with anyio.fail_after(20), rt.events.watch() as watcher:
        handle = await start(client)
        row = await rt.store.run(handle.task_id)
        async for event in watcher:
            if event.data.get("activity") == "Read: /etc/hostname":
                break
        working = await get(client, handle.task_id)
        gate.opened.set()
        outcome = await wait(rt, handle.task_id)
        done = await get(client, handle.task_id)

    assert row.prompt == "slow work"
    assert (handle.model_extra or {})["status"] == "working"
    assert working["status"] == "working"
    assert working["statusMessage"].startswith("helper: Read: /etc/hostname · ")
    assert re.search(r" · [\d,]+ tokens · \$0\.\d{4}$", working["statusMessage"])
    assert working["ttlMs"] is None
    assert working["pollIntervalMs"] == 1000
    assert working["createdAt"] == done["createdAt"] == results.iso(row.created_us)
    assert working["createdAt"] <= working["lastUpdatedAt"] <= done["lastUpdatedAt"]
    assert "result" not in working
    assert done["status"] == "completed"
    result = CallToolResult.model_validate(done["result"])
    assert text_of(result).startswith("at last\n")
    assert facts_of(result)["run"] == outcome.run_id == handle.task_id


@pytest.mark.parametrize(
    "answer", [Reply("the answer"), Reply(fault=Fault(status=401, message="bad key"))], ids=["answer", "failure"]
)
async def test_a_task_reads_as_the_waiting_tool_does(
    client: Client, plain: Client, model: ModelServer, answer: Reply
) -> None:
    model.rules = [Rule(answer)]

    with anyio.fail_after(30):
        waited = await plain.call_tool("delegate", CALL)
        polled = await client.call_tool("delegate", CALL)

    assert without_ids(polled) == without_ids(waited)


async def test_a_failure_names_its_tool_also_when_it_is_told_later(client: Client, model: ModelServer) -> None:
    model.rules = [Rule("noted", when={"user_contains": "remember"}), Rule(Reply(fault=Fault(status=401)))]
    with anyio.fail_after(30):
        session = facts_of(await client.call_tool("delegate", {**CALL, "prompt": "remember 42"}))["session"]
        failed = await client.call_tool("fork_session", {"session_id": session, "prompt": "what was it?"})

    assert text_of(failed).startswith("Error executing tool fork_session: helper failed: ")
    assert error_of(failed)["code"] == "authentication"


async def test_what_is_refused_at_once_is_no_task(rt: Runtime, client: Client) -> None:
    refused = await client.session.call_tool("delegate", {**CALL, "agent": "nobody"}, allow_claimed=True)
    wrong = await client.session.call_tool("delegate", {"agent": "helper"}, allow_claimed=True)

    assert isinstance(refused, CallToolResult)
    assert error_of(refused)["code"] == "agent_not_found"
    assert isinstance(wrong, CallToolResult)
    assert "prompt is missing" in text_of(wrong)
    assert await rt.store.runs() == []


async def test_cancelling_twice(rt: Runtime, client: Client, model: ModelServer) -> None:
    model.rules = [Rule(Gate())]
    with anyio.fail_after(20):
        task_id = (await start(client)).task_id
        await model.wait_for("slow work")
        acks = [await ask(client, "tasks/cancel", task_id) for _ in range(2)]
        await wait(rt, task_id)
        acks.append(await ask(client, "tasks/cancel", task_id))
        done = await get(client, task_id)

    assert [without_meta(ack) for ack in acks] == [{}] * 3
    assert done["status"] == "cancelled"
    assert "result" not in done
    assert done["statusMessage"].startswith(f'helper: cancelled; run_wait(["{task_id}"]) has what it had said')


def without_meta(answer: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in answer.items() if key != "_meta"}


async def test_an_update_nobody_waits_for_is_acknowledged(client: Client, model: ModelServer) -> None:
    model.rules = [Rule("ok")]
    task_id = (await start(client)).task_id
    ack = await ask(client, "tasks/update", task_id, inputResponses={"name": {"action": "accept", "content": {}}})
    assert without_meta(ack) == {}


# -- several runs, and plans --------------------------------------------------------------------------------


MANY = {"tasks": [{"agent": "helper", "prompt": "one"}, {"agent": "worker", "prompt": "two"}]}


@pytest.mark.parametrize("join", ["all_done", "all_ok"])
async def test_several_runs_are_one_task(client: Client, plain: Client, model: ModelServer, join: str) -> None:
    refused = Rule(Reply(fault=Fault(status=401, message="bad key")), when={"user_contains": "two"})
    model.rules = [Rule("the first", when={"user_contains": "one"}), refused]

    with anyio.fail_after(40):
        waited = await plain.call_tool("delegate_many", {**MANY, "join": join})
        polled = await client.call_tool("delegate_many", {**MANY, "join": join})

    assert polled.is_error is (join == "all_ok")
    if join == "all_done":  # of the others, one that was cancelled may have answered before
        assert without_ids(polled) == without_ids(waited)
        assert text_of(polled).startswith("1 succeeded, 1 failed\n\n--- helper ")


async def test_a_task_of_several_runs_tells_how_far_they_are(
    rt: Runtime, client: Client, model: ModelServer
) -> None:
    gate = Gate()
    model.rules = [Rule("the first", when={"user_contains": "one"}), Rule(gate)]
    with anyio.fail_after(30):
        handle = await client.session.call_tool("delegate_many", MANY, allow_claimed=True)
        assert isinstance(handle, TaskHandle)
        [one, two], join = run_tasks.runs_of(handle.task_id)
        await wait(rt, one)
        await model.wait_for("two")
        working = await get(client, handle.task_id)
        await ask(client, "tasks/cancel", handle.task_id)
        await wait(rt, two)
        done = await get(client, handle.task_id)

    assert join == "all_done"
    assert working["status"] == "working"
    assert working["statusMessage"].startswith("1 of 2 done; worker: ")
    # What one of them has answered is an answer of the call.
    assert done["status"] == "completed"
    text = text_of(CallToolResult.model_validate(done["result"]))
    assert text.startswith("1 succeeded, 1 cancelled\n\n--- helper ")


async def test_a_task_whose_runs_are_all_cancelled_is_cancelled(rt: Runtime, client: Client) -> None:
    runs = [a_run(rt, status="cancelled") for _ in range(2)]
    for run in runs:
        await rt.store.create_run(run)
    task = await get(client, group_id([run.id for run in runs], "all_done"))
    assert (task["status"], "result" in task) == ("cancelled", False)


async def test_long_answers_of_several_runs_share_the_room(rt: Runtime, client: Client) -> None:
    error = {"code": "timeout", "message": "it took too long", "retryable": True}
    long = a_run(rt, text="first" + "y" * 200_000)
    failed = a_run(rt, text="second" + "z" * 200_000, status="failed", error=error)
    for run in (long, failed):
        await rt.store.create_run(run)

    task = await get(client, group_id([long.id, failed.id], "all_done"))

    text = text_of(CallToolResult.model_validate(task["result"]))
    assert 90_000 < len(text) <= run_tasks.RESULT_CHARS
    one, two = text.split("\n\n--- ")[1:]
    assert one.splitlines()[1].startswith("firsty")
    assert one.splitlines()[-1].startswith(f"[run_id={long.id} status=succeeded ")
    assert two.splitlines()[1].startswith("secondz")
    assert two.splitlines()[-2].startswith(f"[run_id={failed.id} status=failed ")
    assert '"code":"timeout"' in two.splitlines()[-1]


@pytest.mark.parametrize(("count", "fits"), [(1, True), (7, True), (8, False)])
async def test_runs_too_many_for_an_id_are_waited_for(rt: Runtime, count: int, fits: bool) -> None:
    """The limit is what Claude Code takes: it would not know of a task with a longer id."""
    runs = [a_run(rt) for _ in range(count)]
    for run in runs:
        await rt.store.create_run(run)
    server = MCPServer("a server", extensions=[Tasks(RunTasks(rt))])

    @server.tool(structured_output=False)
    async def begin(ctx: Context) -> str:
        """Would like to be a task."""
        return "" if answer_with_task(ctx, group_id([run.id for run in runs], "all_done")) else "too many"

    async with Client(server, extensions=[KnowsTasks()]) as client:
        answer = await client.session.call_tool("begin", {}, allow_claimed=True)

    if fits:
        assert isinstance(answer, TaskHandle)
        assert len(answer.task_id) <= 128
    else:
        assert isinstance(answer, CallToolResult)
        assert text_of(answer) == "too many"


async def test_ids_of_several_runs_that_are_none(rt: Runtime, client: Client) -> None:
    run = a_run(rt)
    await rt.store.create_run(run)
    for task_id in (
        f"all_done.{new_run_id()}",
        f"all_done.{run.id}.{new_run_id()}",
        f"never.{run.id}",
        "all_done.",
    ):
        with pytest.raises(MCPError, match="no task") as refusal:
            await get(client, task_id)
        assert refusal.value.code == -32602


async def test_a_plan_is_a_task(rt: Runtime, client: Client, plain: Client, model: ModelServer) -> None:
    model.rules = [Rule("the answer")]
    plan = "version: 1\nname: small\nsteps:\n  - id: first\n    agent: helper\n    prompt: do it\n"
    (rt.config.project_dir / "small.yaml").write_text(plan)

    with anyio.fail_after(40):
        waited = await plain.call_tool("run_plan", {"plan": "small.yaml"})
        polled = await client.call_tool("run_plan", {"plan": "small.yaml"})

    assert not waited.is_error, text_of(waited)
    assert without_ids(polled) == without_ids(waited)
    assert text_of(polled).startswith("first (helper) succeeded run_id=")


# -- who is answered with a task ----------------------------------------------------------------------------


async def test_a_client_that_knows_no_tasks_waits(plain: Client, model: ModelServer) -> None:
    model.rules = [Rule("the answer")]
    assert text_of(await plain.call_tool("delegate", CALL)).startswith("the answer\n")


async def test_an_older_protocol_has_no_tasks(rt: Runtime, model: ModelServer) -> None:
    model.rules = [Rule("the answer")]
    async with Client(build_server(rt), mode="legacy", extensions=[advertise(EXTENSION_ID)]) as client:
        result = await client.call_tool("delegate", CALL)
        with pytest.raises(MCPError, match="Method not found"):
            await get(client, facts_of(result)["run"])


@pytest.mark.parametrize("options", [{"wait_s": 0}, {"wait_s": 30}, {"cancel_on_disconnect": True}])
async def test_a_call_that_says_how_to_wait_is_taken_at_its_word(
    client: Client, model: ModelServer, options: dict[str, Any]
) -> None:
    model.rules = [Rule("the answer")]
    with anyio.fail_after(20):
        result = await client.session.call_tool("delegate", {**CALL, **options}, allow_claimed=True)
    assert isinstance(result, CallToolResult)
    assert text_of(result).startswith("run_id=" if options == {"wait_s": 0} else "the answer\n")


@pytest.mark.parametrize("method", ["tasks/get", "tasks/update", "tasks/cancel"])
async def test_only_a_client_that_declares_it_may_use_the_extension(
    rt: Runtime, plain: Client, method: str
) -> None:
    run = a_run(rt)
    await rt.store.create_run(run)
    with pytest.raises(MCPError) as refusal:
        await ask(plain, method, run.id, inputResponses={})
    assert refusal.value.code == -32021
    assert refusal.value.error.data == {"requiredCapabilities": {"extensions": {EXTENSION_ID: {}}}}


async def test_only_who_declares_the_extension_may_ask_to_be_told_of_tasks(rt: Runtime, url: str) -> None:
    async def listen(extensions: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """The status of the answer, and its first message."""
        meta = {
            "io.modelcontextprotocol/protocolVersion": "2026-07-28",
            "io.modelcontextprotocol/clientCapabilities": {"extensions": extensions},
        }
        params = {"_meta": meta, "notifications": {"taskIds": [new_run_id()]}}
        headers = {
            "authorization": f"Bearer {TOKEN}",
            "accept": "application/json, text/event-stream",
            "mcp-protocol-version": "2026-07-28",
            "mcp-method": "subscriptions/listen",
        }
        body = {"jsonrpc": "2.0", "id": 1, "method": "subscriptions/listen", "params": params}
        async with httpx2.AsyncClient() as http, http.stream("POST", url, json=body, headers=headers) as answer:
            async for line in answer.aiter_lines():
                if (text := line.removeprefix("data: ")).startswith("{"):
                    return answer.status_code, json.loads(text)
        raise AssertionError("no message came")

    with anyio.fail_after(20):
        status, refused = await listen({})
        _, acknowledged = await listen({EXTENSION_ID: {}})

    assert (status, refused["error"]["code"]) == (400, -32021)
    assert acknowledged["method"] == "notifications/subscriptions/acknowledged"
    assert "taskIds" not in acknowledged["params"]["notifications"]


@pytest.mark.parametrize("kind", [Unnamed, Misnamed])
async def test_the_header_names_the_task(rt: Runtime, client: Client, kind: type[TaskRequest]) -> None:
    run = a_run(rt)
    await rt.store.create_run(run)
    for method in ("tasks/get", "tasks/update", "tasks/cancel"):
        with pytest.raises(MCPError, match="mcp-name header does not match") as refusal:
            await ask(client, method, run.id, kind, inputResponses={}, another=new_run_id())
        assert refusal.value.code == -32020
    assert (await get(client, run.id))["status"] == "completed"


async def test_without_headers_there_is_nothing_to_compare(rt: Runtime) -> None:
    """As over stdio, which has none."""
    run = a_run(rt)
    await rt.store.create_run(run)
    async with Client(build_server(rt), extensions=[KnowsTasks()]) as client:
        assert (await ask(client, "tasks/get", run.id, Unnamed))["status"] == "completed"


async def test_an_unknown_task(rt: Runtime, client: Client) -> None:
    run = a_run(rt)
    await rt.store.create_run(run)
    for task_id in (new_run_id(), run.id[:12], "", "a task"):
        for method in ("tasks/get", "tasks/update", "tasks/cancel"):
            with pytest.raises(MCPError, match=f"no task '{task_id}' is known here") as refusal:
                await ask(client, method, task_id, inputResponses={})
            assert refusal.value.code == -32602


async def test_a_run_sees_the_tasks_below_it_alone(rt: Runtime, url: str, model: ModelServer) -> None:
    gate = Gate()
    model.rules = [Rule(gate, when={"user_contains": "outer"}), Rule("inner answer")]
    stranger = a_run(rt)
    await rt.store.create_run(stranger)
    outer = await submit(rt, Task(agent="worker", prompt="outer"))
    token = rt.tokens.issue("a process")
    rt.tokens.assign("a process", outer)

    with anyio.fail_after(30):
        async with connected(url, token, KnowsTasks()) as agent:
            inner = await start(agent)
            await wait(rt, inner.task_id)
            done = await get(agent, inner.task_id)
            for method in ("tasks/get", "tasks/update", "tasks/cancel"):
                for foreign in (stranger.id, outer):
                    with pytest.raises(MCPError, match="no task") as refusal:
                        await ask(agent, method, foreign, inputResponses={})
                    assert refusal.value.code == -32602
        gate.opened.set()
        outcome = await wait(rt, outer)

    assert outcome.ok
    assert (await rt.store.run(inner.task_id)).parent_id == outer
    assert text_of(CallToolResult.model_validate(done["result"])).startswith("inner answer\n")


# -- what a task outlives -----------------------------------------------------------------------------------


async def test_a_task_outlives_its_client(rt: Runtime, url: str, model: ModelServer) -> None:
    gate = Gate()
    model.rules = [Rule(gate)]
    with anyio.fail_after(20):
        async with connected(url, TOKEN, KnowsTasks()) as first:
            task_id = (await start(first)).task_id
            await model.wait_for("slow work")
        gate.opened.set()
        assert (await wait(rt, task_id)).ok
        async with connected(url, TOKEN, KnowsTasks()) as second:
            done = await get(second, task_id)

    assert text_of(CallToolResult.model_validate(done["result"])).startswith("at last\n")


async def test_a_task_outlives_its_server(runtime: Open, model: ModelServer) -> None:
    """The run that was going on when the server stopped is told as what it was: cancelled by that."""
    gate = Gate()
    model.rules = [Rule("the answer", when={"user_contains": "quick"}), Rule(gate)]
    with anyio.fail_after(40):
        async with (
            runtime() as rt,
            open_doors(rt, token=TOKEN) as doors,
            connected(doors.url, TOKEN, KnowsTasks()) as client,
        ):
            ended = (await start(client, prompt="quick")).task_id
            await wait(rt, ended)
            before = await get(client, ended)
            going_on = (await start(client)).task_id
            await model.wait_for("slow work")
        async with (
            runtime() as rt,
            open_doors(rt, token=TOKEN) as doors,
            connected(doors.url, TOKEN, KnowsTasks()) as client,
        ):
            after = await get(client, ended)
            stopped = await get(client, going_on)

    assert text_of(CallToolResult.model_validate(after["result"])).startswith("the answer\n")
    changing = ("_meta", "pollIntervalMs")
    assert {k: v for k, v in after.items() if k not in changing} == {
        k: v for k, v in before.items() if k not in changing
    }
    assert stopped["status"] == "cancelled"


async def test_a_run_of_another_process_is_a_task_too(rt: Runtime, client: Client) -> None:
    run = a_run(rt, status="running", text="", input_tokens=1234)
    await rt.store.create_run(run)
    task = await get(client, run.id)
    assert (task["status"], task["statusMessage"]) == ("working", "helper: in another process · 1,234 tokens")


async def test_a_parked_run_says_until_when(rt: Runtime, client: Client) -> None:
    run = a_run(rt, status="waiting", text="", resume_at_us=1_900_000_000_000_000)
    await rt.store.create_run(run)
    task = await get(client, run.id)
    assert task["status"] == "working"
    assert "waiting until 2030-03-17T17:46:40.000Z for the end of a usage limit" in task["statusMessage"]


@pytest.mark.parametrize("status", ["timed_out", "interrupted", "failed"])
async def test_a_run_that_failed_is_a_completed_task(rt: Runtime, client: Client, status: str) -> None:
    error = {"code": "timeout", "message": "it took too long", "retryable": True}
    run = a_run(rt, status=status, text="so far", error=error)
    await rt.store.create_run(run)
    task = await get(client, run.id)
    result = CallToolResult.model_validate(task["result"])
    assert task["status"] == "completed"
    assert text_of(result) == f"Error executing tool delegate: {results.failure('helper', run.outcome())}"
    assert error_of(result)["partial_text"] == "so far"


async def test_a_call_from_below_a_run_is_told_with_the_tools_own_name(
    rt: Runtime, client: Client, model: ModelServer
) -> None:
    """A shim below an agent: the client is trusted, and acts for the run."""
    model.rules = [Rule(Gate(), when={"user_contains": "outer"}), Rule(Reply(fault=Fault(status=401)))]
    outer = await submit(rt, Task(agent="worker", prompt="outer"))
    with anyio.fail_after(20):
        failed = await client.call_tool("delegate", CALL, meta={CALLER_KEY: {"run_id": outer}})
    assert text_of(failed).startswith("Error executing tool delegate: helper failed: ")
    assert (await rt.store.run(error_of(failed)["run_id"])).parent_id == outer


# -- what it looks like -------------------------------------------------------------------------------------


async def test_a_long_answer_is_cut_and_says_how_to_have_the_rest(rt: Runtime, client: Client) -> None:
    run = a_run(rt, text="first" + "y" * 200_000 + "last")
    await rt.store.create_run(run)

    result = CallToolResult.model_validate((await get(client, run.id))["result"])
    whole = await client.call_tool("run_wait", {"run_ids": [run.id]})

    said, note, facts = text_of(result).split("\n")
    assert len(text_of(result)) == run_tasks.RESULT_CHARS
    assert said.startswith("firsty")
    assert note == f'[… 200,009 characters in all: run_wait(["{run.id}"]) has the whole answer]'
    assert text_of(whole) == f"{run.text}\n{facts}"


def test_an_answer_that_fits_is_left_alone() -> None:
    text = "y" * run_tasks.RESULT_CHARS
    assert run_tasks.shortened(text, "a" * 16, run_tasks.RESULT_CHARS, lines=1) == text


def test_the_older_the_run_the_less_often_it_is_asked_for() -> None:
    ages = [0, 59, 60, 599, 600, 86_400]
    assert [run_tasks.poll_ms(age) for age in ages] == [1000, 1000, 5000, 5000, 10_000, 10_000]


def test_a_message_leaves_out_what_is_not_known() -> None:
    assert run_tasks.message("helper: thinking", [0], [None]) == "helper: thinking"
    assert run_tasks.message("helper: thinking", [1200], [0.5]) == "helper: thinking · 1,200 tokens · $0.5000"
    assert run_tasks.message("1 of 2 done", [5, 7], [0.5, None]) == "1 of 2 done · 12 tokens · $0.5000"


@pytest.mark.parametrize(
    ("status", "due"),
    [
        ("working", set()),
        ("cancelled", set()),
        ("completed", {"result"}),
        ("failed", {"error"}),
        ("input_required", {"inputRequests"}),
    ],
)
def test_a_task_carries_what_its_status_calls_for(status: Any, due: set[str]) -> None:
    payloads: dict[str, Any] = {"result": {}, "error": {}, "inputs": {}}
    state = TaskState(id="a", status=status, created_us=5000, updated_us=1000, poll_ms=1, **payloads)
    base = {"taskId", "status", "createdAt", "lastUpdatedAt", "ttlMs", "pollIntervalMs"}
    assert state.wire().keys() == base | due
    assert state.handle().keys() == base
    # A clock that was set back must not make a task older than itself.
    assert state.wire()["lastUpdatedAt"] == state.wire()["createdAt"]
