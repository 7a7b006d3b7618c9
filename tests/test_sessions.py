"""Sessions: going on with one, forking one, and the lock that keeps two runs from splitting a history."""

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import anyio
import anyio.lowlevel
import pytest

from orchestrator.delegation import cancel, delegate, submit, wait
from orchestrator.errors import OrchestratorError, SessionBusyError, SessionNotFoundError
from orchestrator.outcome import Outcome
from orchestrator.runtime import Runtime
from orchestrator.task import Task
from orchestrator.testing import Fault, ModelServer, Reply, Request, Rule
from orchestrator.testing import Usage as Tokens
from tests.conftest import write_agent

OpenRuntime = Callable[..., AbstractAsyncContextManager[Runtime]]


class Gate:
    """Holds the model's answer to prompts that contain ``word`` until it is opened."""

    def __init__(self, word: str) -> None:
        self.opened = anyio.Event()
        self.rule = Rule(self._answer, when={"user_contains": word})

    async def _answer(self, request: Request) -> str:
        await self.opened.wait()
        return "let through"


async def one_session(rt: Runtime, model: ModelServer) -> Outcome:
    """A session of one turn: "My name is Ada." - "Hello Ada." """
    model.rules = [Rule("Hello Ada.", when={"user_contains": "My name is Ada."}), Rule("ok")]
    outcome = await delegate(rt, Task(agent="helper", prompt="My name is Ada."))
    assert outcome.status == "succeeded"
    return outcome


# --- Going on


async def test_continue_has_the_history_and_the_id(rt: Runtime, model: ModelServer) -> None:
    first = await one_session(rt, model)
    second = await delegate(rt, Task(agent="helper", prompt="What is it?", session=first.session_id))
    third = await delegate(rt, Task(agent="helper", prompt="Sure?", session=first.session_id))
    assert first.session_id == second.session_id == third.session_id
    assert model.journal[1].texts == ["My name is Ada.", "Hello Ada.", "What is it?"]
    assert model.journal[2].texts == ["My name is Ada.", "Hello Ada.", "What is it?", "ok", "Sure?"]
    session = await rt.store.session(first.session_id or "")
    assert (session.turns, session.last_run_id, session.locked_by) == (3, third.run_id, None)


async def test_cost_and_usage_are_those_of_the_turn(rt: Runtime, model: ModelServer) -> None:
    model.rules = [Rule(Reply("ok", usage=Tokens(input=10_000, output=0)))]
    first = await delegate(rt, Task(agent="helper", prompt="one"))
    second = await delegate(rt, Task(agent="helper", prompt="two", session=first.session_id))
    forked = await delegate(rt, Task(agent="helper", prompt="three", session=first.session_id, fork=True))
    assert [outcome.cost_usd for outcome in (first, second, forked)] == [pytest.approx(0.04)] * 3
    assert [outcome.usage.input_tokens for outcome in (first, second, forked)] == [10_000] * 3


async def test_continue_in_another_directory(rt: Runtime, model: ModelServer, project: Path) -> None:
    (project / "sub").mkdir()
    first = await one_session(rt, model)
    task = Task(agent="helper", prompt="Where?", session=first.session_id, cwd=Path("sub"))
    elsewhere = await delegate(rt, task)
    assert elsewhere.status == "succeeded"
    assert "Hello Ada." in model.journal[1].texts
    # Without a word about it, a session goes on where it began.
    back = await delegate(rt, Task(agent="helper", prompt="And now?", session=first.session_id))
    assert (await rt.store.run(elsewhere.run_id)).cwd == str(project / "sub")
    assert (await rt.store.run(back.run_id)).cwd == str(project)


async def test_another_agent_goes_on_with_its_own_prompt(rt: Runtime, model: ModelServer, project: Path) -> None:
    first = await one_session(rt, model)
    write_agent(project, "poet", tools="Glob", body="You answer in verse.")
    rt.catalog.load()
    await delegate(rt, Task(agent="poet", prompt="Who am I?", session=first.session_id))
    await delegate(rt, Task(agent="poet", prompt="Who am I?", session=first.session_id, fork=True))
    for request in model.journal[1:]:
        assert "You answer in verse." in request.system
        assert "You are the helper." not in request.system
        assert request.tools == ["Glob"]
        assert "My name is Ada." in request.texts


async def test_an_edited_file_counts_from_the_next_turn(rt: Runtime, model: ModelServer, project: Path) -> None:
    first = await one_session(rt, model)
    write_agent(project, "helper", tools="Read", body="You are the new helper.")
    rt.catalog.load()
    await delegate(rt, Task(agent="helper", prompt="Again.", session=first.session_id))
    assert "You are the new helper." in model.journal[1].system


