"""Conversations without a CLI process: a script says what the CLI would, for tests of what is above it.

    async with open_runtime(config, open_process=FakeProcesses("done")) as rt: ...

Queues, budgets, the record and events are the real ones, and what the script says goes through the real parser.
What only a CLI can show (tools, files, retries, prices) needs the real one and ``running_model_server``.
"""

import json
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

import anyio
import anyio.lowlevel

from orchestrator.errors import CLIExitError, OrchestratorError
from orchestrator.messages import Message, parse_message

if TYPE_CHECKING:
    from orchestrator.conversation import Spec, Turn

JsonMessage: TypeAlias = Mapping[str, Any]
Answer: TypeAlias = "str | Sequence[JsonMessage] | OrchestratorError | None"
Script: TypeAlias = "Callable[[FakeConversation, Turn], Answer]"


class FakeConversation:
    """A ``Conversation`` that answers each turn by a script.

    The script is asked when a turn is sent. A text is answered as the CLI would, event by event; a list holds the
    messages to say, as JSON objects; an error ends the conversation, as the death of a CLI would; with None nothing
    is said, until ``say`` or ``end`` is called or the turn is interrupted. ``turns`` has what was sent.
    """

    def __init__(self, spec: "Spec", script: Script) -> None:
        self.spec = spec
        self.turns: list[Turn] = []
        self.interrupts = 0
        self._script = script
        self._lines: deque[bytes] = deque()
        self._said = anyio.Event()
        self._error: OrchestratorError | None = None
        self._at_work = False

    def __repr__(self) -> str:
        return f"<FakeConversation {self.spec.session_id[:8]}, {len(self.turns)} turns>"

    @property
    def stderr_tail(self) -> str:
        return ""

    async def prepare(self, turn: "Turn") -> None:  # noqa: ARG002  # as the protocol has it
        await anyio.lowlevel.checkpoint()

    async def send(self, turn: "Turn") -> None:
        await anyio.lowlevel.checkpoint()
        if self._error is not None:
            return  # as with a CLI: whoever reads is told
        self.turns.append(turn)
        self._at_work = True
        answer = self._script(self, turn)
        if isinstance(answer, OrchestratorError):
            self.end(answer)
        elif isinstance(answer, str):
            self.say(*answer_messages(self.spec, turn, answer))
        elif answer is not None:
            self.say(*answer)

    async def receive(self) -> Message:
        while not self._lines:
            if self._error is not None:
                raise self._error
            self._said = anyio.Event()
            await self._said.wait()
        return parse_message(self._lines.popleft())

    async def answer(self, request_id: str, response: Mapping[str, Any]) -> None:
        """Nothing of what it says is a question that waits."""

    async def interrupt(self) -> None:
        """A turn at work ends with the result of one that was interrupted."""
        await anyio.lowlevel.checkpoint()
        self.interrupts += 1
        if self._at_work:
            self.say(interrupted_message(self.spec, self.turns[-1]))

    def say(self, *messages: JsonMessage) -> None:
        """Say these next. A message of type ``result`` ends the turn."""
        self._lines.extend(json.dumps(message).encode() for message in messages)
        if any(message.get("type") == "result" for message in messages):
            self._at_work = False
        self._said.set()

    def end(self, error: OrchestratorError | None = None) -> None:
        """End the conversation: whoever reads gets what was said before, then the error."""
        self._error = error or CLIExitError("the CLI ended (exit code 1) before it gave a result")
        self._said.set()


class FakeProcesses:
    """Opens a ``FakeConversation`` wherever a CLI process would be started. For ``open_runtime(open_process=…)``.

    ``script`` is one text for every answer, or a function of the conversation and the turn. ``living`` has the
    conversations that are open, ``opened`` counts all there were.
    """

    def __init__(self, script: "Script | str" = "ok") -> None:
        self.living: set[FakeConversation] = set()
        self.opened = 0
        self._script = _always(script) if isinstance(script, str) else script

    def __repr__(self) -> str:
        return f"<FakeProcesses {len(self.living)} of {self.opened} living>"

    @asynccontextmanager
    async def __call__(
        self, spec: "Spec", on_ready: Callable[[], None] | None = None
    ) -> AsyncIterator[FakeConversation]:
        conversation = FakeConversation(spec, self._script)
        self.opened += 1
        self.living.add(conversation)
        try:
            if on_ready is not None:
                on_ready()
            yield conversation
        finally:
            self.living.discard(conversation)


def _always(text: str) -> Script:
    def answer(_: FakeConversation, __: "Turn") -> str:
        return text

    return answer


# --- What the CLI says of a turn


def answer_messages(spec: "Spec", turn: "Turn", text: str) -> list[JsonMessage]:
    """The messages of a turn that is answered with a text and calls no tools: 100 tokens in, 5 out."""
    model = turn.model or spec.model or "claude-opus-5-5"
    message_id = f"msg_fake_{turn.uuid}"
    said = {"id": message_id, "type": "message", "role": "assistant", "model": model}
    before: JsonMessage = {**said, "content": [], "usage": {"input_tokens": 100, "output_tokens": 1}}
    whole: JsonMessage = {**before, "content": [{"type": "text", "text": text}]}
    block = {"type": "text", "text": ""}
    delta = {"type": "text_delta", "text": text}
    stop = {"stop_reason": "end_turn"}
    usage = {"input_tokens": 100, "output_tokens": 5}
    messages: list[JsonMessage] = [
        _lifecycle(turn, "started"),
        {
            "type": "system", "subtype": "init", "cwd": str(spec.cwd), "model": model, "tools": [],
            "mcp_servers": [], "permissionMode": spec.permission_mode or "default",
        },
        _event({"type": "message_start", "message": before}),
        _event({"type": "content_block_start", "index": 0, "content_block": block}),
        _event({"type": "content_block_delta", "index": 0, "delta": delta}),
        {"type": "assistant", "message": whole, "parent_tool_use_id": None},
        _event({"type": "content_block_stop", "index": 0}),
        _event({"type": "message_delta", "delta": stop, "usage": usage}),
        _event({"type": "message_stop"}),
        _result(turn, model, is_error=False, subtype="success", result=text, terminal_reason="completed"),
        _lifecycle(turn, "completed"),
    ]  # fmt: skip
    return [
        {**message, "session_id": spec.session_id, "uuid": f"{turn.uuid}/{n}"} for n, message in enumerate(messages)
    ]


def interrupted_message(spec: "Spec", turn: "Turn") -> JsonMessage:
    """The result of a turn that was interrupted in the middle of the answer."""
    model = turn.model or spec.model or "claude-opus-5-5"
    ending = {"subtype": "error_during_execution", "terminal_reason": "aborted_streaming", "errors": []}
    return {**_result(turn, model, is_error=True, **ending), "session_id": spec.session_id}


def _event(event: JsonMessage) -> JsonMessage:
    return {"type": "stream_event", "event": event, "parent_tool_use_id": None}


def _lifecycle(turn: "Turn", state: str) -> JsonMessage:
    return {"type": "command_lifecycle", "command_uuid": turn.uuid, "state": state}


def _result(turn: "Turn", model: str, **fields: Any) -> JsonMessage:
    spent = {"inputTokens": 100, "outputTokens": 5, "costUSD": 0.0005}
    return {
        "type": "result",
        "num_turns": 1,
        "total_cost_usd": 0.0005,
        "model_usage_since_last_result": {model: spent},
        "user_message_uuids": [turn.uuid],
        **fields,
    }
