"""Pools of tasks over the real CLI: how many run at once, in which order, how they end, and what is seen live."""

import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import anyio
import psutil
import pytest

from orchestrator import Outcome, Pools, ProcessPool, Runtime, StreamingPool, Task, submit, watch_run
from orchestrator.delegation import wait
from orchestrator.errors import ConfigError, QueueFullError, RunCancelledError, RunNotFoundError
from orchestrator.messages import (
    AssistantMessage,
    Message,
    ResultMessage,
    StreamEvent,
    UserMessage,
    collect_text,
)
from orchestrator.pool_tasks import PoolTask
from orchestrator.testing import Fault, ModelServer, Reply, Request, Rule, ToolUse
from orchestrator.watching import PAGE
from tests.conftest import bundled_cli

Open = Callable[..., AbstractAsyncContextManager[Runtime]]
ROOT = Path(__file__).parent.parent


class Gates:
    """A model whose answers wait: each prompt has a gate, and the gates count who stands before them."""

    def __init__(self, model: ModelServer) -> None:
        self.model = model
        self.inside = self.most = 0
        self._gates: dict[str, anyio.Event] = {}
        model.rules = [Rule(self._answer)]

    def open(self, *prompts: str) -> None:
        for prompt in prompts:
            self._gate(prompt).set()

    async def reached(self, *prompts: str) -> None:
        """Wait until the model is asked each of these."""
        for prompt in prompts:
            await self.model.wait_for(prompt, timeout=60)

    def _gate(self, prompt: str) -> anyio.Event:
        return self._gates.setdefault(prompt, anyio.Event())

    async def _answer(self, request: Request) -> str:
        self.inside += 1
        self.most = max(self.most, self.inside)
        try:
            await self._gate(request.last_user_text).wait()
        finally:
            self.inside -= 1
        return f"answer to {request.last_user_text}"


@pytest.fixture
def gates(model: ModelServer) -> Gates:
    return Gates(model)


def prompts_of(tasks: list[PoolTask]) -> list[str]:
    return [task.task.prompt for task in tasks]


def processes(rt: Runtime, run_id: str) -> list[psutil.Process]:
    """The CLI that works for a run."""
    pids = [kept.pid for kept in rt.pool._kept.values() if kept.worker.run_id == run_id]
    return [psutil.Process(pid) for pid in pids if pid is not None]


# -- how many at once, in which order -------------------------------------------------------------------------


async def test_a_task_has_an_outcome_and_a_run(rt: Runtime, model: ModelServer) -> None:
    model.rules = [Rule("hello to you")]
    with anyio.fail_after(60):
        async with ProcessPool(rt, agent="helper") as pool:
            task = await pool.submit("hello")
            assert pool.get_task(task.id) is task
            outcome = await task.result()
    assert (task.status, outcome.text, outcome.run_id) == ("done", "hello to you", task.run_id)
    row = await rt.store.run(outcome.run_id)
    assert (row.status, row.prompt, row.name) == ("succeeded", "hello", "helper")
    assert row.options["timeout_s"] == 300


async def test_no_more_than_max_workers_run_at_once(rt: Runtime, gates: Gates) -> None:
    with anyio.fail_after(90):
        async with ProcessPool(rt, agent="helper", max_workers=2) as pool:
            tasks = [await pool.submit(f"p{n}") for n in range(4)]
            await gates.reached("p0", "p1")
            stats = pool.get_stats()
            assert (stats.running, stats.pending, stats.done) == (2, 2, 0)
            assert [task.status for task in tasks] == ["running", "running", "pending", "pending"]
            gates.open("p0", "p1", "p2", "p3")
            outcomes = [await task.result() for task in tasks]
        assert gates.most == 2
    assert [outcome.text for outcome in outcomes] == [f"answer to p{n}" for n in range(4)]
    stats = pool.get_stats()
    assert (stats.running, stats.pending, stats.done, stats.kept) == (0, 0, 4, 4)


