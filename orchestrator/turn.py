"""One turn of a run with its CLI: send the prompt, take in what comes, keep time, judge the result."""

import time

import anyio

from orchestrator.agents import Agent
from orchestrator.conversation import Conversation
from orchestrator.endings import figures
from orchestrator.errors import BackendError, OrchestratorError, RunTimeoutError, StructuredOutputError
from orchestrator.groups import unwrapped
from orchestrator.messages import KeepAlive, Message, StreamEvent
from orchestrator.runtime import LiveRun, Runtime
from orchestrator.specs import build_spec
from orchestrator.store import Run
from orchestrator.task import Task

# How long a stopped CLI may take to say what the turn had cost.
WIND_DOWN_SECONDS = 0.7
# How often the text of a running turn is put on its row: what a crash leaves behind is at most this old.
TEXT_SECONDS = 0.25
TEXT_CHARS_PER_SECOND = 1_000_000


async def converse(rt: Runtime, live: LiveRun, agent: Agent, task: Task) -> None:
    """One turn with the CLI; sets the verdict on ``live``."""
    limits = rt.config.limits
    wall, idle = task.timeout_s or limits.timeout_s, task.idle_timeout_s or limits.idle_timeout_s
    live.budget.check()  # others may have spent it while this run waited for its place
    spec = await build_spec(rt, live, agent, task)
    async with rt.connect(spec) as conversation:
        try:
            with unwrapped():
                async with anyio.create_task_group() as tg:
                    tg.start_soon(_watch_time, live, wall, idle)
                    tg.start_soon(_note_text, rt, live)
                    tg.start_soon(conversation.send, _first_words(agent, live.row, task))
                    await _listen(rt, live, conversation)
                    tg.cancel_scope.cancel()
        except BaseException:
            with anyio.CancelScope(shield=True), anyio.move_on_after(WIND_DOWN_SECONDS):
                await _wind_down(rt, live, conversation)
            if live.progress.result is not None and verdict(rt, live, task.output_schema is not None) is None:
                live.answered = True  # the answer was on its way when the run was stopped
            raise
        live.verdict = verdict(rt, live, task.output_schema is not None)
        live.answered = True


def _first_words(agent: Agent, row: Run, task: Task) -> str:
    if row.session_mode == "fresh" and agent.initial_prompt:
        return f"{agent.initial_prompt}\n\n{task.prompt}"
    return task.prompt


async def _listen(rt: Runtime, live: LiveRun, conversation: Conversation) -> None:
    """Take in messages up to the result, each recorded before it is acted upon."""
    while live.progress.result is None:
        await take(rt, live, await conversation.receive())
        if live.progress.unreadable is not None:
            raise BackendError(f"the CLI's result could not be read: {live.progress.unreadable}")
        if live.progress.result is None:
            if (fatal := rt.dialect.fatal(live.progress.last_retry)) is not None:
                raise fatal
            live.budget.check()


async def _note_text(rt: Runtime, live: LiveRun) -> None:
    noted, row_chars = "", len(live.row.prompt or "")
    while True:
        # SQLite writes the whole row anew, prompt included: large ones less often.
        await anyio.sleep(max(TEXT_SECONDS, (row_chars + len(noted)) / TEXT_CHARS_PER_SECOND))
        if (text := live.progress.text) != noted:
            noted = text
            await rt.store.note_progress(live.row.id, text=text)


async def take(rt: Runtime, live: LiveRun, message: Message) -> None:
    """Record one message and update what is known of the run: its figures, its budget, its watchers."""
    live.touch(time.monotonic())
    before, activity, known = live.progress.charge_usd, live.progress.activity, live.progress.initialised
    live.progress.feed(message)
    live.budget.charge(live.progress.charge_usd - before)
    if not isinstance(message, StreamEvent | KeepAlive):
        # Deltas are not kept one by one: the assistant message that follows says the same in one row.
        raw = message.raw()
        live.messages += 1
        await rt.store.add_message(live.row.id, live.messages, raw.get("type", "?"), raw.get("subtype"), raw)
    if live.progress.initialised and not known:
        assert live.row.session_id is not None
        await rt.store.count_turn(live.row.session_id, live.row.id)
    if live.progress.activity != activity:
        rt.emit("run.activity", live.row.id, **figures(live))


async def _wind_down(rt: Runtime, live: LiveRun, conversation: Conversation) -> None:
    """Interrupt the turn and keep what the CLI still says: the cut text and what the turn cost."""
    await conversation.interrupt()
    while live.progress.result is None:
        try:
            await take(rt, live, await conversation.receive())
        except OrchestratorError:
            return


async def _watch_time(live: LiveRun, wall: float, idle: float) -> None:
    """Stop the run when it takes too long, or when nothing has been heard of it and its children for too long."""
    deadline = time.monotonic() + wall
    while True:
        now = time.monotonic()
        if now >= deadline:
            live.stop(RunTimeoutError(f"the run took longer than {wall:g} s", details={"kind": "wall"}))
        elif now >= live.touched + idle:
            live.stop(RunTimeoutError(f"nothing was heard of the run for {idle:g} s", details={"kind": "idle"}))
        await anyio.sleep(max(0.01, min(deadline, live.touched + idle) - now))


def verdict(rt: Runtime, live: LiveRun, schema_asked: bool) -> OrchestratorError | None:
    """Whether the turn is an answer. A schema asked for and no structured output is an error, whatever was said."""
    progress = live.progress
    assert progress.result is not None
    error = rt.dialect.error_of(progress.result, progress.last_retry, progress.assistant_error)
    if error is None and schema_asked and not progress.result.has_structured_output:
        return StructuredOutputError("the agent answered in text where structured output was asked for")
    return error
