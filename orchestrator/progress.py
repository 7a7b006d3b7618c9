"""What is known of a run while it goes on: text, tools, tokens, cost. Pure: messages in, figures out.

Until the CLI reports its own cost with the result, cost is estimated from list prices of what streamed, so that
budgets act during a turn and a run that is killed still says what it must have cost.
"""

from dataclasses import dataclass, field
from typing import Any

from orchestrator.content import ModelUsage
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
from orchestrator.pricing import estimate_usd

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
    unpriced: bool = False
    guessed_usd: float = 0.0
    unreadable: str | None = None
    _said: dict[str, str] = field(default_factory=dict)
    _streaming: list[str] = field(default_factory=list)
    _request: dict[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """Everything the agent has said so far, the part still streaming included."""
        return "\n\n".join([*self._said.values(), *filter(None, ["".join(self._streaming)])])

    @property
    def charge_usd(self) -> float:
        """What budgets are charged: the cost, or for a model without a known price what the CLI guesses it to be.

        The guess is never shown as a cost; but a budget that ignored such models would bound nothing.
        """
        return max(self.cost_usd or 0.0, self.guessed_usd)

    def feed(self, message: Message) -> None:
        """Take in one message."""
        match message:
            case StreamEvent(parent_tool_use_id=None):
                self._stream(message)
            case AssistantMessage(parent_tool_use_id=None):
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
            self.cut_short()
            begun = message.event.get("message")
            model = begun.get("model") if isinstance(begun, dict) else None
            self._request = {**(message.usage or {}), "model": model}
        elif kind == "message_delta" and self._request:
            self._count({**self._request, **{k: v for k, v in (message.usage or {}).items() if v is not None}})
            self._request = {}

    def _count(self, request: dict[str, Any]) -> None:
        """Add one finished model request: its tokens, and its list price."""
        self.num_turns += 1
        # Streamed events are the provider's, unchecked: a count in a new shape must not end the run.
        counts = {key: value for key, value in request.items() if isinstance(value, int)}
        self.usage += Usage(
            input_tokens=counts.get("input_tokens", 0),
            output_tokens=counts.get("output_tokens", 0),
            cache_read_tokens=counts.get("cache_read_input_tokens", 0),
            cache_write_tokens=counts.get("cache_creation_input_tokens", 0),
        )
        price = estimate_usd(str(request.pop("model")), request)
        if price is None:
            self.unpriced = True
        else:
            self.cost_usd = (self.cost_usd or 0.0) + price

    def cut_short(self) -> None:
        """The turn, or an attempt, broke off. A request left open, with no result to price it, cost its input."""
        if self.result is None and self._request:
            self._count(self._request)
            self._request = {}

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
