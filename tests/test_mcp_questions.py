"""Questions of runs, as MCP clients see them: told and answered in words, or as forms of a task."""

import re
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import anyio
import pytest
from mcp import Client
from mcp_types import CallToolResult, ElicitRequestParams, ElicitResult, Implementation

from mcp_tools import build_server
from mcp_tools.context import CALLER_KEY
from orchestrator.delegation import wait
from orchestrator.runtime import Runtime
from orchestrator.task import Task
from orchestrator.testing import ModelServer
from tests.test_mcp_tasks import KnowsTasks, ask, get, start
from tests.test_mcp_tools import error_of, facts_of, text_of
from tests.test_questions import agents, asked, chooser, mark, notes, seen

__all__ = ["agents", "chooser", "mark"]

Open = Callable[..., AbstractAsyncContextManager[Runtime]]

ME = Implementation(name="the test", version="1")
MAKE = {"agent": "maker", "prompt": "make it"}
PAINT = {"agent": "chooser", "prompt": "paint it"}


@pytest.fixture
async def rt(runtime: Open) -> AsyncIterator[Runtime]:
    async with runtime(questions__policy="ask") as opened:
        yield opened


@pytest.fixture
async def client(rt: Runtime) -> AsyncIterator[Client]:
    async with Client(build_server(rt), client_info=ME) as connected:
        yield connected


async def nobody(ctx: Any, params: ElicitRequestParams) -> ElicitResult:
    """Has a client say that it can show forms; those of tasks do not come this way."""
    raise AssertionError("nothing is asked within a request")


@pytest.fixture
async def knowing(rt: Runtime) -> AsyncIterator[Client]:
    """A client that knows tasks and can show forms."""
    knows = [KnowsTasks()]
    async with Client(build_server(rt), client_info=ME, extensions=knows, elicitation_callback=nobody) as connected:
        yield connected


def ids_of(result: CallToolResult) -> dict[str, str]:
    """The question in what a tool has told."""
    assert not result.is_error
    found = re.search(
        r"^run_id=(?P<run_id>\w{16}) question_id=(?P<question_id>\w+) ", text_of(result), re.MULTILINE
    )
    assert found is not None, text_of(result)
    return found.groupdict()


# -- in words -----------------------------------------------------------------------------------------------


async def test_a_call_that_waits_is_told_and_goes_on_after_the_answer(client: Client, mark: Path) -> None:
    with anyio.fail_after(30):
        early = await client.call_tool("delegate", MAKE)
        ids = ids_of(early)
        again = await client.call_tool("run_wait", {"run_ids": [ids["run_id"]]})
        answered = await client.call_tool("run_answer", {**ids, "allow": True})
        done = await client.call_tool("run_wait", {"run_ids": [ids["run_id"]]})

    assert "still running (maker: waits for an answer" in text_of(early)
    assert f'asks: may it use Bash with {{"command": "touch {mark}"' in text_of(early)
    assert "run_answer(run_id, question_id, allow=true or false)" in text_of(early)
    assert ids_of(again) == ids, "it is told again until it is answered"
    assert text_of(answered) == f'allowed; the run goes on: call run_wait(["{ids["run_id"]}"])'
    assert facts_of(done)["status"] == "succeeded"
    assert mark.exists()


async def test_who_waits_already_is_told_at_once(rt: Runtime, client: Client, mark: Path) -> None:
    with anyio.fail_after(30):
        result = await client.call_tool("delegate", {**MAKE, "wait_s": 25})
        assert ids_of(result)["question_id"] in rt.live[ids_of(result)["run_id"]].questions


async def test_a_denial_with_its_reason(client: Client, mark: Path) -> None:
    with anyio.fail_after(30):
        ids = ids_of(await client.call_tool("delegate", MAKE))
        await client.call_tool("run_answer", {**ids, "allow": False, "message": "Not today."})
        done = await client.call_tool("run_wait", {"run_ids": [ids["run_id"]]})

    assert "Not today." in text_of(done)
    assert not mark.exists()


@pytest.mark.parametrize("words", ["Blue", {"Which colour?": "Blue"}])
async def test_a_question_of_the_agent(client: Client, chooser: None, words: Any) -> None:
    with anyio.fail_after(30):
        early = await client.call_tool("delegate", PAINT)
        ids = ids_of(early)
        unclear = await client.call_tool("run_answer", {**ids, "allow": True})
        answered = await client.call_tool("run_answer", {**ids, "answer": words})
        done = await client.call_tool("run_wait", {"run_ids": [ids["run_id"]]})

    assert "Which colour? [one of 'Red' (warm), 'Blue' (cold), or words of your own]" in text_of(early)
    assert error_of(unclear)["code"] == "question"
    assert text_of(answered).startswith("answered; ")
    assert '"Which colour?"="Blue"' in text_of(done)


