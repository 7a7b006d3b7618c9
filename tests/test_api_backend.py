"""The API path that may stand in for the CLI: real requests of the real SDK to the scripted model server."""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio.abc import SocketAttribute

from orchestrator.agent_files import read_agent
from orchestrator.backends.api import ApiConversation, connect_api, installed, open_fallback
from orchestrator.backends.api_errors import error_of_answer, retry_after
from orchestrator.backends.api_fallback import api_model, why_not_fall_back
from orchestrator.backends.api_http import certificates, proxy
from orchestrator.config import Config, FallbackConfig
from orchestrator.conversation import McpEndpoint, Spec, Turn
from orchestrator.errors import (
    AuthenticationError,
    BackendError,
    BillingError,
    CircuitOpenError,
    CLIExitError,
    CLINotFoundError,
    CLIStartError,
    ConfigError,
    ConnectionFailedError,
    InvalidRequestError,
    ModelNotFoundError,
    OrchestratorError,
    OverloadedError,
    PermissionDeniedError,
    RateLimitError,
    RefusalError,
    RunTimeoutError,
    ServerError,
    StalledError,
)
from orchestrator.messages import (
    AssistantMessage,
    Message,
    ResultMessage,
    StreamEvent,
    SystemInit,
    UnknownMessage,
    UnknownSystemMessage,
    collect_text,
    collect_thinking,
)
from orchestrator.pricing import estimate_usd
from orchestrator.progress import Progress
from orchestrator.specs import split_tools
from orchestrator.testing import Fault, ModelServer, Reply, Request, Rule, Text, Thinking, Usage

KEY = "sk-ant-test-loopback"
MODEL = "claude-opus-5-5"
SESSION = "5e55105e-0000-4000-8000-000000000001"

Connect = Callable[..., AbstractAsyncContextManager[ApiConversation]]


@pytest.fixture
def spec(tmp_path: Path) -> Spec:
    """A task that needs no tools."""
    return Spec(cwd=tmp_path, env={"ANTHROPIC_API_KEY": KEY}, session_id=SESSION, model=MODEL, tools=())


@pytest.fixture
def connect(spec: Spec, model: ModelServer) -> Connect:
    """Opens conversations with the scripted model; keyword arguments are fields of the spec or settings."""

    def open_one(*, base_url: str | None = None, **more: Any) -> AbstractAsyncContextManager[ApiConversation]:
        settings = {
            "models": more.pop("models", {}),
            "max_tokens": more.pop("max_tokens", 1000),
            "timeout_s": more.pop("timeout_s", 30),
            "api_key": more.pop("api_key", KEY),
        }
        return connect_api(replace(spec, **more), base_url=base_url or model.base_url, **settings)

    return open_one


def turn(prompt: str, uuid: str = "u1", **more: Any) -> Turn:
    return Turn(prompt=prompt, uuid=uuid, **more)


async def rest(conversation: ApiConversation) -> list[Message]:
    """The messages up to the result."""
    messages: list[Message] = []
    with anyio.fail_after(30):
        while not messages or not isinstance(messages[-1], ResultMessage):
            messages.append(await conversation.receive())
    return messages


async def ask(conversation: ApiConversation, prompt: str) -> list[Message]:
    await conversation.send(turn(prompt))
    return await rest(conversation)


async def until_error(conversation: ApiConversation) -> tuple[list[Message], OrchestratorError]:
    """The messages before the error, and the error."""
    messages: list[Message] = []
    with anyio.fail_after(30):
        while True:
            try:
                messages.append(await conversation.receive())
            except OrchestratorError as error:
                return messages, error


def result_of(messages: list[Message]) -> ResultMessage:
    assert isinstance(messages[-1], ResultMessage)
    return messages[-1]


def fed(messages: list[Message]) -> Progress:
    progress = Progress()
    for message in messages:
        progress.feed(message)
    return progress


# --- An answer


