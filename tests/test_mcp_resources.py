"""Resources, prompts, and the word that they have changed, as a client of the SDK gets them."""

import json
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
from httpx2 import AsyncClient
from mcp import Client
from mcp.client.streamable_http import streamable_http_client
from mcp.client.subscriptions import PromptsListChanged, ResourcesListChanged, ResourceUpdated, Subscription
from mcp.shared.exceptions import MCPError
from mcp_types import INVALID_PARAMS, TextContent, TextResourceContents

from mcp_tools import build_server, open_door, open_doors
from mcp_tools.context import CALLER_KEY
from mcp_tools.resources import SESSION_RUNS, TEXT_CHARS
from orchestrator.delegation import delegate
from orchestrator.runtime import Runtime
from orchestrator.store import SessionRow, now_us
from orchestrator.task import Task
from orchestrator.testing import ModelServer, Rule, ToolUse
from tests.conftest import write_agent
from tests.test_claude_code import Home, home
from tests.test_mcp_tools import a_run
from tests.test_shim import serving, started

__all__ = ["home"]  # a fixture

Open = Callable[..., AbstractAsyncContextManager[Runtime]]


@pytest.fixture
async def client(rt: Runtime) -> AsyncIterator[Client]:
    async with Client(build_server(rt)) as connected:
        yield connected


@asynccontextmanager
async def over_http(url: str, token: str) -> AsyncIterator[Client]:
    async with (
        AsyncClient(headers={"Authorization": f"Bearer {token}"}) as http,
        Client(streamable_http_client(url, http_client=http)) as connected,
    ):
        yield connected


async def read(client: Client, uri: str, of: str | None = None) -> TextResourceContents:
    """The one content of a resource; ``of`` is the run that reads."""
    meta: Any = {CALLER_KEY: {"run_id": of}} if of else None
    [content] = (await client.read_resource(uri, meta=meta)).contents
    assert isinstance(content, TextResourceContents)
    assert content.uri == uri
    return content


async def read_json(client: Client, uri: str, of: str | None = None) -> Any:
    content = await read(client, uri, of)
    assert content.mime_type == "application/json"
    return json.loads(content.text)


# -- resources ----------------------------------------------------------------------------------------------


async def test_what_is_listed(client: Client) -> None:
    resources = (await client.list_resources()).resources
    templates = (await client.list_resource_templates()).resource_templates

    assert [(each.uri, each.name, each.mime_type) for each in resources] == [
        ("agents://", "agents", "application/json"),
        ("agents://helper", "helper", "application/json"),
        ("agents://worker", "worker", "application/json"),
    ]
    assert resources[1].description == "The helper of the tests"
    assert {(each.uri_template, each.mime_type) for each in templates} == {
        ("agents://{name}", "application/json"),
        ("run://{run_id}", "application/json"),
        ("trace://{run_id}", "text/plain"),
        ("session://{session_id}", "application/json"),
    }
    assert all(each.description for each in templates)


async def test_agents(rt: Runtime, client: Client) -> None:
    await rt.store.prefer("worker", "sonnet")

    everyone = await read_json(client, "agents://")
    worker = await read_json(client, "agents://worker")

    assert everyone == (await client.call_tool("list_agents", {})).structured_content
    assert (worker["model"], worker["model_from"]) == ("sonnet", "preference")
    assert worker["tools"] == ["Read", "Write", "Bash"]
    assert worker["instructions"].strip() == "You are the worker."
    assert worker["permission_mode"] == "acceptEdits"


@pytest.mark.parametrize("name", ["a b", "Zoë", "100%", "a,b?c#d", "[", ".."])
async def test_agents_of_any_name(rt: Runtime, client: Client, name: str) -> None:
    (rt.config.project_dir / "agents" / "odd.md").write_text(f"---\nname: {json.dumps(name)}\n---\nOdd.\n")
    rt.catalog.load()

    [uri] = [each.uri for each in (await client.list_resources()).resources if each.name == name]

    assert (await read_json(client, uri))["name"] == name
    assert name in [each.name for each in (await client.list_prompts()).prompts]
    assert (await client.get_prompt(name)).description == f"Hand a task to the agent {name}."