async def test_sessions_outlive_the_runtime(runtime: OpenRuntime, model: ModelServer) -> None:
    async with runtime() as rt:
        first = await one_session(rt, model)
    async with runtime() as rt:
        await delegate(rt, Task(agent="helper", prompt="Still there?", session=first.session_id))
    assert model.journal[1].texts == ["My name is Ada.", "Hello Ada.", "Still there?"]


# --- Forking


async def test_fork_has_the_history_under_a_new_id(rt: Runtime, model: ModelServer) -> None:
    first = await one_session(rt, model)
    forked = await delegate(rt, Task(agent="helper", prompt="Forked?", session=first.session_id, fork=True))
    assert forked.session_id != first.session_id
    assert model.journal[1].texts == ["My name is Ada.", "Hello Ada.", "Forked?"]
    assert (await rt.store.session(forked.session_id or "")).parent_id == first.session_id
    run = await rt.store.run(forked.run_id)
    assert (run.session_mode, run.source_session_id) == ("fork", first.session_id)
    # The source has not heard of it.
    await delegate(rt, Task(agent="helper", prompt="Source?", session=first.session_id))
    assert model.journal[2].texts == ["My name is Ada.", "Hello Ada.", "Source?"]


async def test_fork_of_a_fork(rt: Runtime, model: ModelServer) -> None:
    first = await one_session(rt, model)
    child = await delegate(rt, Task(agent="helper", prompt="Child?", session=first.session_id, fork=True))
    grandchild = await delegate(rt, Task(agent="helper", prompt="Deeper?", session=child.session_id, fork=True))
    await delegate(rt, Task(agent="helper", prompt="Go on.", session=grandchild.session_id))
    assert len({first.session_id, child.session_id, grandchild.session_id}) == 3
    history = ["My name is Ada.", "Hello Ada.", "Child?", "ok", "Deeper?", "ok", "Go on."]
    assert model.journal[3].texts == history


async def test_forks_at_the_same_time(rt: Runtime, model: ModelServer) -> None:
    first = await one_session(rt, model)
    outcomes: list[Outcome] = []

    async def fork(word: str) -> None:
        outcomes.append(await delegate(rt, Task(agent="helper", prompt=word, session=first.session_id, fork=True)))

    async with anyio.create_task_group() as tg:
        for word in ("left", "right"):
            tg.start_soon(fork, word)
    assert [outcome.status for outcome in outcomes] == ["succeeded", "succeeded"]
    assert sorted(request.texts[-1] for request in model.journal[1:]) == ["left", "right"]
    assert all(request.texts[:-1] == ["My name is Ada.", "Hello Ada."] for request in model.journal[1:])


# --- The lock


async def test_a_session_in_use_is_refused(rt: Runtime, model: ModelServer) -> None:
    first = await one_session(rt, model)
    gate = Gate("hold")
    model.rules.insert(0, gate.rule)
    holder = await submit(rt, Task(agent="helper", prompt="hold", session=first.session_id))
    await model.wait_for("hold")
    for fork in (False, True):
        with pytest.raises(SessionBusyError, match=holder) as caught:
            await delegate(rt, Task(agent="helper", prompt="me too", session=first.session_id, fork=fork))
        assert caught.value.retryable
    assert len(await rt.store.runs()) == 2
    gate.opened.set()
    with anyio.fail_after(10):
        await wait(rt, holder)
    after = await delegate(rt, Task(agent="helper", prompt="now me", session=first.session_id))
    assert after.status == "succeeded"


async def test_a_session_is_held_from_its_first_turn_on(rt: Runtime, model: ModelServer) -> None:
    gate = Gate("hold")
    model.rules = [gate.rule]
    holder = await submit(rt, Task(agent="helper", prompt="hold"))
    await model.wait_for("hold")
    session_id = (await rt.store.run(holder)).session_id
    with pytest.raises(SessionBusyError):
        await delegate(rt, Task(agent="helper", prompt="me too", session=session_id))
    gate.opened.set()
    with anyio.fail_after(10):
        await wait(rt, holder)


async def test_of_two_at_once_one_wins(rt: Runtime, model: ModelServer) -> None:
    first = await one_session(rt, model)
    results: list[Outcome | OrchestratorError] = []
    gate = Gate("turn")
    model.rules.insert(0, gate.rule)

    async def go_on(number: int) -> None:
        try:
            task = Task(agent="helper", prompt=f"turn {number}", session=first.session_id)
            results.append(await delegate(rt, task))
        except OrchestratorError as error:
            results.append(error)
            gate.opened.set()

    with anyio.fail_after(10):
        async with anyio.create_task_group() as tg:
            tg.start_soon(go_on, 1)
            tg.start_soon(go_on, 2)
    loser, winner = results
    assert isinstance(loser, SessionBusyError)
    assert isinstance(winner, Outcome)
    assert winner.status == "succeeded"
    assert len(await rt.store.runs()) == 2
    assert len(model.journal) == 2


