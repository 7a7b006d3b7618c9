"""What the CLI does at a usage limit, and how a session goes on after one. ``orchestrator.parking`` rests on it.

Each test is a fact of the CLI itself: a version that behaves differently fails here before a run is lost.
"""

import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest

from orchestrator.backends import claude
from orchestrator.conversation import Conversation, SessionMode, Spec, Turn
from orchestrator.errors import RateLimitError, SessionNotFoundError
from orchestrator.messages import AssistantMessage, Message, RateLimitEvent, ResultMessage
from orchestrator.parking import CONTINUE_PROMPT, Redelivery, UsageLimit, continue_uuid, prompt_uuid, usage_limit
from orchestrator.process import ProcessConversation, connect_process
from orchestrator.testing import Fault, ModelServer, Reply, Request, Rule, ToolUse
from tests.conftest import DUMMY_KEY, bundled_cli

Open = Callable[..., AbstractAsyncContextManager[ProcessConversation]]

NOW = int(time.time())
RESET = NOW + 3600
WINDOW = {
    "anthropic-ratelimit-unified-status": "rejected",
    "anthropic-ratelimit-unified-reset": RESET,
    "anthropic-ratelimit-unified-representative-claim": "five_hour",
    "anthropic-ratelimit-unified-5h-status": "rejected",
    "anthropic-ratelimit-unified-5h-utilization": "1.0",
    "anthropic-ratelimit-unified-5h-reset": RESET,
    "anthropic-ratelimit-unified-overage-status": "rejected",
}
WARNING = WINDOW | {
    "anthropic-ratelimit-unified-status": "allowed_warning",
    "anthropic-ratelimit-unified-5h-status": "allowed_warning",
    "anthropic-ratelimit-unified-5h-utilization": "0.91",
    "anthropic-ratelimit-unified-5h-surpassed-threshold": "0.9",
}
OVERAGE = WINDOW | {"anthropic-ratelimit-unified-overage-status": "allowed"}
USED_UP = Reply(fault=Fault(status=429, headers=WINDOW))
PROMPT = "Count the shelves."


@pytest.fixture
def cli(tmp_path: Path, model: ModelServer) -> Open:
    """Opens CLI processes on a session: ``async with cli(session, "continue") as conversation``."""
    home, cwd = tmp_path / "home", tmp_path / "work"
    home.mkdir()
    cwd.mkdir()

    @asynccontextmanager
    async def open_one(
        session: str, mode: SessionMode = "fresh", *, key: bool = False
    ) -> AsyncIterator[ProcessConversation]:
        credential = {"ANTHROPIC_API_KEY": DUMMY_KEY} if key else {"CLAUDE_CODE_OAUTH_TOKEN": "dummy-not-a-token"}
        # A login of a subscription might be looked up elsewhere than at the base URL: there is no way out.
        nowhere = {"HTTPS_PROXY": "http://127.0.0.1:9", "NO_PROXY": "127.0.0.1", "CLAUDE_CODE_MAX_RETRIES": "0"}
        extra = {"ANTHROPIC_BASE_URL": model.base_url, **credential, **nowhere}
        env = claude.environment({"PATH": "/usr/bin:/bin"}, home=home, pass_env=(), extra=extra)
        spec = Spec(
            cwd=cwd,
            env=env,
            session_id=session,
            session_mode=mode,
            model="claude-opus-5-5",
            tools=("Bash",),
            allowed_tools=("Bash",),
        )
        with anyio.fail_after(60):
            async with connect_process(
                spec, binary=bundled_cli(), dialect=claude, max_line_bytes=1 << 26
            ) as conversation:
                yield conversation

    return open_one


async def turn(conversation: Conversation, prompt: str, prompt_id: str) -> list[Message]:
    """What the CLI says to the prompt, up to its result, or until it is known that there will be none."""
    heard: list[Message] = []
    redelivery = Redelivery(prompt_id)
    await conversation.send(Turn(prompt, prompt_id))
    while True:
        heard.append(await conversation.receive())
        if isinstance(heard[-1], ResultMessage) or redelivery.swallowed(heard[-1]):
            return heard