async def test_an_answer_comes_as_the_clis_messages(model: ModelServer, connect: Connect, tmp_path: Path) -> None:
    model.rules = [Rule(Reply(["What is said first. ", Text("And then.")], chunks=3))]
    async with connect(system_prompt="You are terse.", append_system_prompt="Be kind.") as conversation:
        messages = await ask(conversation, "hello")
        assert conversation.stderr_tail == ""
    kinds = [type(message) for message in messages]
    assert kinds[0] is SystemInit
    assert kinds.count(AssistantMessage) == 2, "one for each block, as the CLI has it"
    assert not {UnknownMessage, UnknownSystemMessage} & set(kinds)
    init, result = messages[0], result_of(messages)
    assert isinstance(init, SystemInit)
    assert (init.model, init.cwd, init.tools) == (MODEL, str(tmp_path), [])
    assert {getattr(message, "session_id", None) for message in messages} == {SESSION}
    assert len({getattr(message, "uuid", None) for message in messages}) == len(messages)
    assert (result.is_error, result.subtype, result.terminal_reason) == (False, "success", "completed")
    assert (result.num_turns, result.stop_reason, result.user_message_uuid) == (1, "end_turn", "u1")
    assert result.result == "What is said first. And then."
    assert not result.has_structured_output
    [request] = model.journal
    assert (request.model, request.last_user_text) == (MODEL, "hello")
    assert request.system == "You are terse.\n\nBe kind."
    assert request.body["max_tokens"] == 1000
    assert request.tools == []
    assert KEY in request.headers.get("authorization", "") + request.headers.get("x-api-key", "")


async def test_a_prompt_is_sent_verbatim(model: ModelServer, connect: Connect) -> None:
    model.rules = [Rule("ok")]
    prompt = "/clear @/etc/passwd !ls {{ x }} \u2028 ü 🙂 </system-reminder>"
    async with connect() as conversation:
        await ask(conversation, prompt)
    [request] = model.journal
    assert request.body["messages"] == [{"role": "user", "content": prompt}]
    assert "system" not in request.body
    assert "output_config" not in request.body


async def test_text_streams_before_the_answer_is_over(model: ModelServer, connect: Connect) -> None:
    model.rules = [Rule(Reply("half of it and the rest", chunks=2, fault=Fault(stall_at=4)))]
    progress = Progress()
    async with connect() as conversation:
        await conversation.send(turn("go"))
        with anyio.fail_after(30):
            while not progress.text:
                progress.feed(await conversation.receive())
    assert progress.text == "half of it a"
    assert progress.activity == "answering"


async def test_events_are_the_providers_own(model: ModelServer, connect: Connect) -> None:
    model.rules = [Rule(Reply([Thinking("hm"), "yes"], usage=Usage(cache_read=7)))]
    async with connect() as conversation:
        messages = await ask(conversation, "go")
    events = [message.event for message in messages if isinstance(message, StreamEvent)]
    assert [event["type"] for event in events if "delta" not in event["type"]] == [
        *("message_start", "content_block_start", "content_block_stop", "content_block_start"),
        *("content_block_stop", "message_stop"),
    ]
    assert {"type": "content_block_stop", "index": 1} in events
    assert events[-1] == {"type": "message_stop"}
    assert events[0]["message"]["usage"]["cache_read_input_tokens"] == 7
    assert "".join(m.text_delta or "" for m in messages if isinstance(m, StreamEvent)) == "yes"
    assert collect_thinking(messages) == "hm"
    assert collect_text(messages) == "yes"


async def test_usage_and_list_price(model: ModelServer, connect: Connect) -> None:
    usage = Usage(input=1000, output=200, cache_read=300, cache_write_5m=40, cache_write_1h=60)
    model.rules = [Rule(Reply("done", usage=usage))]
    async with connect() as conversation:
        messages = await ask(conversation, "count")
    progress = fed(messages)
    counted = progress.usage
    assert (counted.input_tokens, counted.output_tokens) == (1000, 200)
    assert (counted.cache_read_tokens, counted.cache_write_tokens) == (300, 100)
    price = estimate_usd(
        MODEL,
        {
            "input_tokens": 1000,
            "output_tokens": 200,
            "cache_read_input_tokens": 300,
            "cache_creation_input_tokens": 100,
            "cache_creation": {"ephemeral_5m_input_tokens": 40, "ephemeral_1h_input_tokens": 60},
        },
    )
    assert price is not None
    assert price > 0
    assert result_of(messages).turn_cost_usd == pytest.approx(price)
    assert progress.cost_usd == pytest.approx(price)
    assert (progress.num_turns, progress.model, progress.text) == (1, MODEL, "done")
    [spent] = (result_of(messages).model_usage_since_last_result or {}).values()
    assert spent.cost_basis == "list"


