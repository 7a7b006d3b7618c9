"""What is known of a run while it goes on: text, tools, tokens, cost. Pure: messages in, figures out.

Until the CLI reports its own cost with the result, cost is estimated from list prices of what is seen, so that
budgets act during a turn and a run that is killed still says what it must have cost. The agent's own requests are
known from their stream: their input when they begin, their output when they end. Of its sub-agents' the CLI tells
each answer's input; their output is guessed from its length until the result corrects it.
"""

from dataclasses import dataclass, field
from typing import Any

from orchestrator.content import Block, ModelUsage, TextBlock, ThinkingBlock, ToolUseBlock
from orchestrator.messages import (
    ApiRetry,
    AssistantMessage,
    Message,
    ResultMessage,
    StreamEvent,
    SystemInit,
    UnknownMessage,
)
from orchestrator.outcome import Usage
from orchestrator.usage import Meter

SYNTHETIC_MODEL = "<synthetic>"


@dataclass(slots=True)
class Progress:
    """The state of one turn. ``cost_usd`` is None while nothing is known; ``estimated`` tells its basis."""

    model: str | None = None
    usage: Usage = field(default_factory=Usage)
    cost_usd: float | None = None
    estimated: bool = True
    num_turns: int = 0
    activity: str = "starting"
    initialised: bool = False
    result: ResultMessage | None = None
    last_retry: ApiRetry | None = None
    assistant_error: str | None = None
    guessed_usd: float = 0.0
    unreadable: str | None = None
    heard: bool = False
    _said: dict[str, str] = field(default_factory=dict)
    _cut: list[str] = field(default_factory=list)
    _streaming: list[str] = field(default_factory=list)
    _meter: Meter = field(default_factory=Meter)

    @property
    def text(self) -> str:
        """Everything the agent has said so far, the part still streaming included."""
        return "\n\n".join([*self._said.values(), *filter(None, ["".join(self._streaming)])])

    @property
    def answer(self) -> str:
        """The result's text with the parts that were cut off before it; without a result all that was said."""
        said = self.result.result if self.result is not None else None
        return "".join([*self._cut, said]) if said else self.text

    @property
    def charge_usd(self) -> float:
        """What budgets are charged: the cost, or for a model without a known price what the CLI guesses it to be.

        The guess is never shown as a cost; but a budget that ignored such models would bound nothing.
        """
        return max(self.cost_usd or 0.0, self.guessed_usd)

    @property
    def charge_turns(self) -> int:
        """Turns as budgets count them: model requests begun, sub-agents' included."""
        return self._meter.requests

    @property
    def unpriced_model(self) -> str | None:
        """A model that was used and has no list price; None while there is none."""
        return self._meter.unpriced_model

    @property
    def unpriced(self) -> bool:
        """Whether part of the cost is not in the estimate."""
        return self.unpriced_model is not None

    def feed(self, message: Message) -> None:
        """Take in one message."""
        self.heard = True
        match message:
            case StreamEvent(parent_tool_use_id=None):
                self._stream(message)
            case AssistantMessage():
                self._count_block(message)
                if message.parent_tool_use_id is None:
                    self._assistant(message)
            case SystemInit():
                self.initialised = True
                self.model = message.model or self.model
            case ApiRetry():
                self.last_retry = message
                self.activity = f"retry {message.attempt}/{message.max_retries}: {message.error}"
            case ResultMessage():
                self._result(message)
            case UnknownMessage(type="result"):
                # Guessing at a result would be worse than none: a lost is_error reads as success.
                self.unreadable = message.problem or "unknown shape"
            case _:
                pass

    def _stream(self, message: StreamEvent) -> None:
        kind = message.event.get("type")
        if (delta := message.text_delta) is not None:
            self._streaming.append(delta)
            self.activity = "answering"
        elif message.thinking_delta is not None:
            self.activity = "thinking"
        if kind == "message_start":
            self._streaming.clear()  # of an attempt that broke off and is made again
            begun = message.event.get("message")
            begun = begun if isinstance(begun, dict) else {}
            request_id, model = begun.get("id"), str(begun.get("model"))
            self.num_turns += self._meter.begin(None, request_id, model, message.usage or {}, streamed=True)
        elif kind == "message_delta":
            self._meter.end(None, message.usage or {})
            self._note_stop(message.event)
        if kind in ("message_start", "message_delta"):
            self._estimate()

    def _note_stop(self, event: dict[str, Any]) -> None:
        """An answer that ran into its limit of tokens is gone on with: the CLI's result has the last part alone."""
        delta = event.get("delta")
        stop = delta.get("stop_reason") if isinstance(delta, dict) else None
        if stop == "max_tokens" and self._said:
            self._cut.append(next(reversed(self._said.values())))
        elif stop == "tool_use":
            self._cut.clear()

    def _count_block(self, message: AssistantMessage) -> None:
        said, usage = message.message, message.message.usage
        if usage is None or said.model in (None, SYNTHETIC_MODEL) or message.error:
            return
        length = sum(_length(block) for block in said.content)
        self._meter.block(message.parent_tool_use_id, said.id, said.model, usage.raw(), length)
        self._estimate()

    def _estimate(self) -> None:
        if self.result is None:
            self.usage, self.cost_usd = self._meter.usage, self._meter.cost_usd

    def cut_short(self) -> None:
        """The turn broke off. Nothing is left to do: a request counts from its beginning."""

    def _assistant(self, message: AssistantMessage) -> None:
        if message.message.model == SYNTHETIC_MODEL or message.error:
            # The CLI speaking in the model's place; what it says is the error, not the answer.
            self.assistant_error = message.error or self.assistant_error
            return
        self.model = message.message.model or self.model
        for taken_back in message.supersedes or ():
            self._said.pop(taken_back, None)
        if text := message.text_content:
            self._said[message.uuid or f"#{len(self._said)}"] = text
            self._streaming.clear()
        for use in message.tool_uses:
            self.activity = describe_tool(use.name, use.input)

    def _result(self, result: ResultMessage) -> None:
        self.result = result
        self.initialised = self.initialised or not result.is_error
        self.num_turns = result.num_turns or self.num_turns
        self.activity = "done"
        spent = result.model_usage_since_last_result
        if spent:
            self.usage = sum((_tokens(usage) for usage in spent.values()), Usage())
            if result.turn_cost_usd is None:
                self.guessed_usd = float(sum(usage.cost_usd or 0 for usage in spent.values()))
        if result.turn_cost_usd is not None and (spent or self.cost_usd is None):
            self.cost_usd, self.estimated = result.turn_cost_usd, False


def _tokens(usage: ModelUsage) -> Usage:
    return Usage(
        input_tokens=usage.input_tokens or 0,
        output_tokens=usage.output_tokens or 0,
        cache_read_tokens=usage.cache_read_input_tokens or 0,
        cache_write_tokens=usage.cache_creation_input_tokens or 0,
    )


def _length(block: Block) -> int:
    match block:
        case TextBlock():
            return len(block.text)
        case ThinkingBlock():
            return len(block.thinking)
        case ToolUseBlock():
            return len(str(block.input))
        case _:
            return 0


# The argument of a tool that tells best what it is doing.
_TELLING = ("command", "file_path", "pattern", "agent", "description", "url", "query", "path")


def describe_tool(name: str, arguments: dict[str, Any]) -> str:
    """One short line about a tool use: ``Bash: git log -3``."""
    short = name.removeprefix("mcp__").replace("__", ".")
    for key in _TELLING:
        if isinstance(value := arguments.get(key), str) and value:
            line = " ".join(value.split())
            return f"{short}: {line[:80]}"
    return short