@pytest.mark.parametrize(("order", "expected"), [("input", ["p0", "p1", "p2"]), ("completion", ["p2", "p1", "p0"])])
async def test_map_yields_in_the_order_asked_for(
    rt: Runtime, gates: Gates, order: Any, expected: list[str]
) -> None:
    """The last prompt is answered first."""
    done: list[PoolTask] = []

    async def collect() -> None:
        results = pool.map(["p0", "p1", "p2"], order=order)
        done.append(await anext(results))
        await ended.wait()  # meanwhile several end
        done.extend([task async for task in results])

    ended = anyio.Event()
    with anyio.fail_after(90):
        async with ProcessPool(rt, agent="helper", max_workers=3) as pool, anyio.create_task_group() as tg:
            tg.start_soon(collect)
            await gates.reached("p0", "p1", "p2")
            with rt.events.watch() as events:
                for prompt in ("p2", "p1", "p0"):
                    gates.open(prompt)
                    await anext(event async for event in events if event.type == "run.ended")
            ended.set()
    assert prompts_of(done) == expected
    assert all(task.outcome and task.outcome.text == f"answer to {task.task.prompt}" for task in done)


async def test_map_takes_prompts_only_as_there_is_room(rt: Runtime, gates: Gates) -> None:
    """An endless iterable is no trouble, and leaving the iteration cancels what was begun for it."""
    taken: list[str] = []

    def endless() -> Iterator[str]:
        while True:
            taken.append(f"p{len(taken)}")
            yield taken[-1]

    gates.open("p0", "p1")
    with anyio.fail_after(90):
        async with ProcessPool(rt, agent="helper", max_workers=1, queue_size=1) as pool:
            results = pool.map(endless(), order="completion")
            assert prompts_of([await anext(results), await anext(results)]) == ["p0", "p1"]
            await results.aclose()  # type: ignore[attr-defined]  # it is a generator
            stats = pool.get_stats()
            assert (stats.pending, stats.running, stats.done) == (0, 0, 2)
            assert stats.cancelled == len(taken) - 3  # the last one taken was never submitted
            assert len(taken) <= 5
    assert not rt.live


async def test_the_fields_of_one_map_are_every_prompts_own(rt: Runtime, model: ModelServer) -> None:
    """The caller's options are not changed by use: the second prompt has what the first had."""
    model.rules = [Rule("ok")]
    options: dict[str, Any] = {"agent": "worker", "append_system_prompt": "Say please."}
    with anyio.fail_after(60):
        async with ProcessPool(rt, agent="helper") as pool:
            tasks = [task async for task in pool.map(["a", "b"], **options)]
    assert options == {"agent": "worker", "append_system_prompt": "Say please."}
    assert [(t.task.agent, t.task.append_system_prompt) for t in tasks] == [("worker", "Say please.")] * 2
    assert [request.system.count("Say please.") for request in model.journal] == [1, 1]


async def test_gather_keeps_the_order_and_failures_apart(rt: Runtime, model: ModelServer) -> None:
    model.rules = [
        Rule(Reply(fault=Fault(status=400, message="no")), when={"user_contains": "bad"}),
        Rule(lambda request: f"answer to {request.last_user_text}"),
    ]
    with anyio.fail_after(90):
        async with ProcessPool(rt, agent="helper", queue_size=0) as pool:
            mine = await pool.submit("mine")
            outcomes = await pool.gather(
                "a", "bad", Task(agent="nobody", prompt="b"), Task(agent="worker", prompt="c"), mine
            )
    assert [outcome.status for outcome in outcomes] == ["succeeded", "failed", "failed", "succeeded", "succeeded"]
    assert (outcomes[0].text, outcomes[3].text) == ("answer to a", "answer to c")
    assert outcomes[1].error
    assert outcomes[1].error["code"] == "invalid_request"
    # Refused before anything was spent: there is no run.
    assert outcomes[2].error
    assert (outcomes[2].error["code"], outcomes[2].run_id) == ("agent_not_found", "")
    assert (await rt.store.run(outcomes[3].run_id)).name == "worker"
    stats = pool.get_stats()
    assert (stats.done, stats.failed) == (3, 2)


async def test_a_gather_that_is_cancelled_cancels_its_own(rt: Runtime, gates: Gates) -> None:
    with anyio.fail_after(90):
        async with ProcessPool(rt, agent="helper") as pool:
            mine = await pool.submit("mine")
            async with anyio.create_task_group() as tg:
                tg.start_soon(pool.gather, "p0", mine)
                await gates.reached("p0", "mine")
                tg.cancel_scope.cancel()
            assert pool.get_stats().cancelled == 1
            assert mine.status == "running"
            gates.open("mine")
            assert (await mine.result()).ok


# -- ends ------------------------------------------------------------------------------------------------------