async def test_agents_of_workspaces_have_addresses_too(runtime: Open, tmp_path: Path) -> None:
    folder = tmp_path / "the team"
    (folder / ".claude" / "agents").mkdir(parents=True)
    (folder / ".claude" / "agents" / "tester.md").write_text("---\nname: tester\n---\nYou test.\n")

    async with runtime(agents__workspaces=[str(folder)]) as rt, Client(build_server(rt)) as client:
        [uri] = [each.uri for each in (await client.list_resources()).resources if each.name == "the team:tester"]
        assert uri == "agents://the%20team:tester"
        assert (await read_json(client, uri))["name"] == "the team:tester"


async def test_settings_that_may_hold_secrets_are_not_shown(rt: Runtime, client: Client) -> None:
    servers = "{there: {command: run, env: {API_KEY: swordfish-swordfish}}}"
    write_agent(rt.config.project_dir, "keeper", mcpServers=servers)
    rt.catalog.load()
    assert rt.catalog.get("keeper").mcp_servers

    assert "swordfish" not in (await read(client, "agents://keeper")).text


async def test_a_real_run_its_trace_and_its_session(rt: Runtime, client: Client, model: ModelServer) -> None:
    model.rules = [Rule("The answer.")]
    outcome = await delegate(rt, Task(agent="helper", prompt="The question."))

    run = await read_json(client, f"run://{outcome.run_id}")
    trace = await read(client, f"trace://{outcome.run_id}")
    session = await read_json(client, f"session://{outcome.session_id}")

    assert (run["run_id"], run["status"], run["prompt"], run["text"]) == (
        outcome.run_id,
        "succeeded",
        "The question.",
        "The answer.",
    )
    assert run["cost_usd"] == outcome.cost_usd
    assert run["error"] is None
    assert trace.mime_type == "text/plain"
    assert f"\n{outcome.run_id} helper succeeded " in trace.text
    assert (session["session_id"], session["turns"]) == (outcome.session_id, 1)
    assert [each["run_id"] for each in session["runs"]] == [outcome.run_id]


async def test_long_texts_say_how_to_have_the_rest(rt: Runtime, client: Client) -> None:
    run = a_run(rt, text="t" * (TEXT_CHARS + 1), prompt="p" * TEXT_CHARS)
    await rt.store.create_run(run)

    shown = await read_json(client, f"run://{run.id}")

    assert (len(shown["text"]), shown["text_chars"]) == (TEXT_CHARS, TEXT_CHARS + 1)
    assert shown["text_whole"] == f'get_trace({{"run_id":"{run.id}","view":"run"}})'
    assert (len(shown["prompt"]), "prompt_chars" in shown) == (TEXT_CHARS, False)


async def test_a_session_of_many_turns_says_how_to_have_the_rest(rt: Runtime, client: Client) -> None:
    session = SessionRow(id="s", backend="claude", agent="helper", cwd="/", home="/", created_us=1, updated_us=1)
    await rt.store.begin_session(session)
    for _ in range(SESSION_RUNS + 1):
        await rt.store.create_run(a_run(rt, session_id="s"))

    shown = await read_json(client, "session://s")

    assert len(shown["runs"]) == SESSION_RUNS
    assert shown["more"] == "query_traces(session_id='s')"


MISSING = [
    ("agents://helpr", "no agent is called 'helpr'; did you mean 'helper'?"),
    ("run://0123456789abcdee", "did you mean 0123456789abcdef (helper, succeeded)?"),
    ("run://none", "no run 'none'"),
    ("trace://ffffffffffffffff", "no run 'ffffffffffffffff'"),
    ("session://none", "no session 'none' is known here"),
    ("agents://../x", "Unknown resource"),
    ("plan://x", "Unknown resource"),
]


async def test_what_is_not_found_is_told_as_the_protocol_has_it(rt: Runtime, client: Client) -> None:
    await rt.store.create_run(a_run(rt, id="0123456789abcdef"))
    for uri, words in MISSING:
        with pytest.raises(MCPError) as caught:
            await client.read_resource(uri)
        assert caught.value.error.code == INVALID_PARAMS
        assert words in caught.value.error.message
        assert caught.value.error.data == {"uri": uri}