async def go_on(conversation: Conversation, run_id: str, attempt: int) -> ResultMessage:
    """A parked run goes on: the prompt again, swallowed, then the word to continue."""
    again = await turn(conversation, PROMPT, prompt_uuid(run_id))
    assert not isinstance(again[-1], ResultMessage), again[-1]
    return result_of(await turn(conversation, CONTINUE_PROMPT, continue_uuid(run_id, attempt)))


def result_of(heard: list[Message]) -> ResultMessage:
    assert isinstance(heard[-1], ResultMessage), heard
    return heard[-1]


def limit_in(heard: list[Message]) -> UsageLimit | None:
    """The limit that ended the turn, read as the executor reads it."""
    events = [message for message in heard if isinstance(message, RateLimitEvent)]
    named = [message.error for message in heard if isinstance(message, AssistantMessage) and message.error]
    error = claude.error_of(result_of(heard), None, named[-1] if named else None)
    return usage_limit(error, events[-1] if events else None, account="a", now=NOW)


def said(request: Request) -> list[Any]:
    """The dialogue of a request: texts and tool results in order, reminders of the CLI left out."""
    return [
        block.get("text", "").strip() if block["type"] == "text" else (block["type"], block.get("content"))
        for message in request.body["messages"]
        if message["role"] in ("user", "assistant")
        for block in blocks(message["content"])
        if not block.get("text", "").lstrip().startswith("<system-reminder>") and block["type"] != "tool_use"
    ]


