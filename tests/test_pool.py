"""The pool with real CLI processes: warm starts, held sessions, what a hand-out changes, what ends a process."""

import json
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import psutil
import pytest

from mcp_tools import open_door
from orchestrator import Outcome, Runtime, Task, delegate, keep_warm, submit
from orchestrator.delegation import wait
from orchestrator.errors import QueueFullError
from orchestrator.pool_state import Worker
from orchestrator.testing import ModelServer, Reply, Request, Rule, ToolUse
from tests.conftest import write_agent

Open = Callable[..., AbstractAsyncContextManager[Runtime]]


async def until(rt: Runtime, condition: Callable[[], object], within: float = 30) -> None:
    """Wait for events of the runtime until the condition holds."""
    with anyio.fail_after(within), rt.events.watch() as events:
        while not condition():
            with anyio.move_on_after(0.2):
                await anext(aiter(events))


def workers(rt: Runtime, *phases: str) -> list[Worker]:
    return [worker for worker in rt.pool.state.workers.values() if worker.phase in phases]


def ready(rt: Runtime, count: int) -> Callable[[], bool]:
    return lambda: len([worker for worker in workers(rt, "idle") if not worker.starting]) == count


@asynccontextmanager
async def warmed(opened: AbstractAsyncContextManager[Runtime], count: int = 1) -> AsyncIterator[Runtime]:
    """A runtime whose warm processes are ready."""
    async with opened as rt, anyio.create_task_group() as tg:
        tg.start_soon(keep_warm, rt)
        await until(rt, ready(rt, count))
        yield rt
        tg.cancel_scope.cancel()


async def turn(rt: Runtime, prompt: str, **more: Any) -> Outcome:
    with anyio.fail_after(60):
        outcome = await delegate(rt, Task(agent=more.pop("agent", "helper"), prompt=prompt, **more))
    assert outcome.status == "succeeded", outcome.error
    return outcome


def without_ids(request: Request) -> dict[str, Any]:
    """A request body without what differs between any two runs."""
    return {**request.body, "metadata": None}


# -- warm processes -----------------------------------------------------------------------------------------


async def test_a_warm_process_says_what_a_cold_one_would(runtime: Open, model: ModelServer) -> None:
    model.rules = [Rule("ok")]
    async with warmed(runtime(pool__warm={"helper": 1})) as rt:
        await turn(rt, "hello")
        assert (rt.pool.state.counters.hits, rt.pool.state.counters.cold_starts) == (1, 0)
    async with runtime() as rt:
        await turn(rt, "hello")
        assert rt.pool.state.counters.cold_starts == 1
    warm, cold = map(without_ids, model.journal)
    assert warm == cold


async def test_the_model_and_the_mode_are_the_runs_own(runtime: Open, model: ModelServer, project: Path) -> None:
    write = ToolUse("Write", {"file_path": str(project / "made.txt"), "content": "x"})
    write_agent(project, "writer", tools="Write", body="You write.")
    model.rules = [Rule("done", when={"tool_result": True}), Rule(Reply(write))]
    other: dict[str, Any] = {"model": "claude-sonnet-5-5", "permission_mode": "acceptEdits"}
    async with warmed(runtime(pool__warm={"writer": 1})) as rt:
        outcome = await turn(rt, "hello", agent="writer", **other)
        assert rt.pool.state.counters.hits == 1
        again = await turn(rt, "and again", agent="writer", session=outcome.session_id, **other)
        assert rt.pool.state.counters.session_hits == 1
    assert (project / "made.txt").read_text() == "x"
    assert (outcome.model, again.model) == ("claude-sonnet-5-5", "claude-sonnet-5-5")
    assert {request.model for request in model.journal} == {"claude-sonnet-5-5"}
    # Told once, silently: nothing about a change of model is in what the model reads.
    assert "Set model" not in json.dumps([request.body["messages"] for request in model.journal])


