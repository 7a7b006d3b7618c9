"""One turn of a run over a conversation: send the prompt, take in what comes, keep time, judge the result."""

import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial

import anyio
from anyio.abc import TaskGroup

from orchestrator.asking import is_asking, open_question, see_answered, withdraw
from orchestrator.conversation import Conversation, Turn
from orchestrator.endings import figures
from orchestrator.errors import (
    BackendError,
    BudgetExceededError,
    OrchestratorError,
    RunTimeoutError,
    StructuredOutputError,
)
from orchestrator.groups import unwrapped
from orchestrator.limits import refuse_unknown_cost
from orchestrator.messages import (
    AssistantMessage,
    ControlCancelRequest,
    ControlRequest,
    KeepAlive,
    Message,
    RateLimitEvent,
    StreamEvent,
)
from orchestrator.parking import CONTINUE_PROMPT, Redelivery, continue_uuid
from orchestrator.runtime import LiveRun, Runtime
from orchestrator.task import Task

# How long a stopped CLI may take to say what the turn had cost.
WIND_DOWN_SECONDS = 0.7
# How often the text of a running turn is put on its row: what a crash leaves behind is at most this old.
TEXT_SECONDS = 0.25
TEXT_CHARS_PER_SECOND = 1_000_000
#: Tools that can start processes which outlive the call.
SHELLS = ("Bash", "PowerShell", "Monitor", "REPL")


async def hold_turn(rt: Runtime, live: LiveRun, task: Task, conversation: Conversation, turn: Turn) -> None:
    """Have the turn answered; sets the verdict on ``live``. When it is stopped, what the CLI still says is kept."""
    schema_asked = task.output_schema is not None
    try:
        await _converse(rt, live, task, conversation, turn)
    except BaseException as stopped:
        with anyio.CancelScope(shield=True), anyio.move_on_after(WIND_DOWN_SECONDS):
            await _wind_down(rt, live, conversation)
        answered = live.progress.result is not None and verdict(rt, live, schema_asked) is None
        if answered and not isinstance(stopped, BudgetExceededError):
            live.answered = True  # the answer was on its way when the run was stopped
        raise
    live.verdict = verdict(rt, live, schema_asked)
    live.answered = True


async def _converse(rt: Runtime, live: LiveRun, task: Task, conversation: Conversation, turn: Turn) -> None:
    idle = task.idle_timeout_s or rt.config.limits.idle_timeout_s
    go_on = replace(turn, prompt=CONTINUE_PROMPT, uuid=continue_uuid(live.row.id, live.waits.parks))
    live.questions.clear()  # those of a turn before, if it was ended before anybody was told of them
    with unwrapped():
        async with anyio.create_task_group() as tg:
            tg.start_soon(conversation.send, turn)
            tg.start_soon(_watch_time, rt, live, idle)
            tg.start_soon(_note_text, rt, live)
            asked = partial(_ask, rt, live, conversation, tg) if turn.asks else None
            await _listen(rt, live, conversation, Redelivery(turn.uuid), partial(conversation.send, go_on), asked)
            tg.cancel_scope.cancel()


async def _listen(
    rt: Runtime,
    live: LiveRun,
    conversation: Conversation,
    redelivery: Redelivery,
    go_on: Callable[[], Awaitable[None]],
    asked: Callable[[Message], None] | None,
) -> None:
    """Take in messages up to the result, each recorded before it is acted upon."""
    while True:
        spent = live.progress.charge_usd
        message = await conversation.receive()
        await take(rt, live, message)
        if asked is not None:
            asked(message)
        if redelivery.swallowed(message):
            if not live.earlier:
                raise BackendError("the session has had this prompt already; it is not answered again")
            await go_on()
        if live.progress.unreadable is not None:
            raise BackendError(f"the CLI's result could not be read: {live.progress.unreadable}")
        result = live.progress.result
        if result is None and (fatal := rt.dialect.fatal(live.progress.last_retry)) is not None:
            raise fatal
        # An answer that is in stands although others have used up what was left; not if it did so itself.
        if result is None or live.progress.charge_usd > spent:
            _check_budget(rt, live)
        if result is not None:
            return