async def test_an_unknown_price_stays_unknown(model: ModelServer, connect: Connect) -> None:
    model.rules = [Rule("done")]
    async with connect(model="house", models={"house": "no-such-model-9"}) as conversation:
        messages = await ask(conversation, "count")
    assert model.journal[0].model == "no-such-model-9"
    assert result_of(messages).turn_cost_usd is None
    progress = fed(messages)
    assert progress.cost_usd is None
    assert progress.unpriced
    assert progress.usage.total_tokens == 105


async def test_a_second_prompt_knows_the_first(model: ModelServer, connect: Connect) -> None:
    model.rules = [Rule("blue", when={"user": "colour"}), Rule("it was blue", when={"history": "blue"})]
    async with connect(models={"opus": "claude-opus-5-5", "small": "claude-haiku-5-5"}) as conversation:
        first = await ask(conversation, "name a colour")
        await conversation.send(turn("which was it?", "u2", model="small"))
        second = await rest(conversation)
        with pytest.raises(ConfigError, match=r"fallback\.models has no entry 'medium'"):
            await conversation.send(turn("and now?", "u3", model="medium"))
    assert result_of(second).result == "it was blue"
    assert [result_of(first).result_index, result_of(second).result_index] == [0, 1]
    assert [request.model for request in model.journal] == [MODEL, "claude-haiku-5-5"]


async def test_effort_goes_along(model: ModelServer, connect: Connect) -> None:
    model.rules = [Rule("ok")]
    async with connect(effort="low") as conversation:
        await ask(conversation, "go")
    assert model.journal[0].body["output_config"] == {"effort": "low"}


async def test_the_environment_is_the_clis_and_not_ours(
    model: ModelServer, spec: Spec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-ant-of-the-shell")
    monkeypatch.setenv("ANTHROPIC_BASE_URL", "http://127.0.0.1:9/of-the-shell")
    monkeypatch.setenv("ANTHROPIC_CUSTOM_HEADERS", "x-leak: of-the-shell\nAuthorization: of-the-shell")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    model.rules = [Rule("ok")]
    headers = "x-gateway: one\nno header\nX-Team:  two"
    env = {**spec.env, "ANTHROPIC_BASE_URL": model.base_url, "ANTHROPIC_CUSTOM_HEADERS": headers}
    settings = FallbackConfig(enabled=True, max_tokens=77)
    async with open_fallback(replace(spec, env=env), settings) as conversation:
        await conversation.send(turn("go"))
        with anyio.fail_after(30):
            while not isinstance(await conversation.receive(), ResultMessage):
                pass
    [request] = model.journal
    assert request.body["max_tokens"] == 77
    assert (request.headers["x-gateway"], request.headers["x-team"]) == ("one", "two")
    assert KEY in request.headers["authorization"]
    assert "of-the-shell" not in json.dumps(dict(request.headers))


# --- Structured output

SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 3}, "tags": {"type": "array", "items": {"type": "string"}}},
    "required": ["n"],
}


@pytest.mark.parametrize(
    ("said", "structured"),
    [('{"n": 3, "tags": []}', {"n": 3, "tags": []}), ('{"n": 2}', None), ("no JSON", None), ('{"tags": []}', None)],
)
async def test_structured_output_is_checked_against_the_schema(
    model: ModelServer, connect: Connect, said: str, structured: dict[str, Any] | None
) -> None:
    model.rules = [Rule(lambda request: Reply(said))]
    async with connect(output_schema=SCHEMA) as conversation:
        result = result_of(await ask(conversation, "how many?"))
    assert result.has_structured_output == (structured is not None)
    assert result.structured_output == structured
    asked = model.journal[0].body["output_config"]["format"]
    assert asked["type"] == "json_schema"
    assert asked["schema"]["additionalProperties"] is False, "the provider takes no open objects"
    assert asked["schema"]["properties"]["n"]["type"] == "integer"