async def test_a_caller_cancelled_while_it_takes_the_session_leaves_it_free(
    rt: Runtime, model: ModelServer
) -> None:
    """The request is withdrawn at every point at which it can wait; afterwards the session can be used."""
    first = await one_session(rt, model)
    points = 0
    while True:
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as tg:
                tg.start_soon(submit, rt, Task(agent="helper", prompt="go on", session=first.session_id))
                for _ in range(points):
                    await anyio.lowlevel.checkpoint()
                scope.cancel()
        if rt.live:
            break  # it got through
        assert len(await rt.store.runs()) == 1
        assert (await rt.store.session(first.session_id or "")).locked_by is None
        points += 1 + points // 8
    [live] = rt.live.values()
    await cancel(rt, live.row.id)
    with anyio.fail_after(10):
        await live.ended.wait()
    assert points > 3


# --- Sessions that are not there


@pytest.mark.parametrize("session", ["7b1f0ed2-9d0c-4d5e-8a55-0d5b8f9c6a11", "not-a-uuid", "--help", "%"])
@pytest.mark.parametrize("fork", [False, True])
async def test_unknown_sessions(rt: Runtime, model: ModelServer, session: str, fork: bool) -> None:
    with pytest.raises(SessionNotFoundError, match="is known here"):
        await delegate(rt, Task(agent="helper", prompt="x", session=session, fork=fork))
    assert await rt.store.runs() == []
    assert not model.journal


async def test_a_session_that_never_came_to_be(runtime: OpenRuntime, tmp_path: Path) -> None:
    quits = tmp_path / "quits"
    quits.write_text("#!/bin/sh\nexit 3\n")
    quits.chmod(0o755)
    async with runtime(claude__path=str(quits)) as rt:
        failed = await delegate(rt, Task(agent="helper", prompt="x"))
        assert failed.status == "failed"
        with pytest.raises(SessionNotFoundError, match=f"never came to be: run {failed.run_id} ended"):
            await delegate(rt, Task(agent="helper", prompt="again", session=failed.session_id))
        assert len(await rt.store.runs()) == 1


async def test_a_session_whose_first_answer_failed_can_go_on(rt: Runtime, model: ModelServer) -> None:
    """The prompt is in the transcript, so the session exists."""
    model.rules = [Rule(Reply(fault=Fault(status=403)), times=1), Rule("ok")]
    failed = await delegate(rt, Task(agent="helper", prompt="My name is Ada."))
    assert failed.status == "failed"
    after = await delegate(rt, Task(agent="helper", prompt="And now?", session=failed.session_id))
    assert after.status == "succeeded"
    assert model.journal[-1].texts[0].strip() == "My name is Ada."


async def test_a_session_under_another_home(runtime: OpenRuntime, model: ModelServer, tmp_path: Path) -> None:
    async with runtime() as rt:
        first = await one_session(rt, model)
    (tmp_path / "other").mkdir()
    async with runtime(claude__home=str(tmp_path / "other")) as rt:
        with pytest.raises(SessionNotFoundError, match="under another HOME") as caught:
            await delegate(rt, Task(agent="helper", prompt="x", session=first.session_id))
        assert str(tmp_path / "home") in caught.value.message
        assert "claude.home" in caught.value.advice
        assert len(await rt.store.runs()) == 1


async def test_a_transcript_that_was_deleted(rt: Runtime, model: ModelServer, tmp_path: Path) -> None:
    first = await one_session(rt, model)
    [transcript] = (tmp_path / "home" / ".claude" / "projects").rglob(f"{first.session_id}.jsonl")
    transcript.unlink()
    outcome = await delegate(rt, Task(agent="helper", prompt="x", session=first.session_id))
    assert (outcome.status, (outcome.error or {})["code"]) == ("failed", "session_not_found")
    assert len(model.journal) == 1


# --- After a cut


async def test_after_a_cancel_the_session_holds_what_was_said(rt: Runtime, model: ModelServer) -> None:
    first = await one_session(rt, model)
    stalled = Reply("The first half. The second half.", fault=Fault(stall_at=4))
    model.rules.insert(0, Rule(stalled, when={"user_contains": "Tell"}))
    with anyio.fail_after(10), rt.events.watch() as watcher:
        run_id = await submit(rt, Task(agent="helper", prompt="Tell me more.", session=first.session_id))
        async for event in watcher:
            if event.data.get("activity") == "answering":
                break
        await cancel(rt, run_id)
        cut = await wait(rt, run_id)
    assert (cut.status, cut.text) == ("cancelled", "The first half. ")
    after = await delegate(rt, Task(agent="helper", prompt="Go on.", session=first.session_id))
    assert after.status == "succeeded"
    said = model.journal[-1].texts
    assert said[:3] == ["My name is Ada.", "Hello Ada.", "Tell me more."]
    assert said[-1] == "Go on."
    assert any("The first half." in text for text in said[3:-1])
