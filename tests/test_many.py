"""Several runs at once, runs repeated, forks in the middle, and tasks that come back: through the real CLI."""

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import anyio
import pytest

from mcp_tools import open_door
from orchestrator.delegation import delegate, submit_many, wait
from orchestrator.errors import AgentNotFoundError, ConfigError, QueueFullError, SessionTurnError
from orchestrator.outcome import Outcome
from orchestrator.replaying import replay_task
from orchestrator.runtime import Runtime
from orchestrator.task import Task
from orchestrator.testing import Fault, ModelServer, Reply, Request, Rule, ToolUse
from tests.conftest import write_agent

OpenRuntime = Callable[..., AbstractAsyncContextManager[Runtime]]
FAILS = Reply(fault=Fault(status=400, message="no"))


def task(prompt: str, **more: object) -> Task:
    return Task(**{"agent": "helper", "prompt": prompt, **more})


async def ended(rt: Runtime, ids: list[str]) -> list[Outcome]:
    with anyio.fail_after(60):
        return [await wait(rt, run_id) for run_id in ids]


class Gate:
    """Holds the model's answers to a prompt until it is opened."""

    def __init__(self, prompt: str) -> None:
        self.opened = anyio.Event()
        self.rule = Rule(self._answer, when={"user_contains": prompt})

    async def _answer(self, _: Request) -> str:
        await self.opened.wait()
        return "let through"


# -- several at once ----------------------------------------------------------------------------------------


async def test_all_are_run_and_their_ids_are_in_order(rt: Runtime, model: ModelServer) -> None:
    model.rules = [Rule(lambda request: f"to {request.last_user_text}")]
    ids = await submit_many(rt, [task("a"), task("b"), task("c")])
    assert [outcome.text for outcome in await ended(rt, ids)] == ["to a", "to b", "to c"]


async def test_no_more_are_at_work_than_allowed(rt: Runtime, model: ModelServer) -> None:
    first = Gate("a")
    model.rules = [first.rule, Rule("ok")]
    with rt.events.watch() as events:
        ids = await submit_many(rt, [task("a"), task("b")], max_parallel=1)
        await model.wait_for("a")
        assert [(await rt.store.run(run_id)).status for run_id in ids] == ["running", "queued"]
        first.opened.set()
        assert all(outcome.ok for outcome in await ended(rt, ids))
        told = [(event.type, event.run_id) for event in events.rest() if event.type in ("run.started", "run.ended")]
    assert told == [(kind, run_id) for run_id in ids for kind in ("run.started", "run.ended")]


async def test_one_that_is_refused_keeps_all_from_running(runtime: OpenRuntime, model: ModelServer) -> None:
    model.rules = [Rule("ok")]
    async with runtime(limits__max_processes=1, limits__max_queue=1) as rt:
        with pytest.raises(AgentNotFoundError):
            await submit_many(rt, [task("a"), task("b", agent="nobody")])
        with pytest.raises(QueueFullError):
            await submit_many(rt, [task("a"), task("b"), task("c")])
        assert await rt.store.runs() == []
        assert rt.live == {}
        assert (await delegate(rt, task("d"))).ok, "none of them holds a place"
    assert [request.last_user_text for request in model.journal] == ["d"]


async def test_the_first_failure_cancels_the_rest(rt: Runtime, model: ModelServer) -> None:
    waits = Gate("waits")
    model.rules = [waits.rule, Rule(FAILS)]
    ids = await submit_many(rt, [task("waits"), task("fails")], join="all_ok")
    waiting, failed = await ended(rt, ids)
    assert (waiting.status, failed.status) == ("cancelled", "failed")
    assert waiting.error is not None
    assert waiting.error["message"] == f"run {ids[1]} of the same tasks did not succeed"


async def test_the_first_answer_cancels_the_rest(rt: Runtime, model: ModelServer) -> None:
    waits = Gate("waits")
    model.rules = [waits.rule, Rule(FAILS, when={"user_contains": "fails"}), Rule("quick")]
    ids = await submit_many(rt, [task("waits"), task("fails"), task("quick")], join="first_ok")
    outcomes = await ended(rt, ids)
    assert [outcome.status for outcome in outcomes] == ["cancelled", "failed", "succeeded"]