async def test_null_is_an_answer(model: ModelServer, connect: Connect) -> None:
    model.rules = [Rule("null")]
    schema = {"anyOf": [{"type": "null"}, {"type": "string"}]}
    async with connect(output_schema=schema) as conversation:
        result = result_of(await ask(conversation, "nothing?"))
    assert result.has_structured_output
    assert result.structured_output is None


# --- Failures


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, InvalidRequestError),
        (401, AuthenticationError),
        (402, BillingError),
        (403, PermissionDeniedError),
        (404, ModelNotFoundError),
        (413, InvalidRequestError),
        (429, RateLimitError),
        (500, ServerError),
        (504, ServerError),
        (529, OverloadedError),
    ],
)
async def test_refused_requests(
    model: ModelServer, connect: Connect, status: int, kind: type[BackendError]
) -> None:
    fault = Fault(status=status, message="in the provider's words", headers={"retry-after": "17"})
    model.rules = [Rule(Reply(fault=fault))]
    async with connect() as conversation:
        await conversation.send(turn("go"))
        messages, error = await until_error(conversation)
        again = (await until_error(conversation))[1]
    assert type(error) is kind
    assert "in the provider's words" in error.message
    assert error.details["status"] == status
    assert error.retry_after == (17 if error.retryable else None)
    assert again is error, "the error stays until the next prompt"
    assert messages == [], "nothing was begun, so nothing was spent"
    assert len(model.journal) == 1, "one request, whatever the SDK thinks of retries"
    assert KEY not in json.dumps(error.to_dict())


@pytest.mark.parametrize(
    ("error_type", "names"), [("authentication_error", "claude.env"), ("not_found_error", "fallback.models")]
)
def test_advice_names_the_settings_of_this_path(error_type: str, names: str) -> None:
    assert names in error_of_answer(400, error_type, "x", {}, now=0).advice


@pytest.mark.parametrize(
    ("status", "error_type", "words", "kind"),
    [
        (404, None, "<html>no such page</html>", InvalidRequestError),
        (302, None, "moved", InvalidRequestError),
        (418, "teapot_error", "x", InvalidRequestError),
        (502, None, "bad gateway", ServerError),
        (408, None, "slow", ConnectionFailedError),
        (409, None, "conflict", ServerError),
        (200, "overloaded_error", "within a stream", OverloadedError),
        (400, "invalid_request_error", "Your credit balance is too low to use the API", BillingError),
    ],
)
def test_answers_without_the_usual_names(
    status: int, error_type: str | None, words: str, kind: type[BackendError]
) -> None:
    assert type(error_of_answer(status, error_type, words, {}, now=0)) is kind


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, None),
        ("3", 3.0),
        ("0.5", 0.5),
        ("-4", 0.0),
        ("Thu, 01 Jan 1970 00:01:40 GMT", 40.0),
        ("Thu, 01 Jan 1970 00:00:10 GMT", 0.0),
        ("soon", None),
        ("nan", None),
        ("inf", None),
        ("", None),
    ],
)
def test_retry_after(header: str | None, seconds: float | None) -> None:
    assert retry_after(header, now=60.0) == seconds


async def test_a_refused_connection(connect: Connect) -> None:
    async with await anyio.create_tcp_listener(local_host="127.0.0.1", local_port=0) as listener:
        port = listener.extra(SocketAttribute.local_port)
    async with connect(base_url=f"http://127.0.0.1:{port}") as conversation:
        await conversation.send(turn("go"))
        messages, error = await until_error(conversation)
    assert type(error) is ConnectionFailedError
    assert error.retryable
    assert messages == []


async def test_an_address_that_is_none(connect: Connect) -> None:
    async with connect(base_url="gateway.example") as conversation:
        await conversation.send(turn("go"))
        assert type((await until_error(conversation))[1]) is ConnectionFailedError