def _ask(rt: Runtime, live: LiveRun, conversation: Conversation, tg: TaskGroup, message: Message) -> None:
    """Have a question of the CLI answered while the turn goes on: it may ask several at once."""
    match message:
        case ControlRequest() if rt.dialect.is_question(message):
            tg.start_soon(see_answered, rt, live, conversation, open_question(live, message))
        case ControlCancelRequest():
            withdraw(live, message.request_id)


def _check_budget(rt: Runtime, live: LiveRun) -> None:
    if (model := live.progress.unpriced_model) is not None:
        refuse_unknown_cost(live.budget, model, rt.config.limits.on_unknown_cost)
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
    progress = live.progress
    activity, known = progress.activity, progress.initialised
    progress.feed(message)
    _notice(rt, live, message)
    _charge(live)
    if not isinstance(message, StreamEvent | KeepAlive):
        # Deltas are not kept one by one: the assistant message that follows says the same in one row.
        raw = message.raw()
        live.messages += 1
        await rt.store.add_message(live.row.id, live.messages, raw.get("type", "?"), raw.get("subtype"), raw)
    live.said.publish(message, live.messages)
    if live.progress.initialised and not known and not live.earlier and live.row.session_id is not None:
        await rt.store.count_turn(live.row.session_id, live.row.id)
    if live.progress.activity != activity:
        rt.emit("run.activity", live.row.id, **figures(live))


def _charge(live: LiveRun) -> None:
    """Have the budgets know what the run has used; most messages change nothing."""
    progress = live.progress
    used = (progress.charge_usd, progress.usage.total_tokens, progress.charge_turns)
    if used == live.charged:
        return
    live.charged = used
    earlier = live.earlier
    live.budget.settle(
        usd=used[0] + sum(each.charge_usd for each in earlier),
        tokens=used[1] + sum(each.usage.total_tokens for each in earlier),
        turns=used[2] + sum(each.charge_turns for each in earlier),
    )


def _notice(rt: Runtime, live: LiveRun, message: Message) -> None:
    """What a message says beside the progress of the turn."""
    match message:
        case RateLimitEvent():
            live.rate_limit = message
        case StreamEvent() if live.permit is not None and live.permit.probe:
            # The provider works. Told at once: what this run delegates must not wait for its end.
            rt.breaker.success(live.permit, anyio.current_time())
        case AssistantMessage():
            live.commands = live.commands or any(use.name in SHELLS for use in message.tool_uses)


async def _wind_down(rt: Runtime, live: LiveRun, conversation: Conversation) -> None:
    """Interrupt the turn and keep what the CLI still says: the cut text and what the turn cost."""
    await conversation.interrupt()
    while live.progress.result is None:
        try:
            await take(rt, live, await conversation.receive())
        except OrchestratorError:
            return


async def _watch_time(rt: Runtime, live: LiveRun, idle: float) -> None:
    """Stop the run when it takes too long, or when nothing has been heard of it and its children for too long.

    Raises RunTimeoutError where the API may answer in place of a CLI that has not said a word.
    """
    fallback = rt.config.fallback
    while True:
        now, deadline = time.monotonic(), live.budget.left.deadline
        try:
            live.budget.check_time(now)
        except OrchestratorError as error:
            live.stop(error)
        if now >= live.touched + idle and is_asking(rt, live):
            live.touch(now)  # who waits for an answer is not idle
        if now >= live.touched + idle:
            silent = RunTimeoutError(f"nothing was heard of the run for {idle:g} s", details={"kind": "idle"})
            if fallback.enabled and fallback.on_timeout and not live.progress.heard and live.row.fallback is None:
                raise silent
            live.stop(silent)
        ends = live.touched + idle if deadline is None else min(deadline, live.touched + idle)
        await anyio.sleep(max(0.01, ends - now))


def verdict(rt: Runtime, live: LiveRun, schema_asked: bool) -> OrchestratorError | None:
    """Whether the turn is an answer. A schema asked for and no structured output is an error, whatever was said."""
    progress = live.progress
    assert progress.result is not None
    error = rt.dialect.error_of(
        progress.result, progress.last_retry, progress.assistant_error, rate_limit=live.rate_limit, now=time.time()
    )
    if error is None and schema_asked and not progress.result.has_structured_output:
        return StructuredOutputError("the agent answered in text where structured output was asked for")
    return error
