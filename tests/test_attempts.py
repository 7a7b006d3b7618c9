"""What stands before and behind a turn: the circuit breaker, the rate of beginnings, another process, the API."""

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import anyio
import pytest

from mcp_tools import open_door
from orchestrator import Outcome, Runtime, Task, delegate
from orchestrator.testing import Fault, ModelServer, Reply, Rule, ToolUse
from tests.conftest import bundled_cli, write_agent

Open = Callable[..., AbstractAsyncContextManager[Runtime]]
OVERLOADED = Rule(Reply(fault=Fault(status=529)))


async def run(rt: Runtime, prompt: str = "hello", **more: Any) -> Outcome:
    with anyio.fail_after(60):
        return await delegate(rt, Task(agent=more.pop("agent", "helper"), prompt=prompt, **more))


def code(outcome: Outcome) -> str | None:
    return outcome.error["code"] if outcome.error else None


async def test_after_failures_in_a_row_no_run_begins_for_a_while(runtime: Open, model: ModelServer) -> None:
    model.rules = [OVERLOADED]
    async with runtime(breaker__failure_threshold=2, claude__max_retries=0) as rt:
        assert [code(await run(rt)) for _ in range(2)] == ["overloaded", "overloaded"]
        asked = len(model.journal)
        refused = await run(rt)
        assert code(refused) == "circuit_open"
        assert refused.error is not None
        assert 0 < refused.error["retry_after"] <= 30
        assert len(model.journal) == asked, "nothing was spent"
        assert len(await rt.store.runs()) == 3, "and it is on record"


async def test_when_the_provider_works_again_runs_begin_again(runtime: Open, model: ModelServer) -> None:
    model.rules = [Rule(Reply(fault=Fault(status=529)), times=1), Rule("ok")]
    async with runtime(
        breaker__failure_threshold=1,
        breaker__success_threshold=1,
        breaker__reset_timeout_s=0.2,
        claude__max_retries=0,
    ) as rt:
        assert code(await run(rt)) == "overloaded"
        while (outcome := await run(rt)).status == "failed":
            assert code(outcome) == "circuit_open"
        assert outcome.text == "ok"
        assert rt.breaker.get_stats(anyio.current_time()).state == "closed"


async def test_watchers_are_told_when_no_run_may_begin_and_when_again(runtime: Open, model: ModelServer) -> None:
    model.rules = [Rule(Reply(fault=Fault(status=529)), times=1), Rule("ok")]
    async with runtime(
        breaker__failure_threshold=1,
        breaker__success_threshold=1,
        breaker__reset_timeout_s=0.2,
        claude__max_retries=0,
    ) as rt:
        with rt.events.watch() as watcher:
            while (await run(rt)).status == "failed":
                pass
            told = [event for event in watcher.rest() if event.type.startswith("breaker.")]
    assert [event.type for event in told] == ["breaker.open", "breaker.half_open", "breaker.closed"]
    assert told[0].data["reason"] == "overloaded"
    assert 0 < told[0].data["retry_after"] <= 0.2


async def test_a_run_that_tries_whether_the_provider_works_again_may_delegate(
    runtime: Open, model: ModelServer, project: Path
) -> None:
    """It is the only one let through, and it ends only after what it delegates."""
    write_agent(project, "boss", tools="mcp__orchestrator", body="You are the boss.")
    call = ToolUse("mcp__orchestrator__delegate", {"agent": "helper", "prompt": "help"})
    model.rules = [
        Rule(Reply(fault=Fault(status=529)), times=1),
        Rule(call, when={"system": "the boss", "tool_result": False}),
        Rule(lambda request: f"heard: {request.tool_results[0].text}", when={"system": "the boss"}),
        Rule("helped", when={"system": "the helper"}),
    ]
    async with runtime(
        open_door=open_door,
        breaker__failure_threshold=1,
        breaker__half_open_max_calls=1,
        breaker__success_threshold=2,
        breaker__reset_timeout_s=0.2,
        claude__max_retries=0,
    ) as rt:
        assert code(await run(rt)) == "overloaded"
        while code(outcome := await run(rt, agent="boss")) == "circuit_open":
            assert not outcome.ok
        assert "heard: helped" in outcome.text, outcome.error
        assert rt.breaker.get_stats(anyio.current_time()).state == "closed", "the two of them were enough"


async def test_what_is_nobodys_fault_opens_nothing(runtime: Open, model: ModelServer) -> None:
    model.rules = [Rule(Reply(fault=Fault(status=400, message="no")))]
    async with runtime(breaker__failure_threshold=1, claude__max_retries=0) as rt:
        assert [code(await run(rt)) for _ in range(2)] == ["invalid_request", "invalid_request"]


async def test_runs_begin_no_faster_than_the_rate(runtime: Open, model: ModelServer) -> None:
    model.rules = [Rule("ok")]
    async with runtime(limits__rate="1/2s") as rt:
        first, second = await run(rt), await run(rt)
        begun = [(await rt.store.run(outcome.run_id)).started_us or 0 for outcome in (first, second)]
        assert begun[1] - begun[0] >= 1_900_000  # a clock of microseconds beside one of the loop's