async def test_each_run_is_known_to_its_requests_and_its_shells(
    runtime: Open, model: ModelServer, project: Path
) -> None:
    write_agent(project, "shell", tools="Bash(printenv *)", body="You run commands.")
    show = ToolUse("Bash", {"command": "printenv ORCHESTRATOR_RUN_ID", "description": "show"})
    model.rules = [Rule("done", when={"tool_result": True}), Rule(Reply(show))]
    async with warmed(runtime(pool__warm={"shell": 1})) as rt:
        first = await turn(rt, "one", agent="shell")
        second = await turn(rt, "two", agent="shell", session=first.session_id)
        runs = [await rt.store.run(outcome.run_id) for outcome in (first, second)]
    shown = [json.dumps(request.body["messages"][-1]) for request in model.journal[1::2]]
    assert [outcome.run_id in said for outcome, said in zip((first, second), shown, strict=True)] == [True, True]
    seen = [request.headers.get("x-orchestrator-run-id") for request in model.journal]
    assert seen == [first.run_id, first.run_id, second.run_id, second.run_id]
    assert runs[0].session_id == runs[1].session_id


async def test_warm_processes_do_not_slow_down_those_at_work(runtime: Open, model: ModelServer) -> None:
    """A refill is nice to others until somebody has it."""
    model.rules = [Rule("ok")]
    async with warmed(runtime(pool__warm={"helper": 1})) as rt:
        [kept] = rt.pool._kept.values()
        assert kept.pid is not None
        assert kept.lowered
        await turn(rt, "hello")
        assert not kept.lowered


async def test_runs_that_came_together_find_warm_processes_the_next_time(runtime: Open, model: ModelServer) -> None:
    model.rules = [Rule("ok")]
    async with runtime() as rt:
        async with anyio.create_task_group() as tg:
            for n in range(2):
                tg.start_soon(turn, rt, f"hello {n}")
        await until(rt, ready(rt, 2))
        before = rt.pool.state.counters.cold_starts
        await turn(rt, "again")
        assert rt.pool.state.counters.cold_starts == before
        assert rt.pool.state.counters.hits >= 1


@pytest.mark.parametrize("change", ["agent", "CLAUDE.md", "settings"])
async def test_a_warm_process_ages_out_when_what_it_has_read_changes(
    runtime: Open, model: ModelServer, project: Path, change: str
) -> None:
    model.rules = [Rule("ok")]
    (project / "CLAUDE.md").write_text("Say ONE.")
    async with warmed(runtime(pool__warm={"helper": 1})) as rt:
        [old] = workers(rt, "idle")
        if change == "agent":
            write_agent(project, "helper", tools="Read", body="You are the new helper.")
        elif change == "CLAUDE.md":
            (project / "CLAUDE.md").write_text("Say TWO, whatever was said before.")
        else:
            (project / ".claude").mkdir()
            (project / ".claude" / "settings.json").write_text('{"env": {"X": "1"}}')
        await until(rt, lambda: old not in rt.pool.state.workers.values())
        assert rt.pool.state.counters.retired["stale"] == 1
        await until(rt, ready(rt, 1))
        await turn(rt, "hello")
        assert rt.pool.state.counters.hits == 1
    if change == "agent":
        assert "the new helper" in model.journal[0].system
    if change == "CLAUDE.md":
        assert "Say TWO" in json.dumps(model.journal[0].body)


async def test_a_warm_process_that_dies_is_nobodys_trouble(runtime: Open, model: ModelServer) -> None:
    model.rules = [Rule("ok")]
    async with warmed(runtime(pool__warm={"helper": 2}), 2) as rt:
        first, second = rt.pool._kept.values()
        assert first.pid is not None
        psutil.Process(first.pid).kill()
        await until(rt, lambda: rt.pool.state.counters.retired["died"] == 1)
        assert second.worker in workers(rt, "idle")
        await turn(rt, "hello")
        assert second.worker in workers(rt, "held")


async def test_a_run_whose_process_dies_before_it_has_said_anything_gets_another(
    runtime: Open, model: ModelServer
) -> None:
    """Its death and the hand-out cross: nothing was done yet, so doing it elsewhere is not doing it twice."""
    model.rules = [Rule("ok")]
    async with warmed(runtime(pool__warm={"helper": 1})) as rt:
        [kept] = rt.pool._kept.values()
        assert kept.pid is not None
        psutil.Process(kept.pid).kill()
        outcome = await turn(rt, "hello")
        again = await turn(rt, "again", session=outcome.session_id)
        assert again.session_id == outcome.session_id
        assert len(await rt.store.sessions()) == 1
    assert len(model.journal) == 2