async def test_cancel_of_a_pending_task(rt: Runtime, gates: Gates) -> None:
    with anyio.fail_after(60):
        async with ProcessPool(rt, agent="helper", max_workers=1) as pool:
            first = await pool.submit("p0")
            second = await pool.submit("p1")
            await gates.reached("p0")
            assert await pool.cancel(second.id)
            outcome = await second.result()
            assert (second.status, outcome.status, outcome.run_id, second.run_id) == (
                "cancelled",
                "cancelled",
                "",
                None,
            )
            gates.open("p0")
            assert (await first.result()).ok
    assert len(await rt.store.runs()) == 1
    assert gates.model.requests(text="p1") == []


async def test_cancel_of_a_running_task_ends_its_process(rt: Runtime, model: ModelServer) -> None:
    model.rules = [Rule(Reply("The first half. The other half.", fault=Fault(stall_at=4)))]
    with anyio.fail_after(60):
        async with StreamingPool(rt, agent="helper") as pool:
            task = await pool.submit("p0")
            async for message in task:
                if isinstance(message, StreamEvent) and message.text_delta:
                    break
            assert task.run_id is not None
            [process] = processes(rt, task.run_id)
            assert await pool.cancel(task.id)
            outcome = await task.result()
            assert not process.is_running()
            assert not await pool.cancel(task.id)
    assert (task.status, outcome.status, outcome.text) == ("cancelled", "cancelled", "The first half. ")
    assert outcome.error
    assert outcome.error["message"] == "cancelled on request"


async def test_cancel_of_what_is_not_there(rt: Runtime) -> None:
    async with ProcessPool(rt, agent="helper") as pool:
        assert not await pool.cancel("nothing")
        assert pool.get_task("nothing") is None


async def test_a_task_is_cancelled_while_the_runtime_makes_it_wait(runtime: Open, gates: Gates) -> None:
    """The pool's workers are more than the runtime's processes: what waits there has no process to end."""
    async with runtime(limits__max_processes=1) as rt:
        with anyio.fail_after(60):
            async with ProcessPool(rt, agent="helper") as pool:
                first, second = await pool.submit("p0"), await pool.submit("p1")
                await gates.reached("p0")
                while second.status != "running":
                    await anyio.lowlevel.checkpoint()
                assert await pool.cancel(second.id)
                assert (await second.result()).status == "cancelled"
                gates.open("p0")
                assert (await first.result()).ok
        assert gates.model.requests(text="p1") == []


async def test_shutdown_waits(rt: Runtime, gates: Gates) -> None:
    pool = ProcessPool(rt, agent="helper", max_workers=1)
    with anyio.fail_after(60):
        tasks = [await pool.submit(f"p{n}") for n in range(2)]
        async with anyio.create_task_group() as tg:
            tg.start_soon(pool.shutdown)
            await gates.reached("p0")
            with pytest.raises(RunCancelledError):
                await pool.submit("late")
            gates.open("p0", "p1")
    assert [task.status for task in tasks] == ["done", "done"]


async def test_shutdown_without_waiting_cancels(rt: Runtime, gates: Gates) -> None:
    pool = ProcessPool(rt, agent="helper", max_workers=1)
    with anyio.fail_after(60):
        tasks = [await pool.submit(f"p{n}") for n in range(3)]
        await gates.reached("p0")
        assert tasks[0].run_id is not None
        [process] = processes(rt, tasks[0].run_id)
        await pool.shutdown(wait=False)
    assert [task.status for task in tasks] == ["cancelled"] * 3
    assert not process.is_running()
    assert not rt.live
    assert gates.model.requests(text="p1") == []  # none of those that waited took the free place


async def test_shutdown_sends_those_away_who_wait_for_room(rt: Runtime, gates: Gates) -> None:
    pool = ProcessPool(rt, agent="helper", max_workers=1, queue_size=0)
    refused: list[str] = []

    async def late(prompt: str) -> None:
        with pytest.raises(RunCancelledError):
            await pool.submit(prompt)
        refused.append(prompt)

    with anyio.fail_after(60):
        first = await pool.submit("p0")
        async with anyio.create_task_group() as tg:
            tg.start_soon(late, "p1")
            tg.start_soon(late, "p2")
            await gates.reached("p0")
            tg.start_soon(pool.shutdown)
            gates.open("p0")
    assert refused == ["p1", "p2"]
    assert first.status == "done"