def blocks(content: Any) -> list[dict[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def new() -> str:
    return str(uuid.uuid4())


# -- how a limit is told ------------------------------------------------------------------------------------


async def test_a_subscription_is_told_when_its_window_ends(cli: Open, model: ModelServer) -> None:
    model.rules = [Rule(USED_UP)]
    async with cli(new()) as conversation:
        heard = await turn(conversation, PROMPT, new())
    assert limit_in(heard) == UsageLimit("a", RESET, "five_hour", "rate_limit_event")
    assert result_of(heard).api_error == "usage_limit_reached"
    assert len(model.journal) == 1, "it is not tried again"


async def test_without_a_window_nobody_is_told_the_end(cli: Open, model: ModelServer) -> None:
    """The CLI keeps retry-after to itself, and with a key the windows too."""
    model.rules = [Rule(Reply(fault=Fault(status=429, headers={"retry-after": 7200})))]
    async with cli(new()) as conversation:
        heard = await turn(conversation, PROMPT, new())
    [event] = [each.rate_limit_info for each in heard if isinstance(each, RateLimitEvent)]
    assert (event["status"], "resetsAt" in event) == ("rejected", False)
    assert limit_in(heard) == UsageLimit("a", None, "request_rate", "status")

    model.rules = [Rule(Reply(fault=Fault(status=429, headers=WINDOW | {"retry-after": 7200})))]
    async with cli(new(), key=True) as conversation:
        heard = await turn(conversation, PROMPT, new())
    assert not [each for each in heard if isinstance(each, RateLimitEvent)]
    assert limit_in(heard) == UsageLimit("a", None, "request_rate", "status")


async def test_what_does_not_end_the_turn_is_no_limit(cli: Open, model: ModelServer) -> None:
    model.rules = [Rule([Reply("fine", headers=WARNING), Reply("fine", headers=OVERAGE)])]
    async with cli(new()) as conversation:
        for status in ("allowed_warning", "rejected"):
            heard = await turn(conversation, PROMPT, new())
            [event] = [each.rate_limit_info for each in heard if isinstance(each, RateLimitEvent)]
            assert (event["status"], event["resetsAt"]) == (status, RESET)
            assert limit_in(heard) is None


# -- how a session goes on ----------------------------------------------------------------------------------


async def test_a_turn_refused_at_once_goes_on(cli: Open, model: ModelServer) -> None:
    model.rules = [Rule([USED_UP, "There are 12."])]
    session, run_id = new(), "0123456789abcdef"
    async with cli(session) as conversation:
        await turn(conversation, PROMPT, prompt_uuid(run_id))
    async with cli(session, "continue") as conversation:
        result = await go_on(conversation, run_id, 1)
    assert (result.is_error, result.result) == (False, "There are 12.")
    assert said(model.journal[-1]) == [PROMPT, CONTINUE_PROMPT]
    assert len(model.journal) == 2, "one turn for the prompt, whoever sent it again"


async def test_a_turn_refused_midway_keeps_what_its_tools_gave(
    cli: Open, model: ModelServer, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    model.rules = [
        Rule([ToolUse("Bash", {"command": f"echo {n} >> {log}; echo result {n}"}) for n in (1, 2)], times=2),
        Rule([USED_UP, USED_UP, "There are 12."]),
    ]
    session, run_id = new(), "0123456789abcdef"
    async with cli(session) as conversation:
        refused = await turn(conversation, PROMPT, prompt_uuid(run_id))
    assert limit_in(refused) is not None
    results = [("tool_result", "result 1"), ("tool_result", "result 2")]

    async with cli(session, "continue") as conversation:
        again = await go_on(conversation, run_id, 1)
    assert isinstance(claude.error_of(again, None, None), RateLimitError)
    assert said(model.journal[-1]) == [PROMPT, *results, CONTINUE_PROMPT]

    async with cli(session, "continue") as conversation:
        result = await go_on(conversation, run_id, 2)
        assert (result.is_error, result.result) == (False, "There are 12.")
        assert said(model.journal[-1]) == [PROMPT, *results, CONTINUE_PROMPT, CONTINUE_PROMPT]
        assert log.read_text().split() == ["1", "2"], "no tool ran twice"

    asked = len(model.journal)
    async with cli(session, "continue") as conversation:
        for prompt, prompt_id in [(PROMPT, prompt_uuid(run_id)), (CONTINUE_PROMPT, continue_uuid(run_id, 2))]:
            heard = await turn(conversation, prompt, prompt_id)
            assert not isinstance(heard[-1], ResultMessage), "what was answered is not answered again"
    assert len(model.journal) == asked


async def test_a_killed_process_leaves_the_refused_prompt(cli: Open, model: ModelServer) -> None:
    model.rules = [Rule([USED_UP, "There are 12."])]
    session, run_id = new(), "0123456789abcdef"
    async with cli(session) as conversation:
        await turn(conversation, PROMPT, prompt_uuid(run_id))
        conversation._process.kill()
    async with cli(session, "continue") as conversation:
        result = await go_on(conversation, run_id, 1)
    assert result.result == "There are 12."
    assert said(model.journal[-1]) == [PROMPT, CONTINUE_PROMPT]


async def test_a_session_that_lost_the_prompt_answers_it(cli: Open, model: ModelServer) -> None:
    model.rules = [Rule("ok")]
    session, run_id = new(), "0123456789abcdef"
    async with cli(session) as conversation:
        await turn(conversation, "Hello.", new())
    async with cli(session, "continue") as conversation:
        heard = await turn(conversation, PROMPT, prompt_uuid(run_id))
    assert result_of(heard).result == "ok"
    assert said(model.journal[-1]) == ["Hello.", "ok", PROMPT]


async def test_a_session_that_is_gone_is_an_error(cli: Open, model: ModelServer) -> None:
    async with cli(new(), "continue") as conversation:
        heard = await turn(conversation, PROMPT, new())
    assert isinstance(claude.error_of(result_of(heard), None, None), SessionNotFoundError)
    assert not model.journal


async def test_under_another_uuid_the_prompt_would_be_there_twice(cli: Open, model: ModelServer) -> None:
    """Why a prompt is sent again under the uuid it had."""
    model.rules = [Rule([USED_UP, "There are 12."])]
    session = new()
    async with cli(session) as conversation:
        await turn(conversation, PROMPT, new())
    async with cli(session, "continue") as conversation:
        await turn(conversation, PROMPT, new())
    assert said(model.journal[-1]) == [PROMPT, PROMPT]