async def test_answers_nobody_waits_for(client: Client, mark: Path) -> None:
    with anyio.fail_after(30):
        ids = ids_of(await client.call_tool("delegate", MAKE))
        unknown = await client.call_tool("run_answer", {**ids, "question_id": "none", "allow": True})
        await client.call_tool("run_answer", {**ids, "allow": False})
        late = await client.call_tool("run_answer", {**ids, "allow": True})
        await client.call_tool("run_wait", {"run_ids": [ids["run_id"]]})
        over = await client.call_tool("run_answer", {**ids, "allow": True})

    assert error_of(unknown)["code"] == error_of(late)["code"] == error_of(over)["code"] == "question_not_found"
    assert "settled before, by the test/1" in text_of(late)
    assert "has ended" in text_of(over)
    assert not mark.exists()


async def test_an_agent_answers_neither_its_own_questions_nor_those_of_others(
    rt: Runtime, client: Client, mark: Path
) -> None:
    maker = Task(agent="maker", prompt="make it")
    async with asked(rt, maker) as (run_id, question), asked(rt, maker) as (other, _):
        for caller in (run_id, other):
            words = {"run_id": run_id, "question_id": question.id, "allow": True}
            refused = await client.call_tool("run_answer", words, meta={CALLER_KEY: {"run_id": caller}})
            assert error_of(refused)["code"] == "run_not_found"
        assert question.id in rt.live[run_id].questions
    assert not mark.exists()


async def test_several_runs_that_ask(client: Client, mark: Path, model: ModelServer) -> None:
    with anyio.fail_after(40):
        early = await client.call_tool("delegate_many", {"tasks": [MAKE, {**MAKE, "prompt": "and again"}]})
        runs = re.findall(r"^--- maker (\w+) ---", text_of(early), re.MULTILINE)
        denied = set()
        while len(denied) < 2:
            told = await client.call_tool("run_wait", {"run_ids": runs})
            ids = ids_of(told)
            await client.call_tool("run_answer", {**ids, "allow": False})
            denied.add(ids["run_id"])
        done = await client.call_tool("run_wait", {"run_ids": runs})

    assert denied == set(runs)
    assert text_of(done).count("status=succeeded") == 2


async def test_a_plan_asks_whoever_runs_it(client: Client, project: Path, mark: Path) -> None:
    step = "{id: only, agent: maker, prompt: make it}"
    (project / "plan.yaml").write_text(f"version: 1\nname: one\nsteps:\n  - {step}\n")
    with anyio.fail_after(40):
        early = await client.call_tool("run_plan", {"plan": str(project / "plan.yaml")})
        ids = ids_of(early)
        await client.call_tool("run_answer", {**ids, "allow": True})
        [plan] = re.findall(r'run_wait\(\["(\w+)"\]\)', text_of(early))
        done = await client.call_tool("run_wait", {"run_ids": [plan]})

    assert plan != ids["run_id"]
    assert not done.is_error, text_of(done)
    assert mark.exists()


# -- as forms of a task -------------------------------------------------------------------------------------


async def opened_form(rt: Runtime, client: Client, **call: str) -> tuple[str, str, dict[str, Any]]:
    """A task that has asked something: its id, the id of its question, and the form."""
    with rt.events.watch() as watcher:
        task_id = (await start(client, **call)).task_id
        await seen(watcher, "run.asked")
    task = await get(client, task_id)
    assert task["status"] == "input_required"
    [(question_id, request)] = task["inputRequests"].items()
    assert request["method"] == "elicitation/create"
    return task_id, question_id, request["params"]


async def filled(client: Client, task_id: str, question_id: str, response: Any) -> None:
    assert await ask(client, "tasks/update", task_id, inputResponses={question_id: response}) == {}


async def ended(rt: Runtime, client: Client, task_id: str) -> str:
    await wait(rt, task_id)
    task = await get(client, task_id)
    assert task["status"] == "completed"
    return text_of(CallToolResult.model_validate(task["result"]))


