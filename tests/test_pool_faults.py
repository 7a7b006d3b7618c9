"""What may go wrong around the pool, with conversations that do as a script says: no run pays for another's."""

import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from orchestrator import Outcome, Runtime, Task, delegate, keep_warm, open_runtime, submit
from orchestrator.config import Config
from orchestrator.conversation import Spec, Turn
from orchestrator.delegation import wait
from orchestrator.errors import CLIExitError, RunCancelledError
from orchestrator.testing import FakeConversation, FakeProcesses
from orchestrator.testing.fake_conversation import answer_messages

Opened = Callable[..., AbstractAsyncContextManager[Runtime]]


class Script:
    """Answers at once; prompts that begin with "long" get their result when ``finish`` is called."""

    def __init__(self) -> None:
        self.at_work: dict[str, tuple[FakeConversation, Any]] = {}
        self._came = anyio.Event()

    def __call__(self, conversation: FakeConversation, turn: Turn) -> str | None:
        if not turn.prompt.startswith("long"):
            return "ok"
        messages = answer_messages(conversation.spec, turn, "done")
        ends = next(n for n, message in enumerate(messages) if message["type"] == "result")
        conversation.say(*messages[:ends])
        self.at_work[turn.prompt] = conversation, messages[ends:]
        self._came.set()
        return None

    async def began(self, *prompts: str) -> None:
        while not set(prompts) <= set(self.at_work):
            self._came = anyio.Event()
            await self._came.wait()

    def finish(self, *prompts: str) -> None:
        for prompt in prompts:
            conversation, rest = self.at_work.pop(prompt)
            conversation.say(*rest)


@pytest.fixture
def fake(make_config: Callable[..., Config], environ: dict[str, str]) -> Opened:
    """Opens runtimes on fake processes, for at most half a minute."""

    @asynccontextmanager
    async def opened(processes: FakeProcesses, **more: Any) -> AsyncIterator[Runtime]:
        config = make_config(retry__max_retries=0, **more)
        with anyio.fail_after(30):
            async with open_runtime(config, environ=environ, open_process=processes) as rt:
                yield rt

    return opened


async def ended(rt: Runtime, *run_ids: str) -> list[Outcome]:
    return [await wait(rt, run_id) for run_id in run_ids]


async def idle(rt: Runtime, count: int, agent: str = "helper") -> None:
    """Wait until so many warm processes are ready."""

    def ready() -> int:
        return sum((w.phase, w.starting, w.agent) == ("idle", False, agent) for w in rt.pool.state.workers.values())

    with rt.events.watch() as events:
        while ready() != count:
            with anyio.move_on_after(0.2):
                await anext(aiter(events))


async def test_runs_of_a_new_kind_that_had_to_wait(fake: Opened) -> None:
    """While they wait, what is kept of kinds nobody uses is thrown away; theirs is used."""
    script = Script()
    async with fake(FakeProcesses(script), limits__max_processes=2, pool__max_starts=4) as rt:
        long = [await submit(rt, Task(agent="helper", prompt=f"long {n}")) for n in range(2)]
        await script.began("long 0", "long 1")
        short = [await submit(rt, Task(agent="worker", prompt="short")) for _ in range(2)]
        while len(rt.pool.state.keys) < 2:
            await anyio.wait_all_tasks_blocked()
        rt.pool.forget_stale()
        script.finish("long 0", "long 1")
        assert [outcome.status for outcome in await ended(rt, *long, *short)] == ["succeeded"] * 4
        await idle(rt, 2, "worker")  # they came together, so two more of their kind are kept warm
        assert (await delegate(rt, Task(agent="worker", prompt="short"))).status == "succeeded"


async def test_a_run_that_is_cancelled_while_it_begins_leaves_its_session_to_nobody(fake: Opened) -> None:
    """Its warm process has a session whose row may be written or not: the next run gets another process."""
    script = Script()
    settings = {"limits__max_processes": 1, "pool__warm": {"helper": 1}}
    async with fake(FakeProcesses(script), **settings) as rt, anyio.create_task_group() as tg:
        tg.start_soon(keep_warm, rt)
        await idle(rt, 1)
        first = await submit(rt, Task(agent="worker", prompt="long"))
        await script.began("long")
        cancelled = await submit(rt, Task(agent="helper", prompt="x"))
        after = await submit(rt, Task(agent="helper", prompt="y"))
        while not [session for session in await rt.store.sessions() if session.turns]:
            await anyio.wait_all_tasks_blocked()  # until all that "long" has said so far is written
        blocker = sqlite3.connect(rt.config.store_path, isolation_level=None)
        blocker.execute("BEGIN IMMEDIATE")  # the disk is slow: nothing that is written comes through
        script.finish("long")
        while not any(w.run_id == cancelled for w in rt.pool.state.workers.values()):
            await anyio.wait_all_tasks_blocked()
            await anyio.lowlevel.checkpoint()
        await anyio.wait_all_tasks_blocked()
        rt.live[cancelled].stop(RunCancelledError("enough"))
        await anyio.wait_all_tasks_blocked()
        blocker.execute("COMMIT")
        blocker.close()
        outcomes = await ended(rt, first, cancelled, after)
        assert [outcome.status for outcome in outcomes] == ["succeeded", "cancelled", "succeeded"]
        assert outcomes[2].session_id != outcomes[1].session_id
        again = await delegate(rt, Task(agent="helper", prompt="z", session=outcomes[2].session_id))
        assert again.status == "succeeded"
        tg.cancel_scope.cancel()