@pytest.mark.parametrize("stall_at", [0, 3])
async def test_a_stall(model: ModelServer, connect: Connect, stall_at: int) -> None:
    model.rules = [Rule(Reply("never said", fault=Fault(stall_at=stall_at)))]
    async with connect(timeout_s=0.3) as conversation:
        await conversation.send(turn("go"))
        messages, error = await until_error(conversation)
    assert type(error) is StalledError
    assert "fallback.timeout_s" in error.advice
    assert isinstance(messages[0], SystemInit), "the model may have worked on it: its cost is not known to be none"
    assert len(model.journal) == 1


async def test_a_silence_before_the_answers_head(model: ModelServer, connect: Connect) -> None:
    model.rules = [Rule(Reply("late", delay_s=60))]
    async with connect(timeout_s=0.3) as conversation:
        await conversation.send(turn("go"))
        messages, error = await until_error(conversation)
    assert type(error) is StalledError
    assert [type(message) for message in messages] == [SystemInit]
    assert len(model.journal) == 1


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (Fault(truncate_at=4), ConnectionFailedError),
        (Fault(reset_at=4), ConnectionFailedError),
        (Fault(error_at=4, error_type="overloaded_error"), OverloadedError),
        (Fault(malformed_at=4), ServerError),
    ],
)
async def test_an_answer_that_breaks_off_is_not_asked_for_again(
    model: ModelServer, connect: Connect, fault: Fault, kind: type[BackendError]
) -> None:
    model.rules = [Rule(Reply("half of it", chunks=2, fault=fault))]
    async with connect() as conversation:
        await conversation.send(turn("go"))
        messages, error = await until_error(conversation)
    assert type(error) is kind
    progress = fed(messages)
    progress.cut_short()
    assert progress.text == "half "
    assert progress.usage.input_tokens == 100
    assert isinstance(messages[-1], AssistantMessage)
    assert messages[-1].aborted
    assert len(model.journal) == 1


async def test_a_reset_before_the_head(model: ModelServer, connect: Connect) -> None:
    model.rules = [Rule(Reply("x", fault=Fault(reset_at=0)))]
    async with connect() as conversation:
        await conversation.send(turn("go"))
        messages, error = await until_error(conversation)
    assert type(error) is ConnectionFailedError
    assert [type(message) for message in messages] == [SystemInit]
    assert len(model.journal) == 1


@pytest.mark.parametrize(
    "body",
    [
        "<html>a login page</html>",
        "",
        'event: message_stop\ndata: {"type": "message_stop"}\n\n',
        'event: message_start\ndata: {"type": "message_start"}\n\n',
        'event: message_start\ndata: {"type": "message_start", "message": {"usage": 7, "content": []}}\n\n'
        'event: content_block_start\ndata: {"type": "content_block_start", "index": 3}\n\n',
    ],
)
async def test_what_is_no_answer_is_an_error(model: ModelServer, connect: Connect, body: str) -> None:
    model.rules = [Rule(lambda request: Reply(fault=Fault(body=body, content_type="text/event-stream")))]
    async with connect() as conversation:
        await conversation.send(turn("go"))
        error = (await until_error(conversation))[1]
        assert type(error) in (ServerError, ConnectionFailedError)
        model.rules = [Rule("fine")]
        assert result_of(await ask(conversation, "again")).result == "fine", "a new prompt is a new start"


@pytest.mark.parametrize(
    ("stop_reason", "kind"),
    [
        ("max_tokens", InvalidRequestError),
        ("model_context_window_exceeded", InvalidRequestError),
        ("refusal", RefusalError),
    ],
)
async def test_an_answer_that_is_none(
    model: ModelServer, connect: Connect, stop_reason: str, kind: type[BackendError]
) -> None:
    model.rules = [Rule(Reply("as far as it went", stop_reason=stop_reason))]
    async with connect() as conversation:
        await conversation.send(turn("go"))
        messages, error = await until_error(conversation)
    assert type(error) is kind
    progress = fed(messages)
    assert progress.text == "as far as it went"
    assert progress.cost_usd, "it was paid for"
    if stop_reason == "max_tokens":
        assert "fallback.max_tokens" in error.advice


# --- Interrupts and cancels