# -- sessions -----------------------------------------------------------------------------------------------


async def test_a_session_goes_on_in_its_living_process(rt: Runtime, model: ModelServer) -> None:
    model.rules = [Rule("ok")]
    first = await turn(rt, "My name is Ada.")
    [worker] = workers(rt, "held")
    second = await turn(rt, "And now?", session=first.session_id)
    assert workers(rt, "held") == [worker]
    assert second.session_id == first.session_id
    assert (rt.pool.state.counters.session_hits, rt.pool.state.counters.cold_starts) == (1, 1)
    assert "My name is Ada." in json.dumps(model.journal[-1].body["messages"])
    # Each turn is charged with its own tokens, although the process counts on.
    assert first.usage.input_tokens == second.usage.input_tokens == 100


async def test_a_fork_of_a_session_that_a_living_process_holds_has_all_of_it(
    rt: Runtime, model: ModelServer
) -> None:
    model.rules = [Rule("ok")]
    first = await turn(rt, "My name is Ada.")
    await turn(rt, "I live in London.", session=first.session_id)
    fork = await turn(rt, "Who?", session=first.session_id, fork=True)
    told = json.dumps(model.journal[-1].body["messages"])
    assert "My name is Ada." in told
    assert "I live in London." in told
    assert fork.session_id != first.session_id
    await turn(rt, "Go on.", session=first.session_id)
    assert "Who?" not in json.dumps(model.journal[-1].body["messages"])


async def test_a_session_that_went_on_elsewhere_is_not_gone_on_with_from_memory(
    rt: Runtime, runtime: Open, model: ModelServer
) -> None:
    """Somebody resumes it by hand while our process holds it: what they said must not be lost."""
    model.rules = [Rule("ok")]
    first = await turn(rt, "My name is Ada.")
    async with runtime() as elsewhere:
        await turn(elsewhere, "I live in London.", session=first.session_id)
    await turn(rt, "And now?", session=first.session_id)
    told = json.dumps(model.journal[-1].body["messages"])
    assert "I live in London." in told
    assert rt.pool.state.counters.retired["superseded"] == 1


async def test_a_session_goes_on_with_other_settings_in_another_process(
    rt: Runtime, model: ModelServer, project: Path
) -> None:
    model.rules = [Rule("ok")]
    first = await turn(rt, "My name is Ada.")
    write_agent(project, "helper", tools="Read", body="You are the new helper.")
    await until(rt, lambda: not workers(rt, "held"))
    await turn(rt, "And now?", session=first.session_id)
    assert "the new helper" in model.journal[-1].system
    assert "My name is Ada." in json.dumps(model.journal[-1].body["messages"])


async def test_what_a_turn_left_running_ends_with_it_and_the_session_stays(
    runtime: Open, model: ModelServer, project: Path
) -> None:
    (project / "leave.sh").write_text("setsid sleep 300 < /dev/null > /dev/null 2>&1 &\necho $! > pid\n")
    sleeper = ToolUse("Bash", {"command": "sh leave.sh", "description": "leave something running"})
    write_agent(project, "shell", tools="Bash(sh leave.sh)", body="You run commands.")
    model.rules = [Rule("done", when={"tool_result": True}), Rule(Reply(sleeper))]
    async with runtime() as rt:
        outcome = await turn(rt, "go", agent="shell")
        assert workers(rt, "held"), outcome
        assert not runs(int((project / "pid").read_text()))
        assert not [p for p in psutil.process_iter() if carries(p, outcome.run_id)]


def runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def carries(process: psutil.Process, run_id: str) -> bool:
    try:
        return process.environ().get("ORCHESTRATOR_RUN_ID") == run_id
    except (psutil.Error, OSError):
        return False


async def test_a_budget_is_each_turns_own_in_a_session_with_sub_agents(
    runtime: Open, model: ModelServer, project: Path
) -> None:
    """The CLI counts its own second line of defence over all turns of a process."""
    write_agent(project, "boss", tools="Read, Agent", body="You have sub-agents.")
    model.rules = [Rule("ok")]  # 0.0005 $
    async with runtime() as rt:
        session = None
        for n in range(3):
            outcome = await turn(rt, f"turn {n}", agent="boss", session=session, budget_usd=0.0009)
            session = outcome.session_id