# -- from the middle of a session, and once more ------------------------------------------------------------


async def three_turns(rt: Runtime, model: ModelServer) -> list[Outcome]:
    model.rules = [Rule(lambda request: f"answer to {request.last_user_text}")]
    outcomes = [await delegate(rt, task("one"))]
    for prompt in ("two", "three"):
        outcomes.append(await delegate(rt, task(prompt, session=outcomes[0].session_id)))
    return outcomes


async def test_a_fork_may_begin_after_any_turn(rt: Runtime, model: ModelServer) -> None:
    first, *_ = await three_turns(rt, model)
    forked = await delegate(rt, task("else", session=first.session_id, fork=True, fork_turn=2))
    assert model.journal[-1].texts == ["one", "answer to one", "two", "answer to two", "else"]
    assert forked.session_id != first.session_id
    await delegate(rt, task("four", session=first.session_id))
    assert model.journal[-1].texts[-3:] == ["three", "answer to three", "four"], "it stays as it was"


async def test_a_turn_that_is_not_there_is_refused(rt: Runtime, model: ModelServer) -> None:
    first, *_ = await three_turns(rt, model)
    with pytest.raises(SessionTurnError, match="has 3 turns on record"):
        await delegate(rt, task("else", session=first.session_id, fork=True, fork_turn=4))
    with pytest.raises(ConfigError, match="fork_turn"):
        await delegate(rt, task("else", session=first.session_id, fork_turn=1))


async def test_a_run_is_repeated_from_where_it_began(rt: Runtime, model: ModelServer) -> None:
    outcomes = await three_turns(rt, model)
    asked = (["one"], ["one", "answer to one", "two"], ["one", "answer to one", "two", "answer to two", "three"])
    for outcome, texts in zip(outcomes, asked, strict=True):
        again = await delegate(rt, await replay_task(rt, await rt.store.run(outcome.run_id), model="opus"))
        assert again.ok
        assert again.session_id != outcome.session_id
        assert model.journal[-1].texts == texts
        assert "opus" in model.journal[-1].model
    forked = await delegate(rt, task("else", session=outcomes[0].session_id, fork=True, fork_turn=1))
    await delegate(rt, await replay_task(rt, await rt.store.run(forked.run_id)))
    assert model.journal[-1].texts == ["one", "answer to one", "else"]


async def test_a_run_is_gone_on_from_its_end(rt: Runtime, model: ModelServer) -> None:
    _, second, _ = await three_turns(rt, model)
    run = await rt.store.run(second.run_id)
    await delegate(rt, await replay_task(rt, run, onwards=True, prompt="and now?"))
    assert model.journal[-1].texts == ["one", "answer to one", "two", "answer to two", "and now?"]
    with pytest.raises(ConfigError, match="no prompt"):
        await replay_task(rt, run, onwards=True)


# -- tasks that come back -----------------------------------------------------------------------------------


async def test_a_task_that_comes_back_to_its_agent_is_refused(
    runtime: OpenRuntime, model: ModelServer, project: Path
) -> None:
    for name, other in (("ping", "pong"), ("pong", "ping")):
        write_agent(project, name, tools="mcp__orchestrator", body=f"You are {name}. Ask {other}.")

    def pass_on(to: str) -> ToolUse:
        return ToolUse("mcp__orchestrator__delegate", {"agent": to, "prompt": "do  it"})

    def heard(request: Request) -> str:
        return request.tool_results[0].text

    model.rules = [
        Rule(pass_on("pong"), when={"system": "You are ping", "tool_result": False}),
        Rule(pass_on("ping"), when={"system": "You are pong", "tool_result": False}),
        Rule(heard, when={"tool_result": True}),
    ]
    async with runtime(open_door=open_door, limits__max_depth=9) as rt:
        with anyio.fail_after(60):
            outcome = await delegate(rt, Task(agent="ping", prompt="do it"))
        assert len(await rt.store.runs()) == 2
    assert "the same task comes back to ping: ping → pong → ping" in outcome.text
    assert '"code":"delegation_cycle"' in outcome.text.replace(": ", ":")