async def test_an_interrupt_ends_the_turn_with_what_was_said(model: ModelServer, connect: Connect) -> None:
    model.rules = [Rule(Reply("one two", chunks=2, fault=Fault(stall_at=4)), times=1), Rule("three")]
    async with connect() as conversation:
        await conversation.send(turn("go"))
        progress = Progress()
        with anyio.fail_after(30):
            while not progress.text:
                progress.feed(await conversation.receive())
        await conversation.interrupt()
        messages = await rest(conversation)
        result = result_of(messages)
        assert (result.subtype, result.terminal_reason) == ("error_during_execution", "aborted_streaming")
        assert result.is_error
        assert collect_text(messages) == "one "
        for message in messages:
            progress.feed(message)
        assert progress.usage.input_tokens == 100
        assert progress.cost_usd
        await conversation.interrupt()  # nothing is under way: a no-op
        after = await ask(conversation, "and now?")
    assert result_of(after).result == "three"
    assert len(model.journal[-1].body["messages"]) == 1, "what was cut is not part of the history"


async def test_an_interrupt_before_any_answer(model: ModelServer, connect: Connect) -> None:
    arrived = anyio.Event()

    async def never(request: Request) -> Reply:
        arrived.set()
        await anyio.sleep_forever()
        raise AssertionError

    model.rules = [Rule(never)]
    async with connect() as conversation:
        await conversation.send(turn("go"))
        with anyio.fail_after(30):
            await arrived.wait()
        await conversation.interrupt()
        messages = await rest(conversation)
    assert [type(message) for message in messages] == [SystemInit, ResultMessage]
    assert result_of(messages).terminal_reason == "aborted_streaming"
    progress = fed(messages)
    assert progress.cost_usd is None, "what it cost is not known"


async def test_a_cancelled_receive_loses_nothing(model: ModelServer, connect: Connect) -> None:
    release = anyio.Event()

    async def held(request: Request) -> Reply:
        await release.wait()
        return Reply("all of it", chunk_size=1)

    model.rules = [Rule(held)]
    async with connect() as conversation:
        await conversation.send(turn("go"))
        with anyio.move_on_after(0.05) as scope:
            await conversation.receive()
        assert scope.cancelled_caught
        release.set()
        messages: list[Message] = []
        with anyio.fail_after(30):
            while not messages or not isinstance(messages[-1], ResultMessage):
                with anyio.move_on_after(0.001):
                    messages.append(await conversation.receive())
    events = [message for message in messages if isinstance(message, StreamEvent)]
    assert "".join(event.text_delta or "" for event in events) == "all of it"
    assert isinstance(messages[0], SystemInit)
    assert result_of(messages).result == "all of it"


async def test_leaving_ends_the_request(model: ModelServer, connect: Connect) -> None:
    model.rules = [Rule(Reply("endless", fault=Fault(stall_at=3)))]
    with anyio.fail_after(30):
        async with connect() as conversation:
            await conversation.send(turn("go"))
            await conversation.receive()
    assert len(model.journal) == 1


async def test_an_error_of_the_caller_comes_out_as_itself(model: ModelServer, connect: Connect) -> None:
    model.rules = [Rule(Reply("endless", fault=Fault(stall_at=3)))]

    async def go_wrong() -> None:
        async with connect() as conversation:
            await conversation.send(turn("go"))
            await conversation.receive()
            raise KeyError("mine")

    with anyio.fail_after(30), pytest.raises(KeyError, match="mine"):
        await go_wrong()


# --- What the API path refuses


@pytest.mark.parametrize("key", ["", "sk ant", "sk-ant\n", "schlüssel"])
async def test_a_key_that_is_none_is_not_told(connect: Connect, key: str) -> None:
    with pytest.raises(ConfigError, match="ANTHROPIC_API_KEY") as caught:
        async with connect(api_key=key):
            pass
    assert not key or key not in json.dumps(caught.value.to_dict(), ensure_ascii=False)