async def test_leaving_with_an_error_cancels(rt: Runtime, gates: Gates) -> None:
    async def use() -> None:
        async with ProcessPool(rt, agent="helper") as pool:
            tasks.append(await pool.submit("p0"))
            await gates.reached("p0")
            raise ZeroDivisionError

    tasks: list[PoolTask] = []
    with anyio.fail_after(60), pytest.raises(ZeroDivisionError):
        await use()
    assert tasks[0].status == "cancelled"
    assert not rt.live


async def test_leaving_that_is_cancelled_cancels(rt: Runtime, gates: Gates) -> None:
    with anyio.fail_after(60):
        async with anyio.create_task_group() as tg:
            tasks: list[PoolTask] = []

            async def use() -> None:
                async with ProcessPool(rt, agent="helper") as pool:
                    tasks.append(await pool.submit("p0"))

            tg.start_soon(use)
            await gates.reached("p0")
            tg.cancel_scope.cancel()
    assert tasks[0].status == "cancelled"
    assert not rt.live


async def test_a_runtime_that_closes_ends_the_tasks(runtime: Open, gates: Gates) -> None:
    with anyio.fail_after(60):
        async with runtime() as rt:
            pool = ProcessPool(rt, agent="helper", max_workers=1)
            tasks = [await pool.submit("p0"), await pool.submit("p1")]
            await gates.reached("p0")
        assert [(await task.result()).status for task in tasks] == ["cancelled", "cancelled"]
        with pytest.raises(RunCancelledError):
            await pool.submit("p2")


async def test_a_task_that_takes_too_long(rt: Runtime, gates: Gates) -> None:
    with anyio.fail_after(60):
        async with ProcessPool(rt, agent="helper", task_timeout_s=2) as pool:
            outcome = await (await pool.submit("p0")).result()
            own = await pool.submit("p1", timeout_s=30)
            await gates.reached("p1")
            gates.open("p1")
            assert (await own.result()).ok
            assert own.task.timeout_s == 30
    assert outcome.status == "timed_out"
    assert outcome.error
    assert outcome.error["code"] == "timeout"
    assert pool.get_stats().failed == 1


# -- a full queue ----------------------------------------------------------------------------------------------


async def test_a_full_queue_refuses(rt: Runtime, gates: Gates) -> None:
    with anyio.fail_after(60):
        async with ProcessPool(rt, agent="helper", max_workers=1, queue_size=1, on_full="refuse") as pool:
            await pool.submit("p0")
            await pool.submit("p1")
            with pytest.raises(QueueFullError) as refused:
                await pool.submit("p2")
            assert refused.value.retry_after
            assert refused.value.retryable
            assert (pool.get_stats().refused, pool.get_stats().pending) == (1, 2)
            gates.open("p0", "p1")
    assert pool.get_stats().done == 2
    assert gates.model.requests(text="p2") == []


async def test_a_full_queue_waits(rt: Runtime, gates: Gates) -> None:
    taken: list[PoolTask] = []

    async def hand_over() -> None:
        taken.append(await pool.submit("p2"))

    with anyio.fail_after(60):
        async with ProcessPool(rt, agent="helper", max_workers=1, queue_size=1) as pool:
            await pool.submit("p0")
            await pool.submit("p1")
            async with anyio.create_task_group() as tg:
                tg.start_soon(hand_over)
                await gates.reached("p0")
                assert taken == []
                gates.open("p0", "p2")
            assert prompts_of(taken) == ["p2"]
            gates.open("p1")
    assert pool.get_stats().done == 3
    assert gates.most == 1


async def test_the_full_queue_of_the_runtime_refuses_no_task_of_a_pool(runtime: Open, gates: Gates) -> None:
    async with runtime(limits__max_processes=1, limits__max_queue=1) as rt:
        with anyio.fail_after(90):
            async with ProcessPool(rt, agent="helper", max_workers=4) as pool:
                tasks = [await pool.submit(f"p{n}") for n in range(4)]
                await gates.reached("p0")  # the others have found their places taken by now
                gates.open("p0", "p1", "p2", "p3")
    assert [task.status for task in tasks] == ["done"] * 4