def broken_cli(tmp_path: Path, times: int) -> str:
    """A CLI that ends, the first ``times`` times, before it has said anything."""
    script = tmp_path / "broken"
    script.write_text(
        f"#!/bin/sh\n"
        f"for n in $(seq {times}); do mkdir {tmp_path}/broken-$n 2>/dev/null && kill -9 $$; done\n"
        f'exec {bundled_cli()} "$@"\n'
    )
    script.chmod(0o755)
    return str(script)


async def test_a_process_that_ends_before_it_has_said_anything_is_replaced(
    runtime: Open, model: ModelServer, tmp_path: Path
) -> None:
    model.rules = [Rule("ok")]
    async with runtime(claude__path=broken_cli(tmp_path, 1)) as rt, anyio.create_task_group() as tg:
        events: list[str] = []
        with rt.events.watch() as watcher:
            outcome = await run(rt)
            events = [event.type for event in watcher.rest()]
        tg.cancel_scope.cancel()
        assert outcome.text == "ok"
        assert events.count("run.retried") == 1
        assert [session.id for session in await rt.store.sessions()] == [outcome.session_id]
    assert len(model.journal) == 1


async def test_it_is_replaced_as_often_as_the_settings_say(runtime: Open, tmp_path: Path) -> None:
    often: dict[str, Any] = {"retry__max_retries": 2, "retry__base_delay_s": 0, "pool__max_idle": 0}
    async with runtime(claude__path=broken_cli(tmp_path, 9), **often) as rt:
        outcome = await run(rt)
        assert code(outcome) == "cli_exit"
        assert await rt.store.sessions() == []
    assert len(list(tmp_path.glob("broken-*"))) == 3


async def test_a_process_that_has_said_something_is_not(runtime: Open, model: ModelServer, tmp_path: Path) -> None:
    """What it did may not be done twice."""
    cli = tmp_path / "says-something"
    cli.write_text(
        '#!/bin/sh\necho \'{"type":"system","subtype":"init"}\'\nmkdir ' + f"{tmp_path}/said-$$\nkill -9 $$\n"
    )
    cli.chmod(0o755)
    async with runtime(claude__path=str(cli), retry__max_retries=5) as rt:
        assert code(await run(rt)) == "cli_exit"
    assert len(list(tmp_path.glob("said-*"))) == 1


async def test_without_a_word_in_the_settings_no_run_goes_to_the_api(runtime: Open, tmp_path: Path) -> None:
    async with runtime(claude__path=str(tmp_path / "missing")) as rt:
        assert code(await run(rt)) == "cli_not_found"


async def test_the_api_answers_where_no_cli_is_and_the_run_says_so(
    runtime: Open, model: ModelServer, tmp_path: Path, project: Path
) -> None:
    write_agent(project, "talker", tools="[]", body="You talk.")
    model.rules = [Rule("from the API")]
    async with runtime(claude__path=str(tmp_path / "missing"), fallback__enabled=True) as rt:
        outcome = await run(rt, agent="talker")
        row = await rt.store.run(outcome.run_id)
        with_tools = await run(rt, agent="helper")
    assert (outcome.status, outcome.text) == ("succeeded", "from the API")
    assert row.fallback is not None
    assert row.fallback["code"] == "cli_not_found"
    assert (outcome.session_id, row.cost_basis) == (None, "estimate")
    assert outcome.usage.input_tokens == 100
    assert len(model.journal) == 1
    assert code(with_tools) == "cli_not_found", "an agent with tools needs the CLI"


async def test_the_api_answers_while_the_circuit_is_open(runtime: Open, model: ModelServer, project: Path) -> None:
    write_agent(project, "talker", tools="[]", body="You talk.")
    model.rules = [Rule(Reply(fault=Fault(status=529)), times=1), Rule("from the API")]
    async with runtime(breaker__failure_threshold=1, claude__max_retries=0, fallback__enabled=True) as rt:
        first = await run(rt, agent="talker")
        assert code(first) == "overloaded", "what the CLI had begun is not begun a second time"
        second = await run(rt, agent="talker")
        row = await rt.store.run(second.run_id)
        assert rt.breaker.get_stats(anyio.current_time()).state == "open", "the API says nothing of the CLI"
    assert (second.text, (row.fallback or {})["code"]) == ("from the API", "circuit_open")
    assert len(model.journal) == 2


@pytest.mark.parametrize(("word", "text"), [("", "from the API"), ('{"type":"system","subtype":"init"}', "")])
async def test_the_api_answers_only_where_the_cli_has_not_said_a_word(
    runtime: Open, model: ModelServer, project: Path, tmp_path: Path, word: str, text: str
) -> None:
    write_agent(project, "talker", tools="[]", body="You talk.")
    model.rules = [Rule("from the API")]
    cli = tmp_path / "dies"
    cli.write_text(f"#!/bin/sh\necho '{word}'\nkill -9 $$\n")
    cli.chmod(0o755)
    async with runtime(claude__path=str(cli), fallback__enabled=True, retry__max_retries=0) as rt:
        outcome = await run(rt, agent="talker")
        row = await rt.store.run(outcome.run_id)
    assert outcome.text == text
    assert [error["code"] for error in (outcome.error, row.fallback) if error] == ["cli_exit"]
    assert len(model.journal) == bool(text)