LACKING: dict[str, tuple[dict[str, Any], str]] = {
    "default tools": ({"tools": None}, "default tools"),
    "a tool": ({"tools": ("Read",)}, "tools or MCP"),
    "a granted tool": ({"allowed_tools": ("mcp__x__y",)}, "tools or MCP"),
    "our own server": ({"mcp": (McpEndpoint("orchestrator", "http://127.0.0.1:1", "T"),)}, "tools or MCP"),
    "an MCP server": ({"mcp_servers": {"x": {"command": "x"}}}, "tools or MCP"),
    "a session": ({"session_mode": "continue"}, "session"),
    "a fork": ({"session_mode": "fork", "source_session_id": SESSION}, "session"),
    "settings": ({"settings": {"env": {"A": "b"}}}, "settings"),
    "an alias": ({"model": "opus"}, "'opus' is not a model id"),
    "a marked model": ({"model": "claude-opus-5-5[1m]"}, "is not a model id"),
    "no model": ({"model": None}, "names no model"),
    "an open object": ({"output_schema": {"type": "object"}}, "the top: an object whose keys"),
    "a mapping": (
        {"output_schema": {"type": "object", "properties": {"m": {"type": "object", "additionalProperties": {}}}}},
        "/m: an object whose keys",
    ),
    "any value": ({"output_schema": {"type": "array", "items": {}}}, "/items: it has no type"),
    "several types": ({"output_schema": {"type": ["string", "null"]}}, "its type is"),
    "a variant": ({"output_schema": {"anyOf": [{"type": "null"}, {}]}}, "/anyOf/1: it has no type"),
    "a definition": ({"output_schema": {"$ref": "#/$defs/a", "$defs": {"a": {}}}}, "/\\$defs/a: it has no type"),
    "anything": ({"output_schema": {"type": "array"}}, "/items: anything is allowed"),
}


@pytest.mark.parametrize(("change", "why"), LACKING.values(), ids=LACKING.keys())
async def test_what_needs_the_cli_is_refused(
    model: ModelServer, spec: Spec, connect: Connect, change: dict[str, Any], why: str
) -> None:
    reason = decide(CLINotFoundError("x"), replace(spec, **change))
    assert reason is not None
    with pytest.raises(ConfigError, match=why) as caught:
        async with connect(**change):
            pass
    assert reason in caught.value.message, "the decision and the connection judge alike"
    assert model.journal == []


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("opus", "claude-opus-5-5"),
        ("claude-haiku-5-5", "claude-haiku-5-5"),
        ("claude-mapped", "other"),
        (None, "claude-sonnet-5-5"),
        ("default", "claude-sonnet-5-5"),
        ("sonnet", None),
        ("opus[1m]", None),
        ("", "claude-sonnet-5-5"),
    ],
)
def test_model_ids_come_from_the_settings(name: str | None, expected: str | None) -> None:
    models = {"opus": "claude-opus-5-5", "claude-mapped": "other", "default": "claude-sonnet-5-5"}
    assert api_model(name, models) == expected


# --- Whether to fall back


def decide(error: OrchestratorError, spec: Spec, *, heard: bool = False, there: bool = True, **more: Any) -> Any:
    settings = FallbackConfig(**{"enabled": True, **more})
    return why_not_fall_back(error, spec, settings, heard=heard, installed=there)


def test_it_is_off_by_default(spec: Spec) -> None:
    reason = why_not_fall_back(CLINotFoundError("x"), spec, Config().fallback, heard=False, installed=True)
    assert reason == "fallback.enabled is false"


COVERED = [CLINotFoundError("x"), CLIStartError("x"), CLIExitError("x"), CircuitOpenError("x")]


@pytest.mark.parametrize("error", COVERED, ids=lambda error: error.code)
def test_failures_that_are_covered(spec: Spec, error: OrchestratorError) -> None:
    assert decide(error, spec) is None
    assert decide(error, spec, heard=True) == "the CLI had already begun"
    off = "on_circuit_open" if isinstance(error, CircuitOpenError) else "on_cli_unavailable"
    assert error.code in decide(error, spec, **{off: False})


IDLE = RunTimeoutError("x", details={"kind": "idle"})


@pytest.mark.parametrize("error", [IDLE, StalledError("x")], ids=lambda error: error.code)
def test_time_outs_are_covered_on_request(spec: Spec, error: OrchestratorError) -> None:
    assert error.code in decide(error, spec)
    assert decide(error, spec, on_timeout=True) is None


