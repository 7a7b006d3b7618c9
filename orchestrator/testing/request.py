"""A request to the Messages API as a scenario sees it."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

# The CLI puts context of its own beside what the user wrote, wrapped in this tag.
_REMINDER = re.compile(r"<system-reminder>.*?</system-reminder>", re.DOTALL)

# First line of the CLI's system prompt; it names the CLI's version, never the agent.
_BILLING_HEADER = "x-anthropic-billing-header:"


@dataclass(frozen=True)
class ToolResult:
    """What one tool call gave back to the model. Images and other non-text parts are left out of ``text``."""

    tool_use_id: str
    text: str
    is_error: bool = False


@dataclass(frozen=True, eq=False)
class Request:
    """One POST to ``/v1/messages``.

    ``index`` counts the server's requests from 0, ``body`` is the decoded JSON, ``headers`` has lower-case
    names, ``size`` is the length of the encoded body in bytes. Everything else is read out of these.
    """

    index: int
    body: Mapping[str, Any]
    headers: Mapping[str, str] = field(default_factory=dict)
    size: int = 0

    @property
    def model(self) -> str:
        """The model asked for."""
        return str(self.body.get("model", ""))

    @property
    def stream(self) -> bool:
        """True if the answer is wanted as server-sent events."""
        return bool(self.body.get("stream"))

    @property
    def traceparent(self) -> str | None:
        """The W3C trace context the request came with."""
        return self.headers.get("traceparent")

    @property
    def tools(self) -> list[str]:
        """Names of the tools on offer."""
        return [str(tool.get("name", "")) for tool in self.body.get("tools") or ()]

    @cached_property
    def system(self) -> str:
        """All system text: the ``system`` field and, after it, messages of role ``system``."""
        messages = (text for m in self._messages if m.get("role") == "system" for text in _texts(m))
        return "\n".join([*_content_texts(self.body.get("system")), *messages])

    @property
    def system_prompt_start(self) -> str:
        """The system text without the CLI's billing line: the part that tells agents apart."""
        lines = self.system.splitlines()
        return "\n".join(line for line in lines if not line.startswith(_BILLING_HEADER)).strip()

    @cached_property
    def last_user_text(self) -> str:
        """Text of the last user message without ``<system-reminder>`` parts; empty if it is all tool results."""
        texts = (_REMINDER.sub("", text).strip() for text in _texts(self._last_user_message))
        return "\n".join(text for text in texts if text)

    @cached_property
    def texts(self) -> list[str]:
        """Every text of the user and the assistant, oldest first, reminders included."""
        return [text for message in self._dialogue for text in _texts(message)]

    @cached_property
    def earlier_texts(self) -> list[str]:
        """``texts`` without those of the last user message."""
        last = self._last_user_message
        return [text for message in self._dialogue if message is not last for text in _texts(message)]

    @cached_property
    def tool_results(self) -> list[ToolResult]:
        """Tool results of the last user message."""
        return list(_tool_results(self._last_user_message))

    @cached_property
    def all_tool_results(self) -> list[ToolResult]:
        """Tool results of the whole history, oldest first."""
        return [result for message in self._dialogue for result in _tool_results(message)]

    def says(self, text: str) -> bool:
        """True if the last user message contains ``text``, in its own words or in a tool result."""
        return text in self.last_user_text or any(text in result.text for result in self.tool_results)

    def describe(self) -> str:
        """One line for an error message: what the request asks, cut to a readable length."""
        results = ", ".join(repr(result.text[:80]) for result in self.tool_results) or "none"
        return (
            f"model {self.model}, last user text {self.last_user_text[:200]!r}, tool results {results}, "
            f"system starts {self.system_prompt_start[:120]!r}"
        )

    @property
    def _messages(self) -> list[Mapping[str, Any]]:
        return [message for message in self.body.get("messages") or () if isinstance(message, Mapping)]

    @cached_property
    def _dialogue(self) -> list[Mapping[str, Any]]:
        return [message for message in self._messages if message.get("role") in ("user", "assistant")]

    @cached_property
    def _last_user_message(self) -> Mapping[str, Any]:
        users = (message for message in reversed(self._dialogue) if message.get("role") == "user")
        return next(users, {})


def _texts(message: Mapping[str, Any]) -> Iterator[str]:
    return _content_texts(message.get("content"))


def _content_texts(content: Any) -> Iterator[str]:
    if isinstance(content, str):
        yield content
    else:
        for block in _blocks(content, "text"):
            yield str(block.get("text", ""))


def _tool_results(message: Mapping[str, Any]) -> Iterator[ToolResult]:
    for block in _blocks(message.get("content"), "tool_result"):
        yield ToolResult(
            tool_use_id=str(block.get("tool_use_id", "")),
            text="\n".join(_content_texts(block.get("content"))),
            is_error=bool(block.get("is_error")),
        )


def _blocks(content: Any, block_type: str) -> Iterator[Mapping[str, Any]]:
    for block in content if isinstance(content, list) else ():
        if isinstance(block, Mapping) and block.get("type") == block_type:
            yield block