@pytest.mark.parametrize("wrong", [{"max_workers": 0}, {"queue_size": -1}, {"keep": -1}])
async def test_limits_that_are_none(rt: Runtime, wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        ProcessPool(rt, **wrong)


async def test_what_cannot_be_a_task_takes_no_room(rt: Runtime, model: ModelServer) -> None:
    model.rules = [Rule("ok")]
    with anyio.fail_after(60):
        async with ProcessPool(rt, max_workers=1, queue_size=0, on_full="refuse") as pool:
            with pytest.raises(ConfigError, match="agent"):
                await pool.submit("for nobody")
            with pytest.raises(ValueError, match="timeout_s"):
                await pool.submit("x", agent="helper", timeout_s=-1)
            assert (await (await pool.submit("x", agent="helper")).result()).ok


# -- what is kept ----------------------------------------------------------------------------------------------


async def test_ended_tasks_are_forgotten_but_for_the_last(rt: Runtime, model: ModelServer) -> None:
    model.rules = [Rule("ok")]
    with anyio.fail_after(90):
        async with ProcessPool(rt, agent="helper", max_workers=1, keep=2) as pool:
            ids = [task.id async for task in pool.map([f"p{n}" for n in range(4)])]
            assert [pool.get_task(id_) is not None for id_ in ids] == [False, False, True, True]
            stats = pool.get_stats()
            assert (stats.done, stats.kept) == (4, 2)
    assert len(await rt.store.runs()) == 4  # the record forgets nothing


async def test_shared_pools_are_the_same_by_name(rt: Runtime, model: ModelServer) -> None:
    model.rules = [Rule("ok")]
    with anyio.fail_after(60):
        async with Pools(rt) as pools:
            pool = pools.get_pool(agent="helper", max_workers=2)
            assert pools.get_pool() is pool
            assert pools.get_pool(agent="helper", max_workers=2) is pool
            assert pools.get_pool("other") is not pool
            with pytest.raises(ConfigError, match="max_workers"):
                pools.get_pool(max_workers=3)
            streaming = pools.get_streaming_pool(agent="helper")
            assert streaming is pools.get_streaming_pool()
            task = await pool.submit("x")
            await pools.reset_pools()
            assert task.status == "done"
            with pytest.raises(RunCancelledError):
                await pool.submit("y")
            again = pools.get_pool(agent="helper")
            assert again is not pool
            last = await again.submit("z")
        assert last.status == "done"


# -- what is seen live -----------------------------------------------------------------------------------------


def deltas(messages: list[Message]) -> list[str]:
    return [m.text_delta for m in messages if isinstance(m, StreamEvent) and m.text_delta is not None]


def whole(messages: list[Message]) -> list[Any]:
    """The messages that are recorded, as plain data."""
    return [m.raw() for m in messages if not isinstance(m, StreamEvent)]


async def all_of(messages: AsyncIterator[Message]) -> list[Message]:
    return [message async for message in messages]


async def until_text(messages: AsyncIterator[Message]) -> list[Message]:
    """What comes, up to the first piece of text."""
    seen: list[Message] = []
    async for message in messages:
        seen.append(message)
        if deltas([message]):
            return seen
    raise AssertionError("it said nothing")


async def test_text_and_tools_are_seen_before_the_result(rt: Runtime, model: ModelServer, project: Path) -> None:
    (project / "note.txt").write_text("the note")
    answer = anyio.Event()

    async def second(_: Request) -> str:
        await answer.wait()
        return "It says: the note."

    read = ToolUse("Read", {"file_path": str(project / "note.txt")})
    model.rules = [Rule(second, when={"tool_result": True}), Rule(Reply(["Let me look.", read]))]
    seen: list[Message] = []
    with anyio.fail_after(60):
        async with StreamingPool(rt, agent="helper") as pool:
            task = await pool.submit("what does it say?")
            async for message in task:
                seen.append(message)
                if isinstance(message, UserMessage) and message.tool_results:
                    # The model is still thinking: no result can be there.
                    assert (task.status, task.outcome) == ("running", None)
                    assert "".join(deltas(seen)) == "Let me look."
                    [use] = [u for m in seen if isinstance(m, AssistantMessage) for u in m.tool_uses]
                    assert use.input == read.input
                    assert any(m.usage for m in seen if isinstance(m, StreamEvent))
                    answer.set()
            outcome = await task.result()
    assert isinstance(seen[-1], ResultMessage)
    assert seen[-1].result == outcome.text == "It says: the note."
    assert "".join(deltas(seen)) == "Let me look.It says: the note."
    assert collect_text(seen) == "Let me look.\n\nIt says: the note."


async def test_a_slow_consumer_loses_deltas_only_and_knows_how_many(rt: Runtime, model: ModelServer) -> None:
    text = "".join(chr(ord("a") + n % 26) for n in range(400))
    model.rules = [Rule(Reply(text, chunk_size=1))]
    fast: list[Message] = []
    with anyio.fail_after(60):
        async with StreamingPool(rt, agent="helper") as pool, anyio.create_task_group() as tg:
            task = await pool.submit("x")
            slow, quick = task.messages(size=5), task.messages(size=5000)

            async def follow() -> None:
                fast.extend(await all_of(quick))

            tg.start_soon(follow)
            begun = [await anext(slow)]  # it listens from before the first delta
            assert deltas(begun) == []
            assert (await task.result()).text == text  # the run did not wait for it
            late = begun + await all_of(slow)
    assert quick.lost == 0
    assert "".join(deltas(fast)) == text
    assert slow.lost > 300
    streamed = [sum(isinstance(m, StreamEvent) for m in seen) for seen in (fast, late)]
    assert slow.lost == streamed[0] - streamed[1]
    # Nothing that is recorded went by: it was fetched from the store.
    assert whole(late) == whole(fast)
    assert isinstance(late[-1], ResultMessage)


async def test_a_slow_consumer_fetches_a_long_run_page_by_page(
    rt: Runtime, model: ModelServer, project: Path
) -> None:
    (project / "note.txt").write_text("the note")
    read = ToolUse("Read", {"file_path": str(project / "note.txt")})
    model.rules = [Rule("done", when={"tool_result": True}), Rule(Reply([read] * (PAGE // 2)))]
    with anyio.fail_after(90):
        async with StreamingPool(rt, agent="helper") as pool:
            task = await pool.submit("x")
            slow = task.messages(size=1)
            seen = [await anext(slow)]
            assert (await task.result()).text == "done"
            seen += await all_of(slow)
    stored = await rt.store.messages(task.run_id or "")
    assert len(stored) > PAGE
    assert whole(seen) == [message.body for message in stored]


async def test_a_late_consumer_has_what_was_said_then_what_comes(
    rt: Runtime, model: ModelServer, project: Path
) -> None:
    """It comes in the middle of the second answer: whole messages, what has streamed of that one, then the rest."""
    (project / "note.txt").write_text("the note")
    read = ToolUse("Read", {"file_path": str(project / "note.txt")})
    half = Reply("The first half. The other half.", fault=Fault(stall_at=4))
    model.rules = [Rule(half, when={"tool_result": True}), Rule(Reply(["Let me look.", read], chunks=3))]
    with anyio.fail_after(60):
        async with StreamingPool(rt, agent="helper") as pool:
            task = await pool.submit("x")
            early = task.messages()
            first: list[Message] = []
            while "".join(deltas(first)) != "Let me look.The first half. ":
                first += await until_text(early)
            late = task.messages()
            caught_up: list[Message] = []
            while deltas(caught_up) != ["The first half. "]:
                caught_up += await until_text(late)
            assert whole(caught_up) == whole(first)
            await pool.cancel(task.id)
            rest, same = await all_of(early), await all_of(late)
            outcome = await task.result()
    assert [m.raw() for m in rest] == [m.raw() for m in same]
    assert outcome.text == "Let me look.\n\nThe first half. "
    assert early.lost == late.lost == 0


async def test_pieces_that_came_before_are_one(rt: Runtime, model: ModelServer) -> None:
    model.rules = [Rule(Reply("abcdefgh", chunk_size=1, fault=Fault(stall_at=6)))]
    with anyio.fail_after(60):
        async with StreamingPool(rt, agent="helper") as pool:
            task = await pool.submit("x")
            early = task.messages()
            seen: list[Message] = []
            while "".join(deltas(seen)) != "abc":
                seen += await until_text(early)
            assert deltas(seen) == ["a", "b", "c"]
            assert deltas(await until_text(task.messages())) == ["abc"]
            await pool.cancel(task.id)


async def test_a_consumer_after_the_end_has_every_whole_message(rt: Runtime, model: ModelServer) -> None:
    model.rules = [Rule(Reply("hello", chunks=5))]
    with anyio.fail_after(60):
        async with StreamingPool(rt, agent="helper") as pool:
            task = await pool.submit("x")
            live = await all_of(task.messages())
            after = await all_of(task.messages())
    assert deltas(after) == []
    assert whole(after) == whole(live)
    assert isinstance(after[-1], ResultMessage)
    assert len(after) < PAGE


async def test_a_consumer_that_leaves_is_forgotten(rt: Runtime, model: ModelServer) -> None:
    model.rules = [Rule(Reply("The first half. The other half.", fault=Fault(stall_at=4)))]
    with anyio.fail_after(60):
        async with StreamingPool(rt, agent="helper") as pool:
            task = await pool.submit("x")
            staying = task.messages()
            await until_text(staying)
            assert task.run_id is not None
            said = rt.live[task.run_id].said
            assert len(said._listeners) == 1
            async for message in task:
                if deltas([message]):
                    assert len(said._listeners) == 2
                    break
            assert len(said._listeners) == 1
            with anyio.move_on_after(0.1) as waiting:
                await all_of(task.messages())
            assert waiting.cancelled_caught
            assert len(said._listeners) == 1
            await pool.cancel(task.id)
            assert isinstance((await all_of(staying))[-1], ResultMessage)  # what the interrupted CLI still said


async def test_a_wait_that_is_cancelled_loses_nothing(rt: Runtime, model: ModelServer) -> None:
    model.rules = [Rule(Reply("".join("abcdefghij" * 5), chunk_size=1))]
    seen: list[Message] = []
    with anyio.fail_after(60):
        async with StreamingPool(rt, agent="helper") as pool:
            task = await pool.submit("x")
            messages = task.messages()
            while not (seen and isinstance(seen[-1], ResultMessage)):
                with anyio.move_on_after(0.001):
                    seen.append(await anext(messages))
    assert "".join(deltas(seen)) == "abcdefghij" * 5
    assert whole(seen) == [message.body for message in await rt.store.messages(task.run_id or "")]


async def test_a_task_that_never_begins_says_nothing(rt: Runtime, gates: Gates) -> None:
    with anyio.fail_after(60):
        async with StreamingPool(rt, agent="helper", max_workers=1) as pool:
            await pool.submit("p0")
            waiting = await pool.submit("p1")
            unknown = await pool.submit("p2", agent="nobody")
            seen: list[list[Message]] = []

            async def follow() -> None:
                seen.append(await all_of(waiting.messages()))

            async with anyio.create_task_group() as tg:
                tg.start_soon(follow)
                await gates.reached("p0")
                await pool.cancel(waiting.id)
            gates.open("p0")
            assert seen == [[]]
            assert await all_of(unknown.messages()) == []
            assert (await unknown.result()).status == "failed"


async def test_a_run_of_another_process_can_be_watched(runtime: Open, gates: Gates) -> None:
    """Of such a run there are no deltas; what is recorded comes as it is recorded."""
    async with runtime() as rt, runtime() as other:
        with anyio.fail_after(60):
            run_id = await submit(rt, Task(agent="helper", prompt="p0"))
            messages = watch_run(other, run_id[:20])
            await gates.reached("p0")
            first = await anext(messages)
            assert (await other.store.run(run_id)).status == "running"
            gates.open("p0")
            rest = await all_of(messages)
            outcome: Outcome = await wait(rt, run_id)
    assert not isinstance(first, ResultMessage)
    assert isinstance(rest[-1], ResultMessage)
    assert rest[-1].result == outcome.text == "answer to p0"


async def test_watching_a_run_that_is_not_there(rt: Runtime) -> None:
    with pytest.raises(RunNotFoundError):
        await anext(watch_run(rt, "0" * 16))
    with pytest.raises(ValueError, match="buffer"):
        watch_run(rt, "0" * 16, size=0)


# -- the example -----------------------------------------------------------------------------------------------


async def test_the_example_runs_offline(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    environ = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(tmp_path / "home"),
        "PYTHONPATH": str(ROOT),
        "ORCHESTRATOR_DATA_DIR": str(tmp_path / "data"),
        "ORCHESTRATOR_AGENTS__USER_PATH": str(tmp_path / "none"),
        "ORCHESTRATOR_CLAUDE__PATH": str(bundled_cli()),
    }
    program = os.fspath(ROOT / "examples" / "pool.py")
    with anyio.fail_after(100):
        done = await anyio.run_process(
            [sys.executable, program, "--offline"], cwd=tmp_path, env=environ, check=False, stderr=subprocess.STDOUT
        )
    said = done.stdout.decode()
    assert done.returncode == 0, said
    assert said.count("done: What is in examples/tiny_repo/") == 3, said
    assert "It prints what is on the shelf" in said
    assert "A test for each of the two comes first.\nsucceeded, 760 tokens, 0.00" in said, said