class SlowToEnd(FakeProcesses):
    """Ending one takes a while, as it does with a CLI."""

    def __init__(self, script: Any) -> None:
        super().__init__(script)
        self.may_end = anyio.Event()

    @asynccontextmanager
    async def __call__(
        self, spec: Spec, on_ready: Callable[[], None] | None = None
    ) -> AsyncIterator[FakeConversation]:
        async with super().__call__(spec, on_ready) as conversation:
            try:
                yield conversation
            finally:
                with anyio.CancelScope(shield=True):
                    await self.may_end.wait()


async def test_a_session_whose_process_dies_as_it_is_handed_out_goes_on_in_another(fake: Opened) -> None:
    processes = SlowToEnd("ok")
    async with fake(processes) as rt:
        first = await delegate(rt, Task(agent="helper", prompt="one"))
        [conversation] = processes.living
        conversation.end(CLIExitError("killed by the kernel"))
        run_id = await submit(rt, Task(agent="helper", prompt="two", session=first.session_id))
        await anyio.wait_all_tasks_blocked()
        processes.may_end.set()
        [second] = await ended(rt, run_id)
        assert (second.status, second.session_id) == ("succeeded", first.session_id)


async def test_who_waits_for_room_is_told_when_there_is_some(fake: Opened) -> None:
    """Also without any queue: then a place that comes free is the only room."""
    script = Script()
    outcomes: list[Outcome] = []
    async with fake(FakeProcesses(script), limits__max_processes=1, limits__max_queue=0) as rt:
        first = await submit(rt, Task(agent="helper", prompt="long"))
        await script.began("long")

        async def patient() -> None:
            outcomes.append(await delegate(rt, Task(agent="helper", prompt="x", on_full="wait")))

        async with anyio.create_task_group() as tg:
            tg.start_soon(patient)
            await anyio.wait_all_tasks_blocked()
            script.finish("long")
        await ended(rt, first)
    assert [outcome.status for outcome in outcomes] == ["succeeded"]


async def test_whoever_is_waited_for_is_as_urgent_as_who_waits(fake: Opened) -> None:
    """Otherwise runs of the parent's priority would take, one after the other, the place it lends to its child."""
    script = Script()
    async with fake(FakeProcesses(script), limits__max_processes=1) as rt:
        parent = await submit(rt, Task(agent="helper", prompt="long parent", priority=5))
        await script.began("long parent")
        other = await submit(rt, Task(agent="worker", prompt="long other", priority=4))
        child = await submit(rt, Task(agent="worker", prompt="child", parent_id=parent))
        assert (await ended(rt, child))[0].status == "succeeded"
        script.finish("long parent")
        await script.began("long other")
        script.finish("long other")
        assert [outcome.status for outcome in await ended(rt, parent, other)] == ["succeeded", "succeeded"]


async def test_runs_that_waited_for_a_place_together_do_not_begin_together_against_the_rate(fake: Opened) -> None:
    script = Script()
    async with fake(FakeProcesses(script), limits__max_processes=2, limits__rate="2/1s") as rt:
        long = [await submit(rt, Task(agent="helper", prompt=f"long {n}")) for n in range(2)]
        await script.began("long 0", "long 1")
        waiting = [await submit(rt, Task(agent="helper", prompt=f"x {n}")) for n in range(4)]
        await anyio.sleep(1.1)  # the window of the first two is over: time is what the test is about
        script.finish("long 0", "long 1")
        await ended(rt, *long, *waiting)
        begun = sorted([(await rt.store.run(run_id)).started_us or 0 for run_id in waiting])
    assert begun[2] - begun[0] >= 900_000


async def test_what_waits_on_the_api_alone_is_in_nobodys_way(fake: Opened) -> None:
    """A place in the queue is given back by every way a run can take."""
    script = Script()
    async with fake(FakeProcesses(script), limits__max_processes=1, limits__max_queue=2) as rt:
        first = await submit(rt, Task(agent="helper", prompt="long"))
        await script.began("long")
        waiting = [await submit(rt, Task(agent="helper", prompt="x")) for _ in range(2)]
        rt.live[waiting[0]].stop(RunCancelledError("enough"))
        await ended(rt, waiting[0])
        waiting.append(await submit(rt, Task(agent="helper", prompt="x")))
        script.finish("long")
        outcomes = await ended(rt, first, *waiting)
    assert [outcome.status for outcome in outcomes] == ["succeeded", "cancelled", "succeeded", "succeeded"]