# -- the door -----------------------------------------------------------------------------------------------


async def test_a_process_that_works_for_no_run_can_do_nothing_through_the_door(
    runtime: Open, model: ModelServer, project: Path
) -> None:
    """Its token outlives the turn; it acts for the run it works for now, or for none."""
    write_agent(project, "boss", tools="mcp__orchestrator__delegate", body="You are the boss.")
    call = ToolUse("mcp__orchestrator__delegate", {"agent": "helper", "prompt": "inner"})
    model.rules = [
        Rule("inner", when={"user_contains": "inner", "tool_result": False}),
        Rule("done", when={"tool_result": True}),
        Rule(Reply(call)),
    ]
    async with warmed(runtime(open_door=open_door, pool__warm={"boss": 1})) as rt:
        [token_of] = rt.tokens._processes.values()
        assert rt.tokens._runs == {}
        first = await turn(rt, "one", agent="boss")
        second = await turn(rt, "two", agent="boss", session=first.session_id)
        assert token_of not in rt.tokens._runs
        tree = [[run.name for run in await rt.store.tree(outcome.run_id)] for outcome in (first, second)]
    assert tree == [["boss", "helper"], ["boss", "helper"]]


# -- the queue ----------------------------------------------------------------------------------------------


async def test_a_full_queue_refuses_with_a_time_to_come_back_or_waits_if_asked(
    runtime: Open, model: ModelServer
) -> None:
    gate = anyio.Event()

    async def held(request: Request) -> Reply:
        await gate.wait()
        return Reply("ok")

    model.rules = [Rule(held)]
    async with runtime(limits__max_processes=1, limits__max_queue=1) as rt:
        working = await submit(rt, Task(agent="helper", prompt="one"))
        await model.wait_for("one")
        waiting = await submit(rt, Task(agent="helper", prompt="two"))
        with pytest.raises(QueueFullError) as refused:
            await submit(rt, Task(agent="helper", prompt="three"))
        assert refused.value.retry_after is not None
        assert refused.value.retry_after > 0
        assert len(await rt.store.runs()) == 2, "a refused run leaves no row"
        patient: list[Outcome] = []

        async def waits() -> None:
            patient.append(await delegate(rt, Task(agent="helper", prompt="four", on_full="wait")))

        async with anyio.create_task_group() as tg:
            tg.start_soon(waits)
            gate.set()
            with anyio.fail_after(60):
                for run_id in (working, waiting):
                    assert (await wait(rt, run_id)).status == "succeeded"
        assert patient[0].status == "succeeded"
        assert rt.pool.state.counters.refused >= 1


async def test_delegation_cannot_wait_for_itself(runtime: Open, model: ModelServer, project: Path) -> None:
    """One process at a time, three levels deep: each run lends its place to the one it waits for."""
    for name in ("a", "b"):
        write_agent(project, name, tools="mcp__orchestrator__delegate", body=f"You are {name}.")
    write_agent(project, "c", tools="Read", body="You are c.")

    def to(agent: str) -> Reply:
        return Reply(ToolUse("mcp__orchestrator__delegate", {"agent": agent, "prompt": f"for {agent}"}))

    model.rules = [
        Rule("done", when={"tool_result": True}),
        Rule(to("b"), when={"user_contains": "for a"}),
        Rule(to("c"), when={"user_contains": "for b"}),
        Rule("leaf"),
    ]
    async with runtime(open_door=open_door, limits__max_processes=1) as rt:
        outcome = await turn(rt, "for a", agent="a")
        assert [run.name for run in await rt.store.tree(outcome.run_id)] == ["a", "b", "c"]


# -- the end ------------------------------------------------------------------------------------------------


async def test_closing_ends_every_process(runtime: Open, model: ModelServer) -> None:
    model.rules = [Rule("ok")]
    async with warmed(runtime(pool__warm={"helper": 2}), 2) as rt:
        await turn(rt, "hello")
        await until(rt, ready(rt, 2))
        pids = [kept.pid for kept in rt.pool._kept.values()]
        assert len(pids) == 3
    assert not [pid for pid in pids if pid and psutil.pid_exists(pid)]