async def test_an_agent_reads_its_own_tree_only(rt: Runtime, client: Client) -> None:
    def in_session(session: str) -> SessionRow:
        return SessionRow(id=session, backend="b", agent="helper", cwd="/", home="/", created_us=1, updated_us=1)

    stranger = a_run(rt, session_id="theirs")
    project = str(rt.config.project_dir)
    me = a_run(rt, status="running", started_us=now_us(), session_id="mine", project=project)
    child = a_run(rt, parent_id=me.id, root_id=me.id, depth=2, session_id="childs")
    for run in (stranger, me, child):
        await rt.store.create_run(run)
        await rt.store.begin_session(in_session(run.session_id or ""))

    for uri in (f"run://{me.id}", f"run://{child.id}", "session://mine", "session://childs", "agents://helper"):
        assert await read(client, uri, of=me.id)
    assert stranger.id not in (await read(client, f"trace://{me.id}", of=me.id)).text
    for uri, unknown in (
        (f"run://{stranger.id}", "run://ffffffffffffffff"),
        (f"trace://{stranger.id}", "trace://ffffffffffffffff"),
        ("session://theirs", "session://nobodys"),
    ):
        assert await read(client, uri)  # a person may
        told = []
        for each in (uri, unknown):
            with pytest.raises(MCPError) as caught:
                await read(client, each, of=me.id)
            told.append(caught.value.error.message.replace(each.split("//")[1], "…"))
        assert told[0] == told[1]


async def test_a_process_that_works_for_no_run_reads_nothing(runtime: Open, model: ModelServer) -> None:
    """Through the real door with a run's own token: a resource is as closed as a tool."""
    async with runtime(open_door=open_door) as rt:
        run = a_run(rt)
        await rt.store.create_run(run)
        url, token = await rt.endpoint(), rt.tokens.issue("idle")
        assert url
        async with over_http(url, token) as client:
            with pytest.raises(MCPError) as caught:
                await client.read_resource(f"run://{run.id}")
            rt.tokens.assign("idle", run.id)
            assert (await read_json(client, f"run://{run.id}"))["run_id"] == run.id

    assert "this process works for no run now" in caught.value.error.message


async def test_a_real_agent_reads_resources(runtime: Open, project: Path, model: ModelServer) -> None:
    """The CLI's own tool for resources, behind the door, with the run's own token."""
    write_agent(project, "reader", tools="ReadMcpResourceTool, mcp__orchestrator", body="You read.")
    call = ToolUse("ReadMcpResourceTool", {"server": "orchestrator", "uri": "agents://worker"})
    model.rules = [
        Rule(call, when={"system": "You read", "tool_result": False}),
        Rule(lambda request: request.tool_results[0].text, when={"system": "You read"}),
    ]
    with anyio.fail_after(60):
        async with runtime(open_door=open_door) as rt:
            outcome = await delegate(rt, Task(agent="reader", prompt="read"))

    assert outcome.ok, outcome.error
    assert "You are the worker." in outcome.text


async def test_a_shim_below_an_agent_reads_what_the_agent_may(rt: Runtime, environ: dict[str, str]) -> None:
    """A client started from an agent's shell says for which run, with resources as with tools."""
    me, stranger = a_run(rt, status="running", started_us=now_us()), a_run(rt)
    for run in (me, stranger):
        await rt.store.create_run(run)

    async with serving(rt), started(rt.config, environ, ORCHESTRATOR_RUN_ID=me.id) as shim:
        own = await shim.ask("resources/read", {"uri": f"run://{me.id}"})
        foreign = await shim.ask("resources/read", {"uri": f"run://{stranger.id}"})

    assert json.loads(own["result"]["contents"][0]["text"])["run_id"] == me.id
    assert foreign["error"]["code"] == INVALID_PARAMS


# -- prompts ------------------------------------------------------------------------------------------------


async def test_a_prompt_for_each_agent(client: Client) -> None:
    prompts = (await client.list_prompts()).prompts

    assert [(each.name, each.description, each.arguments) for each in prompts] == [
        ("helper", "The helper of the tests", None),
        ("worker", "The worker of the tests", None),
    ]
    told = await client.get_prompt("worker")
    [message] = told.messages
    assert message.role == "user"
    assert isinstance(message.content, TextContent)
    assert 'call the orchestrator\'s tool delegate with agent "worker"' in message.content.text


