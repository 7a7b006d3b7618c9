"""The fake conversation: a runtime on it works like one on CLIs, with a script in their place."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import anyio
import pytest

from orchestrator import Runtime, Task, delegate, open_runtime, submit
from orchestrator.config import Config
from orchestrator.conversation import Conversation, Spec, Turn
from orchestrator.delegation import cancel, wait
from orchestrator.errors import CLIExitError, RunCancelledError, ServerError
from orchestrator.messages import ResultMessage, StreamEvent
from orchestrator.testing import FakeConversation, FakeProcesses
from orchestrator.testing.fake_conversation import answer_messages

Open = Callable[[FakeProcesses], AbstractAsyncContextManager[Runtime]]
SESSION = "3f0d6c1e-6a0e-4d7c-9d1a-0e8a4d0f7a11"


@pytest.fixture
def fake(make_config: Callable[..., Config], environ: dict[str, str]) -> Open:
    """Opens runtimes on fakes."""

    @asynccontextmanager
    async def opened(processes: FakeProcesses) -> AsyncIterator[Runtime]:
        config = make_config(retry__max_retries=0)
        with anyio.fail_after(30):
            async with open_runtime(config, environ=environ, open_process=processes) as rt:
                yield rt

    return opened


async def test_a_run_on_a_fake_is_recorded_like_any_other(fake: Open) -> None:
    processes = FakeProcesses("All is well.")
    async with fake(processes) as rt:
        outcome = await delegate(rt, Task(agent="helper", prompt="How are things?"))
        assert (outcome.status, outcome.text) == ("succeeded", "All is well.")
        assert (outcome.usage.input_tokens, outcome.usage.output_tokens) == (100, 5)
        assert outcome.cost_usd == 0.0005
        assert (await rt.store.run(outcome.run_id)).outcome() == outcome
        kinds = [message.type for message in await rt.store.messages(outcome.run_id)]
        assert kinds == ["command_lifecycle", "system", "assistant", "result"]
        [conversation] = processes.living
        assert [turn.prompt for turn in conversation.turns] == ["How are things?"]
    assert (processes.living, processes.opened) == (set(), 1)


async def test_a_session_goes_on_in_the_same_fake(fake: Open) -> None:
    def count(conversation: FakeConversation, _: Turn) -> str:
        return f"answer {len(conversation.turns)}"

    processes = FakeProcesses(count)
    async with fake(processes) as rt:
        first = await delegate(rt, Task(agent="helper", prompt="one"))
        second = await delegate(rt, Task(agent="helper", prompt="two", session=first.session_id))
    assert (first.text, second.text) == ("answer 1", "answer 2")
    assert first.session_id == second.session_id
    assert processes.opened == 1


async def test_an_error_is_the_death_of_the_cli(fake: Open) -> None:
    async with fake(FakeProcesses(lambda _, __: CLIExitError("it fell over"))) as rt:
        outcome = await delegate(rt, Task(agent="helper", prompt="go"))
        assert outcome.error is not None
        assert (outcome.status, outcome.error["code"]) == ("failed", "cli_exit")


async def test_what_says_nothing_can_be_cancelled(fake: Open) -> None:
    sent = anyio.Event()

    def silent(_: FakeConversation, __: Turn) -> None:
        sent.set()

    processes = FakeProcesses(silent)
    async with fake(processes) as rt:
        run_id = await submit(rt, Task(agent="helper", prompt="go"))
        await sent.wait()
        [conversation] = processes.living
        await cancel(rt, run_id)
        assert (await wait(rt, run_id)).status == "cancelled"
        assert conversation.interrupts == 1


async def test_a_script_may_speak_later(environ: dict[str, str]) -> None:
    spec = Spec(cwd=Path(environ["HOME"]), env=environ, session_id=SESSION)
    said = [{"type": "result", "subtype": "success", "is_error": False, "result": "late"}]
    with anyio.fail_after(10):
        async with FakeProcesses(lambda _, __: None)(spec) as conversation:
            await conversation.send(Turn("go", "u1"))
            with anyio.move_on_after(0.01) as early:
                await conversation.receive()
            assert early.cancelled_caught
            conversation.say(*said)
            message = await conversation.receive()
            assert isinstance(message, ResultMessage)
            assert message.result == "late"
            await conversation.interrupt()  # nothing is at work: nothing is said
            conversation.end(ServerError("over"))
            with pytest.raises(ServerError):
                await conversation.receive()
            await conversation.send(Turn("too late", "u2"))
            assert len(conversation.turns) == 1


async def test_it_streams_as_the_cli_does(environ: dict[str, str]) -> None:
    spec = Spec(cwd=Path(environ["HOME"]), env=environ, session_id=SESSION)
    async with FakeProcesses("so")(spec) as opened:
        conversation: Conversation = opened  # it is one
        await conversation.send(Turn("go", "u1"))
        heard = [await conversation.receive()]
        while not isinstance(heard[-1], ResultMessage):
            heard.append(await conversation.receive())
        assert [m.text_delta for m in heard if isinstance(m, StreamEvent) and m.text_delta] == ["so"]
        assert heard[-1].turn_cost_usd == 0.0005


async def test_a_message_that_comes_with_the_cancel_is_recorded(fake: Open) -> None:
    sent = anyio.Event()

    def silent(_: FakeConversation, __: Turn) -> None:
        sent.set()

    processes = FakeProcesses(silent)
    async with fake(processes) as rt:
        run_id = await submit(rt, Task(agent="helper", prompt="go"))
        await sent.wait()
        await anyio.wait_all_tasks_blocked()
        [conversation] = processes.living
        init, *_ = [
            m for m in answer_messages(conversation.spec, conversation.turns[0], "x") if m["type"] == "system"
        ]
        conversation.say(init)
        rt.live[run_id].stop(RunCancelledError("at the same moment"))
        outcome = await wait(rt, run_id)
        messages = await rt.store.messages(run_id)
        [session] = await rt.store.sessions()
    assert outcome.status == "cancelled"
    assert [(message.seq, message.type) for message in messages] == [(1, "system"), (2, "result")]
    assert session.turns == 1