async def test_a_task_asks_for_permission(rt: Runtime, knowing: Client, mark: Path) -> None:
    with anyio.fail_after(30):
        task_id, question_id, form = await opened_form(rt, knowing, **MAKE)
        await filled(knowing, task_id, question_id, {"action": "accept", "content": {"decision": "allow"}})
        going_on = await get(knowing, task_id)
        await ended(rt, knowing, task_id)

    assert form["mode"] == "form"
    assert form["message"].startswith("maker asks: may it use Bash with")
    assert form["requestedSchema"]["properties"]["decision"]["enum"] == ["allow", "deny"]
    assert form["requestedSchema"]["required"] == ["decision"]
    assert going_on["status"] in ("working", "completed")
    assert "inputRequests" not in going_on
    assert mark.exists()
    assert (await notes(rt, task_id))[1]["by"] == "the test/1"


@pytest.mark.parametrize(
    "response",
    [
        {"action": "decline"},
        {"action": "cancel"},
        {"action": "accept"},
        {"action": "accept", "content": {}},
        {"action": "accept", "content": {"decision": "yes"}},
        {"action": "accept", "content": {"decision": ["allow"]}},
        {"action": "decline", "content": {"decision": "allow"}},
        {"decision": "allow"},
        "allow",
        None,
    ],
)
async def test_whatever_is_not_clearly_allowed_is_denied(
    rt: Runtime, knowing: Client, mark: Path, response: Any
) -> None:
    with anyio.fail_after(30):
        task_id, question_id, _ = await opened_form(rt, knowing, **MAKE)
        await filled(knowing, task_id, question_id, response)
        await ended(rt, knowing, task_id)

    assert not mark.exists()
    assert (await notes(rt, task_id))[1]["allowed"] is False


async def test_the_reason_of_a_form_reaches_the_agent(rt: Runtime, knowing: Client, mark: Path) -> None:
    with anyio.fail_after(30):
        task_id, question_id, _ = await opened_form(rt, knowing, **MAKE)
        content = {"decision": "deny", "reason": "It is late."}
        await filled(knowing, task_id, question_id, {"action": "accept", "content": content})
        assert "It is late." in await ended(rt, knowing, task_id)


@pytest.mark.parametrize(
    ("content", "answer"),
    [
        ({"q1": "Blue"}, '"Which colour?"="Blue"'),
        ({"q1": "Blue", "q1_other": "None at all"}, '"Which colour?"="None at all"'),
        ({}, "It was not answered."),
    ],
)
async def test_a_task_asks_what_its_agent_asks(
    rt: Runtime, knowing: Client, chooser: None, content: dict[str, str], answer: str
) -> None:
    with anyio.fail_after(30):
        task_id, question_id, form = await opened_form(rt, knowing, **PAINT)
        await filled(knowing, task_id, question_id, {"action": "accept", "content": content})
        text = await ended(rt, knowing, task_id)

    field = form["requestedSchema"]["properties"]["q1"]
    assert field == {"type": "string", "enum": ["Red", "Blue"], "title": "Colour", "description": "Which colour?"}
    assert answer in text


async def test_answers_to_what_is_not_asked_are_ignored(rt: Runtime, knowing: Client, mark: Path) -> None:
    allow = {"action": "accept", "content": {"decision": "allow"}}
    with anyio.fail_after(30):
        task_id, question_id, _ = await opened_form(rt, knowing, **MAKE)
        await filled(knowing, task_id, "another", allow)
        assert (await get(knowing, task_id))["status"] == "input_required"
        await filled(knowing, task_id, question_id, {"action": "decline"})
        await filled(knowing, task_id, question_id, allow)
        await ended(rt, knowing, task_id)
        await filled(knowing, task_id, question_id, allow)

    assert not mark.exists()


async def test_a_client_without_forms_is_told_in_words(rt: Runtime, mark: Path) -> None:
    with anyio.fail_after(30):
        async with Client(build_server(rt), extensions=[KnowsTasks()]) as client:
            with rt.events.watch() as watcher:
                task_id = (await start(client, **MAKE)).task_id
                await seen(watcher, "run.asked")
            task = await get(client, task_id)
            ids = ids_of(await client.call_tool("run_wait", {"run_ids": [task_id]}))
            await client.call_tool("run_answer", {**ids, "allow": True})
            await ended(rt, client, task_id)

    assert task["status"] == "working"
    assert task["statusMessage"].startswith("maker: waits for an answer")
    assert mark.exists()