async def test_an_unknown_prompt_is_answered_with_near_ones(client: Client) -> None:
    with pytest.raises(MCPError) as caught:
        await client.get_prompt("workr")
    assert caught.value.error.code == INVALID_PARAMS
    assert caught.value.error.message == "there is no prompt 'workr'; did you mean 'worker'?"


async def test_a_person_types_the_prompt_in_claude_code(home: Home, model: ModelServer) -> None:
    """The whole task reaches the model beside our words, though it has blanks in it."""
    model.rules = [Rule("Understood.")]

    session = await home.claude(home.stdio(), "/mcp__orchestrator__helper mend the fence now")

    assert session.answer == "Understood."
    said = json.dumps(model.journal[0].body["messages"])
    assert "tool delegate with agent" in said
    assert "mend the fence now" in said


# -- changes ------------------------------------------------------------------------------------------------


async def heard(subscription: Subscription, *, until: type[Any], uri: str | None = None) -> list[Any]:
    """What a client hears, up to an event of that kind (and resource)."""
    told = []
    with anyio.fail_after(20):
        async for event in subscription:
            told.append(event)
            if isinstance(event, until) and getattr(event, "uri", None) == uri:
                return told
    raise AssertionError("the stream ended")


async def test_clients_hear_of_agents_that_come_change_and_go(rt: Runtime, client: Client) -> None:
    wanted = {"prompts_list_changed": True, "resources_list_changed": True, "tools_list_changed": True}
    project, uri = rt.config.project_dir, "agents://newcomer"
    async with client.listen(**wanted, resource_subscriptions=["agents://", uri]) as subscription:
        path = write_agent(project, "newcomer")
        came = await heard(subscription, until=ResourceUpdated, uri=uri)
        assert {type(event) for event in came} == {PromptsListChanged, ResourcesListChanged, ResourceUpdated}
        assert "newcomer" in [each.name for each in (await client.list_prompts()).prompts]
        assert uri in [each.uri for each in (await client.list_resources()).resources]

        write_agent(project, "newcomer", body="Other instructions.")
        changed = await heard(subscription, until=ResourceUpdated, uri=uri)
        assert {type(event) for event in changed} == {ResourceUpdated}, "the lists read as before"
        assert "Other instructions." in (await read(client, uri)).text

        path.unlink()
        gone = await heard(subscription, until=ResourceUpdated, uri=uri)
        assert PromptsListChanged in {type(event) for event in gone}
        assert "newcomer" not in [each.name for each in (await client.list_prompts()).prompts]


async def test_two_listeners_and_one_that_leaves(rt: Runtime, client: Client) -> None:
    async with client.listen(prompts_list_changed=True) as stays:
        async with client.listen(prompts_list_changed=True) as leaves:
            write_agent(rt.config.project_dir, "first")
            assert len(await heard(stays, until=PromptsListChanged)) == 1
            assert len(await heard(leaves, until=PromptsListChanged)) == 1
        write_agent(rt.config.project_dir, "second")
        assert len(await heard(stays, until=PromptsListChanged)) == 1


async def test_nobody_watches_when_nobody_listens(rt: Runtime, client: Client) -> None:
    assert not rt.events.watched
    for _ in range(2):
        async with client.listen(prompts_list_changed=True):
            assert rt.events.watched
        with anyio.fail_after(10):
            while rt.events.watched:
                await anyio.lowlevel.checkpoint()


async def test_list_changed_through_the_door(runtime: Open, project: Path, model: ModelServer) -> None:
    """Over HTTP, as Claude Code listens."""
    token = "t" * 32
    async with runtime() as rt, open_doors(rt, token=token) as doors, over_http(doors.url, token) as client:
        async with client.listen(prompts_list_changed=True) as subscription:
            write_agent(project, "newcomer")
            assert await heard(subscription, until=PromptsListChanged)
        names = [each.name for each in (await client.list_prompts()).prompts]

    assert names == ["helper", "newcomer", "worker"]