UNCOVERED = [
    RunTimeoutError("the run's own time is over", details={"kind": "wall"}),
    CLIStartError("too large a prompt", scope="agent"),
    AuthenticationError("x"),
    RateLimitError("x"),
    OverloadedError("x"),
    ConnectionFailedError("x"),
    BackendError("x"),
    ConfigError("x"),
]


@pytest.mark.parametrize("error", UNCOVERED, ids=lambda error: error.code)
def test_other_failures_are_not_covered(spec: Spec, error: OrchestratorError) -> None:
    assert error.code in decide(error, spec, on_timeout=True)


@pytest.mark.parametrize("env", [{}, {"ANTHROPIC_API_KEY": ""}, {"ANTHROPIC_AUTH_TOKEN": "x"}])
def test_without_a_key_there_is_no_fallback(spec: Spec, env: Mapping[str, str]) -> None:
    assert "ANTHROPIC_API_KEY" in decide(CLINotFoundError("x"), replace(spec, env=env))


def test_without_the_extra_there_is_no_fallback(spec: Spec) -> None:
    assert "orchestrator-mcp[api]" in decide(CLINotFoundError("x"), spec, there=False)


@pytest.mark.parametrize(("tools", "may"), [("tools: []", True), ("tools: [Read]", False), ("model: opus", False)])
def test_which_agent_files_need_no_tools(tmp_path: Path, spec: Spec, tools: str, may: bool) -> None:
    path = tmp_path / "a.md"
    path.write_text(f"---\nname: a\ndescription: An agent\n{tools}\n---\nYou help.\n")
    offered, rules = split_tools(read_agent(path, source="project").tools)
    reason = decide(CLINotFoundError("x"), replace(spec, tools=offered, allowed_tools=rules))
    assert (reason is None) == may


# --- The way to the provider


@pytest.mark.parametrize(
    ("env", "url", "through"),
    [
        ({}, "https://api.example", None),
        ({"https_proxy": "http://p:1"}, "https://api.example", "http://p:1"),
        ({"HTTPS_PROXY": "http://p:1"}, "http://api.example", None),
        ({"ALL_PROXY": "http://p:2"}, "https://api.example", "http://p:2"),
        ({"HTTPS_PROXY": "http://p:1", "NO_PROXY": "example"}, "https://api.example", None),
        ({"http_proxy": "http://p:1", "no_proxy": "127.0.0.1,::1"}, "http://127.0.0.1:80", None),
    ],
)
def test_proxies_are_those_of_the_environment(env: dict[str, str], url: str, through: str | None) -> None:
    import httpx2

    assert proxy(env, httpx2.URL(url)) == through


async def test_a_proxy_is_used(model: ModelServer, connect: Connect) -> None:
    env = {"ANTHROPIC_API_KEY": KEY, "HTTP_PROXY": model.base_url}
    async with connect(base_url="http://provider.invalid", env=env) as conversation:
        await conversation.send(turn("go"))
        error = (await until_error(conversation))[1]
    assert "POST http://provider.invalid/v1/messages" in error.message, "the words of what stands in for the proxy"


def test_certificates(tmp_path: Path) -> None:
    assert certificates({}) is True
    broken = tmp_path / "ca.pem"
    broken.write_text("no certificate")
    with pytest.raises(ConfigError, match="NODE_EXTRA_CA_CERTS"):
        certificates({"NODE_EXTRA_CA_CERTS": str(broken)})
    with pytest.raises(ConfigError, match="SSL_CERT_FILE"):
        certificates({"SSL_CERT_FILE": str(tmp_path / "missing.pem")})


def test_the_sdk_is_not_loaded_before_it_is_needed() -> None:
    assert installed()
    code = (
        "import sys, orchestrator, orchestrator.runtime, orchestrator.delegation\n"
        "from orchestrator.backends import api\n"
        "assert api.installed()\n"
        "print(*[m for m in ('anthropic', 'httpx2', 'jsonschema') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert "anthropic" not in done.stdout.split()
